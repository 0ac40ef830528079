// SPDX-License-Identifier: Apache-2.0
//! What every write to the image has to pass: a bound on how often, and a look whether the image is still
//! where it was.
//!
//! A guest decides how often its TPM stores, and each store is two flushes of the host's disk. And a file
//! that was replaced by name (`mv copy image`) takes writes as before, but nobody will ever read them: such a
//! write is refused.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use crate::pace::Pace;

/// The image has no name any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the image was removed or replaced while it was in use, and what is written now would be lost; nothing more is stored. End \
     the service, and put the right file in its place"
)]
pub struct Gone;

/// How many seconds' worth of writes may come at once.
const BURST_SECONDS: u32 = 10;

/// The conditions of a write.
#[derive(Debug, Default)]
pub struct Upkeep {
    file: Option<OwnedFd>,
    /// Whether the file had a name when the TPM was first powered on. One that had none is not meant to be
    /// found again.
    named: OnceLock<bool>,
    pace: Option<Pace>,
}

impl Upkeep {
    /// Watches the file at `path`; at most `per_second` writes in the long run (0: no limit).
    pub fn of(path: &Path, per_second: u32) -> Self {
        use rustix::fs::Mode;
        use rustix::fs::OFlags;
        let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok();
        let pace = Duration::from_secs(1).checked_div(per_second);
        let pace = pace.map(|interval| Pace::new(interval, per_second.saturating_mul(BURST_SECONDS)));
        Self { file, named: OnceLock::new(), pace }
    }

    fn has_a_name(&self) -> bool {
        // Where it cannot be asked nothing is claimed.
        self.file.as_ref().is_none_or(|file| rustix::fs::fstat(file).is_ok_and(|s| s.st_nlink > 0))
    }

    /// Whether `path` still leads to the file that it led to at first.
    pub fn is_at(&self, path: &Path) -> bool {
        let identity = |s: rustix::fs::Stat| (s.st_dev, s.st_ino);
        let watched = self.file.as_ref().map(|file| rustix::fs::fstat(file).map(identity));
        watched.is_none_or(|watched| watched == rustix::fs::stat(path).map(identity))
    }

    /// The TPM is powered on. From the first time on the image has to stay.
    pub fn begin(&self) {
        self.named.get_or_init(|| self.has_a_name());
    }

    /// Whether the image is still there.
    pub fn look(&self) -> Result<(), Gone> {
        if self.named.get() == Some(&true) && !self.has_a_name() { Err(Gone) } else { Ok(()) }
    }

    /// Before a write: waits for its turn, and looks.
    pub fn admit(&self) -> Result<(), Gone> {
        if let Some(pace) = &self.pace {
            pace.wait();
        }
        self.look()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_replaced_is_noticed_and_one_that_was_nameless_from_the_start_is_not() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("image");
        std::fs::write(&path, "1").expect("write");
        let (early, late) = (Upkeep::of(&path, 0), Upkeep::of(&path, 0));
        assert!(early.is_at(&path));
        early.begin();
        assert_eq!(early.admit(), Ok(()));
        // Another name is fine.
        std::fs::rename(&path, dir.path().join("moved")).expect("rename");
        assert_eq!(early.admit(), Ok(()));
        std::fs::write(dir.path().join("copy"), "2").expect("write");
        std::fs::rename(dir.path().join("copy"), dir.path().join("moved")).expect("replace");
        assert_eq!(early.admit(), Err(Gone));
        assert!(!early.is_at(&dir.path().join("moved")));
        late.begin();
        assert_eq!(late.admit(), Ok(()));
    }
}
