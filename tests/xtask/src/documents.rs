// SPDX-License-Identifier: Apache-2.0
//! The documents, held against the files and programs that they speak of.
//!
//! Each check is a function from pages to a list of problems, so that it can be shown a wrong page as well.
//! What the checks know comes from the code: the command lines from clap, the exit codes from the types that
//! have them, messages from the sources.

mod codes;
mod commands;
mod examples;
mod holders;
mod links;
mod messages;
mod options;
mod page;
mod paths;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

use cvmm_tests::workspace::Workspace;

use page::Page;

/// Pages by their paths below the root of the checkout.
type Pages = BTreeMap<PathBuf, Page>;

/// The folders whose pages a reader is led to, from the README.
const FOLDERS: [&str; 4] = ["", "docs", "resources", "resources/example"];

fn root() -> PathBuf {
    Workspace::find().root().to_path_buf()
}

fn pages() -> Pages {
    let mut pages = Pages::new();
    for folder in FOLDERS {
        for entry in fs::read_dir(root().join(folder)).expect("a folder of pages") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(&path).expect("a page");
                let name = path.strip_prefix(root()).expect("below the root").to_path_buf();
                pages.insert(name, Page::parse(&text));
            }
        }
    }
    assert!(pages.len() > 15, "{} pages", pages.len());
    pages
}

/// One page with `text`, as a check sees it.
fn one(name: &str, text: &str) -> Pages {
    Pages::from([(PathBuf::from(name), Page::parse(text))])
}

/// `page:line: problem`.
fn problem(page: &Path, line: usize, what: impl std::fmt::Display) -> String {
    format!("{}:{line}: {what}", page.display())
}

fn none(problems: &[String]) {
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}
