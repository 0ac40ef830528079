// SPDX-License-Identifier: Apache-2.0
//! Every link leads somewhere, and every page is two steps from the README at most.

use std::collections::BTreeSet;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use super::Pages;
use super::none;
use super::one;
use super::pages;
use super::problem;
use super::root;

/// The path that `target` names, seen from `page`, below the root; and the anchor.
fn resolve(page: &Path, target: &str) -> Option<(PathBuf, Option<String>)> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (path, anchor) = match target.split_once('#') {
        Some((path, anchor)) => (path, Some(anchor.to_owned())),
        None => (target, None),
    };
    if path.is_empty() {
        return Some((page.into(), anchor));
    }
    let mut found = PathBuf::new();
    for part in page.parent().unwrap_or(Path::new("")).join(path).components() {
        match part {
            Component::ParentDir => {
                found.pop();
            }
            Component::Normal(name) => found.push(name),
            _ => {}
        }
    }
    Some((found, anchor))
}

fn broken(pages: &Pages, exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, page) in pages {
        for (line, target) in &page.links {
            let Some((path, anchor)) = resolve(name, target) else { continue };
            let there = match (pages.get(&path), anchor) {
                (None, None) => exists(&path),
                (None, Some(_)) => false,
                (Some(_), None) => true,
                (Some(page), Some(anchor)) => page.headings.iter().any(|heading| heading.anchor == anchor),
            };
            if !there {
                problems.push(problem(name, *line, format!("a link to {target}, which is not there")));
            }
        }
    }
    problems
}

fn far(pages: &Pages) -> Vec<String> {
    let mut reached = BTreeSet::from([PathBuf::from("README.md")]);
    for _ in 0..2 {
        let from: Vec<PathBuf> = reached.iter().cloned().collect();
        for name in from {
            let links = pages.get(&name).map(|page| page.links.as_slice()).unwrap_or_default();
            reached
                .extend(links.iter().filter_map(|(_, target)| resolve(&name, target)).map(|(path, _)| path));
        }
    }
    let missed = pages.keys().filter(|name| !reached.contains(*name));
    missed.map(|name| problem(name, 1, "more than two steps from the README")).collect()
}

#[test]
fn links_lead_somewhere() {
    none(&broken(&pages(), |path| root().join(path).exists()));
}

#[test]
fn every_page_is_two_steps_from_the_readme() {
    none(&far(&pages()));
}

#[test]
fn wrong_links_are_found() {
    for link in ["nowhere.md", "#nothing", "docs/a.md#b", "../../x"] {
        let pages = one("README.md", &format!("# Title\n[x]({link})\n"));
        assert_eq!(broken(&pages, |_| false).len(), 1, "{link}");
    }
    for link in ["#title", "https://example.org/a#b", "README.md#title", "LICENSE"] {
        let pages = one("README.md", &format!("# Title\n[x]({link})\n"));
        none(&broken(&pages, |path| path == Path::new("LICENSE")));
    }
}

#[test]
fn a_page_that_is_too_far_is_found() {
    let mut pages = one("README.md", "[a](docs/a.md)");
    pages.extend(one("docs/a.md", "[b](b.md)"));
    pages.extend(one("docs/b.md", "[c](c.md)"));
    none(&far(&pages));
    pages.extend(one("docs/c.md", ""));
    assert_eq!(far(&pages).len(), 1);
}
