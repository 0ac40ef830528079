// SPDX-License-Identifier: Apache-2.0
//! Rules of PVALIDATE, RMPADJUST and changes of the private attribute.

use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;

use super::*;

const RAM: [Range<u64>; 2] = [0..0x40_0000, 0x1_0000_0000..0x1_0020_0000];

fn private(two_mib: TwoMib) -> PageStates {
    let pages = PageStates::new(&RAM, two_mib);
    for range in RAM {
        pages.set_private(range.start, (range.end - range.start) / PAGE_SIZE, true);
    }
    pages
}

const DONE: InstructionResult = InstructionResult::Done { eax: SUCCESS, carry: false };
const SAME: InstructionResult = InstructionResult::Done { eax: SUCCESS, carry: true };

#[test]
fn double_validation_is_reported_to_the_guest() {
    let pages = private(TwoMib::SizeMismatch);
    assert_eq!(pages.pvalidate(0x5000, true, 0, 1), DONE);
    assert_eq!(pages.pvalidate(0x5000, true, 0, 1), SAME);
    assert_eq!(pages.findings(), [Finding::NoChange { gpa: 0x5000, validate: true }]);
}

#[test]
fn a_launched_page_is_validated_already() {
    let pages = private(TwoMib::SizeMismatch);
    pages.launch(0x7000).unwrap();
    assert_eq!(pages.pvalidate(0x7000, true, 0, 1), SAME);
    assert_eq!(pages.launch(0x7000), Err(LaunchRefusal::Assigned));
}

#[test]
fn only_private_ram_can_be_launched() {
    let pages = PageStates::new(&RAM, TwoMib::Accept);
    assert_eq!(pages.launch(0x7000), Err(LaunchRefusal::NotPrivate));
    assert_eq!(pages.launch(0x8000_0000), Err(LaunchRefusal::OutsideRam));
}

#[test]
fn pvalidate_of_a_shared_page_or_outside_ram_is_a_nested_fault() {
    let pages = PageStates::new(&RAM, TwoMib::Accept);
    for gpa in [0x5000, 0x8000_0000, !0xfff] {
        assert_eq!(pages.pvalidate(gpa, true, 0, 1), InstructionResult::NestedFault { gpa });
    }
}

#[test]
fn a_change_to_shared_clears_validated_and_a_change_back_does_not_set_it() {
    let pages = private(TwoMib::SizeMismatch);
    pages.pvalidate(0x5000, true, 0, 1);
    pages.set_private(0x5000, 1, false);
    pages.set_private(0x5000, 1, true);
    let state = pages.state(0x5000).unwrap();
    assert!(state.private() && !state.validated() && !state.assigned(), "{state:?}");
    assert_eq!(pages.findings(), [Finding::ToSharedWhileValidated { gpa: 0x5000 }]);
    assert_eq!(pages.pvalidate(0x5000, true, 0, 1), DONE);
}

#[test]
fn a_correct_conversion_leaves_no_finding() {
    let pages = private(TwoMib::SizeMismatch);
    assert_eq!(pages.pvalidate(0x5000, true, 0, 1), DONE);
    assert_eq!(pages.pvalidate(0x5000, true, 0, 0), DONE);
    pages.set_private(0x5000, 1, false);
    pages.set_private(0x5000, 1, true);
    assert_eq!(pages.pvalidate(0x5000, true, 0, 1), DONE);
    assert_eq!(pages.findings(), []);
    let s = pages.statistics();
    assert_eq!((s.validated, s.cleared, s.no_change, s.to_shared), (2, 1, 0, 1));
}

#[test]
fn a_host_with_small_rmp_entries_answers_2m_with_size_mismatch() {
    let pages = private(TwoMib::SizeMismatch);
    let mismatch = InstructionResult::Done { eax: 6, carry: false };
    assert_eq!(pages.pvalidate(0x20_0000, true, 1, 1), mismatch);
    assert_eq!(pages.statistics().validated, 0);
}

