// SPDX-License-Identifier: Apache-2.0
//! What a verifier reads: reports, certificates, revocation lists, certificate tables, policies, digest sets.

use p384::pkcs8::der::pem::LineEnding;
use p384::pkcs8::der::pem::encode_string;
use snp::attest::cert::Cert;
use snp::attest::cert::Crl;
use snp::attest::cert_table;
use snp::attest::cert_table::Kind;
use snp::attest::chain::Trust;
use snp::attest::evidence;
use snp::attest::policy::Policy;
use snp::attest::policy::measurement_set;
use snp::attest::report::Report;
use snp::attest::report::ReportBuilder;
use snp::attest::report::field;
use snp::attest::tcb::Product;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::Verdict;
use snp::attest::verify::verify;
use test_support::chain::Authority;
use test_support::chain::NOW;
use test_support::keys;

use crate::driver::Seed;
use crate::driver::Target;
use crate::driver::no_repair;
use crate::text;

fn authority() -> Authority {
    Authority::with_keys([keys::p384(1), keys::p384(2), keys::p384(3)])
}

fn report(version: u32) -> Vec<u8> {
    let tcb = [3, 0, 0, 0, 0, 0, 8, 0xd2];
    let builder = ReportBuilder::new(version)
        .set(field::POLICY, &0x3_0000u64.to_le_bytes())
        .set(field::REPORTED_TCB, &tcb)
        .set(field::COMMITTED_TCB, &tcb)
        .set(field::CURRENT_TCB, &tcb)
        .set(field::REPORT_ID_MA, &[0xff; 32])
        .set(field::LAUNCH_TCB, &tcb)
        .set(field::CPUID_FMS, &[0x19, 1, 1])
        .set(field::CHIP_ID, &[0x77; 64]);
    authority().report(builder).as_bytes().to_vec()
}

fn judge(authority: &Authority, report: &Report, leaf: &Cert, crl: Option<&Crl>, policy: &Policy) -> Verdict {
    let certificates = [leaf.clone(), authority.intermediate.clone()];
    let trust = Trust { other_root: Some(authority.root.clone()) };
    let evidence = Evidence { report, certificates: &certificates, crl, runtime_data: None };
    let verdict = verify(&evidence, &Demands { policy, nonce: None, trust: &trust, now: NOW });
    for check in verdict.checks.iter().filter(|check| !check.pass) {
        assert!(!check.expected.is_empty() && !check.found.is_empty(), "{check:?}");
    }
    verdict
}

fn any_software() -> Policy {
    Policy::parse("any_measurement = true").unwrap()
}

#[test]
fn attestation_report() {
    let authority = authority();
    let leaf = authority.endorsement("Milan-B0", &[]);
    let policy = any_software();
    let genuine: Vec<Vec<u8>> = [2, 3, 5].map(report).into();
    for bytes in &genuine[1..] {
        let verdict = judge(&authority, &Report::parse(bytes).unwrap(), &leaf, None, &policy);
        assert!(verdict.verified, "{verdict:#?}");
    }
    Target {
        name: "report",
        seeds: genuine
            .iter()
            .map(|bytes| Seed::with_fields(bytes.clone(), [0..0x90, 0x180..0x208, 0x2a0..0x330]))
            .collect(),
        repair: no_repair,
        parse: &|bytes| {
            let report = Report::parse(bytes).map_err(text)?;
            let _ = (format!("{report:?}"), report.signer(), report.cpuid_fms());
            let verdict = judge(&authority, &report, &leaf, None, &policy);
            assert!(
                !verdict.verified || genuine.iter().any(|good| good == bytes),
                "a changed report verifies"
            );
            Ok(())
        },
        says: &["offset 0x", "has 1184 bytes, these are"],
    }
    .run();
}

