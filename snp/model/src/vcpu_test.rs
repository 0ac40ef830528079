// SPDX-License-Identifier: Apache-2.0
//! The GHCB protocol as a guest sees it: messages by MSR, the envelope of the page, page-state changes, one
//! test per rule; and arbitrary bytes for all of it. Events that do something in the guest's name are in
//! `vcpu_events_test.rs`.

use proptest::prelude::*;
use snp::ghcb::exit;
use snp::ghcb::psc::Entry;
use snp::policy::PolicyRules;

use super::*;
use crate::commands::Init2;
use crate::faults::Faults;
use crate::firmware::testing::platform;
use crate::memory::View;
use crate::memory::testing::TestMemory;
use crate::outcome::MAP_GPA_SIZE_2M;
use crate::rmp::Finding;
use crate::rmp::TwoMib;
use crate::vm::VmConfig;

#[path = "vcpu_events_test.rs"]
mod events;

const RAM: u64 = 0x40_0000;
const GHCB: u64 = 0x5000;
const BUFFER: u64 = GHCB + 0x800;

struct Setup {
    vm: VmModel,
    mem: TestMemory,
    vcpu: VcpuModel,
}

impl Setup {
    fn new() -> Self {
        Setup::with(Faults::default())
    }

    fn with(faults: Faults) -> Self {
        let config = VmConfig {
            platform: platform(),
            ram: std::iter::once(0..RAM).collect(),
            vmsa_features: 0,
            policy_rules: PolicyRules::LINUX_6_12,
            two_mib: TwoMib::Accept,
            faults,
        };
        let vm = VmModel::new(config);
        vm.set_hypercall_exits(true);
        vm.init2(&Init2::default()).unwrap();
        vm.create_vcpu(0).unwrap();
        vm.create_vcpu(1).unwrap();
        vm.pages.set_private(0, RAM / PAGE_SIZE, true);
        vm.pages.set_private(GHCB, 1, false);
        let mut vcpu = VcpuModel::new(&vm, vec![]);
        vcpu.write_ghcb_msr(GHCB | 0x012);
        let mem = TestMemory::new(RAM as usize);
        assert_eq!(vcpu.vmgexit(&vm, &mem), Outcome::Resume);
        vcpu.write_ghcb_msr(GHCB);
        Setup { vm, mem, vcpu }
    }

    fn msr(&mut self, value: u64) -> (Outcome, u64) {
        self.vcpu.write_ghcb_msr(value);
        let outcome = self.vcpu.vmgexit(&self.vm, &self.mem);
        (outcome, self.vcpu.read_ghcb_msr())
    }

    /// A VMGEXIT with these fields marked valid, and no others.
    fn nae(&mut self, code: u64, info1: u64, info2: u64, fields: &[(Field, u64)]) -> Outcome {
        let mut page = self.mem.bytes::<4096>(GHCB, View::Shared);
        page::set_valid(&mut page, page::Valid::default());
        let fixed = [(Field::ExitCode, code), (Field::ExitInfo1, info1), (Field::ExitInfo2, info2)];
        for (field, value) in fixed.iter().chain(fields) {
            page::set(&mut page, *field, *value);
        }
        self.mem.write(GHCB, View::Shared, &page).unwrap();
        self.vcpu.write_ghcb_msr(GHCB);
        self.vcpu.vmgexit(&self.vm, &self.mem)
    }

    fn reply(&mut self, reply: Reply) -> Outcome {
        self.vcpu.complete(&self.vm, &self.mem, reply)
    }

    /// A field of the answer; `None` if it is not marked valid.
    fn field(&self, field: Field) -> Option<u64> {
        page::get_if_valid(&self.mem.bytes(GHCB, View::Shared), field)
    }

    fn infos(&self) -> (Option<u64>, Option<u64>) {
        (self.field(Field::ExitInfo1), self.field(Field::ExitInfo2))
    }

    fn psc_buffer(&self, current: u16, end: u16, entries: &[Entry]) {
        let mut bytes = psc::Header { current, end }.encode().to_vec();
        entries.iter().for_each(|e| bytes.extend(e.encode().to_le_bytes()));
        self.mem.write(BUFFER, View::Shared, &bytes).unwrap();
    }

    fn psc(&mut self) -> Outcome {
        self.nae(exit::PAGE_STATE_CHANGE, 0, 0, &[(Field::Scratch, BUFFER)])
    }

