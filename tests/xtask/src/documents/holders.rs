// SPDX-License-Identifier: Apache-2.0
//! Each promise of the specification names a test that is there.

use std::path::Path;

use cvmm_tests::cases;

use super::Pages;
use super::messages;
use super::none;
use super::one;
use super::pages;
use super::problem;
use super::root;

const PAGE: &str = "SPECIFICATION.md";
const PACKAGES: [&str; 5] = ["snp", "vmm", "vtpm-svc", "cvmm-tests", "xtask"];
/// Sections whose rows are no promises that a test holds.
const OTHERS: [&str; 2] = ["goals-of-speed", "limits"];

struct Holders {
    sources: String,
    cases: Vec<String>,
}

impl Holders {
    fn have(&self, holder: &str) -> bool {
        let case = |name: &String| name == holder || name.starts_with(&format!("{holder}/"));
        if let Some(test) = holder.strip_prefix("--test ") {
            root().join(format!("vtpm-svc/tests/{test}.rs")).exists()
        } else if holder.contains('_') {
            self.sources.contains(&format!("fn {holder}("))
        } else {
            self.cases.iter().any(case)
        }
    }
}

fn unheld(pages: &Pages, holders: &Holders) -> Vec<String> {
    let name = Path::new(PAGE);
    let Some(page) = pages.get(name) else { return vec![format!("{PAGE} is missing")] };
    let mut problems = Vec::new();
    for (line, cells) in &page.rows {
        let section = page.headings.iter().rfind(|heading| heading.line < *line);
        let [promise, held, ..] = cells.as_slice() else { continue };
        if section.is_some_and(|section| OTHERS.contains(&section.anchor.as_str()))
            || ["Promise"].contains(&promise.as_str())
            || promise.starts_with('-')
        {
            continue;
        }
        let named: Vec<&str> = held.split('`').skip(1).step_by(2).collect();
        // A path is looked at with those of the other pages.
        let named: Vec<&&str> = named.iter().filter(|name| !PACKAGES.contains(name)).collect();
        if named.is_empty() && !held.contains("target of") {
            problems.push(problem(name, *line, "nothing holds this"));
        }
        let missing = named
            .iter()
            .filter(|name| (!name.contains('/') || name.contains("strict/")) && !holders.have(name));
        problems.extend(missing.map(|holder| problem(name, *line, format!("no test or case {holder}"))));
    }
    problems
}

#[test]
fn promises_are_held_by_tests_that_are_there() {
    let mut sources = String::new();
    for folder in ["snp", "vmm/src", "vmm/tests", "vtpm-svc/src", "vtpm-svc/tests", "tests"] {
        messages::sources(&root().join(folder), &mut sources);
    }
    let cases = cases::all().into_iter().map(|case| case.name).collect();
    none(&unheld(&pages(), &Holders { sources, cases }));
}

#[test]
fn a_promise_without_a_holder_is_found() {
    let holders = Holders { sources: "fn a_rule_holds() {}".into(), cases: vec!["boot/one".into()] };
    for (held, problems) in [
        ("`snp`: `a_rule_holds`", 0),
        ("cases `boot`", 0),
        ("`snp`: `a_rule_does_not`", 1),
        ("cases `boots`", 1),
        ("`vtpm-svc`: `--test nothing_of_that_name`", 1),
        ("reading", 1),
    ] {
        let page = one(PAGE, &format!("| Promise | Held by |\n|---|---|\n| one | {held} |\n"));
        assert_eq!(unheld(&page, &holders).len(), problems, "{held}");
    }
}
