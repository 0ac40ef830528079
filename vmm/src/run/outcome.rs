// SPDX-License-Identifier: Apache-2.0
//! How a guest ended, and the process exit codes that say so.

use std::fmt;

use snp::ghcb::term::SevTerm;

/// Why a run is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off (ACPI S5).
    PoweredOff,
    /// The guest asked for a reset.
    Rebooted,
    /// An SNP guest ended itself and gave a reason.
    Terminated(SevTerm),
    /// A vCPU took a triple fault.
    Crashed {
        /// Which one.
        vcpu: u32,
    },
    /// The monitor was told to stop by a signal.
    Signal(i32),
}

/// Exit code: the monitor failed. Usage errors are 2, by clap's convention.
pub const EXIT_MONITOR_ERROR: u8 = 1;
/// Exit code: what was asked for is not valid.
pub const EXIT_USAGE: u8 = 2;

impl Outcome {
    /// Exit code of a run.
    pub fn exit_code(&self) -> u8 {
        match self {
            Outcome::PoweredOff => 0,
            Outcome::Rebooted => 3,
            Outcome::Terminated(_) => 4,
            Outcome::Crashed { .. } => 5,
            // The shell's convention for a process that a signal ended.
            Outcome::Signal(signal) => 128u8.saturating_add(*signal as u8),
        }
    }
}

/// Every exit code of a run, and what it means. `--help` and the documentation print this table.
pub const EXIT_CODES: &[(&str, &str)] = &[
    ("0", "the guest switched itself off"),
    ("1", "the monitor, its host, or another command failed; the message says where"),
    ("2", "the request is not valid (bad option, bad file, not enough memory for the image)"),
    ("3", "the guest asked for a reset, and --on-reboot restart was not given"),
    ("4", "the guest terminated itself (SEV_TERM); the reason is printed in words"),
    ("5", "the guest crashed (triple fault)"),
    ("130", "stopped by SIGINT or Ctrl-A X; 143 by SIGTERM, 128 + N by signal N, any that ends programs"),
];

/// The table as `--help` shows it.
pub fn exit_codes_help() -> String {
    let rows: String = EXIT_CODES.iter().map(|(code, meaning)| format!("  {code:>3}  {meaning}\n")).collect();
    format!(
        "Exit codes:\n{rows}Other commands than a run end with 0, 1 or 2; 1 is also the answer of a check or a comparison that found a \
         fault. `doctor` and `vmgs` have codes of their own, which their help shows."
    )
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::PoweredOff => write!(f, "the guest switched itself off"),
            Outcome::Rebooted => write!(f, "the guest asked for a reset"),
            Outcome::Terminated(reason) => write!(f, "the guest terminated itself: {reason}"),
            Outcome::Crashed { vcpu } => write!(f, "the guest crashed: triple fault on vCPU {vcpu}"),
            Outcome::Signal(signal) => write!(f, "stopped by signal {signal}"),
        }
    }
}
