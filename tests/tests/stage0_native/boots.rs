// SPDX-License-Identifier: Apache-2.0
//! Boots that get to their kernel, whatever the host is like.

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use snp::image::direct::Validation;
use snp::image::lazy::Acceptance;
use snp::stage0::BUILT;
use snp::stage0::layout;
use test_support::kernels::BzImage;
use test_support::stage0::Boot;

use crate::host::End;
use crate::host::Host;
use crate::rig::BOOT_PARAMS;
use crate::rig::CMDLINE;
use crate::rig::HIGH;
use crate::rig::HIGH_LEN;
use crate::rig::KERNEL;
use crate::rig::LARGE;
use crate::rig::MEMORY;
use crate::rig::PAGE;
use crate::rig::Rig;
use crate::rig::kernel;

#[test]
fn everything_is_validated_once_and_the_kernel_gets_what_was_staged() {
    let mut rig = Rig::new();
    let mut host = Host::default();
    assert_eq!(rig.run(&mut host), End::Kernel);
    let ram = (0..MEMORY).chain(HIGH..HIGH + HIGH_LEN).step_by(PAGE as usize);
    let missing: Vec<u64> = ram.filter(|gpa| !rig.validated[(gpa / PAGE) as usize]).collect();
    assert_eq!(missing, Vec::<u64>::new());
    assert_eq!(rig.private.at(KERNEL, kernel().len() as u64), kernel());
    let tail = kernel().len() as u64;
    assert!(rig.private.at(KERNEL + tail, 0x4000 - tail).iter().all(|byte| *byte == 0));
    assert_eq!(rig.private.at(CMDLINE, 14), b"console=ttyS0\0");
    assert!(rig.private.at(0, 0x1000).iter().all(|byte| *byte == 0), "page 0 is cleared");
    // 32 MiB and two pages above 4 GiB, less the first 2 MiB: that one and the odd pages go one by one.
    assert_eq!((host.large_ok, host.mismatches), (15 + 2, 0));
    let launched = 2 + 1 + BUILT.image.len() as u64 / PAGE;
    assert_eq!(host.small_ok, 512 + 3 - launched);
}

/// The boot of a kernel that this host can run.
fn booted(kernel: Vec<u8>, memory: u64, validation: Validation) -> Boot {
    Boot { kernel, initrd: vec![0x77; 5000], cmdline: "panic=-1", memory, vcpus: 1, c_bit: 40, validation }
}

#[test]
fn the_plan_of_a_direct_boot_runs_and_puts_every_byte_in_its_place() {
    let kernel = bz_image().bytes();
    for memory in [128 << 20, 4608 << 20] {
        let boot =
            |validation| Boot { vcpus: 2, ..booted(kernel.clone(), memory, validation) }.image().unwrap();
        let (image, expected) = (boot(Validation::Stage0(Acceptance::Eager)), boot(Validation::AllByLaunch));
        let mut rig = Rig::of_image(&image);
        let mut host = Host::default();
        assert_eq!(rig.run(&mut host), End::Kernel);
        // What stage0 leaves behind is what the plan without stage0 launches, less its page tables and
        // descriptor table.
        let skip = ["free RAM", "page tables", "descriptor table", "CPUID page", "secrets page"];
        for record in expected.plan.records.iter().filter(|r| !skip.contains(&&*r.name)) {
            let bytes = record.contents.as_slice();
            assert_eq!(rig.private.at(record.gpa, bytes.len() as u64), bytes, "{}", record.name);
        }
        for gpa in image.ram.iter().flat_map(|range| range.clone().step_by(PAGE as usize)) {
            let page = (gpa / PAGE) as usize;
            // The secrets page and the CPUID page are launch pages; this host marks them as validated.
            assert!(rig.validated[page] && rig.is_private[page], "{gpa:#x}");
        }
        // The work grows with RAM by one PVALIDATE for each 2 MiB; the first 2 MiB go page by page.
        assert_eq!(host.large_ok, memory / LARGE - 1);
        assert_eq!(host.small_ok, 512 - 3 - BUILT.image.len() as u64 / PAGE);
    }
}

