// SPDX-License-Identifier: Apache-2.0
//! Every point at which a disk or a process can end, in every operation that writes an image anew: with the
//! anchor that it has, the image opens as before or as after, by the next command or by the one that the
//! refusal names.

#![allow(clippy::panic)]

use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use super::anchor::AnchorFolder;
use super::anchor::AnchorSource;
use super::anchor::Durability;
use super::block::BlockFile;
use super::block::MemFile;
use super::crash_test::Rng;
use super::crypto::Key;
use super::error::VmgsError;
use super::file_id::FileId;
use super::findings::Accept;
use super::findings::Finding;
use super::layouts_test::entry_at;
use super::layouts_test::key;
use super::layouts_test::newest;
use super::layouts_test::put32;
use super::layouts_test::seal_header;
use super::layouts_test::seal_with_zero_key;
use super::layouts_test::u32_at;
use super::root::FLAG_DISCLOSED;
use super::root::digest;
use super::store::Change;
use super::store::Vmgs;
use super::view::View;
use crate::keys::KeyError;
use crate::keys::KeyProvider;
use crate::keys::KeyRequest;
use crate::keys::Purpose;
use crate::keys::open::key_of;

const MIB: usize = 1 << 20;
const WHO: super::identity::Identity = super::identity::Identity { image: [5; 16], vm: [9; 16] };

/// What has reached the disk, what may have, and how many operations it still does.
struct State {
    durable: Vec<u8>,
    in_flight: Vec<(usize, Vec<u8>)>,
    seen: Vec<u8>,
    left: usize,
}

#[derive(Clone)]
struct Disk(Arc<Mutex<State>>);

impl Disk {
    fn new(image: Vec<u8>, left: usize) -> Self {
        let state = State { durable: image.clone(), in_flight: Vec::new(), seen: image, left };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The process ends: everything that was written is there.
    fn written(&self) -> Vec<u8> {
        self.0.lock().expect("disk").seen.clone()
    }

    /// The power goes: any sectors of what was not flushed are there.
    fn powerless(&self, rng: &mut Rng) -> Vec<u8> {
        let state = self.0.lock().expect("disk");
        let mut image = state.durable.clone();
        for (at, data) in &state.in_flight {
            for (n, sector) in data.chunks(512).enumerate() {
                if rng.below(2) == 0 {
                    image[at + n * 512..][..sector.len()].copy_from_slice(sector);
                }
            }
        }
        image
    }
}

impl BlockFile for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("disk").seen.len() as u64)
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.0.lock().expect("disk");
        buffer.copy_from_slice(&state.seen[offset as usize..][..buffer.len()]);
        Ok(())
    }
    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.0.lock().expect("disk");
        state.left = state.left.checked_sub(1).ok_or_else(|| io::Error::other("disk gone"))?;
        state.seen[offset as usize..][..data.len()].copy_from_slice(data);
        state.in_flight.push((offset as usize, data.to_vec()));
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.0.lock().expect("disk");
        state.left = state.left.checked_sub(1).ok_or_else(|| io::Error::other("disk gone"))?;
        for (at, data) in std::mem::take(&mut state.in_flight) {
            state.durable[at..][..data.len()].copy_from_slice(&data);
        }
        Ok(())
    }
}

fn folder(dir: &tempfile::TempDir) -> AnchorFolder {
    AnchorFolder { path: dir.path().join("anchors"), durability: Durability::Leased }
}

/// An image in use, with its anchor.
fn used(dir: &tempfile::TempDir, k: Option<Key>, fill: usize) -> Vec<u8> {
    let file = MemFile(vec![0; MIB + 512]);
    let mut v = Vmgs::create(file, k, WHO, Some(&folder(dir))).expect("create");
    v.commit(&[Change::Put(FileId::VTPM_STATE, b"the TPM"), Change::Put(FileId::BIOS_NVRAM, &vec![3; fill])])
        .expect("commit");
    v.commit(&[Change::Put(FileId::VTPM_STATE_GOOD, &[4; 5000])]).expect("commit");
    v.close().expect("close").0
}

