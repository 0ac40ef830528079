// SPDX-License-Identifier: Apache-2.0
//! The command line: `cvmm --kernel …` runs a guest, subcommands do everything else.

mod certs;
mod doctor;
mod emulated;
mod fields;
mod firmware;
mod help;
mod id_block;
mod image;
mod measure;
mod modes;
mod note;
mod out;
mod reboot;
mod report;
mod run;
mod spec;
mod trials;
mod values;
mod verify;
mod vtpm;

use std::io;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::FromArgMatches;
use clap::Parser;
use clap::Subcommand;

use crate::run::outcome::EXIT_MONITOR_ERROR;
use crate::run::outcome::EXIT_USAGE;
use crate::run::outcome::Outcome;

/// A virtual machine monitor for confidential guests: boots Linux directly as an AMD SEV-SNP guest on KVM.
#[derive(Parser)]
#[command(name = "cvmm", version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    run: run::Args,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Compute the launch digest of a guest, without a VM
    Measure(Box<measure::Args>),
    /// Print the VM that a command line describes as JSON, for --spec
    Spec(Box<run::Args>),
    /// Make, sign, show and check ID blocks: your signed statement of what may launch
    IdBlock(id_block::Args),
    /// Check an attestation report, its certificates, and your policy
    Verify(Box<verify::Args>),
    /// Show what a report says, and what to fetch to verify it
    Report(report::Args),
    /// Make and show certificate tables for --certs
    Certs(certs::Args),
    /// Say what this host offers for SNP guests and for emulated ones, and how to fix what is missing
    Doctor(doctor::Args),
    /// Make, examine and change guest-state files: where a vTPM keeps what outlives the VM
    Vmgs(Box<vtpm_svc::cli::vmgs::VmgsArgs>),
}

/// Why a command failed, and with which exit code.
pub enum Failure {
    /// The request is not valid.
    Usage(String),
    /// The monitor failed.
    Monitor(String),
    /// The process was told to stop before there was a guest.
    Stopped(i32),
}

impl Failure {
    /// From an error about the request.
    pub fn usage(error: impl std::fmt::Display) -> Failure {
        Failure::Usage(error.to_string())
    }

    /// From an error of the monitor or the host.
    pub fn monitor(error: impl std::fmt::Display) -> Failure {
        Failure::Monitor(error.to_string())
    }
}

/// Every subcommand and option, for manual pages, completions and the test of the documents.
pub fn command() -> clap::Command {
    help::complete(Cli::command())
}

/// The whole program.
pub fn main() -> ExitCode {
    let matches = command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match cli.command {
        Some(Command::Measure(args)) => match matches.subcommand() {
            Some((_, matches)) => modes::check(matches, true).and_then(|()| measure::main(&args)),
            None => measure::main(&args),
        },
        Some(Command::Spec(args)) => match matches.subcommand() {
            Some((_, matches)) => modes::check(matches, false).and_then(|()| args.spec()),
            None => args.spec(),
        }
        .and_then(|spec| spec::print(&spec)),
        Some(Command::IdBlock(args)) => id_block::main(&args),
        Some(Command::Verify(args)) => verify::main(&args),
        Some(Command::Report(args)) => report::main(&args),
        Some(Command::Certs(args)) => certs::main(&args),
        Some(Command::Doctor(args)) => doctor::main(&args),
        // It has exit codes of its own, the same as `vtpm-svc vmgs`.
        Some(Command::Vmgs(args)) => match vtpm_svc::cli::vmgs::run(&args, &mut io::stdout().lock()) {
            Ok(()) => Ok(0),
            Err(error) => {
                note::error(&error);
                return ExitCode::from(error.exit_code());
            }
        },
        None => modes::check(&matches, false).and_then(|()| run::main(&cli.run)),
    };
    let (message, code) = match result {
        Ok(code) => return ExitCode::from(code),
        Err(Failure::Usage(message)) => (message, EXIT_USAGE),
        Err(Failure::Monitor(message)) => (message, EXIT_MONITOR_ERROR),
        Err(Failure::Stopped(signal)) => {
            let outcome = Outcome::Signal(signal);
            note::note(&outcome);
            return ExitCode::from(outcome.exit_code());
        }
    };
    // The terminal is back in its usual mode by now.
    note::error(fields::with_options(&message));
    ExitCode::from(code)
}
