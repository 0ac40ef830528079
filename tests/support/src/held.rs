// SPDX-License-Identifier: Apache-2.0
//! What a process can leak: descriptors, threads, memory.

use std::time::Duration;
use std::time::Instant;

/// What the process holds.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// File descriptors.
    pub descriptors: usize,
    /// Threads of the monitor.
    pub threads: usize,
    /// Those of them that run a vCPU.
    pub vcpus: usize,
    /// Memory that is resident.
    pub rss_kib: u64,
}

/// What the process holds now that no guest runs. A thread that was joined stays in the table of tasks for a
/// moment longer.
pub fn held() -> Held {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let held = count();
        if held.vcpus == 0 || Instant::now() >= deadline {
            return held;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn count() -> Held {
    // Threads of the test harness come and go.
    let ours = |name: &String| name.starts_with("vcpu") || ["signals\n", "input\n"].contains(&name.as_str());
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let names: Vec<String> = names.filter(ours).collect();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    Held {
        descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        threads: names.len(),
        vcpus: names.iter().filter(|name| name.starts_with("vcpu")).count(),
        rss_kib: line.split_whitespace().nth(1).unwrap().parse().unwrap(),
    }
}
