// SPDX-License-Identifier: Apache-2.0
//! The measured inputs of stage0: one page with memory ranges and with the items that it fetches from staging memory.
//!
//! The page is part of the launch digest, so its author is whoever computed the expected digest. It is checked in full all the
//! same before anything is done: a table that overlaps itself could make stage0 validate a page twice or write over itself,
//! which must not depend on the care of whoever wrote the table.
//!
//! | Offset | Content |
//! |---|---|
//! | 0 | magic, 8 bytes |
//! | 8 | address of the kernel's 64-bit entry |
//! | 16 | address of `boot_params` |
//! | 24 | flags: bit 0 lazy acceptance |
//! | 32 | number of RAM ranges, launch-page ranges, staging ranges, accept ranges, items: one byte each, then 27 bytes of zero |
//! | 64, 128, 192, 320 | those ranges: start and end, 8 bytes each; room for 4, 4, 8 and 8 |
//! | 448 | items of 88 bytes: kind u32, zero u32, source, target, length, length in memory u64, SHA-384 |
//!
//! All numbers are little-endian.

use super::layout;
use super::layout::LARGE;
use super::layout::PAGE;
use super::reason::Reason;

/// First bytes of the page.
pub const MAGIC: [u8; 8] = *b"cvmmST0\x01";
/// Flag: memory outside of the accept ranges is left to the kernel.
pub const FLAG_LAZY: u64 = 1;
/// Bytes of an item.
pub const ITEM_LEN: usize = 88;
/// Offset of the first item.
pub const ITEMS: usize = 448;
/// Largest number of items.
pub const ITEMS_MAX: usize = 16;
/// End of the addresses that a range may use.
pub const ADDRESS_END: u64 = 1 << 46;

/// Offset of the counts, offset of the ranges, largest count.
#[derive(Clone, Copy)]
pub struct List {
    /// Offset of the number of entries.
    pub count: usize,
    /// Offset of the first entry.
    pub at: usize,
    /// Room.
    pub max: usize,
}

/// RAM, ascending.
pub const RAM: List = List { count: 32, at: 64, max: 4 };
/// Pages of the launch: validated already.
pub const EXCLUDED: List = List { count: 33, at: 128, max: 4 };
/// Memory that is shared at launch: the GHCB page first, then what holds the items.
pub const STAGING: List = List { count: 34, at: 192, max: 8 };
/// With lazy acceptance, what stage0 validates.
pub const ACCEPT: List = List { count: 35, at: 320, max: 8 };
/// Offset of the number of items.
pub const ITEM_COUNT: usize = 36;

/// Addresses from `start` up to, not including, `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
}

impl Span {
    /// Both lie in one another's way.
    pub fn overlaps(self, other: Span) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// `other` lies wholly inside.
    pub fn contains(self, other: Span) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    fn aligned(self, unit: u64) -> bool {
        (self.start | self.end) & (unit - 1) == 0
    }
}

/// What an item is; decides the words of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Part of the kernel.
    Kernel = 1,
    /// Initial RAM disk.
    Initrd = 2,
    /// Command line.
    Cmdline = 3,
    /// `boot_params`, `setup_data` and the blob that they lead to.
    BootData = 4,
    /// ACPI tables.
    Acpi = 5,
}

impl Kind {
    fn from_number(number: u32) -> Option<Kind> {
        Some(match number {
            1 => Kind::Kernel,
            2 => Kind::Initrd,
            3 => Kind::Cmdline,
            4 => Kind::BootData,
            5 => Kind::Acpi,
            _ => return None,
        })
    }

    /// The refusal if the bytes are not those that were measured.
    pub fn mismatch(self) -> Reason {
        match self {
            Kind::Kernel => Reason::HashKernel,
            Kind::Initrd => Reason::HashInitrd,
            Kind::Cmdline => Reason::HashCmdline,
            Kind::BootData => Reason::HashBootData,
            Kind::Acpi => Reason::HashAcpi,
        }
    }
}

/// Bytes that the host stages and stage0 takes over if their hash is the measured one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it is.
    pub kind: Kind,
    /// Where the host put it.
    pub source: u64,
    /// Where it goes.
    pub target: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes at the target; those beyond `len` become zero.
    pub mem_len: u64,
    /// SHA-384 of the bytes.
    pub hash: [u8; 48],
}

impl Item {
    /// Where it lies in staging memory.
    pub fn source_span(&self) -> Option<Span> {
        Some(Span { start: self.source, end: self.source.checked_add(self.len)? })
    }

    /// Where it lies in the end.
    pub fn target_span(&self) -> Option<Span> {
        Some(Span { start: self.target, end: self.target.checked_add(self.mem_len)? })
    }
}

