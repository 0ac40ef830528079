// SPDX-License-Identifier: Apache-2.0
//! An x86-64 ELF image: the System V ABI; the PVH note is `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's `elfnote.h`.

use std::ops::Range;
use std::sync::Arc;

use elf::ElfBytes;
use elf::abi;
use elf::endian::AnyEndian;
use elf::file::Class;
use elf::note::Note;
use elf::segment::ProgramHeader;

use super::error::KernelError;
use super::error::SEGMENTS_MAX;
use super::fields::Fields;
use super::fields::LOWEST_LOAD_ADDRESS;
use super::fields::require;
use crate::plan::Bytes;
use crate::plan::PAGE_SIZE;

/// Note type `XEN_ELFNOTE_PHYS32_ENTRY`.
const XEN_PHYS32_ENTRY: u64 = 18;
/// Most notes that are looked at for the PVH entry point: Linux has some twenty.
const NOTES_MAX: usize = 4096;

/// A loadable segment of an ELF kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub gpa: u64,
    /// Contents in the file.
    pub file: Range<usize>,
    /// Length in memory in bytes; what lies beyond the contents is zero.
    pub mem_len: u64,
}

/// An ELF kernel.
#[derive(Clone, Debug)]
pub struct ElfKernel {
    /// The whole file.
    pub file: Arc<Vec<u8>>,
    /// Loadable segments, ascending, disjoint, not empty.
    pub segments: Vec<Segment>,
    /// Physical address of the 64-bit entry point.
    pub entry: u64,
    /// Physical address of the 32-bit PVH entry point, if the image has that note.
    pub pvh_entry: Option<u32>,
}

/// Refuses what is no x86-64 executable.
fn check_header(f: &Fields<'_>) -> Result<(), KernelError> {
    let class = f.u8("EI_CLASS", 4)?;
    require(class == abi::ELFCLASS64, "EI_CLASS", 4, class, "2: a 64-bit image")?;
    let data = f.u8("EI_DATA", 5)?;
    require(data == abi::ELFDATA2LSB, "EI_DATA", 5, data, "1: little-endian")?;
    let e_type = f.u16("e_type", 16)?;
    let executable = e_type == abi::ET_EXEC || e_type == abi::ET_DYN;
    require(executable, "e_type", 16, e_type, "2 or 3: an executable, not an object or core file")?;
    let machine = f.u16("e_machine", 18)?;
    require(machine == abi::EM_X86_64, "e_machine", 18, machine, "62: x86-64")
}

/// A loadable segment, checked by itself.
fn segment(index: usize, phdr: &ProgramHeader, file_len: u64) -> Result<Segment, KernelError> {
    let refuse = |why| KernelError::Segment {
        index,
        gpa: phdr.p_paddr,
        file_len: phdr.p_filesz,
        mem_len: phdr.p_memsz,
        why,
    };
    if phdr.p_filesz > phdr.p_memsz {
        return Err(refuse("more bytes in the file than in memory"));
    }
    if phdr.p_paddr < LOWEST_LOAD_ADDRESS {
        return Err(refuse("below 1 MiB, where the boot data lie"));
    }
    if phdr.p_paddr.checked_add(phdr.p_memsz).is_none() {
        return Err(refuse("beyond the end of the address space"));
    }
    let end = phdr.p_offset.checked_add(phdr.p_filesz).ok_or_else(|| refuse("file range wraps"))?;
    if end > file_len {
        return Err(KernelError::Truncated { what: "an ELF segment", needed: end, found: file_len });
    }
    Ok(Segment { gpa: phdr.p_paddr, file: phdr.p_offset as usize..end as usize, mem_len: phdr.p_memsz })
}

/// All loadable segments with their virtual addresses, in the order of the file.
fn segments(parsed: &ElfBytes<'_, AnyEndian>, file_len: u64) -> Result<Vec<(u64, Segment)>, KernelError> {
    let mut segments = Vec::new();
    let mut contents = 0u64;
    let loadable = |phdr: &ProgramHeader| phdr.p_type == abi::PT_LOAD && phdr.p_memsz != 0;
    let all = parsed.segments().into_iter().flatten().enumerate();
    for (index, phdr) in all.filter(|(_, phdr)| loadable(phdr)) {
        let segment = segment(index, &phdr, file_len)?;
        if segments.len() == SEGMENTS_MAX {
            return Err(KernelError::Segments);
        }
        contents += phdr.p_filesz;
        segments.push((phdr.p_vaddr, segment));
    }
    if contents > file_len {
        return Err(KernelError::SegmentBytes { found: contents, file: file_len });
    }
    Ok(segments)
}

