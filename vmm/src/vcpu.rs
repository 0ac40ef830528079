// SPDX-License-Identifier: Apache-2.0
//! vCPU threads and the one dispatcher of exits.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use devices::bus::Action;
use snp::ghcb::term::SevTerm;

use crate::certs::Certificates;
use crate::certs::Held;
use crate::conversion::Conversions;
use crate::conversion::RangeState;
use crate::implicit::ImplicitSharing;
use crate::machine::Machine;
use crate::outcome::Outcome;
use crate::platform::CallError;
use crate::platform::Exit;
use crate::platform::HC_MAP_GPA_RANGE;
use crate::platform::Vcpu;

/// `KVM_SYSTEM_EVENT_SEV_TERM`.
const SYSTEM_EVENT_SEV_TERM: u32 = 6;
/// Bit of a memory fault's flags: the access was to the private side. No other bit has a meaning.
const FAULT_PRIVATE: u64 = 1 << 3;
/// How often in a row a vCPU may fault on a page that is in the right state. It happens when another vCPU converts the page
/// meanwhile; then the next try goes well.
const FAULTS_MAX: u32 = 16;

/// What every vCPU thread shares.
pub struct Shared {
    /// Buses and devices.
    pub machine: Machine,
    /// Page-state changes; `None` in plain guests.
    pub conversions: Option<Conversions>,
    /// What firmware may do without asking; `None` for kernels.
    pub implicit: Option<ImplicitSharing>,
    /// Certificates that the guest may ask for.
    pub certificates: Option<Certificates>,
    /// Set once the guest is to stop.
    pub stop: AtomicBool,
}

/// Why a vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// `KVM_RUN` failed. EINVAL is how KVM answers a guest that breaks the GHCB protocol.
    #[error("vCPU {vcpu}: {source}{hint}")]
    Run {
        /// Which one.
        vcpu: u32,
        /// What failed.
        source: CallError,
        /// What the errno means here.
        hint: &'static str,
    },
    /// The guest touched a page through the wrong view, or outside of RAM.
    #[error(
        "vCPU {vcpu}: the guest made a {view} access to {gpa:#x} ({size:#x} bytes), but {state}. A guest announces every \
         change of a page's state, and reaches devices through shared mappings, so this is a bug in the guest"
    )]
    MemoryFault {
        /// Which one.
        vcpu: u32,
        /// "private" or "shared".
        view: &'static str,
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// What the monitor knows of the page.
        state: &'static str,
    },
    /// The same access, which the page's state allows, does not go through.
    #[error(
        "vCPU {vcpu}: KVM reports again and again that an access to {gpa:#x} goes to the wrong side, but the page is on the right \
         one: the monitor's record of page states and KVM's differ"
    )]
    Repeated {
        /// Which one.
        vcpu: u32,
        /// Guest-physical address.
        gpa: u64,
    },
    /// A kind of memory fault that came after Linux 6.12.
    #[error(
        "vCPU {vcpu}: KVM reports a memory fault at {gpa:#x} with flags {flags:#x}, of which only bit 3 is known"
    )]
    FaultFlags {
        /// Which one.
        vcpu: u32,
        /// Guest-physical address.
        gpa: u64,
        /// What KVM says.
        flags: u64,
    },
    /// The CPU would not enter the guest.
    #[error(
        "vCPU {vcpu}: the CPU refused to enter the guest (hardware reason {reason:#x}): its initial registers are not consistent"
    )]
    FailEntry {
        /// Which one.
        vcpu: u32,
        /// Hardware's code.
        reason: u64,
    },
    /// KVM gave up.
    #[error(
        "vCPU {vcpu}: KVM could not emulate an instruction of the guest (internal error {suberror}) at RIP {rip}"
    )]
    Internal {
        /// Which one.
        vcpu: u32,
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Where, if the registers can be read.
        rip: String,
    },
    /// An exit that no guest of this monitor should cause.
    #[error("vCPU {vcpu}: unexpected exit {what} from KVM")]
    Unexpected {
        /// Which one.
        vcpu: u32,
        /// Its kind.
        what: String,
    },
}

/// What to do after an exit.
enum Step {
    Continue,
    /// The vCPU is where it was: run it again, but not for ever.
    Retry(RunError),
    /// As if nothing had happened.
    Ignore,
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
    let mut retries = 0;
    while !shared.stop.load(Ordering::Acquire) {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(source) => return Err(run_error(id, source)),
        };
        if let Exit::InternalError { suberror } = exit {
            let rip = vcpu.get_regs().map_or_else(|_| "unknown".to_owned(), |r| format!("{:#x}", r.rip));
            return Err(RunError::Internal { vcpu: id, suberror, rip });
        }
        match dispatch(id, exit, shared)? {
            Step::Continue => retries = 0,
            Step::Ignore => {}
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
        Some(libc::EINVAL) => {
            " (the guest used a GHCB that it had not registered, or reported an event that KVM does not know)"
        }
        Some(libc::EBADF) => " (was /dev/sev closed while the guest runs?)",
        _ => "",
    };
    RunError::Run { vcpu, source, hint }
}

/// An access to a page through the view that its state forbids, or outside of RAM. Nothing is converted: that would throw away the
/// page's contents, and Linux announces every change.
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
        Exit::Hypercall { nr: HC_MAP_GPA_RANGE, args, ret } => {
            // The answer is always written: KVM does not clear the field, and reads whatever is there.
            *ret = match &shared.conversions {
                Some(conversions) => conversions.map_gpa_range(args),
                None => u64::MAX,
            };
            Step::Continue
        }
        Exit::Hypercall { ret, .. } => {
            *ret = u64::MAX;
            Step::Continue
        }
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
            let (Some(certificates), Some(conversions)) = (&shared.certificates, &shared.conversions) else {
                return Ok(Step::Continue);
            };
            let answer = certificates.answer(gpa, *npages, |page| conversions.is_shared(page));
            (*ret, *npages) = (answer.ret as u64, answer.npages);
            answer.held.map_or(Step::Continue, Step::Complete)
        }
        Exit::Shutdown => Step::Stop(Outcome::Crashed { vcpu }),
        Exit::Interrupted => Step::Ignore,
        Exit::FailEntry { reason } => return Err(RunError::FailEntry { vcpu, reason }),
        Exit::Hlt => return Err(RunError::Unexpected { vcpu, what: "HLT".into() }),
        Exit::InternalError { suberror } => {
            return Err(RunError::Internal { vcpu, suberror, rip: "unknown".into() });
        }
        Exit::Other(reason) => return Err(RunError::Unexpected { vcpu, what: format!("reason {reason}") }),
    })
}

#[cfg(test)]
#[path = "vcpu_test.rs"]
mod tests;
