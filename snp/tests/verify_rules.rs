// SPDX-License-Identifier: Apache-2.0
//! Each rule of a policy fails for its own reason, and what no rule looked at is said. The reports are made
//! up, and signed by a made-up chain of trust.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use snp::attest::cert::Cert;
use snp::attest::cert::Crl;
use snp::attest::chain::Trust;
use snp::attest::policy::Policy;
use snp::attest::report::Report;
use snp::attest::report::ReportBuilder;
use snp::attest::report::field;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::verify;
use support::reports::builder;
use support::reports::failures;
use test_support::chain::Authority;
use test_support::chain::NOW;
use test_support::chain::integer;

#[test]
fn each_mismatch_fails_for_its_own_reason() {
    let authority = Authority::new();
    let milan = || authority.endorsement("Milan-B0", &[]);
    let any = "any_measurement = true";
    let fails = |builder: ReportBuilder, endorsement: Cert, policy: &str| {
        failures(&authority, &authority.report(builder), endorsement, policy)
    };
    assert_eq!(fails(builder(), milan(), any), [] as [&str; 0]);

    // Each part of the TCB, the chip, the product, the kind of key.
    for (offset, value) in [(0, 4u8), (1, 1), (6, 7), (7, 0xd3)] {
        let mut tcb = [3, 0, 0, 0, 0, 0, 8, 0xd2];
        tcb[offset] = value;
        let newer = [9, 9, 0, 0, 0, 0, 9, 0xd9];
        let committed = builder().set(field::COMMITTED_TCB, &newer).set(field::CURRENT_TCB, &newer);
        assert_eq!(fails(committed.clone(), milan(), any), [] as [&str; 0]);
        let report = committed.set(field::REPORTED_TCB, &tcb);
        assert_eq!(fails(report, milan(), any), ["certificate-tcb"], "TCB byte {offset}");
        // Committed to less than is reported, or running less than it has committed itself to.
        let mut older = [3u8, 0, 0, 0, 0, 0, 8, 0xd2];
        older[offset] = older[offset].wrapping_sub(1);
        if older[offset] != 0xff {
            assert_eq!(fails(builder().set(field::CURRENT_TCB, &older), milan(), any), ["tcb-order"]);
            let uncommitted = builder().set(field::COMMITTED_TCB, &older);
            assert_eq!(fails(uncommitted, milan(), any), ["tcb-order"]);
        }
    }
    assert_eq!(fails(builder().set(field::KEY_INFO, &[0]), milan(), any), ["author-key-field"]);
    let anonymous = builder().set(field::AUTHOR_KEY_DIGEST, &[]);
    assert_eq!(fails(anonymous.clone(), milan(), any), ["author-key-field"]);
    assert_eq!(fails(anonymous.set(field::KEY_INFO, &[0]), milan(), any), [] as [&str; 0]);
    let agent = builder().set(field::REPORT_ID_MA, &[1; 32]);
    assert_eq!(fails(agent.clone(), milan(), any), ["migration-agent"]);
    assert_eq!(fails(agent, milan(), &format!("{any}\nallow_migration = true")), [] as [&str; 0]);
    assert_eq!(fails(builder().set(field::CHIP_ID, &[0x78; 64]), milan(), any), ["certificate-chip"]);
    assert_eq!(fails(builder().set(field::CHIP_ID, &[0; 64]), milan(), any), ["certificate-chip"]);
    assert_eq!(fails(builder().set(field::CPUID_FMS, &[0x19, 0x11, 1]), milan(), any), ["product"]);
    assert_eq!(fails(builder().set(field::KEY_INFO, &[1 << 2 | 1]), milan(), any), ["signer"]);
    assert_eq!(fails(builder().set(field::KEY_INFO, &[2 | 1]), milan(), any), ["chip-key"]);
    assert_eq!(fails(builder().set(field::SIG_ALGO, &[2]), milan(), any), ["signature-algorithm"]);
    let without_tcb = authority.endorsement("Milan-B0", &[("1.3.6.1.4.1.3704.1.3.8", vec![])]);
    assert_eq!(fails(builder(), without_tcb, any), ["certificate-tcb"]);
    // INTEGERs that DER does not allow are not read as some number.
    for odd in [vec![2, 1, 0xd2], vec![2, 2, 0, 0x52], vec![2, 2, 1, 0xd2], vec![4, 1, 2]] {
        let cert = authority.endorsement("Milan-B0", &[("1.3.6.1.4.1.3704.1.3.8", odd)]);
        assert_eq!(fails(builder(), cert, any), ["certificate-tcb"]);
    }

    // The caller's rules.
    assert_eq!(fails(builder().set(field::REPORT_DATA, &[0x12; 64]), milan(), any), ["nonce"]);
    let hex = |byte: &str, len: usize| byte.repeat(len);
    let signer = format!("id_key_digests = ['{}']", hex("bb", 48));
    for (rule, good, bad) in [
        (
            "measurement",
            format!("measurements = ['{}']", hex("aa", 48)),
            format!("measurements = ['{}']", hex("ab", 48)),
        ),
        (
            "id-key",
            format!("id_key_digests = ['{}']", hex("bb", 48)),
            format!("id_key_digests = ['{}']", hex("ba", 48)),
        ),
        (
            "author-key",
            format!("author_key_digests = ['{}']", hex("cc", 48)),
            "author_key_digests = []".into(),
        ),
        (
            "host-data",
            format!("host_data = ['{}']", hex("dd", 32)),
            format!("host_data = ['{}']", hex("de", 32)),
        ),
        (
            "family-id",
            format!("{signer}\nfamily_id = '{}'", hex("01", 16)),
            format!("{signer}\nfamily_id = '{}'", hex("02", 16)),
        ),
        (
            "image-id",
            format!("{signer}\nimage_id = '{}'", hex("02", 16)),
            format!("{signer}\nimage_id = '{}'", hex("01", 16)),
        ),
        ("guest-svn", format!("{signer}\nminimum_svn = 5"), format!("{signer}\nminimum_svn = 6")),
        ("vmpl", "vmpl = [1, 0]".into(), "vmpl = [1]".into()),
        ("smt", "allow_smt = true".into(), "allow_smt = false".into()),
        ("allowed-signer", "signers = ['vcek']".into(), "signers = ['vlek']".into()),
        ("certificate-chip", format!("chips = ['{}']", hex("77", 64)), String::new()),
        ("chip", String::new(), format!("chips = ['{}']", hex("78", 64))),
        ("products", "products = ['turin', 'milan']".into(), "products = ['genoa']".into()),
        ("report-version", "minimum_report_version = 3".into(), "minimum_report_version = 4".into()),
        ("guest-abi", "minimum_abi = '0.0'".into(), "minimum_abi = '1.51'".into()),
        (
            "guest-policy",
            "guest_policy.forbid = ['single_socket', 'cxl_allow']".into(),
            "guest_policy.require = ['page_swap_disable']".into(),
        ),
        (
            "platform-info",
            "platform_info = { require = ['alias_check', 'ecc'], forbid = ['smt'] }".into(),
            "platform_info.require = ['ciphertext_hiding']".into(),
        ),
        ("platform-info", String::new(), "platform_info.forbid = ['tio', 'ecc']".into()),
        (
            "minimum-firmware",
            "[minimum_firmware]\nmilan = '1.55.22'".into(),
            "[minimum_firmware]\nmilan = '1.55.23'".into(),
        ),
        ("minimum-firmware", String::new(), "[minimum_firmware]\nturin = '1.0'".into()),
        ("minimum-mitigations", String::new(), "[minimum_mitigations.milan]\nlaunch = 0".into()),
        ("revocation", String::new(), "require_revocation_list = true".into()),
        ("provider", String::new(), "providers = ['CN=example']".into()),
        (
            "minimum-tcb",
            "[minimum_tcb.milan]\nsnp = 8\nmicrocode = 0xd2".into(),
            "[minimum_tcb.genoa]\nsnp = 1".into(),
        ),
    ] {
        assert_eq!(fails(builder(), milan(), &format!("{any}\n{good}")), [] as [&str; 0], "{good}");
        if !bad.is_empty() {
            assert_eq!(fails(builder(), milan(), &format!("{any}\n{bad}")), [rule], "{bad}");
        }
    }
    let minimum = format!("{any}\n[minimum_tcb.milan]\nmicrocode = 0xd3");
    assert_eq!(
        fails(builder(), milan(), &minimum),
        ["minimum-tcb", "minimum-committed-tcb", "minimum-launch-tcb"]
    );
    for (rule, bit, allow) in
        [("debug", 19, "allow_debug = true"), ("migration", 18, "allow_migration = true")]
    {
        let report = builder().set(field::POLICY, &(0x3_0000u64 | 1 << bit).to_le_bytes());
        assert_eq!(fails(report.clone(), milan(), any), [rule]);
        assert_eq!(fails(report, milan(), &format!("{any}\n{allow}")), [] as [&str; 0]);
    }
}

