// SPDX-License-Identifier: Apache-2.0
//! Memory slots of an emulated VM.

use super::super::old_launch_test::launching;
use super::*;
use crate::platform::mapping::Mapping;

/// KVM answers EINVAL to another size of a slot that is there, and moves one of the same size (Linux,
/// `kvm_main.c:kvm_set_memory_region`); the monitor gives out each number once and means neither.
#[test]
fn a_slot_number_of_ram_is_not_a_device_s_as_well() {
    let Some(vm) = launching() else { return };
    let memory = |slot, gpa| MemorySlot {
        slot,
        gpa,
        shared: Arc::new(Mapping::anonymous(4096).unwrap()),
        private: None,
    };
    assert_eq!(vm.set_memory(memory(0, 0xc000_0000)).unwrap_err().source.raw_os_error(), Some(libc::EINVAL));
    vm.set_memory(memory(1, 0xc000_0000)).unwrap();
    assert!(vm.set_memory(memory(1, 0xc000_1000)).is_err());
    assert!(vm.remove_memory(0).is_err(), "RAM stays");
    vm.remove_memory(1).unwrap();
    vm.set_memory(memory(1, 0xc000_1000)).unwrap();
}
