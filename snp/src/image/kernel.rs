// SPDX-License-Identifier: Apache-2.0
//! A kernel file, told apart and checked: a Linux bzImage or an x86-64 ELF image.
//!
//! The file is trusted for nothing: every offset is checked against its length, every address against the
//! others. What fits into a guest's memory is decided later, by [`super::direct`].

mod bzimage;
mod error;
mod fields;
mod vmlinux;

use std::ops::Range;
use std::sync::Arc;

pub use bzimage::BzImage;
pub use bzimage::ENTRY_64;
pub use bzimage::SETUP_HEADER;
pub use error::KernelError;
pub use vmlinux::ElfKernel;
pub use vmlinux::Segment;

use self::fields::Fields;
use crate::plan::Bytes;

/// `COMMAND_LINE_SIZE - 1` of x86 Linux, for ELF images, which do not say it.
const ELF_CMDLINE_MAX: u32 = 2047;
/// Highest initrd address that x86 Linux announces, for ELF images, which do not say it.
const ELF_INITRD_ADDR_MAX: u64 = 0x7fff_ffff;

/// A checked kernel file.
#[derive(Clone, Debug)]
pub enum Kernel {
    /// A bzImage: decompresses itself in the guest.
    BzImage(BzImage),
    /// An uncompressed ELF image.
    Elf(ElfKernel),
}

impl Kernel {
    /// Tells the format and checks the file.
    pub fn parse(file: impl Into<Arc<Vec<u8>>>) -> Result<Kernel, KernelError> {
        let file = file.into();
        if file.starts_with(b"\x7fELF") {
            ElfKernel::parse(file).map(Kernel::Elf)
        } else if file.get(0x202..0x206) == Some(b"HdrS") {
            BzImage::parse(file).map(Kernel::BzImage)
        } else if has_section(&file, *b".linux\0\0") {
            Err(KernelError::Unified)
        } else {
            Err(KernelError::UnknownFormat)
        }
    }

    /// The whole file.
    pub fn file(&self) -> &Arc<Vec<u8>> {
        match self {
            Kernel::BzImage(kernel) => &kernel.file,
            Kernel::Elf(kernel) => &kernel.file,
        }
    }

    /// Address range that the kernel occupies before it has set up its own memory management.
    pub fn memory(&self) -> Range<u64> {
        match self {
            Kernel::BzImage(k) => {
                let body = k.body.len() as u64;
                k.pref_address..k.pref_address.saturating_add(k.init_size.max(body))
            }
            Kernel::Elf(k) => {
                let start = k.segments.first().map_or(0, |s| s.gpa);
                start..k.segments.last().map_or(start, |s| s.gpa.saturating_add(s.mem_len))
            }
        }
    }

    /// Longest command line in bytes, without the final zero.
    pub fn cmdline_max(&self) -> u32 {
        match self {
            Kernel::BzImage(k) => k.cmdline_max,
            Kernel::Elf(_) => ELF_CMDLINE_MAX,
        }
    }

    /// Highest address that the initrd may occupy.
    pub fn initrd_addr_max(&self) -> u64 {
        match self {
            Kernel::BzImage(k) => k.initrd_addr_max,
            Kernel::Elf(_) => ELF_INITRD_ADDR_MAX,
        }
    }

    /// Memory for which the file has nothing and that must be zero when the kernel starts. A bzImage clears
    /// its own.
    pub fn zeros(&self) -> Vec<Range<u64>> {
        match self {
            Kernel::BzImage(_) => Vec::new(),
            Kernel::Elf(k) => {
                let zeros = k.segments.iter().map(|s| s.gpa + s.file.len() as u64..s.gpa + s.mem_len);
                zeros.filter(|range| !range.is_empty()).collect()
            }
        }
    }

    /// Runs of contents with their addresses, page-aligned, ascending and disjoint.
    pub fn runs(&self) -> Vec<(u64, Bytes)> {
        match self {
            Kernel::BzImage(k) => {
                Bytes::window(&k.file, k.body.clone()).map(|b| (k.pref_address, b)).into_iter().collect()
            }
            Kernel::Elf(k) => k.runs(),
        }
    }
}

/// Whether the file is a PE image with a section of that name (PE format, "MS-DOS Stub", "COFF File Header",
/// "Section Table").
fn has_section(file: &[u8], name: [u8; 8]) -> bool {
    let f = Fields(file);
    let found = || {
        let pe = f.u32("e_lfanew", 0x3c).ok()? as usize;
        let (count, optional) = (f.u16("NumberOfSections", pe + 6).ok()?, f.u16("its header", pe + 20).ok()?);
        let table = pe + 24 + usize::from(optional);
        let is_pe = file.starts_with(b"MZ") && f.bytes::<4>("PE signature", pe).ok()? == *b"PE\0\0";
        let mut names = (0..usize::from(count)).map_while(|i| f.bytes::<8>("section", table + i * 40).ok());
        Some(is_pe && names.any(|section| section == name))
    };
    found().unwrap_or(false)
}
