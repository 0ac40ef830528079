// SPDX-License-Identifier: Apache-2.0
//! Events of the GHCB page as a guest sees them: AP creation, instructions in the guest's name, guest
//! requests, and what injected faults make of them. One test per rule.

use snp::vmsa::VmsaState;

use super::*;
use crate::commands::FinishArgs;
use crate::commands::Start;
use crate::commands::Update;
use crate::faults::Trigger;
use crate::firmware::message;
use crate::firmware::message::Message;
use crate::vm::ApAction;
use crate::vm::ApCreation;

// --- AP creation

const VMSA: u64 = 0x1_3000;

fn ap_create(s: &mut Setup, apic: u64, request: u64, vmsa: u64, features: u64) -> Outcome {
    s.nae(exit::AP_CREATION, apic << 32 | request, vmsa, &[(Field::Rax, features)])
}

#[test]
fn an_ap_is_created_from_a_page_marked_as_vmsa() {
    let mut s = Setup::new();
    let outcome = ap_create(&mut s, 1, 1, VMSA, 1);
    assert_eq!(
        outcome,
        Outcome::ApCreate(ApCreation { apic_id: 1, action: ApAction::Run { vmsa_gpa: VMSA } })
    );
    assert_eq!(s.infos(), (Some(0), Some(0)));
    assert!(s.vm.load_vmsa(&s.mem, VMSA).unwrap_err().to_string().contains("must be private, validated"));
    s.vm.pvalidate(VMSA, true, 0, 1);
    s.vm.rmpadjust(VMSA, true, 0, 0x1_0001);
    let state = VmsaState { rip: 0x1234, ..VmsaState::reset() };
    s.mem.write(VMSA, View::Private, &state.encode()).unwrap();
    assert_eq!(s.vm.load_vmsa(&s.mem, VMSA), Ok(state));
}

#[test]
fn a_vmsa_at_a_shared_page_or_outside_ram_cannot_be_loaded() {
    let s = Setup::new();
    assert!(s.vm.load_vmsa(&s.mem, GHCB).unwrap_err().to_string().contains("shared"));
    assert!(s.vm.load_vmsa(&s.mem, RAM).unwrap_err().to_string().contains("not in guest RAM"));
}

#[test]
fn a_vmsa_with_other_features_cannot_be_loaded() {
    let s = Setup::new();
    s.vm.pvalidate(VMSA, true, 0, 1);
    s.vm.rmpadjust(VMSA, true, 0, 0x1_0001);
    let state = VmsaState { sev_features: 0x21, ..VmsaState::reset() };
    s.mem.write(VMSA, View::Private, &state.encode()).unwrap();
    assert!(s.vm.load_vmsa(&s.mem, VMSA).unwrap_err().to_string().contains("0x21"));
}

/// Linux 6.12.117 and 7.3.4, `sev.c:sev_snp_ap_creation`: on error the target is not touched; 7.3.4 wants the
/// guest's features exactly.
#[test]
fn a_wrong_ap_creation_is_an_invalid_input_and_leaves_the_target_alone() {
    // (APIC id, request, VMSA, features)
    let cases = [
        (9, 1, VMSA, 1),
        (1, 1, VMSA + 1, 1),
        (1, 1, 0x20_0000, 1),
        (1, 1, VMSA, 0),
        (1, 1, VMSA, 1 | 1 << 3),
        (1, 1, VMSA, 1 | 1 << 5),
        (1, 0, VMSA, 1 | 1 << 5),
        (1, 3, VMSA, 1),
        (1, 0x1_0001, VMSA, 1),
        (1, 0, 0x20_0000, 1),
    ];
    for (apic, request, vmsa, features) in cases {
        let mut s = Setup::new();
        let outcome = ap_create(&mut s, apic, request, vmsa, features);
        assert_eq!(outcome, Outcome::Resume, "{apic} {request:#x} {vmsa:#x} {features:#x}");
        assert_eq!(
            s.infos(),
            malformed(Malformed::InvalidInput),
            "{apic} {request:#x} {vmsa:#x} {features:#x}"
        );
    }
}

