// SPDX-License-Identifier: Apache-2.0
//! Where a kernel executes SNP instructions, and how the emulated platform makes them trap.
//!
//! A processor without SNP takes VMGEXIT for a VMMCALL and faults on PVALIDATE and RMPADJUST, so the emulated platform
//! replaces each by a write to a port: `OUT port, AL` and a two-byte NOP, which change no register and no flag. The compiler
//! spreads these instructions over some twenty functions; they are found by their bytes, in sections that hold code only
//! (other sections contain the same bytes as data), and patched at exactly these places or not at all.
//!
//! A bzImage hides its kernel compressed. [`annotate`] decompresses it beforehand and finds the *hook* too: the
//! decompressor's last instructions, at which the kernel proper lies in memory and can be patched. None of this is
//! measured; the launch digest is that of the original bytes.

pub mod decompress;

use std::io;
use std::ops::Range;

use elf::ElfBytes;
use elf::abi;
use elf::endian::AnyEndian;
use snp::image::kernel::BzImage;
use snp::image::kernel::ENTRY_64;
use snp::image::kernel::ElfKernel;
use snp::image::kernel::Kernel;
use snp::image::kernel::KernelError;
use snp::stage0::BUILT;

use decompress::DecompressError;

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

    /// What replaces the hook's first instruction, `mov rsi, r15`: `OUT port, AL` and a one-byte NOP. Whoever handles the
    /// exit does that move.
    pub fn patched_hook(&self) -> [u8; 3] {
        [0xe6, self.hook, 0x90]
    }
}

/// The decompressor's end, `mov rsi, r15; jmp *rax`: RAX is the kernel's entry point, R15 its `boot_params`.
pub const HOOK: [u8; 5] = [0x4c, 0x89, 0xfe, 0xff, 0xe0];

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
pub enum PatchError {
    /// Other bytes than expected.
    #[error(
        "{what} at guest-physical address {gpa:#x} (offset {offset:#x}) should be {expected:02x?} but is {found:02x?}: \
         the code in memory is not the code that was scanned"
    )]
    Mismatch {
        /// The instruction.
        what: String,
        /// Its address.
        gpa: u64,
        /// Its offset from the load address.
        offset: u64,
        /// The bytes that were scanned.
        expected: Vec<u8>,
        /// The bytes that are there.
        found: Vec<u8>,
    },
    /// Guest memory cannot be accessed.
    #[error("guest-physical address {gpa:#x}: {source}")]
    Memory {
        /// The address.
        gpa: u64,
        /// Why.
        source: io::Error,
    },
}

fn read<const N: usize>(memory: &mut impl CodeMemory, gpa: u64) -> Result<[u8; N], PatchError> {
    let mut bytes = [0; N];
    memory.read(gpa, &mut bytes).map_err(|source| PatchError::Memory { gpa, source })?;
    Ok(bytes)
}

fn write(memory: &mut impl CodeMemory, gpa: u64, bytes: &[u8]) -> Result<(), PatchError> {
    memory.write(gpa, bytes).map_err(|source| PatchError::Memory { gpa, source })
}

fn expect(
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
    fn scan(&mut self, code: &[u8], offset: u64) {
        let hits = code.windows(4).enumerate().filter(|(_, w)| w[1] == 0x0f && w[2] == 0x01);
        self.sites.extend(hits.filter_map(|(at, bytes)| {
            Opcode::of(bytes).map(|opcode| Site { offset: offset + at as u64, opcode })
        }));
    }

    fn check(mut self, place: &'static str) -> Result<SiteList, SiteError> {
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

/// The no-operation before stage0's jump to the kernel: RAX is the kernel's entry point, RSI its `boot_params`.
pub const HANDOVER: [u8; 4] = [0x0f, 0x1f, 0x40, 0x00];

/// What the emulated platform has to know about stage0, beside its page. Never measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShimSites {
    /// Its instructions; offsets are guest-physical addresses.
    pub sites: SiteList,
    /// Guest-physical address of [`HANDOVER`]. The kernel may be patched once it is reached, and not before: until then
    /// stage0 compares the kernel with its hash.
    pub handover: u64,
}

impl ShimSites {
    /// Patches stage0 in launched memory: `OUT port, AL` and a two-byte NOP at each place.
    pub fn patch_at_launch(&self, memory: &mut impl CodeMemory, ports: &Ports) -> Result<(), PatchError> {
        let found: [u8; 4] = read(memory, self.handover)?;
        expect("stage0's end", self.handover, self.handover, &HANDOVER, &found)?;
        self.sites.patch(memory, 0, ports)?;
        write(memory, self.handover, &ports.patched_handover())
    }
}

/// Where this build's stage0 is to be patched.
pub fn shim_sites() -> ShimSites {
    let site = |(gpa, kind): &(u64, u32)| Site {
        offset: *gpa,
        opcode: if *kind == 0 { Opcode::Vmgexit } else { Opcode::Pvalidate },
    };
    let mut sites: Vec<Site> = BUILT.sites.iter().map(site).collect();
    sites.sort_by_key(|site| site.offset);
    ShimSites { sites: SiteList { sites, entry_offset: BUILT.entry }, handover: BUILT.hook }
}

/// What the emulated platform has to know about a kernel, beside its pages. Never measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Annotations {
    /// Where the file's code is loaded: a bzImage's protected-mode part, or an ELF image's lowest segment.
    pub load: u64,
    /// A bzImage's decompressor; `None` for an ELF image.
    pub decompressor: Option<Decompressor>,
    /// The kernel proper. Its place is `load` for an ELF image, and known at the hook for a bzImage.
    pub kernel: SiteList,
}

