// SPDX-License-Identifier: Apache-2.0
//! Real reports from Milan, Genoa and Turin verify; every damaged one, and every mismatch, fails for its own reason.
//!
//! Mismatches that AMD's keys would have to sign are made with a made-up chain of trust.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use proptest::prelude::*;
use snp::attest::cert::Cert;
use snp::attest::cert::Crl;
use snp::attest::chain::Trust;
use snp::attest::evidence;
use snp::attest::policy::Policy;
use snp::attest::report::Report;
use snp::attest::report::ReportBuilder;
use snp::attest::report::field;
use snp::attest::tcb::Product;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::signs;
use snp::attest::verify::verify;
use support::reports::NOVEMBER_2025;
use support::reports::any_software;
use support::reports::builder;
use support::reports::judge;
use support::reports::real_reports;
use test_support::chain;
use test_support::chain::Authority;
use test_support::chain::NOW;
use test_support::chain::integer;
use test_support::keys::platform_chain;

#[test]
fn real_reports_verify_with_amds_built_in_roots() {
    for real in real_reports() {
        let report = Report::parse(&real.report).unwrap();
        assert_eq!(report.version(), real.version, "{}", real.name);
        let verdict = judge(&report, &real.certificates, &any_software(), NOVEMBER_2025);
        assert!(verdict.verified, "{}: {:#?}", real.name, verdict);
        // The rule of the measurement, as a user would write it.
        let policy = format!(
            "measurements = [\"{}\"]\nvmpl = [{}]\nallow_debug = true",
            hex::encode(report.measurement()),
            report.vmpl()
        );
        let verdict = judge(&report, &real.certificates, &Policy::parse(&policy).unwrap(), NOVEMBER_2025);
        assert!(verdict.verified, "{}: {:#?}", real.name, verdict);
        assert!(verdict.checks.iter().any(|check| check.rule == "measurement"));
        let other = format!("measurements = [\"{}\"]\nvmpl = [0, 1]", "00".repeat(48));
        let verdict = judge(&report, &real.certificates, &Policy::parse(&other).unwrap(), NOVEMBER_2025);
        assert!(verdict.failed().contains(&"measurement"), "{}", real.name);
    }
}

#[test]
fn every_single_bit_flip_in_the_signed_range_is_found() {
    for real in real_reports() {
        let policy = any_software();
        let flip = |bit: usize| {
            let mut bytes = real.report.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            // Another version is refused before any rule.
            let Ok(report) = Report::parse(&bytes) else {
                return assert!(bit < 32, "{} bit {bit}", real.name);
            };
            assert!(!signs(&report, &real.certificates[0]), "{} bit {bit}", real.name);
            if bit.is_multiple_of(61) {
                let verdict = judge(&report, &real.certificates, &policy, NOVEMBER_2025);
                assert!(!verdict.verified, "{} bit {bit}", real.name);
                assert!(verdict.failed().contains(&"report-signature"), "{} bit {bit}", real.name);
            }
        };
        // All signed bits, and some of R and S.
        std::thread::scope(|scope| {
            scope.spawn(|| (0..0x150 * 8).for_each(flip));
            scope.spawn(|| (0x150 * 8..0x2a0 * 8).for_each(flip));
            scope.spawn(|| (0x2a0 * 8..0x330 * 8).step_by(23).for_each(flip));
        });
    }
}

#[test]
fn every_swapped_certificate_is_found() {
    let reports = real_reports();
    for a in &reports {
        for b in reports.iter().filter(|b| b.name != a.name) {
            let report = Report::parse(&a.report).unwrap();
            let failed = judge(&report, &b.certificates, &any_software(), NOVEMBER_2025).failed();
            assert!(failed.contains(&"report-signature"), "{} with {}: {failed:?}", a.name, b.name);
            if a.product != b.product && a.version > 2 {
                assert!(failed.contains(&"product"), "{} with {}: {failed:?}", a.name, b.name);
            }
        }
        // Every single bit of the certificate's signed part counts; some of them make it unreadable.
        let der = a.certificates[0].der().to_vec();
        for bit in (0..der.len() * 8).step_by(397) {
            let mut damaged = der.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let Ok(cert) = Cert::from_der(&damaged) else { continue };
            let mut certificates = vec![cert];
            certificates.extend(a.certificates[1..].iter().cloned());
            let report = Report::parse(&a.report).unwrap();
            let verdict = judge(&report, &certificates, &any_software(), NOVEMBER_2025);
            assert!(!verdict.verified, "{} bit {bit}", a.name);
        }
    }
}

