// SPDX-License-Identifier: Apache-2.0
//! Who may vouch for a report: roots, links of a chain, revocation lists, and what their names may look like.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use snp::attest::cert::Cert;
use snp::attest::cert::Crl;
use snp::attest::chain::Trust;
use snp::attest::policy::Policy;
use snp::attest::tcb::Product;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::verify;
use support::reports::builder;
use support::reports::failures;
use support::reports::real_reports;
use test_support::chain;
use test_support::chain::Authority;
use test_support::chain::NOW;
use test_support::chain::integer;
use test_support::keys::platform_chain;

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
    // 2.5.29.27 makes a list one of changes, 2.5.29.28 one of some certificates only (RFC 5280, 5.2.4 and
    // 5.2.5).
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
