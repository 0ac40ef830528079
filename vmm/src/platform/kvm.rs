// SPDX-License-Identifier: Apache-2.0
//! The KVM platform: every operation of the seam is the ioctl of the same name, and nothing else. What the host can do is found out
//! beside them ([`check`], [`ask`], [`mod@host_cpuid`]).

mod ask;
mod check;
mod exit;
mod host_cpuid;
mod sev;
mod slots;
mod vcpu;
mod vm;

pub use ask::PlatformStatus;
pub use ask::platform_status;
pub use check::Access;
pub use check::Capabilities;
pub use check::Finding;
pub use check::LaunchFacts;
pub use check::NoSnp;
pub use check::cpu_finding;
pub use check::sev_leaf;
pub use exit::MsrAccess;
pub use exit::decode;
pub use exit::msr_access;
pub use host_cpuid::CpuidRow;
pub use host_cpuid::host_cpuid;
pub use vcpu::KvmVcpu;
pub use vcpu::interrupt;
pub use vm::KvmVm;

use std::fs::File;
use std::io;
use std::sync::Arc;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Kvm;
use snp::pages::cpuid::SnpCpuid;
use snp::pages::cpuid_raw::RawCpuid;
use snp::policy::PolicyRules;
use snp_model::patch::CodeHints;

use super::Platform;
use super::Vm;
use super::VmKind;
use crate::platform::error::CallError;

/// `KVM_X86_SNP_VM`, the VM type of SNP guests.
const SNP_VM_TYPE: u64 = kvm_bindings::KVM_X86_SNP_VM as u64;

/// A host's KVM.
pub struct KvmPlatform {
    kvm: Kvm,
}

/// Why `/dev/kvm` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No such device.
    #[error(
        "/dev/kvm does not exist: load the kvm_amd or kvm_intel module, or enable virtualization in the BIOS"
    )]
    Absent,
    /// No permission.
    #[error("/dev/kvm cannot be opened (permission denied): run as a member of its group, usually 'kvm'")]
    Denied,
    /// Anything else.
    #[error("/dev/kvm cannot be opened: {0}")]
    Other(io::Error),
    /// Not the stable API.
    #[error("/dev/kvm speaks API version {0}, 12 is needed")]
    Version(i32),
}

impl KvmPlatform {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self, OpenError> {
        let kvm = Kvm::new().map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => OpenError::Absent,
            libc::EACCES | libc::EPERM => OpenError::Denied,
            errno => OpenError::Other(io::Error::from_raw_os_error(errno)),
        })?;
        match kvm.get_api_version() {
            12 => Ok(KvmPlatform { kvm }),
            version => Err(OpenError::Version(version)),
        }
    }

    /// The system file descriptor, for questions about the host.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// What KVM can do, asked at system scope.
    pub fn capabilities(&self) -> Capabilities {
        Capabilities::of(&self.kvm)
    }

    /// Lists what keeps this host from launching SNP guests.
    pub fn check_snp(&self) -> Result<(), NoSnp> {
        check::check_snp(&self.kvm)
    }

    /// `KVM_CREATE_VM`, again when a signal interrupts it.
    pub fn create(&self, kind: VmKind) -> Result<KvmVm, CallError> {
        let vm_type = match kind {
            VmKind::Plain => 0,
            VmKind::Snp => SNP_VM_TYPE,
        };
        let sev = match kind {
            VmKind::Plain => None,
            VmKind::Snp => Some(
                File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/sev")
                    .map_err(|source| CallError { call: "opening /dev/sev", source })?,
            ),
        };
        loop {
            match self.kvm.create_vm_with_type(vm_type) {
                Err(e) if e.errno() == libc::EINTR => continue,
                Err(e) => return Err(CallError::of("KVM_CREATE_VM")(e)),
                Ok(fd) => return Ok(KvmVm::new(fd, kind, sev)),
            }
        }
    }
}

impl Platform for KvmPlatform {
    fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, CallError> {
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(CallError::of("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(cpuid.as_slice().to_vec())
    }

    fn snp_cpuid(&self) -> SnpCpuid {
        // AMD APM volume 3, E.4.17: EBX 5:0 is the C-bit's position, EBX 31 is COHERENCY_SFW_NO.
        let ebx = std::arch::x86_64::__cpuid(0x8000_001f).ebx;
        SnpCpuid { c_bit: (ebx & 0x3f) as u8, phys_bits: None, coherency_sfw_no: ebx >> 31 == 1 }
    }

    fn raw_cpuid(&self) -> Option<RawCpuid> {
        Some(host_cpuid())
    }

    fn policy_rules(&self) -> PolicyRules {
        let release = || std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        check::policy_bits(&self.kvm).map_or_else(|| PolicyRules::of_release(&release()), PolicyRules::told)
    }

    fn vmsa_features(&self) -> u64 {
        self.capabilities().vmsa_features.unwrap_or(0)
    }

    fn create_vm(&self, kind: VmKind, _code: &CodeHints) -> Result<Arc<dyn Vm>, CallError> {
        Ok(Arc::new(self.create(kind)?))
    }
}
