// SPDX-License-Identifier: Apache-2.0
//! The cage that the TPM runs in: what the process may still ask of the kernel once its files and sockets are open.
//!
//! The state blob and every command are untrusted input to a large C library. So before the first byte of either is
//! parsed, the process gives up the file system and the network (landlock) and every system call that serving open
//! descriptors does not need (seccomp). Opening a file answers "no such file", because the crypto library under
//! the engine looks for its configuration late and copes with its absence; anything else that is not on the list ends
//! the process.

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
    libc::SYS_fcntl,
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
    libc::SYS_clone3,
    libc::SYS_clone,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_prctl,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Answered with "no such file" by the second filter.
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_access,
    libc::SYS_readlink,
];

/// Calls that look for files.
const ABSENT: &[libc::c_long] =
    &[libc::SYS_openat, libc::SYS_newfstatat, libc::SYS_access, libc::SYS_readlink];

fn refuse(e: seccompiler::BackendError) -> SandboxError {
    SandboxError::Seccomp(e.to_string())
}

/// Calls that are allowed with some arguments only: memory that is mapped or changed from now on is never executable,
/// and a signal goes to this process or to none.
fn conditional() -> Result<BTreeMap<i64, Vec<SeccompRule>>, SandboxError> {
    let only = |argument, operator, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map(|rule| vec![rule])
            .map_err(refuse)
    };
    let not_executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    Ok(BTreeMap::from([
        (libc::SYS_mmap, only(2, not_executable.clone(), 0)?),
        (libc::SYS_mprotect, only(2, not_executable, 0)?),
        (libc::SYS_tgkill, only(0, SeccompCmpOp::Eq, std::process::id().into())?),
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

/// Closes the cage around this thread and all that it starts from now on. Returns what the kernel could not give.
pub fn close(seccomp: bool) -> Result<Vec<String>, SandboxError> {
    let mut missing = Vec::new();
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
    if !seccomp {
        missing.push("the system-call filter is off (--seccomp action=none)".into());
        return Ok(missing);
    }
    let apply = |program: &BpfProgram| {
        seccompiler::apply_filter(program).map_err(|e| SandboxError::Seccomp(e.to_string()))
    };
    let no_files =
        filter(ABSENT, BTreeMap::new(), SeccompAction::Allow, SeccompAction::Errno(libc::ENOENT as u32))?;
    let allow_list = filter(ALLOWED, conditional()?, SeccompAction::KillProcess, SeccompAction::Allow)?;
    apply(&no_files)?;
    apply(&allow_list)?;
    Ok(missing)
}
