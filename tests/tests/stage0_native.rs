// SPDX-License-Identifier: Apache-2.0
//! stage0 on the native KVM, against a small host of its own: what it validates, what it refuses, how it hands over.
//!
//! The host here is a few hundred lines that share nothing with the monitor or with `snp_model`: separate backings for the
//! private and the shared view of each page, one flag per page for "validated", and the handful of GHCB requests that stage0
//! makes. The kernel is a few bytes that report the state they were entered with. So the tests need `/dev/kvm` but no Linux
//! guest, and they also run on a KVM that is too slow for one.

#![allow(unsafe_code, reason = "maps guest memory and hands it to KVM")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::single_range_in_vec_init,
    reason = "a test fails where its host fails"
)]

use kvm_bindings::*;
use kvm_ioctls::*;
use snp::image::direct::DirectImage;
use snp::image::direct::Validation;
use snp::image::lazy::Acceptance;
use snp::stage0::BUILT;
use snp::stage0::InputsPage;
use snp::stage0::inputs::Item;
use snp::stage0::inputs::Kind;
use snp::stage0::item_hash;
use snp::stage0::layout;
use snp::stage0::reason::REASON_SET;
use snp::stage0::reason::Reason;
use test_support::kernels::BzImage;
use test_support::stage0::Boot;

const PAGE: u64 = 0x1000;
const LARGE: u64 = 0x20_0000;
/// Low RAM of a rig that is built by hand.
const MEMORY: u64 = 32 << 20;
const KERNEL: u64 = 16 << 20;
const ENTRY: u64 = KERNEL + 0x200;
const INITRD: u64 = 24 << 20;
const STAGING: u64 = 4 << 20;
const BOOT_PARAMS: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
const GHCB_MSR: u32 = 0xc001_0130;
const DONE_PORT: u16 = 0xe9;

/// Memory of the host that backs one view of the guest's.
struct Backing(*mut u8, u64);

impl Backing {
    fn new(len: u64) -> Backing {
        // SAFETY: a fresh anonymous mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        Backing(at.cast(), len)
    }

    #[allow(clippy::mut_from_ref, reason = "the guest is stopped whenever the test looks at its memory")]
    fn at(&self, gpa: u64, len: u64) -> &mut [u8] {
        assert!(gpa + len <= self.1, "{gpa:#x}");
        // SAFETY: inside of the mapping, which is never unmapped; the guest does not run at the same time.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(gpa as usize), len as usize) }
    }

    fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.at(gpa, 8).try_into().unwrap())
    }
}

/// Something done to a rig before it runs.
type Change = fn(&mut Rig);
/// Address, length, type.
type E820 = (u64, u64, u32);

/// How a run ended.
#[derive(Debug, PartialEq)]
enum End {
    /// stage0 jumped to the kernel.
    Kernel,
    /// stage0 gave up.
    Terminated(Reason),
}

/// What the host does wrong, if anything, and what it counted.
struct Host {
    c_bit: u32,
    /// Answers 2 MiB PVALIDATE as hosts with 4 KiB RMP entries do.
    small_rmp: bool,
    /// Handles at most this many page-state entries per request.
    psc_batch: u64,
    psc_error: bool,
    sev_info: u64,
    /// Runs before stage0's first instruction.
    prepare: Change,
    large_ok: u64,
    small_ok: u64,
    mismatches: u64,
    psc_requests: u64,
}

impl Default for Host {
    fn default() -> Self {
        Host {
            c_bit: 40,
            small_rmp: false,
            psc_batch: 253,
            psc_error: false,
            sev_info: 2 << 48 | 1 << 32 | 40 << 24 | 1,
            prepare: |_| {},
            large_ok: 0,
            small_ok: 0,
            mismatches: 0,
            psc_requests: 0,
        }
    }
}

struct Rig {
    private: Backing,
    shared: Backing,
    high: Backing,
    inputs: InputsPage,
    /// Bytes of low RAM, and of RAM from 4 GiB on.
    low: u64,
    high_len: u64,
    entry: u64,
    validated: Vec<bool>,
    is_private: Vec<bool>,
}

const HIGH: u64 = 4 << 30;
const HIGH_LEN: u64 = 2 * LARGE + 3 * PAGE;

