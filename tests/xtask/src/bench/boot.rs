// SPDX-License-Identifier: Apache-2.0
//! From exec to the first byte that a tiny guest writes, and the monitor's memory at that point, on the
//! native KVM.
//!
//! Both monitors get the same file, the same memory and one vCPU, and are run in turn so that a busy machine
//! hits both. QEMU is given what it needs to be fast: the `microvm` machine without the devices that the
//! guest does not use, and without ACPI, so that it starts qboot and not SeaBIOS. Its CPU lacks one feature
//! of the host because some software KVMs offer that feature's MSR and then refuse to set it, which ends
//! QEMU.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use cvmm_tests::nested::QEMU;
use cvmm_tests::tiny;
use cvmm_tests::workspace::Workspace;

use super::Args;
use super::median;
use super::millis;
use crate::build;

/// A monitor that shows no byte within this time never will.
const LIMIT: Duration = Duration::from_secs(20);

/// Goals of the project: a share of QEMU's time, and MiB.
const GOAL_RATIO: f64 = 0.3;
const GOAL_MEMORY: f64 = 6.0;

struct Sample {
    millis: f64,
    resident_mib: f64,
}

/// Runs the bench and prints its table.
pub fn run(args: &Args) -> Result<()> {
    let workspace = Workspace::find();
    build::release(&workspace, &["vmm"])?;
    let guest = workspace.work().join("tiny-guest.elf");
    fs::create_dir_all(workspace.work())?;
    fs::write(&guest, tiny::pvh_guest()).with_context(|| format!("cannot write {}", guest.display()))?;
    let cvmm = workspace.cargo_output(build::PROFILE).join("cvmm");

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    // One unmeasured run of each brings the programs into the page cache.
    measure(&mut cvmm_command(&cvmm, &guest)).context("cvmm")?;
    measure(&mut qemu_command(&guest)).context("QEMU")?;
    for _ in 0..args.runs {
        ours.push(measure(&mut cvmm_command(&cvmm, &guest)).context("cvmm")?);
        theirs.push(measure(&mut qemu_command(&guest)).context("QEMU")?);
    }
    let column = |samples: &[Sample], value: fn(&Sample) -> f64| {
        let values: Vec<f64> = samples.iter().map(value).collect();
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        (median(&values), low, high)
    };
    println!(
        "\nexec to first serial byte, {}-byte PVH guest, 128 MiB, 1 vCPU, {} runs each in turn",
        tiny::pvh_guest().len(),
        args.runs
    );
    println!("{:34} {:>10} {:>22} {:>10} {:>8}", "median (range)", "cvmm", "QEMU microvm", "ratio", "goal");
    let row = |name: &str, value: fn(&Sample) -> f64, goal: String| {
        let (a, b) = (column(&ours, value), column(&theirs, value));
        println!(
            "{name:20} {:8.2} ({:.2}-{:.2}) {:12.2} ({:.2}-{:.2}) {:9.3} {goal:>9}",
            a.0,
            a.1,
            a.2,
            b.0,
            b.1,
            b.2,
            a.0 / b.0
        );
    };
    row("time, ms", |sample| sample.millis, format!("<= {GOAL_RATIO}"));
    row("resident, MiB", |sample| sample.resident_mib, format!("<= {GOAL_MEMORY} MiB"));
    Ok(())
}

fn cvmm_command(cvmm: &Path, guest: &Path) -> Command {
    let mut command = Command::new(cvmm);
    command.arg("--kernel").arg(guest).args(["--memory", "128M", "--cpus", "1"]);
    command
}

fn qemu_command(guest: &Path) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args([
            "-M",
            "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,auto-kernel-cmdline=off",
        ])
        .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities", "-smp", "1", "-m", "128"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-kernel"])
        .arg(guest);
    command
}

/// Starts a monitor, waits for the guest's byte, looks at the monitor's memory, and ends it.
fn measure(command: &mut Command) -> Result<Sample> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start")?;
    let mut output = child.stdout.take().context("no output")?;
    let watchdog = Watchdog::start(child.id());
    let mut byte = [0];
    let read = output.read_exact(&mut byte);
    let time = started.elapsed();
    let resident = resident_mib(child.id());
    drop(watchdog);
    end(&mut child);
    if read.is_err() || byte[0] != tiny::BYTE {
        let mut errors = String::new();
        if let Some(mut pipe) = child.stderr.take() {
            let _ = pipe.read_to_string(&mut errors);
        }
        bail!("no byte from the guest after {:.1} s: {}", time.as_secs_f64(), errors.trim());
    }
    Ok(Sample { millis: millis(time), resident_mib: resident? })
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn resident_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the monitor's memory")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("VmRSS")?;
    Ok(kib / 1024.0)
}

/// Kills a silent monitor, so that reading its output ends.
struct Watchdog {
    cancel: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn start(pid: u32) -> Self {
        let (cancel, cancelled) = std::sync::mpsc::channel::<()>();
        thread::spawn(move || {
            let expired = cancelled.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if let (true, Some(pid)) =
                (expired, i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw))
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        });
        Watchdog { cancel }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.cancel.send(());
    }
}
