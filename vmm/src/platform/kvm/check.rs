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
use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_sev_snp_launch_start;
use serde::Deserialize;
use serde::Serialize;
use snp::firmware_status::FwStatus;
use snp::pages::cpuid::CpuidTable;
use snp::pages::cpuid::decode_page;
use snp::pages::cpuid_diff::CpuidDiff;
use snp::pages::cpuid_diff::Difference;
use snp::pages::cpuid_raw::RawCpuid;
use snp::plan::LaunchPlan;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;
use snp::plan::Record;
use snp::policy::GuestPolicy;

use super::CpuidRow;
use super::KvmPlatform;
use super::ask;
use crate::cpuid;
use crate::launch;
use crate::launch::LaunchError;
use crate::launch::Updater;
use crate::machine::ram::GuestRam;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::HC_MAP_GPA_RANGE;
use crate::platform::Platform;
use crate::platform::Vm;
use crate::platform::VmKind;

/// One thing that was looked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the line for programs; it stays the same from version to version.
    pub id: &'static str,
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
const CAP_PIT2: c_ulong = 33;
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
    /// `KVM_CAP_PIT2`.
    pub pit2: i32,
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
        Finding { id: "dev-sev", what: "/dev/sev", found, needed: "open for reading and writing", fix, ok }
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
        id: "cpu-snp",
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
        let number = |id, what, value: i32, ok, needed, fix| Finding {
            id,
            what,
            found: format!("KVM answers {value:#x}"),
            needed,
            fix,
            ok,
        };
        // Which option of the kernel's build brings a capability: Linux 7.3, arch/x86/kvm/Kconfig.
        vec![
            Finding {
                id: "kvm-vm-types",
                what: "KVM with SNP guests",
                found: format!("KVM_CAP_VM_TYPES is {types:#x}"),
                needed: "bit 4",
                fix: "Use Linux 6.11 or later on the host and load kvm_amd with sev=1 sev_es=1 sev_snp=1",
                ok: types & 1 << kvm_bindings::KVM_X86_SNP_VM != 0,
            },
            number(
                "kvm-guest-memfd",
                "KVM_CAP_GUEST_MEMFD",
                self.guest_memfd,
                self.guest_memfd > 0,
                "not 0",
                "Use Linux 6.11 or later with CONFIG_KVM_AMD_SEV, which brings guest_memfd",
            ),
            number(
                "kvm-user-memory2",
                "KVM_CAP_USER_MEMORY2",
                self.user_memory2,
                self.user_memory2 > 0,
                "not 0",
                "Use Linux 6.8 or later on the host",
            ),
            number(
                "kvm-memory-attributes",
                "KVM_CAP_MEMORY_ATTRIBUTES",
                self.memory_attributes,
                self.memory_attributes & ATTRIBUTE_PRIVATE as i32 != 0,
                "bit 3, the private attribute",
                "Use Linux 6.11 or later with CONFIG_KVM_AMD_SEV, which brings private memory",
            ),
            number(
                "kvm-exit-hypercall",
                "KVM_CAP_EXIT_HYPERCALL",
                self.exit_hypercall,
                self.exit_hypercall & 1 << HC_MAP_GPA_RANGE != 0,
                "bit 12, KVM_HC_MAP_GPA_RANGE",
                "Use Linux 5.14 or later on the host",
            ),
            self.irqchip_finding(),
            self.pit_finding(),
        ]
    }

    /// The in-kernel interrupt controllers, which every guest here has.
    pub fn irqchip_finding(&self) -> Finding {
        Finding {
            id: "kvm-irqchip",
            what: "KVM_CAP_IRQCHIP",
            found: format!("KVM answers {:#x}", self.irqchip),
            needed: "not 0",
            fix: NO_IOAPIC,
            ok: self.irqchip > 0,
        }
    }

    /// The in-kernel timer, likewise.
    pub fn pit_finding(&self) -> Finding {
        Finding {
            id: "kvm-pit2",
            what: "KVM_CAP_PIT2",
            found: format!("KVM answers {:#x}", self.pit2),
            needed: "not 0",
            fix: NO_IOAPIC,
            ok: self.pit2 > 0,
        }
    }
}

