// SPDX-License-Identifier: Apache-2.0
//! The key of an image that is there.
//!
//! A key may depend on the container's id, as a passphrase's does. While a change of key is under way the
//! container has two ids, the one before and the one after, so both are asked for and the one that opens the
//! image is taken.

use super::KeyError;
use super::KeyProvider;
use super::KeyRequest;
use super::Purpose;
use crate::vmgs::Key;
use crate::vmgs::VmgsError;
use crate::vmgs::block::BlockFile;
use crate::vmgs::image;

/// Why there is no key for an image.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The image does not say who it is.
    #[error(transparent)]
    Image(#[from] VmgsError),
    /// The provider has none.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Asks for the key of an image. One that does not open it is given all the same if there is no other: what
/// is wrong with it is for the opener to say.
pub fn key_of<F: BlockFile>(
    provider: &dyn KeyProvider,
    file: &F,
    vm: Option<[u8; 16]>,
    purpose: Purpose,
) -> Result<Key, OpenError> {
    let mut salts = image::salts(file)?.into_iter();
    let mut ask =
        || salts.next().map(|image| provider.obtain(&KeyRequest { image, vm, purpose, evidence: None }));
    let first = match ask() {
        Some(answer) => answer,
        None => return Err(VmgsError::Empty.into()),
    };
    let Some(second) = (match &first {
        // An image that cannot be read is the opener's to refuse.
        Ok(key) if image::key_opens(file, key).unwrap_or(true) => None,
        _ => ask(),
    }) else {
        return Ok(first?);
    };
    match second {
        Ok(key) if image::key_opens(file, &key)? => Ok(key),
        _ => Ok(first?),
    }
}
