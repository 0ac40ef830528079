// SPDX-License-Identifier: Apache-2.0
//! One line of the report: found, needed, how to fix.

use std::fmt;

use serde::Serialize;

use crate::platform::kvm::Finding;

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
    /// Name for programs, one of [`IDS`](super::IDS); an id may have several lines, one for each cgroup.
    pub id: &'static str,
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
    pub(super) fn deciding(area: Area, finding: Finding) -> Check {
        let status = if finding.ok { Status::Ok } else { Status::Missing };
        Check {
            decides: true,
            ..Check::new(area, (finding.id, finding.what), status, finding.found, finding.needed, finding.fix)
        }
    }

    pub(super) fn new(
        area: Area,
        (id, what): (&'static str, &str),
        status: Status,
        found: impl Into<String>,
        needed: &str,
        fix: impl Into<String>,
    ) -> Check {
        Check {
            id,
            area,
            what: what.to_owned(),
            status,
            found: found.into(),
            needed: needed.to_owned(),
            fix: if status == Status::Ok { String::new() } else { fix.into() },
            decides: false,
        }
    }

    /// A line about SNP guests that explains, but does not decide.
    pub(super) fn explaining(
        name: (&'static str, &str),
        ok: bool,
        found: impl Into<String>,
        needed: &str,
        fix: &str,
    ) -> Check {
        Check::new(Area::Snp, name, if ok { Status::Ok } else { Status::Missing }, found, needed, fix)
    }
}
