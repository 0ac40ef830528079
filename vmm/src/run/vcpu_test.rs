// SPDX-License-Identifier: Apache-2.0
//! The dispatcher of exits, through the seam: what a guest can make a vCPU report, and that it ends or goes
//! on.

use std::fs::File;
use std::io;

use rustix::fs::FlockOperation;
use snp::attest::cert_table;
use snp::board::Board;

use super::*;
use crate::machine::certs::CertFile;
use crate::machine::certs::Source;
use crate::machine::dma::Dma;
use crate::machine::ram::GuestRam;
use crate::platform::Vm;
use crate::platform::scripted::Answered;
use crate::platform::scripted::Scripted;
use crate::platform::scripted::Scripted::MemoryFault;
use crate::platform::scripted::ScriptedVcpu;
use crate::platform::scripted::ScriptedVm;

const RAM: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// A page that the guest has shared, as all others are private.
const SHARED: u64 = 0x8000;
const PRIVATE: u64 = 0x4000;

struct Bench {
    vm: Arc<ScriptedVm>,
    shared: Arc<Shared>,
}

fn bench(source: Option<Source>) -> Bench {
    let vm = Arc::new(ScriptedVm::default());
    let ram = GuestRam::new([(0, RAM)]).unwrap();
    let memfds = vec![Arc::new(vm.create_guest_memfd(RAM).unwrap())];
    let staged = SHARED..SHARED + 4 * PAGE;
    let conversions =
        Conversions::new(Arc::clone(&vm) as Arc<dyn Vm>, ram.clone(), memfds, std::slice::from_ref(&staged));
    let conversions = Arc::new(conversions);
    let dma = Dma::new(ram, Some(Arc::clone(&conversions)));
    let seam: Arc<dyn Vm> = Arc::clone(&vm) as _;
    let shared = Shared {
        machine: Machine::new(&seam, &Board::new(1 << 30, 1), dma.clone(), Box::new(io::sink())).unwrap(),
        conversions: Some(conversions),
        implicit: None,
        pre_fault: Some(PreFault::new(Vec::new())),
        certificates: source.map(|source| Certificates::new(source, dma)),
        stop: AtomicBool::new(false),
    };
    Bench { vm, shared: Arc::new(shared) }
}

fn private_fault(gpa: u64, size: u64) -> Scripted {
    MemoryFault { flags: 1 << 3, gpa, size }
}

/// Runs a script; the result, and how often the vCPU was run.
fn run_script(script: impl IntoIterator<Item = Scripted>) -> (Result<Option<Outcome>, String>, usize) {
    let b = bench(None);
    let mut vcpu = ScriptedVcpu::new(script);
    let result = run(0, &mut vcpu, &b.shared).map_err(|e| e.to_string());
    assert_eq!(*b.vm.attributes.lock().unwrap(), [], "an access never converts");
    (result, vcpu.runs)
}

#[test]
fn an_access_through_the_wrong_view_ends_the_run_and_converts_nothing() {
    for (fault, words) in [
        (private_fault(SHARED, PAGE), "a private access to 0x8000 (0x1000 bytes), but the page is shared"),
        (MemoryFault { flags: 0, gpa: PRIVATE, size: PAGE }, "a shared access to 0x4000"),
        // 2 MiB, as KVM may say: one page of it disagrees.
        (private_fault(0, RAM), "some of its pages are shared and some private"),
    ] {
        let (result, runs) = run_script([fault]);
        assert!(result.as_ref().is_err_and(|e| e.contains(words)), "{words}: {result:?}");
        assert_eq!(runs, 1);
    }
}

#[test]
fn an_access_outside_of_ram_ends_the_run() {
    for (gpa, size) in [
        (RAM, PAGE),
        (RAM - PAGE, 2 * PAGE),
        (u64::MAX - 0xfff, PAGE),
        (u64::MAX, u64::MAX),
        (0, u64::MAX),
        (PRIVATE, 0),
    ] {
        for flags in [0, 1 << 3] {
            let (result, runs) = run_script([MemoryFault { flags, gpa, size }]);
            assert!(result.as_ref().is_err_and(|e| e.contains("that is not RAM")), "{gpa:#x}: {result:?}");
            assert_eq!(runs, 1);
        }
    }
}

#[test]
fn a_flag_that_is_not_known_ends_the_run() {
    for flags in [1, 1 << 4, 1 << 3 | 1 << 63] {
        let (result, _) = run_script([MemoryFault { flags, gpa: PRIVATE, size: PAGE }]);
        let words = format!("flags {flags:#x}");
        assert!(result.as_ref().is_err_and(|e| e.contains(&words)), "{result:?}");
    }
}

