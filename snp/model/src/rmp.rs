// SPDX-License-Identifier: Apache-2.0
//! The state of each 4 KiB page: the monitor's private attribute, and what the RMP would hold about it.
//!
//! AMD64 Architecture Programmer's Manual, volume 2, section 15.36 (RMP), and volume 3, `PVALIDATE` and
//! `RMPADJUST`. The attribute is set by the monitor (`KVM_SET_MEMORY_ATTRIBUTES`); a page becomes validated
//! only by `PVALIDATE` or by `SNP_LAUNCH_UPDATE`, and stops being so by `PVALIDATE` or by a change to shared.
//! One byte per page: 4 MiB for a guest of 16 GiB. Each page's byte changes atomically, so vCPUs need no lock
//! here.
//!
//! What a correct guest never does is not refused where hardware would let it pass, but recorded as a
//! [`Finding`].

use std::fmt;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use snp::plan::PAGE_SIZE;

/// 4 KiB pages of a 2 MiB page.
pub const PAGES_2M: u64 = 512;
/// Memory slots that KVM takes on x86: `KVM_USER_MEM_SLOTS`, that is `SHRT_MAX` without the three that KVM
/// keeps for itself (Linux 6.1 and 7.3, `include/linux/kvm_host.h`, `arch/x86/include/asm/kvm_host.h`).
pub const MAX_SLOTS: usize = 32_764;
/// Slots for which there is room from the start; each further part has room for twice as many as the one
/// before.
const FIRST_PART: usize = 32;
/// Parts that hold [`MAX_SLOTS`].
const PARTS: usize = part_of(MAX_SLOTS - 1).0 + 1;
/// Findings kept with their details; further ones are only counted.
const FINDINGS_KEPT: usize = 1000;

/// `PVALIDATE` and `RMPADJUST` result in EAX: done.
pub const SUCCESS: u32 = 0;
/// An operand has a value that is not allowed.
pub const FAIL_INPUT: u32 = 1;
/// The caller's VMPL does not allow it.
pub const FAIL_PERMISSION: u32 = 2;
/// The RMP entry has another page size than the operand.
pub const FAIL_SIZE_MISMATCH: u32 = 6;

const PRIVATE: u8 = 1 << 0;
const ASSIGNED: u8 = 1 << 1;
const VALIDATED: u8 = 1 << 2;
const VMSA: u8 = 1 << 3;
const LAUNCHED: u8 = 1 << 4;

/// What is known about one page.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct PageState(u8);

impl PageState {
    /// The monitor's attribute says private.
    pub fn private(self) -> bool {
        self.0 & PRIVATE != 0
    }
    /// The page belongs to the guest in the RMP. KVM assigns a private page when it is first touched.
    pub fn assigned(self) -> bool {
        self.0 & ASSIGNED != 0
    }
    /// The guest, or the launch, has validated the page.
    pub fn validated(self) -> bool {
        self.0 & VALIDATED != 0
    }
    /// The guest has marked the page as a VMSA.
    pub fn vmsa(self) -> bool {
        self.0 & VMSA != 0
    }
    /// The page came by `SNP_LAUNCH_UPDATE`, hence with a 4 KiB RMP entry.
    pub fn launched(self) -> bool {
        self.0 & LAUNCHED != 0
    }
    /// The guest may use the page's private view.
    pub fn usable(self) -> bool {
        self.0 & (PRIVATE | VALIDATED) == PRIVATE | VALIDATED
    }
}

impl fmt::Debug for PageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.private() { "private" } else { "shared" })?;
        for (set, word) in [
            (self.assigned(), " assigned"),
            (self.validated(), " validated"),
            (self.vmsa(), " VMSA"),
            (self.launched(), " launched"),
        ] {
            f.write_str(if set { word } else { "" })?;
        }
        Ok(())
    }
}

/// What the RMP says to a `PVALIDATE` of 2 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TwoMib {
    /// All RMP entries are of 4 KiB, as on a host with Linux 6.12: the guest has to fall back to 4 KiB.
    #[default]
    SizeMismatch,
    /// 2 MiB entries exist where all 512 pages are in one state and none came by the launch.
    Accept,
}

