// SPDX-License-Identifier: Apache-2.0
//! Who an image is, and whose.

use super::crypto;
use super::error::VmgsError;

/// Who an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The image itself: drawn at creation, never used again, also the container's unique id.
    pub image: [u8; 16],
    /// The VM that it belongs to.
    pub vm: [u8; 16],
}

impl Identity {
    /// A fresh image for a VM; without a VM's id, one is drawn too.
    pub fn fresh(vm: Option<[u8; 16]>) -> Result<Self, VmgsError> {
        let (mut image, mut drawn) = ([0; 16], [0; 16]);
        crypto::fill_random(&mut image)?;
        crypto::fill_random(&mut drawn)?;
        Ok(Self { image, vm: vm.unwrap_or(drawn) })
    }
}
