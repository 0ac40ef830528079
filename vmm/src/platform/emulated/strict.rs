// SPDX-License-Identifier: Apache-2.0
//! Strict runs: a page is accessible only in the view, and in the state, in which hardware would let the
//! guest use it.
//!
//! Access is taken away in the monitor's own mappings (`mprotect`), which KVM follows: a forbidden access
//! ends `KVM_RUN` with EFAULT. It is taken away at once, and given back late: a page that the guest has
//! validated stays closed until something runs into it, when all that were validated since are opened
//! together. So `PVALIDATE` costs no system call here, and memory that was validated in order is opened as
//! one piece, whatever its size.
//!
//! | page | shared view | private view |
//! |---|---|---|
//! | shared | open | closed |
//! | private, not validated | closed | closed |
//! | private, validated | closed | open |
//!
//! The first MiB has one memory for both views. It is open unless it is private and not validated.

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use snp_model::rmp::PageStates;

use super::region::BackedRegion;
use super::region::LOW_END;
use crate::lock::lock;

/// Pieces that wait to be opened before that is done without a need, so that a guest cannot make the list
/// grow.
const WAITING_MAX: usize = 1024;

/// What waits to be opened.
#[derive(Default)]
pub struct Gate {
    waiting: Mutex<Vec<Range<u64>>>,
    /// How often something was opened.
    opened: AtomicU64,
}

/// The parts of `range` below and above the end of the common memory that lie in `region`, as offsets into
/// it.
fn parts(region: &BackedRegion, range: &Range<u64>) -> [Range<u64>; 2] {
    let all = region.range();
    let (start, end) = (range.start.clamp(all.start, all.end), range.end.clamp(all.start, all.end));
    let middle = LOW_END.clamp(start, end.max(start));
    [start - all.start..middle - all.start, middle - all.start..end.max(middle) - all.start]
}