#[test]
fn destroy_needs_no_features_and_stops_the_target() {
    let mut s = Setup::new();
    let outcome = s.nae(exit::AP_CREATION, 1 << 32 | 2, 0, &[]);
    assert_eq!(outcome, Outcome::ApCreate(ApCreation { apic_id: 1, action: ApAction::Stop }));
    assert_eq!(s.infos(), (Some(0), Some(0)));
}

#[test]
fn a_new_vmsa_voids_what_the_vcpu_waited_for() {
    let mut s = Setup::new();
    assert_eq!(s.nae(exit::AP_RESET_HOLD, 0, 0, &[]), Outcome::ResetHold);
    s.vcpu.start_from_vmsa();
    assert_eq!(s.reply(Reply::Wake), Outcome::RunFails(Errno::EINVAL));
    assert_eq!(s.vcpu.read_ghcb_msr(), GHCB, "KVM keeps the GHCB MSR");
}

// --- Instructions in the guest's name

#[test]
fn port_input_keeps_the_upper_part_of_rax_for_small_sizes() {
    let mut s = Setup::new();
    let outcome = s.nae(exit::svm::IOIO, 0x3f8_0011, 0, &[(Field::Rax, 0x1122_3344_5566_7788)]);
    assert_eq!(outcome, Outcome::Io { port: 0x3f8, size: 1, direction: Direction::In, data: vec![0] });
    assert_eq!(s.reply(Reply::Io(vec![0xab])), Outcome::Resume);
    assert_eq!(s.field(Field::Rax), Some(0x1122_3344_5566_77ab));
    s.nae(exit::svm::IOIO, 0xcfc_0041, 0, &[(Field::Rax, u64::MAX)]);
    s.reply(Reply::Io(vec![1, 2, 3, 4]));
    assert_eq!(s.field(Field::Rax), Some(0x0403_0201));
}

#[test]
fn port_output_and_string_output_carry_the_data() {
    let mut s = Setup::new();
    let outcome = s.nae(exit::svm::IOIO, 0x80_0020, 0, &[(Field::Rax, 0x1234)]);
    assert_eq!(
        outcome,
        Outcome::Io { port: 0x80, size: 2, direction: Direction::Out, data: vec![0x34, 0x12] }
    );
    assert_eq!(s.reply(Reply::Io(vec![])), Outcome::Resume);
    s.mem.write(BUFFER, View::Shared, b"hello").unwrap();
    let outcome = s.nae(exit::svm::IOIO, 0x3f8_0014, 5, &[(Field::Scratch, BUFFER)]);
    assert_eq!(
        outcome,
        Outcome::Io { port: 0x3f8, size: 1, direction: Direction::Out, data: b"hello".to_vec() }
    );
    assert_eq!(s.reply(Reply::Io(vec![])), Outcome::Resume);
}

#[test]
fn string_input_lands_in_the_scratch_area() {
    let mut s = Setup::new();
    let outcome = s.nae(exit::svm::IOIO, 0x1f0_0025, 1000, &[(Field::Scratch, BUFFER)]);
    assert_eq!(outcome, Outcome::Io { port: 0x1f0, size: 2, direction: Direction::In, data: vec![0; 2000] });
    assert_eq!(s.reply(Reply::Io([[7; 1999].as_slice(), &[8]].concat())), Outcome::Resume);
    assert_eq!(s.mem.bytes::<3>(BUFFER + 1998, View::Shared), [7, 8, 0]);
}

