// SPDX-License-Identifier: Apache-2.0
//! What an emulated VM and its vCPUs share: the underlying VM, its memory, the model, and how far the guest
//! has come.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use kvm_bindings::KVM_CAP_DISABLE_QUIRKS2;
use kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR;
use kvm_bindings::KVM_MSR_EXIT_REASON_FILTER;
use kvm_bindings::KVM_X86_QUIRK_FIX_HYPERCALL_INSN;
use kvm_bindings::kvm_enable_cap;
use kvm_ioctls::MsrFilterDefaultAction;
use kvm_ioctls::MsrFilterRange;
use kvm_ioctls::MsrFilterRangeFlags;
use snp::ghcb::msr::MSR_GHCB;
use snp::vmsa::VmsaState;
use snp_model::faults::Faults;
use snp_model::firmware::Platform as Firmware;
use snp_model::memory::GuestMemory;
use snp_model::memory::View;
use snp_model::patch::CodeHints;
use snp_model::patch::CodeMemory;
use snp_model::patch::PatchError;
use snp_model::patch::Ports;
use snp_model::patch::stage0_sites;
use snp_model::vm::ApAction;
use snp_model::vm::ApCreation;
use snp_model::vm::VmConfig;
use snp_model::vm::VmModel;

use super::options::EmulatedOptions;
use super::options::POLICY_RULES;
use super::options::VMSA_FEATURES;
use super::registers::Recorded;
use super::statistics::Meter;
use super::views::Views;
use super::wake::Order;
use super::wake::Wake;
use crate::lock::lock;
use crate::platform::error::CallError;
use crate::platform::kvm::KvmVm;

/// One vCPU, as the VM knows it.
struct KnownVcpu {
    id: u32,
    recorded: Arc<Mutex<Recorded>>,
    wake: Arc<Wake>,
}

/// What runs in the guest, as far as the platform follows it. Each is left once, by the first vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Nothing yet, or stage0.
    #[default]
    Stage0,
    /// The kernel's decompressor.
    Decompressor,
    /// The kernel proper, or firmware.
    Kernel,
}

/// What the VM and its vCPUs share. Declared so that the underlying VM goes before the memory that it refers
/// to.
pub struct VmShared {
    pub(super) kvm: KvmVm,
    pub(super) views: Views,
    pub(super) ports: Ports,
    pub(super) model: VmModel,
    pub(super) meter: Meter,
    options: EmulatedOptions,
    code: CodeHints,
    /// Numbers of memory slots, of RAM and of devices.
    pub(super) slots: Mutex<HashSet<u32>>,
    members: Mutex<Vec<KnownVcpu>>,
    begun: Mutex<bool>,
    stage: Mutex<Stage>,
}

/// The private view, as code to patch.
struct Code<'a>(&'a Views);

impl CodeMemory for Code<'_> {
    fn read(&mut self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        GuestMemory::read(self.0, gpa, View::Private, bytes).map_err(io::Error::other)
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        GuestMemory::write(self.0, gpa, View::Private, bytes).map_err(io::Error::other)
    }
}

fn patch_failed(e: PatchError) -> CallError {
    CallError {
        call: "patching the SNP instructions that the guest has put in memory",
        source: io::Error::other(e),
    }
}

impl VmShared {
    pub(super) fn new(
        kvm: KvmVm,
        options: EmulatedOptions,
        firmware: Arc<Firmware>,
        code: CodeHints,
        faults: Faults,
    ) -> Result<Self, CallError> {
        intercept_msrs(&kvm)?;
        keep_hypercalls(&kvm)?;
        let model = VmModel::new(VmConfig {
            platform: firmware,
            ram: Vec::new(),
            vmsa_features: VMSA_FEATURES,
            policy_rules: POLICY_RULES,
            two_mib: options.two_mib,
            faults,
        });
        let views = Views::new(options.clone(), model.c_bit());
        Ok(VmShared {
            kvm,
            views,
            model,
            ports: Ports::default(),
            meter: Meter::default(),
            options,
            code,
            slots: Mutex::default(),
            members: Mutex::default(),
            begun: Mutex::default(),
            stage: Mutex::default(),
        })
    }

    pub(super) fn c_mask(&self) -> u64 {
        1 << self.model.c_bit()
    }

    /// What the guest did with its pages, if that was asked for.
    pub(super) fn statistics(&self) -> Option<String> {
        self.options.statistics.then(|| self.meter.report(&self.model.pages))
    }

    pub(super) fn strict(&self) -> bool {
        self.options.strict
    }

    /// After LAUNCH_FINISH the registers are encrypted; KVM refuses to read or write them.
    pub(super) fn unsealed(&self) -> Result<(), CallError> {
        match self.model.registers_sealed() {
            true => {
                Err(CallError::errno("the vCPU's registers are sealed since LAUNCH_FINISH", libc::EINVAL))
            }
            false => Ok(()),
        }
    }

