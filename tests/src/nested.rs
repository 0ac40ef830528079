// SPDX-License-Identifier: Apache-2.0
//! The outer guest (L1) of a nested run: a Linux with a working KVM, inside a pure software emulation.
//!
//! It shows cvmm a KVM that runs an unmodified Linux on a machine that has none. One L1 serves many jobs. It
//! sees the host's files read-only and the harness's directory writable, at the same paths. When it hangs or
//! dies, its jobs end as lost with the tail of its console, and the emulator is killed.
//!
//! QEMU shows an AMD CPU and is what the tests use by default. [`bochs`] shows an Intel CPU, for the few
//! tests that ask for one.

pub mod bochs;

use std::collections::HashMap;
use std::fs;
use std::fs::File;
use std::io::BufReader;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use guest_init::frame;
use guest_init::frame::Hello;
use guest_init::frame::Message;
use guest_init::frame::PORT_NAME;
use guest_init::job::Event;
use guest_init::job::Job;

use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::workspace::Workspace;

/// The emulator, from Debian's `qemu-system-x86`.
pub const QEMU: &str = "qemu-system-x86_64";

/// L1 has one CPU. With two of them QEMU's software CPU now and then runs L2 with the wrong memory, or L1 as
/// if it were L2: of some 33 strict runs of 300,000 exits each, 6 ended with a guest that crashed, an L1 that
/// panicked, or one that hung (with QEMU 7.2 and with 10.0); with one CPU, none of 38 did. `CVMM_L1_CPUS`
/// overrides.
const CPUS: &str = "1";

/// QEMU's software CPU loses an interrupt now and then when it enters L2. A timer that has to be set anew for
/// each tick is then dead, and L1 with it; one that ticks by itself is late once.
const PERIODIC_TIMER: &str = "highres=off nohz=off";

/// QEMU warns about features of this model that its software CPU lacks; none of them is needed. Two are taken
/// away: `xsaves`, and `cx16`, because the software CPU of QEMU 7.2 gives an interrupted L2 guest wrong flags
/// after CMPXCHG16B (6 of 8 boots of a 6.12 guest under QEMU's own KVM mode died of it, most in
/// `kmem_cache_alloc`; without it none of 8).
///
/// AVX and what needs it are taken away too. QEMU 7.2 runs an L2 guest's XSETBV without an exit to L1, so
/// L1's KVM answers CPUID 0xd for an XCR0 without AVX, and the guest finds that its XSAVE area has another
/// size. Linux before 6.16 warns and goes on; later ones crash (`fpu__init_system_xstate` in
/// arch/x86/kernel/fpu/xstate.c). Without AVX the sizes are the same, but programs with signal handlers then
/// died in L2 (busybox's shell as init, three times of three), so XSAVE goes as well: guests save their state
/// by FXSAVE. `CVMM_L1_CPU` adds to this.
const CPU: &str = "EPYC-Rome,+svm,+npt,+nrip-save,-xsaves,-cx16,-avx,-avx2,-fma,-f16c,-xsave";

/// Software emulation boots L1 in about 10 s; a busy machine takes longer.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// L1's memory: enough for a 4.5 GiB guest, which touches only part of what it has. `CVMM_L1_MEMORY`
/// overrides.
const MEMORY: &str = "3G";

/// Lines of L1's console in an error message.
const CONSOLE_TAIL: usize = 25;

/// A running L1.
pub struct Nested {
    state: Arc<Mutex<State>>,
    stream: Mutex<File>,
    speed: Speed,
    console: PathBuf,
    hello: Hello,
    boot_time: Duration,
    // Holds the socket; removed with the machine.
    _directory: tempfile::TempDir,
}

/// How an L1 keeps the time limits that jobs have.
#[derive(Clone, Copy)]
struct Speed {
    /// By how much limits are longer than on a usual machine.
    longer: u32,
    /// How much slower than this machine's clock L1's may run.
    slower: u32,
}

struct State {
    emulator: Child,
    jobs: HashMap<u32, Sender<Event>>,
    last_job: u32,
    gone: Option<String>,
}

