// SPDX-License-Identifier: Apache-2.0
//! The page-state-change buffer: a header and up to 253 entries.
//!
//! GHCB specification, section 4.1.6 (SNP page state change). Uses `core` only.

use super::msr::PageOperation;

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 8;
/// Length of an entry in bytes.
pub const ENTRY_LEN: usize = 8;
/// Entries that fit into a GHCB's shared buffer.
pub const MAX_ENTRIES: usize = 253;

/// Exit info 2 when the hypervisor could not do it (KVM's generic error).
pub const ERROR_GENERIC: u64 = 0x100 << 32;
/// Exit info 2 for a header that reaches beyond the buffer.
pub const ERROR_INVALID_HEADER: u64 = 1 << 32 | 1;
/// Exit info 2 for an entry that cannot be right.
pub const ERROR_INVALID_ENTRY: u64 = 1 << 32 | 2;

/// The header: the work is entries `current` to `end`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Next entry to work on.
    pub current: u16,
    /// Last entry.
    pub end: u16,
}

impl Header {
    /// Reads the header; its reserved half is ignored.
    pub const fn decode(bytes: [u8; HEADER_LEN]) -> Self {
        Header {
            current: u16::from_le_bytes([bytes[0], bytes[1]]),
            end: u16::from_le_bytes([bytes[2], bytes[3]]),
        }
    }

    /// The header's bytes, the reserved half zero.
    pub const fn encode(self) -> [u8; HEADER_LEN] {
        let (c, e) = (self.current.to_le_bytes(), self.end.to_le_bytes());
        [c[0], c[1], e[0], e[1], 0, 0, 0, 0]
    }
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// 4 KiB pages of this entry that are done, 12 bits.
    pub done: u16,
    /// First guest frame number, 40 bits.
    pub frame: u64,
    /// What to do.
    pub operation: PageOperation,
    /// One page of 2 MiB instead of 4 KiB.
    pub huge: bool,
}

impl Entry {
    /// Reads an entry; reserved bits are ignored, as KVM does.
    pub const fn decode(value: u64) -> Self {
        Entry {
            done: (value & 0xfff) as u16,
            frame: value >> 12 & ((1 << 40) - 1),
            operation: PageOperation::from_bits((value >> 52) as u8),
            huge: value >> 56 & 1 != 0,
        }
    }

    /// The entry's value, reserved bits zero.
    pub const fn encode(self) -> u64 {
        (self.done & 0xfff) as u64
            | (self.frame & ((1 << 40) - 1)) << 12
            | (self.operation.bits() as u64) << 52
            | (self.huge as u64) << 56
    }

    /// 4 KiB pages that the entry stands for.
    pub const fn pages(self) -> u16 {
        if self.huge { 512 } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_specified_bit_fields() {
        let entry = Entry { done: 5, frame: 0x1fe00, operation: PageOperation::Shared, huge: true };
        assert_eq!(entry.encode(), 1 << 56 | 2 << 52 | 0x1fe00 << 12 | 5);
        assert_eq!(Entry::decode(entry.encode()), entry);
        assert_eq!(entry.pages(), 512);
    }

    #[test]
    fn the_largest_buffer_ends_where_the_shared_buffer_ends() {
        use super::super::page;
        assert_eq!(page::SHARED_BUFFER + HEADER_LEN + MAX_ENTRIES * ENTRY_LEN, page::SHARED_BUFFER_END);
    }
}
