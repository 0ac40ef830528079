// SPDX-License-Identifier: Apache-2.0
//! The lines about SNP guests of this host.

use snp::policy::GuestPolicy;
use snp::policy::PolicyRules;

use super::facts::AsidGroup;
use super::facts::Facts;
use super::line::Area;
use super::line::Check;
use super::line::Status;
use super::log;
use super::trial::CpuidChange;
use super::trial::CpuidTrial;
use super::trial::Trial;
use crate::platform::kvm::Capabilities;
use crate::platform::kvm::Finding;
use crate::platform::kvm::PlatformStatus;
use crate::platform::kvm::cpu_finding;

/// Lowest version of the firmware's ABI that Linux takes (`drivers/crypto/ccp/sev-dev.c`, `SNP_MIN_API_*`).
const API_MIN: (u8, u8) = (1, 51);

/// Module parameters that `sev_hardware_setup` wants, and why.
const PARAMETERS: [(&str, &str, &str); 7] = [
    ("param-sev", "kvm_amd/sev", "Load kvm_amd with sev=1; if that does not help, see the other lines"),
    (
        "param-sev-es",
        "kvm_amd/sev_es",
        "Load kvm_amd with sev_es=1; it turns itself off without ASIDs, mmio_caching or lbrv",
    ),
    (
        "param-sev-snp",
        "kvm_amd/sev_snp",
        "Load kvm_amd with sev_snp=1; it turns itself off if the host has no RMP or the firmware refused",
    ),
    ("param-npt", "kvm_amd/npt", "Load kvm_amd with npt=1: SEV needs nested paging"),
    ("param-nrips", "kvm_amd/nrips", "Load kvm_amd with nrips=1: SEV needs it"),
    ("param-lbrv", "kvm_amd/lbrv", "Load kvm_amd with lbrv=1: SEV-ES needs it"),
    ("param-mmio-caching", "kvm/mmio_caching", "Load kvm with mmio_caching=1: SEV-ES needs it"),
];

/// All lines, those that decide first.
pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut lines = vec![deciding(cpu_finding(facts.sev_leaf))];
    match &facts.kvm {
        Ok(kvm) => {
            lines.extend(kvm.capabilities.snp_findings().into_iter().map(deciding));
            lines.push(deciding(Finding {
                id: "cpuid-table",
                what: "CPUID for an SNP guest",
                found: kvm.snp_cpuid.as_ref().err().cloned().unwrap_or_else(|| "can be made".into()),
                needed: "a table that the firmware's CPUID page can hold, with RDRAND and a C-bit",
                fix: "Update the host's kernel; KVM must offer what Linux guests need",
                ok: kvm.snp_cpuid.is_ok(),
            }));
        }
        Err(why) => lines.push(super::emulation::kvm_line(Area::Snp, Err(why))),
    }
    lines.push(deciding(facts.sev_device.finding()));
    lines.push(trial(&facts.snp_trial));
    lines.extend(facts.snp_trial.cpuid().map(|cpuid| cpuid_page(cpuid, facts)));

    lines.extend(asids_of_cpu(facts));
    lines.extend(parameters(facts));
    lines.push(log::rmp(facts));
    lines.extend(log::iommu(facts));
    match &facts.firmware {
        Some(Ok(status)) => lines.extend(firmware(status)),
        Some(Err(why)) => lines.push(Check::explaining(
            ("firmware", "SNP firmware"),
            false,
            why.clone(),
            "an answer",
            log::firmware_fix(facts),
        )),
        None => lines.extend(log::firmware(facts)),
    }
    lines.extend(facts.asids.iter().map(asids_of_group));
    if let Ok(kvm) = &facts.kvm {
        lines.extend(attributes(&kvm.capabilities, &facts.kernel));
    }
    lines
}

fn deciding(finding: Finding) -> Check {
    Check::deciding(Area::Snp, finding)
}

