// SPDX-License-Identifier: Apache-2.0
//! The walk of the main job: a guest's lives, one VM after the other, and what outlives each of them: signals, the terminal, and
//! companions such as a TPM.

use std::error::Error;
use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::Sender;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use devices::serial::Serial;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Handle;
use signal_hook::iterator::Signals;
use snp::digest::LaunchDigest;
use snp::digest::launch_digest;

use crate::certs::Source;
use crate::launch::LaunchError;
use crate::launch::LaunchOptions;
use crate::launch::Staged;
use crate::life;
use crate::life::spawn;
use crate::machine::Machine;
use crate::machine::MachineError;
use crate::outcome::Outcome;
use crate::platform::CallError;
use crate::platform::Platform;
use crate::platform::Vm;
use crate::terminal;
use crate::terminal::RawMode;
use crate::terminal::Typed;
use crate::vcpu::RunError;

/// How long typed bytes wait for a guest that has no room for them.
const INPUT_PAUSE: Duration = Duration::from_millis(2);

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

impl Guest {
    /// Lets go of everything that only a launch needs: kernel and initrd, of which the guest has its own copy by then.
    fn forget_contents(&mut self) {
        self.plan.records = Vec::new();
        self.staged = Staged::default();
    }

    /// What an SNP guest's reports will show.
    fn digest(&self) -> Result<Option<LaunchDigest>, MonitorError> {
        let digest = self.snp.is_some().then(|| launch_digest(&self.plan)).transpose();
        digest.map_err(|e| MonitorError::Launch(LaunchError::Plan(e)))
    }
}

/// The host's side of a guest.
pub struct Host {
    /// Takes what the guest writes to its console.
    pub console: Box<dyn Write + Send>,
    /// Standard input is the console's keyboard.
    pub interactive: bool,
    /// What follows when the guest asks for a reset; `None`: the run ends.
    pub restart: Option<Restart>,
    /// Certificates that an SNP guest may ask for; `None`: those that the platform knows, if any.
    pub certificates: Option<Source>,
    /// What starts anew with each VM, in this order.
    pub companions: Vec<Box<dyn Companion>>,
}

impl Host {
    /// A host that has a console and nothing else.
    pub fn new(console: Box<dyn Write + Send>) -> Self {
        Host { console, interactive: false, restart: None, certificates: None, companions: Vec::new() }
    }
}

/// A reset is answered by a new VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// How many VMs there may be, the first one included; `None`: any number.
    pub lives: Option<u32>,
    /// Shortest time from one VM's start to the next one's, for guests that do nothing but reset: launches are work for the
    /// one SNP firmware of a host.
    pub pace: Duration,
}

/// Something outside of the VM that must start anew with each VM of a guest.
pub trait Companion {
    /// What error messages call it.
    fn name(&self) -> &'static str;
    /// Called for each VM before its launch, the first (`life` 1) included: resets itself, and puts its devices on the new
    /// machine's buses, its memory into the VM.
    fn before_life(
        &mut self,
        life: u32,
        vm: &dyn Vm,
        machine: &mut Machine,
    ) -> Result<(), Box<dyn Error + Send + Sync>>;
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
    /// Something beside the VM.
    #[error("{name}: {problem}")]
    Companion {
        /// Which one.
        name: &'static str,
        /// What is wrong.
        problem: Box<dyn Error + Send + Sync>,
    },
    /// The launch.
    #[error("launch failed: {0}")]
    Launch(#[from] LaunchError),
    /// A vCPU.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The VM that should follow a reset.
    #[error("the guest asked for a reset, and its VM number {life} could not follow: {source}")]
    Restart {
        /// Counted from 1.
        life: u32,
        /// What failed.
        source: Box<MonitorError>,
    },
    /// A VM that must be gone before the next one is there.
    #[error("a vCPU of the VM before it did not stop")]
    Stuck,
    /// Another guest than before.
    #[error(
        "its launch digest would be {now}, but the first VM's was {first}: the file of the kernel or of the initrd was \
         changed while the guest ran"
    )]
    Digest {
        /// What was launched first.
        first: LaunchDigest,
        /// What would be launched now.
        now: LaunchDigest,
    },
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

/// What the monitor waits for.
pub(crate) enum Event {
    /// A vCPU says how the guest ended.
    Ended {
        /// In which life: several vCPUs may say so, and only the first is heard.
        life: u32,
        /// How.
        result: Result<Outcome, RunError>,
    },
    /// The process was told to stop.
    Signal(i32),
}

