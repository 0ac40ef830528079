// SPDX-License-Identifier: Apache-2.0
//! The bytes of guest-state format version 3: header, file table, extended file table. Pure functions, no
//! I/O.
//!
//! Everything parsed here comes from a file that an attacker may have written. Integers are little-endian; a
//! block is 4096 bytes; the payload holds two header slots, then tables and files in whole blocks. The file
//! table is neither encrypted nor authenticated, so [`FileTable::check`] bounds every number in it before
//! anything else looks at it.

use zeroize::Zeroize;
use zeroize::ZeroizeOnDrop;

use crate::bytes::array;

use super::error::VmgsError;
use super::file_id::FileId;
use super::seal::Seal;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Bytes of a header; the rest of its sector is zero.
pub const HEADER: usize = 168;
/// Distance of the second header slot: the sector size of a VHD.
pub const SECTOR: usize = 512;
/// First block that a table or a file may use.
pub const FIRST_BLOCK: u32 = 2;
/// Entries of both tables.
pub const ENTRIES: usize = 64;
/// Smallest payload of an image that is made here.
pub const MIN_SIZE: u64 = 1 << 20;
/// Largest payload of an image that is made here.
pub const MAX_SIZE: u64 = 64 << 20;
/// No file is loaded or written beyond this size, whatever a table says.
pub const MAX_FILE: u64 = 64 << 20;
/// All files of an image together have no more bytes than this, which is as much as the largest image that is
/// made here has room for: what nobody vouches for yet must not cost more than that to read.
pub const MAX_TOTAL: u64 = 64 << 20;
/// Marker bit of ours in a header: the image was written anew and not everything of before is overwritten
/// yet. Other tools leave it alone or drop it; whoever sets it makes an opener overwrite what nothing names.
pub const SCRUB_PENDING: u16 = 1 << 15;
/// Attribute bit: the file is encrypted.
pub const ENCRYPTED: u32 = 1;
/// Attribute bit: the file is authenticated; this format always sets it along with [`ENCRYPTED`].
pub const AUTHENTICATED: u32 = 2;
const VERSION: u32 = 0x0003_0000;
const SIGNATURE: &[u8; 8] = b"GUESTRTS";

fn le32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(b, at))
}

fn le64(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(b, at))
}

/// One wrapped copy of the metadata key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeySlot {
    /// Nonce and tag of the wrap.
    pub seal: Seal,
    /// The metadata key, encrypted under a datastore key.
    pub wrapped: [u8; 32],
}

impl KeySlot {
    /// A slot whose wrapped key is zero holds nothing.
    pub fn is_empty(&self) -> bool {
        self.wrapped == [0; 32]
    }
}

/// A valid header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Generation of the header, wrapping.
    pub sequence: u32,
    /// Block of the file table.
    pub table_block: u32,
    /// Whether files may be encrypted (algorithm 1) or not (0).
    pub encrypted: bool,
    /// Marker bits; bit 0 says that the image was reformatted on request, [`SCRUB_PENDING`] is ours.
    pub markers: u16,
    /// The metadata key, wrapped under up to two datastore keys.
    pub keys: [KeySlot; 2],
}

/// What is wrong with the bytes of a header slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum HeaderFault {
    /// The slot is all zero.
    #[error("is empty")]
    Zero,
    /// Offset 0 does not hold the signature.
    #[error("has no signature at offset 0")]
    Signature,
    /// Offset 8: not version 3.0.
    #[error("has version {0:#010x} at offset 8, expected 0x00030000")]
    Version(u32),
    /// Offset 12: checksum.
    #[error(
        "has checksum {found:#010x} at offset 12, computed {computed:#010x} (its sequence field says {sequence})"
    )]
    Crc { found: u32, computed: u32, sequence: u32 },
    /// Offset 20: header size.
    #[error("has size {0} at offset 20, expected 168")]
    Size(u32),
    /// Offset 24: block of the file table.
    #[error("has its file table in block {0} (offset 24), expected 2 or later")]
    TableBlock(u32),
    /// Offset 28: size of the file table.
    #[error("has a file table of {0} blocks (offset 28), expected 1")]
    TableSize(u32),
    /// Offset 32: algorithm.
    #[error("has encryption algorithm {0} (offset 32), expected 0 or 1")]
    Algorithm(u16),
}

fn header_crc(bytes: &[u8; HEADER]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..12]);
    crc.update(&[0; 4]);
    crc.update(&bytes[16..]);
    crc.finalize()
}

