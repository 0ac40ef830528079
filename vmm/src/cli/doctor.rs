// SPDX-License-Identifier: Apache-2.0
//! `cvmm doctor`: what this host offers, and how to fix what is missing.

use std::io::Write as _;

use super::Failure;
use crate::doctor;
use crate::doctor::facts::Facts;

/// Options of `cvmm doctor`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Print JSON: the verdict, each line, and the facts behind them
    #[arg(long)]
    json: bool,
}

/// Looks, judges and prints.
pub fn main(args: &Args) -> Result<u8, Failure> {
    let diagnosis = doctor::judge(Facts::gather());
    let text = if args.json {
        serde_json::to_string_pretty(&diagnosis).map_err(Failure::monitor)?
    } else {
        diagnosis.to_string()
    };
    writeln!(std::io::stdout(), "{text}").map_err(Failure::monitor)?;
    Ok(diagnosis.exit_code)
}
