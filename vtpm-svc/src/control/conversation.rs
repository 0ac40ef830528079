// SPDX-License-Identifier: Apache-2.0
//! One control client: messages read whole, answered, and never taken for something else.
//!
//! Messages do not say how long they are (see [`super::wire`]). When it is not known where the next one
//! begins, the client is answered and loses its connection: the rest of a refused message is somebody's data,
//! and must not be read as commands.

use std::io;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::clients::Seat;
use super::socket::Stream;
use super::wire;
use super::wire::Parsed;
use super::wire::Request;
use super::wire::Response;
use super::wire::code;

/// Room for the largest fixed message; what is announced beyond it is read on demand.
const ROOM: usize = 4096 + 64;
/// Longest wait for a body that a client sends apart from its command.
const APART: Duration = Duration::from_millis(200);
/// Longest wait for each piece of what was announced.
const ANNOUNCED: Duration = Duration::from_secs(10);

/// A message and the descriptor that came with it.
struct Message {
    parsed: Parsed,
    fd: Option<OwnedFd>,
}

/// Reads one message; `None` when the client is gone, or does not finish what it announced.
fn receive(stream: &Stream) -> io::Result<Option<Message>> {
    let (mut message, fd) = stream.receive(ROOM)?;
    if message.is_empty() {
        return Ok(None);
    }
    let mut parsed = wire::parse(&message);
    loop {
        let (total, patience) = match parsed {
            Parsed::Announces(total) => (total, ANNOUNCED),
            Parsed::Short(total) => (total, APART),
            // A message that fills the room goes on behind it, if what it announced does not end just there.
            _ if message.len() == ROOM && wire::announced_end(&message) != Some(ROOM) => {
                parsed = Parsed::Lost(code::SIZE);
                break;
            }
            _ => break,
        };
        stream.set_patience(Some(patience))?;
        let more = stream.receive(total - message.len());
        stream.set_patience(None)?;
        match more {
            Ok((more, _)) if !more.is_empty() => message.extend_from_slice(&more),
            _ if matches!(parsed, Parsed::Short(_)) => {
                parsed = Parsed::Lost(code::BAD_PARAMETER);
                break;
            }
            _ => return Ok(None),
        }
        parsed = wire::parse(&message);
    }
    zeroize::Zeroize::zeroize(&mut message);
    Ok(Some(Message { parsed, fd }))
}

/// Serves a client until it is gone (false), or has asked for the end of the service (true).
pub(super) fn converse(
    stream: &mut Stream,
    seat: Option<&Seat>,
    answer: impl Fn(Request, Option<OwnedFd>) -> Response,
) -> bool {
    while let Ok(Some(Message { parsed, fd })) = receive(stream) {
        if let Some(seat) = seat {
            seat.busy();
        }
        let end = matches!(parsed, Parsed::Whole(Request::Shutdown));
        let (response, lost) = match parsed {
            Parsed::Whole(Request::Shutdown) => (Response::ok(), false),
            Parsed::Whole(request) => (answer(request, fd), false),
            Parsed::Refused(code) => (Response::refused(code), false),
            Parsed::Lost(code) => (Response::refused(code), true),
            Parsed::Announces(_) | Parsed::Short(_) => (Response::refused(code::BAD_PARAMETER), true),
        };
        // Before the answer is sent: a client that does not take it is idle.
        if let Some(seat) = seat {
            seat.answered();
        }
        let sent = stream.write_all(response.as_bytes());
        if end {
            return true;
        }
        if lost {
            stream.take_leave();
        }
        if lost || sent.is_err() {
            return false;
        }
    }
    false
}
