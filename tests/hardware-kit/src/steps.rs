// SPDX-License-Identifier: Apache-2.0
//! The steps, in order. Each is a run of cvmm and what must be true afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use guest_init::console::Console;
use guest_init::console::Report as Attestation;
use guest_init::console::hex;
use guest_init::console::unhex;
use guest_init::job;
use guest_init::job::Ending;
use guest_init::job::Event;
use serde_json::Value;
use serde_json::json;

use crate::idle;
use crate::idle::kib;
use crate::kernel_log::KernelLog;
use crate::program::Output;
use crate::program::Program;
use crate::report::Found;
use crate::report::Report;

/// Most pages that a launch through stage0 measures, beside the vCPUs' registers.
const PAGES_MAX: u64 = 10;
/// Memory of the guest, in MiB.
const GUEST_MIB: u64 = 1024;
/// The same in a rehearsal, which keeps two copies of it.
const REHEARSAL_MIB: u64 = 512;
/// Shared memory that the monitor may hold for a guest of that size, in MiB: bounce buffers (6 % of the
/// memory, at least 64 MiB), what the guest shares besides, and the monitor itself.
const SHARED_MIB_MAX: u64 = 192;
/// Longest time for one guest.
const LIMIT: Duration = Duration::from_secs(300);
/// The same in a rehearsal, which may run in a KVM that is itself emulated.
const REHEARSAL_LIMIT: Duration = Duration::from_secs(900);
/// How long a sleeping guest's monitor is watched.
const WATCH: Duration = Duration::from_secs(5);
/// The share of the time above which a vCPU of a sleeping guest does not sleep.
const BUSY: f64 = 0.5;
/// Exit code of cvmm: the guest asked for a reset, which is how the test's guest ends.
const REBOOTED: i32 = 3;
/// Exit code of `cvmm verify`: the report is not as demanded.
const NOT_VERIFIED: i32 = 1;
/// What a Linux guest logs when it runs as an SNP guest.
const SNP_LOG_LINE: &str = "Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP";
/// What the guest does in a boot.
const ACTIONS: &str = "info,memory,cpu-cycle,report,reboot";

/// What is tested, and with what.
pub struct Kit {
    /// The program under test.
    pub cvmm: Program,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initial ramdisk: `l2-init`.
    pub initrd: PathBuf,
    /// Certificates of this host's key.
    pub certs: Vec<PathBuf>,
    /// Numbers of vCPUs, ascending.
    pub cpus: Vec<u32>,
    /// On the emulated platform.
    pub rehearsal: bool,
    /// Its keys.
    pub keys: Option<PathBuf>,
}

/// A run of the steps.
struct Test<'a> {
    kit: &'a Kit,
    /// For files that cvmm reads and writes.
    work: &'a Path,
    /// Launch with the firmware's CPUID values.
    accept_cpuid: bool,
    /// 64 bytes in hexadecimal, which the guest's reports must carry.
    nonce: String,
}

impl Kit {
    /// What `cvmm --version` says.
    pub fn version(&self) -> Option<String> {
        let output = self.cvmm.run(&["--version"], LIMIT);
        (output.ending == Ending::Code(0)).then(|| output.text().trim().to_owned())
    }

    /// Goes through every step.
    pub fn all(&self, work: &Path, accept_cpuid: bool, report: &mut Report) -> Result<()> {
        let test = Test { kit: self, work, accept_cpuid, nonce: nonce()? };
        if accept_cpuid {
            report.note("the firmware refuses values of the CPUID page; every launch has --accept-cpuid");
        }
        let log = KernelLog::begin();
        let certificates = report.capability("req_certs") == Some(1);
        let mut digests = Vec::new();
        for &cpus in &self.cpus {
            step(report, &format!("measure {cpus} vCPU"), |_| {
                let (value, digest) = test.measure(&self.initrd, cpus)?;
                digests.push((cpus, digest));
                Ok(Found::Passed(value))
            });
        }
        for (cpus, digest) in &digests {
            step(report, &format!("launch {cpus} vCPU"), |report| {
                test.launch(*cpus, digest, report).map(Found::Passed)
            });
        }
        if let Some((cpus, digest)) = digests.first() {
            step(report, "verify", |_| test.verify(digest));
            step(report, "tampered initrd", |report| test.tampered(*cpus, digest, report));
            step(report, "reboot", |report| test.restarted(*cpus, digest, report).map(Found::Passed));
            step(report, "certificates", |report| test.certificates(*cpus, certificates, report));
            step(report, "tpm", |report| test.tpm(*cpus, report).map(Found::Passed));
        }
        if let Some(cpus) = self.cpus.last() {
            step(report, "idle guest", |_| test.idle(*cpus).map(Found::Passed));
        }
        report.kernel_log(log.lines());
        Ok(())
    }
}