/// The physical address of the entry point. Linux gives it as such; images linked otherwise give the virtual
/// one.
fn entry(e_entry: u64, segments: &[(u64, Segment)]) -> Result<u64, KernelError> {
    let inside = |start: u64, len: u64| e_entry.checked_sub(start).is_some_and(|d| d < len);
    if segments.iter().any(|(_, s)| inside(s.gpa, s.mem_len)) {
        return Ok(e_entry);
    }
    let by_virtual = segments.iter().find(|(vaddr, s)| inside(*vaddr, s.mem_len));
    by_virtual.map(|(vaddr, s)| e_entry - vaddr + s.gpa).ok_or(KernelError::EntryOutside { entry: e_entry })
}

/// The 32-bit entry address that a note gives. A note that does not parse is as good as none: the 64-bit
/// entry point is always there.
fn pvh_entry(parsed: &ElfBytes<'_, AnyEndian>) -> Option<u32> {
    let all = parsed.segments().into_iter().flatten().filter(|phdr| phdr.p_type == abi::PT_NOTE);
    let notes = all.filter_map(|phdr| parsed.segment_data_as_notes(&phdr).ok()).flatten();
    notes.take(NOTES_MAX).find_map(pvh_note)
}

impl ElfKernel {
    pub(super) fn parse(file: Arc<Vec<u8>>) -> Result<ElfKernel, KernelError> {
        check_header(&Fields(&file))?;
        let parsed = ElfBytes::<AnyEndian>::minimal_parse(&file).map_err(elf_error)?;
        if parsed.ehdr.class != Class::ELF64 {
            return Err(KernelError::Elf("not a 64-bit image".to_owned()));
        }
        let placed = segments(&parsed, file.len() as u64)?;
        let mut segments: Vec<Segment> = placed.iter().map(|(_, segment)| segment.clone()).collect();
        segments.sort_by_key(|s| s.gpa);
        if segments.is_empty() {
            return Err(KernelError::NothingToLoad);
        }
        if let Some(pair) = segments.windows(2).find(|pair| pair[0].gpa + pair[0].mem_len > pair[1].gpa) {
            return Err(KernelError::SegmentsOverlap { gpa: pair[1].gpa });
        }
        let entry = entry(parsed.ehdr.e_entry, &placed)?;
        let pvh_entry = pvh_entry(&parsed)
            .filter(|e| segments.iter().any(|s| (s.gpa..s.gpa + s.mem_len).contains(&u64::from(*e))));
        Ok(ElfKernel { segments, entry, pvh_entry, file })
    }

    /// Contents by page: segments that share a page are merged, all others stay windows of the file.
    pub(super) fn runs(&self) -> Vec<(u64, Bytes)> {
        let mut runs: Vec<(u64, Vec<&Segment>)> = Vec::new();
        let mut last_page = None;
        for segment in self.segments.iter().filter(|s| !s.file.is_empty()) {
            let first = segment.gpa & !(PAGE_SIZE - 1);
            match runs.last_mut() {
                Some((_, run)) if last_page == Some(first) => run.push(segment),
                _ => runs.push((first, vec![segment])),
            }
            last_page = Some((segment.gpa + segment.file.len() as u64 - 1) & !(PAGE_SIZE - 1));
        }
        runs.into_iter().map(|(gpa, run)| (gpa, self.run_bytes(gpa, &run))).collect()
    }

    fn run_bytes(&self, gpa: u64, run: &[&Segment]) -> Bytes {
        if let [only] = run
            && only.gpa == gpa
            && let Some(window) = Bytes::window(&self.file, only.file.clone())
        {
            return window;
        }
        let mut buffer = Vec::new();
        for segment in run {
            buffer.resize((segment.gpa - gpa) as usize, 0);
            buffer.extend_from_slice(&self.file[segment.file.clone()]);
        }
        Bytes::from(buffer)
    }
}

fn elf_error(error: elf::ParseError) -> KernelError {
    KernelError::Elf(error.to_string())
}

/// The 32-bit entry address, if `note` is Xen's.
fn pvh_note(note: Note<'_>) -> Option<u32> {
    let Note::Unknown(note) = note else { return None };
    if note.name.strip_suffix(b"\0") != Some(b"Xen") || note.n_type != XEN_PHYS32_ENTRY {
        return None;
    }
    match note.desc.len() {
        4 => note.desc.try_into().ok().map(u32::from_le_bytes),
        8 => note.desc.try_into().ok().map(u64::from_le_bytes).and_then(|v| u32::try_from(v).ok()),
        _ => None,
    }
}