fn trial(trial: &Trial) -> Check {
    let (ok, found, fix) = match trial {
        Trial::Passed(_) => (true, "an SNP VM was initialised and took its first pages".to_owned(), ""),
        Trial::NotTried(why) => (false, format!("not tried: {why}"), "See the lines above"),
        Trial::Failed { step, error, cpuid: Some(cpuid), .. } => {
            let fix = match (cpuid.acceptable, &cpuid.again) {
                (true, Some(Ok(()))) => {
                    "Launch with --accept-cpuid: the firmware took the page with its own values, which only take features away"
                }
                _ => {
                    "Update the host's kernel and its SEV firmware together, and send the output of `cvmm doctor --json` to this \
                     project: the firmware refuses values that its monitor offers"
                }
            };
            (false, format!("{step}: {error}; see the next line"), fix)
        }
        Trial::Failed { step, errno, firmware, error, cpuid: None } => {
            (false, format!("{step}: {error}"), trial_fix(step, *errno, *firmware))
        }
    };
    deciding(Finding {
        id: "launch-trial",
        what: "A launch that is begun and given up",
        found,
        needed: "KVM_CREATE_VM, KVM_SEV_INIT2, a guest_memfd, LAUNCH_START, and LAUNCH_UPDATE of a normal page and of the CPUID \
                 page succeed",
        fix,
        ok,
    })
}

/// What the firmware made of each value that the launch offers, beside what the CPU itself says.
fn cpuid_page(cpuid: &CpuidTrial, facts: &Facts) -> Check {
    let host = |change: &CpuidChange| {
        let row = facts.cpuid.host.iter().find(|r| (r.leaf, r.subleaf) == (change.leaf, change.subleaf))?;
        let at = ["EAX", "EBX", "ECX", "EDX"].iter().position(|name| *name == change.register)?;
        row.registers.get(at)
    };
    let mut said: Vec<String> = cpuid
        .changes
        .iter()
        .map(|c| {
            let own = host(c).map_or_else(String::new, |v| format!(", this CPU itself says {v:#010x}"));
            format!(
                "{:#x}.{} {}: offered {:#010x}, accepted {:#010x}{own}",
                c.leaf, c.subleaf, c.register, c.offered, c.accepted
            )
        })
        .collect();
    if cpuid.structure {
        said.push("the firmware also changed the page's count, leaves or reserved bytes".into());
    }
    if let Some(Err(why)) = &cpuid.again {
        said.push(format!("and it refused its own values as well: {why}"));
    }
    let entries = cpuid.offered.len();
    let found = match said.is_empty() {
        true => format!("the firmware took all {entries} entries as they were offered"),
        false => format!("of {entries} entries, {}", said.join("; ")),
    };
    Check::explaining(
        ("cpuid-page", "Values of the CPUID page"),
        said.is_empty(),
        found,
        "every value is accepted as KVM offers it",
        "Nothing, if the launch above succeeded: the guest does without these features",
    )
}

/// What an errno most likely means at a step (`sev_guest_init`, `snp_launch_start` in Linux'
/// `arch/x86/kvm/svm/sev.c`).
fn trial_fix(step: &str, errno: i32, firmware: u32) -> &'static str {
    let init = step == "creating an SNP guest";
    match (errno, firmware) {
        (libc::EBUSY, 0 | u32::MAX) if init => {
            "No ASID is free: stop other SEV-ES or SNP guests, raise misc.max (sev_es) of the cgroup, or reserve more ASIDs in the BIOS"
        }
        (libc::ENOTTY, _) if init => {
            "There are no ASIDs for SEV-ES and SNP: set the minimum SEV non-ES ASID in the BIOS to more than 1"
        }
        (libc::EINVAL, _) if init => "KVM refused KVM_SEV_INIT2: use Linux 6.11 or later on the host",
        (libc::EINVAL, _) if step == "creating an SNP VM" => {
            "KVM refuses the VM type: load kvm_amd with sev=1 sev_es=1 sev_snp=1"
        }
        (libc::EACCES | libc::EPERM, _) => "Give this user access to /dev/kvm and /dev/sev",
        (libc::ENODEV | libc::ETIMEDOUT, _) => {
            "The PSP does not answer: see the kernel log for lines of the ccp driver; a power cycle may be needed"
        }
        (libc::ENOMEM, _) => "The host is out of memory",
        (_, 0 | u32::MAX) => "See the kernel log for lines of kvm_amd and ccp",
        _ => {
            "The firmware refused: update the BIOS or the SEV firmware, and see the kernel log for lines of the ccp driver"
        }
    }
}

