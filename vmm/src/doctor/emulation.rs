// SPDX-License-Identifier: Apache-2.0
//! The lines about the emulated platform. All it needs is KVM on an x86-64 host, of any vendor.

use super::facts::Facts;
use super::line::Area;
use super::line::Check;
use super::line::Status;
use crate::platform::emulated::ADDRESS_BITS_MIN;
use crate::platform::emulated::EmulationTrial;
use crate::platform::kvm::Finding;

/// Below this many instructions each second a Linux kernel takes minutes to boot. Interpreters run about a
/// million, hardware and nested KVM at least ten times this limit.
const SLOW: u64 = 10_000_000;

/// All lines.
pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut lines = vec![kvm_line(Area::Emulation, facts.kvm.as_ref().map(|_| ()))];
    let Ok(kvm) = &facts.kvm else { return lines };
    let deciding = |finding| Check::deciding(Area::Emulation, finding);
    let caps = &kvm.capabilities;
    lines.push(deciding(Finding {
        id: "kvm-msr-exits",
        what: "KVM_CAP_X86_USER_SPACE_MSR",
        found: format!("KVM answers {:#x}", caps.user_space_msr),
        needed: "not 0",
        fix: "Use Linux 5.10 or later on the host",
        ok: caps.user_space_msr > 0,
    }));
    lines.push(deciding(Finding {
        id: "kvm-msr-exits",
        what: "KVM_CAP_X86_MSR_FILTER",
        found: format!("KVM answers {:#x}", caps.msr_filter),
        needed: "not 0",
        fix: "Use Linux 5.10 or later on the host",
        ok: caps.msr_filter > 0,
    }));
    lines.push(deciding(caps.irqchip_finding()));
    lines.push(deciding(caps.pit_finding()));
    lines.push(deciding(Finding {
        id: "address-bits",
        what: "Physical address bits",
        found: kvm
            .address_bits
            .map_or_else(|| "not told, so 36".to_owned(), |bits| format!("{bits} in KVM's CPUID")),
        needed: "at least 36, to set one apart as the C-bit",
        fix: "Use another host; in a nested guest, give its CPUs more address bits",
        ok: kvm.address_bits.is_none_or(|bits| bits >= ADDRESS_BITS_MIN),
    }));
    lines.push(deciding(Finding {
        id: "cpuid-table",
        what: "CPUID for an emulated guest",
        found: kvm.emulated_cpuid.as_ref().err().cloned().unwrap_or_else(|| "can be made".into()),
        needed: "long mode, RDRAND and what else Linux wants of an SNP guest's CPU",
        fix: "Use another host; in a nested guest, give its CPUs these features",
        ok: kvm.emulated_cpuid.is_ok(),
    }));
    lines.extend(trial(&facts.emulation_trial));
    lines
}

/// Whether KVM can be asked anything.
pub fn kvm_line(area: Area, kvm: Result<(), &String>) -> Check {
    Check::deciding(
        area,
        Finding {
            id: "kvm-open",
            what: "/dev/kvm",
            found: kvm.err().cloned().unwrap_or_else(|| "can be used".into()),
            needed: "open for reading and writing, API version 12",
            fix: "Load kvm_amd or kvm_intel, enable virtualization in the BIOS, and add this user to the device's group",
            ok: kvm.is_ok(),
        },
    )
}

fn trial(trial: &EmulationTrial) -> Vec<Check> {
    let (ok, found) = match trial {
        EmulationTrial::Passed { .. } => (true, "it ran to its end".to_owned()),
        EmulationTrial::Failed(why) => (false, why.clone()),
        EmulationTrial::NotTried(why) => (false, format!("not tried: {why}")),
    };
    let mut lines = vec![Check::deciding(
        Area::Emulation,
        Finding {
            id: "emulation-trial",
            what: "A guest of a few bytes",
            found,
            needed: "a VM with an MSR filter runs a loop and halts",
            fix: "Use another host, or nested KVM under QEMU's software emulation: `cargo xtask l1` in cvmm's repository",
            ok,
        },
    )];
    if let EmulationTrial::Passed { rate } = *trial {
        let millions = rate as f64 / 1e6;
        let status = if rate < SLOW { Status::Warning } else { Status::Ok };
        lines.push(Check::new(
            Area::Emulation,
            ("speed", "Speed"),
            status,
            format!("{millions:.1} million instructions each second"),
            "10 million for a Linux kernel that boots in reasonable time",
            "This KVM interprets its guests and may not know every instruction of a Linux kernel: use another host, or nested KVM \
             under QEMU's software emulation: `cargo xtask l1` in cvmm's repository",
        ));
    }
    lines
}
