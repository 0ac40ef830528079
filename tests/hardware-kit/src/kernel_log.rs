// SPDX-License-Identifier: Apache-2.0
//! What the host's kernel logged while the kit ran.

use std::fs::File;
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
        while let Ok(length @ 1..) = log.read(&mut record) {
            let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
            let message =
                text.split_once(';').map_or("", |(_, message)| message).lines().next().unwrap_or_default();
            if WORDS.iter().any(|word| message.contains(word)) {
                lines.push(message.to_owned());
            }
            if lines.len() >= LINES {
                break;
            }
        }
        Some(lines)
    }
}
