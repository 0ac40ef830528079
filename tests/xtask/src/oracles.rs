// SPDX-License-Identifier: Apache-2.0
//! What the measurement tests compare with: `sev-snp-measure` in a Python environment of its own, and
//! Debian's firmware.
//!
//! Both land under `target/cvmm` and are used there, never installed on the machine.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use cvmm_tests::workspace::Workspace;

use crate::apt;
use crate::steps::show;

/// The release of `sev-snp-measure` whose register values are followed.
const SEV_SNP_MEASURE: &str = "sev-snp-measure==0.0.13";

/// The interpreter that can import `sevsnpmeasure`.
pub fn python(workspace: &Workspace) -> PathBuf {
    let own = || workspace.work().join("venv/bin/python");
    std::env::var_os("CVMM_ORACLE_PYTHON").map_or_else(own, PathBuf::from)
}

/// Installs what is missing. Without the tool its tests say that they are skipped, which is no reason not to run the others.
pub fn prepare(workspace: &Workspace) -> Result<()> {
    let has_tool = Command::new(python(workspace)).args(["-c", "import sevsnpmeasure"]).output();
    if !has_tool.is_ok_and(|output| output.status.success())
        && std::env::var_os("CVMM_ORACLE_PYTHON").is_none()
        && let Err(error) = install_tool(workspace)
    {
        // An environment without the tool would be taken for one that has it.
        let _ = fs::remove_dir_all(workspace.work().join("venv"));
        println!("           {SEV_SNP_MEASURE} is not installed: {error:#}");
        println!(
            "           its tests are skipped. To have them, give pip a way to PyPI (PIP_INDEX_URL for a mirror), or set"
        );
        println!("           CVMM_ORACLE_PYTHON to a Python interpreter that can import sevsnpmeasure");
    }
    let ovmf = workspace.work().join("ovmf");
    if !ovmf.exists() && apt::debian_codename().is_some() {
        unpack("ovmf", &ovmf)?;
    }
    Ok(())
}

fn install_tool(workspace: &Workspace) -> Result<()> {
    if apt::debian_codename().is_some() {
        let missing = apt::missing(&["python3-venv"]);
        if !missing.is_empty() {
            apt::install(&missing)?;
        }
    }
    show(Command::new("python3").args(["-m", "venv"]).arg(workspace.work().join("venv")))?;
    show(Command::new(python(workspace)).args(["-m", "pip", "install", "--quiet", SEV_SNP_MEASURE]))
}

/// Fetches a Debian package of this machine's release and unpacks it to `target`.
fn unpack(package: &str, target: &Path) -> Result<()> {
    let folder = target.with_extension("partial");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    show(Command::new("apt-get").args(["--quiet", "download", package]).current_dir(&folder))?;
    let file = fs::read_dir(&folder)?.filter_map(|entry| Some(entry.ok()?.path())).next();
    let Some(file) = file else { bail!("apt-get download {package} wrote no file") };
    show(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&folder))?;
    fs::remove_file(&file).context("cannot remove the package file")?;
    fs::rename(&folder, target).with_context(|| format!("cannot rename {}", folder.display()))
}
