// SPDX-License-Identifier: Apache-2.0
//! Executes a launch plan on a platform: the second interpreter of the plan, next to the digest.
//!
//! The order of calls is the one that KVM enforces (Linux, `arch/x86/kvm/svm/sev.c`): INIT2, memory,
//! attributes, START, UPDATE in plan order, vCPU registers, FINISH. Every failure names its step.

mod error;
mod signals;
pub mod tamper;
mod update;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use error::LaunchError;
use error::call;
use error::command;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use snp::digest::Measured;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::pages::cpuid_diff::CpuidDiff;
use snp::pages::cpuid_entry::Register;
use snp::pages::cpuid_raw::RawCpuid;
use snp::plan::Bytes;
use snp::plan::LaunchPlan;
use snp::plan::Record;
use snp::policy::GuestPolicy;
use snp::vmsa::SEV_FEATURE_SNP_ACTIVE;
pub(crate) use update::Updater;

use crate::machine::ram::GuestRam;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::Vcpu;
use crate::platform::Vm;
use crate::platform::memory::MemorySlot;
use crate::platform::registers;
use crate::platform::sev::Snp;

/// The GHCB protocol version that is asked for.
const GHCB_VERSION: u16 = 2;

/// What a launch needs beside the plan.
#[derive(Clone, Debug, Default)]
pub struct LaunchOptions {
    /// The guest policy.
    pub policy: GuestPolicy,
    /// 32 bytes that the host puts into every report of the guest.
    pub host_data: [u8; 32],
    /// The owner's signed ID block.
    pub identity: Option<(IdBlock, IdAuth)>,
    /// Launch with the firmware's CPUID page where it refuses ours, if every change is on the list of
    /// acceptable ones.
    pub accept_cpuid: bool,
    /// What CPUID gives on the platform's processors, if known: bits that KVM made up beyond it may be lost
    /// without being asked.
    pub host_cpuid: Option<RawCpuid>,
    /// What starts is firmware. It uses some pages as shared without asking ([`crate::machine::implicit`]),
    /// and starts the other vCPUs by INIT and SIPI. A kernel announces every change, and starts them by AP
    /// creation.
    pub firmware: bool,
    /// Memory that the guest validates before anything else, where that is known; ascending.
    pub validated_at_start: Vec<Range<u64>>,
}

/// What stage0 fetches from memory that the host can write to. Not measured.
#[derive(Clone, Debug, Default)]
pub struct Staged {
    /// Guest-physical address and contents.
    pub bytes: Vec<(u64, Bytes)>,
    /// RAM that is shared when the guest starts, ascending; all other RAM is private.
    pub shared: Vec<Range<u64>>,
    /// A staged byte that the host keeps changing, for tests ([`crate::launch::tamper`]).
    pub raced: Option<u64>,
}

/// An SNP guest whose VM has its RAM and vCPUs.
pub struct Assembled<'a> {
    /// The VM, initialised by [`init_snp`].
    pub vm: &'a dyn Vm,
    /// What enters it.
    pub measured: &'a Measured,
    /// What it finds in shared memory.
    pub staged: &'a Staged,
    /// The shared side of its RAM.
    pub ram: &'a GuestRam,
    /// Its vCPUs.
    pub vcpus: &'a mut [Box<dyn Vcpu>],
    /// The CPUID tables that they were given.
    pub cpuid: &'a [Vec<kvm_cpuid_entry2>],
}

/// Gives `vm` its RAM. For an SNP guest each region gets a guest_memfd, which is returned, in the order of
/// the regions.
pub fn add_memory(vm: &dyn Vm, ram: &GuestRam, snp: bool) -> Result<Vec<Arc<OwnedFd>>, LaunchError> {
    let mut memfds = Vec::new();
    for (slot, region) in (0u32..).zip(ram.regions()) {
        let private = if snp {
            let memfd = Arc::new(
                vm.create_guest_memfd(region.mapping.len()).map_err(call("creating the private memory"))?,
            );
            memfds.push(Arc::clone(&memfd));
            Some((memfd, 0))
        } else {
            None
        };
        vm.set_memory(MemorySlot { slot, gpa: region.gpa, shared: Arc::clone(&region.mapping), private })
            .map_err(call(format!("adding guest RAM at {:#x}", region.gpa)))?;
    }
    Ok(memfds)
}

/// Places the plan of a plain guest: records are copied, registers are set.
pub fn load_plain(plan: &LaunchPlan, ram: &GuestRam, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), LaunchError> {
    for record in &plan.records {
        let bytes = record.contents.as_slice();
        if !bytes.is_empty() {
            ram.write(record.gpa, bytes).map_err(|_| not_ram(record))?;
        }
    }
    set_registers(plan, vcpus)
}

/// Prepares an SNP VM for the vCPUs of `plan`: `KVM_SEV_INIT2`, page-state exits. Before any vCPU.
pub fn init_snp(vm: &dyn Snp, plan: &LaunchPlan) -> Result<(), LaunchError> {
    vm.enable_map_gpa_range_exit().map_err(call("enabling page-state changes"))?;
    // The features are measured with each vCPU, so they are what the plan says; KVM adds SNP_ACTIVE itself,
    // and refuses it.
    let expected = plan.vcpus.first().map_or(SEV_FEATURE_SNP_ACTIVE, |state| state.sev_features);
    if let Some((vcpu, state)) = plan.vcpus.iter().enumerate().find(|(_, s)| s.sev_features != expected) {
        return Err(LaunchError::Features { vcpu, found: state.sev_features, expected });
    }
    let mut init = kvm_sev_init {
        vmsa_features: expected & !SEV_FEATURE_SNP_ACTIVE,
        ghcb_version: GHCB_VERSION,
        ..Default::default()
    };
    vm.sev_init2(&mut init).map_err(command("creating an SNP guest"))
}

