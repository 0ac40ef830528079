// SPDX-License-Identifier: Apache-2.0
//! Kernels of a few bytes that do with SNP pages what Linux never does, for booting through stage0 on the
//! emulated platform.
//!
//! Each is an ELF file with one section of code, which the platform searches for SNP instructions as it does
//! with Linux, and with the GUID of the table of unaccepted memory in it, so that stage0 leaves most of
//! memory to it. It runs on stage0's page tables: 4 GiB private, the same memory shared at 512 GiB. It has no
//! interrupt table: any exception is a triple fault.

use test_support::code::PVALIDATE;
use test_support::code::RMPADJUST;
use test_support::code::VMGEXIT;
use test_support::code::power_off;
use test_support::elf::Segment;
use test_support::elf::executable;
use test_support::kernels::UNACCEPTED;

/// Physical address of the code, in memory that stage0 validates.
const LOAD: u64 = 16 << 20;
/// Where stage0's page tables show the shared view.
const SHARED_VIEW: u64 = 1 << 39;
/// Code under construction. Addresses are below 4 GiB.
#[derive(Clone, Default)]
pub struct Code(Vec<u8>);

impl Code {
    /// None yet.
    pub fn new() -> Self {
        Code::default()
    }

    fn then(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn load(self, opcode: u8, value: u32) -> Self {
        self.then(&[opcode]).then(&value.to_le_bytes())
    }

    /// Writes a byte to the private view of `address`.
    pub fn write(self, address: u32) -> Self {
        // mov eax, address; mov byte [rax], 1
        self.load(0xb8, address).then(&[0xc6, 0x00, 0x01])
    }

    /// Reads a byte from the private view of `address`.
    pub fn read(self, address: u32) -> Self {
        // mov eax, address; mov al, [rax]
        self.load(0xb8, address).then(&[0x8a, 0x00])
    }

    /// Writes a byte to the shared view of `address`.
    pub fn write_shared(self, address: u32) -> Self {
        // mov rax, imm64; mov byte [rax], 1
        let target = SHARED_VIEW + u64::from(address);
        self.then(&[0x48, 0xb8]).then(&target.to_le_bytes()).then(&[0xc6, 0x00, 0x01])
    }

    /// Executes what is at `address`.
    pub fn jump(self, address: u32) -> Self {
        // mov eax, address; jmp rax
        self.load(0xb8, address).then(&[0xff, 0xe0])
    }

    /// `PVALIDATE` of one page, and a digit for the console: 0, or 1 if the page was in that state already.
    pub fn pvalidate(self, address: u32, large: bool, validate: bool) -> Self {
        // mov eax, address; mov ecx, large; mov edx, validate; PVALIDATE; setc al; add al, '0'; out to the
        // console
        self.load(0xb8, address)
            .load(0xb9, large.into())
            .load(0xba, validate.into())
            .then(&PVALIDATE)
            .then(&[0x0f, 0x92, 0xc0, 0x04, b'0'])
            .console()
    }

    /// Page-state change of one page by the MSR protocol (GHCB specification, 2.3.1: request 0x014).
    pub fn change(self, address: u32, private: bool) -> Self {
        let operation: u32 = if private { 1 } else { 2 };
        // mov ecx, 0xc0010130; mov eax, low; mov edx, high; wrmsr; VMGEXIT
        self.load(0xb9, 0xc001_0130)
            .load(0xb8, address | 0x014)
            .load(0xba, operation << 20)
            .then(&[0x0f, 0x30])
            .then(&VMGEXIT)
    }

    /// VMMCALL, the instruction that no Intel CPU has and that the platform leaves as it is.
    pub fn vmmcall(self) -> Self {
        self.then(&[0x0f, 0x01, 0xd9])
    }

    /// Writes a letter to the console.
    pub fn say(self, letter: u8) -> Self {
        self.then(&[0xb0, letter]).console()
    }

    /// AL to the first serial port.
    fn console(self) -> Self {
        self.then(&[0x66, 0xba, 0xf8, 0x03, 0xee])
    }

    /// The kernel: this code, then a power-off by cvmm's ACPI register.
    pub fn kernel(self) -> Vec<u8> {
        // One of each instruction behind the power-off, never reached: no kernel lacks one.
        let code = self.then(&power_off()).then(&VMGEXIT).then(&PVALIDATE).then(&RMPADJUST).0;
        let len = code.len() as u64;
        let mut file = executable(LOAD, &[Segment::flat(LOAD, code)], &[(0, 0..len, true)], &[]);
        file.extend_from_slice(&UNACCEPTED);
        file
    }
}

#[cfg(test)]
mod tests {
    use snp::image::kernel::Kernel;
    use snp::image::lazy::knows_unaccepted_memory;
    use snp_model::patch;
    use snp_model::patch::Opcode;

    use super::*;

    #[test]
    fn the_platform_finds_every_instruction() {
        let code = Code::new().pvalidate(0x4000_0000, true, true).change(0x4000_0000, false).say(b'x');
        let kernel = Kernel::parse(code.kernel()).unwrap();
        assert!(knows_unaccepted_memory(&kernel));
        let list = patch::annotate(&kernel).unwrap().kernel;
        let counts = Opcode::ALL.map(|opcode| list.count(opcode));
        assert_eq!(counts, [2, 2, 1]);
    }
}