/// The part of a bzImage that runs first. Offsets are from [`Annotations::load`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decompressor {
    /// Its instructions.
    pub sites: SiteList,
    /// Where the hook is: [`HOOK`] before patching.
    pub hook: u64,
    /// The compressed kernel: never patched, whatever bytes it has.
    pub payload: Range<u64>,
}

impl Annotations {
    /// Patches what can be patched at launch: the decompressor and its hook, or an ELF image's code.
    pub fn patch_at_launch(&self, memory: &mut impl CodeMemory, ports: &Ports) -> Result<(), PatchError> {
        let Some(Decompressor { sites, hook, .. }) = &self.decompressor else {
            return self.kernel.patch(memory, self.load, ports);
        };
        let gpa = self.load.wrapping_add(*hook);
        let found: [u8; 5] = read(memory, gpa)?;
        expect("the decompressor's end", gpa, *hook, &HOOK, &found)?;
        sites.patch(memory, self.load, ports)?;
        write(memory, gpa, &ports.patched_hook())
    }
}

/// Why a kernel cannot run on the emulated platform.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// No instruction of one kind: not a kernel that knows SNP.
    #[error(
        "no {opcode:?} instruction in {place}: the emulated platform needs a kernel that was built with \
         CONFIG_AMD_MEM_ENCRYPT, 6.1 or later"
    )]
    NoSite {
        /// The kind.
        opcode: Opcode,
        /// Where it was looked for.
        place: &'static str,
    },
    /// More than any kernel has.
    #[error(
        "{place} has more than {SITES_MAX} SNP instructions; Linux has about a hundred: this is no kernel"
    )]
    TooMany {
        /// Where they are.
        place: &'static str,
    },
    /// The decompressor's end is not where it can be found.
    #[error(
        "the decompressor's last instructions (4c 89 fe ff e0) occur {found} times instead of once: \
         the emulated platform does not know this kernel; use its vmlinux"
    )]
    Hook {
        /// How often they occur.
        found: usize,
    },
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

/// Finds what has to be patched in `kernel`, or says why it cannot be known.
pub fn annotate(kernel: &Kernel) -> Result<Annotations, SiteError> {
    match kernel {
        Kernel::Elf(elf) => {
            let load = elf.segments.first().map_or(0, |s| s.gpa);
            Ok(Annotations { load, decompressor: None, kernel: kernel_sites(elf)? })
        }
        Kernel::BzImage(image) => {
            let decompressor = Some(decompressor(image)?);
            let inner = Kernel::parse(decompress::extract_vmlinux(image)?).map_err(SiteError::Inner)?;
            let Kernel::Elf(elf) = inner else { return Err(SiteError::Inner(KernelError::UnknownFormat)) };
            Ok(Annotations { load: image.pref_address, decompressor, kernel: kernel_sites(&elf)? })
        }
    }
}

