// SPDX-License-Identifier: Apache-2.0
//! Control messages as bytes (`swtpm_ioctls(3)`, UNIX-socket form): big-endian, command number, then a body.
//!
//! Messages do not say how long they are, and clients pad bodies to the size of a C union. So one received
//! message is one command and spare bytes behind it are dropped, except for the two commands that announce
//! how much data follows. A message that is refused before its end is known takes the connection with it:
//! what follows may be anything.

/// TPM 1.2 result codes that the protocol answers with.
pub mod code {
    /// Done.
    pub const OK: u32 = 0;
    /// The body is not what the command needs.
    pub const BAD_PARAMETER: u32 = 3;
    /// It did not work.
    pub const FAIL: u32 = 9;
    /// Unknown command, or not in this state.
    pub const BAD_ORDINAL: u32 = 0x0a;
    /// Does not fit.
    pub const SIZE: u32 = 0x17;
    /// Sockets or descriptors.
    pub const IO: u32 = 0x1f;
    /// Locality above 4.
    pub const BAD_LOCALITY: u32 = 0x3d;
}

/// Command numbers.
pub mod number {
    #![allow(missing_docs)]
    pub const GET_CAPABILITY: u32 = 1;
    pub const INIT: u32 = 2;
    pub const SHUTDOWN: u32 = 3;
    pub const GET_ESTABLISHED: u32 = 4;
    pub const SET_LOCALITY: u32 = 5;
    pub const HASH_START: u32 = 6;
    pub const HASH_DATA: u32 = 7;
    pub const HASH_END: u32 = 8;
    pub const CANCEL: u32 = 9;
    pub const STORE_VOLATILE: u32 = 10;
    pub const RESET_ESTABLISHED: u32 = 11;
    pub const GET_STATEBLOB: u32 = 12;
    pub const SET_STATEBLOB: u32 = 13;
    pub const STOP: u32 = 14;
    pub const GET_CONFIG: u32 = 15;
    pub const SET_DATAFD: u32 = 16;
    pub const SET_BUFFERSIZE: u32 = 17;
    pub const GET_INFO: u32 = 18;
    pub const LOCK_STORAGE: u32 = 19;
    // Ours, far from where swtpm's grow: "CVM" and a number.
    pub const PPI_STATE: u32 = 0x4356_4d01;
    pub const PPI_SUBMIT: u32 = 0x4356_4d02;
    pub const CLOCK_GET: u32 = 0x4356_4d03;
    pub const CLOCK_SET: u32 = 0x4356_4d04;
    pub const COLD: u32 = 0x4356_4d05;
}

/// Capabilities of this server: every bit up to 14, the command header on the data channel, and storage
/// locking.
pub const CAPABILITIES: u32 = 0x1_ffff;
/// Largest state blob that is taken in.
pub const MAX_STATE: u32 = 512 << 10;
/// Largest piece of a measured launch in one message.
pub const MAX_HASH: u32 = 4096;
/// `INIT` flag: delete the volatile state once it has been read.
pub const INIT_DELETE_VOLATILE: u32 = 1;
/// State-blob flag: the blob is encrypted.
pub const STATE_ENCRYPTED: u32 = 2;

/// A parsed request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Request {
    GetCapability,
    Init {
        flags: u32,
    },
    Shutdown,
    GetEstablished,
    SetLocality(u8),
    HashStart,
    HashData(Vec<u8>),
    HashEnd,
    Cancel,
    StoreVolatile,
    ResetEstablished(u8),
    GetStateBlob {
        kind: u32,
        offset: u32,
    },
    SetStateBlob {
        flags: u32,
        kind: u32,
        data: Vec<u8>,
    },
    Stop,
    GetConfig,
    SetDataFd,
    SetBufferSize(u32),
    GetInfo {
        flags: u64,
        offset: u32,
    },
    LockStorage,
    /// The physical-presence request that is pending and the outcome of the last.
    PpiState,
    /// A physical-presence request for the next start.
    PpiSubmit {
        operation: u32,
        argument: u32,
    },
    /// Offset of the guest's clock.
    ClockGet,
    /// The same, to be kept; 100 ns.
    ClockSet(i64),
    /// Forget a stored volatile state: the next power-on is that of a machine that was off.
    Cold,
}