/// Something that a correct guest (or monitor) does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// `PVALIDATE` to the state that the page already had: CF was set.
    NoChange {
        /// The page.
        gpa: u64,
        /// Whether it was to be validated.
        validate: bool,
    },
    /// `PVALIDATE` or `RMPADJUST` through a mapping without the C-bit.
    SharedMapping {
        /// The page.
        gpa: u64,
    },
    /// `PVALIDATE` or `RMPADJUST` of a page whose attribute is shared, or outside of RAM.
    NotPrivate {
        /// The page.
        gpa: u64,
    },
    /// `RMPADJUST` of a page that is not validated.
    NotValidated {
        /// The page.
        gpa: u64,
    },
    /// A change to shared of a page that the guest had not un-validated first.
    ToSharedWhileValidated {
        /// The page.
        gpa: u64,
    },
    /// A change to shared of a page that is a VMSA.
    ToSharedWhileVmsa {
        /// The page.
        gpa: u64,
    },
    /// The guest gave the hypervisor an address that is not shared RAM.
    BufferNotShared {
        /// The page.
        gpa: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::NoChange { gpa, validate: true } => {
                write!(f, "page {gpa:#x} was validated twice")
            }
            Finding::NoChange { gpa, validate: false } => {
                write!(f, "page {gpa:#x} was un-validated although it was not validated")
            }
            Finding::SharedMapping { gpa } => {
                write!(f, "page {gpa:#x}: PVALIDATE or RMPADJUST through a mapping without the C-bit")
            }
            Finding::NotPrivate { gpa } => {
                write!(f, "page {gpa:#x}: PVALIDATE or RMPADJUST, but it is not private RAM")
            }
            Finding::NotValidated { gpa } => {
                write!(f, "page {gpa:#x}: RMPADJUST, but it is not validated")
            }
            Finding::ToSharedWhileValidated { gpa } => {
                write!(f, "page {gpa:#x} became shared while still validated")
            }
            Finding::ToSharedWhileVmsa { gpa } => {
                write!(f, "page {gpa:#x} became shared while it was a VMSA")
            }
            Finding::BufferNotShared { gpa } => {
                write!(f, "page {gpa:#x} was given to the hypervisor, but it is not shared RAM")
            }
        }
    }
}

/// How often what happened. Page counts are in 4 KiB pages, call counts in calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// `PVALIDATE` calls.
    pub pvalidate_calls: u64,
    /// Of these, calls for 2 MiB that were done.
    pub pvalidate_2m: u64,
    /// Of these, calls that were answered with a size mismatch.
    pub pvalidate_size_mismatch: u64,
    /// Pages that became validated by `PVALIDATE`.
    pub validated: u64,
    /// Pages that became un-validated by `PVALIDATE`.
    pub cleared: u64,
    /// `PVALIDATE` calls that changed nothing (CF set).
    pub no_change: u64,
    /// `RMPADJUST` calls.
    pub rmpadjust_calls: u64,
    /// Pages whose attribute became private.
    pub to_private: u64,
    /// Pages whose attribute became shared.
    pub to_shared: u64,
    /// Pages that came by `SNP_LAUNCH_UPDATE`.
    pub launched: u64,
    /// All findings, kept or not.
    pub findings: u64,
}

#[derive(Debug, Default)]
struct Counters {
    pvalidate_calls: AtomicU64,
    pvalidate_2m: AtomicU64,
    pvalidate_size_mismatch: AtomicU64,
    validated: AtomicU64,
    cleared: AtomicU64,
    no_change: AtomicU64,
    rmpadjust_calls: AtomicU64,
    to_private: AtomicU64,
    to_shared: AtomicU64,
    launched: AtomicU64,
    findings: AtomicU64,
}

fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

/// What `PVALIDATE` or `RMPADJUST` comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionResult {
    /// The instruction ends: EAX, and CF (always clear for `RMPADJUST`). OF, SF, ZF, AF and PF become clear.
    Done {
        /// Result code.
        eax: u32,
        /// "The page was in that state already".
        carry: bool,
    },
    /// The page is not private RAM: a nested page fault, which KVM shows as a `MEMORY_FAULT` exit of a
    /// private access.
    NestedFault {
        /// Address of the page.
        gpa: u64,
    },
    /// The page is private but not validated: #VC with error code 0x404 in the guest.
    NotValidated {
        /// Address of the page.
        gpa: u64,
    },
}

