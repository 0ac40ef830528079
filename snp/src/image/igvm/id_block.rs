// SPDX-License-Identifier: Apache-2.0
//! The ID block in an IGVM file: its keys and signatures are the firmware's, in another order.

use super::error::IgvmError;
use super::header::Header;
use crate::digest::LaunchDigest;
use crate::identity::IdAuth;
use crate::identity::IdBlock;
use crate::identity::PublicKey;
use crate::identity::Signature;
use crate::le::array;
use crate::le::u32_at;
use crate::policy::GuestPolicy;

/// Bytes of the header's value.
pub(super) const LEN: usize = 696;

/// Reads the ID block in an SNP_ID_BLOCK header, for a file with this policy.
pub(super) fn read(header: &Header, policy: GuestPolicy) -> Result<(IdBlock, IdAuth), IgvmError> {
    let body = header.body;
    for (at, what, expected, counts) in [
        (88, "ID block version", 1, true),
        (96, "ID key algorithm", 1, true),
        (100, "author key algorithm", 1, body[4] == 1),
        (248, "curve of the ID key", 2, true),
    ] {
        if counts && u32_at(body, at) != expected {
            return Err(header.error(at, what, u32_at(body, at).into(), expected.to_string()));
        }
    }
    let part = |what: &'static str| move |source| IgvmError::IdBlock { offset: header.offset, what, source };
    let key = |at: usize, what: &'static str| {
        // The file's form has four bytes more after the curve.
        let mut form = [0; crate::identity::keys::PUBLIC_KEY_LEN];
        form[..4].copy_from_slice(&body[at..at + 4]);
        form[4..148].copy_from_slice(&body[at + 8..at + 152]);
        PublicKey::decode(&form).map_err(part(what))
    };
    let signature =
        |at: usize, what: &'static str| Signature::from_fields(&array(body, at)).map_err(part(what));
    let author = match body[4] {
        0 => None,
        1 => Some((key(544, "author key")?, signature(400, "author key's signature")?)),
        other => return Err(header.error(4, "author key flag", other.into(), "0 or 1")),
    };
    let block = IdBlock {
        launch_digest: LaunchDigest(array(body, 8)),
        family_id: array(body, 56),
        image_id: array(body, 72),
        guest_svn: u32_at(body, 92),
        policy,
    };
    let auth = IdAuth { block_signature: signature(104, "signature")?, id_key: key(248, "ID key")?, author };
    Ok((block, auth))
}

/// The body of an SNP_ID_BLOCK header for a file with this compatibility mask.
pub fn id_block_header(block: &IdBlock, auth: &IdAuth, compatibility_mask: u32) -> Vec<u8> {
    let mut body = vec![0; LEN];
    let mut put = |at: usize, value: &[u8]| body[at..at + value.len()].copy_from_slice(value);
    let key = |at: usize, key: &PublicKey, put: &mut dyn FnMut(usize, &[u8])| {
        let form = key.encode();
        put(at, &form[..4]);
        put(at + 8, &form[4..148]);
    };
    put(0, &compatibility_mask.to_le_bytes());
    put(8, &block.launch_digest.0);
    put(56, &block.family_id);
    put(72, &block.image_id);
    put(88, &1u32.to_le_bytes());
    put(92, &block.guest_svn.to_le_bytes());
    put(96, &1u32.to_le_bytes());
    put(104, &auth.block_signature.fields());
    key(248, &auth.id_key, &mut put);
    if let Some((author, signature)) = &auth.author {
        put(4, &[1]);
        put(100, &1u32.to_le_bytes());
        put(400, &signature.fields());
        key(544, author, &mut put);
    }
    body
}
