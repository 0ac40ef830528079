// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask hardware-test`: what a user with an SNP host runs, and the report to send back.
//!
//! **It has never run on hardware**: the project has no SNP host. What each step proves is in `docs/hardware-acceptance.md`.
//! Where `cvmm doctor` does not say that SNP guests can be launched it refuses, so that an emulated run cannot be taken for
//! an acceptance; no command here ever asks for the emulated platform.

use std::fs;
use std::io::BufRead as _;
use std::io::BufReader;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use cvmm_tests::cases::boot::REBOOTED;
use cvmm_tests::cases::boot::SNP_LOG_LINE;
use cvmm_tests::digest::hex;
use cvmm_tests::digest::unhex;
use cvmm_tests::guest::Console;
use cvmm_tests::guest::Report;
use cvmm_tests::kernels::Kernel;
use cvmm_tests::kernels::Role;
use cvmm_tests::machine::Machine;
use cvmm_tests::machine::Output;
use cvmm_tests::machine::job;
use cvmm_tests::workspace::Workspace;
use guest_init::job::Ending;
use serde_json::Value;
use serde_json::json;

use crate::build;
use crate::setup;
use crate::steps::Steps;

/// Exit code: this host cannot launch SNP guests, nothing was tried.
pub const REFUSED: u8 = 3;
/// Most pages that a launch through stage0 measures, beside the vCPUs' registers.
const PAGES_MAX: u64 = 12;
/// Memory of the guest, in MiB.
const GUEST_MIB: u64 = 1024;
/// Shared memory that the monitor may hold for a guest of that size, in MiB: bounce buffers (6 % of the memory, at least 64
/// MiB), what the guest shares besides, and the monitor itself.
const SHARED_MIB_MAX: u64 = 192;
/// Longest time for one guest.
const LIMIT: Duration = Duration::from_secs(300);

