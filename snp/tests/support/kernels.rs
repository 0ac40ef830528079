// SPDX-License-Identifier: Apache-2.0
//! Made-up kernels: files that look like a bzImage or a vmlinux, with every field in view.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

/// The three SNP instructions, AMD64 Architecture Programmer's Manual volume 3.
pub const VMGEXIT: [u8; 4] = [0xf3, 0x0f, 0x01, 0xd9];
pub const PVALIDATE: [u8; 4] = [0xf2, 0x0f, 0x01, 0xff];
pub const RMPADJUST: [u8; 4] = [0xf3, 0x0f, 0x01, 0xfe];

/// A loadable segment of an [`elf`].
#[derive(Clone, Debug)]
pub struct Segment {
    pub paddr: u64,
    pub vaddr: u64,
    pub contents: Vec<u8>,
    pub mem_len: u64,
}

impl Segment {
    pub fn new(paddr: u64, contents: Vec<u8>) -> Segment {
        let mem_len = contents.len() as u64;
        Segment { paddr, vaddr: 0xffff_ffff_8000_0000 + paddr, contents, mem_len }
    }
}

/// An x86-64 ELF executable. `code` gives its sections: index of a segment, range of its contents, and whether they hold
/// code. `notes` is the contents of a note segment.
pub fn elf(
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

/// Xen's note with the 32-bit entry point.
pub fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&entry.to_le_bytes());
    note
}

/// A bzImage of boot protocol 2.15 with one setup sector: `head`, `payload` and `tail` make up the protected-mode part, which
/// is padded with zeros to a multiple of 16 bytes.
#[derive(Clone, Debug)]
pub struct BzImage {
    pub head: Vec<u8>,
    pub payload: Vec<u8>,
    pub tail: Vec<u8>,
    pub init_size: u32,
}

impl BzImage {
    pub fn bytes(&self) -> Vec<u8> {
        let mut body = [&self.head[..], &self.payload[..], &self.tail[..]].concat();
        body.resize(body.len().next_multiple_of(16), 0);
        let mut file = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]); // setup_sects
        put(0x1f4, &(body.len() as u32 / 16).to_le_bytes()); // syssize
        put(0x1fe, &[0x55, 0xaa]);
        put(0x200, &[0xeb, 0x6a]); // jump to 0x26c, the end of the header
        put(0x202, b"HdrS");
        put(0x206, &0x20fu16.to_le_bytes());
        put(0x211, &[1]); // LOADED_HIGH
        put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
        put(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
        put(0x234, &[1, 21]); // relocatable
        put(0x236, &1u16.to_le_bytes()); // XLF_KERNEL_64
        put(0x238, &2047u32.to_le_bytes()); // cmdline_size
        put(0x248, &(self.head.len() as u32).to_le_bytes());
        put(0x24c, &(self.payload.len() as u32).to_le_bytes());
        put(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
        put(0x260, &self.init_size.to_le_bytes());
        file.extend_from_slice(&body);
        file
    }
}

/// A kernel proper with one instruction of each kind in code, and all of them once more as data.
pub fn small_vmlinux() -> Vec<u8> {
    let mut text = vec![0x90; 0x40];
    text[0x10..0x14].copy_from_slice(&VMGEXIT);
    text[0x20..0x24].copy_from_slice(&PVALIDATE);
    text[0x31..0x35].copy_from_slice(&RMPADJUST);
    let data = [VMGEXIT, PVALIDATE, RMPADJUST].concat();
    let segments =
        [Segment::new(0x100_0000, text), Segment { mem_len: 0x1000, ..Segment::new(0x120_0000, data) }];
    elf(0x100_0008, &segments, &[(0, 0..0x40, true), (1, 0..12, false)], &[])
}

/// A decompressor with one instruction of each kind and the hook, around `payload`.
pub fn small_bzimage(payload: Vec<u8>) -> BzImage {
    let mut head = vec![0x90; 0x240];
    head[0x210..0x214].copy_from_slice(&VMGEXIT);
    let mut tail = vec![0x90; 0x40];
    tail[4..8].copy_from_slice(&PVALIDATE);
    tail[9..13].copy_from_slice(&RMPADJUST);
    tail[0x20..0x25].copy_from_slice(&[0x4c, 0x89, 0xfe, 0xff, 0xe0]);
    BzImage { head, payload, tail, init_size: 0x10_0000 }
}

/// Directories of unpacked Debian kernel packages (`*/boot/vmlinuz-*`), from `CVMM_TEST_KERNELS`. Says so if there is none.
pub fn debian_kernels() -> Vec<PathBuf> {
    let Some(root) = std::env::var_os("CVMM_TEST_KERNELS") else {
        println!("note: CVMM_TEST_KERNELS is not set, so no real kernel is looked at");
        return Vec::new();
    };
    let mut found = Vec::new();
    for package in std::fs::read_dir(root).unwrap() {
        let Ok(boot) = std::fs::read_dir(package.unwrap().path().join("boot")) else { continue };
        let files = boot.map(|f| f.unwrap().path());
        found.extend(files.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-")));
    }
    found.sort();
    assert!(!found.is_empty(), "CVMM_TEST_KERNELS is set, but no */boot/vmlinuz-* is there");
    found
}

/// `input` through a compression tool; `None`, with a note, where the tool is not installed.
pub fn compress(tool: &str, args: &[&str], input: &[u8]) -> Option<Vec<u8>> {
    let child = Command::new(tool).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        println!("note: {tool} is not installed, so its format is not tried");
        return None;
    };
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "{tool} failed");
    Some(output.stdout)
}
