// SPDX-License-Identifier: Apache-2.0
//! Images that an attacker, an accident or another tool could put in front of us, one by one, then at random.
//!
//! Offsets are written as numbers from the format's description, not taken from the parser's constants.

#![allow(clippy::panic)]

use proptest::prelude::*;

use super::anchor::AnchorFolder;
use super::anchor::Durability;
use super::block::MemFile;
use super::crypto::Key;
use super::error::VmgsError;
use super::file_id::FileId;
use super::findings::Accept;
use super::findings::Finding;
use super::store::Change;
use super::store::Vmgs;

const MIB: usize = 1 << 20;
const WHO: super::identity::Identity = super::identity::Identity { image: [5; 16], vm: [9; 16] };
const SECRET: &[u8] = b"the seed of the endorsement hierarchy";
const STATE: FileId = FileId::VTPM_STATE;

fn key(fill: u8) -> Key {
    Key::from_bytes(&[fill; 32]).expect("key")
}

fn blank() -> MemFile {
    MemFile(vec![0; MIB + 512])
}

fn open(image: &[u8]) -> Result<Vmgs<MemFile>, VmgsError> {
    open_with(image, Accept::default())
}

fn open_with(image: &[u8], accept: Accept) -> Result<Vmgs<MemFile>, VmgsError> {
    Vmgs::open(MemFile(image.to_vec()), Some(key(7)), None, accept)
}

/// What an image is refused for.
fn refused_for(image: &[u8]) -> Vec<Finding> {
    match refusal(image) {
        VmgsError::Refused(refusal) => refusal.findings,
        other => panic!("{other}"),
    }
}

/// What is said of a file that cannot be read, while all others can.
fn blocked(image: &[u8], id: FileId) -> VmgsError {
    let v = open(image).expect("one damaged file does not lock the others");
    assert!(v.is_damaged(id), "{:?}", v.findings());
    for (other, _, _) in v.list().into_iter().filter(|(other, _, _)| !v.is_damaged(*other)) {
        v.read(other).expect("the others can be read");
    }
    v.read(id).map(|_| ()).expect_err("the file itself is blocked")
}

fn refusal(image: &[u8]) -> VmgsError {
    open(image).map(|_| ()).expect_err("must be refused")
}

/// An encrypted image at header sequence 3 (so the active slot is slot 0) with a TPM state and UEFI
/// variables.
fn image() -> Vec<u8> {
    let mut v = Vmgs::create(blank(), Some(key(7)), WHO, None).expect("create");
    v.commit(&[Change::Put(STATE, SECRET)]).expect("commit");
    v.commit(&[Change::Put(FileId::BIOS_NVRAM, b"variables")]).expect("commit");
    v.close().expect("close").0
}

fn u32_at(image: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes"))
}

fn put32(image: &mut [u8], at: usize, v: u32) {
    image[at..at + 4].copy_from_slice(&v.to_le_bytes());
}

/// Recomputes the CRC of a header slot.
pub(super) fn seal_header(image: &mut [u8], slot: usize) {
    let at = slot * 512;
    image[at + 12..at + 16].fill(0);
    let crc = crc32fast::hash(&image[at..at + 168]);
    put32(image, at + 12, crc);
}

/// Byte offset of a file-table entry of the header in `slot`.
fn entry_at(image: &[u8], slot: usize, id: usize) -> usize {
    u32_at(image, slot * 512 + 24) as usize * 4096 + id * 64
}

fn data_at(image: &[u8], id: usize) -> usize {
    u32_at(image, entry_at(image, 0, id)) as usize * 4096
}

fn edit(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut i = image();
    change(&mut i);
    i
}

#[test]
fn a_good_image_opens_and_reads_back() {
    let v = open(&image()).expect("open");
    assert_eq!(v.read(STATE).expect("read").as_slice(), SECRET);
    assert_eq!(v.root().generation, 3);
    assert_eq!(v.findings(), [Finding::NoAnchor]);
}

