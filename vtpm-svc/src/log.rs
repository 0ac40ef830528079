// SPDX-License-Identifier: Apache-2.0
//! What the service says: one plain line per event on standard error, or in the file that `--log` names.
//!
//! Lines are written for operators. No key, seed, blob or command body is ever passed to these functions.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

static FILE: OnceLock<File> = OnceLock::new();

/// Sends all later lines to a file; the first call wins.
pub fn to_file(file: File) {
    let _ = FILE.set(file);
}

fn line(level: &str, text: &str) {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let line = format!("vtpm-svc: {level}{clean}\n");
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

/// Something happened.
pub fn info(text: &str) {
    line("", text);
}
