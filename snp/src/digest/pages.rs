// SPDX-License-Identifier: Apache-2.0
//! The parallel half of the digest: the hash of every measured page, delivered in launch order.
//!
//! Pages are hashed in batches by as many threads as there are cores, while the caller chains the results.
//! What is kept at any time is one hash (48 bytes) per page that is ahead of the chain, never the pages: with
//! a mapped file as the record's contents, an image of any size is measured in little memory.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

use sha2::Digest as _;
use sha2::Sha384;

use super::lanes;
use super::lanes::LANES;
use crate::plan::PAGE_SIZE;
use crate::plan::Record;

/// Pages per batch: large enough that handing one over costs nothing beside hashing it (half a millisecond).
const BATCH_PAGES: u64 = 256;

/// Some consecutive pages of one record.
struct Batch<'a> {
    record: &'a Record,
    first: u64,
    count: u64,
}

impl Batch<'_> {
    fn hash(&self) -> Vec<[u8; 48]> {
        let mut digests = Vec::with_capacity(self.count as usize);
        let start = usize::try_from(self.first * PAGE_SIZE).unwrap_or(usize::MAX);
        let bytes = self.record.contents.as_slice().get(start..).unwrap_or_default();
        let whole = &bytes.as_chunks::<{ PAGE_SIZE as usize }>().0;
        let whole = &whole[..whole.len().min(self.count as usize)];
        let (groups, rest) = whole.as_chunks::<LANES>();
        for group in groups {
            match lanes::hash_eight(&group.each_ref()) {
                Some(eight) => digests.extend(eight),
                None => digests.extend(group.iter().map(one)),
            }
        }
        digests.extend(rest.iter().map(one));
        let mut page = [0; PAGE_SIZE as usize];
        let mut zeros = None;
        while (digests.len() as u64) < self.count {
            let offset = (self.first + digests.len() as u64) * PAGE_SIZE;
            let beyond = offset >= self.record.contents.as_slice().len() as u64;
            digests.push(match zeros {
                Some(digest) if beyond => digest,
                _ => {
                    self.record.read_page(offset, &mut page);
                    let digest = one(&page);
                    if beyond {
                        zeros = Some(digest);
                    }
                    digest
                }
            });
        }
        digests
    }
}

fn one(page: &lanes::Page) -> [u8; 48] {
    Sha384::digest(page).into()
}

/// Calls `chain` for every page of every record in launch order, with the hash of its contents or zeros.
///
/// The records must consist of whole pages.
pub(super) fn for_each_page(records: &[Record], mut chain: impl FnMut(usize, &Record, u64, &[u8; 48])) {
    let batches: Vec<Batch> = records
        .iter()
        .filter(|record| record.page_type.contents_measured())
        .flat_map(|record| {
            let pages = record.len / PAGE_SIZE;
            (0..pages).step_by(BATCH_PAGES as usize).map(move |first| Batch {
                record,
                first,
                count: BATCH_PAGES.min(pages - first),
            })
        })
        .collect();
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut source = |next: &mut dyn FnMut(usize) -> Vec<[u8; 48]>| {
        let mut taken = 0;
        for (index, record) in records.iter().enumerate() {
            let pages = record.len / PAGE_SIZE;
            let mut page = 0;
            while page < pages {
                if record.page_type.contents_measured() {
                    for digest in next(taken) {
                        chain(index, record, record.gpa + page * PAGE_SIZE, &digest);
                        page += 1;
                    }
                    taken += 1;
                } else {
                    chain(index, record, record.gpa + page * PAGE_SIZE, &[0; 48]);
                    page += 1;
                }
            }
        }
    };
    if cores == 1 || batches.len() < 2 {
        return source(&mut |i| batches[i].hash());
    }
    let next_batch = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let (batches, next_batch) = (&batches, &next_batch);
        for _ in 0..cores.min(batches.len()) {
            let sender = sender.clone();
            scope.spawn(move || {
                loop {
                    let i = next_batch.fetch_add(1, Ordering::Relaxed);
                    let Some(batch) = batches.get(i) else { break };
                    if sender.send((i, batch.hash())).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        source(&mut |wanted| {
            loop {
                if let Some(digests) = early.remove(&wanted) {
                    return digests;
                }
                match receiver.recv() {
                    Ok((i, digests)) => early.insert(i, digests),
                    // Every worker is gone: only if one of them could not run. Its batch is hashed here.
                    Err(_) => return batches[wanted].hash(),
                };
            }
        });
    });
}
