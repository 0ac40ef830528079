// SPDX-License-Identifier: Apache-2.0
//! The trial, on a VM that answers LAUNCH_UPDATE as a host's KVM and firmware do.

use std::os::fd::OwnedFd;
use std::sync::Mutex;

use kvm_bindings::kvm_memory_attributes;
use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use kvm_bindings::kvm_sev_snp_launch_update;
use snp::pages::cpuid::SnpCpuid;
use snp::pages::cpuid_entry::CpuidEntry;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::platform::Vcpu;
use crate::platform::error::CallError;
use crate::platform::error::SevError;
use crate::platform::interrupt::MsiMessage;
use crate::platform::interrupt::MsiRoute;
use crate::platform::memory::MemorySlot;
use crate::platform::scripted::ScriptedVm;
use crate::platform::sev::Snp;

/// Byte of the CPUID page where an entry's registers begin: 16 bytes of header, 24 of inputs.
const FIRST_REGISTERS: usize = 16 + 24;
const ENTRY: usize = 48;

/// What the firmware answers to the CPUID page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Firmware {
    /// It takes the page.
    Takes,
    /// It clears these bits of a register of the entry with this leaf, and takes the page when they are
    /// clear.
    Clears(u32, usize, u32),
    /// It does so, and refuses its own page too.
    Stubborn(u32, usize, u32),
}

/// A VM that notes the calls of a launch in order.
struct Host {
    vm: ScriptedVm,
    firmware: Firmware,
    calls: Mutex<Vec<&'static str>>,
    /// Linux 7.1 and later refuse a source that is not page aligned; 6.12 does not look
    /// (`sev.c:snp_launch_update`).
    page_aligned: bool,
}

impl Host {
    fn new(firmware: Firmware) -> Self {
        Host { vm: ScriptedVm::default(), firmware, calls: Mutex::default(), page_aligned: false }
    }

    fn call(&self, name: &'static str) {
        self.calls.lock().unwrap().push(name);
    }
}

impl Vm for Host {
    fn create_irqchip(&self) -> Result<(), CallError> {
        unreachable!("the trial has no vCPU to interrupt")
    }
    fn register_irqfd(&self, _: &EventFd, _: u32) -> Result<(), CallError> {
        unreachable!("nor devices")
    }
    fn unregister_irqfd(&self, _: &EventFd, _: u32) -> Result<(), CallError> {
        unreachable!("nor devices")
    }
    fn set_msi_routes(&self, _: &[MsiRoute]) -> Result<(), CallError> {
        unreachable!("nor devices")
    }
    fn signal_msi(&self, _: MsiMessage) -> Result<bool, CallError> {
        unreachable!("nor devices")
    }
    fn register_ioevent(&self, _: &EventFd, _: u64) -> Result<(), CallError> {
        unreachable!("nor devices")
    }
    fn unregister_ioevent(&self, _: &EventFd, _: u64) -> Result<(), CallError> {
        unreachable!("nor devices")
    }
    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, CallError> {
        self.call("guest_memfd");
        self.vm.create_guest_memfd(size)
    }
    fn set_memory(&self, slot: MemorySlot) -> Result<(), CallError> {
        self.call("memory");
        self.vm.set_memory(slot)
    }
    fn set_memory_attributes(&self, attributes: kvm_memory_attributes) -> Result<(), CallError> {
        self.call("attributes");
        self.vm.set_memory_attributes(attributes)
    }
    fn create_vcpu(&self, _: u32) -> Result<Box<dyn Vcpu>, CallError> {
        unreachable!("LAUNCH_UPDATE needs no vCPU")
    }
    fn remove_memory(&self, _: u32) -> Result<(), CallError> {
        unreachable!("what is given up is closed")
    }
    fn snp(&self) -> Option<&dyn Snp> {
        Some(self)
    }
}

