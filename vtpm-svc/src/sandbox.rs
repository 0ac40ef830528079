// SPDX-License-Identifier: Apache-2.0
//! The cage that the TPM runs in: what the process may still ask of the kernel once its files and sockets are
//! open.
//!
//! The state blob and every command are untrusted input to a large C library. So before the first byte of
//! either is parsed, the process gives up the file system and the network (landlock) and every system call
//! that serving open descriptors does not need (seccomp). Opening a file answers "no such file", because the
//! crypto library under the engine looks for its configuration late and copes with its absence; anything else
//! that is not on the list ends the process.
//!
//! Some calls are on the list with some of their arguments only: `fcntl` can aim a signal at any process of
//! the user, `clone` can make processes and namespaces, `prctl` can make the memory readable for others
//! again, memory can be made executable. `clone3` hides its arguments from a filter, so it is answered as by
//! a kernel that has none; threads are then made by `clone`.

use std::collections::BTreeMap;

use landlock::ABI;
use landlock::Access;
use landlock::AccessFs;
use landlock::AccessNet;
use landlock::CompatLevel;
use landlock::Compatible;
use landlock::Ruleset;
use landlock::RulesetAttr;
use landlock::RulesetStatus;
use landlock::Scope;
use seccompiler::BpfProgram;
use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompFilter;
use seccompiler::SeccompRule;
use seccompiler::TargetArch;

/// Why the cage could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The system-call filter.
    #[error("installing the system-call filter: {0}")]
    Seccomp(String),
    /// The file-system and network rules.
    #[error("installing the landlock rules: {0}")]
    Landlock(String),
    /// There are threads that it would not hold.
    #[error("the process has {0} threads before its cage is closed; it must have one")]
    Threads(usize),
}

/// Calls that serving open files and sockets from several threads needs, and no more.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_lseek,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_poll,
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Answered with "not implemented" by a second filter.
    libc::SYS_clone3,
    // Answered with "no such file" by a third.
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_access,
    libc::SYS_readlink,
];

/// Calls that look for files.
const ABSENT: &[libc::c_long] =
    &[libc::SYS_openat, libc::SYS_newfstatat, libc::SYS_access, libc::SYS_readlink];

/// Threads of this process. One that has just ended is still listed for a moment after it was waited for.
fn threads() -> std::io::Result<usize> {
    let mut last = 0;
    for _ in 0..100 {
        last = std::fs::read_dir("/proc/self/task")?.count();
        if last == 1 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    Ok(last)
}

fn refuse(e: seccompiler::BackendError) -> SandboxError {
    SandboxError::Seccomp(e.to_string())
}

/// What a new thread shares with the others, as glibc makes one (and musl, which adds a flag that means
/// nothing any more).
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// Calls that are allowed with some arguments only: memory that is mapped or changed from now on is never
/// executable, a signal goes to this process or to none, a new thread is a thread, and this process stays
/// unreadable for others.
fn conditional() -> Result<BTreeMap<i64, Vec<SeccompRule>>, SandboxError> {
    use SeccompCmpArgLen::Dword;
    use SeccompCmpArgLen::Qword;
    use SeccompCmpOp::Eq;
    use SeccompCmpOp::MaskedEq;
    let condition = |argument, length, operator, value| {
        SeccompCondition::new(argument, length, operator, value).map_err(refuse)
    };
    let rule = |conditions| SeccompRule::new(conditions).map_err(refuse);
    let only = |argument, operator, value| {
        condition(argument, Dword, operator, value).and_then(|c| rule(vec![c])).map(|r| vec![r])
    };
    let not_executable = MaskedEq(libc::PROT_EXEC as u64);
    // Not F_SETOWN, F_SETSIG, F_NOTIFY, locks or leases; and no signal when something arrives.
    let mut fcntl = Vec::new();
    for command in [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC] {
        fcntl.extend(only(1, Eq, command as u64)?);
    }
    fcntl.push(rule(vec![
        condition(1, Dword, Eq, libc::F_SETFL as u64)?,
        condition(2, Dword, MaskedEq(libc::O_ASYNC as u64), 0)?,
    ])?);
    let thread = condition(0, Qword, MaskedEq(!(libc::CLONE_DETACHED as u64)), THREAD)?;
    Ok(BTreeMap::from([
        (libc::SYS_mmap, only(2, not_executable.clone(), 0)?),
        (libc::SYS_mprotect, only(2, not_executable, 0)?),
        (libc::SYS_tgkill, only(0, Eq, std::process::id().into())?),
        (libc::SYS_fcntl, fcntl),
        (libc::SYS_clone, vec![rule(vec![thread])?]),
        (libc::SYS_prctl, only(0, Eq, libc::PR_SET_NAME as u64)?),
    ]))
}

fn filter(
    calls: &[libc::c_long],
    more: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, SandboxError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls.iter().map(|n| (*n, Vec::new())).collect();
    rules.extend(more);
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(refuse)?;
    SeccompFilter::new(rules, otherwise, listed, arch).map_err(refuse)?.try_into().map_err(refuse)
}

/// Closes the cage around this thread and all that it starts from now on. Returns what the kernel could not
/// give.
///
/// It does not hold a thread that exists already, so there must be none.
pub fn close(seccomp: bool) -> Result<Vec<String>, SandboxError> {
    let mut missing = Vec::new();
    match threads() {
        Ok(1) => {}
        Ok(threads) => return Err(SandboxError::Threads(threads)),
        Err(e) => missing.push(format!("cannot see whether a thread is left outside of the cage: {e}")),
    }
    let refuse = |e: landlock::RulesetError| SandboxError::Landlock(e.to_string());
    let abi = ABI::V4;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|r| r.handle_access(AccessNet::from_all(abi)))
        .and_then(|r| r.create())
        .and_then(|r| r.restrict_self())
        .map_err(refuse)?;
    if status.ruleset != RulesetStatus::FullyEnforced {
        missing.push(
            "this kernel has no landlock, or an old one: the file system is closed by seccomp only".into(),
        );
    }
    // Linux 6.12 and later: no signal to a process outside, no abstract socket of one. Without it the filter
    // below is alone in that.
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .scope(Scope::from_all(ABI::V6))
        .and_then(|r| r.create())
        .and_then(|r| r.restrict_self())
        .map_err(refuse)?;
    if !seccomp {
        missing.push("the system-call filter is off (--seccomp action=none)".into());
        return Ok(missing);
    }
    let apply = |program: &BpfProgram| {
        seccompiler::apply_filter(program).map_err(|e| SandboxError::Seccomp(e.to_string()))
    };
    let no_files =
        filter(ABSENT, BTreeMap::new(), SeccompAction::Allow, SeccompAction::Errno(libc::ENOENT as u32))?;
    let no_clone3 = filter(
        &[libc::SYS_clone3],
        BTreeMap::new(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let allow_list = filter(ALLOWED, conditional()?, SeccompAction::KillProcess, SeccompAction::Allow)?;
    apply(&no_files)?;
    apply(&no_clone3)?;
    apply(&allow_list)?;
    Ok(missing)
}
