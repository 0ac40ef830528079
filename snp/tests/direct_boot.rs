// SPDX-License-Identifier: Apache-2.0
//! The direct-boot image as a guest sees it. Structure offsets come from `linux-loader`'s bindings of the kernel's own headers,
//! the rest from the specifications named at each test.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::io::Write as _;
use std::mem::offset_of;
use std::process::Command;
use std::sync::Arc;

use linux_loader::bootparam::boot_e820_entry;
use linux_loader::bootparam::boot_params;
use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::start_info::hvm_memmap_table_entry;
use linux_loader::loader::elf::start_info::hvm_modlist_entry;
use linux_loader::loader::elf::start_info::hvm_start_info;
use proptest::prelude::*;
use snp::board::Board;
use snp::board::acpi;
use snp::digest::launch_digest;
use snp::image::direct::DirectBoot;
use snp::image::direct::DirectImage;
use snp::image::direct::Guest;
use snp::image::direct::Snp;
use snp::image::direct::Validation;
use snp::image::entry::Entry;
use snp::image::error::ImageError;
use snp::image::kernel::Kernel;
use snp::image::lazy::Acceptance;
use snp::pages::cpuid::CpuidTable;
use snp::pages::cpuid::SnpCpuid;
use snp::pages::cpuid_entry::CpuidEntry;
use snp::plan::PageType;
use snp::vmsa::SEV_FEATURE_SECURE_TSC;
use support::kernels::Segment;
use support::kernels::elf;
use support::kernels::pvh_note;
use support::kernels::small_bzimage;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const C_BIT: u8 = 51;

const SNP: Guest<'static> =
    Guest::Snp(Snp { c_bit: C_BIT, cpuid: None, validation: Validation::AllByLaunch, features: 0 });

fn bzimage() -> Kernel {
    Kernel::parse(small_bzimage(vec![7; 0x3000]).bytes()).unwrap()
}

fn vmlinux(notes: &[u8]) -> Kernel {
    let segments = [
        Segment { mem_len: 0x5000, ..Segment::new(0x100_0000, vec![1; 0x2800]) },
        Segment { mem_len: 0x40_0000, ..Segment::new(0x120_0000, vec![2; 0x10]) },
    ];
    Kernel::parse(elf(0x100_0040, &segments, &[], notes)).unwrap()
}

fn boot<'a>(kernel: &'a Kernel, guest: Guest<'a>) -> DirectBoot<'a> {
    DirectBoot {
        tpm: None,
        kernel,
        initrd: Some(Arc::new(vec![0x5a; 5000])),
        cmdline: "console=ttyS0",
        memory: 512 * MIB,
        vcpus: 2,
        guest,
    }
}

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

#[test]
fn an_snp_launch_covers_every_page_of_ram_once_and_a_plain_one_only_what_has_contents() {
    let kernel = bzimage();
    for memory in [128 * MIB, 4608 * MIB] {
        let image = DirectBoot { memory, ..boot(&kernel, SNP) }.image().unwrap();
        assert_eq!(image.plan.check(), Ok(()));
        let pages: u64 = image.plan.records.iter().map(|r| r.len / 4096).sum();
        assert_eq!(pages, memory / 4096);
        assert!(
            image.plan.records.iter().all(|r| image.ram.iter().any(|m| m.start <= r.gpa && r.end() <= m.end))
        );
        // Page 0 is read by Linux at 0x40e and 0x413 and must be validated.
        assert!(image.plan.records.iter().any(|r| r.gpa == 0 && r.page_type == PageType::Zero));
    }
    let image = boot(&kernel, Guest::Plain).image().unwrap();
    assert!(
        image
            .plan
            .records
            .iter()
            .all(|r| r.page_type == PageType::Normal && !r.contents.as_slice().is_empty())
    );
}

