// SPDX-License-Identifier: Apache-2.0
//! Evidence in the forms that people have it: with a certificate table behind the report, in hexadecimal, in
//! a paravisor's envelope.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::PathBuf;

use snp::attest::cert::Cert;
use snp::attest::cert::Crl;
use snp::attest::cert_table;
use snp::attest::chain::Trust;
use snp::attest::evidence;
use snp::attest::policy::Policy;
use snp::attest::report::field;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::verify;
use support::reports::NOVEMBER_2025;
use support::reports::Real;
use support::reports::any_software;
use support::reports::builder;
use support::reports::judge;
use support::reports::real_reports;
use test_support::chain::Authority;
use test_support::chain::NOW;

/// A peer makes the table, as hosts and guests' drivers have it.
fn table_of(certificates: &[Cert]) -> Vec<u8> {
    use sev::firmware::host::CertTableEntry;
    use sev::firmware::host::CertType;
    let kind = |cert: &Cert| match (cert.is_ca(), cert.is_issued_in_the_name_of(cert)) {
        (true, true) => CertType::ARK,
        (true, false) => CertType::ASK,
        (false, _) if cert.has_hwid() => CertType::VCEK,
        (false, _) => CertType::VLEK,
    };
    let entries: Vec<CertTableEntry> = certificates
        .iter()
        .map(|cert| CertTableEntry { cert_type: kind(cert), data: cert.der().to_vec() })
        .collect();
    CertTableEntry::cert_table_to_vec_bytes(&entries).unwrap()
}

#[test]
fn a_table_holds_certificates_that_belong_together() {
    let reports = real_reports();
    for real in &reports {
        let Some(folder) = std::env::var_os("CVMM_REPORT_FIXTURES").map(PathBuf::from) else { continue };
        let product = real.product.to_string().to_lowercase();
        // AMD's file of authorities: for VCEKs, the root, for VLEKs.
        let authorities = std::fs::read(folder.join(format!("{product}_ask_ark_asvk.pem"))).unwrap();
        let authorities = Cert::read_all(&authorities).unwrap();
        let key = real.certificates[0].clone();
        let all = [std::slice::from_ref(&key), &authorities].concat();
        let table = cert_table::of_certificates(&all, None).unwrap();
        let found: Vec<String> =
            evidence::read_certificates(&table).unwrap().iter().map(Cert::name).collect();
        assert_eq!(found[1], key.issuer_name(), "{}", real.name);
        assert_eq!((found.len(), &found[2]), (3, &format!("ARK-{}", real.product)));
        // Of another product, or of another kind only.
        for other in reports.iter().filter(|other| other.product != real.product) {
            let mixed = [std::slice::from_ref(&other.certificates[0]), &authorities].concat();
            let error = cert_table::of_certificates(&mixed, None).unwrap_err();
            assert!(error.contains("is issued by"), "{error}");
        }
        let without: Vec<Cert> =
            all.iter().filter(|cert| cert.name() != key.issuer_name()).cloned().collect();
        assert!(cert_table::of_certificates(&without, None).is_err(), "{}", real.name);
        let twice = [std::slice::from_ref(&key), &all].concat();
        assert!(cert_table::of_certificates(&twice, None).unwrap_err().contains("one key"));
    }
}

#[test]
fn a_table_holds_no_revocation_list_that_its_root_has_not_signed() {
    let authority = Authority::new();
    let all =
        [authority.endorsement("Milan-B0", &[]), authority.intermediate.clone(), authority.root.clone()];
    let list = |of: &Authority| Crl::read(&of.crl(&[], NOW - 5, NOW + 5)).unwrap();
    let own = list(&authority);
    let table = cert_table::of_certificates(&all, Some(&own)).unwrap();
    let held = cert_table::parse(&table).unwrap();
    assert!(held.contains(&(cert_table::Kind::CRL, own.der())));
    let error = cert_table::of_certificates(&all, Some(&list(&Authority::new()))).unwrap_err();
    assert!(error.contains("not signed by 'ARK-Test'"), "{error}");
    // The intermediate has number 2.
    let revoked = Crl::read(&authority.crl(&[2], NOW - 5, NOW + 5)).unwrap();
    let error = cert_table::of_certificates(&all, Some(&revoked)).unwrap_err();
    assert!(error.contains("revokes 'SEV-Test'"), "{error}");
    let error = cert_table::of_certificates(&all[..2], Some(&own)).unwrap_err();
    assert!(error.contains("without its root"), "{error}");
}