    fn psc_state(&self, entries: usize) -> (u64, Vec<u16>) {
        let current = self.mem.u64(BUFFER, View::Shared) & 0xffff;
        let done =
            (0..entries).map(|i| Entry::decode(self.mem.u64(BUFFER + 8 + i as u64 * 8, View::Shared)).done);
        (current, done.collect())
    }
}

fn entry(frame: u64, operation: PageOperation, huge: bool) -> Entry {
    Entry { done: 0, frame, operation, huge }
}

const fn range(gpa: u64, pages: u64, attributes: u64) -> Outcome {
    Outcome::MapGpaRange(MapGpaRange { gpa, pages, attributes })
}

fn malformed(why: Malformed) -> (Option<u64>, Option<u64>) {
    (Some(2), Some(why as u64))
}

// --- MSR protocol

#[test]
fn after_reset_the_msr_holds_sev_info_with_versions_1_to_2() {
    let s = Setup::new();
    assert_eq!(VcpuModel::new(&s.vm, vec![]).read_ghcb_msr(), 0x0002_0001_2700_0001);
}

#[test]
fn msr_requests_get_the_answers_of_kvm() {
    let mut s = Setup::new();
    assert_eq!(s.msr(0x002), (Outcome::Resume, 0x0002_0001_2700_0001));
    assert_eq!(s.msr(0x080), (Outcome::Resume, 0x3081));
    assert_eq!(s.msr(0x010), (Outcome::Resume, !0xfff | 0x011));
    assert_eq!(s.msr(0x3a0_0012), (Outcome::Resume, 0x3a0_0013));
}

#[test]
fn an_unknown_msr_request_leaves_the_value_as_it_is() {
    let mut s = Setup::new();
    assert_eq!(s.msr(0x1234_5678_9abc_d7ff), (Outcome::Resume, 0x1234_5678_9abc_d7ff));
}

#[test]
fn an_msr_page_state_change_becomes_one_hypercall_exit() {
    let mut s = Setup::new();
    // Value seen from Linux: to shared.
    let (outcome, _) = s.msr(0x0020_0000_0020_0014);
    assert_eq!(outcome, range(0x20_0000, 1, 0));
    assert_eq!(s.reply(Reply::MapGpaRange { ret: 0 }), Outcome::Resume);
    assert_eq!(s.vcpu.read_ghcb_msr(), 0x15);
    let (outcome, _) = s.msr(0x0010_0000_0020_0014);
    assert_eq!(outcome, range(0x20_0000, 1, MAP_GPA_ENCRYPTED));
    assert_eq!(s.reply(Reply::MapGpaRange { ret: 22 }), Outcome::Resume);
    assert_eq!(s.vcpu.read_ghcb_msr(), 1 << 63 | 0x15);
}

#[test]
fn other_operations_and_a_missing_hypercall_exit_are_errors_of_the_msr_protocol() {
    let mut s = Setup::new();
    assert_eq!(s.msr(0x0030_0000_0020_0014), (Outcome::Resume, 1 << 63 | 0x15));
    s.vm.set_hypercall_exits(false);
    assert_eq!(s.msr(0x0020_0000_0020_0014), (Outcome::Resume, 1 << 63 | 0x15));
}

#[test]
fn a_termination_request_ends_the_guest_with_the_msrs_value() {
    let mut s = Setup::new();
    assert_eq!(s.msr(0x4_1100).0, Outcome::Terminate { data0: 0x4_1100 });
}

#[test]
fn cpuid_by_msr_answers_one_register() {
    let mut s = Setup::new();
    let (eax, ebx, ecx, edx) = (1, 2, 3, 0xdead_beef);
    s.vcpu.set_cpuid(vec![CpuidEntry {
        function: 0x8000_001f,
        index: 0,
        indexed: false,
        eax,
        ebx,
        ecx,
        edx,
    }]);
    let (_, value) = s.msr(0x8000_001f_c000_0004);
    assert_eq!(value, 0xdead_beef_c000_0005);
    assert_eq!(s.msr(0x4000_0004).1, 0x4000_0005);
}

#[test]
fn a_held_vcpu_resumes_with_a_result_only_by_sipi() {
    let mut s = Setup::new();
    assert_eq!(s.msr(0x006), (Outcome::ResetHold, 0x007));
    assert_eq!(s.reply(Reply::Wake), Outcome::Resume);
    assert_eq!(s.vcpu.read_ghcb_msr(), 0x1007);
}

