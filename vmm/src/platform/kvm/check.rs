// SPDX-License-Identifier: Apache-2.0
//! Whether this host can launch SNP guests, asked before anything is built.
//!
//! The capabilities are those that the launch uses (Linux `Documentation/virt/kvm/api.rst` and
//! `Documentation/virt/kvm/x86/amd-memory-encryption.rst`).

use std::fmt;
use std::io;
use std::os::raw::c_ulong;

use super::KvmPlatform;

/// Something that SNP guests need and this host lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What was looked for.
    pub need: &'static str,
    /// What was found.
    pub found: String,
    /// What can be done.
    pub remedy: &'static str,
}

/// Everything that is missing.
#[derive(Debug, thiserror::Error)]
pub struct NoSnp(pub Vec<Missing>);

impl fmt::Display for NoSnp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--snp: this host cannot launch SEV-SNP guests:")?;
        for missing in &self.0 {
            write!(f, "\n  - {}: {}. {}", missing.need, missing.found, missing.remedy)?;
        }
        write!(
            f,
            "\nTo develop and test without SNP hardware, add --platform emulated: it runs the same guest on a software model, \
             which protects nothing"
        )
    }
}

const CAP_VM_TYPES: c_ulong = 235;
const CAP_EXIT_HYPERCALL: c_ulong = 201;
const CAP_GUEST_MEMFD: c_ulong = 234;
const CAP_USER_MEMORY2: c_ulong = 231;
const CAP_MEMORY_ATTRIBUTES: c_ulong = 233;

impl KvmPlatform {
    fn capability(&self, number: c_ulong) -> i32 {
        self.kvm.check_extension_raw(number)
    }

    /// Lists what keeps this host from launching SNP guests.
    pub fn check_snp(&self) -> Result<(), NoSnp> {
        let mut missing = Vec::new();
        let mut need = |ok: bool, need, found: String, remedy| {
            if !ok {
                missing.push(Missing { need, found, remedy });
            }
        };
        let eax = if std::arch::x86_64::__cpuid(0x8000_0000).eax >= 0x8000_001f {
            std::arch::x86_64::__cpuid(0x8000_001f).eax
        } else {
            0
        };
        need(
            eax & 1 << 4 != 0,
            "CPU with SEV-SNP",
            format!("CPUID 0x8000001F EAX is {eax:#x}, bit 4 is clear"),
            "Use a host with an AMD EPYC 7003 or later, and enable SNP in its BIOS",
        );
        let types = self.capability(CAP_VM_TYPES);
        need(
            types & 1 << kvm_bindings::KVM_X86_SNP_VM != 0,
            "KVM with SNP guests",
            format!("KVM_CAP_VM_TYPES is {types:#x}, bit 4 is clear"),
            "Use Linux 6.11 or later and load kvm_amd with sev=1 sev_es=1 sev_snp=1",
        );
        for (number, name) in [
            (CAP_GUEST_MEMFD, "KVM_CAP_GUEST_MEMFD"),
            (CAP_USER_MEMORY2, "KVM_CAP_USER_MEMORY2"),
            (CAP_MEMORY_ATTRIBUTES, "KVM_CAP_MEMORY_ATTRIBUTES"),
        ] {
            // The private attribute is bit 3; the other two are yes or no.
            let value = self.capability(number);
            let ok = if number == CAP_MEMORY_ATTRIBUTES { value & 8 != 0 || types == 0 } else { value > 0 };
            need(ok, name, format!("KVM answers {value}"), "Use Linux 6.11 or later");
        }
        let exits = self.capability(CAP_EXIT_HYPERCALL);
        need(
            exits & 1 << crate::platform::HC_MAP_GPA_RANGE != 0,
            "KVM_CAP_EXIT_HYPERCALL",
            format!("KVM answers {exits:#x}, bit 12 is clear"),
            "Use Linux 6.11 or later",
        );
        if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/sev") {
            let (found, remedy) = match e.kind() {
                io::ErrorKind::NotFound => {
                    ("does not exist".to_owned(), "Load the ccp module; the BIOS must not hide the PSP")
                }
                io::ErrorKind::PermissionDenied => (
                    "permission denied".to_owned(),
                    "Give this user read and write access, for example by a udev rule",
                ),
                _ => (e.to_string(), "See the kernel log for lines of the ccp driver"),
            };
            need(false, "/dev/sev", found, remedy);
        }
        if missing.is_empty() { Ok(()) } else { Err(NoSnp(missing)) }
    }
}