impl Nested {
    /// Boots L1 and waits until it takes jobs.
    pub fn start(workspace: &Workspace) -> Result<Self> {
        let started = Instant::now();
        let kernel = Kernel::find(workspace, Role::StableGeneric)?;
        let initrd = workspace.initrds().join("l1.cpio");
        if !initrd.exists() {
            bail!("{} is missing: run `cargo xtask setup`", initrd.display());
        }
        let share = workspace.work();
        fs::create_dir_all(&share).with_context(|| format!("cannot create {}", share.display()))?;
        let console = share.join(format!("l1-console-{}.log", std::process::id()));
        // A socket's path is limited to 107 bytes, so it does not go below the workspace.
        let directory = tempfile::tempdir().context("cannot create a temporary directory")?;
        let socket = directory.path().join("agent");
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("cannot bind {}", socket.display()))?;
        let mut qemu = qemu_command(&kernel, &initrd, &share, &console, &socket)
            .spawn()
            .with_context(|| format!("cannot start {QEMU}: install Debian's qemu-system-x86"))?;
        let accept = || listener.accept().map(|(stream, _)| OwnedFd::from(stream));
        listener.set_nonblocking(true)?;
        let connected = connect(accept, &mut qemu, started + BOOT_LIMIT);
        let speed = Speed { longer: 1, slower: 1 };
        Self::serve(qemu, connected, console, directory, started, speed)
    }

    /// Boots an L1 with an Intel CPU under Bochs. It has copies of `files`, at their paths, and no others of
    /// the host's.
    pub fn start_intel(workspace: &Workspace, files: &[PathBuf]) -> Result<Self> {
        let started = Instant::now();
        let work = workspace.work();
        fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
        let console = work.join(format!("l1-intel-console-{}.log", std::process::id()));
        let directory = tempfile::tempdir_in(&work).context("cannot create a temporary directory")?;
        // Bochs connects by TCP only; nothing but this machine reaches the address.
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("cannot listen on 127.0.0.1")?;
        listener.set_nonblocking(true)?;
        let iso = directory.path().join("l1.iso");
        bochs::build_iso(workspace, files, &iso)?;
        let mut emulator = bochs::start(directory.path(), &iso, &console, listener.local_addr()?)?;
        let accept = || {
            let (stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            Ok(OwnedFd::from(stream))
        };
        let connected = connect(accept, &mut emulator, started + bochs::BOOT_LIMIT);
        Self::serve(emulator, connected, console, directory, started, bochs::SPEED)
    }

    /// Begins to hand out the messages of an agent that is connected.
    fn serve(
        mut emulator: Child,
        connected: Result<(File, Hello)>,
        console: PathBuf,
        directory: tempfile::TempDir,
        started: Instant,
        speed: Speed,
    ) -> Result<Self> {
        let (stream, hello) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                let _ = emulator.kill();
                let _ = emulator.wait();
                return Err(error.context(format!("L1 did not come up; its console:\n{}", tail(&console))));
            }
        };
        let state = State { emulator, jobs: HashMap::new(), last_job: 0, gone: None };
        let state = Arc::new(Mutex::new(state));
        let events = stream.try_clone().context("cannot duplicate the agent's socket")?;
        let (readers_state, readers_console) = (Arc::clone(&state), console.clone());
        thread::spawn(move || deliver(events, &readers_state, &readers_console));
        Ok(Nested {
            state,
            stream: Mutex::new(stream),
            speed,
            console,
            hello,
            boot_time: started.elapsed(),
            _directory: directory,
        })
    }

    /// L1's kernel release.
    pub fn kernel(&self) -> &str {
        &self.hello.kernel
    }

    /// Why L1 has no KVM, if it has none.
    pub fn kvm_error(&self) -> Option<&str> {
        self.hello.kvm_error.as_deref()
    }

    /// From starting the emulator to the first message of the agent.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Where L1's console is written.
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// Whether it can take another job.
    pub fn alive(&self) -> bool {
        lock(&self.state).gone.is_none()
    }

    /// Why it cannot take another job.
    pub fn why_gone(&self) -> String {
        lock(&self.state).gone.clone().unwrap_or_else(|| "L1 is still there".into())
    }

    /// The longest that a job with this limit may take on this machine's clock.
    pub fn patience(&self, limit: Duration) -> Duration {
        limit * self.speed.longer * self.speed.slower
    }

    /// Kills the emulator and ends all jobs as lost.
    pub fn give_up(&self, why: &str) {
        lose(&mut lock(&self.state), why, &self.console);
    }

    pub(crate) fn start_job(&self, job: &Job, events: Sender<Event>) -> u32 {
        let number = {
            let mut state = lock(&self.state);
            state.last_job += 1;
            let number = state.last_job;
            if state.gone.is_none() {
                state.jobs.insert(number, events);
            }
            number
        };
        let mut job = job.clone();
        job.limit *= self.speed.longer;
        self.send(number, &Message::Start(job));
        number
    }

    pub(crate) fn signal(&self, job: u32, signal: i32) {
        self.send(job, &Message::Signal(signal));
    }

    pub(crate) fn write_stdin(&self, job: u32, bytes: &[u8]) {
        for chunk in bytes.chunks(frame::MAX_FRAME / 2) {
            self.send(job, &Message::Stdin(chunk.to_vec()));
        }
    }

    fn send(&self, job: u32, message: &Message) {
        let sent = frame::write(&mut *lock(&self.stream), job, message);
        if let Err(error) = sent {
            self.give_up(&format!("cannot send to L1: {error}"));
        }
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let _ = state.emulator.kill();
        let _ = state.emulator.wait();
    }
}

