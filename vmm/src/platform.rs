// SPDX-License-Identifier: Apache-2.0
//! The seam: one `Vm`/`Vcpu` pair with the operations, structs and exits of mainline KVM's SNP support.
//!
//! Everything above this module is the same on an SNP host and on the emulated platform. Below it are two platforms:
//! [`kvm`], a thin pass-through to the kernel, and [`emulated`], which models the kernel's SEV code, the firmware and the
//! RMP on top of an ordinary VM. Struct layouts are the kernel's (`include/uapi/linux/kvm.h`), by way of `kvm-bindings`.

pub mod emulated;
pub mod kvm;
#[cfg(test)]
pub(crate) mod scripted;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use kvm_bindings::kvm_sev_snp_launch_update;
use kvm_bindings::kvm_sregs;
use snp::digest::LaunchDigest;
use snp::pages::cpuid::SnpCpuid;
use snp::pages::cpuid_raw::RawCpuid;
use snp::policy::PolicyRules;
use snp_model::patch::CodeHints;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Mapping;

/// `KVM_HC_MAP_GPA_RANGE`: the hypercall by which a page-state change reaches the monitor.
pub const HC_MAP_GPA_RANGE: u64 = 12;
/// `KVM_MAP_GPA_RANGE_ENCRYPTED`: bit of the third argument that says "to private".
pub const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
pub const ATTRIBUTE_PRIVATE: u64 = 8;

/// A KVM call that failed, with the call's name.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub struct CallError {
    /// Name of the ioctl or system call.
    pub call: &'static str,
    /// What the kernel (or the model of it) answered.
    pub source: io::Error,
}

impl CallError {
    /// A function that wraps an errno of `kvm-ioctls` for `map_err`.
    pub fn of(call: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> CallError {
        move |e| CallError { call, source: io::Error::from_raw_os_error(e.errno()) }
    }

    /// From a raw errno value.
    pub fn errno(call: &'static str, errno: i32) -> CallError {
        CallError { call, source: io::Error::from_raw_os_error(errno) }
    }
}

/// A SEV command that failed: the errno, and the firmware's status in `kvm_sev_cmd.error`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SevError {
    /// The command, such as `SNP_LAUNCH_UPDATE`.
    pub command: &'static str,
    /// The errno of the ioctl.
    pub errno: i32,
    /// The firmware status; 0 means that the firmware gave no verdict.
    pub firmware: u32,
}

impl std::error::Error for SevError {}

impl fmt::Display for SevError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.command, io::Error::from_raw_os_error(self.errno))?;
        match self.firmware {
            0 => write!(f, " (no verdict of the firmware: KVM refused it)"),
            code => {
                write!(f, " (firmware status {code:#x}: {})", snp::firmware_status::FwStatus(code))
            }
        }
    }
}

/// A piece of guest RAM: where the guest sees it, and what backs each side.
pub struct MemorySlot {
    /// Slot number.
    pub slot: u32,
    /// Guest-physical address, page aligned.
    pub gpa: u64,
    /// The shared side; its length is the slot's.
    pub shared: Arc<Mapping>,
    /// The private side: a guest_memfd and the offset into it. `None` for plain guests, and for memory of an SNP guest that is
    /// always shared.
    pub private: Option<(Arc<OwnedFd>, u64)>,
}

/// What kind of guest a VM holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmKind {
    /// An ordinary VM.
    Plain,
    /// An SEV-SNP VM (`KVM_X86_SNP_VM`).
    Snp,
}

