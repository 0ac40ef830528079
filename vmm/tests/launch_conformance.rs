// SPDX-License-Identifier: Apache-2.0
//! The monitor's launch path against every refusal that the model can make: errno and firmware status at each
//! step, partial progress, EAGAIN, signals. After each failure nothing may be left, and the message must name
//! step, page and cause.
//!
//! No guest has to run for this, so any `/dev/kvm` will do; without one the tests say so and do nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::io;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use p384::ecdsa::SigningKey;
use snp::attest::tcb::Product;
use snp::board::Board;
use snp::firmware_status::FwStatus;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use snp::plan::Record;
use snp::policy::GuestPolicy;
use snp::vmsa::VmsaState;
use snp_model::errno::Errno;
use snp_model::faults::CommandFault;
use snp_model::faults::Faults;
use snp_model::faults::Injection;
use snp_model::faults::Step;
use snp_model::faults::Trigger;
use test_support::held::held;
use test_support::monitor::alter;
use test_support::monitor::emulated;
use test_support::monitor::launch;
use test_support::monitor::snp;
use test_support::monitor::snp_cpuid;
use vmm::cpuid;
use vmm::launch::LaunchOptions;
use vmm::platform::Platform;
use vmm::platform::emulated::EmulatedPlatform;
use vmm::run::error::MonitorError;
use vmm::run::guest::Guest;
use vmm::run::guest::Host;
use vmm::run::monitor;
use vmm::spec::Backing;

const MEMORY: u64 = 16 << 20;
/// The record that most faults are aimed at, and its pages.
const CODE: u64 = 0x10_0000;
const CODE_PAGES: u64 = 8;
/// Pages of the records before it.
const PAGES_BEFORE: u64 = 2;

struct Bench {
    platform: EmulatedPlatform,
    cpuid: CpuidTable,
    _alone: MutexGuard<'static, ()>,
}

/// One test at a time: they count what the process holds.
fn bench() -> Option<Bench> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let platform = emulated(Backing::Split, Some(Product::Genoa))?;
    let cpuid = snp_cpuid(&platform, 1);
    Some(Bench { platform, cpuid, _alone: alone })
}

impl Bench {
    /// CPUID, secrets, a record of several pages; real mode at the reset vector, where there is no memory.
    fn guest(&self) -> Guest {
        let records = vec![
            Record::new(0x1000, PageType::Cpuid, self.cpuid.page().unwrap().to_vec(), "CPUID page"),
            Record::empty(0x2000, 0x1000, PageType::Secrets, "secrets page"),
            Record::new(CODE, PageType::Normal, vec![0xf4; (CODE_PAGES * 4096) as usize], "code"),
            Record::empty(0x20_0000, 0x4000, PageType::Zero, "zeros"),
        ];
        Guest {
            load: snp(LaunchPlan { records, vcpus: vec![VmsaState::reset()] }, LaunchOptions::default()),
            board: Board::new(MEMORY, 1),
            ram: vec![(0, MEMORY)],
            cpuid: vec![cpuid::to_kvm(&self.cpuid.for_vcpu(0))],
        }
    }

    /// Launches with one fault. `None`: the launch got to its end, and the guest ran (and, having no code,
    /// failed later).
    fn launch(&self, guest: Guest, step: Step, trigger: Trigger, injection: Injection) -> Option<String> {
        let commands = vec![CommandFault { step, trigger, injection }];
        self.platform.inject(Faults { commands, ..Faults::default() });
        self.run(guest)
    }

    fn run(&self, guest: Guest) -> Option<String> {
        match monitor::run(&self.platform, guest, Host::new(Box::new(io::sink()))) {
            Ok(_) | Err(MonitorError::Run(_)) => None,
            Err(e) => Some(e.to_string()),
        }
    }
}

/// A line of `/proc/self/status` in KiB.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

const ERRNOS: [Errno; 11] = [
    Errno::EPERM,
    Errno::EINTR,
    Errno::EIO,
    Errno::EBADF,
    Errno::ENOMEM,
    Errno::EFAULT,
    Errno::EBUSY,
    Errno::EEXIST,
    Errno::EINVAL,
    Errno::ENOTTY,
    Errno::ENOSPC,
];

/// What a message must say about a step.
fn named(step: Step) -> &'static [&'static str] {
    match step {
        Step::Init2 => &["creating an SNP guest", "KVM_SEV_INIT2"],
        Step::CreateVcpu => &["creating a vCPU", "KVM_CREATE_VCPU"],
        Step::SetAttributes => &["making guest RAM private at 0x0", "KVM_SET_MEMORY_ATTRIBUTES"],
        Step::Start => &["starting the launch with policy 0x30000", "KVM_SEV_SNP_LAUNCH_START"],
        Step::UpdatePage => &["adding code (NORMAL page at 0x103000)", "KVM_SEV_SNP_LAUNCH_UPDATE"],
        Step::Finish => &["finishing the launch", "KVM_SEV_SNP_LAUNCH_FINISH", "a new VM is needed"],
    }
}

