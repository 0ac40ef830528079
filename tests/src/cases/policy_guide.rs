// SPDX-License-Identifier: Apache-2.0
//! `docs/policy-guide.md` as it is written: its commands run in order, in a directory of their own, and what
//! it promises comes true.
//!
//! Each fenced block of the guide says in an HTML comment on the line above what it is; a block that does not
//! is an error:
//!
//! | comment | the block |
//! |---|---|
//! | `run: here` | is a script for this machine |
//! | `run: guest` | is a script that launches a guest, for a machine whose KVM runs Linux |
//! | `run: …, exit code N` | ends with `N`; without this, with 0 |
//! | `run: no, REASON` | is not run |
//! | `file: NAME` | is a file that the reader writes |
//! | `output` | has lines that the script above printed; `…` stands for any text |
//!
//! That the guide's steps succeed is not enough: it must still have those that this page of the documentation
//! is for, so the report is also looked at here, by offsets of the firmware's specification, and verified
//! with another nonce, in vain.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use guest_init::job::Ending;
use guest_init::job::Job;

use crate::digest::hex;
use crate::guest::Report;
use crate::machine::Output;
use crate::machine::job;
use crate::suite::Case;
use crate::suite::Context;

/// The guide's nonce, and another one.
const NONCE: &str = "5a5a5a5a";
const OTHER_NONCE: &str = "5a5a5a5b";

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    vec![Case::new("policy-guide/runs-as-written", guide)]
}

/// A fenced block of the guide.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Block {
    Run { script: String, guest: bool, code: i32 },
    NotRun,
    File { name: String, text: String },
    Output { text: String },
}

/// The steps that were run, with what they printed.
type Steps = Vec<(String, bool, Output)>;

fn guide(context: &Context) -> Result<()> {
    let path = context.workspace.root().join("docs/policy-guide.md");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let blocks = blocks(&text).with_context(|| path.display().to_string())?;
    let not_run = blocks.iter().filter(|block| **block == Block::NotRun).count();
    ensure!(not_run <= 1, "{not_run} blocks of the guide are not run; only its first need not be");
    // The first block makes this directory, beside the kernels; a reader's own is left alone.
    let folder = context.workspace.work().join("guide-test");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    context.keys()?;

    let mut steps = Steps::new();
    for block in &blocks {
        match block {
            Block::NotRun => {}
            Block::File { name, text } => fs::write(folder.join(name), text)?,
            Block::Run { script, guest, code } => {
                let output = run(context, &folder, script, *guest)?;
                ensure!(output.ending == Ending::Code(*code), "{}, not {code}: {script}", output.ending);
                steps.push((script.clone(), *guest, output));
            }
            Block::Output { text } => {
                let (script, _, output) = steps.last().context("output before any script")?;
                let printed = output.text() + &output.errors();
                for line in text.lines() {
                    ensure!(printed.lines().any(|l| matches(line, l)), "no line {line:?} of: {script}");
                }
            }
        }
    }
    outcomes(context, &folder, &steps)
}

/// What the guide is for.
fn outcomes(context: &Context, folder: &Path, steps: &Steps) -> Result<()> {
    let step = |guest: bool, code: i32, word: &str| {
        let found = steps.iter().find(|(script, in_guest, output)| {
            *in_guest == guest && output.ending == Ending::Code(code) && script.contains(word)
        });
        found.with_context(|| format!("the guide has no step with `{word}` and exit code {code} any more"))
    };
    let launched = step(true, 0, "--id-block")?.2.errors();
    step(false, 0, "id-block check")?;

    let report = fs::read(folder.join("report.bin")).context("report.bin")?;
    ensure!(report.len() == 1184, "a report of {} bytes", report.len());
    let digest = hex(Report(&report).measurement().context("measurement")?);
    ensure!(launched.contains(&format!("launch digest {digest}")), "not the report of: {launched}");
    // Only an ID block gives a guest a family and an image (SEV-SNP Firmware ABI 1.58, table 23: offsets 0x10
    // and 0x20).
    let named = |at: usize, name: &[u8]| report.get(at..).is_some_and(|bytes| bytes.starts_with(name));
    ensure!(named(0x10, b"shop\0") && named(0x20, b"web-1\0"), "the ID block is not in the report");

    let (script, ..) = step(false, 0, "cvmm verify")?;
    ensure!(script.contains("--policy policy.toml") && script.contains(NONCE), "another check: {script}");
    let output = run(context, folder, &script.replace(NONCE, OTHER_NONCE), false)?;
    ensure!(output.ending == Ending::Code(1), "with another nonce: {}", output.ending);
    ensure!(output.text().ends_with("REFUSED: nonce\n"), "not refused for its nonce alone");

    let refusal = step(true, 2, "--id-block")?.2.errors();
    let difference = step(false, 1, "measure --diff")?.2.text();
    ensure!(!difference.trim().is_empty(), "measure --diff says nothing");
    ensure!(refusal.contains(difference.trim()), "{difference:?} is not in the refusal: {refusal}");
    Ok(())
}

