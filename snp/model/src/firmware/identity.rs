// SPDX-License-Identifier: Apache-2.0
//! Who stands behind a guest.

/// Who stands behind a guest, from its ID block; all zero without one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Family, chosen by the guest's owner.
    pub family_id: [u8; 16],
    /// Image, chosen by the guest's owner.
    pub image_id: [u8; 16],
    /// Security version number, chosen by the guest's owner.
    pub guest_svn: u32,
    /// SHA-384 of the ID key; `None` without an ID block.
    pub id_key_digest: Option<[u8; 48]>,
    /// SHA-384 of the author key; `None` without one.
    pub author_key_digest: Option<[u8; 48]>,
}
