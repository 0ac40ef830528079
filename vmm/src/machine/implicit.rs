// SPDX-License-Identifier: Apache-2.0
//! Pages that firmware uses as shared without having asked for it.
//!
//! Linux announces every change of a page's state, so for a kernel an access through the other view is a bug,
//! and ends the run. OVMF does not announce its first communication page (GHCB): it is in no section of the
//! metadata, and QEMU makes it shared at the first access. So does cvmm for firmware, within limits: only
//! from private to shared, each page once, and few pages. The page's private contents are lost, which is
//! harmless for a page that the guest never validated.

use std::collections::BTreeSet;
use std::sync::Mutex;

use crate::events::Events;
use crate::lock::lock;
use crate::machine::conversion::Conversions;
use crate::machine::conversion::RangeState;
use crate::platform::mapping::PAGE;

/// Most pages that a guest may share in this way.
const PAGES_MAX: usize = 16;

/// The pages so far.
pub struct ImplicitSharing {
    pages: Mutex<BTreeSet<u64>>,
    events: Events,
}

impl ImplicitSharing {
    /// None yet; what is shared is told to `events`.
    pub fn new(events: &Events) -> Self {
        ImplicitSharing { pages: Mutex::default(), events: events.clone() }
    }

    /// Makes the page of a shared access to `gpa` shared. False: the access is an error.
    pub fn share(&self, conversions: &Conversions, gpa: u64) -> bool {
        let page = gpa & !(PAGE - 1);
        if conversions.state(page, PAGE) != RangeState::Private || !self.admit(page) {
            return false;
        }
        if let Err(e) = conversions.convert(page, PAGE, false) {
            self.events.warn(format_args!("the page at {page:#x} cannot be made shared: {e}"));
            return false;
        }
        self.events.note(format_args!(
            "the firmware used the page at {page:#x} as shared memory without asking; it is shared now"
        ));
        true
    }

    /// Whether `page` is a new one, and not one too many.
    fn admit(&self, page: u64) -> bool {
        let mut pages = lock(&self.pages);
        pages.len() < PAGES_MAX && pages.insert(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_once_and_not_more_than_a_few() {
        let sharing = ImplicitSharing::new(&Events::silent());
        assert!(sharing.admit(0x1000));
        assert!(!sharing.admit(0x1000));
        for page in 1..PAGES_MAX as u64 {
            assert!(sharing.admit(0x1000 + page * PAGE));
        }
        assert!(!sharing.admit(0x100_0000));
    }
}
