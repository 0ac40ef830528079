// SPDX-License-Identifier: Apache-2.0
//! Memory slots: what stands behind a range of guest-physical addresses, on each side.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::mapping::Mapping;

/// A piece of guest RAM: where the guest sees it, and what backs each side.
pub struct MemorySlot {
    /// Slot number.
    pub slot: u32,
    /// Guest-physical address, page aligned.
    pub gpa: u64,
    /// The shared side; its length is the slot's.
    pub shared: Arc<Mapping>,
    /// The private side: a guest_memfd and the offset into it. `None` for plain guests, and for memory of an
    /// SNP guest that is always shared.
    pub private: Option<(Arc<OwnedFd>, u64)>,
}
