// SPDX-License-Identifier: Apache-2.0
//! KVM's SEV commands: their order, what each one checks, and the errno of each refusal.
//!
//! Stands for `sev_mem_enc_ioctl` (`arch/x86/kvm/svm/sev.c`) and the functions that it calls; each method and
//! each check names its own. Where Linux 6.12 to 7.3 differ, the model is as strict as the strictest of them,
//! so that what launches here launches on each. As in KVM, an errno alone says little: with -EIO and a
//! firmware status the firmware said no, with -EIO and status 0 KVM did, and hides why.

use std::fmt;

use rand_core::CryptoRngCore;
use snp::digest::LaunchDigest;
use snp::firmware_status::FwStatus;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;
use snp::policy::GuestPolicy;
use snp::vmsa::VmsaState;

use crate::errno::Errno;
use crate::faults::Injection;
use crate::faults::Step;
use crate::firmware::context::Finish;
use crate::firmware::context::GuestContext;
use crate::firmware::context::Page;
use crate::firmware::id_block;
use crate::launch::Launch;
use crate::memory::GuestMemory;
use crate::memory::View;
use crate::rmp::AttributeChange;
use crate::vm::GHCB_VERSION_MAX;
use crate::vm::VmModel;

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
pub const ATTRIBUTE_PRIVATE: u64 = 1 << 3;
/// DR7 without a breakpoint; the only value that KVM puts into a VMSA.
const DR7_FIXED: u64 = 0x400;

/// A failed command: `kvm_sev_cmd.error` beside the errno.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CommandError {
    /// The errno of the ioctl.
    pub errno: Errno,
    /// The firmware's status, 0 if it was not asked.
    pub firmware: FwStatus,
}

impl CommandError {
    const fn kvm(errno: Errno) -> Self {
        CommandError { errno, firmware: FwStatus(0) }
    }

    /// The driver answers -EIO whatever the firmware's status (`__sev_do_cmd_locked`).
    const fn firmware(status: FwStatus) -> Self {
        CommandError { errno: Errno::EIO, firmware: status }
    }
}

impl std::error::Error for CommandError {}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.firmware {
            FwStatus(0) => write!(f, "{}, no firmware verdict", self.errno),
            status => write!(f, "{}, firmware status {status}", self.errno),
        }
    }
}

impl fmt::Debug for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `kvm_sev_init`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "names are those of the kernel's struct")]
pub struct Init2 {
    pub vmsa_features: u64,
    pub flags: u32,
    pub ghcb_version: u16,
}

/// `kvm_sev_snp_launch_start`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "names are those of the kernel's struct")]
pub struct Start {
    pub policy: u64,
    pub gosvw: [u8; 16],
    pub flags: u16,
}

/// `kvm_sev_snp_launch_update`; the call advances it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "names are those of the kernel's struct")]
pub struct Update {
    pub gfn_start: u64,
    pub uaddr: u64,
    pub len: u64,
    pub page_type: u8,
    pub flags: u16,
}

/// `kvm_sev_snp_launch_finish`, with what its pointers point to.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "names are those of the kernel's struct")]
pub struct FinishArgs<'a> {
    /// ID block and ID authentication page, if `id_block_en`.
    pub id: Option<(&'a [u8; 96], &'a [u8; 4096])>,
    pub auth_key_en: bool,
    pub vcek_disabled: bool,
    pub host_data: [u8; 32],
    pub flags: u16,
}

/// Why a vCPU cannot be run yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunRefusal {
    /// `KVM_RUN` fails (`sev->need_init`).
    Errno(Errno),
    /// The processor refuses the state, as its VMSA is not there yet: `KVM_EXIT_FAIL_ENTRY`.
    FailEntry,
}

impl VmModel {
    fn inject(&self, step: Step) -> Option<Injection> {
        let fault = self.faults.commands.iter().find(|fault| fault.step == step && fault.trigger.fire())?;
        Some(fault.injection)
    }

