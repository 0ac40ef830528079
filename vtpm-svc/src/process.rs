// SPDX-License-Identifier: Apache-2.0
//! What the service asks of the operating system for its own process: signals, memory locking, the background.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;

/// Takes over a descriptor that the parent process left open.
pub fn inherited(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks whether the descriptor is open.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, it was named for this purpose on the command line, and it is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// No core dumps, no ptrace by other processes of the user, memory locked where the limits allow it.
///
/// Returns what could not be had, in words.
pub fn hide_memory() -> Vec<String> {
    let mut missing = Vec::new();
    // SAFETY: plain integers.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        missing.push(format!("cannot forbid core dumps: {}", io::Error::last_os_error()));
    }
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct lives over the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) } != 0 {
        missing.push(format!("cannot set the core limit to zero: {}", io::Error::last_os_error()));
    }
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct lives over the call.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
    // With a finite limit, locking all future memory would make ordinary allocations fail.
    let unlimited = rustix::process::geteuid().is_root() || (known && limit.rlim_cur == libc::RLIM_INFINITY);
    if !unlimited {
        missing.push("memory is not locked and may be swapped out: set LimitMEMLOCK=infinity".into());
        return missing;
    }
    // SAFETY: plain integers; ONFAULT locks what is used instead of all that is mapped.
    let locked = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if locked != 0 {
        missing.push(format!("memory is not locked and may be swapped out: {}", io::Error::last_os_error()));
    }
    missing
}

/// Goes to the background. Must be called while there is one thread.
pub fn daemonize() -> io::Result<()> {
    // SAFETY: only one thread exists, so the child has no half-held locks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: no arguments.
            if unsafe { libc::setsid() } < 0 {
                return Err(io::Error::last_os_error());
            }
            let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
            rustix::stdio::dup2_stdin(&null)?;
            rustix::stdio::dup2_stdout(&null)?;
            Ok(())
        }
        _ => std::process::exit(0),
    }
}

/// Blocks the ending signals for this thread and all that it starts.
pub fn block_signals() -> io::Result<()> {
    let set = ending_signals();
    // SAFETY: the set lives over the call; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
        0 => Ok(()),
        e => Err(io::Error::from_raw_os_error(e)),
    }
}

/// Waits for one of the ending signals, which must be blocked.
pub fn wait_for_signal() -> io::Result<i32> {
    let set = ending_signals();
    let mut signal = 0;
    // SAFETY: both pointers are locals.
    match unsafe { libc::sigwait(&set, &mut signal) } {
        0 => Ok(signal),
        e => Err(io::Error::from_raw_os_error(e)),
    }
}

fn ending_signals() -> libc::sigset_t {
    // SAFETY: a zeroed set is a valid argument of sigemptyset, and the signal numbers are valid.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}
