// SPDX-License-Identifier: Apache-2.0
//! Guests of a few bytes, assembled by hand, as ELF kernels that are entered in 64-bit mode. They use so few
//! instructions that any KVM runs them, even one that is a slow software model.

use snp::image::direct::DirectBoot;
use snp::image::direct::DirectImage;
use snp::image::direct::Guest as ImageGuest;
use snp::image::kernel::Kernel;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use snp::plan::Record;
use snp::vmsa::SEV_FEATURE_SNP_ACTIVE;
use vmm::cpuid;
use vmm::launch::LaunchOptions;
use vmm::platform::Platform;
use vmm::platform::emulated::EmulatedPlatform;
use vmm::platform::kvm::KvmPlatform;
use vmm::run::guest::Guest;
use vmm::run::guest::Load;
use vmm::spec::Backing;

use crate::code::power_off;
use crate::elf;
use crate::monitor::emulated;
use crate::monitor::kvm;
use crate::monitor::run;
use crate::monitor::snp;

/// Where the guest's code is loaded and entered.
pub const CODE: u64 = 0x10_0000;
/// The same for SNP guests: in the first MiB, where code that runs without the C-bit finds private memory.
pub const SNP_CODE: u64 = 0x8_0000;
/// RAM of a guest.
pub const MEMORY: u64 = 128 << 20;
const EFER_SVME: u64 = 1 << 12;
const CR4_MCE: u64 = 1 << 6;

/// `code` as a kernel's file.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    elf::flat(CODE, code)
}

/// `code` as a plain guest with `cpus` vCPUs, and this host's KVM. `None`: there is none.
pub fn plain_guest(code: &[u8], cpus: u32) -> Option<(KvmPlatform, Guest)> {
    let platform = kvm()?;
    let image = image(code, cpus);
    let table = CpuidTable::plain(&cpuid::from_kvm(&platform.supported_cpuid().unwrap()), cpus, None);
    let guest = Guest {
        load: Load::Plain(image.plan),
        board: image.board,
        ram: image.ram.iter().map(|r| (r.start, r.end - r.start)).collect(),
        cpuid: (0..cpus).map(|id| cpuid::to_kvm(&table.for_vcpu(id))).collect(),
    };
    Some((platform, guest))
}

fn image(code: &[u8], vcpus: u32) -> DirectImage {
    let kernel = Kernel::parse(self::kernel(code)).unwrap();
    let guest = ImageGuest::Plain;
    let boot =
        DirectBoot { tpm: None, kernel: &kernel, initrd: None, cmdline: "", memory: MEMORY, vcpus, guest };
    boot.image().unwrap()
}

/// `code` as an SNP guest on the emulated platform, in the form that the platform's patches leave: VMGEXIT is
/// `out 0xe4, al` and a two-byte NOP.
pub fn emulated_guest(code: &[u8], backing: Backing) -> Option<(EmulatedPlatform, Guest)> {
    emulated_guest_with(code, backing, 1)
}

/// The same with `cpus` vCPUs, of which the guest starts all but the first.
pub fn emulated_guest_with(code: &[u8], backing: Backing, cpus: u32) -> Option<(EmulatedPlatform, Guest)> {
    let host = kvm()?;
    let platform = emulated(backing, None)?;
    // The registers and tables of a plain boot will do, with what KVM adds to EFER, CR4 and the features for
    // SEV guests (Linux 6.12, `svm_set_efer`, `svm_set_cr4`, `sev_es_sync_vmsa`); the plan is code and
    // tables, each page measured.
    let mut image = image(code, cpus);
    image.plan.vcpus.iter_mut().for_each(|state| {
        state.efer |= EFER_SVME;
        state.cr4 |= CR4_MCE;
        state.sev_features = SEV_FEATURE_SNP_ACTIVE;
        state.rip = SNP_CODE;
    });
    image.plan.records.iter_mut().filter(|r| r.gpa == CODE).for_each(|r| r.gpa = SNP_CODE);
    image.plan.records.sort_by_key(|r| r.gpa);
    let records =
        image.plan.records.into_iter().map(|r| Record { page_type: PageType::Normal, ..r }).collect();
    let table = CpuidTable::plain(&cpuid::from_kvm(&host.supported_cpuid().unwrap()), cpus, None);
    let guest = Guest {
        load: snp(LaunchPlan { records, vcpus: image.plan.vcpus }, LaunchOptions::default()),
        board: image.board,
        ram: image.ram.iter().map(|r| (r.start, r.end - r.start)).collect(),
        cpuid: (0..cpus).map(|id| cpuid::to_kvm(&table.for_vcpu(id))).collect(),
    };
    Some((platform, guest))
}

/// Whether this KVM hands filtered MSRs to the monitor, as Linux does since 5.10 and a software model of it
/// may not. The emulated platform needs that; without it these tests say so and do nothing.
pub fn msrs_reach_the_monitor() -> bool {
    // After reset the GHCB MSR holds the SEV_INFO answer, whose low byte is 1: mov ecx, 0xc0010130; rdmsr; to
    // the console.
    let code = [&[0xb9, 0x30, 0x01, 0x01, 0xc0, 0x0f, 0x32, 0x66, 0xba, 0xf8, 0x03, 0xee][..], &power_off()]
        .concat();
    let guest = emulated_guest(&code, Backing::Single);
    match guest.map(|(platform, guest)| run(&platform, guest)) {
        Some((_, console)) if console == [1] => true,
        Some((Err(e), _)) => panic!("the guest that asks was not launched: {e}"),
        Some((Ok(_), _)) => {
            println!("skipped: this KVM does not hand MSR accesses to the monitor");
            false
        }
        None => false,
    }
}