    /// Fails if a fault is to be injected at a step other than [`Step::UpdatePage`].
    fn inject_error(&self, step: Step) -> Result<(), CommandError> {
        match self.inject(step) {
            None => Ok(()),
            Some(Injection::Errno(errno)) => Err(CommandError::kvm(errno)),
            Some(Injection::Firmware(status)) => Err(CommandError::firmware(status)),
            Some(Injection::Stop) => Err(CommandError::kvm(Errno::EINTR)),
        }
    }

    /// `KVM_SEV_INIT2`: `sev_guest_init2` and `__sev_guest_init`.
    pub fn init2(&self, args: &Init2) -> Result<(), CommandError> {
        let mut launch = self.launch();
        // sev_mem_enc_ioctl: an SNP guest takes no command below LAUNCH_START.
        if !matches!(*launch, Launch::Created) {
            return Err(CommandError::kvm(Errno::EPERM));
        }
        let refused = self.vcpu_count() != 0
            || args.flags != 0
            || args.vmsa_features & !self.supported_vmsa_features() != 0
            || args.ghcb_version > GHCB_VERSION_MAX
            // Version 1 has no SNP: refused by `__sev_guest_init` of Linux 7.2 and 7.3, taken by that of
            // 6.12.
            || args.ghcb_version == 1;
        if refused {
            return Err(CommandError::kvm(Errno::EINVAL));
        }
        self.inject_error(Step::Init2)?;
        self.set_sev_features(args.vmsa_features);
        // GHCB_VERSION_DEFAULT for zero.
        self.set_ghcb_version(if args.ghcb_version == 0 { GHCB_VERSION_MAX } else { args.ghcb_version });
        *launch = Launch::Initialised;
        Ok(())
    }

    /// `KVM_SEV_SNP_ENABLE_REQ_CERTS` of Linux 7.0: `snp_enable_certs`.
    pub fn enable_req_certs(&self) -> Result<(), CommandError> {
        if self.vcpu_count() != 0 || matches!(*self.launch(), Launch::Created) {
            return Err(CommandError::kvm(Errno::EINVAL));
        }
        self.set_certs_enabled();
        Ok(())
    }