#[test]
fn every_refusal_at_every_step_names_step_and_cause_and_leaves_nothing_behind() {
    let Some(bench) = bench() else { return };
    assert_eq!(bench.run(bench.guest()), None, "the launch works without faults");
    let counts = || {
        let held = held();
        (held.descriptors, held.threads)
    };
    let (before, memory) = (counts(), (status("VmSize"), status("VmRSS")));
    let mut cases = 0;
    for step in
        [Step::Init2, Step::CreateVcpu, Step::SetAttributes, Step::Start, Step::UpdatePage, Step::Finish]
    {
        // The fourth page of the code: three pages were taken by the call that stopped, the next one reports
        // it.
        let skip = if step == Step::UpdatePage { PAGES_BEFORE + 3 } else { 0 };
        let firmware = !matches!(step, Step::CreateVcpu | Step::SetAttributes);
        let statuses = (1..=0x2a).filter(|_| firmware).map(|code| Injection::Firmware(FwStatus(code)));
        for injection in ERRNOS.map(Injection::Errno).into_iter().chain(statuses) {
            let error = bench.launch(bench.guest(), step, Trigger::after(skip, u64::MAX - skip), injection);
            let error = error.unwrap_or_else(|| panic!("{step:?} {injection:?} did not fail"));
            let cause = match injection {
                Injection::Errno(errno) => io::Error::from_raw_os_error(errno.0).to_string(),
                Injection::Firmware(status) => status.to_string(),
                Injection::Stop => unreachable!(),
            };
            for part in named(step).iter().copied().chain([cause.as_str()]) {
                assert!(error.contains(part), "{step:?} {injection:?}: '{part}' is not in: {error}");
            }
            assert_eq!(counts(), before, "{step:?} {injection:?}");
            cases += 1;
        }
    }
    // A VM that was kept would show as its RAM in VmSize, and as stacks, buffers and tables in VmRSS.
    let (size, rss) = (status("VmSize"), status("VmRSS"));
    assert!(
        size < memory.0 + (MEMORY >> 10) * 4,
        "VmSize went from {} to {size} KiB in {cases} launches",
        memory.0
    );
    assert!(rss < memory.1 + (8 << 10), "VmRSS went from {} to {rss} KiB in {cases} launches", memory.1);
    assert_eq!(bench.run(bench.guest()), None, "a new VM launches after every failure");
    println!("{cases} failed launches: VmSize {} to {size} KiB, VmRSS {} to {rss} KiB", memory.0, memory.1);
}

#[test]
fn partial_progress_is_continued_wherever_a_call_stops() {
    let Some(bench) = bench() else { return };
    for skip in 1..CODE_PAGES {
        // One stop, as by a signal, in the middle of the record; then the rest.
        let trigger = Trigger::after(PAGES_BEFORE + skip, 1);
        assert_eq!(
            bench.launch(bench.guest(), Step::UpdatePage, trigger, Injection::Stop),
            None,
            "page {skip}"
        );
    }
    // At the first page of a call there is no progress to tell: the kernel says EIO, and not why.
    let error =
        bench.launch(bench.guest(), Step::UpdatePage, Trigger::after(PAGES_BEFORE, 1), Injection::Stop);
    let error = error.unwrap();
    assert!(error.contains("page at 0x100000") && error.contains("a signal is pending"), "{error}");
}

#[test]
fn eagain_is_tried_again_but_not_for_ever() {
    let Some(bench) = bench() else { return };
    let again = Injection::Errno(Errno::EAGAIN);
    let some = Trigger::after(PAGES_BEFORE, 10);
    assert_eq!(bench.launch(bench.guest(), Step::UpdatePage, some, again), None);
    let always = Trigger::after(PAGES_BEFORE + 1, u64::MAX - 10);
    let error = bench.launch(bench.guest(), Step::UpdatePage, always, again).unwrap();
    assert!(
        error.contains("adding code: KVM took no page at 0x101000") && error.contains("EAGAIN"),
        "{error}"
    );
}

