// SPDX-License-Identifier: Apache-2.0
//! Replaced instructions that a guest executes where, when and as often as it likes, and orders between
//! vCPUs.

use kvm_bindings::kvm_sev_snp_launch_finish;
use snp_model::vm::ApAction;
use snp_model::vm::ApCreation;

use super::super::old_launch_test::CODE;
use super::super::old_launch_test::MEMORY;
use super::super::old_launch_test::launching;
use super::super::vm::EmulatedVm;
use super::*;
use crate::platform::emulated::shared::Stage;
use crate::platform::sev::Snp as _;

/// A launched guest of `count` vCPUs, with `code` at [`CODE`]. Of what runs nothing has been told yet.
fn launched(code: &[u8], count: u32) -> Option<(EmulatedVm, Vec<EmulatedVcpu>)> {
    let vm = launching()?;
    vm.0.views.write(CODE, View::Private, code).unwrap();
    vm.snp_launch_finish(&mut kvm_sev_snp_launch_finish::default(), None).unwrap();
    // As `create_vcpu` makes them, but for being launched: registers are read and written below what KVM
    // would refuse.
    let vcpu = |id| {
        let kvm = vm.0.kvm.new_vcpu(id).unwrap();
        let recorded = Recorded::new(kvm.get_regs().unwrap(), kvm.get_sregs().unwrap());
        let recorded = Arc::new(Mutex::new(recorded));
        let wake = Arc::new(Wake::new().unwrap());
        vm.0.join(id, &recorded, &wake);
        EmulatedVcpu::new(id, Arc::clone(&vm.0), kvm, recorded, wake, false)
    };
    let vcpus = (0..count).map(vcpu).collect();
    Some((vm, vcpus))
}

fn at(vcpu: &mut EmulatedVcpu, rip: u64) {
    let mut regs = vcpu.kvm.get_regs().unwrap();
    regs.rip = rip;
    vcpu.kvm.set_regs(&regs).unwrap();
}

/// `OUT port, AL` and a NOP, as the patches write it.
const VMGEXIT: [u8; 4] = [0xe6, 0xe4, 0x66, 0x90];
const HANDOVER: [u8; 4] = [0xe6, 0xe8, 0x66, 0x90];
const HOOK: [u8; 3] = [0xe6, 0xe7, 0x90];

/// One page can be mapped at any number of addresses; here the whole of memory is full of replacements.
#[test]
fn a_guest_with_replacements_everywhere_costs_the_monitor_a_bounded_memory() {
    let Some((vm, mut vcpus)) = launched(&[], 1) else { return };
    vm.0.views.write(0, View::Private, &VMGEXIT.repeat(MEMORY as usize / 4)).unwrap();
    let vcpu = &mut vcpus[0];
    let mut most = 0;
    for rip in (0..MEMORY).step_by(4) {
        assert_eq!(vcpu.site(rip, &VMGEXIT), Some(rip));
        most = most.max(vcpu.sites.len());
    }
    // There are 262,144 places. Some hundred would do for a kernel.
    assert!((100..10_000).contains(&most), "{most}");
    // A port write that is another replacement's is not taken for this one.
    assert_eq!(vcpu.site(MEMORY - 4, &HANDOVER), None);
}

/// A KVM that emulates the port write has moved RIP on by its two bytes when it exits.
#[test]
fn the_handover_is_known_on_a_kvm_that_has_moved_on() {
    for rip in [CODE, CODE + 2] {
        let Some((vm, mut vcpus)) = launched(&HANDOVER, 1) else { return };
        at(&mut vcpus[0], rip);
        assert!(matches!(vcpus[0].handover(), Ok(Next::Enter)), "RIP {rip:#x}");
        assert_eq!(vm.0.stage(), Stage::Kernel);
    }
}

/// Afterwards, on another vCPU, or out of order these bytes are what they are: writes to a port, which the
/// monitor's bus answers.
#[test]
fn handover_and_hook_are_taken_once_in_order_on_the_first_vcpu() {
    let Some((vm, mut vcpus)) = launched(&[&HANDOVER[..], &HOOK].concat(), 2) else { return };
    at(&mut vcpus[1], CODE);
    assert!(matches!(vcpus[1].handover(), Ok(Next::Pass)), "another vCPU");
    at(&mut vcpus[0], CODE + 4);
    assert!(matches!(vcpus[0].kernel_entry(), Ok(Next::Pass)), "before the handover");
    assert_eq!(vm.0.stage(), Stage::Stage0);
    at(&mut vcpus[0], CODE);
    assert!(matches!(vcpus[0].handover(), Ok(Next::Enter)));
    assert!(matches!(vcpus[0].handover(), Ok(Next::Pass)), "again");
    at(&mut vcpus[0], CODE + 4);
    assert!(matches!(vcpus[0].kernel_entry(), Ok(Next::Pass)), "this guest has no decompressor");
    assert_eq!(vm.0.stage(), Stage::Kernel);
}

/// The monitor answers when the page is in the right state. Then the instruction is executed again, as on
/// hardware.
#[test]
fn a_fault_of_a_replaced_instruction_is_told_once_and_the_instruction_tried_again() {
    let Some((_vm, mut vcpus)) = launched(&VMGEXIT, 1) else { return };
    let vcpu = &mut vcpus[0];
    at(vcpu, CODE + 2);
    vcpu.told = Some(PendingExit::Fault { gpa: 0x9000, again: Some(CODE) });
    assert!(matches!(vcpu.answered(), Ok(Next::Enter)));
    assert!(vcpu.told.is_none());
    assert_eq!(vcpu.kvm.get_regs().unwrap().rip, CODE);
    // An access of another kind stays where it is: the monitor ends such a run.
    vcpu.told = Some(PendingExit::Fault { gpa: 0x9000, again: None });
    assert!(matches!(vcpu.answered(), Ok(Next::Tell)));
}

#[test]
fn an_instruction_that_kvm_gives_up_on_is_named_by_its_address() {
    let Some((_vm, mut vcpus)) = launched(&[], 1) else { return };
    at(&mut vcpus[0], 0x5abc);
    let text = vcpus[0].not_emulated(1).to_string();
    assert!(text.contains("could not emulate") && text.contains("RIP 0x5abc"), "{text}");
}

/// An order waits until its target has taken the last one. Meanwhile others are given to others.
#[test]
fn an_order_that_waits_for_its_target_holds_up_nobody_else() {
    let Some((vm, vcpus)) = launched(&[], 2) else { return };
    let stop = |apic_id| ApCreation { apic_id, action: ApAction::Stop };
    let shut = vcpus[0].wake.shut();
    let (told, done) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| vm.0.order(stop(0)));
        std::thread::sleep(Duration::from_millis(200));
        scope.spawn(|| {
            vm.0.order(stop(1));
            told.send(()).unwrap();
        });
        let given = done.recv_timeout(Duration::from_secs(5));
        drop(shut);
        assert!(given.is_ok(), "the second order waited for the first");
    });
    assert!(vcpus[0].wake.pending() && vcpus[1].wake.pending());
}
