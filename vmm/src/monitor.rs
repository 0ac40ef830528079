// SPDX-License-Identifier: Apache-2.0
//! The walk of the main job: plan, digest, platform, vCPU threads, end.

use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::mpsc::Sender;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use devices::serial::Serial;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use vmm_sys_util::signal::Killable;
use vmm_sys_util::signal::SIGRTMIN;

use crate::certs::Certificates;
use crate::conversion::Conversions;
use crate::launch;
use crate::launch::LaunchError;
use crate::launch::LaunchOptions;
use crate::launch::Prepared;
use crate::launch::Staged;
use crate::machine::Machine;
use crate::machine::MachineError;
use crate::memory::GuestRam;
use crate::outcome::Outcome;
use crate::platform::CallError;
use crate::platform::Platform;
use crate::platform::Vcpu;
use crate::platform::VmKind;
use crate::terminal;
use crate::terminal::RawMode;
use crate::terminal::Typed;
use crate::vcpu;
use crate::vcpu::RunError;
use crate::vcpu::Shared;

/// How long the monitor waits for vCPU threads to notice that the guest is over. They may be stuck writing to a terminal
/// that nobody reads; the process ends all the same.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a vCPU thread is told again: a signal that arrives just before `KVM_RUN` is lost.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// A guest that is ready to be created.
pub struct Guest {
    /// What enters it.
    pub plan: snp::plan::LaunchPlan,
    /// RAM: guest-physical address and bytes of each range.
    pub ram: Vec<(u64, u64)>,
    /// CPUID of each vCPU.
    pub cpuid: Vec<Vec<kvm_bindings::kvm_cpuid_entry2>>,
    /// How to launch it as an SNP guest; `None` for a plain one.
    pub snp: Option<LaunchOptions>,
    /// What an SNP guest finds in shared memory when it starts.
    pub staged: Staged,
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// A KVM call while the VM was put together.
    #[error("{step}: {source}")]
    Create {
        /// What was being done.
        step: &'static str,
        /// What failed.
        source: CallError,
    },
    /// No host memory.
    #[error("cannot reserve guest RAM: {0}")]
    Ram(io::Error),
    /// Devices.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The launch.
    #[error("launch failed: {0}")]
    Launch(#[from] LaunchError),
    /// A vCPU.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The terminal.
    #[error("cannot switch the terminal to raw mode: {0}")]
    Terminal(io::Error),
    /// Threads or signals.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What failed.
        source: io::Error,
    },
}

enum Event {
    Ended(Result<Outcome, RunError>),
    Signal(i32),
}