/// Runs a script as a reader's shell does, but ends it at the first failure.
fn run(context: &Context, folder: &Path, script: &str, guest: bool) -> Result<Output> {
    let job = script_job(&context.cvmm, folder, script)?;
    if guest { context.run(&job) } else { Ok(context.run_on_host(&job)) }
}

fn script_job(cvmm: &Path, folder: &Path, script: &str) -> Result<Job> {
    let mut job = job("sh");
    job.argv.extend(["-euc".into(), script.into()]);
    let programs = cvmm.parent().context("cvmm is in no directory")?;
    for (name, value) in &mut job.env {
        if name == "PATH" {
            *value = format!("{}:{value}", programs.display());
        }
    }
    if let Some(kernels) = std::env::var_os("CVMM_KERNEL_DIR") {
        let kernels = fs::canonicalize(PathBuf::from(kernels)).context("CVMM_KERNEL_DIR")?;
        job.env.push(("CVMM_KERNEL_DIR".into(), kernels.display().to_string()));
    }
    job.cwd = folder.to_path_buf();
    job.limit = Duration::from_secs(400);
    Ok(job)
}

/// Whether `line` has the parts of `pattern` between its `…` in order, from its start to its end.
fn matches(pattern: &str, line: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('…') else { return line == pattern };
    let Some(mut left) = line.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = rest.split('…').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match left.split_once(part) {
            Some((_, after)) => left = after,
            None => return false,
        }
    }
    left.ends_with(last)
}

/// The fenced blocks of a page, in order.
fn blocks(page: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut lines = page.lines().enumerate();
    let mut above = "";
    while let Some((index, line)) = lines.next() {
        if line.trim_start().starts_with("```") {
            let mut text = String::new();
            loop {
                let (_, line) = lines.next().with_context(|| format!("line {}: no end", index + 1))?;
                if line == "```" {
                    break;
                }
                ensure!(!line.contains("```"), "line {}: a block in a block", index + 1);
                text += &format!("{line}\n");
            }
            let block = classify(above, text).with_context(|| format!("the block in line {}", index + 1))?;
            blocks.push(block);
            above = "";
        } else {
            above = line;
        }
    }
    Ok(blocks)
}

/// What a block is, by the comment above it.
fn classify(comment: &str, text: String) -> Result<Block> {
    let inner = comment.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->"));
    let inner = inner.with_context(|| format!("a comment must say above what it is, found {comment:?}"))?;
    let (kind, rest) = inner.split_once(": ").unwrap_or((inner, ""));
    let (how, detail) = rest.split_once(", ").unwrap_or((rest, ""));
    match (kind, how) {
        ("output", "") => Ok(Block::Output { text }),
        ("file", name) if !name.is_empty() && detail.is_empty() && !name.contains('/') => {
            Ok(Block::File { name: name.into(), text })
        }
        ("run", "no") if !detail.is_empty() => Ok(Block::NotRun),
        ("run", "here" | "guest") => {
            let code = match detail {
                "" => 0,
                _ => detail.strip_prefix("exit code ").context("expected `exit code N`")?.parse()?,
            };
            Ok(Block::Run { script: text, guest: how == "guest", code })
        }
        _ => bail!("{comment:?} says nothing that this test knows"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_say_what_blocks_are() {
        let page = "# A\n\n<!-- run: here -->\n```sh\na\nb\n```\ntext\n<!-- run: guest, exit code 2 -->\n```sh\nc\n```\n\
                    <!-- run: no, it is slow -->\n```sh\nd\n```\n<!-- file: x.toml -->\n```toml\ne\n```\n<!-- output -->\n```text\nf\n```\n";
        let expected = [
            Block::Run { script: "a\nb\n".into(), guest: false, code: 0 },
            Block::Run { script: "c\n".into(), guest: true, code: 2 },
            Block::NotRun,
            Block::File { name: "x.toml".into(), text: "e\n".into() },
            Block::Output { text: "f\n".into() },
        ];
        assert_eq!(blocks(page).unwrap(), expected);
    }

    #[test]
    fn blocks_that_say_nothing_are_errors() {
        for comment in ["", "text", "<!-- run: no -->", "<!-- run: there -->", "<!-- run: here, fast -->"] {
            let page = format!("{comment}\n```sh\na\n```\n");
            assert!(blocks(&page).is_err(), "{comment:?}");
        }
        assert!(blocks("<!-- run: here -->\n\n```sh\na\n```\n").is_err(), "not on the line above");
        assert!(
            blocks("<!-- run: here -->\n```sh\na\n<!-- run: here -->\n```sh\nb\n```\n").is_err(),
            "no end"
        );
    }

    #[test]
    fn an_ellipsis_stands_for_any_text() {
        for (pattern, line, expected) in [
            ("a b", "a b", true),
            ("a b", "a b c", false),
            ("a …", "a b c", true),
            ("a … c", "a b c", true),
            ("a … c … e", "a b c d e", true),
            ("a … c", "a b", false),
            ("a … c", "x a b c", false),
        ] {
            assert_eq!(matches(pattern, line), expected, "{pattern:?} and {line:?}");
        }
    }
}
