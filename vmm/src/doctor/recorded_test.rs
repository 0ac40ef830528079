// SPDX-License-Identifier: Apache-2.0
//! The judgement, on the facts of hosts that are not here.
//!
//! `this_machine` was recorded on the project's development machine by `cvmm doctor --json`. `good_host` is
//! put together from what Linux 6.12's sources and AMD's manuals say about an EPYC 7003 host; it was **not**
//! recorded on one.

use std::collections::BTreeMap;

use super::*;
use crate::doctor::facts::AsidGroup;
use crate::doctor::facts::CpuidFacts;
use crate::doctor::facts::KvmFacts;
use crate::doctor::trial::CpuidChange;
use crate::doctor::trial::CpuidTrial;
use crate::doctor::trial::Trial;
use crate::platform::emulated::EmulationTrial;
use crate::platform::kvm::Access;
use crate::platform::kvm::Capabilities;
use crate::platform::kvm::CpuidRow;
use crate::platform::kvm::PlatformStatus;

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
        // SME, SEV, page flush, ES, SNP, VMPL; C-bit 51 and 5 bits lost; 509 ASIDs, 99 of them below plain
        // SEV's.
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
                pit2: 1,
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
        snp_trial: Trial::Passed(CpuidTrial::default()),
        cpuid: CpuidFacts::default(),
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

/// Its KVM interprets guests, and offers no RDRAND: `cvmm --snp --platform emulated` refuses it for that as
/// well.
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
    let lines: Vec<_> = diagnosis.checks.iter().filter(|c| c.id == "kvm-open").map(|c| c.area).collect();
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
    let lacks: [Change; 11] = [
        ("CPU with SEV-SNP", |f| f.sev_leaf.as_mut().unwrap()[0] &= !(1 << 4)),
        ("CPU with SEV-SNP", |f| f.sev_leaf = None),
        ("KVM with SNP guests", |f| capabilities(f).vm_types = 1),
        ("KVM_CAP_GUEST_MEMFD", |f| capabilities(f).guest_memfd = 0),
        ("KVM_CAP_USER_MEMORY2", |f| capabilities(f).user_memory2 = 0),
        ("KVM_CAP_MEMORY_ATTRIBUTES", |f| capabilities(f).memory_attributes = 4),
        ("KVM_CAP_EXIT_HYPERCALL", |f| capabilities(f).exit_hypercall = 1),
        ("KVM_CAP_IRQCHIP", |f| capabilities(f).irqchip = 0),
        ("KVM_CAP_PIT2", |f| capabilities(f).pit2 = 0),
        ("/dev/sev", |f| f.sev_device = Access::Denied),
        ("A launch that is begun and given up", |f| f.snp_trial = Trial::NotTried("no reason".into())),
    ];
    for (what, change) in lacks {
        let mut facts = good_host();
        change(&mut facts);
        let diagnosis = judge(facts);
        assert_ne!(diagnosis.verdict, Verdict::Snp, "{what}");
        let bad: Vec<_> = diagnosis.checks.iter().filter(|c| c.status != Status::Ok).collect();
        // The emulated platform has some of the needs as well.
        assert!(bad.iter().all(|c| c.what == what && c.status == Status::Missing), "\n{diagnosis}");
        assert!(bad.iter().any(|c| c.area == Area::Snp), "{what}");
        assert!(!line(&diagnosis, what).fix.is_empty(), "{what}");
    }
}

