// SPDX-License-Identifier: Apache-2.0
//! Kernel files that are not what they should be: each is refused with the field and its offset, and none
//! makes the parser panic or read beyond the file.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use proptest::prelude::*;
use snp::image::kernel::Kernel;
use snp::image::kernel::KernelError;
use snp_model::patch::annotate;
use test_support::elf::Segment;
use test_support::elf::executable;
use test_support::elf::pvh_note;
use test_support::kernels::small_bzimage;
use test_support::kernels::small_vmlinux;

/// The message for a small bzImage after `change`.
fn bzimage_refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut file = small_bzimage(vec![7; 64]).bytes();
    change(&mut file);
    Kernel::parse(file).unwrap_err().to_string()
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn each_malformed_setup_header_is_named_with_offset_and_expectation() {
    let cases = [
        ("neither a bzImage", bzimage_refusal(|f| f.clear())),
        ("neither a bzImage", bzimage_refusal(|f| f.truncate(0x205))),
        ("neither a bzImage", bzimage_refusal(|f| f[0x203] = b'x')),
        ("boot_flag at offset 0x1fe is 0x0, expected 0xaa55", bzimage_refusal(|f| put(f, 0x1fe, &[0, 0]))),
        (
            "truncated: version needs the bytes up to offset 0x208, the file has 0x206",
            bzimage_refusal(|f| f.truncate(0x206)),
        ),
        ("version (boot protocol) at offset 0x206 is 0x20b", bzimage_refusal(|f| f[0x206] = 0x0b)),
        ("loadflags at offset 0x211 is 0x0", bzimage_refusal(|f| f[0x211] = 0)),
        ("xloadflags at offset 0x236 is 0x2, expected XLF_KERNEL_64", bzimage_refusal(|f| f[0x236] = 2)),
        ("end of the setup header at offset 0x201 is 0x202", bzimage_refusal(|f| f[0x201] = 0)),
        ("end of the setup header at offset 0x201 is 0x301", bzimage_refusal(|f| f[0x201] = 0xff)),
        ("syssize at offset 0x1f4 is 0x0", bzimage_refusal(|f| put(f, 0x1f4, &[0; 4]))),
        ("the protected-mode part needs the bytes up to", bzimage_refusal(|f| put(f, 0x1f4, &[0xff; 4]))),
        (
            "the protected-mode part needs the bytes up to offset 0x6c0, the file has 0x6bf",
            bzimage_refusal(|f| f.truncate(0x6bf)),
        ),
        ("the protected-mode part needs", bzimage_refusal(|f| f[0x1f1] = 0)),
        ("payload_offset + payload_length at offset 0x248", bzimage_refusal(|f| put(f, 0x248, &[0xff; 8]))),
        ("payload_offset + payload_length", bzimage_refusal(|f| put(f, 0x24c, &[3, 0, 0, 0]))),
        (
            "pref_address at offset 0x258 is 0xfffff, expected a multiple of 4 KiB",
            bzimage_refusal(|f| put(f, 0x258, &0xf_ffffu64.to_le_bytes())),
        ),
        ("pref_address", bzimage_refusal(|f| put(f, 0x258, &[0xff; 8]))),
    ];
    for (expected, found) in cases {
        assert!(found.contains(expected), "{found:?} should say {expected:?}");
    }
}

/// The message for a small vmlinux after `change`.
fn elf_refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut file = small_vmlinux();
    change(&mut file);
    Kernel::parse(file).unwrap_err().to_string()
}

/// Offset of a field of the first program header.
const PHDR: usize = 64;

#[test]
fn each_malformed_elf_header_is_named_with_offset_and_expectation() {
    let word = |value: u64| value.to_le_bytes();
    let cases = [
        ("truncated: EI_CLASS", elf_refusal(|f| f.truncate(4))),
        ("EI_CLASS at offset 0x4 is 0x1, expected 2: a 64-bit image", elf_refusal(|f| f[4] = 1)),
        ("EI_DATA at offset 0x5 is 0x2", elf_refusal(|f| f[5] = 2)),
        ("e_type at offset 0x10 is 0x1", elf_refusal(|f| f[16] = 1)),
        ("e_machine at offset 0x12 is 0xb7, expected 62", elf_refusal(|f| f[18] = 183)),
        ("malformed ELF image", elf_refusal(|f| f.truncate(80))),
        ("malformed ELF image", elf_refusal(|f| put(f, 32, &word(u64::MAX)))),
        ("without a loadable segment", elf_refusal(|f| put(f, 56, &[0, 0]))),
        ("below 1 MiB", elf_refusal(|f| put(f, PHDR + 24, &word(0x9_0000)))),
        ("more bytes in the file than in memory", elf_refusal(|f| put(f, PHDR + 40, &word(0x10)))),
        ("beyond the end of the address space", elf_refusal(|f| put(f, PHDR + 24, &word(u64::MAX - 0x3e)))),
        ("truncated: an ELF segment", elf_refusal(|f| put(f, PHDR + 8, &word(1 << 40)))),
        ("file range wraps", elf_refusal(|f| put(f, PHDR + 8, &word(u64::MAX)))),
        ("ELF segments overlap at address 0x1200000", elf_refusal(|f| put(f, PHDR + 40, &word(0x20_0001)))),
        ("entry point 0x42 lies in no loadable segment", elf_refusal(|f| put(f, 24, &word(0x42)))),
    ];
    for (expected, found) in cases {
        assert!(found.contains(expected), "{found:?} should say {expected:?}");
    }
}

