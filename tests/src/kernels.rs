// SPDX-License-Identifier: Apache-2.0
//! The guest kernels, by the part they play, and whatever kernels a folder holds.
//!
//! Each is one or more unpacked Debian packages: an image and its modules. Older packages have the image at
//! `boot/vmlinuz-RELEASE`, those of 7.2 and later at `usr/lib/modules/RELEASE/vmlinuz`. `cargo xtask setup`
//! fetches them; on a machine that is not Debian 12 somebody provides them and points `CVMM_KERNEL_DIR` at
//! the directory.

use std::fs;
use std::fs::File;
use std::io::Read;
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
    /// The generic kernel of the stable release: 6.1. It is also L1's kernel, because it has 9p and KVM as
    /// modules.
    StableGeneric,
    /// The newest cloud kernel of later suites.
    NewestCloud,
    /// The newest cloud kernel of later suites that is of another series than [`Role::NewestCloud`].
    NewerCloud,
}

impl Role {
    /// Those that every chore needs.
    pub const NEEDED: [Role; 3] = [Role::BackportsCloud, Role::StableCloud, Role::StableGeneric];

    /// Those of later suites. A machine may be unable to fetch them; their cases are skipped then.
    pub const LATER: [Role; 2] = [Role::NewestCloud, Role::NewerCloud];

    /// Name of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Role::BackportsCloud => "backports-cloud",
            Role::StableCloud => "stable-cloud",
            Role::StableGeneric => "stable-generic",
            Role::NewestCloud => "newest-cloud",
            Role::NewerCloud => "newer-cloud",
        }
    }

    /// The Debian package whose dependency is the kernel's own package.
    pub fn meta_package(self) -> &'static str {
        match self {
            Role::StableGeneric => "linux-image-amd64",
            Role::BackportsCloud | Role::StableCloud | Role::NewestCloud | Role::NewerCloud => {
                "linux-image-cloud-amd64"
            }
        }
    }
}

/// One kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// The directory with `kernel/` and `modules.builtin` in it; a lone image has none.
    pub modules: Option<PathBuf>,
    /// The release, such as `6.1.0-56-amd64`; for a lone image its file's name.
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

    /// The one kernel unpacked at `directory`, with its modules.
    pub fn open(directory: &Path) -> Result<Self> {
        let mut found = Self::unpacked(directory);
        let kernel = match (found.pop(), found.is_empty()) {
            (Some(kernel), true) => kernel,
            (None, _) => bail!(
                "{} has neither boot/vmlinuz-RELEASE nor usr/lib/modules/RELEASE/vmlinuz in it",
                directory.display()
            ),
            _ => bail!("{} has more than one kernel in it", directory.display()),
        };
        if kernel.modules.is_none() {
            bail!("{} has no modules of {} in it", directory.display(), kernel.release);
        }
        Ok(kernel)
    }

    /// Every kernel in `folder`: unpacked there, unpacked in one of its directories, or a bzImage file.
    pub fn all_in(folder: &Path) -> Result<Vec<Self>> {
        let listed = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut entries: Vec<PathBuf> = listed.flatten().map(|entry| entry.path()).collect();
        entries.sort();
        let mut found = Self::unpacked(folder);
        for entry in entries {
            if entry.is_dir() {
                found.extend(Self::unpacked(&entry));
            } else if is_bzimage(&entry) {
                let release = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
                found.push(Kernel { image: entry, modules: None, release });
            }
        }
        if found.is_empty() {
            bail!("{} has no kernel in it: no unpacked package and no bzImage", folder.display());
        }
        Ok(found)
    }

    /// The kernels of packages unpacked at `root`, by release.
    fn unpacked(root: &Path) -> Vec<Self> {
        let modules = ["lib/modules", "usr/lib/modules"].map(|parent| root.join(parent));
        let mut images: Vec<(String, PathBuf)> = Vec::new();
        for path in entries(&root.join("boot")) {
            if let Some(release) = name(&path).strip_prefix("vmlinuz-") {
                images.push((release.into(), path));
            }
        }
        for directory in modules.iter().flat_map(|parent| entries(parent)) {
            let image = directory.join("vmlinuz");
            if image.is_file() {
                images.push((name(&directory), image));
            }
        }
        images.sort();
        // A system whose lib is a link to usr/lib shows each of them twice.
        images.dedup_by(|a, b| a.0 == b.0);
        let of_release = |release: &str| {
            // Newer packages put the image, and nothing else of theirs, beside the modules.
            modules.iter().map(|parent| parent.join(release)).find(|path| path.join("kernel").is_dir())
        };
        images
            .into_iter()
            .map(|(release, image)| Kernel { image, modules: of_release(&release), release })
            .collect()
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .map(|found| found.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether a file has the signature of the x86 boot protocol (Linux, Documentation/arch/x86/boot.rst: `HdrS`
/// at 0x202).
fn is_bzimage(path: &Path) -> bool {
    let mut start = [0; 0x206];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
    read.is_ok() && start.ends_with(b"HdrS")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, bytes: &[u8]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn bzimage() -> Vec<u8> {
        let mut image = vec![0; 0x202];
        image.extend_from_slice(b"HdrS and more");
        image
    }

    /// Lists of files: `dpkg-deb --contents` of linux-image-6.12.95+deb12-cloud-amd64, and of linux-binary
    /// and linux-modules of 7.3.4+deb13-cloud-amd64, shortened.
    #[test]
    fn old_and_new_packages_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("old");
        write(&old.join("boot/vmlinuz-6.12.95+deb12-cloud-amd64"), b"");
        write(&old.join("boot/config-6.12.95+deb12-cloud-amd64"), b"");
        write(&old.join("lib/modules/6.12.95+deb12-cloud-amd64/kernel/a.ko.xz"), b"");
        let new = folder.path().join("new");
        let modules = new.join("usr/lib/modules/7.3.4+deb13-cloud-amd64");
        write(&modules.join("vmlinuz"), b"");
        assert!(
            Kernel::open(&new).unwrap_err().to_string().contains("no modules of 7.3.4+deb13-cloud-amd64")
        );
        write(&modules.join("kernel/a.ko.xz"), b"");

        assert_eq!(Kernel::open(&old).unwrap().release, "6.12.95+deb12-cloud-amd64");
        let kernel = Kernel::open(&new).unwrap();
        assert_eq!(kernel.release, "7.3.4+deb13-cloud-amd64");
        assert_eq!((kernel.image, kernel.modules), (modules.join("vmlinuz"), Some(modules)));
        assert!(Kernel::open(folder.path()).unwrap_err().to_string().contains("has neither"));
    }

    #[test]
    fn a_folder_may_hold_packages_and_lone_images() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        write(&root.join("boot/vmlinuz-1"), b"");
        write(&root.join("boot/vmlinuz-2"), b"");
        write(&root.join("mine"), &bzimage());
        write(&root.join("notes.txt"), b"no kernel");
        write(&root.join("package/usr/lib/modules/3/vmlinuz"), b"");
        write(&root.join("package/usr/lib/modules/3/kernel/a.ko"), b"");
        let found = Kernel::all_in(root).unwrap();
        let releases: Vec<(&str, bool)> =
            found.iter().map(|kernel| (kernel.release.as_str(), kernel.modules.is_some())).collect();
        assert_eq!(releases, [("1", false), ("2", false), ("mine", false), ("3", true)]);
        assert!(Kernel::open(root).unwrap_err().to_string().contains("more than one kernel"));

        let empty = tempfile::tempdir().unwrap();
        assert!(Kernel::all_in(empty.path()).unwrap_err().to_string().contains("no kernel in it"));
    }
}