/// What became of a received message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// A whole request.
    Whole(Request),
    /// A request that announces this many bytes in all; the rest is still to come.
    Announces(usize),
    /// A request whose body is missing, or a part of it; with it, it has this many bytes. A client may send
    /// the two apart.
    Short(usize),
    /// Answer with this code; the message is over.
    Refused(u32),
    /// Answer with this code and close: where the message ends is not known.
    Lost(u32),
}

fn be32(b: &[u8], at: usize) -> Option<u32> {
    let bytes: [u8; 4] = b.get(at..at.checked_add(4)?)?.try_into().ok()?;
    Some(u32::from_be_bytes(bytes))
}

/// Parses one received message.
pub fn parse(message: &[u8]) -> Parsed {
    use Parsed::Refused;
    use Parsed::Short;
    use Parsed::Whole;
    let Some(command) = be32(message, 0) else { return Short(4) };
    let body = &message[4..];
    let word = |at: usize| be32(body, at);
    match command {
        number::GET_CAPABILITY => Whole(Request::GetCapability),
        number::INIT => match (word(0), body.len()) {
            (Some(flags), 4) => Whole(Request::Init { flags }),
            (Some(_), _) => Refused(code::BAD_PARAMETER),
            (None, _) => Short(8),
        },
        number::SHUTDOWN => Whole(Request::Shutdown),
        number::GET_ESTABLISHED => Whole(Request::GetEstablished),
        number::SET_LOCALITY => body.first().map_or(Short(5), |l| Whole(Request::SetLocality(*l))),
        number::HASH_START => Whole(Request::HashStart),
        number::HASH_DATA => announced(body, 0, MAX_HASH, Request::HashData),
        number::HASH_END => Whole(Request::HashEnd),
        number::CANCEL => Whole(Request::Cancel),
        number::STORE_VOLATILE => Whole(Request::StoreVolatile),
        number::RESET_ESTABLISHED => body.first().map_or(Short(5), |l| Whole(Request::ResetEstablished(*l))),
        number::GET_STATEBLOB => match (word(4), word(8)) {
            (Some(kind), Some(offset)) => Whole(Request::GetStateBlob { kind, offset }),
            _ => Short(16),
        },
        number::SET_STATEBLOB => match (word(0), word(4)) {
            (Some(flags), Some(kind)) => {
                announced(body, 8, MAX_STATE, |data| Request::SetStateBlob { flags, kind, data })
            }
            _ => Short(16),
        },
        number::STOP => Whole(Request::Stop),
        number::GET_CONFIG => Whole(Request::GetConfig),
        number::SET_DATAFD => Whole(Request::SetDataFd),
        number::SET_BUFFERSIZE => word(0).map_or(Short(8), |size| Whole(Request::SetBufferSize(size))),
        number::GET_INFO => match (word(0), word(4), word(8)) {
            (Some(high), Some(low), Some(offset)) => {
                Whole(Request::GetInfo { flags: u64::from(high) << 32 | u64::from(low), offset })
            }
            _ => Short(16),
        },
        number::LOCK_STORAGE => Whole(Request::LockStorage),
        number::PPI_STATE => Whole(Request::PpiState),
        number::PPI_SUBMIT => match (word(0), word(4)) {
            (Some(operation), Some(argument)) => Whole(Request::PpiSubmit { operation, argument }),
            _ => Short(12),
        },
        number::CLOCK_GET => Whole(Request::ClockGet),
        number::CLOCK_SET => match (word(0), word(4)) {
            (Some(high), Some(low)) => {
                Whole(Request::ClockSet((u64::from(high) << 32 | u64::from(low)).cast_signed()))
            }
            _ => Short(12),
        },
        number::COLD => Whole(Request::Cold),
        _ => Refused(code::BAD_ORDINAL),
    }
}

