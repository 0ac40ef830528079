// SPDX-License-Identifier: Apache-2.0
//! Whether this host can launch SNP guests, asked before anything is built, and tried without building a guest.
//!
//! Capabilities are those that the launch uses (Linux `Documentation/virt/kvm/api.rst` and
//! `Documentation/virt/kvm/x86/amd-memory-encryption.rst`). Asking is apart from judging: [`LaunchFacts`] is plain data, and
//! [`LaunchFacts::findings`] is what both the launch and `cvmm doctor` go by, so neither can be stricter than the other.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::raw::c_ulong;
use std::path::Path;

use kvm_bindings::KVM_X86_SEV_VMSA_FEATURES;
use kvm_bindings::kvm_sev_snp_launch_start;
use serde::Deserialize;
use serde::Serialize;
use snp::plan::LaunchPlan;
use snp::policy::GuestPolicy;

use super::KvmPlatform;
use super::ask;
use crate::launch;
use crate::launch::LaunchError;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::HC_MAP_GPA_RANGE;
use crate::platform::Vm;
use crate::platform::VmKind;

/// One thing that was looked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked for.
    pub what: &'static str,
    /// What was found.
    pub found: String,
    /// What is needed.
    pub needed: &'static str,
    /// What can be done if it is missing.
    pub fix: &'static str,
    /// It is there.
    pub ok: bool,
}

/// Everything that is missing.
#[derive(Debug, thiserror::Error)]
pub struct NoSnp(pub Vec<Finding>);

impl fmt::Display for NoSnp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--snp: this host cannot launch SEV-SNP guests:")?;
        for missing in &self.0 {
            write!(f, "\n  - {}: {}. {}", missing.what, missing.found, missing.fix)?;
        }
        write!(
            f,
            "\n`cvmm doctor` looks for the causes. To develop and test without SNP hardware, add --platform emulated: it runs \
             the same guest on a software model, which protects nothing"
        )
    }
}

const CAP_IRQCHIP: c_ulong = 0;
const CAP_X86_USER_SPACE_MSR: c_ulong = 188;
const CAP_X86_MSR_FILTER: c_ulong = 189;
const CAP_EXIT_HYPERCALL: c_ulong = 201;
const CAP_USER_MEMORY2: c_ulong = 231;
const CAP_MEMORY_FAULT_INFO: c_ulong = 232;
const CAP_MEMORY_ATTRIBUTES: c_ulong = 233;
const CAP_GUEST_MEMFD: c_ulong = 234;
const CAP_VM_TYPES: c_ulong = 235;

/// `KVM_X86_SNP_POLICY_BITS` (Linux 6.19) and `KVM_X86_SEV_SNP_REQ_CERTS` (Linux 7.0), not in `kvm-bindings` yet.
const SNP_POLICY_BITS: u32 = 1;
const SEV_SNP_REQ_CERTS: u32 = 2;

/// What KVM answers to `KVM_CHECK_EXTENSION` and about its SEV attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `KVM_CAP_VM_TYPES`: one bit for each.
    pub vm_types: i32,
    /// `KVM_CAP_GUEST_MEMFD`. At system scope this says only that the kernel knows it.
    pub guest_memfd: i32,
    /// `KVM_CAP_USER_MEMORY2`.
    pub user_memory2: i32,
    /// `KVM_CAP_MEMORY_ATTRIBUTES`: one bit for each.
    pub memory_attributes: i32,
    /// `KVM_CAP_MEMORY_FAULT_INFO`.
    pub memory_fault_info: i32,
    /// `KVM_CAP_EXIT_HYPERCALL`: one bit for each hypercall.
    pub exit_hypercall: i32,
    /// `KVM_CAP_IRQCHIP`.
    pub irqchip: i32,
    /// `KVM_CAP_X86_USER_SPACE_MSR`.
    pub user_space_msr: i32,
    /// `KVM_CAP_X86_MSR_FILTER`.
    pub msr_filter: i32,
    /// SEV attribute 0: VMSA features that guests may have. `None`: no such attribute, and so no `KVM_SEV_INIT2`.
    pub vmsa_features: Option<u64>,
    /// SEV attribute 1: policy bits that guests may set.
    pub policy_bits: Option<u64>,
    /// SEV attribute 2: extended guest requests can come to the monitor.
    pub req_certs: Option<u64>,
}

/// Whether a device file can be opened for reading and writing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// It can.
    Granted,
    /// It does not exist.
    Absent,
    /// It may not.
    Denied,
    /// Something else went wrong.
    Failed(String),
}

