// SPDX-License-Identifier: Apache-2.0
//! Why an IGVM file is refused.

use std::fmt;

use crate::digest::LaunchDigest;
use crate::identity::KeyError;
use crate::plan::PlanError;

/// How pages without data enter the guest. The specification says NORMAL pages of zeros, but QEMU and Cloud
/// Hypervisor load them as type ZERO, so one file has two digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPages {
    /// As the specification says.
    Normal,
    /// As QEMU and Cloud Hypervisor do.
    Zero,
}

impl fmt::Display for ZeroPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ZeroPages::Normal => "NORMAL pages of zeros (the IGVM specification)",
            ZeroPages::Zero => "type ZERO (QEMU, Cloud Hypervisor)",
        })
    }
}

/// Why an IGVM file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum IgvmError {
    /// A field with a wrong value.
    #[error("offset {offset:#x}: {what} is {found:#x}, expected {expected}")]
    Field { offset: usize, what: &'static str, found: u64, expected: String },
    /// The file ends too early.
    #[error("offset {offset:#x}: the file ends in {what}, expected {expected} more bytes")]
    CutOff { offset: usize, what: &'static str, expected: usize },
    /// Made for other platforms.
    #[error("the file has no SUPPORTED_PLATFORM header for SEV-SNP")]
    NotForSnp,
    /// A key or signature in the file's ID block.
    #[error("offset {offset:#x}: the ID block's {what}: {source}")]
    IdBlock { offset: usize, what: &'static str, source: KeyError },
    /// The ID block in the file is for something else than the file.
    #[error(
        "the file's ID block is for digest {block}, but the file has {computed} with pages without data as {zero_pages}{hint}"
    )]
    IdBlockDigest {
        block: LaunchDigest,
        computed: LaunchDigest,
        zero_pages: ZeroPages,
        /// Whether the other convention would match.
        hint: &'static str,
    },
    /// Something that KVM cannot take into an SNP guest.
    #[error("KVM cannot launch this file: {0}")]
    Kvm(String),
    /// Something that the file wants of a machine which this one does not have.
    #[error("offset {offset:#x}: {reason}")]
    Machine { offset: usize, reason: String },
    /// The records as a plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
}