/// `cargo xtask hardware-test`
#[derive(clap::Args)]
pub struct Args {
    /// The cvmm to test; built if not given.
    #[arg(long, value_name = "FILE")]
    cvmm: Option<PathBuf>,
    /// The host's VCEK or VLEK certificate, and its issuer's if that is not AMD's VCEK intermediate; without it the report's
    /// signature is not checked.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    certs: Vec<PathBuf>,
    /// Where the report goes.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// How one step ended.
struct Done {
    name: &'static str,
    /// Passed, or skipped for a reason.
    verdict: Result<Found>,
    seconds: f64,
}

enum Found {
    Passed(Value),
    Skipped(String),
}

/// Runs the chore. Exit codes: 0 all steps passed, 1 a step failed, 3 refused.
pub fn run(args: &Args) -> Result<ExitCode> {
    let workspace = Workspace::find();
    let mut progress = Steps::new();
    let cvmm = match &args.cvmm {
        Some(path) => path.clone(),
        None => {
            progress.step("build cvmm (release)", || build::release(&workspace, &["vmm"]))?;
            workspace.cargo_output(build::PROFILE).join("cvmm")
        }
    };
    let doctor = run_cvmm(&cvmm, &["doctor", "--json"], Duration::from_secs(60));
    let diagnosis: Value = serde_json::from_slice(&doctor.stdout)
        .with_context(|| format!("cvmm doctor printed no JSON: {}", doctor.errors()))?;
    if let Err(why) = gate(&doctor.ending, &diagnosis, Path::new("/dev/sev").exists()) {
        eprintln!("hardware-test refuses to run: {why}");
        eprintln!("It proves something only on a host with SEV-SNP; `cvmm doctor` says what this one lacks.");
        eprintln!("For tests without SNP hardware: `cargo xtask test`, `cargo xtask demo`.");
        return Ok(ExitCode::from(REFUSED));
    }
    setup::prepare(&mut progress, setup::Kernels::Needed, false)?;
    let output = args.output.clone().unwrap_or_else(|| workspace.work().join("hardware-report"));
    fs::create_dir_all(&output).with_context(|| format!("cannot create {}", output.display()))?;
    let test = Test {
        kernel: Kernel::find(&workspace, Role::BackportsCloud)?.image,
        initrd: workspace.guest_initrd(Role::BackportsCloud),
        nonce: nonce()?,
        certs: args.certs.clone(),
        cvmm,
        output,
    };
    let done = test.all(&diagnosis);
    test.write_report(&diagnosis, &done)?;
    let failed = done.iter().any(|step| step.verdict.is_err());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whether this is an SNP host, by what doctor says and by a look of our own.
fn gate(ending: &Ending, diagnosis: &Value, sev_device: bool) -> Result<(), String> {
    let verdict = diagnosis["verdict"].as_str().unwrap_or("nothing");
    match (ending, verdict) {
        (Ending::Code(0), "snp") if sev_device => Ok(()),
        (Ending::Code(0), "snp") => Err("cvmm doctor says yes, but there is no /dev/sev".into()),
        (_, "emulation") => Err("this host can only emulate SNP".into()),
        (_, "neither") => Err("this host can neither launch nor emulate SNP guests".into()),
        (ending, other) => Err(format!("cvmm doctor says {other:?} and ended with {ending}")),
    }
}

struct Test {
    cvmm: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    /// 64 bytes in hexadecimal.
    nonce: String,
    certs: Vec<PathBuf>,
    output: PathBuf,
}

impl Test {
    fn all(&self, diagnosis: &Value) -> Vec<Done> {
        let mut done = Vec::new();
        let mut digest = None;
        step(&mut done, "measure", || {
            let (value, found) = self.measure(&self.initrd)?;
            digest = Some(found);
            Ok(Found::Passed(value))
        });
        let Some(digest) = digest else { return done };
        step(&mut done, "launch", || self.launch(&self.initrd, &digest, "report.bin").map(Found::Passed));
        step(&mut done, "verify", || self.verify(&digest));
        step(&mut done, "tampered initrd", || self.tampered(&digest));
        step(&mut done, "conversions", || self.conversions().map(Found::Passed));
        step(&mut done, "reboot", || self.restarted(&digest).map(Found::Passed));
        let asked = &diagnosis["facts"]["kvm"]["Ok"]["capabilities"]["req_certs"];
        step(&mut done, "certificates", || self.certificates(asked.as_u64() == Some(1)));
        done
    }

    fn image_options(&self, initrd: &Path, actions: &str) -> Vec<String> {
        let cmdline = format!(
            "console=ttyS0 panic=-1 reboot=k quiet cvmm.do={actions} cvmm.report_data={}",
            self.nonce
        );
        let options: [(&str, String); 5] = [
            ("--kernel", self.kernel.display().to_string()),
            ("--initrd", initrd.display().to_string()),
            ("--cmdline", cmdline),
            ("--memory", format!("{GUEST_MIB}M")),
            ("--cpus", "2".into()),
        ];
        options.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }

    /// The predicted digest; both the JSON and the digest alone.
    fn measure(&self, initrd: &Path) -> Result<(Value, String)> {
        let mut arguments = vec!["measure".to_owned(), "--json".to_owned()];
        arguments.extend(self.image_options(initrd, ACTIONS));
        let output = run_cvmm(&self.cvmm, &arguments, LIMIT);
        ensure!(
            output.ending == Ending::Code(0),
            "cvmm measure ended with {}: {}",
            output.ending,
            output.errors()
        );
        fs::write(self.output.join("measure.json"), &output.stdout)?;
        let value: Value = serde_json::from_slice(&output.stdout).context("JSON of cvmm measure")?;
        let digest = value["launch_digest"].as_str().context("no launch_digest")?.to_owned();
        let pages = value["launch_pages"].as_u64().context("no launch_pages")?;
        ensure!(pages <= PAGES_MAX, "{pages} pages are launched, more than {PAGES_MAX}");
        Ok((json!({ "launch_digest": digest, "launch_pages": pages }), digest))
    }

    /// Boots the guest and returns its report's measurement.
    fn boot(&self, initrd: &Path, file: &str) -> Result<(Value, String)> {
        let mut arguments = self.image_options(initrd, ACTIONS);
        arguments.push("--snp".into());
        let output = run_cvmm(&self.cvmm, &arguments, LIMIT);
        fs::write(self.output.join(file).with_extension("console"), &output.stdout)?;
        fs::write(self.output.join(file).with_extension("errors"), &output.stderr)?;
        ensure!(
            output.ending == Ending::Code(REBOOTED),
            "cvmm ended with {}: {}",
            output.ending,
            output.errors()
        );
        let console = Console::parse(&output.text());
        ensure!(console.all("error").is_empty(), "the guest complains: {:?}", console.all("error"));
        let log = console.get("log")?;
        ensure!(log.contains(SNP_LOG_LINE), "the guest's log says {log:?}, not {SNP_LOG_LINE:?}");
        ensure!(console.get("cpus")? == "0-1", "online CPUs are {}, not 0-1", console.get("cpus")?);
        let bytes = console.bytes("report")?;
        fs::write(self.output.join(file), &bytes)?;
        let report = Report(&bytes);
        let data = hex(report.report_data().context("the report is too short")?);
        ensure!(data == self.nonce, "the report carries {data}, not {}", self.nonce);
        let measurement = hex(report.measurement().context("the report is too short")?);
        let seconds = output.elapsed.as_secs_f64();
        Ok((
            json!({ "measurement": measurement, "seconds": seconds, "kernel": console.get("kernel")? }),
            measurement,
        ))
    }

    fn launch(&self, initrd: &Path, digest: &str, file: &str) -> Result<Value> {
        let (value, measurement) = self.boot(initrd, file)?;
        ensure!(measurement == digest, "the report's measurement is {measurement}, predicted was {digest}");
        Ok(value)
    }

    /// One run of cvmm in which the guest reboots once: two VMs, one digest.
    fn restarted(&self, digest: &str) -> Result<Value> {
        let mut arguments = self.image_options(&self.initrd, ACTIONS);
        arguments.extend(["--snp", "--on-reboot", "restart", "--max-lives", "2"].map(String::from));
        let output = run_cvmm(&self.cvmm, &arguments, 2 * LIMIT);
        fs::write(self.output.join("restart.console"), &output.stdout)?;
        fs::write(self.output.join("restart.errors"), &output.stderr)?;
        ensure!(
            output.ending == Ending::Code(REBOOTED),
            "cvmm ended with {}: {}",
            output.ending,
            output.errors()
        );
        let console = Console::parse(&output.text());
        let reports: Vec<Vec<u8>> = console.all("report").into_iter().map(unhex).collect::<Result<_>>()?;
        ensure!(reports.len() == 2, "{} reports of two VMs", reports.len());
        let mut ids = Vec::new();
        for bytes in &reports {
            let report = Report(bytes);
            let measurement = hex(report.measurement().context("the report is too short")?);
            ensure!(measurement == digest, "a report's measurement is {measurement}, predicted was {digest}");
            ids.push(hex(report.report_id().context("the report is too short")?));
        }
        ensure!(ids.first() != ids.last(), "both reports are of one launch, {ids:?}");
        Ok(json!({ "measurement": digest, "report_ids": ids, "seconds": output.elapsed.as_secs_f64() }))
    }

    /// The guest's driver gets, with its report, the certificates that the operator put into a file.
    fn certificates(&self, asked: bool) -> Result<Found> {
        if self.certs.is_empty() {
            return Ok(Found::Skipped("no --certs: there is nothing to hand out".into()));
        }
        if !asked {
            return Ok(Found::Skipped(
                "this kernel's KVM does not ask the monitor for certificates (Linux 7.0 does)".into(),
            ));
        }
        let table = self.output.join("certs.table");
        let mut make = vec!["certs".to_owned(), "--out".into(), table.display().to_string()];
        make.extend(self.certs.iter().map(|path| path.display().to_string()));
        let made = run_cvmm(&self.cvmm, &make, LIMIT);
        ensure!(made.ending == Ending::Code(0), "cvmm certs ended with {}: {}", made.ending, made.errors());
        let mut arguments = self.image_options(&self.initrd, "ext-report,reboot");
        arguments.extend(["--snp".into(), "--certs".into(), table.display().to_string()]);
        let output = run_cvmm(&self.cvmm, &arguments, LIMIT);
        fs::write(self.output.join("certificates.errors"), &output.stderr)?;
        ensure!(
            output.ending == Ending::Code(REBOOTED),
            "cvmm ended with {}: {}",
            output.ending,
            output.errors()
        );
        let got = Console::parse(&output.text()).bytes("certificates")?;
        let given = fs::read(&table)?;
        // The guest leaves zeros at the end out.
        ensure!(given.starts_with(&got), "the guest got other certificates than the file's");
        ensure!(given.iter().skip(got.len()).all(|b| *b == 0), "the guest got a part of the certificates");
        Ok(Found::Passed(json!({ "bytes": given.len() })))
    }

    fn verify(&self, digest: &str) -> Result<Found> {
        if self.certs.is_empty() {
            return Ok(Found::Skipped(
                "no --certs: the report's digest was compared, its signature was not checked".into(),
            ));
        }
        let output = run_cvmm(&self.cvmm, &self.verify_options("report.bin")?, LIMIT);
        ensure!(
            output.ending == Ending::Code(0),
            "cvmm verify ended with {}:\n{}",
            output.ending,
            output.text()
        );
        Ok(Found::Passed(json!({ "launch_digest": digest, "verdict": output.text() })))
    }

    fn verify_options(&self, report: &str) -> Result<Vec<String>> {
        let policy = self.output.join("policy.toml");
        fs::write(&policy, "measurement_sets = [\"measure.json\"]\n")?;
        let path = |path: &Path| path.display().to_string();
        let mut options = vec!["verify".to_owned(), path(&self.output.join(report)), "--certs".to_owned()];
        options.extend(self.certs.iter().map(|p| path(p)));
        options.extend(["--policy".into(), path(&policy), "--nonce".into(), self.nonce.clone()]);
        Ok(options)
    }

    /// A zero byte at the end of an initrd changes nothing for the guest; the report must show it all the same.
    fn tampered(&self, digest: &str) -> Result<Found> {
        let mut bytes = fs::read(&self.initrd)?;
        bytes.push(0);
        let initrd = self.output.join("tampered-initrd");
        fs::write(&initrd, bytes)?;
        let result = self.boot(&initrd, "report-tampered.bin");
        fs::remove_file(&initrd)?;
        let (value, measurement) = result?;
        ensure!(measurement != digest, "the report still shows the digest of the untouched initrd");
        if !self.certs.is_empty() {
            let output = run_cvmm(&self.cvmm, &self.verify_options("report-tampered.bin")?, LIMIT);
            ensure!(
                output.ending == Ending::Code(1),
                "cvmm verify ended with {}:\n{}",
                output.ending,
                output.text()
            );
        }
        Ok(Found::Passed(value))
    }

    /// While a guest that has used its memory sleeps, the monitor holds only what the guest shares; when the guest is gone,
    /// its memory is the host's again.
    fn conversions(&self) -> Result<Value> {
        let before = kib("/proc/meminfo", "MemAvailable:")?;
        let mut child = Command::new(&self.cvmm)
            .args(self.image_options(&self.initrd, "info,memory,sleep"))
            .arg("--snp")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start cvmm")?;
        let stdout = child.stdout.take().context("no output of cvmm")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let deadline = Instant::now() + LIMIT;
        let asleep = loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains("cvmm-guest: sleeping") => break true,
                Ok(_) => {}
                Err(_) => break false,
            }
        };
        let held = kib(&format!("/proc/{}/status", child.id()), "VmRSS:");
        let during = kib("/proc/meminfo", "MemAvailable:");
        let _ = child.kill();
        child.wait().context("cvmm")?;
        ensure!(asleep, "the guest did not get to sleep");
        let (held, during) = (held? >> 10, during?);
        thread::sleep(Duration::from_secs(2));
        let after = kib("/proc/meminfo", "MemAvailable:")?;
        ensure!(
            held <= SHARED_MIB_MAX,
            "cvmm holds {held} MiB beside the guest's private memory, expected at most {SHARED_MIB_MAX}: the stale shared \
             side of converted pages is not freed"
        );
        let lost = before.saturating_sub(after) >> 10;
        ensure!(lost < GUEST_MIB / 2, "{lost} MiB did not come back after the guest had ended");
        Ok(json!({
            "monitor_rss_mib": held,
            "host_available_mib": { "before": before >> 10, "during": during >> 10, "after": after >> 10 },
        }))
    }

