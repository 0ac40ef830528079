// SPDX-License-Identifier: Apache-2.0
//! Memory that is mapped into this process and that a guest, or another process, may change at any time.
//!
//! So its bytes are only ever copied in or out, never borrowed. Mapping and copying are `vm-memory`'s; here
//! is what a confidential guest needs beside them: giving pages back, hiding them, and showing another file's
//! pages in their place.

#![allow(unsafe_code, reason = "changes mappings, and has the kernel copy to and from them")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::mm::Advice;
use rustix::mm::MapFlags;
use rustix::mm::MprotectFlags;
use rustix::mm::ProtFlags;
use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestRegionMmap;
use vm_memory::MmapRegion;
use vm_memory::VolatileMemory;
use vm_memory::VolatileSlice;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::mmap::MmapRegionError;

/// Page size of the guest's page states.
pub const PAGE: u64 = snp::plan::PAGE_SIZE;

/// Memory mapped into this process, unmapped when dropped.
#[derive(Clone, Debug)]
pub struct Mapping {
    region: Arc<MmapRegion>,
}

/// An access outside of a mapping, or outside of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len:#x} bytes at {start:#x} are not all in guest RAM")]
pub struct OutsideRam {
    /// Where the access started.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl Mapping {
    /// Zero-filled memory of `len` bytes that takes host memory only where touched.
    pub fn anonymous(len: u64) -> io::Result<Self> {
        Self::build(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
    }

    /// `len` bytes of the file `fd` from `offset`, shared with everyone else who maps it.
    pub fn file(fd: impl AsFd, offset: u64, len: u64) -> io::Result<Self> {
        let file = File::from(fd.as_fd().try_clone_to_owned()?);
        Self::build(len, libc::MAP_SHARED, Some(FileOffset::new(file, offset)))
    }

    fn build(len: u64, flags: i32, file: Option<FileOffset>) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let region = MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags | libc::MAP_NORESERVE);
        let region = match file {
            Some(file) => region.with_file_offset(file),
            None => region,
        };
        match region.build() {
            Ok(region) => Ok(Mapping { region: Arc::new(region) }),
            Err(MmapRegionError::Mmap(e)) => Err(e),
            Err(e) => Err(io::Error::other(e)),
        }
    }

    /// As a region of a guest's physical memory that begins at `gpa`; `None` if it would wrap around.
    pub fn at_address(&self, gpa: u64) -> Option<GuestRegionMmap> {
        GuestRegionMmap::with_arc(Arc::clone(&self.region), GuestAddress(gpa))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.region.size() as u64
    }

    /// Whether the mapping has no bytes; the kernel never makes such a one.
    pub fn is_empty(&self) -> bool {
        self.region.size() == 0
    }

    /// Address in this process, for KVM's memory slots.
    pub fn host_address(&self) -> u64 {
        self.region.as_ptr().addr() as u64
    }

    fn at(&self, offset: u64, len: usize) -> Result<*mut u8, OutsideRam> {
        Ok(self.slice(offset, len)?.ptr_guard_mut().as_ptr())
    }

    fn slice(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_>, OutsideRam> {
        let outside = OutsideRam { start: offset, len: len as u64 };
        let start = usize::try_from(offset).map_err(|_| outside)?;
        self.region.get_slice(start, len).map_err(|_| outside)
    }

    /// Copies out of the mapping.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), OutsideRam> {
        self.slice(offset, buf.len())?.copy_to(buf);
        Ok(())
    }

    /// Copies into the mapping.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), OutsideRam> {
        self.slice(offset, data.len())?.copy_from(data);
        Ok(())
    }

    /// Copies out of the mapping by way of the kernel, so that a page which is not accessible is an error,
    /// not a crash.
    pub fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let remote = self.at(offset, buf.len()).map_err(io::Error::other)?;
        let remote = libc::iovec { iov_base: remote.cast(), iov_len: buf.len() };
        let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: both vectors describe memory of this process that is valid for their length; the kernel
        // checks access.
        let done = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        all_done(done, buf.len())
    }

    /// Copies into the mapping by way of the kernel; see [`Mapping::try_read`].
    pub fn try_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let remote = self.at(offset, data.len()).map_err(io::Error::other)?;
        let remote = libc::iovec { iov_base: remote.cast(), iov_len: data.len() };
        let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        // SAFETY: as in `try_read`; the kernel only reads the local side.
        let done = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
        all_done(done, data.len())
    }

    /// Gives the pages of a range back to the host; they read as zero afterwards.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let target = self.range(offset, len)?;
        // SAFETY: the range lies within this mapping; losing its contents is the purpose.
        unsafe { rustix::mm::madvise(target, len as usize, Advice::LinuxDontNeed) }?;
        Ok(())
    }

    /// Shows a part of the file `fd`, from `from` on, in place of `len` bytes of the mapping, which are lost.
    /// All are whole pages.
    pub fn overlay(&self, offset: u64, len: u64, fd: impl AsFd, from: u64) -> io::Result<()> {
        let target = self.range(offset, len)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range lies within this mapping, to which no reference exists, and stays mapped as long.
        unsafe {
            rustix::mm::mmap(target, len as usize, ProtFlags::READ | ProtFlags::WRITE, flags, fd, from)
        }?;
        Ok(())
    }

    /// Makes a range accessible, or an error to access, for this process and for the guest through KVM.
    pub fn set_accessible(&self, offset: u64, len: u64, accessible: bool) -> io::Result<()> {
        let target = self.range(offset, len)?;
        let flags =
            if accessible { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::empty() };
        // SAFETY: the range lies within this mapping, to which no reference exists.
        unsafe { rustix::mm::mprotect(target, len as usize, flags) }?;
        Ok(())
    }

    fn range(&self, offset: u64, len: u64) -> io::Result<*mut c_void> {
        let bytes = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let start = self.at(offset, bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        Ok(start.cast())
    }
}

