// SPDX-License-Identifier: Apache-2.0
//! The judgement, on the facts of hosts that are not here.
//!
//! `this_machine` was recorded on the project's development machine by `cvmm doctor --json`. `good_host` is put together from
//! what Linux 6.12's sources and AMD's manuals say about an EPYC 7003 host; it was **not** recorded on one.

use std::collections::BTreeMap;

use super::*;
use crate::doctor::facts::AsidGroup;
use crate::doctor::facts::KvmFacts;
use crate::platform::emulated::EmulationTrial;
use crate::platform::kvm::Access;
use crate::platform::kvm::Capabilities;
use crate::platform::kvm::PlatformStatus;
use crate::platform::kvm::Trial;

/// A line, and what is done to a good host before it is looked at.
type Change = (&'static str, fn(&mut Facts));

fn good_host() -> Facts {
    let parameters = [
        ("kvm_amd/sev", "Y"),
        ("kvm_amd/sev_es", "Y"),
        ("kvm_amd/sev_snp", "Y"),
        ("kvm_amd/npt", "Y"),
        ("kvm_amd/nrips", "1"),
        ("kvm_amd/lbrv", "1"),
        ("kvm_amd/debug_swap", "N"),
        ("kvm/mmio_caching", "Y"),
    ];
    Facts {
        kernel: "6.12.95".into(),
        cpu_model: "AMD EPYC 7443P 24-Core Processor".into(),
        // SME, SEV, page flush, ES, SNP, VMPL; C-bit 51 and 5 bits lost; 509 ASIDs, 99 of them below plain SEV's.
        sev_leaf: Some([0x0101_fd3f, 0x0000_4173, 0x1fd, 0x64]),
        parameters: parameters.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
        sev_device: Access::Granted,
        firmware: Some(Ok(PlatformStatus {
            api: (1, 55),
            state: 1,
            rmp_initialized: true,
            build: 23,
            mask_chip_id: false,
            mask_chip_key: false,
            vlek: false,
            guests: 0,
            current_tcb: 0xd315_0000_0000_0004,
            reported_tcb: 0xd315_0000_0000_0004,
        })),
        asids: vec![AsidGroup { cgroup: "/".into(), max: Some(99), current: Some(0) }],
        kernel_log: Some(vec!["SEV-SNP: RMP table physical range [0x35e00000 - 0x3d2fffff]".into()]),
        kvm: Ok(KvmFacts {
            capabilities: Capabilities {
                vm_types: 0b1_1101,
                guest_memfd: 1,
                user_memory2: 1,
                memory_attributes: 8,
                memory_fault_info: 1,
                exit_hypercall: 1 << 12,
                irqchip: 1,
                user_space_msr: 1,
                msr_filter: 1,
                vmsa_features: Some(0x20),
                policy_bits: None,
                req_certs: None,
            },
            address_bits: Some(48),
            emulated_cpuid: Ok(()),
            snp_cpuid: Ok(()),
        }),
        snp_trial: Trial::Passed,
        emulation_trial: EmulationTrial::Passed { rate: 900_000_000 },
    }
}

/// A host as it is when `kvm_amd` has turned SNP off.
fn snp_off() -> Facts {
    let mut facts = good_host();
    facts.parameters.insert("kvm_amd/sev_snp".into(), "N".into());
    capabilities(&mut facts).vm_types = 0b1101;
    facts.snp_trial = Trial::NotTried("KVM has no SNP guests".into());
    facts
}

fn capabilities(facts: &mut Facts) -> &mut Capabilities {
    &mut facts.kvm.as_mut().unwrap().capabilities
}

fn this_machine() -> Facts {
    serde_json::from_str(include_str!("recorded/development.json")).unwrap()
}

/// The same machine if its KVM were a full one.
fn emulating_host() -> Facts {
    let mut facts = this_machine();
    facts.kvm.as_mut().unwrap().emulated_cpuid = Ok(());
    facts.emulation_trial = EmulationTrial::Passed { rate: 400_000_000 };
    facts
}

fn line<'a>(diagnosis: &'a Diagnosis, what: &str) -> &'a Check {
    let found = diagnosis.checks.iter().find(|c| c.what == what);
    found.unwrap_or_else(|| panic!("no line {what:?} in\n{diagnosis}"))
}

fn not_ok(diagnosis: &Diagnosis) -> Vec<(&str, Status)> {
    let bad = diagnosis.checks.iter().filter(|c| c.status != Status::Ok);
    bad.map(|c| (c.what.as_str(), c.status)).collect()
}

#[test]
fn a_host_as_the_kernel_describes_it_has_nothing_to_fix() {
    let diagnosis = judge(good_host());
    assert_eq!(not_ok(&diagnosis), [], "\n{diagnosis}");
    assert_eq!((diagnosis.verdict, diagnosis.exit_code), (Verdict::Snp, 0));
    assert_eq!(
        line(&diagnosis, "ASIDs for SEV-ES and SNP").found,
        "99 of 509 (the lowest one for plain SEV is 100)"
    );
    assert!(line(&diagnosis, "C-bit").found.starts_with("bit 51, 5 "), "{diagnosis}");
}