impl Snp for Host {
    fn enable_map_gpa_range_exit(&self) -> Result<(), CallError> {
        self.vm.enable_map_gpa_range_exit()
    }
    fn sev_init2(&self, init: &mut kvm_sev_init) -> Result<(), SevError> {
        self.call("INIT2");
        self.vm.sev_init2(init)
    }
    fn snp_launch_start(&self, start: &mut kvm_sev_snp_launch_start) -> Result<(), SevError> {
        self.call("START");
        self.vm.snp_launch_start(start)
    }
    fn snp_launch_update(
        &self,
        update: &mut kvm_sev_snp_launch_update,
        source: &mut [u8],
    ) -> Result<(), SevError> {
        let refuse = |errno, firmware| Err(SevError { command: "LAUNCH_UPDATE", errno, firmware });
        if self.page_aligned && !(source.as_ptr() as usize).is_multiple_of(4096) {
            return refuse(libc::EINVAL, 0);
        }
        if update.type_ == PageType::Cpuid as u8 {
            self.call("UPDATE CPUID");
            if let Firmware::Clears(leaf, register, bits) | Firmware::Stubborn(leaf, register, bits) =
                self.firmware
            {
                let at = (0..64)
                    .map(|i| FIRST_REGISTERS + i * ENTRY)
                    .find(|at| source[at - 24..at - 20] == leaf.to_le_bytes())
                    .expect("the entry");
                let word = &mut source[at + register * 4..][..4];
                let value = u32::from_le_bytes(word.try_into().unwrap());
                if value & bits != 0 || matches!(self.firmware, Firmware::Stubborn(..)) {
                    word.copy_from_slice(&(value & !bits).to_le_bytes());
                    return refuse(libc::EIO, FwStatus::INVALID_PARAM.0);
                }
            }
        } else {
            self.call("UPDATE");
        }
        update.len = 0;
        Ok(())
    }
    fn snp_launch_finish(
        &self,
        _: &mut kvm_sev_snp_launch_finish,
        _: Option<(&[u8; 96], &[u8; 4096])>,
    ) -> Result<(), SevError> {
        unreachable!("a launch that is given up has no end")
    }
    fn snp_enable_req_certs(&self) -> Result<(), SevError> {
        Ok(())
    }
}

/// A table with what [`CpuidTable::snp`] needs, and features to lose.
fn table() -> CpuidTable {
    let entry = |function, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..CpuidEntry::default()
    };
    let offered = [
        entry(0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(1, [0xa0_0f11, 0x800, 0xfefa_3203, 0x178b_fbff]),
        entry(0x4000_0000, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x8000_0000, [0x8000_0021, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(0x8000_0008, [0x3030, 0x1, 0, 0]),
        entry(0x8000_0021, [0x1800_0065, 0, 0, 0]),
    ];
    CpuidTable::snp(&offered, 1, &SnpCpuid { c_bit: 51, phys_bits: None, coherency_sfw_no: false }).unwrap()
}

#[test]
fn the_trial_makes_the_calls_of_a_launch_up_to_the_cpuid_page() {
    let host = Host::new(Firmware::Takes);
    let trial = try_pages(&host, &table(), None);
    let Trial::Passed(cpuid) = trial else { panic!("{trial:?}") };
    assert_eq!(
        *host.calls.lock().unwrap(),
        ["INIT2", "guest_memfd", "memory", "attributes", "START", "UPDATE", "UPDATE CPUID"]
    );
    assert_eq!(*host.vm.attributes.lock().unwrap(), [(0, 0x2000, ATTRIBUTE_PRIVATE)]);
    assert_eq!((cpuid.changes.as_slice(), cpuid.structure, cpuid.again), (&[][..], false, None));
    let sev = cpuid.offered.iter().find(|row| row.leaf == 0x8000_001f).unwrap();
    assert_eq!(sev.registers, [0x1a, 1 << 6 | 51, 0, 0], "the table of a launch, SEV leaf and all");
}

/// A value that the launch does not accept without being asked: RDSEED, which AMD's CPUs have.
#[test]
fn a_refusal_shows_offered_and_accepted_and_offers_the_firmwares_page_again() {
    for firmware in [Firmware::Clears(1, 2, 1 << 12), Firmware::Stubborn(1, 2, 1 << 12)] {
        let trial = try_pages(&Host::new(firmware), &table(), None);
        let Trial::Failed { step, firmware: status, cpuid: Some(cpuid), .. } = trial else {
            panic!("{trial:?}")
        };
        assert_eq!((step.as_str(), status), ("adding the CPUID page", 0x16));
        let change = CpuidChange {
            leaf: 1,
            subleaf: 0,
            register: "ECX".into(),
            offered: 0xfefa_3203,
            accepted: 0xfefa_2203,
        };
        assert_eq!(cpuid.changes, [change]);
        assert!(cpuid.acceptable);
        match firmware {
            Firmware::Clears(..) => assert_eq!(cpuid.again, Some(Ok(()))),
            _ => assert!(cpuid.again.unwrap().is_err()),
        }
    }
}

/// Linux 7.1 and later: the launch's own scratch buffer is what the trial tries.
#[test]
fn a_kernel_that_wants_page_aligned_sources_takes_ours() {
    let host = Host { page_aligned: true, ..Host::new(Firmware::Takes) };
    let trial = try_pages(&host, &table(), None);
    assert!(matches!(trial, Trial::Passed(_)), "{trial:?}");
}
