// SPDX-License-Identifier: Apache-2.0
//! What the firmware keeps for one guest, and the launch commands that build it.
//!
//! SEV-SNP Firmware ABI 1.58, sections 8.16 `SNP_LAUNCH_START`, 8.17 `SNP_LAUNCH_UPDATE`, 8.18
//! `SNP_LAUNCH_FINISH` and 8.26 `SNP_GUEST_REQUEST`. The digest is computed here from the bytes that really
//! entered the guest, by code of its own: a launch that differs from its plan shows in the guest's report.

use rand_core::CryptoRngCore;
use sha2::Digest as _;
use sha2::Sha384;
use snp::digest::LaunchDigest;
use snp::firmware_status::FwStatus;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;
use snp::vmsa::VMSA_GPA;
use zeroize::Zeroizing;

use crate::firmware::FIRMWARE_VERSION;
use crate::firmware::Platform;
use crate::firmware::cpuid_page;
use crate::firmware::identity::Identity;

/// Highest bit that a policy may have: 25, `PAGE_SWAP_DISABLE`.
const POLICY_KNOWN: u64 = (1 << 26) - 1;
const POLICY_SMT: u64 = 1 << 16;
const POLICY_RESERVED_ONE: u64 = 1 << 17;

/// Offsets in the secrets page.
mod secrets {
    pub const VERSION: usize = 0x0;
    pub const FMS: usize = 0x8;
    pub const GOSVW: usize = 0x10;
    pub const VMPCK0: usize = 0x20;
}
/// Version of the secrets page.
const SECRETS_VERSION: u32 = 3;
/// Processor signature in the secrets page, as in CPUID function 1 EAX: Milan, family 0x19, model 1, stepping
/// 1.
const SECRETS_FMS: u32 = 0x00a0_0f11;

/// A page of guest memory.
pub type Page = [u8; PAGE_SIZE as usize];

/// How far a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between start and finish.
    Launching,
    /// Finished.
    Running,
}

/// Operands of `SNP_LAUNCH_FINISH`.
#[derive(Clone, Debug, Default)]
pub struct Finish {
    /// Shown in reports.
    pub host_data: [u8; 32],
    /// Do not sign reports with the VCEK.
    pub vcek_disabled: bool,
    /// ID block, checked by the caller against digest and policy; see [`GuestContext::digest`].
    pub identity: Identity,
}

/// One guest of the firmware.
pub struct GuestContext {
    state: State,
    pub(crate) policy: u64,
    gosvw: [u8; 16],
    pub(crate) digest: LaunchDigest,
    pub(super) vmpcks: Zeroizing<[[u8; 32]; 4]>,
    pub(super) sequence: [u64; 4],
    pub(crate) vmrk: Zeroizing<[u8; 32]>,
    pub(crate) report_id: [u8; 32],
    pub(crate) host_data: [u8; 32],
    pub(crate) vcek_disabled: bool,
    pub(crate) identity: Identity,
}

impl std::fmt::Debug for GuestContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // No keys.
        f.debug_struct("GuestContext")
            .field("state", &self.state)
            .field("policy", &self.policy)
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

impl GuestContext {
    /// `SNP_LAUNCH_START`.
    pub fn start(policy: u64, gosvw: [u8; 16], rng: &mut dyn CryptoRngCore) -> Result<Self, FwStatus> {
        // AMD-ASPFW, `sev_mcmd.c:snp_mcmd_launch_start`: whatever is wrong with a policy has one status.
        if policy & !POLICY_KNOWN != 0 || policy & POLICY_RESERVED_ONE == 0 {
            return Err(FwStatus::POLICY_FAILURE);
        }
        let [_, minor, major] = FIRMWARE_VERSION;
        let wanted = ((policy >> 8) as u8, policy as u8);
        // The platform has SMT on, and none of the features that bits 22 to 25 ask for.
        if wanted > (major, minor) || policy & POLICY_SMT == 0 || policy >> 22 != 0 {
            return Err(FwStatus::POLICY_FAILURE);
        }
        let mut context = GuestContext {
            state: State::Launching,
            policy,
            gosvw,
            digest: LaunchDigest::START,
            vmpcks: Zeroizing::default(),
            sequence: [0; 4],
            vmrk: Zeroizing::default(),
            report_id: [0; 32],
            host_data: [0; 32],
            vcek_disabled: false,
            identity: Identity::default(),
        };
        context.vmpcks.iter_mut().for_each(|key| rng.fill_bytes(key));
        rng.fill_bytes(context.vmrk.as_mut_slice());
        rng.fill_bytes(&mut context.report_id);
        Ok(context)
    }

