// SPDX-License-Identifier: Apache-2.0
//! The shim's bytes depend on its sources and on the compiler, on nothing else: everyone who builds cvmm with
//! one toolchain gets one launch digest.

#![allow(clippy::unwrap_used, reason = "a test fails where its files fail")]

#[path = "../stage0/recipe.rs"]
mod recipe;

use std::path::Path;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn two_builds_in_different_folders_give_the_embedded_bytes() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("stage0");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    for name in ["a", "another-folder/with a space"] {
        let folder = tempfile::tempdir().unwrap();
        let (there, out) = (folder.path().join(name), folder.path().join("out"));
        copy(&sources, &there);
        std::fs::create_dir(&out).unwrap();
        let built = recipe::build(Path::new(&rustc), &there, &out).unwrap();
        assert_eq!(built.image, snp::stage0::BUILT.image, "built in {name}");
        assert_eq!(built.entry, snp::stage0::BUILT.entry);
        assert_eq!(built.park, snp::stage0::BUILT.park);
        assert_eq!(built.hook, snp::stage0::BUILT.hook);
        assert_eq!(built.sites, snp::stage0::BUILT.sites);
    }
}
