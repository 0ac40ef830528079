// SPDX-License-Identifier: Apache-2.0
//! Page-state changes by GHCB page: from a buffer of entries to exits of merged ranges.
//!
//! Stands for `snp_begin_psc`, `__snp_complete_one_psc` and `snp_complete_psc` of Linux 6.12 and 7.3, and
//! keeps to their merging, because the monitor shall see the exits that it would see on hardware. As in
//! 6.12.117 and 7.3.4 the header must lie in the GHCB's shared buffer, and what does not fit behind it is not
//! read. One difference: entries are copied once, where KVM reads them again for each range.

use snp::ghcb::msr::PageOperation;
use snp::ghcb::page;
use snp::ghcb::psc;
use snp::ghcb::psc::Entry;
use snp::ghcb::psc::Header;
use snp::plan::PAGE_SIZE;

use crate::exchange::Guest;
use crate::outcome::MAP_GPA_ENCRYPTED;
use crate::outcome::MAP_GPA_SIZE_2M;
use crate::outcome::MapGpaRange;

/// A buffer that is being worked on.
#[derive(Debug)]
pub(crate) struct Psc {
    gpa: u64,
    header: Header,
    entries: Vec<Entry>,
    raw: Vec<u64>,
    /// Entries whose range is with the monitor.
    in_flight: std::ops::Range<usize>,
    /// Entries to write back.
    touched: Vec<usize>,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask the monitor for this range, then call [`Psc::range_done`].
    Exit(MapGpaRange),
    /// Nothing is left, or an error: exit info 2.
    End(u64),
}

impl Psc {
    /// Copies the buffer at `scratch` from `ghcb`, the copy of the page at `ghcb_gpa`. `None` if the buffer
    /// does not lie in the shared buffer.
    pub fn new(ghcb: &[u8; page::SIZE], ghcb_gpa: u64, scratch: u64) -> Option<Self> {
        let offset = usize::try_from(scratch.checked_sub(ghcb_gpa)?).ok()?;
        if offset < page::SHARED_BUFFER {
            return None;
        }
        let mut words = ghcb.get(offset..page::SHARED_BUFFER_END)?.chunks_exact(psc::ENTRY_LEN).map(|word| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(word);
            bytes
        });
        let header = Header::decode(words.next()?);
        let raw: Vec<u64> = words.map(u64::from_le_bytes).collect();
        let entries = raw.iter().map(|value| Entry::decode(*value)).collect();
        Some(Psc { gpa: scratch, header, entries, raw, in_flight: 0..0, touched: Vec::new() })
    }

    /// `snp_begin_psc`: the next range for the monitor.
    pub fn next(&mut self) -> Step {
        loop {
            let end = usize::from(self.header.end);
            if end >= self.entries.len() {
                return Step::End(psc::ERROR_INVALID_HEADER);
            }
            let mut found = None;
            for (idx, entry) in self.entries.iter().enumerate().take(end + 1).skip(self.header.current.into())
            {
                let pages = u64::from(entry.pages());
                let done = u64::from(entry.done);
                if done > pages || !entry.frame.is_multiple_of(pages) {
                    return Step::End(psc::ERROR_INVALID_ENTRY);
                }
                if done < pages {
                    found = Some((idx, *entry, pages - done));
                    break;
                }
                self.header.current += 1;
            }
            let Some((first, start, mut pages)) = found else { return Step::End(0) };
            // The rest of a page that is partly done is handled in 4 KiB pages, on its own.
            let huge = start.huge && start.done == 0;
            let mut last = first;
            for entry in self.entries.iter().take(end + 1).skip(first + 1) {
                let adjacent = entry.frame == start.frame + pages;
                if entry.operation != start.operation || !adjacent || entry.done != 0 || entry.huge != huge {
                    break;
                }
                last += 1;
                pages += u64::from(entry.pages());
            }
            self.in_flight = first..last + 1;
            let encrypted = match start.operation {
                PageOperation::Private => MAP_GPA_ENCRYPTED,
                PageOperation::Shared => 0,
                // KVM takes other operations as done.
                PageOperation::Other(_) => {
                    self.range_done();
                    continue;
                }
            };
            let size = if start.huge { MAP_GPA_SIZE_2M } else { 0 };
            return Step::Exit(MapGpaRange {
                gpa: (start.frame + u64::from(start.done)) * PAGE_SIZE,
                pages,
                attributes: encrypted | size,
            });
        }
    }

    /// `__snp_complete_one_psc`: the monitor has changed the range.
    pub fn range_done(&mut self) {
        let done = std::mem::take(&mut self.in_flight);
        // At most 253 entries, so the index fits.
        self.header.current = u16::try_from(done.end).unwrap_or(u16::MAX);
        for idx in done {
            if let (Some(entry), Some(raw)) = (self.entries.get_mut(idx), self.raw.get_mut(idx)) {
                entry.done = entry.pages();
                *raw = *raw & !0xfff | u64::from(entry.done);
                self.touched.push(idx);
            }
        }
    }

    /// Shows the guest how far the work came.
    pub fn write_back(&self, guest: Guest) {
        for (idx, raw) in self.touched.iter().filter_map(|idx| Some((*idx, self.raw.get(*idx)?))) {
            let at = self.gpa + (psc::HEADER_LEN + idx * psc::ENTRY_LEN) as u64;
            if !guest.write(at, &raw.to_le_bytes()) {
                return;
            }
        }
        guest.write(self.gpa, &self.header.current.to_le_bytes());
    }
}