/// The little-endian number at `at`; zero beyond the end of `bytes`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    match bytes.get(at..).and_then(|rest| rest.first_chunk()) {
        Some(chunk) => u64::from_le_bytes(*chunk),
        None => 0,
    }
}

/// The little-endian number at `at`; zero beyond the end of `bytes`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..).and_then(|rest| rest.first_chunk()) {
        Some(chunk) => u32::from_le_bytes(*chunk),
        None => 0,
    }
}

/// A view of the page.
#[derive(Clone, Copy)]
pub struct Inputs<'a>(pub &'a [u8]);

impl<'a> Inputs<'a> {
    fn count(self, at: usize, max: usize) -> usize {
        match self.0.get(at) {
            Some(count) if usize::from(*count) <= max => usize::from(*count),
            _ => 0,
        }
    }

    /// The ranges of one list.
    pub fn spans(self, list: List) -> impl Iterator<Item = Span> + Clone + 'a {
        let count = self.count(list.count, list.max);
        (0..count).map(move |i| Span {
            start: u64_at(self.0, list.at + i * 16),
            end: u64_at(self.0, list.at + i * 16 + 8),
        })
    }

    /// The items; one of unknown kind is left out, which [`Inputs::check`] refuses.
    pub fn items(self) -> impl Iterator<Item = Item> + Clone + 'a {
        let count = self.count(ITEM_COUNT, ITEMS_MAX);
        (0..count).filter_map(move |i| {
            let bytes = self.0.get(ITEMS + i * ITEM_LEN..)?;
            Some(Item {
                kind: Kind::from_number(u32_at(bytes, 0))?,
                source: u64_at(bytes, 8),
                target: u64_at(bytes, 16),
                len: u64_at(bytes, 24),
                mem_len: u64_at(bytes, 32),
                hash: *bytes.get(40..)?.first_chunk()?,
            })
        })
    }

    /// Address of the kernel's first instruction.
    pub fn entry(self) -> u64 {
        u64_at(self.0, 8)
    }

    /// Address of `boot_params`.
    pub fn boot_params(self) -> u64 {
        u64_at(self.0, 16)
    }

    /// The kernel accepts most memory by itself.
    pub fn lazy(self) -> bool {
        u64_at(self.0, 24) == FLAG_LAZY
    }

    /// What stage0 validates, launch pages and staging memory aside.
    pub fn to_validate(self) -> List {
        if self.lazy() { ACCEPT } else { RAM }
    }

    /// Checks everything that the rest of stage0 relies on. `image_end` is the end of stage0's own pages.
    pub fn check(self, image_end: u64) -> Result<(), Reason> {
        self.check_header()?;
        self.check_list(RAM, PAGE, Reason::RamTable)?;
        if !self.spans(RAM).any(|s| s.start == 0 && s.end >= LARGE) {
            return Err(Reason::RamTable);
        }
        self.check_list(EXCLUDED, PAGE, Reason::ExcludedTable)?;
        let launched = [
            Span { start: layout::CPUID, end: layout::SECRETS + PAGE },
            Span { start: layout::INPUTS, end: image_end },
        ];
        if !self.spans(EXCLUDED).all(|s| self.inside(RAM, s))
            || !launched.into_iter().all(|s| self.inside(EXCLUDED, s))
            || self.spans(EXCLUDED).any(|s| SCRATCH.into_iter().any(|t| t.overlaps(s)))
        {
            return Err(Reason::ExcludedTable);
        }
        self.check_staging()?;
        self.check_accept()?;
        self.check_items()
    }

    fn check_header(self) -> Result<(), Reason> {
        let counts = [RAM, EXCLUDED, STAGING, ACCEPT].map(|list| (list.count, list.max));
        let within =
            |(at, max): (usize, usize)| self.0.get(at).is_some_and(|count| usize::from(*count) <= max);
        let known = self.0.len() as u64 == PAGE
            && self.0.starts_with(&MAGIC)
            && u64_at(self.0, 24) & !FLAG_LAZY == 0
            && counts.into_iter().all(within)
            && within((ITEM_COUNT, ITEMS_MAX))
            && self.0.get(ITEM_COUNT + 1..RAM.at).is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
        if known { Ok(()) } else { Err(Reason::InputsHeader) }
    }

    /// The list is ascending and disjoint, each range made of whole units inside the address space.
    fn check_list(self, list: List, unit: u64, reason: Reason) -> Result<(), Reason> {
        let mut last = 0;
        for span in self.spans(list) {
            if !span.aligned(unit) || span.start < last || span.start >= span.end || span.end > ADDRESS_END {
                return Err(reason);
            }
            last = span.end;
        }
        Ok(())
    }

    /// One range of the list holds all of `span`.
    pub fn inside(self, list: List, span: Span) -> bool {
        self.spans(list).any(|s| s.contains(span))
    }

    /// A range of the list shares an address with `span`.
    pub fn touches(self, list: List, span: Span) -> bool {
        self.spans(list).any(|s| s.overlaps(span))
    }

    fn check_staging(self) -> Result<(), Reason> {
        self.check_list(STAGING, PAGE, Reason::StagingTable)?;
        let ghcb = Span { start: layout::GHCB, end: layout::GHCB + PAGE };
        if self.spans(STAGING).next() != Some(ghcb) || self.touches(EXCLUDED, ghcb) {
            return Err(Reason::StagingTable);
        }
        for span in self.spans(STAGING).skip(1) {
            let good = span.aligned(LARGE)
                && span.start >= LARGE
                && self.inside(RAM, span)
                && span.end <= SHARED_END
                && !self.touches(EXCLUDED, span);
            if !good {
                return Err(Reason::StagingTable);
            }
        }
        Ok(())
    }

    /// With lazy acceptance the ranges lie in RAM and cover what is validated when the kernel starts: low memory, staging
    /// memory (which stage0 turns private), launch pages, and the items, which [`Inputs::check_items`] looks at.
    fn check_accept(self) -> Result<(), Reason> {
        self.check_list(ACCEPT, PAGE, Reason::AcceptTable)?;
        let low = Span { start: 0, end: LARGE };
        let good = if self.lazy() {
            self.inside(ACCEPT, low)
                && self.spans(ACCEPT).all(|s| self.inside(RAM, s))
                && self.spans(STAGING).all(|s| self.inside(ACCEPT, s))
                && self.spans(EXCLUDED).all(|s| self.inside(ACCEPT, s))
        } else {
            self.spans(ACCEPT).next().is_none()
        };
        if good { Ok(()) } else { Err(Reason::AcceptTable) }
    }

    fn check_items(self) -> Result<(), Reason> {
        if self.items().count() != self.count(ITEM_COUNT, ITEMS_MAX) {
            return Err(Reason::ItemTable);
        }
        for (i, item) in self.items().enumerate() {
            if item.len == 0 || item.mem_len < item.len {
                return Err(Reason::ItemTable);
            }
            let (Some(source), Some(target)) = (item.source_span(), item.target_span()) else {
                return Err(Reason::ItemTable);
            };
            if !self.spans(STAGING).skip(1).any(|s| s.contains(source)) {
                return Err(Reason::ItemSource);
            }
            let others = self.items().take(i).filter_map(|other| other.target_span());
            let free = self.inside(self.to_validate(), target)
                && target.end <= SHARED_END
                && !self.touches(EXCLUDED, target)
                && !self.touches(STAGING, target)
                && !SCRATCH.into_iter().any(|s| s.overlaps(target))
                && !others.into_iter().any(|other| other.overlaps(target));
            if !free {
                return Err(Reason::ItemTarget);
            }
        }
        let holds = |kind, start: u64, len: u64| {
            start.checked_add(len).is_some_and(|end| {
                self.items().any(|item| {
                    item.kind == kind && item.target_span().is_some_and(|s| s.contains(Span { start, end }))
                })
            })
        };
        if !holds(Kind::Kernel, self.entry(), 1) {
            return Err(Reason::EntryPoint);
        }
        if !holds(Kind::BootData, self.boot_params(), PAGE) {
            return Err(Reason::ItemTable);
        }
        Ok(())
    }

    /// The first range that is not to be validated like other RAM and that ends after `at`.
    fn next_hole(self, at: u64) -> Option<Span> {
        let holes = self.spans(EXCLUDED).chain(self.spans(STAGING)).chain([WORK]);
        let mut first: Option<Span> = None;
        for hole in holes.filter(|hole| hole.end > at) {
            if first.is_none_or(|f| hole.start < f.start) {
                first = Some(hole);
            }
        }
        first
    }

    /// The first run of pages in `span`, from `at` on, that is neither launched nor shared nor stage0's scratch memory.
    pub fn next_piece(self, span: Span, at: u64) -> Option<Span> {
        let mut start = at.max(span.start);
        while start < span.end {
            match self.next_hole(start) {
                Some(hole) if hole.start <= start => start = hole.end,
                Some(hole) => return Some(Span { start, end: hole.start.min(span.end) }),
                None => return Some(Span { start, end: span.end }),
            }
        }
        None
    }
}

/// Staging memory and items lie below 4 GiB, where stage0 has both views mapped.
const SHARED_END: u64 = 4 << 30;
/// stage0's scratch memory.
const WORK: Span = Span { start: layout::WORK, end: layout::WORK_END };
/// What no item and no launch page may use.
const SCRATCH: [Span; 3] = [
    WORK,
    Span { start: layout::EFI_TABLES, end: layout::EFI_TABLES_END },
    Span { start: layout::UNACCEPTED, end: layout::UNACCEPTED_END },
];
