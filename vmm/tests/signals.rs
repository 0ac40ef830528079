// SPDX-License-Identifier: Apache-2.0
//! A signal that comes at any moment ends a run in good order, or does not end it: the program itself, with a
//! terminal of its own, from its first instruction to its last.
//!
//! After each run the terminal is as it was, no process of the run is left, nothing lies in the folder where
//! a fresh TPM keeps its key and image, and the exit code is the documented one. `CVMM_SIGNALS` says how many
//! signals are sent.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use rustix::pty::OpenptFlags;
use rustix::termios::Termios;
use rustix::termios::tcgetattr;
use test_support::code::out;
use test_support::code::power_off;
use test_support::monitor::kvm;
use test_support::tiny;

/// Numbers of Linux on x86-64, signal(7). Signals that end programs which do not expect them. Users, shells,
/// terminals, service managers and their watchdogs send them.
const ENDING: [i32; 18] = [
    2,  // SIGINT
    15, // SIGTERM
    1,  // SIGHUP
    3,  // SIGQUIT
    6,  // SIGABRT
    10, // SIGUSR1
    12, // SIGUSR2
    14, // SIGALRM
    26, // SIGVTALRM
    24, // SIGXCPU
    27, // SIGPROF
    29, // SIGIO
    30, // SIGPWR
    16, // SIGSTKFLT
    5,  // SIGTRAP
    35, 50, 64, // SIGRTMIN+1 to SIGRTMAX
];
/// Signals that must change nothing. The last is SIGRTMIN, which the monitor uses itself.
const HARMLESS: [i32; 7] = [
    18, // SIGCONT
    28, // SIGWINCH
    17, // SIGCHLD
    23, // SIGURG
    13, // SIGPIPE
    XFSZ, 34,
];
const XFSZ: i32 = 25;
const TERM: i32 = 15;
const RTMIN: i32 = 34;
/// Marks the processes of a run: children inherit it.
const MARK: &str = "CVMM_SIGNAL_TEST";
/// No run takes longer than this after its signal.
const PATIENCE: Duration = Duration::from_secs(60);

/// A kind of run.
struct Kind {
    name: &'static str,
    /// The guest's code.
    code: Vec<u8>,
    options: &'static [&'static str],
    /// Exit code if nobody disturbs it; `None`: only a signal ends it.
    alone: Option<i32>,
}

fn kinds() -> Vec<Kind> {
    // mov ecx, COUNT; dec ecx; jnz back to it
    let delay = [0xb9, 0, 0, 4, 0, 0xff, 0xc9, 0x75, 0xfc];
    let spin = [0xeb, 0xfe];
    let text = [out(0x3f8, b'u'), out(0x3f8, b'p')].concat();
    let reset = [&text[..], &delay, &out(0xcf9, 6), &spin].concat();
    vec![
        Kind {
            name: "a guest that switches itself off",
            code: [&text[..], &delay, &power_off()].concat(),
            options: &[],
            alone: Some(0),
        },
        Kind { name: "a guest without an end", code: [&text[..], &spin].concat(), options: &[], alone: None },
        Kind {
            name: "a guest that resets",
            code: reset.clone(),
            options: &["--on-reboot", "restart", "--max-lives", "2"],
            alone: Some(3),
        },
        Kind {
            name: "a guest with a TPM",
            code: [&text[..], &delay, &power_off()].concat(),
            options: &["--vtpm"],
            alone: Some(0),
        },
        Kind {
            name: "a guest with a TPM that resets",
            code: reset,
            options: &["--vtpm", "--on-reboot", "restart", "--max-lives", "2"],
            alone: Some(3),
        },
    ]
}

