// SPDX-License-Identifier: Apache-2.0
//! For tests of what lies above the seam: a VM that notes what it is asked, and a vCPU that exits as it was
//! told.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering;

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
use vmm_sys_util::eventfd::EventFd;

use super::CallError;
use super::Exit;
use super::MemorySlot;
use super::Vcpu;
use super::Vm;
use super::interrupt::MsiMessage;
use super::interrupt::MsiRoute;
use super::sev::Snp;
use crate::platform::error::SevError;

/// A VM that does nothing.
#[derive(Default)]
pub struct ScriptedVm {
    /// Attributes that were set: address, size, attributes.
    pub attributes: Mutex<Vec<(u64, u64, u64)>>,
    /// The errno of every attempt to set attributes; 0 lets them through.
    pub fail_attributes: AtomicI32,
    /// What devices were connected to, in order.
    pub wiring: Mutex<Vec<Wiring>>,
}

/// A connection of a device, made or taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// Slot number and address of memory.
    Memory(u32, u64),
    /// A slot that is gone.
    NoMemory(u32),
    /// An event that raises this interrupt.
    Interrupt(u32),
    /// An event that no longer does.
    NoInterrupt(u32),
    /// The messages of interrupt numbers.
    Routes(Vec<MsiRoute>),
    /// A message that was sent.
    Message(MsiMessage),
    /// Writes to this address become events.
    Doorbell(u64),
    /// They no longer do.
    NoDoorbell(u64),
}

impl ScriptedVm {
    /// The last thing that was said of something.
    fn last<T>(&self, of: impl Fn(&Wiring) -> Option<T>) -> Option<T> {
        self.wiring.lock().unwrap().iter().rev().find_map(of)
    }

    fn has_memory(&self, slot: u32) -> bool {
        let there = self.last(|wiring| match wiring {
            Wiring::Memory(number, _) if *number == slot => Some(true),
            Wiring::NoMemory(number) if *number == slot => Some(false),
            _ => None,
        });
        there.unwrap_or(false)
    }

    fn has_doorbell(&self, gpa: u64) -> bool {
        let there = self.last(|wiring| match wiring {
            Wiring::Doorbell(at) if *at == gpa => Some(true),
            Wiring::NoDoorbell(at) if *at == gpa => Some(false),
            _ => None,
        });
        there.unwrap_or(false)
    }

    /// As KVM refuses it (Linux, `kvm_main.c:kvm_set_memory_region`, `eventfd.c:kvm_assign_ioeventfd_idx`).
    fn refuse_unless(&self, possible: bool, errno: i32) -> Result<(), CallError> {
        if possible { Ok(()) } else { Err(CallError::errno("scripted", errno)) }
    }

    fn note(&self, wiring: Wiring) -> Result<(), CallError> {
        self.wiring.lock().unwrap().push(wiring);
        Ok(())
    }
}

