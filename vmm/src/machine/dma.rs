// SPDX-License-Identifier: Apache-2.0
//! The one door through which devices reach guest memory.
//!
//! A device may touch a page of an SNP guest only while it is shared. The shared side of a private page is
//! other memory: what is read there means nothing, and what is written there takes host memory that nothing
//! gives back; in strict runs of the emulated platform it is closed, and a load from it would end the
//! monitor. The guest can convert a page at any moment, also one that it has just given to a device. So there
//! are two ways in:
//!
//! - **Copies** of rings, headers and status bytes, by [`vm_memory::GuestMemory`], as `virtio-queue` wants
//!   it. As long as a slice lives, its range is held ([`Conversions::hold_shared`]): a conversion waits for
//!   the end of the copy. No slice may live while something else is waited for.
//! - **Transfers** of payload by system calls ([`Dma::transfer`]). These may take as long as a disk takes,
//!   and a conversion does not wait for disks. The kernel finds a page that is closed meanwhile, which is an
//!   error of the transfer (EFAULT); what was written to a page that has become private is given back at its
//!   end.
//!
//! Refusals are counted: a correct driver never causes one.

#![allow(unsafe_code, reason = "slices of guest memory for vm-memory, vectors of it for system calls")]

use std::fmt;
use std::io;
use std::iter::FusedIterator;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;
use vm_memory::GuestMemory;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryError;
use vm_memory::GuestMemoryMmap;
use vm_memory::Permissions;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BS;
use vm_memory::bitmap::Bitmap;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::guest_memory::GuestMemorySliceIterator;

use super::conversion::Conversions;
use super::conversion::Held;
use super::conversion::RangeState;
use super::ram::GuestRam;

/// A guest's memory, for its devices.
#[derive(Clone)]
pub struct Dma(Arc<Inside>);

struct Inside {
    ram: GuestRam,
    /// `None` in a plain guest: all memory is shared.
    conversions: Option<Arc<Conversions>>,
    refused: AtomicU64,
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device writes to guest memory.
    ToGuest,
    /// The device reads it.
    FromGuest,
}

impl Dma {
    /// The memory of a guest whose pages change state by `conversions`; `None`: they do not.
    pub fn new(ram: GuestRam, conversions: Option<Arc<Conversions>>) -> Self {
        Dma(Arc::new(Inside { ram, conversions, refused: AtomicU64::new(0) }))
    }

    /// How many regions RAM has; each is a memory slot.
    pub fn regions(&self) -> usize {
        self.0.ram.regions().len()
    }

    /// How often a device was told to access memory that is not shared RAM.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    fn refuse(&self, gpa: u64) -> GuestMemoryError {
        self.0.refused.fetch_add(1, Ordering::Relaxed);
        GuestMemoryError::InvalidGuestAddress(GuestAddress(gpa))
    }

    /// Memory for system calls to read or write, if all of it is shared RAM now.
    pub fn transfer(
        &self,
        gpa: u64,
        len: u64,
        direction: Direction,
    ) -> Result<Transfer<'_>, GuestMemoryError> {
        let shared = |conversions: &Arc<Conversions>| conversions.state(gpa, len) == RangeState::Shared;
        let Ok(parts) = self.0.ram.parts(gpa, len) else { return Err(self.refuse(gpa)) };
        if len > 0 && !self.0.conversions.as_ref().is_none_or(shared) {
            return Err(self.refuse(gpa));
        }
        let vectors = parts.map(|part| {
            let mapping = &self.0.ram.regions()[part.region].mapping;
            let address = mapping.host_address() + part.offset;
            libc::iovec { iov_base: address as *mut libc::c_void, iov_len: part.len as usize }
        });
        Ok(Transfer { dma: self, gpa, len, direction, vectors: vectors.collect() })
    }
}

/// Guest memory that a system call reads or writes.
pub struct Transfer<'a> {
    dma: &'a Dma,
    gpa: u64,
    len: u64,
    direction: Direction,
    vectors: Vec<libc::iovec>,
}

