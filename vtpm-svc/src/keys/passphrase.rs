// SPDX-License-Identifier: Apache-2.0
//! A key derived from a passphrase with argon2id (RFC 9106).
//!
//! The salt is the image's unique id, which every container carries, so that equal passphrases give different
//! keys and nothing has to be stored beside the image. 64 MiB, three passes, one lane: RFC 9106's second
//! recommendation, with one lane instead of four because the derivation runs on one thread. The image does
//! not say which parameters it was made with, so these never change; others would be another kind of key, to
//! which an image goes by `vmgs rekey`.

use std::path::PathBuf;

use zeroize::Zeroizing;

use super::KeyError;
use super::KeyProvider;
use super::KeyRequest;
use crate::vmgs::Key;

const MEMORY_KIB: u32 = 64 << 10;
const PASSES: u32 = 3;
const LANES: u32 = 1;

/// A passphrase in the first line of a file.
pub struct Passphrase {
    /// The file.
    pub path: PathBuf,
}

impl KeyProvider for Passphrase {
    fn describe(&self) -> String {
        format!("passphrase in {}", self.path.display())
    }

    fn obtain(&self, request: &KeyRequest<'_>) -> Result<Key, KeyError> {
        let bytes = super::file::read_secret(&self.path)?;
        let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
        let refuse = |why| Err(KeyError::Passphrase { path: self.path.clone(), why });
        if line.is_empty() {
            return refuse("is empty");
        }
        // What is left out or added without a word would be missed on another system.
        if line.len() as u64 > super::file::MOST {
            return refuse("has more than 4096 bytes in its first line");
        }
        if line.ends_with(b"\r") {
            return refuse("ends in a carriage return, as files of other systems do; remove it");
        }
        let failed = |e: argon2::Error| KeyError::Derivation(e.to_string());
        let params = argon2::Params::new(MEMORY_KIB, PASSES, LANES, Some(32)).map_err(failed)?;
        let mut key = Zeroizing::new([0; 32]);
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
            .hash_password_into(line, &request.image, key.as_mut())
            .map_err(failed)?;
        Key::from_bytes(&key).map_err(|_| KeyError::Zero)
    }
}
