// SPDX-License-Identifier: Apache-2.0
//! Interrupts of a VM: pins of its controllers as the board has them, and messages, whose numbers are given
//! out.
//!
//! A device raises either by an event descriptor, in the kernel; the monitor's threads take no part. What an
//! interrupt number of the second kind sends is set by the guest, at any time, so the table of messages is
//! made anew at each change.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::lock::lock;
use crate::platform::Vm;
use crate::platform::error::CallError;
use crate::platform::interrupt::MsiMessage;
use crate::platform::interrupt::MsiRoute;

/// First number that is not a pin of KVM's IOAPIC (Linux, `KVM_IOAPIC_NUM_PINS`).
const FIRST_MESSAGE: u32 = 24;
/// End of the numbers that are given out: KVM's table has 4,096 routes (Linux, `KVM_MAX_IRQ_ROUTES`), and 16
/// of the pins have two.
const NUMBERS: u32 = 4096 - 16;

/// Why there is no interrupt.
#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    /// The pin has a device already.
    #[error("interrupt {0} has a device already, or is no pin of the controllers")]
    Taken(u32),
    /// All numbers are given out.
    #[error("all {} numbers of message-signalled interrupts are given out", NUMBERS - FIRST_MESSAGE)]
    None,
    /// No event descriptor.
    #[error("cannot make an event descriptor: {0}")]
    Event(io::Error),
    /// KVM does not take it.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// The interrupts of one VM.
pub struct Interrupts {
    vm: Arc<dyn Vm>,
    given: Mutex<Given>,
}

#[derive(Default)]
struct Given {
    pins: Vec<u32>,
    /// What each number sends; `None`: nothing yet.
    messages: BTreeMap<u32, Option<MsiMessage>>,
}

impl Given {
    fn routes(&self) -> Vec<MsiRoute> {
        let route = |(gsi, message): (&u32, &Option<MsiMessage>)| {
            message.map(|message| MsiRoute { gsi: *gsi, message })
        };
        self.messages.iter().filter_map(route).collect()
    }
}

impl Interrupts {
    /// Those of `vm`, none of which has a device.
    pub fn new(vm: &Arc<dyn Vm>) -> Arc<Self> {
        Arc::new(Interrupts { vm: Arc::clone(vm), given: Mutex::default() })
    }

    /// The event that raises a pin, for the one device that the board has there.
    pub fn pin(&self, pin: u32) -> Result<EventFd, InterruptError> {
        let mut given = lock(&self.given);
        if pin >= FIRST_MESSAGE || given.pins.contains(&pin) {
            return Err(InterruptError::Taken(pin));
        }
        let event = EventFd::new(EFD_NONBLOCK).map_err(InterruptError::Event)?;
        self.vm.register_irqfd(&event, pin)?;
        given.pins.push(pin);
        Ok(event)
    }

    /// An interrupt that sends a message, once the guest has said which.
    pub fn message(self: &Arc<Self>) -> Result<MessageInterrupt, InterruptError> {
        let mut given = lock(&self.given);
        let free = (FIRST_MESSAGE..NUMBERS).find(|gsi| !given.messages.contains_key(gsi));
        let gsi = free.ok_or(InterruptError::None)?;
        let event = EventFd::new(EFD_NONBLOCK).map_err(InterruptError::Event)?;
        self.vm.register_irqfd(&event, gsi)?;
        given.messages.insert(gsi, None);
        Ok(MessageInterrupt { interrupts: Arc::clone(self), gsi, event })
    }
}

/// An interrupt that sends a message; its number is free again when this is dropped.
pub struct MessageInterrupt {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    event: EventFd,
}

impl MessageInterrupt {
    /// Who signals this raises the interrupt.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Sets what is sent; `None`: nothing. When this returns, the old message is not sent any more.
    pub fn send(&self, message: Option<MsiMessage>) -> Result<(), CallError> {
        let mut given = lock(&self.interrupts.given);
        let old = given.messages.insert(self.gsi, message);
        let result = self.interrupts.vm.set_msi_routes(&given.routes());
        if result.is_err() {
            // KVM keeps its table whole if it refuses one.
            given.messages.insert(self.gsi, old.flatten());
        }
        result
    }
}

impl Drop for MessageInterrupt {
    fn drop(&mut self) {
        let mut given = lock(&self.interrupts.given);
        let sent = given.messages.insert(self.gsi, None).flatten();
        // A number that KVM still knows is not given out again.
        let vm = &self.interrupts.vm;
        let silent = sent.is_none() || vm.set_msi_routes(&given.routes()).is_ok();
        if vm.unregister_irqfd(&self.event, self.gsi).is_ok() && silent {
            given.messages.remove(&self.gsi);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::scripted::ScriptedVm;
    use crate::platform::scripted::Wiring;

    #[test]
    fn a_pin_has_one_device_and_messages_have_numbers_of_their_own() {
        let vm = Arc::new(ScriptedVm::default());
        let interrupts = Interrupts::new(&(Arc::clone(&vm) as Arc<dyn Vm>));
        interrupts.pin(4).unwrap();
        assert!(matches!(interrupts.pin(4), Err(InterruptError::Taken(4))));
        assert!(matches!(interrupts.pin(24), Err(InterruptError::Taken(24))));
        let (first, second) = (interrupts.message().unwrap(), interrupts.message().unwrap());
        let message = |data| MsiMessage { address: 0xfee0_0000, data };
        first.send(Some(message(0x30))).unwrap();
        second.send(Some(message(0x31))).unwrap();
        drop(first);
        let third = interrupts.message().unwrap();
        third.send(Some(message(0x32))).unwrap();
        let route = |gsi, data| MsiRoute { gsi, message: message(data) };
        let expected = [
            Wiring::Interrupt(4),
            Wiring::Interrupt(24),
            Wiring::Interrupt(25),
            Wiring::Routes(vec![route(24, 0x30)]),
            Wiring::Routes(vec![route(24, 0x30), route(25, 0x31)]),
            Wiring::Routes(vec![route(25, 0x31)]),
            Wiring::NoInterrupt(24),
            Wiring::Interrupt(24),
            Wiring::Routes(vec![route(24, 0x32), route(25, 0x31)]),
        ];
        assert_eq!(*vm.wiring.lock().unwrap(), expected);
    }

    #[test]
    fn numbers_end_before_kvm_s_table_does() {
        let vm: Arc<dyn Vm> = Arc::new(ScriptedVm::default());
        let interrupts = Interrupts::new(&vm);
        let all: Vec<_> = std::iter::from_fn(|| interrupts.message().ok()).collect();
        // 40 routes of pins stand in the same table (16 of the PICs, 24 of the IOAPIC).
        assert_eq!(all.len() + 40, 4096);
        assert!(matches!(interrupts.message(), Err(InterruptError::None)));
    }
}
