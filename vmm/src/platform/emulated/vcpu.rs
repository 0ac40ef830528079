// SPDX-License-Identifier: Apache-2.0
//! A vCPU of an emulated SNP guest: runs the guest on KVM, and answers its SNP instructions from the model.
//!
//! A patched instruction exits as a port write. While the exit is being handled RIP still points at the OUT,
//! and KVM skips it at the next `KVM_RUN`; it must not be advanced here. Where RIP itself is to change, the
//! OUT is completed first by a `KVM_RUN` with `immediate_exit` (Linux `Documentation/virt/kvm/api.rst`,
//! `KVM_RUN`).

mod at_exit;
mod forbidden;
mod init;
mod instructions;
mod msr;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use kvm_bindings::KVM_MP_STATE_AP_RESET_HOLD;
use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_bindings::KVM_MP_STATE_INIT_RECEIVED;
use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_sregs;
use kvm_bindings::kvm_vcpu_events;
use kvm_ioctls::Cap;
use kvm_ioctls::SyncReg;
use snp::vmsa::VmsaState;
use snp_model::commands::RunRefusal;
use snp_model::memory::GuestMemory;
use snp_model::memory::View;
use snp_model::nae::Direction;
use snp_model::outcome::MapGpaRange;
use snp_model::vcpu::VcpuModel;

use super::registers::Recorded;
use super::shared::VmShared;
use super::wake::Order;
use super::wake::Wake;
use crate::cpuid;
use crate::lock::lock;
use crate::platform::HC_MAP_GPA_RANGE;
use crate::platform::Vcpu;
use crate::platform::error::CallError;
use crate::platform::exit::Exit;
use crate::platform::kvm::KvmVcpu;
use crate::platform::kvm::decode;
use crate::platform::mapping::PAGE;
use crate::platform::registers;

/// Bit of a memory fault's flags: the access was to the private side.
const FAULT_PRIVATE: u64 = 1 << 3;
/// `KVM_SYSTEM_EVENT_SEV_TERM`.
const SEV_TERM: u32 = 6;
/// Most places that are remembered to hold a replacement. A kernel has fewer than a hundred; a guest that
/// makes more can only make its own exits slower.
const SITES_MAX: usize = 4096;
/// Pause of a vCPU that has nothing to do any more.
const WHILE_SEARCHING: Duration = Duration::from_millis(5);
/// A wait that only signals end.
const WAIT_IN_KERNEL: rustix::thread::Timespec = rustix::thread::Timespec { tv_sec: 3600, tv_nsec: 0 };

/// A vCPU.
pub struct EmulatedVcpu {
    id: u32,
    /// Before `vm`: the vCPU's descriptor keeps the kernel's VM, and that must not outlive the memory which
    /// `vm` holds.
    kvm: KvmVcpu,
    vm: Arc<VmShared>,
    model: VcpuModel,
    recorded: Arc<Mutex<Recorded>>,
    wake: Arc<Wake>,
    /// It has been run at least once.
    started: bool,
    /// Created after LAUNCH_FINISH, and not started by the guest since: it has no save area that hardware
    /// would take.
    unmeasured: bool,
    activity: Activity,
    /// What the monitor was told, and has not answered yet.
    told: Option<PendingExit>,
    /// What follows from the monitor's last answer, if that was worked out before the next run.
    next: Option<Next>,
    /// Instruction pointers at which a replacement was seen, with its port.
    sites: HashSet<(u64, u8)>,
    /// KVM leaves the registers in memory that it shares with the monitor, and takes them from there
    /// (`KVM_CAP_SYNC_REGS`): two system calls less for each instruction.
    synced: bool,
}

