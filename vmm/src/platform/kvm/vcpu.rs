// SPDX-License-Identifier: Apache-2.0
//! A vCPU of the host's KVM.
//!
//! A vCPU is interrupted by a signal. One that arrives just before `KVM_RUN` would be lost, so its handler
//! sets `immediate_exit` as well, which keeps that call from entering the guest (Linux
//! `Documentation/virt/kvm/api.rst`, `KVM_RUN`).

#![allow(
    unsafe_code,
    reason = "calls that kvm-ioctls does not have, KVM_RUN, whose EFAULT and EHWPOISON it gives one result, and a flag that a \
              signal handler sets"
)]

use std::cell::Cell;
use std::os::fd::AsRawFd;

use kvm_bindings::CpuId;
use kvm_bindings::KVM_EXIT_MEMORY_FAULT;
use kvm_bindings::KVMIO;
use kvm_bindings::Msrs;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_msr_entry;
use kvm_bindings::kvm_pre_fault_memory;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_sregs;
use kvm_bindings::kvm_xcr;
use kvm_bindings::kvm_xcrs;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::exit::decode;
use super::slots::Slots;
use crate::platform::Vcpu;
use crate::platform::error::CallError;
use crate::platform::exit::Exit;

/// Offsets of the local vector table's pins in the APIC page, and delivery modes (Intel SDM volume 3,
/// 11.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u8 = 7;
const DELIVERY_NMI: u8 = 4;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// `KVM_RUN`, `_IO(KVMIO, 0x80)`.
const KVM_RUN: libc::c_ulong = 0xae80;
/// XCR0 after a reset, and what a CPU without XSAVE does: x87 state only.
const XCR0_RESET: u64 = 1;

/// A vCPU; the emulated platform builds on it.
pub struct KvmVcpu {
    /// The file descriptor and its mapping.
    pub fd: VcpuFd,
    /// The kernel's structure holds an exit that nobody has seen yet.
    pub(super) unseen: bool,
    /// A vCPU can outlive the VM's handle, and with it the memory must.
    pub(super) _slots: Slots,
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null while it runs none.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// Handler of the signal that interrupts vCPUs.
pub extern "C" fn interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: a pointer that is not null is into the mapping of the vCPU that this very thread runs;
        // `disarm` takes it away before the vCPU goes.
        unsafe { flag.write_volatile(1) };
    }
}

impl KvmVcpu {
    /// From now on a signal keeps this vCPU from entering the guest, until [`KvmVcpu::disarm`] on the same
    /// thread. What the signal is about must be looked at after this and before `KVM_RUN`.
    pub(in crate::platform) fn arm(&mut self) {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
    }

    /// The end of [`KvmVcpu::arm`].
    pub(in crate::platform) fn disarm(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
        self.fd.set_kvm_immediate_exit(0);
    }

    /// `KVM_RUN`; the errno if it fails.
    fn enter(&mut self) -> Result<(), i32> {
        // SAFETY: the descriptor is a vCPU's; the call takes no argument, and writes to the vCPU's own
        // mapping and to memory that the VM was given as guest memory.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN as _, 0) } {
            0.. => Ok(()),
            _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
        }
    }

    /// XCR0, if the CPU has it. A KVM on a CPU without XSAVE reads no register and refuses to set one (Linux
    /// 7.3, arch/x86/kvm/x86.c, `kvm_vcpu_ioctl_x86_get_xcrs` and `kvm_vcpu_ioctl_x86_set_xcrs`).
    fn xcr0(&self) -> Result<Option<u64>, CallError> {
        let xcrs = self.fd.get_xcrs().map_err(CallError::of("KVM_GET_XCRS"))?;
        let found = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0);
        Ok(found.map(|x| x.value))
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        // Only if a panic has come in between.
        if IMMEDIATE_EXIT.get() == &raw mut self.fd.get_kvm_run().immediate_exit {
            self.disarm();
        }
    }
}

impl Vcpu for KvmVcpu {
    fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<(), CallError> {
        let cpuid = CpuId::from_entries(entries)
            .map_err(|_| CallError::errno("KVM_SET_CPUID2 (too many entries)", libc::E2BIG))?;
        self.fd.set_cpuid2(&cpuid).map_err(CallError::of("KVM_SET_CPUID2"))
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), CallError> {
        self.fd.set_regs(regs).map_err(CallError::of("KVM_SET_REGS"))
    }

    fn get_regs(&self) -> Result<kvm_regs, CallError> {
        self.fd.get_regs().map_err(CallError::of("KVM_GET_REGS"))
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), CallError> {
        self.fd.set_sregs(sregs).map_err(CallError::of("KVM_SET_SREGS"))
    }

    fn get_sregs(&self) -> Result<kvm_sregs, CallError> {
        self.fd.get_sregs().map_err(CallError::of("KVM_GET_SREGS"))
    }

