// SPDX-License-Identifier: Apache-2.0
//! Faults that a test asks the model for: what hardware cannot be made to do on demand.
//!
//! All default to "never". A [`Trigger`] counts the occasions at which its fault could happen, and fires at
//! some of them.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use snp::firmware_status::FwStatus;

use crate::errno::Errno;

/// When a fault happens: not at the first `skip` occasions, then `times` times.
#[derive(Debug, Default)]
pub struct Trigger {
    skip: u64,
    times: u64,
    seen: AtomicU64,
}

impl Trigger {
    /// Fires at the next `times` occasions.
    pub const fn times(times: u64) -> Self {
        Trigger::after(0, times)
    }

    /// Fires `times` times after `skip` occasions.
    pub const fn after(skip: u64, times: u64) -> Self {
        Trigger { skip, times, seen: AtomicU64::new(0) }
    }

    /// Fires at every occasion.
    pub const fn always() -> Self {
        Trigger::times(u64::MAX)
    }

    /// Counts an occasion; true if the fault happens.
    pub fn fire(&self) -> bool {
        if self.times == 0 {
            return false;
        }
        let n = self.seen.fetch_add(1, Relaxed);
        n >= self.skip && n - self.skip < self.times
    }
}

/// A step of a launch at which a fault can be injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `KVM_SEV_INIT2`.
    Init2,
    /// `KVM_CREATE_VCPU`.
    CreateVcpu,
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    SetAttributes,
    /// `KVM_SEV_SNP_LAUNCH_START`.
    Start,
    /// One page of `KVM_SEV_SNP_LAUNCH_UPDATE`; each page is an occasion.
    UpdatePage,
    /// `KVM_SEV_SNP_LAUNCH_FINISH`.
    Finish,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// KVM refuses with this errno. At a page that is not the first of its call: partial progress.
    Errno(Errno),
    /// The firmware refuses.
    Firmware(FwStatus),
    /// KVM stops before the page, as for a pending signal: partial progress, or -EIO without a status.
    Stop,
}

/// A fault of a launch.
#[derive(Debug)]
pub struct CommandFault {
    /// Where.
    pub step: Step,
    /// At which occasions.
    pub trigger: Trigger,
    /// What.
    pub injection: Injection,
}

/// All faults that can be asked for.
#[derive(Debug, Default)]
pub struct Faults {
    /// Lowest and highest GHCB protocol version to offer, in place of KVM's.
    pub ghcb_versions: Option<(u16, u16)>,
    /// Offer no SNP feature bits.
    pub no_snp_features: bool,
    /// Answer a GHCB registration with another address.
    pub refuse_registration: Trigger,
    /// Answer a page-state change with an error, without asking the monitor.
    pub psc_error: Trigger,
    /// End a page-state change by page after a range, as if it were done: the guest finds the cursor short of
    /// the end and has to ask again. Each finished range is an occasion.
    pub psc_stop: Trigger,
    /// Let `PVALIDATE` say that nothing changed.
    pub pvalidate_no_change: Trigger,
    /// Let `PVALIDATE` fail with a size mismatch.
    pub pvalidate_size_mismatch: Trigger,
    /// Let `RMPADJUST` fail for lack of permission.
    pub rmpadjust_permission: Trigger,
    /// Answer a guest request with "busy".
    pub guest_request_busy: Trigger,
    /// Break the authentication tag of a response message.
    pub guest_request_bad_tag: Trigger,
    /// Answer with a wrong sequence number.
    pub guest_request_bad_sequence: Trigger,
    /// Accept an AP creation and never start the vCPU.
    pub drop_ap_creation: Trigger,
    /// Faults of the launch.
    pub commands: Vec<CommandFault>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trigger_skips_then_fires_then_stops() {
        let trigger = Trigger::after(1, 2);
        let fired: Vec<bool> = (0..5).map(|_| trigger.fire()).collect();
        assert_eq!(fired, [false, true, true, false, false]);
        assert!(!Trigger::default().fire());
    }
}
