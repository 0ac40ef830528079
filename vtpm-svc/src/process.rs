// SPDX-License-Identifier: Apache-2.0
//! What the service asks of the operating system for its own process: signals, memory locking, the
//! background.
#![allow(unsafe_code)]

use std::io;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::process::Command;

/// Takes over a descriptor that the parent process left open.
pub fn inherited(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD fails if the descriptor is not open; if it is, the programs that this process starts do
    // not get it.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, it was named for this purpose on the command line, and it is taken once.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // Threads here wait in accept and read; a service manager may have left the flag of its own loop on.
    rustix::io::ioctl_fionbio(&fd, false)?;
    Ok(fd)
}

/// One heap for all threads: they take turns with the engine's lock, and a heap for each costs memory in
/// every guest.
pub fn one_heap() {
    // SAFETY: plain integers; called before a second thread exists. A refusal leaves the default.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives memory back that only the start needed. The file is opened before the cage closes and read after it.
pub struct Trim {
    smaps: std::fs::File,
}

impl Trim {
    /// Without `/proc` nothing can be given back.
    pub fn prepare() -> Option<Self> {
        std::fs::File::open("/proc/self/smaps").ok().map(|smaps| Self { smaps })
    }

    /// Drops the resident pages of every file mapping that this process never wrote to (code, constants, the
    /// message tables of libraries): they are read again from the page cache when they are used.
    pub fn run(&mut self) -> io::Result<()> {
        use std::io::Seek;
        let mut text = String::with_capacity(1 << 15);
        self.smaps.rewind()?;
        // Bounded, and without the question for the file's size, which the cage does not allow.
        Read::take(&self.smaps, 1 << 20).read_to_string(&mut text)?;
        for (start, end) in untouched(&text) {
            // SAFETY: the range is a private mapping of a file without a page of its own, so the pages that
            // come back are the same bytes. A range that was unmapped meanwhile is refused by the kernel.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, MADV_DONTNEED_LOCKED) };
        }
        // SAFETY: no pointers.
        unsafe { libc::malloc_trim(0) };
        Ok(())
    }
}

/// `MADV_DONTNEED` for locked memory too (Linux 5.18).
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

/// Ranges of private, unwritable file mappings that have no anonymous page, from the text of
/// `/proc/self/smaps`.
fn untouched(smaps: &str) -> Vec<(usize, usize)> {
    let mut out = Vec::new();
    let mut candidate = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next(), words.clone().nth(2)) {
            (Some(range), Some(rights), Some(inode)) if range.contains('-') => {
                candidate = span(range).filter(|_| matches!(rights, "r--p" | "r-xp") && inode != "0");
            }
            (Some("Anonymous:"), Some("0"), _) => out.extend(candidate.take()),
            _ => {}
        }
    }
    out
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
    // With a finite limit, locking all future memory would make ordinary allocations fail. Being root is not
    // enough: a container may have taken the right away.
    let privileged = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::IPC_LOCK));
    let unlimited = known && limit.rlim_cur == libc::RLIM_INFINITY;
    if !privileged && !unlimited {
        missing.push("memory is not locked and may be swapped out: set LimitMEMLOCK=infinity".into());
    } else if let Err(e) = lock_writable_memory() {
        missing.push(format!("memory is not locked and may be swapped out: {e}"));
    }
    missing
}

/// Locks what can hold a secret: heap, stacks and data as they are now, and everything that is mapped from
/// now on.
///
/// Code and constants of the libraries that are loaded already stay out of it: the kernel's bookkeeping for
/// thousands of pages of other people's files would cost a tenth of the start.
fn lock_writable_memory() -> io::Result<()> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some("rw-p")) = (words.next(), words.next()) else { continue };
        let Some((start, end)) = span(range) else { continue };
        // SAFETY: plain integers; ONFAULT locks what is used instead of all that is mapped.
        if unsafe { libc::mlock2(start as *const libc::c_void, end - start, libc::MLOCK_ONFAULT) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: plain integers.
    if unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// An address range as `/proc/self/maps` writes it.
fn span(range: &str) -> Option<(usize, usize)> {
    let (start, end) = range.split_once('-')?;
    let hex = |n| usize::from_str_radix(n, 16).ok();
    Some((hex(start)?, hex(end)?))
}

/// Closes every descriptor from 3 on that is not listed: what a parent process left open by mistake is
/// nothing for the cage.
///
/// Must be called before this process opens anything itself.
pub fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let close = |from: u32, to: u32| {
        // SAFETY: plain integers; nothing of this process owns a descriptor in the range.
        if from <= to && unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    let mut from = 3;
    for fd in keep.into_iter().filter(|fd| *fd >= 3) {
        close(from, fd - 1)?;
        from = fd + 1;
    }
    close(from, u32::MAX)
}

/// Runs `work` in a second process, which has one end of a connection and no other descriptor of this one.
/// Must be called while there is one thread.
pub fn beside(work: impl FnOnce(UnixStream)) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: only one thread exists, so the child has no half-held locks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // What a terminal or a service manager sends is for the service. A refusal costs a name that
            // stays behind.
            let _ = block_signals();
            let _ = close_others(&[theirs.as_raw_fd()]);
            work(theirs);
            // SAFETY: plain integer. Nothing of the copied process may run its own end.
            unsafe { libc::_exit(0) }
        }
        _ => Ok(ours),
    }
}