/// Its KVM interprets guests, and offers no RDRAND: `cvmm --snp --platform emulated` refuses it for that as well.
#[test]
fn the_development_machine_can_do_neither() {
    let diagnosis = judge(this_machine());
    assert_eq!((diagnosis.verdict, diagnosis.exit_code), (Verdict::Neither, 11), "\n{diagnosis}");
    for what in [
        "CPU with SEV-SNP",
        "KVM with SNP guests",
        "/dev/sev",
        "Module kvm_amd",
        "CPUID for an emulated guest",
    ] {
        assert_eq!(line(&diagnosis, what).status, Status::Missing, "{what}");
        assert!(!line(&diagnosis, what).fix.is_empty(), "{what}");
    }
    assert!(line(&diagnosis, "CPUID for an emulated guest").found.contains("RDRAND"));
    assert_eq!(line(&diagnosis, "Speed").status, Status::Warning);
}

#[test]
fn an_ordinary_host_can_emulate_only() {
    let diagnosis = judge(emulating_host());
    assert_eq!((diagnosis.verdict, diagnosis.exit_code), (Verdict::Emulation, 10), "\n{diagnosis}");
}

#[test]
fn a_host_without_kvm_can_do_neither_and_is_told_once_for_each() {
    let mut facts = this_machine();
    facts.kvm = Err("/dev/kvm does not exist".into());
    facts.emulation_trial = EmulationTrial::NotTried("KVM cannot be used".into());
    let diagnosis = judge(facts);
    assert_eq!(diagnosis.exit_code, 11);
    let lines: Vec<_> = diagnosis.checks.iter().filter(|c| c.what == "/dev/kvm").map(|c| c.area).collect();
    assert_eq!(lines, [Area::Snp, Area::Emulation]);
    assert!(!diagnosis.checks.iter().any(|c| c.what.starts_with("KVM_CAP")), "no noise:\n{diagnosis}");
}

/// A host that launches is good, whatever else looks odd: each of these alone may be a warning, not more.
#[test]
fn nothing_but_the_launch_itself_can_fail_a_host() {
    let oddities: [Change; 7] = [
        ("Parameter kvm_amd.sev_snp", |f| drop(f.parameters.insert("kvm_amd/sev_snp".into(), "N".into()))),
        ("Module kvm_amd", |f| f.parameters = BTreeMap::new()),
        ("SNP firmware", |f| f.firmware = Some(Err("SNP_PLATFORM_STATUS: busy".into()))),
        ("RMP table", |f| (f.firmware, f.kernel_log) = (None, None)),
        ("Free ASID in cgroup /", |f| f.asids[0].current = Some(99)),
        ("ASIDs for SEV-ES and SNP", |f| f.sev_leaf.as_mut().unwrap()[3] = 1),
        ("KVM_SEV_INIT2", |f| capabilities(f).vmsa_features = None),
    ];
    for (what, change) in oddities {
        let mut facts = good_host();
        change(&mut facts);
        let diagnosis = judge(facts);
        assert_eq!(diagnosis.verdict, Verdict::Snp, "{what}");
        assert_eq!(line(&diagnosis, what).status, Status::Warning, "{what}");
    }
}

/// And the other way: what the launch refuses, doctor does not pass.
#[test]
fn each_need_of_the_launch_fails_a_host_alone() {
    let lacks: [Change; 9] = [
        ("CPU with SEV-SNP", |f| f.sev_leaf.as_mut().unwrap()[0] &= !(1 << 4)),
        ("CPU with SEV-SNP", |f| f.sev_leaf = None),
        ("KVM with SNP guests", |f| capabilities(f).vm_types = 1),
        ("KVM_CAP_GUEST_MEMFD", |f| capabilities(f).guest_memfd = 0),
        ("KVM_CAP_USER_MEMORY2", |f| capabilities(f).user_memory2 = 0),
        ("KVM_CAP_MEMORY_ATTRIBUTES", |f| capabilities(f).memory_attributes = 4),
        ("KVM_CAP_EXIT_HYPERCALL", |f| capabilities(f).exit_hypercall = 1),
        ("/dev/sev", |f| f.sev_device = Access::Denied),
        ("A launch that is begun and given up", |f| f.snp_trial = Trial::NotTried("no reason".into())),
    ];
    for (what, change) in lacks {
        let mut facts = good_host();
        change(&mut facts);
        let diagnosis = judge(facts);
        assert_eq!(diagnosis.verdict, Verdict::Emulation, "{what}");
        assert_eq!(not_ok(&diagnosis), [(what, Status::Missing)], "\n{diagnosis}");
        assert!(!line(&diagnosis, what).fix.is_empty(), "{what}");
    }
}

