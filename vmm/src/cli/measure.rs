// SPDX-License-Identifier: Apache-2.0
//! `cvmm measure`: the launch digest of a guest, without a VM.

use std::fs::File;
use std::io::BufWriter;
use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;
use snp::digest::launch_digest;
use snp::image::direct::Guest;
use snp::image::direct::Snp;

use super::Failure;
use super::run::ImageArgs;

/// Options of `cvmm measure`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// Position of the C-bit on the host that will launch the guest: part of the measured page tables of `--validation launch`
    #[arg(long, value_name = "BIT", default_value_t = 51, hide = true, value_parser = clap::value_parser!(u8).range(32..=51))]
    c_bit: u8,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write the plan, one JSON object per line, for a check by other programs
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
}

#[derive(Serialize)]
struct Output {
    launch_digest: String,
    launch_pages: u64,
    vcpus: u32,
}

/// Computes and prints the digest.
pub fn main(args: &Args) -> Result<u8, Failure> {
    let files = args.image.read().map_err(Failure::usage)?;
    let snp = Snp { c_bit: args.c_bit, cpuid: None, validation: args.image.validation.into() };
    let image = args.image.boot(&files, Guest::Snp(snp)).image().map_err(Failure::usage)?;
    if let Some(path) = &args.dump {
        let write = || {
            let mut out = BufWriter::new(File::create(path)?);

            out.flush()
        };
        write().map_err(|e| Failure::Monitor(format!("--dump {}: {e}", path.display())))?;
    }
    let digest = launch_digest(&image.plan).map_err(Failure::usage)?;
    let output = Output {
        launch_digest: digest.to_string(),
        launch_pages: image.plan.launch_pages(),
        vcpus: args.image.cpus,
    };
    if args.json {
        let text = serde_json::to_string_pretty(&output).map_err(Failure::monitor)?;
        println!("{text}");
    } else {
        println!("{}", output.launch_digest);
    }
    Ok(0)
}
