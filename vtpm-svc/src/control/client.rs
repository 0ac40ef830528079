// SPDX-License-Identifier: Apache-2.0
//! The client side: what the monitor uses to drive a TPM behind the control socket, ours or stock swtpm.
//!
//! The data socket is one half of a pair whose other half is handed to the server. Replies are matched to
//! commands by reading exactly one response per command; there is no time-out on a command, because making a
//! key may take seconds. Control requests have a long one: a service that does not answer them is as good as
//! gone, and its socket is closed.

use std::io;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use crate::lock::lock;

use super::data;
use super::data::Received;
use super::socket::Stream;
use super::wire::INIT_DELETE_VOLATILE;
use super::wire::code;
use super::wire::number;

/// Longest wait for the answer to a control request. Powering on may take long: it makes the TPM, and its
/// certified keys.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why the TPM could not be driven.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ClientError {
    /// The socket.
    #[error("TPM {what}: {source}")]
    Io { what: &'static str, source: io::Error },
    /// The server's answer.
    #[error("the TPM service refused {what} with code {code:#x}")]
    Refused { what: &'static str, code: u32 },
    /// The server does not have what is needed.
    #[error("the TPM service at {path} lacks capabilities {missing:#x}")]
    Capabilities { path: String, missing: u32 },
    /// A response that is not one.
    #[error("the TPM service's response is malformed")]
    Malformed,
    /// The data connection was given up after an earlier error.
    #[error("the connection to the TPM was closed after an answer that could not be used")]
    Closed,
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> ClientError {
    move |source| ClientError::Io { what, source }
}

/// A big-endian word of a reply, whose length was asked for.
fn word(reply: &[u8], at: usize) -> u32 {
    reply[at..at + 4].iter().fold(0, |v, b| v << 8 | u32::from(*b))
}

/// The control connection; cloneable, so that a cancel can be sent while a command runs.
#[derive(Clone)]
pub struct Control {
    stream: Arc<Mutex<UnixStream>>,
}

impl Control {
    fn call(
        &self,
        what: &'static str,
        command: u32,
        body: &[u8],
        reply: usize,
    ) -> Result<Vec<u8>, ClientError> {
        let mut stream = lock(&self.stream);
        Self::exchange(&mut stream, what, command, body, reply)
    }

    fn exchange(
        stream: &mut UnixStream,
        what: &'static str,
        command: u32,
        body: &[u8],
        reply: usize,
    ) -> Result<Vec<u8>, ClientError> {
        let mut message = command.to_be_bytes().to_vec();
        message.extend_from_slice(body);
        let answer = stream.write_all(&message).map_err(io_error(what));
        let answer = answer.and_then(|()| Self::reply(stream, what, reply));
        if let Err(ClientError::Io { .. }) = answer {
            // An answer that comes late would be taken for the next one's.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        answer
    }

    fn reply(stream: &mut UnixStream, what: &'static str, reply: usize) -> Result<Vec<u8>, ClientError> {
        use std::io::Read;
        let mut result = [0; 4];
        stream.read_exact(&mut result).map_err(io_error(what))?;
        let code = u32::from_be_bytes(result);
        if code != 0 {
            return Err(ClientError::Refused { what, code });
        }
        let mut rest = vec![0; reply];
        stream.read_exact(&mut rest).map_err(io_error(what))?;
        Ok(rest)
    }

    /// Cancels the command that is running.
    pub fn cancel(&self) -> Result<(), ClientError> {
        self.call("cancel", number::CANCEL, &[], 0).map(|_| ())
    }

    /// Whether a dynamic launch has happened.
    pub fn established(&self) -> Result<bool, ClientError> {
        self.call("get-established", number::GET_ESTABLISHED, &[], 4).map(|r| r[0] != 0)
    }

    /// Resets that flag.
    pub fn reset_established(&self, locality: u8) -> Result<(), ClientError> {
        self.call("reset-established", number::RESET_ESTABLISHED, &[locality, 0, 0, 0], 0).map(|_| ())
    }

    /// Sets the locality of later commands.
    pub fn set_locality(&self, locality: u8) -> Result<(), ClientError> {
        self.call("set-locality", number::SET_LOCALITY, &[locality, 0, 0, 0], 0).map(|_| ())
    }

    /// Powers the TPM off.
    pub fn stop(&self) -> Result<(), ClientError> {
        self.call("stop", number::STOP, &[], 0).map(|_| ())
    }

    /// Powers the TPM on; `resume` continues from a stored volatile state and deletes it.
    pub fn init(&self, resume: bool) -> Result<(), ClientError> {
        let flags = if resume { INIT_DELETE_VOLATILE } else { 0 };
        self.call("init", number::INIT, &flags.to_be_bytes(), 0).map(|_| ())
    }

    /// Asks for, or (while the TPM is off) sets, the size of the command buffer.
    pub fn buffer_size(&self, wanted: u32) -> Result<u32, ClientError> {
        let r = self.call("set-buffersize", number::SET_BUFFERSIZE, &wanted.to_be_bytes(), 12)?;
        Ok(u32::from_be_bytes([r[0], r[1], r[2], r[3]]))
    }

    /// Asks for a physical-presence operation at the TPM's next start; the answer is what the interface
    /// returns to the guest (0 accepted, 1 not implemented, 2 failure). Only our service knows it.
    pub fn submit_ppi(&self, operation: u32, argument: u32) -> Result<u32, ClientError> {
        let mut stream = lock(&self.stream);
        Self::submit(&mut stream, operation, argument)
    }

    /// The same for somebody who may not wait: `hears` gets the answer and says whether it still counts. If
    /// it does not, what was stored is taken back before anything else goes over this connection: what waited
    /// before waits again, or nothing does.
    pub fn submit_ppi_for(
        &self,
        operation: u32,
        argument: u32,
        hears: impl FnOnce(Result<u32, ClientError>) -> bool,
    ) -> Result<(), ClientError> {
        let mut stream = lock(&self.stream);
        let before = match Self::exchange(&mut stream, "ppi-state", number::PPI_STATE, &[], 16) {
            Ok(before) => before,
            Err(e) => {
                hears(Err(e));
                return Ok(());
            }
        };
        let answer = Self::submit(&mut stream, operation, argument);
        let stored = matches!(answer, Ok(0));
        if hears(answer) || !stored {
            return Ok(());
        }
        // A service that has seen too many requests refuses another, but never that there be none.
        match Self::submit(&mut stream, word(&before, 0), word(&before, 4)) {
            Ok(0) => Ok(()),
            _ => Self::submit(&mut stream, 0, 0).map(|_| ()),
        }
    }

    fn submit(stream: &mut UnixStream, operation: u32, argument: u32) -> Result<u32, ClientError> {
        let body = [operation.to_be_bytes(), argument.to_be_bytes()].concat();
        let r = Self::exchange(stream, "ppi-submit", number::PPI_SUBMIT, &body, 4)?;
        Ok(word(&r, 0))
    }

    /// Pending operation, its argument, last operation, its response. Only our service knows it.
    pub fn ppi(&self) -> Result<[u32; 4], ClientError> {
        let r = self.call("ppi-state", number::PPI_STATE, &[], 16)?;
        Ok([word(&r, 0), word(&r, 4), word(&r, 8), word(&r, 12)])
    }

    /// How far the guest's clock is ahead of UTC, in units of 100 ns, if that is known. Only our service
    /// knows it.
    pub fn clock(&self) -> Result<Option<i64>, ClientError> {
        let r = self.call("clock-get", number::CLOCK_GET, &[], 12)?;
        let offset = u64::from(word(&r, 4)) << 32 | u64::from(word(&r, 8));
        Ok((word(&r, 0) != 0).then_some(offset.cast_signed()))
    }

    /// Keeps that offset; durable when it returns.
    pub fn set_clock(&self, offset: i64) -> Result<(), ClientError> {
        self.call("clock-set", number::CLOCK_SET, &offset.to_be_bytes(), 0).map(|_| ())
    }

    /// Forgets a volatile state that was stored, so that the next power-on is a fresh one. A service that
    /// does not know the request (stock swtpm) refuses it.
    pub fn cold(&self) -> Result<(), ClientError> {
        self.call("cold", number::COLD, &[], 0).map(|_| ())
    }

    /// Ends the service.
    pub fn shutdown(&self) -> Result<(), ClientError> {
        self.call("shutdown", number::SHUTDOWN, &[], 0).map(|_| ())
    }
}

/// A TPM behind a control socket.
pub struct Client {
    control: Control,
    data: Stream,
    /// Whether the next bytes on the data socket are the answer to the next command.
    in_step: bool,
    locality: u8,
}

impl Client {
    /// Connects, hands over a data socket and checks that everything that is needed is there. The TPM is not
    /// started.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Io { what: "control socket (is vtpm-svc running?)", source })?;
        Self::over(stream, &path.display().to_string())
    }

    /// The same over a control connection that exists already; `name` is for messages.
    pub fn over(stream: UnixStream, name: &str) -> Result<Self, ClientError> {
        stream.set_read_timeout(Some(PATIENCE)).map_err(io_error("control socket"))?;
        let (ours, theirs) = UnixStream::pair().map_err(io_error("data socket"))?;
        let handover = Stream::Unix(stream.try_clone().map_err(io_error("control socket"))?);
        handover
            .send_with_fd(&number::SET_DATAFD.to_be_bytes(), &OwnedFd::from(theirs))
            .map_err(io_error("set-datafd"))?;
        let control = Control { stream: Arc::new(Mutex::new(stream)) };
        {
            let mut stream = lock(&control.stream);
            Control::reply(&mut stream, "set-datafd", 0)?;
        }
        let caps = control.call("get-capability", number::GET_CAPABILITY, &[], 4)?;
        // INIT, SHUTDOWN, GET_EST, SET_LOCALITY, CANCEL, RESET_EST, STOP, SET_DATAFD, SET_BUFFERSIZE.
        const NEEDED: u32 = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 10 | 1 << 12 | 1 << 13;
        let missing = NEEDED & !u32::from_be_bytes([caps[0], caps[1], caps[2], caps[3]]);
        if missing != 0 {
            return Err(ClientError::Capabilities { path: name.to_owned(), missing });
        }
        Ok(Self { control, data: Stream::Unix(ours), in_step: true, locality: 0 })
    }

    /// The control connection.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Power cycle, as at a reset of the guest: off, buffer of `buffer` bytes (0: leave it), on, from the
    /// beginning.
    pub fn reset(&mut self, buffer: u32) -> Result<(), ClientError> {
        self.control.stop()?;
        // Without this the TPM would go on where somebody saved it. swtpm has no such request; a TPM of its
        // that was saved answers the start-up that follows with an error.
        match self.control.cold() {
            Ok(()) | Err(ClientError::Refused { code: code::BAD_ORDINAL, .. }) => {}
            Err(e) => return Err(e),
        }
        if buffer != 0 {
            self.control.buffer_size(buffer)?;
        }
        self.control.init(false)?;
        self.locality = 0;
        Ok(())
    }

    /// Runs one command and returns its response, however long it takes.
    ///
    /// After an answer that was none, or none at all, the connection is closed: a late one would be taken for
    /// the next one's.
    pub fn execute(&mut self, locality: u8, command: &[u8]) -> Result<Vec<u8>, ClientError> {
        if !self.in_step {
            return Err(ClientError::Closed);
        }
        if locality != self.locality {
            self.control.set_locality(locality)?;
            self.locality = locality;
        }
        let answer = self.transmit(command);
        if answer.is_err() {
            self.in_step = false;
            self.data.shutdown();
        }
        answer
    }

    fn transmit(&mut self, command: &[u8]) -> Result<Vec<u8>, ClientError> {
        self.data.write_all(command).map_err(io_error("command"))?;
        match data::receive(&mut self.data).map_err(io_error("response"))? {
            Received::Command(response) if response.prefix.is_none() => Ok(response.command),
            Received::End => {
                Err(ClientError::Io { what: "response", source: io::ErrorKind::UnexpectedEof.into() })
            }
            _ => Err(ClientError::Malformed),
        }
    }
}
