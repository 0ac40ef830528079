// SPDX-License-Identifier: Apache-2.0
//! Reads an exit out of the `kvm_run` structure that the kernel shares with us.
//!
//! `kvm-ioctls` decodes exits as well, but hands them out only from its `run`, and does not know
//! `KVM_EXIT_SNP_REQ_CERTS`. Source: `struct kvm_run` in `include/uapi/linux/kvm.h`.

#![allow(unsafe_code, reason = "reads the unions of kvm_run, and port data behind it")]

use kvm_bindings::*;

use crate::platform::exit::Exit;

/// `KVM_EXIT_SNP_REQ_CERTS` (Linux 7.0).
const EXIT_SNP_REQ_CERTS: u32 = 43;

/// Decodes the exit that `run` holds after `KVM_RUN` returned 0 (or, for a memory fault, EFAULT or
/// EHWPOISON).
///
/// `run` must be the start of a vCPU's mapping as `VcpuFd::get_kvm_run` returns it: port data lies behind the
/// structure.
pub fn decode(run: &mut kvm_run) -> Exit<'_> {
    let base: *mut kvm_run = run;
    let u = &mut run.__bindgen_anon_1;
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: exit_reason says that this union member is the valid one.
            let io = unsafe { u.io };
            let len = usize::from(io.size) * io.count as usize;
            // The data lie behind the structure, so the pointer is made from the address of the mapping,
            // which the kernel gave out.
            let data = std::ptr::with_exposed_provenance_mut::<u8>(base.addr() + io.data_offset as usize);
            // SAFETY: the kernel places `len` bytes at `data_offset` within the vCPU's mapping, which starts
            // at `base` and lives as long as the vCPU, which is mutably borrowed for the life of the result.
            let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
            match u32::from(io.direction) {
                KVM_EXIT_IO_IN => Exit::IoIn { port: io.port, data },
                _ => Exit::IoOut { port: io.port, data },
            }
        }
        KVM_EXIT_MMIO => {
            // SAFETY: exit_reason says that this union member is the valid one.
            let mmio = unsafe { &mut u.mmio };
            let data = &mut mmio.data[..(mmio.len as usize).min(8)];
            match mmio.is_write {
                0 => Exit::MmioRead { addr: mmio.phys_addr, data },
                _ => Exit::MmioWrite { addr: mmio.phys_addr, data },
            }
        }
        KVM_EXIT_HYPERCALL => {
            // SAFETY: exit_reason says that this union member is the valid one.
            let call = unsafe { &mut u.hypercall };
            Exit::Hypercall { nr: call.nr, args: call.args, ret: &mut call.ret }
        }
        KVM_EXIT_MEMORY_FAULT => {
            // SAFETY: exit_reason says that this union member is the valid one.
            let fault = unsafe { u.memory_fault };
            Exit::MemoryFault { flags: fault.flags, gpa: fault.gpa, size: fault.size }
        }
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: exit_reason says that this union member is the valid one; its inner union is all
            // integers.
            let (kind, ndata, data) =
                unsafe { (u.system_event.type_, u.system_event.ndata, u.system_event.__bindgen_anon_1.data) };
            Exit::SystemEvent { kind, data: if ndata > 0 { data[0] } else { 0 } }
        }
        EXIT_SNP_REQ_CERTS => {
            // SAFETY: the member of that reason is { u64 gpa, u64 npages, u64 ret }, at the start of the
            // union, which is larger and 8-byte aligned.
            let certs = unsafe { &mut *std::ptr::from_mut(u).cast::<ReqCerts>() };
            Exit::ReqCerts { gpa: certs.gpa, npages: &mut certs.npages, ret: &mut certs.ret }
        }
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_HLT => Exit::Hlt,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: exit_reason says that this union member is the valid one.
            let entry = unsafe { u.fail_entry };
            Exit::FailEntry { reason: entry.hardware_entry_failure_reason }
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: exit_reason says that this union member is the valid one.
            let internal = unsafe { u.internal };
            Exit::InternalError { suberror: internal.suberror }
        }
        other => Exit::Other(other),
    }
}

/// An access to an MSR that the filter keeps from KVM.
pub enum MsrAccess<'a> {
    /// RDMSR.
    Read {
        /// Number of the MSR.
        index: u32,
        /// Its value.
        data: &'a mut u64,
        /// Nonzero gives the guest #GP.
        error: &'a mut u8,
    },
    /// WRMSR.
    Write {
        /// Number of the MSR.
        index: u32,
        /// The value.
        data: u64,
        /// Nonzero gives the guest #GP.
        error: &'a mut u8,
    },
}

/// The MSR access that `run` holds, if the exit is one.
pub fn msr_access(run: &mut kvm_run) -> Option<MsrAccess<'_>> {
    let reason = run.exit_reason;
    if reason != KVM_EXIT_X86_RDMSR && reason != KVM_EXIT_X86_WRMSR {
        return None;
    }
    // SAFETY: exit_reason says that this union member is the valid one.
    let msr = unsafe { &mut run.__bindgen_anon_1.msr };
    let (index, error) = (msr.index, &mut msr.error);
    *error = 0;
    Some(match reason {
        KVM_EXIT_X86_RDMSR => MsrAccess::Read { index, data: &mut msr.data, error },
        _ => MsrAccess::Write { index, data: msr.data, error },
    })
}

/// `kvm_run.snp_req_certs`, which `kvm-bindings` does not have yet.
#[repr(C)]
struct ReqCerts {
    gpa: u64,
    npages: u64,
    ret: u64,
}