    /// The digest of what has entered the guest so far.
    pub fn digest(&self) -> LaunchDigest {
        self.digest
    }

    /// The guest policy.
    pub fn policy(&self) -> u64 {
        self.policy
    }

    /// Whether the launch is finished.
    pub fn is_running(&self) -> bool {
        self.state == State::Running
    }

    /// `SNP_LAUNCH_UPDATE` of one page. `page` holds the bytes that the host put there, and afterwards those
    /// that the guest will find. A refused CPUID page holds the values that would be accepted.
    pub fn update(
        &mut self,
        platform: &Platform,
        page_type: PageType,
        gpa: u64,
        page: &mut Page,
    ) -> Result<(), FwStatus> {
        if self.state != State::Launching {
            return Err(FwStatus::INVALID_GUEST_STATE);
        }
        let gpa = match page_type {
            PageType::Normal | PageType::Unmeasured => gpa,
            PageType::Vmsa => VMSA_GPA,
            PageType::Zero => {
                page.fill(0);
                gpa
            }
            PageType::Secrets => {
                self.fill_secrets(page);
                gpa
            }
            PageType::Cpuid => {
                if !cpuid_page::check(page, &platform.processor, platform.c_bit) {
                    return Err(FwStatus::INVALID_PARAM);
                }
                gpa
            }
        };
        self.digest = extend(self.digest, page_type, gpa, page);
        Ok(())
    }

    fn fill_secrets(&self, page: &mut Page) {
        page.fill(0);
        page[secrets::VERSION..][..4].copy_from_slice(&SECRETS_VERSION.to_le_bytes());
        page[secrets::FMS..][..4].copy_from_slice(&SECRETS_FMS.to_le_bytes());
        page[secrets::GOSVW..][..16].copy_from_slice(&self.gosvw);
        for (i, key) in self.vmpcks.iter().enumerate() {
            page[secrets::VMPCK0 + i * 32..][..32].copy_from_slice(key);
        }
    }

    /// `SNP_LAUNCH_FINISH`.
    pub fn finish(&mut self, finish: Finish) -> Result<(), FwStatus> {
        if self.state != State::Launching {
            return Err(FwStatus::INVALID_GUEST_STATE);
        }
        self.host_data = finish.host_data;
        self.vcek_disabled = finish.vcek_disabled;
        self.identity = finish.identity;
        self.state = State::Running;
        Ok(())
    }
}

/// Section 8.17.2, `PAGE_INFO`: written apart from [`LaunchDigest::extend`], so that predicted and launched
/// digests come from two pieces of code.
fn extend(digest: LaunchDigest, page_type: PageType, gpa: u64, page: &Page) -> LaunchDigest {
    let contents: [u8; 48] = match page_type {
        PageType::Normal | PageType::Vmsa => Sha384::digest(page).into(),
        PageType::Zero | PageType::Unmeasured | PageType::Secrets | PageType::Cpuid => [0; 48],
    };
    let mut hash = Sha384::new();
    hash.update(digest.0);
    hash.update(contents);
    hash.update(0x70u16.to_le_bytes());
    // Type, IMI page, permissions of VMPL 3, 2, 1, reserved.
    hash.update([page_type as u8, 0, 0, 0, 0, 0]);
    hash.update(gpa.to_le_bytes());
    LaunchDigest(hash.finalize().into())
}

#[cfg(test)]
#[path = "context_test.rs"]
mod tests;