/// Creates `guest` on `platform` and runs it to its end, in more than one VM if `host` says so.
pub fn run(platform: &dyn Platform, mut guest: Guest, mut host: Host) -> Result<Outcome, MonitorError> {
    let (interactive, restart) = (host.interactive, host.restart);
    let (events, inbox) = mpsc::channel();
    // Signals are caught from here on, so that one that arrives during a launch is not lost.
    let _signals = SignalThread::start(events.clone())?;
    let console =
        SharedConsole(Arc::new(Mutex::new(std::mem::replace(&mut host.console, Box::new(io::sink())))));
    let keyboard = Keyboard::default();
    let mut raw = None;
    let digest = if restart.is_some() { guest.digest()? } else { None };

    let mut life = 1;
    loop {
        let begun = Instant::now();
        let output = Box::new(console.clone());
        let booted = life::boot(platform, &guest, output, &mut host, life);
        let booted = booted.map_err(|e| in_life(life, e))?;
        if restart.is_none() {
            guest.forget_contents();
        }
        if interactive && life == 1 {
            raw = RawMode::enter().map_err(MonitorError::Terminal)?;
            keyboard.listen(raw.is_some(), events.clone())?;
        }
        keyboard.connect(Some(Arc::clone(&booted.shared.machine.serial)));
        let running = booted.start(life, &events)?;
        let outcome = end_of(life, &inbox);
        keyboard.connect(None);
        let stopped = running.stop();
        let outcome = outcome?;
        let Some(restart) =
            restart.filter(|r| outcome == Outcome::Rebooted && r.lives.is_none_or(|n| life < n))
        else {
            drop(raw);
            return Ok(outcome);
        };
        if let Some(signal) = signal_before(begun + restart.pace, &inbox) {
            return Ok(Outcome::Signal(signal));
        }
        life = life.saturating_add(1);
        let next = if stopped { same_guest(&guest, digest) } else { Err(MonitorError::Stuck) };
        next.map_err(|e| in_life(life, e))?;
        eprintln!("cvmm: the guest asked for a reset: VM number {life} follows");
    }
}

/// Says of an error of a later life that there were others before.
fn in_life(life: u32, source: MonitorError) -> MonitorError {
    if life > 1 { MonitorError::Restart { life, source: Box::new(source) } } else { source }
}

/// The plan must still be what was launched first: parts of it may be files.
fn same_guest(guest: &Guest, first: Option<LaunchDigest>) -> Result<(), MonitorError> {
    match (first, guest.digest()?) {
        (Some(first), Some(now)) if first != now => Err(MonitorError::Digest { first, now }),
        _ => Ok(()),
    }
}

/// Waits for the end of a life.
fn end_of(life: u32, inbox: &Receiver<Event>) -> Result<Outcome, MonitorError> {
    loop {
        match inbox.recv() {
            Ok(Event::Ended { life: ended, result }) if ended == life => return Ok(result?),
            Ok(Event::Ended { .. }) => {}
            Ok(Event::Signal(signal)) => return Ok(Outcome::Signal(signal)),
            Err(e) => {
                return Err(MonitorError::Host { what: "all threads ended", source: io::Error::other(e) });
            }
        }
    }
}

/// Waits until `deadline`, or for a signal.
fn signal_before(deadline: Instant, inbox: &Receiver<Event>) -> Option<i32> {
    loop {
        match inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Signal(signal)) => return Some(signal),
            Ok(Event::Ended { .. }) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// Turns signals into events until it is dropped.
struct SignalThread {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalThread {
    fn start(events: Sender<Event>) -> Result<Self, MonitorError> {
        let mut signals = Signals::new([SIGINT, SIGTERM])
            .map_err(|source| MonitorError::Host { what: "cannot catch signals", source })?;
        let handle = signals.handle();
        let thread = spawn("signals".into(), move || {
            for signal in signals.forever() {
                if events.send(Event::Signal(signal)).is_err() {
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

/// Standard input, connected to the serial port of whatever VM there is.
#[derive(Clone, Default)]
struct Keyboard(Arc<Mutex<Option<Arc<Mutex<Serial>>>>>);

impl Keyboard {
    fn connect(&self, serial: Option<Arc<Mutex<Serial>>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = serial;
    }

    /// Offers bytes to the guest; returns how many it took, none between two VMs.
    fn offer(&self, bytes: &[u8]) -> usize {
        let serial = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        serial.map_or(0, |s| s.lock().unwrap_or_else(PoisonError::into_inner).receive(bytes))
    }

    /// Reads standard input in a thread, until its end.
    fn listen(&self, terminal: bool, events: Sender<Event>) -> Result<(), MonitorError> {
        let keyboard = self.clone();
        spawn("input".into(), move || {
            terminal::read_input(terminal, |typed| match typed {
                Typed::Quit => {
                    let _ = events.send(Event::Signal(SIGINT));
                    false
                }
                Typed::Bytes(bytes) => {
                    let mut rest = bytes.as_slice();
                    while !rest.is_empty() {
                        let taken = keyboard.offer(rest);
                        rest = rest.get(taken..).unwrap_or_default();
                        if taken == 0 {
                            // The guest's FIFO is full, or there is no guest: wait for it to read.
                            thread::sleep(INPUT_PAUSE);
                        }
                    }
                    true
                }
            });
        })?;
        Ok(())
    }
}

/// The console's output, handed to the serial port of each VM in turn.
#[derive(Clone)]
struct SharedConsole(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for SharedConsole {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
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