/// What CPUID says about address spaces, and about the C-bit.
fn asids_of_cpu(facts: &Facts) -> Vec<Check> {
    let Some([eax, ebx, ecx, edx]) = facts.sev_leaf.filter(|leaf| leaf[0] & 1 << 4 != 0) else {
        return Vec::new();
    };
    // With EDX = ECX + 1 all of them are for SEV-ES and SNP, and none for plain SEV, which is no fault.
    let shared = edx.saturating_sub(1).min(ecx);
    // Ciphertext hiding: SNP guests have 1..N, SEV-ES the rest (Linux 7.3, `sev_hardware_setup`).
    let hiding = facts.parameters.get("kvm_amd/ciphertext_hiding_asids").and_then(|n| n.parse().ok());
    let (count, split) = match hiding.filter(|n| *n > 0) {
        Some(n) => (shared.min(n), format!("; ciphertext hiding leaves SEV-ES {}", shared.saturating_sub(n))),
        None => (shared, String::new()),
    };
    let plain = match edx <= ecx {
        true => format!("the lowest one for plain SEV is {edx}"),
        false => "plain SEV has none".to_owned(),
    };
    vec![
        Check::explaining(
            ("cpu-sev-es", "SEV and SEV-ES"),
            eax & 0b1010 == 0b1010,
            format!("CPUID 0x8000001F EAX is {eax:#x}"),
            "bits 1 and 3",
            "Enable SEV and SEV-ES in the BIOS",
        ),
        Check::explaining(
            ("asids", "ASIDs for SEV-ES and SNP"),
            count > 0,
            format!("{count} of {ecx} ({plain}{split})"),
            "at least 1",
            "Set the minimum SEV non-ES ASID in the BIOS to more than 1",
        ),
        Check::explaining(
            ("c-bit", "C-bit"),
            (32..=51).contains(&(ebx & 0x3f)),
            format!("bit {}, {} physical address bits lost", ebx & 0x3f, ebx >> 6 & 0x3f),
            "a position from 32 to 51",
            "",
        ),
    ]
}

fn parameters(facts: &Facts) -> Vec<Check> {
    if !facts.parameters.keys().any(|name| name.starts_with("kvm_amd/")) {
        return vec![Check::explaining(
            ("module-kvm-amd", "Module kvm_amd"),
            false,
            "no parameters in /sys/module/kvm_amd",
            "loaded, or built in",
            "Run `modprobe kvm_amd` on an AMD host with SVM enabled in the BIOS",
        )];
    }
    let line = |(id, name, fix): &(&'static str, &str, &'static str)| {
        let value = facts.parameters.get(*name)?;
        // Some are booleans, some are numbers.
        let on = matches!(value.as_str(), "Y" | "y") || value.parse().is_ok_and(|n: i64| n != 0);
        let what = format!("Parameter {}", name.replace('/', "."));
        Some(Check::explaining((id, &what), on, value.clone(), "Y or 1", fix))
    };
    PARAMETERS.iter().filter_map(line).collect()
}

