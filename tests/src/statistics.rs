// SPDX-License-Identifier: Apache-2.0
//! What `cvmm --statistics` prints at the end of a run on the emulated platform.

use anyhow::Context;
use anyhow::Result;
use serde::Deserialize;

/// Counts from the first vCPU's start up to some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Counts {
    /// `PVALIDATE` instructions.
    pub pvalidate: u64,
    /// Those of 2 MiB that were done.
    pub pvalidate_2m: u64,
    /// Those of 2 MiB that were answered with a size mismatch.
    pub size_mismatch: u64,
    /// Pages of 4 KiB that became validated, the launch's not among them.
    pub validated_pages: u64,
    /// Page-state changes that the monitor was asked for.
    pub page_state_changes: u64,
    /// Time.
    pub milliseconds: u64,
    /// The monitor's memory, guest memory that was touched included.
    pub resident_kib: u64,
}

/// The line of a run.
#[derive(Clone, Debug, Deserialize)]
pub struct Statistics {
    /// Up to the kernel's first instruction.
    pub before_kernel: Option<Counts>,
    /// Over the whole run.
    pub in_all: Counts,
    /// Pages that the launch brought.
    pub launched_pages: u64,
    /// What a correct guest does not do.
    pub findings: Vec<String>,
}

impl Statistics {
    /// Finds the line in the monitor's messages.
    pub fn parse(errors: &str) -> Result<Self> {
        let line = errors.lines().find_map(|line| line.strip_prefix("cvmm: statistics "));
        let line = line.context("cvmm printed no statistics")?;
        serde_json::from_str(line).with_context(|| format!("cvmm's statistics: {line}"))
    }

    /// stage0's share.
    pub fn stage0(&self) -> Result<Counts> {
        self.before_kernel.context("stage0 did not enter a kernel")
    }
}

/// The number of pages that cvmm announced for a launch.
pub fn launch_pages(errors: &str) -> Result<u64> {
    let line = errors.lines().find(|line| line.starts_with("cvmm: launch digest "));
    let pages = line.and_then(|line| line.rsplit_once('(')?.1.strip_suffix(" pages)")?.parse().ok());
    pages.context("cvmm announced no launch pages")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_are_found_among_messages() {
        let counts = |pvalidate: u64| {
            format!(
                "{{\"pvalidate\":{pvalidate},\"pvalidate_2m\":2,\"size_mismatch\":3,\"validated_pages\":4,\
                 \"cleared_pages\":5,\"page_state_changes\":6,\"milliseconds\":7,\"resident_kib\":8}}"
            )
        };
        let errors = format!(
            "cvmm: launch digest 00ff (12 pages)\nnoise\ncvmm: statistics {{\"before_kernel\":{},\"in_all\":{},\
             \"launched_pages\":9,\"findings\":[]}}\ncvmm: the guest asked for a reset\n",
            counts(1),
            counts(100)
        );
        assert_eq!(launch_pages(&errors).unwrap(), 12);
        let statistics = Statistics::parse(&errors).unwrap();
        assert_eq!(statistics.stage0().unwrap().pvalidate, 1);
        assert_eq!(statistics.in_all.pvalidate, 100);
        assert!(launch_pages("cvmm: launch digest 00ff").is_err());
        assert!(Statistics::parse("cvmm: statistics {").is_err());
    }
}
