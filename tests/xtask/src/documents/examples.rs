// SPDX-License-Identifier: Apache-2.0
//! The examples in `resources/` are what the programs take, and the sample evidence verifies as the README
//! says.

use std::fs;
use std::process::Command;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use snp::attest::cert::Cert;
use snp::attest::chain::Trust;
use snp::attest::policy::Policy;
use snp::attest::report::Report;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::verify;
use vmm::spec::VmSpec;

use super::page::Page;
use super::root;

fn read(path: &str) -> Vec<u8> {
    fs::read(root().join(path)).expect("an example")
}

fn text(path: &str) -> String {
    String::from_utf8(read(path)).expect("text")
}

/// What does not hold.
fn refused(report: &[u8], trusted: bool, first: u8) -> Vec<String> {
    let certificates = Cert::read_all(&read("resources/example/emulated-chain.pem")).expect("certificates");
    let other_root = certificates.iter().find(|cert| cert.name() == cert.issuer_name()).cloned();
    assert!(
        other_root.as_ref().is_some_and(|root| root.name().contains("EMULATED")),
        "it must say what it is"
    );
    let report = Report::parse(report).expect("a report");
    let policy = Policy::load(&root().join("resources/example/policy.toml")).expect("a policy");
    let mut nonce = [0; 64];
    nonce[..4].copy_from_slice(&[first, 0x5a, 0x5a, 0x5a]);
    let trust = Trust { other_root: other_root.filter(|_| trusted) };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs();
    let evidence = Evidence { report: &report, certificates: &certificates, crl: None, runtime_data: None };
    let verdict = verify(&evidence, &Demands { policy: &policy, nonce: Some(nonce), trust: &trust, now });
    let failed = verdict.checks.iter().filter(|check| !check.pass);
    failed.map(|check| check.rule.to_string()).collect()
}

#[test]
fn the_sample_evidence_verifies_and_only_as_it_is() {
    let report = read("resources/example/report.bin");
    assert_eq!(refused(&report, true, 0x5a), Vec::<String>::new());
    assert_eq!(refused(&report, true, 0x5b), ["nonce"]);
    assert_eq!(refused(&report, false, 0x5a), ["certificate-chain"]);
    let mut changed = report.clone();
    // A byte of the measurement (SEV-SNP Firmware ABI 1.58, table 23: offset 0x90).
    changed[0x90] ^= 1;
    assert_eq!(refused(&changed, true, 0x5a), ["report-signature", "measurement"]);
}

/// Rules that the guide's table names and `policy` does not.
fn unnamed(policy: &str) -> Vec<String> {
    let guide = Page::parse(&text("docs/policy-guide.md"));
    let from = guide.headings.iter().find(|heading| heading.anchor == "the-rules").expect("the rules").line;
    let cells = guide
        .rows
        .iter()
        .filter(|(line, cells)| *line > from && cells.len() == 3)
        .map(|(_, cells)| &cells[0]);
    let rules = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    // `[minimum_tcb.milan]`, `platform_info.require`, `any_measurement = true`: the name of the rule comes
    // first.
    let names = rules.filter(|rule| rule.len() > 3 && !rule.starts_with('.'));
    let names = names.map(|rule| {
        rule.trim_start_matches('[').split(['.', ' ', ']']).next().unwrap_or_default().to_owned()
    });
    // The parts of tables are not rules, and the page that the table is on is no policy.
    let known = [
        "policy",
        "milan",
        "genoa",
        "turin",
        "tee",
        "snp",
        "fmc",
        "bootloader",
        "microcode",
        "launch",
        "current",
        "smt",
    ];
    let parts = [
        "tsme",
        "ecc",
        "rapl_off",
        "ciphertext_hiding",
        "alias_check",
        "tio",
        "single_socket",
        "cxl_allow",
        "aes256_xts",
    ];
    let more = ["rapl_dis", "page_swap_disable", "true", "false"];
    let is_rule = |name: &String| ![&known[..], &parts, &more].concat().contains(&name.as_str());
    let names: Vec<String> =
        names.filter(|name| is_rule(name) && !name.contains('"') && !name.starts_with('-')).collect();
    assert!(names.len() >= 20, "{names:?}");
    names.into_iter().filter(|name| !policy.contains(name)).collect()
}

#[test]
fn the_policy_has_every_rule() {
    let policy = text("resources/policy.toml");
    Policy::load(&root().join("resources/policy.toml")).expect("a policy that can be read");
    assert_eq!(unnamed(&policy), Vec::<String>::new());
    assert_eq!(unnamed(&policy.replace("minimum_svn", "")), ["minimum_svn"]);
}

#[test]
fn the_vm_as_a_file_is_one() {
    let vm = text("resources/example/vm.json");
    VmSpec::parse(&vm).expect("a VM");
    assert!(VmSpec::parse(&vm.replace("memory", "memroy")).is_err());
}

#[test]
fn the_key_hook_gives_a_key_to_a_vm_that_it_knows() {
    let folder = tempfile::tempdir().expect("a folder");
    let vm = "11111111-2222-3333-4444-555555555555";
    fs::write(folder.path().join(vm), "key").expect("a key");
    let hook = text("resources/hooks/key-from-vault");
    let path = format!("folder={}", folder.path().display());
    assert!(hook.contains("folder=/etc/cvmm/keys"));
    let hook = hook.replace("folder=/etc/cvmm/keys", &path);
    let run = |request: &str| {
        let script = format!("printf '%s' '{request}' | sh -c '{}'", hook.replace('\'', "'\\''"));
        let output = Command::new("sh").args(["-c", &script]).output().expect("sh");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let request = |vm: &str| {
        format!(r#"{{"image":"22222222-2222-3333-4444-555555555555","purpose":"open","vm":{vm}}}"#)
    };
    assert_eq!(run(&request(&format!("\"{vm}\""))), (true, "key".into()));
    assert_eq!(run(&request("null")), (false, String::new()));
    assert_eq!(run(&request("\"33333333-2222-3333-4444-555555555555\"")), (false, String::new()));
}