impl Header {
    /// Parses one slot.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, HeaderFault> {
        if bytes.iter().all(|b| *b == 0) {
            return Err(HeaderFault::Zero);
        }
        if &bytes[..8] != SIGNATURE {
            return Err(HeaderFault::Signature);
        }
        if le32(bytes, 8) != VERSION {
            return Err(HeaderFault::Version(le32(bytes, 8)));
        }
        let (found, computed, sequence) = (le32(bytes, 12), header_crc(bytes), le32(bytes, 16));
        if found != computed {
            return Err(HeaderFault::Crc { found, computed, sequence });
        }
        if le32(bytes, 20) != HEADER as u32 {
            return Err(HeaderFault::Size(le32(bytes, 20)));
        }
        let table_block = le32(bytes, 24);
        if table_block < FIRST_BLOCK {
            return Err(HeaderFault::TableBlock(table_block));
        }
        if le32(bytes, 28) != 1 {
            return Err(HeaderFault::TableSize(le32(bytes, 28)));
        }
        let algorithm = u16::from_le_bytes(array(bytes, 32));
        if algorithm > 1 {
            return Err(HeaderFault::Algorithm(algorithm));
        }
        let slot = |at: usize| KeySlot {
            seal: Seal { nonce: array(bytes, at), tag: array(bytes, at + 16) },
            wrapped: array(bytes, at + 32),
        };
        Ok(Self {
            sequence,
            table_block,
            encrypted: algorithm == 1,
            markers: u16::from_le_bytes(array(bytes, 34)),
            keys: [slot(36), slot(100)],
        })
    }

    /// The header as one sector.
    pub fn to_sector(&self) -> [u8; SECTOR] {
        let mut h = [0u8; HEADER];
        h[..8].copy_from_slice(SIGNATURE);
        h[8..12].copy_from_slice(&VERSION.to_le_bytes());
        h[16..20].copy_from_slice(&self.sequence.to_le_bytes());
        h[20..24].copy_from_slice(&(HEADER as u32).to_le_bytes());
        h[24..28].copy_from_slice(&self.table_block.to_le_bytes());
        h[28..32].copy_from_slice(&1u32.to_le_bytes());
        h[32..34].copy_from_slice(&u16::from(self.encrypted).to_le_bytes());
        h[34..36].copy_from_slice(&self.markers.to_le_bytes());
        for (slot, at) in self.keys.iter().zip([36, 100]) {
            h[at..at + 12].copy_from_slice(&slot.seal.nonce);
            h[at + 16..at + 32].copy_from_slice(&slot.seal.tag);
            h[at + 32..at + 64].copy_from_slice(&slot.wrapped);
        }
        let crc = header_crc(&h);
        h[12..16].copy_from_slice(&crc.to_le_bytes());
        let mut sector = [0; SECTOR];
        sector[..HEADER].copy_from_slice(&h);
        sector
    }
}

/// The two slots and which of them is active.
#[derive(Debug, Clone)]
pub struct Headers {
    /// Parse result of each slot.
    pub slots: [Result<Header, HeaderFault>; 2],
    /// Index of the active slot.
    pub active: usize,
}

impl Headers {
    /// Picks the active header.
    pub fn choose(slots: [Result<Header, HeaderFault>; 2]) -> Result<Self, VmgsError> {
        let active = match &slots {
            [Ok(a), Ok(b)] if a.sequence == b.sequence.wrapping_add(1) => 0,
            [Ok(a), Ok(b)] if b.sequence == a.sequence.wrapping_add(1) => 1,
            [Ok(a), Ok(b)] => return Err(VmgsError::SequenceGap { a: a.sequence, b: b.sequence }),
            [Ok(_), Err(_)] => 0,
            [Err(_), Ok(_)] => 1,
            [Err(HeaderFault::Zero), Err(HeaderFault::Zero)] => return Err(VmgsError::Empty),
            [Err(HeaderFault::Version(v)), Err(HeaderFault::Version(_) | HeaderFault::Zero)]
            | [Err(HeaderFault::Zero), Err(HeaderFault::Version(v))] => {
                return Err(VmgsError::UnsupportedVersion(*v));
            }
            [Err(a), Err(b)] => {
                return Err(VmgsError::NoValidHeader { slot0: a.to_string(), slot1: b.to_string() });
            }
        };
        Ok(Self { slots, active })
    }