#[test]
fn containers_that_are_not_vhds_are_refused() {
    assert!(matches!(refusal(&[]), VmgsError::Empty));
    assert!(matches!(refusal(&[0; 100]), VmgsError::Truncated(_)));
    assert!(matches!(refusal(&image()[..5000]), VmgsError::Truncated(_)));
    assert!(matches!(refusal(&image()[..MIB / 2]), VmgsError::NotVhd(_)), "cut");
    assert!(matches!(refusal(&image()[..MIB]), VmgsError::NotVhd(_)), "footer removed");
    assert!(matches!(refusal(&edit(|i| i[MIB] = b'x')), VmgsError::NotVhd(_)), "cookie");
    assert!(matches!(refusal(&edit(|i| i[MIB + 66] ^= 1)), VmgsError::NotVhd(_)), "checksum");
    assert!(
        matches!(refusal(&edit(|i| i[MIB + 100] ^= 1)), VmgsError::NotVhd(_)),
        "reserved byte, old checksum"
    );
    let mut only_footer = vec![0; MIB];
    only_footer.extend_from_slice(&image()[MIB..]);
    assert!(matches!(refusal(&only_footer), VmgsError::Empty));
    let short_body: Vec<u8> = image()[MIB - 4096..].to_vec();
    assert!(matches!(refusal(&short_body), VmgsError::Truncated(_)), "size beyond the file");
}

#[test]
fn other_versions_are_named() {
    assert!(matches!(refusal(&edit(|i| i[512..520].copy_from_slice(b"EFI PART"))), VmgsError::V1Format));
    let v2 = edit(|i| {
        for slot in [0, 1] {
            put32(i, slot * 512 + 8, 0x0002_0000);
            seal_header(i, slot);
        }
    });
    assert!(matches!(refusal(&v2), VmgsError::UnsupportedVersion(0x0002_0000)));
}

#[test]
fn a_damaged_active_header_is_not_silently_an_older_generation() {
    for damage in [
        (|i: &mut Vec<u8>| i[40] ^= 1) as fn(&mut Vec<u8>),
        |i| i[..168].fill(0),
        |i| {
            i[32] = 2;
            seal_header(i, 0);
        },
        |i| {
            put32(i, 24, 1);
            seal_header(i, 0);
        },
    ] {
        let bad = edit(damage);
        assert!(matches!(refusal(&bad), VmgsError::StaleGeneration { have: 2, .. }));
        let accepted = open_with(&bad, Accept { rollback: true, foreign: false, ..Accept::default() })
            .expect("operator accepts");
        assert_eq!(accepted.root().generation, 2);
    }
}

#[test]
fn a_damaged_inactive_header_is_a_warning_and_healed_by_the_next_commit() {
    let bad = edit(|i| i[512 + 40] ^= 1);
    assert!(
        matches!(refusal(&bad), VmgsError::StaleGeneration { have: 3, .. }),
        "nothing in a damaged slot says that it is the older one"
    );
    let mut v = open_with(&bad, Accept { rollback: true, ..Accept::default() }).expect("open");
    assert!(matches!(v.findings()[0], Finding::MayBeOlder(_)));
    v.commit(&[]).expect("commit");
    let healed = v.close().expect("close").0;
    assert_eq!(open(&healed).expect("open").findings(), [Finding::NoAnchor]);
}

#[test]
fn headers_that_cannot_be_ordered_are_refused() {
    let both_bad = edit(|i| {
        i[40] ^= 1;
        i[512 + 40] ^= 1;
    });
    assert!(matches!(refusal(&both_bad), VmgsError::NoValidHeader { .. }));
    for other in [3, 5, 1] {
        let gap = edit(|i| {
            put32(i, 512 + 16, other);
            seal_header(i, 1);
        });
        assert!(matches!(refusal(&gap), VmgsError::SequenceGap { a: 3, .. }));
    }
}

