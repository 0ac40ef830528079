// SPDX-License-Identifier: Apache-2.0
//! The data channel: TPM commands in, TPM responses out, each as long as its own header says.
//!
//! A client may put a nine-byte prefix in front (`TPM_SEND_COMMAND`, locality, length), as the simulator of
//! the reference code has it; the response then has its length in front and a zero word behind.

use std::io;
use std::io::Read;

/// Largest command or response.
pub const MAX_COMMAND: usize = 4096;
/// Shortest command or response: the header.
pub const HEADER: usize = 10;
/// `TPM_RC_COMMAND_SIZE`.
const RC_COMMAND_SIZE: u32 = 0x142;
/// `TPM_RC_FAILURE`.
const RC_FAILURE: u32 = 0x101;
/// Command number of the prefix.
const SEND_COMMAND: u32 = 8;

/// A command as received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// The command's bytes, header included.
    pub command: Vec<u8>,
    /// Locality from the prefix, if there was one.
    pub prefix: Option<u8>,
}

/// What came over the channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// A command.
    Command(Incoming),
    /// A length that cannot be: answer, then close, because the next command's start is unknown.
    BadLength,
    /// The client is gone.
    End,
}

/// Reads one command; pipelined ones stay in the stream.
pub fn receive(stream: &mut impl Read) -> io::Result<Received> {
    let mut head = [0u8; HEADER];
    if !fill(stream, &mut head[..6])? {
        return Ok(Received::End);
    }
    let mut prefix = None;
    let mut announced = None;
    if head[..4] == SEND_COMMAND.to_be_bytes() {
        prefix = Some(head[4]);
        let mut rest = [0; 3];
        if !fill(stream, &mut rest)? {
            return Ok(Received::End);
        }
        announced = Some(u32::from_be_bytes([head[5], rest[0], rest[1], rest[2]]));
        if !fill(stream, &mut head[..6])? {
            return Ok(Received::End);
        }
    }
    let length = u32::from_be_bytes([head[2], head[3], head[4], head[5]]);
    let fits = (HEADER as u32..=MAX_COMMAND as u32).contains(&length);
    if !fits || announced.is_some_and(|a| a != length) {
        return Ok(Received::BadLength);
    }
    let mut command = vec![0; length as usize];
    command[..6].copy_from_slice(&head[..6]);
    if !fill(stream, &mut command[6..])? {
        return Ok(Received::End);
    }
    Ok(Received::Command(Incoming { command, prefix }))
}

/// Fills the buffer; false when the stream ends first.
fn fill(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match stream.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// A response that carries nothing but a code.
pub fn error_response(code: u32) -> Vec<u8> {
    let mut r = vec![0x80, 1, 0, 0, 0, HEADER as u8];
    r.extend_from_slice(&code.to_be_bytes());
    r
}

/// The answer to a length that cannot be.
pub fn bad_length() -> Vec<u8> {
    error_response(RC_COMMAND_SIZE)
}

/// The answer when the TPM is off or out of order: the client takes it for failed. Before the power-on its
/// tag tells a probing client that this is a TPM 2.0.
pub fn failure() -> Vec<u8> {
    error_response(RC_FAILURE)
}

/// A response as it goes over the channel.
pub fn encode(response: &[u8], prefixed: bool) -> Vec<u8> {
    if !prefixed {
        return response.to_vec();
    }
    let mut out = (response.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(response);
    out.extend_from_slice(&[0; 4]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GET_RANDOM: &[u8] = &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8];

    #[test]
    fn pipelined_commands_come_one_by_one() {
        let mut wire: &[u8] = &[GET_RANDOM, GET_RANDOM, &GET_RANDOM[..7]].concat();
        let one = Received::Command(Incoming { command: GET_RANDOM.to_vec(), prefix: None });
        assert_eq!(receive(&mut wire).expect("read"), one);
        assert_eq!(receive(&mut wire).expect("read"), one);
        assert_eq!(receive(&mut wire).expect("read"), Received::End);
    }

    #[test]
    fn a_prefix_carries_the_locality_and_must_agree() {
        let mut wire = vec![0, 0, 0, 8, 3, 0, 0, 0, 12];
        wire.extend_from_slice(GET_RANDOM);
        let got = receive(&mut wire.as_slice()).expect("read");
        assert_eq!(got, Received::Command(Incoming { command: GET_RANDOM.to_vec(), prefix: Some(3) }));
        wire[8] = 13;
        assert_eq!(receive(&mut wire.as_slice()).expect("read"), Received::BadLength);
        assert_eq!(encode(&[1, 2], true), [0, 0, 0, 2, 1, 2, 0, 0, 0, 0]);
    }

    #[test]
    fn lengths_that_cannot_be_are_not_believed() {
        for length in [0u32, 9, 4097, u32::MAX] {
            let mut wire = vec![0x80, 1];
            wire.extend_from_slice(&length.to_be_bytes());
            assert_eq!(receive(&mut wire.as_slice()).expect("read"), Received::BadLength);
        }
        assert_eq!(failure(), [0x80, 1, 0, 0, 0, 10, 0, 0, 1, 1]);
    }

    proptest! {
        #[test]
        fn no_stream_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut wire = bytes.as_slice();
            while let Ok(Received::Command(c)) = receive(&mut wire) {
                prop_assert!(c.command.len() >= HEADER && c.command.len() <= MAX_COMMAND);
            }
        }
    }
}
