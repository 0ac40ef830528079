// SPDX-License-Identifier: Apache-2.0
//! The cage, tried from inside: what code that has taken over the TPM engine could call.
//!
//! Each try is a process of its own, started by this program, which closes the cage around itself and makes
//! one call.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::process::Stdio;

use vtpm_svc::sandbox;

/// What becomes of a call.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// The process was ended for it (SIGSYS).
    Killed,
    /// It was answered with this error.
    Error(i32),
    /// It was done.
    Done,
    /// Something else.
    Odd(String),
}

fn call(number: libc::c_long, arguments: &[libc::c_long]) -> io::Result<()> {
    let at = |n: usize| arguments.get(n).copied().unwrap_or(0);
    // SAFETY: a call that the cage should end or refuse; pointers are null or of constants, and the process
    // ends after it.
    let result = unsafe { libc::syscall(number, at(0), at(1), at(2), at(3), at(4)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn text(text: &'static std::ffi::CStr) -> libc::c_long {
    text.as_ptr() as libc::c_long
}

fn number<T: TryInto<libc::c_long>>(value: T) -> libc::c_long {
    value.try_into().unwrap_or(-1)
}

/// A try, by name; `other` is a process outside.
fn attempt(name: &str, other: libc::c_long) -> io::Result<()> {
    use libc::*;
    let (ours, _theirs) = UnixStream::pair()?;
    let s = number(ours.as_raw_fd());
    let fcntl = |command: c_int, value: c_long| call(SYS_fcntl, &[s, number(command), value]);
    let me = number(std::process::id());
    let seccomp = name != "landlock alone: signal" && name != "landlock alone: file";
    if name == "a thread outside" {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || stopped.recv());
        let closed = sandbox::close(true);
        drop(stop);
        // It cannot say why it was woken.
        let _ = thread.join();
        return closed.map(drop).map_err(|_| io::Error::from_raw_os_error(EBUSY));
    }
    sandbox::close(seccomp).map_err(io::Error::other)?;
    match name {
        "what it needs" => {
            let copy = ours.try_clone()?;
            fcntl(F_SETFL, number(O_NONBLOCK))?;
            let thread = std::thread::Builder::new().name("named".into()).spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(1));
                drop(copy);
            })?;
            thread.join().map_err(|_| io::Error::other("the thread"))
        }
        "kill" => call(SYS_kill, &[other, 0]),
        "tkill" => call(SYS_tkill, &[other, 0]),
        "tgkill" => call(SYS_tgkill, &[other, other, 0]),
        "rt_sigqueueinfo" => call(SYS_rt_sigqueueinfo, &[other, number(SIGTERM), 0]),
        "pidfd_open" => call(SYS_pidfd_open, &[other, 0]),
        "fcntl owner" => fcntl(F_SETOWN, other),
        "fcntl owner by struct" => fcntl(15, 0),
        "fcntl signal" => fcntl(10, number(SIGKILL)),
        "fcntl async" => fcntl(F_SETFL, number(O_ASYNC)),
        "fcntl lease" => fcntl(F_SETLEASE, 0),
        "ioctl owner" => call(SYS_ioctl, &[s, 0x8901, 0]),
        "fork" => call(SYS_clone, &[number(SIGCHLD)]),
        "user namespace" => call(SYS_clone, &[number(CLONE_NEWUSER | SIGCHLD)]),
        "thread in a namespace" => call(SYS_clone, &[0x3d_0f00 | number(CLONE_NEWNET)]),
        "clone3" => call(SYS_clone3, &[0, 0]),
        "unshare" => call(SYS_unshare, &[number(CLONE_NEWUSER)]),
        "setns" => call(SYS_setns, &[0, 0]),
        "dumpable" => call(SYS_prctl, &[number(PR_SET_DUMPABLE), 1]),
        "death signal" => call(SYS_prctl, &[number(PR_SET_PDEATHSIG), number(SIGKILL)]),
        "file" => call(SYS_openat, &[number(AT_FDCWD), text(c"/etc/passwd"), 0]),
        "own memory" => call(SYS_openat, &[number(AT_FDCWD), text(c"/proc/self/mem"), 2]),
        "file by openat2" => call(SYS_openat2, &[number(AT_FDCWD), text(c"/etc/passwd"), 0, 24]),
        "remove" => call(SYS_unlink, &[text(c"/tmp/no-such-file")]),
        "memory file" => call(SYS_memfd_create, &[text(c"x"), 0]),
        "exec" => call(SYS_execve, &[text(c"/bin/true"), 0, 0]),
        "socket" => call(SYS_socket, &[number(AF_UNIX), number(SOCK_STREAM), 0]),
        "network" => call(SYS_socket, &[number(AF_INET), number(SOCK_STREAM), 0]),
        "socket pair" => call(SYS_socketpair, &[number(AF_UNIX), number(SOCK_STREAM), 0, 0]),
        "connect" => call(SYS_connect, &[s, 0, 0]),
        "ring" => call(SYS_io_uring_setup, &[1, 0]),
        "code" => call(SYS_mprotect, &[0x1000, 0x1000, number(PROT_READ | PROT_EXEC)]),
        "trace" => call(SYS_ptrace, &[number(PTRACE_TRACEME)]),
        "other memory" => call(SYS_process_vm_readv, &[other, 0, 0, 0, 0]),
        "limits" => call(SYS_prlimit64, &[me, number(RLIMIT_CORE), 0, 0]),
        "landlock alone: signal" => call(SYS_kill, &[other, 0]),
        "landlock alone: file" => call(SYS_openat, &[number(AT_FDCWD), text(c"/etc/passwd"), 0]),
        _ => Err(io::Error::other("no such try")),
    }
}

