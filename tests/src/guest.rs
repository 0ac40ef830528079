// SPDX-License-Identifier: Apache-2.0
//! A guest as a test describes it, the cvmm commands that run and measure it, and what its console said.

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

pub use guest_init::console::Console;
pub use guest_init::console::Report;
use guest_init::job::Job;

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