/// AMD-SB-3019 asks for SNP 0x18 of Milan, AMD-SB-3015 for the alias check.
#[test]
fn a_baseline_asks_for_what_its_bulletins_say() {
    let authority = Authority::new();
    let policy = "any_measurement = true\nbaseline = '2025-02'";
    let tcb = |snp: u8| [3, 0, 0, 0, 0, 0, snp, 0xd2];
    let fields = [field::CURRENT_TCB, field::REPORTED_TCB, field::COMMITTED_TCB, field::LAUNCH_TCB];
    let report = |snp: u8| fields.iter().fold(builder(), |builder, field| builder.set(*field, &tcb(snp)));
    let cert = |snp: u8| authority.endorsement("Milan-B0", &[("1.3.6.1.4.1.3704.1.3.3", vec![2, 1, snp])]);
    let fails = |builder, snp| failures(&authority, &authority.report(builder), cert(snp), policy);
    assert_eq!(fails(report(0x18), 0x18), [] as [&str; 0]);
    assert_eq!(fails(report(0x17), 0x17), ["baseline"]);
    assert_eq!(fails(report(0x18).set(field::LAUNCH_TCB, &tcb(0x17)), 0x18), ["baseline"], "launched before");
    assert_eq!(fails(report(0x18).set(field::PLATFORM_INFO, &[0x04]), 0x18), ["baseline"], "no alias check");
}