/// Linux 6.12.117 and 7.3.4, `sev.c:setup_vmgexit_scratch`: with GHCB version 2 nothing outside of the page's
/// shared buffer.
#[test]
fn a_scratch_area_must_lie_in_the_shared_buffer_of_the_ghcb() {
    let cases =
        [(0x6000u64, 1), (GHCB - 1, 1), (BUFFER, 2033), (GHCB + 8, 1), (RAM - 1, 2), (u64::MAX, 2), (0, 1)];
    for (scratch, count) in cases {
        let mut s = Setup::new();
        s.vm.pages.set_private(0x6000, 64, false);
        s.nae(exit::svm::IOIO, 0x3f8_0014, count, &[(Field::Scratch, scratch)]);
        assert_eq!(s.infos(), malformed(Malformed::InvalidScratchArea), "{scratch:#x} {count}");
        s.nae(exit::MMIO_WRITE, 0xfee0_0020, 8, &[(Field::Scratch, scratch.wrapping_sub(4096))]);
        assert_eq!(s.infos(), malformed(Malformed::InvalidScratchArea), "{scratch:#x}");
    }
}

/// Linux 6.12.117 and 7.3.4, `sev.c:sev_handle_vmgexit` and `sev_es_string_io`.
#[test]
fn an_access_of_no_bytes_is_resumed_and_too_long_a_string_fails_the_run() {
    let mut s = Setup::new();
    let scratch = [(Field::Scratch, BUFFER), (Field::Rax, 0)];
    for (code, info1, info2) in [
        (exit::MMIO_READ, 0xfee0_0020, 0),
        (exit::MMIO_WRITE, 0xfee0_0020, 0),
        (exit::svm::IOIO, 0x3f8_0000, 0),
        (exit::svm::IOIO, 0x3f8_0004, 5),
        (exit::svm::IOIO, 0x3f8_0014, 0),
    ] {
        assert_eq!(s.nae(code, info1, info2, &scratch), Outcome::Resume, "{code:#x} {info1:#x}");
        assert_eq!(s.infos(), (Some(0), Some(0)), "{code:#x} {info1:#x}");
    }
    for (info1, count) in [(0x3f8_0014, 1 << 31), (0x3f8_0014, u64::MAX), (0x3f8_0024, 1 << 30)] {
        let outcome = s.nae(exit::svm::IOIO, info1, count, &scratch);
        assert_eq!(outcome, Outcome::RunFails(Errno::EINVAL), "{info1:#x} {count:#x}");
    }
}

#[test]
fn mmio_of_one_to_eight_bytes_goes_through_the_scratch_area() {
    let mut s = Setup::new();
    let outcome = s.nae(exit::MMIO_READ, 0xfee0_0020, 4, &[(Field::Scratch, BUFFER)]);
    assert_eq!(outcome, Outcome::Mmio { gpa: 0xfee0_0020, len: 4, direction: Direction::In, data: [0; 8] });
    assert_eq!(s.reply(Reply::Mmio([1, 2, 3, 4, 9, 9, 9, 9])), Outcome::Resume);
    assert_eq!(s.mem.bytes::<5>(BUFFER, View::Shared), [1, 2, 3, 4, 0]);
    let outcome = s.nae(exit::MMIO_WRITE, 0xfee0_0020, 2, &[(Field::Scratch, BUFFER)]);
    assert_eq!(
        outcome,
        Outcome::Mmio { gpa: 0xfee0_0020, len: 2, direction: Direction::Out, data: [1, 2, 0, 0, 0, 0, 0, 0] }
    );
    for len in [9, u64::MAX] {
        s.nae(exit::MMIO_READ, 0xfee0_0020, len, &[(Field::Scratch, BUFFER)]);
        assert_eq!(s.infos(), malformed(Malformed::InvalidInput));
    }
}

#[test]
fn a_refused_msr_injects_gp_into_the_guest() {
    let mut s = Setup::new();
    assert_eq!(s.nae(exit::svm::MSR, 0, 0, &[(Field::Rcx, 0x10)]), Outcome::ReadMsr { index: 0x10 });
    assert_eq!(s.reply(Reply::ReadMsr(Some(0x1_0000_0002))), Outcome::Resume);
    assert_eq!((s.field(Field::Rax), s.field(Field::Rdx)), (Some(2), Some(1)));
    let fields = [(Field::Rcx, 0x10), (Field::Rax, 5), (Field::Rdx, 6)];
    assert_eq!(s.nae(exit::svm::MSR, 1, 0, &fields), Outcome::WriteMsr { index: 0x10, value: 6 << 32 | 5 });
    assert_eq!(s.reply(Reply::WriteMsr(false)), Outcome::Resume);
    // Vector 13, type 3 (exception), valid.
    assert_eq!(s.infos(), (Some(1), Some(0x8000_030d)));
}

