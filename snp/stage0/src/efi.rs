// SPDX-License-Identifier: Apache-2.0
//! The EFI data by which Linux accepts memory on demand, for a guest that has no EFI.
//!
//! UEFI 2.10, sections 4.3 (system table), 4.6 (configuration table) and 7.2 (memory map); Linux `linux_efi_unaccepted` table,
//! version 1, `include/linux/efi.h`. A bit of that table on memory that has contents would make Linux validate it a second time
//! and hand the host a chance to swap it, so the table is made here, from the measured ranges, and never comes from the host.
//! Linux looks at the system table's signature and at one configuration table; there are no runtime services.

use super::e820;
use super::inputs::ACCEPT;
use super::inputs::Inputs;
use super::inputs::RAM;
use super::inputs::Span;
use super::layout;
use super::layout::LARGE;
use super::layout::PAGE;
use super::reason::Reason;

/// "IBI SYST".
const SIGNATURE: u64 = 0x5453_5953_2049_4249;
const REVISION: u32 = 0x0002_0046;
const SYSTEM_TABLE_LEN: usize = 120;
/// GUID d5d1de3c-105c-44f9-9ea9-bcef98120031 as it lies in memory.
pub const UNACCEPTED_GUID: [u8; 16] =
    [0x3c, 0xde, 0xd1, 0xd5, 0x5c, 0x10, 0xf9, 0x44, 0x9e, 0xa9, 0xbc, 0xef, 0x98, 0x12, 0x00, 0x31];
/// Offset of the configuration table in the EFI tables.
const CONFIGURATION: usize = 128;
/// Offset of the memory map in the EFI tables.
pub const MEMORY_MAP: usize = 256;
/// Bytes of a descriptor of the memory map.
pub const DESCRIPTOR_LEN: usize = 40;
/// `EFI_MEMORY_WB`.
const WRITE_BACK: u64 = 8;
/// Offset of `efi_info` in `boot_params`.
const EFI_INFO: usize = 0x1c0;
/// Offset of the bitmap in the unaccepted table.
pub const BITMAP: usize = 24;

/// Memory types of the map.
const RESERVED: u32 = 0;
/// Memory that Linux may put its kernel into: all of it is validated.
const CONVENTIONAL: u32 = 7;
/// RAM all the same, but nothing for the kernel's place: a type that the decompressor's KASLR leaves alone. What is RAM for
/// the kernel proper follows from e820.
const LOADER_DATA: u32 = 2;
const ACPI_RECLAIM: u32 = 9;
const ACPI_NVS: u32 = 10;

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Result<(), Reason> {
    let place = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut());
    *place.ok_or(Reason::LazyTables)? = value;
    Ok(())
}

/// Calls `f` for the parts of `span` that lie in the accept list (`true`) and those that do not (`false`), ascending.
fn split(
    inputs: Inputs<'_>,
    span: Span,
    mut f: impl FnMut(Span, bool) -> Result<(), Reason>,
) -> Result<(), Reason> {
    let mut at = span.start;
    // The list is ascending and disjoint, as `Inputs::check` made sure.
    for accept in inputs.spans(ACCEPT).filter(|accept| accept.overlaps(span)) {
        let (start, end) = (accept.start.max(at), accept.end.min(span.end));
        if at < start {
            f(Span { start: at, end: start }, false)?;
        }
        if start < end {
            f(Span { start, end }, true)?;
        }
        at = at.max(end);
    }
    if at < span.end {
        f(Span { start: at, end: span.end }, false)?;
    }
    Ok(())
}

/// Writes system table, configuration table and memory map to `tables`, which are zero and lie at [`layout::EFI_TABLES`], and
/// announces them in `boot_params`, whose e820 map was checked before.
pub fn announce(tables: &mut [u8], boot_params: &mut [u8], inputs: Inputs<'_>) -> Result<(), Reason> {
    let configuration = layout::EFI_TABLES + CONFIGURATION as u64;
    put(tables, 0, SIGNATURE.to_le_bytes())?;
    put(tables, 8, REVISION.to_le_bytes())?;
    put(tables, 12, (SYSTEM_TABLE_LEN as u32).to_le_bytes())?;
    put(tables, 104, 1u32.to_le_bytes())?;
    put(tables, 112, configuration.to_le_bytes())?;
    put(tables, CONFIGURATION, UNACCEPTED_GUID)?;
    put(tables, CONFIGURATION + 16, layout::UNACCEPTED.to_le_bytes())?;

    let mut at = MEMORY_MAP;
    let mut descriptor = |span: Span, kind: u32| {
        if (span.start | span.end) & (PAGE - 1) != 0 {
            return Err(Reason::LazyTables);
        }
        put(tables, at, kind.to_le_bytes())?;
        put(tables, at + 8, span.start.to_le_bytes())?;
        put(tables, at + 24, ((span.end - span.start) / PAGE).to_le_bytes())?;
        put(tables, at + 32, WRITE_BACK.to_le_bytes())?;
        at += DESCRIPTOR_LEN;
        Ok(())
    };
    for (start, len, kind) in e820::entries(boot_params) {
        let span = Span { start, end: start.checked_add(len).ok_or(Reason::E820Overflow)? };
        match kind {
            e820::TYPE_RAM => split(inputs, span, |part, accepted| {
                descriptor(part, if accepted { CONVENTIONAL } else { LOADER_DATA })
            })?,
            e820::TYPE_ACPI => descriptor(span, ACPI_RECLAIM)?,
            e820::TYPE_NVS => descriptor(span, ACPI_NVS)?,
            _ => descriptor(span, RESERVED)?,
        }
    }
    let (map, len) = (layout::EFI_TABLES + MEMORY_MAP as u64, at - MEMORY_MAP);
    put(boot_params, EFI_INFO, *b"EL64")?;
    put(boot_params, EFI_INFO + 4, (layout::EFI_TABLES as u32).to_le_bytes())?;
    put(boot_params, EFI_INFO + 8, (DESCRIPTOR_LEN as u32).to_le_bytes())?;
    put(boot_params, EFI_INFO + 12, 1u32.to_le_bytes())?;
    put(boot_params, EFI_INFO + 16, (map as u32).to_le_bytes())?;
    put(boot_params, EFI_INFO + 20, (len as u32).to_le_bytes())
}

/// Writes the table of unaccepted memory: one bit for each 2 MiB of RAM that stage0 has not validated and no launch page lies
/// in. `table` is zero and lies at [`layout::UNACCEPTED`].
pub fn unaccepted(table: &mut [u8], inputs: Inputs<'_>) -> Result<(), Reason> {
    let top = inputs.spans(RAM).map(|span| span.end).max().unwrap_or(0);
    let bytes = top.div_ceil(LARGE).div_ceil(64) * 8;
    if bytes > (table.len() - BITMAP.min(table.len())) as u64 {
        return Err(Reason::LazyTables);
    }
    put(table, 0, 1u32.to_le_bytes())?;
    put(table, 4, (LARGE as u32).to_le_bytes())?;
    put(table, 16, bytes.to_le_bytes())?;
    for span in inputs.spans(RAM) {
        split(inputs, span, |part, accepted| {
            if accepted {
                return Ok(());
            }
            // Linux accepts whole units only: a part of one must have been validated here.
            if (part.start | part.end) & (LARGE - 1) != 0 {
                return Err(Reason::AcceptTable);
            }
            for unit in part.start / LARGE..part.end / LARGE {
                let byte = table.get_mut(BITMAP + (unit / 8) as usize).ok_or(Reason::LazyTables)?;
                *byte |= 1 << (unit % 8);
            }
            Ok(())
        })?;
    }
    Ok(())
}