#[test]
fn a_unified_kernel_image_is_called_that() {
    // DOS header, PE signature at 0x40, COFF header with two sections and no optional header, section table.
    let mut file = vec![0; 0x200];
    put(&mut file, 0, b"MZ");
    put(&mut file, 0x3c, &0x40u32.to_le_bytes());
    put(&mut file, 0x40, b"PE\0\0\x64\x86\x02\0");
    put(&mut file, 0x58, b".osrel\0\0");
    put(&mut file, 0x58 + 40, b".linux\0\0");
    let refusal = |file: &[u8]| Kernel::parse(file.to_vec()).unwrap_err();
    assert_eq!(refusal(&file), KernelError::Unified);
    put(&mut file, 0x46, &[1]);
    assert_eq!(refusal(&file), KernelError::UnknownFormat, "the second section does not count");
    put(&mut file, 0x3c, &u32::MAX.to_le_bytes());
    assert_eq!(refusal(&file), KernelError::UnknownFormat);
}

#[test]
fn a_virtual_entry_point_is_translated_to_its_physical_address() {
    let segment = Segment::new(0x20_0000, vec![0x90; 16]);
    let Kernel::Elf(kernel) = Kernel::parse(executable(segment.vaddr + 4, &[segment], &[], &[])).unwrap()
    else {
        panic!()
    };
    assert_eq!(kernel.entry, 0x20_0004);
}

#[test]
fn a_pvh_note_counts_only_if_it_points_into_the_image() {
    let entry = |notes: &[u8]| {
        let segment = Segment::new(0x20_0000, vec![0x90; 16]);
        let Kernel::Elf(kernel) = Kernel::parse(executable(0x20_0000, &[segment], &[], notes)).unwrap()
        else {
            panic!()
        };
        kernel.pvh_entry
    };
    assert_eq!(entry(&pvh_note(0x20_0008)), Some(0x20_0008));
    assert_eq!(entry(&pvh_note(0x20_0010)), None);
    assert_eq!(entry(&[]), None);
    let mut other = pvh_note(0x20_0008);
    other[8] = 6;
    assert_eq!(entry(&other), None, "another of Xen's notes");
    let mut wide = pvh_note(0x20_0008);
    wide[4] = 8;
    assert_eq!(entry(&wide), None, "a note longer than its segment");
    wide.extend_from_slice(&[0; 4]);
    assert_eq!(entry(&wide), Some(0x20_0008), "64-bit kernels use eight bytes");
}

#[test]
fn segments_that_share_a_page_become_one_run() {
    let segments = [
        Segment::new(0x20_0100, vec![1; 0x10]),
        Segment { mem_len: 0x800, ..Segment::new(0x20_0800, vec![2; 4]) },
        Segment::new(0x20_1000, vec![3; 4]),
    ];
    let kernel = Kernel::parse(executable(0x20_0100, &segments, &[], &[])).unwrap();
    let runs = kernel.runs();
    assert_eq!(runs.iter().map(|(gpa, _)| *gpa).collect::<Vec<_>>(), [0x20_0000, 0x20_1000]);
    let first = runs[0].1.as_slice();
    assert_eq!((first[0xff], first[0x100], first[0x10f], first[0x110]), (0, 1, 1, 0));
    assert_eq!(first[0x800..], [2; 4]);
    assert_eq!(kernel.memory(), 0x20_0100..0x20_1004);
}

/// What must hold for whatever parses.
fn check(file: Vec<u8>) {
    let len = file.len();
    let Ok(kernel) = Kernel::parse(file) else { return };
    let memory = kernel.memory();
    assert!(memory.start >= 0x10_0000 && memory.start <= memory.end);
    let mut end = 0;
    for (gpa, bytes) in kernel.runs() {
        assert!(gpa % 4096 == 0 && gpa >= end, "runs are aligned, ascending and disjoint");
        end = (gpa + bytes.as_slice().len() as u64).next_multiple_of(4096);
        assert!(bytes.as_slice().len() <= len + 4096 * 8);
    }
    if let Kernel::BzImage(image) = &kernel {
        assert!(image.body.end <= len && image.payload.end <= image.body.end);
    }
    // Total as well: an error or a list, never a panic.
    let _ = annotate(&kernel);
}

fn any_kernel() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(small_bzimage(vec![0x28; 64]).bytes()),
        Just(small_vmlinux()),
        Just(executable(0x20_0000, &[Segment::new(0x20_0000, vec![0; 8])], &[], &pvh_note(0x20_0000))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn truncated_and_mutated_kernels_never_panic(
        mut file in any_kernel(),
        keep in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        for (at, value) in changes {
            // The headers are where a change matters most.
            let at = at.index(file.len().min(0x400));
            file[at] = value;
        }
        if truncate {
            file.truncate(keep.index(file.len() + 1));
        }
        check(file);
    }

    #[test]
    fn wild_elf_headers_never_panic(
        fields in proptest::collection::vec((0usize..28, prop_oneof![
            any::<u64>(), Just(u64::MAX), Just(0), (0u64..0x1000), (0x10_0000u64..0x200_0000),
        ]), 0..8),
    ) {
        let mut file = small_vmlinux();
        for (word, value) in fields {
            let at = 24 + word * 8;
            put(&mut file, at.min(0xa0), &value.to_le_bytes());
        }
        check(file);
    }
}

#[test]
fn errors_compare_equal_so_that_callers_can_match() {
    assert_eq!(Kernel::parse(vec![0; 4096]).unwrap_err(), KernelError::UnknownFormat);
}
