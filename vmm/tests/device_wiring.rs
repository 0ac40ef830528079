// SPDX-License-Identifier: Apache-2.0
//! What devices are connected to, tried by guests of a few bytes on this host's KVM: doorbells, memory,
//! messages. Plain guests, and SNP guests of the emulated platform, which reach devices by addresses without
//! the C-bit.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::error::Error;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use snp::board::pci;
use test_support::code::out;
use test_support::code::power_off;
use test_support::monitor::Capture;
use test_support::tiny::emulated_guest;
use test_support::tiny::msrs_reach_the_monitor;
use test_support::tiny::plain_guest;
use vmm::machine::Machine;
use vmm::machine::companion::Companion;
use vmm::platform::Platform;
use vmm::platform::interrupt::MsiMessage;
use vmm::platform::mapping::Mapping;
use vmm::run::guest::Guest;
use vmm::run::guest::Host;
use vmm::run::monitor;
use vmm::run::outcome::Outcome;
use vmm::spec::Backing;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

/// Where the devices of these tests are: in the window of base address registers.
const DOORBELL: u32 = pci::BARS.start as u32;
const MEMORY: u32 = DOORBELL + 0x1000;

/// A companion that does this with each machine.
struct Connect<F>(F);

impl<F: FnMut(&Machine) -> Result<(), Box<dyn Error + Send + Sync>>> Companion for Connect<F> {
    fn name(&self) -> &'static str {
        "the device"
    }

    fn attach(&mut self, _: u32, machine: &Machine) -> Result<(), Box<dyn Error + Send + Sync>> {
        (self.0)(machine)
    }
}

/// Runs a guest to its end; what it wrote to its console.
fn run<F>(platform: &dyn Platform, guest: Guest, connect: F) -> Vec<u8>
where
    F: FnMut(&Machine) -> Result<(), Box<dyn Error + Send + Sync>> + 'static,
{
    let console = Capture::default();
    let host = Host { companions: vec![Box::new(Connect(connect))], ..Host::new(Box::new(console.clone())) };
    assert_eq!(monitor::run(platform, guest, host).unwrap(), Outcome::PoweredOff);
    console.bytes()
}

/// Calls `test` for a guest with `code` of each kind that this host can run.
fn each_kind(code: &[u8], test: impl Fn(&dyn Platform, Guest)) {
    if let Some((platform, guest)) = plain_guest(code, 1) {
        test(&platform, guest);
    }
    if !msrs_reach_the_monitor() {
        return;
    }
    if let Some((platform, guest)) = emulated_guest(code, Backing::Split) {
        test(&platform, guest);
    }
}

/// `mov ebx, ADDRESS; mov dword [rbx], VALUE`
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xbb][..], &address.to_le_bytes(), &[0xc7, 0x03], &value.to_le_bytes()].concat()
}

/// `mov ebx, ADDRESS; mov al, [rbx]; mov dx, 0x3f8; out dx, al`
fn show(address: u32) -> Vec<u8> {
    [&[0xbb][..], &address.to_le_bytes(), &[0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee]].concat()
}

#[test]
fn writes_to_a_doorbell_are_events() {
    let code = [store(DOORBELL, 1), store(DOORBELL, 2), store(DOORBELL, 3), power_off()].concat();
    each_kind(&code, |platform, guest| {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let theirs = event.try_clone().unwrap();
        run(platform, guest, move |machine| Ok(machine.vm.register_ioevent(&theirs, DOORBELL.into())?));
        assert_eq!(event.read().unwrap(), 3);
    });
}

#[test]
fn a_doorbell_that_was_taken_back_is_silent() {
    let code = [store(DOORBELL, 1), power_off()].concat();
    each_kind(&code, |platform, guest| {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let theirs = event.try_clone().unwrap();
        run(platform, guest, move |machine| {
            machine.vm.register_ioevent(&theirs, DOORBELL.into())?;
            Ok(machine.vm.unregister_ioevent(&theirs, DOORBELL.into())?)
        });
        assert!(event.read().is_err(), "nothing was signalled");
    });
}

/// The guest sees device memory, writes to it, and finds nothing in the place of memory that was taken away.
#[test]
fn memory_of_a_device_is_there_until_it_is_taken_away() {
    let code = [show(MEMORY), store(MEMORY, u32::from(b'w')), show(MEMORY + 0x1000), power_off()].concat();
    each_kind(&code, |platform, guest| {
        let page = Arc::new(Mapping::anonymous(0x1000).unwrap());
        page.write(0, b"m").unwrap();
        let theirs = Arc::clone(&page);
        let console = run(platform, guest, move |machine| {
            assert_eq!(machine.addresses.take(0x1000), Some(DOORBELL.into()));
            assert_eq!(machine.addresses.take(0x1000), Some(MEMORY.into()));
            machine.slots.add(MEMORY.into(), &theirs)?;
            let gone = machine.slots.add(u64::from(MEMORY) + 0x1000, &theirs)?;
            Ok(machine.slots.remove(gone)?)
        });
        assert_eq!(console, [b'm', 0xff]);
        let mut byte = [0];
        page.read(0, &mut byte).unwrap();
        assert_eq!(&byte, b"w");
    });
}

/// KVM answers -1 to a message that no local APIC takes (Linux 7.3, `lapic.c:__kvm_irq_delivery_to_apic`),
/// which is the errno of EPERM and no error.
#[test]
fn a_message_without_a_receiver_is_no_error() {
    each_kind(&power_off(), |platform, guest| {
        run(platform, guest, |machine| {
            // Physical destination 200: this guest has one vCPU.
            let nobody = MsiMessage { address: 0xfee0_0000 | 200 << 12, data: 0x41 };
            assert!(!machine.vm.signal_msi(nobody)?);
            Ok(())
        });
    });
}

/// The guest rings, the device answers with a message, and the guest finds its vector in the local APIC's IRR
/// (AMD64 APM volume 2, 16.6.1): registers 0xf0 (bit 8 enables the APIC) and 0x220 (vectors 32 to 63 are at
/// 0x210, 64 to 95 at 0x220).
#[test]
fn a_device_sends_the_message_that_was_set() {
    let poll = [0x8b, 0x03, 0xa9, 2, 0, 0, 0, 0x75, 14, 0xff, 0xc9, 0x75, 0xf3];
    let code = [
        &store(0xfee0_00f0, 0x1ff)[..],
        &store(DOORBELL, 1),
        // mov ebx, IRR; mov ecx, TRIES; again: mov eax, [rbx]; test eax, 2; jnz found; dec ecx; jnz again
        &[0xbb, 0x20, 0x02, 0xe0, 0xfe, 0xb9, 0x00, 0x00, 0x04, 0x00],
        &poll,
        &power_off(),
        &out(0x3f8, b'i'),
        &power_off(),
    ]
    .concat();
    each_kind(&code, |platform, guest| {
        let bell = EventFd::new(0).unwrap();
        let kept = Arc::new(Mutex::new(None));
        let console = run(platform, guest, move |machine| {
            machine.vm.register_ioevent(&bell, DOORBELL.into())?;
            let interrupt = machine.interrupts.message()?;
            interrupt.send(Some(MsiMessage { address: 0xfee0_0000, data: 0x41 }))?;
            let (event, bell) = (interrupt.event().try_clone()?, bell.try_clone()?);
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(interrupt);
            std::thread::spawn(move || {
                bell.read().unwrap();
                event.write(1).unwrap();
            });
            Ok(())
        });
        assert_eq!(console, b"i");
    });
}
