// SPDX-License-Identifier: Apache-2.0
//! Messages that the troubleshooting page quotes are messages that the programs have.

use std::fs;
use std::path::Path;

use super::Pages;
use super::none;
use super::one;
use super::pages;
use super::problem;
use super::root;

const PAGE: &str = "docs/troubleshooting.md";

/// Words of Linux, of clap and of serde.
const OTHERS: [&str; 5] = [
    "Unable to mount root fs",
    "unexpected argument",
    "unrecognized subcommand",
    "required arguments were not provided",
    "unknown field",
];

/// Text of the programs, with strings that are broken over lines made whole.
pub fn sources(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).expect("a source");
            let mut parts = source.split("\\\n");
            *text += parts.next().unwrap_or_default();
            parts.for_each(|part| *text += part.trim_start());
        }
    }
}

fn unknown(pages: &Pages, sources: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let Some(page) = pages.get(Path::new(PAGE)) else { return vec![format!("{PAGE} is missing")] };
    for (line, cells) in &page.rows {
        // Only what stands in the first column is a message.
        let quoted = cells.first().map(String::as_str).unwrap_or_default();
        for message in quoted.split('`').skip(1).step_by(2) {
            let known = match message.split_once("REFUSED: ") {
                Some((_, rule)) => sources.contains(&format!("\"{rule}\"")),
                // The command line puts an option before what a library says.
                None => {
                    let said = match message.strip_prefix("--") {
                        Some(rest) => rest.split_once(' ').map_or(rest, |(_, said)| said),
                        None => message,
                    };
                    said.split('…').all(|part| sources.contains(part))
                }
            };
            if !known && !OTHERS.iter().any(|other| message.contains(other)) {
                problems.push(problem(Path::new(PAGE), *line, format!("nothing says `{message}`")));
            }
        }
    }
    problems
}

/// Names of rules in the reference that no rule has.
fn unknown_rules(pages: &Pages, sources: &str) -> Vec<String> {
    let name = Path::new("docs/reference.md");
    let Some(page) = pages.get(name) else { return vec!["no reference".into()] };
    let section = |heading: &&super::page::Heading| heading.anchor == "rules-of-a-verdict";
    let from = page.headings.iter().find(section).map_or(usize::MAX, |heading| heading.line);
    let to = page.headings.iter().map(|heading| heading.line).find(|line| *line > from).unwrap_or(usize::MAX);
    let rows = page.rows.iter().filter(|(line, _)| (from..to).contains(line));
    let rules = rows.flat_map(|(line, cells)| cells.first().into_iter().map(move |cell| (line, cell)));
    let rules =
        rules.flat_map(|(line, cell)| cell.split('`').skip(1).step_by(2).map(move |rule| (line, rule)));
    let missing = rules.filter(|(_, rule)| !sources.contains(&format!("\"{rule}\"")));
    missing.map(|(line, rule)| problem(name, *line, format!("no rule {rule}"))).collect()
}

#[test]
fn rules_of_the_reference_exist() {
    let mut text = String::new();
    sources(&root().join("snp/src/attest"), &mut text);
    none(&unknown_rules(&pages(), &text));
    let page =
        one("docs/reference.md", "# Rules of a verdict\n| `nonce`, `nonsense` | x |\n# Next\n| `y` | z |\n");
    assert_eq!(unknown_rules(&page, &text).len(), 1);
}

#[test]
fn quoted_messages_exist() {
    let mut text = String::new();
    for folder in ["snp/src", "snp/model/src", "vmm/src", "vtpm-svc/src"] {
        sources(&root().join(folder), &mut text);
    }
    none(&unknown(&pages(), &text));
}

#[test]
fn a_message_that_nobody_says_is_found() {
    let sources = "the {what} is not valid: {why}; \"nonce\"";
    for (message, problems) in [
        ("is not valid: … ", 0),
        ("REFUSED: nonce", 0),
        ("is not vaild", 1),
        ("is not valid … really", 1),
        ("REFUSED: nothing", 1),
    ] {
        let pages = one(PAGE, &format!("| `{message}` | do `this` |\n"));
        assert_eq!(unknown(&pages, sources).len(), problems, "{message}");
    }
}