#[test]
fn certificates_count_only_within_their_dates_and_with_their_issuer() {
    for real in real_reports() {
        let report = Report::parse(&real.report).unwrap();
        for now in [0, 1_500_000_000, 4_000_000_000] {
            let verdict = judge(&report, &real.certificates, &any_software(), now);
            assert_eq!(verdict.failed(), ["certificate-dates"], "{} at {now}", real.name);
        }
        if real.certificates.len() > 1 {
            let verdict = judge(&report, &real.certificates[..1], &any_software(), NOVEMBER_2025);
            assert_eq!(verdict.failed(), ["certificate-chain"], "{} without its ASVK", real.name);
        }
        // A stranger's root, even one of the right name, is not AMD's.
        let trust = Trust { other_root: Some(Authority::new().root) };
        let evidence =
            Evidence { report: &report, certificates: &real.certificates, crl: None, runtime_data: None };
        let policy = any_software();
        let demands = Demands { policy: &policy, nonce: None, trust: &trust, now: NOW };
        assert!(verify(&evidence, &demands).failed().contains(&"certificate-chain"), "{}", real.name);
    }
    let report = Report::parse(&real_reports()[0].report).unwrap();
    assert_eq!(judge(&report, &[], &any_software(), NOVEMBER_2025).failed(), ["certificates"]);
}

#[test]
fn built_in_roots_have_the_published_fingerprints() {
    use sha2::Digest as _;
    for (product, fingerprint) in [
        (Product::Milan, "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"),
        (Product::Genoa, "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"),
        (Product::Turin, "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"),
    ] {
        let root = snp::attest::chain::amd_root(product).unwrap();
        assert_eq!(hex::encode(sha2::Sha256::digest(root.der())), fingerprint, "{product}");
    }
}

fn failures(authority: &Authority, report: &Report, endorsement: Cert, policy: &str) -> Vec<&'static str> {
    let certificates = [endorsement, authority.intermediate.clone()];
    let trust = Trust { other_root: Some(authority.root.clone()) };
    let evidence = Evidence { report, certificates: &certificates, crl: None, runtime_data: None };
    let policy = Policy::parse(policy).unwrap();
    let demands = Demands { policy: &policy, nonce: Some([0x11; 64]), trust: &trust, now: NOW };
    verify(&evidence, &demands).failed()
}

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

/// The signature does not cover them, so anybody can change them, and copies of one report would look like two.
#[test]
fn bytes_behind_the_signature_must_be_zero() {
    for real in real_reports() {
        for at in [0x330, 0x400, 0x49f] {
            let mut bytes = real.report.clone();
            bytes[at] = 1;
            let report = Report::parse(&bytes).unwrap();
            let failed = judge(&report, &real.certificates, &any_software(), NOVEMBER_2025).failed();
            assert_eq!(failed, ["signature-padding"], "{} {at:#x}", real.name);
        }
    }
}