#[test]
fn tables_out_of_range_are_refused() {
    let header_past_end = edit(|i| {
        put32(i, 24, 256);
        seal_header(i, 0);
    });
    assert!(matches!(refusal(&header_past_end), VmgsError::OutOfRange(FileId::FILE_TABLE, _)));
    let at = |i: &[u8], id| entry_at(i, 0, id);
    let zero_entry_0 = edit(|i| {
        let e = at(i, 0);
        i[e..e + 64].fill(0);
    });
    assert!(matches!(refusal(&zero_entry_0), VmgsError::BadTable(FileId::FILE_TABLE, _)));
    let marked = edit(|i| {
        let e = at(i, 0);
        i[e..e + 64].fill(0);
        i[34] = 1;
        seal_header(i, 0);
    });
    assert!(matches!(refusal(&marked), VmgsError::BadTable(FileId::FILE_TABLE, _)));
    let file = |field: usize, v: u32| {
        edit(|i| {
            let e = at(i, 60);
            put32(i, e + field, v);
        })
    };
    for bad in [
        file(0, 0),
        file(0, 1),
        file(0, 256),
        file(0, u32::MAX),
        file(4, u32::MAX),
        file(4, 255),
        file(8, 4097),
    ] {
        assert!(matches!(refusal(&bad), VmgsError::OutOfRange(STATE, _)));
    }
    let wrap = edit(|i| {
        let e = at(i, 60);
        put32(i, e, u32::MAX);
        put32(i, e + 4, u32::MAX);
    });
    assert!(matches!(refusal(&wrap), VmgsError::OutOfRange(STATE, _)));
    let short_extended = edit(|i| {
        let e = at(i, 63);
        put32(i, e + 8, 4095);
    });
    assert!(matches!(refusal(&short_extended), VmgsError::BadTable(FileId::EXTENDED, _)));
    let overlap = edit(|i| {
        let (a, b) = (at(i, 1), at(i, 60));
        let block = u32_at(i, b);
        put32(i, a, block);
    });
    assert!(matches!(refusal(&overlap), VmgsError::Overlap(FileId::BIOS_NVRAM, STATE, _)));
    let over_table = edit(|i| {
        let block = u32_at(i, 24);
        let a = at(i, 1);
        put32(i, a, block);
    });
    assert!(matches!(refusal(&over_table), VmgsError::Overlap(FileId::FILE_TABLE, FileId::BIOS_NVRAM, _)));
}

#[test]
fn changed_ciphertext_is_refused() {
    let shorter = edit(|i| {
        let e = entry_at(i, 0, 60);
        let n = u32_at(i, e + 8);
        put32(i, e + 8, n - 1);
    });
    assert!(matches!(blocked(&shorter, STATE), VmgsError::AuthFailed(STATE)));
    let flipped = edit(|i| {
        let d = data_at(i, 60);
        i[d] ^= 1;
    });
    assert!(matches!(blocked(&flipped, STATE), VmgsError::AuthFailed(STATE)));
    let zeroed = edit(|i| {
        let d = data_at(i, 60);
        i[d..d + 4096].fill(0);
    });
    assert!(matches!(blocked(&zeroed, STATE), VmgsError::ZeroCiphertext(STATE)));
    let zero_table = edit(|i| {
        let d = data_at(i, 63);
        i[d..d + 4096].fill(0);
    });
    assert!(matches!(refusal(&zero_table), VmgsError::ZeroCiphertext(FileId::EXTENDED)));
    let table_flip = edit(|i| {
        let d = data_at(i, 63);
        i[d + 9] ^= 1;
    });
    assert!(matches!(refusal(&table_flip), VmgsError::AuthFailed(FileId::EXTENDED)));
}

#[test]
fn the_attribute_copy_is_not_believed() {
    let cleared = edit(|i| {
        let e = entry_at(i, 0, 60);
        put32(i, e + 44, 0);
    });
    assert_eq!(open(&cleared).expect("open").read(STATE).expect("read").as_slice(), SECRET);
}