#[test]
fn cpuid_tsc_and_dr7_are_answered_in_registers() {
    let mut s = Setup::new();
    let (eax, ebx, ecx, edx) = (1, 2, 3, 4);
    s.vcpu.set_cpuid(vec![CpuidEntry { function: 7, index: 0, indexed: true, eax, ebx, ecx, edx }]);
    s.nae(exit::svm::CPUID, 0, 0, &[(Field::Rax, 7), (Field::Rcx, 0)]);
    assert_eq!(s.field(Field::Rdx), Some(4));
    assert_eq!(s.nae(exit::svm::RDTSCP, 0, 0, &[]), Outcome::Tsc);
    s.reply(Reply::Tsc { tsc: 0x5_0000_0006, aux: 7 });
    assert_eq!((s.field(Field::Rax), s.field(Field::Rdx), s.field(Field::Rcx)), (Some(6), Some(5), Some(7)));
    s.nae(exit::svm::WRITE_DR7, 0, 0, &[(Field::Rax, 0x401)]);
    s.nae(exit::svm::READ_DR7, 0, 0, &[]);
    assert_eq!(s.field(Field::Rax), Some(0x401));
}

#[test]
fn an_unknown_hypercall_gets_minus_kvm_enosys() {
    let mut s = Setup::new();
    s.nae(exit::svm::VMMCALL, 0, 0, &[(Field::Rax, 12), (Field::Cpl, 0)]);
    assert_eq!(s.field(Field::Rax), Some((-1000i64) as u64));
}

// --- Guest requests: the envelope. Messages are tested with the firmware.

/// Linux 7.3.4, `sev.c:sev_handle_vmgexit`; 6.12 says "missing input".
#[test]
fn request_pages_must_be_aligned_and_different() {
    for (request, response) in [(0x8001, 0x9000), (0x8000, 0x9001), (0x8000, 0x8000)] {
        let mut s = Setup::new();
        s.nae(exit::GUEST_REQUEST, request, response, &[]);
        assert_eq!(s.infos(), malformed(Malformed::InvalidInput));
    }
}

#[test]
fn a_request_page_outside_ram_fails_the_run() {
    let mut s = Setup::new();
    assert_eq!(s.nae(exit::GUEST_REQUEST, RAM, 0x9000, &[]), Outcome::RunFails(Errno::EIO));
}

#[test]
fn an_extended_report_request_needs_its_certificate_registers() {
    let mut s = Setup::new();
    s.vm.pages.set_private(0x8000, 2, false);
    s.mem.write(0x8034, View::Shared, &[5]).unwrap();
    s.nae(exit::EXTENDED_GUEST_REQUEST, 0x8000, 0x9000, &[(Field::Rax, 0x6000)]);
    assert_eq!(s.infos(), malformed(Malformed::InvalidInput));
    s.nae(exit::EXTENDED_GUEST_REQUEST, 0x8000, 0x9000, &[(Field::Rax, 0x6001), (Field::Rbx, 1)]);
    assert_eq!(s.infos(), malformed(Malformed::InvalidInput));
}

