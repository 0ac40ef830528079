// SPDX-License-Identifier: Apache-2.0
//! What is known about a host, as plain data that can be recorded, sent and judged elsewhere.
//!
//! Files are read below a root that tests choose. Nothing here judges; what cannot be read is said to be
//! unknown. Only the two trials do anything: one begins an SNP launch and gives it up, one runs a guest of a
//! few bytes.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use serde::Deserialize;
use serde::Serialize;
use snp::pages::cpuid::CpuidTable;

use super::trial;
use super::trial::Trial;
use crate::cpuid;
use crate::platform::Platform;
use crate::platform::emulated;
use crate::platform::emulated::EmulationTrial;
use crate::platform::kvm::Access;
use crate::platform::kvm::Capabilities;
use crate::platform::kvm::CpuidRow;
use crate::platform::kvm::KvmPlatform;
use crate::platform::kvm::PlatformStatus;
use crate::platform::kvm::host_cpuid;
use crate::platform::kvm::platform_status;
use crate::platform::kvm::sev_leaf;

/// Most lines that are kept: the last ones, because a cause is followed by what it leads to, and not the
/// other way.
const LINES: usize = 60;
/// What lines about SEV have in them.
const WORDS: [&str; 8] = [
    "SNP: ",
    "cannot be supported",
    "ccp ",
    "kvm_amd: SEV",
    "SEV-ES",
    "RMP",
    "IOMMU SNP",
    "ciphertext hiding",
];

/// Module parameters that SNP depends on, and two that say something about it.
const PARAMETERS: [&str; 9] = [
    "kvm_amd/sev",
    "kvm_amd/sev_es",
    "kvm_amd/sev_snp",
    "kvm_amd/npt",
    "kvm_amd/nrips",
    "kvm_amd/lbrv",
    "kvm_amd/debug_swap",
    "kvm_amd/ciphertext_hiding_asids",
    "kvm/mmio_caching",
];
/// Most bytes of the log that are read; the kernel's buffer is smaller.
const LOG_BYTES: u64 = 64 << 20;
/// Most bytes that are read of a file that holds a value.
const VALUE_BYTES: u64 = 64 << 10;

/// What KVM says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmFacts {
    /// Its capabilities.
    pub capabilities: Capabilities,
    /// Physical address bits of the CPUs that it offers.
    pub address_bits: Option<u32>,
    /// Whether the CPUID table of an emulated guest can be made from what it offers, or why not.
    pub emulated_cpuid: Result<(), String>,
    /// The same for an SNP guest.
    pub snp_cpuid: Result<(), String>,
}

/// CPUID, from both sides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidFacts {
    /// What the CPU itself answers.
    pub host: Vec<CpuidRow>,
    /// What KVM offers to guests (`KVM_GET_SUPPORTED_CPUID`).
    pub kvm: Vec<CpuidRow>,
}

/// One cgroup's count of ASIDs for SEV-ES and SNP guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AsidGroup {
    /// The cgroup; `/` is the whole host.
    pub cgroup: String,
    /// How many there may be; `None` is no limit.
    pub max: Option<u64>,
    /// How many are in use.
    pub current: Option<u64>,
}

/// Everything that the judgement looks at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The kernel's release.
    pub kernel: String,
    /// The CPU's name.
    pub cpu_model: String,
    /// CPUID leaf 0x8000001F, EAX to EDX.
    pub sev_leaf: Option<[u32; 4]>,
    /// Module parameters, by `module/name`; those that do not exist are left out.
    pub parameters: BTreeMap<String, String>,
    /// Whether `/dev/sev` can be opened.
    pub sev_device: Access,
    /// What the firmware says, or why it says nothing; `None` if it was not asked.
    pub firmware: Option<Result<PlatformStatus, String>>,
    /// ASID counts of this process's cgroup and of those above it.
    pub asids: Vec<AsidGroup>,
    /// Lines of the kernel log about SEV; `None` if the log cannot be read.
    pub kernel_log: Option<Vec<String>>,
    /// What KVM says, or why it cannot be asked.
    pub kvm: Result<KvmFacts, String>,
    /// How far an SNP launch came.
    pub snp_trial: Trial,
    /// CPUID leaves; a record may lack them.
    #[serde(default)]
    pub cpuid: CpuidFacts,
    /// Whether a guest runs at all.
    pub emulation_trial: EmulationTrial,
}

