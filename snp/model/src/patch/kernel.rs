// SPDX-License-Identifier: Apache-2.0
//! Where a kernel, or other code, executes SNP instructions.
//!
//! The compiler spreads these instructions over some twenty functions; they are found in sections that hold
//! code only (other sections contain the same bytes as data), and patched at exactly these places or not at
//! all. A bzImage hides its kernel compressed. [`annotate`] decompresses it beforehand and finds the *hook*
//! too: the decompressor's last instructions, at which the kernel proper lies in memory and can be patched.

use std::ops::Range;

use elf::ElfBytes;
use elf::abi;
use elf::endian::AnyEndian;
use snp::image::kernel::BzImage;
use snp::image::kernel::ENTRY_64;
use snp::image::kernel::ElfKernel;
use snp::image::kernel::Kernel;
use snp::image::kernel::KernelError;

use super::code::CodeMemory;
use super::code::HOOK;
use super::code::PatchError;
use super::code::Ports;
use super::code::SiteError;
use super::code::SiteList;
use super::code::expect;
use super::code::read;
use super::code::write;
use super::decompress;

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

/// Finds what has to be patched in images that have no section headers, such as firmware: every place with
/// the bytes of an instruction. `code` is {guest-physical address, bytes}. Data with the same bytes is taken
/// for code, so give no more than what is code; one chance match in a gigabyte is to be expected.
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
    use super::super::code::Opcode;
    use super::super::code::Site;
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