#[test]
fn a_fault_that_another_vcpu_has_settled_by_now_is_tried_again_but_not_for_ever() {
    let settled = private_fault(PRIVATE, PAGE);
    let few = vec![settled.clone(); FAULTS_MAX as usize];
    // A few, then the guest goes on.
    let (result, runs) = run_script(few.iter().cloned().chain([Scripted::Shutdown]));
    assert_eq!(result, Ok(Some(Outcome::Crashed { vcpu: 0 })));
    assert_eq!(runs, few.len() + 1);
    // Any progress starts the count again; a signal is none.
    let twice = few.iter().cloned().chain([Scripted::Out(0x80, 0)]).chain(few.iter().cloned());
    assert_eq!(run_script(twice.chain([Scripted::Shutdown])).0, Ok(Some(Outcome::Crashed { vcpu: 0 })));
    let endless = std::iter::repeat_n([settled, Scripted::Interrupted], 1000).flatten();
    let (result, runs) = run_script(endless);
    assert!(result.as_ref().is_err_and(|e| e.contains("again and again")), "{result:?}");
    assert!(runs <= 2 * (FAULTS_MAX as usize + 1), "{runs}");
}

#[test]
fn a_plain_guest_has_no_faults_of_this_kind() {
    let b = bench(None);
    let mut shared = Arc::into_inner(b.shared).unwrap();
    shared.conversions = None;
    let mut vcpu = ScriptedVcpu::new([private_fault(PRIVATE, PAGE)]);
    let error = run(0, &mut vcpu, &Arc::new(shared)).unwrap_err().to_string();
    assert!(error.contains("that is not RAM"), "{error}");
}

#[test]
fn every_hypercall_is_answered() {
    let b = bench(None);
    let script = [
        Scripted::MapGpaRange([PRIVATE, 1, 0, 0, 0, 0]),
        Scripted::MapGpaRange([RAM, 1, 0, 0, 0, 0]),
        Scripted::Hypercall(1),
        Scripted::Hypercall(u64::MAX),
        Scripted::Shutdown,
    ];
    let mut vcpu = ScriptedVcpu::new(script);
    assert!(run(0, &mut vcpu, &b.shared).is_ok());
    let refused = Answered::Ret(libc::EINVAL as u64);
    assert_eq!(vcpu.answers, [Answered::Ret(0), refused.clone(), refused.clone(), refused]);
    assert_eq!(*b.vm.attributes.lock().unwrap(), [(PRIVATE, PAGE, 0)]);
}

#[test]
fn a_range_that_became_private_is_assigned_before_the_guest_goes_on() {
    let b = bench(None);
    let script = [
        Scripted::MapGpaRange([SHARED, 2, 16, 0, 0, 0]),
        Scripted::MapGpaRange([RAM, 1, 16, 0, 0, 0]),
        Scripted::MapGpaRange([PRIVATE, 1, 0, 0, 0, 0]),
        Scripted::Shutdown,
    ];
    let mut vcpu = ScriptedVcpu::new(script);
    assert!(run(0, &mut vcpu, &b.shared).is_ok());
    assert_eq!(vcpu.pre_faulted, [(SHARED, 2 * PAGE)], "not what was refused, and not what became shared");
}

/// Linux 7.2 and later end KVM_RUN with EINVAL at any other errno than EINVAL and EAGAIN, so that a host
/// without memory would look like a guest that broke the protocol (`sev.c:snp_complete_one_psc`).
#[test]
fn a_conversion_that_the_host_cannot_make_is_told_as_the_host_s_fault() {
    for (errno, words) in
        [(libc::ENOMEM, "has no memory for the guest's private pages"), (libc::EIO, "Input/output")]
    {
        let b = bench(None);
        b.vm.fail_attributes.store(errno, Ordering::Relaxed);
        let mut vcpu = ScriptedVcpu::new([Scripted::MapGpaRange([PRIVATE, 2, 0, 0, 0, 0])]);
        let error = run(1, &mut vcpu, &b.shared).unwrap_err().to_string();
        let start = "vCPU 1: the guest's change of 2 pages at 0x4000 failed on the host: ";
        assert!(error.starts_with(start) && error.contains(words), "{error}");
        assert_eq!(vcpu.answer_now(), libc::EINVAL as u64, "the field holds an answer that KVM takes");
    }
}