#[test]
fn no_rmp_in_the_bios_is_found_in_the_kernel_log() {
    let mut facts = snp_off();
    facts.firmware = Some(Err("SNP_PLATFORM_STATUS: Input/output error (os error 5)".into()));
    let said = "SEV-SNP: Memory for the RMP table has not been reserved by BIOS";
    facts.kernel_log = Some(vec!["ccp 0000:22:00.1: sev enabled".into(), said.into()]);
    let diagnosis = judge(facts);
    let rmp = line(&diagnosis, "RMP table");
    assert_eq!(rmp.status, Status::Missing);
    assert!(rmp.found.contains(said) && rmp.fix.contains("BIOS"), "{rmp:?}");
    let parameter = line(&diagnosis, "Parameter kvm_amd.sev_snp");
    assert_eq!((parameter.status, parameter.found.as_str()), (Status::Missing, "N"));
}

#[test]
fn a_bios_that_reserves_no_asids_is_told_how_to() {
    let mut facts = snp_off();
    facts.sev_leaf.as_mut().unwrap()[3] = 1;
    let diagnosis = judge(facts);
    let asids = line(&diagnosis, "ASIDs for SEV-ES and SNP");
    assert_eq!(asids.status, Status::Missing);
    assert!(asids.found.starts_with("0 of 509") && asids.fix.contains("ASID"), "{asids:?}");
}

#[test]
fn a_launch_that_finds_no_asid_is_not_blamed_on_the_firmware() {
    let mut facts = good_host();
    facts.asids.insert(0, AsidGroup { cgroup: "/guests".into(), max: Some(2), current: Some(2) });
    facts.snp_trial = Trial::Failed {
        step: "creating an SNP guest".into(),
        errno: libc::EBUSY,
        firmware: 0,
        error: "KVM_SEV_INIT2: Device or resource busy".into(),
    };
    let diagnosis = judge(facts);
    assert_eq!(diagnosis.verdict, Verdict::Emulation);
    let trial = line(&diagnosis, "A launch that is begun and given up");
    assert!(trial.fix.contains("ASID") && trial.found.contains("busy"), "{trial:?}");
    assert_eq!(line(&diagnosis, "Free ASID in cgroup /guests").status, Status::Missing);
    assert_eq!(line(&diagnosis, "Free ASID in cgroup /").status, Status::Ok);
}

#[test]
fn old_firmware_and_masked_keys_are_named() {
    let mut facts = good_host();
    if let Some(Ok(status)) = &mut facts.firmware {
        (status.api, status.mask_chip_key) = ((1, 50), true);
    }
    let diagnosis = judge(facts.clone());
    assert_eq!(
        not_ok(&diagnosis),
        [("SNP firmware", Status::Warning), ("Reports are signed", Status::Warning)]
    );
    facts.snp_trial = Trial::NotTried("KVM has no SNP guests".into());
    assert_eq!(line(&judge(facts), "SNP firmware").status, Status::Missing);
}

#[test]
fn a_kernel_that_names_its_policy_bits_is_believed() {
    let mut facts = good_host();
    capabilities(&mut facts).policy_bits = Some(0x3fb_ffff);
    assert!(line(&judge(facts.clone()), "Policy bits").found.contains("0x3fbffff"));
    capabilities(&mut facts).policy_bits = Some(0x2_ffff);
    assert!(line(&judge(facts), "Policy bits").found.contains("SMT"));
}

#[test]
fn a_slow_kvm_is_a_warning_and_a_guest_that_does_not_run_is_none() {
    let mut facts = emulating_host();
    facts.emulation_trial = EmulationTrial::Passed { rate: 1_000_000 };
    let diagnosis = judge(facts.clone());
    assert_eq!(line(&diagnosis, "Speed").status, Status::Warning);
    assert_eq!(diagnosis.exit_code, 10);
    facts.emulation_trial = EmulationTrial::Failed("KVM_RUN: Function not implemented".into());
    assert_eq!(judge(facts).exit_code, 11);
}

#[test]
fn too_few_address_bits_rule_out_emulation() {
    let mut facts = emulating_host();
    facts.kvm.as_mut().unwrap().address_bits = Some(32);
    let diagnosis = judge(facts);
    assert_eq!(diagnosis.exit_code, 11);
    assert_eq!(line(&diagnosis, "Physical address bits").status, Status::Missing);
}

#[test]
fn json_carries_verdict_lines_and_facts() {
    let diagnosis = judge(good_host());
    let json = serde_json::to_value(&diagnosis).unwrap();
    assert_eq!(json["verdict"], "snp");
    assert_eq!(json["exit_code"], 0);
    assert_eq!(json["checks"][0]["status"], "ok");
    let facts: Facts = serde_json::from_value(json["facts"].clone()).unwrap();
    assert_eq!(facts, diagnosis.facts);
}