struct Case {
    name: &'static str,
    /// The image's key before.
    key: Option<u8>,
    /// The key that the operator gives.
    given: Option<u8>,
    accept: Accept,
    prepare: fn(&mut Vec<u8>),
    run: fn(&mut Vmgs<Disk>) -> Result<(), VmgsError>,
    /// What the image must hold in the end.
    after: fn(&Vmgs<MemFile>) -> bool,
}

const NONE: Accept = Accept { rollback: false, foreign: false, zero_key: false, replacing: 0 };
const ADOPT: Accept = Accept { foreign: true, ..NONE };
const REPAIR: Accept = Accept { zero_key: true, ..NONE };

fn clock() -> FileId {
    FileId::RTC_SKEW
}

fn cases() -> Vec<Case> {
    let whole = |v: &Vmgs<MemFile>| v.read(FileId::VTPM_STATE).is_ok_and(|d| d.as_slice() == b"the TPM");
    vec![
        Case {
            name: "import",
            key: Some(7),
            given: Some(7),
            accept: NONE,
            prepare: |_| {},
            run: |v| v.commit(&[Change::Put(clock(), &[1; 8])]).map(|_| ()),
            after: whole,
        },
        Case {
            name: "rekey",
            key: Some(7),
            given: Some(7),
            accept: NONE,
            prepare: |_| {},
            run: |v| v.rekey(key(8), 0).map(|_| ()),
            after: whole,
        },
        Case {
            name: "encrypt",
            key: None,
            given: None,
            accept: NONE,
            prepare: |_| {},
            run: |v| v.rekey(key(8), 0).map(|_| ()),
            after: whole,
        },
        Case {
            name: "repair",
            key: Some(7),
            given: Some(7),
            accept: REPAIR,
            prepare: |i| {
                let slot = newest(i);
                seal_with_zero_key(i, slot, &[7; 32]);
            },
            run: |v| v.rekey(key(8), FLAG_DISCLOSED).map(|_| ()),
            after: whole,
        },
        Case {
            name: "repair by somebody who has no key",
            key: Some(7),
            given: None,
            accept: REPAIR,
            prepare: |i| {
                let slot = newest(i);
                seal_with_zero_key(i, slot, &[7; 32]);
            },
            run: |v| v.rekey(key(8), FLAG_DISCLOSED).map(|_| ()),
            after: whole,
        },
        Case {
            name: "repair of the older table",
            key: Some(7),
            given: Some(7),
            accept: REPAIR,
            prepare: |i| {
                let slot = 1 - newest(i);
                seal_with_zero_key(i, slot, &[7; 32]);
            },
            run: |v| v.rekey(key(8), FLAG_DISCLOSED).map(|_| ()),
            after: whole,
        },
        Case {
            name: "adopt",
            key: Some(7),
            given: Some(7),
            accept: ADOPT,
            prepare: |i| {
                let e = entry_at(i, 61);
                i[e..e + 64].fill(0);
            },
            run: |v| v.commit(&[]).map(|_| ()),
            after: whole,
        },
    ]
}

#[test]
fn at_every_failure_point_an_image_is_as_before_or_as_after() {
    let mut rng = Rng(0xfa11);
    for case in cases() {
        let mut points = 0;
        for left in 0.. {
            let dir = tempfile::tempdir().expect("tempdir");
            let mut before = used(&dir, case.key.map(key), 9000);
            (case.prepare)(&mut before);
            let disk = Disk::new(before, left);
            let anchors = folder(&dir);
            let mut v =
                Vmgs::open(disk.clone(), case.given.map(key), Some(&anchors), case.accept).expect("open");
            let done = (case.run)(&mut v);
            // The process is gone without a word.
            drop(v);
            let record = std::fs::read(anchors.record_path(&WHO.image)).expect("record");
            let mut images = vec![disk.written()];
            images.extend((0..4).map(|_| disk.powerless(&mut rng)));
            for (n, image) in images.into_iter().enumerate() {
                let what = format!("{}, {left} operations, {n}", case.name);
                std::fs::write(anchors.record_path(&WHO.image), &record).expect("record");
                // One of the two keys opens it; options only as before, if it is as before.
                let open = |k, accept| Vmgs::open(MemFile(image.clone()), k, Some(&anchors), accept);
                let opened = open(Some(key(8)), NONE)
                    .or_else(|_| open(case.given.map(key), NONE))
                    .or_else(|_| open(case.given.map(key), case.accept));
                // A repair that was cut short after its first header is known by its traces, and repaired
                // with the new key.
                let opened = opened.or_else(|_| open(Some(key(8)), case.accept));
                let v = opened.unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!((case.after)(&v), "{what}");
            }
            points += 1;
            if done.is_ok() {
                break;
            }
        }
        assert!(points > 4, "{}: {points} points", case.name);
    }
}