impl Access {
    /// Tries to open `path`.
    pub fn of(path: &Path) -> (Access, Option<File>) {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => (Access::Granted, Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => (Access::Absent, None),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => (Access::Denied, None),
            Err(e) => (Access::Failed(e.to_string()), None),
        }
    }

    /// What it means for `/dev/sev`.
    pub fn finding(&self) -> Finding {
        let (found, fix) = match self {
            Access::Granted => ("can be opened".to_owned(), ""),
            Access::Absent => {
                ("does not exist".to_owned(), "Load the ccp module; the BIOS must not hide the PSP")
            }
            Access::Denied => (
                "permission denied".to_owned(),
                "Give this user read and write access, for example by a udev rule",
            ),
            Access::Failed(e) => (e.clone(), "See the kernel log for lines of the ccp driver"),
        };
        let ok = *self == Access::Granted;
        Finding { what: "/dev/sev", found, needed: "open for reading and writing", fix, ok }
    }
}

/// What decides, before anything is built, whether a launch makes sense.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchFacts {
    /// EAX to EDX of CPUID leaf 0x8000001F, if the CPU has it.
    pub sev_leaf: Option<[u32; 4]>,
    /// What KVM can do.
    pub capabilities: Capabilities,
    /// `/dev/sev`.
    pub sev_device: Access,
}

impl LaunchFacts {
    /// Everything that a launch needs, missing or not.
    pub fn findings(&self) -> Vec<Finding> {
        let mut all = vec![cpu_finding(self.sev_leaf)];
        all.extend(self.capabilities.snp_findings());
        all.push(self.sev_device.finding());
        all
    }
}

/// Whether the CPU knows SNP and the BIOS lets it.
pub fn cpu_finding(sev_leaf: Option<[u32; 4]>) -> Finding {
    let snp = |eax: u32| eax & 1 << 4 != 0;
    let found = match sev_leaf {
        None => "the CPU has no CPUID leaf 0x8000001F".to_owned(),
        Some([eax, ..]) => {
            format!("CPUID 0x8000001F EAX is {eax:#x}, bit 4 is {}", if snp(eax) { "set" } else { "clear" })
        }
    };
    Finding {
        what: "CPU with SEV-SNP",
        found,
        needed: "CPUID 0x8000001F EAX bit 4",
        fix: "Use a host with an AMD EPYC 7003 or later, and enable SNP in its BIOS",
        ok: sev_leaf.is_some_and(|[eax, ..]| snp(eax)),
    }
}

impl Capabilities {
    /// What a launch of an SNP guest needs of KVM.
    pub fn snp_findings(&self) -> Vec<Finding> {
        let types = self.vm_types;
        let number = |what, value: i32, ok, needed| {
            let found = format!("KVM answers {value:#x}");
            Finding { what, found, needed, fix: "Use Linux 6.11 or later on the host", ok }
        };
        vec![
            Finding {
                what: "KVM with SNP guests",
                found: format!("KVM_CAP_VM_TYPES is {types:#x}"),
                needed: "bit 4",
                fix: "Use Linux 6.11 or later on the host and load kvm_amd with sev=1 sev_es=1 sev_snp=1",
                ok: types & 1 << kvm_bindings::KVM_X86_SNP_VM != 0,
            },
            number("KVM_CAP_GUEST_MEMFD", self.guest_memfd, self.guest_memfd > 0, "not 0"),
            number("KVM_CAP_USER_MEMORY2", self.user_memory2, self.user_memory2 > 0, "not 0"),
            number(
                "KVM_CAP_MEMORY_ATTRIBUTES",
                self.memory_attributes,
                self.memory_attributes & ATTRIBUTE_PRIVATE as i32 != 0,
                "bit 3, the private attribute",
            ),
            number(
                "KVM_CAP_EXIT_HYPERCALL",
                self.exit_hypercall,
                self.exit_hypercall & 1 << HC_MAP_GPA_RANGE != 0,
                "bit 12, KVM_HC_MAP_GPA_RANGE",
            ),
            number("KVM_CAP_IRQCHIP", self.irqchip, self.irqchip > 0, "not 0"),
        ]
    }
}

/// How far a launch without a guest came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trial {
    /// Nothing was tried, and why.
    NotTried(String),
    /// A step failed.
    Failed {
        /// What was being done.
        step: String,
        /// Errno of the failed call, 0 if there is none.
        errno: i32,
        /// The firmware's status, 0 if it gave none.
        firmware: u32,
        /// All of it in words.
        error: String,
    },
    /// An SNP VM was created, initialised, and its launch begun; then it was closed.
    Passed,
}

