// SPDX-License-Identifier: Apache-2.0
//! The plan of a direct boot through stage0: small whatever it boots, bound to every byte that it boots.

#![allow(clippy::unwrap_used, reason = "a test fails where its image fails")]

use snp::image::direct::DirectImage;
use snp::image::direct::Validation;
use snp::image::error::ImageError;
use snp::image::lazy::Acceptance;
use snp::image::staged::StagedBoot;
use snp::plan::PageType;
use snp_model::patch::CodeMemory;
use snp_model::patch::Ports;
use test_support::elf::Segment;
use test_support::elf::executable;
use test_support::kernels::UNACCEPTED;
use test_support::stage0::Boot;
use test_support::stage0::kernel;

const MIB: u64 = 1 << 20;
const LAZY: Validation = Validation::Stage0(Acceptance::Lazy);

fn shim(image: &DirectImage) -> &StagedBoot {
    image.staged.as_ref().unwrap()
}

#[test]
fn the_launch_takes_at_most_a_dozen_pages_whatever_is_booted() {
    let small = Boot::default().image().unwrap().plan.launch_pages();
    assert!(small <= 12 + 1, "{small} pages");
    let large = Boot {
        kernel: kernel(12 << 20, 60 << 20).bytes(),
        initrd: vec![1; 100 << 20],
        memory: 4608 * MIB,
        ..Boot::default()
    };
    assert_eq!(large.image().unwrap().plan.launch_pages(), small);
    let many = Boot { vcpus: 16, ..Boot::default() };
    assert_eq!(many.image().unwrap().plan.launch_pages(), small + 15);
}

#[test]
fn a_small_guest_holds_a_distribution_kernel_and_its_initrd_twice() {
    // Debian's cloud kernel has 12 MB, its decompressor works in some 50 MiB, its initrd may have 30 MB.
    let boot = |init_size, initrd: usize| Boot {
        kernel: kernel(12 << 20, init_size).bytes(),
        initrd: vec![1; initrd],
        ..Boot::default()
    };
    for initrd in [30 << 20, 50 << 20] {
        let image = boot(50 << 20, initrd).image().unwrap();
        assert!(shim(&image).shared.iter().all(|range| range.end <= 128 * MIB));
    }
    let error = boot(20 << 20, 60 << 20).image().unwrap_err();
    assert!(error.to_string().starts_with("`memory`: no room for a second copy of initrd"), "{error}");
}

#[test]
fn one_digest_holds_for_every_position_of_the_c_bit() {
    let digest = Boot::default().digest();
    for c_bit in [39, 47, 51] {
        assert_eq!(Boot { c_bit, ..Boot::default() }.digest(), digest, "C-bit {c_bit}");
    }
}

#[test]
fn every_input_changes_the_digest() {
    let digest = Boot::default().digest();
    let flip = |mut bytes: Vec<u8>, at: usize| {
        bytes[at] ^= 1;
        bytes
    };
    let Boot { kernel, initrd, .. } = Boot::default();
    let last = kernel.len() - 1;
    let changed = [
        ("setup header", Boot { kernel: flip(kernel.clone(), 0x24c), ..Boot::default() }),
        ("kernel's first byte", Boot { kernel: flip(kernel.clone(), 1024), ..Boot::default() }),
        ("kernel's last byte", Boot { kernel: flip(kernel, last), ..Boot::default() }),
        ("initrd", Boot { initrd: flip(initrd.clone(), 9_999), ..Boot::default() }),
        ("initrd's length", Boot { initrd: initrd[..9_999].to_vec(), ..Boot::default() }),
        ("command line", Boot { cmdline: "console=ttyS1", ..Boot::default() }),
        ("memory", Boot { memory: 130 * MIB, ..Boot::default() }),
        ("vCPUs", Boot { vcpus: 2, ..Boot::default() }),
    ];
    for (what, boot) in changed {
        assert_ne!(boot.digest(), digest, "{what}");
    }
}

#[test]
fn staged_bytes_lie_in_shared_memory_and_launch_pages_do_not() {
    let image = Boot { memory: 4608 * MIB, ..Boot::default() }.image().unwrap();
    let shim = shim(&image);
    assert_eq!(shim.staging.len(), shim.inputs.items.len());
    for ((gpa, bytes), item) in shim.staging.iter().zip(&shim.inputs.items) {
        let end = gpa + bytes.as_slice().len() as u64;
        assert!(shim.shared.iter().any(|range| range.start <= *gpa && end <= range.end), "{gpa:#x}");
        assert_eq!((item.source, item.len), (*gpa, end - gpa));
    }
    for record in &image.plan.records {
        assert!(!shim.shared.iter().any(|range| range.start < record.end() && record.gpa < range.end));
    }
    let unmeasured = image.plan.records.iter().filter(|r| r.page_type == PageType::Unmeasured);
    assert_eq!(unmeasured.count(), 0, "nothing enters the guest's private memory unmeasured");
}

