// SPDX-License-Identifier: Apache-2.0
//! A guest's identity: the signed ID block that names one launch digest, one policy and the owner's version
//! number.
//!
//! The firmware refuses to finish a launch whose digest or policy differs from the block, and puts the
//! digests of the signing keys into every report, so a verifier can trust a signer instead of listing
//! digests. SEV-SNP Firmware ABI 1.58, section 8.18 (`SNP_LAUNCH_FINISH`), tables 75 to 77 for the block, the
//! auth page and the key formats.

pub mod block;
pub mod keys;

pub use block::IdAuth;
pub use block::IdBlock;
pub use block::IdMismatch;
pub use keys::KeyError;
pub use keys::PublicKey;
pub use keys::Signature;
