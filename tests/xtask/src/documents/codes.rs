// SPDX-License-Identifier: Apache-2.0
//! Tables of exit codes are what the code says.

use std::collections::BTreeMap;
use std::path::Path;

use snp::ghcb::term::SevTerm;
use vmm::doctor;
use vmm::run::outcome::EXIT_MONITOR_ERROR;
use vmm::run::outcome::EXIT_USAGE;
use vmm::run::outcome::Outcome;

use super::Pages;
use super::none;
use super::one;
use super::pages;

/// Where the codes of a run are listed: page, and the anchor of the section.
const RUN: [(&str, &str); 3] = [
    ("README.md", "exit-codes"),
    ("docs/user-guide.md", "how-a-run-ends"),
    ("docs/reference.md", "a-run-cvmm---kernel-"),
];

const DOCTOR: (&str, &str) = ("docs/hardware-acceptance.md", "is-this-host-ready");

/// What each code of a run means, in words that every table has.
fn run_codes() -> BTreeMap<u8, String> {
    let outcomes = [
        Outcome::PoweredOff,
        Outcome::Rebooted,
        Outcome::Terminated(SevTerm::Msr { set: 0, code: 0 }),
        Outcome::Crashed { vcpu: 0 },
    ];
    let mut codes = BTreeMap::new();
    for outcome in outcomes {
        let words = outcome.to_string();
        codes.insert(outcome.exit_code(), words.split(':').next().unwrap_or_default().to_owned());
    }
    for signal in [2, 15] {
        codes.insert(Outcome::Signal(signal).exit_code(), "stopped by".into());
    }
    codes.insert(EXIT_MONITOR_ERROR, "the monitor".into());
    codes.insert(EXIT_USAGE, "the request is not valid".into());
    codes
}

fn doctor_codes() -> BTreeMap<u8, String> {
    BTreeMap::from([
        (doctor::EXIT_SNP, "SNP guests can be launched".into()),
        (doctor::EXIT_EMULATION_ONLY, "only the emulated platform".into()),
        (doctor::EXIT_NEITHER, "neither".into()),
    ])
}

/// The rows with codes in a section, down to the next heading.
fn listed(pages: &Pages, (page, section): (&str, &str)) -> BTreeMap<u8, String> {
    let Some(page) = pages.get(Path::new(page)) else { return BTreeMap::new() };
    let Some(start) = page.headings.iter().position(|heading| heading.anchor == section) else {
        return BTreeMap::new();
    };
    let from = page.headings.get(start).map_or(0, |heading| heading.line);
    let to = page.headings.get(start + 1).map_or(usize::MAX, |heading| heading.line);
    let mut codes = BTreeMap::new();
    for (_, cells) in page.rows.iter().filter(|(line, _)| (from..to).contains(line)) {
        if let [codes_cell, meaning, ..] = cells.as_slice() {
            for code in codes_cell.split([',', ';']).filter_map(|code| code.trim().parse().ok()) {
                codes.insert(code, meaning.clone());
            }
        }
    }
    codes
}

fn differences(pages: &Pages, place: (&str, &str), expected: &BTreeMap<u8, String>) -> Vec<String> {
    let found = listed(pages, place);
    let mut problems = Vec::new();
    for (code, words) in expected {
        match found.get(code) {
            Some(meaning) if meaning.contains(words.as_str()) => {}
            Some(meaning) => problems.push(format!("{place:?}: {code} is '{meaning}', not '{words}'")),
            None => problems.push(format!("{place:?}: {code} ('{words}') is missing")),
        }
    }
    problems.extend(
        found
            .keys()
            .filter(|code| !expected.contains_key(code))
            .map(|code| format!("{place:?}: {code} is no code")),
    );
    problems
}

#[test]
fn tables_have_the_codes_of_the_code() {
    let pages = pages();
    for place in RUN {
        none(&differences(&pages, place, &run_codes()));
    }
    none(&differences(&pages, DOCTOR, &doctor_codes()));
}

#[test]
fn the_help_has_the_same() {
    let run = vmm::run::outcome::exit_codes_help();
    for (text, codes) in [(run.as_str(), run_codes()), (doctor::EXIT_CODES, doctor_codes())] {
        for (code, words) in codes {
            let line = text.lines().find(|line| line.contains(&code.to_string()));
            assert!(line.is_some_and(|line| line.contains(&words)), "{code}, {words}: {line:?}");
        }
    }
}

#[test]
fn a_wrong_table_is_found() {
    let right: Vec<String> =
        run_codes().iter().map(|(code, words)| format!("| {code} | {words} |")).collect();
    let page = |rows: &[String]| {
        one("README.md", &format!("# Exit codes\n\n| code | meaning |\n|---|---|\n{}\n", rows.join("\n")))
    };
    none(&differences(&page(&right), RUN[0], &run_codes()));
    for index in 0..right.len() {
        let mut rows = right.clone();
        rows.remove(index);
        assert_eq!(differences(&page(&rows), RUN[0], &run_codes()).len(), 1, "without {index}");
        let mut rows = right.clone();
        rows[index] = format!("| 77 |{}", rows[index].split('|').nth(2).unwrap_or_default());
        assert_eq!(differences(&page(&rows), RUN[0], &run_codes()).len(), 2, "{}", rows[index]);
    }
}