#[test]
fn an_accepted_2m_page_validates_512_pages() {
    let pages = private(TwoMib::Accept);
    assert_eq!(pages.pvalidate(0x20_0000, true, 1, 1), DONE);
    assert!(pages.all(0x20_0000, 0x20_0000, PageState::validated));
    assert!(!pages.state(0x1f_f000).unwrap().validated());
    assert_eq!(pages.pvalidate(0x20_0000, true, 1, 1), SAME);
    assert_eq!(pages.pvalidate(0x20_0000, true, 1, 0), DONE);
}

#[test]
fn a_2m_page_that_holds_a_launched_or_shared_page_is_a_size_mismatch() {
    let mismatch = InstructionResult::Done { eax: 6, carry: false };
    let pages = private(TwoMib::Accept);
    pages.launch(0x7000).unwrap();
    assert_eq!(pages.pvalidate(0, true, 1, 1), mismatch);
    pages.set_private(0x30_0000, 1, false);
    assert_eq!(pages.pvalidate(0x20_0000, true, 1, 1), mismatch);
}

#[test]
fn an_unaligned_2m_page_is_an_input_error() {
    let pages = private(TwoMib::Accept);
    assert_eq!(pages.pvalidate(0x1000, true, 1, 1), InstructionResult::Done { eax: 1, carry: false });
}

/// Linux passes the size and the action as bools in CL and DL, and leaves what is above undefined.
#[test]
fn of_size_and_action_only_bit_0_counts() {
    let pages = private(TwoMib::SizeMismatch);
    assert_eq!(pages.pvalidate(0x1000, true, !1, !0), DONE);
    assert_eq!(pages.rmpadjust(0x1000, true, !1, 0x1_0001), DONE);
    assert_eq!(pages.pvalidate(0x1000, true, !1, !1), DONE);
    assert!(!pages.state(0x1000).unwrap().validated());
}

#[test]
fn rmpadjust_marks_and_unmarks_a_vmsa() {
    let pages = private(TwoMib::Accept);
    assert_eq!(pages.rmpadjust(0x5000, true, 0, 0x1_0001), InstructionResult::NotValidated { gpa: 0x5000 });
    pages.pvalidate(0x5000, true, 0, 1);
    assert_eq!(pages.rmpadjust(0x5000, true, 0, 0x1_0001), DONE);
    assert!(pages.state(0x5000).unwrap().vmsa());
    assert_eq!(pages.rmpadjust(0x5000, true, 0, 1), DONE);
    assert!(!pages.state(0x5000).unwrap().vmsa());
}

#[test]
fn rmpadjust_cannot_target_its_own_or_an_unknown_level() {
    let pages = private(TwoMib::Accept);
    pages.pvalidate(0x5000, true, 0, 1);
    assert_eq!(pages.rmpadjust(0x5000, true, 0, 0), InstructionResult::Done { eax: 2, carry: false });
    assert_eq!(pages.rmpadjust(0x5000, true, 0, 4), InstructionResult::Done { eax: 1, carry: false });
}

#[test]
fn an_attribute_range_may_span_ram_and_holes() {
    let pages = PageStates::new(&RAM, TwoMib::Accept);
    let change = pages.set_private(0x3f_f000, 0x1_0000_0000 / PAGE_SIZE, true);
    // One page of the low region, and the high region up to 0x1_003f_f000.
    assert_eq!(change.changed, 1 + 0x20_0000 / PAGE_SIZE);
    assert_eq!(change.changed + change.outside_ram, 0x1_0000_0000 / PAGE_SIZE);
    assert!(!pages.all_shared(0x3f_e000, 0x2000));
    assert!(pages.all_shared(0x3f_e000, 0x1000));
}

#[test]
fn runs_cover_all_ram_in_order() {
    let pages = PageStates::new(&RAM, TwoMib::Accept);
    pages.set_private(0x1000, 2, true);
    let mut runs = Vec::new();
    pages.for_each_run(|range, state| runs.push((range, state.private())));
    assert_eq!(
        runs,
        [
            (0..0x1000, false),
            (0x1000..0x3000, true),
            (0x3000..0x40_0000, false),
            (0x1_0000_0000..0x1_0020_0000, false)
        ]
    );
    let mut runs = Vec::new();
    pages.for_each_run_in(0x2000..0x1_0000_1000, |range, state| runs.push((range, state.private())));
    assert_eq!(
        runs,
        [(0x2000..0x3000, true), (0x3000..0x40_0000, false), (0x1_0000_0000..0x1_0000_1000, false)]
    );
    pages.for_each_run_in(0x40_0000..0x8000_0000, |range, _| panic!("{range:?} is no RAM"));
}