#[test]
fn a_deleted_entry_is_noticed_without_any_anchor() {
    for id in [1, 60, 62] {
        let gone = edit(|i| {
            let e = entry_at(i, 0, id);
            i[e..e + 64].fill(0);
        });
        let found = refused_for(&gone);
        match id {
            62 => assert!(matches!(found[..], [Finding::RootLost(_)]), "{found:?}"),
            _ => assert_eq!(found, [Finding::Missing(FileId::user(id as u32).expect("id"))]),
        }
    }
    let no_extended = edit(|i| {
        let e = entry_at(i, 0, 63);
        i[e..e + 64].fill(0);
    });
    assert!(matches!(refusal(&no_extended), VmgsError::MissingEntry(FileId::EXTENDED)));
}

#[test]
fn two_entries_that_were_swapped_are_noticed() {
    let swapped = edit(|i| {
        let (a, b) = (entry_at(i, 0, 1), entry_at(i, 0, 60));
        for n in 0..64 {
            i.swap(a + n, b + n);
        }
    });
    assert!(matches!(blocked(&swapped, STATE), VmgsError::AuthFailed(_)));
    assert!(matches!(blocked(&swapped, FileId::BIOS_NVRAM), VmgsError::AuthFailed(_)));
}

#[test]
fn a_planted_plaintext_file_is_noticed() {
    let planted = |id: usize| {
        edit(move |i| {
            let e = entry_at(i, 0, id);
            put32(i, e, 200);
            put32(i, e + 4, 1);
            put32(i, e + 8, 9);
            i[200 * 4096..200 * 4096 + 9].copy_from_slice(b"my secret");
        })
    };
    assert!(refused_for(&planted(3)).contains(&Finding::Planted(FileId::TPM_NVRAM)));
    assert!(matches!(refused_for(&planted(9))[..], [Finding::Unexpected(_)]));
    let adopted = open_with(&planted(9), Accept { rollback: false, foreign: true, ..Accept::default() })
        .expect("adopt");
    assert_eq!(adopted.read(FileId::user(9).expect("id")).expect("read").as_slice(), b"my secret");
}

#[test]
fn stripping_the_encryption_is_noticed() {
    let stripped = edit(|i| {
        i[32] = 0;
        seal_header(i, 0);
    });
    assert!(matches!(refusal(&stripped), VmgsError::EncryptionStripped(_)));
    let stripped_copies_too = edit(|i| {
        i[32] = 0;
        seal_header(i, 0);
        for id in 0..64 {
            let e = entry_at(i, 0, id);
            put32(i, e + 44, 0);
        }
    });
    assert!(matches!(refusal(&stripped_copies_too), VmgsError::EncryptionStripped(FileId::EXTENDED)));
}

#[test]
fn wrong_missing_and_zero_keys_are_told_apart() {
    let wrong = Vmgs::open(MemFile(image()), Some(key(8)), None, Accept::default()).map(|_| ());
    assert!(matches!(wrong, Err(VmgsError::WrongKey)));
    let none = Vmgs::open(MemFile(image()), None, None, Accept::default()).map(|_| ());
    assert!(matches!(none, Err(VmgsError::KeyNeeded)));
    let no_slots = edit(|i| {
        i[36..164].fill(0);
        seal_header(i, 0);
    });
    assert!(matches!(refusal(&no_slots), VmgsError::WrongKey));
}

/// Makes the image that writers with the zeroed metadata key made: extended table sealed with key 0 and nonce
/// 0.
#[test]
fn a_zero_metadata_key_is_found_without_any_key() {
    use aes_gcm::KeyInit;
    use aes_gcm::aead::AeadInPlace;
    let bad = edit(|i| {
        let d = data_at(i, 63);
        let cipher = aes_gcm::Aes256Gcm::new(&[0; 32].into());
        let mut table = vec![0x11; 4096];
        let tag = cipher.encrypt_in_place_detached(&[0; 12].into(), b"", &mut table).expect("seal");
        i[d..d + 4096].copy_from_slice(&table);
        let e = entry_at(i, 0, 63);
        i[e + 16..e + 28].fill(0);
        i[e + 28..e + 44].copy_from_slice(&tag);
    });
    let found = Vmgs::open(MemFile(bad), None, None, Accept::default()).map(|_| ());
    assert!(
        matches!(found, Err(VmgsError::Refused(r)) if r.findings.contains(&Finding::ZeroKey(super::findings::ZeroKey::Active)))
    );
}

