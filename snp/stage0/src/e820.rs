// SPDX-License-Identifier: Apache-2.0
//! The check of the memory map that Linux will believe.
//!
//! Linux takes every e820 entry of type RAM for memory that it may use at once. The map is measured, but it comes from a
//! program on the host, so stage0 holds it against the RAM that it validated: nothing that is not RAM may be called RAM, and
//! neither stage0 nor a launch page may be given away. A `setup_data` element can add entries to the map (Linux,
//! `arch/x86/kernel/e820.c`, `e820__memory_setup_extended`), so the list of them is walked and none may.

use super::inputs::EXCLUDED;
use super::inputs::Inputs;
use super::inputs::Kind;
use super::inputs::RAM;
use super::inputs::Span;
use super::inputs::u32_at;
use super::inputs::u64_at;
use super::layout;
use super::reason::Reason;

/// Offset of the number of entries in `boot_params`.
pub const ENTRIES: usize = 0x1e8;
/// Offset of the table in `boot_params`.
pub const TABLE: usize = 0x2d0;
/// Bytes of an entry: address, length, type.
pub const ENTRY_LEN: usize = 20;
/// Room in `boot_params`.
pub const ENTRIES_MAX: usize = 128;

/// Usable memory.
pub const TYPE_RAM: u32 = 1;
/// Not to be touched.
pub const TYPE_RESERVED: u32 = 2;
/// ACPI tables, which Linux maps private.
pub const TYPE_ACPI: u32 = 3;
/// Memory of ACPI firmware.
pub const TYPE_NVS: u32 = 4;

/// Offset of the address of the first `setup_data` element in `boot_params`.
pub const SETUP_DATA: usize = 0x250;
/// Bytes of an element's header: address of the next one, type, length of what follows.
pub const SETUP_DATA_LEN: u64 = 16;
/// Largest number of elements; a longer list may be a circle.
pub const SETUP_DATA_MAX: usize = 16;
/// The type of an element that adds entries to the map.
pub const SETUP_E820_EXT: u32 = 1;

/// What Linux must not use as RAM beside the launch pages: the EFI tables and the GHCB page.
const KEPT: Span = Span { start: layout::EFI_TABLES, end: layout::BLOCK_END };

/// The entries of `boot_params` as they stand: start, length, type.
pub fn entries(boot_params: &[u8]) -> impl Iterator<Item = (u64, u64, u32)> + Clone {
    let count = boot_params.get(ENTRIES).map_or(0, |count| usize::from(*count)).min(ENTRIES_MAX);
    (0..count).map(move |i| {
        let at = TABLE + i * ENTRY_LEN;
        (u64_at(boot_params, at), u64_at(boot_params, at + 8), u32_at(boot_params, at + 16))
    })
}

/// Checks the map in `boot_params` against the measured ranges.
pub fn check(boot_params: &[u8], inputs: Inputs<'_>) -> Result<(), Reason> {
    match boot_params.get(ENTRIES) {
        Some(count) if (1..=ENTRIES_MAX).contains(&usize::from(*count)) => {}
        _ => return Err(Reason::E820Count),
    }
    let mut last = 0;
    for (start, len, kind) in entries(boot_params) {
        let Some(end) = start.checked_add(len) else {
            return Err(Reason::E820Overflow);
        };
        if len == 0 {
            return Err(Reason::E820Overflow);
        }
        if start < last {
            return Err(Reason::E820Overlap);
        }
        last = end;
        let span = Span { start, end };
        match kind {
            TYPE_RAM | TYPE_ACPI if !inputs.inside(RAM, span) => return Err(Reason::E820NotRam),
            TYPE_RAM | TYPE_ACPI if inputs.touches(EXCLUDED, span) || KEPT.overlaps(span) => {
                return Err(Reason::E820CoversStage0);
            }
            TYPE_RAM | TYPE_RESERVED | TYPE_ACPI | TYPE_NVS => {}
            _ => return Err(Reason::E820Type),
        }
    }
    Ok(())
}

/// Walks the `setup_data` list that begins in `boot_params`. Each element lies in measured boot data, the list ends, and none
/// adds to the map. `header` gives the first [`SETUP_DATA_LEN`] bytes of the element at an address in such data.
pub fn check_setup_data<'h>(
    boot_params: &[u8],
    inputs: Inputs<'_>,
    header: impl Fn(u64) -> &'h [u8],
) -> Result<(), Reason> {
    let measured = |start: u64, len: u64| {
        start.checked_add(len).is_some_and(|end| {
            let wanted = Span { start, end };
            let mut data = inputs.items().filter(|item| item.kind == Kind::BootData);
            data.any(|item| item.target_span().is_some_and(|span| span.contains(wanted)))
        })
    };
    let mut at = u64_at(boot_params, SETUP_DATA);
    for _ in 0..SETUP_DATA_MAX {
        if at == 0 {
            return Ok(());
        }
        if !measured(at, SETUP_DATA_LEN) {
            return Err(Reason::SetupData);
        }
        let element = header(at);
        let (next, kind, len) = (u64_at(element, 0), u32_at(element, 8), u32_at(element, 12));
        if kind == SETUP_E820_EXT || !measured(at, SETUP_DATA_LEN + u64::from(len)) {
            return Err(Reason::SetupData);
        }
        at = next;
    }
    Err(Reason::SetupData)
}