/// An exit that the model made, with room for the monitor's answer.
enum PendingExit {
    MapGpaRange {
        range: MapGpaRange,
        ret: u64,
    },
    Certs {
        gpa: u64,
        npages: u64,
        ret: u64,
    },
    Io {
        port: u16,
        direction: Direction,
        data: Vec<u8>,
    },
    Mmio {
        gpa: u64,
        len: usize,
        direction: Direction,
        data: [u8; 8],
    },
    Terminate {
        data: u64,
    },
    /// `again`: where the instruction stands that made the access, if it is a replaced one.
    Fault {
        gpa: u64,
        again: Option<u64>,
    },
    PrivateGhcb {
        gpa: u64,
    },
}

/// What KVM calls a vCPU's `mp_state`, as far as it decides what an AP creation does to it (Linux 6.12.117 to
/// 7.3.4, `x86.c`: `kvm_arch_vcpu_ioctl_run`, `vcpu_block`; `sev.c:sev_snp_init_protected_guest_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// It executes.
    Runnable,
    /// HALTED or AP_RESET_HOLD: an AP creation starts it.
    Halted,
    /// UNINITIALIZED: it waits for an INIT. An AP creation wakes it, KVM_RUN answers EAGAIN, and the creation
    /// stays undone.
    Uninitialised,
    /// INIT_RECEIVED: it waits for a SIPI, and an AP creation leaves it there without an answer.
    InitReceived,
}

/// What to do after an event.
enum Next {
    /// Back into the guest.
    Enter,
    /// `told` holds an exit for the monitor.
    Tell,
    /// KVM's own exit is one for the monitor.
    Pass,
}

fn invalid(what: &'static str) -> CallError {
    CallError::errno(what, libc::EINVAL)
}

impl EmulatedVcpu {
    pub(super) fn new(
        id: u32,
        vm: Arc<VmShared>,
        kvm: KvmVcpu,
        recorded: Arc<Mutex<Recorded>>,
        wake: Arc<Wake>,
        unmeasured: bool,
    ) -> Self {
        let model = VcpuModel::new(&vm.model, Vec::new());
        let mut kvm = kvm;
        // The answer is a set of the register groups that can be shared; the first is that of KVM_GET_REGS.
        let synced = vm.kvm.fd.check_extension_int(Cap::SyncRegs) & SyncReg::Register as i32 != 0;
        if synced {
            kvm.fd.set_sync_valid_reg(SyncReg::Register);
        }
        EmulatedVcpu {
            id,
            vm,
            kvm,
            model,
            recorded,
            wake,
            started: false,
            unmeasured,
            // kvm_arch_vcpu_create, with the interrupt controller in the kernel.
            activity: if id == 0 { Activity::Runnable } else { Activity::Uninitialised },
            told: None,
            next: None,
            sites: HashSet::new(),
            synced,
        }
    }

    /// KVM refuses to read or write registers that LAUNCH_FINISH has encrypted.
    fn unsealed(&self) -> Result<(), CallError> {
        if self.unmeasured { Ok(()) } else { self.vm.unsealed() }
    }

    fn record(&self, f: impl FnOnce(&mut Recorded)) {
        f(&mut lock(&self.recorded));
    }

    /// Splits a guest-physical address of the underlying VM into the guest's address and its C-bit.
    fn split(&self, address: u64) -> (u64, bool) {
        let mask = self.vm.c_mask();
        (address & !mask, address & mask != 0)
    }

    /// Finishes a pending OUT, so that RIP may be replaced.
    fn complete_out(&mut self) -> Result<(), CallError> {
        self.kvm.fd.set_kvm_immediate_exit(1);
        let result = self.kvm.fd.run().map(|_| ());
        self.kvm.fd.set_kvm_immediate_exit(0);
        match result {
            Err(e) if e.errno() != libc::EINTR => Err(CallError::of("KVM_RUN (completing an exit)")(e)),
            _ => Ok(()),
        }
    }

