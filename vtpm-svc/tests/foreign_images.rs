// SPDX-License-Identifier: Apache-2.0
//! Images that another tool of the format has written, changed or damaged: what is seen of them, what is
//! refused, and that the way out which a refusal names works.
#![allow(clippy::panic)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use common::STARTUP_CLEAR;
use common::Site;
use common::code;
use common::decoder::decode;
use common::program;
use common::tpm;

const NEW: [u8; 32] = [0x99; 32];

/// A site with one of the recorded images and its key.
fn site(name: &str) -> Site {
    let site = Site::without_image();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let out =
        Command::new("gzip").arg("-dc").arg(data.join(format!("{name}.vmgs.gz"))).output().expect("gzip");
    assert!(out.status.success(), "{out:?}");
    std::fs::write(site.path("vmgs"), out.stdout).expect("image");
    std::fs::copy(data.join("key.bin"), site.path("key")).expect("key");
    std::fs::write(site.path("new"), NEW).expect("key");
    for key in ["key", "new"] {
        std::fs::set_permissions(site.path(key), std::fs::Permissions::from_mode(0o600)).expect("mode");
    }
    site
}

/// A command with exit code, on the site's image, key and anchor.
fn vmgs(site: &Site, args: &[&str]) -> (i32, String) {
    let mut c = program();
    c.arg("vmgs").arg(args[0]).arg(site.path("vmgs")).args(&args[1..]);
    c.arg("--key-file").arg(site.path("key")).arg("--anchor").arg(site.path("anchor"));
    let out = c.output().expect("run");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text)
}

fn bytes(path: PathBuf) -> Vec<u8> {
    std::fs::read(path).expect("read")
}

#[test]
fn looking_needs_nobodys_permission_and_changes_nothing() {
    for (name, file) in [("foreign-plain", "40"), ("foreign-encrypted", "1")] {
        let site = site(name);
        let before = bytes(site.path("vmgs"));
        let out = site.path("out").display().to_string();
        let (code, text) = vmgs(&site, &["list"]);
        assert!(code == 0 && text.contains("bytes=100") && text.contains("integrity root"), "{text}");
        let (code, text) = vmgs(&site, &["export", "--id", file, "-o", &out]);
        assert!(code == 0 && bytes(site.path("out")).len() == 100, "{text}");
        let (code, text) = vmgs(&site, &["inspect"]);
        assert!(code == 0 && text.contains("root: -"), "{text}");
        assert!(bytes(site.path("vmgs")) == before && !site.path("anchor").exists(), "{name}");
        // To change it is another thing: nothing says that it is the newest copy either.
        for words in [&[][..], &["--adopt"], &["--accept-rollback"]] {
            let (code, text) = vmgs(&site, &[&["import", "--id", "9", "-i", &out], words].concat());
            assert!(code == 5 && text.contains("--adopt and --accept-rollback together"), "{text}");
        }
        let (code, text) = vmgs(&site, &["import", "--id", "9", "-i", &out, "--adopt", "--accept-rollback"]);
        assert!(code == 0 && text.contains("ADOPTED") && !text.contains("ROLLBACK"), "{text}");
        let (code, text) = vmgs(&site, &["import", "--id", "9", "-i", &out]);
        assert_eq!(code, 0, "{text}");
        // The copy of before, under an id that the anchor does not know: to adopt it would be a rollback.
        let mut copy = before;
        let footer = copy.len() - 512;
        copy[footer + 68] ^= 1;
        let sum: u32 = copy[footer..].iter().map(|b| u32::from(*b)).sum::<u32>()
            - copy[footer + 64..footer + 68].iter().map(|b| u32::from(*b)).sum::<u32>();
        copy[footer + 64..footer + 68].copy_from_slice(&(!sum).to_be_bytes());
        std::fs::write(site.path("vmgs"), copy).expect("copy");
        let (code, text) = vmgs(&site, &["import", "--id", "9", "-i", &out, "--adopt"]);
        assert!(code == 5 && text.contains("--adopt and --accept-rollback together"), "{text}");
    }
}

