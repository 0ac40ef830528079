// SPDX-License-Identifier: Apache-2.0
//! The hardware kit, where no SNP host is: it refuses from a root with nothing in it but its own archive,
//! which is stricter than any other distribution, and it rehearses its steps on the emulated platform.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;
use serde_json::Value;

use crate::machine::job;
use crate::suite::Case;
use crate::suite::Context;
use crate::suite::Verdict;

/// Name of the archive's folder.
const FOLDER: &str = "cvmm-hardware-kit";
/// Exit code: this host cannot launch SNP guests.
const REFUSED: i32 = 3;
/// Runs the kit in the root `$1`: devices and processes are the host's, everything else is what was unpacked.
const IN_ROOT: &str = "mkdir -p \"$1/dev\" \"$1/proc\" && mount --rbind /dev \"$1/dev\" && mount --rbind /proc \"$1/proc\" && \
                       chroot \"$1\" /cvmm-hardware-kit/vtpm-svc --version && \
                       exec chroot \"$1\" /cvmm-hardware-kit/run --output /report.json";

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    vec![
        Case::with_verdict("hardware-kit/refuses-in-an-empty-root-without-network", |context| {
            if Path::new("/dev/sev").exists() {
                return Ok(Verdict::Skipped("this host has /dev/sev".into()));
            }
            let mut unshare = job("unshare");
            unshare.argv.extend(["--map-root-user", "--mount", "--net", "true"].map(String::from));
            if context.run_on_host(&unshare).ending != Ending::Code(0) {
                return Ok(Verdict::Skipped("this user may not make namespaces".into()));
            }
            refuses(context).map(|()| Verdict::Passed)
        }),
        Case::new("hardware-kit/rehearsal", rehearsal)
            .long("boots a guest for each step of the kit: five minutes"),
    ]
}

/// Makes the archive.
fn archive(context: &Context) -> Result<PathBuf> {
    let archive = context.workspace.work().join(format!("{FOLDER}.tar.gz"));
    // The suite is a chore of xtask, so this program is xtask.
    let output = Command::new(std::env::current_exe().context("this program")?)
        .args(["hardware-kit", "--output"])
        .arg(&archive)
        .output()
        .context("cannot start xtask")?;
    ensure!(
        output.status.success(),
        "xtask hardware-kit: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(archive)
}

/// Unpacks the archive in a new folder of this name.
fn unpack(context: &Context, name: &str) -> Result<PathBuf> {
    let archive = archive(context)?;
    let root = context.workspace.work().join(name);
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    let mut tar = job("tar");
    tar.argv.extend(["-xzf".into(), archive.display().to_string(), "-C".into(), root.display().to_string()]);
    let output = context.run_on_host(&tar);
    ensure!(output.ending == Ending::Code(0), "tar ended with {}", output.ending);
    Ok(root)
}

fn refuses(context: &Context) -> Result<()> {
    let root = unpack(context, "hardware-kit-root")?;
    let mut kit = job("unshare");
    kit.argv.extend(["--map-root-user", "--mount", "--net", "sh", "-c", IN_ROOT, "sh"].map(String::from));
    kit.argv.push(root.display().to_string());
    kit.limit = Duration::from_secs(120);
    let output = context.run_on_host(&kit);
    ensure!(output.ending == Ending::Code(REFUSED), "it ended with {}: {}", output.ending, output.errors());
    for part in [
        "refuses to run",
        "SNP guests cannot be launched on this host",
        "missing: CPU with SEV-SNP",
        "missing: /dev/sev",
    ] {
        ensure!(output.errors().contains(part), "it does not say {part:?}");
    }
    ensure!(output.text().starts_with("vtpm-svc "), "the TPM service found no libraries: {}", output.text());
    let report: Value =
        serde_json::from_str(&fs::read_to_string(root.join("report.json")).context("its report")?)?;
    ensure!(report["refused"].is_string(), "its report has no refusal");
    ensure!(report["steps"] == Value::Array(Vec::new()), "it tried something");
    let rows = report["doctor"]["facts"]["cpuid"]["host"].as_array().map_or(0, Vec::len);
    ensure!(rows > 10, "its report has {rows} rows of the CPU's CPUID");
    Ok(())
}

fn rehearsal(context: &Context) -> Result<()> {
    let root = unpack(context, "hardware-kit-rehearsal")?;
    let report = root.join("report.json");
    let mut kit = job(root.join(FOLDER).join("run"));
    // Eight vCPUs would take minutes where one emulated CPU runs them all.
    kit.argv.extend(["--rehearse", "--cpus", "1,2", "--output"].map(String::from));
    kit.argv.push(report.display().to_string());
    kit.argv.extend(["--emulated-keys".into(), context.keys()?.display().to_string()]);
    kit.limit = Duration::from_secs(1200);
    let output = context.run(&kit)?;
    ensure!(output.ending == Ending::Code(0), "it ended with {}", output.ending);
    ensure!(output.text().contains("REHEARSAL"), "it does not say that this is a rehearsal");
    let report: Value = serde_json::from_str(&fs::read_to_string(&report).context("its report")?)?;
    ensure!(report["rehearsal"] == true, "its report does not say that this is a rehearsal");
    for step in report["steps"].as_array().context("no steps")? {
        // Without certificates there is nothing to verify with.
        let skipped = step["step"] == "verify" || step["step"] == "certificates";
        let expected = if skipped { "skipped" } else { "passed" };
        ensure!(step["state"] == expected, "step {} is {}", step["step"], step["state"]);
    }
    Ok(())
}
