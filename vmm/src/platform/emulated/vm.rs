// SPDX-License-Identifier: Apache-2.0
//! An emulated SNP VM: launch commands go to the model, memory to the two views.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;

use kvm_bindings::kvm_memory_attributes;
use rustix::fs::MemfdFlags;
use vmm_sys_util::eventfd::EventFd;

use super::registers::Recorded;
use super::shared::VmShared;
use super::vcpu::EmulatedVcpu;
use super::wake::Wake;
use crate::lock::lock;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::Vcpu;
use crate::platform::Vm;
use crate::platform::error::CallError;
use crate::platform::interrupt::MsiMessage;
use crate::platform::interrupt::MsiRoute;
use crate::platform::memory::MemorySlot;
use crate::platform::sev::Snp;

/// The VM; its state is what its vCPUs share.
pub struct EmulatedVm(pub(super) Arc<VmShared>);

impl Vm for EmulatedVm {
    fn create_irqchip(&self) -> Result<(), CallError> {
        self.0.kvm.create_irqchip()
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), CallError> {
        self.0.kvm.register_irqfd(fd, gsi)
    }

    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), CallError> {
        self.0.kvm.unregister_irqfd(fd, gsi)
    }

    fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<(), CallError> {
        self.0.kvm.set_msi_routes(routes)
    }

    fn signal_msi(&self, message: MsiMessage) -> Result<bool, CallError> {
        self.0.kvm.signal_msi(message)
    }

    fn register_ioevent(&self, fd: &EventFd, gpa: u64) -> Result<(), CallError> {
        self.0.kvm.register_ioevent(fd, gpa)
    }

    fn unregister_ioevent(&self, fd: &EventFd, gpa: u64) -> Result<(), CallError> {
        self.0.kvm.unregister_ioevent(fd, gpa)
    }

    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, CallError> {
        let fail = |call| move |e: rustix::io::Errno| CallError { call, source: e.into() };
        let fd = rustix::fs::memfd_create("cvmm-private", MemfdFlags::CLOEXEC)
            .map_err(fail("memfd_create for a guest_memfd"))?;
        rustix::fs::ftruncate(&fd, size).map_err(fail("ftruncate of a guest_memfd"))?;
        Ok(fd)
    }

    fn set_memory(&self, slot: MemorySlot) -> Result<(), CallError> {
        const CALL: &str = "KVM_SET_USER_MEMORY_REGION2 (a slot that is there)";
        let mut numbers = lock(&self.0.slots);
        let number = slot.slot;
        if numbers.contains(&number) {
            return Err(CallError::errno(CALL, libc::EINVAL));
        }
        let range = slot.gpa..slot.gpa.saturating_add(slot.shared.len());
        if slot.private.is_none() {
            self.0.views.add_shared_only(&self.0.kvm, slot)?;
        } else {
            self.0.views.add(&self.0.kvm, slot)?;
            if !self.0.model.pages.add_ram(range) {
                return Err(CallError::errno("KVM_SET_USER_MEMORY_REGION2 (too many slots)", libc::EINVAL));
            }
        }
        numbers.insert(number);
        Ok(())
    }

    fn remove_memory(&self, slot: u32) -> Result<(), CallError> {
        let mut numbers = lock(&self.0.slots);
        self.0.views.remove_shared_only(&self.0.kvm, slot)?;
        numbers.remove(&slot);
        Ok(())
    }

    fn set_memory_attributes(&self, attributes: kvm_memory_attributes) -> Result<(), CallError> {
        const CALL: &str = "KVM_SET_MEMORY_ATTRIBUTES";
        let vm = &self.0;
        let (start, len) = (attributes.address, attributes.size);
        let private = attributes.attributes & ATTRIBUTE_PRIVATE != 0;
        let end = start.checked_add(len).ok_or(CallError::errno(CALL, libc::EINVAL))?;
        vm.model
            .set_attributes(start, len, attributes.attributes, attributes.flags)
            .map_err(|errno| CallError::errno(CALL, errno.0))?;
        vm.views.attribute_changed(&vm.kvm, &vm.model.pages, start..end, private)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CallError> {
        let vcpu = self.0.kvm.new_vcpu(id)?;
        let recorded = Arc::new(Mutex::new(Recorded::new(vcpu.get_regs()?, vcpu.get_sregs()?)));
        let wake = Wake::new().map_err(|source| CallError { call: "eventfd for a vCPU", source })?;
        let wake = Arc::new(wake);
        let unmeasured = self.0.model.registers_sealed();
        self.0.model.create_vcpu(id).map_err(|errno| CallError::errno("KVM_CREATE_VCPU", errno.0))?;
        self.0.join(id, &recorded, &wake);
        Ok(Box::new(EmulatedVcpu::new(id, Arc::clone(&self.0), vcpu, recorded, wake, unmeasured)))
    }

    fn snp(&self) -> Option<&dyn Snp> {
        Some(self)
    }

    fn backs_sides_apart(&self) -> bool {
        !self.0.views.single()
    }

    fn statistics(&self) -> Option<String> {
        self.0.statistics()
    }
}

#[cfg(test)]
#[path = "vm_test.rs"]
mod vm_test;