fn all_done(done: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(done) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(done) if done < wanted => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hidden_page_is_an_error_and_not_a_crash() {
        let mapping = Mapping::anonymous(0x2000).unwrap();
        mapping.try_write(0xffe, &[1, 2, 3, 4]).unwrap();
        mapping.set_accessible(0x1000, 0x1000, false).unwrap();
        let mut back = [0; 4];
        assert!(mapping.try_read(0xffe, &mut back).is_err());
        assert!(mapping.try_write(0x1000, &[1]).is_err());
        mapping.set_accessible(0x1000, 0x1000, true).unwrap();
        mapping.try_read(0xffe, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
    }

    #[test]
    fn an_overlay_is_the_files_memory_and_its_surroundings_are_not() {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 0x3000).unwrap();
        let (file, mapping) = (Mapping::file(&fd, 0, 0x3000).unwrap(), Mapping::anonymous(0x3000).unwrap());
        mapping.overlay(0, 0x2000, &fd, 0x1000).unwrap();
        mapping.write(0x1ffe, &[1, 2, 3, 4]).unwrap();
        let mut back = [9; 4];
        file.read(0x2ffc, &mut back).unwrap();
        assert_eq!(back, [0, 0, 1, 2]);
        file.write(0x1000, &[7]).unwrap();
        mapping.read(0, &mut back).unwrap();
        assert_eq!(back[0], 7);
        assert!(mapping.overlay(0x2000, 0x2000, &fd, 0).is_err());
    }

    #[test]
    fn discarded_pages_read_as_zero() {
        let mapping = Mapping::anonymous(0x3000).unwrap();
        mapping.write(0x1000, &[5; 0x1000]).unwrap();
        mapping.discard(0x1000, 0x1000).unwrap();
        let mut byte = [1];
        mapping.read(0x1800, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        assert!(mapping.discard(0x2000, 0x2000).is_err());
    }
}
