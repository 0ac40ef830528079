// SPDX-License-Identifier: Apache-2.0
//! A VM in a file and the same one in options: `cvmm measure` has one plan for both, byte for byte.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::path::Path;
use std::process::Command;

use test_support::code::power_off;
use test_support::firmware;
use test_support::firmware::Firmware;
use test_support::tiny;

fn cvmm(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_cvmm")).args(args).output().unwrap();
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// A firmware file with a page for the hashes of a kernel.
fn ovmf() -> Vec<u8> {
    let (secrets, cpuid, hashes) = (0x80_d000, 0x80_e000, 0x80_f000);
    Firmware {
        pages: 16,
        seed: 1,
        sections: vec![
            (0x80_0000, 0x9000, firmware::SEC_MEM),
            (secrets, 0x1000, firmware::SECRETS),
            (cpuid, 0x1000, firmware::CPUID),
            (hashes, 0x1000, firmware::KERNEL_HASHES),
        ],
        reset_eip: 0xffff_f000,
        hashes_base: hashes + 0x400,
        svsm_entry: 0,
    }
    .bytes()
}

#[test]
fn a_file_and_options_have_one_plan() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("kernel"), tiny::kernel(&power_off())).unwrap();
    std::fs::write(at("initrd"), [0x5a; 5000]).unwrap();
    std::fs::write(at("ovmf"), ovmf()).unwrap();
    let (kernel, initrd, firmware, file) = (at("kernel"), at("initrd"), at("ovmf"), at("spec"));
    let direct = ["--kernel", &kernel];
    let ovmf = ["--firmware", &firmware, "--vcpu-model", "EPYC-v4"];
    let mut digests = std::collections::BTreeSet::new();
    let rows: [(&[&str], &[&str]); 14] = [
        (&direct, &[]),
        (&direct, &["--initrd", &initrd]),
        (&direct, &["--cmdline", "console=ttyS0 quiet"]),
        (&direct, &["--memory", "1G"]),
        (&direct, &["--cpus", "3"]),
        (&direct, &["--accept", "eager", "--memory", "3G"]),
        (&direct, &["--secure-tsc"]),
        (&direct, &["--validation", "launch", "--memory", "128M"]),
        (&direct, &["--vtpm"]),
        (&ovmf, &[]),
        (&ovmf, &["--cpus", "3"]),
        (&ovmf, &["--guest-features", "0x21"]),
        (&ovmf, &["--kernel", &kernel, "--initrd", &initrd, "--cmdline", "quiet"]),
        (&["--firmware", &firmware, "--vcpu-model", "EPYC-Milan"], &[]),
    ];
    for (base, options) in rows {
        let (dump, other) = (at("dump"), at("dump-of-file"));
        let measured = cvmm(&[&["measure", "--dump", &dump], base, options].concat());
        assert!(measured.0, "{base:?} {options:?}: {}", measured.1);
        let (made, text) = cvmm(&[&["spec", "--snp"], base, options].concat());
        assert!(made, "{options:?}: {text}");
        std::fs::write(&file, text).unwrap();
        assert_eq!(cvmm(&["measure", "--dump", &other, "--spec", &file]), measured, "{base:?} {options:?}");
        for end in ["", ".contents"] {
            let read = |path: &str| std::fs::read(Path::new(&format!("{path}{end}"))).unwrap();
            assert!(read(&dump) == read(&other), "{base:?} {options:?}: another plan");
        }
        digests.insert(measured.1);
    }
    assert_eq!(digests.len(), rows.len(), "each option is part of the digest");
}

/// What is in no plan, but in the VM: the file that stands for the options stands for all of them.
#[test]
fn a_file_keeps_every_option_of_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (file, state, auth) = (at("spec"), at("state"), at("auth"));
    std::fs::write(&state, b"").unwrap();
    let host_data = "5a".repeat(32);
    let emulated = ["--snp", "--platform", "emulated"];
    let tpm = ["--vtpm", &state, "--vtpm-key-file", &file];
    // The first of each kind has no option more: one that were lost would leave the same text.
    let rows: [(&[&str], &[&str]); 25] = [
        (&[], &[]),
        (&["--snp"], &[]),
        (&emulated, &[]),
        (&["--vtpm"], &[]),
        (&tpm, &[]),
        (&[], &["--on-reboot", "restart"]),
        (&["--snp"], &["--policy", "0x30001"]),
        (&["--snp"], &["--host-data", &host_data]),
        (&["--snp"], &["--id-block", &file, "--id-auth", &auth]),
        (&["--snp"], &["--id-block", &file, "--id-auth", &auth, "--reference", &state]),
        (&["--snp"], &["--accept-cpuid"]),
        (&["--snp"], &["--certs", &file]),
        (&emulated, &["--backing", "split"]),
        (&emulated, &["--backing", "split", "--strict"]),
        (&emulated, &["--pvalidate-2m", "refuse"]),
        (&emulated, &["--product", "milan"]),
        (&emulated, &["--emulated-keys", &file]),
        (&emulated, &["--statistics"]),
        (&[], &["--vtpm-socket", &file]),
        (&tpm, &["--vtpm-anchor", &at("")]),
        (&tpm, &["--vm-uuid", "01234567-89ab-cdef-0123-456789abcdef"]),
        (&tpm, &["--vtpm-accept-rollback"]),
        (&tpm, &["--vtpm-adopt"]),
        (&tpm, &["--vtpm-svc", &auth]),
        (&["--vtpm"], &["--vtpm-ek-ca", &at("")]),
    ];
    let mut texts = std::collections::BTreeSet::new();
    for (base, options) in rows {
        let (made, text) = cvmm(&[&["spec", "--kernel", "/a/kernel"], base, options].concat());
        assert!(made, "{base:?} {options:?}: {text}");
        std::fs::write(&file, &text).unwrap();
        assert_eq!(cvmm(&["spec", "--spec", &file]), (true, text.clone()), "{base:?} {options:?}");
        assert!(texts.insert(text), "{base:?} {options:?}: the file is that of other options");
    }
}

#[test]
fn a_file_that_contradicts_itself_is_refused_by_its_field() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spec");
    let file = path.to_str().unwrap();
    for (text, expected) in [
        (r#"{"boot": {"direct": {"kernel": "k"}}, "snp": {"polcy": "0x30000"}}"#, "snp.polcy: unknown field"),
        (r#"{"boot": {"direct": {"kernel": "k"}}, "cpus": "two"}"#, "cpus: invalid type"),
        (
            r#"{"boot": {"igvm": {"image": "i"}}, "snp": {"accept": "lazy"}}"#,
            "snp.accept: would have no effect",
        ),
        (r#"{"boot": {"direct": {"kernel": "k"}}}"#, "snp: a plain guest has no launch digest"),
    ] {
        std::fs::write(&path, text).unwrap();
        let (good, message) = cvmm(&["measure", "--spec", file]);
        assert!(!good && message.contains(expected), "{text}: {message}");
    }
    assert!(!cvmm(&["--spec", file, "--cpus", "2"]).0);
}
