// SPDX-License-Identifier: Apache-2.0
//! Two faults of the monitor that passed every test while the model was kinder than the kernel. The launch
//! code as it was is repeated here, through the seam, and has to fail.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_bindings::KVM_MP_STATE_INIT_RECEIVED;
use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use kvm_bindings::kvm_sev_snp_launch_update;
use snp::vmsa::SEV_FEATURE_SNP_ACTIVE;
use snp::vmsa::Segment;
use snp::vmsa::VmsaState;
use snp_model::memory::GuestMemory;
use snp_model::memory::View;
use snp_model::rmp::TwoMib;
use snp_model::vm::ApAction;
use snp_model::vm::ApCreation;

use super::vm::EmulatedVm;
use super::*;
use crate::events::Events;
use crate::machine::dma::Dma;
use crate::machine::ram::GuestRam;
use crate::platform::ATTRIBUTE_PRIVATE;
use crate::platform::Vcpu;
use crate::platform::emulated::Backing;
use crate::platform::error::SevError;
use crate::platform::exit::Exit;
use crate::platform::mapping::Mapping;
use crate::platform::memory::MemorySlot;
use crate::platform::registers;
use crate::platform::sev::Snp as _;
use crate::run::vcpu;

pub(super) const MEMORY: u64 = 1 << 20;
const VMSA: u64 = 0x3000;
pub(super) const CODE: u64 = 0x5000;

/// An SNP VM with RAM at 0, private, with a launch begun. `None`: no KVM here.
pub(super) fn launching() -> Option<EmulatedVm> {
    let Ok(kvm) = KvmPlatform::open() else {
        // Where guests are to run on this host, a test that does nothing would say too much.
        assert_ne!(std::env::var("CVMM_TEST_KVM").as_deref(), Ok("host"), "no /dev/kvm");
        println!("skipped: no /dev/kvm");
        return None;
    };
    let folder = tempfile::tempdir().unwrap();
    let keys = test_support::keys::written(folder.path());
    drop(kvm);
    let options = EmulatedOptions {
        backing: Backing::Single,
        strict: false,
        two_mib: TwoMib::Accept,
        statistics: false,
        product: None,
        keys,
    };
    let platform = EmulatedPlatform::open(options, &Events::silent()).unwrap();
    let vm = platform.snp_vm(platform.kvm.create(VmKind::Plain).unwrap(), &CodeHints::default()).unwrap();
    vm.create_irqchip().unwrap();
    vm.sev_init2(&mut kvm_sev_init { ghcb_version: 2, ..Default::default() }).unwrap();
    let shared = Arc::new(Mapping::anonymous(MEMORY).unwrap());
    let private = Some((Arc::new(vm.create_guest_memfd(MEMORY).unwrap()), 0));
    vm.set_memory(MemorySlot { slot: 0, gpa: 0, shared, private }).unwrap();
    let attributes =
        kvm_memory_attributes { address: 0, size: MEMORY, attributes: ATTRIBUTE_PRIVATE, flags: 0 };
    vm.set_memory_attributes(attributes).unwrap();
    vm.snp_launch_start(&mut kvm_sev_snp_launch_start { policy: 0x3_0000, ..Default::default() }).unwrap();
    Some(vm)
}

fn update(vm: &EmulatedVm, gpa: u64, source: &mut [u8]) -> Result<(), SevError> {
    let mut args = kvm_sev_snp_launch_update {
        gfn_start: gpa / 4096,
        len: source.len() as u64,
        type_: 1,
        ..Default::default()
    };
    vm.snp_launch_update(&mut args, source)
}

/// Linux 7.2.13 and 7.3.4, `sev.c:snp_launch_update`. The scratch buffer was a vector of the C library, which
/// begins 16 bytes into a page.
#[test]
fn a_source_that_is_not_page_aligned_launches_nothing() {
    let Some(vm) = launching() else { return };
    let mut buffer = vec![0xf4; 3 * 4096];
    let aligned = buffer.as_ptr().align_offset(4096);
    let before = vm.measured();
    let error = update(&vm, CODE, &mut buffer[aligned + 16..aligned + 16 + 4096]).unwrap_err();
    assert_eq!((error.errno, error.firmware), (libc::EINVAL, 0), "{error}");
    assert_eq!(vm.measured(), before);
    update(&vm, CODE, &mut buffer[aligned..aligned + 4096]).unwrap();
    assert_ne!(vm.measured(), before);
}

