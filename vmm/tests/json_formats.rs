// SPDX-License-Identifier: Apache-2.0
//! JSON that other programs read: within a format fields are added, and never renamed, taken away or given
//! another type.
//!
//! The files in `formats/` have a line for each field: its path, with `[]` for the items of a list and `*`
//! where names are data, and its type. They are written by hand; a line is taken out only together with a new
//! number of the format.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use snp::attest::report::ReportBuilder;
use snp::attest::report::field;
use test_support::chain::Authority;
use test_support::code::power_off;
use test_support::tiny;

/// Objects whose names are data.
const MAPS: [&str; 4] = ["inputs", "pcrs", "pcrs.*", "backends"];

fn paths(value: &Value, path: &str, out: &mut BTreeSet<String>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(items) => {
            items.iter().for_each(|item| paths(item, &format!("{path}[]"), out));
            "list"
        }
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = if MAPS.contains(&path) { "*" } else { name };
                let path = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
                paths(value, &path, out);
            }
            "object"
        }
    };
    out.insert(format!("{path} {kind}"));
}

fn check(format: &str, json: &str) {
    let value: Value = serde_json::from_str(json).unwrap();
    let mut found = BTreeSet::new();
    paths(&value, "", &mut found);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/formats").join(format);
    let text = std::fs::read_to_string(file).unwrap();
    let promised: BTreeSet<String> =
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    let missing: Vec<&String> = promised.difference(&found).collect();
    assert_eq!(missing, [] as [&String; 0], "promised by {format}; there is {found:#?}");
    if let Some(name) = value.get("format") {
        assert_eq!(name, format, "the file has the format's name");
    }
}

fn cvmm(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_cvmm")).args(args).output().unwrap();
    assert!(!output.stdout.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn fields_that_were_promised_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let kernel = at("kernel");
    std::fs::write(&kernel, tiny::kernel(&power_off())).unwrap();
    check("cvmm-measurement-1", &cvmm(&["measure", "--json", "--vtpm", "--kernel", &kernel]));

    let options = [
        "spec",
        "--snp",
        "--kernel",
        &kernel,
        "--vtpm",
        "v",
        "--vtpm-key-file",
        "k",
        "--on-reboot",
        "restart",
    ];
    check("cvmm-spec", &cvmm(&options));

    let authority = Authority::new();
    let builder = ReportBuilder::new(3).set(field::CPUID_FMS, &[0x19, 1, 1]);
    std::fs::write(at("report"), authority.report(builder).as_bytes()).unwrap();
    std::fs::write(at("certs"), authority.endorsement("Milan-B0", &[]).der()).unwrap();
    std::fs::write(at("policy"), "any_measurement = true").unwrap();
    check("cvmm-report-1", &cvmm(&["report", "show", "--json", &at("report")]));
    let verify = [
        "verify",
        "--json",
        &at("report"),
        "--certs",
        &at("certs"),
        "--policy",
        &at("policy"),
        "--any-nonce",
    ];
    check("cvmm-verdict-1", &cvmm(&verify));
}
