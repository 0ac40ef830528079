// SPDX-License-Identifier: Apache-2.0
//! Whether this host can launch SNP guests, asked before anything is built.
//!
//! Capabilities are those that the launch uses (Linux `Documentation/virt/kvm/api.rst` and
//! `Documentation/virt/kvm/x86/amd-memory-encryption.rst`). Asking is apart from judging: [`LaunchFacts`] is
//! plain data, and [`LaunchFacts::findings`] is what both the launch and `cvmm doctor` go by, so neither can
//! be stricter than the other.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::raw::c_ulong;
use std::path::Path;

use kvm_bindings::KVM_X86_SEV_VMSA_FEATURES;
use kvm_ioctls::Kvm;
use kvm_ioctls::VmFd;
use serde::Deserialize;
use serde::Serialize;

use super::ask;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::HC_MAP_GPA_RANGE;

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
        write!(f, "`snp`: this host cannot launch SEV-SNP guests:")?;
        for missing in &self.0 {
            write!(f, "\n  - {}: {}. {}", missing.what, missing.found, missing.fix)?;
        }
        write!(
            f,
            "\n`cvmm doctor` looks for the causes. To develop and test without SNP hardware, add `platform` emulated: it runs \
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

/// `KVM_X86_SNP_POLICY_BITS` (Linux 6.19) and `KVM_X86_SEV_SNP_REQ_CERTS` (Linux 7.0), not in `kvm-bindings`
/// yet.
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
    /// SEV attribute 0: VMSA features that guests may have. `None`: no such attribute, and so no
    /// `KVM_SEV_INIT2`.
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

/// Linux 7.3, `arch/x86/kvm/Kconfig`: KVM_IOAPIC is "I/O APIC, PIC, and PIT emulation", which a kernel can be
/// built without.
const NO_IOAPIC: &str = "This kernel was built without CONFIG_KVM_IOAPIC, which has the in-kernel I/O APIC, PIC and PIT: use a \
                         kernel that has it";

/// CPUID leaf 0x8000001F of the CPU that this runs on.
pub fn sev_leaf() -> Option<[u32; 4]> {
    if std::arch::x86_64::__cpuid(0x8000_0000).eax < 0x8000_001f {
        return None;
    }
    let leaf = std::arch::x86_64::__cpuid(0x8000_001f);
    Some([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
}

impl Capabilities {
    /// Asks KVM at system scope.
    pub(super) fn of(kvm: &Kvm) -> Capabilities {
        let ask = |number| kvm.check_extension_raw(number);
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
            vmsa_features: ask::sev_attribute(kvm, KVM_X86_SEV_VMSA_FEATURES),
            policy_bits: policy_bits(kvm),
            req_certs: ask::sev_attribute(kvm, SEV_SNP_REQ_CERTS),
        }
    }
}

/// `KVM_X86_SNP_POLICY_BITS`; `None`: this kernel does not say.
pub(super) fn policy_bits(kvm: &Kvm) -> Option<u64> {
    ask::sev_attribute(kvm, SNP_POLICY_BITS)
}

/// Lists what keeps this host from launching SNP guests.
pub(super) fn check_snp(kvm: &Kvm) -> Result<(), NoSnp> {
    let facts = LaunchFacts {
        sev_leaf: sev_leaf(),
        capabilities: Capabilities::of(kvm),
        sev_device: Access::of(Path::new("/dev/sev")).0,
    };
    let missing: Vec<Finding> = facts.findings().into_iter().filter(|f| !f.ok).collect();
    if missing.is_empty() { Ok(()) } else { Err(NoSnp(missing)) }
}

/// What an SNP VM must be able to do itself: at system scope KVM says what the kernel knows, only the VM says
/// what it can use. The name of what is missing and KVM's answer.
pub(super) fn check_vm(vm: &VmFd) -> Result<(), (&'static str, i32)> {
    for (number, name, bits) in
        [(CAP_GUEST_MEMFD, "KVM_CAP_GUEST_MEMFD", 1), (CAP_MEMORY_ATTRIBUTES, "KVM_CAP_MEMORY_ATTRIBUTES", 8)]
    {
        let value = vm.check_extension_raw(number);
        if value & bits == 0 {
            return Err((name, value));
        }
    }
    Ok(())
}
