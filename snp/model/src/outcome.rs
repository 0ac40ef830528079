// SPDX-License-Identifier: Apache-2.0
//! What a VMGEXIT leads to, and what the monitor answers.

use crate::errno::Errno;
use crate::nae::Direction;
use crate::vm::ApCreation;

/// Bit 4 of a range's attributes: make it private (`KVM_MAP_GPA_RANGE_ENCRYPTED`).
pub const MAP_GPA_ENCRYPTED: u64 = 1 << 4;
/// Page-size hint of 2 MiB in bits 3:0 (`KVM_MAP_GPA_RANGE_PAGE_SZ_2M`).
pub const MAP_GPA_SIZE_2M: u64 = 1;
/// A `KVM_EXIT_HYPERCALL` with `KVM_HC_MAP_GPA_RANGE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapGpaRange {
    /// First address (`args[0]`).
    pub gpa: u64,
    /// Number of 4 KiB pages (`args[1]`).
    pub pages: u64,
    /// `args[2]`: see [`MAP_GPA_ENCRYPTED`] and [`MAP_GPA_SIZE_2M`].
    pub attributes: u64,
}

/// What a VMGEXIT, or the answer to an earlier outcome, leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest has its answer: resume it.
    Resume,
    /// `KVM_EXIT_HYPERCALL`; answer with [`Reply::MapGpaRange`].
    MapGpaRange(MapGpaRange),
    /// `KVM_EXIT_SYSTEM_EVENT`, type `SEV_TERM`: the guest ends itself. See [`snp::ghcb::term::SevTerm`].
    Terminate {
        /// The event's data word.
        data0: u64,
    },
    /// `KVM_EXIT_SNP_REQ_CERTS`; answer with [`Reply::Certs`].
    ReqCerts {
        /// Where the certificate table shall go; 4 KiB aligned, otherwise not checked.
        gpa: u64,
        /// Pages that the guest has reserved there.
        npages: u64,
    },
    /// The vCPU waits, outside of every lock, until an AP creation or a SIPI ([`Reply::Wake`]).
    ResetHold,
    /// Start or stop a vCPU, which may be this one. The guest is answered: resume it, unless it is the one to
    /// stop.
    ApCreate(ApCreation),
    /// Read an MSR; answer with [`Reply::ReadMsr`].
    ReadMsr {
        /// Number of the MSR.
        index: u32,
    },
    /// Write an MSR; answer with [`Reply::WriteMsr`].
    WriteMsr {
        /// Number of the MSR.
        index: u32,
        /// Value.
        value: u64,
    },
    /// `KVM_EXIT_IO`; answer with [`Reply::Io`].
    Io {
        /// I/O port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// Direction.
        direction: Direction,
        /// The accesses' data; for [`Direction::In`] zeros, of the length that is wanted.
        data: Vec<u8>,
    },
    /// `KVM_EXIT_MMIO`; answer with [`Reply::Mmio`].
    Mmio {
        /// Address as the guest gave it.
        gpa: u64,
        /// Length, 1 to 8.
        len: u8,
        /// Direction.
        direction: Direction,
        /// Data of a write in the first `len` bytes.
        data: [u8; 8],
    },
    /// Read the guest's time stamp counter; answer with [`Reply::Tsc`].
    Tsc,
    /// The guest broke the protocol in a way that KVM does not answer: `KVM_RUN` fails.
    RunFails(Errno),
}

/// The monitor's answer to an [`Outcome`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `hypercall.ret`: zero if the range was changed, else EINVAL or EAGAIN, which are the same to the
    /// guest.
    MapGpaRange {
        /// The field's value.
        ret: u64,
    },
    /// `snp_req_certs.ret` and `.npages`.
    Certs {
        /// 0, ENOSPC, EAGAIN or EIO.
        ret: i32,
        /// With ENOSPC: pages that are needed.
        npages: u64,
    },
    /// The vCPU was started by SIPI.
    Wake,
    /// The MSR's value, or `None` for #GP.
    ReadMsr(Option<u64>),
    /// Whether the MSR could be written; otherwise #GP.
    WriteMsr(bool),
    /// For [`Direction::In`] the data, as long as was asked for; ignored otherwise.
    Io(Vec<u8>),
    /// For [`Direction::In`] the data; ignored otherwise.
    Mmio([u8; 8]),
    /// Time stamp counter and the value of TSC_AUX.
    Tsc {
        /// Time stamp counter.
        tsc: u64,
        /// TSC_AUX.
        aux: u32,
    },
}