#[test]
fn a_refused_cpuid_page_is_shown_and_accepted_only_on_request_and_within_the_list() {
    let Some(bench) = bench() else { return };
    let table = bench.cpuid.page().unwrap();
    let count = u32::from_le_bytes(table[..4].try_into().unwrap()) as usize;
    let find =
        |leaf: u32| (0..count).map(|i| 16 + i * 48).find(|at| table[*at..*at + 4] == leaf.to_le_bytes());
    // Bit 24 of leaf 1 ECX, the TSC deadline timer, which the firmware withholds; and a C-bit that is not the
    // host's.
    let leaf1 = find(1).unwrap();
    let sev = find(0x8000_001f).unwrap();
    let offer = |at: usize, flip: u8, accept_cpuid: bool| {
        let mut page = table.to_vec();
        page[at] ^= flip;
        let mut guest = bench.guest();
        alter(&mut guest, |plan| plan.records[0] = Record::new(0x1000, PageType::Cpuid, page, "CPUID page"));
        launch(&mut guest).options.accept_cpuid = accept_cpuid;
        bench.run(guest)
    };
    assert_eq!(table[leaf1 + 35] & 1, 0, "ECX bit 24 is clear in our table");
    let error = offer(leaf1 + 35, 1, false).unwrap();
    for part in [
        "CPUID page at 0x1000",
        "INVALID_PARAM",
        "leaf",
        "offered",
        "accepted",
        "ECX",
        "`accept_cpuid` launches",
    ] {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
    assert_eq!(offer(leaf1 + 35, 1, true), None, "accepted on request");
    // No EPYC has that bit in its own CPUID: where this is known, it goes without being asked. The C-bit
    // never does.
    let host_cpuid = bench.platform.raw_cpuid();
    assert!(host_cpuid.is_some());
    let knowing = |at: usize| {
        let mut page = table.to_vec();
        page[at] ^= 1;
        let mut guest = bench.guest();
        alter(&mut guest, |plan| plan.records[0] = Record::new(0x1000, PageType::Cpuid, page, "CPUID page"));
        launch(&mut guest).options.host_cpuid = host_cpuid.clone();
        bench.run(guest)
    };
    assert_eq!(knowing(leaf1 + 35), None);
    assert!(knowing(sev + 28).unwrap().contains("not on the list"));
    for accept in [false, true] {
        let error = offer(sev + 28, 1, accept).unwrap();
        assert!(error.contains("0x8000001f") && error.contains("not on the list"), "{error}");
    }
}

#[test]
fn an_id_block_is_checked_before_the_launch_and_taken_by_the_firmware() {
    let Some(bench) = bench() else { return };
    let (id_key, author_key) =
        (SigningKey::random(&mut rand_core::OsRng), SigningKey::random(&mut rand_core::OsRng));
    let good = IdBlock {
        launch_digest: bench.guest().snp().unwrap().measured.digest(),
        family_id: [1; 16],
        image_id: [2; 16],
        guest_svn: 3,
        policy: GuestPolicy::DEFAULT,
    };
    let refused = |block: &[u8], auth: &[u8]| {
        let identity = Some((IdBlock::decode(block).unwrap(), IdAuth::decode(auth).unwrap()));
        let mut guest = bench.guest();
        launch(&mut guest).options.identity = identity;
        // START would fail: what is reported before was found before.
        let error = bench.launch(guest, Step::Start, Trigger::always(), Injection::Errno(Errno::ENOTTY));
        error.unwrap()
    };
    for author in [None, Some(&author_key)] {
        let (block, auth) = (good.encode(), IdAuth::sign(&good, &id_key, author).encode());
        let mut guest = bench.guest();
        let identity = Some((IdBlock::decode(&block).unwrap(), IdAuth::decode(&auth).unwrap()));
        launch(&mut guest).options.identity = identity;
        assert_eq!(bench.run(guest), None);
    }
    let other = IdBlock { policy: GuestPolicy(0xb_0000), ..good.clone() };
    let error = refused(&other.encode(), &IdAuth::sign(&other, &id_key, None).encode());
    assert!(error.contains("policy 0xb0000") && error.contains("0x30000"), "{error}");
    let other = IdBlock { launch_digest: snp::digest::LaunchDigest([7; 48]), ..good.clone() };
    let error = refused(&other.encode(), &IdAuth::sign(&other, &id_key, None).encode());
    assert!(error.contains("BAD_MEASUREMENT") && error.contains(&good.launch_digest.to_string()), "{error}");
    let changed = IdBlock { guest_svn: 4, ..good.clone() };
    let error = refused(&changed.encode(), &IdAuth::sign(&good, &id_key, None).encode());
    assert!(error.contains("BAD_SIGNATURE"), "{error}");
}

/// Linux 7.3.4, `svm.c:svm_get_segment`: KVM measures segments as they were set and reports them tidied up,
/// as an IGVM file's save area may not be.
#[test]
fn segments_that_kvm_reports_otherwise_are_no_reason_to_refuse() {
    let Some(bench) = bench() else { return };
    let mut guest = bench.guest();
    alter(&mut guest, |plan| {
        let state = &mut plan.vcpus[0];
        (state.tr.attrib, state.tr.limit) = (0x89, 0xffff);
        (state.ds.attrib, state.ds.limit) = (0x92, 0xffff);
        (state.es.attrib, state.es.limit) = (0x893, 0xffff);
    });
    assert_eq!(bench.run(guest), None);
}

#[test]
fn registers_that_no_call_can_set_are_refused_before_finish() {
    let Some(bench) = bench() else { return };
    for (name, change) in [
        ("dr6", (|s| s.dr6 = 0) as fn(&mut VmsaState)),
        ("mxcsr", |s| s.mxcsr = 0x1fbf),
        ("cr4", |s| s.cr4 = 0),
        ("efer", |s| s.efer = 0),
    ] {
        let mut guest = bench.guest();
        alter(&mut guest, |plan| change(&mut plan.vcpus[0]));
        let error =
            bench.launch(guest, Step::Finish, Trigger::always(), Injection::Errno(Errno::EINVAL)).unwrap();
        assert!(error.contains(&format!("vCPU 0: {name} is ")), "{name}: {error}");
    }
}
