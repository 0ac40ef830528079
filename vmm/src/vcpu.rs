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
use crate::conversion::NotConverted;
use crate::conversion::RangeState;
use crate::implicit::ImplicitSharing;
use crate::machine::Machine;
use crate::memory::PAGE;
use crate::outcome::Outcome;
use crate::platform::CallError;
use crate::platform::Exit;
use crate::platform::HC_MAP_GPA_RANGE;
use crate::platform::MAP_GPA_RANGE_ENCRYPTED;
use crate::platform::Vcpu;
use crate::prefault::PreFault;

/// `KVM_SYSTEM_EVENT_SEV_TERM`.
const SYSTEM_EVENT_SEV_TERM: u32 = 6;
/// Bit of a memory fault's flags: the access was to the private side. No other bit has a meaning.
const FAULT_PRIVATE: u64 = 1 << 3;
/// How often in a row a vCPU may fault on a page that is in the right state. It happens when another vCPU converts the page
/// meanwhile; then the next try goes well.
const FAULTS_MAX: u32 = 16;
/// How often in a row KVM may put off a vCPU. It does once for each INIT; a vCPU that it puts off for ever is one that the guest
/// starts in a way that its state does not allow.
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
    pub conversions: Option<Conversions>,
    /// What firmware may do without asking; `None` for kernels.
    pub implicit: Option<ImplicitSharing>,
    /// Private memory that is assigned before the guest touches it; `None` in plain guests.
    pub pre_fault: Option<PreFault>,
    /// Certificates that the guest may ask for.
    pub certificates: Option<Certificates>,
    /// Set once the guest is to stop.
    pub stop: AtomicBool,
}

/// Why a vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// `KVM_RUN` failed.
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
    /// The CPU would not enter the guest for the first time.
    #[error(
        "vCPU {vcpu}: the CPU refused to enter the guest (hardware reason {reason:#x}): its initial registers are not consistent"
    )]
    FailEntry {
        /// Which one.
        vcpu: u32,
        /// Hardware's code.
        reason: u64,
    },
    /// The CPU would not enter a vCPU that the guest has started or stopped itself.
    #[error(
        "vCPU {vcpu}: the CPU refused to enter the guest (hardware reason {reason:#x}): the vCPU has no usable save area. The \
         guest's AP creation named a page that is not private RAM or not marked as a save area, or an AP destruction took it away; \
         this is a bug in the guest"
    )]
    SaveArea {
        /// Which one.
        vcpu: u32,
        /// Hardware's code.
        reason: u64,
    },
    /// KVM does not run the vCPU.
    #[error(
        "vCPU {vcpu}: KVM does not run it and asks to try again ({AGAIN_MAX} times in a row): it waits for an INIT, and the guest \
         sent it something else, such as an AP creation"
    )]
    PutOff {
        /// Which one.
        vcpu: u32,
    },
    /// Memory of the host is broken.
    #[error(
        "vCPU {vcpu}: the host's memory behind guest address {gpa:#x} has an uncorrectable error (EHWPOISON); the page's contents are \
         lost, and the guest cannot go on"
    )]
    Poisoned {
        /// Which one.
        vcpu: u32,
        /// Guest-physical address.
        gpa: u64,
    },
    /// The host could not change the state of pages.
    #[error(
        "vCPU {vcpu}: the guest's change of {pages} pages at {gpa:#x} failed on the host: {source}{hint}"
    )]
    Conversion {
        /// Which one.
        vcpu: u32,
        /// First guest-physical address.
        gpa: u64,
        /// Pages of 4 KiB.
        pages: u64,
        /// What the host said.
        source: std::io::Error,
        /// What that means here.
        hint: &'static str,
    },
    /// KVM gave up.
    #[error(
        "vCPU {vcpu}: KVM could not emulate an instruction of the guest (internal error {suberror}) {place}"
    )]
    Internal {
        /// Which one.
        vcpu: u32,
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Where, if the registers can be read.
        place: String,
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
            Exit::Again if put_off == AGAIN_MAX => return Err(RunError::PutOff { vcpu: id }),
            Exit::Again => {
                put_off += 1;
                continue;
            }
            Exit::Interrupted => {}
            _ => put_off = 0,
        }
        if let Exit::FailEntry { reason } = exit {
            // A kernel starts the other vCPUs from save areas of its own; firmware lets them run from the measured ones.
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
        Exit::Hypercall { nr, args, ret } => {
            // The answer is always written: older kernels do not clear the field, and KVM reads whatever is there. From Linux 7.2
            // on it takes no other refusal than EINVAL and EAGAIN (`x86.h:kvm_is_valid_map_gpa_range_ret`).
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
            let (Some(certificates), Some(conversions)) = (&shared.certificates, &shared.conversions) else {
                return Ok(Step::Continue);
            };
            let answer = certificates.answer(gpa, *npages, |gpa, len| conversions.hold_shared(gpa, len));
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