// --- Envelope of the GHCB page

/// Linux 6.12.117, `sev.c:sev_handle_vmgexit`; from 7.1 on the guest is told NOT_REGISTERED.
#[test]
fn an_unregistered_ghcb_is_not_answered_but_fails_the_run() {
    let mut s = Setup::new();
    s.vm.pages.set_private(0x9000, 1, false);
    assert_eq!(s.msr(0x9000).0, Outcome::RunFails(Errno::EINVAL));
}

#[test]
fn a_ghcb_that_is_private_or_outside_ram_gets_no_answer() {
    let mut s = Setup::new();
    for gpa in [0x9000, RAM, 0xffff_ffff_ffff_f000] {
        s.msr(gpa | 0x012);
        assert_eq!(s.msr(gpa).0, Outcome::Resume, "{gpa:#x}");
    }
    assert_eq!(s.vm.pages.findings().len(), 3);
    assert_eq!(s.msr(0).0, Outcome::Resume);
}

#[test]
fn a_usage_other_than_zero_is_refused() {
    let mut s = Setup::new();
    s.mem.write(GHCB + 0xffc, View::Shared, &[1]).unwrap();
    assert_eq!(s.nae(exit::HYPERVISOR_FEATURES, 0, 0, &[]), Outcome::Resume);
    assert_eq!(s.infos(), malformed(Malformed::InvalidUsage));
}

#[test]
fn each_missing_valid_bit_is_refused() {
    let missing = [
        (exit::svm::CPUID, 0, vec![Field::Rax]),
        (exit::svm::CPUID, 0, vec![Field::Rcx]),
        (exit::svm::RDPMC, 0, vec![]),
        (exit::svm::WRITE_DR7, 0, vec![]),
        (exit::svm::IOIO, 0x3f8_0010, vec![]),
        (exit::svm::IOIO, 0x3f8_0015, vec![Field::Rax]),
        (exit::svm::MSR, 0, vec![]),
        (exit::svm::MSR, 1, vec![Field::Rcx, Field::Rax]),
        (exit::svm::VMMCALL, 0, vec![Field::Rax]),
        (exit::svm::MONITOR, 0, vec![Field::Rax, Field::Rcx]),
        (exit::svm::MWAIT, 0, vec![Field::Rax]),
        (exit::MMIO_READ, 0, vec![]),
        (exit::PAGE_STATE_CHANGE, 0, vec![]),
        (exit::AP_CREATION, 1, vec![]),
    ];
    for (code, info1, fields) in missing {
        let mut s = Setup::new();
        let fields: Vec<(Field, u64)> = fields.into_iter().map(|f| (f, 1)).collect();
        assert_eq!(s.nae(code, info1, 0, &fields), Outcome::Resume);
        assert_eq!(s.infos(), malformed(Malformed::MissingInput), "{code:#x}");
    }
    let mut s = Setup::new();
    assert_eq!(s.nae(exit::svm::CPUID, 0, 0, &[(Field::Rax, 0xd), (Field::Rcx, 0)]), Outcome::Resume);
    assert_eq!(s.infos(), malformed(Malformed::MissingInput), "leaf 0xd needs XCR0");
}

#[test]
fn exit_code_and_infos_must_be_valid_themselves() {
    let mut s = Setup::new();
    for missing in [Field::ExitCode, Field::ExitInfo1, Field::ExitInfo2] {
        let mut page = [0; 4096];
        for field in [Field::ExitCode, Field::ExitInfo1, Field::ExitInfo2] {
            if field != missing {
                page::set(&mut page, field, 0);
            }
        }
        page[0x390..0x398].copy_from_slice(&exit::HYPERVISOR_FEATURES.to_le_bytes());
        s.mem.write(GHCB, View::Shared, &page).unwrap();
        assert_eq!(s.msr(GHCB).0, Outcome::Resume);
        assert_eq!(s.infos(), malformed(Malformed::MissingInput), "{missing:?}");
    }
}

#[test]
fn an_unknown_event_is_refused() {
    let mut s = Setup::new();
    // HLT (0x78) is no GHCB event either.
    for code in [0x78, 0x8000_0006, 0x1_8000_0010, u64::MAX] {
        s.nae(code, 0, 0, &[]);
        assert_eq!(s.infos(), malformed(Malformed::InvalidEvent), "{code:#x}");
    }
}

