// SPDX-License-Identifier: Apache-2.0
//! Why there is no image of a direct boot.

use super::kernel::KernelError;
use super::lazy;
use crate::board::layout;
use crate::pages::cpuid::CpuidError;
use crate::plan::PlanError;
use crate::stage0::TooMany;

/// Most vCPUs of an image: their ids are xAPIC ids, of which 255 is the broadcast address.
pub const VCPUS_MAX: u32 = 255;

/// Why there is no image. Messages begin with the field of the request that has to change, and have fields in
/// backticks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ImageError {
    /// The kernel file is no good.
    #[error("`kernel`: {0}")]
    Kernel(#[from] KernelError),
    /// Memory size that is not possible.
    #[error(
        "`memory`: {found} bytes; give a multiple of 4 KiB from {min_mib} MiB to {max_mib} MiB",
        min_mib = layout::MEMORY_MIN >> 20,
        max_mib = .max >> 20
    )]
    Memory { found: u64, max: u64 },
    /// vCPU count that is not possible.
    #[error("`cpus`: {0}; give 1 to {VCPUS_MAX}")]
    Vcpus(u32),
    /// The command line does not fit.
    #[error("`cmdline`: {found} bytes, but this kernel takes at most {max}; shorten it")]
    CmdlineLength { found: usize, max: u32 },
    /// The kernel would stop reading at a zero byte.
    #[error("`cmdline`: contains a zero byte at offset {0}; remove it")]
    CmdlineNul(usize),
    /// The kernel does not fit.
    #[error(
        "`memory`: the kernel works in addresses {start:#x} to {end:#x}, but RAM below the device gap ends at {top:#x}; \
         give more memory"
    )]
    KernelFit { start: u64, end: u64, top: u64 },
    /// The initrd does not fit between the kernel and the end of low RAM.
    #[error(
        "`initrd`: {len} bytes do not fit between the kernel's end {start:#x} and {end:#x}; \
         give a smaller initrd{advice}"
    )]
    InitrdFit { len: u64, start: u64, end: u64, advice: &'static str },
    /// An empty initrd is a mistake.
    #[error("`initrd`: the file is empty; leave the option out or give an initrd")]
    InitrdEmpty,
    /// C-bit that no table entry or plan can have.
    #[error("C-bit {c_bit}: the CPUID table says {table:?}; expected the same position, from 32 to 51")]
    CBit { c_bit: u8, table: Option<u8> },
    /// The CPUID page cannot be made.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// There is no room to hand the files over.
    #[error(
        "`memory`: no room for a second copy of {name} ({len} bytes), which stage0 needs until it has checked it; \
         give more memory or a smaller `initrd`"
    )]
    StagingFit { name: String, len: u64 },
    /// An ELF kernel with more parts than the inputs page takes.
    #[error("`kernel`: {0}; use the bzImage of this kernel")]
    TooMany(#[from] TooMany),
    /// Lazy acceptance with a kernel that cannot do it.
    #[error(
        "`accept` lazy: this kernel does not know unaccepted memory (Linux before 6.6, or built without it); \
         use `accept` auto or eager"
    )]
    NotLazy,
    /// More memory than stage0's table of unaccepted memory has bits for.
    #[error(
        "`accept` lazy: {0} bytes of `memory`, but the kernel can be told of {max} bytes at most; use `accept` auto or eager",
        max = lazy::MEMORY_MAX
    )]
    LazyMemory(u64),
    /// stage0 would end the guest.
    #[error("internal layout error: stage0 would refuse it: {0}")]
    Stage0(&'static str),
    /// The result is not a plan.
    #[error("internal layout error: {0}")]
    Plan(#[from] PlanError),
}
