// SPDX-License-Identifier: Apache-2.0
//! The program `run` of the hardware kit, and, by its other name, `vtpm-svc`.

use std::process::ExitCode;

use clap::Parser;
use hardware_kit::service;

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    if words.next().is_some_and(|name| service::is_meant(&name)) {
        return service::become_it(words);
    }
    hardware_kit::main(&hardware_kit::Args::parse())
}