/// Linux 7.3, `arch/x86/kvm/Kconfig`: KVM_IOAPIC is "I/O APIC, PIC, and PIT emulation", which a kernel can be built without.
const NO_IOAPIC: &str = "This kernel was built without CONFIG_KVM_IOAPIC, which has the in-kernel I/O APIC, PIC and PIT: use a \
                         kernel that has it";

/// One register of the CPUID page for which the firmware has another value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidChange {
    /// Leaf.
    pub leaf: u32,
    /// Sub-leaf.
    pub subleaf: u32,
    /// Register, as in "EAX".
    pub register: String,
    /// What was offered.
    pub offered: u32,
    /// What the firmware accepts.
    pub accepted: u32,
}

/// What became of the CPUID page of a launch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTrial {
    /// The page, in its order.
    pub offered: Vec<CpuidRow>,
    /// What the firmware changed; nothing if it took the page as it was.
    pub changes: Vec<CpuidChange>,
    /// It changed the page's count, leaves or reserved bytes as well.
    pub structure: bool,
    /// `--accept-cpuid` would launch with the changes.
    pub acceptable: bool,
    /// Whether the firmware took its own values when they were offered; `None`: they were not.
    pub again: Option<Result<(), String>>,
}

impl CpuidTrial {
    fn of(offered: Vec<CpuidRow>, diff: &CpuidDiff) -> Self {
        let change = |d: &Difference| CpuidChange {
            leaf: d.leaf,
            subleaf: d.subleaf,
            register: d.register.to_string(),
            offered: d.offered,
            accepted: d.accepted,
        };
        CpuidTrial {
            offered,
            changes: diff.differences.iter().map(change).collect(),
            structure: diff.structure,
            acceptable: diff.is_acceptable(),
            again: None,
        }
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
        /// The CPUID page, if it was what failed.
        cpuid: Option<CpuidTrial>,
    },
    /// An SNP VM was created, initialised, its launch begun and pages added to it; then it was closed.
    Passed(CpuidTrial),
}

impl Trial {
    fn failed(step: &str, errno: i32, firmware: u32, error: impl fmt::Display) -> Trial {
        Trial::Failed { step: step.to_owned(), errno, firmware, error: error.to_string(), cpuid: None }
    }

    fn refused(step: &str, e: LaunchError) -> Trial {
        match e {
            LaunchError::Sev { step, source } => Trial::failed(&step, source.errno, source.firmware, &source),
            LaunchError::Call { step, source } => Trial::failed(&step, errno(&source.source), 0, source),
            e => Trial::failed(step, 0, 0, e),
        }
    }

    /// The CPUID page, if it was offered to the firmware.
    pub fn cpuid(&self) -> Option<&CpuidTrial> {
        match self {
            Trial::NotTried(_) => None,
            Trial::Failed { cpuid, .. } => cpuid.as_ref(),
            Trial::Passed(cpuid) => Some(cpuid),
        }
    }
}

fn errno(e: &io::Error) -> i32 {
    e.raw_os_error().unwrap_or(0)
}

/// Where the trial's memory lies, and its pages: one of code, one with the CPUID table.
const TRIAL_GPA: u64 = 0;
const TRIAL_LEN: u64 = 2 * PAGE_SIZE;

