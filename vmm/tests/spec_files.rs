// SPDX-License-Identifier: Apache-2.0
//! A VM in a file and the same one in options: `cvmm measure` has one plan for both, byte for byte.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::path::Path;
use std::process::Command;

use test_support::code::power_off;
use test_support::tiny;

fn cvmm(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_cvmm")).args(args).output().unwrap();
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn a_file_and_options_have_one_plan() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("kernel"), tiny::kernel(&power_off())).unwrap();
    std::fs::write(at("initrd"), [0x5a; 5000]).unwrap();
    let (kernel, initrd, file) = (at("kernel"), at("initrd"), at("spec"));
    let mut digests = std::collections::BTreeSet::new();
    let rows: [&[&str]; 9] = [
        &[],
        &["--initrd", &initrd],
        &["--cmdline", "console=ttyS0 quiet"],
        &["--memory", "1G"],
        &["--cpus", "3"],
        &["--accept", "eager", "--memory", "3G"],
        &["--secure-tsc"],
        &["--validation", "launch", "--memory", "128M"],
        &["--vtpm"],
    ];
    for options in rows {
        let (dump, other) = (at("dump"), at("dump-of-file"));
        let base = ["--kernel", &kernel];
        let measured = cvmm(&[&["measure", "--dump", &dump], &base[..], options].concat());
        assert!(measured.0, "{options:?}: {}", measured.1);
        let (made, text) = cvmm(&[&["spec", "--snp"], &base[..], options].concat());
        assert!(made, "{options:?}: {text}");
        std::fs::write(&file, text).unwrap();
        assert_eq!(cvmm(&["measure", "--dump", &other, "--spec", &file]), measured, "{options:?}");
        for end in ["", ".contents"] {
            let read = |path: &str| std::fs::read(Path::new(&format!("{path}{end}"))).unwrap();
            assert!(read(&dump) == read(&other), "{options:?}: another plan");
        }
        digests.insert(measured.1);
    }
    assert_eq!(digests.len(), rows.len(), "each option is part of the digest");
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