#[test]
fn mitigations_are_compared_bit_by_bit() {
    let authority = Authority::new();
    let report = |launch: u8, now: u8| {
        let mut bytes = *authority.report(builder()).as_bytes();
        bytes[0] = 5;
        let text = ReportBuilder::from(&Report::parse(&bytes).unwrap());
        authority.report(text.set(field::LAUNCH_MIT_VECTOR, &[launch]).set(field::CURRENT_MIT_VECTOR, &[now]))
    };
    let policy = "any_measurement = true\n[minimum_mitigations.milan]\nlaunch = 0b001\ncurrent = 0b101";
    for (launch, now, good) in
        [(1, 5, true), (3, 7, true), (2, 5, false), (1, 4, false), (1, 3, false), (0, 5, false)]
    {
        let failed =
            failures(&authority, &report(launch, now), authority.endorsement("Milan-B0", &[]), policy);
        let expected: &[&str] = if good { &[] } else { &["minimum-mitigations"] };
        assert_eq!(failed, expected, "{launch} {now}");
    }
}

#[test]
fn what_no_rule_looked_at_is_said() {
    let authority = Authority::new();
    let report = authority.report(builder());
    let certificates = [authority.endorsement("Milan-B0", &[]), authority.intermediate.clone()];
    let trust = Trust { other_root: Some(authority.root.clone()) };
    let list = Crl::read(&authority.crl(&[], NOW - 5, NOW + 5)).unwrap();
    let unchecked = |policy: &str, nonce, crl: Option<&Crl>| {
        let policy = Policy::parse(policy).unwrap();
        let evidence = Evidence { report: &report, certificates: &certificates, crl, runtime_data: None };
        let verdict = verify(&evidence, &Demands { policy: &policy, nonce, trust: &trust, now: NOW });
        assert!(verdict.verified, "{:?}", verdict.failed());
        verdict.unchecked.iter().map(|unchecked| unchecked.what).collect::<Vec<_>>()
    };
    assert_eq!(
        unchecked("any_measurement = true", None, None),
        ["software", "freshness", "revocation", "minimum-tcb", "chip"]
    );
    let full = format!(
        "measurements = ['{}']\nchips = ['{}']\n[minimum_tcb.milan]\nsnp = 8",
        "aa".repeat(48),
        "77".repeat(64)
    );
    assert_eq!(unchecked(&full, Some([0x11; 64]), Some(&list)), [] as [&str; 0]);
}

