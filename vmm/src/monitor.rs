// SPDX-License-Identifier: Apache-2.0
//! The walk of the main job: a guest's lives, one VM after the other, and what outlives each of them: signals, the terminal, and
//! companions such as a TPM.

use std::error::Error;
use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use devices::serial::Serial;
use signal_hook::consts::SIGINT;
use snp::board::Board;
use snp::digest::Measured;
use snp::plan::LaunchPlan;
use snp_model::patch::CodeHints;

use crate::certs::Source;
use crate::events::Event;
use crate::events::Inbox;
use crate::events::Unattended;
use crate::launch::LaunchError;
use crate::launch::LaunchOptions;
use crate::launch::Staged;
use crate::life;
use crate::life::spawn;
use crate::machine::Machine;
use crate::machine::MachineError;
use crate::note::note;
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
    /// What enters it, and how.
    pub load: Load,
    /// The machine that it runs on.
    pub board: Board,
    /// RAM, and what firmware has beside it: guest-physical address and bytes of each range.
    pub ram: Vec<(u64, u64)>,
    /// CPUID of each vCPU.
    pub cpuid: Vec<Vec<kvm_bindings::kvm_cpuid_entry2>>,
}

/// What enters a guest.
pub enum Load {
    /// A plan that is copied into the memory of a plain guest.
    Plain(LaunchPlan),
    /// The launch of an SNP guest.
    Snp(Box<SnpLaunch>),
}

/// The launch of an SNP guest.
pub struct SnpLaunch {
    /// What is launched.
    pub measured: Measured,
    /// How.
    pub options: LaunchOptions,
    /// What it finds in shared memory when it starts.
    pub staged: Staged,
    /// For the emulated platform: what is known of its code.
    pub code: CodeHints,
}

impl Guest {
    /// Lets go of everything that only a launch needs: kernel and initrd, of which the guest has its own copy by then.
    fn forget_contents(&mut self) {
        match &mut self.load {
            Load::Plain(plan) => plan.records = Vec::new(),
            Load::Snp(snp) => {
                snp.measured.forget_contents();
                snp.staged = Staged::default();
            }
        }
    }