/// A place where guests can be created: a host's KVM, or the model on top of it.
pub trait Platform: Send + Sync {
    /// What the platform offers in CPUID, before anything is stripped for SNP.
    fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, CallError>;
    /// What the platform decides about an SNP guest's CPUID, the position of the C-bit first of all.
    fn snp_cpuid(&self) -> SnpCpuid;
    /// What the CPUID instruction gives on this platform's processors, if it is known: KVM offers more than that.
    fn raw_cpuid(&self) -> Option<RawCpuid> {
        None
    }
    /// Which guest policies this platform's KVM lets through.
    fn policy_rules(&self) -> PolicyRules;
    /// SEV features that KVM gives to guests that ask for them in `KVM_SEV_INIT2` (`KVM_X86_SEV_VMSA_FEATURES`).
    fn vmsa_features(&self) -> u64;
    /// The certificates that belong to this platform's reports, as a table for guests (GHCB specification, 4.1.8.1), where the
    /// platform knows them itself.
    fn certificates(&self) -> Option<Arc<Vec<u8>>> {
        None
    }
    /// Creates a VM. A platform with hardware has no use for `code`, what is known of the guest's code beside its pages.
    fn create_vm(&self, kind: VmKind, code: &CodeHints) -> Result<Arc<dyn Vm>, CallError>;
}

/// One virtual machine.
pub trait Vm: Send + Sync {
    /// `KVM_CREATE_IRQCHIP`, and the PIT.
    fn create_irqchip(&self) -> Result<(), CallError>;
    /// `KVM_IRQFD`: an event on `fd` raises `gsi`.
    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), CallError>;
    /// `KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL)` for `KVM_HC_MAP_GPA_RANGE`.
    fn enable_map_gpa_range_exit(&self) -> Result<(), CallError>;
    /// `KVM_CREATE_GUEST_MEMFD`; `size` in bytes, page aligned.
    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, CallError>;
    /// `KVM_SET_USER_MEMORY_REGION2`. The VM keeps the mapping alive.
    fn set_memory(&self, slot: MemorySlot) -> Result<(), CallError>;
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    fn set_memory_attributes(&self, attributes: kvm_memory_attributes) -> Result<(), CallError>;
    /// `KVM_CREATE_VCPU`; the id is the APIC id.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CallError>;
    /// `KVM_SEV_INIT2`.
    fn sev_init2(&self, init: &mut kvm_sev_init) -> Result<(), SevError>;
    /// `KVM_SEV_SNP_LAUNCH_START`.
    fn snp_launch_start(&self, start: &mut kvm_sev_snp_launch_start) -> Result<(), SevError>;
    /// `KVM_SEV_SNP_LAUNCH_UPDATE`. `source` begins at a page, is what `update.uaddr` points to, which this call sets, and is not
    /// used for ZERO pages. The kernel advances `update` and may write a corrected CPUID page back into `source`.
    fn snp_launch_update(
        &self,
        update: &mut kvm_sev_snp_launch_update,
        source: &mut [u8],
    ) -> Result<(), SevError>;
    /// `KVM_SEV_SNP_LAUNCH_FINISH`; `id` is the ID block and its authentication page.
    fn snp_launch_finish(
        &self,
        finish: &mut kvm_sev_snp_launch_finish,
        id: Option<(&[u8; 96], &[u8; 4096])>,
    ) -> Result<(), SevError>;
    /// The launch digest as the firmware computed it, where the platform can know: hardware tells it only to the guest.
    fn measured(&self) -> Option<LaunchDigest> {
        None
    }
    /// `KVM_SEV_SNP_ENABLE_REQ_CERTS` (Linux 7.0): extended guest requests become [`Exit::ReqCerts`]. After
    /// `KVM_SEV_INIT2` and before any vCPU exists (`snp_enable_certs`).
    fn snp_enable_req_certs(&self) -> Result<(), SevError>;
    /// What the guest did with its pages so far, as one line of JSON, where the platform sees it.
    fn statistics(&self) -> Option<String> {
        None
    }
}

