// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask setup`: everything that the other chores need, on a bare Debian 12 with Rust. Does only what
//! is missing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::nested::QEMU;
use cvmm_tests::nested::bochs;
use cvmm_tests::probe;
use cvmm_tests::workspace::Workspace;

use crate::apt;
use crate::apt::Candidate;
use crate::apt::Downloader;
use crate::apt::Series;
use crate::guest;
use crate::oracles;
use crate::steps::Steps;
use crate::steps::capture;
use crate::steps::show;

/// Packages whose programs the harness runs: the emulator for nested runs, which is also the peer of the boot
/// bench; the TPM engine that vtpm-svc loads; the TPM tools that its tests drive it with, on the host and in
/// guests; and a second opinion on kernels' digests.
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

/// Suites of the same archive with later kernels. None of them is needed: what is there is taken. Both names
/// stay as they are when Debian releases.
const LATER_SUITES: &[&str] = &["trixie-backports", "sid"];

/// Kernels of later suites are of this series or later. It is the first with `struct fpu` behind
/// `x86_task_fpu` (arch/x86/kernel/fpu/core.c), which made an error of what earlier kernels only warned of;
/// earlier ones are among the needed.
const LATER_THAN: Series = (6, 16);

/// Which guest kernels a chore begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// [`Role::NEEDED`].
    Needed,
    /// These, and [`Role::LATER`] if the archive has them.
    AndLater,
}

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
    prepare(&mut steps, Kernels::AndLater, args.update)?;
    steps.print_table();
    Ok(())
}

/// The steps, for chores that begin with them.
pub fn prepare(steps: &mut Steps, wanted: Kernels, update: bool) -> Result<()> {
    let workspace = Workspace::find();
    steps.step("host packages", host_packages)?;
    if probe::intel_is_asked_for() {
        steps.step("packages for an Intel L1", intel_packages)?;
    }
    kernels(steps, &workspace, update)?;
    if wanted == Kernels::AndLater {
        steps.step("kernels of later suites", || later_kernels(&workspace, update))?;
    }
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
    install_missing(PACKAGES)
}

/// Bochs brings a graphical toolkit with it, so it is installed only for those who ask for an Intel CPU.
pub fn intel_packages() -> Result<()> {
    if apt::debian_codename().is_none() {
        bail!("this machine is no Debian: what an Intel L1 needs is known only for Debian");
    }
    install_missing(bochs::PACKAGES)
}

fn install_missing(packages: &[&str]) -> Result<()> {
    let missing = apt::missing(packages);
    if missing.is_empty() {
        println!("           all installed: {}", packages.join(" "));
        return Ok(());
    }
    println!("           installing {}", missing.join(" "));
    apt::install(&missing)
}

fn kernels(steps: &mut Steps, workspace: &Workspace, update: bool) -> Result<()> {
    let directory = workspace.kernels();
    let missing: Vec<Role> =
        Role::NEEDED.into_iter().filter(|role| update || Kernel::find(workspace, *role).is_err()).collect();
    if missing.is_empty() {
        return steps.step("guest kernels", || {
            for role in Role::NEEDED {
                println!("           {}: {}", role.name(), Kernel::find(workspace, role)?.release);
            }
            Ok(())
        });
    }
    let names: Vec<&str> = missing.iter().map(|role| role.name()).collect();
    let provide = format!(
        "provide them: unpacked Debian kernel packages, so that {0}/<name>/boot/vmlinuz-* (or \
         {0}/<name>/usr/lib/modules/*/vmlinuz) and {0}/<name>/lib/modules/* exist for <name> = {1}; CVMM_KERNEL_DIR names \
         another directory",
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

/// Fetches kernels that are newer than this machine's release. Not having them is no error: the cases say
/// what they miss.
fn later_kernels(workspace: &Workspace, update: bool) -> Result<()> {
    // The archive may have only one; it is not asked for the other in every run.
    let is_new = Kernel::find(workspace, Role::NewestCloud).is_err();
    let can_fetch =
        std::env::var_os("CVMM_KERNEL_DIR").is_none() && apt::debian_codename().as_deref() == Some(CODENAME);
    if can_fetch
        && (update || is_new)
        && let Err(error) = fetch_later(workspace)
    {
        println!("           not fetched: {error:#}");
    }
    for role in Role::LATER {
        match Kernel::find(workspace, role) {
            Ok(kernel) => println!("           {}: {}", role.name(), kernel.release),
            Err(_) => println!(
                "           {}: none, so its tests are skipped; setup --update looks again",
                role.name()
            ),
        }
    }
    Ok(())
}

fn fetch_later(workspace: &Workspace) -> Result<()> {
    let downloader = Downloader::other_suites(&workspace.work().join("apt-later"), CODENAME, LATER_SUITES)?;
    if let Err(error) = downloader.update() {
        // apt has taken the suites that it could read, and has said what is wrong with the others.
        println!("           not every suite of {} could be read: {error:#}", LATER_SUITES.join(", "));
    }
    let found = downloader.newest_two(Role::NewestCloud.meta_package(), LATER_THAN)?;
    if found.is_empty() {
        bail!("{} have no kernel from {}.{} on", LATER_SUITES.join(" and "), LATER_THAN.0, LATER_THAN.1);
    }
    for (role, candidate) in Role::LATER.into_iter().zip(found) {
        unpack(&downloader, &workspace.kernels(), role, candidate)?;
    }
    Ok(())
}

fn fetch(downloader: &Downloader, directory: &Path, role: Role) -> Result<()> {
    let candidate = downloader.behind(role.meta_package(), role == Role::BackportsCloud)?;
    unpack(downloader, directory, role, candidate)
}

/// Downloads a kernel and puts it where `role` is looked for.
fn unpack(downloader: &Downloader, directory: &Path, role: Role, candidate: Candidate) -> Result<()> {
    println!("           {} {}", candidate.package, candidate.version);
    let target = directory.join(role.name());
    let partial = directory.join(format!("{}.partial", role.name()));
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    for part in downloader.parts(candidate)? {
        let package = downloader.download(&part)?;
        let size = fs::metadata(&package)?.len() as f64 / f64::from(1 << 20);
        println!("           {}: {size:.0} MiB, unpacking", part.package);
        show(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&partial))?;
        fs::remove_file(&package).context("cannot remove the package file")?;
    }
    Kernel::open(&partial)?;
    if target.exists() {
        fs::remove_dir_all(&target).with_context(|| format!("cannot remove {}", target.display()))?;
    }
    fs::rename(&partial, &target).with_context(|| format!("cannot rename {}", partial.display()))
}
