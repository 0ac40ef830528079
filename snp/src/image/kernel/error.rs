// SPDX-License-Identifier: Apache-2.0
//! Why a file cannot be booted as a kernel.

/// Most segments of an ELF image: Linux has five.
pub(super) const SEGMENTS_MAX: usize = 256;

/// Why a file cannot be booted as a kernel. Offsets are in bytes from the start of the file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum KernelError {
    /// Neither format's signature.
    #[error(
        "neither a bzImage ('HdrS' at offset 0x202) nor an ELF image (0x7f 'ELF' at offset 0): \
         give a distribution's vmlinuz or an uncompressed x86-64 vmlinux"
    )]
    UnknownFormat,
    /// A kernel in a wrapper.
    #[error(
        "a unified kernel image (UKI), which firmware starts; cvmm boots what is in it. Take it apart: `objcopy -O binary \
         --only-section=.linux UKI KERNEL`, the same with .initrd for `initrd`; .cmdline holds its command line"
    )]
    Unified,
    /// The file is shorter than it says.
    #[error("truncated: {what} needs the bytes up to offset {needed:#x}, the file has {found:#x}")]
    Truncated {
        what: &'static str,
        /// Length that the file should have at least.
        needed: u64,
        found: u64,
    },
    /// A field has a value that no bootable kernel has.
    #[error("{what} at offset {offset:#x} is {found:#x}, expected {expected}")]
    Field { what: &'static str, offset: u64, found: u64, expected: &'static str },
    /// The ELF structure itself does not parse.
    #[error("malformed ELF image: {0}")]
    Elf(String),
    /// A loadable segment that cannot be placed.
    #[error("ELF segment {index}: {file_len:#x} bytes of file, {mem_len:#x} of memory at {gpa:#x}: {why}")]
    Segment { index: usize, gpa: u64, file_len: u64, mem_len: u64, why: &'static str },
    /// So many that each further one costs time.
    #[error("the ELF image has more than {SEGMENTS_MAX} loadable segments; a kernel has a few")]
    Segments,
    /// The same bytes of the file in many segments.
    #[error(
        "the ELF image's segments have {found:#x} bytes, more than the {file:#x} of the whole file: they overlap"
    )]
    SegmentBytes { found: u64, file: u64 },
    /// Two segments share memory.
    #[error("ELF segments overlap at address {gpa:#x}")]
    SegmentsOverlap { gpa: u64 },
    /// An ELF image with nothing to load.
    #[error("ELF image without a loadable segment: not a kernel")]
    NothingToLoad,
    /// The entry point lies outside of all segments.
    #[error("ELF entry point {entry:#x} lies in no loadable segment")]
    EntryOutside { entry: u64 },
}