impl Vm for ScriptedVm {
    fn create_irqchip(&self) -> Result<(), CallError> {
        Ok(())
    }
    fn register_irqfd(&self, _: &EventFd, gsi: u32) -> Result<(), CallError> {
        self.note(Wiring::Interrupt(gsi))
    }
    fn unregister_irqfd(&self, _: &EventFd, gsi: u32) -> Result<(), CallError> {
        self.note(Wiring::NoInterrupt(gsi))
    }
    fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<(), CallError> {
        self.note(Wiring::Routes(routes.to_vec()))
    }
    fn signal_msi(&self, message: MsiMessage) -> Result<bool, CallError> {
        self.note(Wiring::Message(message)).map(|()| true)
    }
    fn register_ioevent(&self, _: &EventFd, gpa: u64) -> Result<(), CallError> {
        self.refuse_unless(!self.has_doorbell(gpa), libc::EEXIST)?;
        self.note(Wiring::Doorbell(gpa))
    }
    fn unregister_ioevent(&self, _: &EventFd, gpa: u64) -> Result<(), CallError> {
        self.refuse_unless(self.has_doorbell(gpa), libc::ENOENT)?;
        self.note(Wiring::NoDoorbell(gpa))
    }
    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, CallError> {
        let fd = rustix::fs::memfd_create("scripted", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        Ok(fd)
    }
    fn set_memory(&self, slot: MemorySlot) -> Result<(), CallError> {
        let number = slot.slot;
        self.refuse_unless(!self.has_memory(number), libc::EINVAL)?;
        self.note(Wiring::Memory(number, slot.gpa))
    }
    fn remove_memory(&self, slot: u32) -> Result<(), CallError> {
        self.refuse_unless(self.has_memory(slot), libc::EINVAL)?;
        self.note(Wiring::NoMemory(slot))
    }
    fn set_memory_attributes(&self, a: kvm_memory_attributes) -> Result<(), CallError> {
        let errno = self.fail_attributes.load(Ordering::Relaxed);
        if errno != 0 {
            return Err(CallError::errno("KVM_SET_MEMORY_ATTRIBUTES", errno));
        }
        self.attributes.lock().unwrap().push((a.address, a.size, a.attributes));
        Ok(())
    }
    fn create_vcpu(&self, _: u32) -> Result<Box<dyn Vcpu>, CallError> {
        Ok(Box::new(ScriptedVcpu::new([])))
    }
    fn snp(&self) -> Option<&dyn Snp> {
        Some(self)
    }
}

impl Snp for ScriptedVm {
    fn enable_map_gpa_range_exit(&self) -> Result<(), CallError> {
        Ok(())
    }
    fn sev_init2(&self, _: &mut kvm_sev_init) -> Result<(), SevError> {
        Ok(())
    }
    fn snp_launch_start(&self, _: &mut kvm_sev_snp_launch_start) -> Result<(), SevError> {
        Ok(())
    }
    fn snp_launch_update(&self, _: &mut kvm_sev_snp_launch_update, _: &mut [u8]) -> Result<(), SevError> {
        Ok(())
    }
    fn snp_launch_finish(
        &self,
        _: &mut kvm_sev_snp_launch_finish,
        _: Option<(&[u8; 96], &[u8; 4096])>,
    ) -> Result<(), SevError> {
        Ok(())
    }
    fn snp_enable_req_certs(&self) -> Result<(), SevError> {
        Ok(())
    }
}

/// One exit to come.
#[derive(Clone, Debug)]
pub enum Scripted {
    /// `KVM_EXIT_MEMORY_FAULT`.
    MemoryFault {
        /// Bit 3: private.
        flags: u64,
        /// Address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// `KVM_HC_MAP_GPA_RANGE`; the field for the answer holds something else before.
    MapGpaRange([u64; 6]),
    /// Another hypercall, by number.
    Hypercall(u64),
    /// `KVM_EXIT_SNP_REQ_CERTS`: buffer and its pages.
    ReqCerts(u64, u64),
    /// A signal.
    Interrupted,
    /// A broken page of the host.
    Poisoned(u64),
    /// EAGAIN.
    Again,
    /// `KVM_EXIT_FAIL_ENTRY` with this reason.
    FailEntry(u64),
    /// A byte to a port.
    Out(u16, u8),
    /// Triple fault.
    Shutdown,
}

/// What became of an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answered {
    /// The `ret` of a hypercall.
    Ret(u64),
    /// `ret` and `npages` of a request for certificates.
    Certs(u64, u64),
}

/// A vCPU whose exits are known beforehand; when there are no more, it reports an exit of kind `u32::MAX`.
pub struct ScriptedVcpu {
    script: VecDeque<Scripted>,
    now: Option<Scripted>,
    answer: (u64, u64),
    data: [u8; 1],
    /// The monitor's answers.
    pub answers: Vec<Answered>,
    /// What `KVM_PRE_FAULT_MEMORY` will answer: bytes done, or an errno; then everything that is asked for.
    pub pre_faults: VecDeque<Result<u64, i32>>,
    /// What was asked of it: addresses and lengths.
    pub pre_faulted: Vec<(u64, u64)>,
    /// How often the vCPU was run.
    pub runs: usize,
    /// Called when an exit is completed without a run.
    pub on_complete: Box<dyn FnMut() + Send>,
}

impl ScriptedVcpu {
    /// A vCPU that will exit like this.
    pub fn new(script: impl IntoIterator<Item = Scripted>) -> Self {
        ScriptedVcpu {
            script: script.into_iter().collect(),
            now: None,
            answer: (0, 0),
            data: [0],
            answers: Vec::new(),
            pre_faults: VecDeque::new(),
            pre_faulted: Vec::new(),
            runs: 0,
            on_complete: Box::new(|| {}),
        }
    }

