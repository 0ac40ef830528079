// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask demo`: the main job from end to end, on a machine without SEV hardware.
//!
//! Predicts the launch digest of an unmodified Debian kernel, boots that kernel as an SNP guest on the
//! emulated platform, has the guest fetch its attestation report, and compares.

use std::io::Write;
use std::process::ExitCode;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use cvmm_tests::cases::boot;
use cvmm_tests::digest::hex;
use cvmm_tests::digest::unhex;
use cvmm_tests::evidence;
use cvmm_tests::guest::Console;
use cvmm_tests::guest::Guest;
use cvmm_tests::guest::Mode;
use cvmm_tests::guest::Report;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::suite::Context;
use cvmm_tests::workspace::Workspace;
use guest_init::job::Ending;
use guest_init::job::Event;

use crate::build;
use crate::setup;
use crate::steps::Steps;

/// Runs the chore.
pub fn run() -> Result<ExitCode> {
    let workspace = Workspace::find();
    let mut steps = Steps::new();
    setup::prepare(&mut steps, setup::Kernels::Needed, false)?;
    steps.step("build cvmm (release)", || build::release(&workspace, &["vmm"]))?;
    let context = steps.step("find a KVM that can run Linux", || {
        let context = Context::new(build::PROFILE)?;
        println!("           {}", context.decision());
        context.machine()?;
        Ok(context)
    })?;

    let role = Role::BackportsCloud;
    let kernel = Kernel::find(&workspace, role)?;
    let nonce = nonce()?;
    let guest = Guest {
        kernel: kernel.image.clone(),
        initrd: workspace.guest_initrd(role),
        memory: "512M",
        cpus: 2,
        mode: Mode::SplitStrict,
        actions: "info,ext-report,reboot",
        report_data: nonce.clone(),
        verbose: true,
    };
    let predicted = steps.step("predict the launch digest", || {
        let predicted = boot::predict(&context, &guest)?;
        println!("           cvmm measure: {predicted}");
        Ok(predicted)
    })?;
    let what = format!("boot Linux {} as an SNP guest, emulated platform", kernel.release);
    let output = steps.step(&what, || {
        let job = guest.run_job(&context.cvmm, &context.keys()?);
        println!("           {}", job.argv.join(" "));
        let mut console = Prefixed::default();
        let output = context.machine()?.start(&job).wait_watching(|event| match event {
            Event::Stdout(bytes) | Event::Stderr(bytes) => console.show(bytes),
            Event::Ended(..) => {}
        });
        ensure!(output.ending == Ending::Code(boot::REBOOTED), "cvmm ended with {}", output.ending);
        Ok(output)
    })?;
    let console = Console::parse(&output.text());
    steps.step("check what the guest reported", || {
        let bytes = console.bytes("ext_report")?;
        let report = Report(&bytes);
        let measurement = hex(report.measurement().context("the report is too short")?);
        println!("           measurement in the report: {measurement}");
        println!("           predicted by cvmm measure: {predicted}");
        ensure!(measurement == predicted, "the report's measurement is not the predicted digest");
        let data = hex(report.report_data().context("the report is too short")?);
        ensure!(data == nonce, "the report carries {data}, not the nonce {nonce} of this run");
        let root = evidence::platform_root(&workspace)?;
        let certificates = console.bytes("certificates")?;
        evidence::verified(&bytes, &certificates, root, &unhex(&predicted)?, &unhex(&nonce)?)?;
        ensure!(console.get("log")?.contains(boot::SNP_LOG_LINE), "the guest's log lacks the SNP line");
        Ok(())
    })?;
    steps.print_table();
    println!("\nguest's kernel: {}", console.get("log")?);
    println!("launch digest in the guest's report: {predicted}");
    println!("it is the digest that cvmm measure predicted");
    println!("report verified against the emulated platform's chain");
    Ok(ExitCode::SUCCESS)
}

/// 64 bytes that no earlier run has used, in hexadecimal: the report must be of this boot.
fn nonce() -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?.as_nanos();
    Ok(format!("{now:032x}{:096x}", std::process::id()))
}

/// Shows a guest's console line by line, set off from our own lines.
#[derive(Default)]
struct Prefixed {
    line: Vec<u8>,
}

impl Prefixed {
    fn show(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\r' => {}
                b'\n' => {
                    // Long hexadecimal lines are for programs.
                    let text = String::from_utf8_lossy(&self.line);
                    let shown: String = text.chars().take(150).collect();
                    let _ = writeln!(std::io::stdout(), "  | {shown}");
                    self.line.clear();
                }
                other => self.line.push(other),
            }
        }
    }
}
