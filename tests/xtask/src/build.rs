// SPDX-License-Identifier: Apache-2.0
//! Builds the project's programs as a user gets them.

use std::process::Command;

use anyhow::Result;
use cvmm_tests::workspace::Workspace;

use crate::steps::show;

/// Cargo profile of the programs that chores run: a debug monitor would spend its time hashing.
pub const PROFILE: &str = "release";

/// A cargo command in the checkout.
pub fn cargo(workspace: &Workspace) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(workspace.root());
    command
}

/// Builds `packages` in release mode; cargo shows its progress.
pub fn release(workspace: &Workspace, packages: &[&str]) -> Result<()> {
    let mut command = cargo(workspace);
    command.args(["build", "--release"]);
    for package in packages {
        command.args(["--package", package]);
    }
    show(&mut command)
}
