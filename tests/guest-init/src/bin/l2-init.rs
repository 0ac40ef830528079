// SPDX-License-Identifier: Apache-2.0
//! The whole user space of a guest that cvmm boots: does what the kernel command line asks and ends the
//! machine.
//!
//! `cvmm.do=WORD,WORD...` gives the actions in order. What they find goes to the console in lines
//! `cvmm-guest: KEY VALUE`, for the test outside to read; a failure is `cvmm-guest: error ACTION: REASON`.
//! Actions:
//!
//! | word | prints or does |
//! |---|---|
//! | `info` | `kernel`, `cpus` (the online list), `memory_kib`, and a `log` line for each active memory encryption |
//! | `cmdline` | `cmdline TEXT`: the kernel command line |
//! | `report` | `report HEX`: an attestation report over `cvmm.report_data=HEX` (up to 64 bytes, zero-padded) |
//! | `try-report` | the same, or `no_report REASON` if the kernel has no driver for it |
//! | `ext-report` | `ext_report HEX` and `certificates HEX`, trailing zeros cut |
//! | `key` | `key HEX`: a derived key |
//! | `cpu1-anew` | takes CPU 1 offline and online again, twice, and runs on it: `cpu1_offline` and `cpu1_online`, each with the online list |
//! | `cpu-cycle` | `cpu_cycle LIST`: takes the last CPU offline and online again; the online list, or `one` if there is one CPU |
//! | `tpm` | `tpm_version`, `tpm_pcr INDEX HEX` of the boot's PCRs, `tpm_log HEX`, `tpm_random HEX`: what the TPM holds and answers |
//! | `memory` | `memory_checked MIB`: fills memory with a pattern and reads it back |
//! | `reboot`, `poweroff`, `panic`, `sleep` | ends, or waits for the outside to end, the machine |

use std::fs;
use std::fs::OpenOptions;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use guest_init::pid1;
use guest_init::sev_guest;
use guest_init::sev_guest::SevGuest;
use guest_init::tpm;
use rustix::system::RebootCommand;
use rustix::thread::CpuSet;
use rustix::thread::sched_getaffinity;
use rustix::thread::sched_getcpu;
use rustix::thread::sched_setaffinity;

/// Most memory that `memory` touches; more would only take longer.
const MEMORY_CHECKED_KIB: usize = 96 << 10;

fn main() {
    if let Err(error) = pid1::mount_basics("") {
        println!("cvmm-guest: error mount: {error:#}");
    }
    for failure in pid1::load_modules() {
        // Not an error by itself: a guest without SNP has no use for the SNP driver.
        println!("cvmm-guest: module {failure}");
    }
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let actions = value(&line, "cvmm.do").unwrap_or("info,reboot");
    for action in actions.split(',') {
        if let Err(error) = act(action, &line) {
            println!("cvmm-guest: error {action}: {error:#}");
        }
    }
    let refusal = pid1::end(RebootCommand::Restart);
    println!("cvmm-guest: error reboot: {refusal:#}");
}

fn value<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn act(action: &str, line: &str) -> Result<()> {
    match action {
        "info" => info(),
        "cmdline" => {
            println!("cvmm-guest: cmdline {}", line.trim_end());
            Ok(())
        }
        "try-report" if !Path::new(sev_guest::DEVICE).exists() => {
            println!("cvmm-guest: no_report there is no {}", sev_guest::DEVICE);
            Ok(())
        }
        "report" | "try-report" => {
            let report = SevGuest::open()?.report(report_data(line)?)?;
            println!("cvmm-guest: report {}", hex(&report));
            Ok(())
        }
        "ext-report" => {
            let (report, mut table) = SevGuest::open()?.extended_report(report_data(line)?)?;
            table.truncate(table.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
            println!("cvmm-guest: ext_report {}", hex(&report));
            println!("cvmm-guest: certificates {}", hex(&table));
            Ok(())
        }
        "key" => {
            println!("cvmm-guest: key {}", hex(&SevGuest::open()?.derived_key()?));
            Ok(())
        }
        "tpm" => tpm::show(),
        "cpu1-anew" => cpu1_anew(),
        "cpu-cycle" => cycle_cpu(),
        "memory" => check_memory(),
        "reboot" => Err(pid1::end(RebootCommand::Restart)),
        "poweroff" => Err(pid1::end(RebootCommand::PowerOff)),
        "panic" => fs::write("/proc/sysrq-trigger", "c").context("sysrq"),
        "sleep" => {
            println!("cvmm-guest: sleeping");
            std::thread::sleep(Duration::from_secs(3600));
            Ok(())
        }
        _ => bail!("no such action"),
    }
}

fn info() -> Result<()> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_string());
    println!("cvmm-guest: kernel {}", read("/proc/sys/kernel/osrelease")?.trim());
    println!("cvmm-guest: cpus {}", read("/sys/devices/system/cpu/online")?.trim());
    let meminfo = read("/proc/meminfo")?;
    let total = meminfo.split_whitespace().nth(1).context("MemTotal")?;
    println!("cvmm-guest: memory_kib {total}");
    for message in kernel_log()?.iter().filter(|message| message.contains("Encryption Features active")) {
        println!("cvmm-guest: log {message}");
    }
    Ok(())
}

