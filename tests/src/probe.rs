// SPDX-License-Identifier: Apache-2.0
//! Can this host's KVM run Linux? Decided by trying, because a `/dev/kvm` that opens proves little: some are
//! interpreters that know a part of the instruction set and run a million instructions a second.
//!
//! Three questions, each with a reason in the answer: does KVM have what the emulated platform needs, how
//! fast does a tiny loop run, and do a few instructions work that every Linux kernel uses.
//! `CVMM_TEST_KVM=host|nested|nested-intel` overrides; the last is never chosen by itself.
#![allow(unsafe_code)] // Mapping guest memory into a VM is an unsafe call of kvm-ioctls.

use std::fmt;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Cap;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;

/// Below this rate a kernel needs minutes to boot. Interpreters run about one million; hardware and nested
/// KVM reach hundreds of millions, of which this short loop, its first exits included, shows at least a
/// tenth.
const SLOWEST: f64 = 10e6;

/// A tiny loop that takes longer than this is too slow, whatever the cause.
const PATIENCE: Duration = Duration::from_secs(20);

/// Iterations of the loop; two instructions each.
const ITERATIONS: u32 = 400_000;

/// Whose KVM runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The host's.
    Host,
    /// That of an outer guest under QEMU, on an AMD CPU.
    Nested,
    /// That of an outer guest under Bochs, on an Intel CPU. Only the cases of [`crate::cases::intel`] run
    /// there.
    NestedIntel,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::Host => "on this host's KVM",
            Place::Nested => "in nested KVM under QEMU's software emulation",
            Place::NestedIntel => "in nested KVM on an Intel CPU under Bochs's software emulation",
        })
    }
}

/// Where tests run, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Where.
    pub place: Place,
    /// The reason, one line.
    pub reason: String,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guests run {}: {}", self.place, self.reason)
    }
}

/// What overrides the probe, and the value that asks for an Intel CPU.
const VARIABLE: &str = "CVMM_TEST_KVM";
const INTEL: &str = "nested-intel";

/// Decides where tests run.
pub fn decide() -> Result<Decision> {
    let place = match std::env::var(VARIABLE).as_deref() {
        Ok("host") => Place::Host,
        Ok("nested") => Place::Nested,
        Ok(INTEL) => Place::NestedIntel,
        Ok(other) => bail!("{VARIABLE} is {other:?}; it may be host, nested or {INTEL}"),
        Err(_) => return Ok(probe()),
    };
    Ok(Decision { place, reason: format!("by {VARIABLE}") })
}

/// Whether the user asks for an Intel CPU, which takes an emulator that is otherwise not needed.
pub fn intel_is_asked_for() -> bool {
    std::env::var(VARIABLE).as_deref() == Ok(INTEL)
}

/// Tries the host's KVM.
pub fn probe() -> Decision {
    let (sender, answer) = channel();
    // In a thread of its own: a KVM that never comes back must not take the harness with it.
    thread::spawn(move || sender.send(try_kvm()));
    match answer.recv_timeout(PATIENCE) {
        Ok(Ok(reason)) => Decision { place: Place::Host, reason },
        Ok(Err(error)) => Decision { place: Place::Nested, reason: format!("{error:#}") },
        Err(_) => {
            let reason = format!("the probe did not end within {} s", PATIENCE.as_secs());
            Decision { place: Place::Nested, reason }
        }
    }
}

fn try_kvm() -> Result<String> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    for (cap, name) in [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::X86UserSpaceMsr, "MSR exits to user space"),
        (Cap::X86MsrFilter, "an MSR filter"),
    ] {
        if !kvm.check_extension(cap) {
            bail!("its KVM lacks {name}");
        }
    }
    let rate = rate(&kvm).context("a tiny loop does not run")?;
    let millions = rate / 1e6;
    if rate < SLOWEST {
        bail!(
            "its KVM runs {millions:.1} million instructions/s, fewer than the {:.0} needed",
            SLOWEST / 1e6
        );
    }
    for (name, code) in INSTRUCTIONS {
        try_instructions(&kvm, code).with_context(|| format!("its KVM cannot run {name}"))?;
    }
    Ok(format!(
        "it runs {millions:.0} million instructions/s and all {} sample instructions",
        INSTRUCTIONS.len()
    ))
}

