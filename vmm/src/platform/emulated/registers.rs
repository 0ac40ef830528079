// SPDX-License-Identifier: Apache-2.0
//! The registers that the monitor set on a vCPU, and the VMSA that KVM would make of them.
//!
//! Stands for `sev_es_sync_vmsa` (Linux 6.12): what is measured is what was set, not what the plan said. A
//! register that the monitor forgot shows as KVM's default here, and so as a different digest.

use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_sregs;
use snp::vmsa::VmsaState;

use crate::platform::registers::vmsa;

const MSR_PAT: u32 = 0x277;

/// What was set so far.
#[derive(Clone)]
pub struct Recorded {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    pat: u64,
    xcr0: u64,
}

impl Recorded {
    /// The state of a vCPU that KVM has just created.
    pub fn new(regs: kvm_regs, sregs: kvm_sregs) -> Self {
        let reset = VmsaState::reset();
        let fpu = kvm_fpu { fcw: reset.x87_fcw, mxcsr: reset.mxcsr, ..Default::default() };
        Recorded { regs, sregs, fpu, pat: reset.g_pat, xcr0: reset.xcr0 }
    }

    /// `KVM_SET_REGS`.
    pub fn set_regs(&mut self, regs: &kvm_regs) {
        self.regs = *regs;
    }

    /// `KVM_SET_SREGS`.
    pub fn set_sregs(&mut self, sregs: &kvm_sregs) {
        self.sregs = *sregs;
    }

    /// `KVM_GET_SREGS` of a VM with AMD's extensions, whatever the host has: `svm_get_segment` (Linux
    /// 6.12.117 and 7.3.4).
    pub fn reported_sregs(&self) -> kvm_sregs {
        let mut s = self.sregs;
        for segment in
            [&mut s.cs, &mut s.ds, &mut s.es, &mut s.fs, &mut s.gs, &mut s.ss, &mut s.tr, &mut s.ldt]
        {
            segment.present &= 1 & !segment.unusable;
            segment.g = u8::from(segment.limit > 0xf_ffff);
            segment.unusable = segment.present ^ 1;
        }
        s.tr.type_ |= 2;
        for segment in [&mut s.ds, &mut s.es, &mut s.fs, &mut s.gs] {
            segment.type_ |= segment.present;
        }
        if s.ss.unusable != 0 {
            s.ss.db = 0;
        }
        s
    }

    /// `KVM_SET_FPU`; KVM takes the control word from it, and not MXCSR.
    pub fn set_fpu(&mut self, fpu: &kvm_fpu) {
        self.fpu.fcw = fpu.fcw;
    }

    /// `KVM_SET_MSRS`.
    pub fn set_msrs(&mut self, msrs: &[(u32, u64)]) {
        if let Some((_, value)) = msrs.iter().rev().find(|(index, _)| *index == MSR_PAT) {
            self.pat = *value;
        }
    }

    /// `KVM_SET_XCRS`.
    pub fn set_xcr0(&mut self, value: u64) {
        self.xcr0 = value;
    }

    /// The save area.
    pub fn vmsa(&self, sev_features: u64) -> VmsaState {
        VmsaState {
            g_pat: self.pat,
            xcr0: self.xcr0,
            mxcsr: self.fpu.mxcsr,
            x87_fcw: self.fpu.fcw,
            // Debug registers and whatever else no call of the seam sets have their reset values.
            ..vmsa(&self.regs, &self.sregs, sev_features)
        }
    }
}
