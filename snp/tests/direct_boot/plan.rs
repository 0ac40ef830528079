// SPDX-License-Identifier: Apache-2.0
//! The image as it is launched: which pages, what the digest is bound to, and what is refused.

use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use snp::digest::launch_digest;
use snp::image::direct::DirectBoot;
use snp::image::direct::Guest;
use snp::image::direct::Snp;
use snp::image::direct::Validation;
use snp::image::error::ImageError;
use snp::image::kernel::Kernel;
use snp::image::lazy::Acceptance;
use snp::pages::cpuid::CpuidTable;
use snp::pages::cpuid::SnpCpuid;
use snp::pages::cpuid_entry::CpuidEntry;
use snp::plan::PageType;
use snp::vmsa::SEV_FEATURE_SECURE_TSC;
use test_support::kernels::small_bzimage;

use crate::C_BIT;
use crate::GIB;
use crate::MIB;
use crate::SNP;
use crate::boot;
use crate::bzimage;

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

/// Linux 7.3.4, `sev.c:sev_es_sync_vmsa`: of what Secure TSC changes only `sev_features` is in the save area
/// when it is measured.
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
