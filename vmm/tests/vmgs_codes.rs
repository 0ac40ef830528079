// SPDX-License-Identifier: Apache-2.0
//! `cvmm vmgs` ends with the codes that `docs/vmgs.md` lists, not with those of a run.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

#[test]
fn the_commands_for_state_images_have_their_own_exit_codes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    for (name, byte) in [("key", 0xa5u8), ("other-key", 0xa6)] {
        fs::write(at(name), [byte; 32]).unwrap();
        fs::set_permissions(at(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    let run = |words: &[&str], key: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvmm"));
        command.arg("vmgs").args(words).args(["--key-file", &at(key), "--anchor", &at("anchor")]);
        command.output().unwrap().status.code()
    };
    let image = at("vmgs");
    assert_eq!(run(&["create", &image], "key"), Some(0));
    assert_eq!(run(&["check", &image], "key"), Some(0));
    assert_eq!(run(&["create", &image], "key"), Some(2), "it is there");
    assert_eq!(run(&["list", &image], "other-key"), Some(4), "the wrong key");
    fs::remove_dir_all(at("anchor")).unwrap();
    assert_eq!(run(&["import", &image, "--id", "10", "-i", &at("key")], "key"), Some(5), "no anchor");
}
