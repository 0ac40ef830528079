// SPDX-License-Identifier: Apache-2.0
//! Real reports from Milan, Genoa and Turin verify, and every damaged one fails.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use proptest::prelude::*;
use snp::attest::cert::Cert;
use snp::attest::cert::Crl;
use snp::attest::chain::Trust;
use snp::attest::evidence;
use snp::attest::policy::Policy;
use snp::attest::report::Report;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::signs;
use snp::attest::verify::verify;
use support::reports::NOVEMBER_2025;
use support::reports::any_software;
use support::reports::judge;
use support::reports::real_reports;
use test_support::chain::Authority;
use test_support::chain::NOW;

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

/// The signature does not cover them, so anybody can change them, and copies of one report would look like
/// two.
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

/// ECDSA has two signatures for one key and text, and AMD's firmware gives either: a report is its signed
/// bytes.
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
