// SPDX-License-Identifier: Apache-2.0
//! From the plan's register state to KVM's register calls.
//!
//! Every register of every vCPU is set explicitly, because in an SNP guest KVM's defaults would be part of
//! the measurement. The state holds values as they end up in the VMSA; what KVM adds by itself (EFER.SVME) is
//! left out of the calls.

use kvm_bindings::kvm_dtable;
use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use snp::vmsa::CR4_MCE;
use snp::vmsa::EFER_SVME;
use snp::vmsa::Segment;
use snp::vmsa::VmsaState;

use crate::platform::Vcpu;
use crate::platform::error::CallError;

/// `IA32_PAT`.
const MSR_PAT: u32 = 0x277;
/// `IA32_MTRR_DEF_TYPE`, and "enabled, write-back by default". Not part of the VMSA. Linux 6.1 skips PAT
/// set-up without it and then stops in its encryption code.
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

/// A register that does not hold what the plan says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{register} is {found}, the plan says {planned}")]
pub struct Mismatch {
    /// Its name.
    pub register: &'static str,
    /// What the vCPU holds.
    pub found: String,
    /// What it should hold.
    pub planned: String,
}

/// `planned` as `KVM_GET_SREGS` will tell it: KVM keeps and measures segments as they were set, but on AMD it
/// reports the granularity that fits the limit, TR as busy, data segments as accessed, and no size of an
/// unusable SS (Linux 6.12.117 and 7.3.4, `svm.c:svm_get_segment`).
fn as_kvm_reports(planned: &VmsaState) -> VmsaState {
    const ACCESSED: u16 = 1;
    const BUSY: u16 = 1 << 1;
    const PRESENT: u16 = 1 << 7;
    const DB: u16 = 1 << 10;
    const G: u16 = 1 << 11;
    let mut state = planned.clone();
    for s in [
        &mut state.es,
        &mut state.cs,
        &mut state.ss,
        &mut state.ds,
        &mut state.fs,
        &mut state.gs,
        &mut state.ldtr,
        &mut state.tr,
    ] {
        s.attrib = s.attrib & !G | if s.limit > 0xf_ffff { G } else { 0 };
    }
    for s in [&mut state.ds, &mut state.es, &mut state.fs, &mut state.gs] {
        s.attrib |= if s.attrib & PRESENT != 0 { ACCESSED } else { 0 };
    }
    state.tr.attrib |= BUSY;
    if state.ss.attrib & PRESENT == 0 {
        state.ss.attrib &= !DB;
    }
    state
}

/// Compares what `vcpu` holds with `planned`, as far as KVM lets it be read; possible only until
/// LAUNCH_FINISH. What no call sets, such as debug registers and MXCSR, must have KVM's own values in the
/// plan.
pub fn read_back(vcpu: &dyn Vcpu, planned: &VmsaState) -> Result<Option<Mismatch>, CallError> {
    let (r, s) = (vcpu.get_regs()?, vcpu.get_sregs()?);
    let fcw = vcpu.get_fpu()?.fcw;
    let (pat, xcr0) = (vcpu.get_msr(MSR_PAT)?, vcpu.get_xcr0()?);
    let planned = as_kvm_reports(planned);
    let held = VmsaState { g_pat: pat, xcr0, x87_fcw: fcw, ..vmsa(&r, &s, planned.sev_features) };
    let mut mismatch = None;
    macro_rules! compare {
        ($($field:ident),*) => {
            $(if mismatch.is_none() && held.$field != planned.$field {
                mismatch = Some(Mismatch {
                    register: stringify!($field),
                    found: format!("{:#x?}", held.$field),
                    planned: format!("{:#x?}", planned.$field),
                });
            })*
        };
    }
    compare!(
        es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr, cpl, efer, cr4, cr3, cr0, dr7, dr6, rflags, rip, g_pat,
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8_r15, xcr0, mxcsr, x87_fcw
    );
    Ok(mismatch)
}

/// The save area that KVM makes of general and special registers, with its reset values for everything else.
pub fn vmsa(r: &kvm_regs, s: &kvm_sregs, sev_features: u64) -> VmsaState {
    let table = |base: u64, limit: u16| Segment { base, limit: limit.into(), ..Segment::default() };
    VmsaState {
        es: vmcb_segment(&s.es),
        cs: vmcb_segment(&s.cs),
        ss: vmcb_segment(&s.ss),
        ds: vmcb_segment(&s.ds),
        fs: vmcb_segment(&s.fs),
        gs: vmcb_segment(&s.gs),
        gdtr: table(s.gdt.base, s.gdt.limit),
        ldtr: vmcb_segment(&s.ldt),
        idtr: table(s.idt.base, s.idt.limit),
        tr: vmcb_segment(&s.tr),
        cpl: s.ss.dpl,
        efer: s.efer | EFER_SVME,
        cr4: s.cr4 | CR4_MCE,
        cr3: s.cr3,
        cr0: s.cr0,
        rflags: r.rflags,
        rip: r.rip,
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rbx: r.rbx,
        rsp: r.rsp,
        rbp: r.rbp,
        rsi: r.rsi,
        rdi: r.rdi,
        r8_r15: [r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15],
        sev_features,
        ..VmsaState::reset()
    }
}

/// Sets every register of `vcpu`. CPUID must have been set before: it decides which bits are legal.
pub fn load(vcpu: &mut dyn Vcpu, state: &VmsaState) -> Result<(), CallError> {
    let apic_base = vcpu.get_sregs()?.apic_base;
    vcpu.set_sregs(&sregs(state, apic_base))?;
    vcpu.set_regs(&regs(state))?;
    vcpu.set_fpu(&kvm_fpu { fcw: state.x87_fcw, mxcsr: state.mxcsr, ..Default::default() })?;
    vcpu.set_msrs(&[(MSR_PAT, state.g_pat), MSR_MTRR_DEF_TYPE])?;
    vcpu.set_xcr0(state.xcr0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux 7.3.4, `svm.c:svm_get_segment`, by hand for each register.
    #[test]
    fn segments_are_compared_as_kvm_reports_them() {
        let planned = VmsaState {
            cs: Segment::new(8, 0x29b, 0xffff_ffff, 0),
            ds: Segment::new(16, 0x892, 0xffff, 0),
            es: Segment::new(0, 0, 0, 0),
            ss: Segment::new(0, 0x413, 0, 0),
            tr: Segment::new(0, 0, 0xffff, 0),
            ..VmsaState::reset()
        };
        let reported = as_kvm_reports(&planned);
        assert_eq!(reported.cs.attrib, 0xa9b, "G by the limit");
        assert_eq!(reported.ds.attrib, 0x093, "accessed, and no G");
        assert_eq!(reported.es.attrib, 0, "not present, so not accessed");
        assert_eq!(reported.ss.attrib, 0x013, "unusable, so no size");
        assert_eq!(reported.tr.attrib, 0x002, "busy");
        assert_eq!(as_kvm_reports(&reported), reported);
    }

    #[test]
    fn segments_survive_the_way_to_kvm_and_back() {
        for attrib in [0x93, 0x9b, 0xa9b, 0xc93, 0x8b, 0x82] {
            let s = Segment::new(0x18, attrib, 0xffff_ffff, 0x1000);
            assert_eq!(vmcb_segment(&segment(&s)), s);
        }
    }
}
