// SPDX-License-Identifier: Apache-2.0
//! Guests that ask for a reset and get a new VM: nothing of the old one is seen by the guest or kept by the
//! host.
//!
//! Without `/dev/kvm` the tests say so and do nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::error::Error;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use test_support::code::CRASH;
use test_support::code::out;
use test_support::code::power_off;
use test_support::held::held;
use test_support::monitor::BeforeLife;
use test_support::monitor::Capture;
use test_support::tiny::emulated_guest;
use test_support::tiny::plain_guest;
use vmm::events::Event;
use vmm::events::Events;
use vmm::events::Sink;
use vmm::events::State;
use vmm::machine::Machine;
use vmm::machine::companion::Companion;
use vmm::machine::companion::Work;
use vmm::platform::Platform;
use vmm::run::error::MonitorError;
use vmm::run::guest::Guest;
use vmm::run::guest::Host;
use vmm::run::guest::Restart;
use vmm::run::monitor;
use vmm::run::outcome::Outcome;
use vmm::spec::Backing;

/// One test at a time: they count what the process holds, and send it signals.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn host(
    console: &Capture,
    lives: Option<u32>,
    observer: impl FnMut(u32) -> Result<(), Box<dyn Error + Send + Sync>> + 'static,
) -> Host {
    Host {
        restart: Some(Restart { lives, pace: Duration::ZERO }),
        companions: vec![Box::new(BeforeLife(observer))],
        ..Host::new(Box::new(console.clone()))
    }
}

/// Byte in RAM that the guest of [`touch_and_reset`] writes, far from its code.
const MARK: u32 = 0x20_0000;
const LIVES: u32 = 50;

/// Sends the byte at [`MARK`] to the console, overwrites it, and asks for a reset.
fn touch_and_reset() -> Vec<u8> {
    let mut code = vec![0xbb]; // mov ebx, MARK
    code.extend(MARK.to_le_bytes());
    code.extend([0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xc6, 0x03, 0x55]); // mov al, [rbx]; to the console; mov [rbx], 0x55
    [code, out(0xcf9, 0x06), CRASH.to_vec()].concat()
}

fn fifty_lives(platform: &dyn Platform, guest: Guest) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (console, notes) = (Capture::default(), Arc::clone(&seen));
    let host = host(&console, Some(LIVES), move |life| {
        notes.lock().unwrap().push((life, held()));
        Ok(())
    });
    let before = held();
    assert_eq!(monitor::run(platform, guest, host).unwrap(), Outcome::Rebooted);
    let after = held();
    assert_eq!(console.bytes(), [0; LIVES as usize], "each VM's memory is new");
    let seen = seen.lock().unwrap();
    assert_eq!(seen.iter().map(|(life, _)| *life).collect::<Vec<_>>(), (1..=LIVES).collect::<Vec<_>>());
    let (early, late) = (seen[4].1, seen[LIVES as usize - 1].1);
    println!("life 5: {early:?}; life {LIVES}: {late:?}; afterwards: {after:?}");
    assert_eq!((early.descriptors, early.threads), (late.descriptors, late.threads));
    assert_eq!(before.descriptors, after.descriptors);
    assert_eq!(before.threads, after.threads);
    // One VM's tables and stacks would be more than this in 45 lives; the allocator's own ups and downs are
    // less.
    assert!(late.rss_kib < early.rss_kib + 512, "{} KiB became {} KiB", early.rss_kib, late.rss_kib);
}

#[test]
fn fifty_plain_lives_leave_nothing_behind() {
    let _alone = alone();
    let Some((platform, guest)) = plain_guest(&touch_and_reset(), 2) else { return };
    fifty_lives(&platform, guest);
}

#[test]
fn fifty_snp_lives_leave_nothing_behind() {
    let _alone = alone();
    for backing in [Backing::Single, Backing::Split] {
        let Some((platform, guest)) = emulated_guest(&touch_and_reset(), backing) else { return };
        fifty_lives(&platform, guest);
    }
}

/// What is told of a run, in order.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<Event>>>);

