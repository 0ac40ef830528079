// SPDX-License-Identifier: Apache-2.0
//! A guest owner's ID block.

use snp::digest::LaunchDigest;
use snp::identity::IdBlock;
use snp::policy::GuestPolicy;

/// An ID block for the launch with `digest` and the default policy; the other fields differ from each other
/// and from zero.
pub fn id_block(digest: LaunchDigest) -> IdBlock {
    IdBlock {
        launch_digest: digest,
        family_id: *b"family id is 16b",
        image_id: *b"image id: 16 byt",
        guest_svn: 7,
        policy: GuestPolicy(0x3_0000),
    }
}
