// SPDX-License-Identifier: Apache-2.0
//! An emulated SNP VM: launch commands go to the model, memory to the two views.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use kvm_bindings::KVM_CAP_DISABLE_QUIRKS2;
use kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR;
use kvm_bindings::KVM_MSR_EXIT_REASON_FILTER;
use kvm_bindings::KVM_X86_QUIRK_FIX_HYPERCALL_INSN;
use kvm_bindings::kvm_enable_cap;
use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use kvm_bindings::kvm_sev_snp_launch_update;
use kvm_ioctls::MsrFilterDefaultAction;
use kvm_ioctls::MsrFilterRange;
use kvm_ioctls::MsrFilterRangeFlags;
use rustix::fs::MemfdFlags;
use snp::digest::LaunchDigest;
use snp::ghcb::msr::MSR_GHCB;
use snp_model::commands;
use snp_model::commands::CommandError;
use snp_model::faults::Faults;
use snp_model::firmware::Platform as Firmware;
use snp_model::memory::GuestMemory;
use snp_model::memory::View;
use snp_model::patch::CodeHints;
use snp_model::patch::CodeMemory;
use snp_model::patch::PatchError;
use snp_model::patch::Ports;
use snp_model::patch::shim_sites;
use snp_model::vm::ApAction;
use snp_model::vm::ApCreation;
use snp_model::vm::VmConfig;
use snp_model::vm::VmModel;
use vmm_sys_util::eventfd::EventFd;

use super::EmulatedOptions;
use super::registers::Recorded;
use super::statistics::Meter;
use super::vcpu::EmulatedVcpu;
use super::views::Views;
use super::wake::Order;
use super::wake::Wake;
use crate::memory::PAGE;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::CallError;
use crate::platform::MemorySlot;
use crate::platform::SevError;
use crate::platform::Vcpu;
use crate::platform::Vm;
use crate::platform::kvm::KvmVm;

/// One vCPU, as the VM knows it.
struct Member {
    id: u32,
    recorded: Arc<Mutex<Recorded>>,
    wake: Arc<Wake>,
}

/// What runs in the guest, as far as the platform follows it. Each is left once, by the first vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Nothing yet, or stage0.
    #[default]
    Shim,
    /// The kernel's decompressor.
    Decompressor,
    /// The kernel proper, or firmware.
    Kernel,
}

/// What the VM and its vCPUs share. Declared so that the underlying VM goes before the memory that it refers to.
pub struct Inner {
    pub(super) kvm: KvmVm,
    pub(super) views: Views,
    pub(super) ports: Ports,
    pub(super) model: VmModel,
    pub(super) meter: Meter,
    options: EmulatedOptions,
    code: CodeHints,
    members: Mutex<Vec<Member>>,
    begun: Mutex<bool>,
    stage: Mutex<Stage>,
}

/// The VM.
pub struct EmulatedVm(pub(super) Arc<Inner>);

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

impl Inner {
    pub(super) fn c_mask(&self) -> u64 {
        1 << self.model.c_bit()
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

    /// When the guest first runs, after the launch: patches what is in memory. Not part of FINISH, which only measures.
    pub(super) fn begin(&self) -> Result<(), CallError> {
        let mut begun = lock(&self.begun);
        if *begun {
            return Ok(());
        }
        if self.code.stage0 {
            shim_sites().patch_at_launch(&mut Code(&self.views), &self.ports).map_err(patch_failed)?;
        } else {
            self.begin_kernel()?;
        }
        *begun = true;
        self.meter.begin();
        Ok(())
    }

    /// When the kernel's file is in memory and will run next: at the start, or when stage0 has checked it. Patches it, and
    /// aliases the views until the kernel proper runs. stage0 itself needs no alias: it lies in the first MiB, and has the
    /// C-bit in CR3 before it looks beyond.
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
        lock(&self.members).push(Member { id, recorded, wake });
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

/// Keeps KVM from writing into the guest's code. On an Intel CPU VMMCALL, and a VMGEXIT that was not replaced, is an undefined
/// instruction, over which KVM writes VMCALL: three bytes, and the fourth of a VMGEXIT is then executed on its own
/// (Linux 6.12, arch/x86/kvm/x86.c, `emulator_fix_hypercall`). Without that quirk the guest gets #UD. An old KVM does not let go of it.
fn keep_hypercalls(kvm: &KvmVm) -> Result<(), CallError> {
    let quirks = kvm.fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    if quirks & KVM_X86_QUIRK_FIX_HYPERCALL_INSN as i32 == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
    cap.args[0] = KVM_X86_QUIRK_FIX_HYPERCALL_INSN.into();
    kvm.fd.enable_cap(&cap).map_err(CallError::of("KVM_ENABLE_CAP(KVM_CAP_DISABLE_QUIRKS2)"))
}

impl EmulatedVm {
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
            vmsa_features: super::VMSA_FEATURES,
            policy_rules: super::POLICY_RULES,
            two_mib: options.two_mib,
            faults,
        });
        let views = Views::new(options.clone(), model.c_bit());
        Ok(EmulatedVm(Arc::new(Inner {
            kvm,
            views,
            model,
            ports: Ports::default(),
            meter: Meter::default(),
            options,
            code,
            members: Mutex::default(),
            begun: Mutex::default(),
            stage: Mutex::default(),
        })))
    }
}

impl Vm for EmulatedVm {
    fn create_irqchip(&self) -> Result<(), CallError> {
        self.0.kvm.create_irqchip()
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), CallError> {
        self.0.kvm.register_irqfd(fd, gsi)
    }