#[test]
fn an_answer_marks_only_what_the_hypervisor_wrote() {
    let mut s = Setup::new();
    s.nae(exit::HYPERVISOR_FEATURES, 0, 0, &[(Field::Rax, 7), (Field::Xcr0, 1)]);
    assert_eq!(s.infos(), (Some(0), Some(3)));
    assert_eq!(s.field(Field::Rax), Some(7), "KVM returns RAX to RDX always");
    assert_eq!((s.field(Field::ExitCode), s.field(Field::Xcr0)), (None, None));
}

#[test]
fn an_unsupported_event_fails_the_run_and_a_termination_ends_the_guest() {
    let mut s = Setup::new();
    assert_eq!(s.nae(exit::UNSUPPORTED_EVENT, 0, 0, &[]), Outcome::RunFails(Errno::EINVAL));
    assert_eq!(s.nae(exit::TERMINATION, 0, 0, &[]), Outcome::Terminate { data0: GHCB });
}

// --- Page-state changes by page

#[test]
fn adjacent_entries_of_one_kind_are_merged_into_one_exit() {
    use PageOperation::Private;
    use PageOperation::Shared;
    let mut s = Setup::new();
    let entries = [
        entry(0x10, Shared, false),
        entry(0x11, Shared, false),
        entry(0x12, Private, false),
        entry(0x200, Shared, true),
        entry(0x14, Shared, false),
    ];
    s.psc_buffer(0, 4, &entries);
    assert_eq!(s.psc(), range(0x1_0000, 2, 0));
    let ok = || Reply::MapGpaRange { ret: 0 };
    assert_eq!(s.reply(ok()), range(0x1_2000, 1, MAP_GPA_ENCRYPTED));
    assert_eq!(s.reply(ok()), range(0x20_0000, 512, MAP_GPA_SIZE_2M));
    assert_eq!(s.reply(ok()), range(0x1_4000, 1, 0));
    assert_eq!(s.reply(ok()), Outcome::Resume);
    assert_eq!(s.infos(), (Some(0), Some(0)));
    assert_eq!(s.psc_state(5), (5, vec![1, 1, 1, 512, 1]));
}

#[test]
fn entries_of_2m_are_merged_with_each_other() {
    let mut s = Setup::new();
    let entries = [entry(0x200, PageOperation::Shared, true), entry(0x400, PageOperation::Shared, true)];
    s.psc_buffer(0, 1, &entries);
    assert_eq!(s.psc(), range(0x20_0000, 1024, MAP_GPA_SIZE_2M));
}

#[test]
fn a_partly_done_2m_entry_is_finished_alone() {
    let mut s = Setup::new();
    let first = Entry { done: 510, ..entry(0x200, PageOperation::Shared, true) };
    s.psc_buffer(0, 1, &[first, entry(0x400, PageOperation::Shared, true)]);
    assert_eq!(s.psc(), range(0x3f_e000, 2, MAP_GPA_SIZE_2M));
    assert_eq!(s.reply(Reply::MapGpaRange { ret: 0 }), range(0x40_0000, 512, MAP_GPA_SIZE_2M));
}

#[test]
fn a_refused_range_is_an_error_and_earlier_progress_stays_visible() {
    let mut s = Setup::new();
    s.psc_buffer(
        0,
        1,
        &[entry(0x10, PageOperation::Shared, false), entry(0x20, PageOperation::Shared, false)],
    );
    assert_eq!(s.psc(), range(0x1_0000, 1, 0));
    assert_eq!(s.reply(Reply::MapGpaRange { ret: 0 }), range(0x2_0000, 1, 0));
    assert_eq!(s.reply(Reply::MapGpaRange { ret: 22 }), Outcome::Resume);
    assert_eq!(s.infos(), (Some(0), Some(0x100 << 32)));
    assert_eq!(s.psc_state(2), (1, vec![1, 0]));
}

