// SPDX-License-Identifier: Apache-2.0
//! From the plan's register state to KVM's register calls.
//!
//! Every register of every vCPU is set explicitly, because in an SNP guest KVM's defaults would be part of the measurement.
//! The state holds values as they end up in the VMSA; what KVM adds by itself (EFER.SVME) is left out of the calls.

use kvm_bindings::kvm_dtable;
use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use snp::vmsa::EFER_SVME;
use snp::vmsa::Segment;
use snp::vmsa::VmsaState;

use crate::platform::CallError;
use crate::platform::Vcpu;

/// `IA32_PAT`.
const MSR_PAT: u32 = 0x277;
/// `IA32_MTRR_DEF_TYPE`, and "enabled, write-back by default". Not part of the VMSA. Linux 6.1 skips PAT set-up without it
/// and then stops in its encryption code.
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 0x806);

/// General registers.
pub fn regs(state: &VmsaState) -> kvm_regs {
    let [r8, r9, r10, r11, r12, r13, r14, r15] = state.r8_r15;
    kvm_regs {
        rax: state.rax,
        rbx: state.rbx,
        rcx: state.rcx,
        rdx: state.rdx,
        rsi: state.rsi,
        rdi: state.rdi,
        rsp: state.rsp,
        rbp: state.rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    }
}

/// A segment in KVM's form, from the 12-bit VMCB form.
pub fn segment(s: &Segment) -> kvm_segment {
    let bit = |n: u16| ((s.attrib >> n) & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attrib & 0xf) as u8,
        s: bit(4),
        dpl: ((s.attrib >> 5) & 3) as u8,
        present: bit(7),
        avl: bit(8),
        l: bit(9),
        db: bit(10),
        g: bit(11),
        unusable: bit(7) ^ 1,
        padding: 0,
    }
}

/// The 12-bit VMCB form of a KVM segment, as KVM's `svm_set_segment` makes it.
pub fn vmcb_segment(s: &kvm_segment) -> Segment {
    let present = u16::from(s.present & 1 & !s.unusable);
    let attrib = u16::from(s.type_ & 0xf)
        | u16::from(s.s & 1) << 4
        | u16::from(s.dpl & 3) << 5
        | present << 7
        | u16::from(s.avl & 1) << 8
        | u16::from(s.l & 1) << 9
        | u16::from(s.db & 1) << 10
        | u16::from(s.g & 1) << 11;
    Segment { selector: s.selector, attrib, limit: s.limit, base: s.base }
}

/// Segments, control registers and EFER; `apic_base` is taken over from the vCPU.
pub fn sregs(state: &VmsaState, apic_base: u64) -> kvm_sregs {
    let table =
        |s: &Segment| kvm_dtable { base: s.base, limit: s.limit.min(0xffff) as u16, ..Default::default() };
    kvm_sregs {
        cs: segment(&state.cs),
        ds: segment(&state.ds),
        es: segment(&state.es),
        fs: segment(&state.fs),
        gs: segment(&state.gs),
        ss: segment(&state.ss),
        tr: segment(&state.tr),
        ldt: segment(&state.ldtr),
        gdt: table(&state.gdtr),
        idt: table(&state.idtr),
        cr0: state.cr0,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.efer & !EFER_SVME,
        apic_base,
        ..Default::default()
    }
}

/// Sets every register of `vcpu`. CPUID must have been set before: it decides which bits are legal.
pub fn load(vcpu: &mut dyn Vcpu, state: &VmsaState) -> Result<(), CallError> {
    let apic_base = vcpu.get_sregs()?.apic_base;
    vcpu.set_sregs(&sregs(state, apic_base))?;
    vcpu.set_regs(&regs(state))?;
    vcpu.set_fpu(&kvm_fpu { fcw: state.x87_fcw, mxcsr: state.mxcsr, ..Default::default() })?;
    vcpu.set_msrs(&[(MSR_PAT, state.g_pat), MSR_MTRR_DEF_TYPE])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_way_to_kvm_and_back() {
        for attrib in [0x93, 0x9b, 0xa9b, 0xc93, 0x8b, 0x82] {
            let s = Segment::new(0x18, attrib, 0xffff_ffff, 0x1000);
            assert_eq!(vmcb_segment(&segment(&s)), s);
        }
    }
}
