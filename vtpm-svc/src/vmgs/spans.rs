// SPDX-License-Identifier: Apache-2.0
//! Sets of blocks, as disjoint ranges: an image may be sparse and claim far more blocks than it has bytes on
//! disk, so nothing here is as large as what is claimed.

use std::ops::Range;

use super::format::Entry;
use super::format::FileTable;
use super::format::Header;

/// Disjoint ranges of blocks in ascending order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans(Vec<Range<u32>>);

impl Spans {
    /// From ranges in any order that may touch or overlap.
    pub fn new(mut ranges: Vec<Range<u32>>) -> Self {
        ranges.retain(|r| r.start < r.end);
        ranges.sort_by_key(|r| r.start);
        let mut out: Vec<Range<u32>> = Vec::with_capacity(ranges.len());
        for r in ranges {
            match out.last_mut() {
                Some(last) if r.start <= last.end => last.end = last.end.max(r.end),
                _ => out.push(r),
            }
        }
        Self(out)
    }

    /// What a header and its table name.
    pub fn named(header: &Header, table: &FileTable) -> Self {
        let range = |e: &Entry| e.block..e.block.saturating_add(e.blocks);
        let mut ranges: Vec<_> = table.0.iter().filter(|e| e.exists()).map(range).collect();
        ranges.push(header.table_block..header.table_block.saturating_add(1));
        Self::new(ranges)
    }

    /// Both together.
    pub fn union(&self, other: &Self) -> Self {
        Self::new(self.0.iter().chain(&other.0).cloned().collect())
    }

    /// What lies between them, from `first` up to `end`.
    pub fn gaps(&self, first: u32, end: u32) -> Vec<Range<u32>> {
        let mut out = Vec::new();
        let mut start = first;
        for r in self.0.iter().filter(|r| r.end > first) {
            if r.start.min(end) > start {
                out.push(start..r.start.min(end));
            }
            start = start.max(r.end);
        }
        if start < end {
            out.push(start..end);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_and_what_lies_between_them_is_found() {
        let a = Spans::new(vec![6..7, 2..4, 3..5]);
        assert_eq!(a.gaps(2, 10), [5..6, 7..10]);
        assert_eq!(a.gaps(0, 6), [0..2, 5..6]);
        assert_eq!(a.union(&Spans::new(vec![5..6, 9..12])).gaps(2, 14), [7..9, 12..14]);
        assert_eq!(Spans::default().gaps(2, 4).first(), Some(&(2..4)));
    }
}