/// Folders and files of all runs.
struct Place {
    folder: tempfile::TempDir,
    terminal: OwnedFd,
    /// Keeps the terminal's other side open and empties it.
    _reader: std::thread::JoinHandle<()>,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("run")).unwrap();
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let terminal = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while rustix::io::read(&master, &mut buffer).is_ok() {}
        });
        Place { folder, terminal, _reader: reader }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// Starts a run in a session of its own, whose terminal is ours.
    fn start(&self, kind: &Kind, mark: &str) -> Child {
        let guest = self.path("guest");
        fs::write(&guest, tiny::kernel(&kind.code)).unwrap();
        Command::new("setsid")
            .args(["--ctty", env!("CARGO_BIN_EXE_cvmm"), "--memory", "128M", "--kernel"])
            .arg(&guest)
            .args(kind.options)
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("TMPDIR", self.path("run"))
            .env(MARK, mark)
            .current_dir(self.folder.path())
            .stdin(Stdio::from(self.terminal.try_clone().unwrap()))
            .stdout(Stdio::from(self.terminal.try_clone().unwrap()))
            .stderr(File::create(self.path("messages")).unwrap())
            .spawn()
            .unwrap()
    }

    /// Waits until the run has the terminal.
    fn wait_for_raw_mode(&self, before: &Termios) {
        let begun = Instant::now();
        while alike(before, &tcgetattr(&self.terminal).unwrap()) {
            assert!(begun.elapsed() < PATIENCE, "the terminal was never in raw mode: {}", self.messages());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn messages(&self) -> String {
        fs::read_to_string(self.path("messages")).unwrap_or_default()
    }

    fn left_files(&self) -> Vec<String> {
        let names = fs::read_dir(self.path("run")).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// Processes of the run that still live.
fn left_processes(mark: &str) -> Vec<String> {
    let wanted = format!("{MARK}={mark}");
    let mut left = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|line| line == wanted.as_bytes()) {
            left.push(fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim().to_owned());
        }
    }
    left
}

fn wait(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

fn send(child: &Child, signal: i32) {
    // One that has ended already is a zombie until it is waited for, so the number is nobody else's.
    let sent = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status().unwrap();
    assert!(sent.success(), "signal {signal}: {sent}");
}

/// Numbers that look random and are the same in each run (Marsaglia's xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}

/// Whether two terminals are set alike, in what raw mode changes.
fn alike(a: &Termios, b: &Termios) -> bool {
    (a.input_modes, a.output_modes, a.local_modes) == (b.input_modes, b.output_modes, b.local_modes)
}

/// Each of them while the guest has the terminal; the harmless ones first, to one guest.
#[test]
fn every_signal_that_ends_programs_gives_the_terminal_back() {
    if kvm().is_none() {
        return;
    }
    let place = Place::new();
    let before = tcgetattr(&place.terminal).unwrap();
    let kind = kinds().into_iter().find(|kind| kind.alone.is_none()).unwrap();
    let harmless = HARMLESS.to_vec();
    let before_the_end = ENDING.iter().map(|last| if *last == TERM { &harmless[..] } else { &[] });
    for (last, others) in ENDING.into_iter().zip(before_the_end) {
        let mut child = place.start(&kind, "each");
        place.wait_for_raw_mode(&before);
        others.iter().for_each(|signal| send(&child, *signal));
        if !others.is_empty() {
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(child.try_wait().unwrap(), None, "{}", place.messages());
        }
        send(&child, last);
        let status = wait(&mut child);
        assert_eq!(status.and_then(|s| s.code()), Some(128 + last), "{last}: {}", place.messages());
        assert!(
            alike(&before, &tcgetattr(&place.terminal).unwrap()),
            "{last}: the terminal is not as it was"
        );
        assert_eq!(left_processes("each"), [] as [&str; 0], "{last}: {}", place.messages());
    }
}

#[test]
fn signals_at_any_moment_leave_nothing_behind() {
    if kvm().is_none() {
        return;
    }
    let has_service = Path::new(env!("CARGO_BIN_EXE_cvmm")).with_file_name("vtpm-svc").exists();
    if !has_service {
        eprintln!("SKIPPED in part: vtpm-svc is not built, so no guest has a TPM");
    }
    let count: u64 = std::env::var("CVMM_SIGNALS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let place = Place::new();
    let before = tcgetattr(&place.terminal).unwrap();
    let kinds: Vec<Kind> =
        kinds().into_iter().filter(|kind| has_service || !kind.options.contains(&"--vtpm")).collect();
    // How long each takes when nobody disturbs it, or until it is up.
    let spans: Vec<Duration> = kinds
        .iter()
        .map(|kind| {
            let begun = Instant::now();
            let mut child = place.start(kind, "undisturbed");
            let Some(code) = kind.alone else {
                // Else nothing below would say anything about the terminal.
                place.wait_for_raw_mode(&before);
                send(&child, TERM);
                assert_eq!(wait(&mut child).and_then(|status| status.code()), Some(143), "{}", kind.name);
                return 2 * begun.elapsed();
            };
            let status = wait(&mut child);
            assert_eq!(status.and_then(|s| s.code()), Some(code), "{}: {}", kind.name, place.messages());
            begun.elapsed()
        })
        .collect();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for round in 0..count {
        let at = dice.below(kinds.len() as u64) as usize;
        let (kind, span) = (&kinds[at], spans[at]);
        let all: Vec<i32> = ENDING.into_iter().chain(HARMLESS).collect();
        let signal = all[dice.below(all.len() as u64) as usize];
        let moment = Duration::from_micros(dice.below(span.as_micros() as u64 * 11 / 10));
        let what = format!("round {round}: {}, signal {signal} after {moment:?}", kind.name);
        let mark = round.to_string();
        let mut child = place.start(kind, &mark);
        std::thread::sleep(moment);
        send(&child, signal);
        let ends = ENDING.contains(&signal);
        let mut expected = vec![kind.alone];
        if ends {
            expected.push(Some(128 + signal));
        } else if kind.alone.is_none() {
            std::thread::sleep(Duration::from_millis(300));
            send(&child, TERM);
            expected.push(Some(143));
        }
        let status =
            wait(&mut child).unwrap_or_else(|| panic!("{what}: it does not end: {}", place.messages()));
        // Before the program catches it a signal ends it as it ends any program: for a shell the exit code is
        // the same.
        let code = status.code().or_else(|| status.signal().map(|number| 128 + number));
        if [XFSZ, RTMIN].contains(&signal) && status.signal() == Some(signal) {
            // The program has not said yet that it does not mind; nobody but this test sends these to others.
            assert!(moment < Duration::from_millis(100), "{what}: ended with {status}: {}", place.messages());
            continue;
        }
        assert!(expected.contains(&code), "{what}: ended with {status}: {}", place.messages());
        assert!(
            alike(&before, &tcgetattr(&place.terminal).unwrap()),
            "{what}: the terminal is not as it was"
        );
        let patience = Instant::now() + Duration::from_secs(5);
        while !left_processes(&mark).is_empty() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(left_processes(&mark), [] as [&str; 0], "{what}: {}", place.messages());
        assert_eq!(place.left_files(), [] as [&str; 0], "{what}: {}", place.messages());
    }
}