    fn set_fpu(&mut self, fpu: &kvm_fpu) -> Result<(), CallError> {
        self.fd.set_fpu(fpu).map_err(CallError::of("KVM_SET_FPU"))
    }

    fn get_fpu(&self) -> Result<kvm_fpu, CallError> {
        self.fd.get_fpu().map_err(CallError::of("KVM_GET_FPU"))
    }

    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), CallError> {
        let entries: Vec<_> =
            msrs.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let list = Msrs::from_entries(&entries)
            .map_err(|_| CallError::errno("KVM_SET_MSRS (too many)", libc::E2BIG))?;
        let done = self.fd.set_msrs(&list).map_err(CallError::of("KVM_SET_MSRS"))?;
        if done < entries.len() {
            return Err(CallError::errno("KVM_SET_MSRS (an MSR was refused)", libc::EINVAL));
        }
        Ok(())
    }

    fn get_msr(&self, index: u32) -> Result<u64, CallError> {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut list = Msrs::from_entries(&[entry])
            .map_err(|_| CallError::errno("KVM_GET_MSRS (too many)", libc::E2BIG))?;
        let done = self.fd.get_msrs(&mut list).map_err(CallError::of("KVM_GET_MSRS"))?;
        match list.as_slice().first() {
            Some(entry) if done == 1 => Ok(entry.data),
            _ => Err(CallError::errno("KVM_GET_MSRS (an MSR was refused)", libc::EINVAL)),
        }
    }

    fn set_xcr0(&mut self, value: u64) -> Result<(), CallError> {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value };
        match self.fd.set_xcrs(&xcrs) {
            Err(_) if value == XCR0_RESET && self.xcr0()?.is_none() => Ok(()),
            result => result.map_err(CallError::of("KVM_SET_XCRS")),
        }
    }

    fn get_xcr0(&self) -> Result<u64, CallError> {
        Ok(self.xcr0()?.unwrap_or(XCR0_RESET))
    }

    fn set_lint(&mut self) -> Result<(), CallError> {
        let mut lapic = self.fd.get_lapic().map_err(CallError::of("KVM_GET_LAPIC"))?;
        for (register, mode) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
            // Delivery mode is bits 10:8 of the register, that is the low three bits of its second byte.
            if let Some(byte) = lapic.regs.get_mut(register + 1) {
                *byte = (*byte & !7) | mode as std::ffi::c_char;
            }
        }
        self.fd.set_lapic(&lapic).map_err(CallError::of("KVM_SET_LAPIC"))
    }

    fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), CallError> {
        self.fd.set_mp_state(state).map_err(CallError::of("KVM_SET_MP_STATE"))
    }

    fn pre_fault(&mut self, gpa: u64, len: u64) -> Result<u64, CallError> {
        let mut range = kvm_pre_fault_memory { gpa, size: len, ..Default::default() };
        // SAFETY: the kernel reads and advances the struct, which outlives the call, and touches only guest
        // memory.
        match unsafe { ioctl_with_mut_ref(&self.fd, KVM_PRE_FAULT_MEMORY(), &mut range) } {
            0.. => Ok(len - range.size.min(len)),
            _ => Err(CallError { call: "KVM_PRE_FAULT_MEMORY", source: std::io::Error::last_os_error() }),
        }
    }

    fn complete_exit(&mut self) -> Result<(), CallError> {
        self.fd.set_kvm_immediate_exit(1);
        let result = self.fd.run().map(|_| ());
        self.fd.set_kvm_immediate_exit(0);
        match result {
            Err(e) if e.errno() == libc::EINTR => Ok(()),
            Err(e) => Err(CallError::of("KVM_RUN (completing an exit)")(e)),
            // Completing one exit may cause another.
            Ok(()) => {
                self.unseen = true;
                Ok(())
            }
        }
    }

    fn run(&mut self) -> Result<Exit<'_>, CallError> {
        if std::mem::take(&mut self.unseen) {
            return Ok(decode(self.fd.get_kvm_run()));
        }
        self.arm();
        let result = self.enter();
        self.disarm();
        let run = self.fd.get_kvm_run();
        match result {
            Ok(()) => Ok(decode(run)),
            Err(libc::EINTR) => Ok(Exit::Interrupted),
            Err(libc::EAGAIN) => Ok(Exit::Again),
            // These two come with an exit (`kvm_prepare_memory_fault_exit`).
            Err(libc::EFAULT) if run.exit_reason == KVM_EXIT_MEMORY_FAULT => Ok(decode(run)),
            Err(libc::EHWPOISON) if run.exit_reason == KVM_EXIT_MEMORY_FAULT => Ok(match decode(run) {
                Exit::MemoryFault { gpa, .. } => Exit::Poisoned { gpa },
                other => other,
            }),
            Err(errno) => Err(CallError::errno("KVM_RUN", errno)),
        }
    }
}