/// Landlock's version in this kernel.
fn landlock() -> i32 {
    // SAFETY: asks for the version (flag 1); the pointer is not used then.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) as i32 }
}

fn fate(name: &str, other: u32) -> Fate {
    let own = std::env::current_exe().expect("own path");
    let mut c = Command::new(own);
    c.env("CVMM_CAGE_TRY", name).env("CVMM_CAGE_OTHER", other.to_string());
    let out = c.stdin(Stdio::null()).output().expect("run");
    let said = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    match (out.status.code(), out.status.signal()) {
        (_, Some(libc::SIGSYS)) => Fate::Killed,
        (Some(0), _) => Fate::Done,
        (Some(1), _) => said.parse().map_or_else(|_| Fate::Odd(said.clone()), Fate::Error),
        _ => Fate::Odd(format!("{}: {said}", out.status)),
    }
}

fn main() {
    if let Ok(name) = std::env::var("CVMM_CAGE_TRY") {
        let other = std::env::var("CVMM_CAGE_OTHER").ok().and_then(|n| n.parse().ok()).unwrap_or(-1);
        match attempt(&name, other) {
            Ok(()) => std::process::exit(0),
            Err(e) => {
                println!("{}", e.raw_os_error().map_or_else(|| e.to_string(), |n| n.to_string()));
                std::process::exit(1)
            }
        }
    }
    let killed = [
        "kill",
        "tkill",
        "tgkill",
        "rt_sigqueueinfo",
        "pidfd_open",
        "fcntl owner",
        "fcntl owner by struct",
        "fcntl signal",
        "fcntl async",
        "fcntl lease",
        "ioctl owner",
        "fork",
        "user namespace",
        "thread in a namespace",
        "unshare",
        "setns",
        "dumpable",
        "death signal",
        "file by openat2",
        "remove",
        "memory file",
        "exec",
        "socket",
        "network",
        "socket pair",
        "connect",
        "ring",
        "code",
        "trace",
        "other memory",
        "limits",
    ];
    let mut all: Vec<(&str, Fate)> = killed.into_iter().map(|name| (name, Fate::Killed)).collect();
    all.extend([
        ("what it needs", Fate::Done),
        ("clone3", Fate::Error(libc::ENOSYS)),
        ("file", Fate::Error(libc::ENOENT)),
        ("own memory", Fate::Error(libc::ENOENT)),
        ("a thread outside", Fate::Error(libc::EBUSY)),
    ]);
    if landlock() >= 1 {
        all.push(("landlock alone: file", Fate::Error(libc::EACCES)));
    }
    if landlock() >= 6 {
        all.push(("landlock alone: signal", Fate::Error(libc::EPERM)));
    } else {
        println!("not tried: this kernel's landlock (version {}) has no scopes", landlock());
    }
    let mut sleep = Command::new("sleep").arg("600").spawn().expect("sleep");
    let mut failed = 0;
    for (name, expected) in &all {
        let found = fate(name, sleep.id());
        let right = found == *expected;
        println!("cage: {name} ... {}", if right { "ok" } else { "FAILED" });
        if !right {
            println!("  expected {expected:?}, found {found:?}");
            failed += 1;
        }
    }
    let alive = sleep.try_wait().expect("wait").is_none();
    println!("cage: the process outside is {}", if alive { "alive" } else { "gone" });
    sleep.kill().expect("kill");
    sleep.wait().expect("wait");
    std::process::exit(i32::from(failed > 0 || !alive));
}
