// SPDX-License-Identifier: Apache-2.0
//! Somebody who can write the image file, and has neither its key nor its anchor, against each combination of
//! the options that an operator can give: what is served is what those options name, and an image that had a
//! TPM gets no new one.

#![allow(clippy::panic)]

use super::anchor::AnchorFolder;
use super::anchor::Durability;
use super::block::MemFile;
use super::crash_test::Rng;
use super::error::VmgsError;
use super::file_id::FileId;
use super::findings::Accept;
use super::identity::Identity;
use super::layouts_test::key;
use super::layouts_test::layouts;
use super::layouts_test::newest;
use super::layouts_test::put32;
use super::layouts_test::seal_header;
use super::layouts_test::u32_at;
use super::store::Change;
use super::store::Demand;
use super::store::Vmgs;
use crate::tpm::engine::state::is_virgin;

const MIB: usize = 1 << 20;
const VM: [u8; 16] = [9; 16];
const STATE: FileId = FileId::VTPM_STATE;

/// All copies of one image that were ever on disk, the newest last, and what each holds.
struct Past {
    copies: Vec<Vec<u8>>,
    files: Vec<Vec<(FileId, Vec<u8>)>>,
}

fn past(identity: Identity, encrypted: bool, folder: Option<&AnchorFolder>, fill: u8) -> Past {
    let file = MemFile(vec![0; MIB + 512]);
    let anchors = folder.map(|f| f as &dyn super::anchor::AnchorSource);
    let mut v = Vmgs::create(file, encrypted.then(|| key(7)), identity, anchors).expect("create");
    let mut out = Past { copies: Vec::new(), files: Vec::new() };
    for n in 0..6u8 {
        let state = [vec![fill, n], vec![n; 600 + usize::from(n) * 900]].concat();
        let mut changes = vec![
            Change::Put(STATE, &state),
            Change::Put(FileId::RTC_SKEW, &[0; 8]),
            Change::Flag(super::root::FLAG_PROVISIONED),
        ];
        if n % 2 == 1 {
            changes.push(Change::Put(FileId::VTPM_STATE_GOOD, &state));
        }
        v.commit(&changes).expect("commit");
        let files = v.list().into_iter().filter(|(id, _, _)| *id != FileId::ROOT);
        out.files.push(files.map(|(id, _, _)| (id, v.read(id).expect("read").to_vec())).collect());
        out.copies.push(v.file.0.clone());
    }
    v.close().expect("close");
    out
}

/// One thing that such a person can do.
fn mutate(image: &mut Vec<u8>, rng: &mut Rng, ours: &Past, others: &Past, plain: &Past) {
    // It may be too damaged already to have a table where one is expected.
    let table = |i: &[u8], rng: &mut Rng| {
        let block = u32_at(i, rng.below(2) * 512 + 24);
        (2..MIB / 4096).contains(&block).then_some(block * 4096)
    };
    let ids = [1, 4, 9, 57, 60, 61, 62, 63, 0];
    match rng.below(13) {
        // Entries removed: of the newest header's table or of both.
        0 | 1 => {
            for _ in 0..1 + rng.below(4) {
                if let Some(t) = table(image, rng) {
                    let e = t + ids[rng.below(8)] * 64;
                    image[e..e + 64].fill(0);
                }
            }
        }
        // An older copy, another VM's image, a plain one of the same name.
        2 => *image = ours.copies[rng.below(6)].clone(),
        3 => *image = others.copies[rng.below(6)].clone(),
        4 => *image = plain.copies[rng.below(6)].clone(),
        // A block, a header or an entry of an older copy.
        5 => {
            let old = &ours.copies[rng.below(6)];
            let at = (rng.below(40) + 2) * 4096;
            image[at..at + 4096].copy_from_slice(&old[at..at + 4096]);
        }
        6 => {
            let (old, to) = (&ours.copies[rng.below(6)], rng.below(2) * 512);
            let from = rng.below(2) * 512;
            image[to..to + 512].copy_from_slice(&old[from..from + 512]);
        }
        7 => {
            let old = &ours.copies[rng.below(6)];
            if let (Some(from), Some(to)) = (table(old, rng), table(image, rng)) {
                let id = ids[rng.below(9)] * 64;
                image[to + id..to + id + 64].copy_from_slice(&old[from + id..from + id + 64]);
            }
        }
        // A header that says something else.
        8 => {
            let slot = rng.below(2);
            match rng.below(4) {
                0 => image[slot * 512 + 40] ^= 1,
                1 => put32(image, slot * 512 + 16, rng.below(12) as u32),
                2 => image[slot * 512 + 32] ^= 1,
                _ => image[slot * 512..slot * 512 + 512].fill(0),
            }
            if rng.below(3) != 0 && image[slot * 512] != 0 {
                seal_header(image, slot);
            }
        }
        // Encryption stripped.
        9 => {
            for slot in [0, 1] {
                image[slot * 512 + 32] = 0;
                seal_header(image, slot);
                let block = u32_at(image, slot * 512 + 24);
                if (2..MIB / 4096).contains(&block) {
                    for id in 0..64 {
                        put32(image, block * 4096 + id * 64 + 44, 0);
                    }
                }
            }
        }
        // A file in plain text, with contents that suit the attacker; a root among them.
        10 => {
            if let Some(t) = table(image, rng) {
                let id = ids[rng.below(7)];
                let contents = plain.files[0].first().map_or(vec![1; 40], |(_, d)| d.clone());
                let e = t + id * 64;
                image[e..e + 64].fill(0);
                put32(image, e, 210);
                put32(image, e + 4, 1);
                put32(image, e + 8, contents.len() as u32);
                image[210 * 4096..210 * 4096 + contents.len()].copy_from_slice(&contents);
            }
        }
        // The container's id.
        11 => {
            let other = &others.copies[0];
            image[MIB..].copy_from_slice(&other[MIB..]);
        }
        _ => {
            let at = rng.below(45 * 4096);
            image[at] = rng.next() as u8;
        }
    }
}