#[test]
fn a_foreign_write_is_reported_with_its_ids_and_can_be_adopted() {
    // A tool with the key that does not keep the root: same entry points, root put back to what it was.
    let before = image();
    let mut v = open(&before).expect("open");
    v.commit(&[Change::Put(STATE, b"changed by another tool")]).expect("commit");
    let after = v.close().expect("close").0;
    // Splice: the new image, but with the root of the old one re-sealed in it, is what such a tool leaves
    // behind.
    let old_root = open(&before).expect("open").root().clone();
    let foreign = reroot(after, &old_root);
    assert_eq!(refused_for(&foreign), [Finding::Changed(STATE)]);
    let adopted =
        open_with(&foreign, Accept { rollback: false, foreign: true, ..Accept::default() }).expect("adopt");
    assert!(
        adopted.is_unsettled() && adopted.warnings()[0].starts_with("ADOPTED: file 60"),
        "{:?}",
        adopted.warnings()
    );
    assert_eq!(adopted.read(STATE).expect("read").as_slice(), b"changed by another tool");
}

/// Replaces the root's plain text, as someone with the datastore key could.
fn reroot(mut image: Vec<u8>, root: &super::root::Root) -> Vec<u8> {
    use aes_gcm::KeyInit;
    use aes_gcm::aead::AeadInPlace;
    let slot = if u32_at(&image, 16) > u32_at(&image, 512 + 16) { 0 } else { 1 };
    let h = slot * 512;
    let gcm = |k: &[u8]| aes_gcm::Aes256Gcm::new_from_slice(k).expect("32 bytes");
    let mut metadata = image[h + 68..h + 100].to_vec();
    gcm(&[7; 32])
        .decrypt_in_place_detached(
            image[h + 36..h + 48].into(),
            b"",
            &mut metadata,
            image[h + 52..h + 68].into(),
        )
        .expect("unwrap");
    let e63 = entry_at(&image, slot, 63);
    let x = u32_at(&image, e63) as usize * 4096;
    let mut extended = image[x..x + 4096].to_vec();
    gcm(&metadata)
        .decrypt_in_place_detached(
            image[e63 + 16..e63 + 28].into(),
            b"",
            &mut extended,
            image[e63 + 28..e63 + 44].into(),
        )
        .expect("extended table");
    let e62 = entry_at(&image, slot, 62);
    let d = u32_at(&image, e62) as usize * 4096;
    let mut plain = root.to_bytes();
    let tag = gcm(&extended[62 * 64 + 4..62 * 64 + 36])
        .encrypt_in_place_detached(image[e62 + 16..e62 + 28].into(), b"", &mut plain)
        .expect("seal");
    image[d..d + plain.len()].copy_from_slice(&plain);
    put32(&mut image, e62 + 8, plain.len() as u32);
    image[e62 + 28..e62 + 44].copy_from_slice(&tag);
    image
}