/// One virtual CPU; it is created by one thread and run by another.
pub trait Vcpu: Send {
    /// `KVM_SET_CPUID2`.
    fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<(), CallError>;
    /// `KVM_SET_REGS`.
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), CallError>;
    /// `KVM_GET_REGS`.
    fn get_regs(&self) -> Result<kvm_regs, CallError>;
    /// `KVM_SET_SREGS`.
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), CallError>;
    /// `KVM_GET_SREGS`.
    fn get_sregs(&self) -> Result<kvm_sregs, CallError>;
    /// `KVM_SET_FPU`.
    fn set_fpu(&mut self, fpu: &kvm_fpu) -> Result<(), CallError>;
    /// `KVM_GET_FPU`.
    fn get_fpu(&self) -> Result<kvm_fpu, CallError>;
    /// `KVM_SET_MSRS`, all or error.
    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), CallError>;
    /// `KVM_GET_MSRS` of one.
    fn get_msr(&self, index: u32) -> Result<u64, CallError>;
    /// `KVM_SET_XCRS` for XCR0.
    fn set_xcr0(&mut self, value: u64) -> Result<(), CallError>;
    /// `KVM_GET_XCRS` for XCR0.
    fn get_xcr0(&self) -> Result<u64, CallError>;
    /// `KVM_SET_LAPIC` of the two local interrupt pins, as a PC's firmware leaves them: LINT0 ExtINT, LINT1 NMI.
    fn set_lint(&mut self) -> Result<(), CallError>;
    /// `KVM_SET_MP_STATE`.
    fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), CallError>;
    /// `KVM_PRE_FAULT_MEMORY` of guest memory, page aligned; how many of the `len` bytes were done.
    fn pre_fault(&mut self, gpa: u64, len: u64) -> Result<u64, CallError>;
    /// `KVM_RUN` with `immediate_exit`: the kernel takes in the answer to the last exit and does what follows from it, but does
    /// not enter the guest.
    fn complete_exit(&mut self) -> Result<(), CallError>;
    /// `KVM_RUN` until the next exit for the monitor. A signal ends it with [`Exit::Interrupted`].
    fn run(&mut self) -> Result<Exit<'_>, CallError>;
}

/// Why `KVM_RUN` returned.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port; the answer is written to `data`.
    IoIn {
        /// Port.
        port: u16,
        /// Where the answer goes; preset to whatever the last exit left.
        data: &'a mut [u8],
    },
    /// The guest writes a port.
    IoOut {
        /// Port.
        port: u16,
        /// What it wrote; string instructions write many items at once.
        data: &'a [u8],
    },
    /// The guest reads device memory.
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// Where the answer goes.
        data: &'a mut [u8],
    },
    /// The guest writes device memory.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// What it wrote.
        data: &'a [u8],
    },
    /// `KVM_EXIT_HYPERCALL`.
    Hypercall {
        /// Number; 12 is `KVM_HC_MAP_GPA_RANGE`.
        nr: u64,
        /// Arguments.
        args: [u64; 6],
        /// The answer; must always be written.
        ret: &'a mut u64,
    },
    /// `KVM_EXIT_MEMORY_FAULT`.
    MemoryFault {
        /// Bit 3: the access was to the private side.
        flags: u64,
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// `KVM_EXIT_MEMORY_FAULT` with EHWPOISON: the host's memory behind the page is broken.
    Poisoned {
        /// Guest-physical address.
        gpa: u64,
    },
    /// `KVM_EXIT_SYSTEM_EVENT`; 6 is `SEV_TERM`.
    SystemEvent {
        /// Kind of event.
        kind: u32,
        /// First datum, 0 if there is none.
        data: u64,
    },
    /// `KVM_EXIT_SNP_REQ_CERTS`.
    ReqCerts {
        /// Guest-physical address of the certificate buffer.
        gpa: u64,
        /// Pages that it has; set to the pages needed when `ret` says ENOSPC.
        npages: &'a mut u64,
        /// The answer; must always be written.
        ret: &'a mut u64,
    },
    /// Triple fault.
    Shutdown,
    /// HLT with no in-kernel APIC.
    Hlt,
    /// A signal arrived.
    Interrupted,
    /// `KVM_RUN` answered EAGAIN: the vCPU did not run, and waits for something else than what happened.
    Again,
    /// The CPU refused the guest's state.
    FailEntry {
        /// Hardware's reason code.
        reason: u64,
    },
    /// KVM could not emulate something.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
    },
    /// Anything else.
    Other(u32),
}
