// SPDX-License-Identifier: Apache-2.0
//! What a guest did with its pages, counted up to the kernel's first instruction and over the whole run.
//!
//! stage0's share is what a launch costs inside of the guest; with lazy acceptance it must not grow with RAM.
//! Times are those of an emulated guest and say nothing about SNP hardware.

use std::fs;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use serde::Serialize;
use snp_model::rmp::PageStates;

/// Counts from the first vCPU's start on.
#[derive(Debug, Serialize)]
struct Counts {
    /// `PVALIDATE` instructions.
    pvalidate: u64,
    /// Those of 2 MiB that were done.
    pvalidate_2m: u64,
    /// Those of 2 MiB that were answered with a size mismatch.
    size_mismatch: u64,
    /// Pages of 4 KiB that became validated, the launch's not among them.
    validated_pages: u64,
    /// Pages of 4 KiB whose validation the guest took back.
    cleared_pages: u64,
    /// Ranges of page-state changes that the monitor was asked for.
    page_state_changes: u64,
    /// Time in the guest and in its monitor.
    milliseconds: u64,
    /// Memory of the monitor, guest memory that was touched included, at this moment.
    resident_kib: u64,
}

/// Counts one guest's run.
#[derive(Default)]
pub struct Meter {
    begun: OnceLock<Instant>,
    stage0: OnceLock<Counts>,
    page_state_changes: AtomicU64,
}

/// What is printed at the end.
#[derive(Serialize)]
struct Report<'a> {
    /// Up to the kernel's first instruction; none if stage0 did not run, or did not get there.
    before_kernel: Option<&'a Counts>,
    /// Until now.
    in_all: Counts,
    /// Pages that the launch brought.
    launched_pages: u64,
    /// What a correct guest does not do; of very many, the first thousand.
    findings: Vec<String>,
}

impl Meter {
    /// The guest's first instruction comes next.
    pub fn begin(&self) {
        let _ = self.begun.set(Instant::now());
    }

    /// The kernel's first instruction comes next.
    pub fn kernel_begins(&self, pages: &PageStates) {
        let _ = self.stage0.set(self.counts(pages));
    }

    /// The monitor is asked for a page-state change.
    pub fn page_state_change(&self) {
        self.page_state_changes.fetch_add(1, Relaxed);
    }

    fn counts(&self, pages: &PageStates) -> Counts {
        let s = pages.statistics();
        Counts {
            pvalidate: s.pvalidate_calls,
            pvalidate_2m: s.pvalidate_2m,
            size_mismatch: s.pvalidate_size_mismatch,
            validated_pages: s.validated,
            cleared_pages: s.cleared,
            page_state_changes: self.page_state_changes.load(Relaxed),
            milliseconds: self.begun.get().map_or(0, |begun| begun.elapsed().as_millis() as u64),
            resident_kib: resident_kib().unwrap_or(0),
        }
    }

    /// Everything so far, as one line of JSON.
    pub fn report(&self, pages: &PageStates) -> String {
        let report = Report {
            before_kernel: self.stage0.get(),
            in_all: self.counts(pages),
            launched_pages: pages.statistics().launched,
            findings: pages.findings().iter().map(ToString::to_string).collect(),
        };
        serde_json::to_string(&report).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
    }
}

fn resident_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use snp_model::rmp::TwoMib;

    use super::*;

    #[test]
    fn stage0_s_share_is_frozen_when_the_kernel_begins() {
        let pages = PageStates::new(std::slice::from_ref(&(0..0x10_0000)), TwoMib::Accept);
        pages.set_private(0, 0x100, true);
        let meter = Meter::default();
        meter.begin();
        pages.pvalidate(0x1000, true, 0, 1);
        meter.page_state_change();
        meter.kernel_begins(&pages);
        pages.pvalidate(0x2000, true, 0, 1);
        pages.pvalidate(0x2000, true, 0, 1);
        let report: Value = serde_json::from_str(&meter.report(&pages)).unwrap();
        assert_eq!(report["before_kernel"]["pvalidate"], 1);
        assert_eq!(report["before_kernel"]["page_state_changes"], 1);
        assert_eq!(report["in_all"]["pvalidate"], 3);
        assert_eq!(report["in_all"]["validated_pages"], 2);
        assert_eq!(report["findings"][0], "page 0x2000 was validated twice");
        assert!(report["in_all"]["resident_kib"].as_u64().unwrap() > 0);
    }
}
