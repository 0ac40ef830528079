// SPDX-License-Identifier: Apache-2.0
//! The seam: one `Vm`/`Vcpu` pair with the operations, structs and exits of mainline KVM's SNP support.
//!
//! Everything above this module is the same on an SNP host and on the emulated platform. Below it are two
//! platforms: [`kvm`], a thin pass-through to the kernel, and [`emulated`], which models the kernel's SEV
//! code, the firmware and the RMP on top of an ordinary VM. Struct layouts are the kernel's
//! (`include/uapi/linux/kvm.h`), by way of `kvm-bindings`.

pub mod emulated;
pub mod error;
pub mod exit;
pub mod interrupt;
pub mod kvm;
pub mod mapping;
pub mod memory;
pub mod registers;
#[cfg(test)]
pub(crate) mod scripted;
pub mod sev;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_sregs;
use snp::pages::cpuid::SnpCpuid;
use snp::pages::cpuid_raw::RawCpuid;
use snp::policy::PolicyRules;
use snp_model::patch::CodeHints;
use vmm_sys_util::eventfd::EventFd;

use self::interrupt::MsiMessage;
use self::interrupt::MsiRoute;
use self::sev::Snp;
use crate::platform::error::CallError;
use crate::platform::exit::Exit;
use crate::platform::memory::MemorySlot;

/// `KVM_HC_MAP_GPA_RANGE`: the hypercall by which a page-state change reaches the monitor.
pub const HC_MAP_GPA_RANGE: u64 = 12;
/// `KVM_MAP_GPA_RANGE_ENCRYPTED`: bit of the third argument that says "to private".
pub const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
pub const ATTRIBUTE_PRIVATE: u64 = 8;

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
    /// What the CPUID instruction gives on this platform's processors, if it is known: KVM offers more than
    /// that.
    fn raw_cpuid(&self) -> Option<RawCpuid> {
        None
    }
    /// Which guest policies this platform's KVM lets through.
    fn policy_rules(&self) -> PolicyRules;
    /// SEV features that KVM gives to guests that ask for them in `KVM_SEV_INIT2`
    /// (`KVM_X86_SEV_VMSA_FEATURES`).
    fn vmsa_features(&self) -> u64;
    /// The certificates that belong to this platform's reports, as a table for guests (GHCB specification,
    /// 4.1.8.1), where the platform knows them itself.
    fn certificates(&self) -> Option<Arc<Vec<u8>>> {
        None
    }
    /// Creates a VM. A platform with hardware has no use for `code`, what is known of the guest's code beside
    /// its pages.
    fn create_vm(&self, kind: VmKind, code: &CodeHints) -> Result<Arc<dyn Vm>, CallError>;
}

/// One virtual machine.
pub trait Vm: Send + Sync {
    /// `KVM_CREATE_IRQCHIP`, and the PIT.
    fn create_irqchip(&self) -> Result<(), CallError>;
    /// `KVM_IRQFD`: an event on `fd` raises `gsi`.
    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), CallError>;
    /// `KVM_IRQFD` with its deassign flag.
    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), CallError>;
    /// `KVM_SET_GSI_ROUTING`: the pins of the interrupt controllers as KVM has them at the start, and
    /// `routes`. Replaces what was set before.
    fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<(), CallError>;
    /// `KVM_SIGNAL_MSI`; false if no local APIC takes it.
    fn signal_msi(&self, message: MsiMessage) -> Result<bool, CallError>;
    /// `KVM_IOEVENTFD`: a write of any length and value to the guest-physical address `gpa`, without the
    /// C-bit, is an event on `fd` and no exit.
    fn register_ioevent(&self, fd: &EventFd, gpa: u64) -> Result<(), CallError>;
    /// `KVM_IOEVENTFD` with its deassign flag; both must be as they were registered.
    fn unregister_ioevent(&self, fd: &EventFd, gpa: u64) -> Result<(), CallError>;
    /// `KVM_CREATE_GUEST_MEMFD`; `size` in bytes, page aligned.
    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, CallError>;
    /// `KVM_SET_USER_MEMORY_REGION2`. The VM keeps the mapping alive.
    fn set_memory(&self, slot: MemorySlot) -> Result<(), CallError>;
    /// `KVM_SET_USER_MEMORY_REGION2` of length 0: the slot is gone when this returns, and its mapping may go.
    /// Only for memory without a private side.
    fn remove_memory(&self, slot: u32) -> Result<(), CallError>;
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    fn set_memory_attributes(&self, attributes: kvm_memory_attributes) -> Result<(), CallError>;
    /// `KVM_CREATE_VCPU`; the id is the APIC id.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CallError>;
    /// The commands of an SNP guest; `None` if the VM is not of that kind.
    fn snp(&self) -> Option<&dyn Snp>;
    /// The commands of a VM that was created as an SNP VM.
    fn snp_commands(&self) -> Result<&dyn Snp, CallError> {
        const CALL: &str = "KVM_MEMORY_ENCRYPT_OP (the VM is not of the type of SNP guests)";
        self.snp().ok_or(CallError::errno(CALL, libc::ENOTTY))
    }
    /// Whether the two sides of a page are different memory, as on hardware. On the emulated platform with
    /// single backing they are not.
    fn backs_sides_apart(&self) -> bool {
        true
    }
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
    /// `KVM_SET_LAPIC` of the two local interrupt pins, as a PC's firmware leaves them: LINT0 ExtINT, LINT1
    /// NMI.
    fn set_lint(&mut self) -> Result<(), CallError>;
    /// `KVM_SET_MP_STATE`.
    fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), CallError>;
    /// `KVM_PRE_FAULT_MEMORY` of guest memory, page aligned; how many of the `len` bytes were done.
    fn pre_fault(&mut self, gpa: u64, len: u64) -> Result<u64, CallError>;
    /// `KVM_RUN` with `immediate_exit`: the kernel takes in the answer to the last exit and does what follows
    /// from it, but does not enter the guest.
    fn complete_exit(&mut self) -> Result<(), CallError>;
    /// `KVM_RUN` until the next exit for the monitor. A signal ends it with [`Exit::Interrupted`].
    fn run(&mut self) -> Result<Exit<'_>, CallError>;
}