/// A program that ends with this process, whatever ends this one, and takes along what it has started.
///
/// It leads a process group. The kernel kills the program itself when the thread that started it ends; a
/// second process, which does nothing but wait for this one's end, kills the whole group.
pub struct Dependent {
    child: Child,
    /// The second process and the connection that it waits on.
    guard: Option<(libc::pid_t, UnixStream)>,
}

/// Starts such a program.
pub fn spawn_dependent(command: &mut Command) -> io::Result<Dependent> {
    let parent = std::process::id();
    command.process_group(0);
    // SAFETY: the closure makes two system calls and allocates nothing, as code between fork and exec must.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have ended before the kernel was told.
            if libc::getppid().cast_unsigned() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    let mut dependent = Dependent { child: command.spawn()?, guard: None };
    // If there can be no guard, the program does not run either: dropping it ends it.
    dependent.guard = Some(guard(dependent.child.id())?);
    Ok(dependent)
}

/// Starts the process that kills `group` when this process ends.
fn guard(group: u32) -> io::Result<(libc::pid_t, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let (group, wait) = (group.cast_signed(), theirs.as_raw_fd());
    // SAFETY: other threads may exist, so up to its end the child makes system calls and nothing else: no
    // allocation, no lock, no destructor. The raw call keeps the C library's own work at a fork out of it.
    match unsafe { libc::syscall(libc::SYS_fork) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as above; the byte is on this process's own stack.
        0 => unsafe {
            // What a terminal or a monitor sends to this process's group is not for the guard.
            libc::setsid();
            // Only the connection stays open; else whoever waits for the end of a pipe would wait for the
            // guard.
            let wait_u = wait.cast_unsigned();
            if wait_u > 0 {
                libc::syscall(libc::SYS_close_range, 0u32, wait_u - 1, 0u32);
            }
            libc::syscall(libc::SYS_close_range, wait_u + 1, u32::MAX, 0u32);
            let mut byte = 0u8;
            loop {
                match libc::read(wait, (&raw mut byte).cast(), 1) {
                    1 => break,
                    -1 if *libc::__errno_location() == libc::EINTR => {}
                    // The connection has ended without a word: so has the process.
                    _ => {
                        libc::kill(-group, libc::SIGKILL);
                        break;
                    }
                }
            }
            libc::_exit(0)
        },
        guard => Ok((guard as libc::pid_t, ours)),
    }
}

impl Dependent {
    /// The program.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Kills the program and what it has started. Does nothing when the program has ended and was waited for.
    pub fn kill(&mut self) {
        // Its number is only its own while it has not been waited for.
        if let Ok(None) = self.child.try_wait() {
            // SAFETY: plain integers.
            unsafe { libc::kill(-self.child.id().cast_signed(), libc::SIGKILL) };
            let _ = self.child.wait();
        }
    }
}

impl Drop for Dependent {
    fn drop(&mut self) {
        self.kill();
        if let Some((guard, mut connection)) = self.guard.take() {
            // What a program that ended by itself has left behind is its own affair.
            let _ = io::Write::write_all(&mut connection, &[1]);
            // SAFETY: plain integers; the guard is a child of this process and nobody else waits for it.
            unsafe { libc::waitpid(guard, std::ptr::null_mut(), 0) };
        }
    }
}

/// Goes to the background. Must be called while there is one thread.
///
/// The process that was started waits for a byte on the connection that is returned and then ends with
/// success; if the service ends before, it ends with failure.
pub fn daemonize() -> io::Result<UnixStream> {
    let (mut ready, word) = UnixStream::pair()?;
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
            Ok(word)
        }
        _ => {
            drop(word);
            std::process::exit(i32::from(ready.read_exact(&mut [0]).is_err()))
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as proc(5) shows them: code, relocated constants, data, heap, an unwritten table of constants.
    const SMAPS: &str = "\
1000-3000 r-xp 00001000 fe:00 31 /usr/bin/x
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
3000-4000 r--p 00003000 fe:00 31 /usr/bin/x
Anonymous:             4 kB
4000-5000 rw-p 00004000 fe:00 31 /usr/bin/x
Anonymous:             0 kB
5000-6000 r--p 00000000 00:00 0 [vvar]
Anonymous:             0 kB
6000-7000 r--p 00000000 fe:00 32 /usr/lib/y
Anonymous:             0 kB
";

    #[test]
    fn only_unwritten_mappings_of_files_are_given_back() {
        assert_eq!(untouched(SMAPS), [(0x1000, 0x3000), (0x6000, 0x7000)]);
    }

    #[test]
    fn the_program_goes_on_after_its_pages_were_given_back() {
        let before = std::fs::read("/proc/self/exe").expect("read");
        Trim::prepare().expect("proc").run().expect("trim");
        assert_eq!(std::fs::read("/proc/self/exe").expect("read"), before);
    }
}