    /// The launch, if it is an SNP guest.
    pub fn snp(&self) -> Option<&SnpLaunch> {
        match &self.load {
            Load::Plain(_) => None,
            Load::Snp(snp) => Some(snp),
        }
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
    /// Where signals arrive, if they are caught already; `None`: the run catches them.
    pub inbox: Option<Inbox>,
}

impl Host {
    /// A host that has a console and nothing else.
    pub fn new(console: Box<dyn Write + Send>) -> Self {
        Host {
            console,
            interactive: false,
            restart: None,
            certificates: None,
            companions: Vec::new(),
            inbox: None,
        }
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

/// What a companion does before a life, in a thread of its own.
pub type Work = Box<dyn FnOnce() -> Result<(), Box<dyn Error + Send + Sync>> + Send>;

/// Something outside of the VM that must start anew with each VM of a guest.
pub trait Companion {
    /// What error messages call it.
    fn name(&self) -> &'static str;
    /// What may take long, or for ever if another process hangs: done before each VM is created, the first (`life` 1) included,
    /// while the monitor listens for signals, and for no longer than the time that is given with it.
    fn prepare(&mut self, _life: u32) -> Option<(Duration, Work)> {
        None
    }
    /// Called when [`Companion::prepare`] has failed: whether another try may go well, because what failed can be replaced. The
    /// companion counts.
    fn recovers(&mut self) -> bool {
        false
    }
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

/// Creates `guest` on `platform` and runs it to its end, in more than one VM if `host` says so.
pub fn run(platform: &dyn Platform, mut guest: Guest, mut host: Host) -> Result<Outcome, MonitorError> {
    let (interactive, restart) = (host.interactive, host.restart);
    // Signals are caught from here on at the latest, so that one that arrives during a launch is not lost.
    let inbox = host.inbox.take().map_or_else(Inbox::open, Ok)?;
    let output = Arc::new(Mutex::new(std::mem::replace(&mut host.console, Box::new(io::sink()))));
    let keyboard = Keyboard::default();
    let mut raw = None;

    let mut life = 1;
    loop {
        let begun = Instant::now();
        if let Some(signal) = prepare(&mut host, life, &inbox).map_err(|e| in_life(life, e))? {
            return Ok(Outcome::Signal(signal));
        }
        let console = SharedConsole::new(&output);
        let booted = life::boot(platform, &guest, Box::new(console.clone()), &mut host, life);
        let booted = booted.map_err(|e| in_life(life, e))?;
        if restart.is_none() {
            guest.forget_contents();
        }
        if interactive && life == 1 {
            if terminal::in_background() {
                note("runs in the background of its terminal, so the guest gets no input from it");
            } else {
                raw = RawMode::enter().map_err(MonitorError::Terminal)?;
                keyboard.listen(raw.is_some(), inbox.sender().clone())?;
            }
        }
        keyboard.connect(Some(Arc::clone(&booted.shared.machine.serial)));
        let running = booted.start(life, inbox.sender())?;
        let outcome = end_of(life, &inbox);
        keyboard.connect(None);
        console.end();
        let stopped = running.stop();
        let outcome = outcome?;
        let Some(restart) =
            restart.filter(|r| outcome == Outcome::Rebooted && r.lives.is_none_or(|n| life < n))
        else {
            drop(raw);
            return Ok(outcome);
        };
        if let Some(signal) = inbox.signal_before(begun + restart.pace) {
            return Ok(Outcome::Signal(signal));
        }
        life = life.saturating_add(1);
        if !stopped {
            return Err(in_life(life, MonitorError::Stuck));
        }
        note(format_args!("the guest asked for a reset: VM number {life} follows"));
    }
}

/// Says of an error of a later life that there were others before.
fn in_life(life: u32, source: MonitorError) -> MonitorError {
    if life > 1 { MonitorError::Restart { life, source: Box::new(source) } } else { source }
}

/// Has each companion get ready for a life. A signal ends that, and the run.
fn prepare(host: &mut Host, life: u32, inbox: &Inbox) -> Result<Option<i32>, MonitorError> {
    for companion in &mut host.companions {
        let name = companion.name();
        while let Some((patience, work)) = companion.prepare(life) {
            let problem = match inbox.attend(name, patience, work) {
                Ok(Ok(())) => break,
                Ok(Err(_)) if companion.recovers() => continue,
                Ok(Err(problem)) => problem,
                Err(Unattended::Signal(signal)) => return Ok(Some(signal)),
                Err(other) => other.into(),
            };
            return Err(MonitorError::Companion { name, problem });
        }
    }
    Ok(None)
}

/// Waits for the end of a life.
fn end_of(life: u32, inbox: &Inbox) -> Result<Outcome, MonitorError> {
    loop {
        match inbox.next()? {
            Event::Ended { life: ended, result } if ended == life => return Ok(result?),
            Event::Ended { .. } | Event::Done => {}
            Event::Signal(signal) => return Ok(Outcome::Signal(signal)),
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

/// How long the guest waits for a console that has no room before it goes on and what it writes is lost.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(10);
const CONSOLE_PAUSE: Duration = Duration::from_millis(5);

/// The console's output, handed to the serial port of each VM in turn.
#[derive(Clone)]
struct SharedConsole {
    out: Arc<Mutex<Box<dyn Write + Send>>>,
    /// The VM is over: nothing is waited for.
    over: Arc<AtomicBool>,
    /// Nobody made room in time, and nobody has since.
    stalled: bool,
}

impl SharedConsole {
    fn new(out: &Arc<Mutex<Box<dyn Write + Send>>>) -> Self {
        SharedConsole { out: Arc::clone(out), over: Arc::default(), stalled: false }
    }

    fn end(&self) {
        self.over.store(true, Ordering::Release);
    }
}

impl Write for SharedConsole {
    /// Waits for room where the output does not do so by itself: somebody else may have made it non-blocking.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        loop {
            let result = out.write(buf);
            let kind = result.as_ref().err().map(io::Error::kind);
            let going_on = !self.over.load(Ordering::Acquire);
            match kind {
                // A vCPU is interrupted for other reasons too.
                Some(io::ErrorKind::Interrupted) if going_on => {}
                Some(io::ErrorKind::WouldBlock) if going_on && !self.stalled => {
                    self.stalled = begun.elapsed() >= CONSOLE_PATIENCE;
                    thread::sleep(CONSOLE_PAUSE);
                }
                _ => {
                    self.stalled &= result.is_err();
                    return result;
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner).flush()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// An output with room for a byte at each third attempt, or never again.
    struct Tight {
        attempts: u32,
        gone: bool,
        got: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Tight {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.attempts += 1;
            match self.attempts % 3 {
                _ if self.gone => Err(io::ErrorKind::WouldBlock.into()),
                0 => {
                    self.got.lock().unwrap().push(buf[0]);
                    Ok(1)
                }
                1 => Err(io::ErrorKind::WouldBlock.into()),
                _ => Err(io::ErrorKind::Interrupted.into()),
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_byte_is_lost_while_the_output_has_no_room_for_a_moment() {
        let got = Arc::new(Mutex::new(Vec::new()));
        let tight = Tight { attempts: 0, gone: false, got: Arc::clone(&got) };
        let out: Arc<Mutex<Box<dyn Write + Send>>> = Arc::new(Mutex::new(Box::new(tight)));
        let mut console = SharedConsole::new(&out);
        console.write_all(b"every byte").unwrap();
        assert_eq!(*got.lock().unwrap(), b"every byte");
    }

    #[test]
    fn an_output_without_a_reader_holds_no_vcpu_of_a_guest_that_is_over() {
        let tight = Tight { attempts: 0, gone: true, got: Arc::default() };
        let out: Arc<Mutex<Box<dyn Write + Send>>> = Arc::new(Mutex::new(Box::new(tight)));
        let mut console = SharedConsole::new(&out);
        let ender = console.clone();
        let begun = Instant::now();
        let waiting = thread::spawn(move || console.write(b"x").is_err());
        thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished(), "it waits for a reader");
        ender.end();
        assert!(waiting.join().unwrap());
        assert!(begun.elapsed() < CONSOLE_PATIENCE);
    }
}