/// A key as a passphrase gives it: another one for each id of the container.
struct Salted(&'static [u8]);

impl KeyProvider for Salted {
    fn describe(&self) -> String {
        "salted".into()
    }
    fn obtain(&self, request: &KeyRequest<'_>) -> Result<Key, KeyError> {
        Ok(Key::from_bytes(&digest(&[self.0, &request.image].concat())).expect("key"))
    }
}

/// An image that another tool made without an id, so that the change of passphrase gives the container one.
#[test]
fn at_every_failure_point_the_old_or_the_new_passphrase_opens_the_image_and_the_new_one_ends_the_change() {
    let (old, new) = (Salted(b"old"), Salted(b"new"));
    let (mut rng, mut both) = (Rng(0x5a17), [0, 0]);
    for left in 0.. {
        let dir = tempfile::tempdir().expect("tempdir");
        let salted = |who: &Salted, image| {
            let purpose = Purpose::Open;
            who.obtain(&KeyRequest { image, vm: None, purpose, evidence: None }).expect("key")
        };
        let mut before = used(&dir, Some(salted(&old, [0; 16])), 9000);
        let footer = super::vhd::build(MIB as u64, [0; 16]);
        before[MIB..].copy_from_slice(&footer);
        let disk = Disk::new(before, left);
        let mut v = Vmgs::open(disk.clone(), Some(salted(&old, [0; 16])), None, ADOPT).expect("open");
        assert_eq!(v.root().image, WHO.image);
        let done = v.rekey(salted(&new, WHO.image), 0).is_ok();
        drop(v);
        let mut images = vec![disk.written()];
        images.extend((0..4).map(|_| disk.powerless(&mut rng)));
        for (n, image) in images.into_iter().enumerate() {
            let opened = [&old, &new].map(|who| {
                let file = MemFile(image.clone());
                let k = key_of(who, &file, None, Purpose::Open).expect("a key");
                let accept = Accept { rollback: true, ..ADOPT };
                Vmgs::open(file, Some(k), None, accept).and_then(|v| v.read(FileId::VTPM_STATE)).is_ok()
            });
            assert!(opened[0] != opened[1], "{left} operations, {n}: {opened:?}");
            both[usize::from(opened[1])] += 1;
        }
        if done {
            let image = disk.written();
            assert!(image[MIB + 68..MIB + 84] == WHO.image && image[MIB + 85..].iter().all(|b| *b == 0));
            break;
        }
    }
    assert!(both.iter().all(|n| *n > 10), "{both:?}");
}

/// Bytes of before, wherever a rewrite is cut short: the mark is there until nothing is left, `check` and
/// every other look name it, and the next opener ends it.
#[test]
fn a_rewrite_that_is_cut_short_is_named_and_finished_by_the_next_opener() {
    for case in cases().into_iter().filter(|c| c.name != "import") {
        let (mut marked, mut finished) = (0, 0);
        for left in 0.. {
            let dir = tempfile::tempdir().expect("tempdir");
            let mut before = used(&dir, case.key.map(key), 9000);
            (case.prepare)(&mut before);
            let disk = Disk::new(before.clone(), left);
            let anchors = folder(&dir);
            let mut v =
                Vmgs::open(disk.clone(), case.given.map(key), Some(&anchors), case.accept).expect("open");
            let done = (case.run)(&mut v).is_ok();
            drop(v);
            let image = disk.written();
            let k = if case.name == "adopt" { key(7) } else { key(8) };
            let taken = super::image::key_opens(&MemFile(image.clone()), &k).expect("layout")
                && super::layouts_test::u32_at(&image, newest(&image) * 512 + 24)
                    != super::layouts_test::u32_at(&before, newest(&before) * 512 + 24);
            if taken && !done {
                let view = View::read(&MemFile(image.clone()), Some(&k)).expect("view");
                if !view.findings.contains(&Finding::ScrubPending) {
                    // Only the flush of the last header failed.
                    super::layouts_test::assert_unused_is_zero(&image, case.name);
                    continue;
                }
                marked += 1;
                // An image that anyone can read is still the repair's.
                if let Ok(v) = Vmgs::open(MemFile(image.clone()), Some(k.clone()), Some(&anchors), NONE) {
                    let after = v.close().expect("close").0;
                    super::layouts_test::assert_unused_is_zero(&after, case.name);
                    let view = View::read(&MemFile(after), Some(&k)).expect("view");
                    assert_eq!(view.findings, [], "{} {left}", case.name);
                    finished += 1;
                }
                // The same change again is no refusal.
                if case.name != "adopt" {
                    let flags = if case.accept.zero_key { FLAG_DISCLOSED } else { 0 };
                    let mut v = Vmgs::open(MemFile(image), Some(k.clone()), None, case.accept).expect("open");
                    v.rekey(k.clone(), flags).expect("the same again");
                    super::layouts_test::assert_unused_is_zero(&v.close().expect("close").0, case.name);
                }
            }
            if done {
                break;
            }
        }
        assert!(marked > 4 && finished > 0, "{}: {marked}, {finished}", case.name);
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let mut v = Vmgs::open(MemFile(used(&dir, Some(key(7)), 100)), Some(key(7)), None, NONE).expect("open");
    assert!(matches!(v.rekey(key(7), 0), Err(VmgsError::SameKey)), "a key that nothing was interrupted for");
}

/// The image after a refusal for want of space is the image before it.
#[test]
fn without_space_nothing_is_changed() {
    for case in cases().into_iter().filter(|c| c.name != "import") {
        let dir = tempfile::tempdir().expect("tempdir");
        // More than half of the image, so that there is no room for a second copy.
        let mut before = used(&dir, case.key.map(key), 600 << 10);
        (case.prepare)(&mut before);
        let disk = Disk::new(before.clone(), usize::MAX);
        let mut v =
            Vmgs::open(disk.clone(), case.given.map(key), Some(&folder(&dir)), case.accept).expect("open");
        let full = (case.run)(&mut v);
        assert!(matches!(full, Err(VmgsError::NoSpace { .. })), "{}", case.name);
        drop(v);
        assert!(disk.written() == before, "{}: not a byte", case.name);
        let again =
            Vmgs::open(disk, case.given.map(key), Some(&folder(&dir)), case.accept).expect("as before");
        assert_eq!(again.read(FileId::VTPM_STATE).expect("read").as_slice(), b"the TPM");
    }
}

/// A file that takes another's place: at each moment the one that bears the name is accepted.
#[test]
fn a_restore_that_ends_anywhere_leaves_an_acceptable_file_in_its_place() {
    for left in 0..20 {
        let dir = tempfile::tempdir().expect("tempdir");
        let anchors = folder(&dir);
        let backup = used(&dir, Some(key(7)), 100);
        let mut v = Vmgs::open(MemFile(backup.clone()), Some(key(7)), Some(&anchors), NONE).expect("open");
        v.commit(&[Change::Put(clock(), &[1; 8])]).expect("commit");
        let target = v.close().expect("close").0;

        let copy = Disk::new(backup, left);
        let lease = anchors.lease(&WHO.image).expect("lease");
        let rollback = Accept { rollback: true, ..NONE };
        let mut v = Vmgs::open(copy.clone(), Some(key(7)), None, rollback).expect("open");
        v.lease_unplaced(lease);
        let done = v.commit(&[]).is_ok();
        drop(v);
        let opens = |image: &[u8]| {
            let record = std::fs::read(anchors.record_path(&WHO.image)).expect("record");
            let opened = Vmgs::open(MemFile(image.to_vec()), Some(key(7)), Some(&anchors), NONE).map(|_| ());
            std::fs::write(anchors.record_path(&WHO.image), record).expect("record");
            opened
        };
        opens(&target).expect("before the copy has the name");
        if done {
            opens(&copy.written()).expect("after it has the name");
            return;
        }
    }
    panic!("never done");
}

/// The sequence number of a header wraps to zero, and zero is a number like any other.
#[test]
fn a_sequence_that_wraps_is_no_new_image() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut image = used(&dir, Some(key(7)), 9000);
    let active = newest(&image);
    for (slot, sequence) in [(active, u32::MAX - 1), (1 - active, u32::MAX - 2)] {
        put32(&mut image, slot * 512 + 16, sequence);
        seal_header(&mut image, slot);
    }
    for round in 0..6u8 {
        let mut v = Vmgs::open(MemFile(image), Some(key(7)), None, NONE).expect("open");
        let id = FileId::user(20 + u32::from(round)).expect("id");
        let (before, old) = (v.list(), u32_at(&v.file.0, v.active * 512 + 24));
        v.commit(&[Change::Put(id, &[round; 9000])]).expect("commit");
        image = v.close().expect("close").0;
        assert_ne!(u32_at(&image, newest(&image) * 512 + 24), old, "the live table stays where it is");
        // The generation before is whole as well.
        let mut older = image.clone();
        older[newest(&image) * 512 + 40] ^= 1;
        let accept = Accept { rollback: true, ..NONE };
        let v = Vmgs::open(MemFile(older), Some(key(7)), None, accept).expect("the generation before");
        assert_eq!(v.list(), before);
        for (id, _, _) in before {
            v.read(id).expect("read");
        }
    }
}

/// An image that is so full that three generations have no room in it, and that anyone can read: the repair
/// that its refusal names ends, however often it was cut short before.
#[test]
fn a_repair_that_was_cut_short_is_ended_by_the_same_repair_in_an_image_that_is_nearly_half_full() {
    let (mut ended, mut cut_again) = (0, 0);
    for left in 0.. {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut before = used(&dir, Some(key(7)), 340 << 10);
        let slot = newest(&before);
        seal_with_zero_key(&mut before, slot, &[7; 32]);
        let disk = Disk::new(before, left);
        let anchors = folder(&dir);
        let mut v = Vmgs::open(disk.clone(), Some(key(7)), Some(&anchors), REPAIR).expect("open");
        let done = v.rekey(key(8), FLAG_DISCLOSED).is_ok();
        drop(v);
        if done {
            break;
        }
        let image = disk.written();
        if !super::image::key_opens(&MemFile(image.clone()), &key(8)).expect("layout") {
            continue;
        }
        for again in [1, 2, 3, 5, usize::MAX] {
            let disk = Disk::new(image.clone(), again);
            let Ok(mut v) = Vmgs::open(disk.clone(), Some(key(8)), Some(&anchors), REPAIR) else { continue };
            cut_again += usize::from(v.rekey(key(8), FLAG_DISCLOSED).is_err());
            drop(v);
            let image = disk.written();
            let mut v = Vmgs::open(MemFile(image), Some(key(8)), Some(&anchors), REPAIR).expect("open");
            match v.rekey(key(8), FLAG_DISCLOSED) {
                // All was done and nobody had said so.
                Err(VmgsError::SameKey) => assert_eq!(v.findings(), [], "{left}, {again}"),
                result => _ = result.unwrap_or_else(|e| panic!("{left}, {again}: {e}; {:?}", v.findings())),
            }
            let image = v.close().expect("close").0;
            super::layouts_test::assert_unused_is_zero(&image, "repaired again");
            ended += 1;
        }
    }
    assert!(ended > 10 && cut_again > 4, "{ended}, {cut_again}");
}
