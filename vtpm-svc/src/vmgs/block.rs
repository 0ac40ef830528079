// SPDX-License-Identifier: Apache-2.0
//! The few operations that a guest-state store needs of a disk, so that tests can record and reorder them.

use std::fs::File;
use std::fs::TryLockError;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// How often, and in what intervals, a lock that somebody holds is tried: a fifth of a second.
const LOCK_TRIES: u32 = 20;
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// A random-access file whose writes become durable at [`BlockFile::sync`] and in no particular order before
/// it.
pub trait BlockFile: Send {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether there is nothing in it.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Fills the buffer from an offset.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of the buffer at an offset.
    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()>;
    /// Returns when everything written before is durable.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file of the host, locked for this process while it is open.
#[derive(Debug)]
pub struct FsFile {
    file: File,
}

impl FsFile {
    /// Opens for reading and writing, and takes the exclusive lock: a second instance gets `WouldBlock`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Self::locked(file)
    }

    /// Opens for reading only, with a shared lock.
    pub fn open_read_only(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        soon(|| file.try_lock_shared()).map_err(lock_error)?;
        Ok(Self { file })
    }

    /// Creates a file of a given length that must not exist yet; nobody but the owner may read it.
    ///
    /// It is written full of zeros instead of being left sparse: a flush that has no blocks to allocate is
    /// spared the file system's journal, and later commits cannot run out of disk space.
    pub fn create(path: &Path, len: u64) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        let new = Self::locked(file)?;
        let zeros = [0; 1 << 16];
        for at in (0..len).step_by(zeros.len()) {
            let rest = usize::try_from(len - at).unwrap_or(usize::MAX).min(zeros.len());
            new.file.write_all_at(&zeros[..rest], at)?;
        }
        Ok(new)
    }

    /// The file itself, for its owner and mode.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn locked(file: File) -> io::Result<Self> {
        if file.metadata()?.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        soon(|| file.try_lock()).map_err(lock_error)?;
        Ok(Self { file })
    }
}

/// Takes a lock that may be held a moment longer than its holder: a process that starts another one shares
/// its open files with it until that one is the other program, so a lock that was just given up can still be
/// there.
pub(super) fn soon(lock: impl Fn() -> Result<(), TryLockError>) -> Result<(), TryLockError> {
    for _ in 0..LOCK_TRIES {
        match lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_INTERVAL),
            other => return other,
        }
    }
    lock()
}

fn lock_error(error: TryLockError) -> io::Error {
    match error {
        TryLockError::WouldBlock => io::Error::new(
            io::ErrorKind::WouldBlock,
            "another process has this file open (a running vtpm-svc?)",
        ),
        TryLockError::Error(e) => e,
    }
}

impl BlockFile for FsFile {
    fn len(&self) -> io::Result<u64> {
        // A block device has no length in its metadata, so ask where its end is.
        use std::io::Seek;
        (&self.file).seek(io::SeekFrom::End(0))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// A file in memory: for images that are built or examined without touching a disk, and for tests.
#[derive(Debug, Clone, Default)]
pub struct MemFile(pub Vec<u8>);

impl MemFile {
    fn span(&self, len: usize, offset: u64) -> io::Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        match start.checked_add(len) {
            Some(end) if end <= self.0.len() => Ok(start..end),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl BlockFile for MemFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let span = self.span(buffer.len(), offset)?;
        buffer.copy_from_slice(&self.0[span]);
        Ok(())
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        let span = self.span(data.len(), offset)?;
        self.0[span].copy_from_slice(data);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}