/// A launched guest of two vCPUs that has asked for vCPU `id` to start from a good save area.
fn vcpu_asked_for(id: u32, mp_state: Option<u32>) -> Option<(EmulatedVm, Box<dyn Vcpu>)> {
    let vm = launching()?;
    let mut state = VmsaState { sev_features: SEV_FEATURE_SNP_ACTIVE, ..VmsaState::reset() };
    let mut vcpus: Vec<_> = (0..2).map(|id| vm.create_vcpu(id).unwrap()).collect();
    for vcpu in &mut vcpus {
        registers::load(vcpu.as_mut(), &state).unwrap();
    }
    let mut ap = vcpus.swap_remove(id as usize);
    if let Some(mp_state) = mp_state {
        ap.set_mp_state(kvm_mp_state { mp_state }).unwrap();
    }
    vm.snp_launch_finish(&mut kvm_sev_snp_launch_finish::default(), None).unwrap();
    // What the guest does: a page with the registers of its choice, marked as a save area. out 0x99, al; hlt
    let model = &vm.0.model;
    for page in [VMSA, CODE] {
        model.pvalidate(page, true, 0, 1);
    }
    state.cs = Segment::new((CODE >> 4) as u16, 0x9b, 0xffff, CODE);
    state.rip = 0;
    vm.0.views.write(CODE, View::Private, &[0xe6, 0x99, 0xf4]).unwrap();
    vm.0.views.write(VMSA, View::Private, &state.encode()).unwrap();
    model.rmpadjust(VMSA, true, 0, 0x1_0001);
    vm.0.order(ApCreation { apic_id: id, action: ApAction::Run { vmsa_gpa: VMSA } });
    Some((vm, ap))
}

/// Linux 6.12.117, 7.2.13 and 7.3.4, `x86.c:kvm_arch_vcpu_create` and `kvm_arch_vcpu_ioctl_run`. Nobody set
/// the state of the second vCPU, which KVM creates waiting for an INIT. It must neither start nor go
/// unnoticed.
#[test]
fn an_ap_that_waits_for_an_init_is_not_started_by_ap_creation_and_ends_the_run() {
    let Some((vm, mut ap)) = vcpu_asked_for(1, None) else { return };
    for _ in 0..3 {
        assert!(matches!(ap.run().unwrap(), Exit::Again));
    }
    let shared = vcpu::Shared {
        machine: crate::machine::Machine::new(
            &(Arc::new(vm) as Arc<dyn Vm>),
            &snp::board::Board::new(1 << 30, 1),
            Dma::new(GuestRam::new([(0, MEMORY)]).unwrap(), None),
            Box::new(std::io::sink()),
        )
        .unwrap(),
        conversions: None,
        implicit: None,
        pre_fault: None,
        certificates: None,
        stop: AtomicBool::new(false),
    };
    let error = vcpu::run(1, ap.as_mut(), &Arc::new(shared)).unwrap_err().to_string();
    assert!(error.contains("vCPU 1: KVM does not run it") && error.contains("waits for an INIT"), "{error}");
}

/// As the launch does it now. The first vCPU stands for any: it is the one that software models of KVM can
/// run without an INIT.
#[test]
fn an_ap_that_is_halted_is_started_by_ap_creation() {
    let Some((_vm, mut ap)) = vcpu_asked_for(0, Some(KVM_MP_STATE_HALTED)) else { return };
    match ap.run().unwrap() {
        Exit::IoOut { port: 0x99, .. } => {}
        other => panic!("{other:?}"),
    }
}

/// Another state that looks as if it could do: KVM waits for a SIPI inside of the kernel, and only a signal
/// ends the call.
#[test]
fn an_ap_that_waits_for_a_sipi_stays_where_it_is() {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    let Some((_vm, mut ap)) = vcpu_asked_for(1, Some(KVM_MP_STATE_INIT_RECEIVED)) else { return };
    let signal = vmm_sys_util::signal::SIGRTMIN() + 1;
    vmm_sys_util::signal::register_signal_handler(signal, nothing).unwrap();
    let ran = Arc::new(Mutex::new(None));
    let said = Arc::clone(&ran);
    let thread = std::thread::spawn(move || {
        let exit = format!("{:?}", ap.run().unwrap());
        *said.lock().unwrap() = Some(exit);
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(*ran.lock().unwrap(), None, "it does not come back by itself");
    while !thread.is_finished() {
        vmm_sys_util::signal::Killable::kill(&thread, signal).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(ran.lock().unwrap().as_deref(), Some("Interrupted"));
}

/// Linux 6.12.117 and 7.3.4 create a vCPU after LAUNCH_FINISH. Its save area was never given to the firmware,
/// so VMRUN refuses it (`svm.c:svm_vcpu_run` hands that on as FAIL_ENTRY) until the guest has named one of
/// its own.
#[test]
fn a_vcpu_that_is_created_after_the_launch_runs_only_from_the_guest_s_own_save_area() {
    let Some((vm, _first)) = vcpu_asked_for(0, None) else { return };
    let mut late = vm.create_vcpu(7).unwrap();
    late.get_regs().unwrap();
    late.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    assert!(matches!(late.run().unwrap(), Exit::FailEntry { reason: u64::MAX }));
}