#[test]
fn of_many_vcpus_that_validate_one_page_exactly_one_changes_it() {
    let pages = private(TwoMib::SizeMismatch);
    let changed = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for frame in 0..1024 {
                    if pages.pvalidate(frame * PAGE_SIZE, true, 0, 1) == DONE {
                        changed.fetch_add(1, Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(changed.into_inner(), 1024);
    let s = pages.statistics();
    assert_eq!((s.validated, s.no_change, s.findings), (1024, 3 * 1024, 3 * 1024));
    assert_eq!(pages.findings().len(), 1000, "details of the first thousand only");
}

#[test]
fn sixteen_gib_are_validated_in_2m_pages_and_found_in_few_runs() {
    let pages = PageStates::new(&[0..0xc000_0000, 0x1_0000_0000..0x4_4000_0000], TwoMib::Accept);
    for range in [0..0xc000_0000, 0x1_0000_0000..0x4_4000_0000u64] {
        pages.set_private(range.start, (range.end - range.start) / PAGE_SIZE, true);
        for gpa in range.step_by(0x20_0000) {
            assert_eq!(pages.pvalidate(gpa, true, 1, 1), DONE);
        }
    }
    assert_eq!(pages.statistics().pvalidate_2m, 8192);
    let mut runs = 0;
    pages.for_each_run(|_, state| runs += u32::from(state.usable()));
    assert_eq!(runs, 2);
}

#[test]
fn slots_can_be_added_up_to_a_limit() {
    let pages = PageStates::new(&[], TwoMib::Accept);
    for i in 0..MAX_SLOTS as u64 {
        assert!(pages.add_ram(i * 0x10_0000..i * 0x10_0000 + PAGE_SIZE));
    }
    let after = MAX_SLOTS as u64 * 0x10_0000;
    assert!(!pages.add_ram(after..after + PAGE_SIZE));
    for i in [0, 1, 31, 32, 95, 96, MAX_SLOTS as u64 - 1] {
        assert!(
            pages.state(i * 0x10_0000).is_some() && pages.state(i * 0x10_0000 + PAGE_SIZE).is_none(),
            "{i}"
        );
    }
    assert!(pages.state(after).is_none());
}

proptest! {
    #[test]
    fn no_operand_panics_and_a_validated_page_is_always_private(
        ops in proptest::collection::vec((0u8..4, any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()), 0..64)
    ) {
        let pages = private(TwoMib::Accept);
        for (op, gpa, a, b, flag) in ops {
            // Half of the addresses hit RAM.
            let gpa = if flag { gpa % 0x40_0000 } else { gpa };
            match op {
                0 => { pages.pvalidate(gpa, flag, a & 1, b & 1); }
                1 => { pages.pvalidate(gpa, flag, a, b); }
                2 => { pages.rmpadjust(gpa, flag, a & 1, b & 0x1_ff03); }
                _ => { pages.set_private(gpa, a % 0x2000, b & 1 != 0); }
            }
        }
        let mut sound = true;
        pages.for_each_run(|_, s| sound &= s.private() || !(s.validated() || s.vmsa() || s.assigned()));
        prop_assert!(sound);
    }
}

/// One page goes back and forth while the runs are told; its neighbour never changes, and must not be told
/// otherwise.
#[test]
fn a_page_that_changes_meanwhile_takes_no_other_along() {
    let pages = private(TwoMib::SizeMismatch);
    pages.set_private(0x5000, 2, false);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let wrong = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                pages.set_private(0x5000, 1, true);
                pages.set_private(0x5000, 1, false);
            }
        });
        let mut wrong = 0;
        for _ in 0..400_000 {
            pages.for_each_run_in(0x5000..0x7000, |run, state| {
                wrong += u32::from(run.contains(&0x6000) && state.private());
            });
        }
        stop.store(true, Relaxed);
        wrong
    });
    assert_eq!(wrong, 0, "times that a shared page was told as private");
}
