// SPDX-License-Identifier: Apache-2.0
//! Images of random layouts, written anew: nothing of an earlier generation is left in the raw file.
//!
//! A rewrite moves no bytes, so what is left of earlier stands where it stood. Everything that is live
//! afterwards is fresh cipher text, so a word that is where it was before is a leftover. Offsets are numbers
//! from the format's description.

use super::block::MemFile;
use super::crash_test::Rng;
use super::crypto::Key;
use super::error::VmgsError;
use super::file_id::FileId;
use super::findings::Accept;
use super::identity::Identity;
use super::root::FLAG_DISCLOSED;
use super::store::Change;
use super::store::Vmgs;

const MIB: usize = 1 << 20;
const MARKER: &[u8; 32] = b"plain text that must not be left";

/// How many layouts; `cargo xtask test` says.
pub(super) fn layouts() -> u64 {
    std::env::var("CVMM_IMAGE_LAYOUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(24)
}

pub(super) fn key(fill: u8) -> Key {
    Key::from_bytes(&[fill; 32]).expect("key")
}

pub(super) fn u32_at(image: &[u8], at: usize) -> usize {
    u32::from_le_bytes(image[at..at + 4].try_into().expect("four")) as usize
}

pub(super) fn put32(image: &mut [u8], at: usize, v: u32) {
    image[at..at + 4].copy_from_slice(&v.to_le_bytes());
}

/// Recomputes the CRC of the header in a slot.
pub(super) fn seal_header(image: &mut [u8], slot: usize) {
    let at = slot * 512;
    image[at + 12..at + 16].fill(0);
    let crc = crc32fast::hash(&image[at..at + 168]);
    put32(image, at + 12, crc);
}

/// The slot of the newer header, both being whole.
pub(super) fn newest(image: &[u8]) -> usize {
    usize::from((u32_at(image, 16) as u32).wrapping_add(1) == u32_at(image, 512 + 16) as u32)
}

/// Offset of a table entry behind the newer header.
pub(super) fn entry_at(image: &[u8], id: usize) -> usize {
    u32_at(image, newest(image) * 512 + 24) * 4096 + id * 64
}

/// An image with a history: files of random sizes, written, replaced and removed.
fn image(rng: &mut Rng, encrypted: bool) -> Vec<u8> {
    let file = MemFile(vec![0; MIB + 512]);
    let identity = Identity::fresh(None).expect("identity");
    let mut v = Vmgs::create(file, encrypted.then(|| key(7)), identity, None).expect("create");
    for _ in 0..6 + rng.below(10) {
        let id = FileId::user(1 + rng.below(8) as u32).expect("id");
        let data: Vec<u8> = MARKER.iter().cycle().take(1 + rng.below(14_000)).copied().collect();
        let change = if rng.below(6) == 0 { Change::Delete(id) } else { Change::Put(id, &data) };
        v.commit(&[change]).expect("commit");
    }
    v.commit(&[Change::Put(FileId::VTPM_STATE, &MARKER[..1 + rng.below(31)])]).expect("commit");
    v.close().expect("close").0
}

/// Contents of all files, as the store gives them.
fn contents(image: &[u8], k: Key) -> Vec<(FileId, Vec<u8>)> {
    let accept = Accept { rollback: true, ..Accept::default() };
    let v = Vmgs::open(MemFile(image.to_vec()), Some(k), None, accept).expect("open");
    assert!(!v.findings().iter().any(|f| f.unsettles(&Accept::default())), "{:?}", v.findings());
    let files = v.list().into_iter().filter(|(id, _, _)| *id != FileId::ROOT);
    files.map(|(id, _, _)| (id, v.read(id).expect("read").to_vec())).collect()
}

/// Whatever no header or table entry names is zero.
pub(super) fn assert_unused_is_zero(image: &[u8], what: &str) {
    assert_eq!(u32_at(image, 24), u32_at(image, 512 + 24), "{what}: both headers name one table");
    let mut live = vec![false; MIB];
    live[..168].fill(true);
    live[512..512 + 168].fill(true);
    let table = u32_at(image, 24) * 4096;
    for id in 0..64 {
        let e = table + id * 64;
        if u32_at(image, e + 4) != 0 {
            let at = u32_at(image, e) * 4096;
            live[at..at + u32_at(image, e + 8)].fill(true);
        }
    }
    let left = (0..MIB).find(|n| !live[*n] && image[*n] != 0);
    assert_eq!(left, None, "{what}: a byte that belongs to nothing");
}

/// No eight bytes are what they were, but for numbers that a table or a header has to repeat.
fn assert_nothing_is_left(before: &[u8], after: &[u8], what: &str) {
    let table = u32_at(after, 24) * 4096;
    for at in (0..MIB).step_by(8) {
        let number = match at {
            at if (table..table + 4096).contains(&at) => matches!((at - table) % 64, 0..16 | 40..64),
            at => matches!(at % 512, 0..32) && at < 1024,
        };
        let (old, new) = (&before[at..at + 8], &after[at..at + 8]);
        assert!(number || old != new || old == [0; 8], "{what}: eight bytes at {at} are still there");
    }
    assert!(!after.windows(MARKER.len()).any(|w| w == MARKER), "{what}: plain text");
}

fn assert_dead(image: &[u8], old: u8, what: &str) {
    for damaged in [None, Some(0), Some(512)] {
        let mut i = image.to_vec();
        if let Some(at) = damaged {
            i[at + 40] ^= 1;
        }
        let accept = Accept { rollback: true, foreign: true, zero_key: true, ..Accept::default() };
        let opened = Vmgs::open(MemFile(i.clone()), Some(key(old)), None, accept).map(|_| ());
        assert!(matches!(opened, Err(VmgsError::WrongKey)), "{what}: the old key");
        let keyless = Vmgs::open(MemFile(i), None, None, accept).map(|_| ());
        assert!(matches!(keyless, Err(VmgsError::KeyNeeded)), "{what}: no key");
    }
}

/// What writers did that sealed the extended table under a zero key and a zero nonce.
pub(super) fn seal_with_zero_key(image: &mut [u8], slot: usize, under: &[u8; 32]) {
    use aes_gcm::KeyInit;
    use aes_gcm::aead::AeadInPlace;
    let gcm = |k: &[u8]| aes_gcm::Aes256Gcm::new_from_slice(k).expect("32 bytes");
    let h = slot * 512;
    let mut metadata = image[h + 68..h + 100].to_vec();
    gcm(under)
        .decrypt_in_place_detached(
            image[h + 36..h + 48].into(),
            b"",
            &mut metadata,
            image[h + 52..h + 68].into(),
        )
        .expect("unwrap");
    let e = u32_at(image, h + 24) * 4096 + 63 * 64;
    let x = u32_at(image, e) * 4096;
    let mut table = image[x..x + 4096].to_vec();
    gcm(&metadata)
        .decrypt_in_place_detached(
            image[e + 16..e + 28].into(),
            b"",
            &mut table,
            image[e + 28..e + 44].into(),
        )
        .expect("table");
    let tag = gcm(&[0; 32]).encrypt_in_place_detached(&[0; 12].into(), b"", &mut table).expect("seal");
    image[x..x + 4096].copy_from_slice(&table);
    image[e + 16..e + 28].fill(0);
    image[e + 28..e + 44].copy_from_slice(&tag);
}

#[test]
fn no_byte_of_an_earlier_generation_is_left_after_a_rewrite() {
    let mut rng = Rng(0x5eed_0001_2345_6789);
    for n in 0..layouts() {
        // A change of key.
        let before = image(&mut rng, true);
        let mut v = Vmgs::open(MemFile(before.clone()), Some(key(7)), None, Accept::default()).expect("open");
        v.rekey(key(8), 0).expect("rekey");
        let after = v.close().expect("close").0;
        let what = format!("rekey, layout {n}");
        assert_unused_is_zero(&after, &what);
        assert_nothing_is_left(&before, &after, &what);
        assert_dead(&after, 7, &what);
        assert_eq!(contents(&before, key(7)), contents(&after, key(8)), "{what}");

        // A plain image that is encrypted.
        let before = image(&mut rng, false);
        let mut v = Vmgs::open(MemFile(before.clone()), None, None, Accept::default()).expect("open");
        v.rekey(key(8), 0).expect("encrypt");
        let after = v.close().expect("close").0;
        let what = format!("encryption, layout {n}");
        assert_unused_is_zero(&after, &what);
        assert_nothing_is_left(&before, &after, &what);
        assert_dead(&after, 7, &what);

        // A repair, of the table that counts or of the one before, which is found without any key or not at
        // all.
        let mut before = image(&mut rng, true);
        let files = contents(&before, key(7));
        let slot = newest(&before) ^ (n as usize & 1);
        seal_with_zero_key(&mut before, slot, &[7; 32]);
        let strict = Vmgs::open(MemFile(before.clone()), Some(key(7)), None, Accept::default()).map(|_| ());
        assert!(strict.expect_err("refused").to_string().contains("key of zeros"));
        let accept = Accept { zero_key: true, ..Accept::default() };
        let mut v = Vmgs::open(MemFile(before.clone()), Some(key(7)), None, accept).expect("open");
        v.rekey(key(8), FLAG_DISCLOSED).expect("repair");
        let after = v.close().expect("close").0;
        let what = format!("repair, layout {n}");
        assert_unused_is_zero(&after, &what);
        assert_nothing_is_left(&before, &after, &what);
        assert_dead(&after, 7, &what);
        assert_eq!(contents(&after, key(8)), files, "{what}");

        // A loss that is adopted.
        let mut before = image(&mut rng, true);
        let mut files = contents(&before, key(7));
        let (gone, _) = files.remove(rng.below(files.len()));
        let e = entry_at(&before, gone.index());
        before[e..e + 64].fill(0);
        let accept = Accept { foreign: true, ..Accept::default() };
        let mut v = Vmgs::open(MemFile(before.clone()), Some(key(7)), None, accept).expect("open");
        v.commit(&[]).expect("adopt");
        let after = v.close().expect("close").0;
        let what = format!("adoption, layout {n}");
        assert_unused_is_zero(&after, &what);
        assert_nothing_is_left(&before, &after, &what);
        assert_eq!(contents(&after, key(7)), files, "{what}");
    }
}

/// The table that anyone can read is found in a block that no header names any more, too.
#[test]
fn a_zero_key_table_is_found_behind_either_header_and_in_freed_blocks() {
    let mut rng = Rng(77);
    let mut i = image(&mut rng, true);
    let open = |i: &[u8], accept| Vmgs::open(MemFile(i.to_vec()), Some(key(7)), None, accept);
    let (slot, e) = (newest(&i), entry_at(&i, 63));
    let old_table = u32_at(&i, e);
    seal_with_zero_key(&mut i, slot, &[7; 32]);
    // Two sound commits by a tool that looks at nothing leave it in a freed block.
    let sealed = i[old_table * 4096..(old_table + 1) * 4096].to_vec();
    let mut v = open(&image(&mut rng, true), Accept::default()).expect("open");
    v.commit(&[]).expect("commit");
    let mut sound = v.close().expect("close").0;
    sound[200 * 4096..201 * 4096].copy_from_slice(&sealed);
    let found = open(&sound, Accept::default()).map(|_| ()).expect_err("refused").to_string();
    assert!(found.contains("block 200"), "{found}");
    let mut v = open(&sound, Accept { zero_key: true, ..Accept::default() }).expect("repair");
    v.rekey(key(8), FLAG_DISCLOSED).expect("repair");
    assert_unused_is_zero(&v.close().expect("close").0, "freed block");
}
