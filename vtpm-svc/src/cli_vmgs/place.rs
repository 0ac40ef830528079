// SPDX-License-Identifier: Apache-2.0
//! Files that take their place only when they are whole, and what killed runs have left beside them.
//!
//! A new file is written as `NAME.new-PID` and gets its name in one step: a name that must be free is never taken from
//! somebody who was quicker, and a file that is replaced hands on its owner and mode. If a run fails its file goes; only
//! `kill -9` and power loss leave one, which the next command on that name tells of.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::fchown;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::CWD;
use rustix::fs::RenameFlags;

use super::CliError;
use super::io_at;

/// A file under its temporary name; dropped, it is removed.
pub(super) struct Waiting {
    path: Option<PathBuf>,
}

/// What a file is called until it is whole.
fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".new-{}", std::process::id()));
    path.with_file_name(name)
}

impl Waiting {
    /// Makes a file that will be `path`. `make` must fail if there is one with the name that it gets, for that is not ours.
    pub(super) fn make<T>(
        path: &Path,
        make: impl FnOnce(&Path) -> io::Result<T>,
    ) -> Result<(Self, T), CliError> {
        let temporary = temporary(path);
        // Whatever fails from here on removes what was begun.
        let mut waiting = Self { path: Some(temporary.clone()) };
        match make(&temporary) {
            Ok(made) => Ok((waiting, made)),
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                waiting.path = None;
                Err(CliError::Usage(format!(
                    "{} exists: another command is making {}, or one was killed; if none runs, remove it",
                    temporary.display(),
                    path.display()
                )))
            }
            Err(source) => Err(CliError::Io { path: format!("writing {}", temporary.display()), source }),
        }
    }

    /// Takes a name that nobody has.
    pub(super) fn take_free(mut self, path: &Path) -> Result<(), CliError> {
        let Some(from) = &self.path else { return Ok(()) };
        let taken = match rustix::fs::renameat_with(CWD, from, CWD, path, RenameFlags::NOREPLACE) {
            // A file system that does not know the flag knows links, which never replace either.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                std::fs::hard_link(from, path).and_then(|()| std::fs::remove_file(from))
            }
            other => other.map_err(io::Error::from),
        };
        match taken {
            Ok(()) => {
                self.path = None;
                sync_folder(path)
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(exists(path)),
            Err(source) => Err(io_at(path)(source)),
        }
    }

    /// Takes the place of a file.
    pub(super) fn replace(mut self, path: &Path) -> Result<(), CliError> {
        if let Some(from) = &self.path {
            std::fs::rename(from, path).map_err(io_at(path))?;
        }
        self.path = None;
        sync_folder(path)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // What is half made is of no use; a failure to remove it changes nothing about the error.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Refuses a name that is taken, also by a link that leads nowhere.
pub(super) fn exists(path: &Path) -> CliError {
    CliError::Usage(format!("{} exists already; nothing was changed", path.display()))
}

/// Gives a new file the owner and the mode of the one that it replaces.
pub(super) fn inherit(new: &File, old: &File) -> io::Result<()> {
    let (now, before) = (new.metadata()?, old.metadata()?);
    if (now.uid(), now.gid()) != (before.uid(), before.gid()) {
        fchown(new, Some(before.uid()), Some(before.gid()))?;
    }
    new.set_permissions(before.permissions())
}

fn sync_folder(path: &Path) -> Result<(), CliError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|d| d.sync_all()).map_err(io_at(folder))
}

/// Files that killed runs have left beside this one.
pub(super) fn left_over(path: &Path) -> Vec<PathBuf> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return Vec::new() };
    let prefix = format!("{name}.new-");
    // Whoever cannot list the folder has nothing to be told of.
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let ours = entries.filter(|e| {
        let name = e.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix(&prefix));
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    });
    // A run that is still at work holds a lock.
    let idle = |path: &PathBuf| {
        let open =
            File::options().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(path);
        open.is_ok_and(|f| f.try_lock_shared().is_ok())
    };
    let mut found: Vec<PathBuf> = ours.map(|e| e.path()).filter(idle).collect();
    found.sort();
    found
}

/// Tells of them.
pub(super) fn tell_left_over(path: &Path) {
    for left in left_over(path) {
        crate::log::warn(&format!(
            "{} was left by a command that was killed; nothing needs it, remove it",
            left.display()
        ));
    }
}