    /// What the monitor has written into the answer to the current exit.
    pub fn answer_now(&self) -> u64 {
        self.answer.0
    }

    fn take_answer(&mut self) {
        match self.now.take() {
            Some(Scripted::MapGpaRange(_) | Scripted::Hypercall(_)) => {
                self.answers.push(Answered::Ret(self.answer.0))
            }
            Some(Scripted::ReqCerts(..)) => self.answers.push(Answered::Certs(self.answer.0, self.answer.1)),
            _ => {}
        }
    }
}

/// What the fields for answers hold before: not an answer that the monitor would give.
const STALE: u64 = 0x5a5a;

impl Vcpu for ScriptedVcpu {
    fn set_cpuid(&mut self, _: &[kvm_cpuid_entry2]) -> Result<(), CallError> {
        Ok(())
    }
    fn set_regs(&mut self, _: &kvm_regs) -> Result<(), CallError> {
        Ok(())
    }
    fn get_regs(&self) -> Result<kvm_regs, CallError> {
        Ok(kvm_regs::default())
    }
    fn set_sregs(&mut self, _: &kvm_sregs) -> Result<(), CallError> {
        Ok(())
    }
    fn get_sregs(&self) -> Result<kvm_sregs, CallError> {
        Ok(kvm_sregs::default())
    }
    fn set_fpu(&mut self, _: &kvm_fpu) -> Result<(), CallError> {
        Ok(())
    }
    fn get_fpu(&self) -> Result<kvm_fpu, CallError> {
        Ok(kvm_fpu::default())
    }
    fn set_msrs(&mut self, _: &[(u32, u64)]) -> Result<(), CallError> {
        Ok(())
    }
    fn get_msr(&self, _: u32) -> Result<u64, CallError> {
        Ok(0)
    }
    fn set_xcr0(&mut self, _: u64) -> Result<(), CallError> {
        Ok(())
    }
    fn get_xcr0(&self) -> Result<u64, CallError> {
        Ok(1)
    }
    fn set_lint(&mut self) -> Result<(), CallError> {
        Ok(())
    }
    fn set_mp_state(&mut self, _: kvm_mp_state) -> Result<(), CallError> {
        Ok(())
    }
    fn pre_fault(&mut self, gpa: u64, len: u64) -> Result<u64, CallError> {
        self.pre_faulted.push((gpa, len));
        match self.pre_faults.pop_front() {
            Some(Err(errno)) => Err(CallError::errno("KVM_PRE_FAULT_MEMORY", errno)),
            Some(Ok(done)) => Ok(done),
            None => Ok(len),
        }
    }
    fn complete_exit(&mut self) -> Result<(), CallError> {
        self.take_answer();
        (self.on_complete)();
        Ok(())
    }
    fn run(&mut self) -> Result<Exit<'_>, CallError> {
        self.take_answer();
        self.runs += 1;
        self.now = self.script.pop_front();
        self.answer = (STALE, STALE);
        Ok(match &self.now {
            None => Exit::Other(u32::MAX),
            Some(Scripted::MemoryFault { flags, gpa, size }) => {
                Exit::MemoryFault { flags: *flags, gpa: *gpa, size: *size }
            }
            Some(Scripted::MapGpaRange(args)) => {
                Exit::Hypercall { nr: super::HC_MAP_GPA_RANGE, args: *args, ret: &mut self.answer.0 }
            }
            Some(Scripted::Hypercall(nr)) => {
                Exit::Hypercall { nr: *nr, args: [0; 6], ret: &mut self.answer.0 }
            }
            Some(Scripted::ReqCerts(gpa, npages)) => {
                self.answer.1 = *npages;
                Exit::ReqCerts { gpa: *gpa, npages: &mut self.answer.1, ret: &mut self.answer.0 }
            }
            Some(Scripted::Interrupted) => Exit::Interrupted,
            Some(Scripted::Poisoned(gpa)) => Exit::Poisoned { gpa: *gpa },
            Some(Scripted::Again) => Exit::Again,
            Some(Scripted::FailEntry(reason)) => Exit::FailEntry { reason: *reason },
            Some(Scripted::Out(port, byte)) => {
                self.data = [*byte];
                Exit::IoOut { port: *port, data: &self.data }
            }
            Some(Scripted::Shutdown) => Exit::Shutdown,
        })
    }
}
