// SPDX-License-Identifier: Apache-2.0
//! SNP instructions in code: finding them by their bytes, and replacing each in guest memory by a write to a
//! port.

use std::io;

use snp::image::kernel::KernelError;

use super::decompress::DecompressError;

/// Most instructions of a kernel: Linux has about a hundred.
const SITES_MAX: usize = 65_536;

/// The SNP instructions that a guest executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Opcode {
    /// Exit to the hypervisor.
    Vmgexit,
    /// Validate or invalidate a page.
    Pvalidate,
    /// Change a page's permissions.
    Rmpadjust,
}

impl Opcode {
    /// All of them.
    pub const ALL: [Opcode; 3] = [Opcode::Vmgexit, Opcode::Pvalidate, Opcode::Rmpadjust];

    /// The instruction, AMD64 Architecture Programmer's Manual volume 3.
    pub const fn bytes(self) -> [u8; 4] {
        match self {
            Opcode::Vmgexit => [0xf3, 0x0f, 0x01, 0xd9],
            Opcode::Pvalidate => [0xf2, 0x0f, 0x01, 0xff],
            Opcode::Rmpadjust => [0xf3, 0x0f, 0x01, 0xfe],
        }
    }

    fn of(bytes: &[u8]) -> Option<Opcode> {
        Opcode::ALL.into_iter().find(|op| op.bytes() == bytes)
    }
}

/// Ports that stand for the instructions. No device may use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// VMGEXIT.
    pub vmgexit: u8,
    /// PVALIDATE.
    pub pvalidate: u8,
    /// RMPADJUST.
    pub rmpadjust: u8,
    /// The decompressor has finished.
    pub hook: u8,
    /// stage0 has finished: the kernel is in place and checked.
    pub handover: u8,
}

impl Default for Ports {
    fn default() -> Self {
        Ports { vmgexit: 0xe4, pvalidate: 0xe5, rmpadjust: 0xe6, hook: 0xe7, handover: 0xe8 }
    }
}

impl Ports {
    /// The port for `opcode`.
    pub fn of(&self, opcode: Opcode) -> u8 {
        match opcode {
            Opcode::Vmgexit => self.vmgexit,
            Opcode::Pvalidate => self.pvalidate,
            Opcode::Rmpadjust => self.rmpadjust,
        }
    }

    /// What replaces `opcode`: `OUT port, AL` and a two-byte NOP.
    pub fn patched(&self, opcode: Opcode) -> [u8; 4] {
        [0xe6, self.of(opcode), 0x66, 0x90]
    }

    /// What replaces [`HANDOVER`].
    pub fn patched_handover(&self) -> [u8; 4] {
        [0xe6, self.handover, 0x66, 0x90]
    }

    /// What replaces the hook's first instruction, `mov rsi, r15`: `OUT port, AL` and a one-byte NOP. Whoever
    /// handles the exit does that move.
    pub fn patched_hook(&self) -> [u8; 3] {
        [0xe6, self.hook, 0x90]
    }
}

/// The decompressor's end, `mov rsi, r15; jmp *rax`: RAX is the kernel's entry point, R15 its `boot_params`.
pub const HOOK: [u8; 5] = [0x4c, 0x89, 0xfe, 0xff, 0xe0];

/// The no-operation before stage0's jump to the kernel: RAX is the kernel's entry point, RSI its
/// `boot_params`.
pub const HANDOVER: [u8; 4] = [0x0f, 0x1f, 0x40, 0x00];

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Offset in bytes from the image's load address.
    pub offset: u64,
    /// What is there.
    pub opcode: Opcode,
}

/// All instructions of one image, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SiteList {
    /// The instructions.
    pub sites: Vec<Site>,
    /// Offset of the entry point from the load address.
    pub entry_offset: u64,
}

/// Guest memory to patch. Errors end up in [`PatchError::Memory`].
pub trait CodeMemory {
    /// Reads guest memory at `gpa`.
    fn read(&mut self, gpa: u64, bytes: &mut [u8]) -> io::Result<()>;
    /// Writes guest memory at `gpa`.
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Why code was not patched. Nothing has been written then, unless a write itself failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PatchError {
    /// Other bytes than expected.
    #[error(
        "{what} at guest-physical address {gpa:#x} (offset {offset:#x}) should be {expected:02x?} but is {found:02x?}: \
         the code in memory is not the code that was scanned"
    )]
    Mismatch { what: String, gpa: u64, offset: u64, expected: Vec<u8>, found: Vec<u8> },
    /// Guest memory cannot be accessed.
    #[error("guest-physical address {gpa:#x}: {source}")]
    Memory { gpa: u64, source: io::Error },
}