#[test]
fn certificates_are_asked_for_and_too_few_pages_are_reported() {
    let mut s = Setup::new();
    s.vm.set_certs_enabled();
    s.vm.pages.set_private(0x8000, 2, false);
    s.mem.write(0x8034, View::Shared, &[5]).unwrap();
    let fields = [(Field::Rax, 0x6000), (Field::Rbx, 1)];
    let ask = |s: &mut Setup| s.nae(exit::EXTENDED_GUEST_REQUEST, 0x8000, 0x9000, &fields);
    assert_eq!(ask(&mut s), Outcome::ReqCerts { gpa: 0x6000, npages: 1 });
    assert_eq!(s.reply(Reply::Certs { ret: 28, npages: 3 }), Outcome::Resume);
    assert_eq!((s.field(Field::Rbx), s.infos()), (Some(3), (Some(0), Some(1 << 32))));
    for (errno, info2) in [(11, 2 << 32), (5, 1 << 63)] {
        ask(&mut s);
        assert_eq!(s.reply(Reply::Certs { ret: errno, npages: 0 }), Outcome::Resume);
        assert_eq!(s.infos(), (Some(0), Some(info2)));
    }
    ask(&mut s);
    assert_eq!(s.reply(Reply::Certs { ret: 1, npages: 0 }), Outcome::RunFails(Errno::EINVAL));
}

/// A finished guest with its secrets page at 0x5_0000, pages for messages at 0x8000 and 0x9000, and
/// certificates at 0xa000.
fn launched() -> (Setup, [u8; 32]) {
    let mut s = Setup::new();
    s.vm.launch_start(&Start { policy: 0x3_0000, ..Start::default() }, &mut rand_core::OsRng).unwrap();
    let mut update = Update { gfn_start: 0x50, uaddr: 0x7000, len: PAGE_SIZE, page_type: 5, flags: 0 };
    s.vm.launch_update(&mut update, &mut [0; 4096], &s.mem).unwrap();
    s.vm.launch_finish(&FinishArgs::default(), &[VmsaState::reset(), VmsaState::reset()]).unwrap();
    s.vm.pages.set_private(0x8000, 3, false);
    let key = s.mem.bytes(0x5_0020, View::Private);
    s.mem.write(0xa000, View::Shared, &[0xee; 4096]).unwrap();
    s.vcpu.write_ghcb_msr(GHCB);
    (s, key)
}

fn send_report_request(s: &Setup, key: &[u8; 32], sequence: u64) {
    let request = Message { sequence, message_type: 5, version: 1, vmpck: 0, payload: vec![0; 96] };
    s.mem.write(0x8000, View::Shared, &message::seal(&request, key).unwrap()[..]).unwrap();
}

/// The response in the guest's page, as its sequence number and status.
fn response(s: &Setup, key: &[u8; 32]) -> (u64, u8) {
    let page = s.mem.bytes(0x9000, View::Shared);
    let message = message::open(&page, message::header(&page).unwrap(), key).unwrap();
    (message.sequence, message.payload[0])
}

#[test]
fn a_guest_request_is_answered_in_the_response_page() {
    let (mut s, key) = launched();
    send_report_request(&s, &key, 1);
    assert_eq!(s.nae(exit::GUEST_REQUEST, 0x8000, 0x9000, &[]), Outcome::Resume);
    assert_eq!((s.infos(), response(&s, &key)), ((Some(0), Some(0)), (2, 0)));
    // The same message again: the firmware's status (INVALID_PARAM) in the lower half of exit info 2.
    assert_eq!(s.nae(exit::GUEST_REQUEST, 0x8000, 0x9000, &[]), Outcome::Resume);
    assert_eq!(s.infos(), (Some(0), Some(0x16)));
}

#[test]
fn an_extended_request_without_certificates_gets_an_empty_table() {
    let (mut s, key) = launched();
    send_report_request(&s, &key, 1);
    let fields = [(Field::Rax, 0xa000), (Field::Rbx, 1)];
    assert_eq!(s.nae(exit::EXTENDED_GUEST_REQUEST, 0x8000, 0x9000, &fields), Outcome::Resume);
    assert_eq!((s.infos(), response(&s, &key)), ((Some(0), Some(0)), (2, 0)));
    let table: [u8; 25] = s.mem.bytes(0xa000, View::Shared);
    assert_eq!((&table[..24], table[24]), (&[0; 24][..], 0xee));
}

