// SPDX-License-Identifier: Apache-2.0
//! Reads the files that a user names: whatever they are, to a limit, and not for ever.

use std::fs::File;
use std::io;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;

use crate::events::Events;

/// Largest file that is read, in bytes.
const FILE_LIMIT: u64 = 4 << 30;
/// How long a pipe may bring nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// After what time the user is told what is waited for.
const SILENCE: Duration = Duration::from_secs(2);

/// Reads a regular file or a pipe. A launch owns its bytes: a file that is changed or cut short later changes
/// nothing, and a restart launches the same. `Err` says what is wrong with the file, and what to do.
pub fn read_file(path: &Path, events: &Events) -> Result<Vec<u8>, String> {
    read_limited(path, FILE_LIMIT, events)
}

/// As [`read_file`], to another limit.
pub fn read_limited(path: &Path, limit: u64, events: &Events) -> Result<Vec<u8>, String> {
    let why = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => "no such file".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "permission denied: the file must be readable by this user".to_owned()
        }
        _ => e.to_string(),
    };
    // A named pipe that nobody writes to is opened at once all the same.
    let nonblocking = libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(nonblocking).open(path).map_err(why)?;
    let meta = file.metadata().map_err(why)?;
    let kind = meta.file_type();
    if kind.is_dir() {
        return Err("is a directory, a file is needed".to_owned());
    }
    if kind.is_char_device() || kind.is_block_device() {
        return Err("is a device, a file is needed".to_owned());
    }
    let too_long = |found: String| match limit >> 20 {
        0 => Err(format!("has {found} bytes, more than the limit of {limit}")),
        mib => Err(format!("has {found} bytes, more than the limit of {mib} MiB")),
    };
    if meta.len() > limit {
        return too_long(meta.len().to_string());
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    // A pipe has no length, and a file may grow.
    if kind.is_fifo() {
        Pipe { file, path, patience: PATIENCE, events }
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(why)?;
    } else {
        file.take(limit + 1).read_to_end(&mut bytes).map_err(why)?;
    }
    if bytes.len() as u64 > limit {
        return too_long(format!("at least {}", bytes.len()));
    }
    Ok(bytes)
}

/// A pipe that does not block, read as if it did, but with an end to the patience.
struct Pipe<'a> {
    file: File,
    path: &'a Path,
    patience: Duration,
    events: &'a Events,
}

impl Read for Pipe<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let begun = Instant::now();
        let mut told = false;
        loop {
            let left = self.patience.saturating_sub(begun.elapsed());
            let wait = if told { left } else { left.min(SILENCE) };
            let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
            // Without a writer there is nothing to wait for but one: an end of file here would be an empty
            // file.
            match rustix::event::poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&wait)) {
                Ok(0) if begun.elapsed() >= self.patience => {
                    let seconds = self.patience.as_secs();
                    let text = format!(
                        "is a pipe that brought nothing for {seconds} s: start what writes to it first"
                    );
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                Ok(0) if !told => {
                    self.events.note(format_args!("waits for somebody to write to {}", self.path.display()));
                    told = true;
                }
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => match self.file.read(buf) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                },
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn no_more_than_the_limit_is_read_whatever_the_file_is() {
        const LIMIT: u64 = 1 << 20;
        let folder = tempfile::tempdir().unwrap();
        let read = |path: &Path| read_limited(path, LIMIT, &Events::silent());
        let device = read(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(device, "is a device, a file is needed");
        let sparse = folder.path().join("sparse");
        File::create(&sparse).unwrap().set_len(LIMIT + 1).unwrap();
        assert!(read(&sparse).unwrap_err().contains("has 1048577 bytes"));
        File::create(&sparse).unwrap().set_len(LIMIT).unwrap();
        assert_eq!(read(&sparse).map(|bytes| bytes.len() as u64), Ok(LIMIT));
        // Files of /proc say that they have no bytes, as pipes do.
        assert!(!read(Path::new("/proc/self/maps")).unwrap().is_empty());
        let pipe = |len: u64| {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader)));
            let source = std::thread::spawn(move || {
                let zeros = vec![0; len as usize];
                let _ = io::Write::write_all(&mut File::from(writer), &zeros);
            });
            let result = read(&path).map(|bytes| bytes.len() as u64);
            drop(reader);
            source.join().unwrap();
            result
        };
        assert_eq!(pipe(LIMIT), Ok(LIMIT));
        assert!(pipe(LIMIT * 4).unwrap_err().contains("has at least 1048577 bytes"));
    }

    #[test]
    fn a_pipe_that_nobody_writes_to_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let open = || File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let begun = Instant::now();
        let mut pipe = Pipe {
            file: open(),
            path: &path,
            patience: Duration::from_millis(100),
            events: &Events::silent(),
        };
        let error = pipe.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(begun.elapsed() < SILENCE, "{:?}", begun.elapsed());
        // A writer that comes later, and writes in pieces.
        let writer = std::thread::spawn({
            let path = path.clone();
            move || {
                std::thread::sleep(Duration::from_millis(50));
                let mut file = File::options().write(true).open(path).unwrap();
                for piece in [b"ab", b"cd"] {
                    io::Write::write_all(&mut file, piece).unwrap();
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        });
        assert_eq!(read_limited(&path, 4, &Events::silent()), Ok(b"abcd".to_vec()));
        writer.join().unwrap();
    }
}