impl Sink for Told {
    fn event(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

#[test]
fn whoever_asked_for_the_guest_is_told_of_each_of_its_lives() {
    let _alone = alone();
    let Some((platform, guest)) = plain_guest(&touch_and_reset(), 1) else { return };
    let told = Told::default();
    let host = Host { events: Events::to(told.clone()), ..host(&Capture::default(), Some(2), |_| Ok(())) };
    assert_eq!(monitor::run(&platform, guest, host).unwrap(), Outcome::Rebooted);
    let life = |life| {
        [State::Launching { life }, State::Running { life }, State::Stopped { life }]
            .map(Event::State)
            .to_vec()
    };
    let reset = Event::Note("the guest asked for a reset: VM number 2 follows".into());
    assert_eq!(*told.0.lock().unwrap(), [life(1), vec![reset], life(2)].concat());
}

#[test]
fn a_life_that_ends_otherwise_is_the_last() {
    let _alone = alone();
    for (code, outcome) in
        [(power_off(), Outcome::PoweredOff), (CRASH.to_vec(), Outcome::Crashed { vcpu: 0 })]
    {
        let Some((platform, guest)) = plain_guest(&code, 1) else { return };
        let host = host(&Capture::default(), None, |_| Ok(()));
        assert_eq!(monitor::run(&platform, guest, host).unwrap(), outcome);
    }
}

/// Sends this process a signal, for which [`monitor::run`] has a handler while it runs.
fn signal_ourselves() {
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
}

#[test]
fn a_signal_ends_a_later_life_and_the_time_between_two() {
    let _alone = alone();
    let forever = [0xeb, 0xfe]; // jmp to itself
    let code = touch_and_reset();
    // Life 3 is told while it is prepared, whether its guest then resets or runs for good.
    for last in [&code[..], &forever] {
        let Some((platform, guest)) = plain_guest(last, 1) else { return };
        let when = if last == forever { 1 } else { 3 };
        let host = host(&Capture::default(), None, move |life| {
            if life == when {
                signal_ourselves();
            }
            assert!(life <= when + 1, "the signal was not heard");
            Ok(())
        });
        assert_eq!(monitor::run(&platform, guest, host).unwrap(), Outcome::Signal(15));
    }
    // Between two lives: the guest has asked for its reset long before the next VM may start.
    let Some((platform, guest)) = plain_guest(&code, 1) else { return };
    let mut host = host(&Capture::default(), None, |life| {
        assert_eq!(life, 1);
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_secs(2));
            signal_ourselves();
        });
        Ok(())
    });
    host.restart = Some(Restart { lives: None, pace: Duration::from_secs(60) });
    let begun = Instant::now();
    assert_eq!(monitor::run(&platform, guest, host).unwrap(), Outcome::Signal(15));
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_companion_that_cannot_start_anew_ends_the_run_and_is_named() {
    let _alone = alone();
    let Some((platform, guest)) = plain_guest(&touch_and_reset(), 1) else { return };
    let host =
        host(&Capture::default(), None, |life| if life < 3 { Ok(()) } else { Err("no answer".into()) });
    let error = monitor::run(&platform, guest, host).unwrap_err();
    assert!(matches!(error, MonitorError::Restart { life: 3, .. }), "{error:?}");
    assert!(error.to_string().ends_with("VM number 3 could not follow: observer: no answer"), "{error}");
}

/// A companion whose work before life 2 never ends.
struct Hung(Duration);

impl Companion for Hung {
    fn name(&self) -> &'static str {
        "hung"
    }

    fn prepare(&mut self, life: u32) -> Option<(Duration, Work)> {
        let forever = move || match life {
            1 => Ok(()),
            _ => loop {
                std::thread::park();
            },
        };
        Some((self.0, Box::new(forever)))
    }

    fn attach(&mut self, _: u32, _: &Machine) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }
}

#[test]
fn a_companion_that_hangs_ends_the_run_in_time_and_signals_are_heard_meanwhile() {
    let _alone = alone();
    let hung = |patience| Host {
        restart: Some(Restart { lives: None, pace: Duration::ZERO }),
        companions: vec![Box::new(Hung(patience))],
        ..Host::new(Box::new(Capture::default()))
    };
    let Some((platform, guest)) = plain_guest(&touch_and_reset(), 1) else { return };
    let error = monitor::run(&platform, guest, hung(Duration::from_secs(2))).unwrap_err().to_string();
    assert!(error.ends_with("VM number 2 could not follow: hung: no answer within 2 seconds"), "{error}");

    let Some((platform, guest)) = plain_guest(&touch_and_reset(), 1) else { return };
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(3));
        signal_ourselves();
    });
    let begun = Instant::now();
    assert_eq!(monitor::run(&platform, guest, hung(Duration::from_secs(600))).unwrap(), Outcome::Signal(15));
    assert!(begun.elapsed() < Duration::from_secs(60));
}