#[test]
fn what_the_host_chooses_is_in_the_digest() {
    let kernel = bzimage();
    let digest = |boot: DirectBoot<'_>| launch_digest(&boot.image().unwrap().plan).unwrap();
    let base = boot(&kernel, SNP);
    let reference = digest(base.clone());
    assert_eq!(digest(base.clone()), reference, "the same input gives the same digest");
    let mut changed = small_bzimage(vec![7; 0x3000]);
    changed.payload[0x2000] = 8;
    let changed = Kernel::parse(changed.bytes()).unwrap();
    for (what, boot) in [
        ("kernel", DirectBoot { kernel: &changed, ..base.clone() }),
        ("initrd", DirectBoot { initrd: Some(Arc::new(vec![0x5b; 5000])), ..base.clone() }),
        ("no initrd", DirectBoot { initrd: None, ..base.clone() }),
        ("cmdline", DirectBoot { cmdline: "console=ttyS1", ..base.clone() }),
        ("memory", DirectBoot { memory: 256 * MIB, ..base.clone() }),
        ("vcpus", DirectBoot { vcpus: 3, ..base.clone() }),
    ] {
        assert_ne!(digest(boot), reference, "{what}");
    }
    // Checked by the firmware, not measured.
    let table = cpuid_table();
    let with_table = Guest::Snp(Snp {
        c_bit: C_BIT,
        cpuid: Some(&table),
        validation: Validation::AllByLaunch,
        features: 0,
    });
    assert_eq!(digest(DirectBoot { guest: with_table, ..base }), reference);
}

/// Linux 7.3.4, `sev.c:sev_es_sync_vmsa`: of what Secure TSC changes only `sev_features` is in the save area when it is measured.
#[test]
fn secure_tsc_is_a_feature_of_every_vcpu_and_changes_nothing_else() {
    let kernel = bzimage();
    for validation in [Validation::AllByLaunch, Validation::Stage0(Acceptance::Eager)] {
        let plan = |features| {
            let guest = Guest::Snp(Snp { c_bit: C_BIT, cpuid: None, validation, features });
            boot(&kernel, guest).image().unwrap().plan
        };
        let (without, mut with) = (plan(0), plan(SEV_FEATURE_SECURE_TSC));
        assert_ne!(launch_digest(&with).unwrap(), launch_digest(&without).unwrap());
        for state in &mut with.vcpus {
            assert_eq!(std::mem::replace(&mut state.sev_features, 1), 0x201);
        }
        assert_eq!(launch_digest(&with).unwrap(), launch_digest(&without).unwrap());
    }
}

fn cpuid_table() -> CpuidTable {
    let leaf = |function, eax, ecx| CpuidEntry { function, eax, ecx, ..CpuidEntry::default() };
    let offered = [
        leaf(0, 0x10, 0),
        leaf(1, 0xa00f11, 1 << 30),
        leaf(0x4000_0000, 0x4000_0001, 0),
        leaf(0x8000_0000, 0x8000_001f, 0),
        leaf(0x8000_0008, 0x3034, 0),
    ];
    CpuidTable::snp(&offered, 2, &SnpCpuid { c_bit: C_BIT, phys_bits: None, coherency_sfw_no: false })
        .unwrap()
}

