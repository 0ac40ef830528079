// SPDX-License-Identifier: Apache-2.0
//! A guest has a TPM: Debian's tools use it through the kernel's driver, plain and as an SNP guest; what was
//! measured before the guest ran is in its log and in its PCRs; its state outlives the monitor; and a TPM
//! that dies takes nothing with it.
//!
//! The log is read by `tpm2_eventlog`, which replays it by itself; its values are compared with what the
//! guest's PCRs hold.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;
use serde_json::Value;
use sha2::Digest as _;
use sha2::Sha256;

use super::boot;
use crate::digest::hex;
use crate::guest::Console;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::machine::Output;
use crate::suite::Case;
use crate::suite::Context;
use crate::tpm;

/// Making RSA keys in software, in an emulated machine, takes long.
const LIMIT: Duration = Duration::from_secs(360);

/// The PCR that Linux itself extends (its integrity measurement architecture), after the log that is handed
/// to it.
const IMA: &str = "10";

/// What the tools' script prints when it is through.
const ALL_STEPS: &str = "all steps passed";

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("vtpm/plain/log-and-tools", |context| {
            log_and_tools(context, Role::StableCloud, Mode::Plain)
        }),
        Case::new("vtpm/snp/split-strict/log-and-tools", |context| {
            log_and_tools(context, Role::BackportsCloud, Mode::SplitStrict)
        }),
        Case::new("vtpm/snp/single/log", log_of_an_snp_guest),
        Case::new("vtpm/state-survives-the-monitor", state_survives),
        Case::new("vtpm/snp/reset-by-a-guest", reset_by_a_guest),
        Case::new("vtpm/snp/clear-asked-by-a-guest", clear_asked),
        Case::new("vtpm/service-killed-while-the-guest-runs", service_killed),
    ]
}

fn guest(context: &Context, role: Role, mode: Mode, actions: &'static str) -> Result<Guest> {
    Ok(Guest {
        kernel: Kernel::find(&context.workspace, role)?.image,
        initrd: tpm::initrd_path(&context.workspace),
        memory: "512M",
        cpus: 1,
        mode,
        actions,
        report_data: String::new(),
        verbose: false,
    })
}

/// The command line of a run, for a shell.
fn command(context: &Context, guest: &Guest, vtpm: &str) -> Result<String> {
    let job = guest.run_job(&context.cvmm, &context.keys()?);
    let quoted: Vec<String> = job.argv.iter().map(|word| format!("'{word}'")).collect();
    Ok(format!("{} {vtpm}", quoted.join(" ")))
}

/// Runs a shell script where guests run.
fn shell(context: &Context, script: &str) -> Result<Output> {
    let mut job = crate::machine::job("/bin/sh");
    job.argv.extend(["-c".into(), script.into()]);
    job.limit = LIMIT;
    context.run(&job)
}

fn run(context: &Context, guest: &Guest, vtpm: &str) -> Result<(Output, Console)> {
    let output = shell(context, &format!("exec {}", command(context, guest, vtpm)?))?;
    let console = Console::parse(&output.text());
    ensure!(console.all("error").is_empty(), "the guest complains: {:?}", console.all("error"));
    Ok((output, console))
}

/// An SNP guest shows its log, and its PCRs are those of the log.
pub fn log_of_an_snp_guest(context: &Context) -> Result<()> {
    let guest = guest(context, Role::BackportsCloud, Mode::Single, "log,reboot")?;
    let (output, console) = run(context, &guest, "--vtpm")?;
    ensure!(output.ending == Ending::Code(boot::REBOOTED), "the run ended with {}", output.ending);
    log_holds(context, &guest, &console)
}