fn kernel() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..0x2345u32).map(|i| (i * 7) as u8).collect();
    // mov eax, cs; out 0xe9, al; hlt. Enough to know that it was entered; the registers are read from outside.
    bytes[0x200..0x205].copy_from_slice(&[0x8c, 0xc8, 0xe6, DONE_PORT as u8, 0xf4]);
    bytes
}

fn boot_params() -> Vec<u8> {
    let mut page = vec![0; 0x1000];
    let map: [E820; 5] = [
        (0, 0x8_0000, 1),
        (0x8_0000, 0x1_0000, 2),
        (0x9_0000, 0x1_0000, 3),
        (0x10_0000, MEMORY - 0x10_0000, 1),
        (HIGH, HIGH_LEN, 1),
    ];
    set_e820(&mut page, &map);
    page
}

fn set_e820(page: &mut [u8], map: &[E820]) {
    page[0x1e8] = map.len() as u8;
    for (i, (start, len, kind)) in map.iter().enumerate() {
        let at = 0x2d0 + i * 20;
        page[at..at + 8].copy_from_slice(&start.to_le_bytes());
        page[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
        page[at + 16..at + 20].copy_from_slice(&kind.to_le_bytes());
    }
}

impl Rig {
    fn new() -> Rig {
        Rig::with(boot_params())
    }

    fn with(boot_params: Vec<u8>) -> Rig {
        let (private, shared) = (Backing::new(MEMORY), Backing::new(MEMORY));
        // What the host's memory held before must never be taken for zeros.
        private.at(0, MEMORY).fill(0xa5);
        let initrd: Vec<u8> = (0..300u32).map(|i| (i * 13) as u8).collect();
        let things: [(Kind, u64, Vec<u8>, u64); 4] = [
            (Kind::Kernel, KERNEL, kernel(), 0x4000),
            (Kind::Initrd, INITRD, initrd, 0),
            (Kind::Cmdline, CMDLINE, b"console=ttyS0\0".to_vec(), 0),
            (Kind::BootData, BOOT_PARAMS, boot_params, 0),
        ];
        let (mut source, mut items) = (STAGING, Vec::new());
        for (kind, target, bytes, mem_len) in things {
            let len = bytes.len() as u64;
            shared.at(source, len).copy_from_slice(&bytes);
            items.push(Item {
                kind,
                source,
                target,
                len,
                mem_len: mem_len.max(len),
                hash: item_hash(&bytes),
            });
            source += len.next_multiple_of(PAGE);
        }
        let image_end = layout::IMAGE + BUILT.image.len() as u64;
        let inputs = InputsPage {
            entry: ENTRY,
            boot_params: BOOT_PARAMS,
            ram: vec![0..MEMORY, HIGH..HIGH + HIGH_LEN],
            excluded: vec![layout::CPUID..layout::SECRETS + PAGE, layout::INPUTS..image_end],
            staging: vec![layout::GHCB..layout::GHCB + PAGE, STAGING..STAGING + 2 * LARGE],
            accept: None,
            items,
        };
        Rig {
            private,
            shared,
            high: Backing::new(HIGH_LEN),
            inputs,
            low: MEMORY,
            high_len: HIGH_LEN,
            entry: ENTRY,
            validated: vec![false; ((HIGH + HIGH_LEN) / PAGE) as usize],
            is_private: vec![true; ((HIGH + HIGH_LEN) / PAGE) as usize],
        }
    }

    /// The guest that a plan describes.
    fn of_image(image: &DirectImage) -> Rig {
        let shim = image.shim.as_ref().unwrap();
        let low = image.ram[0].end;
        let high_len = image.ram.get(1).map_or(0, |range| range.end - range.start);
        let (private, shared) = (Backing::new(low), Backing::new(low));
        private.at(0, 32 << 20).fill(0xa5);
        for (gpa, bytes) in &shim.staging {
            shared.at(*gpa, bytes.as_slice().len() as u64).copy_from_slice(bytes.as_slice());
        }
        let pages = ((HIGH + high_len) / PAGE) as usize;
        Rig {
            private,
            shared,
            high: Backing::new(high_len.max(PAGE)),
            inputs: shim.inputs.clone(),
            low,
            high_len,
            entry: shim.inputs.entry,
            validated: vec![false; pages],
            is_private: vec![true; pages],
        }
    }

    /// Puts launch pages in place as the firmware would.
    fn launch(&mut self, c_bit: u32) {
        let page = self.private.at(layout::CPUID, PAGE);
        page.fill(0);
        page[0] = 2;
        let leaves: [[u32; 5]; 2] =
            [[0, 0, 13, 0, 0], [0x8000_001f, 0, 0x1a, 0x8000_0000 | 1 << 6 | c_bit, 0]];
        for (i, [function, index, eax, ebx, ecx]) in leaves.into_iter().enumerate() {
            let entry = &mut page[16 + i * 48..];
            for (at, value) in [(0, function), (4, index), (24, eax), (28, ebx), (32, ecx)] {
                entry[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
        self.private.at(layout::INPUTS, PAGE).copy_from_slice(&self.inputs.encode().unwrap());
        let image = self.private.at(layout::IMAGE, BUILT.image.len() as u64);
        image.copy_from_slice(BUILT.image);
        for (address, kind) in BUILT.sites {
            let at = (address - layout::IMAGE) as usize;
            image[at..at + 4].copy_from_slice(&[0xe6, 0xe4 + *kind as u8, 0x66, 0x90]);
        }
        let hook = (BUILT.hook - layout::IMAGE) as usize;
        image[hook..hook + 4].copy_from_slice(&[0xe6, 0xe8, 0x66, 0x90]);
        for range in self.inputs.excluded.clone() {
            for page in range.step_by(PAGE as usize) {
                self.validated[(page / PAGE) as usize] = true;
            }
        }
        for range in self.inputs.staging.clone() {
            for page in range.step_by(PAGE as usize) {
                self.is_private[(page / PAGE) as usize] = false;
            }
        }
    }

    fn pages(&self, gpa: u64, count: u64) -> std::ops::Range<usize> {
        (gpa / PAGE) as usize..(gpa / PAGE + count) as usize
    }

    /// Walks the guest's page tables; the result still has the C-bit.
    fn translate(&self, cr3: u64, address: u64, c_bit: u32) -> u64 {
        let private = 1 << c_bit;
        assert_ne!(cr3 & private, 0, "the C-bit is missing from CR3");
        let mut table = cr3;
        for level in (0..4).rev() {
            let index = address >> (12 + level * 9) & 511;
            let entry = self.private.u64((table & !private & !0xfff) + index * 8);
            assert_eq!(entry & 1, 1, "{address:#x} is not mapped");
            let size = 1u64 << (12 + level * 9);
            if level == 0 || entry & 0x80 != 0 {
                return entry & 0x000f_ffff_ffff_f000 & !(size - 1) | address & (size - 1);
            }
            assert_ne!(entry & private, 0, "a table entry lacks the C-bit");
            table = entry & 0x000f_ffff_ffff_f000;
        }
        unreachable!()
    }

    fn run(&mut self, host: &mut Host) -> End {
        self.launch(host.c_bit);
        (host.prepare)(self);
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        cap.args[0] = 1 << 2;
        vm.enable_cap(&cap).unwrap();
        let mut bitmap = [0u8; 1];
        let mut filter = kvm_msr_filter::default();
        filter.ranges[0] =
            kvm_msr_filter_range { flags: 3, nmsrs: 2, base: GHCB_MSR, bitmap: bitmap.as_mut_ptr() };
        // SAFETY: KVM copies filter and bitmap during the call; the request number is that of KVM_X86_SET_MSR_FILTER.
        let rc = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&vm), 0x4188_aec6, &raw mut filter) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        let c = 1u64 << host.c_bit;
        let mib = 0x10_0000;
        let slots = [
            (0, &self.private, 0, mib),
            (mib, &self.shared, mib, self.low - mib),
            (c, &self.private, 0, self.low),
            (c + HIGH, &self.high, 0, self.high_len),
        ];
        let slots = slots.into_iter().filter(|(.., len)| *len > 0);
        for (slot, (gpa, backing, offset, len)) in slots.enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: len,
                userspace_addr: backing.0 as u64 + offset,
            };
            // SAFETY: the mapping stays as long as the process.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { type_: 11, selector: 0x10, ..flat };
        let data = kvm_segment { type_: 3, selector: 0x18, ..flat };
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        (sregs.cr0, sregs.cr4, sregs.efer) = (0x11, 0x40, 0);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_regs { rip: BUILT.entry, rflags: 2, ..Default::default() }).unwrap();
        let mut ghcb_msr = 0;
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::X86Wrmsr(exit) => {
                    assert_eq!(exit.index, GHCB_MSR);
                    ghcb_msr = exit.data;
                    *exit.error = 0;
                }
                VcpuExit::X86Rdmsr(exit) => {
                    assert_eq!(exit.index, GHCB_MSR);
                    *exit.data = ghcb_msr;
                    *exit.error = 0;
                }
                VcpuExit::IoOut(0xe4, _) => match self.vmgexit(ghcb_msr, host) {
                    Ok(response) => ghcb_msr = response,
                    Err(end) => return end,
                },
                VcpuExit::IoOut(0xe5, _) => {
                    let (mut regs, cr3) = (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap().cr3);
                    let gpa = self.translate(cr3, regs.rax, host.c_bit);
                    assert_ne!(gpa & c, 0, "PVALIDATE through a shared mapping");
                    assert_eq!(regs.rdx, 1);
                    let (code, carry) = self.pvalidate(gpa & !c, regs.rcx & 1 != 0, host);
                    regs.rax = code;
                    regs.rflags = regs.rflags & !0x8d5 | u64::from(carry);
                    vcpu.set_regs(&regs).unwrap();
                }
                VcpuExit::IoOut(0xe8, _) => {
                    let regs = vcpu.get_regs().unwrap();
                    assert_eq!((regs.rax, regs.rsi), (self.entry, BOOT_PARAMS));
                }
                VcpuExit::IoOut(DONE_PORT, _) => {
                    let (regs, sregs) = (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap());
                    assert_eq!((regs.rsi, regs.rflags & 0x200), (BOOT_PARAMS, 0));
                    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.ds.selector), (0x10, 1, 0x18));
                    assert_eq!((sregs.es.selector, sregs.ss.selector), (0x18, 0x18));
                    assert_eq!((sregs.cr4, sregs.efer & 0xd01), (0x20, 0xd01));
                    assert_eq!(self.translate(sregs.cr3, 3 << 30, host.c_bit), 3 << 30 | c);
                    return End::Kernel;
                }
                // A KVM that interprets guests may lack this one instruction: RDRAND into EDI or ESP.
                VcpuExit::InternalError => {
                    let mut regs = vcpu.get_regs().unwrap();
                    match self.private.at(regs.rip, 3) {
                        [0x0f, 0xc7, 0xf7] => regs.rdi = 0x1234_5678,
                        [0x0f, 0xc7, 0xf4] => regs.rsp = 0x9abc_def0,
                        other => panic!("{other:x?} at {:#x} is no RDRAND", regs.rip),
                    }
                    (regs.rflags, regs.rip) = (regs.rflags | 1, regs.rip + 3);
                    vcpu.set_regs(&regs).unwrap();
                }
                other => {
                    let text = format!("{other:?}");
                    panic!("{text} at {:#x?} {:#x?}", vcpu.get_regs(), vcpu.get_sregs());
                }
            }
        }
    }

    fn pvalidate(&mut self, gpa: u64, large: bool, host: &mut Host) -> (u64, bool) {
        let pages = self.pages(gpa, if large { 512 } else { 1 });
        assert!(self.is_private[pages.clone()].iter().all(|p| *p), "PVALIDATE of shared memory at {gpa:#x}");
        if large {
            assert_eq!(gpa % LARGE, 0);
            if host.small_rmp {
                host.mismatches += 1;
                return (6, false);
            }
        }
        if self.validated[pages.clone()].iter().any(|p| *p) {
            return (0, true);
        }
        self.validated[pages].fill(true);
        *if large { &mut host.large_ok } else { &mut host.small_ok } += 1;
        (0, false)
    }

    fn vmgexit(&mut self, request: u64, host: &mut Host) -> Result<u64, End> {
        match request & 0xfff {
            0x002 => {
                // By now everything is copied. A host that changes its mind gains nothing.
                for range in self.inputs.staging.iter().skip(1) {
                    self.shared.at(range.start, range.end - range.start).fill(0xee);
                }
                Ok(host.sev_info)
            }
            0x080 => Ok(0x3081),
            0x012 => Ok(request + 1),
            0x014 => {
                assert_eq!(request >> 52, 1);
                self.convert(request & 0x000f_ffff_ffff_f000, 1);
                Ok(0x015)
            }
            0x000 => {
                host.psc_requests += 1;
                self.page_state_change(request, host);
                Ok(request)
            }
            0x100 => {
                assert_eq!(request >> 12 & 0xf, u64::from(REASON_SET));
                let code = (request >> 16 & 0xff) as u8;
                let reason = Reason::ALL.iter().find(|reason| **reason as u8 == code);
                Err(End::Terminated(*reason.unwrap()))
            }
            other => panic!("GHCB request {other:#x}"),
        }
    }

    fn convert(&mut self, gpa: u64, count: u64) {
        let pages = self.pages(gpa, count);
        assert!(self.is_private[pages.clone()].iter().all(|p| !p), "{gpa:#x} is private already");
        assert!(self.validated[pages.clone()].iter().all(|v| !v));
        self.is_private[pages].fill(true);
    }

    fn page_state_change(&mut self, ghcb: u64, host: &Host) {
        // The GHCB lies below 1 MiB, where both views have one backing.
        let u64_at = |at: u64| self.private.u64(ghcb + at);
        assert_eq!((u64_at(0x390), u64_at(0x398), u64_at(0x3a0)), (0x8000_0010, 0, 0));
        assert_eq!(u64_at(0x3f8) & 0xf << 50, 0xf << 50);
        assert_eq!(u64_at(0xff8) >> 32, 0, "usage");
        assert_eq!(u64_at(0x3a8), ghcb + 0x800);
        let header = u64_at(0x800);
        let (mut cursor, end) = (header & 0xffff, header >> 16 & 0xffff);
        if host.psc_error {
            self.private.at(ghcb + 0x3a0, 8).copy_from_slice(&(0x100u64 << 32).to_le_bytes());
            return;
        }
        for _ in 0..host.psc_batch {
            if cursor > end {
                break;
            }
            let entry = self.private.u64(ghcb + 0x808 + cursor * 8);
            assert_eq!(entry >> 52, 0x11, "to private, 2 MiB");
            self.convert(entry & 0x000f_ffff_ffff_f000, 512);
            cursor += 1;
        }
        self.private.at(ghcb + 0x800, 2).copy_from_slice(&(cursor as u16).to_le_bytes());
    }
}