impl InstructionResult {
    const fn done(eax: u32) -> Self {
        InstructionResult::Done { eax, carry: false }
    }
}

/// What a change of the private attribute did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttributeChange {
    /// Pages of RAM whose attribute is different now.
    pub changed: u64,
    /// Pages of the range that are not RAM; KVM accepts those too.
    pub outside_ram: u64,
}

/// Why a page cannot enter the guest by `SNP_LAUNCH_UPDATE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchRefusal {
    /// Not RAM.
    OutsideRam,
    /// The private attribute is not set.
    NotPrivate,
    /// The page was populated before.
    Assigned,
}

#[derive(Debug)]
struct Region {
    first: u64,
    pages: Box<[AtomicU8]>,
}

/// The part in which region `index` is, and its place there.
const fn part_of(index: usize) -> (usize, usize) {
    let part = (index / FIRST_PART + 1).ilog2() as usize;
    (part, index - FIRST_PART * ((1 << part) - 1))
}

/// Page states of all guest RAM. Shared by all vCPUs.
#[derive(Debug)]
pub struct PageStates {
    // Filled from the front, and never emptied or moved: vCPUs read it without a lock.
    parts: [OnceLock<Box<[OnceLock<Region>]>>; PARTS],
    /// Number of regions.
    count: Mutex<usize>,
    two_mib: TwoMib,
    counters: Counters,
    findings: Mutex<Vec<Finding>>,
}

impl PageStates {
    /// States for `ram`, given as one range of guest-physical addresses for each memory slot: all pages
    /// shared.
    pub fn new(ram: &[Range<u64>], two_mib: TwoMib) -> Self {
        let states = PageStates {
            parts: std::array::from_fn(|_| OnceLock::new()),
            count: Mutex::default(),
            two_mib,
            counters: Counters::default(),
            findings: Mutex::default(),
        };
        for range in ram {
            // Ranges beyond the limit are no RAM to the model; callers that can have so many use `add_ram`.
            let _ = states.add_ram(range.clone());
        }
        states
    }

    /// Adds the RAM of a memory slot, all pages shared; false if there are [`MAX_SLOTS`] already. A range is
    /// cut to whole pages; of overlapping ranges the first one counts.
    #[must_use]
    pub fn add_ram(&self, range: Range<u64>) -> bool {
        let (first, end) = (range.start.div_ceil(PAGE_SIZE), range.end / PAGE_SIZE);
        let mut pages = Vec::new();
        pages.resize_with(usize::try_from(end.saturating_sub(first)).unwrap_or(0), AtomicU8::default);
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        if *count == MAX_SLOTS {
            return false;
        }
        let (part, at) = part_of(*count);
        let room = || (0..FIRST_PART << part).map(|_| OnceLock::new()).collect();
        *count += 1;
        self.parts[part].get_or_init(room)[at].set(Region { first, pages: pages.into() }).is_ok()
    }

    fn regions(&self) -> impl Iterator<Item = &Region> {
        self.parts.iter().map_while(OnceLock::get).flat_map(|part| part.iter()).map_while(OnceLock::get)
    }

    /// Pages from `gpa` to the end of its memory slot; 0 outside of RAM.
    pub(crate) fn run_in_slot(&self, gpa: u64) -> u64 {
        self.slice(gpa / PAGE_SIZE, u64::MAX).map_or(0, |slice| slice.len() as u64)
    }

    /// The bytes of up to `pages` pages from `frame` on that lie in one region; `None` outside of RAM.
    fn slice(&self, frame: u64, pages: u64) -> Option<&[AtomicU8]> {
        self.regions().find_map(|region| {
            let start = usize::try_from(frame.checked_sub(region.first)?).ok()?;
            let rest = region.pages.get(start..).filter(|rest| !rest.is_empty())?;
            let len = usize::try_from(pages).unwrap_or(usize::MAX).min(rest.len());
            Some(&rest[..len])
        })
    }

