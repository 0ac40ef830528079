// SPDX-License-Identifier: Apache-2.0
//! The structure that docs/architecture.md promises: no circle of files within a package, dependencies
//! between packages as listed here, a measurement library that links neither the model nor KVM nor a command
//! line, and options that are parsed in one folder of the service.
//!
//! Imports are read as text: every path that begins with `crate`, `super` or `self`, and `use` of a module's
//! own children. Tests inside of files are left out, and macros are not expanded.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

/// Folders of sources, one for each package of the product.
const SOURCES: [&str; 5] = ["snp/src", "snp/model/src", "devices/src", "vmm/src", "vtpm-svc/src"];

/// What each package of the product uses of ours. An arrow more needs a reason in docs/architecture.md.
const DEPENDENCIES: [(&str, &[&str]); 5] = [
    ("snp", &[]),
    ("snp-model", &["snp"]),
    ("devices", &[]),
    ("vmm", &["devices", "snp", "snp-model", "vtpm-svc"]),
    ("vtpm-svc", &[]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn cargo(args: &[&str]) -> String {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program).current_dir(root()).args(args).output().unwrap();
    assert!(output.status.success(), "cargo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// All source files below `folder` that are no tests.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            files(&path, found);
        } else if name.ends_with(".rs") && !name.ends_with("_test.rs") && name != "main.rs" {
            found.push(path);
        }
    }
}

/// The module that a file is, below `folder`: its path without ending, `lib` and `mod`.
fn module(folder: &Path, file: &Path) -> Vec<String> {
    let relative = file.strip_prefix(folder).unwrap().with_extension("");
    let mut parts: Vec<String> = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod" || last == "lib") {
        parts.pop();
    }
    parts
}

/// The product's part of a file: no comments, and nothing from the first module of tests on.
fn product_lines(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = Vec::new();
    for line in text.lines() {
        let test = lines.last().is_some_and(|last| last.trim() == "#[cfg(test)]");
        if test && line.contains("mod ") && line.trim_end().ends_with('{') {
            break;
        }
        lines.push(line.split("//").next().unwrap_or_default());
    }
    lines
}

/// The modules that a line names, as paths from the crate's root. `children` are the file's own modules.
fn paths(line: &str, own: &[String], children: &BTreeSet<String>) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut take = |text: &str| {
        let mut base = own.to_vec();
        for (at, part) in text.split("::").enumerate() {
            match part {
                "crate" => base.clear(),
                "self" => {}
                "super" => {
                    base.pop();
                }
                "" => return,
                name => {
                    // A child's name begins a path only in an import.
                    if at == 0 && !children.contains(name) {
                        return;
                    }
                    base.push(name.to_owned());
                }
            }
        }
        found.push(base);
    };
    let word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for text in line.split(|c| !word(c)).filter(|text| text.contains("::")) {
        let text = text.trim_end_matches(':');
        let first = text.split("::").next().unwrap_or_default();
        let import = line.trim_start().trim_start_matches("pub ").starts_with("use ");
        if ["crate", "super", "self"].contains(&first) || import {
            take(text);
        }
    }
    found
}

/// For each file of a package, the files that it takes names from.
fn arrows(folder: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut all = Vec::new();
    files(folder, &mut all);
    let by_module: BTreeMap<Vec<String>, &PathBuf> =
        all.iter().map(|file| (module(folder, file), file)).collect();
    let name = |file: &Path| file.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
    let mut arrows = BTreeMap::new();
    for (own, file) in &by_module {
        let children: BTreeSet<String> = by_module
            .keys()
            .filter(|other| other.len() == own.len() + 1 && other.starts_with(own))
            .map(|other| other[own.len()].clone())
            .collect();
        let text = std::fs::read_to_string(file).unwrap();
        let mut uses = BTreeSet::new();
        for path in product_lines(&text).into_iter().flat_map(|line| paths(line, own, &children)) {
            // The longest part of the path that is a file; the rest are names in it.
            let target = (0..=path.len()).rev().find_map(|len| by_module.get(&path[..len]));
            uses.extend(target.filter(|target| *target != file).map(|target| name(target)));
        }
        arrows.insert(name(file), uses);
    }
    arrows
}

