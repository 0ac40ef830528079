// SPDX-License-Identifier: Apache-2.0
//! The memory of a guest, before and while it runs: two views of each page, and who may use it.

#![allow(unsafe_code, reason = "maps guest memory")]

use snp::image::direct::DirectImage;
use snp::stage0::BUILT;
use snp::stage0::InputsPage;
use snp::stage0::inputs::Item;
use snp::stage0::inputs::Kind;
use snp::stage0::item_hash;
use snp::stage0::layout;

pub const PAGE: u64 = 0x1000;
pub const LARGE: u64 = 0x20_0000;
/// Low RAM of a rig that is built by hand.
pub const MEMORY: u64 = 32 << 20;
pub const KERNEL: u64 = 16 << 20;
pub const ENTRY: u64 = KERNEL + 0x200;
pub const INITRD: u64 = 24 << 20;
pub const STAGING: u64 = 4 << 20;
pub const BOOT_PARAMS: u64 = 0x7000;
pub const CMDLINE: u64 = 0x2_0000;
/// Where the kernel says that it was entered.
pub const DONE_PORT: u16 = 0xe9;

/// Memory of the host that backs one view of the guest's.
pub struct Backing(pub *mut u8, u64);

impl Backing {
    pub fn new(len: u64) -> Backing {
        // SAFETY: a fresh anonymous mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        Backing(at.cast(), len)
    }

    #[allow(clippy::mut_from_ref, reason = "the guest is stopped whenever the test looks at its memory")]
    pub fn at(&self, gpa: u64, len: u64) -> &mut [u8] {
        assert!(gpa + len <= self.1, "{gpa:#x}");
        // SAFETY: inside of the mapping, which is never unmapped; the guest does not run at the same time.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(gpa as usize), len as usize) }
    }

    pub fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.at(gpa, 8).try_into().unwrap())
    }
}

/// Something done to a rig before it runs.
pub type Change = fn(&mut Rig);
/// Address, length, type.
pub type E820 = (u64, u64, u32);

/// A guest: what is in its memory, and what the host has said and seen of each page.
pub struct Rig {
    pub private: Backing,
    pub shared: Backing,
    pub high: Backing,
    pub inputs: InputsPage,
    /// Bytes of low RAM, and of RAM from 4 GiB on.
    pub low: u64,
    pub high_len: u64,
    pub entry: u64,
    pub validated: Vec<bool>,
    pub is_private: Vec<bool>,
}

pub const HIGH: u64 = 4 << 30;
pub const HIGH_LEN: u64 = 2 * LARGE + 3 * PAGE;

pub fn kernel() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..0x2345u32).map(|i| (i * 7) as u8).collect();
    // mov eax, cs; out 0xe9, al; hlt. Enough to know that it was entered; the registers are read from
    // outside.
    bytes[0x200..0x205].copy_from_slice(&[0x8c, 0xc8, 0xe6, DONE_PORT as u8, 0xf4]);
    bytes
}

pub fn boot_params() -> Vec<u8> {
    let mut page = vec![0; 0x1000];
    let map: [E820; 5] = [
        (0, 0x8_0000, 1),
        (0x8_0000, 0x1_0000, 2),
        (0x9_0000, 0x1_0000, 3),
        (0x10_0000, MEMORY - 0x10_0000, 1),
        (HIGH, HIGH_LEN, 1),
    ];
    set_e820(&mut page, &map);
    page
}