/// Finds what has to be patched in images that have no section headers, such as firmware: every place with the bytes of an
/// instruction. `code` is {guest-physical address, bytes}. Data with the same bytes is taken for code, so give no more than
/// what is code; one chance match in a gigabyte is to be expected.
pub fn annotate_code<'a>(code: impl IntoIterator<Item = (u64, &'a [u8])>) -> Annotations {
    let mut parts: Vec<(u64, &[u8])> = code.into_iter().collect();
    parts.sort_by_key(|(gpa, _)| *gpa);
    let mut kernel = SiteList::default();
    let mut tail: (u64, Vec<u8>) = (0, Vec::new());
    for (gpa, bytes) in parts {
        // An instruction may begin in one part and end in the next.
        let mut seam = if tail.0 + tail.1.len() as u64 == gpa { tail.1 } else { Vec::new() };
        let before = seam.len();
        seam.extend_from_slice(bytes.get(..3).unwrap_or(bytes));
        kernel.scan(&seam, gpa.wrapping_sub(before as u64));
        kernel.scan(bytes, gpa);
        let start = bytes.len().saturating_sub(3);
        tail = (gpa + start as u64, bytes.get(start..).unwrap_or_default().to_vec());
    }
    kernel.sites.sort_by_key(|site| site.offset);
    kernel.sites.dedup();
    Annotations { load: 0, decompressor: None, kernel }
}

fn decompressor(image: &BzImage) -> Result<Decompressor, SiteError> {
    let body = image.body();
    let payload = image.payload.start - image.body.start..image.payload.end - image.body.start;
    let mut sites = SiteList { sites: Vec::new(), entry_offset: ENTRY_64 };
    let mut hooks = Vec::new();
    for part in [0..payload.start, payload.end..body.len()] {
        let code = &body[part.clone()];
        sites.scan(code, part.start as u64);
        let ends = code.windows(HOOK.len()).enumerate().filter(|(_, w)| *w == HOOK);
        hooks.extend(ends.map(|(at, _)| (part.start + at) as u64));
    }
    let sites = sites.check("the decompressor")?;
    match hooks[..] {
        [hook] => Ok(Decompressor { sites, hook, payload: payload.start as u64..payload.end as u64 }),
        _ => Err(SiteError::Hook { found: hooks.len() }),
    }
}

fn kernel_sites(kernel: &ElfKernel) -> Result<SiteList, SiteError> {
    let unusable = |e: elf::ParseError| SiteError::Sections(e.to_string());
    let parsed = ElfBytes::<AnyEndian>::minimal_parse(&kernel.file).map_err(unusable)?;
    let base = kernel.segments.first().map_or(0, |s| s.gpa);
    let mut list = SiteList { sites: Vec::new(), entry_offset: kernel.entry.wrapping_sub(base) };
    let headers = parsed.section_headers().ok_or_else(|| SiteError::Sections("none present".to_owned()))?;
    let code =
        |flags: u64| flags & u64::from(abi::SHF_EXECINSTR) != 0 && flags & u64::from(abi::SHF_ALLOC) != 0;
    let mut code_sections = Vec::new();
    for header in headers.iter().filter(|h| code(h.sh_flags) && h.sh_type != abi::SHT_NOBITS) {
        let (bytes, _) = parsed.section_data(&header).map_err(unusable)?;
        // The section's physical address, by its place in a segment's contents.
        let (start, end) = (header.sh_offset, header.sh_offset.saturating_add(header.sh_size));
        let segment = kernel
            .segments
            .iter()
            .find(|s| s.file.start as u64 <= start && end <= s.file.end as u64)
            .ok_or_else(|| SiteError::Sections(format!("code at offset {start:#x} is in no segment")))?;
        if start < end {
            code_sections.push((start, end, bytes, segment.gpa - base + (start - segment.file.start as u64)));
        }
    }
    // Sections that overlap would have the same bytes scanned again and again.
    code_sections.sort_by_key(|(start, ..)| *start);
    if let Some(pair) = code_sections.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        return Err(SiteError::Sections(format!("two code sections overlap at offset {:#x}", pair[1].0)));
    }
    for (_, _, bytes, offset) in code_sections {
        list.scan(bytes, offset);
    }
    list.check("the kernel")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_found_across_the_border_of_two_parts_and_once() {
        let code = [[0x90; 4], Opcode::Pvalidate.bytes(), Opcode::Vmgexit.bytes()].concat();
        for cut in 0..=code.len() {
            let (first, second) = code.split_at(cut);
            let found = annotate_code([(0x1000 + cut as u64, second), (0x1000, first)]).kernel.sites;
            let site = |offset, opcode| Site { offset, opcode };
            assert_eq!(
                found,
                [site(0x1004, Opcode::Pvalidate), site(0x1008, Opcode::Vmgexit)],
                "cut at {cut}"
            );
        }
        assert_eq!(annotate_code([(0, &code[..7]), (8, &code[7..])]).kernel.count(Opcode::Pvalidate), 0);
    }
}