impl Facts {
    /// Gathers the facts of this host.
    pub fn gather() -> Facts {
        let root = Path::new("/");
        let kvm = KvmPlatform::open();
        let (sev_device, sev) = Access::of(Path::new("/dev/sev"));
        let kvm_facts = kvm.as_ref().map_err(ToString::to_string).and_then(ask_kvm);
        let snp_trial = match (&kvm, &kvm_facts) {
            (Ok(kvm), Ok(facts)) if facts.capabilities.vm_types & 1 << kvm_bindings::KVM_X86_SNP_VM != 0 => {
                trial::try_launch(kvm)
            }
            (Ok(_), Ok(_)) => Trial::NotTried("KVM has no SNP guests".into()),
            _ => Trial::NotTried("KVM cannot be asked".into()),
        };
        let emulation_trial = match &kvm {
            Ok(_) => emulated::try_emulation(),
            Err(_) => EmulationTrial::NotTried("KVM cannot be used".into()),
        };
        Facts {
            kernel: value(&root.join("proc/sys/kernel/osrelease")).unwrap_or_else(|| "unknown".into()),
            cpu_model: cpu_model(root).unwrap_or_else(|| "unknown CPU".into()),
            sev_leaf: sev_leaf(),
            parameters: parameters(root),
            sev_device,
            firmware: sev.as_ref().map(platform_status),
            asids: asids(root),
            kernel_log: kernel_log(&root.join("dev/kmsg")),
            cpuid: CpuidFacts {
                host: host_cpuid().entries().iter().map(CpuidRow::from).collect(),
                kvm: kvm.as_ref().map(kvm_cpuid).unwrap_or_default(),
            },
            kvm: kvm_facts,
            snp_trial,
            emulation_trial,
        }
    }
}

fn ask_kvm(kvm: &KvmPlatform) -> Result<KvmFacts, String> {
    let supported = kvm.supported_cpuid().map_err(|e| e.to_string())?;
    let offered = cpuid::from_kvm(&supported);
    let table = |sev| CpuidTable::snp(&offered, 1, &sev).map(|_| ()).map_err(|e| e.to_string());
    Ok(KvmFacts {
        capabilities: kvm.capabilities(),
        address_bits: emulated::address_bits(&supported),
        emulated_cpuid: emulated::snp_cpuid(&supported).map_err(|e| e.to_string()).and_then(table),
        snp_cpuid: table(kvm.snp_cpuid()),
    })
}

fn kvm_cpuid(kvm: &KvmPlatform) -> Vec<CpuidRow> {
    let offered = kvm.supported_cpuid().unwrap_or_default();
    cpuid::from_kvm(&offered).iter().map(CpuidRow::from).collect()
}

/// A small file's text, without the white space around it.
fn value(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(VALUE_BYTES).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

fn cpu_model(root: &Path) -> Option<String> {
    let text = value(&root.join("proc/cpuinfo"))?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The module parameters that exist below `root`.
pub fn parameters(root: &Path) -> BTreeMap<String, String> {
    PARAMETERS
        .iter()
        .filter_map(|name| {
            let (module, parameter) = name.split_once('/')?;
            let path = root.join("sys/module").join(module).join("parameters").join(parameter);
            Some(((*name).to_owned(), value(&path)?))
        })
        .collect()
}

/// The `sev_es` counts of the misc controller, from this process's cgroup up to the host's root.
pub fn asids(root: &Path) -> Vec<AsidGroup> {
    let text = value(&root.join("proc/self/cgroup")).unwrap_or_default();
    let Some(own) = text.lines().find_map(|line| line.strip_prefix("0::")) else { return Vec::new() };
    let mounts = [root.join("sys/fs/cgroup"), root.join("sys/fs/cgroup/unified")];
    let Some(mount) = mounts.iter().find(|m| m.join("cgroup.controllers").exists()) else {
        return Vec::new();
    };
    let count = |path: PathBuf| {
        let text = value(&path)?;
        text.lines().find_map(|line| Some(line.strip_prefix("sev_es ")?.trim().to_owned()))
    };
    let mut groups = Vec::new();
    for cgroup in Path::new(own).ancestors() {
        let below = cgroup.strip_prefix("/").unwrap_or(cgroup);
        let directory = mount.join(below);
        // The host's root has a capacity in place of a limit.
        let limit = if below == Path::new("") { "misc.capacity" } else { "misc.max" };
        let max = count(directory.join(limit));
        let current = count(directory.join("misc.current"));
        if max.is_some() || current.is_some() {
            groups.push(AsidGroup {
                cgroup: cgroup.display().to_string(),
                max: max.and_then(|m| m.parse().ok()),
                current: current.and_then(|c| c.parse().ok()),
            });
        }
    }
    groups
}

/// Lines of the kernel log about SEV. Each read of the log gives one record,
/// `priority,sequence,time,flags;text`.
pub fn kernel_log(path: &Path) -> Option<Vec<String>> {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut log = fs::File::options().read(true).custom_flags(nonblocking).open(path).ok()?;
    let mut text = Vec::new();
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(n) if (text.len() as u64) < LOG_BYTES => {
                text.extend_from_slice(record.get(..n).unwrap_or_default());
            }
            // The record was overwritten before it was read; the next read gives the oldest one that is left.
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
            Ok(_) | Err(_) => break,
        }
    }
    let text = String::from_utf8_lossy(&text);
    let message = |line: &str| line.split_once(';').map(|(_, message)| message.to_owned());
    let messages: Vec<String> = text.lines().filter_map(message).collect();
    Some(about_sev(messages.iter().map(String::as_str)))
}