fn set(mapping: &crate::platform::mapping::Mapping, part: &Range<u64>, open: bool) -> io::Result<()> {
    if part.is_empty() { Ok(()) } else { mapping.set_accessible(part.start, part.end - part.start, open) }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        lock(&self.waiting)
    }

    /// A region that has just been added: all of its pages are shared.
    pub fn add(&self, region: &BackedRegion) -> io::Result<()> {
        let [_, high] = parts(region, &region.range());
        set(&region.private, &high, false)
    }

    /// The monitor has changed the attribute of `range`.
    pub fn attribute_changed(
        &self,
        regions: &[BackedRegion],
        states: &PageStates,
        range: &Range<u64>,
        private: bool,
    ) -> io::Result<()> {
        let _alone = self.lock();
        for region in regions {
            let [low, high] = parts(region, range);
            set(&region.shared, &high, !private)?;
            if !private {
                set(&region.private, &low, true)?;
                set(&region.private, &high, false)?;
                continue;
            }
            // What was private and validated before stays so, and open. The rest of the high part is closed
            // already.
            let mut result = Ok(());
            states.for_each_run_in(region.gpa + low.start..region.gpa + low.end, |run, state| {
                let run = run.start - region.gpa..run.end - region.gpa;
                if result.is_ok() && !state.usable() {
                    result = set(&region.private, &run, false);
                }
            });
            result?;
        }
        Ok(())
    }

    /// `range` is validated: it may be opened.
    pub fn validated(
        &self,
        regions: &[BackedRegion],
        states: &PageStates,
        range: Range<u64>,
    ) -> io::Result<()> {
        let mut waiting = self.lock();
        match waiting.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => waiting.push(range),
        }
        if waiting.len() > WAITING_MAX { self.open_all(&mut waiting, regions, states) } else { Ok(()) }
    }

    /// `range` is no longer validated.
    pub fn rescinded(&self, regions: &[BackedRegion], range: &Range<u64>) -> io::Result<()> {
        let _alone = self.lock();
        for region in regions {
            for part in parts(region, range) {
                set(&region.private, &part, false)?;
            }
        }
        Ok(())
    }

    /// Number of times that something was opened.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Acquire)
    }

    /// Opens what waits, after something ran into a closed page. `seen` is [`Gate::opened`] before the
    /// access. False if nothing was opened since: the access is forbidden.
    pub fn open(&self, regions: &[BackedRegion], states: &PageStates, seen: u64) -> io::Result<bool> {
        let mut waiting = self.lock();
        if !waiting.is_empty() {
            self.open_all(&mut waiting, regions, states)?;
        }
        Ok(self.opened() != seen)
    }

    fn open_all(
        &self,
        waiting: &mut Vec<Range<u64>>,
        regions: &[BackedRegion],
        states: &PageStates,
    ) -> io::Result<()> {
        for range in waiting.drain(..) {
            let mut result = Ok(());
            // A page may have changed again meanwhile. Whoever changes it now waits for the lock, and closes
            // it then.
            states.for_each_run_in(range, |run, state| {
                for region in regions.iter().filter(|_| state.usable()) {
                    for part in parts(region, &run) {
                        result =
                            std::mem::replace(&mut result, Ok(())).and(set(&region.private, &part, true));
                    }
                }
            });
            result?;
        }
        self.opened.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use snp_model::rmp::TwoMib;

    use super::*;
    use crate::platform::mapping::Mapping;

    const RAM: Range<u64> = 0..0x40_0000;
    const PAGE: u64 = 0x20_0000;

    struct Rig {
        gate: Gate,
        states: PageStates,
        regions: Vec<BackedRegion>,
    }

    impl Rig {
        /// All pages private, none validated.
        fn new() -> Rig {
            let mapping = || Arc::new(Mapping::anonymous(RAM.end).unwrap());
            let region = BackedRegion { gpa: RAM.start, shared: mapping(), private: mapping(), memfd: None };
            let states = PageStates::new(std::slice::from_ref(&RAM), TwoMib::Accept);
            let rig = Rig { gate: Gate::default(), states, regions: vec![region] };
            rig.gate.add(&rig.regions[0]).unwrap();
            rig.change(RAM, true);
            rig
        }

        fn change(&self, range: Range<u64>, private: bool) {
            self.states.set_private(range.start, (range.end - range.start) / 0x1000, private);
            self.gate.attribute_changed(&self.regions, &self.states, &range, private).unwrap();
        }

        fn pvalidate(&self, gpa: u64, validate: bool) {
            self.states.pvalidate(gpa, true, 0, validate.into());
            let range = gpa..gpa + 0x1000;
            match validate {
                true => self.gate.validated(&self.regions, &self.states, range).unwrap(),
                false => self.gate.rescinded(&self.regions, &range).unwrap(),
            }
        }

        /// Whether the page is open in (shared, private) view.
        fn open(&self, gpa: u64) -> (bool, bool) {
            let open = |mapping: &Mapping| mapping.try_read(gpa, &mut [0]).is_ok();
            (open(&self.regions[0].shared), open(&self.regions[0].private))
        }

        /// Something ran into a closed page: was it too early only?
        fn run_into(&self) -> bool {
            self.gate.open(&self.regions, &self.states, self.gate.opened()).unwrap()
        }
    }

    #[test]
    fn a_page_opens_when_it_is_validated_and_used() {
        let rig = Rig::new();
        assert_eq!(rig.open(PAGE), (false, false));
        assert!(!rig.run_into(), "nothing is validated");
        rig.pvalidate(PAGE, true);
        assert!(rig.run_into());
        assert_eq!(rig.open(PAGE), (false, true));
        assert_eq!(rig.open(PAGE + 0x1000), (false, false));
        assert!(!rig.run_into(), "nothing was validated since");
    }

    #[test]
    fn a_page_closes_at_once() {
        let rig = Rig::new();
        rig.pvalidate(PAGE, true);
        rig.pvalidate(PAGE + 0x1000, true);
        rig.run_into();
        rig.pvalidate(PAGE, false);
        assert_eq!(rig.open(PAGE), (false, false));
        rig.change(PAGE..PAGE + 0x2000, false);
        assert_eq!(rig.open(PAGE), (true, false));
        assert_eq!(rig.open(PAGE + 0x1000), (true, false));
        rig.change(PAGE..PAGE + 0x2000, true);
        assert_eq!(rig.open(PAGE), (false, false), "private again, to be validated again");
        assert_eq!(rig.open(PAGE + 0x1000), (false, false));
    }

    #[test]
    fn what_changed_before_it_was_opened_stays_closed() {
        let rig = Rig::new();
        rig.pvalidate(PAGE, true);
        rig.pvalidate(PAGE + 0x1000, true);
        rig.pvalidate(PAGE, false);
        rig.run_into();
        assert_eq!((rig.open(PAGE), rig.open(PAGE + 0x1000)), ((false, false), (false, true)));
    }

    #[test]
    fn a_page_that_is_private_already_stays_open() {
        let rig = Rig::new();
        rig.pvalidate(PAGE, true);
        rig.run_into();
        rig.change(RAM, true);
        assert_eq!(rig.open(PAGE), (false, true));
    }

    #[test]
    fn another_vcpu_may_have_opened_it_meanwhile() {
        let rig = Rig::new();
        let seen = rig.gate.opened();
        rig.pvalidate(PAGE, true);
        assert!(rig.run_into(), "the other one");
        assert!(rig.gate.open(&rig.regions, &rig.states, seen).unwrap());
    }

    #[test]
    fn the_first_mib_has_one_memory_that_is_open_when_shared_or_validated() {
        let rig = Rig::new();
        let low = 0x8_0000;
        assert!(!rig.open(low).1);
        rig.change(low..low + 0x1000, false);
        assert!(rig.open(low).1);
        rig.change(low..low + 0x1000, true);
        assert!(!rig.open(low).1);
        rig.pvalidate(low, true);
        rig.run_into();
        assert!(rig.open(low).1);
    }

    #[test]
    fn scattered_validations_do_not_pile_up() {
        let rig = Rig::new();
        for _ in 0..2 {
            for page in (PAGE..RAM.end).step_by(0x2000) {
                rig.pvalidate(page, true);
                rig.pvalidate(page, false);
                rig.pvalidate(page, true);
                rig.pvalidate(page, false);
            }
        }
        assert!(rig.gate.lock().len() <= WAITING_MAX);
    }
}