#[test]
fn each_refusal_names_the_option_and_what_to_do() {
    let kernel = bzimage();
    let base = boot(&kernel, SNP);
    let table = cpuid_table();
    let long = "x".repeat(2048);
    let refuse = |boot: DirectBoot<'_>| boot.image().unwrap_err();
    let other_c_bit =
        Guest::Snp(Snp { c_bit: 47, cpuid: Some(&table), validation: Validation::AllByLaunch, features: 0 });
    let mut large = small_bzimage(vec![7; 64]);
    large.init_size = 0xc000_0000;
    let large = Kernel::parse(large.bytes()).unwrap();
    for (expected, error) in [
        (
            "`memory`: 1048576 bytes; give a multiple of 4 KiB from 128 MiB to",
            refuse(DirectBoot { memory: MIB, ..base.clone() }),
        ),
        ("`memory`: 134217729 bytes", refuse(DirectBoot { memory: 128 * MIB + 1, ..base.clone() })),
        ("`memory`: 18446744073709551615 bytes", refuse(DirectBoot { memory: u64::MAX, ..base.clone() })),
        ("`cpus`: 0; give 1 to 255", refuse(DirectBoot { vcpus: 0, ..base.clone() })),
        ("`cpus`: 10000; give 1 to 255", refuse(DirectBoot { vcpus: 10_000, ..base.clone() })),
        (
            "`cmdline`: 2048 bytes, but this kernel takes at most 2047",
            refuse(DirectBoot { cmdline: &long, ..base.clone() }),
        ),
        (
            "`cmdline`: contains a zero byte at offset 1",
            refuse(DirectBoot { cmdline: "a\0b", ..base.clone() }),
        ),
        ("`initrd`: the file is empty", refuse(DirectBoot { initrd: Some(Arc::default()), ..base.clone() })),
        (
            "`initrd`: 134217728 bytes do not fit",
            refuse(DirectBoot {
                initrd: Some(Arc::new(vec![0; 128 << 20])),
                memory: 128 * MIB,
                ..base.clone()
            }),
        ),
        (
            "`memory`: the kernel works in addresses 0x1000000 to 0xc1000000, but RAM below the device gap ends at 0xc0000000",
            refuse(DirectBoot { kernel: &large, memory: 8 * GIB, ..base.clone() }),
        ),
        ("C-bit 47: the CPUID table says Some(51)", refuse(DirectBoot { guest: other_c_bit, ..base })),
    ] {
        let text = error.to_string();
        assert!(text.contains(expected), "{text:?} should say {expected:?}");
    }
}

#[test]
fn the_longest_command_line_and_the_largest_initrd_fit() {
    let kernel = bzimage();
    let cmdline = "x".repeat(2047);
    let room = 128 * MIB - 0x110_0000;
    let initrd = |len: u64| Some(Arc::new(vec![1; len as usize]));
    let base = DirectBoot {
        cmdline: &cmdline,
        memory: 128 * MIB,
        initrd: initrd(room),
        ..boot(&kernel, Guest::Plain)
    };
    let image = base.image().unwrap();
    let initrd_record = image.plan.records.iter().find(|r| r.name == "initrd").unwrap();
    assert_eq!(
        (initrd_record.gpa, initrd_record.end()),
        (0x110_0000, 128 * MIB),
        "init_size is 1 MiB from 16 MiB on"
    );
    let error = DirectBoot { initrd: initrd(room + 1), ..base.clone() }.image().unwrap_err();
    assert!(matches!(error, ImageError::InitrdFit { .. }), "{error}");
    assert!(error.to_string().ends_with("give a smaller initrd or more `memory`"), "{error}");
    // The kernel takes it below 2 GiB only, however much memory there is.
    for memory in [128 * MIB, 8 << 30] {
        let error = DirectBoot { initrd: Some(Arc::new(vec![0; 2 << 30])), memory, ..base.clone() };
        let error = error.image().unwrap_err().to_string();
        assert!(error.contains("give a smaller initrd. More memory does not help"), "{error}");
    }
}

#[test]
fn memory_that_stage0_cannot_describe_is_refused_with_the_largest_size() {
    let kernel = bzimage();
    let validation = Validation::Stage0(Acceptance::Eager);
    let snp = Snp { c_bit: 51, cpuid: None, validation, features: 0 };
    let boot = |memory| DirectBoot { memory, ..boot(&kernel, Guest::Snp(snp.clone())) };
    // 64 TiB of addresses, with a gap of 1 GiB for devices.
    let most = (64 << 40) - (1 << 30);
    for found in [most + MIB, 64 << 40, 1 << 50] {
        assert_eq!(boot(found).image().unwrap_err(), ImageError::Memory { found, max: most });
    }
    assert!(boot(most).image().is_ok());
}

