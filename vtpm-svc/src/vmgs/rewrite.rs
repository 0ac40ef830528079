// SPDX-License-Identifier: Apache-2.0
//! Writing an image anew, so that nothing of an earlier generation is left in the file: after a change of
//! key, a repair, and when something that another tool wrote is adopted.
//!
//! One commit writes every file, both tables and the root under new keys, its flags included, so that there
//! is no moment at which the image is neither as before nor as after. A second header for the same generation
//! takes the older one's place. Then every byte that this generation does not use is overwritten, and all of
//! it is read back. The headers carry a mark from the commit until all that is done, so whoever opens an
//! image whose rewrite was cut short finishes it. So it does where another writer left the old key in the
//! older header and no mark. An image that is to be written anew once more, as one that anyone can read, is
//! finished first.
//!
//! A passphrase is salted with the container's id, and a change of key may give the container another one.
//! The id of before stands in the footer from before the commit until the mark is gone, so that at each
//! moment the old passphrase or the new one opens the image.

use std::ops::Range;

use zeroize::Zeroizing;

use super::block::BlockFile;
use super::crypto;
use super::crypto::Key;
use super::error::VmgsError;
use super::file_id::FileId;
use super::findings::Finding;
use super::format::BLOCK;
use super::format::FIRST_BLOCK;
use super::format::Header;
use super::format::MAX_SIZE;
use super::format::SCRUB_PENDING;
use super::format::SECTOR;
use super::image;
use super::image::Layout;
use super::image::block_offset;
use super::mark::Mark;
use super::spans::Spans;
use super::store::Change;
use super::store::Generation;
use super::store::Vmgs;
use super::vhd;

/// Bytes that are looked at in one go.
const PIECE: usize = 64 << 10;

impl<F: BlockFile> Vmgs<F> {
    /// Replaces the datastore key, and with it every key in the image; flags of the root change in the same
    /// commit.
    ///
    /// Both header slots then carry only the new key, everything that this generation does not use is
    /// overwritten, and the old key has been tried on what is left and has failed. The caller must have
    /// stored the new key safely *before*.
    pub fn rekey(&mut self, new: Key, flags: u32) -> Result<Mark, VmgsError> {
        let changes = [Change::Flag(flags)];
        if self.key.as_ref() == Some(&new) {
            // The change to this key was cut short, and is repeated as the refusal or the warning says.
            if !self.findings().iter().any(Finding::is_cut_short) {
                return Err(VmgsError::SameKey);
            }
            return self.rewrite(&changes, None);
        }
        self.rewrite(&changes, Some(new))
    }