#[test]
fn too_few_pages_for_certificates_use_up_no_sequence_number() {
    let (mut s, key) = launched();
    s.vm.set_certs_enabled();
    send_report_request(&s, &key, 1);
    let fields = [(Field::Rax, 0xa000), (Field::Rbx, 0)];
    s.nae(exit::EXTENDED_GUEST_REQUEST, 0x8000, 0x9000, &fields);
    s.reply(Reply::Certs { ret: 28, npages: 2 });
    assert_eq!((s.infos(), s.field(Field::Rbx)), ((Some(0), Some(1 << 32)), Some(2)));
    // Linux repeats the same number as a plain request.
    s.nae(exit::GUEST_REQUEST, 0x8000, 0x9000, &[]);
    assert_eq!((s.infos(), response(&s, &key)), ((Some(0), Some(0)), (2, 0)));
    // With enough pages the report comes with what the monitor wrote.
    send_report_request(&s, &key, 3);
    s.nae(exit::EXTENDED_GUEST_REQUEST, 0x8000, 0x9000, &[(Field::Rax, 0xa000), (Field::Rbx, 2)]);
    assert_eq!(s.reply(Reply::Certs { ret: 0, npages: 2 }), Outcome::Resume);
    assert_eq!((s.infos(), response(&s, &key)), ((Some(0), Some(0)), (4, 0)));
}

#[test]
fn a_request_in_a_private_page_is_refused_by_the_firmware() {
    let (mut s, key) = launched();
    send_report_request(&s, &key, 1);
    s.vm.pages.set_private(0x8000, 1, true);
    assert_eq!(s.nae(exit::GUEST_REQUEST, 0x8000, 0x9000, &[]), Outcome::Resume);
    assert_eq!(s.infos(), (Some(0), Some(0x16)));
    assert!(s.vm.pages.findings().contains(&Finding::BufferNotShared { gpa: 0x8000 }));
}

#[test]
fn a_busy_firmware_leaves_the_message_for_a_second_try() {
    let mut s = Setup::with(Faults { guest_request_busy: Trigger::times(1), ..Faults::default() });
    assert_eq!(s.nae(exit::GUEST_REQUEST, 0x8000, 0x9000, &[]), Outcome::Resume);
    assert_eq!(s.infos(), (Some(0), Some(2 << 32)));
}

// --- Faults

#[test]
fn a_page_state_change_can_be_stopped_half_way() {
    let mut s = Setup::with(Faults { psc_stop: Trigger::times(1), ..Faults::default() });
    s.psc_buffer(
        0,
        1,
        &[entry(0x10, PageOperation::Shared, false), entry(0x20, PageOperation::Shared, false)],
    );
    assert_eq!(s.psc(), range(0x1_0000, 1, 0));
    assert_eq!(s.reply(Reply::MapGpaRange { ret: 0 }), Outcome::Resume);
    assert_eq!((s.infos(), s.psc_state(2)), ((Some(0), Some(0)), (1, vec![1, 0])));
    assert_eq!(s.psc(), range(0x2_0000, 1, 0), "the guest asks again");
}

#[test]
fn injected_faults_show_as_the_guest_would_see_them() {
    let faults = Faults {
        ghcb_versions: Some((3, 4)),
        no_snp_features: true,
        psc_error: Trigger::times(1),
        refuse_registration: Trigger::after(1, 1),
        pvalidate_no_change: Trigger::times(1),
        drop_ap_creation: Trigger::always(),
        ..Faults::default()
    };
    let mut s = Setup::with(faults);
    assert_eq!(s.msr(2).1, 0x0004_0003_2700_0001);
    assert_eq!(s.msr(0x80).1, 0x81);
    assert_eq!(s.msr(0x9012).1, 0x8013);
    assert_eq!(s.msr(0x0020_0000_0020_0014), (Outcome::Resume, 1 << 63 | 0x15));
    let done = crate::rmp::InstructionResult::Done { eax: 0, carry: true };
    assert_eq!(s.vm.pvalidate(0x3000, true, 0, 1), done);
    assert_eq!(ap_create(&mut s, 1, 1, VMSA, 1), Outcome::Resume);
}
