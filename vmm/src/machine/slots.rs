// SPDX-License-Identifier: Apache-2.0
//! Memory slots of a VM, given out: nobody chooses a number.

use std::sync::Arc;
use std::sync::Mutex;

use crate::lock::lock;
use crate::platform::Vm;
use crate::platform::error::CallError;
use crate::platform::mapping::Mapping;
use crate::platform::memory::MemorySlot;

/// The slots of one VM.
pub struct Slots {
    vm: Arc<dyn Vm>,
    /// By number; true is taken.
    taken: Mutex<Vec<bool>>,
}

/// Memory of a device in the guest: always shared, and no RAM. It stays until the VM is gone, or until it is
/// taken away.
#[derive(Debug, PartialEq, Eq)]
pub struct DeviceMemory(u32);

impl Slots {
    /// Of a VM whose RAM has the first `ram` slots.
    pub fn new(vm: &Arc<dyn Vm>, ram: usize) -> Self {
        Slots { vm: Arc::clone(vm), taken: Mutex::new(vec![true; ram]) }
    }

    /// Shows `memory` to the guest at `gpa`.
    pub fn add(&self, gpa: u64, memory: &Arc<Mapping>) -> Result<DeviceMemory, CallError> {
        let mut taken = lock(&self.taken);
        let free = taken.iter().position(|taken| !taken).unwrap_or(taken.len());
        let slot = u32::try_from(free).map_err(|_| CallError::errno("a memory slot", libc::EINVAL))?;
        self.vm.set_memory(MemorySlot { slot, gpa, shared: Arc::clone(memory), private: None })?;
        match taken.get_mut(free) {
            Some(place) => *place = true,
            None => taken.push(true),
        }
        Ok(DeviceMemory(slot))
    }

    /// Takes it away again; the guest's accesses become exits.
    pub fn remove(&self, memory: DeviceMemory) -> Result<(), CallError> {
        let mut taken = lock(&self.taken);
        self.vm.remove_memory(memory.0)?;
        if let Some(place) = taken.get_mut(memory.0 as usize) {
            *place = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::scripted::ScriptedVm;
    use crate::platform::scripted::Wiring;

    #[test]
    fn a_number_is_given_out_once_and_again_when_it_is_free() {
        let vm = Arc::new(ScriptedVm::default());
        let slots = Slots::new(&(Arc::clone(&vm) as Arc<dyn Vm>), 2);
        let page = Arc::new(Mapping::anonymous(0x1000).unwrap());
        let first = slots.add(0x1000, &page).unwrap();
        let _second = slots.add(0x2000, &page).unwrap();
        slots.remove(first).unwrap();
        slots.add(0x3000, &page).unwrap();
        slots.add(0x4000, &page).unwrap();
        let memory = Wiring::Memory;
        let expected =
            [memory(2, 0x1000), memory(3, 0x2000), Wiring::NoMemory(2), memory(2, 0x3000), memory(4, 0x4000)];
        assert_eq!(*vm.wiring.lock().unwrap(), expected);
    }
}
