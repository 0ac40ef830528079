// SPDX-License-Identifier: Apache-2.0
//! A launch that is begun and given up: what decides whether this host can launch SNP guests, with the
//! firmware's verdict on each value of the CPUID page.

use std::fmt;
use std::io;

use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_sev_snp_launch_start;
use serde::Deserialize;
use serde::Serialize;
use snp::firmware_status::FwStatus;
use snp::pages::cpuid::CpuidTable;
use snp::pages::cpuid::decode_page;
use snp::pages::cpuid_diff::CpuidDiff;
use snp::pages::cpuid_diff::Difference;
use snp::pages::cpuid_raw::RawCpuid;
use snp::plan::LaunchPlan;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;
use snp::plan::Record;
use snp::policy::GuestPolicy;

use crate::cpuid;
use crate::launch;
use crate::launch::LaunchError;
use crate::launch::Updater;
use crate::machine::ram::GuestRam;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::Platform;
use crate::platform::Vm;
use crate::platform::VmKind;
use crate::platform::kvm::CpuidRow;
use crate::platform::kvm::KvmPlatform;

/// One register of the CPUID page for which the firmware has another value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidChange {
    /// Leaf.
    pub leaf: u32,
    /// Sub-leaf.
    pub subleaf: u32,
    /// Register, as in "EAX".
    pub register: String,
    /// What was offered.
    pub offered: u32,
    /// What the firmware accepts.
    pub accepted: u32,
}

/// What became of the CPUID page of a launch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTrial {
    /// The page, in its order.
    pub offered: Vec<CpuidRow>,
    /// What the firmware changed; nothing if it took the page as it was.
    pub changes: Vec<CpuidChange>,
    /// It changed the page's count, leaves or reserved bytes as well.
    pub structure: bool,
    /// `--accept-cpuid` would launch with the changes.
    pub acceptable: bool,
    /// Whether the firmware took its own values when they were offered; `None`: they were not.
    pub again: Option<Result<(), String>>,
}

impl CpuidTrial {
    fn of(offered: Vec<CpuidRow>, diff: &CpuidDiff) -> Self {
        let change = |d: &Difference| CpuidChange {
            leaf: d.leaf,
            subleaf: d.subleaf,
            register: d.register.to_string(),
            offered: d.offered,
            accepted: d.accepted,
        };
        CpuidTrial {
            offered,
            changes: diff.differences.iter().map(change).collect(),
            structure: diff.structure,
            acceptable: diff.is_acceptable(),
            again: None,
        }
    }
}

/// How far a launch without a guest came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trial {
    /// Nothing was tried, and why.
    NotTried(String),
    /// A step failed.
    Failed {
        /// What was being done.
        step: String,
        /// Errno of the failed call, 0 if there is none.
        errno: i32,
        /// The firmware's status, 0 if it gave none.
        firmware: u32,
        /// All of it in words.
        error: String,
        /// The CPUID page, if it was what failed.
        cpuid: Option<CpuidTrial>,
    },
    /// An SNP VM was created, initialised, its launch begun and pages added to it; then it was closed.
    Passed(CpuidTrial),
}

impl Trial {
    fn failed(step: &str, errno: i32, firmware: u32, error: impl fmt::Display) -> Trial {
        Trial::Failed { step: step.to_owned(), errno, firmware, error: error.to_string(), cpuid: None }
    }

    fn refused(step: &str, e: LaunchError) -> Trial {
        match e {
            LaunchError::Sev { step, source } => Trial::failed(&step, source.errno, source.firmware, &source),
            LaunchError::Call { step, source } => Trial::failed(&step, errno(&source.source), 0, source),
            e => Trial::failed(step, 0, 0, e),
        }
    }

    /// The CPUID page, if it was offered to the firmware.
    pub fn cpuid(&self) -> Option<&CpuidTrial> {
        match self {
            Trial::NotTried(_) => None,
            Trial::Failed { cpuid, .. } => cpuid.as_ref(),
            Trial::Passed(cpuid) => Some(cpuid),
        }
    }
}

fn errno(e: &io::Error) -> i32 {
    e.raw_os_error().unwrap_or(0)
}

/// Where the trial's memory lies, and its pages: one of code, one with the CPUID table.
const TRIAL_GPA: u64 = 0;
const TRIAL_LEN: u64 = 2 * PAGE_SIZE;

