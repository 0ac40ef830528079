// SPDX-License-Identifier: Apache-2.0
//! What cvmm does on an Intel host: plain and SNP guests, and one with a TPM, on the KVM of an outer guest
//! under Bochs.
//!
//! The checks are those of [`super::boot`] and [`super::vtpm`]. Bochs runs some fifty million instructions a
//! second, so there are few cases, and their guests do little.

use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use guest_init::job::Ending;

use super::boot;
use super::firmware;
use super::strict;
use super::vtpm;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::machine::job;
use crate::snp_kernel::Code;
use crate::suite::Case;
use crate::suite::Context;
use crate::suite::Verdict;

/// How the names of these cases begin. None is tried again when it fails: of Bochs's CPU no such faults are
/// known as of QEMU's.
pub const PREFIX: &str = "intel/";

/// The exit code of cvmm for a guest that ended by a triple fault.
const CRASHED: i32 = 5;

/// Why they are long.
const WHY: &str = "Bochs emulates an Intel CPU, 50 million instructions a second";

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    let boots = |name: &str, cpus, memory, mode, actions| {
        Case::new(format!("{PREFIX}{name}"), move |context| {
            let context = context.on_intel();
            boot::boots(context, &guest(context, cpus, memory, mode, actions)?).map(|_| ())
        })
    };
    vec![
        Case::new(format!("{PREFIX}cpu"), cpu),
        boots("plain", 2, "512M", Mode::Plain, "info,memory,reboot"),
        boots("snp/single", 1, "256M", Mode::Single, "info,report,reboot"),
        boots("snp/split-strict", 2, "512M", Mode::SplitStrict, "info,report,reboot"),
        Case::new(format!("{PREFIX}vtpm"), |context| vtpm::log_of_an_snp_guest(context.on_intel())),
        Case::new(format!("{PREFIX}vmmcall-is-undefined"), vmmcall),
    ]
    .into_iter()
    .chain(strict::cases().into_iter().chain(firmware::igvm_cases()).map(|case| {
        Case::new(format!("{PREFIX}{}", case.name), move |context| match (case.run)(context.on_intel())? {
            Verdict::Passed => Ok(()),
            Verdict::Skipped(why) => bail!("not tried: {why}"),
        })
    }))
    .map(|case| case.long(WHY))
    .collect()
}

/// VMMCALL raises #UD, as on the host's own CPU, and KVM does not write VMCALL over it. So does a VMGEXIT
/// that the platform did not find. The kernel has no interrupt table: its end is a triple fault.
fn vmmcall(context: &Context) -> Result<()> {
    let code = Code::new().say(b'a').vmmcall().say(b'b');
    let output = strict::run(context.on_intel(), code)?;
    ensure!(output.text() == "a", "the guest wrote {:?}", output.text());
    ensure!(output.ending == Ending::Code(CRASHED), "the run ended with {}", output.ending);
    Ok(())
}

fn guest(
    context: &Context,
    cpus: u32,
    memory: &'static str,
    mode: Mode,
    actions: &'static str,
) -> Result<Guest> {
    let role = Role::BackportsCloud;
    Ok(Guest {
        kernel: Kernel::find(&context.workspace, role)?.image,
        initrd: context.workspace.guest_initrd(role),
        memory,
        cpus,
        mode,
        actions,
        report_data: if actions.contains("report") { "5a".repeat(64) } else { String::new() },
        verbose: false,
    })
}

/// The machine is what the other cases take it for: Intel's CPU, and KVM for it.
fn cpu(context: &Context) -> Result<()> {
    let mut look = job("/bin/sh");
    look.argv.extend(["-c", "cat /proc/cpuinfo; ls /sys/module"].map(String::from));
    look.limit = Duration::from_secs(60);
    let output = context.on_intel().run(&look)?;
    ensure!(output.ending == Ending::Code(0), "the look at it ended with {}", output.ending);
    let text = output.text();
    let vendor = text.lines().find_map(|line| line.strip_prefix("vendor_id")).context("no vendor_id")?;
    ensure!(vendor.contains("GenuineIntel"), "the CPU's vendor is{vendor}");
    ensure!(text.lines().any(|line| line == "kvm_intel"), "kvm_intel is not loaded");
    Ok(())
}
