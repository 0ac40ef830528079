// SPDX-License-Identifier: Apache-2.0
//! What `l2-init` printed, read outside of the guest: lines `cvmm-guest: KEY VALUE`, and the attestation
//! reports in them.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

/// What `l2-init` printed.
#[derive(Clone, Debug, Default)]
pub struct Console {
    lines: Vec<(String, String)>,
}

impl Console {
    /// Finds the `cvmm-guest: KEY VALUE` lines in a console's text.
    pub fn parse(text: &str) -> Self {
        let lines = text
            .lines()
            .filter_map(|line| {
                let (_, rest) = line.split_once("cvmm-guest: ")?;
                let (key, value) = rest.split_once(' ').unwrap_or((rest, ""));
                Some((key.to_string(), value.trim_end().to_string()))
            })
            .collect();
        Console { lines }
    }

    /// The value of the first line with `key`.
    pub fn get(&self, key: &str) -> Result<&str> {
        let found = self.lines.iter().find(|(name, _)| name == key);
        let value = found.map(|(_, value)| value.as_str());
        value.with_context(|| format!("the guest printed no `{key}`; it printed {:?}", self.summary()))
    }

    /// All values of lines with `key`.
    pub fn all(&self, key: &str) -> Vec<&str> {
        self.lines.iter().filter(|(name, _)| name == key).map(|(_, value)| value.as_str()).collect()
    }

    /// The bytes of a hexadecimal value.
    pub fn bytes(&self, key: &str) -> Result<Vec<u8>> {
        unhex(self.get(key)?).with_context(|| format!("`{key}` from the guest"))
    }

    /// Keys and short values, for error messages.
    fn summary(&self) -> Vec<String> {
        self.lines.iter().map(|(key, value)| format!("{key} {value:.60}")).collect()
    }
}

/// Fields of an attestation report that tests look at (SEV-SNP Firmware ABI 1.58, table 23).
#[derive(Clone, Copy)]
pub struct Report<'a>(pub &'a [u8]);

impl<'a> Report<'a> {
    /// 64 bytes that the guest chose.
    pub fn report_data(&self) -> Option<&'a [u8]> {
        self.0.get(0x50..0x90)
    }

    /// What the firmware drew for this launch of the guest, and keeps for its life.
    pub fn report_id(&self) -> Option<&'a [u8]> {
        self.0.get(0x140..0x160)
    }

    /// The launch digest.
    pub fn measurement(&self) -> Option<&'a [u8]> {
        self.0.get(0x90..0xc0)
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of a hexadecimal string.
pub fn unhex(text: &str) -> Result<Vec<u8>> {
    ensure!(text.is_ascii() && text.len().is_multiple_of(2), "not an even number of hexadecimal digits");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).context("not a hexadecimal digit"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_lines_are_found_among_kernel_messages() {
        let text = "[    1.0] noise\n[    2.0] cvmm-guest: cpus 0-3\ncvmm-guest: sleeping\n";
        let console = Console::parse(text);
        assert_eq!(console.get("cpus").unwrap(), "0-3");
        assert_eq!(console.get("sleeping").unwrap(), "");
        assert!(console.get("report").is_err());
    }
}
