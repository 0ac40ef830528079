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
pub enum MonitorError {
    /// A KVM call while the VM was put together.
    #[error("{step}: {source}")]
    Create {
        /// What was being done.
        step: &'static str,
        /// What failed.
        source: CallError,
    },
    /// No host memory.
    #[error("cannot reserve guest RAM: {0}")]
    Ram(io::Error),
    /// Devices.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Something beside the VM.
    #[error("{name}: {problem}")]
    Companion {
        /// Which one.
        name: &'static str,
        /// What is wrong.
        problem: Box<dyn Error + Send + Sync>,
    },
    /// The launch.
    #[error("launch failed: {0}")]
    Launch(#[from] LaunchError),
    /// A vCPU.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The VM that should follow a reset.
    #[error("the guest asked for a reset, and its VM number {life} could not follow: {source}")]
    Restart {
        /// Counted from 1.
        life: u32,
        /// What failed.
        source: Box<MonitorError>,
    },
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
    Host {
        /// What was being done.
        what: &'static str,
        /// What failed.
        source: io::Error,
    },
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
        "vCPU {vcpu}: KVM does not run it and asks to try again ({times} times in a row): it waits for an INIT, and the guest \
         sent it something else, such as an AP creation"
    )]
    PutOff {
        /// Which one.
        vcpu: u32,
        /// How often it did.
        times: u32,
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
