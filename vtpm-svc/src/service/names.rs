// SPDX-License-Identifier: Apache-2.0
//! Names that the service has made (sockets, the file of its process id) and that go when it ends in good
//! order.
//!
//! The cage has no file system, so the service cannot remove them itself. A second process does, which is
//! started before there is a secret, knows nothing but the names, and acts when it is told to. A name that
//! belongs to somebody else by then stays. If the service is killed the names stay as well, and the next
//! start replaces them.

use std::ffi::OsStr;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use crate::log;
use crate::process;

/// Longest wait for the other process at the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// A file as the kernel knows it, whatever its name.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    path.symlink_metadata().map(|m| (m.dev(), m.ino()))
}

/// The connection to the process that removes names; nothing if there are none to remove.
pub(super) struct Names(Option<UnixStream>);

impl Names {
    /// Starts the other process. Must be called while there is one thread and no secret.
    pub(super) fn prepare(needed: bool) -> io::Result<Self> {
        needed.then(|| process::beside(remove_when_told)).transpose().map(Self)
    }

    /// This name goes at the end.
    pub(super) fn add(&mut self, path: &Path) {
        let Some(stream) = &mut self.0 else { return };
        let noted = std::path::absolute(path).and_then(|path| {
            let (device, inode) = identity(&path)?;
            let mut record = [device.to_be_bytes(), inode.to_be_bytes()].concat();
            record.extend_from_slice(path.as_os_str().as_bytes());
            let length = u32::try_from(record.len()).map_err(io::Error::other)?;
            stream.write_all(&[&length.to_be_bytes(), record.as_slice()].concat())
        });
        if let Err(e) = noted {
            log::warn(&format!("{} will stay when the service ends: {e}", path.display()));
        }
    }

    /// Removes them, and returns when they are gone.
    pub(super) fn remove(&mut self) {
        let Some(mut stream) = self.0.take() else { return };
        let gone = stream.write_all(&[0; 4]).and_then(|()| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.read_to_end(&mut Vec::new())
        });
        if let Err(e) = gone {
            log::warn(&format!("sockets and the file of the process id may be left: {e}"));
        }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The other process: collects names, and removes them at the word. Without the word it leaves them.
fn remove_when_told(stream: UnixStream) {
    let mut stream = BufReader::new(stream);
    let mut names: Vec<(PathBuf, (u64, u64))> = Vec::new();
    while let Ok(Some(record)) = record(&mut stream) {
        let Some((identity, path)) = record.split_first_chunk::<16>() else {
            for (path, made) in names {
                if self::identity(&path).is_ok_and(|now| now == made) {
                    // There is nobody to tell.
                    let _ = std::fs::remove_file(path);
                }
            }
            return;
        };
        let number = |at: usize| identity[at..at + 8].iter().fold(0, |v, b| v << 8 | u64::from(*b));
        names.push((OsStr::from_bytes(path).into(), (number(0), number(8))));
    }
}

/// The next record; an empty one is the word.
fn record(stream: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    if stream.read_exact(&mut length).is_err() {
        return Ok(None);
    }
    let mut record = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut record).map(|()| Some(record))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(run: impl FnOnce(&mut Names)) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let other = std::thread::spawn(|| remove_when_told(theirs));
        let mut names = Names(Some(ours));
        run(&mut names);
        std::mem::drop(names.0.take());
        other.join().expect("join");
    }

    #[test]
    fn names_go_at_the_word_and_only_if_they_are_still_the_same_files() {
        let dir = tempfile::tempdir().expect("folder");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let write = |path: &Path| std::fs::write(path, "1").expect("write");
        write(&a);
        write(&b);
        names(|names| {
            names.add(&a);
            names.add(&b);
            std::fs::rename(&b, dir.path().join("c")).expect("rename");
            write(&b);
            names.remove();
        });
        assert!(!a.exists() && b.exists());
    }

    #[test]
    fn a_service_that_is_killed_leaves_its_names() {
        let dir = tempfile::tempdir().expect("folder");
        let a = dir.path().join("a");
        std::fs::write(&a, "1").expect("write");
        names(|names| names.add(&a));
        assert!(a.exists());
    }
}