fn log_and_tools(context: &Context, role: Role, mode: Mode) -> Result<()> {
    let guest = guest(context, role, mode, "log,tools,reboot")?;
    // An SNP guest's ACPI tables hold the log, so the digest has to be predicted with it.
    let predicted = match mode {
        Mode::Plain => None,
        Mode::Single | Mode::SplitStrict => {
            let mut job = guest.measure_job(&context.cvmm);
            let without = context.run_on_host(&job).text();
            job.argv.extend(["--vtpm".into(), "--json".into()]);
            let with: Value =
                serde_json::from_slice(&context.run_on_host(&job).stdout).context("measure --json")?;
            let digest = with["digests"][0]["launch_digest"].as_str().context("no digest")?;
            ensure!(
                digest.len() == 96 && digest != without.trim(),
                "with a TPM: {digest}, without: {without}"
            );
            Some(with)
        }
    };
    let (output, console) = run(context, &guest, "--vtpm")?;
    ensure!(output.ending == Ending::Code(boot::REBOOTED), "the run ended with {}", output.ending);
    if let Some(predicted) = predicted {
        let log = console.get("log")?;
        ensure!(log.contains(boot::SNP_LOG_LINE), "the guest's log says {log:?}");
        let digest = predicted["digests"][0]["launch_digest"].as_str().unwrap_or_default();
        let announced = format!("launch digest {digest}");
        ensure!(output.errors().contains(&announced), "cvmm did not announce {announced}");
        pcrs_are_as_predicted(&console, &predicted["pcrs"])?;
    }
    log_holds(context, &guest, &console)?;
    let steps = console.all("step");
    ensure!(steps.last() == Some(&ALL_STEPS), "the tools' script got to {:?}", steps.last());
    Ok(())
}

/// The log that the guest's kernel shows is one that `tpm2_eventlog` reads, its replay gives the PCRs of the
/// guest, and it names the files that were booted.
fn log_holds(context: &Context, guest: &Guest, console: &Console) -> Result<()> {
    ensure!(console.get("version")? == "2", "not a TPM 2.0");
    let log = console.bytes("eventlog")?;
    let path = context.workspace.work().join("scratch/guest-eventlog");
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).context("scratch")?;
    fs::write(&path, &log).with_context(|| format!("cannot write {}", path.display()))?;
    let output = Command::new("tpm2_eventlog").arg(&path).output().context("cannot run tpm2_eventlog")?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && errors.is_empty(), "tpm2_eventlog refuses the log: {errors}");
    for event in ["EV_S_CRTM_VERSION", "Calling EFI Application from Boot Option", "EV_SEPARATOR", "EV_IPL"] {
        ensure!(text.contains(event), "the log has no {event}");
    }
    let replayed = replayed(&text);
    // 0 to 7, 9 and 12.
    ensure!(replayed.len() == 2 * 10, "banks and PCRs in the replay: {:?}", replayed.keys());
    let found = shown_pcrs(console);
    ensure!(found.len() == 2 * 16, "PCRs that the guest read: {:?}", found.keys());
    for (name, value) in found.iter().filter(|((_, pcr), _)| pcr != IMA) {
        // What the log does not extend is as it was at power-on.
        let zero = format!("0x{}", "0".repeat(value.len().saturating_sub(2)));
        let expected = replayed.get(name).unwrap_or(&zero);
        ensure!(value == expected, "{name:?} is {value} in the guest, the log gives {expected}");
    }
    let initrd = fs::read(&guest.initrd).context("initrd")?;
    let digest: [u8; 32] = Sha256::digest(&initrd).into();
    ensure!(text.contains(&hex(&digest)), "the initrd's digest is not in the log");
    Ok(())
}

/// The PCRs that `tpm2_pcrread` showed in the guest, by bank and number.
fn shown_pcrs(console: &Console) -> BTreeMap<(String, String), String> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (bank, pcr, value) = (words.next()?, words.next()?, words.next()?);
        Some(((bank.to_owned(), pcr.to_owned()), value.to_lowercase()))
    };
    console.all("pcr").into_iter().filter_map(line).collect()
}

/// What `cvmm measure` said about the PCRs before there was a guest.
fn pcrs_are_as_predicted(console: &Console, predicted: &Value) -> Result<()> {
    let shown = shown_pcrs(console);
    for bank in ["sha256", "sha384"] {
        let pcrs = predicted[bank].as_object().with_context(|| format!("no {bank} among the PCRs"))?;
        // 0 to 7, 9 and 12.
        ensure!(pcrs.len() == 10, "{} PCRs of {bank} are predicted", pcrs.len());
        for (pcr, value) in pcrs {
            let found = shown.get(&(bank.to_owned(), pcr.clone())).map(String::as_str);
            let value = format!("0x{}", value.as_str().unwrap_or_default());
            ensure!(found == Some(value.as_str()), "PCR {pcr} of {bank} is {found:?}, predicted was {value}");
        }
    }
    Ok(())
}