/// Linux 7.2.13 and 7.3.4, `sev.c:snp_complete_psc_msr` and `snp_complete_one_psc`,
/// `x86.h:kvm_is_valid_map_gpa_range_ret`; up to 7.1 any other value than 0 is a refusal.
#[test]
fn an_answer_to_a_conversion_is_0_einval_or_eagain_and_anything_else_fails_the_run() {
    for ret in [u64::MAX, 1, 12, 1 << 32, 22 << 32] {
        let mut s = Setup::new();
        s.psc_buffer(0, 0, &[entry(0x10, PageOperation::Private, false)]);
        s.psc();
        let outcome = s.reply(Reply::MapGpaRange { ret });
        assert_eq!(outcome, Outcome::RunFails(Errno::EINVAL), "{ret:#x}");
        let mut s = Setup::new();
        assert!(matches!(s.msr(0x10_0000 | 1 << 52 | 0x014).0, Outcome::MapGpaRange(_)));
        let outcome = s.reply(Reply::MapGpaRange { ret });
        assert_eq!(outcome, Outcome::RunFails(Errno::EINVAL), "{ret:#x}");
    }
    for ret in [22, 11] {
        let mut s = Setup::new();
        s.psc_buffer(0, 0, &[entry(0x10, PageOperation::Private, false)]);
        s.psc();
        assert_eq!(s.reply(Reply::MapGpaRange { ret }), Outcome::Resume, "{ret}");
        assert_eq!(s.infos().1, Some(psc::ERROR_GENERIC), "{ret}");
    }
}

#[test]
fn a_cursor_out_of_bounds_is_an_invalid_header() {
    let mut s = Setup::new();
    s.psc_buffer(0, 253, &[]);
    assert_eq!(s.psc(), Outcome::Resume);
    assert_eq!(s.infos(), (Some(0), Some(1 << 32 | 1)));
    // A buffer that begins later has less room: here for one entry.
    let scratch = GHCB + 0xff0 - 16;
    s.mem.write(scratch, View::Shared, &psc::Header { current: 0, end: 1 }.encode()).unwrap();
    s.nae(exit::PAGE_STATE_CHANGE, 0, 0, &[(Field::Scratch, scratch)]);
    assert_eq!(s.infos(), (Some(0), Some(1 << 32 | 1)));
}

#[test]
fn a_cursor_behind_the_end_is_success_with_nothing_done() {
    let mut s = Setup::new();
    s.psc_buffer(5, 1, &[entry(0x10, PageOperation::Shared, false)]);
    assert_eq!(s.psc(), Outcome::Resume);
    assert_eq!(s.infos(), (Some(0), Some(0)));
    assert_eq!(s.psc_state(1), (5, vec![0]));
}

#[test]
fn an_impossible_entry_is_an_invalid_entry() {
    let shared = PageOperation::Shared;
    for bad in [Entry { done: 2, ..entry(0x10, shared, false) }, entry(0x201, shared, true)] {
        let mut s = Setup::new();
        s.psc_buffer(0, 0, &[bad]);
        assert_eq!(s.psc(), Outcome::Resume);
        assert_eq!(s.infos(), (Some(0), Some(1 << 32 | 2)));
    }
}

#[test]
fn other_operations_in_a_buffer_are_taken_as_done() {
    let mut s = Setup::new();
    s.psc_buffer(0, 0, &[entry(0x10, PageOperation::Other(3), false)]);
    assert_eq!(s.psc(), Outcome::Resume);
    assert_eq!(s.infos(), (Some(0), Some(0)));
    assert_eq!(s.psc_state(1), (1, vec![1]));
}

#[test]
fn a_psc_buffer_outside_of_the_shared_buffer_is_a_bad_scratch_area() {
    for scratch in [0, GHCB, GHCB + 0x7f8, GHCB + 0xfec, GHCB + 0x1000, 0x9000, u64::MAX] {
        let mut s = Setup::new();
        s.nae(exit::PAGE_STATE_CHANGE, 0, 0, &[(Field::Scratch, scratch)]);
        assert_eq!(s.infos(), malformed(Malformed::InvalidScratchArea), "{scratch:#x}");
    }
}

#[test]
fn a_change_of_the_ghcb_itself_to_private_leaves_nobody_to_answer() {
    let mut s = Setup::new();
    s.psc_buffer(0, 0, &[entry(GHCB >> 12, PageOperation::Private, false)]);
    assert_eq!(s.psc(), range(GHCB, 1, MAP_GPA_ENCRYPTED));
    s.vm.pages.set_private(GHCB, 1, true);
    assert_eq!(s.reply(Reply::MapGpaRange { ret: 0 }), Outcome::Resume);
    assert!(s.vm.pages.findings().iter().any(|f| matches!(f, Finding::BufferNotShared { .. })));
}