    fn write_report(&self, diagnosis: &Value, done: &[Done]) -> Result<()> {
        let mut text = String::from("cvmm hardware acceptance\n\n");
        let mut steps = Vec::new();
        for step in done {
            let (state, detail) = match &step.verdict {
                Ok(Found::Passed(value)) => ("passed", value.clone()),
                Ok(Found::Skipped(why)) => ("skipped", json!(why)),
                Err(error) => ("FAILED", json!(format!("{error:#}"))),
            };
            text += &format!("{state:8} {:18} {:7.1} s  {detail}\n", step.name, step.seconds);
            steps.push(
                json!({ "step": step.name, "state": state, "seconds": step.seconds, "detail": detail }),
            );
        }
        let facts = &diagnosis["facts"];
        text += &format!("\nhost: {} Linux {}\n", facts["cpu_model"], facts["kernel"]);
        let report = json!({
            "cvmm": env!("CARGO_PKG_VERSION"),
            "kernel": self.kernel.display().to_string(),
            "steps": steps,
            "doctor": diagnosis,
        });
        fs::write(self.output.join("report.json"), serde_json::to_string_pretty(&report)?)?;
        fs::write(self.output.join("report.txt"), &text)?;
        println!("\n{text}\nSend back the directory {}", self.output.display());
        Ok(())
    }
}

