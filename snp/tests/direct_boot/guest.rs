// SPDX-License-Identifier: Apache-2.0
//! The image as a guest sees it. Structure offsets come from `linux-loader`'s bindings of the kernel's own
//! headers, the rest from the specifications named at each test.

use std::mem::offset_of;

use linux_loader::bootparam::boot_e820_entry;
use linux_loader::bootparam::boot_params;
use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::start_info::hvm_memmap_table_entry;
use linux_loader::loader::elf::start_info::hvm_modlist_entry;
use linux_loader::loader::elf::start_info::hvm_start_info;
use snp::image::direct::DirectBoot;
use snp::image::direct::DirectImage;
use snp::image::direct::Guest;
use snp::image::entry::Entry;
use snp::plan::PageType;
use test_support::elf::pvh_note;

use crate::C_BIT;
use crate::GIB;
use crate::MIB;
use crate::SNP;
use crate::boot;
use crate::bzimage;
use crate::vmlinux;

/// Guest memory after the launch; what no record covers reads as zero.
fn memory(image: &DirectImage, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (i, byte) in bytes.iter_mut().enumerate() {
        let at = gpa + i as u64;
        let record = image.plan.records.iter().find(|r| (r.gpa..r.end()).contains(&at));
        *byte = record.and_then(|r| r.contents.as_slice().get((at - r.gpa) as usize)).copied().unwrap_or(0);
    }
    bytes
}