    /// Writes everything anew.
    pub(super) fn rewrite(
        &mut self,
        changes: &[Change<'_>],
        new_key: Option<Key>,
    ) -> Result<Mark, VmgsError> {
        if self.payload > MAX_SIZE {
            return Err(VmgsError::TooLargeToRewrite(self.payload));
        }
        // Of a rewrite that was cut short the generation before is of no use, and there may be no room for a
        // third one. Only where the root is lost it may still say whose image this is.
        if self.cut_short && self.is_rooted() {
            self.finish_rewrite()?;
        }
        let old_key = self.key.clone().filter(|_| new_key.is_some());
        let old_header = self.header.clone();
        if new_key.is_some() && self.container != self.root.image {
            // A passphrase for the new key is salted with the image's own id.
            self.write_footer(vhd::build_over(self.payload, self.root.image, self.container))?;
            self.container = self.root.image;
        }
        let mark = self.write_generation(Generation { changes, new_key, all: true })?;
        self.finish_rewrite()?;
        if let Some(old) = old_key {
            self.prove_dead(&old, &old_header)?;
        }
        self.mark_whole()?;
        self.settled();
        Ok(mark)
    }

    /// What follows the commit of a rewrite: nothing of an earlier generation stays.
    pub(super) fn finish_rewrite(&mut self) -> Result<(), VmgsError> {
        // The second header names the same tables, so that the slot with the old wrap disappears.
        let mut next = self.next_header(self.header.table_block, self.header.keys, self.header.encrypted);
        // Another writer has no mark, and nothing but the slot that goes now tells of what it left.
        next.markers |= SCRUB_PENDING;
        self.write_header(next)?;
        self.other = Spans::named(&self.header, &self.table);
        self.scrub()
    }

    /// Ends a rewrite: the old passphrase's salt goes, then the mark.
    pub(super) fn mark_whole(&mut self) -> Result<(), VmgsError> {
        if image::salts(&self.file)?.len() > 1 {
            self.write_footer(vhd::build(self.payload, self.container))?;
        }
        let mut next = self.next_header(self.header.table_block, self.header.keys, self.header.encrypted);
        next.markers &= !SCRUB_PENDING;
        self.write_header(next)?;
        self.cut_short = false;
        Ok(())
    }

    fn write_footer(&mut self, footer: [u8; vhd::FOOTER]) -> Result<(), VmgsError> {
        let len = self.file.len().map_err(VmgsError::io("asking for the image's length"))?;
        self.guard(|f| f.write_at(&footer, len - vhd::FOOTER as u64), "writing the footer")?;
        self.guard(BlockFile::sync, "flushing the footer")
    }

    /// Every byte of the file that this generation does not use, the rests of its blocks included.
    fn unused(&self) -> Result<Vec<Range<u64>>, VmgsError> {
        let block = BLOCK as u64;
        let len = self.file.len().map_err(VmgsError::io("asking for the image's length"))?;
        let live = Spans::named(&self.header, &self.table);
        let gaps = live.gaps(FIRST_BLOCK, self.capacity).into_iter();
        let mut out: Vec<_> =
            gaps.map(|gap| u64::from(gap.start) * block..u64::from(gap.end) * block).collect();
        out.push(2 * SECTOR as u64..block_offset(FIRST_BLOCK));
        for entry in self.table.0.iter().filter(|e| e.exists()) {
            out.push(block_offset(entry.block) + entry.valid..entry.range().end * block);
        }
        out.push(block_offset(self.capacity)..len - vhd::FOOTER as u64);
        out.retain(|range| range.start < range.end);
        Ok(out)
    }

    /// Overwrites what is not used, and reads it back.
    fn scrub(&mut self) -> Result<(), VmgsError> {
        let unused = self.unused()?;
        for range in &unused {
            for (at, len) in self.dirty(range)? {
                self.guard(|f| f.write_at(&vec![0; len], at), "overwriting old blocks")?;
            }
        }
        self.guard(BlockFile::sync, "flushing the overwritten blocks")?;
        for range in &unused {
            if let Some((at, _)) = self.dirty(range)?.first() {
                return Err(VmgsError::OldBytesLeft(at / BLOCK as u64));
            }
        }
        Ok(())
    }

    /// Pieces of a range that hold something.
    fn dirty(&self, range: &Range<u64>) -> Result<Vec<(u64, usize)>, VmgsError> {
        let mut out = Vec::new();
        let mut buffer = vec![0; PIECE];
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(PIECE).min(PIECE);
            let piece = &mut buffer[..len];
            self.file.read_at(piece, at).map_err(VmgsError::io("reading old blocks"))?;
            if piece.iter().any(|b| *b != 0) {
                out.push((at, len));
            }
            at += len as u64;
        }
        Ok(out)
    }

    /// Tries the old key on everything that is on disk.
    fn prove_dead(&self, old: &Key, old_header: &Header) -> Result<(), VmgsError> {
        let layout = Layout::read(&self.file)?;
        for header in layout.headers.slots.iter().flatten() {
            for slot in &header.keys {
                if crypto::open(old.expose(), &slot.seal, &slot.wrapped).is_some() {
                    return Err(VmgsError::OldKeyStillOpens("a header"));
                }
            }
        }
        // The metadata key that the old header wraps must not open the current table either.
        let entry = layout.table.entry(FileId::EXTENDED);
        let block = image::read_block(&self.file, entry.block)?;
        for slot in old_header.keys.iter().filter(|slot| !slot.is_empty()) {
            let Some(metadata) = crypto::open(old.expose(), &slot.seal, &slot.wrapped) else { continue };
            let mut metadata_key = Zeroizing::new([0; 32]);
            metadata_key.copy_from_slice(&metadata);
            if crypto::open(&metadata_key, &entry.seal, &block).is_some() {
                return Err(VmgsError::OldKeyStillOpens("the extended file table"));
            }
        }
        Ok(())
    }
}
