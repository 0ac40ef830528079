// SPDX-License-Identifier: Apache-2.0
//! Reading an image: from raw bytes to proven contents, in steps that each trust only what the one before has proved.
//!
//! [`Layout::read`] needs no key: container, headers, file table. [`unlock`] opens the key slots and the extended table.
//! [`check_files`] compares the tables with each other and [`read_root`] with the integrity root. None of these writes a
//! byte, so a refused image is left as it was found.

use std::collections::BTreeSet;

use zeroize::Zeroizing;

use super::block::BlockFile;
use super::crypto;
use super::crypto::Key;
use super::error::FileList;
use super::error::VmgsError;
use super::format::BLOCK;
use super::format::ENCRYPTED;
use super::format::Entry;
use super::format::ExtendedTable;
use super::format::FileId;
use super::format::FileTable;
use super::format::HEADER;
use super::format::Header;
use super::format::Headers;
use super::format::SECTOR;
use super::root::Root;
use super::root::digest;
use super::vhd;

/// Smallest payload: what other readers of the format insist on.
const MIN_PAYLOAD: u64 = 16 << 10;

/// Everything that can be known of an image without a key.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Bytes of the payload.
    pub payload: u64,
    /// Whole blocks in it.
    pub capacity: u32,
    /// Header slots and the choice between them.
    pub headers: Headers,
    /// The active header.
    pub header: Header,
    /// Its file table, checked.
    pub table: FileTable,
    /// Blocks that the other header needs, if that one is whole.
    pub other: BTreeSet<u32>,
}

fn block_offset(block: u32) -> u64 {
    u64::from(block) * BLOCK as u64
}

/// Reads one block.
pub fn read_block<F: BlockFile>(file: &F, block: u32) -> Result<[u8; BLOCK], VmgsError> {
    let mut buffer = [0; BLOCK];
    file.read_at(&mut buffer, block_offset(block)).map_err(VmgsError::io("reading a table"))?;
    Ok(buffer)
}

/// Blocks that a header and its table name.
pub fn named_blocks(header: &Header, table: &FileTable) -> BTreeSet<u32> {
    let mut set: BTreeSet<u32> = table
        .0
        .iter()
        .filter(|e| e.exists())
        .flat_map(|e| e.block..e.block.saturating_add(e.blocks))
        .collect();
    set.insert(header.table_block);
    set
}

impl Layout {
    /// Reads container, headers and tables.
    pub fn read<F: BlockFile>(file: &F) -> Result<Self, VmgsError> {
        let payload = payload_size(file)?;
        let capacity = u32::try_from(payload / BLOCK as u64).unwrap_or(u32::MAX);
        let mut start = [0u8; 2 * SECTOR];
        file.read_at(&mut start, 0).map_err(VmgsError::io("reading the headers"))?;
        if &start[SECTOR..SECTOR + 8] == b"EFI PART" {
            return Err(VmgsError::V1Format);
        }
        let slot = |at: usize| {
            let mut raw = [0; HEADER];
            raw.copy_from_slice(&start[at..at + HEADER]);
            Header::parse(&raw)
        };
        let headers = Headers::choose([slot(0), slot(SECTOR)])?;
        let header = headers.slots[headers.active].clone().map_err(|fault| VmgsError::NoValidHeader {
            slot0: fault.to_string(),
            slot1: fault.to_string(),
        })?;
        let table = read_table(file, &header, capacity)?;
        let other = match &headers.slots[1 - headers.active] {
            Ok(h) => read_table(file, h, capacity).map(|t| named_blocks(h, &t)).unwrap_or_default(),
            Err(_) => BTreeSet::new(),
        };
        Ok(Self { payload, capacity, headers, header, table, other })
    }

    /// Whether anyone can open the extended table (the defect of writers that zeroed the metadata key).
    pub fn has_zero_metadata_key<F: BlockFile>(&self, file: &F) -> Result<bool, VmgsError> {
        let entry = self.table.entry(FileId::EXTENDED);
        if !self.header.encrypted || !entry.exists() {
            return Ok(false);
        }
        let block = read_block(file, entry.block)?;
        Ok(crypto::open(&[0; 32], &entry.seal, &block).is_some())
    }
}

