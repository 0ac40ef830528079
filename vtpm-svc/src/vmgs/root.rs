// SPDX-License-Identifier: Apache-2.0
//! The integrity root (file 62): one encrypted block that lists every file of the image with its digest.
//!
//! The format itself notices neither a deleted nor an added file, and never an older copy of the whole image.
//! The root binds the files together and carries the generation number that the [anchor](super::anchor)
//! remembers outside of the image. Other tools of the format keep unknown files as they are, so an image with
//! a root stays usable by them.

use std::collections::BTreeMap;

use sha2::Digest;
use sha2::Sha256;

use crate::bytes::array;

use super::error::VmgsError;
use super::file_id::FileId;
use super::format::BLOCK;
use super::mark::Mark;

const MAGIC: &[u8; 8] = b"CVMMROOT";
const FIXED: usize = 96;
const PER_FILE: usize = 64;

/// The TPM of this image has been manufactured: its state may never be missing again.
pub const FLAG_PROVISIONED: u32 = 1;
/// TPM state has left the image through the control channel, so a copy of this identity exists elsewhere.
pub const FLAG_EXPORTED: u32 = 2;
/// The contents were readable without a key at some time; see `vmgs repair`.
pub const FLAG_DISCLOSED: u32 = 4;

/// No image gets here by writing; a number beyond it would wrap some day.
const MOST_GENERATIONS: u64 = 1 << 56;
/// The root remembers when the key was changed in steps of this many generations.
const KEY_STEP: u64 = 1 << 20;
/// One key wraps one metadata key per generation under a random 96-bit nonce: half of the 2^32 that are safe.
const WORN: u64 = 1 << 31;

/// What the root says of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed {
    /// Attribute bits as in the extended table.
    pub attributes: u32,
    /// Bytes of the file.
    pub valid: u64,
    /// SHA-256 of its plain text.
    pub digest: [u8; 32],
}

/// The parsed root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// `FLAG_*` bits.
    pub flags: u32,
    /// Drawn when the image is created or cloned, never used again.
    pub image: [u8; 16],
    /// Identity of the VM that the image belongs to.
    pub vm: [u8; 16],
    /// Counts commits.
    pub generation: u64,
    /// SHA-256 of the preceding root.
    pub previous: [u8; 32],
    /// The generation of the last change of key, in steps of 2^20.
    pub keyed: u32,
    /// Every file but the tables and the root.
    pub files: BTreeMap<FileId, Listed>,
}

/// SHA-256.
pub fn digest(data: &[u8]) -> [u8; 32] {
    Sha256::digest(data).into()
}

impl Root {
    /// A root before its first commit.
    pub fn new(image: [u8; 16], vm: [u8; 16]) -> Self {
        Self { flags: 0, image, vm, generation: 0, previous: [0; 32], keyed: 0, files: BTreeMap::new() }
    }

    /// Parses the plain text.
    pub fn parse(bytes: &[u8]) -> Result<Self, VmgsError> {
        let refuse = |why: String| Err(VmgsError::RootMismatch(why));
        if bytes.len() < FIXED || bytes.len() > BLOCK {
            return refuse(format!("{} bytes, expected {FIXED} to {BLOCK}", bytes.len()));
        }
        if &bytes[..8] != MAGIC {
            return refuse("no `CVMMROOT` at offset 0".into());
        }
        let version = u32::from_le_bytes(array(bytes, 8));
        if version != 1 {
            return refuse(format!("version {version} at offset 8, expected 1"));
        }
        let count = u32::from_le_bytes(array(bytes, 88)) as usize;
        if count > 61 || bytes.len() != FIXED + count * PER_FILE {
            return refuse(format!("{count} entries (offset 88) do not fill {} bytes", bytes.len()));
        }
        let mut files = BTreeMap::new();
        let mut last = 0;
        for raw in bytes[FIXED..].chunks_exact(PER_FILE) {
            let number = u32::from_le_bytes(array(raw, 0));
            let id = match FileId::user(number) {
                Ok(id) if id != FileId::ROOT && number > last => id,
                _ => return refuse(format!("id {number} after id {last} is out of order or no file")),
            };
            last = number;
            files.insert(
                id,
                Listed {
                    attributes: u32::from_le_bytes(array(raw, 4)),
                    valid: u64::from_le_bytes(array(raw, 8)),
                    digest: array(raw, 16),
                },
            );
        }
        let generation = u64::from_le_bytes(array(bytes, 48));
        if generation > MOST_GENERATIONS {
            return refuse(format!("generation {generation} at offset 48 is none that an image reaches"));
        }
        Ok(Self {
            flags: u32::from_le_bytes(array(bytes, 12)),
            image: array(bytes, 16),
            vm: array(bytes, 32),
            generation,
            keyed: u32::from_le_bytes(array(bytes, 92)),
            previous: array(bytes, 56),
            files,
        })
    }

