// SPDX-License-Identifier: Apache-2.0
//! The firmware's check of an ID block: is this the guest that its owner signed?
//!
//! SEV-SNP Firmware ABI 1.58, section 8.18, tables 75 (ID block), 76 (ID authentication), and chapter 10
//! (keys and signatures: integers little-endian in 72 bytes). Written apart from [`snp::identity`], which
//! makes such blocks, as the launch digest is computed apart from its prediction: an error in either shows as
//! a refused launch.

use p384::EncodedPoint;
use p384::ecdsa::Signature;
use p384::ecdsa::VerifyingKey;
use p384::ecdsa::signature::Verifier as _;
use sha2::Digest as _;
use sha2::Sha384;
use snp::digest::LaunchDigest;
use snp::firmware_status::FwStatus;
use snp::le::u32_at;
use snp::plan::PAGE_SIZE;

use crate::firmware::identity::Identity;

/// Length of an ID block.
pub const BLOCK_LEN: usize = 96;
/// Length of an ID authentication page.
pub const AUTH_LEN: usize = PAGE_SIZE as usize;
/// Length of a public key structure.
pub const KEY_LEN: usize = 1028;
/// Length of a signature field.
pub const SIGNATURE_LEN: usize = 512;

const ECDSA_P384_SHA384: u32 = 1;
const CURVE_P384: u32 = 2;
const INTEGER_LEN: usize = 72;

mod block {
    use std::ops::Range;

    pub const DIGEST: Range<usize> = 0..48;
    pub const FAMILY_ID: Range<usize> = 48..64;
    pub const IMAGE_ID: Range<usize> = 64..80;
    pub const GUEST_SVN: usize = 84;
    pub const POLICY: usize = 88;
}

mod auth {
    use std::ops::Range;

    pub const ID_KEY_ALGORITHM: usize = 0;
    pub const AUTHOR_KEY_ALGORITHM: usize = 4;
    pub const BLOCK_SIGNATURE: usize = 64;
    pub const ID_KEY: Range<usize> = 576..576 + super::KEY_LEN;
    pub const ID_KEY_SIGNATURE: usize = 1664;
    pub const AUTHOR_KEY: Range<usize> = 2176..2176 + super::KEY_LEN;
}

/// A little-endian integer of 72 bytes, as 48 big-endian ones; `None` if it is longer.
fn integer(bytes: &[u8], at: usize) -> Option<[u8; 48]> {
    let field = bytes.get(at..at + INTEGER_LEN)?;
    let (value, rest) = field.split_first_chunk::<48>()?;
    let mut value = *value;
    value.reverse();
    rest.iter().all(|byte| *byte == 0).then_some(value)
}

fn key(bytes: &[u8]) -> Option<VerifyingKey> {
    if u32_at(bytes, 0) != CURVE_P384 {
        return None;
    }
    let (x, y) = (integer(bytes, 4)?, integer(bytes, 4 + INTEGER_LEN)?);
    let point = EncodedPoint::from_affine_coordinates(&x.into(), &y.into(), false);
    VerifyingKey::from_encoded_point(&point).ok()
}

/// Whether the signature at `at` of `page` over `message` is of the key in `key_bytes`.
fn signed(message: &[u8], page: &[u8], at: usize, key_bytes: &[u8]) -> bool {
    let signature = integer(page, at)
        .zip(integer(page, at + INTEGER_LEN))
        .and_then(|(r, s)| Signature::from_scalars(r, s).ok());
    match (key(key_bytes), signature) {
        (Some(key), Some(signature)) => key.verify(message, &signature).is_ok(),
        _ => false,
    }
}

/// Checks the ID block of a guest with this digest and policy.
pub fn check(
    id_block: &[u8; BLOCK_LEN],
    id_auth: &[u8; AUTH_LEN],
    author_key: bool,
    digest: LaunchDigest,
    policy: u64,
) -> Result<Identity, FwStatus> {
    // In this order, and without a look at the block's version: AMD-ASPFW,
    // `sev_mcmd.c:snp_mcmd_launch_finish`.
    if id_block[block::DIGEST] != digest.0 {
        return Err(FwStatus::BAD_MEASUREMENT);
    }
    if id_block[block::POLICY..BLOCK_LEN] != policy.to_le_bytes() {
        return Err(FwStatus::POLICY_FAILURE);
    }
    let algorithm_known = u32_at(id_auth, auth::ID_KEY_ALGORITHM) == ECDSA_P384_SHA384
        && (!author_key || u32_at(id_auth, auth::AUTHOR_KEY_ALGORITHM) == ECDSA_P384_SHA384);
    if !algorithm_known {
        return Err(FwStatus::INVALID_PARAM);
    }
    let (id_key, author) = (&id_auth[auth::ID_KEY], &id_auth[auth::AUTHOR_KEY]);
    let good = signed(id_block, id_auth, auth::BLOCK_SIGNATURE, id_key)
        && (!author_key || signed(id_key, id_auth, auth::ID_KEY_SIGNATURE, author));
    if !good {
        return Err(FwStatus::BAD_SIGNATURE);
    }
    let mut identity = Identity {
        guest_svn: u32_at(id_block, block::GUEST_SVN),
        id_key_digest: Some(Sha384::digest(id_key).into()),
        author_key_digest: author_key.then(|| Sha384::digest(author).into()),
        ..Identity::default()
    };
    identity.family_id.copy_from_slice(&id_block[block::FAMILY_ID]);
    identity.image_id.copy_from_slice(&id_block[block::IMAGE_ID]);
    Ok(identity)
}