pub fn set_e820(page: &mut [u8], map: &[E820]) {
    page[0x1e8] = map.len() as u8;
    for (i, (start, len, kind)) in map.iter().enumerate() {
        let at = 0x2d0 + i * 20;
        page[at..at + 8].copy_from_slice(&start.to_le_bytes());
        page[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
        page[at + 16..at + 20].copy_from_slice(&kind.to_le_bytes());
    }
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with(boot_params())
    }

    pub fn with(boot_params: Vec<u8>) -> Rig {
        let (private, shared) = (Backing::new(MEMORY), Backing::new(MEMORY));
        // What the host's memory held before must never be taken for zeros.
        private.at(0, MEMORY).fill(0xa5);
        let initrd: Vec<u8> = (0..300u32).map(|i| (i * 13) as u8).collect();
        let things: [(Kind, u64, Vec<u8>, u64); 4] = [
            (Kind::Kernel, KERNEL, kernel(), 0x4000),
            (Kind::Initrd, INITRD, initrd, 0),
            (Kind::Cmdline, CMDLINE, b"console=ttyS0\0".to_vec(), 0),
            (Kind::BootData, BOOT_PARAMS, boot_params, 0),
        ];
        let (mut source, mut items) = (STAGING, Vec::new());
        for (kind, target, bytes, mem_len) in things {
            let len = bytes.len() as u64;
            shared.at(source, len).copy_from_slice(&bytes);
            items.push(Item {
                kind,
                source,
                target,
                len,
                mem_len: mem_len.max(len),
                hash: item_hash(&bytes),
            });
            source += len.next_multiple_of(PAGE);
        }
        let image_end = layout::IMAGE + BUILT.image.len() as u64;
        let inputs = InputsPage {
            entry: ENTRY,
            boot_params: BOOT_PARAMS,
            ram: vec![0..MEMORY, HIGH..HIGH + HIGH_LEN],
            excluded: vec![layout::CPUID..layout::SECRETS + PAGE, layout::INPUTS..image_end],
            staging: vec![layout::GHCB..layout::GHCB + PAGE, STAGING..STAGING + 2 * LARGE],
            accept: None,
            items,
        };
        Rig {
            private,
            shared,
            high: Backing::new(HIGH_LEN),
            inputs,
            low: MEMORY,
            high_len: HIGH_LEN,
            entry: ENTRY,
            validated: vec![false; ((HIGH + HIGH_LEN) / PAGE) as usize],
            is_private: vec![true; ((HIGH + HIGH_LEN) / PAGE) as usize],
        }
    }

    /// The guest that a plan describes.
    pub fn of_image(image: &DirectImage) -> Rig {
        let shim = image.staged.as_ref().unwrap();
        let low = image.ram[0].end;
        let high_len = image.ram.get(1).map_or(0, |range| range.end - range.start);
        let (private, shared) = (Backing::new(low), Backing::new(low));
        private.at(0, 32 << 20).fill(0xa5);
        for (gpa, bytes) in &shim.staging {
            shared.at(*gpa, bytes.as_slice().len() as u64).copy_from_slice(bytes.as_slice());
        }
        let pages = ((HIGH + high_len) / PAGE) as usize;
        Rig {
            private,
            shared,
            high: Backing::new(high_len.max(PAGE)),
            inputs: shim.inputs.clone(),
            low,
            high_len,
            entry: shim.inputs.entry,
            validated: vec![false; pages],
            is_private: vec![true; pages],
        }
    }

    /// Puts launch pages in place as the firmware would.
    pub fn launch(&mut self, c_bit: u32) {
        let page = self.private.at(layout::CPUID, PAGE);
        page.fill(0);
        page[0] = 2;
        let leaves: [[u32; 5]; 2] =
            [[0, 0, 13, 0, 0], [0x8000_001f, 0, 0x1a, 0x8000_0000 | 1 << 6 | c_bit, 0]];
        for (i, [function, index, eax, ebx, ecx]) in leaves.into_iter().enumerate() {
            let entry = &mut page[16 + i * 48..];
            for (at, value) in [(0, function), (4, index), (24, eax), (28, ebx), (32, ecx)] {
                entry[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
        self.private.at(layout::INPUTS, PAGE).copy_from_slice(&self.inputs.encode().unwrap());
        let image = self.private.at(layout::IMAGE, BUILT.image.len() as u64);
        image.copy_from_slice(BUILT.image);
        for (address, kind) in BUILT.sites {
            let at = (address - layout::IMAGE) as usize;
            image[at..at + 4].copy_from_slice(&[0xe6, 0xe4 + *kind as u8, 0x66, 0x90]);
        }
        let hook = (BUILT.hook - layout::IMAGE) as usize;
        image[hook..hook + 4].copy_from_slice(&[0xe6, 0xe8, 0x66, 0x90]);
        for range in self.inputs.excluded.clone() {
            for page in range.step_by(PAGE as usize) {
                self.validated[(page / PAGE) as usize] = true;
            }
        }
        for range in self.inputs.staging.clone() {
            for page in range.step_by(PAGE as usize) {
                self.is_private[(page / PAGE) as usize] = false;
            }
        }
    }

    pub fn pages(&self, gpa: u64, count: u64) -> std::ops::Range<usize> {
        (gpa / PAGE) as usize..(gpa / PAGE + count) as usize
    }

    /// Walks the guest's page tables; the result still has the C-bit.
    pub fn translate(&self, cr3: u64, address: u64, c_bit: u32) -> u64 {
        let private = 1 << c_bit;
        assert_ne!(cr3 & private, 0, "the C-bit is missing from CR3");
        let mut table = cr3;
        for level in (0..4).rev() {
            let index = address >> (12 + level * 9) & 511;
            let entry = self.private.u64((table & !private & !0xfff) + index * 8);
            assert_eq!(entry & 1, 1, "{address:#x} is not mapped");
            let size = 1u64 << (12 + level * 9);
            if level == 0 || entry & 0x80 != 0 {
                return entry & 0x000f_ffff_ffff_f000 & !(size - 1) | address & (size - 1);
            }
            assert_ne!(entry & private, 0, "a table entry lacks the C-bit");
            table = entry & 0x000f_ffff_ffff_f000;
        }
        unreachable!()
    }
}
