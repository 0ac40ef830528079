// SPDX-License-Identifier: Apache-2.0
//! Giving an SNP guest its private pages before it touches them.
//!
//! A private page is assigned in the RMP at the guest's first access to it, which costs an exit for each 4
//! KiB. Where the kernel has `KVM_PRE_FAULT_MEMORY` (Linux 6.11 and later; for SNP guests only after
//! LAUNCH_FINISH, `mmu.c:kvm_arch_vcpu_pre_fault_memory`) the monitor asks for what the guest is about to
//! use: the memory that stage0 validates, and every range that the guest has just made private. It is only
//! about speed: no answer of the kernel ends the guest, and the first refusal ends the asking.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use crate::platform::Vcpu;

/// How much is asked for at a time, so that a guest with much memory can be stopped meanwhile.
const PIECE: u64 = 64 << 20;
/// How often in a row a call may come back with nothing done, as for a signal.
const TRIES: u32 = 4;

/// What is asked for, and whether it is worth asking.
pub struct PreFault {
    first: Vec<Range<u64>>,
    refused: AtomicBool,
}

impl PreFault {
    /// `first`: private memory that the guest validates as soon as it runs.
    pub fn new(first: Vec<Range<u64>>) -> Self {
        PreFault { first, refused: AtomicBool::new(false) }
    }

    /// Asks for the memory that the guest begins with. To be called by the first vCPU before it runs.
    pub fn begin(&self, vcpu: &mut dyn Vcpu, stop: &AtomicBool) {
        for range in &self.first {
            self.ask(vcpu, range.start, range.end.saturating_sub(range.start), stop);
        }
    }

    /// Asks for a range that has just become private; ends early once `stop` is set.
    pub fn ask(&self, vcpu: &mut dyn Vcpu, gpa: u64, len: u64, stop: &AtomicBool) {
        let end = gpa.saturating_add(len);
        let (mut at, mut tries) = (gpa, 0);
        while at < end
            && tries < TRIES
            && !stop.load(Ordering::Acquire)
            && !self.refused.load(Ordering::Relaxed)
        {
            match vcpu.pre_fault(at, (end - at).min(PIECE)) {
                Ok(done) => {
                    at = at.saturating_add(done);
                    tries = if done == 0 { tries + 1 } else { 0 };
                }
                Err(e) if matches!(e.source.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => tries += 1,
                Err(_) => self.refused.store(true, Ordering::Relaxed),
            }
        }
    }
}

/// `validated` without what is `shared`; both ascending and each without overlaps.
pub fn private_part(validated: &[Range<u64>], shared: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    for range in validated {
        let mut start = range.start;
        for hole in shared.iter().filter(|hole| hole.end > range.start && hole.start < range.end) {
            if start < hole.start {
                parts.push(start..hole.start);
            }
            start = start.max(hole.end);
        }
        if start < range.end {
            parts.push(start..range.end);
        }
    }
    parts
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of one range are meant")]
mod tests {
    use super::*;
    use crate::platform::scripted::ScriptedVcpu;

    #[test]
    fn everything_is_asked_for_in_pieces_and_partial_answers_are_continued() {
        let mut vcpu = ScriptedVcpu::new([]);
        vcpu.pre_faults = [Ok(4096), Ok(PIECE - 4096), Err(libc::EINTR), Ok(PIECE)].into();
        PreFault::new(vec![0..2 * PIECE]).begin(&mut vcpu, &AtomicBool::new(false));
        let asked = [(0, PIECE), (4096, PIECE), (PIECE, PIECE), (PIECE, PIECE)];
        assert_eq!(vcpu.pre_faulted, asked);
    }

    #[test]
    fn a_refusal_ends_the_asking_and_nothing_else() {
        // EOPNOTSUPP: Linux 7.3 before LAUNCH_FINISH; ENOTTY: a kernel that does not have the call.
        for errno in [libc::EOPNOTSUPP, libc::ENOTTY, libc::ENOMEM] {
            let mut vcpu = ScriptedVcpu::new([]);
            vcpu.pre_faults = [Err(errno)].into();
            let pre_fault = PreFault::new(vec![0..2 * PIECE]);
            pre_fault.begin(&mut vcpu, &AtomicBool::new(false));
            pre_fault.ask(&mut vcpu, 0, 4096, &AtomicBool::new(false));
            assert_eq!(vcpu.pre_faulted.len(), 1, "{errno}");
        }
    }

    #[test]
    fn a_call_that_does_nothing_is_not_repeated_for_ever_and_a_stop_is_heard() {
        let mut vcpu = ScriptedVcpu::new([]);
        vcpu.pre_faults = std::iter::repeat_n(Ok(0), 100).collect();
        let pre_fault = PreFault::new(vec![0..PIECE]);
        pre_fault.begin(&mut vcpu, &AtomicBool::new(false));
        assert_eq!(vcpu.pre_faulted.len(), TRIES as usize);
        pre_fault.begin(&mut vcpu, &AtomicBool::new(true));
        assert_eq!(vcpu.pre_faulted.len(), TRIES as usize);
    }

    #[test]
    fn shared_memory_is_left_out() {
        assert_eq!(private_part(&[0..10, 20..30], &[0..2, 4..5, 8..22, 29..40]), [2..4, 5..8, 22..29]);
        assert_eq!(private_part(&[0..10], &[]), [0..10]);
        assert_eq!(private_part(&[2..4], std::slice::from_ref(&(0..10))), Vec::<Range<u64>>::new());
    }
}