#[test]
fn no_vcpu_starts_with_a_bit_that_depends_on_the_host() {
    let image = Boot { vcpus: 3, ..Boot::default() }.image().unwrap();
    for vcpu in &image.plan.vcpus {
        assert_eq!((vcpu.cr3, vcpu.cr0, vcpu.efer), (0, 0x11, 0x1000));
        assert_eq!((vcpu.cs.attrib, vcpu.cs.base, vcpu.cs.limit), (0xc9b, 0, 0xffff_ffff));
    }
    let [first, second, third] = &image.plan.vcpus[..] else { unreachable!() };
    assert_eq!(first.rip, snp::stage0::BUILT.entry);
    assert_eq!(second, third, "other vCPUs are inert and alike");
    assert_eq!(second.rip, snp::stage0::BUILT.park);
}

/// Guest memory with only the launch pages of a plan.
struct Launched(std::collections::BTreeMap<u64, u8>);

impl CodeMemory for Launched {
    fn read(&mut self, gpa: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        for (at, byte) in (gpa..).zip(bytes) {
            *byte = *self.0.get(&at).ok_or(std::io::ErrorKind::InvalidInput)?;
        }
        Ok(())
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.0.extend((gpa..).zip(bytes.iter().copied()));
        Ok(())
    }
}

#[test]
fn an_emulated_platform_can_patch_stage0_and_nothing_else_changes() {
    let image = Boot::default().image().unwrap();
    let pages = image.plan.records.iter().filter(|r| r.page_type == PageType::Normal);
    let launched: std::collections::BTreeMap<u64, u8> =
        pages.flat_map(|r| (r.gpa..).zip(r.contents.as_slice().to_vec())).collect();
    let mut memory = Launched(launched.clone());
    let sites = snp_model::patch::stage0_sites();
    sites.patch_at_launch(&mut memory, &Ports::default()).unwrap();
    let changed: Vec<u64> =
        launched.iter().filter(|(at, byte)| memory.0[at] != **byte).map(|(at, _)| *at).collect();
    let expected = sites.sites.sites.iter().map(|site| site.offset).chain([sites.handover]);
    let mut expected: Vec<u64> = expected.flat_map(|at| at..at + 4).collect();
    expected.sort_unstable();
    assert_eq!(changed, expected);
    let error = sites.patch_at_launch(&mut memory, &Ports::default()).unwrap_err();
    assert!(error.to_string().contains("stage0's end"), "{error}");
}

/// A kernel that accepts memory itself.
fn knowing() -> Vec<u8> {
    kernel(64 << 10, 1 << 20).accepting_memory().bytes()
}

#[test]
fn acceptance_is_lazy_by_itself_only_for_a_large_guest_with_a_kernel_that_can() {
    let lazy = |boot: Boot| shim(&boot.image().unwrap()).inputs.accept.is_some();
    assert!(lazy(Boot { kernel: knowing(), memory: 4608 * MIB, ..Boot::default() }));
    assert!(!lazy(Boot { kernel: knowing(), memory: 2048 * MIB, ..Boot::default() }));
    assert!(!lazy(Boot { memory: 4608 * MIB, ..Boot::default() }));
    assert!(lazy(Boot { kernel: knowing(), validation: LAZY, ..Boot::default() }));
    assert!(!lazy(Boot {
        kernel: knowing(),
        memory: 4608 * MIB,
        validation: Validation::Stage0(Acceptance::Eager),
        ..Boot::default()
    }));
    let error = Boot { validation: LAZY, ..Boot::default() }.image().unwrap_err();
    assert!(error.to_string().starts_with("`accept` lazy: this kernel does not know"), "{error}");
}

