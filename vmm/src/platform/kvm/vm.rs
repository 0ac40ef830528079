// SPDX-License-Identifier: Apache-2.0
//! A VM of the host's KVM.

#![allow(unsafe_code, reason = "memory slots hand the kernel addresses in this process")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::*;
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::NoDatamatch;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::check::check_vm;
use super::slots::Slots;
use super::vcpu::KvmVcpu;
use crate::lock::lock;
use crate::platform::Vcpu;
use crate::platform::Vm;
use crate::platform::VmKind;
use crate::platform::error::CallError;
use crate::platform::interrupt::MsiMessage;
use crate::platform::interrupt::MsiRoute;
use crate::platform::memory::MemorySlot;
use crate::platform::sev::Snp;

/// Where KVM may keep its internal pages on Intel CPUs: just below the BIOS region, outside of RAM and of
/// devices.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Pins of the two PICs, and of the IOAPIC (`KVM_IOAPIC_NUM_PINS`).
const PIC_PINS: u32 = 16;
const IOAPIC_PINS: u32 = 24;

/// A VM; the emulated platform builds on a plain one.
pub struct KvmVm {
    /// The file descriptor.
    pub fd: VmFd,
    /// `/dev/sev`, open under one descriptor as long as the VM lives: KVM uses it again for every guest
    /// request.
    pub(super) sev: Option<File>,
    kind: VmKind,
    slots: Slots,
}

impl KvmVm {
    pub(super) fn new(fd: VmFd, kind: VmKind, sev: Option<File>) -> Self {
        KvmVm { fd, sev, kind, slots: Slots::default() }
    }

    /// Whether the VM itself can do what an SNP guest needs; otherwise the name of what is missing and KVM's
    /// answer.
    pub fn check_snp(&self) -> Result<(), (&'static str, i32)> {
        check_vm(&self.fd)
    }

    /// `KVM_CREATE_VCPU`.
    pub fn new_vcpu(&self, id: u32) -> Result<KvmVcpu, CallError> {
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(CallError::of("KVM_CREATE_VCPU"))?;
        Ok(KvmVcpu { fd, unseen: false, _slots: Arc::clone(&self.slots) })
    }

    /// `KVM_SET_USER_MEMORY_REGION` of part of a mapping; the emulated platform shows one mapping at several
    /// addresses.
    ///
    /// # Safety
    /// The memory at `host..host + len` must stay mapped until the slot is deleted or the VM is gone, and may
    /// be written by the guest at any time. `len` 0 deletes the slot.
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

/// The pins of the interrupt controllers, as KVM connects them itself: the first 16 go to both kinds
/// (`default_routing`, in `arch/x86/kvm/irq_comm.c` of Linux 6.1 and in `irq.c` of 7.3).
fn pins() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pin = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    };
    let pic =
        move |gsi| pin(gsi, if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE }, gsi % 8);
    (0..IOAPIC_PINS).map(move |gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi)).chain((0..PIC_PINS).map(pic))
}

fn msi(route: &MsiRoute) -> kvm_irq_routing_entry {
    let MsiRoute { gsi, message } = *route;
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
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

    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), CallError> {
        self.fd.unregister_irqfd(fd, gsi).map_err(CallError::of("KVM_IRQFD (deassign)"))
    }

    fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<(), CallError> {
        const CALL: &str = "KVM_SET_GSI_ROUTING";
        let entries: Vec<_> = pins().chain(routes.iter().map(msi)).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| CallError::errno(CALL, libc::E2BIG))?;
        self.fd.set_gsi_routing(&table).map_err(CallError::of(CALL))
    }

    fn signal_msi(&self, message: MsiMessage) -> Result<bool, CallError> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        match self.fd.signal_msi(msi) {
            // No local APIC takes it: KVM's answer is -1, which is this errno (Linux 7.3,
            // `lapic.c:__kvm_irq_delivery_to_apic`).
            Err(e) if e.errno() == libc::EPERM => Ok(false),
            other => Ok(other.map_err(CallError::of("KVM_SIGNAL_MSI"))? > 0),
        }
    }

    fn register_ioevent(&self, fd: &EventFd, gpa: u64) -> Result<(), CallError> {
        let address = IoEventAddress::Mmio(gpa);
        self.fd.register_ioevent(fd, &address, NoDatamatch).map_err(CallError::of("KVM_IOEVENTFD"))
    }

    fn unregister_ioevent(&self, fd: &EventFd, gpa: u64) -> Result<(), CallError> {
        let address = IoEventAddress::Mmio(gpa);
        self.fd
            .unregister_ioevent(fd, &address, NoDatamatch)
            .map_err(CallError::of("KVM_IOEVENTFD (deassign)"))
    }

    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, CallError> {
        // Never GUEST_MEMFD_FLAG_MMAP (Linux 6.18): KVM would then serve shared accesses from this memory
        // too, and make their pages private in the RMP (7.3, `guest_memfd.c:kvm_gmem_bind`,
        // `kvm_gmem_get_pfn`).
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
        lock(&self.slots).push(slot);
        Ok(())
    }

    fn remove_memory(&self, slot: u32) -> Result<(), CallError> {
        const CALL: &str = "KVM_SET_USER_MEMORY_REGION2 (delete)";
        let mut slots = lock(&self.slots);
        let found = slots.iter().position(|known| known.slot == slot && known.private.is_none());
        let at = found.ok_or(CallError::errno(CALL, libc::EINVAL))?;
        // SAFETY: length 0 deletes the slot; the kernel has let go of the memory when it returns.
        unsafe { self.set_slot(slot, slots[at].gpa, slots[at].shared.host_address(), 0) }?;
        slots.swap_remove(at);
        Ok(())
    }

    fn set_memory_attributes(&self, attributes: kvm_memory_attributes) -> Result<(), CallError> {
        self.fd.set_memory_attributes(attributes).map_err(CallError::of("KVM_SET_MEMORY_ATTRIBUTES"))
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CallError> {
        Ok(Box::new(self.new_vcpu(id)?))
    }

    fn snp(&self) -> Option<&dyn Snp> {
        (self.kind == VmKind::Snp).then_some(self)
    }
}
