// SPDX-License-Identifier: Apache-2.0
//! Why a vCPU came back: the exits of `KVM_RUN` (Linux, `include/uapi/linux/kvm.h`), those of SNP guests
//! among them.

/// Why `KVM_RUN` returned.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port; the answer is written to `data`.
    IoIn {
        /// Port.
        port: u16,
        /// Where the answer goes; preset to whatever the last exit left.
        data: &'a mut [u8],
    },
    /// The guest writes a port.
    IoOut {
        /// Port.
        port: u16,
        /// What it wrote; string instructions write many items at once.
        data: &'a [u8],
    },
    /// The guest reads device memory.
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// Where the answer goes.
        data: &'a mut [u8],
    },
    /// The guest writes device memory.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// What it wrote.
        data: &'a [u8],
    },
    /// `KVM_EXIT_HYPERCALL`.
    Hypercall {
        /// Number; 12 is `KVM_HC_MAP_GPA_RANGE`.
        nr: u64,
        /// Arguments.
        args: [u64; 6],
        /// The answer; must always be written.
        ret: &'a mut u64,
    },
    /// `KVM_EXIT_MEMORY_FAULT`.
    MemoryFault {
        /// Bit 3: the access was to the private side.
        flags: u64,
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// `KVM_EXIT_MEMORY_FAULT` with EHWPOISON: the host's memory behind the page is broken.
    Poisoned {
        /// Guest-physical address.
        gpa: u64,
    },
    /// `KVM_EXIT_SYSTEM_EVENT`; 6 is `SEV_TERM`.
    SystemEvent {
        /// Kind of event.
        kind: u32,
        /// First datum, 0 if there is none.
        data: u64,
    },
    /// `KVM_EXIT_SNP_REQ_CERTS`.
    ReqCerts {
        /// Guest-physical address of the certificate buffer.
        gpa: u64,
        /// Pages that it has; set to the pages needed when `ret` says ENOSPC.
        npages: &'a mut u64,
        /// The answer; must always be written.
        ret: &'a mut u64,
    },
    /// Triple fault.
    Shutdown,
    /// HLT with no in-kernel APIC.
    Hlt,
    /// A signal arrived.
    Interrupted,
    /// `KVM_RUN` answered EAGAIN: the vCPU did not run, and waits for something else than what happened.
    Again,
    /// The CPU refused the guest's state.
    FailEntry {
        /// Hardware's reason code.
        reason: u64,
    },
    /// KVM could not emulate something.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
    },
    /// Anything else.
    Other(u32),
}