/// [`kernel`] in a bzImage that asks to be where the rig expects it.
fn bz_image() -> BzImage {
    let mut body = kernel();
    body.resize(0x2400, 0);
    BzImage::around(&body, 1 << 20)
}

#[test]
fn a_host_with_4k_rmp_entries_gets_the_same_memory_validated_page_by_page() {
    let mut host = Host { small_rmp: true, ..Host::default() };
    let mut rig = Rig::new();
    assert_eq!(rig.run(&mut host), End::Kernel);
    assert_eq!((host.large_ok, host.mismatches), (0, 17));
    let launched = 2 + 1 + BUILT.image.len() as u64 / PAGE;
    assert_eq!(host.small_ok, (MEMORY + HIGH_LEN) / PAGE - launched);
}

/// Physical address bits of the CPUs that this host's KVM offers.
fn address_bits() -> u32 {
    let offered = Kvm::new().unwrap().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let leaf = offered.as_slice().iter().find(|e| e.function == 0x8000_0008);
    leaf.map_or(36, |e| e.eax & 0xff)
}

#[test]
fn the_same_measured_bytes_run_with_every_c_bit_position() {
    let bits = address_bits();
    // A table entry with a bit beyond the address width faults, so the highest position is the width's last
    // one.
    for c_bit in [36, 39, 47, bits - 1].into_iter().filter(|c_bit| *c_bit < bits) {
        let mut host = Host { c_bit, ..Host::default() };
        let mut rig = Rig::new();
        assert_eq!(rig.run(&mut host), End::Kernel, "C-bit {c_bit}");
        assert_eq!(rig.inputs.encode().unwrap(), Rig::new().inputs.encode().unwrap());
    }
}

#[test]
fn the_stack_stays_far_from_the_page_tables() {
    // Nothing guards the lower end of the 16 KiB stack, below which the page tables lie. stage0 fills it with
    // zeros first, so what it never reached is zero still.
    const STACK: u64 = 0x4000;
    let mut rig = Rig::new();
    assert_eq!(rig.run(&mut Host::default()), End::Kernel);
    let stack = rig.private.at(layout::WORK_END - STACK, STACK);
    let untouched = stack.iter().take_while(|byte| **byte == 0).count() as u64;
    assert!(untouched < STACK, "the stack is where this test looks");
    assert!(untouched >= STACK - 0x1000, "{} bytes of stack were used", STACK - untouched);
}

#[test]
fn page_state_changes_that_are_worked_off_in_parts_are_continued() {
    let mut host = Host { psc_batch: 1, ..Host::default() };
    let mut rig = Rig::new();
    assert_eq!(rig.run(&mut host), End::Kernel);
    assert_eq!(host.psc_requests, 2);
    assert!(rig.is_private.iter().all(|private| *private), "no page stays shared");
}

#[test]
fn a_lazy_boot_validates_the_same_few_ranges_whatever_the_memory() {
    let kernel = bz_image().accepting_memory().bytes();
    let mut counts = Vec::new();
    for memory in [3 << 30, 16 << 30] {
        let image = booted(kernel.clone(), memory, Validation::Stage0(Acceptance::Auto)).image().unwrap();
        let mut rig = Rig::of_image(&image);
        let mut host = Host::default();
        assert_eq!(rig.run(&mut host), End::Kernel);
        counts.push((host.large_ok, host.small_ok));
        // The table in guest memory says of each 2 MiB of RAM what the host saw being validated.
        let table = rig.private.at(layout::UNACCEPTED, layout::UNACCEPTED_END - layout::UNACCEPTED);
        for start in image.ram.iter().flat_map(|range| range.clone().step_by(LARGE as usize)) {
            let unit = (start / LARGE) as usize;
            let accepted = table[24 + unit / 8] >> (unit % 8) & 1 == 0;
            let pages = &rig.validated[unit * 512..(unit + 1) * 512];
            assert!(pages.iter().all(|page| *page == accepted), "{start:#x}");
        }
        assert_eq!(rig.private.at(BOOT_PARAMS + 0x1c0, 4), b"EL64");
    }
    assert_eq!(counts[0], counts[1]);
}
