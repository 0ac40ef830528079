// SPDX-License-Identifier: Apache-2.0
//! The messages between the harness and the agent in L1, over any byte stream.
//!
//! A frame is a length (u32, little-endian, of what follows), a kind (u8), a job number (u32, little-endian),
//! and a payload: raw bytes for streams, JSON for the rest. The peer is our own program, yet its kernel and
//! its emulator may break: a reader checks length and kind and never allocates more than [`MAX_FRAME`].

use std::io;
use std::io::Read;
use std::io::Write;
use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::job::Ending;
use crate::job::Job;

/// Largest frame that a reader takes, in bytes.
pub const MAX_FRAME: usize = 1 << 20;

/// Name of the virtio-serial port that carries the frames.
pub const PORT_NAME: &str = "cvmm.agent";

/// One message in either direction.
#[derive(Clone, Debug)]
pub enum Message {
    /// Harness to agent: run this.
    Start(Job),
    /// Harness to agent: bytes for the job's standard input; empty closes it.
    Stdin(Vec<u8>),
    /// Harness to agent: send this signal to the job.
    Signal(i32),
    /// Agent to harness, once, job number 0: ready for jobs.
    Hello(Hello),
    /// Agent to harness: the job wrote this to its standard output.
    Stdout(Vec<u8>),
    /// Agent to harness: the job wrote this to its standard error.
    Stderr(Vec<u8>),
    /// Agent to harness: the job is over.
    Ended(Ending, Duration),
}

/// What the agent says about its machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Kernel release.
    pub kernel: String,
    /// `None` if `/dev/kvm` could be opened, else the reason.
    pub kvm_error: Option<String>,
}

/// Writes one frame.
pub fn write(stream: &mut impl Write, job: u32, message: &Message) -> io::Result<()> {
    let (kind, payload) = match message {
        Message::Start(job) => (1, serde_json::to_vec(job)?),
        Message::Stdin(bytes) => (2, bytes.clone()),
        Message::Signal(signal) => (3, signal.to_le_bytes().to_vec()),
        Message::Hello(hello) => (4, serde_json::to_vec(hello)?),
        Message::Stdout(bytes) => (5, bytes.clone()),
        Message::Stderr(bytes) => (6, bytes.clone()),
        Message::Ended(ending, time) => (7, serde_json::to_vec(&(ending, time))?),
    };
    let length = payload.len() + 5;
    if length > MAX_FRAME {
        return Err(bad(format!("a frame of {length} bytes is over the limit of {MAX_FRAME}")));
    }
    let mut frame = Vec::with_capacity(length + 4);
    frame.extend_from_slice(&(length as u32).to_le_bytes());
    frame.push(kind);
    frame.extend_from_slice(&job.to_le_bytes());
    frame.extend_from_slice(&payload);
    stream.write_all(&frame)?;
    stream.flush()
}

/// Reads one frame: its job number and message.
pub fn read(stream: &mut impl Read) -> io::Result<(u32, Message)> {
    let mut word = [0; 4];
    stream.read_exact(&mut word)?;
    let length = u32::from_le_bytes(word) as usize;
    if !(5..=MAX_FRAME).contains(&length) {
        return Err(bad(format!("a frame length of {length} is not between 5 and {MAX_FRAME}")));
    }
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    stream.read_exact(&mut word)?;
    let job = u32::from_le_bytes(word);
    let mut payload = vec![0; length - 5];
    stream.read_exact(&mut payload)?;
    let message = match kind[0] {
        1 => Message::Start(json(&payload)?),
        2 => Message::Stdin(payload),
        3 => Message::Signal(i32::from_le_bytes(
            payload.try_into().map_err(|_| bad("a signal frame must hold 4 bytes".into()))?,
        )),
        4 => Message::Hello(json(&payload)?),
        5 => Message::Stdout(payload),
        6 => Message::Stderr(payload),
        7 => {
            let (ending, time) = json(&payload)?;
            Message::Ended(ending, time)
        }
        other => return Err(bad(format!("unknown frame kind {other}"))),
    };
    Ok((job, message))
}

fn json<T: DeserializeOwned>(payload: &[u8]) -> io::Result<T> {
    serde_json::from_slice(payload).map_err(|error| bad(format!("frame payload: {error}")))
}

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_the_documented_bytes() {
        let mut bytes = Vec::new();
        write(&mut bytes, 3, &Message::Stdout(b"hi".to_vec())).unwrap();
        assert_eq!(bytes, [7, 0, 0, 0, 5, 3, 0, 0, 0, b'h', b'i']);
    }

    #[test]
    fn an_ending_survives_the_journey() {
        let mut bytes = Vec::new();
        write(&mut bytes, 9, &Message::Ended(Ending::Signal(11), Duration::from_millis(5))).unwrap();
        let (job, message) = read(&mut bytes.as_slice()).unwrap();
        assert!(matches!(message, Message::Ended(Ending::Signal(11), t) if t.as_millis() == 5));
        assert_eq!(job, 9);
    }

    #[test]
    fn hostile_frames_are_errors() {
        for bytes in [
            &[0xff, 0xff, 0xff, 0xff, 5, 0, 0, 0, 0][..],
            &[4, 0, 0, 0, 5, 0, 0, 0, 0],
            &[5, 0, 0, 0, 99, 0, 0, 0, 0],
            &[6, 0, 0, 0, 3, 0, 0, 0, 0, 1],
            &[6, 0, 0, 0, 1, 0, 0, 0, 0, b'{'],
            &[5, 0, 0],
        ] {
            assert!(read(&mut &bytes[..]).is_err(), "{bytes:?} was accepted");
        }
    }
}
