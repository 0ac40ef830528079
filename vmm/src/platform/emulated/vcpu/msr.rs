// SPDX-License-Identifier: Apache-2.0
//! MSRs: those that an SNP guest has beside the underlying VM, and which others it may reach through its communication page.
//!
//! On hardware KVM carries such a request out as the guest's own instruction (Linux 6.12.117 and 7.3.4:
//! `svm_invoke_exit_handler`, then `kvm_emulate_rdmsr` and `kvm_emulate_wrmsr` of `x86.c`, not
//! host-initiated). The calls that this platform has, KVM_GET_MSRS and KVM_SET_MSRS, act as the host: they
//! write what is read-only for a guest, such as the microcode's level. So only those on the lists below are
//! passed on; others raise #GP, as an MSR that is not there.
//!
//! The guest's side chooses nothing: `vc_handle_msr` of Linux (`arch/x86/coco/sev`) sends every access that
//! the processor refused to carry out, but those of the protocol itself and of a secure TSC. So the lists
//! follow from what KVM intercepts:
//!
//! - MSRs that a Linux guest reaches for on AMD processors (`arch/x86/kernel`: `tsc.c`, `tsc_sync.c`,
//!   `kvm.c`, `kvmclock.c`, `apic/`, `cpu/amd.c`, `cpu/mtrr/`, `cpu/mce/`) and that KVM intercepts are here.
//! - MSRs that an SNP guest has to itself are not: those that `svm.c` (`direct_access_msrs` in 6.12,
//!   `svm_recalc_msr_intercepts` in 7.3) and `sev.c` (`sev_es_init_vmcb`, `sev_es_recalc_msr_intercepts`)
//!   never intercept: STAR to SFMASK, SYSENTER, FS and GS bases, EFER, PAT, SPEC_CTRL, PRED_CMD, DEBUGCTL. No
//!   access to them becomes a request, and `sev_es_prevent_msr_access` refuses one that a guest makes up:
//!   with #GP for a read, and for a write KVM_RUN fails with EINVAL (`kvm_emulate_wrmsr`: a negative result
//!   is the caller's), here too ([`refused`]).
//! - TSC_AUX and XSS belong to either group, depending on the processor and the version; they are here.

use std::ops::RangeInclusive;

use snp::ghcb::msr::MSR_GHCB;
use snp::ghcb::msr::MSR_SEV_STATUS;
use snp_model::vcpu::VcpuModel;

use crate::platform::kvm::MsrAccess;

/// Read and written.
const BOTH: [RangeInclusive<u32>; 15] = [
    0x10..=0x12,   // time stamp counter; the old numbers of KVM's clock
    0x1b..=0x1b,   // APIC base
    0x3b..=0x3b,   // TSC adjust
    0x200..=0x20f, // variable MTRRs
    0x250..=0x250, // fixed MTRRs
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,             // MTRR default type
    0x400..=0x47f,             // machine-check banks
    0x6e0..=0x6e0,             // TSC deadline
    0x800..=0x8ff,             // x2APIC
    0xda0..=0xda0,             // XSS
    0x4b56_4d00..=0x4b56_4d07, // KVM's own
    0xc000_0103..=0xc000_0103, // TSC_AUX
    0xc001_0015..=0xc001_0015, // HWCR
];
/// Only read.
const READ: [RangeInclusive<u32>; 7] = [
    0x8b..=0x8b,               // microcode level
    0xfe..=0xfe,               // MTRR capabilities
    0x10a..=0x10a,             // ARCH_CAPABILITIES
    0x179..=0x17b,             // machine-check capabilities, status and control
    0xc001_0010..=0xc001_001f, // SYSCFG and its neighbours
    0xc001_0114..=0xc001_0117, // VM_CR, VM_HSAVE_PA
    0xc001_1029..=0xc001_1029, // DE_CFG
];

/// What an SNP guest always has to itself.
const OWN: [RangeInclusive<u32>; 5] = [
    0x174..=0x176,             // SYSENTER
    0x277..=0x277,             // PAT
    0xc000_0080..=0xc000_0080, // EFER
    0xc000_0081..=0xc000_0084, // STAR to SFMASK
    0xc000_0100..=0xc000_0102, // FS, GS, KERNEL_GS_BASE
];

/// Whether a write ends KVM_RUN.
pub(super) fn refused(index: u32) -> bool {
    OWN.iter().any(|range| range.contains(&index))
}

/// Whether a guest may read the MSR.
pub(super) fn readable(index: u32) -> bool {
    writable(index) || READ.iter().any(|range| range.contains(&index))
}

/// Whether a guest may write it.
pub(super) fn writable(index: u32) -> bool {
    BOTH.iter().any(|range| range.contains(&index))
}

/// The two MSRs that an SNP guest has and the underlying VM does not.
pub(super) fn answer(access: MsrAccess<'_>, model: &mut VcpuModel, sev_status: u64) {
    match access {
        MsrAccess::Read { index: MSR_GHCB, data, .. } => *data = model.read_ghcb_msr(),
        MsrAccess::Read { index: MSR_SEV_STATUS, data, .. } => *data = sev_status,
        MsrAccess::Write { index: MSR_GHCB, data, .. } => model.write_ghcb_msr(data),
        MsrAccess::Read { error, .. } | MsrAccess::Write { error, .. } => *error = 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read-only by AMD64 Architecture Programmer's Manual volume 2, appendix A: PATCH_LEVEL, MTRRcap,
    /// MCG_CAP.
    #[test]
    fn what_is_read_only_for_a_guest_cannot_be_written() {
        for index in [0x8b, 0xfe, 0x179, 0x10a] {
            assert!(readable(index) && !writable(index), "{index:#x}");
        }
        for index in [0x10, 0x830, 0xda0, 0x4b56_4d01, 0xc000_0103] {
            assert!(writable(index), "{index:#x}");
        }
        // The GHCB's own MSR and SEV_STATUS are the model's.
        for index in [0xc001_0130, 0xc001_0131, 0, 0xffff_ffff] {
            assert!(!readable(index), "{index:#x}");
        }
    }

    /// What KVM lets an SNP guest reach without an exit (Linux 6.12.117, `svm.c:direct_access_msrs` where
    /// `always`, and what `svm_init_vmcb` and `sev_es_init_vmcb` add): STAR, LSTAR, CSTAR, SFMASK, SYSENTER,
    /// FS, GS, KERNEL_GS_BASE, EFER, PAT.
    #[test]
    fn what_a_guest_has_to_itself_is_not_reached_through_the_page() {
        let own = [0xc000_0081u32, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0x174, 0x175, 0x176, 0xc000_0100];
        for index in own.into_iter().chain([0xc000_0101, 0xc000_0102, 0xc000_0080, 0x277]) {
            assert!(!readable(index) && refused(index), "{index:#x}");
        }
        assert!(![0x10, 0x830, 0xda0, 0xc000_0103, 0xc001_0130].into_iter().any(refused));
    }
}
