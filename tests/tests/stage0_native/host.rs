// SPDX-License-Identifier: Apache-2.0
//! A host that runs a rig's guest on KVM and answers it, in good faith or not. It follows the GHCB
//! specification, and no code of ours that follows it too.

#![allow(unsafe_code, reason = "hands guest memory to KVM")]

use kvm_bindings::*;
use kvm_ioctls::*;
use snp::stage0::BUILT;
use snp::stage0::reason::REASON_SET;
use snp::stage0::reason::Reason;

use crate::rig::BOOT_PARAMS;
use crate::rig::Change;
use crate::rig::DONE_PORT;
use crate::rig::HIGH;
use crate::rig::LARGE;
use crate::rig::Rig;

const GHCB_MSR: u32 = 0xc001_0130;
/// How a run ended.
#[derive(Debug, PartialEq)]
pub enum End {
    /// stage0 jumped to the kernel.
    Kernel,
    /// stage0 gave up.
    Terminated(Reason),
}

/// What the host does wrong, if anything, and what it counted.
pub struct Host {
    pub c_bit: u32,
    /// Answers 2 MiB PVALIDATE as hosts with 4 KiB RMP entries do.
    pub small_rmp: bool,
    /// Handles at most this many page-state entries per request.
    pub psc_batch: u64,
    pub psc_error: bool,
    pub sev_info: u64,
    /// Runs before stage0's first instruction.
    pub prepare: Change,
    pub large_ok: u64,
    pub small_ok: u64,
    pub mismatches: u64,
    pub psc_requests: u64,
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

impl Rig {
    /// Launches the guest and runs it to its end.
    pub fn run(&mut self, host: &mut Host) -> End {
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
        // SAFETY: KVM copies filter and bitmap during the call; the request number is that of
        // KVM_X86_SET_MSR_FILTER.
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
