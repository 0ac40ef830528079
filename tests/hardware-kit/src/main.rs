// SPDX-License-Identifier: Apache-2.0
//! The program `run` of the hardware kit.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    hardware_kit::main(&hardware_kit::Args::parse())
}
