// SPDX-License-Identifier: Apache-2.0
//! The table of GUIDed entries at the end of OVMF-like firmware, and the SEV metadata that one entry points
//! to.
//!
//! Layout: edk2, `OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm` (table) and `X64/OvmfSevMetadata.asm`
//! (metadata). The table ends 32 bytes before the end of the file and is read backwards: each entry is its
//! data, then its whole length (u16), then its GUID. The file is hostile input: every offset and length comes
//! from it, and nothing is believed unchecked.

use crate::guid::Guid;
use crate::le;

/// Bytes between the table's end and the file's end.
const TABLE_END_FROM_FILE_END: usize = 32;
/// Most sections of SEV metadata: edk2's firmware has about ten.
const SECTIONS_MAX: u32 = 256;
/// Length and GUID of an entry.
const ENTRY_HEADER: usize = 18;

const TABLE_FOOTER: Guid = Guid::new(0x96b5_82de, 0x1fb2, 0x45f7, 0xbaea_a366_c55a_082d);
const SEV_METADATA: Guid = Guid::new(0xdc88_6566, 0x984a, 0x4798, 0xa75e_5585_a7bf_67cc);
/// {base u32, size u32} of the table of kernel hashes.
const SEV_HASH_TABLE: Guid = Guid::new(0x7255_371f, 0x3a3b, 0x4b04, 0x927b_1da6_efa8_d454);
/// Where an application processor starts.
const SEV_ES_RESET_BLOCK: Guid = Guid::new(0x00f7_71de, 0x1a7e, 0x4fcb, 0x890e_68c7_7e2f_b44e);
/// Where an SVSM starts, relative to its own beginning.
const SVSM_INFO: Guid = Guid::new(0xa789_a612, 0x0597, 0x4c4b, 0xa49f_cbb1_fe9d_1ddd);

/// What is wrong with the file, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum TableError {
    /// No table at all: not OVMF, or the variable store alone.
    #[error(
        "offset {offset:#x}: expected the GUID 96b582de-1fb2-45f7-baea-a366c55a082d that ends an OVMF table, so this \
         file of {len} bytes is no firmware image with a reset vector"
    )]
    NoTable { offset: usize, len: usize },
    /// A value that does not fit.
    #[error("offset {offset:#x}: {what} is {found}, expected {expected}")]
    Field { offset: usize, what: &'static str, found: u64, expected: String },
    /// Two entries of one kind.
    #[error(
        "offset {offset:#x}: a second {what} entry; expected one, because readers differ in which they take"
    )]
    Twice { offset: usize, what: &'static str },
    /// No metadata, so the firmware cannot start as an SNP guest.
    #[error(
        "the firmware has no SEV metadata (no entry dc886566-984a-4798-a75e-5585a7bf67cc), so it cannot run as an SNP \
         guest: take a build that is made for SEV-SNP (of Debian's package ovmf, the 2M files)"
    )]
    NoMetadata,
    /// The metadata's first four bytes.
    #[error("offset {offset:#x}: SEV metadata starts with {found:02x?}, expected \"ASEV\"")]
    Signature { offset: usize, found: [u8; 4] },
}

/// A section of the SEV metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Where it is described in the file.
    pub offset: usize,
    /// Guest-physical address.
    pub gpa: u32,
    /// Length in bytes.
    pub size: u32,
    /// What it is for; see [`super::ovmf`].
    pub kind: u32,
}

/// The entries that this crate reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuidTable {
    /// {offset in the file, base, size} of the kernel hashes' place.
    pub hash_table: Option<(usize, u32, u32)>,
    /// Start of application processors; zero is "none".
    pub reset_eip: Option<u32>,
    /// Start of an SVSM, relative to its image.
    pub svsm_entry: Option<u32>,
    /// SEV metadata in file order.
    pub sections: Vec<Section>,
}

/// Fills `slot` from an entry at `offset` with `len` bytes of data, once.
fn once<T>(
    slot: &mut Option<T>,
    offset: usize,
    what: &'static str,
    len: usize,
    value: Option<T>,
) -> Result<(), TableError> {
    if slot.is_some() {
        return Err(TableError::Twice { offset, what });
    }
    let short =
        || TableError::Field { offset, what, found: len as u64, expected: "more bytes of data".into() };
    *slot = Some(value.ok_or_else(short)?);
    Ok(())
}

