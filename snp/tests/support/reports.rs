// SPDX-License-Identifier: Apache-2.0
//! Real reports with their certificates, and one that tests change.
//!
//! The Milan report is in the `sev` crate's package. The others are read from the folder that
//! `CVMM_REPORT_FIXTURES` names; without it tests say that they were skipped.

use std::path::PathBuf;

use snp::attest::cert::Cert;
use snp::attest::chain::Trust;
use snp::attest::policy::Policy;
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

/// 1 November 2025: every real certificate here was valid then.
pub const NOVEMBER_2025: u64 = 1_761_955_200;

pub struct Real {
    pub name: &'static str,
    pub product: Product,
    pub version: u32,
    pub report: Vec<u8>,
    pub certificates: Vec<Cert>,
}

/// The folder of the `sev` crate's test data in the registry's unpacked package.
fn sev_package() -> PathBuf {
    // Packages for other systems only may never have been fetched.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let metadata = std::process::Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--offline",
            "--filter-platform",
            &platform,
            "--manifest-path",
        ])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let sev = packages.iter().find(|package| package["name"] == "sev").unwrap();
    PathBuf::from(sev["manifest_path"].as_str().unwrap()).with_file_name("tests/certs_data")
}

pub fn real_reports() -> Vec<Real> {
    let sev = sev_package();
    let hex_report = std::fs::read_to_string(sev.join("report_milan.hex")).unwrap();
    let mut reports = vec![Real {
        name: "milan-v2",
        product: Product::Milan,
        version: 2,
        report: hex::decode(hex_report.trim()).unwrap(),
        certificates: Cert::read_all(&std::fs::read(sev.join("vcek_milan.der")).unwrap()).unwrap(),
    }];
    let folder = match std::env::var_os("CVMM_REPORT_FIXTURES").map(PathBuf::from) {
        Some(folder) if folder.is_dir() => folder,
        _ => {
            eprintln!("SKIPPED: reports of Genoa, Turin and VLEK: CVMM_REPORT_FIXTURES names no folder");
            return reports;
        }
    };
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    for (name, product, version, leaf, issuers) in [
        ("genoa-v5", Product::Genoa, 5, "genoa-v5.vcek.der", None),
        ("turin-v5", Product::Turin, 5, "turin-v5.vcek.der", None),
        // The VLEK's issuer is not built in.
        ("milan-vlek-v3", Product::Milan, 3, "milan-vlek-v3.vlek.der", Some("milan_ask_ark_asvk.pem")),
    ] {
        let mut certificates = Cert::read_all(&read(leaf)).unwrap();
        if let Some(issuers) = issuers {
            certificates.extend(Cert::read_all(&read(issuers)).unwrap());
        }
        let report = read(&format!("{name}.report.bin"));
        reports.push(Real { name, product, version, report, certificates });
    }
    reports
}

pub fn any_software() -> Policy {
    Policy::parse("any_measurement = true\nvmpl = [0, 1, 2, 3]\nallow_debug = true\nallow_migration = true")
        .unwrap()
}

pub fn judge(report: &Report, certificates: &[Cert], policy: &Policy, now: u64) -> Verdict {
    let evidence = Evidence { report, certificates, crl: None, runtime_data: None };
    verify(&evidence, &Demands { policy, nonce: None, trust: &Trust::default(), now })
}

/// The report that [`Authority::endorsement`] for Milan vouches for.
pub fn builder() -> ReportBuilder {
    ReportBuilder::new(3)
        .set(field::POLICY, &0x3_0000u64.to_le_bytes())
        .set(field::KEY_INFO, &[1])
        .set(field::REPORT_ID_MA, &[0xff; 32])
        .set(field::CURRENT_TCB, &[3, 0, 0, 0, 0, 0, 8, 0xd2])
        .set(field::REPORTED_TCB, &[3, 0, 0, 0, 0, 0, 8, 0xd2])
        .set(field::COMMITTED_TCB, &[3, 0, 0, 0, 0, 0, 8, 0xd2])
        .set(field::LAUNCH_TCB, &[3, 0, 0, 0, 0, 0, 8, 0xd2])
        .set(field::COMMITTED_VERSION, &[22, 55, 1])
        .set(field::PLATFORM_INFO, &[0x24])
        .set(field::CPUID_FMS, &[0x19, 1, 1])
        .set(field::CHIP_ID, &[0x77; 64])
        .set(field::MEASUREMENT, &[0xaa; 48])
        .set(field::REPORT_DATA, &[0x11; 64])
        .set(field::GUEST_SVN, &5u32.to_le_bytes())
        .set(field::ID_KEY_DIGEST, &[0xbb; 48])
        .set(field::AUTHOR_KEY_DIGEST, &[0xcc; 48])
        .set(field::HOST_DATA, &[0xdd; 32])
        .set(field::FAMILY_ID, &[1; 16])
        .set(field::IMAGE_ID, &[2; 16])
}

/// The rules that a report of `authority` fails under a policy, with the nonce of [`builder`].
pub fn failures(
    authority: &Authority,
    report: &Report,
    endorsement: Cert,
    policy: &str,
) -> Vec<&'static str> {
    let certificates = [endorsement, authority.intermediate.clone()];
    let trust = Trust { other_root: Some(authority.root.clone()) };
    let evidence = Evidence { report, certificates: &certificates, crl: None, runtime_data: None };
    let policy = Policy::parse(policy).unwrap();
    let demands = Demands { policy: &policy, nonce: Some([0x11; 64]), trust: &trust, now: NOW };
    verify(&evidence, &demands).failed()
}