    /// `KVM_CREATE_VCPU`. The id is the APIC id: AP creation finds vCPUs by it (`sev_snp_ap_creation`).
    pub fn create_vcpu(&self, id: u32) -> Result<(), Errno> {
        if let Err(error) = self.inject_error(Step::CreateVcpu) {
            return Err(error.errno);
        }
        // kvm_vm_ioctl_create_vcpu (Linux 6.12 and 7.3): also after FINISH. Such a vCPU has no measured VMSA,
        // and can only be started by the guest's AP creation.
        if self.add_vcpu(id) { Ok(()) } else { Err(Errno::EEXIST) }
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`: `kvm_vm_ioctl_set_mem_attributes`. Addresses without RAM are accepted.
    pub fn set_attributes(
        &self,
        address: u64,
        size: u64,
        attributes: u64,
        flags: u64,
    ) -> Result<AttributeChange, Errno> {
        let unaligned = !address.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE);
        let wraps = size == 0 || address.checked_add(size).is_none();
        if flags != 0 || attributes & !ATTRIBUTE_PRIVATE != 0 || wraps || unaligned {
            return Err(Errno::EINVAL);
        }
        self.inject_error(Step::SetAttributes).map_err(|error| error.errno)?;
        Ok(self.pages.set_private(address, size / PAGE_SIZE, attributes != 0))
    }

    /// `KVM_SEV_SNP_LAUNCH_START`: `snp_launch_start`. `rng` gives the guest's keys.
    pub fn launch_start(&self, args: &Start, rng: &mut dyn CryptoRngCore) -> Result<(), CommandError> {
        let mut launch = self.launch();
        match *launch {
            Launch::Created => return Err(CommandError::kvm(Errno::ENOTTY)),
            Launch::Initialised => {}
            // A context exists.
            Launch::Launching { .. } | Launch::Running(_) => return Err(CommandError::kvm(Errno::EINVAL)),
        }
        let policy = GuestPolicy(args.policy);
        if args.flags != 0 || policy.check_kvm(self.policy_rules()).is_err() {
            return Err(CommandError::kvm(Errno::EINVAL));
        }
        self.inject_error(Step::Start)?;
        // A context that the firmware refuses is given back, and START may be tried again.
        let context = GuestContext::start(args.policy, args.gosvw, rng).map_err(CommandError::firmware)?;
        *launch = Launch::Launching { context: Box::new(context), sealed: false };
        Ok(())
    }

    /// `KVM_SEV_SNP_LAUNCH_UPDATE`: `snp_launch_update`, `kvm_gmem_populate` and `sev_gmem_post_populate`.
    /// `source` holds what `uaddr` points to, and for a refused CPUID page receives the corrected one; it is
    /// not used for ZERO pages. On success `args` has advanced, maybe not to the end: call again until its
    /// length is 0.
    pub fn launch_update(
        &self,
        args: &mut Update,
        source: &mut [u8],
        mem: &dyn GuestMemory,
    ) -> Result<(), CommandError> {
        let mut launch = self.launch();
        let context = match &mut *launch {
            Launch::Created | Launch::Initialised => return Err(CommandError::kvm(Errno::EINVAL)),
            Launch::Launching { context, .. } | Launch::Running(context) => context,
        };
        let invalid = CommandError::kvm(Errno::EINVAL);
        let page_type = match args.page_type {
            1 => PageType::Normal,
            3 => PageType::Zero,
            4 => PageType::Unmeasured,
            5 => PageType::Secrets,
            6 => PageType::Cpuid,
            _ => return Err(invalid),
        };
        // A length of 0 is EINVAL in 7.2 and 7.3; 6.12 does nothing and succeeds.
        if args.len == 0 || !args.len.is_multiple_of(PAGE_SIZE) || args.flags != 0 {
            return Err(invalid);
        }
        // The source is pinned page by page in 7.2 and 7.3 (`kvm_gmem_populate`), so its address is one of a
        // page; 6.12 copies from any address. ZERO pages have no source.
        if page_type != PageType::Zero && (args.uaddr == 0 || !args.uaddr.is_multiple_of(PAGE_SIZE)) {
            return Err(invalid);
        }
        // The memslot of the first page must exist; a call ends at the end of it.
        let first = args.gfn_start.checked_mul(PAGE_SIZE).filter(|gpa| self.pages.state(*gpa).is_some());
        let Some(first) = first else { return Err(invalid) };
        let pages = (args.len / PAGE_SIZE).min(self.pages.run_in_slot(first));
        let mut done = 0;
        let mut error = None;
        while done < pages {
            let at = usize::try_from(done * PAGE_SIZE).unwrap_or(usize::MAX);
            let page = source.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<{ PAGE_SIZE as usize }>());
            if let Err(why) = self.update_page(context, page_type, first + done * PAGE_SIZE, page, mem) {
                error = Some(why);
                break;
            }
            done += 1;
        }
        if done == 0
            && let Some(error) = error
        {
            return Err(error);
        }
        args.gfn_start += done;
        args.len -= done * PAGE_SIZE;
        if page_type != PageType::Zero {
            args.uaddr = args.uaddr.wrapping_add(done * PAGE_SIZE);
        }
        Ok(())
    }

    fn update_page(
        &self,
        context: &mut GuestContext,
        page_type: PageType,
        gpa: u64,
        source: Option<&mut Page>,
        mem: &dyn GuestMemory,
    ) -> Result<(), CommandError> {
        // KVM hides the reason for refusing a page.
        let hidden = CommandError::kvm(Errno::EIO);
        match self.inject(Step::UpdatePage) {
            None => {}
            Some(Injection::Errno(errno)) => return Err(CommandError::kvm(errno)),
            Some(Injection::Firmware(status)) => return Err(CommandError::firmware(status)),
            Some(Injection::Stop) => return Err(hidden),
        }
        // Private by attribute, and not populated before.
        self.pages.launchable(gpa).map_err(|_| hidden)?;
        let mut page = [0; PAGE_SIZE as usize];
        let source = match (page_type, source) {
            (PageType::Zero, _) => None,
            (_, None) => return Err(hidden),
            (_, Some(source)) => {
                page = *source;
                Some(source)
            }
        };
        if let Err(status) = context.update(self.platform(), page_type, gpa, &mut page) {
            if let (PageType::Cpuid, FwStatus::INVALID_PARAM, Some(source)) = (page_type, status, source) {
                *source = page;
            }
            return Err(CommandError::firmware(status));
        }
        mem.write(gpa, View::Private, &page).map_err(|_| hidden)?;
        self.pages.launch(gpa).map_err(|_| hidden)
    }

    /// `KVM_SEV_SNP_LAUNCH_FINISH`: `snp_launch_finish` and `snp_launch_update_vmsa`. `vmsas` are the states
    /// of all vCPUs in the order of their creation; they are measured and sealed first, so a failure is
    /// final.
    pub fn launch_finish(&self, args: &FinishArgs, vmsas: &[VmsaState]) -> Result<(), CommandError> {
        let mut launch = self.launch();
        let invalid = CommandError::kvm(Errno::EINVAL);
        let (context, sealed) = match &mut *launch {
            Launch::Created => return Err(CommandError::kvm(Errno::ENOTTY)),
            Launch::Initialised => return Err(invalid),
            Launch::Launching { context, sealed } => (context, sealed),
            // The vCPUs are sealed.
            Launch::Running(_) => return Err(invalid),
        };
        if args.flags != 0 || *sealed || vmsas.len() != self.vcpu_count() {
            return Err(invalid);
        }
        for vmsa in vmsas {
            // sev_es_sync_vmsa.
            if vmsa.dr7 & !DR7_FIXED != 0 {
                return Err(invalid);
            }
            *sealed = true;
            context
                .update(self.platform(), PageType::Vmsa, 0, &mut vmsa.encode())
                .map_err(CommandError::firmware)?;
        }
        *sealed = true;
        self.inject_error(Step::Finish)?;
        let identity = match args.id {
            Some((block, auth)) => {
                id_block::check(block, auth, args.auth_key_en, context.digest(), context.policy())
                    .map_err(CommandError::firmware)?
            }
            None => Default::default(),
        };
        let finish = Finish { host_data: args.host_data, vcek_disabled: args.vcek_disabled, identity };
        context.finish(finish).map_err(CommandError::firmware)?;
        if let Launch::Launching { context, .. } = std::mem::take(&mut *launch) {
            *launch = Launch::Running(context);
        }
        Ok(())
    }

    /// Whether a vCPU may be run.
    pub fn may_run(&self) -> Result<(), RunRefusal> {
        match *self.launch() {
            Launch::Created => Err(RunRefusal::Errno(Errno::EINVAL)),
            Launch::Initialised | Launch::Launching { .. } => Err(RunRefusal::FailEntry),
            Launch::Running(_) => Ok(()),
        }
    }

    /// Whether registers can no longer be read or set (`guest_state_protected`): KVM answers -EINVAL.
    pub fn registers_sealed(&self) -> bool {
        match &*self.launch() {
            Launch::Created | Launch::Initialised => false,
            Launch::Launching { sealed, .. } => *sealed,
            Launch::Running(_) => true,
        }
    }

    /// The digest of what has entered the guest so far; `None` before START.
    pub fn launch_digest(&self) -> Option<LaunchDigest> {
        match &*self.launch() {
            Launch::Created | Launch::Initialised => None,
            Launch::Launching { context, .. } | Launch::Running(context) => Some(context.digest()),
        }
    }

    /// `SNP_GUEST_REQUEST`: the firmware's answer to a guest message.
    pub(crate) fn guest_message(&self, message: &Page) -> Result<Box<Page>, FwStatus> {
        match &mut *self.launch() {
            Launch::Running(context) => context.request(self.platform(), message, &self.faults),
            _ => Err(FwStatus::INVALID_GUEST_STATE),
        }
    }
}

#[cfg(test)]
#[path = "commands_test.rs"]
mod tests;
