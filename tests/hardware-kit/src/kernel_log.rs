// SPDX-License-Identifier: Apache-2.0
//! What the host's kernel logged while the kit ran.

use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::os::unix::fs::OpenOptionsExt;

/// What lines worth keeping have in them.
const WORDS: [&str; 9] = ["SEV", "SNP", "ccp ", "kvm", "KVM", "AMD-Vi", "RMP", "WARNING", "BUG"];
/// Most lines that are kept.
const LINES: usize = 200;

/// The log from one moment on.
pub struct KernelLog(Option<File>);

impl KernelLog {
    /// Opens the log at its end; only root may.
    pub fn begin() -> Self {
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let open = || {
            let mut log = File::options().read(true).custom_flags(flags).open("/dev/kmsg").ok()?;
            log.seek(SeekFrom::End(0)).ok()?;
            Some(log)
        };
        KernelLog(open())
    }

    /// The lines since then that are about SEV or KVM, or warn; `None` if the log cannot be read.
    pub fn lines(self) -> Option<Vec<String>> {
        let mut log = self.0?;
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        // Each read gives one record, "priority,sequence,time,flags;text"; at the end the read would block.
        loop {
            let length = match log.read(&mut record) {
                Ok(length @ 1..) => length,
                // Records were overwritten before they were read; the next read gives the oldest that is
                // left.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => continue,
                _ => break,
            };
            let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
            let message =
                text.split_once(';').map_or("", |(_, message)| message).lines().next().unwrap_or_default();
            if WORDS.iter().any(|word| message.contains(word)) {
                lines.push(message.to_owned());
            }
        }
        // The cause of an end is in the last ones.
        lines.drain(..lines.len().saturating_sub(LINES));
        Some(lines)
    }
}
