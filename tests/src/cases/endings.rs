// SPDX-License-Identifier: Apache-2.0
//! How a run ends: power-off, crash, signals, and a terminal that is as it was.

use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;

use super::boot::REBOOTED;
use super::boot::predict;
use crate::digest::hex;
use crate::digest::unhex;
use crate::guest::Console;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::guest::Report;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::machine::job;
use crate::suite::Case;
use crate::suite::Context;

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;

/// Time for a guest to reach its user space; nested on a busy machine.
const BOOT: Duration = Duration::from_secs(120);

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("end/power-off-is-exit-code-0", |context| {
            let output = context.run(
                &guest(context, Mode::Plain, "info,poweroff")?.run_job(&context.cvmm, &context.keys()?),
            )?;
            ensure!(output.ending == Ending::Code(0), "{}", output.ending);
            Ok(())
        }),
        Case::new("end/snp-guest-powers-off-too", |context| {
            let guest = guest(context, Mode::SplitStrict, "info,poweroff")?;
            let output = context.run(&guest.run_job(&context.cvmm, &context.keys()?))?;
            ensure!(output.ending == Ending::Code(0), "{}", output.ending);
            Ok(())
        }),
        Case::new("end/sigterm-is-exit-code-143", |context| signalled(context, Mode::Plain, SIGTERM, 143)),
        Case::new("end/sigint-stops-an-snp-guest-with-130", |context| {
            signalled(context, Mode::Single, SIGINT, 130)
        }),
        Case::new("end/restart-launches-the-same-snp-guest-anew", restarted),
        Case::new("end/terminal-is-restored-after-sigterm", terminal_is_restored),
    ]
}

fn guest(context: &Context, mode: Mode, actions: &'static str) -> Result<Guest> {
    let role = Role::BackportsCloud;
    Ok(Guest {
        kernel: Kernel::find(&context.workspace, role)?.image,
        initrd: context.workspace.guest_initrd(role),
        memory: "256M",
        cpus: 1,
        mode,
        actions,
        report_data: String::new(),
        verbose: false,
    })
}

fn signalled(context: &Context, mode: Mode, signal: i32, code: i32) -> Result<()> {
    let job = guest(context, mode, "sleep")?.run_job(&context.cvmm, &context.keys()?);
    let mut running = context.machine()?.start(&job);
    let up = running.wait_for("cvmm-guest: sleeping", BOOT);
    running.signal(signal);
    let output = context.log(&job, running.wait());
    ensure!(up, "the guest did not reach its user space");
    ensure!(output.ending == Ending::Code(code), "{} instead of exit code {code}", output.ending);
    Ok(())
}

/// A guest that reports and reboots, twice: the digest is the predicted one each time, and each time it is
/// another guest.
fn restarted(context: &Context) -> Result<()> {
    let guest =
        Guest { report_data: "a7".repeat(64), ..guest(context, Mode::SplitStrict, "info,report,reboot")? };
    let predicted = predict(context, &guest)?;
    let mut job = guest.run_job(&context.cvmm, &context.keys()?);
    job.argv.extend(["--on-reboot", "restart", "--max-lives", "2"].map(String::from));
    let output = context.run(&job)?;
    ensure!(output.ending == Ending::Code(REBOOTED), "{}", output.ending);
    let console = Console::parse(&output.text());
    let reports: Vec<Vec<u8>> = console.all("report").into_iter().map(unhex).collect::<Result<_>>()?;
    ensure!(reports.len() == 2, "{} reports of two VMs", reports.len());
    for report in &reports {
        let measurement = hex(Report(report).measurement().context("measurement")?);
        ensure!(measurement == predicted, "a report says {measurement}, predicted was {predicted}");
    }
    let ids = reports.iter().map(|report| Report(report).report_id().context("report id"));
    let ids: Vec<&[u8]> = ids.collect::<Result<_>>()?;
    ensure!(ids[0] != ids[1], "both reports are of one launch: {}", hex(ids[0]));
    ensure!(console.all("cpus") == ["0", "0"], "the VMs have CPUs {:?}", console.all("cpus"));
    Ok(())
}

/// Runs cvmm on a pseudo-terminal, ends it by a signal, and asks the terminal for its settings afterwards.
fn terminal_is_restored(context: &Context) -> Result<()> {
    let cvmm = guest(context, Mode::Plain, "sleep")?.run_job(&context.cvmm, &context.keys()?);
    let quoted: Vec<String> = cvmm.argv.iter().map(|word| format!("'{word}'")).collect();
    let inside = format!("timeout --foreground -s TERM 20 {}; echo code $?; stty -a", quoted.join(" "));
    let mut script = job("script");
    script.argv.extend(["--quiet", "--return", "--command", &inside, "/dev/null"].map(String::from));
    script.limit = BOOT;
    let text = context.run(&script)?.text();
    // timeout(1) reports 124 when it had to send the signal.
    ensure!(text.contains("code 124"), "cvmm did not run until the signal");
    for setting in ["icanon", "echo", "isig"] {
        let words: Vec<&str> = text.split_whitespace().collect();
        ensure!(words.contains(&setting), "the terminal's {setting} is off after cvmm ended");
    }
    Ok(())
}
