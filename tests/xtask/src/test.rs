// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask test`: set-up, every package's own tests, then the integration tests.
//!
//! The usual run is bounded in time, so that it can be made for each change. What does not fit says why and
//! waits for `--long`.

use std::io::BufRead;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use cvmm_tests::cases;
use cvmm_tests::cases::intel::PREFIX;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::probe;
use cvmm_tests::suite;
use cvmm_tests::suite::Case;
use cvmm_tests::suite::Context;
use cvmm_tests::suite::Counts;
use cvmm_tests::workspace::Workspace;

use crate::build;
use crate::setup;
use crate::steps::Steps;

/// What the packages' own tests do in a usual and in a long run, by environment variable. Whoever sets one is
/// not overruled.
const AMOUNTS: &[Amount] = &[
    Amount {
        variable: "CVMM_FUZZ_SECONDS",
        usual: "4",
        long: "15",
        why: "seconds for each of some thirty fuzz targets",
    },
    Amount {
        variable: "VTPM_KILLS",
        usual: "400",
        long: "2000",
        why: "kills that the TPM service has to live through",
    },
    Amount { variable: "CVMM_SIGNALS", usual: "40", long: "2000", why: "signals at random moments of a run" },
    Amount {
        variable: "CVMM_AP_RESETS",
        usual: "20",
        long: "5000",
        why: "resets of a guest whose vCPUs start and stop each other, with two vCPUs and with sixteen",
    },
    Amount {
        variable: "CVMM_FLOOD_SECONDS",
        usual: "6",
        long: "150",
        why: "seconds of a guest that floods, for each of four ways of not being read",
    },
    Amount {
        variable: "CVMM_DMA_STEPS",
        usual: "200000",
        long: "10000000",
        why: "accesses of a device against conversions of the same pages, strict and single",
    },
    Amount {
        variable: "CVMM_IMAGE_LAYOUTS",
        usual: "100",
        long: "2000",
        why: "random layouts of the state image that are written anew, and a fifth of the attacks on it",
    },
];

struct Amount {
    variable: &'static str,
    usual: &'static str,
    long: &'static str,
    why: &'static str,
}

/// `cargo xtask test`
#[derive(clap::Args)]
pub struct Args {
    /// Run only the integration tests whose name contains this, and no unit tests.
    filter: Option<String>,
    /// List the integration tests, and say which need `--long` and why; run nothing.
    #[arg(long)]
    list: bool,
    /// Leave the unit tests out.
    #[arg(long)]
    no_unit: bool,
    /// Run everything, also what takes long.
    #[arg(long)]
    long: bool,
    /// Boot every kernel found in this folder instead: unpacked packages, directories with them, and bzImage
    /// files.
    #[arg(long, value_name = "DIR")]
    kernels: Option<PathBuf>,
}

/// Runs the chore. The last line counts passed, failed and skipped tests of both kinds.
pub fn run(args: &Args) -> Result<ExitCode> {
    let all = match &args.kernels {
        Some(folder) => cases::given::cases(folder)?,
        None => cases::all(),
    };
    if args.list {
        list(&all);
        return Ok(ExitCode::SUCCESS);
    }
    let filter = args.filter.as_deref().unwrap_or_default();
    let mut matching: Vec<Case> = all.into_iter().filter(|case| case.name.contains(filter)).collect();
    let intel_only = probe::intel_is_asked_for();
    if intel_only {
        // An Intel L1 has only the files that its own cases need.
        matching.retain(|case| case.name.starts_with(PREFIX));
    }
    let (chosen, left_out): (Vec<Case>, Vec<Case>) =
        matching.into_iter().partition(|case| args.long || intel_only || case.long.is_none());
    if chosen.is_empty() {
        match left_out.first() {
            Some(case) => {
                bail!("every test that matches {filter:?} is a long one, such as {}: add --long", case.name)
            }
            None => bail!("no test matches {filter:?}; `cargo xtask test --list` shows their names"),
        }
    }
    let workspace = Workspace::find();
    let mut steps = Steps::new();
    setup::prepare(&mut steps, setup::Kernels::AndLater, false)?;
    if !intel_only && chosen.iter().any(|case| case.name.starts_with(PREFIX)) {
        steps.step("packages for an Intel L1", setup::intel_packages)?;
    }
    steps.step("build cvmm and vtpm-svc (release)", || build::release(&workspace, &["vmm", "vtpm-svc"]))?;
    let mut total = Counts::default();
    if args.filter.is_none() && args.kernels.is_none() && !args.no_unit {
        total = steps.step("unit tests of all packages", || unit_tests(&workspace, args.long))?;
    }
    let counts = steps.step("integration tests", || {
        let context = Context::new(build::PROFILE)?;
        println!("           {}", context.decision());
        suite::run(&context, &chosen)
    })?;
    total.passed += counts.passed;
    total.failed += counts.failed;
    total.skipped += counts.skipped;
    steps.print_table();
    if !left_out.is_empty() {
        println!("\nleft out without --long:");
        list(&left_out);
    }
    println!("\n{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A line for each case; a long one says why it is.
fn list(cases: &[Case]) {
    for case in cases {
        match case.long {
            Some(why) => println!("{:58} --long: {why}", case.name),
            None => println!("{}", case.name),
        }
    }
}

/// Runs `cargo test` for the workspace and adds up its result lines.
fn unit_tests(workspace: &Workspace, long: bool) -> Result<Counts> {
    let mut command = build::cargo(workspace);
    for amount in AMOUNTS {
        let ours = if long { amount.long } else { amount.usual };
        let value = std::env::var_os(amount.variable).unwrap_or_else(|| ours.into());
        println!("           {}={} ({})", amount.variable, value.display(), amount.why);
        command.env(amount.variable, value);
    }
    let mut child = command
        // What `cargo test` alone leaves out needs what the set-up has fetched.
        .args(["test", "--workspace", "--no-fail-fast", "--", "--include-ignored"])
        .env("CVMM_KERNEL", Kernel::find(workspace, Role::StableCloud)?.image)
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
