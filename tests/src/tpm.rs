// SPDX-License-Identifier: Apache-2.0
//! The initial ramdisk of a guest that uses its TPM: Debian's busybox and tpm2-tools with their libraries, a
//! script that says what it finds, and the tpm2-tools script that `vtpm-svc`'s own tests run on the host.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::cpio::Archive;
use crate::workspace::Workspace;

const INIT: &str = include_str!("tpm/init.sh");
const TOOLS: &str = include_str!("../../vtpm-svc/tests/scripts/tpm2.sh");
const TPM2: &str = "/usr/bin/tpm2";
const TCTI: &str = "/usr/lib/x86_64-linux-gnu/libtss2-tcti-device.so.0";

/// Where it lies once it is built.
pub fn initrd_path(workspace: &Workspace) -> PathBuf {
    workspace.initrds().join("tpm.cpio")
}

/// An archive that gets each directory and each file once.
#[derive(Default)]
struct Tree {
    archive: Archive,
    added: BTreeSet<PathBuf>,
}

impl Tree {
    fn directory(&mut self, path: &Path) {
        let mut above: Vec<&Path> = path.ancestors().filter(|p| p.parent().is_some()).collect();
        above.reverse();
        for directory in above {
            if self.added.insert(directory.to_owned()) {
                self.archive.directory(&directory.display().to_string());
            }
        }
    }

    fn file(&mut self, path: &Path, contents: &[u8]) {
        self.directory(path.parent().unwrap_or(Path::new("/")));
        if self.added.insert(path.to_owned()) {
            self.archive.file(&path.display().to_string(), contents);
        }
    }

    /// A file of the host, at the path that it has there.
    fn host_file(&mut self, path: &Path) -> Result<()> {
        let contents = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.file(path, &contents);
        Ok(())
    }

    /// A program or library of the host, and every library that it needs.
    fn with_libraries(&mut self, path: &str) -> Result<()> {
        self.host_file(Path::new(path))?;
        libraries(Path::new(path))?.iter().try_for_each(|library| self.host_file(library))
    }
}

/// Every library that a program or library of the host needs, and their loader.
pub fn libraries(path: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(path).output().context("cannot run ldd")?;
    ensure!(output.status.success(), "ldd {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// Builds the archive.
pub fn initrd() -> Result<Vec<u8>> {
    let mut tree = Tree::default();
    for directory in ["/dev", "/proc", "/sys", "/tmp", "/bin"] {
        tree.directory(Path::new(directory));
    }
    tree.archive.device("/dev/console", 5, 1);
    tree.file(Path::new("/init"), INIT.as_bytes());
    tree.file(Path::new("/tpm2.sh"), TOOLS.as_bytes());
    let busybox = fs::read("/usr/bin/busybox").or_else(|_| fs::read("/bin/busybox"));
    tree.file(Path::new("/bin/busybox"), &busybox.context("cannot read busybox")?);
    tree.with_libraries(TPM2)?;
    tree.with_libraries(TCTI)?;
    // Each tool is a name of the one program.
    let mut names: Vec<String> = fs::read_dir("/usr/bin")
        .context("cannot read /usr/bin")?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("tpm2_"))
        .collect();
    names.sort();
    ensure!(!names.is_empty(), "no tpm2_* in /usr/bin: install tpm2-tools");
    for name in names {
        tree.archive.symlink(&format!("/usr/bin/{name}"), "tpm2");
    }
    Ok(tree.archive.finish())
}