/// A host is told what to do about each capability: all of them had one text, which sent people to another
/// kernel for nothing.
#[test]
fn each_capability_has_a_text_of_its_own() {
    let mut facts = good_host();
    *capabilities(&mut facts) = Capabilities::default();
    let diagnosis = judge(facts);
    let fix = |what| line(&diagnosis, what).fix.as_str();
    assert!(fix("KVM_CAP_IRQCHIP").contains("CONFIG_KVM_IOAPIC"));
    assert!(fix("KVM_CAP_PIT2").contains("CONFIG_KVM_IOAPIC"));
    assert!(fix("KVM_CAP_GUEST_MEMFD").contains("CONFIG_KVM_AMD_SEV"));
    assert!(fix("KVM with SNP guests").contains("sev_snp=1"));
    assert!(!fix("KVM_CAP_EXIT_HYPERCALL").contains("6.11"));
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
        cpuid: None,
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

/// Whoever reads one line knows what to do.
#[test]
fn the_first_line_is_the_verdict_and_its_reason() {
    let first = |facts| judge(facts).to_string().lines().next().unwrap().to_owned();
    assert_eq!(first(good_host()), "SNP guests can be launched on this host");
    let no = first(emulating_host());
    for part in
        ["SNP guests cannot be launched", "CPU with SEV-SNP", "and 5 more", "--snp --platform emulated"]
    {
        assert!(no.contains(part), "{part:?} is not in {no:?}");
    }
    let neither = first(this_machine());
    for part in ["SNP guests cannot be launched", "Nor can the emulated platform be used", "RDRAND"] {
        assert!(neither.contains(part), "{part:?} is not in {neither:?}");
    }
    let mut facts = good_host();
    facts.kvm = Err("/dev/kvm does not exist".into());
    assert!(first(facts).contains("/dev/kvm does not exist"));
}

/// `docs/hardware-acceptance.md` has the ids in a table, for programs that read `--json`.
#[test]
fn every_line_has_an_id_of_the_documented_list() {
    let page = include_str!("../../../docs/hardware-acceptance.md");
    let documented: Vec<(&str, &str)> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |")?.split_once("` | "))
        .skip_while(|(id, _)| *id != IDS[0].0)
        .take(IDS.len())
        .collect();
    assert_eq!(documented, IDS);
    let mut odd = snp_off();
    odd.firmware = Some(Err("busy".into()));
    odd.kernel_log = Some(vec!["AMD-Vi: SNP: IOMMU disabled, SNP cannot be supported.".into()]);
    let mut no_module = this_machine();
    no_module.kvm = Err("/dev/kvm does not exist".into());
    for facts in [good_host(), this_machine(), odd, no_module, refusing_host()] {
        for check in judge(facts).checks {
            assert!(IDS.iter().any(|(id, _)| *id == check.id), "{check:?}");
        }
    }
}

fn cause(facts: &mut Facts, lines: &[&str]) {
    facts.kernel_log = Some(lines.iter().map(|line| (*line).to_owned()).collect());
    facts.firmware = Some(Err("SNP_PLATFORM_STATUS: Input/output error (os error 5)".into()));
}

/// What `iommu_snp_enable` says in Linux 6.12 and 7.3 (`drivers/iommu/amd/init.c`).
#[test]
fn the_iommus_own_words_are_the_cause() {
    for (said, fix) in [
        (
            "AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode, SNP cannot be supported.",
            "without iommu=off",
        ),
        ("AMD-Vi: SNP: IOMMU configured in passthrough mode, SNP cannot be supported.", "SNP page mode 0"),
        ("AMD-Vi: SNP: IOMMU disabled, SNP cannot be supported.", "without iommu=off"),
        (
            "AMD-Vi: SNP: IOMMU is configured with V2 page table mode, SNP cannot be supported.",
            "without amd_iommu=pgtbl_v2",
        ),
        ("AMD-Vi: SNP: IOMMU SNP feature not enabled, SNP cannot be supported.", "in the BIOS"),
    ] {
        let mut facts = snp_off();
        cause(
            &mut facts,
            &["ccp 0000:22:00.1: sev enabled", said, "kvm_amd: SEV-SNP disabled (ASIDs 1 - 99)"],
        );
        let diagnosis = judge(facts);
        let iommu = line(&diagnosis, "IOMMU");
        assert!(iommu.found.ends_with(said) && iommu.fix.contains(fix), "{iommu:?}");
        assert!(line(&diagnosis, "RMP table").found.contains("because of the IOMMU"), "{diagnosis}");
    }
}

/// Lines of `arch/x86/virt/svm/sev.c`: an RMP that was found says so first, and what went wrong after that.
#[test]
fn the_line_that_fails_is_shown_and_not_the_first_one() {
    for (lines, shown) in [
        (
            &[
                "SEV-SNP: RMP table physical range [0x0000000035e00000 - 0x000000003d2fffff]",
                "SEV-SNP: SNP init failed: not all CPUs online. (0-62 online <-> 0-63 present masks).",
                "AMD-Vi: SNP: RMP initialization failed, SNP cannot be supported.",
            ][..],
            "not all CPUs online",
        ),
        (
            &[
                "SEV-SNP: Segmented RMP base table physical range [0x000001fe00000000 - 0x000001fe000fffff]",
                "SEV-SNP: RMP segment size (40) is not within advertised bounds (min=34, max=38)",
                "AMD-Vi: SNP: RMP initialization failed, SNP cannot be supported.",
            ],
            "not within advertised bounds",
        ),
        (
            &[
                "SEV-SNP: RMP table physical range [0x0000000035e00000 - 0x000000003d2fffff]",
                "SEV-SNP: Memory reserved for the RMP table does not cover full system RAM (expected 0x8400000 got 0x7500000)",
                "AMD-Vi: SNP: RMP initialization failed, SNP cannot be supported.",
            ],
            "does not cover full system RAM",
        ),
    ] {
        let mut facts = snp_off();
        cause(&mut facts, lines);
        let diagnosis = judge(facts);
        let rmp = line(&diagnosis, "RMP table");
        assert_eq!(rmp.status, Status::Missing);
        assert!(rmp.found.contains(shown), "{rmp:?}");
        assert!(!diagnosis.checks.iter().any(|c| c.id == "iommu"), "the IOMMU only repeats it:\n{diagnosis}");
    }
}

/// A host of AWS (Milan; then Genoa), of which Firecracker recorded the CPUID leaf: EDX is ECX + 1, so that
/// all ASIDs are for SEV-ES and SNP (tests/data/cpu_template_helper of firecracker-microvm/firecracker).
#[test]
fn a_host_that_gives_plain_sev_no_asids_is_good() {
    for (leaf, count) in [
        ([0x0101_fd3f, 0x4173, 0x1fd, 0x1fe], "509 of 509 (plain SEV has none)"),
        ([0x030f_fffb, 0x41b3, 0x3ee, 0x3ef], "1006 of 1006 (plain SEV has none)"),
    ] {
        let mut facts = good_host();
        facts.sev_leaf = Some(leaf);
        cause(
            &mut facts,
            &["kvm_amd: SEV unusable (ASIDs 510 - 509)", "kvm_amd: SEV-SNP enabled (ASIDs 1 - 509)"],
        );
        facts.firmware = good_host().firmware;
        let diagnosis = judge(facts);
        assert_eq!(not_ok(&diagnosis), [], "\n{diagnosis}");
        assert_eq!(line(&diagnosis, "ASIDs for SEV-ES and SNP").found, count);
    }
}

/// An EPYC 7313 in an HPE server (AMDESE/AMDSEV issue 197): 253 ASIDs, and four physical address bits fewer.
#[test]
fn a_small_number_of_asids_changes_the_lost_address_bits() {
    let mut facts = good_host();
    facts.sev_leaf = Some([0x0101_fd3f, 0x4133, 0xfd, 0xf]);
    let diagnosis = judge(facts);
    assert_eq!(not_ok(&diagnosis), [], "\n{diagnosis}");
    assert!(line(&diagnosis, "ASIDs for SEV-ES and SNP").found.starts_with("14 of 253"), "{diagnosis}");
    assert!(line(&diagnosis, "C-bit").found.starts_with("bit 51, 4 "), "{diagnosis}");
}

/// Public dumps of Milan from 2021: EAX bits 24 and 8 came with later BIOSes, and nothing here needs them.
#[test]
fn a_milan_of_2021_lacks_nothing_that_is_needed() {
    let mut facts = good_host();
    facts.sev_leaf = Some([0x0001_fc3f, 0x4173, 0x1fd, 0x64]);
    assert_eq!(not_ok(&judge(facts)), []);
}

/// A Milan host of 2022 (AMDESE/AMDSEV issue 97): the oldest firmware that Linux takes, 99 ASIDs of 509.
#[test]
fn the_oldest_firmware_that_linux_takes_is_good() {
    let mut facts = good_host();
    if let Some(Ok(status)) = &mut facts.firmware {
        (status.api, status.build) = ((1, 51), 3);
    }
    let range = "SEV-SNP: RMP table physical range [0x000001fe4f500000 - 0x000002004fafffff]";
    facts.kernel_log = Some(vec![range.into()]);
    let diagnosis = judge(facts.clone());
    assert_eq!(not_ok(&diagnosis), []);
    assert_eq!(line(&diagnosis, "SNP firmware").found, "ABI 1.51, build 3");
    // Where nobody may ask the firmware, the log's line is enough.
    facts.firmware = None;
    assert_eq!(line(&judge(facts), "RMP table").found, format!("the kernel logged: {range}"));
}

/// The log of a Turin host, in the words of Linux 7.3 and of AMDSEV's README of 2026: "RMP table physical
/// range" is absent.
#[test]
fn a_segmented_rmp_is_an_rmp() {
    let mut facts = good_host();
    facts.firmware = None;
    facts.kernel_log = Some(
        [
            "SEV-SNP: Segmented RMP base table physical range [0x000000bffac00000 - 0x000000bffadfffff]",
            "SEV-SNP: Segmented RMP using 128GB segments",
            "SEV-SNP: RMP segment 0 physical address [0x1ff7d00000 - 0x1ffff00000] covering [0x0 - 0x1fffffffff]",
            "AMD-Vi: IOMMU SNP support enabled.",
        ]
        .map(String::from)
        .into(),
    );
    let diagnosis = judge(facts);
    assert_eq!(not_ok(&diagnosis), [], "\n{diagnosis}");
    assert!(line(&diagnosis, "RMP table").found.contains("Segmented RMP"));
}

/// kvm mailing list, 9 April 2026, a Milan with firmware 1.58 build 1: the firmware refuses plain SEV-ES, and
/// SNP is enabled.
#[test]
fn sev_es_may_be_unusable_beside_snp() {
    let mut facts = good_host();
    facts.kernel_log = Some(
        [
            "SEV-SNP: RMP table physical range [0x0000000035e00000 - 0x000000003d2fffff]",
            "kvm_amd: SEV enabled (ASIDs 254 - 509)",
            "kvm_amd: SEV-ES unusable (ASIDs 1 - 253)",
            "kvm_amd: SEV-SNP enabled (ASIDs 1 - 253)",
        ]
        .map(String::from)
        .into(),
    );
    facts.firmware = None;
    let diagnosis = judge(facts);
    assert_eq!(not_ok(&diagnosis), [], "\n{diagnosis}");
}

/// An EPYC 8024P (AMDESE/AMDSEV issue 246): the driver gave up, so there is no /dev/sev.
#[test]
fn a_driver_that_gave_up_says_why_there_is_no_device() {
    let mut facts = snp_off();
    facts.sev_leaf = Some([0x030f_fffb, 0x41b3, 0x3ee, 0x100]);
    (facts.sev_device, facts.firmware) = (Access::Absent, None);
    facts.kernel_log = Some(vec![
        "ccp 0000:01:00.5: sev enabled".into(),
        "ccp 0000:01:00.5: SEV: failed to get status. Error: 0x8003".into(),
        "ccp 0000:01:00.5: psp enabled".into(),
    ]);
    let diagnosis = judge(facts);
    let firmware = line(&diagnosis, "SNP firmware");
    assert!(firmware.found.contains("0x8003") && firmware.fix.contains("BIOS"), "{firmware:?}");
    assert!(line(&diagnosis, "ASIDs for SEV-ES and SNP").found.starts_with("255 of 1006"));
}

/// An EPYC 8024P in a Dell C6615 after a change of its firmware (aleph-vm's documentation, 2026), in the
/// words of Linux 6.14 and, below, of 7.3 (`__sev_snp_init_locked`).
#[test]
fn data_of_another_firmware_is_reset() {
    for said in [
        "ccp 0000:01:00.5: SEV-SNP: failed to INIT rc -5, error 0x14",
        "ccp 0000:01:00.5: SEV-SNP: SNP_INIT_EX failed rc -5, error 0x14",
    ] {
        let mut facts = snp_off();
        cause(&mut facts, &["SEV-SNP: RMP table physical range [0x1 - 0x2]", said]);
        let diagnosis = judge(facts);
        assert!(line(&diagnosis, "SNP firmware").fix.contains("SEV_FACTORY_RESET"), "{diagnosis}");
        assert_eq!(line(&diagnosis, "RMP table").status, Status::Ok, "not the RMP's fault:\n{diagnosis}");
    }
}

/// AMDSEV's README of 2026, an EPYC 7003 with a PSP boot loader before 00.13.00.70.
#[test]
fn an_old_psp_boot_loader_is_named() {
    let mut facts = snp_off();
    cause(&mut facts, &["ccp 0000:22:00.1: SEV: failed to INIT error 0x1, rc -5"]);
    assert!(line(&judge(facts), "SNP firmware").fix.contains("00.13.00.70"));
}

/// Linux 7.3, `sev_hardware_setup`: with `ciphertext_hiding_asids=N` SNP guests have ASIDs 1 to N, SEV-ES the
/// others.
#[test]
fn ciphertext_hiding_divides_the_asids() {
    let mut facts = good_host();
    let hiding = |facts: &mut Facts, n: &str| {
        facts.parameters.insert("kvm_amd/ciphertext_hiding_asids".into(), n.into());
        line(&judge(facts.clone()), "ASIDs for SEV-ES and SNP").found.clone()
    };
    let plain = "99 of 509 (the lowest one for plain SEV is 100)";
    assert_eq!(hiding(&mut facts, "0"), plain);
    let divided = "40 of 509 (the lowest one for plain SEV is 100; ciphertext hiding leaves SEV-ES 59)";
    assert_eq!(hiding(&mut facts, "40"), divided);
    assert!(hiding(&mut facts, "99").contains("leaves SEV-ES 0"));
}

#[test]
fn a_policy_may_forbid_smt_from_linux_6_17_on() {
    let mut facts = good_host();
    for (kernel, smt) in
        [("6.12.95", true), ("6.16.12+deb13", true), ("6.17.8", false), ("7.3.4", false), ("unknown", true)]
    {
        facts.kernel = kernel.into();
        let found = line(&judge(facts.clone()), "Policy bits").found.clone();
        assert_eq!(found.contains("refuse a policy that forbids SMT"), smt, "{kernel}: {found}");
    }
}

/// An EPYC 7003 (qemu-devel, 6 August 2024, D. P. Berrange): bit 9 of 0x80000021 EAX is offered and refused.
fn refusing_host() -> Facts {
    let mut facts = good_host();
    let change = CpuidChange {
        leaf: 0x8000_0021,
        subleaf: 0,
        register: "EAX".into(),
        offered: 0x1800_0245,
        accepted: 0x1800_0045,
    };
    facts.cpuid.host = vec![CpuidRow { leaf: 0x8000_0021, subleaf: 0, registers: [0x204d, 0, 0, 0] }];
    facts.snp_trial = Trial::Failed {
        step: "adding the CPUID page".into(),
        errno: libc::EIO,
        firmware: 0x16,
        error: "the firmware refused 1 of its registers".into(),
        cpuid: Some(CpuidTrial {
            offered: vec![CpuidRow::default(); 31],
            changes: vec![change],
            structure: false,
            acceptable: true,
            again: Some(Ok(())),
        }),
    };
    facts
}

#[test]
fn a_refused_cpuid_value_is_shown_with_what_the_firmware_accepts_and_the_cpu_has() {
    let diagnosis = judge(refusing_host());
    assert_eq!(diagnosis.exit_code, 10);
    let page = line(&diagnosis, "Values of the CPUID page");
    for part in
        ["0x80000021.0 EAX", "offered 0x18000245", "accepted 0x18000045", "CPU itself says 0x0000204d"]
    {
        assert!(page.found.contains(part), "{part:?} is not in {page:?}");
    }
    let trial = line(&diagnosis, "A launch that is begun and given up");
    assert!(trial.fix.contains("--accept-cpuid"), "{trial:?}");
    // What the launch accepts by itself is worth a line and no more.
    let mut facts = refusing_host();
    if let Trial::Failed { cpuid: Some(cpuid), .. } = facts.snp_trial {
        facts.snp_trial = Trial::Passed(cpuid);
    }
    let diagnosis = judge(facts);
    assert_eq!(diagnosis.verdict, Verdict::Snp);
    assert_eq!(not_ok(&diagnosis), [("Values of the CPUID page", Status::Warning)]);
}

#[test]
fn records_of_cpuid_come_back_from_json() {
    let facts = refusing_host();
    let json = serde_json::to_value(&facts).unwrap();
    assert_eq!(json["cpuid"]["host"][0], "80000021 00 0000204d 00000000 00000000 00000000");
    assert_eq!(serde_json::from_value::<Facts>(json).unwrap(), facts);
}
