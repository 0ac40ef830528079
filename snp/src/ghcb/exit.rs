// SPDX-License-Identifier: Apache-2.0
//! Non-automatic exits: the codes of the events, and of the answers, that go through the GHCB page.
//!
//! GHCB specification, sections 4.1 (events) and 4.1.x (error codes); event numbers below 0x8000_0000 are
//! those of the SVM intercepts. Uses `core` only.

/// SVM exit codes that a guest's #VC handler passes on.
#[allow(missing_docs, reason = "names of the SVM intercepts")]
pub mod svm {
    pub const READ_DR7: u64 = 0x27;
    pub const WRITE_DR7: u64 = 0x37;
    pub const RDTSC: u64 = 0x6e;
    pub const RDPMC: u64 = 0x6f;
    pub const CPUID: u64 = 0x72;
    pub const INVD: u64 = 0x76;
    pub const IOIO: u64 = 0x7b;
    pub const MSR: u64 = 0x7c;
    pub const VMMCALL: u64 = 0x81;
    pub const RDTSCP: u64 = 0x87;
    pub const WBINVD: u64 = 0x89;
    pub const MONITOR: u64 = 0x8a;
    pub const MWAIT: u64 = 0x8b;
}

/// Exit info 1 holds the address, exit info 2 the length; data comes back in the scratch area.
pub const MMIO_READ: u64 = 0x8000_0001;
/// As [`MMIO_READ`], data is in the scratch area.
pub const MMIO_WRITE: u64 = 0x8000_0002;
/// The guest has handled an NMI.
pub const NMI_COMPLETE: u64 = 0x8000_0003;
/// Hold this vCPU until it is started again.
pub const AP_RESET_HOLD: u64 = 0x8000_0004;
/// Where APs start, for SEV-ES guests: exit info 1 = 0 set, 1 get.
pub const AP_JUMP_TABLE: u64 = 0x8000_0005;
/// Page state change; the buffer is in the scratch area.
pub const PAGE_STATE_CHANGE: u64 = 0x8000_0010;
/// A message to the firmware: exit info 1 = request, exit info 2 = response.
pub const GUEST_REQUEST: u64 = 0x8000_0011;
/// As [`GUEST_REQUEST`], with certificates: RAX = address, RBX = pages.
pub const EXTENDED_GUEST_REQUEST: u64 = 0x8000_0012;
/// Start or stop a vCPU: exit info 1 = APIC id, VMPL and [`ap_creation`] request, exit info 2 = VMSA.
pub const AP_CREATION: u64 = 0x8000_0013;
/// Feature bits in exit info 2.
pub const HYPERVISOR_FEATURES: u64 = 0x8000_fffd;
/// The guest gives up.
pub const TERMINATION: u64 = 0x8000_fffe;
/// The guest got a #VC that it cannot handle.
pub const UNSUPPORTED_EVENT: u64 = 0x8000_ffff;

/// Requests of [`AP_CREATION`], in exit info 1 bits 31:0 (KVM reads the VMPL field in bits 19:16 as part of
/// it).
#[allow(missing_docs, reason = "names are those of the specification")]
pub mod ap_creation {
    pub const CREATE_ON_INIT: u32 = 0;
    pub const CREATE: u32 = 1;
    pub const DESTROY: u32 = 2;
}

/// Hypervisor features.
pub mod features {
    /// SNP guests are supported.
    pub const SNP: u64 = 1 << 0;
    /// [`super::AP_CREATION`] is supported.
    pub const AP_CREATION: u64 = 1 << 1;
}

/// Values of exit info 1 in an answer.
pub mod info1 {
    /// Nothing to do.
    pub const NO_ACTION: u64 = 0;
    /// Exit info 2 holds an event that the guest shall inject into itself.
    pub const ISSUE_EXCEPTION: u64 = 1;
    /// The request was malformed; exit info 2 says how.
    pub const MALFORMED_INPUT: u64 = 2;
}

/// What was wrong with a request: exit info 2 beside [`info1::MALFORMED_INPUT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Malformed {
    /// The GHCB is not registered.
    NotRegistered = 1,
    /// The usage field is not zero.
    InvalidUsage = 2,
    /// The scratch area does not lie where it may.
    InvalidScratchArea = 3,
    /// A field that the event needs is not marked valid.
    MissingInput = 4,
    /// A field has a value that the event does not allow.
    InvalidInput = 5,
    /// The event is not known.
    InvalidEvent = 6,
}

/// Hypervisor's part of exit info 2 for guest requests, in bits 63:32.
pub mod guest_request {
    /// The certificate buffer is too small; RBX has the pages needed.
    pub const INVALID_LEN: u64 = 1;
    /// Try again.
    pub const BUSY: u64 = 2;
    /// Any other failure.
    pub const GENERIC: u64 = 1 << 31;
}

/// Exit info 2 that makes the guest inject #GP, as KVM asks for after a refused MSR access.
pub const INJECT_GP: u64 = 1 << 31 | 3 << 8 | 13;
