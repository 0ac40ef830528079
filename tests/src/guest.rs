// SPDX-License-Identifier: Apache-2.0
//! A guest as a test describes it, the cvmm commands that run and measure it, and what its console said.

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use guest_init::job::Job;

use crate::digest::unhex;
use crate::machine::job;

/// How a guest is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No SNP.
    Plain,
    /// On the emulated platform, one memory for both views of a page.
    Single,
    /// On the emulated platform, two memories, and every access through the wrong view ends the run.
    SplitStrict,
}

/// A guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial ramdisk.
    pub initrd: PathBuf,
    /// Value of `--memory`.
    pub memory: &'static str,
    /// Number of vCPUs.
    pub cpus: u32,
    /// How it is launched.
    pub mode: Mode,
    /// What `l2-init` does, such as `info,report,reboot`.
    pub actions: &'static str,
    /// 64 bytes that its reports must carry, in hexadecimal.
    pub report_data: String,
    /// Kernel messages on the console; costs about 40,000 exits.
    pub verbose: bool,
}

/// The kernel parameters that every guest gets: console, an end by reset, and no calibration of timers
/// that a nested guest cannot calibrate.
const CMDLINE: &str = "console=ttyS0 panic=-1 reboot=k tsc=reliable no_timer_check";

impl Guest {
    /// The options that describe the image, the same for running and measuring.
    pub fn image_options(&self) -> Vec<String> {
        let quiet = if self.verbose { "" } else { " quiet" };
        let mut cmdline = format!("{CMDLINE}{quiet} cvmm.do={}", self.actions);
        if !self.report_data.is_empty() {
            cmdline += &format!(" cvmm.report_data={}", self.report_data);
        }
        vec![
            "--kernel".into(),
            self.kernel.display().to_string(),
            "--initrd".into(),
            self.initrd.display().to_string(),
            "--cmdline".into(),
            cmdline,
            "--memory".into(),
            self.memory.into(),
            "--cpus".into(),
            self.cpus.to_string(),
        ]
    }

    /// Runs it; `keys` are the emulated platform's.
    pub fn run_job(&self, cvmm: &Path, keys: &Path) -> Job {
        let mut job = job(cvmm);
        job.argv.extend(self.image_options());
        let snp: &[&str] = match self.mode {
            Mode::Plain => &[],
            Mode::Single => &["--snp", "--platform", "emulated", "--backing", "single"],
            Mode::SplitStrict => &["--snp", "--platform", "emulated", "--backing", "split", "--strict"],
        };
        job.argv.extend(snp.iter().map(ToString::to_string));
        if self.mode != Mode::Plain {
            job.argv.extend(["--emulated-keys".into(), keys.display().to_string()]);
        }
        job.limit = Duration::from_secs(400);
        job
    }

    /// Measures it.
    pub fn measure_job(&self, cvmm: &Path) -> Job {
        let mut job = job(cvmm);
        job.argv.push("measure".into());
        job.argv.extend(self.image_options());
        job
    }
}

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
