// SPDX-License-Identifier: Apache-2.0
//! What a host offers for SNP guests and for emulated ones: found, needed, how to fix.
//!
//! Facts are gathered into plain data ([`facts`]) and judged by pure functions ([`snp`], [`emulation`]), so
//! the judgement is tested on facts of machines that are not here. Two things decide, and nothing else does:
//! whether the launch's own check passes
//! ([`LaunchFacts::findings`](crate::platform::kvm::LaunchFacts::findings)), and whether a launch can be
//! begun ([`Trial`](trial::Trial)). Every other line looks for the cause when one of the two fails; where
//! both pass, such a line is a warning at most. So this page is never stricter than the launch.
//!
//! Sources: Linux `arch/x86/kvm/svm/sev.c` (`sev_hardware_setup`), `arch/x86/virt/svm/sev.c` (the RMP),
//! `Documentation/admin-guide/cgroup-v2.rst` (misc), AMD APM volume 3, appendix E.4.17. **The judgement of
//! SNP hosts has not met SNP hardware yet.**

pub mod emulation;
pub mod facts;
pub mod line;
mod log;
pub mod snp;
pub mod trial;

#[cfg(test)]
mod recorded_test;

use std::fmt;

use serde::Serialize;

use crate::doctor::facts::Facts;
use crate::doctor::line::Area;
use crate::doctor::line::Check;
use crate::doctor::line::Status;

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

/// Every id that a line can have, and what it is about; `docs/hardware-acceptance.md` has the same list.
/// Programs go by ids: texts get better from version to version, an id never changes its meaning.
pub const IDS: [(&str, &str); 39] = [
    ("cpu-snp", "the CPU has SEV-SNP and the BIOS has switched it on"),
    ("kvm-open", "`/dev/kvm` can be used"),
    ("kvm-vm-types", "KVM has the VM type of SNP guests"),
    ("kvm-guest-memfd", "`KVM_CAP_GUEST_MEMFD`"),
    ("kvm-user-memory2", "`KVM_CAP_USER_MEMORY2`"),
    ("kvm-memory-attributes", "`KVM_CAP_MEMORY_ATTRIBUTES`, the private attribute"),
    ("kvm-exit-hypercall", "`KVM_CAP_EXIT_HYPERCALL`, page-state changes"),
    ("kvm-irqchip", "`KVM_CAP_IRQCHIP`"),
    ("kvm-pit2", "`KVM_CAP_PIT2`"),
    ("cpuid-table", "a CPUID table for a guest of this area can be made from KVM's"),
    ("dev-sev", "`/dev/sev` can be opened"),
    ("launch-trial", "a launch that is begun and given up: pages are added, the CPUID page among them"),
    ("cpuid-page", "what the firmware said about each value of the CPUID page"),
    ("cpu-sev-es", "the CPU has SEV and SEV-ES"),
    ("asids", "address-space ids for SNP guests"),
    ("c-bit", "position of the C-bit"),
    ("module-kvm-amd", "the module is there"),
    ("param-sev", "module parameter `kvm_amd.sev`"),
    ("param-sev-es", "module parameter `kvm_amd.sev_es`"),
    ("param-sev-snp", "module parameter `kvm_amd.sev_snp`"),
    ("param-npt", "module parameter `kvm_amd.npt`"),
    ("param-nrips", "module parameter `kvm_amd.nrips`"),
    ("param-lbrv", "module parameter `kvm_amd.lbrv`"),
    ("param-mmio-caching", "module parameter `kvm.mmio_caching`"),
    ("rmp", "the reverse map table"),
    ("iommu", "the IOMMU allows SNP; only if the kernel complained"),
    ("firmware", "the SNP firmware answers, and its version"),
    ("firmware-state", "the SNP firmware is initialised"),
    ("reports-signed", "attestation reports are signed"),
    ("reports-chip-id", "attestation reports name the chip"),
    ("asid-cgroup", "a free ASID in a cgroup, one line for each"),
    ("kvm-sev-init2", "`KVM_SEV_INIT2`"),
    ("policy", "policy bits that KVM allows"),
    ("kvm-memory-fault-info", "`KVM_CAP_MEMORY_FAULT_INFO`"),
    ("guest-certs", "KVM asks the monitor for certificates"),
    ("kvm-msr-exits", "`KVM_CAP_X86_USER_SPACE_MSR` and `KVM_CAP_X86_MSR_FILTER`, one line for each"),
    ("address-bits", "physical address bits of an emulated guest"),
    ("emulation-trial", "a guest of a few bytes runs"),
    ("speed", "instructions each second in a guest"),
];

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

/// Everything that was found out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Diagnosis {
    /// What can be launched.
    pub verdict: Verdict,
    /// The exit code that says so.
    pub exit_code: u8,
    /// The verdict and its reason in one line.
    pub summary: String,
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
    let summary = summary(verdict, &checks);
    Diagnosis { verdict, exit_code: verdict.exit_code(), summary, checks, facts }
}

/// The first line of the report: what can be launched here, and what is in the way of the rest.
fn summary(verdict: Verdict, checks: &[Check]) -> String {
    let reason = |area| {
        let mut missing =
            checks.iter().filter(|c| c.area == area && c.decides && c.status == Status::Missing);
        let first = missing.next();
        let first = first.map_or_else(String::new, |c| format!("{}: {}", c.what, c.found));
        match missing.count() {
            0 => first,
            more => format!("{first}, and {more} more"),
        }
    };
    let emulate = "The emulated platform can be used instead: --snp --platform emulated";
    match verdict {
        Verdict::Snp => "SNP guests can be launched on this host".to_owned(),
        Verdict::Emulation => {
            format!("SNP guests cannot be launched on this host ({}). {emulate}", reason(Area::Snp))
        }
        Verdict::Neither => format!(
            "SNP guests cannot be launched on this host ({}). Nor can the emulated platform be used ({})",
            reason(Area::Snp),
            reason(Area::Emulation)
        ),
    }
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
        write!(f, "{}\n\n{}, Linux {}", self.summary, self.facts.cpu_model, self.facts.kernel)?;
        for (area, title) in
            [(Area::Snp, "SNP guests of this host"), (Area::Emulation, "The emulated platform")]
        {
            write!(f, "\n\n{title}")?;
            for check in self.checks.iter().filter(|c| c.area == area) {
                write!(f, "\n  {:8} {}: {}", check.status, check.what, check.found)?;
                if check.status != Status::Ok {
                    if !check.needed.is_empty() {
                        write!(f, "\n           needed: {}", check.needed)?;
                    }
                    if !check.fix.is_empty() {
                        write!(f, "\n           fix:    {}", check.fix)?;
                    }
                }
            }
        }
        Ok(())
    }
}
