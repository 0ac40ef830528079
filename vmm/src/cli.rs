// SPDX-License-Identifier: Apache-2.0
//! The command line: `cvmm --kernel …` runs a guest, subcommands do everything else.

mod certs;
mod doctor;
mod emulated;
mod firmware;
mod id_block;
mod measure;
mod modes;
mod out;
mod reboot;
mod report;
mod run;
mod spec;
mod trials;
mod verify;
mod vtpm;

use std::io;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::FromArgMatches;
use clap::Parser;
use clap::Subcommand;

use crate::note;
use crate::outcome::EXIT_CODES;
use crate::outcome::EXIT_MONITOR_ERROR;
use crate::outcome::EXIT_USAGE;
use crate::outcome::Outcome;

const EXAMPLES: &str = "\
Examples:
  Boot a kernel as a plain guest:
    cvmm --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0' --memory 1G --cpus 2
  The same kernel as an SEV-SNP guest of this host:
    cvmm --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0' --snp
  The same without SNP hardware, on the emulated platform (functional only, protects nothing):
    cvmm --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0' --snp --platform emulated
  The launch digest of that guest, without a VM:
    cvmm measure --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0'
  An IGVM file, from which pages, registers and policy come:
    cvmm --igvm image.igvm --snp
  OVMF built with SEV metadata, with the vCPU model that its digest is computed for:
    cvmm measure --firmware OVMF.fd --vcpu-model EPYC-Milan
    cvmm --firmware OVMF.fd --vcpu-model EPYC-Milan --snp
  A TPM that keeps its state in an encrypted file, which is made once:
    (umask 077; head -c 32 /dev/urandom >vm.key); cvmm vmgs create vm.vmgs --key-file vm.key
    cvmm --kernel bzImage --initrd initrd.img --vtpm vm.vmgs --vtpm-key-file vm.key";

/// A virtual machine monitor for confidential guests: boots Linux directly as an AMD SEV-SNP guest on KVM.
#[derive(Parser)]
#[command(
    name = "cvmm",
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
    after_long_help = format!("{EXIT_CODES}\n\n{EXAMPLES}")
)]
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
    Vmgs(Box<vtpm_svc::cli_vmgs::VmgsArgs>),
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

/// The whole program.
pub fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match cli.command {
        Some(Command::Measure(args)) => match matches.subcommand() {
            Some((_, matches)) => modes::check(matches, true).and_then(|()| measure::main(&args)),
            None => measure::main(&args),
        },
        Some(Command::Spec(args)) => match matches.subcommand() {
            Some((_, matches)) => modes::check(matches, false).and_then(|()| spec::main(&args)),
            None => spec::main(&args),
        },
        Some(Command::IdBlock(args)) => id_block::main(&args),
        Some(Command::Verify(args)) => verify::main(&args),
        Some(Command::Report(args)) => report::main(&args),
        Some(Command::Certs(args)) => certs::main(&args),
        Some(Command::Doctor(args)) => doctor::main(&args),
        // It has exit codes of its own, the same as `vtpm-svc vmgs`.
        Some(Command::Vmgs(args)) => match vtpm_svc::cli_vmgs::run(&args, &mut io::stdout().lock()) {
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
    note::error(message);
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words of a shell command in which only single quotes are special.
    fn words(command: &str) -> Vec<String> {
        let mut words = vec![String::new()];
        for (index, part) in command.split('\'').enumerate() {
            if index % 2 == 1 {
                words.last_mut().unwrap().push_str(part);
                continue;
            }
            for (nth, piece) in part.split(' ').enumerate() {
                if nth > 0 {
                    words.push(String::new());
                }
                words.last_mut().unwrap().push_str(piece);
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    #[test]
    fn examples_in_the_help_are_valid_command_lines() {
        let commands: Vec<&str> = EXAMPLES
            .lines()
            .flat_map(|line| line.split("; "))
            .map(str::trim)
            .filter(|c| c.starts_with("cvmm "))
            .collect();
        assert!(commands.len() >= 9, "{commands:?}");
        for command in commands {
            if let Err(error) = Cli::try_parse_from(words(command)) {
                panic!("{command}: {error}");
            }
        }
    }
}
