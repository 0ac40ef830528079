// SPDX-License-Identifier: Apache-2.0
//! Stream sockets of either family, and the passing of a descriptor with a message.

use std::io;
use std::io::Read;
use std::io::Write;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;

/// How long a client that has lost its connection may pause between what it still sends, and how long it may
/// go on in all.
const LEAVE: Duration = Duration::from_millis(200);
const LONGEST_LEAVE: Duration = Duration::from_secs(2);

/// A connected stream socket.
#[derive(Debug)]
pub enum Stream {
    /// UNIX.
    Unix(UnixStream),
    /// Loopback TCP.
    Tcp(TcpStream),
}

impl Stream {
    /// A UNIX stream from a descriptor that a client handed over.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self::Unix(UnixStream::from(fd))
    }

    /// The same, where the client may have made it for an event loop: threads here wait in reads.
    pub fn handed_over(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags - rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self::from_fd(fd))
    }

    /// How long a read waits; `None` is for ever.
    pub fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.set_read_timeout(patience),
            Self::Tcp(s) => s.set_read_timeout(patience),
        }
    }

    /// How long a write waits for a client that does not read.
    pub fn set_writing_patience(&self, patience: Duration) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.set_write_timeout(Some(patience)),
            Self::Tcp(s) => s.set_write_timeout(Some(patience)),
        }
    }

    /// Ends the connection under whoever reads from it.
    pub fn shutdown(&self) {
        // It may be over already.
        let _ = match self {
            Self::Unix(s) => s.shutdown(Shutdown::Both),
            Self::Tcp(s) => s.shutdown(Shutdown::Both),
        };
    }

    /// A second handle on the same socket.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(s) => Self::Unix(s.try_clone()?),
            Self::Tcp(s) => Self::Tcp(s.try_clone()?),
        })
    }

    /// Receives one message of at most `room` bytes, and a descriptor if one came with it.
    pub fn receive(&self, room: usize) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut data = vec![0; room];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let fd = match self {
            Self::Unix(s) => s.as_fd(),
            Self::Tcp(s) => s.as_fd(),
        };
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(fd, &mut [io::IoSliceMut::new(&mut data)], &mut ancillary, flags)
        })?;
        data.truncate(got.bytes);
        let mut first = None;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                // Descriptors beyond the first are closed by being dropped.
                for fd in fds {
                    first.get_or_insert(fd);
                }
            }
        }
        Ok((data, first))
    }

    /// Says nothing more, and drops what still comes: closing a socket with unread bytes would take back the
    /// answer that was just sent, and a client that is still sending would not get to read it.
    pub fn take_leave(&self) {
        let done = match self {
            Self::Unix(s) => s.shutdown(Shutdown::Write),
            Self::Tcp(s) => s.shutdown(Shutdown::Write),
        };
        if done.and_then(|()| self.set_patience(Some(LEAVE))).is_err() {
            return;
        }
        let (mut junk, started) = ([0; 4096], Instant::now());
        let fd = match self {
            Self::Unix(s) => s.as_fd(),
            Self::Tcp(s) => s.as_fd(),
        };
        while started.elapsed() < LONGEST_LEAVE
            && matches!(rustix::net::recv(fd, &mut junk, RecvFlags::empty()), Ok((1.., _)))
        {}
    }

    /// Sends a message with a descriptor.
    pub fn send_with_fd(&self, data: &[u8], fd: &OwnedFd) -> io::Result<()> {
        let Self::Unix(s) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = rustix::net::sendmsg(s, &[io::IoSlice::new(data)], &mut ancillary, SendFlags::NOSIGNAL)?;
        if sent == data.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.read(buffer),
            Self::Tcp(s) => s.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write(data),
            Self::Tcp(s) => s.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// UNIX.
    Unix(UnixListener),
    /// Loopback TCP.
    Tcp(TcpListener),
}

impl Listener {
    /// Waits for a client.
    pub fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Unix(l) => Stream::Unix(l.accept()?.0),
            Self::Tcp(l) => {
                let stream = l.accept()?.0;
                // A response is one write; waiting to merge it with another only costs time.
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
        })
    }
}
