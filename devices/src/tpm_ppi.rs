// SPDX-License-Identifier: Apache-2.0
//! The registers behind the TPM's physical-presence interface: where the guest leaves what firmware should do
//! to the TPM at the next boot, and finds what became of it.
//!
//! TCG PC Client Platform Physical Presence Interface Specification 1.30. The guest does not touch these
//! registers itself: the `_DSM` method of the TPM's ACPI device does. There is no user at this machine to
//! confirm anything, so what is known is allowed.

use crate::bus::Action;
use crate::bus::Device;

/// Bytes of the page.
pub const LEN: u64 = 0x1000;
/// Reads as the operation that waits (0: none); a write asks for one, with the argument in [`ARGUMENT`].
pub const REQUEST: u64 = 0x00;
/// The operation that was carried out last.
pub const LAST: u64 = 0x04;
/// What became of it: 0 for success.
pub const RESPONSE: u64 = 0x08;
/// Takes an operation and reads as its standing: [`ALLOWED`], or 0 for not implemented.
pub const QUERY: u64 = 0x0c;
/// Argument of the next request.
pub const ARGUMENT: u64 = 0x10;
/// What the last request was answered: 0 accepted, [`NOT_IMPLEMENTED`], [`FAILURE`].
pub const OUTCOME: u64 = 0x14;

/// "Allowed, and no user has to be present".
pub const ALLOWED: u32 = 4;
/// The request is not known.
pub const NOT_IMPLEMENTED: u32 = 1;
/// The request was not stored.
pub const FAILURE: u32 = 2;
/// Operations that can be allowed: withdraw, four names of "clear", set the PCR banks.
const KNOWN: [u32; 6] = [0, 5, 14, 21, 22, 23];

/// What was asked for and what was done, as the guest is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mail {
    /// The operation that waits; 0: none.
    pub request: u32,
    /// The operation that was carried out last; 0: none.
    pub last: u32,
    /// What became of it.
    pub response: u32,
}

/// Stores a request (operation, argument) and answers as [`OUTCOME`] reads; must not wait for long.
pub type Submit = Box<dyn Fn(u32, u32) -> u32 + Send>;

/// The registers of one VM.
pub struct Ppi {
    mail: Mail,
    standing: u32,
    argument: u32,
    outcome: u32,
    submit: Submit,
}

impl Ppi {
    /// Registers that show `mail` and hand requests to `submit`.
    pub fn new(mail: Mail, submit: Submit) -> Self {
        Ppi { mail, standing: 0, argument: 0, outcome: 0, submit }
    }
}

impl Device for Ppi {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data.iter_mut()) {
            let register = match at & !3 {
                REQUEST => self.mail.request,
                LAST => self.mail.last,
                RESPONSE => self.mail.response,
                QUERY => self.standing,
                ARGUMENT => self.argument,
                OUTCOME => self.outcome,
                _ => 0,
            };
            *byte = register.to_le_bytes()[(at & 3) as usize];
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        // The method writes whole registers; anything else is not from it.
        let value = u32::from_le_bytes(data.try_into().ok()?);
        match offset {
            REQUEST => {
                self.outcome = (self.submit)(value, self.argument);
                if self.outcome == 0 {
                    self.mail.request = value;
                }
            }
            QUERY => self.standing = if KNOWN.contains(&value) { ALLOWED } else { 0 },
            ARGUMENT => self.argument = value,
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(ppi: &mut Ppi, at: u64) -> u32 {
        let mut word = [0xee; 4];
        ppi.read(at, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn a_request_is_shown_once_it_is_stored_and_only_then() {
        let (asked, requests) = std::sync::mpsc::channel();
        let submit = Box::new(move |operation, argument| {
            asked.send((operation, argument)).unwrap();
            if operation == 23 { FAILURE } else { 0 }
        });
        let mut ppi = Ppi::new(Mail::default(), submit);
        ppi.write(REQUEST, &5u32.to_le_bytes());
        assert_eq!((read(&mut ppi, OUTCOME), read(&mut ppi, REQUEST)), (0, 5));
        ppi.write(ARGUMENT, &6u32.to_le_bytes());
        ppi.write(REQUEST, &23u32.to_le_bytes());
        assert_eq!((read(&mut ppi, OUTCOME), read(&mut ppi, REQUEST)), (FAILURE, 5));
        assert_eq!(requests.try_iter().collect::<Vec<_>>(), [(5, 0), (23, 6)]);
    }

    /// Values of function 8 in the specification: 0 not implemented, 4 allowed without a user.
    #[test]
    fn the_standing_of_an_operation_can_be_asked() {
        let mut ppi = Ppi::new(Mail::default(), Box::new(|_, _| 0));
        for (operation, standing) in [(5u32, 4), (22, 4), (1, 0), (24, 0), (u32::MAX, 0)] {
            ppi.write(QUERY, &operation.to_le_bytes());
            assert_eq!(read(&mut ppi, QUERY), standing, "{operation}");
        }
    }

    #[test]
    fn results_are_read_only_and_odd_accesses_ask_for_nothing() {
        let mail = Mail { request: 0, last: 5, response: 0x101 };
        let mut ppi = Ppi::new(mail, Box::new(|_, _| panic!("asked")));
        for (at, len) in [(LAST, 4), (RESPONSE, 4), (OUTCOME, 4), (REQUEST, 1), (REQUEST, 8), (0xfff, 4)] {
            assert_eq!(ppi.write(at, &vec![5; len]), None);
        }
        assert_eq!((read(&mut ppi, REQUEST), read(&mut ppi, LAST), read(&mut ppi, RESPONSE)), (0, 5, 0x101));
        assert_eq!(read(&mut ppi, 0xffe), 0, "over the end of the page");
        let mut wide = [0xee; 16];
        ppi.read(2, &mut wide);
        assert_eq!(wide, [0, 0, 5, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
