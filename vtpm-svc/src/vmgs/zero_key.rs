// SPDX-License-Identifier: Apache-2.0
//! The defect of writers that sealed the extended table under an all-zero key: whoever finds such a table
//! anywhere in the file reads the keys of the image's files in it, with no key at all.
//!
//! One correct write later the active table is sound, but the older header's table, or a block that nobody
//! names any more, still holds those keys, and files that were not written since still lie under them. So all
//! three places are tried.

use super::block::BlockFile;
use super::crypto;
use super::error::VmgsError;
use super::file_id::FileId;
use super::findings::ZeroKey;
use super::format::BLOCK;
use super::format::FIRST_BLOCK;
use super::format::FileTable;
use super::format::MAX_SIZE;
use super::image::Layout;
use super::image::block_offset;
use super::image::read_block;
use super::spans::Spans;

/// Finds the first table that anyone can open.
pub fn find<F: BlockFile>(file: &F, layout: &Layout) -> Result<Option<ZeroKey>, VmgsError> {
    if opens(file, &layout.table)? && layout.header.encrypted {
        return Ok(Some(ZeroKey::Active));
    }
    if let Some((header, table)) = &layout.other
        && header.encrypted
        && opens(file, table)?
    {
        return Ok(Some(ZeroKey::Older));
    }
    let looks_sealed = layout.header.encrypted || layout.other.as_ref().is_some_and(|(h, _)| h.encrypted);
    if !looks_sealed {
        return Ok(None);
    }
    // The writers with the defect had a zero nonce too, so the key stream is always the same one.
    let stream = crypto::zero_key_stream(BLOCK)?;
    let live = Spans::named(&layout.header, &layout.table).union(&layout.other_spans());
    let end = layout.capacity.min((MAX_SIZE / BLOCK as u64) as u32);
    let mut buffer = vec![0; 64 * BLOCK];
    for gap in live.gaps(FIRST_BLOCK, end) {
        for start in gap.clone().step_by(64) {
            let blocks = (gap.end - start).min(64) as usize;
            let chunk = &mut buffer[..blocks * BLOCK];
            file.read_at(chunk, block_offset(start)).map_err(VmgsError::io("reading unused blocks"))?;
            if let Some(n) = chunk.chunks_exact(BLOCK).position(|b| is_table(b, &stream)) {
                return Ok(Some(ZeroKey::Freed(start + n as u32)));
            }
        }
    }
    Ok(None)
}

fn opens<F: BlockFile>(file: &F, table: &FileTable) -> Result<bool, VmgsError> {
    let entry = table.entry(FileId::EXTENDED);
    if !entry.exists() {
        return Ok(false);
    }
    let block = read_block(file, entry.block)?;
    Ok(crypto::open(&[0; 32], &entry.seal, &block).is_some())
}

/// Whether a block is an extended table under this key stream. There is no tag to try, but the table has 28
/// zero bytes in each of its 64 entries and small attributes; a block of anything else does not look like
/// that by accident.
fn is_table(block: &[u8], stream: &[u8]) -> bool {
    let mut used = false;
    for (raw, key) in block.chunks_exact(64).zip(stream.chunks_exact(64)) {
        let attributes = (0..4).rev().fold(0u32, |v, n| v << 8 | u32::from(raw[n] ^ key[n]));
        if attributes > 3 || raw[36..].iter().zip(&key[36..]).any(|(a, b)| a != b) {
            return false;
        }
        used |= attributes != 0;
    }
    used
}
