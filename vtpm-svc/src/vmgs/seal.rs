// SPDX-License-Identifier: Apache-2.0
//! What AES-GCM leaves beside a ciphertext, as the format stores it.

/// A nonce and a tag as they stand in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seal {
    /// The nonce; opaque to readers.
    pub nonce: [u8; 12],
    /// The authentication tag.
    pub tag: [u8; 16],
}
