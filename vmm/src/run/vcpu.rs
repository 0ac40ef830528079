// SPDX-License-Identifier: Apache-2.0
//! vCPU threads and the one dispatcher of exits.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use devices::bus::Action;
use snp::ghcb::term::SevTerm;

use crate::machine::Machine;
use crate::machine::certs::Certificates;
use crate::machine::certs::Held;
use crate::machine::conversion::Conversions;
use crate::machine::conversion::NotConverted;
use crate::machine::conversion::RangeState;
use crate::machine::implicit::ImplicitSharing;
use crate::platform::HC_MAP_GPA_RANGE;
use crate::platform::MAP_GPA_RANGE_ENCRYPTED;
use crate::platform::Vcpu;
use crate::platform::error::CallError;
use crate::platform::exit::Exit;
use crate::platform::mapping::PAGE;
use crate::run::error::RunError;
use crate::run::outcome::Outcome;
use crate::run::prefault::PreFault;

/// `KVM_SYSTEM_EVENT_SEV_TERM`.
const SYSTEM_EVENT_SEV_TERM: u32 = 6;
/// Bit of a memory fault's flags: the access was to the private side. No other bit has a meaning.
const FAULT_PRIVATE: u64 = 1 << 3;
/// How often in a row a vCPU may fault on a page that is in the right state. It happens when another vCPU
/// converts the page meanwhile; then the next try goes well.
const FAULTS_MAX: u32 = 16;
/// How often in a row KVM may put off a vCPU. It does once for each INIT; a vCPU that it puts off for ever is
/// one that the guest starts in a way that its state does not allow.
const AGAIN_MAX: u32 = 1000;

/// What ENOMEM means for an SNP guest.
const NO_MEMORY: &str =
    " (the host has no memory for the guest's private pages, which cannot be swapped out)";

/// Where an SNP guest's vCPU was.
const NOT_READABLE: &str = "at an address that cannot be read: the registers of an SNP guest are encrypted";

/// What every vCPU thread shares.
pub struct Shared {
    /// Buses and devices.
    pub machine: Machine,
    /// Page-state changes; `None` in plain guests.
    pub conversions: Option<Arc<Conversions>>,
    /// What firmware may do without asking; `None` for kernels.
    pub implicit: Option<ImplicitSharing>,
    /// Private memory that is assigned before the guest touches it; `None` in plain guests.
    pub pre_fault: Option<PreFault>,
    /// Certificates that the guest may ask for.
    pub certificates: Option<Certificates>,
    /// Set once the guest is to stop.
    pub stop: AtomicBool,
}

/// What to do after an exit.
enum Step {
    Continue,
    /// The vCPU is where it was: run it again, but not for ever.
    Retry(RunError),
    /// As if nothing had happened.
    Ignore,
    /// A range has become private.
    Private {
        gpa: u64,
        len: u64,
    },
    Stop(Outcome),
    /// The file must not change until the kernel has done what the answer asks for.
    Complete(Held),
}

impl From<Option<Action>> for Step {
    fn from(action: Option<Action>) -> Self {
        match action {
            None => Step::Continue,
            Some(Action::Reset) => Step::Stop(Outcome::Rebooted),
            Some(Action::PowerOff) => Step::Stop(Outcome::PoweredOff),
        }
    }
}

