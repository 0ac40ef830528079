// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask hardware-test`: makes the hardware kit and runs it on this machine, for developers who have
//! an SNP host.
//!
//! Everything else is in the package `tests/hardware-kit`. This refuses before it builds or fetches anything.

use std::path::PathBuf;
use std::process::Command;
use std::process::ExitCode;

use anyhow::Context as _;
use anyhow::Result;
use cvmm_tests::workspace::Workspace;
use hardware_kit::Gate;
use hardware_kit::Program;
use hardware_kit::REFUSED;

use crate::build;
use crate::hardware_kit as kit;
use crate::setup;
use crate::steps::Steps;

/// `cargo xtask hardware-test`
#[derive(clap::Args)]
pub struct Args {
    /// The cvmm to ask whether this is an SNP host; built if not given.
    #[arg(long, value_name = "FILE")]
    cvmm: Option<PathBuf>,
    /// What the kit's program gets, after `--`: see `run --help` in the kit.
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// Runs the chore. Exit codes are the kit's.
pub fn run(args: &Args) -> Result<ExitCode> {
    let workspace = Workspace::find();
    let mut steps = Steps::new();
    let cvmm = match &args.cvmm {
        Some(path) => path.clone(),
        None => {
            steps.step("build cvmm (release)", || build::release(&workspace, &["vmm"]))?;
            workspace.cargo_output(build::PROFILE).join("cvmm")
        }
    };
    let rehearsal = args.options.iter().any(|option| option == "--rehearse");
    if let (Gate::Closed(why), _) = hardware_kit::ask(&Program::new(cvmm), rehearsal)? {
        eprintln!("hardware-test refuses to run: {why}");
        eprintln!("It proves something only on a host with SEV-SNP.");
        eprintln!("For tests without SNP hardware: `cargo xtask test`, `cargo xtask demo`.");
        return Ok(ExitCode::from(REFUSED));
    }
    setup::prepare(&mut steps, setup::Kernels::Needed, false)?;
    let folder = kit::unpacked(&workspace, &mut steps)?;
    let program = folder.join("run");
    let status = Command::new(&program)
        .args(&args.options)
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// With a stand-in for cvmm, so that it holds on every machine; `doctor/hardware-test-refuses` uses the
    /// real one.
    #[test]
    fn a_host_that_can_only_emulate_is_refused_before_anything_is_built() {
        let directory = std::env::temp_dir().join(format!("cvmm-hardware-test-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let cvmm = directory.join("cvmm");
        fs::write(&cvmm, "#!/bin/sh\necho '{\"verdict\": \"emulation\"}'\nexit 10\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&cvmm, mode).unwrap();
        let code = run(&Args { cvmm: Some(cvmm), options: Vec::new() }).unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(REFUSED)));
        fs::remove_dir_all(&directory).unwrap();
    }
}