#[test]
fn a_zero_key_is_found_wherever_it_is_and_a_repair_ends_it() {
    for (name, files) in [("zero-metadata-key", 4), ("zero-key-table-behind-inactive-header", 5)] {
        let site = site(name);
        let new = site.path("new").display().to_string();
        let (code, text) = vmgs(&site, &["check"]);
        assert!(code == 3 && text.contains("anyone can read"), "{text}");
        for option in ["--adopt", "--accept-rollback"] {
            let (code, text) = vmgs(&site, &["delete", "--id", "40", option]);
            assert!(code == 5 && text.contains("vmgs repair"), "{text}");
        }
        let repair = ["repair", "--new-key-file", &new, "--adopt", "--accept-rollback"];
        // What the other tool did besides is named, and has to be accepted in words.
        let (code, text) = vmgs(&site, &repair[..3]);
        assert!(code == 5 && text.contains("file 40") && text.contains("--adopt"), "{text}");
        let (code, text) = vmgs(&site, &repair);
        assert!(code == 0 && text.contains("ADOPTED: file 40"), "{text}");
        assert_eq!(decode(&bytes(site.path("vmgs")), &NEW).expect("new key").files.len(), files, "{name}");
        std::fs::rename(site.path("new"), site.path("key")).expect("key");
        let (code, text) = vmgs(&site, &["check"]);
        assert!(code == 0 && text.contains("secrecy: the contents were readable"), "{text}");
        // Once is enough: an image that needs none is not marked by mistake.
        std::fs::write(site.path("new"), [0x98; 32]).expect("key");
        std::fs::set_permissions(site.path("new"), std::fs::Permissions::from_mode(0o600)).expect("mode");
        let (code, text) = vmgs(&site, &repair[..3]);
        assert!(code == 2 && text.contains("needs no repair"), "{text}");
        let (code, text) = vmgs(&site, &["repair", "--new-key-file", &new, "--force"]);
        assert_eq!(code, 0, "{text}");
    }
}

#[test]
fn a_lost_tpm_state_is_no_new_tpm_and_its_copy_brings_it_back() {
    for name in ["tpm-state-one-bit-damaged", "tpm-state-deleted"] {
        let site = site(name);
        let start = |more: &[&str]| {
            let mut c = program();
            c.args(["socket", "--tpm2", "--server"]);
            c.arg(format!("type=unixio,path={}", site.path("x").display()));
            c.arg("--vmgs").arg(site.path("vmgs")).arg("--key-file").arg(site.path("key"));
            c.arg("--anchor").arg(site.path("anchor")).args(more);
            let out = c.output().expect("run");
            String::from_utf8_lossy(&out.stderr).into_owned()
        };
        // With every option there is: the state is named, and so are the commands that help.
        let text = start(&["--accept-rollback", "--adopt"]);
        assert!(text.contains("file 60") && text.contains("vmgs import --id 60"), "{name}: {text}");
        let out = site.path("out").display().to_string();
        let (code, text) = vmgs(&site, &["export", "--id", "61", "-o", &out]);
        assert_eq!(code, 0, "{text}");
        let (code, text) = vmgs(&site, &["import", "--id", "60", "-i", &out, "--accept-rollback"]);
        assert_eq!(code, 0, "{text}");
        let mut service = site.start(&["--flags", "not-need-init"]);
        let mut s = service.connect_data();
        assert_eq!(crate::code(&tpm(&mut s, STARTUP_CLEAR).expect("startup")), 0, "{}", site.log());
        service.kill();
    }
}