fn refusal(mut rig: Rig, prepare: Change) -> End {
    rig.run(&mut Host { prepare, ..Host::default() })
}

fn terminated(host: Host) -> End {
    let mut host = host;
    Rig::new().run(&mut host)
}

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
        // What stage0 leaves behind is what the plan without stage0 launches, less its page tables and descriptor table.
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
    // A table entry with a bit beyond the address width faults, so the highest position is the width's last one.
    for c_bit in [36, 39, 47, bits - 1].into_iter().filter(|c_bit| *c_bit < bits) {
        let mut host = Host { c_bit, ..Host::default() };
        let mut rig = Rig::new();
        assert_eq!(rig.run(&mut host), End::Kernel, "C-bit {c_bit}");
        assert_eq!(rig.inputs.encode().unwrap(), Rig::new().inputs.encode().unwrap());
    }
}

#[test]
fn one_flipped_bit_in_any_staged_item_is_refused_in_its_own_words() {
    let cases: [(usize, Reason); 4] = [
        (0, Reason::HashKernel),
        (1, Reason::HashInitrd),
        (2, Reason::HashCmdline),
        (3, Reason::HashBootData),
    ];
    for (index, reason) in cases {
        for last in [false, true] {
            let mut rig = Rig::new();
            let item = rig.inputs.items[index];
            let at = if last { item.source + item.len - 1 } else { item.source };
            rig.shared.at(at, 1)[0] ^= 0x10;
            assert_eq!(rig.run(&mut Host::default()), End::Terminated(reason));
        }
    }
}