/// Sequences in 64-bit mode, each ending in HLT. RSP is valid, RDI points at 64 KiB of writable memory.
const INSTRUCTIONS: &[(&str, &[u8])] = &[
    ("CPUID", &[0x31, 0xc0, 0x0f, 0xa2, 0xf4]),
    ("RDTSC", &[0x0f, 0x31, 0xf4]),
    ("RDMSR and WRMSR (EFER)", &[0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x0f, 0x30, 0xf4]),
    ("MOV to CR3", &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0xf4]),
    ("INVLPG", &[0x0f, 0x01, 0x3f, 0xf4]),
    ("SWAPGS", &[0x0f, 0x01, 0xf8, 0x0f, 0x01, 0xf8, 0xf4]),
    ("LOCK CMPXCHG", &[0xf0, 0x48, 0x0f, 0xb1, 0x0f, 0xf4]),
    ("REP STOSQ", &[0xb9, 0x10, 0, 0, 0, 0xf3, 0x48, 0xab, 0xf4]),
    ("BSF", &[0x48, 0x0f, 0xbc, 0xc7, 0xf4]),
    ("MOVAPS", &[0x0f, 0x29, 0x07, 0x0f, 0x28, 0x0f, 0xf4]),
    ("FNINIT and FXSAVE64", &[0xdb, 0xe3, 0x48, 0x0f, 0xae, 0x07, 0xf4]),
    (
        "PUSHFQ, POPFQ and LRET",
        &[0x9c, 0x9d, 0x6a, 0x08, 0x48, 0x8d, 0x05, 0x03, 0x00, 0x00, 0x00, 0x50, 0x48, 0xcb, 0xf4],
    ),
];

const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STACK: u64 = 0x4_0000;
const TABLES: u64 = 0x5_0000;
const GDT: u64 = 0x6_0000;
const MEMORY: usize = 2 << 20;

/// A virtual machine with 2 MiB of memory, one vCPU, and `code` at [`CODE`].
struct Tiny {
    vcpu: VcpuFd,
    memory: GuestMemoryMmap,
}

impl Tiny {
    fn new(kvm: &Kvm, code: &[u8]) -> Result<Self> {
        use vm_memory::Bytes;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])?;
        memory.write_slice(code, GuestAddress(CODE))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        };
        // SAFETY: the mapping covers MEMORY bytes; `Tiny` owns it and the only vCPU, so it outlives every run
        // of the guest.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        Ok(Tiny { vcpu, memory })
    }

    fn run(&mut self) -> Result<()> {
        match self.vcpu.run().context("KVM_RUN")? {
            VcpuExit::Hlt => Ok(()),
            other => bail!("it ended with {other:?} instead of HLT"),
        }
    }
}

/// Instructions per second of `dec ecx; jnz` in real mode.
fn rate(kvm: &Kvm) -> Result<f64> {
    let mut code = vec![0x66, 0xb9];
    code.extend_from_slice(&ITERATIONS.to_le_bytes());
    code.extend_from_slice(&[0x66, 0x49, 0x75, 0xfc, 0xf4]);
    let mut tiny = Tiny::new(kvm, &code)?;
    let mut sregs = tiny.vcpu.get_sregs()?;
    sregs.cs.base = CODE;
    sregs.cs.selector = (CODE >> 4) as u16;
    tiny.vcpu.set_sregs(&sregs)?;
    let mut regs = tiny.vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (0, 2);
    tiny.vcpu.set_regs(&regs)?;
    let started = Instant::now();
    tiny.run()?;
    Ok(f64::from(ITERATIONS) * 2.0 / started.elapsed().as_secs_f64())
}

fn try_instructions(kvm: &Kvm, code: &[u8]) -> Result<()> {
    use vm_memory::Bytes;
    let mut tiny = Tiny::new(kvm, code)?;
    // One 2 MiB page, mapped at its own address.
    for (at, entry) in [(0, (TABLES + 0x1000) | 3), (0x1000, (TABLES + 0x2000) | 3), (0x2000, 0x83)] {
        tiny.memory.write_obj::<u64>(entry, GuestAddress(TABLES + at))?;
    }
    for (index, descriptor) in [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
        tiny.memory.write_obj(descriptor, GuestAddress(GDT + 8 * index as u64))?;
    }
    let mut sregs = tiny.vcpu.get_sregs()?;
    let code_segment = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = code_segment;
    let data_segment = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code_segment };
    (sregs.ds, sregs.es, sregs.ss) = (data_segment, data_segment, data_segment);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    sregs.cr0 = 0x8000_0033; // PE, MP, ET, NE, PG
    sregs.cr3 = TABLES;
    sregs.cr4 = 0x620; // PAE, OSFXSR, OSXMMEXCPT
    sregs.efer = 0x500; // LME, LMA
    tiny.vcpu.set_sregs(&sregs).context("KVM_SET_SREGS for 64-bit mode")?;
    let mut regs = tiny.vcpu.get_regs()?;
    (regs.rip, regs.rsp, regs.rdi, regs.rflags) = (CODE, STACK, DATA, 2);
    tiny.vcpu.set_regs(&regs)?;
    tiny.run()
}
