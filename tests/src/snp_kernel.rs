// SPDX-License-Identifier: Apache-2.0
//! Kernels of a few bytes that do with SNP pages what Linux never does, for booting through stage0 on the emulated platform.
//!
//! Each is an ELF file with one section of code, which the platform searches for SNP instructions as it does with Linux, and
//! with the GUID of the table of unaccepted memory in it, so that stage0 leaves most of memory to it. It runs on stage0's page
//! tables: 4 GiB private, the same memory shared at 512 GiB. It has no interrupt table: any exception is a triple fault.

/// Physical address of the code, in memory that stage0 validates.
const LOAD: u64 = 16 << 20;
/// Offset in the file of the code.
const CODE_AT: usize = 0x1000;
/// Where stage0's page tables show the shared view.
const SHARED_VIEW: u64 = 1 << 39;
/// The unaccepted-memory table's GUID, d5d1de3c-105c-44f9-9ea9-bcef98120031 (Linux, `include/linux/efi.h`).
const GUID: [u8; 16] =
    [0x3c, 0xde, 0xd1, 0xd5, 0x5c, 0x10, 0xf9, 0x44, 0x9e, 0xa9, 0xbc, 0xef, 0x98, 0x12, 0x00, 0x31];

const VMGEXIT: [u8; 4] = [0xf3, 0x0f, 0x01, 0xd9];
const PVALIDATE: [u8; 4] = [0xf2, 0x0f, 0x01, 0xff];
const RMPADJUST: [u8; 4] = [0xf3, 0x0f, 0x01, 0xfe];

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
        // mov eax, address; mov ecx, large; mov edx, validate; PVALIDATE; setc al; add al, '0'; out to the console
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
        // mov dx, 0x604; mov ax, 0x3400; out dx, ax; then one of each instruction, never reached: no kernel lacks one.
        let code = self
            .then(&[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef])
            .then(&VMGEXIT)
            .then(&PVALIDATE)
            .then(&RMPADJUST)
            .0;
        let names = b"\0.text\0.shstrtab\0";
        let names_at = CODE_AT + code.len();
        let guid_at = names_at + names.len();
        let headers_at = (guid_at + GUID.len()).next_multiple_of(8);

        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let halves = |file: &mut Vec<u8>, values: &[u16]| {
            values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
        };
        let words = |file: &mut Vec<u8>, values: &[u32]| {
            values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
        };
        let longs = |file: &mut Vec<u8>, values: &[u64]| {
            values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
        };
        halves(&mut file, &[2, 62]); // executable, x86-64
        words(&mut file, &[1]);
        longs(&mut file, &[LOAD, 64, headers_at as u64]);
        words(&mut file, &[0]);
        halves(&mut file, &[64, 56, 1, 64, 3, 2]);
        words(&mut file, &[1, 5]); // PT_LOAD, R-X
        let len = code.len() as u64;
        longs(&mut file, &[CODE_AT as u64, LOAD, LOAD, len, len, 0x1000]);
        file.resize(CODE_AT, 0);
        file.extend_from_slice(&code);
        file.extend_from_slice(names);
        file.extend_from_slice(&GUID);
        file.resize(headers_at + 64, 0); // the null section
        words(&mut file, &[1, 1]); // .text, PROGBITS
        longs(&mut file, &[6, LOAD, CODE_AT as u64, len]); // ALLOC, EXECINSTR
        words(&mut file, &[0, 0]);
        longs(&mut file, &[1, 0]);
        words(&mut file, &[7, 3]); // .shstrtab, STRTAB
        longs(&mut file, &[0, 0, names_at as u64, names.len() as u64]);
        words(&mut file, &[0, 0]);
        longs(&mut file, &[1, 0]);
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
