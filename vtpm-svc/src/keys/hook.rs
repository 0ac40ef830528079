// SPDX-License-Identifier: Apache-2.0
//! A program that gives the key: the way to a key store or a broker that this service knows nothing about.
//!
//! It gets one JSON object on standard input (`image`, `purpose`) and prints the key (32 bytes or 64 hexadecimal digits)
//! on standard output. A non-zero exit is a refusal, and the first line of its standard error is the reason that the
//! operator sees. It runs before the service gives up its rights, with nothing of the environment but `PATH`.

use std::io::Read;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use zeroize::Zeroizing;

use super::KeyError;
use super::KeyProvider;
use super::KeyRequest;
use crate::vmgs::Key;

/// An executable.
pub struct Hook {
    /// The program.
    pub program: PathBuf,
}

impl KeyProvider for Hook {
    fn describe(&self) -> String {
        format!("key hook {}", self.program.display())
    }

    fn obtain(&self, request: &KeyRequest<'_>) -> Result<Key, KeyError> {
        let io = |source| KeyError::Io { path: self.program.clone(), source };
        let mut child = Command::new(&self.program)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(io)?;
        let question =
            serde_json::json!({ "image": request.image_text(), "purpose": request.purpose.word() });
        if let Some(mut stdin) = child.stdin.take() {
            // A hook that does not read its input is not at fault.
            let _ = stdin.write_all(question.to_string().as_bytes());
        }
        let mut answer = Zeroizing::new(Vec::with_capacity(4096));
        if let Some(stdout) = child.stdout.take() {
            stdout.take(4096).read_to_end(&mut answer).map_err(io)?;
        }
        let mut reason = String::new();
        if let Some(stderr) = child.stderr.take() {
            // Not being able to read the reason must not hide the refusal.
            let _ = stderr.take(4096).read_to_string(&mut reason);
        }
        let status = child.wait().map_err(io)?;
        if !status.success() {
            return Err(KeyError::Hook {
                program: self.program.clone(),
                status: status.to_string(),
                message: reason.lines().next().unwrap_or("no reason given").to_owned(),
            });
        }
        super::decode(format!("from hook {}", self.program.display()), &answer)
    }
}