/// ACPI 6.5, section 5.2: lengths, checksums, and the way from the root pointer to each table.
#[test]
fn acpi_tables_are_linked_and_sum_to_zero() {
    let area = acpi::tables(&Board::new(512 * MIB, 255));
    assert!(area.len() <= 0x1_0000, "they fit below 640 KiB");
    let word =
        |at: usize, len: usize| area[at..at + len].iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    let at = |gpa: u64| usize::try_from(gpa - 0x9_0000).unwrap();
    let sum = |at: usize, len: usize| area[at..at + len].iter().fold(0u8, |s, b| s.wrapping_add(*b));
    assert_eq!(&area[..8], b"RSD PTR ");
    assert_eq!((sum(0, 20), sum(0, 36)), (0, 0));
    let table = |gpa: u64, signature: &[u8]| {
        let at = at(gpa);
        assert_eq!(&area[at..at + 4], signature);
        let len = word(at + 4, 4) as usize;
        assert_eq!(sum(at, len), 0, "{}", String::from_utf8_lossy(signature));
        (at, len)
    };
    let (xsdt, len) = table(word(24, 8), b"XSDT");
    assert_eq!(len, 36 + 2 * 8);
    let (fadt, _) = table(word(xsdt + 36, 8), b"FACP");
    let (madt, madt_len) = table(word(xsdt + 44, 8), b"APIC");
    assert_eq!(word(fadt + 40, 4), word(fadt + 140, 8), "DSDT and X_DSDT");
    table(word(fadt + 140, 8), b"DSDT");
    let facs = at(word(fadt + 36, 4));
    assert_eq!((&area[facs..facs + 4], facs % 64), (&b"FACS"[..], 0));
    assert_eq!(word(fadt + 46, 2), 9, "SCI_INT");
    assert_eq!(word(fadt + 48, 4), 0, "no SMI command: ACPI mode is always on");
    assert_eq!((word(fadt + 56, 4), word(fadt + 64, 4)), (0x600, 0x604), "PM1a event and control blocks");
    assert_eq!((word(fadt + 88, 1), word(fadt + 89, 1)), (4, 2));
    // Reset register: I/O space, 8 bits, port 0x64, value 0xfe, and the flag that says so.
    assert_eq!((word(fadt + 116, 2), word(fadt + 120, 8), word(fadt + 128, 1)), (0x0801, 0x64, 0xfe));
    assert_eq!(word(fadt + 112, 4) >> 10 & 1, 1);

    let mut entries = Vec::new();
    let mut next = madt + 44;
    while next < madt + madt_len {
        entries.push((area[next], next));
        next += usize::from(area[next + 1]);
    }
    let ids: Vec<u8> = entries.iter().filter(|(kind, _)| *kind == 0).map(|(_, at)| area[at + 3]).collect();
    assert_eq!(ids, (0..255).collect::<Vec<u8>>(), "APIC id = vCPU id");
    let ioapic = entries.iter().find(|(kind, _)| *kind == 1).unwrap().1;
    assert_eq!((word(ioapic + 4, 4), word(ioapic + 8, 4)), (0xfec0_0000, 0));
    let overrides: Vec<_> = entries
        .iter()
        .filter(|(kind, _)| *kind == 2)
        .map(|(_, at)| (area[at + 3], word(at + 4, 4), word(at + 8, 2)))
        .collect();
    assert_eq!(overrides, [(9, 9, 0xd)], "the SCI alone, active high, level-triggered; IRQ 0 stays on pin 0");
}

