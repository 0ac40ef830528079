// SPDX-License-Identifier: Apache-2.0
//! The two small files that belong to the platform and not to the TPM: the physical-presence request (file 2)
//! and the offset of the guest's clock (file 4). Layouts as OpenVMM writes them; all integers little-endian.
//!
//! Both come from the guest in the end, so they are parsed as hostile: exact length, known operations, a
//! bounded offset.

use crate::bytes::array;

use super::error::VmgsError;
use super::file_id::FileId;

/// A record that is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{id}: {found} bytes, expected {expected}")]
pub struct RecordError {
    /// The file.
    pub id: FileId,
    /// Its length.
    pub found: usize,
    /// The length that it has by the format.
    pub expected: usize,
}

/// An operation that the guest's operator can ask for (TCG Physical Presence Interface 1.30, TPM 2.0
/// operations).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// 0: nothing; withdraws a request that is pending.
    None,
    /// 5, 14, 21, 22: `TPM2_Clear` with platform authorisation; storage keys and owner authorisation are
    /// gone.
    Clear,
    /// 23: use exactly these PCR banks from the next start on.
    SetPcrBanks(Banks),
}

/// PCR banks by the interface's bits; only those that measured boot extends can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Banks {
    /// Bit 1.
    pub sha256: bool,
    /// Bit 2.
    pub sha384: bool,
}

/// What "submit request" answers (function 7 of the interface).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Submitted {
    /// Pending for the next start.
    Accepted = 0,
    /// Not an operation of this platform.
    NotImplemented = 1,
    /// The argument makes no sense here.
    Failure = 2,
}

/// The answer of an operation that worked.
pub const RESPONSE_SUCCESS: u32 = 0;
/// The answer of an operation that the platform could not do ("general failure").
pub const RESPONSE_FAILURE: u32 = 0xffff_fff1;

impl Operation {
    /// Reads a request, or says what the interface answers to it.
    pub fn parse(number: u32, argument: u32) -> Result<Self, Submitted> {
        match number {
            0 => Ok(Self::None),
            5 | 14 | 21 | 22 => Ok(Self::Clear),
            23 => {
                let banks = Banks { sha256: argument & 2 != 0, sha384: argument & 4 != 0 };
                // A bank that nobody extends would let the guest invent a history in it.
                if argument & !6 != 0 || argument == 0 {
                    return Err(Submitted::Failure);
                }
                Ok(Self::SetPcrBanks(banks))
            }
            _ => Err(Submitted::NotImplemented),
        }
    }
}

/// The state of the physical-presence interface, 28 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ppi {
    /// The operation to do at the next start; 0 is none.
    pub pending: u32,
    /// The operation that a user is being asked about (function 8); kept for other tools.
    pub in_query: u32,
    /// State of the submission; kept for other tools.
    pub set_state: u32,
    /// The operation that was done last.
    pub last: u32,
    /// Its response: 0, a TPM response code, or 0xFFFFFFF0 and above.
    pub last_response: u32,
    /// Argument of the pending operation.
    pub argument: u32,
    /// Banks that the TPM has; kept for other tools.
    pub bank_bitmap: u32,
}

impl Ppi {
    /// Bytes of a record.
    pub const LEN: usize = 28;

    /// Reads a record of exactly the right length; what is pending may still be nonsense.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        let record: &[u8; Self::LEN] = bytes.try_into().map_err(|_| RecordError {
            id: FileId::TPM_PPI,
            found: bytes.len(),
            expected: Self::LEN,
        })?;
        let word = |n: usize| u32::from_le_bytes(array(record, 4 * n));
        Ok(Self {
            pending: word(0),
            in_query: word(1),
            set_state: word(2),
            last: word(3),
            last_response: word(4),
            argument: word(5),
            bank_bitmap: word(6),
        })
    }

    /// Writes the record.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let words = [
            self.pending,
            self.in_query,
            self.set_state,
            self.last,
            self.last_response,
            self.argument,
            self.bank_bitmap,
        ];
        let mut out = [0; Self::LEN];
        for (chunk, word) in out.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// Takes a request for the next start.
    pub fn submit(&mut self, number: u32, argument: u32) -> Submitted {
        match Operation::parse(number, argument) {
            Ok(_) => {
                (self.pending, self.argument) = (number, argument);
                Submitted::Accepted
            }
            Err(refusal) => refusal,
        }
    }

    /// Notes that the pending operation was done, or could not be.
    pub fn finish(&mut self, response: u32) {
        (self.last, self.last_response) = (self.pending, response);
        (self.pending, self.argument) = (0, 0);
    }
}