    /// Where the port write stands that has exited with RIP at `rip`, if it is the replacement `wanted`;
    /// otherwise it is the guest's own. Linux exits with RIP on the instruction; a KVM that emulates it may
    /// have moved on by its two bytes.
    fn site(&mut self, rip: u64, wanted: &[u8]) -> Option<u64> {
        [rip, rip.wrapping_sub(2)].into_iter().find(|at| self.is_site(*at, wanted))
    }

    fn is_site(&mut self, rip: u64, wanted: &[u8]) -> bool {
        let key = (rip, wanted.get(1).copied().unwrap_or_default());
        if self.sites.contains(&key) {
            return true;
        }
        let Ok(t) = self.translate(rip) else { return false };
        let (gpa, c_bit) = self.split(t.physical_address);
        let mut code = [0; 4];
        let Some(code) = code.get_mut(..wanted.len()) else { return false };
        // With paging off, and while the views are aliased, the private side is what executes without a C-bit
        // too.
        let views = if c_bit { &[View::Private][..] } else { &[View::Private, View::Shared] };
        let mut reads = |view: &View| self.vm.views.read(gpa, *view, code).is_ok() && code == wanted;
        let found = t.valid != 0 && views.iter().any(&mut reads);
        if found {
            if self.sites.len() >= SITES_MAX {
                self.sites.clear();
            }
            self.sites.insert(key);
        }
        found
    }

    /// Carries out an order of another vCPU (or of itself): start from a VMSA, or stop.
    fn obey(&mut self, order: Order) -> Result<(), CallError> {
        match order {
            Order::Stop => self.activity = Activity::Halted,
            Order::Run { vmsa_gpa } => {
                let vm = Arc::clone(&self.vm);
                let state = vm.model.load_vmsa(&vm.views, vmsa_gpa).map_err(|e| CallError {
                    call: "starting a vCPU from the guest's VMSA",
                    source: std::io::Error::other(format!("vCPU {}: {e}", self.id)),
                })?;
                self.start(&state)?;
                self.activity = Activity::Runnable;
                self.unmeasured = false;
            }
        }
        Ok(())
    }

    /// Puts the vCPU into the state of a VMSA.
    fn start(&mut self, state: &VmsaState) -> Result<(), CallError> {
        self.complete_out()?;
        self.model.start_from_vmsa();
        self.kvm
            .fd
            .set_vcpu_events(&kvm_vcpu_events::default())
            .map_err(CallError::of("KVM_SET_VCPU_EVENTS"))?;
        self.kvm.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        self.reset_by_init()?;
        registers::load(&mut self.kvm, state)
    }

    /// One `KVM_RUN` of a vCPU that waits for an INIT, which no guest of this platform sends.
    fn wait_for_init(&self) -> Result<Step, CallError> {
        match self.wake.wait() {
            Ok(()) if self.activity == Activity::Uninitialised => Ok(Step::Again),
            Ok(()) => loop {
                // KVM goes on waiting, within the kernel.
                match rustix::thread::nanosleep(&WAIT_IN_KERNEL) {
                    rustix::thread::NanosleepRelativeResult::Ok => {}
                    _ => return Ok(Step::Interrupted),
                }
            },
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => Ok(Step::Interrupted),
            Err(source) => Err(CallError { call: "waiting for an INIT", source }),
        }
    }

    /// KVM gave up on an instruction. The monitor cannot read the registers of an SNP guest; those below it
    /// can be.
    fn not_emulated(&self, suberror: u32) -> CallError {
        let rip = self.kvm.get_regs().map_or_else(|e| e.to_string(), |regs| format!("RIP {:#x}", regs.rip));
        let text =
            format!("KVM could not emulate an instruction of the guest (internal error {suberror}) at {rip}");
        CallError { call: "KVM_RUN", source: std::io::Error::other(text) }
    }

