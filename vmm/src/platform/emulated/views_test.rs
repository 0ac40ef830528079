// SPDX-License-Identifier: Apache-2.0
//! Guests whose shared and private pages alternate as often as they can make them.

use std::time::Duration;

use super::*;
use crate::platform::VmKind;
use crate::platform::kvm::KvmPlatform;

/// `None`: no KVM here.
fn kvm() -> Option<KvmVm> {
    let kvm = KvmPlatform::open();
    if let Err(e) = &kvm {
        println!("skipped: {e}");
    }
    Some(kvm.ok()?.create(VmKind::Plain).unwrap())
}

/// One page in two, as a table that has them all and as what is wanted. Nothing of it is told to KVM.
fn alternating(count: usize) -> (Slots, Vec<Slot>) {
    let slot = |i: u64| Slot { gpa: i << 13, host: 1 << 40 | i << 13, len: 4096 };
    let wanted: Vec<Slot> = (0..count as u64).map(slot).collect();
    (Slots { used: wanted.iter().copied().map(Some).collect(), ..Slots::default() }, wanted)
}

/// What this thread has computed so far: what others do on the machine does not count.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Eight times as many slots take about eight times as long to compare, not 64 times.
#[test]
fn a_conversion_costs_what_the_slots_are_and_not_their_square() {
    let Some(vm) = kvm() else { return };
    let shortest = |count| {
        let (mut slots, wanted) = alternating(count);
        let once = || {
            let begun = cpu_time();
            slots.replace(&vm, &wanted, |_| false).unwrap();
            cpu_time().saturating_sub(begun)
        };
        std::iter::repeat_with(once).take(7).min().unwrap_or(Duration::MAX)
    };
    let (few, many) = (shortest(1000), shortest(8000));
    assert!(many < 24 * few, "{few:?} became {many:?}");
}

/// KVM has 32,764 slots. Whoever wants more than the bound is told why, and finds the memory that it had.
#[test]
fn too_many_slots_end_the_run_with_the_reason_and_take_nothing_away() {
    let Some(vm) = kvm() else { return };
    let (_, wanted) = alternating(20_000);
    let (mut slots, _) = alternating(10);
    let error = slots.replace(&vm, &wanted, |_| false).unwrap_err().to_string();
    assert!(error.contains("shared and private pages alternate too often"), "{error}");
    assert_eq!(slots.used.iter().flatten().count(), 10);
}

/// KVM refuses two slots at one address. What was refused is not there, and its number is free.
#[test]
fn memory_that_kvm_refused_is_not_remembered() {
    let Some(vm) = kvm() else { return };
    let options = EmulatedOptions {
        backing: Backing::Split,
        strict: false,
        two_mib: snp_model::rmp::TwoMib::Accept,
        statistics: false,
        product: None,
        keys: std::path::PathBuf::new(),
    };
    let views = Views::new(options, 51);
    let memory = |slot, gpa| MemorySlot {
        slot,
        gpa,
        shared: Arc::new(Mapping::anonymous(0x1000).unwrap()),
        private: None,
    };
    views.add_shared_only(&vm, memory(1, 0x1000)).unwrap();
    assert!(views.add_shared_only(&vm, memory(2, 0x1000)).is_err(), "other memory is there");
    assert!(views.remove_shared_only(&vm, 2).is_err(), "it was never there");
    views.add_shared_only(&vm, memory(2, 0x2000)).unwrap();
    views.remove_shared_only(&vm, 1).unwrap();
    assert!(views.add_shared_only(&vm, memory(3, 0x2000)).is_err(), "slot 2 is still there");
    views.add_shared_only(&vm, memory(4, 0x4000)).unwrap();
    assert_eq!(lock(&views.slots).used.len(), 2, "no number is lost");
}

/// Each run of pages in one state is a mapping of the process; the host limits them (65,530 by default).
#[test]
fn too_many_mappings_of_a_strict_guest_are_named_as_its_alternating_pages() {
    let named = |errno| protecting(io::Error::from_raw_os_error(errno)).to_string();
    assert!(named(libc::ENOMEM).contains("vm.max_map_count"), "{}", named(libc::ENOMEM));
    assert!(!named(libc::EACCES).contains("vm.max_map_count"));
}
