// SPDX-License-Identifier: Apache-2.0
//! Page-state changes against arguments that a guest makes up, on memory that shows what was given back.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::platform::scripted::ScriptedVm;

const MIB: u64 = 1 << 20;
/// Two regions with a hole, as below and above the devices of a PC.
const LOW: Range<u64> = 0..2 * MIB;
const HIGH: Range<u64> = 4 * MIB..5 * MIB;
const KVM_EINVAL: u64 = libc::EINVAL as u64;

struct Bench {
    vm: Arc<ScriptedVm>,
    conversions: Conversions,
}

/// A guest that is all private. Every page of both sides holds 1s, so that a side which was given back shows
/// as zeros.
fn bench() -> Bench {
    let vm = Arc::new(ScriptedVm::default());
    let ram = GuestRam::new([(LOW.start, LOW.end - LOW.start), (HIGH.start, HIGH.end - HIGH.start)]).unwrap();
    let mut memfds = Vec::new();
    for region in ram.regions() {
        let ones = vec![1; region.mapping.len() as usize];
        region.mapping.write(0, &ones).unwrap();
        let memfd = vm.create_guest_memfd(region.mapping.len()).unwrap();
        let file = std::fs::File::from(memfd);
        file.write_all_at(&ones, 0).unwrap();
        memfds.push(Arc::new(OwnedFd::from(file)));
    }
    let conversions = Conversions::new(Arc::clone(&vm) as Arc<dyn Vm>, ram, memfds, &[]);
    Bench { vm, conversions }
}

impl Bench {
    fn ask(&self, gpa: u64, pages: u64, attributes: u64) -> u64 {
        match self.conversions.map_gpa_range([gpa, pages, attributes, 0, 0, 0]) {
            Ok(()) => 0,
            Err(NotConverted::Refused) => KVM_EINVAL,
            Err(NotConverted::Host(e)) => panic!("the host failed: {e}"),
        }
    }

    /// Pages that the host has got back: of the shared side, and of the private one.
    fn given_back(&self) -> (Vec<u64>, Vec<u64>) {
        let (mut shared, mut private) = (Vec::new(), Vec::new());
        let byte = &mut [0];
        for (region, memfd) in self.conversions.ram.regions().iter().zip(&self.conversions.memfds) {
            let file = std::fs::File::from(memfd.try_clone().unwrap());
            for offset in (0..region.mapping.len()).step_by(PAGE as usize) {
                region.mapping.read(offset, byte).unwrap();
                shared.extend((byte[0] == 0).then_some(region.gpa + offset));
                file.read_exact_at(byte, offset).unwrap();
                private.extend((byte[0] == 0).then_some(region.gpa + offset));
            }
        }
        (shared, private)
    }

    fn shared_pages(&self) -> Vec<u64> {
        let all = LOW.step_by(PAGE as usize).chain(HIGH.step_by(PAGE as usize));
        all.filter(|gpa| self.conversions.state(*gpa, PAGE) == RangeState::Shared).collect()
    }
}

fn pages(range: Range<u64>) -> Vec<u64> {
    range.step_by(PAGE as usize).collect()
}

#[test]
fn each_direction_gives_back_the_side_that_the_page_leaves() {
    let b = bench();
    assert_eq!(b.ask(MIB, 3, 0), 0);
    assert_eq!(b.given_back(), (vec![], pages(MIB..MIB + 3 * PAGE)));
    assert_eq!(b.shared_pages(), pages(MIB..MIB + 3 * PAGE));
    assert_eq!(b.ask(MIB + PAGE, 1, MAP_GPA_RANGE_ENCRYPTED), 0);
    assert_eq!(b.given_back().0, [MIB + PAGE]);
    assert_eq!(b.shared_pages(), [MIB, MIB + 2 * PAGE]);
    assert_eq!(*b.vm.attributes.lock().unwrap(), [(MIB, 3 * PAGE, 0), (MIB + PAGE, PAGE, ATTRIBUTE_PRIVATE)]);
}

#[test]
fn a_range_that_the_host_writes_to_stays_shared_meanwhile() {
    let b = bench();
    assert!(b.conversions.hold_shared(MIB, PAGE).is_none(), "it is private");
    assert!(b.conversions.hold_shared(u64::MAX - PAGE, 2 * PAGE).is_none());
    assert_eq!(b.ask(MIB, 2, 0), 0);
    assert!(b.conversions.hold_shared(MIB, 3 * PAGE).is_none(), "a part of it is private");
    let held = b.conversions.hold_shared(MIB, 2 * PAGE).unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b.ask(MIB + PAGE, 1, MAP_GPA_RANGE_ENCRYPTED));
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(!other.is_finished(), "it waits");
        assert_eq!(b.shared_pages(), pages(MIB..MIB + 2 * PAGE));
        drop(held);
        assert_eq!(other.join().unwrap(), 0);
    });
    assert_eq!(b.shared_pages(), [MIB]);
}

#[test]
fn the_page_size_hint_is_not_the_direction() {
    // A request for 2 MiB pages to shared has the value 1.
    let b = bench();
    assert_eq!(b.ask(0, 512, 1), 0);
    assert_eq!(b.shared_pages(), pages(LOW));
    assert_eq!(b.ask(0, 512, 1 | MAP_GPA_RANGE_ENCRYPTED), 0);
    assert!(b.shared_pages().is_empty());
}

