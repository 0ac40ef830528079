// SPDX-License-Identifier: Apache-2.0
//! Page-state changes: the guest asks for a range to become shared or private, and the stale side is given
//! back.
//!
//! Arrives as `HYPERCALL(KVM_HC_MAP_GPA_RANGE)` (Linux, `Documentation/virt/kvm/x86/hypercalls.rst`). The
//! guest chooses every argument. KVM checks only alignment and wrap-around, so everything else is checked
//! here; nothing is changed unless the whole range is RAM. Freeing the stale side is not optional: without it
//! a guest that converts pages back and forth takes twice its memory.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use kvm_bindings::kvm_memory_attributes;
use rustix::fs::FallocateFlags;

use crate::lock::lock;
use crate::machine::ram::GuestRam;
use crate::machine::ram::Part;
use crate::machine::ram::Region;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::MAP_GPA_RANGE_ENCRYPTED;
use crate::platform::Vm;
use crate::platform::mapping::PAGE;

/// Bits of the third argument that have a meaning: page-size hint and direction.
const KNOWN_ATTRIBUTES: u64 = 0xf | MAP_GPA_RANGE_ENCRYPTED;
/// Why a page-state change was not made.
#[derive(Debug)]
pub enum NotConverted {
    /// The guest asked for something that is not there to be given.
    Refused,
    /// The host failed. The range may be changed in part.
    Host(io::Error),
}

/// What a range is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// By one holder alone.
    Conversion,
    /// By any number. One more is let in even while a conversion waits, because it may belong to a holder
    /// that is there already.
    Access,
}

/// Ranges that are converted or accessed now. Two vCPUs may ask for overlapping ranges; others need not wait.
#[derive(Default)]
struct Busy {
    ranges: Mutex<Ranges>,
    freed: Condvar,
}

#[derive(Default)]
struct Ranges {
    held: Vec<(Range<u64>, Use)>,
    waiting: usize,
}

/// A range that is held, until this is dropped.
pub struct Held<'a> {
    busy: &'a Busy,
    range: Range<u64>,
    purpose: Use,
}

impl Busy {
    fn lock(&self, range: Range<u64>, purpose: Use) -> Held<'_> {
        let excludes = |(other, theirs): &(Range<u64>, Use)| {
            other.start < range.end
                && range.start < other.end
                && (purpose, *theirs) != (Use::Access, Use::Access)
        };
        let mut ranges = lock(&self.ranges);
        while ranges.held.iter().any(excludes) {
            ranges.waiting += 1;
            ranges = self.freed.wait(ranges).unwrap_or_else(PoisonError::into_inner);
            ranges.waiting -= 1;
        }
        ranges.held.push((range.clone(), purpose));
        Held { busy: self, range, purpose }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut ranges = lock(&self.busy.ranges);
        let ours = |held: &(Range<u64>, Use)| held.0 == self.range && held.1 == self.purpose;
        if let Some(at) = ranges.held.iter().position(ours) {
            ranges.held.swap_remove(at);
        }
        if ranges.waiting > 0 {
            self.busy.freed.notify_all();
        }
    }
}

impl fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x?} for {:?}", self.range, self.purpose)
    }
}

/// The monitor's own record of which pages are private; KVM has no call to ask.
struct PrivateMap {
    /// In the order of RAM.
    regions: Vec<Bitmap>,
}

/// The pages of one region, a bit each, set = private.
struct Bitmap {
    pages: u64,
    words: Vec<AtomicU64>,
}

impl PrivateMap {
    /// A map of `ram` in which every page is private.
    fn all_private(ram: &GuestRam) -> Self {
        let bitmap = |r: &Region| {
            let pages = r.mapping.len() / PAGE;
            Bitmap { pages, words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(u64::MAX)).collect() }
        };
        PrivateMap { regions: ram.regions().iter().map(bitmap).collect() }
    }

    fn set(&self, region: usize, offset: u64, len: u64, private: bool) {
        let Some(bitmap) = self.regions.get(region) else { return };
        for page in offset / PAGE..(offset + len) / PAGE {
            let (word, mask) = ((page / 64) as usize, 1 << (page % 64));
            match bitmap.words.get(word) {
                Some(cell) if private => cell.fetch_or(mask, Ordering::AcqRel),
                Some(cell) => cell.fetch_and(!mask, Ordering::AcqRel),
                None => 0,
            };
        }
    }

    /// Whether a page of a region is private; `None` outside of it.
    fn page(&self, region: usize, page: u64) -> Option<bool> {
        let bitmap = self.regions.get(region).filter(|bitmap| page < bitmap.pages)?;
        Some(bitmap.words.get((page / 64) as usize)?.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }
}

/// What the monitor knows of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeState {
    /// Every page is private.
    Private,
    /// Every page is shared.
    Shared,
    /// Both are there.
    Mixed,
    /// It is empty, or not all of it is RAM.
    NotRam,
}