fn read_table<F: BlockFile>(file: &F, header: &Header, capacity: u32) -> Result<FileTable, VmgsError> {
    if header.table_block >= capacity {
        return Err(VmgsError::OutOfRange(
            FileId::FILE_TABLE,
            format!("the header puts it in block {} of {capacity}", header.table_block),
        ));
    }
    let table = FileTable::parse(&read_block(file, header.table_block)?);
    table.check(header, capacity)?;
    Ok(table)
}

/// The container's unique id: public, not authenticated, and the salt of a passphrase.
pub fn unique_id<F: BlockFile>(file: &F) -> Result<[u8; 16], VmgsError> {
    let (footer, _) = read_footer(file)?;
    let mut id = [0; 16];
    id.copy_from_slice(&footer[68..84]);
    Ok(id)
}

fn payload_size<F: BlockFile>(file: &F) -> Result<u64, VmgsError> {
    let (_, payload) = read_footer(file)?;
    if payload < MIN_PAYLOAD {
        return Err(VmgsError::Truncated(format!(
            "a payload of {payload} bytes is below the minimum of {MIN_PAYLOAD}"
        )));
    }
    Ok(payload)
}

fn read_footer<F: BlockFile>(file: &F) -> Result<([u8; vhd::FOOTER], u64), VmgsError> {
    let len = file.len().map_err(VmgsError::io("asking for the image's length"))?;
    let sector = vhd::FOOTER as u64;
    if len == 0 {
        return Err(VmgsError::Empty);
    }
    if len < sector || len % sector != 0 {
        return Err(VmgsError::Truncated(format!("{len} bytes is not a whole number of 512-byte sectors")));
    }
    let mut footer = [0; vhd::FOOTER];
    file.read_at(&mut footer, len - sector).map_err(VmgsError::io("reading the footer"))?;
    let payload = vhd::parse(&footer, len)?;
    Ok((footer, payload))
}

/// Opens the key slots of the active header and the extended table.
pub fn unlock<F: BlockFile>(
    file: &F,
    layout: &Layout,
    key: Option<&Key>,
) -> Result<ExtendedTable, VmgsError> {
    let entry = layout.table.entry(FileId::EXTENDED);
    if !layout.header.encrypted {
        return unlock_plain(file, layout, entry);
    }
    if !entry.exists() {
        return Err(VmgsError::MissingEntry(FileId::EXTENDED));
    }
    if layout.has_zero_metadata_key(file)? {
        return Err(VmgsError::ZeroMetadataKey);
    }
    let key = key.ok_or(VmgsError::KeyNeeded)?;
    let block = read_block(file, entry.block)?;
    if block.iter().all(|b| *b == 0) {
        return Err(VmgsError::ZeroCiphertext(FileId::EXTENDED));
    }
    let mut unwrapped = false;
    for slot in layout.header.keys.iter().filter(|slot| !slot.is_empty()) {
        let Some(metadata) = crypto::open(key.expose(), &slot.seal, &slot.wrapped) else { continue };
        unwrapped = true;
        let mut metadata_key = Zeroizing::new([0; 32]);
        metadata_key.copy_from_slice(&metadata);
        if let Some(plain) = crypto::open(&metadata_key, &entry.seal, &block) {
            let mut table = Zeroizing::new([0; BLOCK]);
            table.copy_from_slice(&plain);
            return Ok(ExtendedTable::parse(&table));
        }
    }
    Err(if unwrapped { VmgsError::AuthFailed(FileId::EXTENDED) } else { VmgsError::WrongKey })
}

/// Opens the extended table of an image whose metadata key is zero. Only for repair.
pub fn unlock_with_zero_key<F: BlockFile>(file: &F, layout: &Layout) -> Result<ExtendedTable, VmgsError> {
    let entry = layout.table.entry(FileId::EXTENDED);
    let block = read_block(file, entry.block)?;
    let plain = crypto::open(&[0; 32], &entry.seal, &block).ok_or(VmgsError::AuthFailed(FileId::EXTENDED))?;
    let mut table = Zeroizing::new([0; BLOCK]);
    table.copy_from_slice(&plain);
    Ok(ExtendedTable::parse(&table))
}

