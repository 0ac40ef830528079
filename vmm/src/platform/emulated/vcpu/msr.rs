// SPDX-License-Identifier: Apache-2.0
//! Which MSRs a guest may reach through its communication page.
//!
//! On hardware KVM carries such a request out as the guest's own instruction (`svm_invoke_exit_handler`, then
//! `kvm_emulate_rdmsr` and `kvm_emulate_wrmsr`). The calls that this platform has, KVM_GET_MSRS and KVM_SET_MSRS, act as the host:
//! they write what is read-only for a guest, such as the microcode's level. So only those that Linux guests use are passed on;
//! others raise #GP, as an MSR that is not there.

use std::ops::RangeInclusive;

/// Read and written.
const BOTH: [RangeInclusive<u32>; 20] = [
    0x10..=0x12,   // time stamp counter; the old numbers of KVM's clock
    0x1b..=0x1b,   // APIC base
    0x3b..=0x3b,   // TSC adjust
    0x48..=0x49,   // SPEC_CTRL, PRED_CMD
    0x174..=0x176, // SYSENTER
    0x1d9..=0x1d9, // DEBUGCTL
    0x200..=0x20f, // variable MTRRs
    0x250..=0x250, // fixed MTRRs
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,             // PAT
    0x2ff..=0x2ff,             // MTRR default type
    0x400..=0x47f,             // machine-check banks
    0x6e0..=0x6e0,             // TSC deadline
    0x800..=0x8ff,             // x2APIC
    0xda0..=0xda0,             // XSS
    0x4b56_4d00..=0x4b56_4d07, // KVM's own
    0xc000_0081..=0xc000_0084, // STAR to SFMASK
    0xc000_0100..=0xc000_0103, // FS, GS, KERNEL_GS_BASE, TSC_AUX
    0xc001_0015..=0xc001_0015, // HWCR
];
/// Only read.
const READ: [RangeInclusive<u32>; 8] = [
    0x8b..=0x8b,               // microcode level
    0xfe..=0xfe,               // MTRR capabilities
    0x10a..=0x10a,             // ARCH_CAPABILITIES
    0x179..=0x17b,             // machine-check capabilities, status and control
    0xc000_0080..=0xc000_0080, // EFER: it is written without this detour, and VMRUN refuses some of its values
    0xc001_0010..=0xc001_001f, // SYSCFG and its neighbours
    0xc001_0114..=0xc001_0117, // VM_CR, VM_HSAVE_PA
    0xc001_1029..=0xc001_1029, // DE_CFG
];

/// Whether a guest may read the MSR.
pub(super) fn readable(index: u32) -> bool {
    writable(index) || READ.iter().any(|range| range.contains(&index))
}

/// Whether a guest may write it.
pub(super) fn writable(index: u32) -> bool {
    BOTH.iter().any(|range| range.contains(&index))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read-only by AMD64 Architecture Programmer's Manual volume 2, appendix A: PATCH_LEVEL, MTRRcap, MCG_CAP.
    #[test]
    fn what_is_read_only_for_a_guest_cannot_be_written() {
        for index in [0x8b, 0xfe, 0x179, 0x10a, 0xc000_0080] {
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
}