    /// The other slot is damaged in a way that leaves open which of the two was newer.
    ///
    /// A torn header write looks like this, and so does an attacker who wants the older generation back; only
    /// the anchor can tell them apart. Nothing in a damaged slot is believed, its sequence number neither.
    /// Only a slot that is empty beside a first header is harmless.
    pub fn may_be_older(&self) -> bool {
        let Ok(active) = &self.slots[self.active] else { return true };
        match &self.slots[1 - self.active] {
            Ok(_) => false,
            Err(HeaderFault::Zero) => active.sequence != 1,
            Err(_) => true,
        }
    }
}

/// Where a file lies and how it is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// First block.
    pub block: u32,
    /// Blocks allocated; zero means that the file does not exist.
    pub blocks: u32,
    /// Bytes of the file (of its ciphertext, which is as long as its plain text).
    pub valid: u64,
    /// Nonce and tag if it is encrypted.
    pub seal: Seal,
    /// A copy of the attributes that nobody vouches for.
    pub attributes: u32,
}

impl Entry {
    /// Whether the file exists.
    pub fn exists(&self) -> bool {
        self.blocks != 0
    }

    /// The blocks, as a range.
    pub fn range(&self) -> std::ops::Range<u64> {
        u64::from(self.block)..u64::from(self.block) + u64::from(self.blocks)
    }
}

/// The file table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileTable(pub [Entry; ENTRIES]);

impl FileTable {
    /// Reads a block; every bit pattern is a table, [`Self::check`] says whether it is a sane one.
    pub fn parse(block: &[u8; BLOCK]) -> Self {
        let mut table = Self([Entry::default(); ENTRIES]);
        for (entry, raw) in table.0.iter_mut().zip(block.chunks_exact(64)) {
            *entry = Entry {
                block: le32(raw, 0),
                blocks: le32(raw, 4),
                valid: le64(raw, 8),
                seal: Seal { nonce: array(raw, 16), tag: array(raw, 28) },
                attributes: le32(raw, 44),
            };
        }
        table
    }

    /// The table as a block.
    pub fn to_block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        for (entry, raw) in self.0.iter().zip(block.chunks_exact_mut(64)) {
            raw[0..4].copy_from_slice(&entry.block.to_le_bytes());
            raw[4..8].copy_from_slice(&entry.blocks.to_le_bytes());
            raw[8..16].copy_from_slice(&entry.valid.to_le_bytes());
            raw[16..28].copy_from_slice(&entry.seal.nonce);
            raw[28..44].copy_from_slice(&entry.seal.tag);
            raw[44..48].copy_from_slice(&entry.attributes.to_le_bytes());
        }
        block
    }

    /// The entry of a file.
    pub fn entry(&self, id: FileId) -> &Entry {
        &self.0[id.index()]
    }

    /// The files that exist, the two tables left out.
    pub fn files(&self) -> impl Iterator<Item = (FileId, &Entry)> {
        FileId::files().map(|id| (id, self.entry(id))).filter(|(_, e)| e.exists())
    }

    /// Bounds every entry: inside of the payload, no overlap, sizes that fit, entry 0 equal to the header's
    /// word.
    pub fn check(&self, header: &Header, capacity: u32) -> Result<(), VmgsError> {
        let own = self.entry(FileId::FILE_TABLE);
        if own.block != header.table_block || own.blocks != 1 {
            return Err(VmgsError::BadTable(
                FileId::FILE_TABLE,
                format!(
                    "entry 0 says block {} length {}, the header says block {} length 1",
                    own.block, own.blocks, header.table_block
                ),
            ));
        }
        let mut spans: Vec<(std::ops::Range<u64>, FileId)> = Vec::with_capacity(ENTRIES);
        let mut total = 0u64;
        for (id, entry) in FileId::all().zip(&self.0) {
            if !entry.exists() {
                continue;
            }
            let range = entry.range();
            if range.start < u64::from(FIRST_BLOCK) || range.end > u64::from(capacity) {
                return Err(VmgsError::OutOfRange(
                    id,
                    format!("blocks {}..{} are not within 2..{capacity}", range.start, range.end),
                ));
            }
            if entry.valid > u64::from(entry.blocks) * BLOCK as u64 {
                return Err(VmgsError::OutOfRange(
                    id,
                    format!("{} bytes do not fit into {} blocks", entry.valid, entry.blocks),
                ));
            }
            let claimed = u64::from(entry.blocks) * BLOCK as u64;
            if claimed > MAX_FILE {
                return Err(VmgsError::TooLarge(id, claimed));
            }
            total += entry.valid;
            spans.push((range, id));
        }
        if total > MAX_TOTAL {
            return Err(VmgsError::TooMuch(total));
        }
        let extended = self.entry(FileId::EXTENDED);
        if extended.exists() && (extended.blocks != 1 || extended.valid != BLOCK as u64) {
            return Err(VmgsError::BadTable(
                FileId::EXTENDED,
                format!(
                    "{} bytes in {} blocks, expected exactly one full block",
                    extended.valid, extended.blocks
                ),
            ));
        }
        spans.sort_by_key(|(range, id)| (range.start, *id));
        for pair in spans.windows(2) {
            if pair[1].0.start < pair[0].0.end {
                return Err(VmgsError::Overlap(pair[0].1, pair[1].1, pair[1].0.start as u32));
            }
        }
        Ok(())
    }
}

