// SPDX-License-Identifier: Apache-2.0
//! Signals as events: none of them ends the process by itself.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use signal_hook::consts::SIGABRT;
use signal_hook::consts::SIGALRM;
use signal_hook::consts::SIGHUP;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGIO;
use signal_hook::consts::SIGPROF;
use signal_hook::consts::SIGQUIT;
use signal_hook::consts::SIGTERM;
use signal_hook::consts::SIGTRAP;
use signal_hook::consts::SIGUSR1;
use signal_hook::consts::SIGUSR2;
use signal_hook::consts::SIGVTALRM;
use signal_hook::consts::SIGXCPU;
use signal_hook::consts::SIGXFSZ;
use signal_hook::iterator::Handle;
use signal_hook::iterator::Signals;
use vmm_sys_util::signal::SIGRTMIN;

use super::error::MonitorError;
use crate::platform::kvm;
use crate::run::arrival::Arrival;
use crate::threads::spawn;

/// Signals that end the run, beside the real-time ones ([`ending`]). By default they would end the process,
/// and leave the terminal in raw mode and a child behind. Not here are SIGKILL, which nobody can catch, and
/// what a fault of the processor raises (SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGSYS): a handler that returns
/// would meet the fault again.
const ENDING: [i32; 15] = [
    SIGINT,
    SIGTERM,
    SIGHUP,
    SIGQUIT,
    SIGABRT,
    SIGUSR1,
    SIGUSR2,
    SIGALRM,
    SIGVTALRM,
    SIGXCPU,
    SIGPROF,
    SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    SIGTRAP,
];
/// From here on the signal that interrupts vCPUs does nothing else, whoever sends it. Comes before any vCPU
/// starts.
fn catch_interrupts() -> Result<(), MonitorError> {
    vmm_sys_util::signal::register_signal_handler(SIGRTMIN(), kvm::interrupt).map_err(|e| {
        MonitorError::Host {
            what: "cannot set the signal that interrupts vCPUs",
            source: io::Error::from_raw_os_error(e.errno()),
        }
    })
}

/// Signals that end the run. Of the real-time ones the first is this program's own, and those below it are
/// the C library's.
fn ending() -> impl Iterator<Item = i32> {
    ENDING.into_iter().chain(libc::SIGRTMIN() + 1..=libc::SIGRTMAX())
}

/// Turns signals into events until it is dropped.
pub(super) struct SignalThread {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalThread {
    pub(super) fn start(events: Sender<Arrival>) -> Result<Self, MonitorError> {
        let caught = |source| MonitorError::Host { what: "cannot catch signals", source };
        // A limit on the size of files is an error of the write that reaches it, not the guest's end.
        signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).map_err(caught)?;
        let ignored = ignored();
        // Who starts us with nohup wants us to go on.
        // The first real-time signal interrupts vCPUs, and may come from outside as well.
        catch_interrupts()?;
        let heard = ending().filter(|signal| *signal != SIGHUP || ignored >> (SIGHUP - 1) & 1 == 0);
        let mut signals = Signals::new(heard).map_err(caught)?;
        let handle = signals.handle();
        let thread = spawn("signals".into(), move || {
            for signal in signals.forever() {
                if events.send(Arrival::Signal(signal)).is_err() {
                    return;
                }
            }
        })?;
        Ok(SignalThread { handle, thread: Some(thread) })
    }
}

impl Drop for SignalThread {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The signals that this process ignores, bit 0 is signal 1; none if that cannot be found out.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