fn firmware(status: &PlatformStatus) -> Vec<Check> {
    let (major, minor) = status.api;
    let warning = |name, masked, bad: &str, good: &str, fix: &str| {
        let state = if masked { Status::Warning } else { Status::Ok };
        Check::new(Area::Snp, name, state, if masked { bad } else { good }, "not masked", fix)
    };
    vec![
        Check::explaining(
            ("firmware", "SNP firmware"),
            status.api >= API_MIN,
            format!("ABI {major}.{minor}, build {}", status.build),
            "ABI 1.51 or later",
            "Update the BIOS, or put a newer SEV firmware file where the ccp driver looks for it",
        ),
        Check::explaining(
            ("firmware-state", "SNP firmware's state"),
            status.state == 1,
            match status.state {
                0 => "uninitialised".to_owned(),
                1 => format!(
                    "initialised, {} guests, TCB {:#x} (reported {:#x}), {}",
                    status.guests,
                    status.current_tcb,
                    status.reported_tcb,
                    if status.vlek { "VLEK loaded" } else { "no VLEK" }
                ),
                other => format!("state {other}"),
            },
            "initialised",
            "See the kernel log for lines of the ccp driver",
        ),
        warning(
            ("reports-signed", "Reports are signed"),
            status.mask_chip_key,
            "no: MASK_CHIP_KEY is set, so no verifier can trust a report",
            "yes",
            "Clear MASK_CHIP_KEY by SNP_SET_CONFIG",
        ),
        warning(
            ("reports-chip-id", "Reports name the chip"),
            status.mask_chip_id,
            "no: MASK_CHIP_ID is set, so a verifier must be told which VCEK to take",
            "yes",
            "Clear MASK_CHIP_ID by SNP_SET_CONFIG, or use a VLEK",
        ),
    ]
}

fn asids_of_group(group: &AsidGroup) -> Check {
    let free = match (group.max, group.current) {
        (Some(max), Some(current)) => max > current,
        (Some(max), None) => max > 0,
        (None, _) => true,
    };
    let show = |n: Option<u64>, none: &str| n.map_or_else(|| none.to_owned(), |n| n.to_string());
    Check::explaining(
        ("asid-cgroup", &format!("Free ASID in cgroup {}", group.cgroup)),
        free,
        format!("{} in use, limit {}", show(group.current, "unknown"), show(group.max, "none")),
        "fewer in use than the limit",
        "Stop other SEV-ES or SNP guests, or raise the sev_es entry of misc.max",
    )
}

/// What KVM's SEV attributes say.
fn attributes(caps: &Capabilities, kernel: &str) -> Vec<Check> {
    if caps.vm_types & 1 << kvm_bindings::KVM_X86_SNP_VM == 0 {
        return Vec::new();
    }
    let rules = caps.policy_bits.map_or_else(|| PolicyRules::of_release(kernel), PolicyRules::told);
    let allowed = rules.allowed;
    let policy = GuestPolicy::DEFAULT.check_kvm(rules);
    let source = if caps.policy_bits.is_some() {
        "as KVM says"
    } else {
        "as this kernel's release says; KVM does not"
    };
    vec![
        Check::explaining(
            ("kvm-sev-init2", "KVM_SEV_INIT2"),
            caps.vmsa_features.is_some(),
            caps.vmsa_features.map_or_else(
                || "not known to KVM".to_owned(),
                |f| format!("VMSA features {f:#x} can be asked for"),
            ),
            "known to KVM; no feature is asked for",
            "Use Linux 6.11 or later on the host",
        ),
        Check::explaining(
            ("policy", "Policy bits"),
            policy.is_ok(),
            match &policy {
                Ok(()) => format!("{allowed:#x} are allowed, {source}; {}", demanded(rules)),
                Err(e) => e.to_string(),
            },
            "the default policy 0x30000 is allowed",
            "Use a kernel that allows it, or choose another --policy",
        ),
        Check::explaining(
            ("kvm-memory-fault-info", "KVM_CAP_MEMORY_FAULT_INFO"),
            caps.memory_fault_info > 0,
            format!("KVM answers {:#x}", caps.memory_fault_info),
            "not 0, so that a guest's access to a page in the wrong state can be told",
            "Use Linux 6.8 or later on the host",
        ),
        Check::explaining(
            ("guest-certs", "Certificates for guests"),
            true,
            match caps.req_certs {
                Some(n) if n != 0 => "KVM can ask the monitor for them",
                _ => "KVM gives guests an empty table; Linux 7.0 or later can ask the monitor",
            },
            "",
            "",
        ),
    ]
}

/// Which bits a policy must have.
fn demanded(rules: PolicyRules) -> &'static str {
    if GuestPolicy(rules.required).smt() {
        "bits 16 (SMT) and 17 must be 1: kernels before 6.17 refuse a policy that forbids SMT"
    } else {
        "bit 17 must be 1, and bit 16 (SMT) where the CPU has SMT on"
    }
}