/// A report with a table behind it, in an envelope with runtime data, and in digits.
#[test]
fn evidence_in_its_forms() {
    let authority = authority();
    let leaf = authority.endorsement("Milan-B0", &[]);
    let genuine = report(3);
    let entries = [(Kind::VCEK, leaf.der()), (Kind::ASK, authority.intermediate.der())];
    let table = cert_table::encode(&entries);
    let header = [u32::from_le_bytes(*b"HCLA"), 1, 0x92a, 2, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
    let data = [40u32, 1, 2, 1, 20].map(u32::to_le_bytes).concat();
    let envelope = [&header[..], &genuine, &data, &[b'x'; 20]].concat();
    let behind = 0x4c0..envelope.len();
    Target {
        name: "evidence",
        seeds: vec![
            Seed::new([&genuine[..], &table].concat()),
            Seed::with_fields(envelope, [0..0x20, behind]),
            Seed::new(genuine.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
            Seed::new(table.clone()),
        ],
        repair: no_repair,
        parse: &|file| {
            if evidence::read_certificates(file).is_ok_and(|found| !found.is_empty()) {
                return Ok(());
            }
            let collected = evidence::read(file).map_err(text)?;
            assert!(collected.certificates.len() <= 64 && collected.report.as_bytes().len() == 1184);
            let _ = collected.runtime_data.map(|data| data.hash());
            Ok(())
        },
        says: &["offset", "bytes that are no evidence", "bytes, these are", "certificate"],
    }
    .run();
}

fn pem(label: &str, der: &[u8]) -> Vec<u8> {
    encode_string(label, LineEnding::LF, der).unwrap().into_bytes()
}

#[test]
fn certificate() {
    let authority = authority();
    let leaf = authority.endorsement("Milan-B0", &[]);
    let amd = snp::attest::chain::amd_root(Product::Milan).unwrap().clone();
    let chain = [pem("CERTIFICATE", leaf.der()), pem("CERTIFICATE", authority.root.der())].concat();
    let policy = any_software();
    let genuine = Report::parse(&report(3)).unwrap();
    Target {
        name: "certificate",
        seeds: vec![Seed::new(leaf.der()), Seed::new(amd.der()), Seed::new(chain)],
        repair: no_repair,
        parse: &|file| {
            for cert in Cert::read_all(file).map_err(text)? {
                let _ = (
                    format!("{cert:?}"),
                    cert.name(),
                    cert.issuer_name(),
                    cert.validity_text(),
                    cert.is_ca(),
                );
                let _ = (
                    cert.product().is_ok(),
                    cert.provider(),
                    cert.endorsement_key(),
                    cert.unknown_critical(),
                );
                for product in Product::ALL {
                    let _ = (cert.tcb(product).is_ok(), cert.hwid().is_ok());
                }
                let verdict = judge(&authority, &genuine, &cert, None, &policy);
                assert!(!verdict.verified || cert.der() == leaf.der(), "a changed certificate counts");
            }
            Ok(())
        },
        says: &["certificate"],
    }
    .run();
}

#[test]
fn revocation_list() {
    let authority = authority();
    let leaf = authority.endorsement("Milan-B0", &[]);
    let policy = any_software();
    let genuine = Report::parse(&report(3)).unwrap();
    let der = authority.crl(&[9, 10], NOW - 10, NOW + 10);
    Target {
        name: "revocation-list",
        seeds: vec![Seed::new(der.clone()), Seed::new(pem("X509 CRL", &der))],
        repair: no_repair,
        parse: &|file| {
            let list = Crl::read(file).map_err(text)?;
            let _ = (
                format!("{list:?}"),
                list.issuer_name(),
                list.period(),
                list.check_signed_by(&authority.root),
            );
            let verdict = judge(&authority, &genuine, &leaf, Some(&list), &policy);
            assert!(!verdict.verified || list.der() == der, "a changed list counts");
            Ok(())
        },
        says: &["revocation list"],
    }
    .run();
}

#[test]
fn certificate_table() {
    let table = cert_table::encode(&[(Kind::VCEK, &[1; 300]), (Kind::ASK, &[2; 100]), (Kind::ARK, b"")]);
    Target {
        name: "certificate-table",
        seeds: vec![Seed::with_fields(table, [0..96, 16..24, 40..48]), Seed::new(cert_table::encode(&[]))],
        repair: no_repair,
        parse: &|table| {
            for (kind, data) in cert_table::parse(table).map_err(text)? {
                assert!(data.len() <= table.len() && !kind.to_string().is_empty());
            }
            Ok(())
        },
        says: &["offset 0x"],
    }
    .run();
}

const POLICY: &str = r#"
measurements = ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
id_key_digests = ['bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb']
family_id = "01010101010101010101010101010101"
minimum_svn = 5
vmpl = [0, 1]
allow_debug = false
signers = ["vcek"]
providers = ["CN=example"]

[minimum_tcb.milan]
bootloader = 3
snp = 8
microcode = 0xd2
[minimum_tcb.turin]
fmc = 1
"#;

#[test]
fn policy_file() {
    let genuine = Report::parse(&report(3)).unwrap();
    let authority = authority();
    let leaf = authority.endorsement("Milan-B0", &[]);
    Target {
        name: "policy",
        seeds: vec![Seed::new(POLICY), Seed::new("any_measurement = true\nchips = []\n")],
        repair: no_repair,
        parse: &|file| {
            let policy = Policy::parse(&String::from_utf8_lossy(file)).map_err(text)?;
            let _ = judge(&authority, &genuine, &leaf, None, &policy);
            Ok(())
        },
        // The TOML parser names line and column.
        says: &["at line", "the policy accepts any software", "who may sign one", "expected", "field"],
    }
    .run();
}

#[test]
fn digest_set() {
    let set = format!(
        r#"{{"format": "cvmm-measurement-1", "digests": [{{"vcpus": 1, "launch_digest": "{}"}}]}}"#,
        "ab".repeat(48)
    );
    Target {
        name: "digest-set",
        seeds: vec![Seed::new(set)],
        repair: no_repair,
        parse: &|file| measurement_set(&String::from_utf8_lossy(file)).map(drop),
        says: &["at line", "expected", "no digests"],
    }
    .run();
}
