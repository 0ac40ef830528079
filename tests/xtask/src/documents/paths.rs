// SPDX-License-Identifier: Apache-2.0
//! Files and folders of this repository that pages name are there.

use std::path::Path;

use super::Pages;
use super::none;
use super::one;
use super::pages;
use super::problem;
use super::root;

const TOP: [&str; 7] = ["snp/", "vmm/", "devices/", "vtpm-svc/", "tests/", "resources/", "docs/"];

fn missing(pages: &Pages, exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, page) in pages {
        for (line, code) in &page.code {
            let path = code.split(':').next().unwrap_or_default();
            // A part in capitals stands for a name of the reader's.
            let stands_for = |part: &str| {
                part.split('.').next().is_some_and(|name| {
                    name.len() > 1 && name != "README" && name.chars().all(|c| c.is_ascii_uppercase())
                })
            };
            let plain = !path.contains(|c: char| c.is_whitespace() || "*{}…<>$".contains(c))
                && !path.split('/').any(stands_for);
            if plain && TOP.iter().any(|top| path.starts_with(top)) && !exists(Path::new(path)) {
                problems.push(problem(name, *line, format!("`{code}` is not there")));
            }
        }
    }
    problems
}

#[test]
fn named_files_are_there() {
    none(&missing(&pages(), |path| root().join(path).exists()));
}

#[test]
fn a_missing_file_is_found() {
    let page = one(
        "docs/a.md",
        "`vmm/src/nothing.rs` and `vmm/src/a.rs:function`, not `vmm/src/{a,b}.rs`, `/dev/kvm`\n",
    );
    assert_eq!(missing(&page, |path| path == Path::new("vmm/src/a.rs")).len(), 1);
}
