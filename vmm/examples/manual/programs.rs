// SPDX-License-Identifier: Apache-2.0
//! The parsers of both programs.

use clap::Args as _;
use clap::Command;

/// `cvmm` and `vtpm-svc`.
pub fn programs() -> [Command; 2] {
    let socket = Command::new("socket").about("Serve a TPM 2.0 over sockets, as swtpm does");
    let vmgs = Command::new("vmgs").about("Make, examine and change guest-state files");
    let service = Command::new("vtpm-svc")
        .about("A vTPM and its guest-state file, served from outside the guest")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .subcommand(vtpm_svc::cli::socket::SocketArgs::augment_args(socket))
        .subcommand(vtpm_svc::cli::vmgs::VmgsArgs::augment_args(vmgs));
    [vmm::cli::command(), service]
}
