// SPDX-License-Identifier: Apache-2.0
//! The `vtpm-svc` program: one process per guest, or one command on a guest-state file.

use std::process::ExitCode;

use clap::Parser;
use clap::Subcommand;

#[derive(Parser)]
#[command(
    name = "vtpm-svc",
    version,
    about = "A vTPM and its guest-state file, served from outside the guest"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a TPM 2.0 over sockets, as swtpm does
    Socket(Box<vtpm_svc::cli::socket::SocketArgs>),
    /// Make, examine and change guest-state files
    Vmgs(Box<vtpm_svc::cli::vmgs::VmgsArgs>),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Socket(args) => vtpm_svc::cli::socket::run(&args).map_err(|e| (e.to_string(), 1)),
        Command::Vmgs(args) => vtpm_svc::cli::vmgs::run(&args, &mut std::io::stdout().lock())
            .map_err(|e| (e.to_string(), e.exit_code())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err((message, code)) => {
            vtpm_svc::log::error(&message);
            ExitCode::from(code)
        }
    }
}
