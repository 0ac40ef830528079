// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask hardware-kit`: one archive with everything that tells whether cvmm works on an SNP host.
//!
//! Such a host is somebody's production machine: no package is installed there, no other distribution than
//! ours is expected, and there may be no network. So the programs are static, and the archive holds the guest
//! as well: cvmm, `run` (the package `tests/hardware-kit`), a kernel, an initial ramdisk, and a page that
//! says what to do.
//!
//! The TPM service cannot be static: it loads libtpms when it starts. So it goes with its libraries and their
//! loader in a folder of its own, and `run` starts it there by the name `vtpm-svc`
//! (`tests/hardware-kit/src/service.rs`).

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;
use anyhow::Result;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::tpm;
use cvmm_tests::workspace::Workspace;
use hardware_kit::service;

use crate::build;
use crate::guest;
use crate::setup;
use crate::steps::Steps;
use crate::steps::show;

/// Name of the archive's folder.
pub const FOLDER: &str = "cvmm-hardware-kit";

const README: &str = "\
Tells whether cvmm, a KVM monitor for AMD SEV-SNP guests, works on this host.

    ./run                        # --help lists what else it can do

Run it as root, or as a user who may open /dev/kvm and /dev/sev (only root has the kernel log in the report). It launches
a few small guests, one after the other, takes some minutes, changes nothing on the host and needs nothing but this folder. On a
host that cannot launch SNP guests it says what is missing and ends with code 3.

It writes one file, cvmm-hardware-report.json: please send it back, in the refused case too. It names the CPU, kernel and
firmware versions, and has attestation reports, which carry the chip's id unless the host masks it: look before you send.
With the certificates of this host's key (--certs vcek.der) the reports' signatures are checked as well.
";

/// What the service loads by itself.
const LIBTPMS: &str = "/usr/lib/x86_64-linux-gnu/libtpms.so.0";

/// `cargo xtask hardware-kit`
#[derive(clap::Args)]
pub struct Args {
    /// Where the archive goes [default: target/cvmm/cvmm-hardware-kit.tar.gz]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the chore.
pub fn run(args: &Args) -> Result<()> {
    let workspace = Workspace::find();
    let mut steps = Steps::new();
    setup::prepare(&mut steps, setup::Kernels::Needed, false)?;
    let folder = unpacked(&workspace, &mut steps)?;
    let output = match &args.output {
        Some(path) => path.clone(),
        None => workspace.work().join(format!("{FOLDER}.tar.gz")),
    };
    steps.step("pack it", || pack(&folder, &output))?;
    let size = fs::metadata(&output)?.len() as f64 / f64::from(1 << 20);
    println!("{}: {size:.1} MiB", output.display());
    println!("on the SNP host: tar xzf {FOLDER}.tar.gz && cd {FOLDER} && ./run");
    Ok(())
}

/// Builds the folder that the archive holds; kernel and initial ramdisk must be there.
pub fn unpacked(workspace: &Workspace, steps: &mut Steps) -> Result<PathBuf> {
    let folder = workspace.work().join(FOLDER);
    steps.step("build cvmm and the kit's program (static)", || {
        guest::build_static(workspace, &["vmm", "hardware-kit"])
    })?;
    steps.step("build the TPM service", || build::release(workspace, &["vtpm-svc"]))?;
    steps.step("gather the kit", || {
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let role = Role::BackportsCloud;
        let kernel = Kernel::find(workspace, role)?;
        println!("           Linux {}", kernel.release);
        for (from, name) in [
            (workspace.guest_program("hardware-kit"), "run"),
            (workspace.guest_program("cvmm"), "cvmm"),
            (kernel.image, "vmlinuz"),
            (workspace.guest_initrd(role), "initrd"),
        ] {
            copy(&from, &folder.join(name))?;
        }
        add_service(workspace, &folder)?;
        fs::write(folder.join("README"), README).context("cannot write README")
    })?;
    Ok(folder)
}

/// The TPM service with all that it loads, and its name beside cvmm.
fn add_service(workspace: &Workspace, folder: &Path) -> Result<()> {
    let own = folder.join(service::FOLDER);
    if own.exists() {
        fs::remove_dir_all(&own).with_context(|| format!("cannot remove {}", own.display()))?;
    }
    fs::create_dir_all(&own).with_context(|| format!("cannot create {}", own.display()))?;
    let program = workspace.cargo_output(build::PROFILE).join(service::NAME);
    let mut files = vec![program.clone(), LIBTPMS.into()];
    for file in [&program, Path::new(LIBTPMS)] {
        files.extend(tpm::libraries(file)?);
    }
    for file in files {
        let name = file.file_name().with_context(|| format!("{} has no name", file.display()))?;
        copy(&file, &own.join(name))?;
    }
    let name = folder.join(service::NAME);
    match fs::remove_file(&name) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot replace {}", name.display()));
        }
        _ => {}
    }
    std::os::unix::fs::symlink("run", &name).with_context(|| format!("cannot make {}", name.display()))
}

/// A new file in place of an old one, which may be running.
fn copy(from: &Path, to: &Path) -> Result<()> {
    match fs::remove_file(to) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot replace {}", to.display()));
        }
        _ => {}
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Packs the folder's files and nothing else that may lie there.
fn pack(folder: &Path, output: &Path) -> Result<()> {
    let parent = folder.parent().context("the kit's folder")?;
    let files = ["README", "cvmm", "initrd", "run", "vmlinuz", service::NAME, service::FOLDER]
        .map(|name| format!("{FOLDER}/{name}"));
    show(
        Command::new("tar")
            .args(["--create", "--gzip", "--owner=root:0", "--group=root:0", "--mtime=@0", "--file"])
            .arg(output)
            .arg("--directory")
            .arg(parent)
            .args(files),
    )
}
