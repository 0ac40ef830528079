// SPDX-License-Identifier: Apache-2.0
//! A region of an emulated guest's RAM, with what backs each of its views.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::platform::mapping::Mapping;

/// End of the memory that both views share.
pub const LOW_END: u64 = 1 << 20;

/// A region of RAM.
pub struct BackedRegion {
    /// Where the guest sees it, without the C-bit.
    pub gpa: u64,
    /// What backs its shared view.
    pub shared: Arc<Mapping>,
    /// What backs its private view; the same with single backing.
    pub private: Arc<Mapping>,
    /// The file behind the private side and the offset into it; the monitor punches holes into it.
    pub memfd: Option<(Arc<OwnedFd>, u64)>,
}

impl BackedRegion {
    /// Addresses without the C-bit.
    pub fn range(&self) -> Range<u64> {
        self.gpa..self.gpa + self.shared.len()
    }
}