/// Launches `guest`. Returns what the firmware changed in the CPUID page, if that was accepted.
pub fn launch_snp(guest: Assembled<'_>, options: &LaunchOptions) -> Result<Option<CpuidDiff>, LaunchError> {
    let Assembled { vm, measured, staged, ram, vcpus, cpuid } = guest;
    let plan = measured.plan();
    let commands = vm.snp_commands().map_err(call("launching an SNP guest"))?;
    let _no_signals = signals::Blocked::all();
    if vcpus.len() != plan.vcpus.len() {
        return Err(LaunchError::VcpuCount { planned: plan.vcpus.len(), found: vcpus.len() });
    }
    if let Some((block, auth)) = &options.identity {
        // FINISH seals the vCPUs before the firmware looks at the block: there is no second try.
        auth.check(block, measured.digest(), options.policy)?;
    }
    share_memory(vm, ram, staged)?;
    let mut start = kvm_sev_snp_launch_start { policy: options.policy.0, ..Default::default() };
    commands
        .snp_launch_start(&mut start)
        .map_err(command(format!("starting the launch with policy {}", options.policy)))?;
    let mut updater = Updater::new(commands, options.accept_cpuid, options.host_cpuid.as_ref());
    for record in &plan.records {
        updater.add(record)?;
    }
    let accepted = updater.accepted;
    if let Some(diff) = &accepted {
        agree(vcpus, cpuid, diff)?;
    }
    set_registers(plan, vcpus)?;
    for (vcpu, (real, planned)) in vcpus.iter().zip(&plan.vcpus).enumerate() {
        let found = registers::read_back(real.as_ref(), planned)
            .map_err(call(format!("reading back the registers of vCPU {vcpu}")))?;
        if let Some(mismatch) = found {
            return Err(LaunchError::Register { vcpu, mismatch, digest: measured.digest() });
        }
    }
    let mut finish = kvm_sev_snp_launch_finish { host_data: options.host_data, ..Default::default() };
    let identity = options.identity.as_ref().map(|(block, auth)| (block.encode(), auth.encode()));
    // The block always needs its auth page; this flag is about the author's part of that page alone.
    finish.auth_key_en = u8::from(options.identity.as_ref().is_some_and(|(_, auth)| auth.author.is_some()));
    commands
        .snp_launch_finish(&mut finish, identity.as_ref().map(|(block, auth)| (block, auth)))
        .map_err(command("finishing the launch"))?;
    // Where the platform knows what its firmware measured.
    match commands.measured() {
        Some(found) if found != measured.digest() => {
            Err(LaunchError::Digest { measured: found, predicted: measured.digest() })
        }
        _ => Ok(accepted),
    }
}

/// Makes RAM private but for what is staged, and fills in the latter.
fn share_memory(vm: &dyn Vm, ram: &GuestRam, staged: &Staged) -> Result<(), LaunchError> {
    let set = |step: &str, address: u64, size, attributes| {
        vm.set_memory_attributes(kvm_memory_attributes { address, size, attributes, flags: 0 })
            .map_err(call(format!("{step} at {address:#x}")))
    };
    for region in ram.regions() {
        set("making guest RAM private", region.gpa, region.mapping.len(), ATTRIBUTE_PRIVATE)?;
    }
    for range in &staged.shared {
        set("sharing staging memory", range.start, range.end - range.start, 0)?;
    }
    for (gpa, bytes) in &staged.bytes {
        let bytes = bytes.as_slice();
        ram.write(*gpa, bytes).map_err(|_| LaunchError::Staging { gpa: *gpa, len: bytes.len() as u64 })?;
    }
    Ok(())
}

/// Gives the vCPUs the values of an accepted CPUID page: the guest asks KVM itself before it has found the
/// page.
fn agree(
    vcpus: &mut [Box<dyn Vcpu>],
    cpuid: &[Vec<kvm_cpuid_entry2>],
    diff: &CpuidDiff,
) -> Result<(), LaunchError> {
    for (id, (vcpu, entries)) in vcpus.iter_mut().zip(cpuid).enumerate() {
        let mut entries = entries.clone();
        for d in &diff.differences {
            for entry in entries.iter_mut().filter(|e| e.function == d.leaf && e.index == d.subleaf) {
                *match d.register {
                    Register::Eax => &mut entry.eax,
                    Register::Ebx => &mut entry.ebx,
                    Register::Ecx => &mut entry.ecx,
                    Register::Edx => &mut entry.edx,
                } = d.accepted;
            }
        }
        vcpu.set_cpuid(&entries).map_err(call(format!("setting the accepted CPUID of vCPU {id}")))?;
    }
    Ok(())
}

fn set_registers(plan: &LaunchPlan, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), LaunchError> {
    for (id, (vcpu, state)) in vcpus.iter_mut().zip(&plan.vcpus).enumerate() {
        registers::load(vcpu.as_mut(), state).map_err(call(format!("setting the registers of vCPU {id}")))?;
    }
    Ok(())
}

fn not_ram(record: &Record) -> LaunchError {
    LaunchError::NotRam { name: record.name.to_string(), gpa: record.gpa, end: record.end() }
}
