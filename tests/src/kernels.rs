// SPDX-License-Identifier: Apache-2.0
//! The guest kernels, by the part they play.
//!
//! Each is an unpacked Debian package: `boot/vmlinuz-*` and `lib/modules/*`. `cargo xtask setup` fetches them; on a machine
//! that is not Debian 12 somebody provides them and points `CVMM_KERNEL_DIR` at the directory.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use crate::workspace::Workspace;

/// Which kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The cloud kernel of the stable release's backports: 6.12 for Debian 12. The main guest.
    BackportsCloud,
    /// The cloud kernel of the stable release: 6.1. It has no `sev-guest` driver.
    StableCloud,
    /// The generic kernel of the stable release: 6.1. It is also L1's kernel, because it has 9p and KVM as modules.
    StableGeneric,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 3] = [Role::BackportsCloud, Role::StableCloud, Role::StableGeneric];

    /// Name of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Role::BackportsCloud => "backports-cloud",
            Role::StableCloud => "stable-cloud",
            Role::StableGeneric => "stable-generic",
        }
    }

    /// The Debian package whose dependency is the kernel's own package.
    pub fn meta_package(self) -> &'static str {
        match self {
            Role::BackportsCloud | Role::StableCloud => "linux-image-cloud-amd64",
            Role::StableGeneric => "linux-image-amd64",
        }
    }
}

/// One unpacked kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// The directory with `kernel/` and `modules.builtin` in it.
    pub modules: PathBuf,
    /// The release, such as `6.1.0-56-amd64`.
    pub release: String,
}

impl Kernel {
    /// Finds the kernel that plays `role`.
    pub fn find(workspace: &Workspace, role: Role) -> Result<Self> {
        let directory = workspace.kernels().join(role.name());
        Self::open(&directory).with_context(|| {
            format!(
                "no {} kernel: run `cargo xtask setup`, or see CVMM_KERNEL_DIR in docs/testing.md",
                role.name()
            )
        })
    }

    /// The kernel unpacked at `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        let image = only_entry(&directory.join("boot"), "vmlinuz-")?;
        let modules = [directory.join("lib/modules"), directory.join("usr/lib/modules")]
            .iter()
            .find_map(|parent| only_entry(parent, "").ok())
            .with_context(|| format!("no single directory in {}/lib/modules", directory.display()))?;
        let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Kernel { image, modules, release })
    }
}

/// The one entry of `directory` whose name starts with `prefix`.
fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some(path), true) => Ok(path),
        (None, _) => bail!("{} has no {prefix}* in it", directory.display()),
        _ => bail!("{} has more than one {prefix}* in it", directory.display()),
    }
}