#[test]
fn one_flipped_bit_in_the_measured_hash_is_refused() {
    // On hardware the launch digest differs already; this is what happens if nobody looked at the digest.
    let mut rig = Rig::new();
    rig.inputs.items[0].hash[47] ^= 1;
    assert_eq!(rig.run(&mut Host::default()), End::Terminated(Reason::HashKernel));
}

#[test]
fn a_page_that_was_validated_before_ends_the_guest() {
    // In scratch memory, in low memory, in the middle of a large page, at the very end, in staging memory.
    let middle = 9 * LARGE + 5 * PAGE;
    for gpa in [layout::WORK, 0x1000, middle, HIGH + HIGH_LEN - PAGE] {
        let mut rig = Rig::new();
        rig.validated[(gpa / PAGE) as usize] = true;
        assert_eq!(rig.run(&mut Host::default()), End::Terminated(Reason::AlreadyValidated), "{gpa:#x}");
    }
}

#[test]
fn a_cpuid_page_without_a_usable_leaf_is_refused() {
    let cases: [(Change, Reason); 5] = [
        (|rig| rig.private.at(layout::CPUID, 4).fill(0), Reason::CpuidPage),
        (|rig| rig.private.at(layout::CPUID, 1)[0] = 65, Reason::CpuidPage),
        (|rig| rig.private.at(layout::CPUID, 1)[0] = 1, Reason::CpuidPage),
        (|rig| rig.private.at(layout::CPUID + 16 + 48 + 24, 1)[0] = 0xa, Reason::CpuidPage),
        (|rig| rig.private.at(layout::CPUID + 16 + 48 + 28, 1)[0] = 31, Reason::CbitRange),
    ];
    for (prepare, reason) in cases {
        assert_eq!(refusal(Rig::new(), prepare), End::Terminated(reason));
    }
}

