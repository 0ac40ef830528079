// SPDX-License-Identifier: Apache-2.0
//! Why a launch failed: the step, the page, the errno and firmware status, and what they mean together.
//!
//! An errno of KVM's SEV commands alone says little; the causes here are read from `arch/x86/kvm/svm/sev.c`
//! of Linux 6.12.

use std::io;

use snp::digest::LaunchDigest;
use snp::firmware_status::FwStatus;
use snp::identity::IdMismatch;
use snp::pages::cpuid_diff::CpuidDiff;
use snp::plan::PlanError;

use crate::platform::error::CallError;
use crate::platform::error::SevError;
use crate::platform::registers::Mismatch;

/// How often an update that answers EAGAIN is tried again.
pub(super) const MAX_RETRIES: u32 = 16;

/// A launch step that failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum LaunchError {
    /// A KVM call.
    #[error("{step}: {source}")]
    Call { step: String, source: CallError },
    /// A SEV command.
    #[error("{step}: {source}{}", cause(source))]
    Sev { step: String, source: SevError },
    /// The firmware refused the CPUID page.
    #[error(
        "adding {name} (CPUID page at {gpa:#x}): the firmware refused these values (INVALID_PARAM, 0x16):\n{diff}\n{}",
        advice(diff)
    )]
    Cpuid { name: String, gpa: u64, diff: CpuidDiff },
    /// The plan breaks a rule.
    #[error("the launch plan is not valid: {0}")]
    Plan(#[from] PlanError),
    /// vCPUs that want different features of the VM that they share.
    #[error(
        "vCPU {vcpu}: the plan has SEV features {found:#x}, but {expected:#x} for vCPU 0; INIT2 takes one set for all"
    )]
    Features { vcpu: usize, found: u64, expected: u64 },
    /// Not as many vCPUs as in the plan.
    #[error("the plan has {planned} vCPUs, the VM has {found}: the digest would not be the predicted one")]
    VcpuCount { planned: usize, found: usize },
    /// The ID block is for another launch.
    #[error("{0}")]
    Identity(#[from] IdMismatch),
    /// A register that KVM holds with another value than the plan.
    #[error(
        "vCPU {vcpu}: {mismatch}, read back before LAUNCH_FINISH. The launch digest would not be {digest}, as predicted"
    )]
    Register { vcpu: usize, mismatch: Mismatch, digest: LaunchDigest },
    /// The firmware computed another digest.
    #[error("the firmware measured {measured}, predicted was {predicted}: a bug in cvmm, please report it")]
    Digest { measured: LaunchDigest, predicted: LaunchDigest },
    /// A record that is not RAM.
    #[error("{name}: the guest has no RAM at {gpa:#x}..{end:#x}")]
    NotRam { name: String, gpa: u64, end: u64 },
    /// Staged bytes that are not for RAM.
    #[error("staging {len:#x} bytes at {gpa:#x} for stage0: the guest has no RAM there")]
    Staging { gpa: u64, len: u64 },
    /// The update made no progress.
    #[error("adding {name}: KVM took no page at {gpa:#x} in {MAX_RETRIES} tries (EAGAIN)")]
    NoProgress { name: String, gpa: u64 },
    /// Memory for the launch itself.
    #[error("no memory for the launch: {0}")]
    Memory(#[from] io::Error),
}

/// Wraps a failed KVM call.
pub(super) fn call(step: impl Into<String>) -> impl FnOnce(CallError) -> LaunchError {
    let step = step.into();
    move |source| LaunchError::Call { step, source }
}

/// Wraps a failed SEV command.
pub(super) fn command(step: impl Into<String>) -> impl FnOnce(SevError) -> LaunchError {
    let step = step.into();
    move |source| LaunchError::Sev { step, source }
}

/// What an errno without a firmware status means, by command; empty where errno or status say it all.
fn cause(error: &SevError) -> &'static str {
    let finish = error.command.ends_with("LAUNCH_FINISH");
    match (error.errno, FwStatus(error.firmware)) {
        _ if finish && error.firmware != 0 => {
            ". This VM's vCPUs are sealed, so it cannot finish again: a new VM is needed"
        }
        (_, status) if status.0 != 0 => "",
        (libc::EBUSY, _) if error.command.ends_with("INIT2") => {
            ". No ASID is free: other SEV guests use them all, or the cgroup limit (misc.max, sev_es) is reached"
        }
        (libc::EINVAL, _) if error.command.ends_with("INIT2") => {
            ". This kernel does not know a VMSA feature or the GHCB version, or a vCPU was there first"
        }
        (libc::ENOTTY, _) if error.command.ends_with("INIT2") => {
            ". The BIOS reserves no ASIDs for SEV-ES and SEV-SNP guests"
        }
        (libc::EINVAL, _) if error.command.ends_with("LAUNCH_START") => {
            ". This kernel does not allow a bit of the guest policy, or misses one that it demands"
        }
        (libc::EIO, _) if error.command.ends_with("LAUNCH_UPDATE") => {
            ". The kernel hides the cause: the page is not private or was added before, its source cannot be read, a \
             signal is pending, there is no memory, or the secure processor does not answer"
        }
        _ if finish => ". The vCPUs may be sealed by now, so this VM cannot finish again: a new VM is needed",
        _ => "",
    }
}

fn advice(diff: &CpuidDiff) -> &'static str {
    if diff.is_acceptable() {
        "Every change is on the list of acceptable ones; `accept_cpuid` launches with the firmware's values. The CPUID page \
         is not measured"
    } else {
        "Not every change may be accepted, so `accept_cpuid` would not help: this host's firmware and its KVM disagree \
         about what guests may see"
    }
}