#[test]
fn evidence_is_read_in_the_forms_that_people_have() {
    for real in real_reports() {
        // The file of issuers has an intermediate for each kind of key, a table has one.
        let mut certificates = real.certificates.clone();
        certificates.retain(|cert| !cert.is_ca() || certificates_issuer(&real, cert));
        let table = table_of(&certificates);
        let verified = |collected: evidence::Collected, more: &[Cert]| {
            let mut certificates = collected.certificates;
            certificates.extend(more.iter().cloned());
            judge(&collected.report, &certificates, &any_software(), NOVEMBER_2025).verified
        };
        let read = |bytes: &[u8]| evidence::read(bytes).unwrap();
        assert!(verified(read(&[&real.report[..], &table].concat()), &[]), "{}", real.name);
        assert!(verified(read(&real.report), &evidence::read_certificates(&table).unwrap()), "{}", real.name);
        let digits = hex::encode(&real.report);
        let lines =
            digits.as_bytes().chunks(64).map(|line| [line, b"\n"].concat()).collect::<Vec<_>>().concat();
        assert!(verified(read(&lines), &real.certificates), "{}", real.name);
        // Cut, each is an error that says where.
        let both = [&real.report[..], &table].concat();
        for len in [0, 1183, 1185, 1184 + 23, both.len() - 1] {
            assert!(evidence::read(&both[..len]).is_err(), "{} cut at {len:#x}", real.name);
        }
    }
}

/// Whether this authority issued the report's key.
fn certificates_issuer(real: &Real, authority: &Cert) -> bool {
    real.certificates[0].is_issued_in_the_name_of(authority)
}

/// The header as Microsoft's paravisor writes it (`HCLA`, version, size of the rest, kind of request, status,
/// three reserved words), the report, and the runtime data (size, version, kind of report, kind of hash, size
/// of the JSON text).
fn envelope(report: &[u8], hash_kind: u32, data: &[u8]) -> Vec<u8> {
    let word = |value: u32| value.to_le_bytes();
    let header =
        [word(u32::from_le_bytes(*b"HCLA")), word(1), word(0x92a), word(2), [0; 4], [0; 4], [0; 4], [0; 4]];
    let length = data.len() as u32;
    let claims = [word(length + 20), word(1), word(2), word(hash_kind), word(length)];
    [&header.concat()[..], report, &claims.concat(), data].concat()
}

#[test]
fn a_paravisors_envelope_is_opened_and_its_data_compared() {
    use sha2::Digest as _;
    let authority = Authority::new();
    let claims = br#"{"keys":[],"user-data":"00"}"#;
    let signed = |hash: &[u8]| authority.report(builder().set(field::REPORT_DATA, hash)).as_bytes().to_vec();
    let failed = |file: &[u8]| {
        let collected = evidence::read(file).unwrap();
        let certificates = [authority.endorsement("Milan-B0", &[]), authority.intermediate.clone()];
        let trust = Trust { other_root: Some(authority.root.clone()) };
        let evidence = Evidence {
            report: &collected.report,
            certificates: &certificates,
            crl: None,
            runtime_data: collected.runtime_data.as_ref(),
        };
        let policy = Policy::parse("any_measurement = true").unwrap();
        verify(&evidence, &Demands { policy: &policy, nonce: None, trust: &trust, now: NOW }).failed()
    };
    for (kind, hash) in [
        (1, sha2::Sha256::digest(claims).to_vec()),
        (2, sha2::Sha384::digest(claims).to_vec()),
        (3, sha2::Sha512::digest(claims).to_vec()),
    ] {
        assert_eq!(failed(&envelope(&signed(&hash), kind, claims)), [] as [&str; 0]);
        assert_eq!(failed(&envelope(&signed(&hash), kind, b"{}")), ["runtime-data"]);
        assert_eq!(failed(&envelope(&signed(&hash), 9, claims)), ["runtime-data"]);
        // Without data nothing is bound by report_data.
        assert_eq!(failed(&envelope(&signed(&hash), 0, b"")), [] as [&str; 0]);
    }
    let whole = envelope(&signed(&[0; 32]), 1, claims);
    for len in [4, 15, 16, 0x20, 0x4bf, 0x4d3, whole.len() - 1] {
        assert!(evidence::read(&whole[..len]).is_err(), "cut at {len:#x}");
    }
    let mut other = whole.clone();
    other[0x0c] = 4;
    assert!(evidence::read(&other).unwrap_err().to_string().contains("an SNP report"));
}
