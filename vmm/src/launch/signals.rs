// SPDX-License-Identifier: Apache-2.0
//! Keeps signals from the thread that launches.
//!
//! A pending signal stops `KVM_SEV_SNP_LAUNCH_UPDATE` in the middle (`kvm_gmem_populate`), and before its
//! first page the kernel calls that -EIO, like everything else. Signals that arrive meanwhile go to another
//! thread, or wait.

use std::os::raw::c_int;

use vmm_sys_util::signal::block_signal;
use vmm_sys_util::signal::unblock_signal;

/// Not to be blocked: the kernel refuses the first two, the others report errors of this thread's own
/// instructions.
const LEFT_ALONE: [c_int; 7] =
    [libc::SIGKILL, libc::SIGSTOP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];

/// While this lives, the calling thread gets no signals. To be dropped by the thread that made it.
pub struct Blocked {
    /// Those that were not blocked before.
    signals: Vec<c_int>,
}

impl Blocked {
    /// Blocks what can be blocked.
    pub fn all() -> Self {
        // glibc keeps the first real-time signals for itself: what lies between is not ours.
        let all = (1..libc::SIGSYS + 1).chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
        // An error says that it was blocked already, and then it stays so.
        Blocked { signals: all.filter(|s| !LEFT_ALONE.contains(s) && block_signal(*s).is_ok()).collect() }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        for signal in &self.signals {
            let _ = unblock_signal(*signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::signal::get_blocked_signals;

    use super::*;

    #[test]
    fn signals_are_blocked_for_as_long_as_it_lives_and_others_stay_as_they_were() {
        block_signal(libc::SIGUSR2).unwrap();
        let blocked = Blocked::all();
        let now = get_blocked_signals().unwrap();
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGUSR2, libc::SIGRTMIN(), libc::SIGALRM] {
            assert!(now.contains(&signal), "{signal}");
        }
        drop(blocked);
        assert_eq!(get_blocked_signals().unwrap(), [libc::SIGUSR2]);
    }
}
