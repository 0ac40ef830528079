// SPDX-License-Identifier: Apache-2.0
//! Power loss, simulated: every commit's writes are recorded, then replayed in part and in any order.
//!
//! The disk's promise is weak: what was written before a flush is there after it; what was written since the
//! last flush is there in whole 512-byte sectors, any subset of them, in any order. At every point of a
//! recorded run the image must open, at the acknowledged state or at the one that was being written.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use super::block::BlockFile;
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

#[derive(Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Sync,
    /// The store has told its caller that this counter value is durable.
    Acknowledged(u64),
}

#[derive(Clone)]
struct Recorder {
    disk: MemFile,
    trace: Arc<Mutex<Vec<Op>>>,
}

impl BlockFile for Recorder {
    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(buffer, offset)
    }
    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        self.trace.lock().expect("trace").push(Op::Write(offset, data.to_vec()));
        self.disk.write_at(data, offset)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.trace.lock().expect("trace").push(Op::Sync);
        Ok(())
    }
}

fn key(fill: u8) -> Key {
    Key::from_bytes(&[fill; 32]).expect("key")
}

/// Counter value that the image holds, if it opens.
fn counter(image: &[u8], keys: &[u8]) -> Result<u64, VmgsError> {
    let mut last = Err(VmgsError::WrongKey);
    for k in keys {
        // A torn header is a damaged slot: what an anchor would accept as "confirmed or pending" is accepted
        // here.
        let accept = Accept { rollback: true, ..Accept::default() };
        last = Vmgs::open(MemFile(image.to_vec()), Some(key(*k)), None, accept);
        if !matches!(last, Err(VmgsError::WrongKey)) {
            break;
        }
    }
    let v = last?;
    let data = v.read(FileId::VTPM_STATE)?;
    assert_eq!(
        v.read(FileId::BIOS_NVRAM)?.len() as u64,
        100 + 5000 * (u64::from(data[0]) % 3),
        "one generation"
    );
    Ok(u64::from_le_bytes(data[..8].try_into().expect("eight bytes")))
}

fn put(v: &mut Vmgs<Recorder>, n: u64) {
    let vars = vec![n as u8; 100 + 5000 * (n as usize % 3)];
    let mut state = n.to_le_bytes().to_vec();
    state.resize(1300, n as u8);
    v.commit(&[Change::Put(FileId::VTPM_STATE, &state), Change::Put(FileId::BIOS_NVRAM, &vars)])
        .expect("commit");
}

/// Small deterministic generator, so that a failure can be repeated.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Tries subsets of the sectors that are in flight; all of them when they are few, a sample otherwise.
fn check_point(
    durable: &[u8],
    in_flight: &[(u64, Vec<u8>)],
    allowed: (u64, u64),
    keys: &[u8],
    rng: &mut Rng,
) -> u64 {
    let sectors: Vec<(usize, &[u8])> = in_flight
        .iter()
        .flat_map(|(at, data)| data.chunks(512).enumerate().map(move |(n, s)| (*at as usize + n * 512, s)))
        .collect();
    let all = sectors.len() < 5;
    let rounds = if all { 1u64 << sectors.len() } else { 40 };
    for round in 0..rounds {
        let mut image = durable.to_vec();
        for (n, (at, data)) in sectors.iter().enumerate() {
            let kept = if all { round >> n & 1 == 1 } else { !rng.next().is_multiple_of(3) };
            if kept {
                image[*at..*at + data.len()].copy_from_slice(data);
            }
        }
        let found = counter(&image, keys).expect("the image opens after any power loss");
        assert!(
            found == allowed.0 || found == allowed.1,
            "{found} after {allowed:?} was acknowledged / under way"
        );
    }
    rounds
}

/// Replays a trace and cuts the power before and after every operation.
fn replay(start: Vec<u8>, trace: &[Op], first: u64, keys: &[u8]) -> u64 {
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let (mut durable, mut in_flight, mut acknowledged) = (start, Vec::<(u64, Vec<u8>)>::new(), first);
    let mut tried = 0;
    for op in trace {
        match op {
            Op::Write(at, data) => in_flight.push((*at, data.clone())),
            Op::Sync => {
                for (at, data) in in_flight.drain(..) {
                    durable[at as usize..at as usize + data.len()].copy_from_slice(&data);
                }
            }
            Op::Acknowledged(n) => acknowledged = *n,
        }
        tried += check_point(&durable, &in_flight, (acknowledged, acknowledged + 1), keys, &mut rng);
        if in_flight.is_empty() && matches!(op, Op::Acknowledged(_)) {
            assert_eq!(
                counter(&durable, keys).expect("open"),
                acknowledged,
                "an acknowledged write is there"
            );
        }
    }
    tried
}

