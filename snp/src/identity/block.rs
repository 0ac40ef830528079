// SPDX-License-Identifier: Apache-2.0
//! The ID block (96 bytes) and the ID auth page (4096 bytes) that carries its signatures.
//!
//! SEV-SNP Firmware ABI 1.58, section 8.18. The ID key signs the block; the author key, which is optional,
//! signs the ID key. A launch gets one try: [`IdAuth::check`] finds out beforehand what the firmware would
//! answer.

use p384::ecdsa::SigningKey;

use super::keys::KeyError;
use super::keys::PUBLIC_KEY_LEN;
use super::keys::PublicKey;
use super::keys::SIGNATURE_LEN;
use super::keys::Signature;
use crate::digest::LaunchDigest;
use crate::le::array;
use crate::le::u32_at;
use crate::le::u64_at;
use crate::policy::GuestPolicy;

/// Length of an ID block.
pub const BLOCK_LEN: usize = 96;
/// Length of an ID auth page.
pub const AUTH_LEN: usize = 4096;
/// The only version there is.
const BLOCK_VERSION: u32 = 1;
/// ECDSA P-384 with SHA-384.
const ALGORITHM: u32 = 1;

/// Offsets in the auth page.
mod at {
    pub const ID_KEY_ALGO: usize = 0;
    pub const AUTHOR_KEY_ALGO: usize = 4;
    pub const BLOCK_SIGNATURE: usize = 64;
    pub const ID_KEY: usize = 576;
    pub const ID_KEY_SIGNATURE: usize = 1664;
    pub const AUTHOR_KEY: usize = 2176;
    /// Bytes that must be zero.
    pub const RESERVED: [std::ops::Range<usize>; 3] = [8..64, 1604..1664, 3204..4096];
}

/// Why bytes are no ID block or auth page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum IdError {
    /// A wrong length.
    #[error("the {what} has {found} bytes, expected {expected}")]
    Length { what: &'static str, found: usize, expected: usize },
    /// A field with a wrong value.
    #[error("offset {offset:#x}: {what} is {found}, expected {expected}")]
    Field { offset: usize, what: &'static str, found: u64, expected: u64 },
    /// A key or signature inside.
    #[error("{what} at offset {offset:#x}: {source}")]
    Key {
        what: &'static str,
        offset: usize,
        /// What is wrong; its offsets count from there.
        source: KeyError,
    },
}

/// What a launch and its ID block disagree about, in the order in which it is checked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum IdMismatch {
    /// Another digest.
    #[error(
        "the ID block is for launch digest {block}, this launch has {launch} (firmware would say BAD_MEASUREMENT, 11)"
    )]
    Digest { block: LaunchDigest, launch: LaunchDigest },
    /// Another policy.
    #[error(
        "the ID block is for guest policy {block}, this launch has {launch} (firmware would say POLICY_FAILURE, 7): \
         launch with `policy` {block}, or make a new block"
    )]
    Policy { block: GuestPolicy, launch: GuestPolicy },
    /// The ID key did not sign this block.
    #[error("the ID key's signature does not cover this ID block (firmware would say BAD_SIGNATURE, 10)")]
    BlockSignature,
    /// The author key did not sign this ID key.
    #[error("the author key's signature does not cover this ID key (firmware would say BAD_SIGNATURE, 10)")]
    AuthorSignature,
}

/// The signed statement: this digest, this policy, this version of the owner's software.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdBlock {
    /// The only digest that may launch.
    pub launch_digest: LaunchDigest,
    /// The owner's family id, shown in reports.
    pub family_id: [u8; 16],
    /// The owner's image id, shown in reports.
    pub image_id: [u8; 16],
    /// The owner's security version number, shown in reports.
    pub guest_svn: u32,
    /// The only policy that may launch.
    pub policy: GuestPolicy,
}

impl IdBlock {
    /// The block's bytes, which the ID key signs.
    pub fn encode(&self) -> [u8; BLOCK_LEN] {
        let mut bytes = [0; BLOCK_LEN];
        bytes[..48].copy_from_slice(&self.launch_digest.0);
        bytes[48..64].copy_from_slice(&self.family_id);
        bytes[64..80].copy_from_slice(&self.image_id);
        bytes[80..84].copy_from_slice(&BLOCK_VERSION.to_le_bytes());
        bytes[84..88].copy_from_slice(&self.guest_svn.to_le_bytes());
        bytes[88..].copy_from_slice(&self.policy.0.to_le_bytes());
        bytes
    }

    /// Reads a block.
    pub fn decode(bytes: &[u8]) -> Result<Self, IdError> {
        let wrong = IdError::Length { what: "ID block", found: bytes.len(), expected: BLOCK_LEN };
        let bytes: &[u8; BLOCK_LEN] = bytes.try_into().map_err(|_| wrong)?;
        let version = u32_at(bytes, 80);
        if version != BLOCK_VERSION {
            let (found, expected) = (version.into(), BLOCK_VERSION.into());
            return Err(IdError::Field { offset: 80, what: "ID block version", found, expected });
        }
        Ok(IdBlock {
            launch_digest: LaunchDigest(array(bytes, 0)),
            family_id: array(bytes, 48),
            image_id: array(bytes, 64),
            guest_svn: u32_at(bytes, 84),
            policy: GuestPolicy(u64_at(bytes, 88)),
        })
    }
}

