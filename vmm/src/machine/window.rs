// SPDX-License-Identifier: Apache-2.0
//! A window of guest-physical addresses, given out: where devices' registers and memory are that may be anywhere in it.
//!
//! Guests may move what is there ([`devices::bus::Bus::relocate`]); this is where it begins, for guests that do not.

use std::ops::Range;
use std::sync::Mutex;

use crate::lock::lock;

/// The part of a window that is free.
pub struct Window(Mutex<Range<u64>>);

impl Window {
    /// All of `range`.
    pub fn new(range: Range<u64>) -> Self {
        Window(Mutex::new(range))
    }

    /// `len` bytes that begin at a multiple of their length, as base address registers want it; a power of two. `None`: there is no room.
    pub fn take(&self, len: u64) -> Option<u64> {
        if !len.is_power_of_two() {
            return None;
        }
        let mut free = lock(&self.0);
        let start = free.start.checked_next_multiple_of(len)?;
        let end = start.checked_add(len).filter(|end| *end <= free.end)?;
        free.start = end;
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_aligned_and_given_out_once_until_there_is_no_room() {
        let window = Window::new(0x1000..0x9000);
        assert_eq!(window.take(0x1000), Some(0x1000));
        assert_eq!(window.take(0x4000), Some(0x4000));
        assert_eq!(window.take(0x1800), None, "no power of two");
        assert_eq!(window.take(0x2000), None, "0x8000..0xa000 is too long");
        assert_eq!(window.take(0x1000), Some(0x8000));
        assert_eq!(window.take(1), None);
        assert_eq!(Window::new(u64::MAX - 1..u64::MAX).take(4), None);
    }
}