/// Carries out page-state changes.
pub struct Conversions {
    vm: Arc<dyn Vm>,
    ram: GuestRam,
    /// The private side of each region of `ram`, from offset 0.
    memfds: Vec<Arc<OwnedFd>>,
    /// Each side of a page has memory of its own.
    apart: bool,
    private: PrivateMap,
    busy: Busy,
}

impl Conversions {
    /// For a guest whose RAM is all private now, but for the ranges in `shared`.
    pub fn new(vm: Arc<dyn Vm>, ram: GuestRam, memfds: Vec<Arc<OwnedFd>>, shared: &[Range<u64>]) -> Self {
        let private = PrivateMap::all_private(&ram);
        for range in shared {
            // Staged memory is RAM, or the launch would have failed.
            for part in ram.parts(range.start, range.end - range.start).into_iter().flatten() {
                private.set(part.region, part.offset, part.len, false);
            }
        }
        Conversions { apart: vm.backs_sides_apart(), vm, ram, memfds, private, busy: Busy::default() }
    }

    /// Carries out `KVM_HC_MAP_GPA_RANGE`.
    pub fn map_gpa_range(&self, args: [u64; 6]) -> Result<(), NotConverted> {
        let [gpa, pages, attributes, ..] = args;
        let len = pages.checked_mul(PAGE).ok_or(NotConverted::Refused)?;
        if attributes & !KNOWN_ATTRIBUTES != 0 || gpa % PAGE != 0 || len == 0 {
            return Err(NotConverted::Refused);
        }
        self.convert(gpa, len, attributes & MAP_GPA_RANGE_ENCRYPTED != 0).map_err(|e| {
            match e.raw_os_error() {
                // A range that is not RAM has no errno.
                None => NotConverted::Refused,
                Some(_) => NotConverted::Host(e),
            }
        })
    }

    /// Makes a range private or shared and gives the other side back to the host.
    pub fn convert(&self, gpa: u64, len: u64, private: bool) -> io::Result<()> {
        let end = gpa.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let _alone = self.busy.lock(gpa..end, Use::Conversion);
        for Part { region, offset, done, len } in self.ram.parts(gpa, len)? {
            // Devices are kept away before the page is closed to them, and stay away if that fails half-way.
            if private {
                self.private.set(region, offset, len, true);
            }
            self.vm
                .set_memory_attributes(kvm_memory_attributes {
                    address: gpa + done,
                    size: len,
                    attributes: if private { ATTRIBUTE_PRIVATE } else { 0 },
                    flags: 0,
                })
                .map_err(|e| e.source)?;
            // KVM's state has changed, whatever becomes of the stale side.
            if private {
                self.ram.regions()[region].mapping.discard(offset, len)?;
                continue;
            }
            self.private.set(region, offset, len, false);
            if let Some(memfd) = self.memfds.get(region) {
                rustix::fs::fallocate(
                    memfd,
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    offset,
                    len,
                )?;
            }
        }
        Ok(())
    }

    /// Keeps a range shared, for the host to access it, as long as the result lives; `None` if it is not
    /// shared now. What is written to a page that has become private meanwhile would take host memory that
    /// nothing gives back, and what is read of it may not be there. Conversions of the range wait meanwhile,
    /// so this is for copies, never for what waits for somebody else.
    pub fn hold_shared(&self, gpa: u64, len: u64) -> Option<Held<'_>> {
        let held = self.busy.lock(gpa..gpa.checked_add(len)?, Use::Access);
        (self.state(gpa, len) == RangeState::Shared).then_some(held)
    }

    /// Gives the shared side of pages back that have become private while somebody wrote to them, if they
    /// have one of their own.
    pub fn settle(&self, gpa: u64, len: u64) -> io::Result<()> {
        if !self.apart || matches!(self.state(gpa, len), RangeState::Shared | RangeState::NotRam) {
            return Ok(());
        }
        for Part { region, offset, len, .. } in self.ram.parts(gpa, len)? {
            let known = &self.ram.regions()[region];
            let private = |page| self.private.page(region, page) == Some(true);
            for page in (offset / PAGE..(offset + len).div_ceil(PAGE)).filter(|page| private(*page)) {
                // Each alone: a private page is never held for a copy, but its neighbours may be, by the caller too.
                let start = known.gpa + page * PAGE;
                let _alone = self.busy.lock(start..start + PAGE, Use::Conversion);
                if private(page) {
                    known.mapping.discard(page * PAGE, PAGE)?;
                }
            }
        }
        Ok(())
    }

    /// The monitor's view of a range.
    pub fn state(&self, gpa: u64, len: u64) -> RangeState {
        let Ok(parts) = self.ram.parts(gpa, len) else { return RangeState::NotRam };
        let mut found = None;
        for Part { region, offset, len, .. } in parts {
            let pages = offset / PAGE..(offset + len).div_ceil(PAGE);
            for private in pages.filter_map(|page| self.private.page(region, page)) {
                let state = if private { RangeState::Private } else { RangeState::Shared };
                found = Some(if found.is_none_or(|f| f == state) { state } else { RangeState::Mixed });
            }
        }
        found.unwrap_or(RangeState::NotRam)
    }
}

#[cfg(test)]
#[path = "conversion_test.rs"]
mod tests;