/// What the guest does in a boot.
const ACTIONS: &str = "info,memory,report,reboot";

fn step(done: &mut Vec<Done>, name: &'static str, work: impl FnOnce() -> Result<Found>) {
    println!("{name} ...");
    let started = Instant::now();
    let verdict = work();
    done.push(Done { name, verdict, seconds: started.elapsed().as_secs_f64() });
}

fn run_cvmm(cvmm: &Path, arguments: &[impl AsRef<str>], limit: Duration) -> Output {
    let mut job = job(cvmm);
    job.argv.extend(arguments.iter().map(|a| a.as_ref().to_owned()));
    job.limit = limit;
    Machine::Host.run(&job)
}

/// A number of KiB from a file of `Name: number kB` lines.
fn kib(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let Some(rest) = text.lines().find_map(|line| line.strip_prefix(name)) else {
        bail!("no {name} in {path}")
    };
    rest.trim().trim_end_matches(" kB").parse().with_context(|| format!("{name} in {path}"))
}

/// 64 bytes that no earlier run has used, in hexadecimal.
fn nonce() -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?.as_nanos();
    Ok(format!("{now:032x}{:096x}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_that_launches_snp_guests_passes_the_gate() {
        let says = |verdict: &str| json!({ "verdict": verdict });
        assert_eq!(gate(&Ending::Code(0), &says("snp"), true), Ok(()));
        for (code, verdict, device) in [
            (0, "snp", false),
            (10, "snp", true),
            (10, "emulation", true),
            (11, "neither", false),
            (0, "", true),
        ] {
            assert!(gate(&Ending::Code(code), &says(verdict), device).is_err(), "{code} {verdict}");
        }
        assert!(gate(&Ending::Code(0), &Value::Null, true).is_err());
        assert!(gate(&Ending::Code(10), &says("emulation"), false).unwrap_err().contains("only emulate"));
    }

    /// With a stand-in for cvmm, so that it holds on every machine; `doctor/hardware-test-refuses` uses the real one.
    #[test]
    fn a_host_that_can_only_emulate_is_refused_and_nothing_is_written() {
        let directory = std::env::temp_dir().join(format!("cvmm-hardware-test-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let cvmm = directory.join("cvmm");
        fs::write(&cvmm, "#!/bin/sh\necho '{\"verdict\": \"emulation\"}'\nexit 10\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&cvmm, mode).unwrap();
        let output = directory.join("report");
        let args = Args { cvmm: Some(cvmm), certs: Vec::new(), output: Some(output.clone()) };
        let code = run(&args).unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(REFUSED)));
        assert!(!output.exists(), "a refusal leaves no report");
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn sizes_are_read_from_proc() {
        assert!(kib("/proc/meminfo", "MemTotal:").unwrap() > 0);
        assert!(kib("/proc/meminfo", "NoSuchLine:").is_err());
    }
}