fn number(image: &DirectImage, gpa: u64, len: usize) -> u64 {
    memory(image, gpa, len).iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

macro_rules! header {
    ($field:ident) => {
        (offset_of!(boot_params, hdr) + offset_of!(setup_header, $field)) as u64
    };
}

#[test]
fn linux_finds_everything_through_boot_params() {
    for (kernel, guest) in
        [(bzimage(), SNP), (bzimage(), Guest::Plain), (vmlinux(&[]), SNP), (vmlinux(&[]), Guest::Plain)]
    {
        let snp = matches!(guest, Guest::Snp(_));
        let image = boot(&kernel, guest).image().unwrap();
        let params = image.plan.vcpus[0].rsi;
        let get = |offset: u64, len| number(&image, params + offset, len);

        assert_eq!(get(header!(boot_flag), 2), 0xaa55);
        assert_eq!(get(header!(header), 4), u64::from(u32::from_le_bytes(*b"HdrS")));
        assert!(get(header!(version), 2) >= 0x20c, "setup_data needs 2.09, 64-bit entry 2.12");
        assert_eq!(get(header!(type_of_loader), 1), 0xff);
        assert_eq!(get(offset_of!(boot_params, sentinel) as u64, 1), 0, "else Linux clears half of the page");
        let cmdline = get(header!(cmd_line_ptr), 4);
        assert_eq!(memory(&image, cmdline, 14), b"console=ttyS0\0");
        let (initrd, size) = (get(header!(ramdisk_image), 4), get(header!(ramdisk_size), 4));
        assert_eq!((size, initrd % 4096), (5000, 0));
        assert_eq!(memory(&image, initrd, 5001), [&[0x5a; 5000][..], &[0]].concat());
        assert!(initrd + size <= 512 * MIB && initrd > 500 * MIB, "as high as possible");

        // cc_blob_address must be zero: the blob is found through setup_data alone.
        assert_eq!(get(0x13c, 4), 0);
        let setup_data = get(header!(setup_data), 8);
        assert_eq!(setup_data != 0, snp);
        if snp {
            // struct setup_data { next, type 7, len 4 } and then the blob's address.
            assert_eq!(number(&image, setup_data, 8), 0);
            assert_eq!(number(&image, setup_data + 8, 8), 4 << 32 | 7);
            let blob = number(&image, setup_data + 16, 4);
            assert_eq!(memory(&image, blob, 4), b"AMDE");
            let (secrets, cpuid) = (number(&image, blob + 8, 8), number(&image, blob + 24, 8));
            assert_eq!((number(&image, blob + 16, 4), number(&image, blob + 32, 4)), (4096, 4096));
            let kind = |gpa| image.plan.records.iter().find(|r| r.gpa == gpa).unwrap().page_type;
            assert_eq!((kind(secrets), kind(cpuid)), (PageType::Secrets, PageType::Cpuid));
            assert_eq!(memory(&image, blob + 40, 4056), [0; 4056], "the structure has 40 bytes");
        }
        let rsdp = get(offset_of!(boot_params, acpi_rsdp_addr) as u64, 8);
        assert_eq!(memory(&image, rsdp, 8), b"RSD PTR ");
    }
}

/// The memory map in `boot_params`: start, end, type.
fn e820(image: &DirectImage) -> Vec<(u64, u64, u64)> {
    let params = image.plan.vcpus[0].rsi;
    let count = number(image, params + offset_of!(boot_params, e820_entries) as u64, 1);
    let table = params + offset_of!(boot_params, e820_table) as u64;
    (0..count)
        .map(|i| table + i * size_of::<boot_e820_entry>() as u64)
        .map(|at| (number(image, at, 8), number(image, at + 8, 8), number(image, at + 16, 4)))
        .map(|(start, len, kind)| (start, start + len, kind))
        .collect()
}

#[test]
fn the_memory_map_has_the_device_gap_and_protects_what_must_not_be_ram() {
    let kernel = bzimage();
    for (memory, high) in [
        (128 * MIB, None),
        (3 * GIB, None),
        (4608 * MIB, Some(4 * GIB + 1536 * MIB)),
        (1 << 40, Some((1 << 40) + GIB)),
    ] {
        let image = DirectBoot { memory, ..boot(&kernel, Guest::Plain) }.image().unwrap();
        let map = e820(&image);
        let low = memory.min(3 * GIB);
        let mut expected = vec![
            (0, 0x8_0000, 1),
            (0x8_0000, 0x9_0000, 2),
            (0x9_0000, 0xa_0000, 3),
            (0xa_0000, 0x10_0000, 2),
            (0x10_0000, low, 1),
        ];
        expected.extend(high.map(|end| (4 * GIB, end, 1)));
        assert_eq!(map, expected);
        assert_eq!(image.ram.iter().map(|r| r.end - r.start).sum::<u64>(), memory);
        assert!(image.ram.iter().all(|r| r.end <= 3 * GIB || r.start >= 4 * GIB));
    }
    let image = boot(&kernel, SNP).image().unwrap();
    let kind = |name: &str| {
        let gpa = image.plan.records.iter().find(|r| r.name == name).unwrap().gpa;
        e820(&image).into_iter().find(|(start, end, _)| (*start..*end).contains(&gpa)).unwrap().2
    };
    // Linux maps reserved memory shared, ACPI memory private, and refuses secrets in RAM.
    assert_eq!(kind("secrets page"), 2);
    assert_eq!(kind("CPUID page"), 2);
    assert_eq!(kind("ACPI tables"), 3);
    assert_eq!(kind("kernel"), 1);
    assert_eq!(kind("initrd"), 1);
}

#[test]
fn a_pvh_kernel_is_entered_in_32_bit_mode_with_its_start_info() {
    let kernel = vmlinux(&pvh_note(0x100_0100));
    let image = boot(&kernel, Guest::Plain).image().unwrap();
    assert_eq!(image.entry, Entry::Pvh(0x100_0100));
    let bsp = &image.plan.vcpus[0];
    // Xen's pvh.pandoc: paging off, protected mode, flat 32-bit segments, interrupts off.
    assert_eq!((bsp.rip, bsp.cr0 & 0x8000_0001, bsp.cr4, bsp.efer, bsp.rflags), (0x100_0100, 1, 0, 0, 2));
    assert_eq!((bsp.cs.limit, bsp.cs.attrib & 0x600, bsp.ds.attrib & 0x400), (0xffff_ffff, 0x400, 0x400));
    let get = |offset: usize, len| number(&image, bsp.rbx + offset as u64, len);
    assert_eq!(get(offset_of!(hvm_start_info, magic), 4), 0x336e_c578);
    assert_eq!(get(offset_of!(hvm_start_info, version), 4), 1);
    assert_eq!(get(offset_of!(hvm_start_info, nr_modules), 4), 1);
    let module = get(offset_of!(hvm_start_info, modlist_paddr), 8);
    let initrd = number(&image, module + offset_of!(hvm_modlist_entry, paddr) as u64, 8);
    assert_eq!(number(&image, module + offset_of!(hvm_modlist_entry, size) as u64, 8), 5000);
    assert_eq!(memory(&image, initrd, 4), [0x5a; 4]);
    let cmdline = get(offset_of!(hvm_start_info, cmdline_paddr), 8);
    assert_eq!(memory(&image, cmdline, 14), b"console=ttyS0\0");
    assert_eq!(memory(&image, get(offset_of!(hvm_start_info, rsdp_paddr), 8), 8), b"RSD PTR ");
    let map = get(offset_of!(hvm_start_info, memmap_paddr), 8);
    assert_eq!(get(offset_of!(hvm_start_info, memmap_entries), 4), 5);
    let last = map + 4 * size_of::<hvm_memmap_table_entry>() as u64;
    let field = |offset: usize, len| number(&image, last + offset as u64, len);
    assert_eq!(field(offset_of!(hvm_memmap_table_entry, addr), 8), 0x10_0000);
    assert_eq!(field(offset_of!(hvm_memmap_table_entry, size), 8), 511 * MIB);
    assert_eq!(field(offset_of!(hvm_memmap_table_entry, type_), 4), 1);

    // Under SNP there is no 32-bit start: nothing handles #VC before long mode.
    assert_eq!(boot(&kernel, SNP).image().unwrap().entry, Entry::Long(0x100_0040));
}

/// Walks the page tables as the processor does. Returns the physical address with its C-bit.
fn translate(image: &DirectImage, address: u64) -> Option<u64> {
    let c = 1 << C_BIT;
    let mut table = image.plan.vcpus[0].cr3;
    for level in (1..4).rev() {
        assert_eq!(table & c, image.plan.vcpus[0].cr3 & c, "tables and CR3 agree on the C-bit");
        let index = address >> (12 + 9 * level) & 511;
        let entry = number(image, (table & !c & !0xfff) + index * 8, 8);
        if entry & 1 == 0 {
            return None;
        }
        if level == 1 {
            assert_eq!(entry & 0x83, 0x83, "a writable 2 MiB page");
            return Some(entry & !0x1f_ffff & !(1 << 63) | address & 0x1f_ffff);
        }
        table = entry;
    }
    None
}

#[test]
fn the_first_vcpu_starts_in_long_mode_with_four_gib_mapped() {
    for guest in [SNP, Guest::Plain] {
        let c = if matches!(guest, Guest::Snp(_)) { 1u64 << C_BIT } else { 0 };
        let kernel = bzimage();
        let image = boot(&kernel, guest).image().unwrap();
        let bsp = &image.plan.vcpus[0];
        assert_eq!(
            (image.entry, bsp.rip),
            (Entry::Long(0x100_0200), 0x100_0200),
            "bzImage: load address + 0x200"
        );
        for address in [0, 0x7123, 0x100_0200, 512 * MIB - 1, 3 * GIB - 1, 4 * GIB - 1] {
            assert_eq!(translate(&image, address), Some(address | c));
        }
        assert_eq!(translate(&image, 4 * GIB), None);
        if c != 0 {
            // What KVM makes of them, SVME and MCE included.
            assert_eq!((bsp.efer, bsp.cr4, bsp.cr0, bsp.sev_features), (0x1d01, 0x60, 0x8000_0001, 1));
        } else {
            assert_eq!((bsp.efer, bsp.cr4, bsp.cr0, bsp.sev_features), (0xd01, 0x20, 0x8000_0001, 0));
        }
        // Linux's boot protocol: CS 0x10 execute/read, DS, ES, SS 0x18 read/write, also in the loaded table.
        assert_eq!(
            (bsp.cs.selector, bsp.ds.selector, bsp.es.selector, bsp.ss.selector),
            (0x10, 0x18, 0x18, 0x18)
        );
        assert_eq!(number(&image, bsp.gdtr.base + 0x10, 8), 0x00af_9b00_0000_ffff);
        assert_eq!(number(&image, bsp.gdtr.base + 0x18, 8), 0x00cf_9300_0000_ffff);
        assert_eq!(bsp.gdtr.limit, 0x1f);
        assert_eq!(bsp.rflags, 2, "interrupts off");
    }
}

#[test]
fn other_vcpus_are_inert_and_measured() {
    let kernel = bzimage();
    let image = DirectBoot { vcpus: 255, ..boot(&kernel, SNP) }.image().unwrap();
    assert_eq!(image.plan.vcpus.len(), 255);
    let ap = &image.plan.vcpus[1];
    assert!(image.plan.vcpus[1..].iter().all(|v| v == ap));
    assert_eq!(memory(&image, ap.rip, 4), [0xfa, 0xf4, 0xeb, 0xfd], "cli; hlt; jump to the hlt");
    assert_eq!(translate(&image, ap.rip), Some(ap.rip | 1 << C_BIT));
    assert_eq!((ap.rflags, ap.idtr.limit, ap.rsi), (2, 0, 0));
}
