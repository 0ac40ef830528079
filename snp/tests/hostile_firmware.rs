// SPDX-License-Identifier: Apache-2.0
//! Malformed firmware files: each is refused with the offset and what was expected there, and none makes the
//! parser panic.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use proptest::prelude::*;
use snp::image::guid_table::TableError;
use snp::image::ovmf::Ovmf;
use snp::image::ovmf::OvmfError;
use snp::image::ovmf::OvmfLaunch;
use snp::image::ovmf::Svsm;
use snp::image::vmm_type::VcpuSetup;
use snp::image::vmm_type::VmmType;
use snp::pages::hashes::KernelHashes;
use snp::plan::Bytes;
use support::firmware::any_firmware;
use test_support::firmware::Firmware;

fn firmware() -> Firmware {
    Firmware {
        pages: 2,
        seed: 3,
        sections: vec![(0x80_0000, 0x1000, 1), (0x80_1000, 0x1000, 2), (0x80_2000, 0x1000, 0x10)],
        reset_eip: 0x80_b004,
        hashes_base: 0x80_2c00,
        svsm_entry: 0,
    }
}

fn launch<'a>(vcpus: u32, kernel: Option<&'a KernelHashes>) -> OvmfLaunch<'a> {
    let setup = VcpuSetup { signature: 0xa00f11, sev_features: 1 };
    OvmfLaunch { vmm: VmmType::Qemu, vcpus, setup, kernel }
}

/// Offset of the table's own entry in a file of two pages.
const FOOTER: usize = 0x2000 - 32 - 18;
/// Offset of the SEV metadata, which is 0x800 bytes and its own 52 before the end.
const METADATA: usize = 0x2000 - 0x800 - 52;

/// The message for the file after `change`.
fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut file = firmware().bytes();
    change(&mut file);
    Ovmf::parse(Bytes::from(file)).unwrap_err().to_string()
}

#[test]
fn each_malformed_field_is_named_with_offset_and_expectation() {
    let cases: [(&str, String); 9] = [
        ("offset 0x1fd0: expected the GUID 96b582de", refusal(|f| f[FOOTER + 2] ^= 1)),
        ("offset 0x1fce: length of the OVMF table is 17, expected 18 to", refusal(|f| f[FOOTER] = 17)),
        ("length of an OVMF table entry is 0, expected 18 to", refusal(|f| f[FOOTER - 18] = 0)),
        ("SEV metadata starts with", refusal(|f| f[METADATA] = b'B')),
        ("offset 0x17d4: version of the SEV metadata is 2, expected 1", refusal(|f| f[METADATA + 8] = 2)),
        ("size of the SEV metadata is 15, expected 16 to", refusal(|f| f[METADATA + 4] = 15)),
        ("number of SEV metadata sections is 4, expected at most 3", refusal(|f| f[METADATA + 12] = 4)),
        ("type 0x5, expected 1, 2, 3, 4 or 0x10", refusal(|f| f[METADATA + 16 + 8] = 5)),
        ("section SECRETS has 0x2000 bytes, expected one page", refusal(|f| f[METADATA + 28 + 5] = 0x20)),
    ];
    for (expected, found) in cases {
        assert!(found.contains(expected), "expected '{expected}' in '{found}'");
    }
}

#[test]
fn tiny_and_partial_files_are_refused() {
    for len in [0, 1, 16, 49, 50, 51, 4096] {
        let error = Ovmf::parse(Bytes::from(vec![0; len])).unwrap_err();
        assert!(matches!(error, OvmfError::Table(TableError::NoTable { .. })), "{len}: {error}");
    }
    let mut file = firmware().bytes();
    file.insert(0, 0);
    assert_eq!(Ovmf::parse(Bytes::from(file)).unwrap_err(), OvmfError::Length { len: 0x2001 });
}

#[test]
fn a_kernel_without_a_place_for_its_hashes_is_refused() {
    let hashes = KernelHashes::of(b"kernel", b"", b"");
    let mut file = firmware();
    file.sections.pop();
    let ovmf = Ovmf::parse(Bytes::from(file.bytes())).unwrap();
    assert_eq!(ovmf.plan(&launch(1, Some(&hashes))).unwrap_err(), OvmfError::NoKernelHashes);

    // A table that would run over the end of its page, or lies in another one.
    for hashes_base in [0x80_2f51, 0x80_1c00, 0x80_3000, 0] {
        let file = Firmware { hashes_base, ..firmware() };
        let ovmf = Ovmf::parse(Bytes::from(file.bytes())).unwrap();
        let error = ovmf.plan(&launch(1, Some(&hashes))).unwrap_err();
        assert!(matches!(error, OvmfError::HashTablePlace { .. }), "{hashes_base:#x}: {error}");
    }
}

#[test]
fn more_vcpus_than_the_firmware_can_start_are_refused() {
    let file = Firmware { reset_eip: 0, ..firmware() };
    let ovmf = Ovmf::parse(Bytes::from(file.bytes())).unwrap();
    assert!(ovmf.plan(&launch(1, None)).is_ok());
    assert_eq!(ovmf.plan(&launch(2, None)).unwrap_err(), OvmfError::NoResetBlock { vcpus: 2 });
}

#[test]
fn sections_over_each_other_or_over_the_firmware_are_refused() {
    for gpa in [0x80_0000, 0xffff_f000] {
        let mut file = firmware();
        file.sections.push((gpa, 0x1000, 4));
        let ovmf = Ovmf::parse(Bytes::from(file.bytes())).unwrap();
        assert!(matches!(ovmf.plan(&launch(1, None)).unwrap_err(), OvmfError::Plan(_)), "{gpa:#x}");
    }
}

proptest! {
    #![proptest_config(support::config(3000))]

    #[test]
    fn a_damaged_firmware_file_never_panics(
        firmware in any_firmware(),
        damage in proptest::collection::vec((0usize..0x1000, any::<u8>()), 1..20),
        cut in 0usize..64,
        vcpus in 1u32..4,
    ) {
        let mut file = firmware.bytes();
        // Everything that a parser reads is in the last page.
        let base = file.len() - 0x1000;
        for (offset, value) in damage {
            // Half of the damage goes where the table is.
            let offset = if value & 1 == 0 { offset } else { 0x1000 - 1 - offset % 200 };
            file[base + offset] = value;
        }
        file.truncate(file.len() - cut / 32 * cut);
        if let Ok(ovmf) = Ovmf::parse(Bytes::from(file.clone())) {
            let hashes = KernelHashes::of(b"k", b"i", b"c");
            let _ = ovmf.plan(&launch(vcpus, None));
            let _ = ovmf.plan(&launch(vcpus, Some(&hashes)));
            let _ = Svsm::parse(&ovmf, Bytes::from(file), 0x1000);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(file in proptest::collection::vec(any::<u8>(), 0..9000)) {
        let _ = Ovmf::parse(Bytes::from(file));
    }
}
