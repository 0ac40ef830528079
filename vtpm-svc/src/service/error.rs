// SPDX-License-Identifier: Apache-2.0
//! Why the service does not start, in words for who started it.

use std::io;

use crate::control::listen::SocketError;
use crate::keys::KeyError;
use crate::sandbox::SandboxError;
use crate::tpm::engine::EngineError;
use crate::tpm::manufacture::ManufactureError;
use crate::vmgs::VmgsError;

/// Why the service did not start or ended badly.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ServiceError {
    /// A socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The operating system.
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The image.
    #[error("{path}: {source}")]
    Image { path: String, source: VmgsError },
    /// Somebody put another file in its place.
    #[error("{0}: the image was replaced while it was being opened; start again")]
    Replaced(String),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Certificates.
    #[error(transparent)]
    Manufacture(#[from] ManufactureError),
    /// The cage.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl ServiceError {
    /// The operating system's answer to something.
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what: what.into(), source }
    }
}