fn qemu_command(kernel: &Kernel, initrd: &Path, share: &Path, console: &Path, socket: &Path) -> Command {
    let memory = std::env::var("CVMM_L1_MEMORY").unwrap_or_else(|_| MEMORY.into());
    let cpus = std::env::var("CVMM_L1_CPUS").unwrap_or_else(|_| CPUS.into());
    let cpu = std::env::var("CVMM_L1_CPU").map_or_else(|_| CPU.into(), |more| format!("{CPU},{more}"));
    let append = format!(
        "console=ttyS0 panic=-1 mitigations=off nokaslr quiet loglevel=4 {PERIODIC_TIMER} cvmm.share={}",
        share.display()
    );
    let mut command = Command::new(std::env::var_os("CVMM_QEMU").unwrap_or_else(|| QEMU.into()));
    command
        .args(["-accel", "tcg", "-M", "q35", "-smp", &cpus, "-m", &memory])
        .args(["-cpu", &cpu])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .arg("-serial")
        .arg(format!("file:{}", comma(console)))
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &append])
        .arg("-virtfs")
        .arg("local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap")
        .arg("-virtfs")
        .arg(format!("local,path={},mount_tag=share,security_model=none,multidevs=remap", comma(share)))
        .args(["-device", "virtio-serial-pci", "-chardev"])
        .arg(format!("socket,id=agent,path={}", comma(socket)))
        .arg("-device")
        .arg(format!("virtserialport,chardev=agent,name={PORT_NAME}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(match File::create(emulator_log(console)) {
            Ok(log) => Stdio::from(log),
            Err(_) => Stdio::null(),
        });
    command
}

/// A path inside a QEMU option: commas are doubled.
fn comma(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Waits for the emulator's connection, then for the agent's first message. `accept` takes a connection, and
/// does not wait for one.
fn connect(
    accept: impl Fn() -> std::io::Result<OwnedFd>,
    emulator: &mut Child,
    deadline: Instant,
) -> Result<(File, Hello)> {
    let stream = loop {
        match accept() {
            Ok(stream) => break File::from(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("accept"),
        }
        wait_a_little(emulator, deadline)?;
    };
    let mut reader = stream.try_clone()?;
    let (sender, first): (_, Receiver<_>) = channel();
    // Read to the byte: what follows the first frame belongs to the reader that is started later.
    thread::spawn(move || sender.send(frame::read(&mut reader)));
    loop {
        match first.try_recv() {
            Ok(Ok((_, Message::Hello(hello)))) => return Ok((stream, hello)),
            Ok(Ok((_, other))) => bail!("the agent began with {other:?}"),
            Ok(Err(error)) => return Err(error).context("the agent's first message"),
            Err(std::sync::mpsc::TryRecvError::Disconnected) => bail!("the agent's first message was lost"),
            Err(std::sync::mpsc::TryRecvError::Empty) => wait_a_little(emulator, deadline)?,
        }
    }
}

fn wait_a_little(emulator: &mut Child, deadline: Instant) -> Result<()> {
    if let Some(status) = emulator.try_wait()? {
        bail!("the emulator ended early: {status}");
    }
    if Instant::now() > deadline {
        bail!("no sign of life within its time limit");
    }
    thread::sleep(Duration::from_millis(20));
    Ok(())
}

/// Hands the agent's messages to the jobs they belong to, until there are no more.
fn deliver(stream: File, state: &Mutex<State>, console: &Path) {
    let mut reader = BufReader::new(stream);
    let why = loop {
        let (number, event) = match frame::read(&mut reader) {
            Ok((number, Message::Stdout(bytes))) => (number, Event::Stdout(bytes)),
            Ok((number, Message::Stderr(bytes))) => (number, Event::Stderr(bytes)),
            Ok((number, Message::Ended(ending, time))) => (number, Event::Ended(ending, time)),
            Ok((_, other)) => break format!("the agent sent {other:?}"),
            Err(error) => break format!("L1 went away: {error}"),
        };
        let mut state = lock(state);
        let over = matches!(event, Event::Ended(..));
        if let Some(job) = state.jobs.get(&number) {
            // A test that stopped listening has seen enough.
            let _ = job.send(event);
        }
        if over {
            state.jobs.remove(&number);
        }
    };
    lose(&mut lock(state), &why, console);
}

fn lose(state: &mut State, why: &str, console: &Path) {
    if state.gone.is_none() {
        let _ = state.emulator.kill();
        let _ = state.emulator.wait();
        state.gone = Some(format!("{why}; last lines of L1's console:\n{}", tail(console)));
    }
    // Dropping the senders is what tells the waiting sides.
    state.jobs.clear();
}

/// Where the emulator's own messages go.
fn emulator_log(console: &Path) -> PathBuf {
    console.with_extension("emulator.log")
}

fn tail(console: &Path) -> String {
    let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).replace('\r', "");
    let (text, emulator) = (read(console), read(&emulator_log(console)));
    let lines: Vec<&str> = text.lines().collect();
    let shown = lines[lines.len().saturating_sub(CONSOLE_TAIL)..].join("\n");
    format!("{shown}\n(emulator: {})", emulator.lines().last().unwrap_or("no message"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
