// SPDX-License-Identifier: Apache-2.0
//! The memory that a launch with firmware needs: the guest's RAM, and a region of its own for each run of
//! launch pages that lies outside of it, such as the firmware below 4 GiB.
//!
//! Every region becomes a memory slot with private memory of its own. The plan comes from a file, so it is
//! not believed: a page where devices are, beyond what a guest can address, or one of many scattered ones is
//! refused.

use std::ops::Range;

use crate::board::Board;
use crate::board::layout;
use crate::plan::Record;

/// Where no page may lie: IOAPIC and local APICs, whose registers are in the kernel.
const DEVICES: Range<u64> = layout::IOAPIC as u64..layout::LOCAL_APIC as u64 + 0x1000;
/// Most regions beside RAM.
const EXTRA_MAX: usize = 16;

/// Why a guest has no place for a page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RegionError {
    /// Where devices are.
    #[error("{name} at {gpa:#x}..{end:#x} covers the interrupt controllers at {:#x}..{:#x}", DEVICES.start, DEVICES.end)]
    Devices { name: String, gpa: u64, end: u64 },
    /// Beyond the address space.
    #[error("{name} at {gpa:#x}..{end:#x} lies beyond {limit:#x}, where this guest's addresses end")]
    Limit { name: String, gpa: u64, end: u64, limit: u64 },
    /// Too many pieces.
    #[error(
        "pages lie in more than {EXTRA_MAX} places outside of RAM, the last at {gpa:#x}; give more `memory`"
    )]
    Scattered { gpa: u64 },
}

/// RAM of `board`, and what `pages` need beside it, ascending and disjoint. `limit` is the end of the guest's
/// addresses.
pub fn regions<'a>(
    board: &Board,
    pages: impl Iterator<Item = &'a Record>,
    limit: u64,
) -> Result<Vec<Range<u64>>, RegionError> {
    let ram = board.ram();
    let mut extra: Vec<Range<u64>> = Vec::new();
    for record in pages {
        let (gpa, end) = (record.gpa, record.end());
        if end > limit {
            return Err(RegionError::Limit { name: record.name.to_string(), gpa, end, limit });
        }
        if gpa < DEVICES.end && DEVICES.start < end {
            return Err(RegionError::Devices { name: record.name.to_string(), gpa, end });
        }
        outside(gpa..end, &ram, &mut extra);
        if extra.len() > 2 * EXTRA_MAX {
            extra = merged(extra);
            if extra.len() > EXTRA_MAX {
                return Err(RegionError::Scattered { gpa });
            }
        }
    }
    let extra = merged(extra);
    if let Some(last) = extra.get(EXTRA_MAX) {
        return Err(RegionError::Scattered { gpa: last.start });
    }
    let mut all = [ram, extra].concat();
    all.sort_by_key(|range| range.start);
    Ok(all)
}

/// The parts of `range` that are not in `ram`.
fn outside(range: Range<u64>, ram: &[Range<u64>], parts: &mut Vec<Range<u64>>) {
    let mut at = range.start;
    for known in ram {
        if known.start >= range.end || known.end <= at {
            continue;
        }
        if at < known.start {
            parts.push(at..known.start);
        }
        at = known.end;
    }
    if at < range.end {
        parts.push(at..range.end);
    }
}

/// The same addresses as ranges that do not touch, ascending.
fn merged(mut parts: Vec<Range<u64>>) -> Vec<Range<u64>> {
    parts.sort_by_key(|part| part.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match merged.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => merged.push(part),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PageType;

    const LIMIT: u64 = 1 << 46;

    fn of(memory: u64, pages: &[(u64, u64)]) -> Result<Vec<Range<u64>>, RegionError> {
        let page = |&(gpa, len): &(u64, u64)| Record::empty(gpa, len, PageType::Zero, "page");
        let records: Vec<Record> = pages.iter().map(page).collect();
        regions(&Board::new(memory, 1), records.iter(), LIMIT)
    }

    #[test]
    fn firmware_below_4_gib_gets_a_region_of_its_own_and_pages_in_ram_none() {
        let flash = 0xffc0_0000;
        assert_eq!(
            of(4 << 30, &[(flash, 0x40_0000), (0x80_0000, 0x9000), (4 << 30, 0x1000)]),
            Ok(vec![0..3 << 30, flash..1 << 32, 1 << 32..5 << 30])
        );
        // Pages one after another, in any order, are one region; one that begins in RAM is cut.
        let top = 128 << 20;
        assert_eq!(
            of(top, &[(top + 0x1000, 0x1000), (top - 0x1000, 0x2000)]),
            Ok(vec![0..top, top..top + 0x2000])
        );
    }

    #[test]
    fn pages_where_no_memory_can_be_are_refused() {
        assert!(matches!(of(1 << 30, &[(0xfee0_0000, 0x1000)]), Err(RegionError::Devices { .. })));
        assert!(matches!(of(1 << 30, &[(0xfe00_0000, 0x200_0000)]), Err(RegionError::Devices { .. })));
        assert!(matches!(of(1 << 30, &[(LIMIT, 0x1000)]), Err(RegionError::Limit { .. })));
        assert!(matches!(of(1 << 30, &[(0, u64::MAX - 0xfff)]), Err(RegionError::Limit { .. })));
        let scattered: Vec<_> = (0..17).map(|i| ((1 << 30) + i * 0x2000, 0x1000)).collect();
        assert_eq!(of(1 << 30, &scattered), Err(RegionError::Scattered { gpa: (1 << 30) + 16 * 0x2000 }));
        let many: Vec<_> = (0..1000).map(|i| ((1 << 30) + i * 0x2000, 0x1000)).collect();
        assert!(matches!(of(1 << 30, &many), Err(RegionError::Scattered { .. })));
    }
}