/// Does on `vm` what a launch does up to its CPUID page, by the launch's own functions: `KVM_SEV_INIT2`, memory with a private
/// side, `LAUNCH_START` with the default policy, `LAUNCH_UPDATE` of a normal page and of `table`. No vCPU is needed for any
/// of it (Linux 7.3, `sev.c:snp_launch_update`). `host` is the processors' own CPUID: as in a launch, losses of what it lacks are
/// accepted.
pub(crate) fn try_pages(vm: &dyn Vm, table: &CpuidTable, host: Option<&RawCpuid>) -> Trial {
    let page = match table.page() {
        Ok(page) => page,
        Err(e) => return Trial::failed("making the CPUID page", 0, 0, e),
    };
    if let Err(e) = launch::init_snp(vm, &LaunchPlan { records: Vec::new(), vcpus: Vec::new() }) {
        return Trial::refused("creating an SNP guest", e);
    }
    let ram = match GuestRam::new([(TRIAL_GPA, TRIAL_LEN)]) {
        Ok(ram) => ram,
        Err(e) => return Trial::failed("mapping two pages", errno(&e), 0, e),
    };
    if let Err(e) = launch::add_memory(vm, &ram, true) {
        return Trial::refused("adding guest RAM", e);
    }
    let attributes = kvm_memory_attributes {
        address: TRIAL_GPA,
        size: TRIAL_LEN,
        attributes: ATTRIBUTE_PRIVATE,
        flags: 0,
    };
    if let Err(e) = vm.set_memory_attributes(attributes) {
        return Trial::failed("making guest RAM private", errno(&e.source), 0, e);
    }
    let mut start = kvm_sev_snp_launch_start { policy: GuestPolicy::DEFAULT.0, ..Default::default() };
    if let Err(e) = vm.snp_launch_start(&mut start) {
        return Trial::failed("starting the launch with the default policy", e.errno, e.firmware, &e);
    }
    // A page of HLT, though it never runs.
    let code = Record::new(TRIAL_GPA, PageType::Normal, vec![0xf4; PAGE_SIZE as usize], "a normal page");
    if let Err(e) = Updater::new(vm, false, host).add(&code) {
        return Trial::refused("adding a normal page", e);
    }
    let record = Record::new(TRIAL_GPA + PAGE_SIZE, PageType::Cpuid, page.to_vec(), "the CPUID page");
    let offered = decode_page(&page).unwrap_or_default().iter().map(CpuidRow::from).collect();
    let mut updater = Updater::new(vm, false, host);
    match updater.add(&record) {
        Ok(()) => Trial::Passed(match &updater.accepted {
            None => CpuidTrial { offered, ..CpuidTrial::default() },
            Some(diff) => CpuidTrial { again: Some(Ok(())), ..CpuidTrial::of(offered, diff) },
        }),
        Err(LaunchError::Cpuid { diff, .. }) => {
            let mut cpuid = CpuidTrial::of(offered, &diff);
            // Firmware can refuse even its own version (that of Genoa keeps wrong bits of 0x8000001F EBX).
            if cpuid.acceptable {
                cpuid.again = Some(Updater::new(vm, true, host).add(&record).map_err(|e| e.to_string()));
            }
            Trial::Failed {
                step: "adding the CPUID page".into(),
                errno: libc::EIO,
                firmware: FwStatus::INVALID_PARAM.0,
                error: format!("the firmware refused {} of its registers", cpuid.changes.len()),
                cpuid: Some(cpuid),
            }
        }
        Err(e) => Trial::refused("adding the CPUID page", e),
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
            pit2: ask(CAP_PIT2),
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

    /// Begins a launch and gives it up: a VM of the SNP type and [`try_pages`] on it. Takes one ASID until it returns.
    pub fn try_launch(&self) -> Trial {
        let table = self.supported_cpuid().map_err(|e| e.to_string()).and_then(|supported| {
            CpuidTable::snp(&cpuid::from_kvm(&supported), 1, &self.snp_cpuid()).map_err(|e| e.to_string())
        });
        let table = match table {
            Ok(table) => table,
            Err(e) => return Trial::failed("making the CPUID page", 0, 0, e),
        };
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
        try_pages(&vm, &table, self.raw_cpuid().as_ref())
    }
}

#[cfg(test)]
#[path = "check_test.rs"]
mod check_test;
