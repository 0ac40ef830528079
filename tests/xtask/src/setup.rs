// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask setup`: everything that the other chores need, on a bare Debian 12 with Rust. Does only what is missing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::nested::QEMU;
use cvmm_tests::workspace::Workspace;

use crate::apt;
use crate::apt::Downloader;
use crate::guest;
use crate::oracles;
use crate::steps::Steps;
use crate::steps::capture;
use crate::steps::show;

/// Packages whose programs the harness runs: the emulator for nested runs, which is also the peer of the boot bench; the
/// TPM engine that vtpm-svc loads; the TPM tools that its tests drive it with, on the host and in guests; and a second opinion on
/// kernels' digests.
const PACKAGES: &[&str] = &[
    "qemu-system-x86",
    "libtpms0",
    "swtpm",
    "swtpm-tools",
    "tpm2-tools",
    "tss2",
    "busybox-static",
    "openssl",
    "pesign",
    "systemd",
];

/// The release that the project is tested on.
const CODENAME: &str = "bookworm";

/// `cargo xtask setup`
#[derive(clap::Args)]
pub struct Args {
    /// Fetch the guest kernels again, to follow Debian's updates.
    #[arg(long)]
    update: bool,
}

/// Runs the chore and prints its times.
pub fn run(args: &Args) -> Result<()> {
    let mut steps = Steps::new();
    prepare(&mut steps, args.update)?;
    steps.print_table();
    Ok(())
}

/// The steps, for chores that begin with them.
pub fn prepare(steps: &mut Steps, update: bool) -> Result<()> {
    let workspace = Workspace::find();
    steps.step("host packages", host_packages)?;
    kernels(steps, &workspace, update)?;
    steps.step("measurement oracles", || oracles::prepare(&workspace))?;
    steps.step("build guest programs", || guest::build_programs(&workspace))?;
    steps.step("build initial ramdisks", || guest::build_initrds(&workspace))
}

fn host_packages() -> Result<()> {
    if apt::debian_codename().is_none() {
        return match capture(Command::new(QEMU).arg("--version")) {
            Ok(_) => Ok(()),
            Err(_) => bail!("this machine is no Debian: install {QEMU} (7.2 or later) yourself"),
        };
    }
    let missing = apt::missing(PACKAGES);
    if missing.is_empty() {
        println!("           all installed: {}", PACKAGES.join(" "));
        return Ok(());
    }
    println!("           installing {}", missing.join(" "));
    apt::install(&missing)
}

fn kernels(steps: &mut Steps, workspace: &Workspace, update: bool) -> Result<()> {
    let directory = workspace.kernels();
    let missing: Vec<Role> =
        Role::ALL.into_iter().filter(|role| update || Kernel::find(workspace, *role).is_err()).collect();
    if missing.is_empty() {
        return steps.step("guest kernels", || {
            for role in Role::ALL {
                println!("           {}: {}", role.name(), Kernel::find(workspace, role)?.release);
            }
            Ok(())
        });
    }
    let names: Vec<&str> = missing.iter().map(|role| role.name()).collect();
    let provide = format!(
        "provide them: unpacked Debian kernel packages, so that {0}/<name>/boot/vmlinuz-* and \
         {0}/<name>/lib/modules/* exist for <name> = {1}; CVMM_KERNEL_DIR names another directory",
        directory.display(),
        names.join(", ")
    );
    if std::env::var_os("CVMM_KERNEL_DIR").is_some() {
        bail!("CVMM_KERNEL_DIR is set but lacks kernels; {provide}");
    }
    match apt::debian_codename() {
        Some(name) if name == CODENAME => {}
        Some(name) => {
            bail!("guest kernels come from Debian {CODENAME}, this machine is Debian {name}; {provide}")
        }
        None => bail!("guest kernels come from Debian {CODENAME}, this machine is no Debian; {provide}"),
    }
    let downloader = Downloader::new(&workspace.work().join("apt"), CODENAME)?;
    steps.step("package lists for the guest kernels", || downloader.update())?;
    for role in missing {
        steps.step(&format!("kernel {}", role.name()), || fetch(&downloader, &directory, role))?;
    }
    Ok(())
}

fn fetch(downloader: &Downloader, directory: &Path, role: Role) -> Result<()> {
    let candidate = downloader.behind(role.meta_package(), role == Role::BackportsCloud)?;
    println!("           {} {}", candidate.package, candidate.version);
    let package = downloader.download(&candidate)?;
    let size = fs::metadata(&package)?.len() as f64 / f64::from(1 << 20);
    println!("           {size:.0} MiB, unpacking");
    let target = directory.join(role.name());
    let partial = directory.join(format!("{}.partial", role.name()));
    for old in [&partial, &target] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    show(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&partial))?;
    Kernel::open(&partial)?;
    fs::rename(&partial, &target).with_context(|| format!("cannot rename {}", partial.display()))?;
    fs::remove_file(&package).context("cannot remove the package file")
}
