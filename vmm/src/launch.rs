// SPDX-License-Identifier: Apache-2.0
//! Executes a launch plan on a platform: the second interpreter of the plan, next to the digest.
//!
//! The order of calls is the one that KVM enforces (Linux, `arch/x86/kvm/svm/sev.c`): INIT2, memory, attributes, START,
//! UPDATE in plan order, vCPU registers, FINISH. Every failure names its step.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use kvm_bindings::kvm_sev_snp_launch_update;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::plan::Bytes;
use snp::plan::LaunchPlan;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;
use snp::plan::Record;
use snp::policy::GuestPolicy;

use crate::memory::GuestRam;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::CallError;
use crate::platform::MemorySlot;
use crate::platform::SevError;
use crate::platform::Vcpu;
use crate::platform::Vm;
use crate::registers;

/// How much of a record one `LAUNCH_UPDATE` takes from the scratch buffer, in bytes.
const CHUNK: u64 = 1 << 20;
/// How often a step that answers EAGAIN is tried again.
const MAX_RETRIES: u32 = 16;
/// The GHCB protocol version that is asked for.
const GHCB_VERSION: u16 = 2;

/// What a launch needs beside the plan.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// The guest policy.
    pub policy: GuestPolicy,
    /// 32 bytes that the host puts into every report of the guest.
    pub host_data: [u8; 32],
    /// The owner's signed ID block. Checked by the caller: a launch has one try at it.
    pub identity: Option<(IdBlock, IdAuth)>,
}

/// What stage0 fetches from memory that the host can write to. Not measured.
#[derive(Clone, Debug, Default)]
pub struct Staged {
    /// Guest-physical address and contents.
    pub bytes: Vec<(u64, Bytes)>,
    /// RAM that is shared when the guest starts, ascending; all other RAM is private.
    pub shared: Vec<Range<u64>>,
}

/// A launch step that failed.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A KVM call.
    #[error("{step}: {source}")]
    Call {
        /// What was being done.
        step: &'static str,
        /// What failed.
        source: CallError,
    },
    /// A SEV command.
    #[error("{step}: {source}")]
    Sev {
        /// What was being done.
        step: String,
        /// What failed.
        source: SevError,
    },
    /// A record that is not RAM.
    #[error("{name}: the guest has no RAM at {gpa:#x}..{end:#x}")]
    NotRam {
        /// The record.
        name: String,
        /// Its address.
        gpa: u64,
        /// Its end.
        end: u64,
    },
    /// Staged bytes that are not for RAM.
    #[error("staging {len:#x} bytes at {gpa:#x} for stage0: the guest has no RAM there")]
    Staging {
        /// Where they should go.
        gpa: u64,
        /// How many.
        len: u64,
    },
    /// The update made no progress.
    #[error("{name}: KVM took no page at {gpa:#x} in {MAX_RETRIES} tries (EAGAIN)")]
    NoProgress {
        /// The record.
        name: String,
        /// Where it stands.
        gpa: u64,
    },
    /// Memory for the launch itself.
    #[error("no memory for the launch: {0}")]
    Memory(#[from] io::Error),
}

fn call(step: &'static str) -> impl Fn(CallError) -> LaunchError {
    move |source| LaunchError::Call { step, source }
}

/// Gives `vm` its RAM. For an SNP guest each region gets a guest_memfd, which is returned, in the order of the regions.
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
            .map_err(call("adding guest RAM"))?;
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

/// Prepares an SNP VM: `KVM_SEV_INIT2`, page-state exits. Before any vCPU.
pub fn init_snp(vm: &dyn Vm) -> Result<(), LaunchError> {
    vm.enable_map_gpa_range_exit().map_err(call("enabling page-state changes"))?;
    let mut init = kvm_sev_init { ghcb_version: GHCB_VERSION, ..Default::default() };
    vm.sev_init2(&mut init)
        .map_err(|source| LaunchError::Sev { step: "creating an SNP guest".into(), source })
}