#[test]
fn an_empty_encrypted_file_stops_nothing() {
    let site = site("empty-encrypted-file");
    let input = site.path("key").display().to_string();
    let (code, text) = vmgs(&site, &["import", "--id", "9", "-i", &input, "--adopt", "--accept-rollback"]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = vmgs(&site, &["list"]);
    assert!(code == 0 && text.contains("bytes=0 encrypted=true id=40"), "{text}");
    let (code, text) = vmgs(&site, &["delete", "--id", "40"]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = vmgs(&site, &["check"]);
    assert_eq!(code, 0, "{text}");
}

#[test]
fn a_clock_record_that_is_none_is_named_and_can_be_set() {
    let site = site("rtc-skew-5000-bytes");
    let (code, text) = vmgs(&site, &["clock"]);
    assert!(code == 0 && text.contains("5000 bytes, expected 8"), "{text}");
    // This image was adopted by an earlier version, which gave it an id that its container does not have.
    let (code, text) = vmgs(&site, &["clock", "--set", "5", "--accept-rollback"]);
    assert!(code == 5 && text.contains("the container's id") && text.contains("--adopt"), "{text}");
    let (code, text) = vmgs(&site, &["clock", "--set", "5", "--accept-rollback", "--adopt"]);
    assert_eq!(code, 0, "{text}");
    let new = site.path("new").display().to_string();
    // An id that is not the image's discloses nothing.
    let (code, text) = vmgs(&site, &["repair", "--new-key-file", &new, "--adopt"]);
    assert!(code == 2 && text.contains("needs no repair"), "{text}");
    let (code, text) = vmgs(&site, &["rekey", "--new-key-file", &new, "--adopt"]);
    assert_eq!(code, 0, "{text}");
    std::fs::rename(site.path("new"), site.path("key")).expect("key");
    let (code, text) = vmgs(&site, &["check"]);
    assert_eq!(code, 0, "{text}");
}

/// A backup from before the image was encrypted would take the place of a good file, and nothing would open
/// it afterwards.
#[test]
fn a_restore_puts_no_plain_text_where_an_encrypted_image_is() {
    let site = site("foreign-plain");
    let out = site.path("new").display().to_string();
    let (code, text) = vmgs(&site, &["import", "--id", "9", "-i", &out, "--adopt", "--accept-rollback"]);
    assert_eq!(code, 0, "{text}");
    let backup = bytes(site.path("vmgs"));
    std::fs::write(site.path("backup"), &backup).expect("backup");
    let (code, text) = vmgs(&site, &["rekey", "--new-key-file", &out]);
    assert_eq!(code, 0, "{text}");
    let good = bytes(site.path("vmgs"));
    let mut restore = program();
    restore.args(["vmgs", "restore"]).arg(site.path("backup")).arg(site.path("vmgs")).arg("--confirm");
    restore.arg("--key-file").arg(site.path("new")).arg("--anchor").arg(site.path("anchor"));
    let answer = restore.output().expect("run");
    assert_eq!(answer.status.code(), Some(5), "{}", String::from_utf8_lossy(&answer.stderr));
    assert!(bytes(site.path("vmgs")) == good, "the good file was changed");
}

/// Whoever has put a TPM's state in, or taken it away, has said that there was a TPM.
#[test]
fn an_image_whose_tpm_was_imported_never_gets_a_new_one() {
    let site = Site::new();
    let key = site.path("key").display().to_string();
    let (code, text) = vmgs(&site, &["import", "--id", "60", "-i", &key]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = vmgs(&site, &["delete", "--id", "60", "--confirm"]);
    assert_eq!(code, 0, "{text}");
    let mut start = program();
    start.args(["socket", "--tpm2", "--flags", "startup-clear", "--ctrl"]);
    start.arg(format!("type=unixio,path={}", site.path("c").display()));
    start.arg("--vmgs").arg(site.path("vmgs")).arg("--key-file").arg(site.path("key"));
    let answer = start.arg("--anchor").arg(site.path("anchor")).output().expect("run");
    let text = String::from_utf8_lossy(&answer.stderr);
    assert!(!answer.status.success() && !text.contains("manufactured"), "{text}");
}