pub(super) fn read<const N: usize>(memory: &mut impl CodeMemory, gpa: u64) -> Result<[u8; N], PatchError> {
    let mut bytes = [0; N];
    memory.read(gpa, &mut bytes).map_err(|source| PatchError::Memory { gpa, source })?;
    Ok(bytes)
}

pub(super) fn write(memory: &mut impl CodeMemory, gpa: u64, bytes: &[u8]) -> Result<(), PatchError> {
    memory.write(gpa, bytes).map_err(|source| PatchError::Memory { gpa, source })
}

pub(super) fn expect(
    what: impl ToString,
    gpa: u64,
    offset: u64,
    expected: &[u8],
    found: &[u8],
) -> Result<(), PatchError> {
    if expected == found {
        return Ok(());
    }
    let (expected, found) = (expected.to_vec(), found.to_vec());
    Err(PatchError::Mismatch { what: what.to_string(), gpa, offset, expected, found })
}

impl SiteList {
    /// How often `opcode` occurs.
    pub fn count(&self, opcode: Opcode) -> usize {
        self.sites.iter().filter(|s| s.opcode == opcode).count()
    }

    /// Patches the image loaded at `base`. All sites are verified before the first one is written.
    pub fn patch(&self, memory: &mut impl CodeMemory, base: u64, ports: &Ports) -> Result<(), PatchError> {
        for &Site { offset, opcode } in &self.sites {
            let gpa = base.wrapping_add(offset);
            let found: [u8; 4] = read(memory, gpa)?;
            expect(format_args!("{opcode:?}"), gpa, offset, &opcode.bytes(), &found)?;
        }
        for &Site { offset, opcode } in &self.sites {
            write(memory, base.wrapping_add(offset), &ports.patched(opcode))?;
        }
        Ok(())
    }

    /// Where an image lies whose entry point turned out to be at `entry`.
    pub fn base_from_entry(&self, entry: u64) -> u64 {
        entry.wrapping_sub(self.entry_offset)
    }

    /// Finds the instructions in `code`, whose first byte is at `offset`.
    pub(super) fn scan(&mut self, code: &[u8], offset: u64) {
        let hits = code.windows(4).enumerate().filter(|(_, w)| w[1] == 0x0f && w[2] == 0x01);
        self.sites.extend(hits.filter_map(|(at, bytes)| {
            Opcode::of(bytes).map(|opcode| Site { offset: offset + at as u64, opcode })
        }));
    }

    pub(super) fn check(mut self, place: &'static str) -> Result<SiteList, SiteError> {
        if self.sites.len() > SITES_MAX {
            return Err(SiteError::TooMany { place });
        }
        self.sites.sort_by_key(|s| s.offset);
        self.sites.dedup();
        match Opcode::ALL.into_iter().find(|op| self.count(*op) == 0) {
            Some(opcode) => Err(SiteError::NoSite { opcode, place }),
            None => Ok(self),
        }
    }
}

/// Why a kernel cannot run on the emulated platform.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum SiteError {
    /// No instruction of one kind: not a kernel that knows SNP.
    #[error(
        "no {opcode:?} instruction in {place}: the emulated platform needs a kernel that was built with \
         CONFIG_AMD_MEM_ENCRYPT, 6.1 or later"
    )]
    NoSite { opcode: Opcode, place: &'static str },
    /// More than any kernel has.
    #[error(
        "{place} has more than {SITES_MAX} SNP instructions; Linux has about a hundred: this is no kernel"
    )]
    TooMany { place: &'static str },
    /// The decompressor's end is not where it can be found.
    #[error(
        "the decompressor's last instructions (4c 89 fe ff e0) occur {found} times instead of once: \
         the emulated platform does not know this kernel; use its vmlinux"
    )]
    Hook { found: usize },
    /// The kernel cannot be decompressed.
    #[error(transparent)]
    Decompress(#[from] DecompressError),
    /// What is inside the bzImage is no kernel.
    #[error("the kernel inside the bzImage: {0}")]
    Inner(KernelError),
    /// No section headers.
    #[error(
        "the kernel has no usable section headers ({0}); they say which bytes are code, so the emulated platform needs them"
    )]
    Sections(String),
}