// --- Arbitrary bytes

fn arbitrary_reply() -> impl Strategy<Value = Reply> {
    prop_oneof![
        any::<u64>().prop_map(|r| Reply::MapGpaRange { ret: r & 1 }),
        (0i32..30, any::<u64>()).prop_map(|(ret, npages)| Reply::Certs { ret, npages }),
        Just(Reply::Wake),
        any::<Option<u64>>().prop_map(Reply::ReadMsr),
        any::<bool>().prop_map(Reply::WriteMsr),
        proptest::collection::vec(any::<u8>(), 0..10).prop_map(Reply::Io),
        any::<[u8; 8]>().prop_map(Reply::Mmio),
        any::<(u64, u32)>().prop_map(|(tsc, aux)| Reply::Tsc { tsc, aux }),
    ]
}

/// What a guest that knows the protocol could write, and what it could not.
fn arbitrary_exit() -> impl Strategy<Value = (u64, u64, u64, Vec<(usize, u64)>)> {
    let codes = vec![
        0x27,
        0x37,
        0x6e,
        0x6f,
        0x72,
        0x76,
        0x7b,
        0x7c,
        0x81,
        0x87,
        0x89,
        0x8a,
        0x8b,
        0x8000_0001,
        0x8000_0002,
        0x8000_0003,
        0x8000_0004,
        0x8000_0005,
        0x8000_0010,
        0x8000_0011,
        0x8000_0012,
        0x8000_0013,
        0x8000_fffd,
        0x8000_fffe,
        0x8000_ffff,
    ];
    let code = prop_oneof![4 => proptest::sample::select(codes), 1 => any::<u64>()];
    let word = prop_oneof![
        any::<u64>(),
        0u64..0x10,
        (0u64..0x2_0000).prop_map(|frame| frame << 12),
        (0u64..0x1000).prop_map(|offset| GHCB + offset),
    ];
    let words = proptest::collection::vec((0usize..512, word.clone()), 0..40);
    (code, word.clone(), word, words)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_guest_bytes_panic_or_reach_private_memory(
        exits in proptest::collection::vec((arbitrary_exit(), arbitrary_reply(), any::<u64>()), 1..8)
    ) {
        let mut s = Setup::new();
        s.vm.pages.set_private(0x8000, 4, false);
        for ((code, info1, info2, words), reply, msr) in exits {
            let mut page = [0u8; 4096];
            for (at, word) in words {
                page[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
            }
            page::set_valid(&mut page, page::Valid(u128::MAX >> (msr % 3)));
            page[0xffc..].fill(0);
            page[0x390..0x398].copy_from_slice(&code.to_le_bytes());
            page[0x398..0x3a0].copy_from_slice(&info1.to_le_bytes());
            page[0x3a0..0x3a8].copy_from_slice(&info2.to_le_bytes());
            s.mem.write(GHCB, View::Shared, &page).unwrap();
            s.vcpu.write_ghcb_msr(GHCB);
            let mut outcome = s.vcpu.vmgexit(&s.vm, &s.mem);
            let mut rounds = 0;
            while let Outcome::MapGpaRange(range) = outcome {
                prop_assert!(range.pages > 0 && range.gpa % PAGE_SIZE == 0 && range.attributes & !0x11 == 0);
                rounds += 1;
                prop_assert!(rounds <= psc::MAX_ENTRIES, "the buffer has no more entries");
                outcome = s.vcpu.complete(&s.vm, &s.mem, Reply::MapGpaRange { ret: 0 });
            }
            let _ = s.vcpu.complete(&s.vm, &s.mem, reply.clone());
            s.vcpu.write_ghcb_msr(msr);
            let _ = s.vcpu.vmgexit(&s.vm, &s.mem);
            let _ = s.vcpu.complete(&s.vm, &s.mem, reply);
            // The model asks for the page's state before each access, so none of them failed or took the
            // private view.
            prop_assert_eq!(s.mem.wrong_accesses(), 0);
        }
    }
}

#[test]
fn the_shared_state_can_be_used_by_all_vcpu_threads() {
    fn shared<T: Send + Sync>() {}
    fn movable<T: Send>() {}
    shared::<VmModel>();
    movable::<VcpuModel>();
}
