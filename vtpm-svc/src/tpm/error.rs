// SPDX-License-Identifier: Apache-2.0
//! Why a TPM does not do what a client asked. What an operator has to know of it has been logged by then.

use super::engine::EngineError;

/// Why a TPM did not do it.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// One that there is not, or that clients may not use.
    #[error("locality {0} is not for clients")]
    Locality(u8),
    /// The policy of this service.
    #[error("this TPM's state neither leaves nor enters")]
    Forbidden,
    /// The image cannot be read or written.
    #[error("the guest-state file fails")]
    Image,
    /// A value that the record cannot hold.
    #[error("the value is out of range")]
    Value,
}