    fn page(&self, gpa: u64) -> Option<&AtomicU8> {
        self.slice(gpa / PAGE_SIZE, 1)?.first()
    }

    /// State of the page that holds `gpa`; `None` outside of RAM.
    pub fn state(&self, gpa: u64) -> Option<PageState> {
        Some(PageState(self.page(gpa)?.load(Relaxed)))
    }

    /// Whether all bytes of the range are shared RAM. An empty range is.
    pub fn all_shared(&self, gpa: u64, len: u64) -> bool {
        self.all(gpa, len, |state| !state.private())
    }

    /// Whether all bytes of the range are RAM in a state that `test` accepts.
    pub fn all(&self, gpa: u64, len: u64, test: impl Fn(PageState) -> bool) -> bool {
        let Some(last) = len.checked_sub(1).map(|last| gpa.checked_add(last)) else { return true };
        let Some(last) = last else { return false };
        let (mut frame, end) = (gpa / PAGE_SIZE, last / PAGE_SIZE + 1);
        while frame < end {
            let Some(slice) = self.slice(frame, end - frame) else { return false };
            if !slice.iter().all(|page| test(PageState(page.load(Relaxed)))) {
                return false;
            }
            frame += slice.len() as u64;
        }
        true
    }

    /// Calls `f` for each run of neighbouring pages of one region in one state, in the order of the regions.
    pub fn for_each_run(&self, f: impl FnMut(Range<u64>, PageState)) {
        self.for_each_run_in(0..u64::MAX, f);
    }

    /// As [`PageStates::for_each_run`], of the pages that begin in `range`.
    pub fn for_each_run_in(&self, range: Range<u64>, mut f: impl FnMut(Range<u64>, PageState)) {
        for region in self.regions() {
            let end = region.first + region.pages.len() as u64;
            let first = range.start.div_ceil(PAGE_SIZE).clamp(region.first, end);
            let last = range.end.div_ceil(PAGE_SIZE).clamp(first, end);
            let [from, to] = [first, last].map(|frame| (frame - region.first) as usize);
            let mut frame = first;
            // Each page is looked at once: a vCPU may change it meanwhile, and a run must not be told in a
            // state that only one of its pages has, or had.
            let pages = region.pages.get(from..to).unwrap_or_default();
            let mut states = pages.iter().map(|page| page.load(Relaxed)).peekable();
            while let Some(state) = states.next() {
                let mut end = frame + 1;
                while states.next_if_eq(&state).is_some() {
                    end += 1;
                }
                f(frame * PAGE_SIZE..end * PAGE_SIZE, PageState(state));
                frame = end;
            }
        }
    }

    /// Sets or clears the private attribute of `pages` pages from `gpa` on (`KVM_SET_MEMORY_ATTRIBUTES`). A
    /// page that becomes shared loses its RMP entry. A page that becomes private is not assigned and not
    /// validated.
    pub fn set_private(&self, gpa: u64, pages: u64, private: bool) -> AttributeChange {
        let mut change = AttributeChange::default();
        let (mut frame, mut left) = (gpa / PAGE_SIZE, pages);
        while left > 0 {
            let Some(slice) = self.slice(frame, left) else {
                // On to the next region, or to the end of the range.
                let next = self.regions().map(|r| r.first).filter(|first| *first > frame).min();
                let skip = next.map_or(left, |next| (next - frame).min(left));
                change.outside_ram += skip;
                (frame, left) = (frame + skip, left - skip);
                continue;
            };
            for (page, i) in slice.iter().zip(0..) {
                let old = if private { page.fetch_or(PRIVATE, Relaxed) } else { page.swap(0, Relaxed) };
                change.changed += u64::from((old & PRIVATE != 0) != private);
                if !private && old & VALIDATED != 0 {
                    self.report(Finding::ToSharedWhileValidated { gpa: (frame + i) * PAGE_SIZE });
                }
                if !private && old & VMSA != 0 {
                    self.report(Finding::ToSharedWhileVmsa { gpa: (frame + i) * PAGE_SIZE });
                }
            }
            (frame, left) = (frame + slice.len() as u64, left - slice.len() as u64);
        }
        let counter = if private { &self.counters.to_private } else { &self.counters.to_shared };
        count(counter, change.changed);
        change
    }

