// SPDX-License-Identifier: Apache-2.0
//! The door for every chore of the project: `cargo xtask <chore>`. One file per chore.

mod apt;
mod bench;
mod build;
mod demo;
#[cfg(test)]
mod documents;
mod guest;
mod hardware_kit;
mod hardware_test;
mod in_l1;
mod oracles;
mod setup;
mod steps;
mod test;

use std::process::ExitCode;

use clap::Parser;

/// Chores of the cvmm project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Chore {
    /// Install and fetch what the other chores need: packages, guest kernels, guest programs.
    Setup(setup::Args),
    /// Boot an unmodified Debian kernel as an SNP guest without SNP hardware, and check its attestation
    /// report.
    Demo,
    /// Run every test: each package's own, then the integration tests.
    Test(test::Args),
    /// Measure beside a peer.
    Bench(bench::Args),
    /// Make an archive that tests cvmm on an SNP host of any distribution, without installing anything there.
    HardwareKit(hardware_kit::Args),
    /// Make that kit and run it on this machine. Never run on hardware yet.
    HardwareTest(hardware_test::Args),
    /// Say whether guests run on this host's KVM or nested, and why.
    Probe,
    /// Run a command inside the outer guest (L1) of a nested run.
    L1(in_l1::Args),
}

fn main() -> ExitCode {
    let result = match Chore::parse() {
        Chore::Setup(args) => setup::run(&args).map(|()| ExitCode::SUCCESS),
        Chore::Demo => demo::run(),
        Chore::Test(args) => test::run(&args),
        Chore::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Chore::HardwareKit(args) => hardware_kit::run(&args).map(|()| ExitCode::SUCCESS),
        Chore::HardwareTest(args) => hardware_test::run(&args),
        Chore::Probe => cvmm_tests::probe::decide().map(|decision| {
            println!("{decision}");
            ExitCode::SUCCESS
        }),
        Chore::L1(args) => in_l1::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