#[test]
fn no_secret_stands_in_the_raw_image_and_no_window_opens_with_a_poor_key() {
    use super::seal::Seal;
    let mut v = Vmgs::create(blank(), Some(key(7)), WHO, None).expect("create");
    for n in 0..5u8 {
        v.commit(&[Change::Put(STATE, SECRET), Change::Put(FileId::BIOS_NVRAM, &[n; 9000])]).expect("commit");
    }
    let raw = v.close().expect("close").0;
    assert!(!raw.windows(SECRET.len()).any(|w| w == SECRET), "state in plain text");
    assert!(!raw.windows(16).any(|w| w == [3; 16]), "variables in plain text");
    assert!(!raw.windows(8).any(|w| w == b"CVMMROOT"), "root in plain text");
    assert!(!raw.windows(32).any(|w| w == [7; 32]), "datastore key in the image");
    let take = |at: usize, n: usize| raw[at..at + n].to_vec();
    for slot in [0, 1] {
        let e = entry_at(&raw, slot, 63);
        let seal = Seal {
            nonce: take(e + 16, 12).try_into().expect("12"),
            tag: take(e + 28, 16).try_into().expect("16"),
        };
        assert_ne!(seal.nonce, [0; 12]);
        let x = u32_at(&raw, e) as usize * 4096;
        let extended = take(x, 4096);
        // Zero, constant, and every 32 bytes that stand anywhere in the headers or in the tables.
        let mut candidates: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b; 32]).collect();
        let t = e - 63 * 64;
        for range in [0..1024, t..t + 4096, x..x + 4096] {
            candidates.extend(raw[range].windows(32).map(<[u8]>::to_vec));
        }
        for k in candidates {
            let k: [u8; 32] = k.try_into().expect("32");
            assert!(
                super::crypto::open(&k, &seal, &extended).is_none(),
                "the table opens with bytes of the image"
            );
        }
    }
}

#[test]
fn after_a_rekey_the_old_key_opens_nothing_and_old_blocks_are_gone() {
    let before = image();
    let old_state = before[data_at(&before, 60)..][..SECRET.len()].to_vec();
    let mut v = open(&before).expect("open");
    v.rekey(key(8), 0).expect("rekey");
    let after = v.close().expect("close").0;
    assert!(!after.windows(old_state.len()).any(|w| w == old_state), "an old ciphertext is still there");
    for damage in [None, Some(0), Some(512)] {
        let mut i = after.clone();
        if let Some(at) = damage {
            i[at + 40] ^= 1;
        }
        let accept = Accept { rollback: true, foreign: true, ..Accept::default() };
        let old = Vmgs::open(MemFile(i.clone()), Some(key(7)), None, accept).map(|_| ());
        assert!(matches!(old, Err(VmgsError::WrongKey)), "slot {damage:?}");
        let new = Vmgs::open(MemFile(i), Some(key(8)), None, accept).expect("new key");
        assert_eq!(new.read(STATE).expect("read").as_slice(), SECRET);
    }
}

#[test]
fn rollback_fork_and_second_copy_are_refused_by_the_anchor() {
    let dir = tempfile::tempdir().expect("tempdir");
    let folder = AnchorFolder { path: dir.path().into(), durability: Durability::Strict };
    let mut v = Vmgs::create(blank(), Some(key(7)), WHO, Some(&folder)).expect("create");
    v.commit(&[Change::Put(STATE, b"one")]).expect("commit");
    let old = v.close().expect("close").0;
    let anchored =
        |image: &[u8], accept| Vmgs::open(MemFile(image.to_vec()), Some(key(7)), Some(&folder), accept);

    let mut v = anchored(&old, Accept::default()).expect("newest");
    let second = anchored(&old, Accept::default()).map(|_| ());
    assert!(matches!(second, Err(VmgsError::Anchor(super::anchor::AnchorError::InUse { .. }))));
    v.commit(&[Change::Put(STATE, b"two")]).expect("commit");
    let new = v.close().expect("close").0;

    let stale = anchored(&old, Accept::default()).map(|_| ());
    assert!(matches!(stale, Err(VmgsError::StaleGeneration { have: 2, .. })));

    // A fork: the old copy is accepted on purpose once, moves on, and then the other branch is the stale one.
    let mut fork = anchored(&old, Accept { rollback: true, foreign: false, ..Accept::default() })
        .expect("operator accepts");
    assert!(matches!(fork.findings()[0], Finding::RollbackAccepted { have: 2, .. }));
    fork.commit(&[Change::Put(STATE, b"other")]).expect("commit");
    let forked = fork.close().expect("close").0;
    let loser = anchored(&new, Accept::default()).map(|_| ());
    assert!(matches!(loser, Err(VmgsError::StaleGeneration { have: 3, .. })), "the branch that was given up");
    assert_eq!(
        anchored(&forked, Accept::default()).expect("open").root().generation,
        4,
        "3 was used already"
    );
    anchored(&forked, Accept::default()).expect("the branch that was accepted");

    std::fs::remove_dir_all(dir.path()).expect("lose the anchor");
    let unknown = anchored(&forked, Accept::default()).map(|_| ());
    assert!(matches!(unknown, Err(VmgsError::Anchor(super::anchor::AnchorError::Unknown { .. }))));
}