/// All files that can be reached from `start`.
fn reach(arrows: &BTreeMap<String, BTreeSet<String>>, start: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut next = vec![start.to_owned()];
    while let Some(file) = next.pop() {
        for used in &arrows[&file] {
            if seen.insert(used.clone()) {
                next.push(used.clone());
            }
        }
    }
    seen
}

/// The sets of files in which each uses each other, directly or through others.
fn circles(arrows: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<BTreeSet<String>> {
    let reached: BTreeMap<&String, BTreeSet<String>> = arrows.keys().map(|f| (f, reach(arrows, f))).collect();
    let circle = |file: &String| -> BTreeSet<String> {
        reached[file].iter().filter(|other| reached[*other].contains(file)).cloned().collect()
    };
    arrows.keys().map(circle).filter(|circle| circle.len() > 1).collect()
}

#[test]
fn no_package_has_a_circle_of_files() {
    let mut text = String::new();
    for folder in SOURCES {
        let arrows = arrows(&root().join(folder));
        assert!(arrows.values().any(|uses| !uses.is_empty()), "{folder}: no file uses another");
        for circle in circles(&arrows) {
            text.push_str("a circle of files:\n");
            for file in &circle {
                text.push_str(&format!("  {file} uses {:?}\n", &arrows[file] & &circle));
            }
        }
    }
    assert!(text.is_empty(), "{text}move what they share into a file below them");
}

/// The part of a package that a file belongs to: its folder below `src`, or itself where it stands there.
fn part(file: &str) -> &str {
    let below = SOURCES.iter().find_map(|folder| file.strip_prefix(folder)).unwrap_or(file);
    let part = below.trim_start_matches('/').split('/').next().unwrap_or_default();
    part.strip_suffix(".rs").unwrap_or(part)
}

/// Imports between the folders of a package point down as well: whoever reads one needs to know only those below it.
#[test]
fn no_package_has_a_circle_of_folders() {
    for folder in SOURCES {
        let mut parts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (file, uses) in arrows(&root().join(folder)) {
            let own = part(&file).to_owned();
            let others =
                uses.iter().map(|used| part(used).to_owned()).filter(|used| *used != own && used != "lib");
            let others: Vec<String> = others.collect();
            parts.entry(own).or_default().extend(others);
        }
        parts.remove("lib");
        let found = circles(&parts);
        let ties = |circle: &BTreeSet<String>| -> Vec<String> {
            circle.iter().map(|part| format!("{part} uses {:?}", &parts[part] & circle)).collect()
        };
        assert!(found.is_empty(), "{folder}: {:?}", found.iter().map(ties).collect::<Vec<_>>());
    }
}

/// An option is the command line's; a library names fields, in backticks. Commands that are written out are
/// no options.
#[test]
fn libraries_name_no_option() {
    let commands = [
        "`cvmm measure --json`",
        "`cvmm measure --diff`",
        "`cvmm measure --firmware … --vcpu-model",
        "cvmm vmgs create {path} --key-file {path}.key",
        "--only-section=.linux UKI KERNEL`",
    ];
    // The command line and what it prints as a page; what starts the service, whose command line that is.
    let speak = [
        "cli.rs",
        "cli",
        "doctor.rs",
        "doctor",
        "run/outcome.rs",
        "vtpm/service.rs",
        "vtpm/backend.rs",
        "vtpm.rs",
    ];
    let mut files_read = Vec::new();
    files(&root().join("snp/src"), &mut files_read);
    files(&root().join("snp/model/src"), &mut files_read);
    files(&root().join("vmm/src"), &mut files_read);
    let speaks = |file: &Path| speak.iter().any(|path| file.starts_with(root().join("vmm/src").join(path)));
    files_read.retain(|file| !speaks(file));
    for file in files_read {
        let text = std::fs::read_to_string(&file).unwrap();
        for line in product_lines(&text).into_iter().filter(|line| !commands.iter().any(|c| line.contains(c)))
        {
            let option =
                line.split("--").skip(1).any(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
            assert!(!option, "{}: {line}", file.display());
        }
    }
}

#[test]
fn circles_are_found() {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<String>>();
    let graph = |edges: &[(&str, &[&str])]| edges.iter().map(|(f, to)| ((*f).to_owned(), set(to))).collect();
    let found = circles(&graph(&[("a", &["b"]), ("b", &["c"]), ("c", &["b", "d"]), ("d", &[])]));
    assert_eq!(found, BTreeSet::from([set(&["b", "c"])]));
    let own = ["x".to_owned(), "y".to_owned()];
    let path = |text: &str| text.split("::").map(str::to_owned).collect::<Vec<_>>();
    let children = set(&["child"]);
    assert_eq!(paths("use crate::a::B;", &own, &children), [path("a::B")]);
    assert_eq!(paths("    let x = super::z::f(u8::MAX);", &own, &children), [path("x::z::f")]);
    assert_eq!(paths("pub use child::Name;", &own, &children), [path("x::y::child::Name")]);
    assert!(paths("use std::fmt;", &own, &children).is_empty());
    assert_eq!(product_lines("a // b\n#[cfg(test)]\nmod tests {\nuse crate::c;"), ["a ", "#[cfg(test)]"]);
}

#[test]
fn options_are_parsed_and_lines_are_printed_in_command_lines_alone() {
    for package in ["vtpm-svc", "vmm", "snp", "snp/model", "devices"] {
        let folder = root().join(package).join("src");
        let mut all = Vec::new();
        files(&folder, &mut all);
        let speaks = |file: &&PathBuf| {
            let text = std::fs::read_to_string(file).unwrap();
            ["clap::", "cli::note"].iter().any(|word| text.contains(word))
        };
        let (own, other): (Vec<&PathBuf>, Vec<&PathBuf>) = all
            .iter()
            .filter(speaks)
            .partition(|file| file.starts_with(folder.join("cli")) || **file == folder.join("cli.rs"));
        assert!(other.is_empty(), "{other:?}");
        assert_eq!(own.is_empty(), !["vtpm-svc", "vmm"].contains(&package), "{package}");
    }
}

#[test]
fn packages_depend_on_what_is_listed_and_on_nothing_else_of_ours() {
    let metadata: serde_json::Value =
        serde_json::from_str(&cargo(&["metadata", "--format-version", "1", "--no-deps", "--offline"]))
            .unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let ours: BTreeSet<&str> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    for (name, expected) in DEPENDENCIES {
        let package = packages.iter().find(|package| package["name"] == name).unwrap();
        let all = package["dependencies"].as_array().unwrap();
        let normal = all.iter().filter(|dependency| dependency["kind"].is_null());
        let used: BTreeSet<&str> =
            normal.map(|d| d["name"].as_str().unwrap()).filter(|used| ours.contains(used)).collect();
        assert_eq!(used, expected.iter().copied().collect(), "{name}");
    }
}

#[test]
fn a_verifier_links_no_model_no_kvm_and_no_command_line() {
    let tree = cargo(&["tree", "--offline", "--edges", "normal", "--package", "snp", "--prefix", "none"]);
    let crates: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(crates.contains("snp") && crates.contains("p384"), "{tree}");
    for other in
        ["snp-model", "vmm", "vtpm-svc", "kvm-ioctls", "kvm-bindings", "clap", "libloading", "ruzstd"]
    {
        assert!(!crates.contains(other), "snp links {other}");
    }
}