fn recorded() -> (Vmgs<Recorder>, Arc<Mutex<Vec<Op>>>, Vec<u8>) {
    let trace = Arc::new(Mutex::new(Vec::new()));
    let disk = MemFile(vec![0; MIB + 512]);
    let mut v =
        Vmgs::create(Recorder { disk, trace: trace.clone() }, Some(key(7)), WHO, None).expect("create");
    put(&mut v, 0);
    put(&mut v, 1);
    let mut image = vec![0; MIB + 512];
    for op in trace.lock().expect("trace").drain(..) {
        if let Op::Write(at, data) = op {
            image[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
    }
    (v, trace, image)
}

#[test]
fn every_power_loss_leaves_the_acknowledged_state_or_the_next() {
    let (mut v, trace, start) = recorded();
    for n in 2..26 {
        put(&mut v, n);
        trace.lock().expect("trace").push(Op::Acknowledged(n));
    }
    let trace = trace.lock().expect("trace");
    let tried = replay(start, &trace, 1, &[7]);
    assert!(tried > 1000, "only {tried} images were tried");
}

/// A medium that loses the newest header's sector later on still has the generation before it, at any moment.
#[test]
fn the_generation_before_stays_whole_while_its_header_lives() {
    let (mut v, trace, mut image) = recorded();
    for n in 2..10 {
        put(&mut v, n);
        trace.lock().expect("trace").push(Op::Acknowledged(n));
    }
    let (mut tried, mut acknowledged) = (0, 1);
    for op in trace.lock().expect("trace").iter() {
        let (at, data) = match op {
            Op::Write(at, data) => (*at as usize, data.as_slice()),
            Op::Sync => continue,
            Op::Acknowledged(n) => {
                acknowledged = *n;
                (0, &[][..])
            }
        };
        // Sector by sector, as a disk that is cut off would have it; at least once where nothing is written.
        for n in 0..data.len().div_ceil(512).max(1) {
            let sector = &data[data.len().min(n * 512)..data.len().min((n + 1) * 512)];
            image[at + n * 512..][..sector.len()].copy_from_slice(sector);
            let sequence =
                |slot: usize| u32::from_le_bytes(image[slot + 16..slot + 20].try_into().expect("four"));
            let newest = if sequence(0) > sequence(512) { 0 } else { 512 };
            let mut damaged = image.clone();
            damaged[newest + 40] ^= 1;
            let found = counter(&damaged, &[7]).expect("the older generation opens");
            assert!(found == acknowledged || found + 1 == acknowledged, "{found}, {acknowledged}");
            tried += 1;
        }
    }
    assert!(tried > 200, "only {tried} images were tried");
}

#[test]
fn every_power_loss_during_a_rekey_leaves_one_key_that_opens_everything() {
    let (mut v, trace, start) = recorded();
    v.rekey(key(8), 0).expect("rekey");
    trace.lock().expect("trace").push(Op::Acknowledged(1));
    put(&mut v, 2);
    trace.lock().expect("trace").push(Op::Acknowledged(2));
    replay(start, &trace.lock().expect("trace"), 1, &[8, 7]);
}

/// Killed between the two headers of a rekey, by this program or by one that has no mark for it: the new key
/// works, the old one still has a header, which every look says, and the next opener ends it, contents of
/// before included.
#[test]
fn an_interrupted_rekey_is_noticed_and_ended_by_the_next_opener() {
    let (mut v, trace, mut image) = recorded();
    v.rekey(key(8), 0).expect("rekey");
    let mut slot = 0;
    for op in trace.lock().expect("trace").iter() {
        let Op::Write(at, data) = op else { continue };
        image[*at as usize..*at as usize + data.len()].copy_from_slice(data);
        if *at < 1024 {
            slot = *at as usize / 512;
            break;
        }
    }
    assert_eq!(image[slot * 512 + 35], 0x80, "the mark");
    let mut unmarked = image.clone();
    unmarked[slot * 512 + 35] = 0;
    super::hostile_test::seal_header(&mut unmarked, slot);
    let accept = Accept { rollback: true, ..Accept::default() };
    let open = |image: &[u8]| Vmgs::open(MemFile(image.to_vec()), Some(key(8)), None, accept);
    for image in [image, unmarked] {
        let mut v = open(&image).expect("the new key opens it");
        assert!(v.findings().contains(&Finding::OldKeyInSlot), "{:?}", v.findings());
        v.release().expect("release");
        let opened = v.close().expect("close").0;
        super::layouts_test::assert_unused_is_zero(&opened, "opened");
        let mut v = open(&opened).expect("again");
        assert!(!v.findings().iter().any(Finding::is_cut_short), "{:?}", v.findings());
        v.commit(&[]).expect("commit");
        let written = v.close().expect("close").0;
        for newest_damaged in [0, 512] {
            let mut image = written.clone();
            image[newest_damaged + 40] ^= 1;
            assert!(counter(&image, &[7]).is_err(), "the old key opens neither header");
        }
    }
}

#[test]
fn a_commit_costs_two_flushes_and_header_writes_are_one_sector() {
    let (mut v, trace, _) = recorded();
    put(&mut v, 2);
    let trace = trace.lock().expect("trace");
    assert_eq!(trace.iter().filter(|op| matches!(op, Op::Sync)).count(), 2);
    assert!(matches!(trace.last(), Some(Op::Sync)));
    assert!(matches!(&trace[trace.len() - 2], Op::Write(at, data) if *at < 1024 && data.len() == 512));
}

/// A disk that fails from a certain operation on.
struct Failing {
    disk: MemFile,
    left: usize,
}

impl Failing {
    fn step(&mut self) -> io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| io::Error::other("disk gone"))?;
        Ok(())
    }
}

impl BlockFile for Failing {
    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(buffer, offset)
    }
    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        self.step()?;
        self.disk.write_at(data, offset)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.step()
    }
}

#[test]
fn a_failed_write_or_flush_poisons_the_store() {
    let disk = recorded().2;
    let mut failures = 0;
    for left in 0..12 {
        let file = Failing { disk: MemFile(disk.clone()), left };
        let mut v = Vmgs::open(file, Some(key(7)), None, Accept::default()).expect("open");
        if v.commit(&[Change::Put(FileId::VTPM_STATE, &[2; 1300])]).is_err() {
            failures += 1;
            let again = v.commit(&[]).map(|_| ());
            assert!(matches!(again, Err(VmgsError::Poisoned)), "after {left} operations");
        }
    }
    // A run of blocks, a flush, a header, a flush: the disk has failed at each, and only at these.
    assert_eq!(failures, 4);
}