/// The record as a host that lost its power in the middle of a lease finds it: an image may be ahead of it.
pub(super) fn after_a_power_loss(mut record: Vec<u8>) -> Vec<u8> {
    for at in [0, 4096] {
        let slot = &mut record[at..at + 512];
        slot[16] = 1;
        slot[24..40].fill(0xb0);
        let crc = crc32fast::hash(&slot[..508]);
        slot[508..].copy_from_slice(&crc.to_le_bytes());
    }
    record
}

#[test]
fn only_what_the_options_name_is_served() {
    let dir = tempfile::tempdir().expect("tempdir");
    let folder = AnchorFolder { path: dir.path().join("anchors"), durability: Durability::Leased };
    let ours = past(Identity { image: [5; 16], vm: VM }, true, Some(&folder), 0xaa);
    let others = past(Identity { image: [6; 16], vm: [8; 16] }, true, Some(&folder), 0xbb);
    // The attacker makes this one himself, with any numbers that he likes.
    let plain = past(Identity { image: [5; 16], vm: VM }, false, None, 0xcc);
    let record = std::fs::read(folder.record_path(&[5; 16])).expect("record");
    let records = [record.clone(), after_a_power_loss(record)];
    let demand = Demand { encrypted: true, vm: Some(VM) };
    let mut rng = Rng(0xa77a_c4e5);
    let (mut served, mut refused) = ([0u32; 4], [0u32; 4]);
    for n in 0..layouts() * 5 {
        let mut image = ours.copies[5].clone();
        for _ in 0..1 + rng.below(3) {
            mutate(&mut image, &mut rng, &ours, &others, &plain);
        }
        for (which, (rollback, foreign)) in
            [(false, false), (true, false), (false, true), (true, true)].into_iter().enumerate()
        {
            let what = format!("attack {n}, rollback {rollback}, adopt {foreign}");
            std::fs::write(folder.record_path(&[5; 16]), &records[n as usize % 2]).expect("record");
            let accept = Accept { rollback, foreign, ..Accept::default() };
            let opened = Vmgs::open_for(MemFile(image.clone()), Some(key(7)), Some(&folder), accept, demand);
            let mut v = match opened {
                Ok(v) => v,
                Err(e) => {
                    refused[which] += 1;
                    // The anchor is as it was for who puts the true image back.
                    if !matches!(e, VmgsError::Io { .. }) {
                        let back = ours.copies[5].clone();
                        Vmgs::open_for(MemFile(back), Some(key(7)), Some(&folder), Accept::default(), demand)
                            .unwrap_or_else(|again| panic!("{what}: refused ({e}), and then: {again}"));
                    }
                    continue;
                }
            };
            served[which] += 1;
            assert!(v.is_encrypted(), "{what}");
            assert!(!is_virgin(&v), "{what}: a new TPM would be made");
            assert_eq!(v.root().vm, VM, "{what}");
            let adopted = v.is_unsettled();
            assert!(foreign || !adopted, "{what}");
            if let Ok(state) = v.read(STATE) {
                let known = |past: &Past| {
                    past.files.iter().position(|f| f.iter().any(|(id, d)| *id == STATE && *d == *state))
                };
                match known(&ours) {
                    Some(5) => {}
                    Some(older) => assert!(rollback, "{what}: state of generation {older}"),
                    None => {
                        // Another VM's image whose root was taken away: nothing proves whose it is, as both
                        // options say.
                        assert!(known(&others).is_some(), "{what}: a state that nobody ever wrote");
                        assert!(rollback && foreign, "{what}: another VM's state");
                    }
                }
            }
            if !foreign {
                // Every file of that generation, and no other, or a file that is blocked.
                let list: Vec<FileId> =
                    v.list().iter().map(|(id, _, _)| *id).filter(|id| *id != FileId::ROOT).collect();
                let generation = ours.files.iter().rev().find(|files| {
                    files.iter().map(|(id, _)| *id).eq(list.iter().copied())
                        && files.iter().all(|(id, data)| match v.read(*id) {
                            Ok(found) => *found == *data,
                            Err(_) => v.is_damaged(*id),
                        })
                });
                // The first generation of all, which one header of the oldest copy still names, holds
                // nothing.
                let first = rollback && list.is_empty();
                assert!(first || generation.is_some(), "{what}: {list:?}");
            }
            // What was accepted can be used, and is nobody's business any more.
            if v.list().iter().all(|(id, _, _)| !v.is_damaged(*id)) {
                v.commit(&[]).unwrap_or_else(|e| panic!("{what}: {e}"));
                let image = v.close().expect("close").0;
                assert!(newest(&image) < 2);
                let again = Vmgs::open_for(
                    MemFile(image),
                    Some(key(7)),
                    Some(&folder),
                    Accept { foreign, ..Accept::default() },
                    demand,
                );
                again.map(|_| ()).unwrap_or_else(|e| panic!("{what}: afterwards {e}"));
            }
        }
    }
    // Both must happen, or the test shows nothing.
    assert!(
        served[3] > served[0] && served[0] > 0 && refused[3] > 0,
        "{served:?} served, {refused:?} refused"
    );
}