#[test]
fn a_guest_that_is_too_large_for_the_table_of_unaccepted_memory_is_not_lazy() {
    // The table has 64 KiB, 24 bytes of them for its header: one bit for each 2 MiB below 1,048,192 MiB, 1
    // GiB of which is the device gap.
    let most = 1_047_168;
    let boot = |mib, accept| Boot {
        kernel: knowing(),
        memory: mib * MIB,
        validation: Validation::Stage0(accept),
        ..Boot::default()
    };
    let lazy = |mib| shim(&boot(mib, Acceptance::Auto).image().unwrap()).inputs.accept.is_some();
    assert!(lazy(most) && !lazy(most + 2));
    let error = boot(most + 2, Acceptance::Lazy).image().unwrap_err();
    assert_eq!(error, ImageError::LazyMemory((most + 2) * MIB));
}

/// System V ABI, "Program Header": bytes of a segment beyond its part of the file are zero. Memory that a
/// guest has just validated holds anything.
#[test]
fn an_elf_kernels_memory_is_what_its_segments_say_whatever_was_there_before() {
    const START: u64 = 16 * MIB;
    let segments = [
        Segment { mem_len: 0x5080, ..Segment::new(START, vec![1; 0x2800]) },
        // Begins in the page in which the zeros of the one before end.
        Segment { mem_len: 0x3000, ..Segment::new(START + 0x5100, vec![2; 0x10]) },
        // Its zeros begin at a page, and the next segment lies in that page too.
        Segment { mem_len: 0x1080, ..Segment::new(START + 0x1_0000, vec![3; 0x1000]) },
        Segment::new(START + 0x1_1200, vec![4; 0x20]),
        // Nothing but zeros.
        Segment { mem_len: 0x2345, ..Segment::new(START + 0x2_0800, Vec::new()) },
    ];
    let image =
        Boot { kernel: executable(START + 0x40, &segments, &[], &[]), ..Boot::default() }.image().unwrap();
    let mut memory = vec![0xa5; 0x3_0000];
    let shim = shim(&image);
    for (item, (_, bytes)) in shim.inputs.items.iter().zip(&shim.staging) {
        if let Some(at) = item.target.checked_sub(START).filter(|at| *at < memory.len() as u64) {
            let place = &mut memory[at as usize..][..item.mem_len as usize];
            place.fill(0);
            place[..item.len as usize].copy_from_slice(bytes.as_slice());
        }
    }
    for (n, segment) in segments.iter().enumerate() {
        let found = &memory[(segment.paddr - START) as usize..][..segment.mem_len as usize];
        let mut expected = segment.contents.clone();
        expected.resize(segment.mem_len as usize, 0);
        assert!(found == expected, "segment {n}");
    }
}

#[test]
fn the_bytes_of_the_guid_inside_the_payload_prove_nothing() {
    let mut kernel = kernel(64 << 10, 1 << 20).bytes();
    kernel[1024 + 0x400..1024 + 0x410].copy_from_slice(&UNACCEPTED);
    assert!(Boot { kernel, validation: LAZY, ..Boot::default() }.image().is_err());
}

#[test]
fn what_a_lazy_boot_validates_beforehand_does_not_grow_with_memory() {
    let size = |memory| {
        let kernel = kernel(12 << 20, 50 << 20).accepting_memory().bytes();
        let boot = Boot { kernel, initrd: vec![1; 30 << 20], memory, validation: LAZY, ..Boot::default() };
        let image = boot.image().unwrap();
        shim(&image).inputs.accept.iter().flatten().map(|range| range.end - range.start).sum::<u64>()
    };
    // More than the 2 GiB below which the initrd has to lie: a guest of 2 GiB has no unit after it.
    let three = size(3072 * MIB);
    assert!(three < 400 * MIB, "{three:#x}");
    for memory in [4096, 16 << 10, 512 << 10] {
        assert_eq!(size(memory * MIB), three, "{memory} MiB");
    }
}

#[test]
fn the_explanation_names_every_item_with_its_hash() {
    // SHA-384 of "console=ttyS0" and a zero byte, by coreutils' sha384sum.
    let hash =
        "ef2fff0096336c0de3fb250d6addef9837ab2e4eed9ca30b174f28550d7f801f29421fec6f40f82f16502dc77cd187a2";
    let text = shim(&Boot::default().image().unwrap()).explain();
    let line = text.lines().find(|line| line.contains("command line")).unwrap();
    assert!(line.contains(hash) && line.contains("0x0000020000") && line.contains("14 bytes"), "{line}");
    for name in
        ["kernel", "initrd", "boot_params", "ACPI tables", "Controlled by the host", "all RAM, 128 MiB"]
    {
        assert!(text.contains(name), "{name} is missing in\n{text}");
    }
}