/// n of P-384 (FIPS 186-4, D.1.2.4), little-endian as reports have numbers.
fn minus(s: &[u8]) -> Vec<u8> {
    let n = hex::decode(
        "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    )
    .unwrap();
    let mut borrow = 0i16;
    let difference = n.iter().rev().zip(s).map(|(n, s)| {
        let byte = i16::from(*n) - i16::from(*s) - borrow;
        borrow = i16::from(byte < 0);
        byte.rem_euclid(256) as u8
    });
    difference.collect()
}

/// ECDSA has two signatures for one key and text, and AMD's firmware gives either: a report is its signed bytes.
#[test]
fn the_other_signature_is_of_the_same_report() {
    for real in real_reports() {
        let first = Report::parse(&real.report).unwrap();
        let mut bytes = real.report.clone();
        let other = minus(&bytes[0x2e8..0x2e8 + 48]);
        bytes[0x2e8..0x2e8 + 48].copy_from_slice(&other);
        let second = Report::parse(&bytes).unwrap();
        assert_ne!(first, second);
        let verdict = judge(&second, &real.certificates, &any_software(), NOVEMBER_2025);
        assert!(verdict.verified, "{}: {:?}", real.name, verdict.failed());
        assert_eq!(verdict.report, hex::encode(first.identity()));
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

#[test]
fn revocation_lists_are_checked_before_they_are_believed() {
    let authority = Authority::new();
    let certificates = [authority.endorsement("Milan-B0", &[]), authority.intermediate.clone()];
    let trust = Trust { other_root: Some(authority.root.clone()) };
    let report = authority.report(builder());
    let found = |list: Vec<u8>| {
        let list = Crl::read(&list).unwrap();
        let evidence =
            Evidence { report: &report, certificates: &certificates, crl: Some(&list), runtime_data: None };
        let policy = Policy::parse("any_measurement = true").unwrap();
        let verdict = verify(&evidence, &Demands { policy: &policy, nonce: None, trust: &trust, now: NOW });
        let check = verdict.checks.iter().find(|check| check.rule == "revocation").unwrap().clone();
        assert_eq!(check.pass, verdict.verified);
        (check.pass, check.found)
    };
    assert!(found(authority.crl(&[9], NOW - 5, NOW + 5)).0);
    // Serial 0 is the endorsement certificate's, but the intermediate issued that one, not the root.
    assert!(found(authority.crl(&[0], NOW - 5, NOW + 5)).0);
    let (pass, text) = found(authority.crl(&[2, 9], NOW - 5, NOW + 5));
    assert!(!pass && text.contains("'SEV-Test' is revoked"), "{text}");
    let (pass, text) = found(authority.crl(&[], NOW - 50, NOW - 5));
    assert!(!pass && text.contains("not current"), "{text}");
    let (pass, text) = found(Authority::new().crl(&[], NOW - 5, NOW + 5));
    assert!(!pass && text.contains("not signed by 'ARK-Test'"), "{text}");
    let (pass, text) = found(authority.list(&[], NOW - 5, None, None));
    assert!(!pass && text.contains("when the next one is due"), "{text}");
    // 2.5.29.27 makes a list one of changes, 2.5.29.28 one of some certificates only (RFC 5280, 5.2.4 and 5.2.5).
    for (partial, critical) in [("2.5.29.27", true), ("2.5.29.28", true), ("2.5.29.27", false)] {
        let list = authority.list(&[], NOW - 5, Some(NOW + 5), Some((partial, critical)));
        let error = Crl::read(&list).unwrap_err();
        assert!(error.to_string().contains(partial), "{error}");
    }
    // The intermediate's list says nothing about the intermediate.
    let ask = Authority { root_key: authority.intermediate_key.clone(), ..authority.clone() };
    let (pass, text) = found(ask.list_by("SEV-Test", &[], NOW - 5, Some(NOW + 5), None));
    assert!(!pass && text.contains("expected the root's"), "{text}");
}

#[test]
fn an_issuer_must_be_allowed_to_issue_and_what_is_critical_must_be_known() {
    let authority = Authority::new();
    let report = authority.report(builder());
    let any = "any_measurement = true";
    let issuer = ("ARK-Test", &authority.root_key);
    let ca = ("2.5.29.19", vec![0x30, 3, 1, 1, 0xff]);
    // KeyUsage (RFC 5280, 4.2.1.3) is a BIT STRING: bit 0 digitalSignature, bit 5 keyCertSign.
    let usage = |bits: u8, unused: u8| ("2.5.29.15", vec![3, 2, unused, bits]);
    for (extensions, good) in [
        (vec![ca.clone(), usage(0x04, 2)], true),
        (vec![ca.clone(), usage(0x80, 7)], false),
        (vec![usage(0x04, 2)], false),
        (vec![ca.clone(), (chain::UNKNOWN, vec![5, 0])], false),
    ] {
        let subject = ("SEV-Test", &authority.intermediate_key);
        let intermediate = chain::certificate(subject, issuer, 2, &extensions);
        let authority = Authority { intermediate, ..authority.clone() };
        let failed = failures(&authority, &report, authority.endorsement("Milan-B0", &[]), any);
        let expected: &[&str] = if good { &[] } else { &["certificate-chain"] };
        assert_eq!(failed, expected, "{extensions:?}");
    }
    let odd = authority.endorsement("Milan-B0", &[(chain::UNKNOWN, vec![5, 0])]);
    assert_eq!(failures(&authority, &report, odd, any), ["certificate-chain"]);
}

#[test]
fn a_chain_has_three_different_links() {
    let authority = Authority::new();
    let report = authority.report(builder());
    let any = "any_measurement = true";
    // The chip's certificate by the root itself.
    let chip = ("SEV-VCEK", &authority.chip_key);
    let extensions = [
        ("1.3.6.1.4.1.3704.1.2", [&[0x16, 8], &b"Milan-B0"[..]].concat()),
        ("1.3.6.1.4.1.3704.1.3.1", integer(3)),
        ("1.3.6.1.4.1.3704.1.3.2", integer(0)),
        ("1.3.6.1.4.1.3704.1.3.3", integer(8)),
        ("1.3.6.1.4.1.3704.1.3.8", integer(0xd2)),
        ("1.3.6.1.4.1.3704.1.4", vec![0x77; 64]),
    ];
    let issuer = ("ARK-Test", &authority.root_key);
    let direct = chain::certificate(chip, issuer, 0, &extensions);
    let short = Authority { intermediate: authority.root.clone(), ..authority.clone() };
    assert_eq!(failures(&short, &report, direct, any), ["certificate-chain"]);
    // A root that allows none below an issuer (pathLenConstraint 0, RFC 5280, 4.2.1.9).
    let none_below = [("2.5.29.19", vec![0x30, 6, 1, 1, 0xff, 2, 1, 0])];
    let root = chain::certificate(issuer, issuer, 1, &none_below);
    let strict = Authority { root, ..authority.clone() };
    assert_eq!(
        failures(&strict, &report, authority.endorsement("Milan-B0", &[]), any),
        ["certificate-chain"]
    );
    // One extension twice: which one counts?
    let mut twice = extensions.to_vec();
    twice.push(("1.3.6.1.4.1.3704.1.4", vec![0x78; 64]));
    let issuer = ("SEV-Test", &authority.intermediate_key);
    let der = chain::der(chip, issuer, 0, &twice);
    assert!(Cert::from_der(&der).unwrap_err().to_string().contains("1.3.6.1.4.1.3704.1.4 is there twice"));
}

#[test]
fn names_in_certificates_cannot_paint_a_verdict() {
    let authority = Authority::new();
    let painted = format!("SEV-VCEK\u{1b}[2J\u{202e}\rVERIFIED{}", '\u{9b}');
    let key = (painted.as_str(), &authority.chip_key);
    let cert = chain::certificate(key, ("SEV-Test\u{7}", &authority.intermediate_key), 0, &[]);
    let evil = authority.endorsement("Milan-B0", &[("1.3.6.1.4.1.3704.1.5", b"\x16\x06CN=\x1b[J".to_vec())]);
    let report = authority.report(builder());
    let policy = Policy::parse("any_measurement = true\nproviders = ['CN=cloud']").unwrap();
    let trust = Trust { other_root: Some(authority.root.clone()) };
    for certificates in [vec![cert], vec![evil, authority.intermediate.clone()]] {
        let evidence =
            Evidence { report: &report, certificates: &certificates, crl: None, runtime_data: None };
        let verdict = verify(&evidence, &Demands { policy: &policy, nonce: None, trust: &trust, now: NOW });
        assert!(!verdict.verified);
        for check in verdict.checks {
            let text = check.expected + &check.found;
            let visible = text.chars().all(|c| c == '\u{fffd}' || c.is_ascii_graphic() || c == ' ');
            assert!(visible, "{}: {text:?}", check.rule);
        }
        assert!(certificates[0].name().starts_with("SEV-VCEK"));
    }
}

/// Programs of others demand each of them.
#[test]
fn the_emulated_platforms_key_has_the_extensions_of_a_real_one() {
    use x509_cert::der::Decode as _;
    let extensions = |der: &[u8]| -> Vec<(String, usize)> {
        let cert = x509_cert::Certificate::from_der(der).unwrap();
        let list = cert.tbs_certificate.extensions.unwrap();
        list.iter().map(|e| (e.extn_id.to_string(), usize::from(e.critical))).collect()
    };
    let real = real_reports().remove(0);
    let emulated = platform_chain();
    assert_eq!(extensions(&emulated.certificates().vcek), extensions(real.certificates[0].der()));
}

proptest! {
    #![proptest_config(support::config(600))]

    #[test]
    fn damaged_certificates_lists_and_reports_never_panic(
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8),
        cut in any::<usize>(),
        noise in proptest::collection::vec(any::<u8>(), 0..1400),
    ) {
        use std::sync::LazyLock;
        static SAMPLES: LazyLock<(Vec<u8>, Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
            let authority = Authority::new();
            let real = real_reports().remove(0);
            (real.certificates[0].der().to_vec(), authority.crl(&[1, 2], 5, 6), real.report)
        });
        let damaged = |sample: &[u8]| {
            let mut bytes = sample.to_vec();
            for (at, value) in &damage {
                let at = at % bytes.len();
                bytes[at] = *value;
            }
            if cut % 5 == 0 {
                bytes.truncate(cut / 5 % bytes.len());
            }
            bytes
        };
        let (cert, list, report) = &*SAMPLES;
        let certificates: Vec<Cert> = Cert::read_all(&damaged(cert)).unwrap_or_default();
        let _ = Crl::read(&damaged(list));
        let _ = Crl::read(&noise);
        let _ = Cert::read_all(&noise);
        let _ = Report::parse(&noise);
        let _ = evidence::read(&noise);
        let _ = evidence::read(&[&b"HCLA"[..], &noise].concat());
        let _ = evidence::read(&[&damaged(report)[..], &noise].concat());
        let _ = evidence::read_certificates(&noise);
        if let Ok(report) = Report::parse(&damaged(report)) {
            let verdict = judge(&report, &certificates, &any_software(), NOVEMBER_2025);
            prop_assert!(!verdict.verified || &damaged(cert) == cert);
        }
    }
}