/// Runs one vCPU until the guest ends or another thread sets the stop flag (then `None`).
pub fn run(id: u32, vcpu: &mut dyn Vcpu, shared: &Arc<Shared>) -> Result<Option<Outcome>, RunError> {
    let (mut retries, mut put_off) = (0, 0);
    let mut entered = false;
    if let (0, Some(pre_fault)) = (id, &shared.pre_fault) {
        pre_fault.begin(vcpu, &shared.stop);
    }
    while !shared.stop.load(Ordering::Acquire) {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(source) => return Err(run_error(id, source)),
        };
        if let Exit::InternalError { suberror } = exit {
            let place =
                vcpu.get_regs().map_or_else(|_| NOT_READABLE.into(), |r| format!("at RIP {:#x}", r.rip));
            return Err(RunError::Internal { vcpu: id, suberror, place });
        }
        match exit {
            Exit::Again if put_off == AGAIN_MAX => {
                return Err(RunError::PutOff { vcpu: id, times: AGAIN_MAX });
            }
            Exit::Again => {
                put_off += 1;
                continue;
            }
            Exit::Interrupted => {}
            _ => put_off = 0,
        }
        if let Exit::FailEntry { reason } = exit {
            // A kernel starts the other vCPUs from save areas of its own; firmware lets them run from the
            // measured ones.
            let measured = !entered && (id == 0 || shared.implicit.is_some());
            return Err(match measured {
                true => RunError::FailEntry { vcpu: id, reason },
                false => RunError::SaveArea { vcpu: id, reason },
            });
        }
        entered |= !matches!(exit, Exit::Interrupted);
        match dispatch(id, exit, shared)? {
            Step::Continue => retries = 0,
            Step::Ignore => {}
            Step::Private { gpa, len } => {
                if let Some(pre_fault) = &shared.pre_fault {
                    pre_fault.ask(vcpu, gpa, len, &shared.stop);
                }
                retries = 0;
            }
            Step::Retry(error) if retries == FAULTS_MAX => return Err(error),
            Step::Retry(_) => retries += 1,
            Step::Stop(outcome) => return Ok(Some(outcome)),
            Step::Complete(held) => {
                vcpu.complete_exit().map_err(|source| run_error(id, source))?;
                drop(held);
                retries = 0;
            }
        }
    }
    Ok(None)
}

fn run_error(vcpu: u32, source: CallError) -> RunError {
    let hint = match source.source.raw_os_error() {
        // Linux 6.12 to 7.3, sev.c: sev_handle_vmgexit, sev_es_string_io.
        Some(libc::EINVAL) => {
            " (the guest reported an event that it cannot handle, or asked for too long a string of port accesses; before Linux 7.1 \
             also: it used a GHCB that it had not registered)"
        }
        // mmu.c:kvm_mmu_faultin_pfn_gmem hands on what guest_memfd says.
        Some(libc::ENOMEM) => NO_MEMORY,
        Some(libc::EIO) => {
            " (the security processor failed, or the guest gave an address for a guest request that cannot be read)"
        }
        Some(libc::EBADF) => " (was /dev/sev closed while the guest runs?)",
        _ => "",
    };
    RunError::Run { vcpu, source, hint }
}

/// An access to a page through the view that its state forbids, or outside of RAM. Nothing is converted: that
/// would throw away the page's contents, and Linux announces every change.
fn memory_fault(vcpu: u32, flags: u64, gpa: u64, size: u64, state: RangeState) -> Result<Step, RunError> {
    if flags & !FAULT_PRIVATE != 0 {
        return Err(RunError::FaultFlags { vcpu, gpa, flags });
    }
    let private = flags & FAULT_PRIVATE != 0;
    let state = match state {
        RangeState::Private if private => return Ok(Step::Retry(RunError::Repeated { vcpu, gpa })),
        RangeState::Shared if !private => return Ok(Step::Retry(RunError::Repeated { vcpu, gpa })),
        RangeState::Private => "the page is private",
        RangeState::Shared => "the page is shared",
        RangeState::Mixed => "some of its pages are shared and some private",
        RangeState::NotRam => "that is not RAM",
    };
    let view = if private { "private" } else { "shared" };
    Err(RunError::MemoryFault { vcpu, view, gpa, size, state })
}

