// SPDX-License-Identifier: Apache-2.0
//! A guest that does nothing but ask: console bytes, presence requests, NV writes and resets, as fast as it
//! can, while nobody reads what the monitor prints, or nobody can.
//!
//! The guest may use its own time and its own memory. What it makes the host do has bounds (`docs/vtpm.md`),
//! and this measures them from outside: stores of the state image, lines in the log, memory, threads and
//! descriptors of both processes; and that the run still hears a signal. `CVMM_FLOOD_SECONDS` says how long,
//! for each way of not being read.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::fs::File;
use std::io::PipeReader;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use test_support::code::out;
use test_support::monitor::kvm;
use test_support::tiny;

/// The TPM's registers, its buffer, and those of the presence interface.
const CRB: u32 = 0xfed4_0000;
const BUFFER: u32 = 0xfed4_6000;
const PRESENCE: u32 = 0xfed4_5000;
/// Most stores of the image: at once, and in a second after that (`docs/vtpm.md`).
const STORES: (u64, u64) = (500, 50);
/// Stores that a reset takes: power-off, power-on, and what the monitor asks the TPM for.
const STORES_OF_A_RESET: u64 = 8;
/// Log lines of a guest: at once, and one in so many seconds.
const LINES: (u64, u64) = (20, 10);
/// Lines of a reset, and of start and end.
const LINES_OF_A_RESET: u64 = 2;
const OTHER_LINES: u64 = 20;
/// What memory may grow by while the flood goes on, in KiB.
const GROWTH: u64 = 16 << 10;

/// `mov ebx, address; mov dword [rbx], value`
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xbb][..], &address.to_le_bytes(), &[0xc7, 0x03], &value.to_le_bytes()].concat()
}

/// Has the TPM carry out a command, and waits until it has.
fn tpm(command: &[u8]) -> Vec<u8> {
    let mut code = [store(CRB + 0x08, 1), store(CRB + 0x40, 1)].concat();
    for (at, word) in (0..).step_by(4).zip(command.chunks(4)) {
        let mut bytes = [0; 4];
        bytes[..word.len()].copy_from_slice(word);
        code.extend(store(BUFFER + at, u32::from_le_bytes(bytes)));
    }
    code.extend(store(CRB + 0x4c, 1));
    code.push(0xbb);
    code.extend((CRB + 0x4c).to_le_bytes());
    // mov eax, [rbx]; test eax, eax; jnz back to the first
    code.extend([0x8b, 0x03, 0x85, 0xc0, 0x75, 0xfa]);
    code
}

/// A command with an empty password for one handle (TPM 2.0 Library, Part 1, 19.4; Part 3, 31).
fn command(code: u32, handles: &[u32], parameters: &[u8]) -> Vec<u8> {
    let mut body = code.to_be_bytes().to_vec();
    handles.iter().for_each(|handle| body.extend(handle.to_be_bytes()));
    body.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0]);
    body.extend(parameters);
    [&[0x80, 0x02][..], &(body.len() as u32 + 6).to_be_bytes(), &body].concat()
}

const OWNER: u32 = 0x4000_0001;
const INDEX: u32 = 0x0150_0020;

/// Defines a counter, then: a byte to the console, two presence requests, an increment; after some rounds a
/// reset.
fn flood() -> Vec<u8> {
    // NV_DefineSpace: no password; a counter that its owner may write and read, exempt from lockout, of eight
    // bytes.
    let public = [0x01, 0x50, 0x00, 0x20, 0x00, 0x0b, 0x02, 0x02, 0x00, 0x12, 0, 0, 0, 8];
    let define = command(0x12a, &[OWNER], &[&[0, 0, 0, 14][..], &public].concat());
    let increment = command(0x134, &[OWNER, INDEX], &[]);
    let mut code = tpm(&define);
    code.extend([0xbf, 200, 0, 0, 0]); // mov edi, 200
    let top = code.len();
    for part in [out(0x3f8, b'x'), store(PRESENCE, 5), store(PRESENCE, 14), tpm(&increment)] {
        code.extend(part);
    }
    code.extend([0xff, 0xcf, 0x0f, 0x85]); // dec edi; jnz to the top
    let back = top as i64 - (code.len() as i64 + 4);
    code.extend((back as i32).to_le_bytes());
    code.extend(out(0xcf9, 6));
    code.extend([0xeb, 0xfe]);
    code
}

/// How an output goes where nobody reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sink {
    Read,
    Blocked,
    Closed,
    Full,
}

impl Sink {
    /// The descriptor, and what keeps it as it is.
    fn open(self, path: &Path) -> (Stdio, Option<PipeReader>) {
        match self {
            Sink::Read => (File::create(path).unwrap().into(), None),
            Sink::Full => (File::options().write(true).open("/dev/full").unwrap().into(), None),
            Sink::Blocked | Sink::Closed => {
                let (reader, writer) = std::io::pipe().unwrap();
                (writer.into(), (self == Sink::Blocked).then_some(reader))
            }
        }
    }
}

struct Site(tempfile::TempDir);

impl Site {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn cvmm(&self) -> Command {
        Command::new(env!("CARGO_BIN_EXE_cvmm"))
    }

    fn with_key(&self, command: &mut Command) {
        command.arg("--key-file").arg(self.path("key")).arg("--anchor").arg(self.path("anchor"));
    }

