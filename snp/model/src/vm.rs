// SPDX-License-Identifier: Apache-2.0
//! What all vCPUs of one guest share: page states, features, which vCPUs exist.
//!
//! Stands for KVM's `struct kvm_sev_info` and for `sev_snp_ap_creation` of Linux 6.12 and 7.3. No lock of
//! this type is held while a vCPU waits for anything.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use snp::ghcb::exit::ap_creation;
use snp::ghcb::exit::features;
use snp::plan::PAGE_SIZE;
use snp::policy::PolicyRules;
use snp::vmsa::SEV_FEATURE_SNP_ACTIVE;
use snp::vmsa::VmsaState;
use snp::vmsa::decode::VmsaRefusal;

use crate::faults::Faults;
use crate::firmware::Platform;
use crate::launch::Launch;
use crate::memory::GuestMemory;
use crate::memory::View;
use crate::rmp::FAIL_PERMISSION;
use crate::rmp::FAIL_SIZE_MISMATCH;
use crate::rmp::InstructionResult;
use crate::rmp::PAGES_2M;
use crate::rmp::PageStates;
use crate::rmp::SUCCESS;
use crate::rmp::TwoMib;

/// Lowest GHCB protocol version that KVM tells a guest (`GHCB_VERSION_MIN`).
const GHCB_VERSION_MIN: u16 = 1;
/// Highest GHCB protocol version that KVM offers.
pub const GHCB_VERSION_MAX: u16 = 2;

/// What a guest's model is made from.
#[derive(Debug)]
pub struct VmConfig {
    /// The host's firmware, keys and processor.
    pub platform: Arc<Platform>,
    /// Guest RAM, one range for each memory slot, in guest-physical addresses without C-bit; see also
    /// [`PageStates::add_ram`].
    pub ram: Vec<Range<u64>>,
    /// `vmsa_features` that INIT2 takes (`KVM_X86_SEV_VMSA_FEATURES`); 0 unless the host offers more.
    pub vmsa_features: u64,
    /// Policies that START takes.
    pub policy_rules: PolicyRules,
    /// Answer to `PVALIDATE` of 2 MiB.
    pub two_mib: TwoMib,
    /// Faults to inject.
    pub faults: Faults,
}

/// What becomes of a vCPU after an AP creation event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApAction {
    /// Stop it if it runs, load its state from the VMSA at this address by [`VmModel::load_vmsa`], and run
    /// it.
    Run {
        /// Address of the VMSA.
        vmsa_gpa: u64,
    },
    /// Do the same, but only when the vCPU gets an INIT.
    RunOnInit {
        /// Address of the VMSA.
        vmsa_gpa: u64,
    },
    /// Stop it and let it wait for the next creation.
    Stop,
}

/// An AP creation event that concerns an existing vCPU. The guest that asked for it is answered already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApCreation {
    /// The vCPU: its id is its APIC id.
    pub apic_id: u32,
    /// What to do with it.
    pub action: ApAction,
}

/// Why a vCPU cannot start from a VMSA page. Hardware answers `VMEXIT_INVALID`; KVM fails the vCPU's
/// `KVM_RUN`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum VmsaLoadError {
    /// Not RAM.
    #[error("VMSA at {gpa:#x}: not in guest RAM")]
    OutsideRam { gpa: u64 },
    /// Private, validated and marked as VMSA is what the page has to be.
    #[error("VMSA at {gpa:#x}: the page is {state}, but must be private, validated and marked by RMPADJUST")]
    PageState { gpa: u64, state: String },
    /// The vCPU's features are not the guest's.
    #[error("VMSA at {gpa:#x}: SEV features {found:#x}, but this guest has {expected:#x}")]
    Features { gpa: u64, found: u64, expected: u64 },
    /// The registers cannot be loaded.
    #[error("VMSA at {gpa:#x}: {refusal}")]
    State { gpa: u64, refusal: VmsaRefusal },
}