    /// Whether `SNP_LAUNCH_UPDATE` may take the page at `gpa`.
    pub fn launchable(&self, gpa: u64) -> Result<(), LaunchRefusal> {
        let state = self.state(gpa).ok_or(LaunchRefusal::OutsideRam)?;
        if !state.private() {
            return Err(LaunchRefusal::NotPrivate);
        }
        if state.assigned() { Err(LaunchRefusal::Assigned) } else { Ok(()) }
    }

    /// Enters the page at `gpa` as `SNP_LAUNCH_UPDATE` leaves it: assigned and validated, with a 4 KiB RMP
    /// entry.
    pub fn launch(&self, gpa: u64) -> Result<(), LaunchRefusal> {
        self.launchable(gpa)?;
        let page = self.page(gpa).ok_or(LaunchRefusal::OutsideRam)?;
        page.fetch_or(ASSIGNED | VALIDATED | LAUNCHED, Relaxed);
        count(&self.counters.launched, 1);
        Ok(())
    }

    /// `PVALIDATE` of the page at `gpa` (without C-bit), with RCX and RDX as the guest gave them. `c_bit`
    /// says whether the guest's mapping had the C-bit.
    pub fn pvalidate(&self, gpa: u64, c_bit: bool, rcx: u64, rdx: u64) -> InstructionResult {
        count(&self.counters.pvalidate_calls, 1);
        // Bit 0 of ECX and of EDX counts. Linux leaves the rest of EDX undefined: it passes a bool in DL.
        let (huge, validate) = (rcx & 1 == 1, rdx & 1 == 1);
        let gpa = gpa & !(PAGE_SIZE - 1);
        if huge && !gpa.is_multiple_of(PAGES_2M * PAGE_SIZE) {
            return InstructionResult::done(FAIL_INPUT);
        }
        if !c_bit {
            self.report(Finding::SharedMapping { gpa });
        }
        if huge { self.pvalidate_2m(gpa, validate) } else { self.pvalidate_4k(gpa, validate) }
    }

    fn pvalidate_4k(&self, gpa: u64, validate: bool) -> InstructionResult {
        let Some(page) = self.page(gpa) else { return self.not_private(gpa) };
        let changed =
            page.fetch_update(Relaxed, Relaxed, |old| (old & PRIVATE != 0).then(|| set(old, validate)));
        let Ok(old) = changed else { return self.not_private(gpa) };
        if (old & VALIDATED != 0) == validate {
            return self.no_change(gpa, validate);
        }
        count(if validate { &self.counters.validated } else { &self.counters.cleared }, 1);
        InstructionResult::done(SUCCESS)
    }

    fn pvalidate_2m(&self, gpa: u64, validate: bool) -> InstructionResult {
        let mismatch = || {
            count(&self.counters.pvalidate_size_mismatch, 1);
            InstructionResult::done(FAIL_SIZE_MISMATCH)
        };
        let Some(slice) = self.slice(gpa / PAGE_SIZE, PAGES_2M) else { return self.not_private(gpa) };
        let first = slice.first().map_or(0, |page| page.load(Relaxed));
        if first & PRIVATE == 0 {
            return self.not_private(gpa);
        }
        let uniform = slice.len() as u64 == PAGES_2M
            && first & (LAUNCHED | VMSA) == 0
            && slice.iter().all(|page| (page.load(Relaxed) ^ first) & !ASSIGNED == 0);
        if self.two_mib == TwoMib::SizeMismatch || !uniform {
            return mismatch();
        }
        if (first & VALIDATED != 0) == validate {
            return self.no_change(gpa, validate);
        }
        for page in slice {
            // A page that another vCPU turned shared since the check stays so: its attribute has been
            // cleared.
            let _ =
                page.fetch_update(Relaxed, Relaxed, |old| (old & PRIVATE != 0).then(|| set(old, validate)));
        }
        count(&self.counters.pvalidate_2m, 1);
        count(if validate { &self.counters.validated } else { &self.counters.cleared }, PAGES_2M);
        InstructionResult::done(SUCCESS)
    }