/// An image with a TPM, a clock and a root, in use with an anchor; and a copy of it from before its last
/// commit.
fn anchored_pair(folder: &AnchorFolder) -> (Vec<u8>, Vec<u8>) {
    let mut v = Vmgs::create(blank(), Some(key(7)), WHO, Some(folder)).expect("create");
    let all = super::root::FLAG_PROVISIONED | super::root::FLAG_EXPORTED | super::root::FLAG_DISCLOSED;
    v.commit(&[
        Change::Put(STATE, SECRET),
        Change::Put(FileId::VTPM_STATE_GOOD, SECRET),
        Change::Put(FileId::RTC_SKEW, &[0; 8]),
        Change::Flag(all),
    ])
    .expect("commit");
    let old = v.file.0.clone();
    v.commit(&[Change::Put(FileId::RTC_SKEW, &[1; 8])]).expect("commit");
    v.commit(&[Change::Put(FileId::RTC_SKEW, &[2; 8])]).expect("commit");
    (v.close().expect("close").0, old)
}

fn without(mut image: Vec<u8>, ids: &[usize]) -> Vec<u8> {
    let slot = usize::from(u32_at(&image, 16) < u32_at(&image, 512 + 16));
    for id in ids {
        let e = entry_at(&image, slot, *id);
        image[e..e + 64].fill(0);
    }
    image
}

#[test]
fn a_lost_root_needs_both_words_names_every_loss_and_keeps_who_the_image_is() {
    let dir = tempfile::tempdir().expect("tempdir");
    let folder = AnchorFolder { path: dir.path().join("a"), durability: Durability::Leased };
    let (newest, old) = anchored_pair(&folder);
    let anchored = |image: &[u8], rollback, foreign| {
        let accept = Accept { rollback, foreign, ..Accept::default() };
        Vmgs::open(MemFile(image.to_vec()), Some(key(7)), Some(&folder), accept)
    };
    let robbed = without(newest, &[4, 60, 61, 62]);
    for (rollback, foreign) in [(false, false), (true, false), (false, true)] {
        let text = anchored(&robbed, rollback, foreign).map(|_| ()).expect_err("refused").to_string();
        for named in ["file 4 ", "file 60 ", "file 61 ", "file 62", "--adopt and --accept-rollback together"]
        {
            assert!(text.contains(named), "{named}: {text}");
        }
        // An old copy is no newer for having lost its root.
        let old = without(old.clone(), &[62]);
        assert!(anchored(&old, rollback, foreign).is_err());
    }
    let mut v = anchored(&robbed, true, true).expect("both words");
    assert!(!crate::tpm::engine::state::is_virgin(&v));
    assert_eq!((v.root().image, v.root().vm), (WHO.image, WHO.vm));
    assert_eq!(v.root().flags, 7, "made, exported, disclosed");
    assert!(v.commit(&[]).expect("commit").generation > 4, "above all that the anchor knows");
}