/// The reference compiler of ACPI reads what we wrote. Skipped with a note where it is not installed (acpica-tools).
#[test]
fn iasl_disassembles_the_tables_without_a_complaint() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!(
            "note: iasl is not installed (Debian package acpica-tools), so the tables are not disassembled"
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let area = acpi::tables(&Board::new(512 * MIB, 3));
    for signature in [b"DSDT", b"FACP", b"APIC", b"XSDT", b"FACS"] {
        let at = area.windows(4).position(|w| w == signature).unwrap();
        let len = u32::from_le_bytes(area[at + 4..at + 8].try_into().unwrap()) as usize;
        let name = String::from_utf8_lossy(signature).to_lowercase();
        let path = dir.path().join(format!("{name}.dat"));
        std::fs::File::create(&path).unwrap().write_all(&area[at..at + len]).unwrap();
        let run = |args: &[&str], file: &std::path::Path| {
            let output = Command::new("iasl").args(args).arg(file).current_dir(dir.path()).output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            assert!(output.status.success(), "{name}: {text}");
            assert!(!text.contains("Error") || text.contains(" 0 Errors"), "{name}: {text}");
            assert!(!text.contains("rong checksum") && !text.contains("orrect checksum"), "{name}: {text}");
            text
        };
        run(&["-d"], &path);
        let source = std::fs::read_to_string(path.with_extension("dsl")).unwrap();
        if signature == b"DSDT" {
            for expected in ["Name (_S5", "PNP0501", "PNP0B00", "IRQNoFlags", "Device (_SB.C002)", "0x03F8"] {
                assert!(source.contains(expected), "{expected} in\n{source}");
            }
            let text = run(&["-ve"], &path.with_extension("dsl"));
            assert!(text.contains(" 0 Errors"), "{text}");
        }
    }
}

/// Computes the digest from the dump alone.
const REHASH: &str = r#"
import hashlib, json, sys
data = open(sys.argv[2], "rb").read()
sha = lambda b: hashlib.sha384(b).digest()
digest = bytes(48)
for line in open(sys.argv[1]):
    line = json.loads(line)
    contents = data[line["offset"]:][:line["bytes"]].ljust(line["len"], b"\0")
    assert len(contents) == line["len"]
    for at in range(0, line["len"], 4096):
        measured = line["page_type"] in (1, 2)
        page = sha(contents[at:at + 4096]) if measured else bytes(48)
        info = digest + page + (0x70).to_bytes(2, "little") + bytes([line["page_type"], 0, 0, 0, 0, 0])
        digest = sha(info + (line["gpa"] + at).to_bytes(8, "little"))
print(digest.hex())
"#;

#[test]
fn the_digest_of_a_dump_computed_by_another_program_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = bzimage();
    let plan = DirectBoot { memory: 128 * MIB, ..boot(&kernel, SNP) }.image().unwrap().plan;
    let (lines, contents) = (dir.path().join("plan.jsonl"), dir.path().join("contents"));
    plan.dump(&mut std::fs::File::create(&lines).unwrap(), &mut std::fs::File::create(&contents).unwrap())
        .unwrap();
    let output = match Command::new("python3").args(["-c", REHASH]).arg(lines).arg(contents).output() {
        Ok(output) => output,
        Err(_) => return println!("note: python3 is not installed, so no other program computes the digest"),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), launch_digest(&plan).unwrap().to_string());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_asked_for_gives_a_sound_plan_or_an_error(
        memory in prop_oneof![any::<u64>(), (0u64..(1 << 20)).prop_map(|p| p * 4096)],
        vcpus in 0u32..300,
        initrd in proptest::option::of(0usize..(1 << 21)),
        c_bit in 30u8..64,
        cmdline in ".{0,100}",
        plain in any::<bool>(),
    ) {
        let kernel = bzimage();
        let snp = Guest::Snp(Snp { c_bit, cpuid: None, validation: Validation::AllByLaunch, features: 0 });
        let boot = DirectBoot {
            tpm: None,
            kernel: &kernel,
            initrd: initrd.map(|len| Arc::new(vec![1; len])),
            cmdline: &cmdline,
            memory,
            vcpus,
            guest: if plain { Guest::Plain } else { snp },
        };
        if let Ok(image) = boot.image() {
            prop_assert_eq!(image.plan.check(), Ok(()));
            prop_assert_eq!(image.plan.vcpus.len(), vcpus as usize);
            let inside = |r: &snp::plan::Record| image.ram.iter().any(|m| m.start <= r.gpa && r.end() <= m.end);
            prop_assert!(image.plan.records.iter().all(inside));
        }
    }
}