/// `N` bytes at `offset`; zeros beyond the end, which no caller asks for.
/// The signatures of an ID block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdAuth {
    /// The ID key's, over the block.
    pub block_signature: Signature,
    /// The ID key.
    pub id_key: PublicKey,
    /// The author key and its signature over the ID key, if the owner uses one.
    pub author: Option<(PublicKey, Signature)>,
}

impl IdAuth {
    /// Signs `block`.
    pub fn sign(block: &IdBlock, id_key: &SigningKey, author_key: Option<&SigningKey>) -> Self {
        let public = PublicKey::of(id_key);
        let author = author_key.map(|key| (PublicKey::of(key), Signature::make(key, &public.encode())));
        IdAuth { block_signature: Signature::make(id_key, &block.encode()), id_key: public, author }
    }

    /// The auth page. `KVM_SEV_SNP_LAUNCH_FINISH` takes it with `id_block_en`, and `auth_key_en` if there is
    /// an author.
    pub fn encode(&self) -> [u8; AUTH_LEN] {
        let mut page = [0; AUTH_LEN];
        let mut put = |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(at::ID_KEY_ALGO, &ALGORITHM.to_le_bytes());
        put(at::BLOCK_SIGNATURE, &self.block_signature.encode());
        put(at::ID_KEY, &self.id_key.encode());
        if let Some((key, signature)) = &self.author {
            put(at::AUTHOR_KEY_ALGO, &ALGORITHM.to_le_bytes());
            put(at::ID_KEY_SIGNATURE, &signature.encode());
            put(at::AUTHOR_KEY, &key.encode());
        }
        page
    }

    /// Reads an auth page. An author key that is all zeros is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, IdError> {
        let wrong = IdError::Length { what: "ID auth page", found: bytes.len(), expected: AUTH_LEN };
        let page: &[u8; AUTH_LEN] = bytes.try_into().map_err(|_| wrong)?;
        let algorithm = |offset: usize, what: &'static str| {
            let found = u32_at(page, offset);
            if found != ALGORITHM {
                return Err(IdError::Field { offset, what, found: found.into(), expected: ALGORITHM.into() });
            }
            Ok(())
        };
        for range in at::RESERVED {
            if let Some((offset, byte)) = range.clone().zip(&page[range]).find(|(_, byte)| **byte != 0) {
                let what = "reserved byte of the auth page";
                return Err(IdError::Field { offset, what, found: (*byte).into(), expected: 0 });
            }
        }
        let key = |offset: usize, what: &'static str| {
            let bytes: [u8; PUBLIC_KEY_LEN] = array(page, offset);
            PublicKey::decode(&bytes).map_err(|source| IdError::Key { what, offset, source })
        };
        let signature = |offset: usize, what: &'static str| {
            let bytes: [u8; SIGNATURE_LEN] = array(page, offset);
            Signature::decode(&bytes).map_err(|source| IdError::Key { what, offset, source })
        };
        algorithm(at::ID_KEY_ALGO, "ID key algorithm")?;
        let author_part = [at::ID_KEY_SIGNATURE..at::AUTHOR_KEY, at::AUTHOR_KEY..3204];
        let author = if author_part.into_iter().all(|range| page[range].iter().all(|b| *b == 0)) {
            None
        } else {
            algorithm(at::AUTHOR_KEY_ALGO, "author key algorithm")?;
            Some((
                key(at::AUTHOR_KEY, "author key")?,
                signature(at::ID_KEY_SIGNATURE, "author key's signature")?,
            ))
        };
        Ok(IdAuth {
            block_signature: signature(at::BLOCK_SIGNATURE, "ID key's signature")?,
            id_key: key(at::ID_KEY, "ID key")?,
            author,
        })
    }

    /// Checks both signatures over `block`, as the firmware does.
    pub fn check_signatures(&self, block: &IdBlock) -> Result<(), IdMismatch> {
        if !self.id_key.verifies(&block.encode(), &self.block_signature) {
            return Err(IdMismatch::BlockSignature);
        }
        match &self.author {
            Some((key, signature)) if !key.verifies(&self.id_key.encode(), signature) => {
                Err(IdMismatch::AuthorSignature)
            }
            _ => Ok(()),
        }
    }

    /// Checks `block` against a launch that is about to begin: what would `LAUNCH_FINISH` answer?
    pub fn check(
        &self,
        block: &IdBlock,
        launch: LaunchDigest,
        policy: GuestPolicy,
    ) -> Result<(), IdMismatch> {
        if block.policy != policy {
            return Err(IdMismatch::Policy { block: block.policy, launch: policy });
        }
        self.check_signatures(block)?;
        if block.launch_digest != launch {
            return Err(IdMismatch::Digest { block: block.launch_digest, launch });
        }
        Ok(())
    }
}