    fn run_to_next(&mut self) -> Result<Step, CallError> {
        if !self.started {
            match self.vm.model.may_run() {
                Ok(()) => {}
                Err(RunRefusal::Errno(errno)) => return Err(CallError::errno("KVM_RUN", errno.0)),
                Err(RunRefusal::FailEntry) => return Ok(Step::FailEntry),
            }
            self.vm.begin()?;
            self.started = true;
        }
        if matches!(self.activity, Activity::Uninitialised | Activity::InitReceived) {
            return self.wait_for_init();
        }
        if self.unmeasured && self.activity == Activity::Runnable {
            return Ok(Step::FailEntry);
        }
        let mut next = match self.next.take() {
            Some(next) => next,
            None => self.answered()?,
        };
        loop {
            match next {
                Next::Tell => return Ok(Step::PendingExit),
                Next::Pass => return Ok(Step::Kvm),
                Next::Enter => {}
            }
            // Again after each: obeying one may swallow the signal that came with the next.
            while let Some(order) = self.wake.take() {
                self.obey(order)?;
            }
            if self.activity == Activity::Halted {
                match self.wake.wait() {
                    // The monitor looks whether the guest is over, whatever woke this vCPU.
                    Ok(()) => return Ok(Step::Interrupted),
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => return Ok(Step::Interrupted),
                    Err(source) => return Err(CallError { call: "waiting for an AP creation", source }),
                }
            }
            let seen = self.vm.views.opened();
            let ran = self.kvm.fd.run().map(|_| ());
            if self.vm.views.searching() {
                // Another vCPU has made a forbidden access, and will say so; what this one found means
                // nothing.
                std::thread::sleep(WHILE_SEARCHING);
                return Ok(Step::Interrupted);
            }
            match ran {
                Ok(()) => {}
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                    self.kvm.fd.set_kvm_immediate_exit(0);
                    // An order for this vCPU comes with the same signal.
                    if self.wake.pending() {
                        continue;
                    }
                    return Ok(Step::Interrupted);
                }
                Err(e) if e.errno() == libc::EFAULT && self.vm.strict() => {
                    if self.vm.views.open(&self.vm.model.pages, seen)? {
                        continue;
                    }
                    return self.forbidden();
                }
                Err(e) => return Err(CallError::of("KVM_RUN")(e)),
            }
            next = self.event()?;
        }
    }
}

enum Step {
    PendingExit,
    Kvm,
    Interrupted,
    Again,
    FailEntry,
}

impl Vcpu for EmulatedVcpu {
    fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<(), CallError> {
        self.kvm.set_cpuid(entries)?;
        self.model.set_cpuid(cpuid::from_kvm(entries));
        Ok(())
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), CallError> {
        self.unsealed()?;
        self.kvm.set_regs(regs)?;
        self.record(|r| r.set_regs(regs));
        Ok(())
    }

    fn get_regs(&self) -> Result<kvm_regs, CallError> {
        self.unsealed()?;
        self.kvm.get_regs()
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), CallError> {
        self.unsealed()?;
        self.kvm.set_sregs(sregs)?;
        self.record(|r| r.set_sregs(sregs));
        Ok(())
    }

    fn get_sregs(&self) -> Result<kvm_sregs, CallError> {
        self.unsealed()?;
        Ok(lock(&self.recorded).reported_sregs())
    }

    fn set_fpu(&mut self, fpu: &kvm_fpu) -> Result<(), CallError> {
        self.unsealed()?;
        self.kvm.set_fpu(fpu)?;
        self.record(|r| r.set_fpu(fpu));
        Ok(())
    }

