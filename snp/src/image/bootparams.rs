// SPDX-License-Identifier: Apache-2.0
//! What Linux is told at its entry: `boot_params` with its memory map, the confidential-computing blob, and
//! the start info that a PVH kernel gets instead.
//!
//! Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst`, `arch/x86/include/uapi/asm/bootparam.h`,
//! `arch/x86/include/asm/sev.h` (`cc_blob_sev_info`), and Xen's `public/arch-x86/hvm/start_info.h`. All of it
//! is measured in an SNP guest, for the host chooses it.

use std::ops::Range;

use super::kernel::Kernel;
use super::kernel::SETUP_HEADER;
use crate::board::Board;
use crate::board::layout;
use crate::plan::PAGE_SIZE;

/// What the kernel has to find.
#[derive(Clone, Debug)]
pub struct BootInfo<'a> {
    /// The kernel, whose setup header is passed on.
    pub kernel: &'a Kernel,
    /// Where the initrd lies; empty if there is none.
    pub initrd: Range<u64>,
    /// The board, for the memory map.
    pub board: &'a Board,
    /// Pass the confidential-computing blob.
    pub cc_blob: bool,
}

/// Offsets in `boot_params`.
mod offset {
    pub const ACPI_RSDP_ADDR: usize = 0x070;
    pub const EXT_RAMDISK_IMAGE: usize = 0x0c0;
    pub const EXT_RAMDISK_SIZE: usize = 0x0c4;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const VID_MODE: usize = 0x1fa;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const HEADER: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const SETUP_DATA: usize = 0x250;
    pub const E820_TABLE: usize = 0x2d0;
}

/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `vid_mode`: leave the display as it is.
const VID_MODE_NORMAL: u16 = 0xffff;
/// Boot protocol that an ELF kernel, which brings no header, is told.
const ELF_PROTOCOL: u16 = 0x20f;
/// `setup_data` type of the blob.
const SETUP_CC_BLOB: u32 = 7;
/// "AMDE", first word of the blob.
const CC_BLOB_MAGIC: u32 = 0x4544_4d41;
/// First word of a PVH start info.
const PVH_MAGIC: u32 = 0x336e_c578;

/// A buffer written at fixed offsets.
struct Page(Vec<u8>);

impl Page {
    fn new() -> Self {
        Page(vec![0; PAGE_SIZE as usize])
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// The `boot_params` page.
pub fn boot_params(info: &BootInfo<'_>) -> Vec<u8> {
    let mut page = Page::new();
    match info.kernel {
        Kernel::BzImage(k) => page.put(SETUP_HEADER, &k.file[k.setup_header.clone()]),
        Kernel::Elf(_) => {
            page.put(offset::BOOT_FLAG, &0xaa55u16.to_le_bytes());
            page.put(offset::HEADER, b"HdrS");
            page.put(offset::VERSION, &ELF_PROTOCOL.to_le_bytes());
            page.put(offset::LOADFLAGS, &[1]);
            page.put(offset::CMDLINE_SIZE, &info.kernel.cmdline_max().to_le_bytes());
        }
    }
    let (image, size) = (info.initrd.start, info.initrd.end - info.initrd.start);
    page.put(offset::ACPI_RSDP_ADDR, &layout::ACPI.to_le_bytes());
    page.put(offset::EXT_RAMDISK_IMAGE, &((image >> 32) as u32).to_le_bytes());
    page.put(offset::EXT_RAMDISK_SIZE, &((size >> 32) as u32).to_le_bytes());
    page.put(offset::VID_MODE, &VID_MODE_NORMAL.to_le_bytes());
    page.put(offset::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    page.put(offset::RAMDISK_IMAGE, &(image as u32).to_le_bytes());
    page.put(offset::RAMDISK_SIZE, &(size as u32).to_le_bytes());
    page.put(offset::CMD_LINE_PTR, &(layout::CMDLINE as u32).to_le_bytes());
    let setup_data = if info.cc_blob { layout::SETUP_DATA } else { 0 };
    page.put(offset::SETUP_DATA, &setup_data.to_le_bytes());

    let map = info.board.e820();
    page.put(offset::E820_ENTRIES, &[map.len() as u8]);
    for (i, (range, kind)) in map.iter().enumerate() {
        let at = offset::E820_TABLE + i * 20;
        page.put(at, &range.start.to_le_bytes());
        page.put(at + 8, &(range.end - range.start).to_le_bytes());
        page.put(at + 16, &(*kind as u32).to_le_bytes());
    }
    page.0
}

/// The `setup_data` element at [`layout::SETUP_DATA`]: the only one, pointing to the blob.
pub fn setup_data() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&0u64.to_le_bytes());
    bytes.extend_from_slice(&SETUP_CC_BLOB.to_le_bytes());
    bytes.extend_from_slice(&4u32.to_le_bytes());
    bytes.extend_from_slice(&(layout::CC_BLOB as u32).to_le_bytes());
    bytes
}

/// The blob at [`layout::CC_BLOB`]: where the secrets page and the CPUID page are.
pub fn cc_blob() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&CC_BLOB_MAGIC.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]); // version and reserved
    for page in [layout::SECRETS, layout::CPUID] {
        bytes.extend_from_slice(&page.to_le_bytes());
        bytes.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
    }
    bytes
}

/// The page that a PVH kernel finds at [`layout::BOOT_PARAMS`]: start info, module list, memory map.
pub fn pvh_start_info(info: &BootInfo<'_>) -> Vec<u8> {
    const MODULES: usize = 0x40;
    const MEMORY_MAP: usize = 0x80;
    let mut page = Page::new();
    let at = |offset: usize| (layout::BOOT_PARAMS + offset as u64).to_le_bytes();
    let map = info.board.e820();
    page.put(0, &PVH_MAGIC.to_le_bytes());
    page.put(4, &1u32.to_le_bytes()); // version with a memory map
    if !info.initrd.is_empty() {
        page.put(12, &1u32.to_le_bytes());
        page.put(16, &at(MODULES));
        page.put(MODULES, &info.initrd.start.to_le_bytes());
        page.put(MODULES + 8, &(info.initrd.end - info.initrd.start).to_le_bytes());
    }
    page.put(24, &layout::CMDLINE.to_le_bytes());
    page.put(32, &layout::ACPI.to_le_bytes());
    page.put(40, &at(MEMORY_MAP));
    page.put(48, &(map.len() as u32).to_le_bytes());
    for (i, (range, kind)) in map.iter().enumerate() {
        let entry = MEMORY_MAP + i * 24;
        page.put(entry, &range.start.to_le_bytes());
        page.put(entry + 8, &(range.end - range.start).to_le_bytes());
        page.put(entry + 16, &(*kind as u32).to_le_bytes());
    }
    page.0
}
