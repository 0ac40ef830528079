// SPDX-License-Identifier: Apache-2.0
//! The fixed header and the variable headers of an IGVM file, each with its offset.

use super::error::IgvmError;
use crate::le::u32_at;
use crate::plan::PAGE_SIZE;

const MAGIC: u32 = u32::from_le_bytes(*b"IGVM");
/// Types of headers; bit 31 says that a loader may pass over one that it does not know.
pub(super) mod kind {
    pub const OPTIONAL: u32 = 1 << 31;
    pub const SUPPORTED_PLATFORM: u32 = 0x1;
    pub const GUEST_POLICY: u32 = 0x101;
    pub const RELOCATABLE_REGION: u32 = 0x102;
    pub const PAGE_TABLE_RELOCATION: u32 = 0x103;
    pub const LAST_INIT: u32 = 0x107;
    pub const PARAMETER_AREA: u32 = 0x301;
    pub const PAGE_DATA: u32 = 0x302;
    pub const PARAMETER_INSERT: u32 = 0x303;
    pub const VP_CONTEXT: u32 = 0x304;
    pub const REQUIRED_MEMORY: u32 = 0x305;
    pub const VP_COUNT: u32 = 0x307;
    pub const SRAT: u32 = 0x308;
    pub const MADT: u32 = 0x309;
    pub const MMIO_RANGES: u32 = 0x30a;
    pub const SNP_ID_BLOCK: u32 = 0x30b;
    pub const MEMORY_MAP: u32 = 0x30c;
    pub const COMMAND_LINE: u32 = 0x30e;
    pub const SLIT: u32 = 0x30f;
    pub const PPTT: u32 = 0x310;
    pub const DEVICE_TREE: u32 = 0x312;
    pub const ENVIRONMENT_INFO: u32 = 0x313;
    pub const LAST_DIRECTIVE: u32 = 0x313;
}

/// One variable header.
#[derive(Clone, Copy)]
pub(super) struct Header<'a> {
    /// Offset of its body in the file.
    pub(super) offset: usize,
    /// Its type.
    pub(super) kind: u32,
    /// Its value.
    pub(super) body: &'a [u8],
}

impl Header<'_> {
    /// The type, without the bit that says "optional".
    pub(super) fn kind(&self) -> u32 {
        self.kind & !kind::OPTIONAL
    }

    pub(super) fn error(
        &self,
        at: usize,
        what: &'static str,
        found: u64,
        expected: impl Into<String>,
    ) -> IgvmError {
        IgvmError::Field { offset: self.offset + at, what, found, expected: expected.into() }
    }

    /// Refuses a body of another length than the type has.
    pub(super) fn expect_len(&self, len: usize) -> Result<(), IgvmError> {
        if self.body.len() != len {
            return Err(IgvmError::Field {
                offset: self.offset - 4,
                what: "length of a header",
                found: self.body.len() as u64,
                expected: format!("{len:#x} for type {:#x}", self.kind),
            });
        }
        Ok(())
    }
}

/// Checks the fixed header and splits the variable headers.
pub(super) fn headers(file: &[u8]) -> Result<Vec<Header<'_>>, IgvmError> {
    let cut =
        |offset: usize, what: &'static str, expected: usize| IgvmError::CutOff { offset, what, expected };
    let field = |offset: usize, what: &'static str, expected: String| IgvmError::Field {
        offset,
        what,
        found: u32_at(file, offset).into(),
        expected,
    };
    if file.len() < 24 {
        return Err(cut(file.len(), "the fixed header", 24 - file.len()));
    }
    if u32_at(file, 0) != MAGIC {
        return Err(field(0, "magic number", format!("{MAGIC:#x} ('IGVM')")));
    }
    let fixed = match u32_at(file, 4) {
        1 => 24,
        2 if file.len() < 32 => return Err(cut(file.len(), "the fixed header", 32 - file.len())),
        2 if u32_at(file, 24) != 0 => return Err(field(24, "architecture", "0 (x86-64)".into())),
        2 if u32_at(file, 28) != PAGE_SIZE as u32 => return Err(field(28, "page size", "0x1000".into())),
        2 => 32,
        _ => return Err(field(4, "format version", "1 or 2".into())),
    };
    let (start, size) = (u32_at(file, 8) as usize, u32_at(file, 12) as usize);
    if u32_at(file, 16) as usize != file.len() {
        return Err(field(16, "total file size", format!("{:#x}, as the file has", file.len())));
    }
    if start < fixed || start > file.len() || start % 8 != 0 {
        let expected = format!("a multiple of 8 from {fixed:#x} to {:#x}", file.len());
        return Err(field(8, "offset of the variable headers", expected));
    }
    let variable = file[start..].get(..size);
    let variable = variable.ok_or_else(|| {
        field(12, "size of the variable headers", format!("at most {:#x}", file.len() - start))
    })?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&file[..20]);
    crc.update(&[0; 4]);
    crc.update(&file[24..fixed]);
    crc.update(variable);
    let crc = crc.finalize();
    if crc != u32_at(file, 20) {
        return Err(field(20, "checksum", format!("{crc:#x}")));
    }

    let mut found = Vec::new();
    let mut at = 0;
    while at < variable.len() {
        if variable.len() - at < 8 {
            return Err(cut(start + at, "a variable header", 8 - (variable.len() - at)));
        }
        let (kind, len) = (u32_at(variable, at), u32_at(variable, at + 4) as usize);
        let body = variable[at + 8..].get(..len).ok_or_else(|| IgvmError::Field {
            offset: start + at + 4,
            what: "length of a header",
            found: len as u64,
            expected: format!("at most {:#x}", variable.len() - at - 8),
        })?;
        found.push(Header { offset: start + at + 8, kind, body });
        // The next header begins at a multiple of 8; the last one need not be padded.
        at += 8 + len.next_multiple_of(8);
    }
    Ok(found)
}
