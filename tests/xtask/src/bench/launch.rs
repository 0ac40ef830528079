// SPDX-License-Identifier: Apache-2.0
//! What a launch costs: pages that the firmware measures, and the time that stage0 takes in the guest.
//!
//! The pages are counted in plans as `cvmm measure --dump` writes them, for the same guest in three ways:
//! behind stage0, behind Debian's OVMF, and with kernel and initrd measured by the firmware. Their time is a
//! prediction, at the millisecond for each page that SEVeriFast (ASPLOS 2024) found on hardware; it is not
//! measured here. stage0's time and counts are those of strict runs of Debian's kernel on the emulated
//! platform, from the first vCPU's start to the kernel's first instruction.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use cvmm_tests::cases::boot::REBOOTED;
use cvmm_tests::guest::Guest;
use cvmm_tests::guest::Mode;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::statistics::Counts;
use cvmm_tests::statistics::Statistics;
use cvmm_tests::suite::Context;
use guest_init::job::Ending;
use serde_json::Value;

use crate::build;
use crate::setup;
use crate::steps::Steps;
use crate::steps::capture;

/// Time that the firmware takes for a measured page.
const MILLIS_PER_PAGE: f64 = 1.0;
/// Sizes of the guests whose stage0 is timed.
const MEMORIES: [&str; 4] = ["256M", "1024M", "4096M", "16384M"];

/// Runs the bench and prints its tables.
pub fn run() -> Result<()> {
    let mut steps = Steps::new();
    setup::prepare(&mut steps, setup::Kernels::Needed, false)?;
    let context = Context::new(build::PROFILE)?;
    build::release(&context.workspace, &["vmm"])?;
    let guest = |memory| -> Result<Guest> {
        let role = Role::BackportsCloud;
        Ok(Guest {
            kernel: Kernel::find(&context.workspace, role)?.image,
            initrd: context.workspace.guest_initrd(role),
            memory,
            cpus: 1,
            mode: Mode::SplitStrict,
            actions: "reboot",
            report_data: String::new(),
            verbose: false,
        })
    };
    pages(&context, &guest("512M")?)?;
    println!(
        "\nstage0 before the kernel's first instruction, on the emulated platform, Debian's 6.12, 1 vCPU"
    );
    println!("({})", context.decision());
    println!(
        "{:>8} {:>7} {:>10} {:>20} {:>11} {:>10} {:>14}",
        "RAM", "accept", "PVALIDATE", "page-state changes", "validated", "time, ms", "monitor, MiB"
    );
    for accept in ["eager", "lazy"] {
        for memory in MEMORIES {
            let counts = stage0(&context, &guest(memory)?, accept)?;
            println!(
                "{memory:>8} {accept:>7} {:10} {:20} {:>7} MiB {:10} {:14}",
                counts.pvalidate,
                counts.page_state_changes,
                counts.validated_pages >> 8,
                counts.milliseconds,
                counts.resident_kib >> 10
            );
        }
    }
    Ok(())
}

/// The first table: what the firmware has to measure.
fn pages(context: &Context, guest: &Guest) -> Result<()> {
    let direct = guest.measure_job(&context.cvmm).argv;
    let direct: Vec<&str> = direct.iter().skip(1).map(String::as_str).collect();
    let firmware = context.workspace.work().join("ovmf/usr/share/ovmf/OVMF.fd").display().to_string();
    let ovmf = ["measure", "--firmware", &firmware, "--vmm", "qemu", "--vcpu-model", "EPYC-Milan"];
    let whole = [&direct[..], &["--validation", "launch"]].concat();
    let all = |_: &str| true;
    let rows = [
        ("stage0, any kernel and initrd", count(context, &direct, all)?),
        ("Debian's OVMF, without kernel and initrd", count(context, &ovmf, all)?),
        ("kernel and initrd measured, no other RAM", count(context, &whole, |name| name != "free RAM")?),
        ("the same and all RAM, 512 MiB", count(context, &whole, all)?),
    ];
    println!("\npages that the firmware takes, 1 vCPU; predicted at {MILLIS_PER_PAGE} ms each, not measured");
    println!("{:42} {:>8} {:>12} {:>16}", "launch", "pages", "predicted", "times stage0's");
    let least = rows[0].1 as f64;
    for (name, pages) in rows {
        let seconds = pages as f64 * MILLIS_PER_PAGE / 1e3;
        println!("{name:42} {pages:8} {seconds:10.3} s {:16.1}", pages as f64 / least);
    }
    Ok(())
}

/// Pages of the plan that `cvmm` makes of `arguments`, those whose name `wanted` accepts.
fn count(context: &Context, arguments: &[&str], wanted: impl Fn(&str) -> bool) -> Result<u64> {
    let dump = context.workspace.work().join("bench-plan.jsonl");
    capture(Command::new(&context.cvmm).args(arguments).arg("--dump").arg(&dump))?;
    let lines = fs::read_to_string(&dump).with_context(|| format!("cannot read {}", dump.display()))?;
    let _ = fs::remove_file(Path::new(&format!("{}.contents", dump.display())));
    let mut pages = 0;
    for line in lines.lines() {
        let run: Value = serde_json::from_str(line).context("a line of the plan's dump")?;
        if wanted(run["name"].as_str().unwrap_or_default()) {
            pages += run["len"].as_u64().context("a run without a length")? / 4096;
        }
    }
    Ok(pages)
}

/// Boots the guest and returns what stage0 did.
fn stage0(context: &Context, guest: &Guest, accept: &str) -> Result<Counts> {
    let mut job = guest.run_job(&context.cvmm, &context.keys()?);
    job.argv.extend(["--accept", accept, "--statistics"].map(String::from));
    let output = context.run(&job)?;
    ensure!(output.ending == Ending::Code(REBOOTED), "the guest ended with {}", output.ending);
    Statistics::parse(&output.errors())?.stage0()
}