/// One guest, as KVM, RMP and firmware see it. Shared by all vCPU threads.
#[derive(Debug)]
pub struct VmModel {
    /// Page states.
    pub pages: PageStates,
    /// Faults to inject.
    pub faults: Faults,
    platform: Arc<Platform>,
    supported_vmsa_features: u64,
    policy_rules: PolicyRules,
    launch: Mutex<Launch>,
    ghcb_version: AtomicU16,
    sev_features: AtomicU64,
    hypercall_exits: AtomicBool,
    certs_enabled: AtomicBool,
    jump_table: AtomicU64,
    vcpus: Mutex<BTreeSet<u32>>,
}

impl VmModel {
    /// A guest with all pages shared and no vCPU.
    pub fn new(config: VmConfig) -> Self {
        VmModel {
            pages: PageStates::new(&config.ram, config.two_mib),
            faults: config.faults,
            platform: config.platform,
            supported_vmsa_features: config.vmsa_features,
            policy_rules: config.policy_rules,
            launch: Mutex::default(),
            ghcb_version: AtomicU16::new(GHCB_VERSION_MAX),
            sev_features: AtomicU64::new(SEV_FEATURE_SNP_ACTIVE),
            hypercall_exits: AtomicBool::new(false),
            certs_enabled: AtomicBool::new(false),
            jump_table: AtomicU64::new(0),
            vcpus: Mutex::default(),
        }
    }

    /// Position of the C-bit.
    pub fn c_bit(&self) -> u8 {
        self.platform.c_bit
    }

