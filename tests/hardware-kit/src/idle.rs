// SPDX-License-Identifier: Apache-2.0
//! What a monitor uses while its guest sleeps: CPU time of each vCPU thread, and memory.
//!
//! A vCPU that KVM does not run, but whose thread asks it to over and over, uses a whole CPU (Linux,
//! `kvm_arch_vcpu_ioctl_run` answers EAGAIN to a vCPU that has not been started). The guest does not show it,
//! and neither does its report.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

/// A thread and how long it has been busy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Number of the thread.
    pub id: String,
    /// Its name, such as `vcpu1`.
    pub name: String,
    /// Nanoseconds in which it ran, or waited for a CPU: on a busy host a thread that never sleeps does not
    /// run all the time.
    pub busy: u64,
}

/// The threads of a process.
pub fn threads(process: u32) -> Result<Vec<Thread>> {
    let folder = format!("/proc/{process}/task");
    let mut all = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))? {
        let entry = entry.with_context(|| folder.clone())?;
        // A thread may end meanwhile.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let (name, used) = parse(&stat).with_context(|| format!("{folder}: {stat:?}"))?;
        // Some kernels do not count the waiting.
        let waited = fs::read_to_string(entry.path().join("schedstat")).ok().and_then(|text| waited(&text));
        let busy = used + waited.unwrap_or(0);
        all.push(Thread { id: entry.file_name().to_string_lossy().into_owned(), name, busy });
    }
    Ok(all)
}

/// Name and CPU time in nanoseconds of a line of `stat` (Linux, `proc(5)`): fields 2, 14 and 15. A name can
/// have spaces and brackets. A tick is a hundredth of a second for user space on x86 (`USER_HZ`).
fn parse(stat: &str) -> Option<(String, u64)> {
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11).map_while(|field| field.parse::<u64>().ok());
    Some((name.to_owned(), (times.next()? + times.next()?) * 10_000_000))
}

/// Nanoseconds that a thread waited for a CPU: the second field of `schedstat` (Linux,
/// `Documentation/scheduler/sched-stats.rst`).
fn waited(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

/// The share of `time` in which each vCPU thread of `process` is busy, by name.
pub fn shares(process: u32, time: Duration) -> Result<Vec<(String, f64)>> {
    let vcpus = || -> Result<Vec<Thread>> {
        let mut all = threads(process)?;
        all.retain(|thread| thread.name.starts_with("vcpu"));
        Ok(all)
    };
    let (began, before) = (Instant::now(), vcpus()?);
    ensure!(!before.is_empty(), "the monitor has no thread named vcpu");
    thread::sleep(time);
    let (after, window) = (vcpus()?, began.elapsed().as_nanos() as f64);
    let mut shares: Vec<(String, f64)> = after
        .iter()
        .filter_map(|now| {
            let then = before.iter().find(|then| then.id == now.id)?;
            Some((now.name.clone(), now.busy.saturating_sub(then.busy) as f64 / window))
        })
        .collect();
    shares.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(shares)
}

/// A number of KiB from a file of `Name: number kB` lines.
pub fn kib(path: impl AsRef<Path>, name: &str) -> Result<u64> {
    let path = path.as_ref();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let Some(rest) = text.lines().find_map(|line| line.strip_prefix(name)) else {
        bail!("no {name} in {}", path.display())
    };
    rest.trim().trim_end_matches(" kB").parse().with_context(|| format!("{name} in {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 3 0 100 1 1";
        assert_eq!(parse(stat), Some(("a) b (c".into(), 120_000_000)));
        assert_eq!(parse("42 (x) S 1"), None);
        assert_eq!(waited("1000 250 7\n"), Some(250));
    }

    #[test]
    fn a_thread_that_spins_is_told_from_one_that_sleeps() {
        let named = Arc::new(Barrier::new(3));
        let spin = |name: &str, busy: bool| {
            let named = Arc::clone(&named);
            thread::Builder::new().name(name.into()).spawn(move || {
                named.wait();
                let until = Instant::now() + Duration::from_secs(3);
                while Instant::now() < until {
                    if !busy {
                        thread::sleep(Duration::from_millis(300));
                    }
                }
            })
        };
        let threads = [spin("vcpu0", false).unwrap(), spin("vcpu1", true).unwrap()];
        named.wait();
        let shares = shares(std::process::id(), Duration::from_secs(1)).unwrap();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let [(idle, a), (busy, b)] = &shares[..] else { panic!("{shares:?}") };
        assert_eq!((idle.as_str(), busy.as_str()), ("vcpu0", "vcpu1"));
        assert!(*b > 0.6 && *a < *b - 0.2, "{shares:?}");
    }

    #[test]
    fn sizes_are_read_from_proc() {
        assert!(kib("/proc/meminfo", "MemTotal:").unwrap() > 0);
        assert!(kib("/proc/meminfo", "NoSuchLine:").is_err());
    }
}
