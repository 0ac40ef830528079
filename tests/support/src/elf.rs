// SPDX-License-Identifier: Apache-2.0
//! x86-64 ELF executables, written by the System V ABI without a linker.

/// A loadable segment of an [`executable`].
#[derive(Clone, Debug)]
pub struct Segment {
    /// Physical address.
    pub paddr: u64,
    /// Virtual address.
    pub vaddr: u64,
    /// Its bytes in the file.
    pub contents: Vec<u8>,
    /// Length in memory; what the file has no bytes for is zero.
    pub mem_len: u64,
}

impl Segment {
    /// At a physical address, linked where Linux links itself.
    pub fn new(paddr: u64, contents: Vec<u8>) -> Segment {
        Segment { vaddr: 0xffff_ffff_8000_0000 + paddr, ..Segment::flat(paddr, contents) }
    }

    /// At one address, physical and virtual.
    pub fn flat(address: u64, contents: Vec<u8>) -> Segment {
        let mem_len = contents.len() as u64;
        Segment { paddr: address, vaddr: address, contents, mem_len }
    }
}

/// An executable. `sections` gives for each the index of its segment, the range of the contents, and whether
/// they hold code. `notes` is the contents of a note segment.
pub fn executable(
    entry: u64,
    segments: &[Segment],
    sections: &[(usize, std::ops::Range<u64>, bool)],
    notes: &[u8],
) -> Vec<u8> {
    let phnum = segments.len() + usize::from(!notes.is_empty());
    let mut at = 64 + phnum as u64 * 56;
    let mut headers = Vec::new();
    let mut contents = Vec::new();
    let mut offsets = Vec::new();
    let note_segment = Segment { paddr: 0, vaddr: 0, contents: notes.to_vec(), mem_len: notes.len() as u64 };
    let all = segments.iter().map(|s| (1u32, s)).chain((!notes.is_empty()).then_some((4u32, &note_segment)));
    for (kind, s) in all {
        offsets.push(at);
        headers.extend_from_slice(&kind.to_le_bytes());
        headers.extend_from_slice(&5u32.to_le_bytes());
        for word in [at, s.vaddr, s.paddr, s.contents.len() as u64, s.mem_len, 4] {
            headers.extend_from_slice(&word.to_le_bytes());
        }
        contents.extend_from_slice(&s.contents);
        at += s.contents.len() as u64;
    }
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    let shoff = if sections.is_empty() { 0 } else { at };
    for word in [entry, 64, shoff] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    let shnum = if sections.is_empty() { 0 } else { sections.len() as u16 + 1 };
    for half in [64, 56, phnum as u16, 64, shnum, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    file.extend_from_slice(&headers);
    file.extend_from_slice(&contents);
    if !sections.is_empty() {
        file.extend_from_slice(&[0; 64]);
    }
    for (segment, range, code) in sections {
        let flags = 2u64 | if *code { 4 } else { 0 };
        file.extend_from_slice(&0u32.to_le_bytes());
        file.extend_from_slice(&1u32.to_le_bytes());
        for word in [
            flags,
            segments[*segment].vaddr + range.start,
            offsets[*segment] + range.start,
            range.end - range.start,
        ] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&[0; 8]);
        file.extend_from_slice(&1u64.to_le_bytes());
        file.extend_from_slice(&[0; 8]);
    }
    file
}

/// An executable of one segment, entered at its first byte.
pub fn flat(address: u64, code: &[u8]) -> Vec<u8> {
    executable(address, &[Segment::flat(address, code.to_vec())], &[], &[])
}

/// Xen's note of type 18, `XEN_ELFNOTE_PHYS32_ENTRY` (xen/include/public/elfnote.h), with the 32-bit entry
/// point.
pub fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&entry.to_le_bytes());
    note
}