#[test]
fn a_plain_copy_of_an_encrypted_image_moves_no_anchor_and_no_option_accepts_it() {
    let dir = tempfile::tempdir().expect("tempdir");
    let folder = AnchorFolder { path: dir.path().join("a"), durability: Durability::Leased };
    let (genuine, _) = anchored_pair(&folder);
    let path = folder.record_path(&WHO.image);
    let record = super::attack_test::after_a_power_loss(std::fs::read(&path).expect("record"));
    // Anybody can make this one, with any generation.
    let mut v = Vmgs::create(blank(), None, WHO, None).expect("create");
    v.root.generation = (1 << 56) - 2;
    v.commit(&[Change::Put(FileId::RTC_SKEW, &[9; 8])]).expect("commit");
    let plain = v.close().expect("close").0;
    for (rollback, foreign) in [(false, false), (true, false), (false, true), (true, true)] {
        for plain in [plain.clone(), without(plain.clone(), &[62])] {
            std::fs::write(&path, &record).expect("record");
            let accept = Accept { rollback, foreign, ..Accept::default() };
            let opened = Vmgs::open(MemFile(plain), None, Some(&folder), accept).map(|_| ());
            opened.expect_err("stripped");
            assert!(std::fs::read(&path).expect("record") == record, "{rollback} {foreign}");
        }
    }
    Vmgs::open(MemFile(genuine), Some(key(7)), Some(&folder), Accept::default()).expect("the true one");
}

#[test]
fn space_runs_out_without_touching_a_live_generation() {
    let mut v = open(&image()).expect("open");
    let big = vec![1; 100 * 4096];
    v.commit(&[Change::Put(FileId::BIOS_NVRAM, &big)]).expect("fits");
    v.commit(&[Change::Put(FileId::BIOS_NVRAM, &big)]).expect("fits beside the old copy");
    let full = v.commit(&[Change::Put(FileId::BIOS_NVRAM, &big)]).map(|_| ());
    assert!(matches!(full, Err(VmgsError::NoSpace { need: 100, capacity: 256 })));
    v.commit(&[Change::Delete(FileId::BIOS_NVRAM)]).expect("the store goes on");
    assert_eq!(
        open(&v.close().expect("close").0).expect("open").read(STATE).expect("read").as_slice(),
        SECRET
    );
}

#[test]
fn plain_images_are_possible_and_contain_no_key() {
    let mut v = Vmgs::create(blank(), None, WHO, None).expect("create");
    v.commit(&[Change::Put(FileId::RTC_SKEW, &[1, 2, 3])]).expect("commit");
    let raw = v.close().expect("close").0;
    assert_eq!(raw[32], 0, "algorithm none");
    let v = Vmgs::open(MemFile(raw), None, None, Accept::default()).expect("open");
    assert_eq!(v.read(FileId::RTC_SKEW).expect("read").as_slice(), [1, 2, 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any damage gives an error or the true contents, and never a write or a panic.
    #[test]
    fn random_damage_never_yields_wrong_contents(
        edits in proptest::collection::vec((0usize..12 * 4096, any::<u8>()), 1..6),
        reseal in any::<bool>()
    ) {
        let mut i = image();
        for (at, v) in edits {
            i[at] = v;
        }
        if reseal {
            seal_header(&mut i, 0);
            seal_header(&mut i, 1);
        }
        if let Ok(v) = open(&i) {
            match v.root().generation {
                3 => {
                    for (id, expected) in [(STATE, SECRET), (FileId::BIOS_NVRAM, b"variables")] {
                        match v.read(id) {
                            Ok(data) => prop_assert!(data.as_slice() == expected),
                            Err(e) => prop_assert!(v.is_damaged(id), "{e}"),
                        }
                    }
                }
                // Whoever forges a header can point at the older generation; that is the anchor's to notice.
                2 if reseal => {}
                other => prop_assert!(false, "generation {} without an override", other),
            }
        }
    }

    #[test]
    fn random_tables_never_panic(bytes in proptest::collection::vec(any::<u8>(), 4096), slots in any::<[u8; 336]>()) {
        let mut i = image();
        let t = entry_at(&i, 0, 0);
        i[t + 64..t + 4096].copy_from_slice(&bytes[64..]);
        let _ = open_with(&i, Accept { rollback: true, foreign: true, ..Accept::default() });
        i[..168].copy_from_slice(&slots[..168]);
        i[512..680].copy_from_slice(&slots[168..]);
        let _ = open_with(&i, Accept { rollback: true, foreign: true, ..Accept::default() });
    }
}
