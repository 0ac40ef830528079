// SPDX-License-Identifier: Apache-2.0
//! Where the pieces of a commit go on disk, and how they are sealed for it.
//!
//! [`Space`] knows the blocks that no live header names. A commit asks it for one extent that holds
//! everything, so that what is flushed is one run of sectors and one write; if the free blocks are too
//! scattered, each piece goes where it fits.

use super::crypto;
use super::crypto::Draws;
use super::crypto::Key;
use super::error::VmgsError;
use super::file_id::FileId;
use super::format::AUTHENTICATED;
use super::format::BLOCK;
use super::format::ENCRYPTED;
use super::format::Entry;
use super::format::ExtendedEntry;
use super::format::ExtendedTable;
use super::format::FIRST_BLOCK;
use super::format::FileTable;
use super::format::KeySlot;
use super::spans::Spans;

/// One commit's pieces: sealed, placed, and not written yet.
pub(super) struct Placer {
    space: Space,
    draws: Draws,
    encrypted: bool,
    capacity: u32,
    /// First block and contents.
    pieces: Vec<(u32, Vec<u8>)>,
}

/// Blocks that `bytes` of a file take.
pub(super) fn blocks_of(bytes: usize) -> u32 {
    (bytes.div_ceil(BLOCK) as u32).max(1)
}

impl Placer {
    /// For a commit of about `expected` blocks that may use every block but the live ones.
    pub(super) fn new(capacity: u32, live: &Spans, encrypted: bool, expected: u32) -> Self {
        let mut space = Space::new(capacity, live);
        space.prefer(expected);
        Self { space, draws: Draws::default(), encrypted, capacity, pieces: Vec::new() }
    }

    fn take(&mut self, blocks: u32) -> Result<u32, VmgsError> {
        self.space.take(blocks).ok_or(VmgsError::NoSpace { need: blocks, capacity: self.capacity })
    }

    /// Finds a place for a file and seals it.
    pub(super) fn file(&mut self, data: &[u8]) -> Result<(Entry, ExtendedEntry), VmgsError> {
        let blocks = blocks_of(data.len());
        let block = self.take(blocks)?;
        let mut entry = Entry { block, blocks, valid: data.len() as u64, ..Entry::default() };
        let mut truth = ExtendedEntry::default();
        let bytes = if self.encrypted {
            let (key, seal, bytes) = crypto::seal_once(&mut self.draws, data)?;
            entry.seal = seal;
            entry.attributes = ENCRYPTED | AUTHENTICATED;
            truth.attributes = entry.attributes;
            truth.key.copy_from_slice(key.expose());
            bytes
        } else {
            data.to_vec()
        };
        self.pieces.push((block, bytes));
        Ok((entry, truth))
    }

    /// Places both tables; encrypts the extended one under a metadata key that is drawn here and wrapped at
    /// once.
    pub(super) fn tables(
        &mut self,
        table: &mut FileTable,
        extended: &ExtendedTable,
        key: Option<&Key>,
    ) -> Result<[KeySlot; 2], VmgsError> {
        let table_block = self.take(1)?;
        let extended_block = self.take(1)?;
        let whole = Entry { blocks: 1, valid: BLOCK as u64, ..Entry::default() };
        table.0[FileId::FILE_TABLE.index()] = Entry { block: table_block, ..whole };
        let mut keys = [KeySlot::default(); 2];
        let mut entry = Entry { block: extended_block, ..whole };
        let bytes = match key.filter(|_| self.encrypted) {
            Some(datastore) => {
                let (metadata, seal, bytes) = crypto::seal_once(&mut self.draws, &extended.to_block())?;
                entry.seal = seal;
                entry.attributes = ENCRYPTED | AUTHENTICATED;
                let (seal, wrapped) = crypto::wrap(&mut self.draws, datastore, &metadata)?;
                keys[0] = KeySlot { seal, wrapped };
                bytes
            }
            // A table of no keys in an image that needs them could never be opened by anybody.
            None if self.encrypted => return Err(VmgsError::KeyNeeded),
            None => vec![0; BLOCK],
        };
        table.0[FileId::EXTENDED.index()] = entry;
        self.pieces.push((extended_block, bytes));
        self.pieces.push((table_block, table.to_block().to_vec()));
        Ok(keys)
    }

    /// What is to be written: neighbours as one run, and every piece in whole blocks, so that what a block
    /// held before is gone from its rest too.
    pub(super) fn runs(mut self) -> Vec<(u32, Vec<u8>)> {
        self.pieces.sort_by_key(|(block, _)| *block);
        let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
        for (block, mut data) in self.pieces {
            data.resize(blocks_of(data.len()) as usize * BLOCK, 0);
            match runs.last_mut() {
                Some((start, run)) if *start + blocks_of(run.len()) == block => run.extend_from_slice(&data),
                _ => runs.push((block, data)),
            }
        }
        runs
    }
}

/// The blocks that a commit may use.
struct Space {
    /// Free extents: first block and length.
    holes: Vec<(u32, u32)>,
    /// The hole that everything goes into as long as it has room.
    preferred: Option<usize>,
}

impl Space {
    fn new(capacity: u32, live: &Spans) -> Self {
        let holes =
            live.gaps(FIRST_BLOCK, capacity).into_iter().map(|r| (r.start, r.end - r.start)).collect();
        Self { holes, preferred: None }
    }

    /// Chooses the smallest hole that fits, the first one of equals.
    fn smallest(&self, blocks: u32) -> Option<usize> {
        let fitting = self.holes.iter().enumerate().filter(|(_, (_, len))| *len >= blocks);
        fitting.min_by_key(|(_, (_, len))| *len).map(|(n, _)| n)
    }

    /// Puts what is taken from now on into one hole of at least this size, if there is one.
    fn prefer(&mut self, blocks: u32) {
        self.preferred = self.smallest(blocks);
    }

    fn take(&mut self, blocks: u32) -> Option<u32> {
        let roomy = |n: &usize| self.holes.get(*n).is_some_and(|(_, len)| *len >= blocks);
        let chosen = self.preferred.filter(roomy).or_else(|| self.smallest(blocks))?;
        let hole = self.holes.get_mut(chosen)?;
        let block = hole.0;
        hole.0 += blocks;
        hole.1 -= blocks;
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_one_run_where_there_is_room_and_scattered_where_there_is_none() {
        // Blocks 2 to 9, of which 4 is live: holes of two and of five blocks.
        let live = Spans::new(std::iter::once(4..5).collect());
        let mut space = Space::new(10, &live);
        space.prefer(3);
        assert_eq!([space.take(1), space.take(1), space.take(1)], [Some(5), Some(6), Some(7)]);
        let mut space = Space::new(10, &live);
        space.prefer(6);
        assert_eq!([space.take(2), space.take(4), space.take(2)], [Some(2), Some(5), None]);
    }

    #[test]
    fn neighbouring_pieces_are_written_together_and_padded_with_zeros() {
        let mut placer = Placer::new(8, &Spans::default(), false, 3);
        placer.file(&[1; 10]).expect("first");
        placer.file(&[2; BLOCK + 1]).expect("second");
        let runs = placer.runs();
        assert_eq!(runs.len(), 1);
        let (start, bytes) = &runs[0];
        assert_eq!((*start, bytes.len()), (2, 3 * BLOCK), "whole blocks, the last one too");
        assert_eq!(
            (&bytes[..11], bytes[BLOCK - 1], bytes[BLOCK]),
            (&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0][..], 0, 2)
        );
        assert!(bytes[2 * BLOCK + 1..].iter().all(|b| *b == 0));
    }
}