    fn enable_map_gpa_range_exit(&self) -> Result<(), CallError> {
        self.0.model.set_hypercall_exits(true);
        Ok(())
    }

    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, CallError> {
        let fail = |call| move |e: rustix::io::Errno| CallError { call, source: e.into() };
        let fd = rustix::fs::memfd_create("cvmm-private", MemfdFlags::CLOEXEC)
            .map_err(fail("memfd_create for a guest_memfd"))?;
        rustix::fs::ftruncate(&fd, size).map_err(fail("ftruncate of a guest_memfd"))?;
        Ok(fd)
    }

    fn set_memory(&self, slot: MemorySlot) -> Result<(), CallError> {
        if slot.private.is_none() {
            return self.0.views.add_shared_only(&self.0.kvm, slot);
        }
        let range = slot.gpa..slot.gpa.saturating_add(slot.shared.len());
        self.0.views.add(&self.0.kvm, slot)?;
        match self.0.model.pages.add_ram(range) {
            true => Ok(()),
            false => Err(CallError::errno("KVM_SET_USER_MEMORY_REGION2 (too many slots)", libc::EINVAL)),
        }
    }

    fn set_memory_attributes(&self, attributes: kvm_memory_attributes) -> Result<(), CallError> {
        const CALL: &str = "KVM_SET_MEMORY_ATTRIBUTES";
        let vm = &self.0;
        let (start, len) = (attributes.address, attributes.size);
        let private = attributes.attributes & ATTRIBUTE_PRIVATE != 0;
        let end = start.checked_add(len).ok_or(CallError::errno(CALL, libc::EINVAL))?;
        vm.model
            .set_attributes(start, len, attributes.attributes, attributes.flags)
            .map_err(|errno| CallError::errno(CALL, errno.0))?;
        vm.views.attribute_changed(&vm.kvm, &vm.model.pages, start..end, private)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CallError> {
        let vcpu = self.0.kvm.new_vcpu(id)?;
        let recorded = Arc::new(Mutex::new(Recorded::new(vcpu.get_regs()?, vcpu.get_sregs()?)));
        let wake = Wake::new().map_err(|source| CallError { call: "eventfd for a vCPU", source })?;
        let wake = Arc::new(wake);
        let unmeasured = self.0.model.registers_sealed();
        self.0.model.create_vcpu(id).map_err(|errno| CallError::errno("KVM_CREATE_VCPU", errno.0))?;
        self.0.join(id, &recorded, &wake);
        Ok(Box::new(EmulatedVcpu::new(id, Arc::clone(&self.0), vcpu, recorded, wake, unmeasured)))
    }

    fn sev_init2(&self, init: &mut kvm_sev_init) -> Result<(), SevError> {
        let args = commands::Init2 {
            vmsa_features: init.vmsa_features,
            flags: init.flags,
            ghcb_version: init.ghcb_version,
        };
        self.0.model.init2(&args).map_err(failed("KVM_SEV_INIT2"))
    }

    fn snp_launch_start(&self, start: &mut kvm_sev_snp_launch_start) -> Result<(), SevError> {
        let args = commands::Start { policy: start.policy, gosvw: start.gosvw, flags: start.flags };
        self.0.model.launch_start(&args, &mut rand_core::OsRng).map_err(failed("KVM_SEV_SNP_LAUNCH_START"))
    }

    fn snp_launch_update(
        &self,
        update: &mut kvm_sev_snp_launch_update,
        source: &mut [u8],
    ) -> Result<(), SevError> {
        let mut args = commands::Update {
            gfn_start: update.gfn_start,
            uaddr: source.as_ptr().addr() as u64,
            len: update.len,
            page_type: update.type_,
            flags: update.flags,
        };
        let result = self.0.model.launch_update(&mut args, source, &self.0.views);
        let launched = update.gfn_start * PAGE..args.gfn_start * PAGE;
        let opened = self.0.views.validation_changed(&self.0.model.pages, launched, true);
        (update.gfn_start, update.uaddr, update.len) = (args.gfn_start, args.uaddr, args.len);
        result.map_err(failed("KVM_SEV_SNP_LAUNCH_UPDATE"))?;
        opened.map_err(|e| SevError {
            command: "KVM_SEV_SNP_LAUNCH_UPDATE",
            errno: e.source.raw_os_error().unwrap_or(libc::EIO),
            firmware: 0,
        })
    }

    fn snp_launch_finish(
        &self,
        finish: &mut kvm_sev_snp_launch_finish,
        id: Option<(&[u8; 96], &[u8; 4096])>,
    ) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_SEV_SNP_LAUNCH_FINISH";
        let vm = &self.0;
        let args = commands::FinishArgs {
            id,
            auth_key_en: finish.auth_key_en != 0,
            vcek_disabled: finish.vcek_disabled != 0,
            host_data: finish.host_data,
            flags: finish.flags,
        };
        let features = vm.model.sev_features();
        let vmsas: Vec<_> = lock(&vm.members).iter().map(|m| lock(&m.recorded).vmsa(features)).collect();
        vm.model.launch_finish(&args, &vmsas).map_err(failed(COMMAND))
    }

    fn measured(&self) -> Option<LaunchDigest> {
        self.0.model.launch_digest()
    }

    fn snp_enable_req_certs(&self) -> Result<(), SevError> {
        self.0.model.enable_req_certs().map_err(failed("KVM_SEV_SNP_ENABLE_REQ_CERTS"))
    }

    fn statistics(&self) -> Option<String> {
        self.0.options.statistics.then(|| self.0.meter.report(&self.0.model.pages))
    }
}

fn failed(command: &'static str) -> impl Fn(CommandError) -> SevError {
    move |e| SevError { command, errno: e.errno.0, firmware: e.firmware.0 }
}
