// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask l1 -- COMMAND...`: runs one command inside the outer guest of a nested run, to look at
//! something by hand.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use cvmm_tests::machine::Machine;
use cvmm_tests::machine::job;
use cvmm_tests::nested::Nested;
use cvmm_tests::workspace::Workspace;
use guest_init::job::Ending;
use guest_init::job::Event;

/// `cargo xtask l1`
#[derive(clap::Args)]
pub struct Args {
    /// Kill the command after this many seconds.
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// An L1 with an Intel CPU, under Bochs: takes minutes, and has none of the host's files but a shell and
    /// those of `--file`.
    #[arg(long)]
    intel: bool,
    /// A file that an Intel L1 gets at its path, with the libraries that it needs; may be repeated.
    #[arg(long, requires = "intel")]
    file: Vec<PathBuf>,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs the chore; the command's exit code becomes ours.
pub fn run(args: &Args) -> Result<ExitCode> {
    let workspace = Workspace::find();
    let nested =
        if args.intel { Nested::start_intel(&workspace, &args.file)? } else { Nested::start(&workspace)? };
    let nested = Arc::new(nested);
    eprintln!(
        "L1 up after {:.1} s: Linux {}, {}",
        nested.boot_time().as_secs_f64(),
        nested.kernel(),
        nested.kvm_error().unwrap_or("KVM available")
    );
    let mut job = job("");
    job.argv = args.command.clone();
    job.limit = Duration::from_secs(args.limit);
    let output = Machine::Nested(nested).start(&job).wait_watching(|event| {
        // A closed terminal is no reason to stop the command.
        let _ = match event {
            Event::Stdout(bytes) => {
                std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush())
            }
            Event::Stderr(bytes) => std::io::stderr().write_all(bytes),
            Event::Ended(..) => Ok(()),
        };
    });
    eprintln!("{} after {:.1} s", output.ending, output.elapsed.as_secs_f64());
    Ok(match output.ending {
        Ending::Code(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        _ => ExitCode::FAILURE,
    })
}
