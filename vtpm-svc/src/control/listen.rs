// SPDX-License-Identifier: Apache-2.0
//! The service's sockets, opened in two steps: descriptors that were inherited at once, names only when the
//! image is locked.
//!
//! A start that fails must leave a service that runs untouched, so no name is replaced before this process is
//! known to be the one that serves, and a socket that somebody listens on is never replaced.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;

use super::socket::Listener;
use super::socket::Stream;
use crate::process;

/// Where a channel listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Channel {
    /// A UNIX socket.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A TCP port of a loopback address.
    Tcp {
        /// The address.
        address: std::net::SocketAddr,
    },
    /// A listening UNIX socket that was inherited (socket activation).
    Listening(RawFd),
    /// A connected UNIX socket that was inherited.
    Connected(RawFd),
}

/// A socket that there is not.
#[derive(Debug, thiserror::Error)]
#[error("socket {what}: {source}")]
pub struct SocketError {
    /// Which.
    what: String,
    /// The operating system's answer.
    source: io::Error,
}

/// A channel on its way.
pub enum Open {
    /// Its name or port is still to be made.
    Wanted(Channel),
    /// It listens.
    Listening(Listener),
    /// Its only client is there.
    Connected(Stream),
}

fn named(what: String) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError { what, source }
}

impl Open {
    /// Takes over what was inherited; programs that are started from now on do not get it.
    pub fn inherit(channel: Channel) -> Result<Self, SocketError> {
        let take = |fd: RawFd| process::inherited(fd).map_err(named(format!("descriptor {fd}")));
        Ok(match channel {
            Channel::Listening(fd) => Self::Listening(Listener::Unix(UnixListener::from(take(fd)?))),
            Channel::Connected(fd) => Self::Connected(Stream::from_fd(take(fd)?)),
            wanted => Self::Wanted(wanted),
        })
    }

    /// Makes what is still to be made; `made` is told of a name that has come into the file system.
    pub fn listen(self, made: impl FnOnce(&Path)) -> Result<Self, SocketError> {
        Ok(match self {
            Self::Wanted(Channel::Unix { path, mode }) => {
                let listener = bind(&path, mode).map_err(named(path.display().to_string()))?;
                made(&path);
                Self::Listening(Listener::Unix(listener))
            }
            Self::Wanted(Channel::Tcp { address }) => {
                crate::log::warn(&format!(
                    "{address} is open to every user of this host: each can use the TPM in any locality, and stop it; \
                     type=unixio is its owner's alone"
                ));
                let listener = std::net::TcpListener::bind(address).map_err(named(address.to_string()))?;
                Self::Listening(Listener::Tcp(listener))
            }
            other => other,
        })
    }
}

fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    // A socket that an earlier run left behind is in the way; anything else is not ours to remove.
    if path.symlink_metadata().is_ok_and(|m| m.file_type().is_socket()) {
        if is_served(path)? {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process serves on it; end that one, or give another path",
            ));
        }
        std::fs::remove_file(path)?;
    }
    if path.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.exists()) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "its folder does not exist; make it first"));
    }
    // From its first moment nobody else may connect; there is one thread yet, so the mask is nobody else's.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o777 & !mode));
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    let listener = listener?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Whether a process holds the socket of this name. The question is asked with a socket of another kind,
/// which the kernel refuses in different words for one that is held and one that is not: a connection that is
/// opened only to look would be a client that goes away, and may end a service.
fn is_served(path: &Path) -> io::Result<bool> {
    match UnixDatagram::unbound()?.connect(path) {
        Err(e) if e.raw_os_error() == Some(libc::ECONNREFUSED) => Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::EPROTOTYPE) => Ok(true),
        // A datagram socket, and somebody reads it.
        Ok(()) => Ok(true),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_is_held_is_told_from_one_that_is_left() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("s");
        let held = UnixListener::bind(&path).expect("bind");
        assert!(is_served(&path).expect("asked"));
        let error = bind(&path, 0o600).expect_err("held");
        assert!(error.to_string().contains("another process serves on it"), "{error}");
        held.set_nonblocking(true).expect("flag");
        assert!(held.accept().is_err(), "nobody has connected");
        drop(held);
        assert!(!is_served(&path).expect("asked"));
        bind(&path, 0o600).expect("replaced");
    }

    #[test]
    fn what_is_no_socket_is_not_removed() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("file");
        std::fs::write(&path, "text").expect("write");
        assert!(bind(&path, 0o600).is_err());
        assert_eq!(std::fs::read(&path).expect("still there"), b"text");
    }
}