/// Launches the plan of an SNP guest whose VM is initialised and has its RAM and vCPUs.
pub fn launch_snp(
    vm: &dyn Vm,
    plan: &LaunchPlan,
    staged: &Staged,
    options: &LaunchOptions,
    ram: &GuestRam,
    vcpus: &mut [Box<dyn Vcpu>],
) -> Result<(), LaunchError> {
    let set = |address, size, attributes| {
        vm.set_memory_attributes(kvm_memory_attributes { address, size, attributes, flags: 0 })
    };
    for region in ram.regions() {
        set(region.gpa, region.mapping.len(), ATTRIBUTE_PRIVATE).map_err(call("making guest RAM private"))?;
    }
    for range in &staged.shared {
        set(range.start, range.end - range.start, 0).map_err(call("sharing staging memory"))?;
    }
    for (gpa, bytes) in &staged.bytes {
        let bytes = bytes.as_slice();
        ram.write(*gpa, bytes).map_err(|_| LaunchError::Staging { gpa: *gpa, len: bytes.len() as u64 })?;
    }
    let mut start = kvm_sev_snp_launch_start { policy: options.policy.0, ..Default::default() };
    vm.snp_launch_start(&mut start).map_err(|source| LaunchError::Sev {
        step: format!("starting the launch with policy {}", options.policy),
        source,
    })?;
    let mut scratch = vec![0; CHUNK as usize];
    for record in &plan.records {
        update(vm, record, &mut scratch)?;
    }
    set_registers(plan, vcpus)?;
    let mut finish = kvm_sev_snp_launch_finish { host_data: options.host_data, ..Default::default() };
    let identity = options.identity.as_ref().map(|(block, auth)| (block.encode(), auth.encode()));
    // The block always needs its auth page; this flag is about the author's part of that page alone.
    let author = options.identity.as_ref().is_some_and(|(_, auth)| auth.author.is_some());
    finish.auth_key_en = u8::from(author);
    vm.snp_launch_finish(&mut finish, identity.as_ref().map(|(block, auth)| (block, auth)))
        .map_err(|source| LaunchError::Sev { step: "finishing the launch".into(), source })
}

/// Adds one record, as many calls as it takes: KVM may take part of what it is given.
fn update(vm: &dyn Vm, record: &Record, scratch: &mut [u8]) -> Result<(), LaunchError> {
    let bytes = record.contents.as_slice();
    let zero = record.page_type == PageType::Zero;
    let mut done = 0;
    let mut retries = 0;
    while done < record.len {
        let len = if zero { record.len - done } else { (record.len - done).min(CHUNK) };
        let source = if zero { &mut [][..] } else { &mut scratch[..len as usize] };
        if !zero {
            let from = (done as usize).min(bytes.len());
            let part = &bytes[from..bytes.len().min(from + len as usize)];
            source[..part.len()].copy_from_slice(part);
            source[part.len()..].fill(0);
        }
        let mut args = kvm_sev_snp_launch_update {
            gfn_start: (record.gpa + done) / PAGE_SIZE,
            len,
            type_: record.page_type as u8,
            ..Default::default()
        };
        let result = vm.snp_launch_update(&mut args, source);
        // Progress counts even if the call failed: the next call reports the page that stopped it.
        let taken = len - args.len.min(len);
        done += taken;
        match result {
            Ok(()) => {}
            Err(e) if e.errno == libc::EAGAIN && (taken > 0 || retries < MAX_RETRIES) => {}
            Err(e) if e.errno == libc::EAGAIN => {
                return Err(LaunchError::NoProgress {
                    name: record.name.to_string(),
                    gpa: record.gpa + done,
                });
            }
            Err(source) => {
                return Err(LaunchError::Sev {
                    step: format!(
                        "adding {} ({} page at {:#x})",
                        record.name,
                        record.page_type,
                        record.gpa + done
                    ),
                    source,
                });
            }
        }
        retries = if taken > 0 { 0 } else { retries + 1 };
        if retries > MAX_RETRIES {
            return Err(LaunchError::NoProgress { name: record.name.to_string(), gpa: record.gpa + done });
        }
    }
    Ok(())
}

fn set_registers(plan: &LaunchPlan, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), LaunchError> {
    for (vcpu, state) in vcpus.iter_mut().zip(&plan.vcpus) {
        registers::load(vcpu.as_mut(), state).map_err(call("setting a vCPU's registers"))?;
    }
    Ok(())
}

fn not_ram(record: &Record) -> LaunchError {
    LaunchError::NotRam { name: record.name.to_string(), gpa: record.gpa, end: record.end() }
}