    fn new() -> Self {
        let site = Site(tempfile::tempdir().unwrap());
        fs::write(site.path("key"), [0xa5; 32]).unwrap();
        fs::set_permissions(site.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(site.path("guest"), tiny::kernel(&flood())).unwrap();
        let mut create = site.cvmm();
        site.with_key(create.args(["vmgs", "create"]).arg(site.path("vmgs")));
        assert!(create.output().unwrap().status.success());
        site
    }

    /// The newest generation of the image, which has to be sound.
    fn generation(&self) -> u64 {
        let mut check = self.cvmm();
        self.with_key(check.args(["vmgs", "check"]).arg(self.path("vmgs")));
        let output = check.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let (_, rest) = text.split_once("generation ").unwrap();
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    }
}

/// KiB of resident memory, threads and descriptors of a process.
fn held(process: u32) -> (u64, usize, usize) {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0u64)
    };
    let descriptors = fs::read_dir(format!("/proc/{process}/fd")).unwrap().count();
    (number("VmRSS:"), number("Threads:") as usize, descriptors)
}

/// The service that this monitor has started.
fn service_of(monitor: u32) -> Option<u32> {
    fs::read_dir(format!("/proc/{monitor}/task")).unwrap().flatten().find_map(|task| {
        let text = fs::read_to_string(task.path().join("children")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    })
}

fn ends(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    None
}

fn withstand(stdout: Sink, stderr: Sink, time: Duration) {
    let site = Site::new();
    let before = site.generation();
    let (out, _kept_out) = stdout.open(&site.path("console"));
    let (err, _kept_err) = stderr.open(&site.path("messages"));
    let mut child = site
        .cvmm()
        .args(["--memory", "128M", "--on-reboot", "restart", "--kernel"])
        .arg(site.path("guest"))
        .arg("--vtpm")
        .arg(site.path("vmgs"))
        .arg("--vtpm-key-file")
        .arg(site.path("key"))
        .arg("--vtpm-anchor")
        .arg(site.path("anchor"))
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .unwrap();
    let what = format!("standard output {stdout:?}, standard error {stderr:?}");
    let begun = Instant::now();
    std::thread::sleep(time / 4);
    let service = service_of(child.id()).unwrap_or_else(|| panic!("{what}: no service"));
    // What is held differs from moment to moment, between two lives above all: the most of an earlier and of
    // a later time.
    let mut most = [[(0, 0, 0); 2]; 2];
    while begun.elapsed() < time {
        assert!(child.try_wait().unwrap().is_none(), "{what}: the run ended by itself");
        let half = usize::from(begun.elapsed() > time * 5 / 8);
        for (most, process) in most[half].iter_mut().zip([child.id(), service]) {
            let (memory, threads, descriptors) = held(process);
            *most = (most.0.max(memory), most.1.max(threads), most.2.max(descriptors));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(service_of(child.id()), Some(service), "{what}: another service");
    let [first, last] = most;
    for ((name, a), b) in ["cvmm", "vtpm-svc"].into_iter().zip(first).zip(last) {
        assert!(b.0 < a.0 + GROWTH, "{what}: {name} grew from {} to {} KiB", a.0, b.0);
        // What lives for a moment may not have been seen the first time.
        assert!(b.1 <= a.1 + 2 && b.2 <= a.2 + 2, "{what}: {name} had {a:?}, has {b:?}");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(ends(&mut child), Some(143), "{what}");
    let seconds = begun.elapsed().as_secs() + 1;
    let stores = site.generation() - before;
    // A life takes a second at least.
    let most = STORES.0 + (STORES.1 + STORES_OF_A_RESET) * seconds;
    assert!(stores > 3 && stores <= most, "{what}: {stores} stores in {seconds} s, expected at most {most}");
    let lines = fs::read_to_string(site.path("messages")).map_or(0, |text| text.lines().count() as u64);
    let most = LINES.0 + seconds / LINES.1 + LINES_OF_A_RESET * seconds + OTHER_LINES;
    assert!(lines <= most, "{what}: {lines} lines in {seconds} s, expected at most {most}");
    if stdout == Sink::Read {
        let bytes = fs::read(site.path("console")).unwrap();
        assert!(
            bytes.len() > 100 && bytes.iter().all(|b| *b == b'x'),
            "{what}: the console has {} bytes",
            bytes.len()
        );
    }
    eprintln!(
        "{what}: {stores} stores and {lines} lines in {seconds} s, {} KiB and {} KiB",
        last[0].0, last[1].0
    );
}

#[test]
fn a_guest_that_floods_takes_no_more_than_its_bounds() {
    if kvm().is_none() {
        return;
    }
    if !Path::new(env!("CARGO_BIN_EXE_cvmm")).with_file_name("vtpm-svc").exists() {
        eprintln!("SKIPPED: vtpm-svc is not built");
        return;
    }
    let seconds = std::env::var("CVMM_FLOOD_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    for (stdout, stderr) in [
        (Sink::Read, Sink::Read),
        (Sink::Blocked, Sink::Blocked),
        (Sink::Closed, Sink::Closed),
        (Sink::Full, Sink::Full),
    ] {
        withstand(stdout, stderr, Duration::from_secs(seconds));
    }
}
