// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask test`: set-up, every package's own tests, then the integration tests.

use std::io::BufRead;
use std::io::BufReader;
use std::process::ExitCode;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::Result;
use cvmm_tests::cases;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::suite;
use cvmm_tests::suite::Context;
use cvmm_tests::suite::Counts;
use cvmm_tests::workspace::Workspace;

use crate::build;
use crate::setup;
use crate::steps::Steps;

/// Seconds for each fuzz target: with some thirty of them on two cores, four minutes.
const FUZZ_SECONDS: &str = "15";

/// `cargo xtask test`
#[derive(clap::Args)]
pub struct Args {
    /// Run only the integration tests whose name contains this, and no unit tests.
    filter: Option<String>,
    /// List the integration tests and run nothing.
    #[arg(long)]
    list: bool,
    /// Leave the unit tests out.
    #[arg(long)]
    no_unit: bool,
}

/// Runs the chore. The last line counts passed, failed and skipped tests of both kinds.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.list {
        for case in cases::all() {
            println!("{}", case.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let workspace = Workspace::find();
    let mut steps = Steps::new();
    setup::prepare(&mut steps, false)?;
    steps.step("build cvmm and vtpm-svc (release)", || build::release(&workspace, &["vmm", "vtpm-svc"]))?;
    let mut total = Counts::default();
    if args.filter.is_none() && !args.no_unit {
        total = steps.step("unit tests of all packages", || unit_tests(&workspace))?;
    }
    let filter = args.filter.as_deref().unwrap_or_default();
    let counts = steps.step("integration tests", || {
        let context = Context::new(build::PROFILE)?;
        println!("           {}", context.decision());
        suite::run(&context, &cases::all(), filter)
    })?;
    total.passed += counts.passed;
    total.failed += counts.failed;
    total.skipped += counts.skipped;
    steps.print_table();
    if total == Counts::default() {
        anyhow::bail!("no test matches {filter:?}; `cargo xtask test --list` shows their names");
    }
    println!("\n{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs `cargo test` for the workspace and adds up its result lines.
fn unit_tests(workspace: &Workspace) -> Result<Counts> {
    let mut child = build::cargo(workspace)
        // What `cargo test` alone leaves out needs what the set-up has fetched.
        .args(["test", "--workspace", "--no-fail-fast", "--", "--include-ignored"])
        .env("CVMM_KERNEL", Kernel::find(workspace, Role::StableCloud)?.image)
        // The number of kills that the TPM service has to live through; fewer where someone runs that test alone.
        .env("VTPM_KILLS", std::env::var_os("VTPM_KILLS").unwrap_or_else(|| "2000".into()))
        // The time for each target of the fuzzing; a fraction of a second where someone runs those tests alone.
        .env(
            "CVMM_FUZZ_SECONDS",
            std::env::var_os("CVMM_FUZZ_SECONDS").unwrap_or_else(|| FUZZ_SECONDS.into()),
        )
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo test")?;
    let mut counts = Counts::default();
    let output = child.stdout.take().context("no output of cargo test")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("output of cargo test")?;
        let line = String::from_utf8_lossy(&line);
        // A line per passed test would bury the others.
        if !(line.starts_with("test ") && line.ends_with("... ok") || line.is_empty()) {
            println!("{line}");
        }
        if let Some(numbers) = line.strip_prefix("test result: ") {
            counts.passed += number_before(numbers, " passed");
            counts.failed += number_before(numbers, " failed");
            counts.skipped += number_before(numbers, " ignored");
        }
    }
    let status = child.wait().context("cargo test")?;
    if !status.success() && counts.failed == 0 {
        // It did not build, or a test program died before it could count.
        counts.failed = 1;
    }
    Ok(counts)
}

/// The number before `word`, such as 12 in "ok. 12 passed; 0 failed".
fn number_before(text: &str, word: &str) -> usize {
    let Some((before, _)) = text.split_once(word) else { return 0 };
    before.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_s_result_line_is_read() {
        let line = "FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.31s";
        assert_eq!(number_before(line, " passed"), 12);
        assert_eq!(number_before(line, " failed"), 3);
        assert_eq!(number_before(line, " ignored"), 1);
        assert_eq!(number_before("no numbers", " passed"), 0);
    }
}