    /// When the guest first runs, after the launch: patches what is in memory. Not part of FINISH, which only
    /// measures.
    pub(super) fn begin(&self) -> Result<(), CallError> {
        let mut begun = lock(&self.begun);
        if *begun {
            return Ok(());
        }
        if self.code.stage0 {
            stage0_sites().patch_at_launch(&mut Code(&self.views), &self.ports).map_err(patch_failed)?;
        } else {
            self.begin_kernel()?;
        }
        *begun = true;
        self.meter.begin();
        Ok(())
    }

    /// When the kernel's file is in memory and will run next: at the start, or when stage0 has checked it.
    /// Patches it, and aliases the views until the kernel proper runs. stage0 itself needs no alias: it lies
    /// in the first MiB, and has the C-bit in CR3 before it looks beyond.
    pub(super) fn begin_kernel(&self) -> Result<(), CallError> {
        let Some(annotations) = &self.code.kernel else {
            *lock(&self.stage) = Stage::Kernel;
            return Ok(());
        };
        annotations.patch_at_launch(&mut Code(&self.views), &self.ports).map_err(patch_failed)?;
        if annotations.decompressor.is_some() {
            *lock(&self.stage) = Stage::Decompressor;
            return self.views.begin_alias(&self.kvm, &self.model.pages);
        }
        *lock(&self.stage) = Stage::Kernel;
        Ok(())
    }

    /// Patches the kernel proper, whose entry point turned out to be at `entry`.
    pub(super) fn patch_kernel(&self, entry: u64) -> Result<(), CallError> {
        let Some(annotations) = &self.code.kernel else { return Ok(()) };
        *lock(&self.stage) = Stage::Kernel;
        let base = annotations.kernel.base_from_entry(entry);
        annotations.kernel.patch(&mut Code(&self.views), base, &self.ports).map_err(patch_failed)
    }

    /// What runs now.
    pub(super) fn stage(&self) -> Stage {
        *lock(&self.stage)
    }

    /// From here on the vCPU is measured, and can be given orders.
    pub(super) fn join(&self, id: u32, recorded: &Arc<Mutex<Recorded>>, wake: &Arc<Wake>) {
        let (recorded, wake) = (Arc::clone(recorded), Arc::clone(wake));
        lock(&self.members).push(KnownVcpu { id, recorded, wake });
    }

    /// The vCPUs' registers, as the launch measures them.
    pub(super) fn vmsas(&self) -> Vec<VmsaState> {
        let features = self.model.sev_features();
        lock(&self.members).iter().map(|m| lock(&m.recorded).vmsa(features)).collect()
    }

    /// Starts or stops a vCPU.
    pub(super) fn order(&self, creation: ApCreation) {
        let order = match creation.action {
            ApAction::Run { vmsa_gpa } => Order::Run { vmsa_gpa },
            // KVM starts it at an INIT, and does not even wake it before; no INIT comes to pass here.
            ApAction::RunOnInit { .. } => return,
            ApAction::Stop => Order::Stop,
        };
        let members = lock(&self.members);
        let wake = members.iter().find(|m| m.id == creation.apic_id).map(|m| Arc::clone(&m.wake));
        // Not with the lock: the target may need it for an order of its own.
        drop(members);
        if let Some(wake) = wake {
            wake.give(order);
        }
    }
}

/// Makes the guest's accesses to the GHCB MSR, and to `SEV_STATUS` behind it, exits to the monitor.
pub(super) fn intercept_msrs(kvm: &KvmVm) -> Result<(), CallError> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
    cap.args[0] = KVM_MSR_EXIT_REASON_FILTER.into();
    kvm.fd.enable_cap(&cap).map_err(CallError::of("KVM_ENABLE_CAP(KVM_CAP_X86_USER_SPACE_MSR)"))?;
    // A clear bit denies the access to KVM, so that it comes here: the GHCB MSR and SEV_STATUS behind it.
    let filter = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: MSR_GHCB,
        msr_count: 2,
        bitmap: &[0],
    };
    kvm.fd
        .set_msr_filter(MsrFilterDefaultAction::ALLOW, &[filter])
        .map_err(CallError::of("KVM_X86_SET_MSR_FILTER"))
}

/// Keeps KVM from writing into the guest's code. On an Intel CPU VMMCALL, and a VMGEXIT that was not
/// replaced, is an undefined instruction, over which KVM writes VMCALL: three bytes, and the fourth of a
/// VMGEXIT is then executed on its own (Linux 6.12, arch/x86/kvm/x86.c, `emulator_fix_hypercall`). Without
/// that quirk the guest gets #UD. An old KVM does not let go of it.
fn keep_hypercalls(kvm: &KvmVm) -> Result<(), CallError> {
    let quirks = kvm.fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    if quirks & KVM_X86_QUIRK_FIX_HYPERCALL_INSN as i32 == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
    cap.args[0] = KVM_X86_QUIRK_FIX_HYPERCALL_INSN.into();
    kvm.fd.enable_cap(&cap).map_err(CallError::of("KVM_ENABLE_CAP(KVM_CAP_DISABLE_QUIRKS2)"))
}
