// SPDX-License-Identifier: Apache-2.0
//! Guests of a few bytes on this host's KVM: every kind of exit, every way to end, in milliseconds.
//!
//! Without `/dev/kvm` the tests say so and do nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use test_support::code::CRASH;
use test_support::code::ghcb_msr;
use test_support::code::out;
use test_support::code::power_off;
use test_support::monitor::run;
use test_support::tiny::emulated_guest;
use test_support::tiny::msrs_reach_the_monitor;
use test_support::tiny::plain_guest;
use vmm::run::outcome::Outcome;
use vmm::spec::Backing;

type Ended = (Result<Outcome, String>, Vec<u8>);

fn run_plain(code: &[u8], cpus: u32) -> Option<Ended> {
    plain_guest(code, cpus).map(|(platform, guest)| run(&platform, guest))
}

fn emulated(code: &[u8]) -> Option<Ended> {
    emulated_guest(code, Backing::Single).map(|(platform, guest)| run(&platform, guest))
}

#[test]
fn a_guest_writes_to_its_console_and_switches_itself_off() {
    let code = [out(0x3f8, b'h'), out(0x3f8, b'i'), power_off()].concat();
    let Some((outcome, console)) = run_plain(&code, 1) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
    assert_eq!(console, b"hi");
}

#[test]
fn vcpus_that_never_start_do_not_keep_a_guest_alive() {
    let Some((outcome, _)) = run_plain(&power_off(), 4) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
}

#[test]
fn a_port_without_a_device_reads_as_ones() {
    // mov dx, 0x9999; in al, dx; mov dx, 0x3f8; out dx, al
    let code = [&[0x66, 0xba, 0x99, 0x99, 0xec, 0x66, 0xba, 0xf8, 0x03, 0xee][..], &power_off()].concat();
    let Some((outcome, console)) = run_plain(&code, 1) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
    assert_eq!(console, [0xff]);
}

#[test]
fn device_memory_without_a_device_reads_as_ones_and_takes_writes() {
    // mov ebx, 0xd0000000; mov [rbx], al; mov al, [rbx]; mov dx, 0x3f8; out dx, al
    let code =
        [&[0xbb, 0, 0, 0, 0xd0, 0x88, 0x03, 0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee][..], &power_off()]
            .concat();
    let Some((outcome, console)) = run_plain(&code, 1) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
    assert_eq!(console, [0xff]);
}

#[test]
fn both_reset_registers_reset() {
    for (port, value) in [(0x64, 0xfe), (0xcf9, 0x06)] {
        let Some((outcome, _)) = run_plain(&out(port, value), 1) else { return };
        assert_eq!(outcome, Ok(Outcome::Rebooted), "port {port:#x}");
    }
}

#[test]
fn a_triple_fault_is_a_crash() {
    let Some((outcome, _)) = run_plain(&CRASH, 1) else { return };
    assert_eq!(outcome, Ok(Outcome::Crashed { vcpu: 0 }));
}

fn run_emulated(code: &[u8]) -> Option<Ended> {
    if msrs_reach_the_monitor() { emulated(&[code, &CRASH].concat()) } else { None }
}

#[test]
fn a_guests_termination_is_told_in_words() {
    // GHCB specification, 2.3.1: 0x100, reason set in bits 15:12, code in 23:16.
    let Some((outcome, _)) = run_emulated(&ghcb_msr(0x04_1100)) else { return };
    let outcome = outcome.unwrap();
    assert!(matches!(outcome, Outcome::Terminated(_)), "{outcome:?}");
    assert_eq!(outcome.exit_code(), 4);
    assert!(outcome.to_string().contains("CPUID page"), "{outcome}");
}

#[test]
fn the_sev_info_answer_carries_versions_and_c_bit() {
    // Ask; then send the answer's bits 23:16 of the upper half (highest version) and the C-bit to the
    // console.
    let code = [
        ghcb_msr(2),
        vec![0x0f, 0x32, 0xc1, 0xe8, 0x18], // rdmsr; shr eax, 24: the C-bit
        vec![0x89, 0xd3, 0x66, 0xba, 0xf8, 0x03, 0xee], // mov ebx, edx; to the console
        vec![0x89, 0xd8, 0xc1, 0xe8, 0x10, 0xee], // mov eax, ebx; shr eax, 16: the highest version
        vec![0x88, 0xd8, 0xee],             // mov al, bl: the lowest version
        power_off(),
    ]
    .concat();
    let Some((outcome, console)) = run_emulated(&code) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
    // Linux 6.12's KVM offers versions 1 to 2.
    assert_eq!(console.get(1..), Some(&[2, 1][..]));
    assert!((35..=46).contains(&console[0]), "{console:?}");
}

#[test]
fn a_ghcb_that_was_not_registered_ends_the_run() {
    let Some((outcome, _)) = run_emulated(&ghcb_msr(0x20_0000)) else { return };
    // The page is private, so KVM could not map it: it resumes the guest, which then crashes.
    assert_eq!(outcome, Ok(Outcome::Crashed { vcpu: 0 }));
    // Made shared first (MSR protocol, operation 2), it is readable, but not the guest's GHCB.
    let code = [ghcb_msr(2 << 52 | 0x20_0000 | 0x14), ghcb_msr(0x20_0000)].concat();
    let Some((outcome, _)) = run_emulated(&code) else { return };
    assert!(outcome.as_ref().is_err_and(|e| e.contains("GHCB that it had not registered")), "{outcome:?}");
}
