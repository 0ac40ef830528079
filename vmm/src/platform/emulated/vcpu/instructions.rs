// SPDX-License-Identifier: Apache-2.0
//! The guest's SNP instructions, which exit as port writes: what the model answers, and where the guest goes on.

use std::sync::Arc;

use kvm_bindings::kvm_vcpu_events;
use snp_model::outcome::Outcome;
use snp_model::outcome::Reply;
use snp_model::patch::Opcode;
use snp_model::rmp::InstructionResult;
use snp_model::rmp::PAGES_2M;
use snp_model::rmp::SUCCESS;

use super::super::shared::Stage;
use super::Activity;
use super::EmulatedVcpu;
use super::Next;
use super::PendingExit;
use super::invalid;
use super::msr;
use crate::platform::Vcpu;
use crate::platform::error::CallError;
use crate::platform::exit::Exit;
use crate::platform::kvm::decode;
use crate::platform::kvm::msr_access;
use crate::platform::mapping::PAGE;

const PAGE_FAULT: u8 = 14;
/// CF, PF, AF, ZF, SF and OF in RFLAGS.
const STATUS_FLAGS: u64 = 0x8d5;
const CARRY: u64 = 1;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_AUX: u32 = 0xc000_0103;

impl EmulatedVcpu {
    /// One exit of the underlying vCPU.
    pub(super) fn event(&mut self) -> Result<Next, CallError> {
        if let Some(access) = msr_access(self.kvm.fd.get_kvm_run()) {
            msr::answer(access, &mut self.model, self.vm.model.sev_status());
            return Ok(Next::Enter);
        }
        match decode(self.kvm.fd.get_kvm_run()) {
            Exit::IoOut { port, data } if data.len() == 1 => {
                let ports = self.vm.ports;
                let Ok(port) = u8::try_from(port) else { return Ok(Next::Pass) };
                let opcode = Opcode::ALL.into_iter().find(|opcode| ports.of(*opcode) == port);
                match opcode {
                    None if port == ports.hook => self.kernel_entry(),
                    None if port == ports.handover => self.handover(),
                    None => Ok(Next::Pass),
                    Some(opcode) => self.instruction(opcode),
                }
            }
            Exit::MmioRead { addr, .. } | Exit::MmioWrite { addr, .. } if addr & self.vm.c_mask() != 0 => {
                let (gpa, _) = self.split(addr);
                self.told = Some(PendingExit::Fault { gpa, again: None });
                Ok(Next::Tell)
            }
            _ => Ok(Next::Pass),
        }
    }

    fn instruction(&mut self, opcode: Opcode) -> Result<Next, CallError> {
        let mut regs = self.regs_at_exit()?;
        let Some(site) = self.site(regs.rip, &self.vm.ports.patched(opcode)) else {
            return Ok(Next::Pass);
        };
        if opcode == Opcode::Vmgexit {
            return self.vmgexit();
        }
        let translation = self.translate(regs.rax)?;
        if translation.valid == 0 {
            self.page_fault(site, regs.rax)?;
            return Ok(Next::Enter);
        }
        let (gpa, c_bit) = self.split(translation.physical_address);
        let result = match opcode {
            Opcode::Pvalidate => self.vm.model.pvalidate(gpa, c_bit, regs.rcx, regs.rdx),
            _ => self.vm.model.rmpadjust(gpa, c_bit, regs.rcx, regs.rdx),
        };
        match result {
            InstructionResult::Done { eax, carry } => {
                if opcode == Opcode::Pvalidate && eax == SUCCESS && !carry {
                    let len = if regs.rcx & 1 == 1 { PAGES_2M * PAGE } else { PAGE };
                    let start = gpa & !(PAGE - 1);
                    let (pages, validated) = (&self.vm.model.pages, regs.rdx & 1 == 1);
                    self.vm.views.validation_changed(pages, start..start + len, validated)?;
                }
                regs.rax = eax.into();
                regs.rflags = regs.rflags & !STATUS_FLAGS | if carry { CARRY } else { 0 };
                self.resume_with(&regs)?;
                Ok(Next::Enter)
            }
            InstructionResult::NestedFault { gpa } => {
                self.told = Some(PendingExit::Fault { gpa, again: Some(site) });
                Ok(Next::Tell)
            }
            InstructionResult::NotValidated { .. } => Err(invalid(
                "the guest used RMPADJUST on a page that it has not validated (#VC 0x404 on hardware)",
            )),
        }
    }

