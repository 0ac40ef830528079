// SPDX-License-Identifier: Apache-2.0
//! The container: a fixed VHD, that is the payload followed by a 512-byte big-endian footer.
//!
//! Layout: Virtual Hard Disk Image Format Specification 1.0, "Hard Disk Footer Format". Nothing in the footer
//! is authenticated, so the only thing taken from it is the payload's size, and that is checked against the
//! file.

use super::error::VmgsError;

/// Bytes of a footer, and the granularity of the whole file.
pub const FOOTER: usize = 512;
const COOKIE: &[u8; 8] = b"conectix";
const FIXED: u32 = 2;
const VERSION: u32 = 0x0001_0000;

fn be32(b: &[u8], at: usize) -> u32 {
    let mut v = [0; 4];
    v.copy_from_slice(&b[at..at + 4]);
    u32::from_be_bytes(v)
}

fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}

/// Ones' complement of the byte sum, the checksum's own four bytes left out.
fn checksum(footer: &[u8; FOOTER]) -> u32 {
    let sum = footer
        .iter()
        .enumerate()
        .filter(|(n, _)| !(64..68).contains(n))
        .fold(0u32, |sum, (_, b)| sum.wrapping_add(u32::from(*b)));
    !sum
}

/// Checks a footer and returns the payload's size in bytes.
///
/// `file_len` is the length of the whole file, footer included.
pub fn parse(footer: &[u8; FOOTER], file_len: u64) -> Result<u64, VmgsError> {
    let refuse = |why: String| Err(VmgsError::NotVhd(why));
    if &footer[0..8] != COOKIE {
        return refuse("the last 512 bytes do not begin with `conectix`".into());
    }
    let (found, computed) = (be32(footer, 64), checksum(footer));
    if found != computed {
        return refuse(format!("footer checksum is {found:#010x}, computed {computed:#010x}"));
    }
    if be32(footer, 12) != VERSION {
        return refuse(format!("footer version {:#010x}, expected {VERSION:#010x}", be32(footer, 12)));
    }
    if be32(footer, 60) != FIXED {
        return refuse(format!("disk type {} is not 2 (fixed)", be32(footer, 60)));
    }
    let size = be64(footer, 48);
    let room = file_len.saturating_sub(FOOTER as u64);
    if size > room {
        return Err(VmgsError::Truncated(format!(
            "the footer promises {size} payload bytes, the file has {room}"
        )));
    }
    if !size.is_multiple_of(FOOTER as u64) {
        return refuse(format!("payload size {size} is not a multiple of 512"));
    }
    Ok(size)
}

/// Where, in bytes that the specification reserves, the id stands that the container had before a change of
/// key which is under way: a passphrase is salted with the id, and until the change is done the old one has
/// to open the image too.
const EARLIER: usize = 96;
const EARLIER_MAGIC: &[u8; 8] = b"CVMMSALT";

/// The id that the container had before, while a change of key is under way.
pub fn earlier_id(footer: &[u8; FOOTER]) -> Option<[u8; 16]> {
    let at = EARLIER + EARLIER_MAGIC.len();
    let mut id = [0; 16];
    id.copy_from_slice(&footer[at..at + 16]);
    (&footer[EARLIER..at] == EARLIER_MAGIC).then_some(id)
}

/// Builds a footer that also says which id the container had before.
pub fn build_over(size: u64, unique_id: [u8; 16], earlier: [u8; 16]) -> [u8; FOOTER] {
    let mut f = build(size, unique_id);
    let at = EARLIER + EARLIER_MAGIC.len();
    f[EARLIER..at].copy_from_slice(EARLIER_MAGIC);
    f[at..at + 16].copy_from_slice(&earlier);
    let sum = checksum(&f);
    f[64..68].copy_from_slice(&sum.to_be_bytes());
    f
}

/// Builds the footer of a payload of `size` bytes.
pub fn build(size: u64, unique_id: [u8; 16]) -> [u8; FOOTER] {
    let mut f = [0u8; FOOTER];
    f[0..8].copy_from_slice(COOKIE);
    f[8..12].copy_from_slice(&2u32.to_be_bytes());
    f[12..16].copy_from_slice(&VERSION.to_be_bytes());
    f[16..24].copy_from_slice(&u64::MAX.to_be_bytes());
    f[32..36].copy_from_slice(&0x000A_0000u32.to_be_bytes());
    f[40..48].copy_from_slice(&size.to_be_bytes());
    f[48..56].copy_from_slice(&size.to_be_bytes());
    f[60..64].copy_from_slice(&FIXED.to_be_bytes());
    f[68..84].copy_from_slice(&unique_id);
    let sum = checksum(&f);
    f[64..68].copy_from_slice(&sum.to_be_bytes());
    f
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Checksum of a footer made by qemu-img 7.2 is not needed here: the rule is the specification's own, and
    /// the sum below was done by hand: cookie 848, features 2, version 1, data offset 8 * 255, creator
    /// version 10, two sizes 0x40 each, type 2.
    #[test]
    fn the_checksum_is_the_ones_complement_of_the_byte_sum() {
        let f = build(0x40_0000, [0; 16]);
        let cookie: u32 = b"conectix".iter().map(|b| u32::from(*b)).sum();
        assert_eq!(be32(&f, 64), !(cookie + 2 + 1 + 8 * 255 + 10 + 2 * 0x40 + 2));
    }

    #[test]
    fn each_lie_in_the_footer_has_its_own_answer() {
        let good = build(4096, [7; 16]);
        assert_eq!(parse(&good, 4608).expect("good footer"), 4096);
        let patched = |at: usize, v: u8, fix: bool| {
            let mut f = good;
            f[at] = v;
            if fix {
                let sum = checksum(&f);
                f[64..68].copy_from_slice(&sum.to_be_bytes());
            }
            parse(&f, 4608)
        };
        assert!(matches!(patched(0, b'C', true), Err(VmgsError::NotVhd(_))));
        assert!(matches!(patched(70, 9, false), Err(VmgsError::NotVhd(_))));
        assert!(matches!(patched(13, 9, true), Err(VmgsError::NotVhd(_))));
        assert!(matches!(patched(63, 3, true), Err(VmgsError::NotVhd(_))));
        assert!(matches!(patched(53, 1, true), Err(VmgsError::Truncated(_))));
        assert!(matches!(patched(55, 1, true), Err(VmgsError::NotVhd(_) | VmgsError::Truncated(_))));
    }

    proptest! {
        #[test]
        fn no_footer_panics(bytes in proptest::collection::vec(any::<u8>(), FOOTER), len in any::<u64>()) {
            let mut f = [0; FOOTER];
            f.copy_from_slice(&bytes);
            let _ = parse(&f, len);
        }
    }
}
