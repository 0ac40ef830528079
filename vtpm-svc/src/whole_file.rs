// SPDX-License-Identifier: Apache-2.0
//! Files that take their place only when they are whole, and what killed runs have left beside them: images,
//! and everything else that a command writes for its user.
//!
//! A new file is written as `NAME.new-PID` and gets its name in one step: a name that must be free is never
//! taken from somebody who was quicker, and a file that is replaced hands on its owner and mode. If a run
//! fails its file goes; only `kill -9` and power loss leave one, which the next command on that name tells
//! of.

use std::fs::File;
use std::fs::Metadata;
use std::io;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::fchown;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::CWD;
use rustix::fs::RenameFlags;

/// Why a file did not get its place.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PlaceError {
    /// What was asked for cannot be done.
    #[error("{0}")]
    Usage(String),
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> PlaceError {
    let path = path.display().to_string();
    move |source| PlaceError::Io { path, source }
}

/// Who may read a file that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Its owner; a file that it replaces does not change that, and no link is followed.
    Owner,
    /// Whoever the user's file mode mask lets; of a file that it replaces it keeps owner and mode.
    Anyone,
}

/// Writes a file, whole or not at all. A device or a pipe is written, not replaced.
pub fn write(path: &Path, data: &[u8], readers: Readers) -> Result<(), PlaceError> {
    tell_left_over(path);
    let into = |path: &Path| {
        File::options().write(true).open(path).and_then(|mut f| f.write_all(data)).map_err(io_at(path))
    };
    let real = match path.symlink_metadata() {
        Ok(link) if link.is_symlink() => {
            let own = rustix::process::geteuid().as_raw();
            if readers == Readers::Owner || (link.uid() != own && link.uid() != 0) {
                return Err(PlaceError::Usage(format!(
                    "{} is a symbolic link, which somebody else may have put there; name the file itself",
                    path.display()
                )));
            }
            if path.metadata().is_ok_and(|m| !m.is_file()) {
                return into(path);
            }
            std::fs::canonicalize(path).map_err(io_at(path))?
        }
        Ok(m) if !m.is_file() => return into(path),
        _ => path.to_path_buf(),
    };
    let mode = if readers == Readers::Owner { 0o600 } else { 0o666 };
    let (waiting, ()) = Waiting::make(&real, |temporary| {
        let mut file = File::options().create_new(true).write(true).mode(mode).open(temporary)?;
        if readers == Readers::Anyone
            && let Ok(old) = real.metadata()
        {
            inherit(&file, &old)?;
        }
        // Who looks for what killed runs left knows by the lock that this one runs; not every file system has
        // locks.
        let _ = file.try_lock();
        file.write_all(data)?;
        file.sync_all()
    })?;
    waiting.replace(&real)
}

/// A file under its temporary name; dropped, it is removed.
pub struct Waiting {
    path: Option<PathBuf>,
}

/// What a file is called until it is whole.
fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".new-{}", std::process::id()));
    path.with_file_name(name)
}

impl Waiting {
    /// Makes a file that will be `path`. `make` must fail if there is one with the name that it gets, for
    /// that is not ours.
    pub fn make<T>(path: &Path, make: impl FnOnce(&Path) -> io::Result<T>) -> Result<(Self, T), PlaceError> {
        let temporary = temporary(path);
        // Whatever fails from here on removes what was begun.
        let mut waiting = Self { path: Some(temporary.clone()) };
        match make(&temporary) {
            Ok(made) => Ok((waiting, made)),
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                waiting.path = None;
                Err(PlaceError::Usage(format!(
                    "{} exists: another command is making {}, or one was killed; if none runs, remove it",
                    temporary.display(),
                    path.display()
                )))
            }
            Err(source) => Err(PlaceError::Io { path: format!("writing {}", temporary.display()), source }),
        }
    }

    /// Takes a name that nobody has.
    pub fn take_free(mut self, path: &Path) -> Result<(), PlaceError> {
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
    pub fn replace(mut self, path: &Path) -> Result<(), PlaceError> {
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
pub fn exists(path: &Path) -> PlaceError {
    PlaceError::Usage(format!("{} exists already; nothing was changed", path.display()))
}

/// Gives a new file the owner and the mode of the one that it replaces.
pub fn inherit(new: &File, before: &Metadata) -> io::Result<()> {
    let now = new.metadata()?;
    if (now.uid(), now.gid()) != (before.uid(), before.gid()) {
        fchown(new, Some(before.uid()), Some(before.gid()))?;
    }
    new.set_permissions(before.permissions())
}

fn sync_folder(path: &Path) -> Result<(), PlaceError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|d| d.sync_all()).map_err(io_at(folder))
}

/// Files that killed runs have left beside this one.
pub fn left_over(path: &Path) -> Vec<PathBuf> {
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
pub fn tell_left_over(path: &Path) {
    for left in left_over(path) {
        crate::log::warn(&format!(
            "{} was left by a command that was killed; nothing needs it, remove it",
            left.display()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::fs::lchown;
    use std::os::unix::fs::symlink;

    fn mode(path: &Path) -> u32 {
        path.metadata().expect("there").mode() & 0o777
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).expect("folder").flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_public_file_keeps_link_owner_and_mode_and_a_private_one_is_its_owners() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, b"before").expect("write");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).expect("mode");
        symlink("file", &link).expect("link");
        write(&link, b"after", Readers::Anyone).expect("through the link");
        assert!(link.symlink_metadata().expect("link").is_symlink());
        assert_eq!((std::fs::read(&file).expect("read").as_slice(), mode(&file)), (&b"after"[..], 0o640));
        // A secret goes through no link, and where others could read they cannot any more.
        assert!(matches!(write(&link, b"secret", Readers::Owner), Err(PlaceError::Usage(_))));
        write(&file, b"secret", Readers::Owner).expect("private");
        assert_eq!(mode(&file), 0o600);
        assert_eq!(names(dir.path()), ["file", "link"]);
        // Only root can give a link away.
        if lchown(&link, Some(54321), None).is_ok() {
            let refused = write(&link, b"theirs", Readers::Anyone).expect_err("another user's").to_string();
            assert!(refused.contains("symbolic link"), "{refused}");
        }
        assert_eq!(std::fs::read(&file).expect("read"), b"secret");
    }

    #[test]
    fn what_a_killed_run_left_is_found_and_what_is_not_ours_is_not_touched() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("file");
        for name in ["file.new-12", "file.new-x", "other.new-12"] {
            std::fs::write(dir.path().join(name), b"half").expect("write");
        }
        assert_eq!(left_over(&file), [dir.path().join("file.new-12")]);
        let ours = temporary(&file);
        std::fs::write(&ours, b"somebody's").expect("write");
        let refused = write(&file, b"x", Readers::Anyone).expect_err("its name is taken").to_string();
        assert!(refused.contains("another command") && !file.exists(), "{refused}");
        assert_eq!(std::fs::read(&ours).expect("read"), b"somebody's");
    }

    #[test]
    fn a_device_is_written_and_stays_one() {
        write(Path::new("/dev/null"), b"x", Readers::Anyone).expect("write");
        assert!(!Path::new("/dev/null").metadata().expect("there").is_file());
    }
}
