// SPDX-License-Identifier: Apache-2.0
//! A file mapped read-only: an image of any size is measured without a copy of it in memory.
//!
//! It is for programs that measure with this library. cvmm reads its files into memory, so that what was measured cannot be
//! exchanged on disk before it enters the guest, and a file that is shortened meanwhile ends nothing.

#![allow(unsafe_code, reason = "mapping a file: others can change or shorten it meanwhile")]

use std::fs::File;
use std::io;

/// The bytes of a file.
pub(crate) struct Mapping(memmap2::Mmap);

impl Mapping {
    /// Maps the whole file.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // If another process changes the file, the bytes change: a digest of them is then of neither file, which a launch would
        // refuse. If it shortens the file, this process ends with SIGBUS.
        // SAFETY: the mapping is read-only and private to this type, which hands out plain shared bytes; whatever they become,
        // every parser reads each byte that it relies on through checked slices, and no memory but the file's is reached.
        let map = unsafe { memmap2::Mmap::map(file) }?;
        Ok(Mapping(map))
    }

    /// The file's bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.0
    }
}
