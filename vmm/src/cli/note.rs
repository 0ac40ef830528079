// SPDX-License-Identifier: Apache-2.0
//! What the monitor says to its user: lines on standard error.
//!
//! A guest can make the monitor say something, by a reset for example. So whatever becomes of standard error
//! (closed, a full disk, a pipe that nobody reads), a note neither ends the run nor holds it up: what cannot
//! be written soon is lost. The standard library's `eprintln!` would end the process; the packages of the
//! monitor deny it.

use std::fmt;
use std::fmt::Write as _;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;

use super::fields::with_options;
use crate::events::Event;
use crate::events::Events;
use crate::events::Sink;

/// How long a reader may take to make room.
const PATIENCE: Duration = Duration::from_secs(1);
/// A pipe that is writable has room for as much (`PIPE_BUF`).
const PIECE: usize = 4096;

/// Says that something happened.
pub fn note(text: impl fmt::Display) {
    say(&format!("cvmm: {text}"));
}

/// Says that something is wrong, and that the monitor goes on.
pub fn warn(text: impl fmt::Display) {
    say(&format!("cvmm: warning: {text}"));
}

/// Says why the monitor ends.
pub fn error(text: impl fmt::Display) {
    say(&format!("cvmm: error: {text}"));
}

/// Standard error as a sink of events.
struct StandardError;

impl Sink for StandardError {
    fn event(&self, event: Event) {
        match event {
            Event::Note(text) => note(with_options(&text)),
            Event::Warning(text) => warn(with_options(&text)),
            // Whoever watches a guest sees its console.
            Event::State(_) => {}
        }
    }
}

/// Events become lines on standard error.
pub fn events() -> Events {
    Events::to(StandardError)
}

fn say(text: &str) {
    static OUTPUT: Output = Output::new();
    // Nothing to be done about a note that was not written.
    let _ = OUTPUT.write(rustix::stdio::stderr(), clean(text).as_bytes(), PATIENCE);
}

/// `text` as lines for a terminal: paths and messages of other programs may hold bytes that move its cursor
/// or look like another line of ours. A second line is kept, and indented.
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 1);
    let mut begins = false;
    for c in text.trim_end_matches('\n').chars() {
        if std::mem::take(&mut begins) && c != ' ' {
            out.push_str("  ");
        }
        match c {
            '\n' => {
                begins = true;
                out.push('\n');
            }
            '\t' => out.push(' '),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('\n');
    out
}

/// A descriptor that others share, read by somebody who may have stopped reading.
pub struct Output {
    /// Nobody made room in time; until somebody does, nothing is waited for.
    stalled: AtomicBool,
}

impl Output {
    /// One that has not stalled.
    pub const fn new() -> Self {
        Output { stalled: AtomicBool::new(false) }
    }

    /// Writes all of `bytes`, or as much as there is room for within `patience` from the last progress; then
    /// the rest is lost (`EAGAIN`). A descriptor that blocks is not written to before it is ready.
    pub fn write(&self, fd: BorrowedFd<'_>, mut bytes: &[u8], patience: Duration) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let patience = if self.stalled.load(Ordering::Relaxed) { Duration::ZERO } else { patience };
            if !ready(fd, patience)? {
                self.stalled.store(true, Ordering::Relaxed);
                return Err(Errno::AGAIN);
            }
            match rustix::io::write(fd, bytes.get(..PIECE).unwrap_or(bytes)) {
                Ok(0) => return Err(Errno::IO),
                Ok(done) => {
                    self.stalled.store(false, Ordering::Relaxed);
                    bytes = bytes.get(done..).unwrap_or_default();
                }
                // Another writer was faster.
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Default for Output {
    fn default() -> Self {
        Self::new()
    }
}

/// Waits until `fd` takes bytes, or has an error to tell.
fn ready(fd: impl AsFd, patience: Duration) -> Result<bool, Errno> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&left)) {
            Ok(found) => return Ok(found > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn control_characters_and_forged_lines_do_not_reach_a_terminal() {
        assert_eq!(clean("a\x1b[2Jb\u{9b}c\rd\te"), "a\\x1b[2Jb\\x9bc\\x0dd e\n");
        assert_eq!(
            clean("no such file\ncvmm: launch digest 00\n"),
            "no such file\n  cvmm: launch digest 00\n"
        );
        assert_eq!(clean("do:\n  this\n\n"), "do:\n  this\n");
    }

    #[test]
    fn a_slow_reader_gets_everything_and_one_that_stopped_holds_nobody() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let output = Output::new();
        let text: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
        let expected = text.clone();
        let slow = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            let mut got = vec![0; expected.len()];
            reader.read_exact(&mut got).unwrap();
            assert!(got == expected, "bytes were lost");
            reader
        });
        output.write(writer.as_fd(), &text, Duration::from_secs(20)).unwrap();
        let mut reader = slow.join().unwrap();

        // Nobody reads: one wait, and none after it.
        let patience = Duration::from_millis(300);
        assert_eq!(output.write(writer.as_fd(), &text, patience), Err(Errno::AGAIN));
        let begun = Instant::now();
        for _ in 0..100 {
            assert_eq!(output.write(writer.as_fd(), b"x", patience), Err(Errno::AGAIN));
        }
        assert!(begun.elapsed() < patience * 10, "{:?}", begun.elapsed());
        reader.set_nonblocking(true).unwrap();
        while reader.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {}
        output.write(writer.as_fd(), b"x", patience).unwrap();
    }

    #[test]
    fn a_descriptor_that_blocks_is_not_waited_for_without_end() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let output = Output::new();
        assert_eq!(
            output.write(writer.as_fd(), &[0; 1 << 20], Duration::from_millis(100)),
            Err(Errno::AGAIN)
        );
        drop(reader);
        assert_eq!(output.write(writer.as_fd(), b"x", Duration::ZERO), Err(Errno::PIPE));
    }
}