/// The lines of a log that are worth keeping.
pub(super) fn about_sev<'a>(messages: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut kept: Vec<String> =
        messages.filter(|m| WORDS.iter().any(|word| m.contains(word))).map(str::to_owned).collect();
    kept.drain(..kept.len().saturating_sub(LINES));
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn module_parameters_that_do_not_exist_are_left_out() {
        let root = host(&[
            ("sys/module/kvm_amd/parameters/sev_snp", "Y\n"),
            ("sys/module/kvm/parameters/mmio_caching", "N\n"),
        ]);
        let found = parameters(root.path());
        let expected = [("kvm/mmio_caching", "N"), ("kvm_amd/sev_snp", "Y")];
        assert_eq!(found.len(), expected.len());
        for (name, value) in expected {
            assert_eq!(found.get(name).map(String::as_str), Some(value), "{name}");
        }
    }

    #[test]
    fn asid_limits_count_in_every_cgroup_up_to_the_root() {
        let root = host(&[
            ("proc/self/cgroup", "0::/machine.slice/vm.scope\n"),
            ("sys/fs/cgroup/cgroup.controllers", "cpu memory misc\n"),
            ("sys/fs/cgroup/misc.capacity", "sev 410\nsev_es 99\n"),
            ("sys/fs/cgroup/misc.current", "sev 0\nsev_es 3\n"),
            ("sys/fs/cgroup/machine.slice/misc.max", "sev max\nsev_es 2\n"),
            ("sys/fs/cgroup/machine.slice/misc.current", "sev 0\nsev_es 2\n"),
            ("sys/fs/cgroup/machine.slice/vm.scope/misc.max", "sev max\nsev_es max\n"),
            ("sys/fs/cgroup/machine.slice/vm.scope/misc.current", "sev 0\nsev_es 1\n"),
        ]);
        let group = |cgroup: &str, max, current| AsidGroup { cgroup: cgroup.into(), max, current };
        assert_eq!(
            asids(root.path()),
            [
                group("/machine.slice/vm.scope", None, Some(1)),
                group("/machine.slice", Some(2), Some(2)),
                group("/", Some(99), Some(3)),
            ]
        );
    }

    #[test]
    fn a_host_without_the_misc_controller_has_no_counts() {
        let root = host(&[
            ("proc/self/cgroup", "1:name=systemd:/\n0::/\n"),
            ("sys/fs/cgroup/cgroup.controllers", ""),
        ]);
        assert_eq!(asids(root.path()), []);
        assert_eq!(asids(Path::new("/no/such/root")), []);
    }

    #[test]
    fn the_log_is_reduced_to_lines_about_sev() {
        let root = host(&[(
            "kmsg",
            "6,1,0,-;Linux version 6.12\n6,2,9,-;SEV-SNP: RMP table physical range [0x1 - 0x2]\n6,3,9,-;usb 1-1: new\n",
        )]);
        let lines = kernel_log(&root.path().join("kmsg")).unwrap();
        assert_eq!(lines, ["SEV-SNP: RMP table physical range [0x1 - 0x2]"]);
        assert_eq!(kernel_log(&root.path().join("nothing")), None);
    }
}
