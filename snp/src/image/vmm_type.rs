// SPDX-License-Identifier: Apache-2.0
//! What monitors put into a vCPU's registers when firmware starts: the same firmware has one digest per
//! monitor.
//!
//! Sources, since no specification covers this: the register values that `sev-snp-measure` 0.0.13 and the
//! `sev` crate 8.0.0 found on the monitors (both are oracles of the tests), and Linux's `sev_es_sync_vmsa`.
//! Where the two differ (EC2's RDX), `docs/measurement.md` says which is followed and why.

use std::fmt;
use std::str::FromStr;

use crate::vmsa::Segment;
use crate::vmsa::VmsaState;

/// Whose launch is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VmmType {
    /// This project's monitor: for firmware, the same registers as QEMU's.
    #[default]
    Cvmm,
    /// QEMU on a kernel with `KVM_SEV_INIT2` (about 6.10 and later).
    Qemu,
    /// Amazon EC2.
    Ec2,
    /// Google Compute Engine.
    Gce,
    /// libkrun, as the `sev` crate models it.
    Krun,
}

/// A name that is no monitor's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("monitor '{0}' is not known: cvmm, qemu, ec2, gce and krun are")]
pub struct UnknownVmm(String);

/// What the user chooses about every vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuSetup {
    /// CPUID leaf 1 EAX of the vCPU model, which monitors leave in RDX; see [`crate::image::vcpu_model`].
    pub signature: u32,
    /// The complete `sev_features`: what was requested, and bit 0 for SNP.
    pub sev_features: u64,
}

impl VmmType {
    /// All of them.
    pub const ALL: [VmmType; 5] = [VmmType::Cvmm, VmmType::Qemu, VmmType::Ec2, VmmType::Gce, VmmType::Krun];

    /// Whether the digest depends on the vCPU model.
    pub fn uses_signature(self) -> bool {
        matches!(self, VmmType::Cvmm | VmmType::Qemu)
    }

    /// The registers of a vCPU that starts at `eip` in real mode.
    pub fn reset_state(self, eip: u32, setup: VcpuSetup) -> VmsaState {
        let mut state = VmsaState::reset();
        state.cs.base = u64::from(eip & 0xffff_0000);
        state.rip = u64::from(eip & 0xffff);
        state.sev_features = setup.sev_features;
        match self {
            VmmType::Cvmm | VmmType::Qemu => state.rdx = setup.signature.into(),
            VmmType::Ec2 | VmmType::Krun => {
                state.ss.attrib = 0x92;
                state.tr.attrib = 0x83;
                if self == VmmType::Krun || eip == 0xffff_fff0 {
                    state.cs.attrib = 0x9a;
                }
                // libkrun clears RDX; EC2 leaves what KVM's vCPU reset put there.
                state.rdx = if self == VmmType::Krun { 0 } else { 0x600 };
                state.mxcsr = 0;
                state.x87_fcw = 0;
            }
            VmmType::Gce => {
                state.g_pat = 0x0007_0106;
                state.rdx = 0x600;
                state.mxcsr = 0;
                state.x87_fcw = 0;
            }
        }
        state
    }
}

impl FromStr for VmmType {
    type Err = UnknownVmm;

    fn from_str(name: &str) -> Result<Self, UnknownVmm> {
        let known = VmmType::ALL.into_iter().find(|vmm| vmm.to_string().eq_ignore_ascii_case(name));
        known.ok_or_else(|| UnknownVmm(name.to_owned()))
    }
}

impl fmt::Display for VmmType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            VmmType::Cvmm => "cvmm",
            VmmType::Qemu => "qemu",
            VmmType::Ec2 => "ec2",
            VmmType::Gce => "gce",
            VmmType::Krun => "krun",
        })
    }
}

/// The registers of every vCPU of a guest that starts in an SVSM: flat 32-bit protected mode at `eip`.
///
/// `sev-snp-measure` leaves the x87 control word at zero here, unlike in its QEMU mode, and is followed.
pub fn svsm_state(eip: u32, setup: VcpuSetup) -> VmsaState {
    let data = Segment::new(16, 0xc93, 0xffff_ffff, 0);
    VmsaState {
        es: data,
        cs: Segment::new(8, 0xc9b, 0xffff_ffff, 0),
        ss: data,
        ds: data,
        fs: data,
        cr0: 0x11,
        rip: eip.into(),
        rdx: setup.signature.into(),
        sev_features: setup.sev_features,
        x87_fcw: 0,
        ..VmsaState::reset()
    }
}
