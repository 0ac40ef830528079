// SPDX-License-Identifier: Apache-2.0
//! What an SNP VM has beside an ordinary one: the launch, as `KVM_MEMORY_ENCRYPT_OP` commands (Linux,
//! `Documentation/virt/kvm/x86/amd-memory-encryption.rst`), and page-state changes as exits.

use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use kvm_bindings::kvm_sev_snp_launch_update;
use snp::digest::LaunchDigest;

use super::error::CallError;
use super::error::SevError;

/// The commands, in the order in which a launch issues them.
pub trait Snp: Send + Sync {
    /// `KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL)` for `KVM_HC_MAP_GPA_RANGE`.
    fn enable_map_gpa_range_exit(&self) -> Result<(), CallError>;
    /// `KVM_SEV_INIT2`.
    fn sev_init2(&self, init: &mut kvm_sev_init) -> Result<(), SevError>;
    /// `KVM_SEV_SNP_LAUNCH_START`.
    fn snp_launch_start(&self, start: &mut kvm_sev_snp_launch_start) -> Result<(), SevError>;
    /// `KVM_SEV_SNP_LAUNCH_UPDATE`. `source` begins at a page, is what `update.uaddr` points to, which this
    /// call sets, and is not used for ZERO pages. The kernel advances `update` and may write a corrected
    /// CPUID page back into `source`.
    fn snp_launch_update(
        &self,
        update: &mut kvm_sev_snp_launch_update,
        source: &mut [u8],
    ) -> Result<(), SevError>;
    /// `KVM_SEV_SNP_LAUNCH_FINISH`; `id` is the ID block and its authentication page.
    fn snp_launch_finish(
        &self,
        finish: &mut kvm_sev_snp_launch_finish,
        id: Option<(&[u8; 96], &[u8; 4096])>,
    ) -> Result<(), SevError>;
    /// The launch digest as the firmware computed it, where the platform can know: hardware tells it only to
    /// the guest.
    fn measured(&self) -> Option<LaunchDigest> {
        None
    }
    /// `KVM_SEV_SNP_ENABLE_REQ_CERTS` (Linux 7.0): extended guest requests become
    /// [`Exit::ReqCerts`](super::exit::Exit::ReqCerts). After `KVM_SEV_INIT2` and before any vCPU exists
    /// (`snp_enable_certs`).
    fn snp_enable_req_certs(&self) -> Result<(), SevError>;
}