/// The values under `pcrs:` in the output of `tpm2_eventlog`.
fn replayed(text: &str) -> BTreeMap<(String, String), String> {
    let mut values = BTreeMap::new();
    let mut bank = String::new();
    for line in text.split("\npcrs:").nth(1).unwrap_or_default().lines() {
        match line.split_once(':') {
            Some((name, value)) if value.trim().is_empty() => bank = name.trim().to_owned(),
            Some((pcr, value)) => {
                values.insert((bank.clone(), pcr.trim().to_owned()), value.trim().to_lowercase());
            }
            None => {}
        }
    }
    values
}

/// Seconds by which the guest sets its clock ahead: ten years.
const AHEAD: i64 = 315_360_000;
/// How much later the next run may look at it, in seconds.
const LATER: i64 = 600;

/// A counter, a key and the guest's clock are there again in the next run, under a service that cvmm starts
/// and under one that somebody else did; without the file there is no run, and the file is not made.
fn state_survives(context: &Context) -> Result<()> {
    let guest = guest(context, Role::BackportsCloud, Mode::Plain, "keep,clock,poweroff")?;
    let state = "--vmgs $d/vm.vmgs --key-file $d/key --anchor $d/anchors";
    let run = command(context, &guest, "--vtpm $d/vm.vmgs --vtpm-key-file $d/key --vtpm-anchor $d/anchors")?;
    let connect = command(context, &guest, "--vtpm-socket $d/control")?;
    let cvmm = context.cvmm.display();
    let service = context.cvmm.with_file_name("vtpm-svc");
    let service = service.display();
    let script = format!(
        "d=$(mktemp -d) && umask 077 && head -c 32 /dev/urandom >$d/key || exit 99
         {run} </dev/null; echo \"cvmm-guest: without-file $?\"
         {connect} </dev/null; echo \"cvmm-guest: without-socket $?\"
         {cvmm} vmgs create $d/vm.vmgs --key-file $d/key --anchor $d/anchors || exit 98
         {run} </dev/null; echo \"cvmm-guest: ended $?\"
         {service} socket --tpm2 --ctrl type=unixio,path=$d/control {state} & service=$!
         for n in $(seq 100); do test -S $d/control && break; sleep 0.1; done
         {connect} </dev/null; echo \"cvmm-guest: connected $?\"
         kill -TERM $service || echo 'cvmm-guest: error the service is gone'
         wait $service; echo \"cvmm-guest: service $?\"
         ls $d | while read -r name; do echo \"cvmm-guest: left $name\"; done
         {cvmm} vmgs check $d/vm.vmgs --key-file $d/key --anchor $d/anchors; echo \"cvmm-guest: check $?\"
         rm -r $d"
    );
    let output = shell(context, &script)?;
    let console = Console::parse(&output.text());
    ensure!(console.all("error").is_empty(), "the guest complains: {:?}", console.all("error"));
    ensure!(console.get("without-file")? == "2", "a missing file is no usage error");
    ensure!(output.errors().contains("cvmm vmgs create"), "what to do about a missing file is not said");
    ensure!(console.get("without-socket")? != "0", "a guest without its service ran");
    for (what, expected) in [("ended", "0"), ("connected", "0"), ("service", "0"), ("check", "0")] {
        ensure!(console.get(what)? == expected, "{what}: {} instead of {expected}", console.get(what)?);
    }
    ensure!(console.all("made-counter").len() == 1 && console.all("made-key").len() == 1, "made twice");
    kept(&console)?;
    // The socket went with the service.
    let left = console.all("left");
    ensure!(left == ["anchors", "key", "vm.vmgs"], "left behind: {left:?}");
    let clocks: Vec<i64> = console.all("clock").iter().filter_map(|text| text.parse().ok()).collect();
    let [first, second] = clocks[..] else { anyhow::bail!("not two clocks: {:?}", console.all("clock")) };
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).context("clock")?;
    ensure!((host.as_secs() as i64 - first).abs() < LATER, "the first run's clock showed {first}");
    ensure!((AHEAD..AHEAD + LATER).contains(&(second - first)), "the clock went from {first} to {second}");
    Ok(())
}