impl Trial {
    fn failed(step: &str, errno: i32, firmware: u32, error: impl fmt::Display) -> Trial {
        Trial::Failed { step: step.to_owned(), errno, firmware, error: error.to_string() }
    }
}

/// CPUID leaf 0x8000001F of the CPU that this runs on.
pub fn sev_leaf() -> Option<[u32; 4]> {
    if std::arch::x86_64::__cpuid(0x8000_0000).eax < 0x8000_001f {
        return None;
    }
    let leaf = std::arch::x86_64::__cpuid(0x8000_001f);
    Some([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
}

impl KvmPlatform {
    /// What KVM can do, asked at system scope.
    pub fn capabilities(&self) -> Capabilities {
        let ask = |number| self.kvm.check_extension_raw(number);
        Capabilities {
            vm_types: ask(CAP_VM_TYPES),
            guest_memfd: ask(CAP_GUEST_MEMFD),
            user_memory2: ask(CAP_USER_MEMORY2),
            memory_attributes: ask(CAP_MEMORY_ATTRIBUTES),
            memory_fault_info: ask(CAP_MEMORY_FAULT_INFO),
            exit_hypercall: ask(CAP_EXIT_HYPERCALL),
            irqchip: ask(CAP_IRQCHIP),
            user_space_msr: ask(CAP_X86_USER_SPACE_MSR),
            msr_filter: ask(CAP_X86_MSR_FILTER),
            vmsa_features: ask::sev_attribute(&self.kvm, KVM_X86_SEV_VMSA_FEATURES),
            policy_bits: self.policy_bits(),
            req_certs: ask::sev_attribute(&self.kvm, SEV_SNP_REQ_CERTS),
        }
    }

    /// `KVM_X86_SNP_POLICY_BITS`; `None`: this kernel does not say.
    pub(super) fn policy_bits(&self) -> Option<u64> {
        ask::sev_attribute(&self.kvm, SNP_POLICY_BITS)
    }

    /// Lists what keeps this host from launching SNP guests.
    pub fn check_snp(&self) -> Result<(), NoSnp> {
        let facts = LaunchFacts {
            sev_leaf: sev_leaf(),
            capabilities: self.capabilities(),
            sev_device: Access::of(Path::new("/dev/sev")).0,
        };
        let missing: Vec<Finding> = facts.findings().into_iter().filter(|f| !f.ok).collect();
        if missing.is_empty() { Ok(()) } else { Err(NoSnp(missing)) }
    }

    /// Does what a launch does until the first page would be added, by the launch's own functions where there are some: an
    /// SNP VM, `KVM_SEV_INIT2`, a guest_memfd, `LAUNCH_START` with the default policy. Takes one ASID until it returns.
    pub fn try_launch(&self) -> Trial {
        let errno = |e: &io::Error| e.raw_os_error().unwrap_or(0);
        let vm = match self.create(VmKind::Snp) {
            Ok(vm) => vm,
            Err(e) => return Trial::failed("creating an SNP VM", errno(&e.source), 0, e),
        };
        // At system scope KVM says what the kernel knows; only the VM says what it can use.
        for (number, name, bits) in [
            (CAP_GUEST_MEMFD, "KVM_CAP_GUEST_MEMFD", 1),
            (CAP_MEMORY_ATTRIBUTES, "KVM_CAP_MEMORY_ATTRIBUTES", 8),
        ] {
            let value = vm.fd.check_extension_raw(number);
            if value & bits == 0 {
                let error = format!("{name} is {value:#x} on the SNP VM itself");
                return Trial::failed("asking the VM what it can do", 0, 0, error);
            }
        }
        match launch::init_snp(&vm, &LaunchPlan { records: Vec::new(), vcpus: Vec::new() }) {
            Ok(()) => {}
            Err(LaunchError::Sev { step, source }) => {
                return Trial::failed(&step, source.errno, source.firmware, &source);
            }
            Err(LaunchError::Call { step, source }) => {
                return Trial::failed(&step, errno(&source.source), 0, source);
            }
            Err(e) => return Trial::failed("creating an SNP guest", 0, 0, e),
        }
        if let Err(e) = vm.create_guest_memfd(crate::memory::PAGE) {
            return Trial::failed("creating the private memory", errno(&e.source), 0, e);
        }
        let mut start = kvm_sev_snp_launch_start { policy: GuestPolicy::DEFAULT.0, ..Default::default() };
        match vm.snp_launch_start(&mut start) {
            Ok(()) => Trial::Passed,
            Err(e) => Trial::failed("starting the launch with the default policy", e.errno, e.firmware, &e),
        }
    }
}