/// Creates `guest` on `platform` and runs it to its end. What the guest writes to its console goes to `console`;
/// `interactive` connects standard input to it.
pub fn run(
    platform: &dyn Platform,
    guest: Guest,
    console: Box<dyn Write + Send>,
    interactive: bool,
) -> Result<Outcome, MonitorError> {
    let create = |step| move |source| MonitorError::Create { step, source };
    // Signals are caught from here on, so that one that arrives during the launch is not lost.
    let signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|source| MonitorError::Host { what: "cannot catch signals", source })?;

    let kind = if guest.snp.is_some() { VmKind::Snp } else { VmKind::Plain };
    let vm = platform.create_vm(kind).map_err(create("creating the VM"))?;
    vm.create_irqchip().map_err(create("creating the interrupt controllers"))?;
    if guest.snp.is_some() {
        launch::init_snp(vm.as_ref(), &guest.plan)?;
    }
    let ram = GuestRam::new(guest.ram).map_err(MonitorError::Ram)?;
    let memfds = launch::add_memory(vm.as_ref(), &ram, guest.snp.is_some())?;
    let mut vcpus = Vec::new();
    for (id, cpuid) in (0u32..).zip(&guest.cpuid) {
        let mut vcpu = vm.create_vcpu(id).map_err(create("creating a vCPU"))?;
        vcpu.set_cpuid(cpuid).map_err(create("setting a vCPU's CPUID"))?;
        vcpu.set_lint().map_err(create("setting a vCPU's APIC"))?;
        vcpus.push(vcpu);
    }
    let machine = Machine::new(vm.as_ref(), console)?;
    let conversions = match &guest.snp {
        None => {
            launch::load_plain(&guest.plan, &ram, &mut vcpus)?;
            None
        }
        Some(options) => {
            let prepared = Prepared {
                vm: vm.as_ref(),
                plan: &guest.plan,
                staged: &guest.staged,
                ram: &ram,
                vcpus: &mut vcpus,
                cpuid: &guest.cpuid,
            };
            if let Some(diff) = launch::launch_snp(prepared, options)? {
                eprintln!(
                    "cvmm: warning: --accept-cpuid: launched with the firmware's CPUID values:\n{diff}"
                );
            }
            Some(Conversions::new(Arc::clone(&vm), ram.clone(), memfds, &guest.staged.shared))
        }
    };
    let table = platform.certificates().filter(|_| guest.snp.is_some());
    let certificates = match table {
        None => None,
        Some(table) => {
            vm.snp_enable_req_certs().map_err(|source| LaunchError::Sev {
                step: "offering certificates to the guest".into(),
                source,
            })?;
            Some(Certificates::new(table, ram))
        }
    };
    // The plan's buffers hold the kernel and the initrd; the guest has its own copy now.
    drop(guest.plan);
    drop(guest.staged);

    let serial = Arc::clone(&machine.serial);
    let shared = Arc::new(Shared { machine, conversions, certificates, stop: AtomicBool::new(false) });
    let (events, inbox) = mpsc::channel();
    spawn_signals(signals, events.clone())?;
    let _raw = if interactive { RawMode::enter().map_err(MonitorError::Terminal)? } else { None };
    if interactive {
        spawn_input(serial, _raw.is_some(), events.clone())?;
    }
    let threads = start(vcpus, &shared, &events)?;
    let event = inbox.recv();
    stop(threads, &shared);
    match event {
        Ok(Event::Ended(result)) => Ok(result?),
        Ok(Event::Signal(signal)) => Ok(Outcome::Signal(signal)),
        Err(e) => Err(MonitorError::Host { what: "all threads ended", source: io::Error::other(e) }),
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, MonitorError> {
    thread::Builder::new()
        .name(name)
        .stack_size(256 << 10)
        .spawn(body)
        .map_err(|source| MonitorError::Host { what: "cannot start a thread", source })
}

fn spawn_signals(mut signals: Signals, events: Sender<Event>) -> Result<(), MonitorError> {
    spawn("signals".into(), move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

fn spawn_input(
    serial: Arc<Mutex<Serial>>,
    terminal: bool,
    events: Sender<Event>,
) -> Result<(), MonitorError> {
    spawn("input".into(), move || {
        terminal::read_input(terminal, |typed| match typed {
            Typed::Quit => {
                let _ = events.send(Event::Signal(SIGINT));
                false
            }
            Typed::Bytes(bytes) => {
                let mut rest = bytes.as_slice();
                while !rest.is_empty() {
                    let taken = serial.lock().unwrap_or_else(PoisonError::into_inner).receive(rest);
                    rest = rest.get(taken..).unwrap_or_default();
                    if taken == 0 {
                        // The guest's FIFO is full: wait for it to read.
                        thread::sleep(Duration::from_millis(2));
                    }
                }
                true
            }
        });
    })?;
    Ok(())
}

fn start(
    vcpus: Vec<Box<dyn Vcpu>>,
    shared: &Arc<Shared>,
    events: &Sender<Event>,
) -> Result<Vec<JoinHandle<()>>, MonitorError> {
    extern "C" fn interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    vmm_sys_util::signal::register_signal_handler(SIGRTMIN(), interrupt).map_err(|e| MonitorError::Host {
        what: "cannot set the signal that interrupts vCPUs",
        source: io::Error::from_raw_os_error(e.errno()),
    })?;
    let mut threads = Vec::new();
    for (id, mut vcpu) in (0u32..).zip(vcpus) {
        let (shared, events) = (Arc::clone(shared), events.clone());
        threads.push(spawn(format!("vcpu{id}"), move || {
            let ended = match vcpu::run(id, vcpu.as_mut(), &shared) {
                Ok(None) => return,
                Ok(Some(outcome)) => Ok(outcome),
                Err(e) => Err(e),
            };
            let _ = events.send(Event::Ended(ended));
        })?);
    }
    Ok(threads)
}

fn stop(threads: Vec<JoinHandle<()>>, shared: &Shared) {
    shared.stop.store(true, Ordering::Release);
    let deadline = Instant::now() + STOP_TIMEOUT;
    while Instant::now() < deadline && threads.iter().any(|t| !t.is_finished()) {
        for thread in threads.iter().filter(|t| !t.is_finished()) {
            let _ = thread.kill(SIGRTMIN());
        }
        thread::sleep(KICK_INTERVAL);
    }
}

/// The guest's console output: standard output, each byte at once.
pub struct Console;

impl Write for Console {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), buf)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