/// Answers one exit.
fn dispatch(vcpu: u32, exit: Exit<'_>, shared: &Shared) -> Result<Step, RunError> {
    let machine = &shared.machine;
    Ok(match exit {
        Exit::IoIn { port, data } => {
            machine.pio.read(u64::from(port), data);
            Step::Continue
        }
        Exit::IoOut { port, data } => machine.pio.write(u64::from(port), data).into(),
        Exit::MmioRead { addr, data } => {
            machine.mmio.read(addr, data);
            Step::Continue
        }
        Exit::MmioWrite { addr, data } => machine.mmio.write(addr, data).into(),
        Exit::Hypercall { nr, args, ret } => {
            // The answer is always written: older kernels do not clear the field, and KVM reads whatever is
            // there. From Linux 7.2 on it takes no other refusal than EINVAL and EAGAIN
            // (`x86.h:kvm_is_valid_map_gpa_range_ret`).
            *ret = libc::EINVAL as u64;
            let Some(conversions) = shared.conversions.as_ref().filter(|_| nr == HC_MAP_GPA_RANGE) else {
                return Ok(Step::Continue);
            };
            match conversions.map_gpa_range(args) {
                Ok(()) => {
                    *ret = 0;
                    let [gpa, pages, attributes, ..] = args;
                    if attributes & MAP_GPA_RANGE_ENCRYPTED != 0 {
                        return Ok(Step::Private { gpa, len: pages * PAGE });
                    }
                }
                Err(NotConverted::Refused) => {}
                // Told as the guest's mistake it would end the guest all the same, and hide the cause.
                Err(NotConverted::Host(source)) => {
                    let hint = match source.raw_os_error() {
                        Some(libc::ENOMEM) => NO_MEMORY,
                        _ => "",
                    };
                    let [gpa, pages, ..] = args;
                    return Err(RunError::Conversion { vcpu, gpa, pages, source, hint });
                }
            }
            Step::Continue
        }
        Exit::Poisoned { gpa } => return Err(RunError::Poisoned { vcpu, gpa }),
        Exit::MemoryFault { flags: 0, gpa, .. }
            if let (Some(implicit), Some(conversions)) = (&shared.implicit, &shared.conversions)
                && implicit.share(conversions, gpa) =>
        {
            Step::Continue
        }
        Exit::MemoryFault { flags, gpa, size } => {
            let state = shared.conversions.as_ref().map_or(RangeState::NotRam, |c| c.state(gpa, size));
            memory_fault(vcpu, flags, gpa, size, state)?
        }
        Exit::SystemEvent { kind: SYSTEM_EVENT_SEV_TERM, data } => {
            Step::Stop(Outcome::Terminated(SevTerm::decode(data)))
        }
        Exit::SystemEvent { kind, .. } => {
            return Err(RunError::Unexpected { vcpu, what: format!("SYSTEM_EVENT {kind}") });
        }
        Exit::ReqCerts { gpa, npages, ret } => {
            // As for page-state changes, the answer is always written.
            *ret = libc::EIO as u64;
            let Some(certificates) = &shared.certificates else { return Ok(Step::Continue) };
            let answer = certificates.answer(gpa, *npages);
            (*ret, *npages) = (answer.ret as u64, answer.npages);
            answer.held.map_or(Step::Continue, Step::Complete)
        }
        Exit::Shutdown => Step::Stop(Outcome::Crashed { vcpu }),
        Exit::Interrupted => Step::Ignore,
        Exit::FailEntry { .. } | Exit::Again => {
            return Err(RunError::Unexpected { vcpu, what: "FAIL_ENTRY or EAGAIN".into() });
        }
        Exit::Hlt => return Err(RunError::Unexpected { vcpu, what: "HLT".into() }),
        Exit::InternalError { suberror } => {
            return Err(RunError::Internal { vcpu, suberror, place: NOT_READABLE.into() });
        }
        Exit::Other(reason) => return Err(RunError::Unexpected { vcpu, what: format!("reason {reason}") }),
    })
}

#[cfg(test)]
#[path = "vcpu_test.rs"]
mod tests;
