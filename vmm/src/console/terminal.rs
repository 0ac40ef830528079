// SPDX-License-Identifier: Apache-2.0
//! The user's terminal as the guest's console: raw mode, put back on every way out.

use std::io;
use std::io::IsTerminal;
use std::io::Read;
use std::sync::Mutex;

use rustix::termios::OptionalActions;
use rustix::termios::Termios;

use crate::lock::lock;

/// The settings to put back; `None` once that is done, or if the terminal was never changed.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Puts the terminal back as it was. May be called any number of times, from any thread.
pub fn restore() {
    let saved = lock(&SAVED).take();
    // In the background a job that changes the terminal is stopped; whoever is in the foreground has set it
    // for himself.
    if let Some(settings) = saved
        && !in_background()
    {
        // Nothing can be done about a terminal that has gone away.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &settings);
    }
}

/// Whether standard input is a terminal that somebody else uses now: reading or changing it would stop this
/// process.
pub fn in_background() -> bool {
    let foreground = rustix::termios::tcgetpgrp(io::stdin());
    foreground.is_ok_and(|group| group != rustix::process::getpgrp())
}

/// Raw mode for as long as this lives.
pub struct RawMode(());

impl RawMode {
    /// Switches standard input to raw mode if it is a terminal. A panic puts it back as well.
    pub fn enter() -> io::Result<Option<RawMode>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let settings = rustix::termios::tcgetattr(io::stdin())?;
        let mut raw = settings.clone();
        raw.make_raw();
        // Output keeps its newline translation: the monitor's own messages go to the same terminal.
        raw.output_modes = settings.output_modes;
        *lock(&SAVED) = Some(settings);
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            report(info);
        }));
        rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(RawMode(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Ctrl-A, which starts a command to the monitor.
const ESCAPE: u8 = 1;

/// What the user typed, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// Bytes for the guest.
    Bytes(Vec<u8>),
    /// Ctrl-A X: stop the monitor.
    Quit,
}

/// Splits typed bytes into those for the guest and commands to the monitor.
#[derive(Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// Takes in what was read from a terminal.
    pub fn take(&mut self, input: &[u8]) -> Typed {
        let mut out = Vec::with_capacity(input.len());
        for &byte in input {
            match (self.escaped, byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => return Typed::Quit,
                // Ctrl-A twice sends one to the guest.
                (_, byte) => {
                    self.escaped = false;
                    out.push(byte);
                }
            }
        }
        Typed::Bytes(out)
    }
}

/// Reads standard input until its end; `deliver` gets everything for the guest and says whether to go on.
pub fn read_input(terminal: bool, mut deliver: impl FnMut(Typed) -> bool) {
    let mut keys = Keys::default();
    let mut buffer = [0; 256];
    loop {
        let typed = match io::stdin().lock().read(&mut buffer) {
            Ok(0) => return,
            Ok(n) if terminal => keys.take(&buffer[..n]),
            Ok(n) => Typed::Bytes(buffer[..n].to_vec()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if !deliver(typed) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_quits_and_ctrl_a_twice_reaches_the_guest() {
        assert_eq!(Keys::default().take(b"ab"), Typed::Bytes(b"ab".to_vec()));
        assert_eq!(Keys::default().take(b"a\x01\x01b"), Typed::Bytes(b"a\x01b".to_vec()));
        let mut keys = Keys::default();
        assert_eq!(keys.take(b"a\x01"), Typed::Bytes(b"a".to_vec()));
        assert_eq!(keys.take(b"x"), Typed::Quit);
    }
}