/// What `keep` found in two lives: a counter that goes on, one key.
fn kept(console: &Console) -> Result<()> {
    let [first, second] = console.all("counter")[..] else { anyhow::bail!("not two counters") };
    let number = |text: &str| u64::from_str_radix(text, 16).context("counter");
    ensure!(number(second)? == number(first)? + 1, "the counter went from {first} to {second}");
    let [first, second] = console.all("key")[..] else { anyhow::bail!("not two keys") };
    ensure!(first == second && first.len() == 68, "the key's name went from {first} to {second}");
    Ok(())
}

/// A reset is one for the TPM too: its PCRs are those of a boot, its storage stays.
fn reset_by_a_guest(context: &Context) -> Result<()> {
    let guest = guest(context, Role::BackportsCloud, Mode::Single, "log,spoil,keep,reboot")?;
    let (output, console) = run(context, &guest, "--vtpm --on-reboot restart --max-lives 2")?;
    ensure!(output.ending == Ending::Code(boot::REBOOTED), "the run ended with {}", output.ending);
    kept(&console)?;
    let pcrs = console.all("pcr");
    ensure!(pcrs.len() == 2 * 32, "{} PCRs in two lives", pcrs.len());
    let (first, second) = pcrs.split_at(32);
    ensure!(first == second, "the PCRs of the second life differ: {second:?}, before: {first:?}");
    let logs = console.all("eventlog");
    ensure!(logs.len() == 2 && logs[0] == logs[1] && !logs[0].is_empty(), "the logs of the two lives differ");
    Ok(())
}

/// The guest asks firmware to clear its TPM through the kernel's interface; it is done at the reset, once.
fn clear_asked(context: &Context) -> Result<()> {
    let guest = guest(context, Role::BackportsCloud, Mode::Single, "ppi,keep,ask,reboot")?;
    let (output, console) = run(context, &guest, "--vtpm --on-reboot restart --max-lives 2")?;
    ensure!(output.ending == Ending::Code(boot::REBOOTED), "the run ended with {}", output.ending);
    let version = console.all("ppi-version");
    ensure!(version == ["1.3", "1.3"], "versions of the interface: {version:?}");
    ensure!(console.all("ppi-waits") == ["0", "0"], "a request waits: {:?}", console.all("ppi-waits"));
    ensure!(console.all("asked") == ["5", "5"], "the kernel shows {:?} as the request", console.all("asked"));
    let done = console.all("ppi-done");
    ensure!(done.len() == 2 && done[1] == "5 0: Success", "what was done: {done:?}");
    ensure!(console.all("made-key").len() == 2, "the key is still there: the TPM was not cleared");
    Ok(())
}

/// The guest goes on without its TPM, and the user is told once.
fn service_killed(context: &Context) -> Result<()> {
    let guest = guest(context, Role::BackportsCloud, Mode::Plain, "lose,poweroff")?;
    let run = command(context, &guest, "--vtpm")?;
    let script = format!(
        "d=$(mktemp -d) || exit 99
         {run} </dev/null >$d/out 2>$d/err & cvmm=$!
         for n in $(seq 600); do grep -q waiting $d/out && break; sleep 0.2; done
         kill -9 $(cat /proc/$cvmm/task/$cvmm/children) || exit 98
         wait $cvmm; code=$?
         cat $d/out; cat $d/err >&2; rm -r $d; exit $code"
    );
    let output = shell(context, &script)?;
    let console = Console::parse(&output.text());
    ensure!(output.ending == Ending::Code(0), "the run ended with {}", output.ending);
    ensure!(console.all("error").is_empty(), "the guest complains: {:?}", console.all("error"));
    ensure!(console.all("tpm-failed").len() == 1, "the guest did not see its TPM fail");
    let told = output.errors().matches("the vTPM service is gone").count();
    ensure!(told == 1, "cvmm said {told} times that the service is gone");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_replay_of_the_tool_is_found_behind_its_events() {
        let text = "events:\n- EventNum: 0\n  x: y\npcrs:\n  sha256:\n    0  : 0xAB\n    12 : 0xcd\n  sha384:\n    0  : 0xef\n";
        let values = replayed(text);
        assert_eq!(values.len(), 3);
        assert_eq!(values[&("sha256".into(), "0".into())], "0xab");
        assert_eq!(values[&("sha384".into(), "0".into())], "0xef");
    }
}
