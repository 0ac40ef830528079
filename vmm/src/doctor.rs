// SPDX-License-Identifier: Apache-2.0
//! What a host offers for SNP guests and for emulated ones: found, needed, how to fix.
//!
//! Facts are gathered into plain data ([`facts`]) and judged by pure functions ([`snp`], [`emulation`]), so the judgement is
//! tested on facts of machines that are not here. Two things decide, and nothing else does: whether the launch's own check
//! passes ([`LaunchFacts::findings`](crate::platform::kvm::LaunchFacts::findings)), and whether a launch can be begun
//! ([`Trial`](crate::platform::kvm::Trial)). Every other line looks for the cause when one of the two fails; where both
//! pass, such a line is a warning at most. So this page is never stricter than the launch.
//!
//! Sources: Linux `arch/x86/kvm/svm/sev.c` (`sev_hardware_setup`), `arch/x86/virt/svm/sev.c` (the RMP),
//! `Documentation/admin-guide/cgroup-v2.rst` (misc), AMD APM volume 3, appendix E.4.17. **The judgement of SNP hosts has not
//! met SNP hardware yet.**

pub mod emulation;
pub mod facts;
pub mod snp;

#[cfg(test)]
mod recorded_test;

use std::fmt;

use serde::Serialize;

use crate::doctor::facts::Facts;
use crate::platform::kvm::Finding;

/// Exit code: SNP guests can be launched.
pub const EXIT_SNP: u8 = 0;
/// Exit code: only guests on the emulated platform can be launched.
pub const EXIT_EMULATION_ONLY: u8 = 10;
/// Exit code: neither.
pub const EXIT_NEITHER: u8 = 11;

/// The table that `cvmm doctor --help` shows.
pub const EXIT_CODES: &str = "\
Exit codes:
    0  SNP guests can be launched on this host
    1  doctor itself failed
    2  the request is not valid
   10  only the emulated platform can be used (--snp --platform emulated)
   11  neither can be used";

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// SNP guests of this host.
    Snp,
    /// The emulated platform.
    Emulation,
}

/// How a line came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As needed.
    Ok,
    /// Guests can be launched, but something is unusual.
    Warning,
    /// Guests cannot be launched, and this is why or may be.
    Missing,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Missing => "missing",
        })
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What it is about.
    pub area: Area,
    /// What was checked.
    pub what: String,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What is needed.
    pub needed: String,
    /// What can be done; empty if nothing need be.
    pub fix: String,
    /// Guests of this area can be launched only if this line is `ok`.
    pub decides: bool,
}

impl Check {
    /// A line that decides.
    fn deciding(area: Area, finding: Finding) -> Check {
        let status = if finding.ok { Status::Ok } else { Status::Missing };
        Check {
            decides: true,
            ..Check::new(area, finding.what, status, finding.found, finding.needed, finding.fix)
        }
    }

    fn new(
        area: Area,
        what: &str,
        status: Status,
        found: impl Into<String>,
        needed: &str,
        fix: impl Into<String>,
    ) -> Check {
        Check {
            area,
            what: what.to_owned(),
            status,
            found: found.into(),
            needed: needed.to_owned(),
            fix: if status == Status::Ok { String::new() } else { fix.into() },
            decides: false,
        }
    }
}

/// What can be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// SNP guests.
    Snp,
    /// Only emulated ones.
    Emulation,
    /// Neither.
    Neither,
}

impl Verdict {
    /// Exit code of `cvmm doctor`.
    pub fn exit_code(self) -> u8 {
        match self {
            Verdict::Snp => EXIT_SNP,
            Verdict::Emulation => EXIT_EMULATION_ONLY,
            Verdict::Neither => EXIT_NEITHER,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Snp => "SNP guests can be launched on this host",
            Verdict::Emulation => {
                "no SNP guests on this host; the emulated platform can be used (--snp --platform emulated)"
            }
            Verdict::Neither => "neither SNP guests nor the emulated platform can be used on this host",
        })
    }
}

/// Everything that was found out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Diagnosis {
    /// What can be launched.
    pub verdict: Verdict,
    /// The exit code that says so.
    pub exit_code: u8,
    /// Line by line.
    pub checks: Vec<Check>,
    /// What the lines were judged by.
    pub facts: Facts,
}

/// Judges a host by its facts.
pub fn judge(facts: Facts) -> Diagnosis {
    let mut checks = settle(snp::checks(&facts));
    checks.extend(settle(emulation::checks(&facts)));
    let can = |area| checks.iter().filter(|c| c.area == area && c.decides).all(|c| c.status == Status::Ok);
    let verdict = match (can(Area::Snp), can(Area::Emulation)) {
        (true, _) => Verdict::Snp,
        (false, true) => Verdict::Emulation,
        (false, false) => Verdict::Neither,
    };
    Diagnosis { verdict, exit_code: verdict.exit_code(), checks, facts }
}

/// The lines of one area: where nothing that decides is missing, nothing else is missing either.
fn settle(mut checks: Vec<Check>) -> Vec<Check> {
    if checks.iter().filter(|c| c.decides).all(|c| c.status == Status::Ok) {
        for check in checks.iter_mut().filter(|c| c.status == Status::Missing) {
            check.status = Status::Warning;
        }
    }
    checks
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, Linux {}", self.facts.cpu_model, self.facts.kernel)?;
        for (area, title) in
            [(Area::Snp, "SNP guests of this host"), (Area::Emulation, "The emulated platform")]
        {
            writeln!(f, "\n{title}")?;
            for check in self.checks.iter().filter(|c| c.area == area) {
                writeln!(f, "  {:8} {}: {}", check.status, check.what, check.found)?;
                if check.status != Status::Ok {
                    if !check.needed.is_empty() {
                        writeln!(f, "           needed: {}", check.needed)?;
                    }
                    if !check.fix.is_empty() {
                        writeln!(f, "           fix:    {}", check.fix)?;
                    }
                }
            }
        }
        write!(f, "\n{}", self.verdict)
    }
}