/// One entry of the extended table: the truth about a file's attributes, and its key.
#[derive(Clone, PartialEq, Eq, Default, Zeroize, ZeroizeOnDrop)]
pub struct ExtendedEntry {
    /// Attribute bits.
    pub attributes: u32,
    /// Key of the file, zero if it is not encrypted.
    pub key: [u8; 32],
}

/// The extended file table, wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct ExtendedTable(pub Vec<ExtendedEntry>);

impl Default for ExtendedTable {
    fn default() -> Self {
        Self(vec![ExtendedEntry::default(); ENTRIES])
    }
}

impl ExtendedTable {
    /// Reads a decrypted block. Its own entry (63) is ignored: other writers leave an old metadata key in it.
    pub fn parse(block: &[u8; BLOCK]) -> Self {
        let mut table = Self::default();
        for (entry, raw) in table.0.iter_mut().zip(block.chunks_exact(64)).take(ENTRIES - 1) {
            entry.attributes = le32(raw, 0);
            entry.key.copy_from_slice(&raw[4..36]);
        }
        table
    }

    /// The table as a block, to be encrypted at once.
    pub fn to_block(&self) -> zeroize::Zeroizing<Vec<u8>> {
        let mut block = zeroize::Zeroizing::new(vec![0; BLOCK]);
        for (entry, raw) in self.0.iter().zip(block.chunks_exact_mut(64)).take(ENTRIES - 1) {
            raw[0..4].copy_from_slice(&entry.attributes.to_le_bytes());
            raw[4..36].copy_from_slice(&entry.key);
        }
        block
    }

    /// The entry of a file.
    pub fn entry(&self, id: FileId) -> &ExtendedEntry {
        &self.0[id.index()]
    }

    /// The entry of a file, to be changed.
    pub fn entry_mut(&mut self, id: FileId) -> &mut ExtendedEntry {
        &mut self.0[id.index()]
    }
}