    fn get_fpu(&self) -> Result<kvm_fpu, CallError> {
        self.unsealed()?;
        self.kvm.get_fpu()
    }

    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), CallError> {
        self.unsealed()?;
        self.kvm.set_msrs(msrs)?;
        self.record(|r| r.set_msrs(msrs));
        Ok(())
    }

    fn set_xcr0(&mut self, value: u64) -> Result<(), CallError> {
        self.unsealed()?;
        self.kvm.set_xcr0(value)?;
        self.record(|r| r.set_xcr0(value));
        Ok(())
    }

    fn get_msr(&self, index: u32) -> Result<u64, CallError> {
        self.unsealed()?;
        self.kvm.get_msr(index)
    }

    fn get_xcr0(&self) -> Result<u64, CallError> {
        self.unsealed()?;
        self.kvm.get_xcr0()
    }

    fn set_lint(&mut self) -> Result<(), CallError> {
        self.kvm.set_lint()
    }

    fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), CallError> {
        self.activity = match state.mp_state {
            KVM_MP_STATE_RUNNABLE => Activity::Runnable,
            KVM_MP_STATE_HALTED | KVM_MP_STATE_AP_RESET_HOLD => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED => Activity::Uninitialised,
            KVM_MP_STATE_INIT_RECEIVED => Activity::InitReceived,
            _ => return Err(CallError::errno("KVM_SET_MP_STATE", libc::EINVAL)),
        };
        // The vCPU below runs whenever it is asked to; this one asks only while it is runnable.
        self.kvm.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
    }

    fn pre_fault(&mut self, _: u64, len: u64) -> Result<u64, CallError> {
        // kvm_arch_vcpu_pre_fault_memory: not before LAUNCH_FINISH. Pages of this platform need no
        // assignment.
        match self.vm.model.registers_sealed() {
            true => Ok(len),
            false => Err(CallError::errno("KVM_PRE_FAULT_MEMORY", libc::EOPNOTSUPP)),
        }
    }

    fn complete_exit(&mut self) -> Result<(), CallError> {
        // An exit of the underlying VM is completed when that runs; nobody waits for it.
        if self.told.is_some() && self.next.is_none() {
            self.next = Some(self.answered()?);
        }
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, CallError> {
        self.wake.running_on_this_thread();
        self.kvm.arm();
        let step = self.run_to_next();
        self.kvm.disarm();
        match step? {
            Step::Interrupted => Ok(Exit::Interrupted),
            Step::Again => Ok(Exit::Again),
            Step::FailEntry => Ok(Exit::FailEntry { reason: u64::MAX }),
            Step::Kvm => {
                if let Exit::InternalError { suberror } = decode(self.kvm.fd.get_kvm_run()) {
                    return Err(self.not_emulated(suberror));
                }
                Ok(decode(self.kvm.fd.get_kvm_run()))
            }
            Step::PendingExit => Ok(match &mut self.told {
                None => Exit::Interrupted,
                Some(PendingExit::MapGpaRange { range, ret }) => Exit::Hypercall {
                    nr: HC_MAP_GPA_RANGE,
                    args: [range.gpa, range.pages, range.attributes, 0, 0, 0],
                    ret,
                },
                Some(PendingExit::Certs { gpa, npages, ret }) => Exit::ReqCerts { gpa: *gpa, npages, ret },
                Some(PendingExit::Io { port, direction: Direction::In, data }) => {
                    Exit::IoIn { port: *port, data }
                }
                Some(PendingExit::Io { port, direction: Direction::Out, data }) => {
                    Exit::IoOut { port: *port, data }
                }
                Some(PendingExit::Mmio { gpa, len, direction, data }) => {
                    let data = &mut data[..*len];
                    match direction {
                        Direction::In => Exit::MmioRead { addr: *gpa, data },
                        Direction::Out => Exit::MmioWrite { addr: *gpa, data },
                    }
                }
                Some(PendingExit::Terminate { data }) => Exit::SystemEvent { kind: SEV_TERM, data: *data },
                Some(PendingExit::PrivateGhcb { gpa }) => {
                    Exit::MemoryFault { flags: 0, gpa: *gpa, size: PAGE }
                }
                Some(PendingExit::Fault { gpa, .. }) => {
                    Exit::MemoryFault { flags: FAULT_PRIVATE, gpa: *gpa, size: PAGE }
                }
            }),
        }
    }
}

#[cfg(test)]
#[path = "vcpu/replaced_test.rs"]
mod replaced_test;
