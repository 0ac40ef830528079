// SPDX-License-Identifier: Apache-2.0
//! What whoever has an SNP host runs: `run`, a static program beside a static cvmm, a kernel and an initial
//! ramdisk. It needs no package, no network and no Rust, and leaves one file that tells everything that this
//! project wants to know of a host.
//!
//! **It has never run on hardware**: the project has no SNP host. What each step proves is in
//! `docs/hardware-acceptance.md`. Where `cvmm doctor` does not say that SNP guests can be launched it
//! refuses, and says what doctor found missing. A *rehearsal* goes through the same steps on the emulated
//! platform, to test the kit itself; its report says on every page that it is no acceptance.

mod gate;
mod idle;
mod kernel_log;
mod program;
mod report;
pub mod service;
mod steps;

use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use anyhow::Result;

pub use gate::Gate;
pub use gate::ask;
pub use program::Program;

/// Exit code: a step failed, or the test could not run.
pub const FAILED: u8 = 1;
/// Exit code: this host cannot launch SNP guests, nothing was tried.
pub const REFUSED: u8 = 3;
/// Name of the report file.
pub const REPORT: &str = "cvmm-hardware-report.json";

/// Tells whether cvmm works on this SNP host: one report file to send back.
#[derive(clap::Parser, Clone, Debug)]
#[command(
    name = "run",
    version,
    after_help = "\
Exit codes:
    0  no step failed
    1  a step failed, or the test could not run
    2  the request is not valid
    3  refused: SNP guests cannot be launched on this host; the report says what is missing"
)]
pub struct Args {
    /// The host's VCEK or VLEK certificate, and its issuer's if that is not AMD's VCEK intermediate; without
    /// it the report's signature is not checked
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub certs: Vec<PathBuf>,
    /// Where the report goes
    #[arg(long, value_name = "FILE", default_value = REPORT)]
    pub output: PathBuf,
    /// The numbers of vCPUs to launch with, ascending
    #[arg(long, value_name = "N,N...", value_delimiter = ',', default_value = "1,2,8", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub cpus: Vec<u32>,
    /// Go through the steps on the emulated platform, to test this kit; it says nothing about the host
    #[arg(long)]
    pub rehearse: bool,
    /// Keys of the emulated platform for a rehearsal; made if absent
    #[arg(long, value_name = "FILE", requires = "rehearse")]
    pub emulated_keys: Option<PathBuf>,
    /// The cvmm to test [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    pub cvmm: Option<PathBuf>,
    /// The guest's kernel [default: vmlinuz beside this program]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The guest's initial ramdisk [default: initrd beside this program]
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
}

/// Runs the kit and prints what became of it.
pub fn main(args: &Args) -> ExitCode {
    match run(args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

/// Runs the kit; the result is the exit code.
pub fn run(args: &Args) -> Result<u8> {
    let program = std::env::current_exe().context("this program's own path")?;
    let beside =
        |given: &Option<PathBuf>, name: &str| given.clone().unwrap_or_else(|| program.with_file_name(name));
    let kit = steps::Kit {
        cvmm: Program::new(beside(&args.cvmm, "cvmm")),
        kernel: beside(&args.kernel, "vmlinuz"),
        initrd: beside(&args.initrd, "initrd"),
        certs: args.certs.clone(),
        cpus: args.cpus.clone(),
        rehearsal: args.rehearse,
        keys: args.emulated_keys.clone(),
    };
    let (gate, diagnosis) = gate::ask(&kit.cvmm, args.rehearse)?;
    let mut report = report::Report::new(&kit, diagnosis, args.output.clone());
    let accept_cpuid = match gate {
        Gate::Open { accept_cpuid } => accept_cpuid,
        Gate::Closed(why) => {
            eprintln!("The hardware test refuses to run: {why}");
            eprintln!("`{} doctor` shows each line, and what can be done.", kit.cvmm.path().display());
            report.refused(&why);
            match report.ends() {
                Ok(()) => {
                    eprintln!("{} has what was found; it is worth sending back, too.", args.output.display())
                }
                Err(error) => eprintln!("no report file: {error:#}"),
            }
            return Ok(REFUSED);
        }
    };
    let work = WorkFolder::beside(&args.output)?;
    // A place that cannot be written shows now.
    report.write()?;
    kit.all(&work.0, accept_cpuid, &mut report)?;
    report.ends()?;
    println!("\n{report}\nSend back {}", args.output.display());
    Ok(if report.failed() { FAILED } else { 0 })
}

/// Files of the run that the report has copies of; gone when it ends.
struct WorkFolder(PathBuf);

impl WorkFolder {
    fn beside(output: &Path) -> Result<Self> {
        let mut name = output.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}", std::process::id()));
        let path = output.with_file_name(name);
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(WorkFolder(path))
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // What cannot be removed is small.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod scripted_test;
