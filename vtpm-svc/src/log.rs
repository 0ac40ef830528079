// SPDX-License-Identifier: Apache-2.0
//! What the service says: one plain line per event on standard error, or in the file that `--log` names.
//!
//! Lines are written for operators. No key, seed, blob or command body is ever passed to these functions.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::pace::Pace;

static FILE: OnceLock<File> = OnceLock::new();

/// Sends all later lines to a file; the first call wins.
pub fn to_file(file: File) {
    let _ = FILE.set(file);
}

/// Lines that a guest or a client can cause at will: twenty at once, one in ten seconds in the long run.
static OFTEN: Pace = Pace::new(Duration::from_secs(10), 20);
/// How many of them were left out.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Text from outside as one line that does nothing to a terminal: without control characters, line and
/// paragraph separators, and marks that turn the direction of what follows.
pub fn clean(text: &str) -> String {
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    text.chars().map(|c| if odd(c) { ' ' } else { c }).collect()
}

fn line(level: &str, text: &str) {
    let line = format!("vtpm-svc: {level}{}\n", clean(text));
    // A log that cannot be written must not stop the TPM.
    let _ = match FILE.get() {
        Some(mut f) => f.write_all(line.as_bytes()),
        None => std::io::stderr().write_all(line.as_bytes()),
    };
}

/// Something failed.
pub fn error(text: &str) {
    line("error: ", text);
}

/// Something is odd, or was overridden by an operator.
pub fn warn(text: &str) {
    line("warning: ", text);
}

/// A warning that a guest or a client can cause as often as it likes.
pub fn often(text: &str) {
    if !OFTEN.allow() {
        LEFT_OUT.fetch_add(1, Ordering::Relaxed);
        return;
    }
    match LEFT_OUT.swap(0, Ordering::Relaxed) {
        0 => warn(text),
        n => warn(&format!("{text} (before it, {n} lines of this kind were left out)")),
    }
}

/// Something happened.
pub fn info(text: &str) {
    line("", text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_cannot_move_the_cursor_or_forge_a_line() {
        let hostile = "a\u{1b}[2Jb\r\nvtpm-svc: ready\u{202e}c\u{2028}d\u{9b}e";
        assert_eq!(clean(hostile), "a [2Jb  vtpm-svc: ready c d e");
        assert_eq!(clean("Grüße, 世界"), "Grüße, 世界");
    }
}