/// How far the guest's clock is from UTC of the host, in units of 100 ns; positive is ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RtcSkew(pub i64);

impl RtcSkew {
    /// Units in a second.
    pub const PER_SECOND: i64 = 10_000_000;
    /// Bytes of a record.
    pub const LEN: usize = 8;
    /// A clock that is further off than two hundred years is not one that a CMOS clock can show.
    const FURTHEST: i64 = 200 * 366 * 86_400 * Self::PER_SECOND;

    /// An offset in whole seconds.
    pub fn from_seconds(seconds: i64) -> Result<Self, VmgsError> {
        seconds.checked_mul(Self::PER_SECOND).map(Self).and_then(Self::checked).ok_or_else(|| {
            VmgsError::Invalid(format!("a clock offset of {seconds} seconds is more than two hundred years"))
        })
    }

    /// The offset if it is within bounds.
    pub fn checked(self) -> Option<Self> {
        (-Self::FURTHEST..=Self::FURTHEST).contains(&self.0).then_some(self)
    }

    /// Whole seconds, rounded down.
    pub fn seconds(self) -> i64 {
        self.0.div_euclid(Self::PER_SECOND)
    }

    /// Reads a record of exactly the right length.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        let record = bytes.try_into().map_err(|_| RecordError {
            id: FileId::RTC_SKEW,
            found: bytes.len(),
            expected: Self::LEN,
        })?;
        Ok(Self(i64::from_le_bytes(record)))
    }

    /// Writes the record.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        self.0.to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Laid out by hand from the field list of `docs/vmgs.md`.
    #[test]
    fn fields_stand_where_the_format_has_them() {
        let mut bytes = [0; 28];
        (bytes[0], bytes[12], bytes[16], bytes[20]) = (23, 5, 0xf1, 6);
        bytes[17..20].fill(0xff);
        let ppi = Ppi::parse(&bytes).expect("28 bytes");
        assert_eq!((ppi.pending, ppi.argument, ppi.last, ppi.last_response), (23, 6, 5, RESPONSE_FAILURE));
        assert_eq!(ppi.to_bytes(), bytes);
        assert_eq!(
            RtcSkew::parse(&[0x80, 0x69, 0x67, 0xff, 0xff, 0xff, 0xff, 0xff]),
            Ok(RtcSkew(-10_000_000))
        );
        assert_eq!(RtcSkew(-10_000_000).seconds(), -1);
    }

    #[test]
    fn only_what_this_platform_does_is_accepted() {
        let mut ppi = Ppi::default();
        // Numbers of the specification: enable, disable, change EPS, block SID, vendor specific.
        for number in [1, 2, 24, 34, 96, 128, u32::MAX] {
            assert_eq!(ppi.submit(number, 0), Submitted::NotImplemented, "operation {number}");
        }
        for argument in [0, 1, 3, 8, 0x10, u32::MAX] {
            assert_eq!(ppi.submit(23, argument), Submitted::Failure, "banks {argument:#x}");
        }
        assert_eq!(ppi, Ppi::default(), "a refused request leaves no trace");
        for number in [5, 14, 21, 22] {
            assert_eq!(ppi.submit(number, 0), Submitted::Accepted);
        }
        ppi.finish(RESPONSE_SUCCESS);
        assert_eq!((ppi.pending, ppi.last, ppi.last_response), (0, 22, 0));
    }

    proptest! {
        #[test]
        fn records_of_another_length_are_refused_and_others_come_back(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            match Ppi::parse(&bytes) {
                Ok(ppi) => prop_assert_eq!(ppi.to_bytes().to_vec(), bytes.clone()),
                Err(e) => prop_assert!(bytes.len() != 28 && e.found == bytes.len()),
            }
            match RtcSkew::parse(&bytes) {
                Ok(skew) => prop_assert_eq!(skew.to_bytes().to_vec(), bytes.clone()),
                Err(_) => prop_assert!(bytes.len() != 8),
            }
        }

        #[test]
        fn no_offset_overflows(seconds in any::<i64>()) {
            if let Ok(skew) = RtcSkew::from_seconds(seconds) {
                prop_assert_eq!(skew.seconds(), seconds);
            }
        }
    }
}
