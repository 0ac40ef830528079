// SPDX-License-Identifier: Apache-2.0
//! A VM of the host's KVM.

#![allow(unsafe_code, reason = "memory slots hand the kernel addresses in this process")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use kvm_bindings::*;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::KvmVcpu;
use super::sev;
use crate::platform::Vcpu;
use crate::platform::Vm;
use crate::platform::VmKind;
use crate::platform::error::CallError;
use crate::platform::error::SevError;
use crate::platform::memory::MemorySlot;

/// Where KVM may keep its internal pages on Intel CPUs: just below the BIOS region, outside of RAM and of devices.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What the kernel's memory slots refer to, kept alive as long as the VM and its vCPUs.
pub(super) type Slots = Arc<Mutex<Vec<MemorySlot>>>;

/// A VM; the emulated platform builds on a plain one.
pub struct KvmVm {
    /// The file descriptor.
    pub fd: VmFd,
    /// `/dev/sev`, open under one descriptor as long as the VM lives: KVM uses it again for every guest request.
    pub(super) sev: Option<File>,
    kind: VmKind,
    slots: Slots,
}

impl KvmVm {
    pub(super) fn new(fd: VmFd, kind: VmKind, sev: Option<File>) -> Self {
        KvmVm { fd, sev, kind, slots: Slots::default() }
    }

    /// `KVM_CREATE_VCPU`.
    pub fn new_vcpu(&self, id: u32) -> Result<KvmVcpu, CallError> {
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(CallError::of("KVM_CREATE_VCPU"))?;
        Ok(KvmVcpu { fd, unseen: false, _slots: Arc::clone(&self.slots) })
    }

    /// `KVM_SET_USER_MEMORY_REGION` of part of a mapping; the emulated platform shows one mapping at several addresses.
    ///
    /// # Safety
    /// The memory at `host..host + len` must stay mapped until the slot is deleted or the VM is gone, and may be written
    /// by the guest at any time. `len` 0 deletes the slot.
    pub unsafe fn set_slot(&self, slot: u32, gpa: u64, host: u64, len: u64) -> Result<(), CallError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: the caller promises that the memory stays mapped and is only used as guest memory.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(CallError::of("KVM_SET_USER_MEMORY_REGION"))
    }
}

impl Vm for KvmVm {
    fn create_irqchip(&self) -> Result<(), CallError> {
        if self.kind == VmKind::Plain {
            self.fd.set_tss_address(TSS_ADDRESS).map_err(CallError::of("KVM_SET_TSS_ADDR"))?;
        }
        self.fd.create_irq_chip().map_err(CallError::of("KVM_CREATE_IRQCHIP"))?;
        // The flag gives port 0x61 to the kernel's PIT, which Linux uses to calibrate timers.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).map_err(CallError::of("KVM_CREATE_PIT2"))
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), CallError> {
        self.fd.register_irqfd(fd, gsi).map_err(CallError::of("KVM_IRQFD"))
    }

    fn enable_map_gpa_range_exit(&self) -> Result<(), CallError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
        cap.args[0] = 1 << crate::platform::HC_MAP_GPA_RANGE;
        self.fd.enable_cap(&cap).map_err(CallError::of("KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL)"))
    }

    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, CallError> {
        // Never GUEST_MEMFD_FLAG_MMAP (Linux 6.18): KVM would then serve shared accesses from this memory too, and make their pages
        // private in the RMP (7.3, `guest_memfd.c:kvm_gmem_bind`, `kvm_gmem_get_pfn`).
        let args = kvm_create_guest_memfd { size, flags: 0, ..Default::default() };
        let fd = self.fd.create_guest_memfd(args).map_err(CallError::of("KVM_CREATE_GUEST_MEMFD"))?;
        // SAFETY: the kernel has just returned this descriptor to us, and nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn set_memory(&self, slot: MemorySlot) -> Result<(), CallError> {
        let (host, len) = (slot.shared.host_address(), slot.shared.len());
        match &slot.private {
            // SAFETY: `slots` keeps the mapping alive as long as the VM.
            None => unsafe { self.set_slot(slot.slot, slot.gpa, host, len) }?,
            Some((memfd, offset)) => {
                let region = kvm_userspace_memory_region2 {
                    slot: slot.slot,
                    flags: KVM_MEM_GUEST_MEMFD,
                    guest_phys_addr: slot.gpa,
                    memory_size: len,
                    userspace_addr: host,
                    guest_memfd_offset: *offset,
                    guest_memfd: memfd.as_raw_fd() as u32,
                    ..Default::default()
                };
                // SAFETY: `slots` keeps the mapping and the guest_memfd alive as long as the VM.
                unsafe { self.fd.set_user_memory_region2(region) }
                    .map_err(CallError::of("KVM_SET_USER_MEMORY_REGION2"))?;
            }
        }
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
        Ok(())
    }

    fn set_memory_attributes(&self, attributes: kvm_memory_attributes) -> Result<(), CallError> {
        self.fd.set_memory_attributes(attributes).map_err(CallError::of("KVM_SET_MEMORY_ATTRIBUTES"))
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CallError> {
        Ok(Box::new(self.new_vcpu(id)?))
    }

    fn sev_init2(&self, init: &mut kvm_sev_init) -> Result<(), SevError> {
        sev::init2(self, init)
    }

    fn snp_launch_start(&self, start: &mut kvm_sev_snp_launch_start) -> Result<(), SevError> {
        sev::launch_start(self, start)
    }

    fn snp_launch_update(
        &self,
        update: &mut kvm_sev_snp_launch_update,
        source: &mut [u8],
    ) -> Result<(), SevError> {
        sev::launch_update(self, update, source)
    }

    fn snp_launch_finish(
        &self,
        finish: &mut kvm_sev_snp_launch_finish,
        id: Option<(&[u8; 96], &[u8; 4096])>,
    ) -> Result<(), SevError> {
        sev::launch_finish(self, finish, id)
    }

    fn snp_enable_req_certs(&self) -> Result<(), SevError> {
        sev::enable_req_certs(self)
    }
}