    /// `RMPADJUST` of the page at `gpa` (without C-bit) by VMPL 0, with RCX and RDX as the guest gave them.
    pub fn rmpadjust(&self, gpa: u64, c_bit: bool, rcx: u64, rdx: u64) -> InstructionResult {
        count(&self.counters.rmpadjust_calls, 1);
        let (target, vmsa) = (rdx as u8, rdx >> 16 & 1 != 0);
        let gpa = gpa & !(PAGE_SIZE - 1);
        // Reserved bits, a VMPL that does not exist, a VMSA of 2 MiB. Of RCX bit 0 counts, as for PVALIDATE.
        let huge = rcx & 1 == 1;
        let unaligned = !gpa.is_multiple_of(PAGES_2M * PAGE_SIZE);
        if rdx >> 17 != 0 || target > 3 || (huge && (vmsa || unaligned)) {
            return InstructionResult::done(FAIL_INPUT);
        }
        if !c_bit {
            self.report(Finding::SharedMapping { gpa });
        }
        let Some(page) = self.page(gpa) else { return self.not_private(gpa) };
        let state = PageState(page.load(Relaxed));
        if !state.private() {
            return self.not_private(gpa);
        }
        if huge {
            return InstructionResult::done(FAIL_SIZE_MISMATCH);
        }
        if !state.validated() {
            self.report(Finding::NotValidated { gpa });
            return InstructionResult::NotValidated { gpa };
        }
        // The caller runs at VMPL 0 and may only change what numerically higher levels may do.
        if target == 0 {
            return InstructionResult::done(FAIL_PERMISSION);
        }
        let changed = page.fetch_update(Relaxed, Relaxed, |old| {
            PageState(old).usable().then_some(if vmsa { old | VMSA } else { old & !VMSA })
        });
        match changed {
            Ok(_) => InstructionResult::done(SUCCESS),
            Err(_) => self.not_private(gpa),
        }
    }

    fn not_private(&self, gpa: u64) -> InstructionResult {
        self.report(Finding::NotPrivate { gpa });
        InstructionResult::NestedFault { gpa }
    }

    fn no_change(&self, gpa: u64, validate: bool) -> InstructionResult {
        count(&self.counters.no_change, 1);
        self.report(Finding::NoChange { gpa, validate });
        InstructionResult::Done { eax: SUCCESS, carry: true }
    }

    /// Records a finding.
    pub fn report(&self, finding: Finding) {
        count(&self.counters.findings, 1);
        let mut kept = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < FINDINGS_KEPT {
            kept.push(finding);
        }
    }

    /// The findings so far; of very many, the first thousand.
    pub fn findings(&self) -> Vec<Finding> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The counters so far.
    pub fn statistics(&self) -> Statistics {
        let c = &self.counters;
        Statistics {
            pvalidate_calls: c.pvalidate_calls.load(Relaxed),
            pvalidate_2m: c.pvalidate_2m.load(Relaxed),
            pvalidate_size_mismatch: c.pvalidate_size_mismatch.load(Relaxed),
            validated: c.validated.load(Relaxed),
            cleared: c.cleared.load(Relaxed),
            no_change: c.no_change.load(Relaxed),
            rmpadjust_calls: c.rmpadjust_calls.load(Relaxed),
            to_private: c.to_private.load(Relaxed),
            to_shared: c.to_shared.load(Relaxed),
            launched: c.launched.load(Relaxed),
            findings: c.findings.load(Relaxed),
        }
    }
}

/// The byte of a private page after `PVALIDATE`. KVM assigns the page on this first touch if it was not.
fn set(old: u8, validate: bool) -> u8 {
    let assigned = old | ASSIGNED;
    // Un-validating ends any use as a VMSA: the page has to be marked again.
    if validate { assigned | VALIDATED } else { assigned & !(VALIDATED | VMSA) }
}

#[cfg(test)]
#[path = "rmp_test.rs"]
mod tests;