/// An image whose header says "not encrypted" must hold no trace of encryption.
fn unlock_plain<F: BlockFile>(file: &F, layout: &Layout, entry: &Entry) -> Result<ExtendedTable, VmgsError> {
    if let Some((id, _)) = layout.table.files().find(|(_, e)| e.attributes & ENCRYPTED != 0) {
        return Err(VmgsError::EncryptionStripped(id));
    }
    if entry.exists() && read_block(file, entry.block)?.iter().any(|b| *b != 0) {
        return Err(VmgsError::EncryptionStripped(FileId::EXTENDED));
    }
    Ok(ExtendedTable::default())
}

/// Compares file table and extended table: nothing removed, nothing planted.
pub fn check_files(layout: &Layout, extended: &ExtendedTable, adopt: bool) -> Result<(), VmgsError> {
    if !layout.header.encrypted {
        return Ok(());
    }
    for id in FileId::files() {
        let (entry, truth) = (layout.table.entry(id), extended.entry(id));
        let remembered = truth.attributes != 0 || truth.key != [0; 32];
        if remembered && !entry.exists() && !adopt {
            return Err(VmgsError::MissingEntry(id));
        }
        if entry.exists() && !truth.encrypted() && id.is_secret() && !adopt {
            return Err(VmgsError::UnexpectedPlaintext(id));
        }
    }
    Ok(())
}

/// Reads and decrypts one file, as the extended table says. No digest is compared here.
pub fn read_file<F: BlockFile>(
    file: &F,
    layout_table: &FileTable,
    extended: &ExtendedTable,
    id: FileId,
) -> Result<Zeroizing<Vec<u8>>, VmgsError> {
    let entry = layout_table.entry(id);
    if !entry.exists() {
        return Err(VmgsError::NotFound(id));
    }
    // `FileTable::check` has bounded `valid` by MAX_FILE and by the payload.
    let mut data = Zeroizing::new(vec![0; entry.valid as usize]);
    file.read_at(&mut data, block_offset(entry.block))
        .map_err(VmgsError::io("reading a file of the image"))?;
    let truth = extended.entry(id);
    if !truth.encrypted() {
        return Ok(data);
    }
    if data.iter().all(|b| *b == 0) {
        return Err(VmgsError::ZeroCiphertext(id));
    }
    crypto::open(&truth.key, &entry.seal, &data).ok_or(VmgsError::AuthFailed(id))
}

/// How the files differ from what the root lists.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Listed but not allocated.
    pub missing: Vec<FileId>,
    /// Allocated but not listed.
    pub unexpected: Vec<FileId>,
    /// Size, attributes or contents differ.
    pub changed: Vec<FileId>,
}

impl Differences {
    /// The first difference as a refusal; the most alarming kind first.
    pub fn refuse(self) -> Result<(), VmgsError> {
        match (self.missing.first(), self.unexpected.first(), self.changed.is_empty()) {
            (Some(id), _, _) => Err(VmgsError::MissingEntry(*id)),
            (_, Some(id), _) => Err(VmgsError::UnexpectedEntry(*id)),
            (_, _, false) => Err(VmgsError::ForeignWrite(FileList(self.changed))),
            _ => Ok(()),
        }
    }
}

/// Compares every file, contents included, with the root.
pub fn compare<F: BlockFile>(
    file: &F,
    layout: &Layout,
    extended: &ExtendedTable,
    root: &Root,
) -> Result<Differences, VmgsError> {
    let mut out = Differences::default();
    for id in FileId::files().filter(|id| *id != FileId::ROOT) {
        let entry = layout.table.entry(id);
        match (entry.exists(), root.files.get(&id)) {
            (false, None) => {}
            (false, Some(_)) => out.missing.push(id),
            (true, None) => out.unexpected.push(id),
            (true, Some(listed)) => {
                // Authentication comes first: a file that fails it was not written by anyone who has the key.
                let data = read_file(file, &layout.table, extended, id)?;
                if extended.entry(id).attributes != listed.attributes
                    || entry.valid != listed.valid
                    || digest(&data) != listed.digest
                {
                    out.changed.push(id);
                }
            }
        }
    }
    Ok(out)
}

/// Reads the integrity root.
pub fn read_root<F: BlockFile>(
    file: &F,
    layout: &Layout,
    extended: &ExtendedTable,
) -> Result<Root, VmgsError> {
    match read_file(file, &layout.table, extended, FileId::ROOT) {
        Ok(bytes) => Root::parse(&bytes),
        Err(VmgsError::NotFound(_)) => Err(VmgsError::RootMissing),
        Err(e) => Err(e),
    }
}
