// SPDX-License-Identifier: Apache-2.0
//! Registers and addresses at an exit, read as cheaply as KVM offers it: an emulated PVALIDATE is little
//! else.

use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_translation;
use kvm_ioctls::SyncReg;

use super::EmulatedVcpu;
use crate::platform::Vcpu;
use crate::platform::error::CallError;

impl EmulatedVcpu {
    /// The registers at an exit that has just happened.
    pub(super) fn regs_at_exit(&self) -> Result<kvm_regs, CallError> {
        if self.synced { Ok(self.kvm.fd.sync_regs().regs) } else { self.kvm.get_regs() }
    }

    /// Has the guest go on with other registers after an exit that has just happened.
    pub(super) fn resume_with(&mut self, regs: &kvm_regs) -> Result<(), CallError> {
        if !self.synced {
            return self.kvm.set_regs(regs);
        }
        self.kvm.fd.sync_regs_mut().regs = *regs;
        self.kvm.fd.set_sync_dirty_reg(SyncReg::Register);
        Ok(())
    }

    /// `KVM_TRANSLATE`. KVM walks the guest's tables itself; in strict runs they may lie in pages that wait
    /// to be opened.
    pub(super) fn translate(&self, address: u64) -> Result<kvm_translation, CallError> {
        let walk = || self.kvm.fd.translate_gva(address).map_err(CallError::of("KVM_TRANSLATE"));
        let seen = self.vm.views.opened();
        let found = walk()?;
        if found.valid == 0 && self.vm.strict() && self.vm.views.open(&self.vm.model.pages, seen)? {
            return walk();
        }
        Ok(found)
    }
}