/// A policy whose digest sets nobody read does not allow any software.
#[test]
fn digest_sets_that_were_not_read_allow_nothing() {
    let authority = Authority::new();
    let failed = failures(
        &authority,
        &authority.report(builder()),
        authority.endorsement("Milan-B0", &[]),
        "measurement_sets = ['guest.json']",
    );
    assert_eq!(failed, ["measurement"]);
}

#[test]
fn turin_has_an_fmc_and_a_short_chip_id() {
    let authority = Authority::new();
    let turin = |fmc: Vec<u8>| {
        let changes = [("1.3.6.1.4.1.3704.1.3.9", fmc), ("1.3.6.1.4.1.3704.1.4", vec![0x77; 8])];
        authority.endorsement("Turin-B1", &changes)
    };
    let mut chip = [0; 64];
    chip[..8].fill(0x77);
    let report = |chip: &[u8; 64]| {
        builder()
            .set(field::CPUID_FMS, &[0x1a, 0x02, 1])
            .set(field::CHIP_ID, chip)
            .set(field::REPORTED_TCB, &[1, 3, 0, 8, 0, 0, 0, 0xd2])
            .set(field::COMMITTED_TCB, &[1, 3, 0, 8, 0, 0, 0, 0xd2])
            .set(field::CURRENT_TCB, &[1, 3, 0, 8, 0, 0, 0, 0xd2])
    };
    let fails = |builder: ReportBuilder, cert: Cert| {
        failures(&authority, &authority.report(builder), cert, "any_measurement = true")
    };
    assert_eq!(fails(report(&chip), turin(integer(1))), [] as [&str; 0]);
    assert_eq!(fails(report(&chip), turin(integer(2))), ["certificate-tcb"]);
    assert_eq!(fails(report(&chip), turin(vec![])), ["certificate-tcb"]);
    assert_eq!(
        fails(report(&[0x77; 64]), turin(integer(1))),
        ["certificate-chip"],
        "bytes after the first 8"
    );
}

#[test]
fn a_vlek_has_a_provider_and_no_chip() {
    let authority = Authority::new();
    let name = b"CN=cloud";
    let csp = [&[0x16, name.len() as u8], &name[..]].concat();
    let changes = [("1.3.6.1.4.1.3704.1.4", vec![]), ("1.3.6.1.4.1.3704.1.5", csp)];
    let vlek = || authority.endorsement("Milan", &changes);
    let report =
        authority.report(builder().set(field::KEY_INFO, &[1 << 2 | 1]).set(field::CHIP_ID, &[0; 64]));
    let fails = |policy: &str| failures(&authority, &report, vlek(), policy);
    assert_eq!(fails("any_measurement = true"), [] as [&str; 0]);
    assert_eq!(
        fails("any_measurement = true\nproviders = ['CN=cloud']\nsigners = ['vlek']"),
        [] as [&str; 0]
    );
    assert_eq!(fails("any_measurement = true\nproviders = ['CN=other']"), ["provider"]);
}