/// One step of the walk from the table's end: the entry that ends at `end`, as {GUID, start of its data,
/// length of it}.
fn entry_before(file: &[u8], start: usize, end: usize) -> Result<(Guid, usize, usize), TableError> {
    let room = end - start;
    let bad = |found: usize, expected: String| TableError::Field {
        offset: end.saturating_sub(ENTRY_HEADER),
        what: "length of an OVMF table entry",
        found: found as u64,
        expected,
    };
    let header = end.checked_sub(ENTRY_HEADER).filter(|at| *at >= start);
    let header: Option<&[u8; ENTRY_HEADER]> = header.and_then(|at| file.get(at..)?.first_chunk());
    let Some([len0, len1, guid @ ..]) = header else {
        return Err(bad(room, format!("{ENTRY_HEADER} or more")));
    };
    let len = usize::from(u16::from_le_bytes([*len0, *len1]));
    if len < ENTRY_HEADER || len > room {
        return Err(bad(len, format!("{ENTRY_HEADER} to {room}")));
    }
    Ok((Guid(*guid), end - len, len - ENTRY_HEADER))
}

impl GuidTable {
    /// Reads the table and the SEV metadata of a whole firmware file.
    pub fn parse(file: &[u8]) -> Result<Self, TableError> {
        let end = file.len().saturating_sub(TABLE_END_FROM_FILE_END);
        let no_table = TableError::NoTable { offset: end.saturating_sub(16), len: file.len() };
        let footer = end.checked_sub(ENTRY_HEADER).ok_or(no_table.clone())?;
        let footer_bytes: Option<&[u8; ENTRY_HEADER]> = file.get(footer..).and_then(|f| f.first_chunk());
        let (table_len, guid) = match footer_bytes {
            Some([len0, len1, guid @ ..]) => (usize::from(u16::from_le_bytes([*len0, *len1])), Guid(*guid)),
            None => return Err(no_table),
        };
        if guid != TABLE_FOOTER {
            return Err(no_table);
        }
        let start = end.checked_sub(table_len).filter(|s| *s <= footer);
        let start = start.ok_or_else(|| TableError::Field {
            offset: footer,
            what: "length of the OVMF table",
            found: table_len as u64,
            expected: format!("{ENTRY_HEADER} to {end}"),
        })?;

        let mut table = GuidTable::default();
        let mut metadata = None;
        let mut end = footer;
        while end > start {
            let (guid, data, len) = entry_before(file, start, end)?;
            let word = |i: usize| {
                (len >= i * 4 + 4).then(|| le::get(file, data + i * 4)).flatten().map(u32::from_le_bytes)
            };
            match guid {
                SEV_METADATA => once(&mut metadata, data, "SEV metadata", len, word(0))?,
                SEV_ES_RESET_BLOCK => once(&mut table.reset_eip, data, "SEV-ES reset block", len, word(0))?,
                SVSM_INFO => once(&mut table.svsm_entry, data, "SVSM info", len, word(0))?,
                SEV_HASH_TABLE => {
                    let value = word(0).zip(word(1)).map(|(base, size)| (data, base, size));
                    once(&mut table.hash_table, data, "SEV hash table", len, value)?
                }
                _ => {}
            }
            end = data;
        }
        table.sections = sections(file, metadata.ok_or(TableError::NoMetadata)?)?;
        Ok(table)
    }
}

/// Reads the SEV metadata that starts `from_end` bytes before the end of the file.
fn sections(file: &[u8], from_end: u32) -> Result<Vec<Section>, TableError> {
    let start = usize::try_from(from_end).ok().and_then(|n| file.len().checked_sub(n));
    let start = start.filter(|s| file.len() - s >= 16).ok_or_else(|| TableError::Field {
        offset: 0,
        what: "distance of the SEV metadata from the end of the file",
        found: from_end.into(),
        expected: format!("16 to {}", file.len()),
    })?;
    let word = |i: usize| le::u32_at(file, start + i * 4);
    let signature: [u8; 4] = word(0).to_le_bytes();
    if signature != *b"ASEV" {
        return Err(TableError::Signature { offset: start, found: signature });
    }
    let (size, version, count) = (word(1), word(2), word(3));
    let field = |i: usize, what: &'static str, found: u32, expected: String| {
        Err(TableError::Field { offset: start + i * 4, what, found: found.into(), expected })
    };
    if version != 1 {
        return field(2, "version of the SEV metadata", version, "1".into());
    }
    let room = (file.len() - start) as u64;
    if u64::from(size) < 16 || u64::from(size) > room {
        return field(1, "size of the SEV metadata", size, format!("16 to {room}"));
    }
    let fitting = ((size - 16) / 12).min(SECTIONS_MAX);
    if count > fitting {
        return field(3, "number of SEV metadata sections", count, format!("at most {fitting}"));
    }
    let section = |i: usize| {
        let offset = start + 16 + i * 12;
        let word = |i: usize| le::u32_at(file, offset + i * 4);
        Section { offset, gpa: word(0), size: word(1), kind: word(2) }
    };
    Ok((0..count as usize).map(section).collect())
}