/// Does on `vm` what a launch does up to its CPUID page, by the launch's own functions: `KVM_SEV_INIT2`,
/// memory with a private side, `LAUNCH_START` with the default policy, `LAUNCH_UPDATE` of a normal page and
/// of `table`. No vCPU is needed for any of it (Linux 7.3, `sev.c:snp_launch_update`). `host` is the
/// processors' own CPUID: as in a launch, losses of what it lacks are accepted.
pub(crate) fn try_pages(vm: &dyn Vm, table: &CpuidTable, host: Option<&RawCpuid>) -> Trial {
    let page = match table.page() {
        Ok(page) => page,
        Err(e) => return Trial::failed("making the CPUID page", 0, 0, e),
    };
    let commands = match vm.snp_commands() {
        Ok(commands) => commands,
        Err(e) => return Trial::failed("creating an SNP VM", errno(&e.source), 0, e),
    };
    if let Err(e) = launch::init_snp(commands, &LaunchPlan { records: Vec::new(), vcpus: Vec::new() }) {
        return Trial::refused("creating an SNP guest", e);
    }
    let ram = match GuestRam::new([(TRIAL_GPA, TRIAL_LEN)]) {
        Ok(ram) => ram,
        Err(e) => return Trial::failed("mapping two pages", errno(&e), 0, e),
    };
    if let Err(e) = launch::add_memory(vm, &ram, true) {
        return Trial::refused("adding guest RAM", e);
    }
    let attributes = kvm_memory_attributes {
        address: TRIAL_GPA,
        size: TRIAL_LEN,
        attributes: ATTRIBUTE_PRIVATE,
        flags: 0,
    };
    if let Err(e) = vm.set_memory_attributes(attributes) {
        return Trial::failed("making guest RAM private", errno(&e.source), 0, e);
    }
    let mut start = kvm_sev_snp_launch_start { policy: GuestPolicy::DEFAULT.0, ..Default::default() };
    if let Err(e) = commands.snp_launch_start(&mut start) {
        return Trial::failed("starting the launch with the default policy", e.errno, e.firmware, &e);
    }
    // A page of HLT, though it never runs.
    let code = Record::new(TRIAL_GPA, PageType::Normal, vec![0xf4; PAGE_SIZE as usize], "a normal page");
    if let Err(e) = Updater::new(commands, false, host).add(&code) {
        return Trial::refused("adding a normal page", e);
    }
    let record = Record::new(TRIAL_GPA + PAGE_SIZE, PageType::Cpuid, page.to_vec(), "the CPUID page");
    let offered = decode_page(&page).unwrap_or_default().iter().map(CpuidRow::from).collect();
    let mut updater = Updater::new(commands, false, host);
    match updater.add(&record) {
        Ok(()) => Trial::Passed(match &updater.accepted {
            None => CpuidTrial { offered, ..CpuidTrial::default() },
            Some(diff) => CpuidTrial { again: Some(Ok(())), ..CpuidTrial::of(offered, diff) },
        }),
        Err(LaunchError::Cpuid { diff, .. }) => {
            let mut cpuid = CpuidTrial::of(offered, &diff);
            // Firmware can refuse even its own version (that of Genoa keeps wrong bits of 0x8000001F EBX).
            if cpuid.acceptable {
                cpuid.again =
                    Some(Updater::new(commands, true, host).add(&record).map_err(|e| e.to_string()));
            }
            Trial::Failed {
                step: "adding the CPUID page".into(),
                errno: libc::EIO,
                firmware: FwStatus::INVALID_PARAM.0,
                error: format!("the firmware refused {} of its registers", cpuid.changes.len()),
                cpuid: Some(cpuid),
            }
        }
        Err(e) => Trial::refused("adding the CPUID page", e),
    }
}

/// Begins a launch and gives it up: a VM of the SNP type and [`try_pages`] on it. Takes one ASID until it
/// returns.
pub fn try_launch(kvm: &KvmPlatform) -> Trial {
    let table = kvm.supported_cpuid().map_err(|e| e.to_string()).and_then(|supported| {
        CpuidTable::snp(&cpuid::from_kvm(&supported), 1, &kvm.snp_cpuid()).map_err(|e| e.to_string())
    });
    let table = match table {
        Ok(table) => table,
        Err(e) => return Trial::failed("making the CPUID page", 0, 0, e),
    };
    let vm = match kvm.create(VmKind::Snp) {
        Ok(vm) => vm,
        Err(e) => return Trial::failed("creating an SNP VM", errno(&e.source), 0, e),
    };
    if let Err((name, value)) = vm.check_snp() {
        let error = format!("{name} is {value:#x} on the SNP VM itself");
        return Trial::failed("asking the VM what it can do", 0, 0, error);
    }
    try_pages(&vm, &table, kvm.raw_cpuid().as_ref())
}

#[cfg(test)]
#[path = "trial_test.rs"]
mod trial_test;