/// A request with data behind a length at `at`.
fn announced(body: &[u8], at: usize, most: u32, request: impl FnOnce(Vec<u8>) -> Request) -> Parsed {
    let Some(length) = be32(body, at) else { return Parsed::Short(4 + at + 4) };
    if length > most {
        // Its body is on the way, or a part of it is here.
        return Parsed::Lost(code::SIZE);
    }
    let end = at + 4 + length as usize;
    match body.get(at + 4..end) {
        Some(data) => Parsed::Whole(request(data.to_vec())),
        None => Parsed::Announces(4 + end),
    }
}

/// Where a message that announces its length ends.
pub fn announced_end(message: &[u8]) -> Option<usize> {
    let at = match be32(message, 0)? {
        number::HASH_DATA => 4,
        number::SET_STATEBLOB => 12,
        _ => return None,
    };
    Some(at + 4 + be32(message, at)? as usize)
}

/// A response: the result and, only if it is zero, more words and bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Response(Vec<u8>);

impl Response {
    /// Success with nothing behind it.
    pub fn ok() -> Self {
        Self(code::OK.to_be_bytes().to_vec())
    }

    /// A refusal: four bytes and no more.
    pub fn refused(code: u32) -> Self {
        Self(code.to_be_bytes().to_vec())
    }

    /// Appends a word.
    #[must_use]
    pub fn word(mut self, word: u32) -> Self {
        self.0.extend_from_slice(&word.to_be_bytes());
        self
    }

    /// Appends bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The message.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_be_bytes()).collect()
    }

    #[test]
    fn both_sizes_of_a_locality_body_are_taken() {
        assert_eq!(parse(&[0, 0, 0, 5, 3]), Parsed::Whole(Request::SetLocality(3)));
        assert_eq!(parse(&[0, 0, 0, 5, 3, 0, 0, 0]), Parsed::Whole(Request::SetLocality(3)));
        assert_eq!(parse(&[0, 0, 0, 5]), Parsed::Short(5));
    }

    #[test]
    fn init_has_exactly_one_word() {
        assert_eq!(parse(&message(&[2, 1])), Parsed::Whole(Request::Init { flags: 1 }));
        assert_eq!(parse(&message(&[2])), Parsed::Short(8));
        assert_eq!(parse(&message(&[2, 1, 1])), Parsed::Refused(code::BAD_PARAMETER));
    }

    #[test]
    fn a_state_blob_may_come_in_two_messages() {
        let mut m = message(&[13, 0, 1, 5]);
        assert_eq!(parse(&m), Parsed::Announces(21));
        m.extend_from_slice(b"state");
        let data = b"state".to_vec();
        assert_eq!(parse(&m), Parsed::Whole(Request::SetStateBlob { flags: 0, kind: 1, data }));
        assert_eq!(parse(&message(&[13, 0, 1, MAX_STATE + 1])), Parsed::Lost(code::SIZE));
        assert_eq!(parse(&message(&[7, u32::MAX])), Parsed::Lost(code::SIZE));
        assert_eq!(parse(&message(&[13, 0, 1])), Parsed::Short(16));
    }

    #[test]
    fn unknown_commands_are_bad_ordinals() {
        for n in [0, 20, 0x8001_0000, u32::MAX] {
            assert_eq!(parse(&message(&[n, 0, 0])), Parsed::Refused(code::BAD_ORDINAL));
        }
        assert_eq!(parse(&[0, 0, 1]), Parsed::Short(4));
    }

    #[test]
    fn a_clock_offset_keeps_its_sign() {
        assert_eq!(parse(&message(&[0x4356_4d04, u32::MAX, u32::MAX])), Parsed::Whole(Request::ClockSet(-1)));
        assert_eq!(parse(&message(&[0x4356_4d04, 1])), Parsed::Short(12));
    }

    proptest! {
        #[test]
        fn no_message_panics(command in prop_oneof![0u32..22, 0x4356_4d00u32..0x4356_4d07], body in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut m = command.to_be_bytes().to_vec();
            m.extend_from_slice(&body);
            match parse(&m) {
                Parsed::Announces(total) => prop_assert!(total > m.len() && total <= 16 + MAX_STATE as usize),
                Parsed::Short(total) => prop_assert!(total > m.len() && total <= 16),
                _ => {}
            }
        }
    }
}