impl Test<'_> {
    fn limit(&self) -> Duration {
        if self.kit.rehearsal { REHEARSAL_LIMIT } else { LIMIT }
    }

    fn memory_mib(&self) -> u64 {
        if self.kit.rehearsal { REHEARSAL_MIB } else { GUEST_MIB }
    }

    fn image_options(&self, initrd: &Path, cpus: u32, actions: &str) -> Vec<String> {
        // Under an emulated CPU a nested guest cannot calibrate its timers.
        let timers = if self.kit.rehearsal { "tsc=reliable no_timer_check " } else { "" };
        let cmdline = format!(
            "console=ttyS0 panic=-1 reboot=k {timers}quiet cvmm.do={actions} cvmm.report_data={}",
            self.nonce
        );
        let options: [(&str, String); 5] = [
            ("--kernel", self.kit.kernel.display().to_string()),
            ("--initrd", initrd.display().to_string()),
            ("--cmdline", cmdline),
            ("--memory", format!("{}M", self.memory_mib())),
            ("--cpus", cpus.to_string()),
        ];
        options.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }

    fn launch_options(&self, initrd: &Path, cpus: u32, actions: &str) -> Vec<String> {
        let mut options = self.image_options(initrd, cpus, actions);
        options.push("--snp".into());
        if self.accept_cpuid {
            options.push("--accept-cpuid".into());
        }
        if self.kit.rehearsal {
            options.extend(["--platform", "emulated", "--backing", "split"].map(String::from));
            let keys = self.kit.keys.clone().unwrap_or_else(|| self.work.join("emulated-platform.pem"));
            options.extend(["--emulated-keys".into(), keys.display().to_string()]);
        }
        options
    }

    /// The predicted digest; both what is worth telling and the digest alone.
    fn measure(&self, initrd: &Path, cpus: u32) -> Result<(Value, String)> {
        let mut arguments = vec!["measure".to_owned(), "--json".to_owned()];
        arguments.extend(self.image_options(initrd, cpus, ACTIONS));
        let output = self.kit.cvmm.run(&arguments, LIMIT);
        output.expect_code("cvmm measure", 0)?;
        fs::write(self.work.join(format!("measure-{cpus}.json")), &output.stdout)?;
        let value: Value = serde_json::from_slice(&output.stdout).context("JSON of cvmm measure")?;
        let digests = value["digests"].as_array().context("no digests in the JSON of cvmm measure")?;
        let ours = digests.iter().find(|digest| digest["vcpus"] == cpus);
        let digest = ours.and_then(|digest| digest["launch_digest"].as_str());
        let digest = digest.with_context(|| format!("no digest for {cpus} vCPUs"))?.to_owned();
        let pages = value["inputs"]["launch pages"].as_str().and_then(|pages| pages.parse::<u64>().ok());
        let pages = pages.context("no number of launch pages")?;
        // One page for the registers of each vCPU is among them.
        let most = PAGES_MAX + u64::from(cpus);
        ensure!(pages <= most, "{pages} pages are launched, more than {most}");
        Ok((json!({ "launch_digest": digest, "launch_pages": pages }), digest))
    }

    /// Boots the guest; returns what is worth telling and the measurement in its report.
    fn boot(&self, initrd: &Path, cpus: u32, name: &str, report: &mut Report) -> Result<(Value, String)> {
        let output = self.kit.cvmm.run(&self.launch_options(initrd, cpus, ACTIONS), self.limit());
        keep(report, name, &output);
        output.expect_code("cvmm", REBOOTED)?;
        let console = Console::parse(&output.text());
        ensure!(console.all("error").is_empty(), "the guest complains: {:?}", console.all("error"));
        let log = console.get("log")?;
        ensure!(log.contains(SNP_LOG_LINE), "the guest's log says {log:?}, not {SNP_LOG_LINE:?}");
        let online = if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) };
        let found = console.get("cpus")?;
        ensure!(found == online, "online CPUs are {found}, not {online}: not every vCPU was started");
        let cycled = console.get("cpu_cycle")?;
        let bytes = console.bytes("report")?;
        report.keep(&format!("{name} report"), hex(&bytes));
        fs::write(self.work.join(format!("{name}.bin")), &bytes)?;
        let attestation = Attestation(&bytes);
        let data = hex(attestation.report_data().context("the report is too short")?);
        ensure!(data == self.nonce, "the report carries {data}, not {}", self.nonce);
        let measurement = hex(attestation.measurement().context("the report is too short")?);
        let value = json!({
            "measurement": measurement,
            "seconds": output.seconds,
            "kernel": console.get("kernel")?,
            "cpus": found,
            "cpu_cycle": cycled,
        });
        Ok((value, measurement))
    }

    fn launch(&self, cpus: u32, digest: &str, report: &mut Report) -> Result<Value> {
        let (value, measurement) = self.boot(&self.kit.initrd, cpus, &launched(cpus), report)?;
        ensure!(measurement == digest, "the report's measurement is {measurement}, predicted was {digest}");
        Ok(value)
    }

    /// One run of cvmm in which the guest reboots once: two VMs, one digest.
    fn restarted(&self, cpus: u32, digest: &str, report: &mut Report) -> Result<Value> {
        let mut arguments = self.launch_options(&self.kit.initrd, cpus, ACTIONS);
        arguments.extend(["--on-reboot", "restart", "--max-lives", "2"].map(String::from));
        let output = self.kit.cvmm.run(&arguments, 2 * self.limit());
        keep(report, "restart", &output);
        output.expect_code("cvmm", REBOOTED)?;
        let console = Console::parse(&output.text());
        let reports: Vec<Vec<u8>> = console.all("report").into_iter().map(unhex).collect::<Result<_>>()?;
        ensure!(reports.len() == 2, "{} reports of two VMs", reports.len());
        let mut ids = Vec::new();
        for bytes in &reports {
            let attestation = Attestation(bytes);
            let measurement = hex(attestation.measurement().context("the report is too short")?);
            ensure!(measurement == digest, "a report's measurement is {measurement}, predicted was {digest}");
            ids.push(hex(attestation.report_id().context("the report is too short")?));
        }
        ensure!(ids.first() != ids.last(), "both reports are of one launch, {ids:?}");
        Ok(json!({ "measurement": digest, "report_ids": ids, "seconds": output.seconds }))
    }

    /// The guest's driver gets, with its report, the certificates that the operator put into a file.
    fn certificates(&self, cpus: u32, asked: bool, report: &mut Report) -> Result<Found> {
        if self.kit.certs.is_empty() {
            return Ok(Found::Skipped("no --certs: there is nothing to hand out".into()));
        }
        if !asked && !self.kit.rehearsal {
            return Ok(Found::Skipped(
                "this kernel's KVM does not ask the monitor for certificates (Linux 7.0 does)".into(),
            ));
        }
        let table = self.work.join("certs.table");
        let mut make = vec!["certs".to_owned(), "--out".into(), table.display().to_string()];
        make.extend(self.kit.certs.iter().map(|path| path.display().to_string()));
        self.kit.cvmm.run(&make, LIMIT).expect_code("cvmm certs", 0)?;
        let mut arguments = self.launch_options(&self.kit.initrd, cpus, "ext-report,reboot");
        arguments.extend(["--certs".into(), table.display().to_string()]);
        let output = self.kit.cvmm.run(&arguments, self.limit());
        keep(report, "certificates", &output);
        output.expect_code("cvmm", REBOOTED)?;
        let got = Console::parse(&output.text()).bytes("certificates")?;
        let given = fs::read(&table)?;
        // The guest leaves zeros at the end out.
        ensure!(given.starts_with(&got), "the guest got other certificates than the file's");
        ensure!(given.iter().skip(got.len()).all(|b| *b == 0), "the guest got a part of the certificates");
        Ok(Found::Passed(json!({ "bytes": given.len() })))
    }

    /// A guest with a TPM: its digest is the predicted one, its PCRs hold what `cvmm measure` says, and the
    /// TPM answers.
    fn tpm(&self, cpus: u32, report: &mut Report) -> Result<Value> {
        const ACTIONS: &str = "tpm,report,reboot";
        let mut measure = vec!["measure".to_owned(), "--json".into(), "--vtpm".into()];
        measure.extend(self.image_options(&self.kit.initrd, cpus, ACTIONS));
        let output = self.kit.cvmm.run(&measure, LIMIT);
        output.expect_code("cvmm measure --vtpm", 0)?;
        let value: Value = serde_json::from_slice(&output.stdout).context("JSON of cvmm measure")?;
        let digest = value["digests"][0]["launch_digest"].as_str().context("no digest")?.to_owned();
        let predicted = value["pcrs"]["sha256"].as_object().context("no predicted PCRs")?;

        let mut arguments = self.launch_options(&self.kit.initrd, cpus, ACTIONS);
        arguments.push("--vtpm".into());
        let output = self.kit.cvmm.run(&arguments, self.limit());
        keep(report, "tpm", &output);
        output.expect_code("cvmm", REBOOTED)?;
        let console = Console::parse(&output.text());
        ensure!(console.all("error").is_empty(), "the guest complains: {:?}", console.all("error"));
        let bytes = console.bytes("report")?;
        let measurement = hex(Attestation(&bytes).measurement().context("the report is too short")?);
        ensure!(measurement == digest, "the report's measurement is {measurement}, predicted was {digest}");
        ensure!(
            console.get("tpm_version")? == "2",
            "the guest's TPM is of version {}",
            console.get("tpm_version")?
        );
        let pcrs: BTreeMap<&str, &str> =
            console.all("tpm_pcr").into_iter().filter_map(|line| line.split_once(' ')).collect();
        for (pcr, value) in predicted {
            let found = pcrs.get(pcr.as_str());
            ensure!(
                found.is_some_and(|found| value == found),
                "PCR {pcr} is {}, predicted was {value}",
                found.unwrap_or(&"absent")
            );
        }
        let log = console.bytes("tpm_log")?.len();
        ensure!(log > 0, "the event log is empty");
        ensure!(console.bytes("tpm_random")?.iter().any(|b| *b != 0), "the TPM's random bytes are zero");
        Ok(json!({ "measurement": measurement, "pcrs": pcrs, "log_bytes": log, "seconds": output.seconds }))
    }

    fn verify(&self, digest: &str) -> Result<Found> {
        let Some(cpus) = self.kit.cpus.first() else { bail!("no guest was launched") };
        if self.kit.certs.is_empty() {
            return Ok(Found::Skipped(
                "no --certs: the report's digest was compared, its signature was not checked".into(),
            ));
        }
        let output = self.kit.cvmm.run(&self.verify_options(*cpus, &launched(*cpus))?, LIMIT);
        ensure!(
            output.ending == Ending::Code(0),
            "cvmm verify ended with {}:\n{}",
            output.ending,
            output.text()
        );
        Ok(Found::Passed(json!({ "launch_digest": digest, "verdict": output.text() })))
    }

    fn verify_options(&self, cpus: u32, name: &str) -> Result<Vec<String>> {
        let policy = self.work.join("policy.toml");
        fs::write(&policy, format!("measurement_sets = [\"measure-{cpus}.json\"]\n"))?;
        let path = |path: &Path| path.display().to_string();
        let report = self.work.join(format!("{name}.bin"));
        let mut options = vec!["verify".to_owned(), path(&report), "--certs".to_owned()];
        options.extend(self.kit.certs.iter().map(|p| path(p)));
        options.extend(["--policy".into(), path(&policy), "--nonce".into(), self.nonce.clone()]);
        Ok(options)
    }

    /// A zero byte at the end of an initrd changes nothing for the guest; the report must show it all the
    /// same.
    fn tampered(&self, cpus: u32, digest: &str, report: &mut Report) -> Result<Found> {
        let mut bytes = fs::read(&self.kit.initrd)?;
        bytes.push(0);
        let initrd = self.work.join("tampered-initrd");
        fs::write(&initrd, bytes)?;
        let (value, measurement) = self.boot(&initrd, cpus, "tampered", report)?;
        ensure!(measurement != digest, "the report still shows the digest of the untouched initrd");
        if !self.kit.certs.is_empty() {
            let output = self.kit.cvmm.run(&self.verify_options(cpus, "tampered")?, LIMIT);
            ensure!(
                output.ending == Ending::Code(NOT_VERIFIED),
                "cvmm verify ended with {}:\n{}",
                output.ending,
                output.text()
            );
        }
        Ok(Found::Passed(value))
    }

    /// While a guest that has used its memory sleeps, its vCPUs use no CPU and the monitor holds only what
    /// the guest shares. The host's available memory is told and not judged: others use it, too.
    fn idle(&self, cpus: u32) -> Result<Value> {
        let before = kib("/proc/meminfo", "MemAvailable:")?;
        let options = self.launch_options(&self.kit.initrd, cpus, "info,memory,sleep");
        let (sender, events) = channel();
        let control = job::start(&self.kit.cvmm.job(&options, self.limit() + WATCH), move |event| {
            // A receiver that is gone has all that it wanted.
            let _ = sender.send(event);
        });
        let (mut text, mut errors, mut ended) = (Vec::new(), Vec::new(), None);
        let deadline = Instant::now() + self.limit();
        while ended.is_none() && !contains(&text, b"cvmm-guest: sleeping") {
            match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Stdout(bytes)) => text.extend_from_slice(&bytes),
                Ok(Event::Stderr(bytes)) => errors.extend_from_slice(&bytes),
                Ok(Event::Ended(how, _)) => ended = Some(how),
                Err(_) => break,
            }
        }
        let asleep = contains(&text, b"cvmm-guest: sleeping");
        let seen = match control.id() {
            Some(id) if asleep && ended.is_none() => idle::shares(id, WATCH)
                .and_then(|shares| Ok((shares, kib(format!("/proc/{id}/status"), "VmRSS:")? >> 10)))
                .map(Some),
            _ => Ok(None),
        };
        let during = kib("/proc/meminfo", "MemAvailable:");
        control.signal(KILL);
        // Until it has ended.
        events.iter().find(|event| matches!(event, Event::Ended(..)));
        let Some((shares, held)) = seen? else {
            bail!("the guest did not get to sleep: {}", String::from_utf8_lossy(&errors).trim())
        };
        std::thread::sleep(Duration::from_secs(2));
        let after = kib("/proc/meminfo", "MemAvailable:")?;
        let value = json!({
            "vcpu_busy_share": shares.iter().map(|(name, share)| json!([name, share])).collect::<Vec<_>>(),
            "monitor_rss_mib": held,
            "host_available_mib": { "before": before >> 10, "during": during? >> 10, "after": after >> 10 },
        });
        ensure!(shares.len() == cpus as usize, "{} vCPU threads for {cpus} vCPUs", shares.len());
        // The emulated platform keeps the private side in the monitor, and its CPUs may be emulated
        // themselves.
        if !self.kit.rehearsal {
            if let Some((name, share)) = shares.iter().find(|(_, share)| *share > BUSY) {
                bail!(
                    "thread {name} is busy {:.0} % of the time while the guest sleeps: KVM_RUN returns again and again without running \
                     the vCPU ({value})",
                    share * 100.0
                );
            }
            ensure!(
                held <= SHARED_MIB_MAX,
                "cvmm holds {held} MiB beside the guest's private memory, expected at most {SHARED_MIB_MAX}: the stale shared \
                 side of converted pages is not freed"
            );
        }
        Ok(value)
    }
}

/// SIGKILL.
const KILL: i32 = 9;

/// Name of a launch with so many vCPUs.
fn launched(cpus: u32) -> String {
    format!("launch-{cpus}")
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Keeps what a guest and its monitor said.
fn keep(report: &mut Report, name: &str, output: &Output) {
    report.keep(&format!("{name} console"), output.text());
    report.keep(&format!("{name} messages"), output.errors());
}

fn step(report: &mut Report, name: &str, work: impl FnOnce(&mut Report) -> Result<Found>) {
    println!("{name} ...");
    report.begins(name);
    let started = Instant::now();
    let verdict = work(report);
    report.step(name, started.elapsed().as_secs_f64(), verdict);
}

/// 64 bytes that no earlier run has used, in hexadecimal.
fn nonce() -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?.as_nanos();
    Ok(format!("{now:032x}{:096x}", std::process::id()))
}
