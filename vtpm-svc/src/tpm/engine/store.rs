// SPDX-License-Identifier: Apache-2.0
//! The state of the TPM as the library hands it out: blobs, and the promise of whoever keeps them.

use zeroize::Zeroizing;

/// One of the library's state blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blob {
    /// Seeds, NV, persistent objects.
    Permanent,
    /// PCRs, sessions, transient objects.
    Volatile,
    /// Unused by TPM 2.0, but the library may name it.
    Save,
}

impl Blob {
    pub(super) fn from_name(name: &str) -> Option<Self> {
        match name {
            "permall" => Some(Self::Permanent),
            "volatilestate" => Some(Self::Volatile),
            "savestate" => Some(Self::Save),
            _ => None,
        }
    }

    /// The number that library and control protocol use.
    pub fn number(self) -> u32 {
        match self {
            Self::Permanent => 1,
            Self::Volatile => 2,
            Self::Save => 4,
        }
    }

    /// The state-blob type of the control protocol (1, 2, 3).
    pub fn from_protocol(kind: u32) -> Option<Self> {
        match kind {
            1 => Some(Self::Permanent),
            2 => Some(Self::Volatile),
            3 => Some(Self::Save),
            _ => None,
        }
    }
}

/// A blob could not be read or written; the details are the store's to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state store failed")]
pub struct StoreFailed;

/// Where blobs are kept.
pub trait StateStore: Send {
    /// Reads a blob; `None` if there is none.
    fn load(&mut self, blob: Blob) -> Result<Option<Zeroizing<Vec<u8>>>, StoreFailed>;
    /// Writes a blob; durable when it returns.
    fn store(&mut self, blob: Blob, data: &[u8]) -> Result<(), StoreFailed>;
    /// Removes a blob and says whether it was there.
    fn delete(&mut self, blob: Blob) -> Result<bool, StoreFailed>;
}
