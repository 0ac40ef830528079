// SPDX-License-Identifier: Apache-2.0
//! Builds what runs inside guests: the static programs and the initial ramdisks.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use cvmm_tests::initrd;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::tpm;
use cvmm_tests::workspace::Workspace;

use crate::steps::show;

/// Builds the programs of `tests/guest-init`.
pub fn build_programs(workspace: &Workspace) -> Result<()> {
    build_static(workspace, &["guest-init"])
}

/// Builds the programs of `packages` as static executables, so that they need no file but themselves.
///
/// Naming the target keeps the flags away from procedural macros, which cannot be linked statically.
pub fn build_static(workspace: &Workspace, packages: &[&str]) -> Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--release", "--bins"]);
    for package in packages {
        command.args(["--package", package]);
    }
    show(
        command
            .args(["--target", "x86_64-unknown-linux-gnu", "--target-dir"])
            .arg(workspace.guest_target())
            .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .current_dir(workspace.root()),
    )
}

/// Builds L1's initial ramdisk and one per guest kernel.
pub fn build_initrds(workspace: &Workspace) -> Result<()> {
    let directory = workspace.initrds();
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let l1 = Kernel::find(workspace, Role::StableGeneric)?;
    let agent = workspace.guest_program("l1-agent");
    write(&directory.join("l1.cpio"), &initrd::build(&l1, &agent, initrd::L1_MODULES)?)?;
    let init = workspace.guest_program("l2-init");
    for role in Role::NEEDED.into_iter().chain(Role::LATER) {
        let kernel = match Kernel::find(workspace, role) {
            Ok(kernel) => kernel,
            Err(_) if Role::LATER.contains(&role) => continue,
            Err(error) => return Err(error),
        };
        let bytes = initrd::build(&kernel, &init, initrd::SEV_GUEST_MODULES)?;
        write(&workspace.guest_initrd(role), &bytes)?;
    }
    write(&tpm::initrd_path(workspace), &tpm::initrd()?)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    println!("           {} {:.1} MiB", path.display(), bytes.len() as f64 / f64::from(1 << 20));
    Ok(())
}