impl Transfer<'_> {
    /// The memory as vectors; valid as long as this object.
    pub fn vectors(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// Reads from `file` at `offset` into guest memory; how many bytes.
    pub fn read_at(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        if self.direction != Direction::ToGuest {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a transfer from the guest"));
        }
        let (vectors, count, offset) = self.arguments(offset)?;
        // SAFETY: the vectors are parts of mappings that live as long as the guest's memory; the kernel
        // checks access.
        done(unsafe { libc::preadv64(file.as_fd().as_raw_fd(), vectors, count, offset) })
    }

    /// Writes guest memory to `file` at `offset`; how many bytes.
    pub fn write_at(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let (vectors, count, offset) = self.arguments(offset)?;
        // SAFETY: as in `read_at`; the kernel only reads this memory.
        done(unsafe { libc::pwritev64(file.as_fd().as_raw_fd(), vectors, count, offset) })
    }

    fn arguments(&self, offset: u64) -> io::Result<(*const libc::iovec, libc::c_int, i64)> {
        let invalid = |_| io::ErrorKind::InvalidInput;
        let count = self.vectors.len().try_into().map_err(invalid)?;
        Ok((self.vectors.as_ptr(), count, offset.try_into().map_err(invalid)?))
    }
}

fn done(bytes: isize) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::Error::last_os_error())
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        if self.direction == Direction::ToGuest
            && let Some(conversions) = &self.dma.0.conversions
        {
            // Host memory that cannot be given back now is given back at the guest's end.
            let _ = conversions.settle(self.gpa, self.len);
        }
    }
}

/// `vm-memory`'s place for a record of writes, which holds the range of a slice instead.
pub struct Holding;

/// Keeps the range of a slice as it is, while a clone of it lives.
#[derive(Clone, Debug)]
pub struct Hold<'a> {
    _range: Option<Arc<Held<'a>>>,
}

impl<'a> WithBitmapSlice<'a> for Holding {
    type S = Hold<'a>;
}

impl Bitmap for Holding {
    fn mark_dirty(&self, _: usize, _: usize) {}

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, _: usize) -> Hold<'_> {
        Hold { _range: None }
    }
}

impl<'a> WithBitmapSlice<'_> for Hold<'a> {
    type S = Hold<'a>;
}

impl BitmapSlice for Hold<'_> {}

impl Bitmap for Hold<'_> {
    fn mark_dirty(&self, _: usize, _: usize) {}

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, _: usize) -> Self {
        self.clone()
    }
}

/// Slices of a range, each of which holds all of it.
struct Slices<'a, I> {
    inner: I,
    hold: Hold<'a>,
}

impl<'a, I: Iterator<Item = Result<VolatileSlice<'a>, GuestMemoryError>>> Iterator for Slices<'a, I> {
    type Item = Result<VolatileSlice<'a, Hold<'a>>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        let slice = match self.inner.next()? {
            Ok(slice) => slice,
            Err(e) => return Some(Err(e)),
        };
        let (address, len) = (slice.ptr_guard_mut().as_ptr(), slice.len());
        // SAFETY: the bytes of a slice of the guest's memory, which lives as long.
        Some(Ok(unsafe { VolatileSlice::with_bitmap(address, len, self.hold.clone(), None) }))
    }
}

impl<'a, I> FusedIterator for Slices<'a, I> where
    I: FusedIterator<Item = Result<VolatileSlice<'a>, GuestMemoryError>>
{
}

impl<'a, I> GuestMemorySliceIterator<'a, Hold<'a>> for Slices<'a, I> where
    I: FusedIterator<Item = Result<VolatileSlice<'a>, GuestMemoryError>>
{
}

impl GuestMemory for Dma {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = Holding;

    /// Whether all of it is shared RAM, which holds for this moment only.
    fn check_range(&self, addr: GuestAddress, count: usize, _: Permissions) -> bool {
        let inside = GuestMemoryBackend::check_range(self.0.ram.memory(), addr, count);
        let shared = |conversions: &Arc<Conversions>| {
            count == 0 || conversions.state(addr.0, count as u64) == RangeState::Shared
        };
        inside && self.0.conversions.as_ref().is_none_or(shared)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        let memory = self.0.ram.memory();
        if !GuestMemoryBackend::check_range(memory, addr, count) {
            return Err(self.refuse(addr.0));
        }
        let hold = match &self.0.conversions {
            Some(conversions) if count > 0 => {
                let held = conversions.hold_shared(addr.0, count as u64);
                Hold { _range: Some(Arc::new(held.ok_or_else(|| self.refuse(addr.0))?)) }
            }
            _ => Hold { _range: None },
        };
        Ok(Slices { inner: GuestMemoryBackend::get_slices(memory, addr, count), hold })
    }
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dma({} refused)", self.refused())
    }
}

#[cfg(test)]
#[path = "dma_test.rs"]
mod dma_test;