#[test]
fn a_vcpu_that_kvm_puts_off_for_ever_ends_the_run_and_one_that_it_puts_off_now_and_then_does_not() {
    let (result, runs) = run_script(std::iter::repeat_n(Scripted::Again, 5000));
    assert!(result.as_ref().is_err_and(|e| e.contains("it waits for an INIT")), "{result:?}");
    assert_eq!(runs, 1001);
    // A signal is nothing else that happened to it.
    let signals = (0..5000).flat_map(|_| [Scripted::Again, Scripted::Interrupted]);
    let (result, _) = run_script(signals);
    assert!(result.as_ref().is_err_and(|e| e.contains("it waits for an INIT")), "{result:?}");
    // Once for each INIT, with something else in between.
    let now_and_then = (0..5000).flat_map(|_| [Scripted::Again, Scripted::Out(0x80, 0)]);
    let (result, runs) = run_script(now_and_then.chain([Scripted::Shutdown]));
    assert_eq!((result, runs), (Ok(Some(Outcome::Crashed { vcpu: 0 })), 10_001));
}

/// Linux 7.3.4, `svm.c:svm_vcpu_run` and `sev.c:pre_sev_run`: the same exit for a save area that the guest
/// named wrongly.
#[test]
fn a_refused_entry_is_the_monitor_s_fault_at_first_and_the_guest_s_afterwards() {
    let fail = || Scripted::FailEntry(u64::MAX);
    let ended = |vcpu, script: Vec<Scripted>| {
        run(vcpu, &mut ScriptedVcpu::new(script), &bench(None).shared).unwrap_err().to_string()
    };
    // A signal before the first entry changes nothing.
    for script in [vec![fail()], vec![Scripted::Interrupted, fail()]] {
        let error = ended(0, script);
        assert!(error.contains("its initial registers are not consistent"), "{error}");
    }
    for (vcpu, script) in [(1, vec![fail()]), (0, vec![Scripted::Out(0x80, 1), fail()])] {
        let error = ended(vcpu, script);
        assert!(error.contains("no usable save area") && error.contains("0xffffffffffffffff"), "{error}");
    }
}

#[test]
fn a_broken_page_of_the_host_is_not_taken_for_an_access_through_the_wrong_view() {
    let (result, runs) = run_script([Scripted::Poisoned(PRIVATE)]);
    assert!(result.as_ref().is_err_and(|e| e.contains("EHWPOISON") && e.contains("0x4000")), "{result:?}");
    assert_eq!(runs, 1);
}

#[test]
fn an_errno_of_kvm_run_is_explained() {
    for (errno, words) in [
        (libc::EINVAL, "before Linux 7.1"),
        (libc::ENOMEM, "cannot be swapped out"),
        (libc::EIO, "security processor"),
        (libc::EBADF, "/dev/sev"),
    ] {
        let error = run_error(0, CallError::errno("KVM_RUN", errno)).to_string();
        assert!(error.starts_with("vCPU 0: KVM_RUN: ") && error.contains(words), "{error}");
    }
}

#[test]
fn the_file_of_certificates_is_locked_until_the_kernel_has_done_the_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("certs");
    std::fs::write(&path, cert_table::encode(&[])).unwrap();
    let file = CertFile::open(&path, &crate::events::Events::silent()).unwrap();
    let b = bench(Some(Source::File(Arc::new(file))));
    let mut vcpu = ScriptedVcpu::new([Scripted::ReqCerts(SHARED, 1), Scripted::Shutdown]);
    let free = move || {
        let other = File::options().write(true).open(&path).unwrap();
        rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).is_ok()
    };
    let during = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (seen, check) = (Arc::clone(&during), free.clone());
    vcpu.on_complete = Box::new(move || seen.lock().unwrap().push(check()));
    assert!(run(0, &mut vcpu, &b.shared).is_ok());
    assert_eq!(vcpu.answers, [Answered::Certs(0, 1)]);
    assert_eq!(*during.lock().unwrap(), [false], "the exit is completed once, under the lock");
    assert!(free(), "and the lock is gone afterwards");
}

#[test]
fn a_request_for_certificates_that_cannot_be_met_is_answered_all_the_same() {
    let b = bench(None);
    let mut vcpu = ScriptedVcpu::new([Scripted::ReqCerts(SHARED, 1), Scripted::Shutdown]);
    assert!(run(0, &mut vcpu, &b.shared).is_ok());
    assert_eq!(vcpu.answers, [Answered::Certs(libc::EIO as u64, 1)]);
    let b = bench(Some(Source::Table(Arc::new(cert_table::encode(&[])))));
    let script = [PRIVATE, RAM, SHARED + 1, u64::MAX - 0xfff].map(|gpa| Scripted::ReqCerts(gpa, 1));
    let mut vcpu =
        ScriptedVcpu::new(script.into_iter().chain([Scripted::ReqCerts(SHARED, 0), Scripted::Shutdown]));
    assert!(run(0, &mut vcpu, &b.shared).is_ok());
    let (refused, short) = (Answered::Certs(libc::EIO as u64, 1), Answered::Certs(libc::ENOSPC as u64, 1));
    assert_eq!(vcpu.answers, [refused.clone(), refused.clone(), refused.clone(), refused, short]);
}