    fn vmgexit(&mut self) -> Result<Next, CallError> {
        let vm = Arc::clone(&self.vm);
        if let Some(gpa) = self.model.private_ghcb(&vm.model) {
            self.told = Some(PendingExit::PrivateGhcb { gpa });
            return Ok(Next::Tell);
        }
        let outcome = self.model.vmgexit(&vm.model, &vm.views);
        self.follow(outcome)
    }

    /// Finishes the port write and has RIP on it again.
    fn go_back(&mut self, site: u64) -> Result<(), CallError> {
        self.complete_out()?;
        let mut regs = self.kvm.get_regs()?;
        regs.rip = site;
        self.kvm.set_regs(&regs)
    }

    /// The operand's address is not mapped: hardware faults on the instruction, the port write does not.
    fn page_fault(&mut self, site: u64, operand: u64) -> Result<(), CallError> {
        self.go_back(site)?;
        let mut sregs = self.kvm.get_sregs()?;
        sregs.cr2 = operand;
        self.kvm.set_sregs(&sregs)?;
        let mut events: kvm_vcpu_events =
            self.kvm.fd.get_vcpu_events().map_err(CallError::of("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 1;
        events.exception.nr = PAGE_FAULT;
        events.exception.has_error_code = 1;
        events.exception.error_code = 0;
        self.kvm.fd.set_vcpu_events(&events).map_err(CallError::of("KVM_SET_VCPU_EVENTS"))
    }

    /// stage0 is done: the kernel is in place, checked, and not yet patched. RIP needs no change.
    pub(super) fn handover(&mut self) -> Result<Next, CallError> {
        // The guest can execute these bytes again, and elsewhere: then they are what they are, a write to a
        // port.
        if self.id != 0 || self.vm.stage() != Stage::Stage0 {
            return Ok(Next::Pass);
        }
        let at = self.kvm.get_regs()?;
        if self.site(at.rip, &self.vm.ports.patched_handover()).is_none() {
            return Ok(Next::Pass);
        }
        self.vm.meter.kernel_begins(&self.vm.model.pages);
        self.vm.begin_kernel()?;
        Ok(Next::Enter)
    }

    /// The decompressor is done: its last two instructions were `mov rsi, r15; jmp *rax`, the first is
    /// patched.
    pub(super) fn kernel_entry(&mut self) -> Result<Next, CallError> {
        if self.id != 0 || self.vm.stage() != Stage::Decompressor {
            return Ok(Next::Pass);
        }
        let at = self.kvm.get_regs()?;
        if self.site(at.rip, &self.vm.ports.patched_hook()).is_none() {
            return Ok(Next::Pass);
        }
        let entry = self.translate(at.rax)?;
        if entry.valid == 0 {
            return Err(invalid("the decompressor jumps to an address that is not mapped"));
        }
        let (entry, _) = self.split(entry.physical_address);
        self.vm.patch_kernel(entry)?;
        self.complete_out()?;
        let mut regs = self.kvm.get_regs()?;
        regs.rsi = at.r15;
        regs.rip = at.rax;
        self.kvm.set_regs(&regs)?;
        if self.vm.views.end_alias(&self.vm.kvm, &self.vm.model.pages)? {
            // The table entries carry the C-bit; hardware walks them privately without it in CR3 as well,
            // this VM does not.
            let mut sregs = self.kvm.get_sregs()?;
            sregs.cr3 |= self.vm.c_mask();
            self.kvm.set_sregs(&sregs)?;
        }
        Ok(Next::Enter)
    }

    /// Does what the model says.
    fn follow(&mut self, mut outcome: Outcome) -> Result<Next, CallError> {
        let vm = Arc::clone(&self.vm);
        loop {
            let reply = match outcome {
                Outcome::Resume => return Ok(Next::Enter),
                Outcome::ResetHold => {
                    self.activity = Activity::Halted;
                    return Ok(Next::Enter);
                }
                Outcome::ApCreate(creation) => {
                    vm.order(creation);
                    return Ok(Next::Enter);
                }
                Outcome::RunFails(errno) => return Err(CallError::errno("KVM_RUN", errno.0)),
                Outcome::MapGpaRange(range) => {
                    vm.meter.page_state_change();
                    self.told = Some(PendingExit::MapGpaRange { range, ret: u64::MAX });
                    return Ok(Next::Tell);
                }
                Outcome::ReqCerts { gpa, npages } => {
                    self.told = Some(PendingExit::Certs { gpa, npages, ret: libc::EIO as u64 });
                    return Ok(Next::Tell);
                }
                Outcome::Terminate { data0 } => {
                    self.told = Some(PendingExit::Terminate { data: data0 });
                    return Ok(Next::Tell);
                }
                Outcome::Io { port, direction, data, .. } => {
                    self.told = Some(PendingExit::Io { port, direction, data });
                    return Ok(Next::Tell);
                }
                Outcome::Mmio { gpa, len, direction, data } => {
                    self.told =
                        Some(PendingExit::Mmio { gpa, len: usize::from(len).min(8), direction, data });
                    return Ok(Next::Tell);
                }
                Outcome::ReadMsr { index } => {
                    Reply::ReadMsr(msr::readable(index).then(|| self.kvm.get_msr(index).ok()).flatten())
                }
                Outcome::WriteMsr { index, .. } if msr::refused(index) => {
                    return Err(CallError::errno("KVM_RUN", libc::EINVAL));
                }
                Outcome::WriteMsr { index, value } => {
                    Reply::WriteMsr(msr::writable(index) && self.kvm.set_msrs(&[(index, value)]).is_ok())
                }
                Outcome::Tsc => Reply::Tsc {
                    tsc: self.kvm.get_msr(MSR_TSC)?,
                    aux: self.kvm.get_msr(MSR_TSC_AUX).unwrap_or(0) as u32,
                },
            };
            outcome = self.model.complete(&vm.model, &vm.views, reply);
        }
    }

    /// Takes the monitor's answer to the last exit to the model.
    pub(super) fn answered(&mut self) -> Result<Next, CallError> {
        let vm = Arc::clone(&self.vm);
        let reply = match self.told.take() {
            None => return Ok(Next::Enter),
            Some(PendingExit::MapGpaRange { ret, .. }) => Reply::MapGpaRange { ret },
            Some(PendingExit::Certs { npages, ret, .. }) => {
                Reply::Certs { ret: i32::try_from(ret).unwrap_or(libc::EINVAL), npages }
            }
            Some(PendingExit::Io { data, .. }) => Reply::Io(data),
            Some(PendingExit::Mmio { data, .. }) => Reply::Mmio(data),
            // Once the page is shared, the guest's message is in it: with one backing, where it was written.
            Some(PendingExit::PrivateGhcb { .. }) => return self.vmgexit(),
            // The monitor has found the page in the right state by now: the instruction is executed again, as
            // on hardware.
            Some(PendingExit::Fault { again: Some(site), .. }) => {
                self.go_back(site)?;
                return Ok(Next::Enter);
            }
            // A guest that has ended, or that made an access which cannot be answered, stays where it is.
            Some(told @ (PendingExit::Terminate { .. } | PendingExit::Fault { again: None, .. })) => {
                self.told = Some(told);
                return Ok(Next::Tell);
            }
        };
        let outcome = self.model.complete(&vm.model, &vm.views, reply);
        self.follow(outcome)
    }
}