impl ExtendedEntry {
    /// Whether the file is encrypted.
    pub fn encrypted(&self) -> bool {
        self.attributes & ENCRYPTED != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(sequence: u32) -> Header {
        Header { sequence, table_block: 2, encrypted: true, markers: 0, keys: [KeySlot::default(); 2] }
    }

    fn reparse(h: &Header, patch: impl Fn(&mut [u8; HEADER])) -> Result<Header, HeaderFault> {
        let mut raw: [u8; HEADER] = array(&h.to_sector(), 0);
        patch(&mut raw);
        let crc = header_crc(&raw);
        raw[12..16].copy_from_slice(&crc.to_le_bytes());
        Header::parse(&raw)
    }

    #[test]
    fn sequence_numbers_wrap() {
        let pick = |a, b| Headers::choose([Ok(header(a)), Ok(header(b))]).map(|h| h.active);
        assert_eq!(pick(u32::MAX, 0).expect("wraps"), 1);
        assert_eq!(pick(0, u32::MAX).expect("wraps"), 0);
        assert_eq!(pick(8, 7).expect("follows"), 0);
        assert!(matches!(pick(7, 7), Err(VmgsError::SequenceGap { a: 7, b: 7 })));
        assert!(matches!(pick(7, 9), Err(VmgsError::SequenceGap { a: 7, b: 9 })));
    }

    #[test]
    fn each_header_field_has_its_own_fault() {
        let h = header(1);
        assert_eq!(Header::parse(&[0; HEADER]), Err(HeaderFault::Zero));
        assert_eq!(reparse(&h, |r| r[0] = 0), Err(HeaderFault::Signature));
        assert_eq!(reparse(&h, |r| r[10] = 2), Err(HeaderFault::Version(0x0002_0000)));
        assert_eq!(reparse(&h, |r| r[20] = 169), Err(HeaderFault::Size(169)));
        assert_eq!(reparse(&h, |r| r[24] = 1), Err(HeaderFault::TableBlock(1)));
        assert_eq!(reparse(&h, |r| r[28] = 2), Err(HeaderFault::TableSize(2)));
        assert_eq!(reparse(&h, |r| r[32] = 2), Err(HeaderFault::Algorithm(2)));
        let mut raw: [u8; HEADER] = array(&h.to_sector(), 0);
        raw[40] ^= 1;
        assert!(matches!(Header::parse(&raw), Err(HeaderFault::Crc { sequence: 1, .. })));
    }

    /// The checksum is the CRC-32 of zlib; the value was computed with Python's `zlib.crc32` over the same
    /// 168 bytes. A sparse image may promise gigabytes that nobody vouches for.
    #[test]
    fn all_files_together_have_a_bound() {
        let table = |bytes: u64| {
            let mut table = FileTable([Entry::default(); ENTRIES]);
            table.0[0] = Entry { block: 2, blocks: 1, valid: 4096, ..Entry::default() };
            for n in 1..=4u32 {
                let (blocks, valid) = (8192, bytes);
                table.0[n as usize] = Entry { block: n * 8192, blocks, valid, ..Entry::default() };
            }
            let header = Header {
                sequence: 1,
                table_block: 2,
                encrypted: false,
                markers: 0,
                keys: Default::default(),
            };
            table.check(&header, 1 << 20)
        };
        assert!(table((16 << 20) - 1024).is_ok());
        let refused = table(16 << 20).expect_err("refused").to_string();
        assert!(refused.contains("67112960 bytes together") && refused.contains("64 MiB"), "{refused}");
    }

    #[test]
    fn the_checksum_is_that_of_zlib() {
        let mut raw: [u8; HEADER] = array(&header(1).to_sector(), 0);
        raw[12..16].fill(0);
        assert_eq!(header_crc(&raw), 0x526f_c552);
    }

    proptest! {
        #[test]
        fn no_header_panics_and_valid_ones_round_trip(bytes in proptest::collection::vec(any::<u8>(), HEADER)) {
            let raw: [u8; HEADER] = array(&bytes, 0);
            let _ = Header::parse(&raw);
            let h = Header {
                sequence: le32(&bytes, 16),
                table_block: le32(&bytes, 24).max(2),
                encrypted: bytes[32] & 1 == 1,
                markers: u16::from_le_bytes(array(&bytes, 34)),
                keys: [
                    KeySlot { seal: Seal { nonce: array(&bytes, 36), tag: array(&bytes, 52) }, wrapped: array(&bytes, 68) },
                    KeySlot::default(),
                ],
            };
            prop_assert_eq!(Header::parse(&array(&h.to_sector(), 0)), Ok(h));
        }

        #[test]
        fn no_table_panics(bytes in proptest::collection::vec(any::<u8>(), BLOCK), capacity in any::<u32>()) {
            let table = FileTable::parse(&array(&bytes, 0));
            prop_assert_eq!(FileTable::parse(&table.to_block()), table.clone());
            let _ = table.check(&header(1), capacity);
            let _ = ExtendedTable::parse(&array(&bytes, 0));
        }

        /// Small numbers, so that the checks behind the first one are reached too.
        #[test]
        fn a_table_that_passes_is_in_range_and_disjoint(
            spans in proptest::collection::vec((0u32..40, 0u32..4, 0u64..20_000), ENTRIES)
        ) {
            let mut table = FileTable([Entry::default(); ENTRIES]);
            for (entry, (block, blocks, valid)) in table.0.iter_mut().zip(&spans).take(8) {
                *entry = Entry { block: *block, blocks: *blocks, valid: *valid, ..Entry::default() };
            }
            table.0[0] = Entry { block: 2, blocks: 1, valid: 4096, ..Entry::default() };
            if table.check(&header(1), 32).is_ok() {
                let mut used = [false; 32];
                for entry in table.0.iter().filter(|e| e.exists()) {
                    for b in entry.range() {
                        prop_assert!(!std::mem::replace(&mut used[b as usize], true) && b >= 2);
                    }
                    prop_assert!(entry.valid <= u64::from(entry.blocks) * 4096);
                }
            }
        }
    }
}