fn cpu1_anew() -> Result<()> {
    let directory = Path::new("/sys/devices/system/cpu");
    let switch = directory.join("cpu1/online");
    let online = || fs::read_to_string(directory.join("online")).context("the list of CPUs");
    for _ in 0..2 {
        fs::write(&switch, "0").context("taking CPU 1 offline")?;
        println!("cvmm-guest: cpu1_offline {}", online()?.trim());
        fs::write(&switch, "1").context("taking CPU 1 online")?;
        // The kernel refuses the mask of a CPU that is offline, and returns on that CPU.
        let mut only_cpu1 = CpuSet::new();
        only_cpu1.set(1);
        let everywhere = sched_getaffinity(None).context("sched_getaffinity")?;
        sched_setaffinity(None, &only_cpu1).context("sched_setaffinity to CPU 1")?;
        let here = sched_getcpu();
        sched_setaffinity(None, &everywhere).context("sched_setaffinity to all CPUs")?;
        if here != 1 {
            bail!("bound to CPU 1, but on CPU {here}");
        }
        println!("cvmm-guest: cpu1_online {}", online()?.trim());
    }
    Ok(())
}

/// The messages that the kernel has logged so far.
fn kernel_log() -> Result<Vec<String>> {
    use std::os::unix::fs::OpenOptionsExt;
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut log =
        OpenOptions::new().read(true).custom_flags(nonblocking).open("/dev/kmsg").context("/dev/kmsg")?;
    let mut messages = Vec::new();
    let mut record = [0; 8192];
    // Each read gives one record, "priority,sequence,time,flags;text"; at the end the read would block.
    while let Ok(length) = log.read(&mut record) {
        let text = String::from_utf8_lossy(&record[..length]);
        if let Some((_, message)) = text.split_once(';') {
            messages.push(message.lines().next().unwrap_or_default().to_string());
        }
    }
    Ok(messages)
}

fn check_memory() -> Result<()> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let free = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:")).context("MemFree")?;
    let free_kib: usize = free.trim().trim_end_matches(" kB").parse().context("MemFree")?;
    let words = (free_kib / 4).min(MEMORY_CHECKED_KIB) * 1024 / 8;
    let pattern = |index: usize| (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let memory: Vec<u64> = (0..words).map(pattern).collect();
    if let Some(index) = memory.iter().enumerate().position(|(index, &word)| word != pattern(index)) {
        bail!("word {index} of {words} changed to {:#x}", memory[index]);
    }
    println!("cvmm-guest: memory_checked {}", (words * 8) >> 20);
    Ok(())
}

/// The last CPU goes and comes back: an SNP guest gives it a new save area for that.
fn cycle_cpu() -> Result<()> {
    const ONLINE: &str = "/sys/devices/system/cpu/online";
    let online = || fs::read_to_string(ONLINE).context(ONLINE);
    let before = online()?;
    let Some((_, last)) = before.trim().rsplit_once(['-', ',']) else {
        println!("cvmm-guest: cpu_cycle one");
        return Ok(());
    };
    let switch = format!("/sys/devices/system/cpu/cpu{last}/online");
    for (state, name) in [("0", "offline"), ("1", "online")] {
        fs::write(&switch, state).with_context(|| format!("taking CPU {last} {name}"))?;
        let now = online()?;
        ensure!(
            (now == before) == (state == "1"),
            "CPU {last} was taken {name}, and {} are online",
            now.trim()
        );
    }
    println!("cvmm-guest: cpu_cycle {}", before.trim());
    Ok(())
}

fn report_data(line: &str) -> Result<[u8; 64]> {
    let text = value(line, "cvmm.report_data").unwrap_or_default();
    let mut data = [0; 64];
    if text.len() > 128 || !text.len().is_multiple_of(2) || !text.is_ascii() {
        bail!("cvmm.report_data must be up to 128 hexadecimal digits, an even number");
    }
    for (byte, at) in data.iter_mut().zip((0..text.len()).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).context("cvmm.report_data")?;
    }
    Ok(data)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