#[test]
fn nothing_happens_unless_the_whole_range_is_ram() {
    let b = bench();
    let (page, last) = (PAGE, u64::MAX - 0xfff);
    for (gpa, pages, attributes) in [
        (0, 0, 0),                      // nothing
        (1, 1, 0),                      // not a page's address
        (0, 1, 1 << 5),                 // an unknown bit
        (0, 1, 1 << 63),                // the highest of them
        (LOW.end - page, 2, 0),         // into the hole
        (LOW.end, 1, 0),                // in the hole
        (0, HIGH.end / page, 0),        // over the hole
        (LOW.end, 512, 16),             // from the hole into RAM
        (HIGH.end - page, 2, 16),       // past the end
        (HIGH.end, 1, 0),               // after the end
        (last, 1, 0),                   // the last page there is: its end wraps to 0
        (last, 2, 0),                   // wraps to RAM
        (last, 2, 16),                  // the same to private
        (0, u64::MAX / page, 0),        // the longest that does not overflow
        (0, u64::MAX / page + 1, 0),    // bytes wrap to 0
        (0, u64::MAX / page + 2, 0),    // bytes wrap to one page
        (page, u64::MAX, 16),           // -1 pages
        (HIGH.start, 1 << 52, 0),       // bytes wrap to 0
        (u64::MAX, u64::MAX, u64::MAX), // everything
    ] {
        assert_eq!(b.ask(gpa, pages, attributes), KVM_EINVAL, "{gpa:#x} {pages:#x} {attributes:#x}");
    }
    assert_eq!(b.given_back(), (vec![], vec![]));
    assert_eq!(*b.vm.attributes.lock().unwrap(), []);
    assert!(b.shared_pages().is_empty());
}

/// Addresses and lengths near everything that could go wrong.
fn hostile() -> impl Strategy<Value = u64> {
    let near = |at: u64| (-3i64..4).prop_map(move |pages| at.wrapping_add_signed(pages * PAGE as i64));
    prop_oneof![
        8 => near(LOW.start),
        8 => near(LOW.end),
        8 => near(HIGH.start),
        8 => near(HIGH.end),
        2 => near(u64::MAX / PAGE),
        2 => near(1 << 52),
        1 => any::<u64>(),
        8 => (0..0x600u64).prop_map(|page| page * PAGE),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Against a model in 128-bit arithmetic: a request is carried out exactly if every byte of it is RAM.
    #[test]
    fn exactly_the_pages_that_were_asked_for_change(
        requests in proptest::collection::vec((hostile(), hostile(), 0..70u64, any::<bool>(), any::<u64>()), 1..12)
    ) {
        let b = bench();
        let mut shared = std::collections::BTreeSet::new();
        for (gpa, length, few, use_few, bits) in requests {
            let count = if use_few { few } else { length / if length > HIGH.end { 1 } else { PAGE } };
            let attributes = if bits % 5 == 0 { bits } else { bits & 0x1f };
            let (start, end) = (u128::from(gpa), u128::from(gpa) + u128::from(count) * u128::from(PAGE));
            let within = |range: &Range<u64>| u128::from(range.start) <= start && end <= u128::from(range.end);
            let valid = count > 0 && gpa % PAGE == 0 && attributes < 0x20 && (within(&LOW) || within(&HIGH));
            let before = b.vm.attributes.lock().unwrap().len();
            let ret = b.ask(gpa, count, attributes);
            prop_assert_eq!(ret == 0, valid, "{:#x} {:#x} {:#x} gave {}", gpa, count, attributes, ret);
            let calls = b.vm.attributes.lock().unwrap().len() - before;
            prop_assert_eq!(calls, usize::from(valid));
            if valid {
                for page in (gpa..end as u64).step_by(PAGE as usize) {
                    if attributes & MAP_GPA_RANGE_ENCRYPTED == 0 { shared.insert(page) } else { shared.remove(&page) };
                }
            }
        }
        prop_assert_eq!(b.shared_pages(), shared.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn a_page_map_knows_each_page_of_its_regions() {
    let ram = GuestRam::new([(0, 0x10000), (0x100000, 0x41000)]).unwrap();
    let map = PrivateMap::all_private(&ram);
    map.set(1, 0x40000, 0x1000, false);
    let pages = [(1, 0x40), (1, 0x3f), (1, 0x41), (0, 0x10), (0, 0xf), (2, 0)];
    let expected = [Some(false), Some(true), None, None, Some(true), None];
    assert_eq!(pages.map(|(region, page)| map.page(region, page)), expected);
}

#[test]
fn the_state_of_a_range_is_that_of_all_its_pages() {
    let b = bench();
    b.ask(MIB, 2, 0);
    let state = |gpa, len| b.conversions.state(gpa, len);
    assert_eq!(state(0, MIB), RangeState::Private);
    assert_eq!(state(MIB, 2 * PAGE), RangeState::Shared);
    assert_eq!(state(MIB + 7, 1), RangeState::Shared);
    assert_eq!(state(MIB - PAGE, 2 * PAGE), RangeState::Mixed);
    assert_eq!(state(MIB + 2 * PAGE - 1, 2), RangeState::Mixed);
    for (gpa, len) in
        [(LOW.end, PAGE), (LOW.end - PAGE, 2 * PAGE), (0, 0), (u64::MAX, 1), (u64::MAX - 1, u64::MAX)]
    {
        assert_eq!(state(gpa, len), RangeState::NotRam, "{gpa:#x} {len:#x}");
    }
}
