// SPDX-License-Identifier: Apache-2.0
//! Made-up kernels: files that look like a bzImage or a vmlinux, with every field in view; and real ones,
//! where there are any.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use crate::code::PVALIDATE;
use crate::code::RMPADJUST;
use crate::code::VMGEXIT;
use crate::elf::Segment;
use crate::elf::executable;

/// The GUID of the table of unaccepted memory, d5d1de3c-105c-44f9-9ea9-bcef98120031 (Linux,
/// `include/linux/efi.h`): a kernel that accepts memory itself has it in its code.
pub const UNACCEPTED: [u8; 16] =
    [0x3c, 0xde, 0xd1, 0xd5, 0x5c, 0x10, 0xf9, 0x44, 0x9e, 0xa9, 0xbc, 0xef, 0x98, 0x12, 0x00, 0x31];

/// A bzImage of boot protocol 2.15 with one setup sector: `head`, `payload` and `tail` make up the
/// protected-mode part, which is padded with zeros to a multiple of 16 bytes.
#[derive(Clone, Debug)]
pub struct BzImage {
    /// Up to the payload.
    pub head: Vec<u8>,
    /// The compressed kernel.
    pub payload: Vec<u8>,
    /// What comes behind it.
    pub tail: Vec<u8>,
    /// Memory that the decompressor works in.
    pub init_size: u32,
}

impl BzImage {
    /// One whose protected-mode part is `body`, of at least 1040 bytes, with a payload of 16 bytes in it that
    /// nobody looks at.
    pub fn around(body: &[u8], init_size: u32) -> BzImage {
        let (head, rest) = body.split_at(0x400);
        let (payload, tail) = rest.split_at(16);
        BzImage { head: head.to_vec(), payload: payload.to_vec(), tail: tail.to_vec(), init_size }
    }

    /// With both halves of [`UNACCEPTED`] in the tail, apart as a compiler leaves them in code that compares
    /// with it.
    pub fn accepting_memory(mut self) -> BzImage {
        let (first, second) = UNACCEPTED.split_at(8);
        self.tail[0x3f0..0x3f8].copy_from_slice(first);
        self.tail[0x4f0..0x4f8].copy_from_slice(second);
        self
    }

    /// The file.
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
    executable(0x100_0008, &segments, &[(0, 0..0x40, true), (1, 0..12, false)], &[])
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

/// Directories of unpacked Debian kernel packages (`*/boot/vmlinuz-*`), from `CVMM_TEST_KERNELS`. Says so if
/// there is none.
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
