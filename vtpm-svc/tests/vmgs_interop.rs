// SPDX-License-Identifier: Apache-2.0
//! Images of ours, read by a second reader of the format after every kind of change.

mod common;

use std::collections::BTreeMap;

use common::KEY;
use common::decoder::decode;
use vtpm_svc::vmgs::Accept;
use vtpm_svc::vmgs::Change;
use vtpm_svc::vmgs::FileId;
use vtpm_svc::vmgs::Identity;
use vtpm_svc::vmgs::Key;
use vtpm_svc::vmgs::Vmgs;
use vtpm_svc::vmgs::block::MemFile;

fn blank(mib: usize) -> MemFile {
    MemFile(vec![0; (mib << 20) + 512])
}

fn key(k: &[u8; 32]) -> Key {
    Key::from_bytes(k).expect("key")
}

fn identity() -> Identity {
    Identity::fresh(None).expect("identity")
}

/// A thousand commits of mixed sizes and deletions, then a rekey; the second reader agrees on every byte on
/// the way.
#[test]
fn a_second_reader_agrees_after_a_thousand_mixed_writes_and_a_rekey() {
    for encrypted in [true, false] {
        let mut v = Vmgs::create(blank(4), encrypted.then(|| key(&KEY)), identity(), None).expect("create");
        let mut expected = BTreeMap::new();
        let mut seed = 1u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for round in 0..1000u32 {
            let id = FileId::user(1 + next(12) as u32).expect("id");
            if next(5) == 0 {
                v.commit(&[Change::Delete(id)]).expect("delete");
                expected.remove(&id.number());
            } else {
                let data = vec![round as u8; 1 + next(20_000) as usize];
                v.commit(&[Change::Put(id, &data)]).expect("put");
                expected.insert(id.number(), data);
            }
            if round % 100 == 99 {
                let image = v.close().expect("close").0;
                check(&image, &KEY, encrypted, &expected);
                v = Vmgs::open(MemFile(image), encrypted.then(|| key(&KEY)), None, Accept::default())
                    .expect("open");
            }
        }
        let other = [0x77; 32];
        v.rekey(key(&other), 0).expect("rekey");
        let image = v.close().expect("close").0;
        check(&image, &other, true, &expected);
        assert!(decode(&image, &KEY).is_err(), "the old key");
    }
}

fn check(image: &[u8], key: &[u8; 32], encrypted: bool, expected: &BTreeMap<u32, Vec<u8>>) {
    let mut got = decode(image, key).expect("the second reader");
    assert_eq!(got.encrypted, encrypted);
    assert!(got.files.remove(&62).expect("root").starts_with(b"CVMMROOT"));
    assert!(got.files == *expected, "contents differ");
}

/// All sizes that the product promises.
#[test]
fn images_from_one_to_sixty_four_mebibytes() {
    for mib in [1, 2, 7, 64] {
        let mut v = Vmgs::create(blank(mib), Some(key(&KEY)), identity(), None).expect("create");
        let most = (mib << 20) * 2 / 5;
        let big = vec![mib as u8; most];
        v.commit(&[Change::Put(FileId::BIOS_NVRAM, &big)]).expect("put");
        v.commit(&[Change::Put(FileId::BIOS_NVRAM, &big)]).expect("put beside the old copy");
        let image = v.close().expect("close").0;
        assert!(decode(&image, &KEY).expect("decode").files[&1] == big);
    }
    for bytes in [0, 512 << 10, 65 << 20, (1 << 20) + 512] {
        let file = MemFile(vec![0; bytes + 512]);
        assert!(Vmgs::create(file, Some(key(&KEY)), identity(), None).is_err(), "{bytes}");
    }
}

/// An image as the reference tool makes it: laid out by hand from the format's description, with the second
/// key slot in use, the attribute copies zero, and no integrity root.
#[test]
fn an_image_of_another_tool_opens_once_it_is_adopted() {
    use aes_gcm::KeyInit;
    use aes_gcm::aead::AeadInPlace;
    let seal = |k: &[u8], n: u8, data: &mut [u8]| -> [u8; 16] {
        let cipher = aes_gcm::Aes256Gcm::new_from_slice(k).expect("key");
        cipher.encrypt_in_place_detached(&[n; 12].into(), b"", data).expect("seal").into()
    };
    let ours = Vmgs::create(blank(1), Some(key(&KEY)), identity(), None).expect("create");
    let footer = ours.close().expect("close").0[1 << 20..].to_vec();
    for slot in [0usize, 1] {
        let mut p = vec![0u8; 1 << 20];
        let (metadata, file_key) = ([0x21u8; 32], [0x22u8; 32]);
        let mut data = b"variables".to_vec();
        let file_tag = seal(&file_key, 1, &mut data);
        p[5 * 4096..5 * 4096 + data.len()].copy_from_slice(&data);
        let mut extended = vec![0u8; 4096];
        extended[64..68].copy_from_slice(&3u32.to_le_bytes());
        extended[68..100].copy_from_slice(&file_key);
        // What the reference leaves in entry 63: an older metadata key.
        extended[63 * 64 + 4..63 * 64 + 36].fill(0x99);
        let extended_tag = seal(&metadata, 2, &mut extended);
        p[4 * 4096..5 * 4096].copy_from_slice(&extended);
        let mut entry = |id: usize, block: u32, len: u64, nonce: u8, tag: &[u8; 16]| {
            let at = 3 * 4096 + id * 64;
            p[at..at + 4].copy_from_slice(&block.to_le_bytes());
            p[at + 4..at + 8].copy_from_slice(&1u32.to_le_bytes());
            p[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
            p[at + 16..at + 28].fill(nonce);
            p[at + 28..at + 44].copy_from_slice(tag);
        };
        entry(0, 3, 4096, 0, &[0; 16]);
        entry(1, 5, 9, 1, &file_tag);
        entry(63, 4, 4096, 2, &extended_tag);
        p[..8].copy_from_slice(b"GUESTRTS");
        for (at, v) in [(8, 0x30000u32), (16, 1), (20, 168), (24, 3), (28, 1), (32, 1)] {
            p[at..at + 4].copy_from_slice(&v.to_le_bytes());
        }
        let mut wrapped = metadata;
        let tag = seal(&KEY, 3, &mut wrapped);
        let at = 36 + slot * 64;
        p[at..at + 12].fill(3);
        p[at + 16..at + 32].copy_from_slice(&tag);
        p[at + 32..at + 64].copy_from_slice(&wrapped);
        let crc = crc32fast::hash(&p[..168]);
        p[12..16].copy_from_slice(&crc.to_le_bytes());
        p.extend_from_slice(&footer);
        assert_eq!(decode(&p, &KEY).expect("the second reader").files[&1], b"variables");

        let refused = Vmgs::open(MemFile(p.clone()), Some(key(&KEY)), None, Accept::default()).map(|_| ());
        assert!(refused.expect_err("no root").to_string().contains("integrity root"));
        let accept = Accept { foreign: true, rollback: true, ..Accept::default() };
        let mut v = Vmgs::open(MemFile(p), Some(key(&KEY)), None, accept).expect("adopt");
        v.commit(&[]).expect("re-root");
        let image = v.close().expect("close").0;
        assert_eq!(decode(&image, &KEY).expect("the second reader").files[&1], b"variables");
        let v = Vmgs::open(MemFile(image), Some(key(&KEY)), None, Accept::default()).expect("rooted now");
        assert_eq!(v.read(FileId::BIOS_NVRAM).expect("read").as_slice(), b"variables");
    }
}