#[test]
fn inputs_that_would_have_stage0_write_over_itself_are_refused() {
    let cases: [(Change, Reason); 5] = [
        (|rig| rig.private.at(layout::INPUTS, 1)[0] = 0, Reason::InputsHeader),
        (|rig| rig.inputs.items[1].target = layout::IMAGE, Reason::ItemTarget),
        (|rig| rig.inputs.items[1].target = layout::WORK, Reason::ItemTarget),
        (|rig| rig.inputs.items[1].source = KERNEL, Reason::ItemSource),
        (|rig| rig.inputs.excluded.truncate(1), Reason::ExcludedTable),
    ];
    for (change, reason) in cases {
        let prepare: Change = |_| {};
        let mut rig = Rig::new();
        if reason == Reason::InputsHeader {
            assert_eq!(refusal(rig, change), End::Terminated(reason));
        } else {
            change(&mut rig);
            assert_eq!(refusal(rig, prepare), End::Terminated(reason));
        }
    }
}

#[test]
fn a_memory_map_that_lies_is_refused_inside_the_guest() {
    let ram = (0, 0x8_0000, 1);
    let cases: [(&[E820], Reason); 8] = [
        (&[], Reason::E820Count),
        (&[ram, (layout::GHCB, PAGE, 1)], Reason::E820CoversStage0),
        (&[ram, (0x7_f000, 0x2000, 2)], Reason::E820Overlap),
        (&[ram, (u64::MAX - 0xfff, 0x2000, 1)], Reason::E820Overflow),
        (&[ram, (0x10_0000, MEMORY, 1)], Reason::E820NotRam),
        (&[ram, (3 << 30, 0x1000, 3)], Reason::E820NotRam),
        (&[ram, (0x8_0000, 0x1_0000, 1)], Reason::E820CoversStage0),
        (&[ram, (0x8_0000, 0x1_0000, 7)], Reason::E820Type),
    ];
    for (map, reason) in cases {
        let mut page = boot_params();
        page[0x2d0..].fill(0);
        set_e820(&mut page, map);
        assert_eq!(refusal(Rig::with(page), |_| {}), End::Terminated(reason));
    }
    // The same by a list of setup_data that leads out of what was measured.
    let mut page = boot_params();
    page[0x250..0x258].copy_from_slice(&0x9000u64.to_le_bytes());
    assert_eq!(refusal(Rig::with(page), |_| {}), End::Terminated(Reason::SetupData));
}

#[test]
fn the_stack_stays_far_from_the_page_tables() {
    // Nothing guards the lower end of the 16 KiB stack, below which the page tables lie. stage0 fills it with zeros first, so what
    // it never reached is zero still.
    const STACK: u64 = 0x4000;
    let mut rig = Rig::new();
    assert_eq!(rig.run(&mut Host::default()), End::Kernel);
    let stack = rig.private.at(layout::WORK_END - STACK, STACK);
    let untouched = stack.iter().take_while(|byte| **byte == 0).count() as u64;
    assert!(untouched < STACK, "the stack is where this test looks");
    assert!(untouched >= STACK - 0x1000, "{} bytes of stack were used", STACK - untouched);
}

#[test]
fn a_hypervisor_that_breaks_the_protocol_ends_the_guest() {
    let bad_version = Host { sev_info: 1 << 48 | 1 << 32 | 1, ..Host::default() };
    assert_eq!(terminated(bad_version), End::Terminated(Reason::GhcbVersion));
    let error = Host { psc_error: true, ..Host::default() };
    assert_eq!(terminated(error), End::Terminated(Reason::PageStateChange));
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