    /// The plain text.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED + self.files.len() * PER_FILE);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&1u32.to_le_bytes());
        out.extend_from_slice(&self.flags.to_le_bytes());
        out.extend_from_slice(&self.image);
        out.extend_from_slice(&self.vm);
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.previous);
        out.extend_from_slice(&(self.files.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.keyed.to_le_bytes());
        for (id, file) in &self.files {
            out.extend_from_slice(&id.number().to_le_bytes());
            out.extend_from_slice(&file.attributes.to_le_bytes());
            out.extend_from_slice(&file.valid.to_le_bytes());
            out.extend_from_slice(&file.digest);
            out.extend_from_slice(&[0; 16]);
        }
        out
    }

    /// The number of the next generation.
    pub fn next_generation(&self) -> Result<u64, VmgsError> {
        let next = self.generation.checked_add(1).filter(|g| *g <= MOST_GENERATIONS);
        next.ok_or(VmgsError::LastGeneration(self.generation))
    }

    /// Notes that the generation after this one has another key.
    pub fn keyed_anew(&mut self) {
        self.keyed = u32::try_from(self.generation / KEY_STEP).unwrap_or(u32::MAX);
    }

    /// Whether the key has sealed more generations than it should.
    pub fn worn(&self) -> bool {
        self.generation.saturating_sub(u64::from(self.keyed) * KEY_STEP) >= WORN
    }

    /// What the anchor has to remember of this root.
    pub fn mark(&self) -> Mark {
        Mark { generation: self.generation, digest: digest(&self.to_bytes()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_root_fits_one_block() {
        let mut root = Root::new([1; 16], [2; 16]);
        for id in FileId::files().filter(|id| *id != FileId::ROOT) {
            root.files.insert(id, Listed { attributes: 3, valid: 1, digest: [9; 32] });
        }
        assert_eq!(root.to_bytes().len(), 4000);
        assert_eq!(Root::parse(&root.to_bytes()).expect("own bytes"), root);
    }

    #[test]
    fn a_key_is_worn_after_2_to_the_31_generations_and_generations_end_before_they_wrap() {
        let mut root = Root::new([1; 16], [2; 16]);
        root.generation = (1 << 31) + 5;
        assert!(root.worn());
        root.keyed_anew();
        root.generation += (1 << 31) - (1 << 20);
        assert!(!root.worn() && Root::parse(&root.to_bytes()).expect("own bytes") == root);
        root.generation = 1 << 56;
        assert!(matches!(root.next_generation(), Err(VmgsError::LastGeneration(_))));
        root.generation = u64::MAX - 1;
        assert!(matches!(Root::parse(&root.to_bytes()), Err(VmgsError::RootMismatch(_))));
    }

    proptest! {
        #[test]
        fn no_root_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..4200), named in any::<bool>()) {
            if named && bytes.len() >= 96 {
                bytes[..8].copy_from_slice(b"CVMMROOT");
                bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
                let n = ((bytes.len() - 96) / 64) as u32;
                bytes.truncate(96 + n as usize * 64);
                bytes[88..92].copy_from_slice(&n.to_le_bytes());
            }
            let _ = Root::parse(&bytes);
        }
    }
}