    /// The host.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    pub(crate) fn supported_vmsa_features(&self) -> u64 {
        self.supported_vmsa_features
    }

    pub(crate) fn policy_rules(&self) -> PolicyRules {
        self.policy_rules
    }

    pub(crate) fn launch(&self) -> MutexGuard<'_, Launch> {
        self.launch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_ghcb_version(&self, version: u16) {
        self.ghcb_version.store(version, Relaxed);
    }

    /// Whether `KVM_CAP_EXIT_HYPERCALL` was enabled with bit 12 (`KVM_HC_MAP_GPA_RANGE`).
    pub fn set_hypercall_exits(&self, enabled: bool) {
        self.hypercall_exits.store(enabled, Relaxed);
    }

    pub(crate) fn hypercall_exits(&self) -> bool {
        self.hypercall_exits.load(Relaxed)
    }

    /// Extended guest requests become exits.
    pub(crate) fn set_certs_enabled(&self) {
        self.certs_enabled.store(true, Relaxed);
    }

    pub(crate) fn certs_enabled(&self) -> bool {
        self.certs_enabled.load(Relaxed)
    }

    pub(crate) fn set_jump_table(&self, address: u64) {
        self.jump_table.store(address, Relaxed);
    }

    pub(crate) fn jump_table(&self) -> u64 {
        self.jump_table.load(Relaxed)
    }

    /// SEV features of the guest's vCPUs, bit 0 (SNP) included.
    pub fn sev_features(&self) -> u64 {
        self.sev_features.load(Relaxed)
    }

    /// Features asked for by `KVM_SEV_INIT2`; SNP is added, as KVM does.
    pub(crate) fn set_sev_features(&self, features: u64) {
        self.sev_features.store(features | SEV_FEATURE_SNP_ACTIVE, Relaxed);
    }

    /// Value of the SEV_STATUS MSR: SEV, SEV-ES, and the features from bit 2 on. The guest cannot write it.
    pub fn sev_status(&self) -> u64 {
        self.sev_features() << 2 | 3
    }

    /// Lowest and highest GHCB protocol version on offer.
    pub(crate) fn ghcb_versions(&self) -> (u16, u16) {
        self.faults.ghcb_versions.unwrap_or((GHCB_VERSION_MIN, self.ghcb_version.load(Relaxed)))
    }

    /// Hypervisor features on offer: `GHCB_HV_FT_SUPPORTED` of KVM.
    pub(crate) fn hypervisor_features(&self) -> u64 {
        if self.faults.no_snp_features { 0 } else { features::SNP | features::AP_CREATION }
    }

    /// Adds a vCPU; false if it exists.
    pub(crate) fn add_vcpu(&self, id: u32) -> bool {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).insert(id)
    }

    pub(crate) fn vcpu_count(&self) -> usize {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn has_vcpu(&self, id: u32) -> bool {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }

    /// The `PVALIDATE` instruction at `gpa`; see [`PageStates::pvalidate`].
    pub fn pvalidate(&self, gpa: u64, c_bit: bool, rcx: u64, rdx: u64) -> InstructionResult {
        if self.faults.pvalidate_no_change.fire() {
            return InstructionResult::Done { eax: SUCCESS, carry: true };
        }
        if self.faults.pvalidate_size_mismatch.fire() {
            return InstructionResult::Done { eax: FAIL_SIZE_MISMATCH, carry: false };
        }
        self.pages.pvalidate(gpa, c_bit, rcx, rdx)
    }

    /// The `RMPADJUST` instruction at `gpa`; see [`PageStates::rmpadjust`].
    pub fn rmpadjust(&self, gpa: u64, c_bit: bool, rcx: u64, rdx: u64) -> InstructionResult {
        if self.faults.rmpadjust_permission.fire() {
            return InstructionResult::Done { eax: FAIL_PERMISSION, carry: false };
        }
        self.pages.rmpadjust(gpa, c_bit, rcx, rdx)
    }

    /// An AP creation event (`sev_snp_ap_creation`): what to do with a vCPU, and whether the guest asked
    /// rightly. A wrong request leaves its target as it was (Linux 6.12.117 and 7.3.4). Features must be the
    /// guest's own (7.3.4, and 6.17 before it; 6.12.117 compares the two bits that select how interrupts are
    /// injected).
    pub(crate) fn ap_creation(
        &self,
        request: u32,
        apic_id: u32,
        vmsa_gpa: u64,
        sev_features: u64,
    ) -> (Option<ApCreation>, bool) {
        if !self.has_vcpu(apic_id) {
            return (None, false);
        }
        let action = match request {
            ap_creation::DESTROY => ApAction::Stop,
            _ if sev_features != self.sev_features() => return (None, false),
            ap_creation::CREATE => ApAction::Run { vmsa_gpa },
            ap_creation::CREATE_ON_INIT => ApAction::RunOnInit { vmsa_gpa },
            _ => return (None, false),
        };
        // An unaligned page; and one where a 2 MiB page would collide with the VMSA's RMP entry (an erratum
        // of the CPU).
        let unusable = !vmsa_gpa.is_multiple_of(PAGE_SIZE) || vmsa_gpa.is_multiple_of(PAGE_SIZE * PAGES_2M);
        if action != ApAction::Stop && unusable {
            return (None, false);
        }
        if action != ApAction::Stop && self.faults.drop_ap_creation.fire() {
            return (None, true);
        }
        (Some(ApCreation { apic_id, action }), true)
    }

    /// Reads the registers with which a vCPU starts after an AP creation. The page's state is checked now,
    /// when the VMSA is used, as hardware does at VMRUN.
    pub fn load_vmsa(&self, mem: &dyn GuestMemory, gpa: u64) -> Result<VmsaState, VmsaLoadError> {
        let state = self.pages.state(gpa).ok_or(VmsaLoadError::OutsideRam { gpa })?;
        if !(state.usable() && state.vmsa()) {
            return Err(VmsaLoadError::PageState { gpa, state: format!("{state:?}") });
        }
        let mut page = [0; PAGE_SIZE as usize];
        mem.read(gpa, View::Private, &mut page).map_err(|_| VmsaLoadError::OutsideRam { gpa })?;
        let vmsa = VmsaState::decode(&page)
            .and_then(|vmsa| vmsa.check_loadable().map(|()| vmsa))
            .map_err(|refusal| VmsaLoadError::State { gpa, refusal })?;
        let (found, expected) = (vmsa.sev_features, self.sev_features());
        if found != expected {
            return Err(VmsaLoadError::Features { gpa, found, expected });
        }
        Ok(vmsa)
    }
}
