// SPDX-License-Identifier: Apache-2.0
//! Reading an image: from raw bytes to proven contents, in steps that each trust only what the one before has
//! proved.
//!
//! [`Layout::read`] needs no key: container, headers, file tables. [`unlock`] opens the key slots and the
//! extended table, and [`read_file`] single files. None of these writes a byte, so a refused image is left as
//! it was found. What the tables and the root say of each other is [`super::view`]'s.

use zeroize::Zeroizing;

use super::block::BlockFile;
use super::crypto;
use super::crypto::Key;
use super::error::VmgsError;
use super::file_id::FileId;
use super::format::BLOCK;
use super::format::ENCRYPTED;
use super::format::Entry;
use super::format::ExtendedTable;
use super::format::FileTable;
use super::format::HEADER;
use super::format::Header;
use super::format::Headers;
use super::format::SECTOR;
use super::root::Root;
use super::spans::Spans;
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
    /// The other header and its table, if both are whole.
    pub other: Option<(Header, FileTable)>,
}

pub(super) fn block_offset(block: u32) -> u64 {
    u64::from(block) * BLOCK as u64
}

/// Reads one block.
pub fn read_block<F: BlockFile>(file: &F, block: u32) -> Result<[u8; BLOCK], VmgsError> {
    let mut buffer = [0; BLOCK];
    file.read_at(&mut buffer, block_offset(block)).map_err(VmgsError::io("reading a table"))?;
    Ok(buffer)
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
            Ok(h) => read_table(file, h, capacity).ok().map(|t| (h.clone(), t)),
            Err(_) => None,
        };
        Ok(Self { payload, capacity, headers, header, table, other })
    }

    /// The blocks that the other header needs.
    pub fn other_spans(&self) -> Spans {
        self.other.as_ref().map(|(h, t)| Spans::named(h, t)).unwrap_or_default()
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

/// The ids that a passphrase for this image may be salted with: the container's own, and during a change of
/// key also the one that it had before.
pub fn salts<F: BlockFile>(file: &F) -> Result<Vec<[u8; 16]>, VmgsError> {
    let (footer, _) = read_footer(file)?;
    Ok([unique_id(file)?].into_iter().chain(vhd::earlier_id(&footer)).collect())
}

/// Whether a key opens a slot of the header that counts.
pub fn key_opens<F: BlockFile>(file: &F, key: &Key) -> Result<bool, VmgsError> {
    let header = Layout::read(file)?.header;
    let mut slots = header.keys.iter().filter(|slot| !slot.is_empty());
    Ok(slots.any(|slot| crypto::open(key.expose(), &slot.seal, &slot.wrapped).is_some()))
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

/// Opens the key slots of a header and its extended table.
pub fn unlock<F: BlockFile>(
    file: &F,
    header: &Header,
    table: &FileTable,
    key: Option<&Key>,
) -> Result<ExtendedTable, VmgsError> {
    let entry = table.entry(FileId::EXTENDED);
    if !header.encrypted {
        return unlock_plain(file, table, entry);
    }
    if !entry.exists() {
        return Err(VmgsError::MissingEntry(FileId::EXTENDED));
    }
    let key = key.ok_or(VmgsError::KeyNeeded)?;
    let block = read_block(file, entry.block)?;
    if block.iter().all(|b| *b == 0) {
        return Err(VmgsError::ZeroCiphertext(FileId::EXTENDED));
    }
    let mut unwrapped = false;
    for slot in header.keys.iter().filter(|slot| !slot.is_empty()) {
        let Some(metadata) = crypto::open(key.expose(), &slot.seal, &slot.wrapped) else { continue };
        unwrapped = true;
        let mut metadata_key = Zeroizing::new([0; 32]);
        metadata_key.copy_from_slice(&metadata);
        if let Some(plain) = crypto::open(&metadata_key, &entry.seal, &block) {
            return Ok(parse_extended(&plain));
        }
    }
    Err(if unwrapped { VmgsError::AuthFailed(FileId::EXTENDED) } else { VmgsError::WrongKey })
}

/// Opens the extended table of an image whose metadata key is zero.
pub fn unlock_with_zero_key<F: BlockFile>(file: &F, table: &FileTable) -> Result<ExtendedTable, VmgsError> {
    let entry = table.entry(FileId::EXTENDED);
    let block = read_block(file, entry.block)?;
    let plain = crypto::open(&[0; 32], &entry.seal, &block).ok_or(VmgsError::AuthFailed(FileId::EXTENDED))?;
    Ok(parse_extended(&plain))
}

fn parse_extended(plain: &[u8]) -> ExtendedTable {
    let mut block = Zeroizing::new([0; BLOCK]);
    block.copy_from_slice(plain);
    ExtendedTable::parse(&block)
}

/// An image whose header says "not encrypted" must hold no trace of encryption.
fn unlock_plain<F: BlockFile>(
    file: &F,
    table: &FileTable,
    entry: &Entry,
) -> Result<ExtendedTable, VmgsError> {
    if let Some((id, _)) = table.files().find(|(_, e)| e.attributes & ENCRYPTED != 0) {
        return Err(VmgsError::EncryptionStripped(id));
    }
    if entry.exists() && read_block(file, entry.block)?.iter().any(|b| *b != 0) {
        return Err(VmgsError::EncryptionStripped(FileId::EXTENDED));
    }
    Ok(ExtendedTable::default())
}

/// Reads and decrypts one file, as the extended table says. No digest is compared here.
pub fn read_file<F: BlockFile>(
    file: &F,
    table: &FileTable,
    extended: &ExtendedTable,
    id: FileId,
) -> Result<Zeroizing<Vec<u8>>, VmgsError> {
    let entry = table.entry(id);
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
    // An empty message still has a tag.
    if !data.is_empty() && data.iter().all(|b| *b == 0) {
        return Err(VmgsError::ZeroCiphertext(id));
    }
    crypto::open(&truth.key, &entry.seal, &data).ok_or(VmgsError::AuthFailed(id))
}

/// Reads the integrity root; `None` if there is none.
pub fn read_root<F: BlockFile>(
    file: &F,
    table: &FileTable,
    extended: &ExtendedTable,
) -> Result<Option<Root>, VmgsError> {
    match read_file(file, table, extended, FileId::ROOT) {
        Ok(bytes) => Root::parse(&bytes).map(Some),
        Err(VmgsError::NotFound(_)) => Ok(None),
        Err(e) => Err(e),
    }
}
