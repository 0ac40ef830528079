// SPDX-License-Identifier: Apache-2.0
//! Why a run ended otherwise than by the guest's wish.

use std::error::Error;
use std::io;

use crate::launch::LaunchError;
use crate::machine::MachineError;
use crate::platform::error::CallError;
use crate::threads::ThreadError;

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum MonitorError {
    /// A KVM call while the VM was put together.
    #[error("{step}: {source}")]
    Create { step: &'static str, source: CallError },
    /// No host memory.
    #[error("cannot reserve guest RAM: {0}")]
    Ram(io::Error),
    /// Devices.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Something beside the VM.
    #[error("{name}: {problem}")]
    Companion { name: &'static str, problem: Box<dyn Error + Send + Sync> },
    /// The launch.
    #[error("launch failed: {0}")]
    Launch(#[from] LaunchError),
    /// A vCPU.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The VM that should follow a reset.
    #[error("the guest asked for a reset, and its VM number {life} could not follow: {source}")]
    Restart { life: u32, source: Box<MonitorError> },
    /// A VM that must be gone before the next one is there.
    #[error("a vCPU of the VM before it did not stop")]
    Stuck,
    /// The terminal.
    #[error("cannot switch the terminal to raw mode: {0}")]
    Terminal(io::Error),
    /// No thread.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// Signals.
    #[error("{what}: {source}")]
    Host { what: &'static str, source: io::Error },
}

/// Why a vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RunError {
    /// `KVM_RUN` failed.
    #[error("vCPU {vcpu}: {source}{hint}")]
    Run { vcpu: u32, source: CallError, hint: &'static str },
    /// The guest touched a page through the wrong view, or outside of RAM.
    #[error(
        "vCPU {vcpu}: the guest made a {view} access to {gpa:#x} ({size:#x} bytes), but {state}. A guest announces every \
         change of a page's state, and reaches devices through shared mappings, so this is a bug in the guest"
    )]
    MemoryFault { vcpu: u32, view: &'static str, gpa: u64, size: u64, state: &'static str },
    /// The same access, which the page's state allows, does not go through.
    #[error(
        "vCPU {vcpu}: KVM reports again and again that an access to {gpa:#x} goes to the wrong side, but the page is on the right \
         one: the monitor's record of page states and KVM's differ"
    )]
    Repeated { vcpu: u32, gpa: u64 },
    /// A kind of memory fault that came after Linux 6.12.
    #[error(
        "vCPU {vcpu}: KVM reports a memory fault at {gpa:#x} with flags {flags:#x}, of which only bit 3 is known"
    )]
    FaultFlags { vcpu: u32, gpa: u64, flags: u64 },
    /// The CPU would not enter the guest for the first time.
    #[error(
        "vCPU {vcpu}: the CPU refused to enter the guest (hardware reason {reason:#x}): its initial registers are not consistent"
    )]
    FailEntry { vcpu: u32, reason: u64 },
    /// The CPU would not enter a vCPU that the guest has started or stopped itself.
    #[error(
        "vCPU {vcpu}: the CPU refused to enter the guest (hardware reason {reason:#x}): the vCPU has no usable save area. The \
         guest's AP creation named a page that is not private RAM or not marked as a save area, or an AP destruction took it away; \
         this is a bug in the guest"
    )]
    SaveArea { vcpu: u32, reason: u64 },
    /// KVM does not run the vCPU.
    #[error(
        "vCPU {vcpu}: KVM does not run it and asks to try again ({times} times in a row): it waits for an INIT, and the guest \
         sent it something else, such as an AP creation"
    )]
    PutOff { vcpu: u32, times: u32 },
    /// Memory of the host is broken.
    #[error(
        "vCPU {vcpu}: the host's memory behind guest address {gpa:#x} has an uncorrectable error (EHWPOISON); the page's contents are \
         lost, and the guest cannot go on"
    )]
    Poisoned { vcpu: u32, gpa: u64 },
    /// The host could not change the state of pages.
    #[error(
        "vCPU {vcpu}: the guest's change of {pages} pages at {gpa:#x} failed on the host: {source}{hint}"
    )]
    Conversion { vcpu: u32, gpa: u64, pages: u64, source: std::io::Error, hint: &'static str },
    /// KVM gave up.
    #[error(
        "vCPU {vcpu}: KVM could not emulate an instruction of the guest (internal error {suberror}) {place}"
    )]
    Internal { vcpu: u32, suberror: u32, place: String },
    /// An exit that no guest of this monitor should cause.
    #[error("vCPU {vcpu}: unexpected exit {what} from KVM")]
    Unexpected { vcpu: u32, what: String },
}
