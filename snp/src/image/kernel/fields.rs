// SPDX-License-Identifier: Apache-2.0
//! Fields of a kernel file, read within its length and held against what a bootable kernel has there.

use super::error::KernelError;
use crate::le;

/// Lowest address at which anything of a kernel may be placed: what lies below belongs to the boot data.
pub(super) const LOWEST_LOAD_ADDRESS: u64 = 0x10_0000;

/// Little-endian fields of a file, checked against its length.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn bytes<const N: usize>(
        &self,
        what: &'static str,
        offset: usize,
    ) -> Result<[u8; N], KernelError> {
        le::get(self.0, offset).ok_or(KernelError::Truncated {
            what,
            needed: (offset + N) as u64,
            found: self.0.len() as u64,
        })
    }

    pub(super) fn u8(&self, what: &'static str, offset: usize) -> Result<u8, KernelError> {
        self.bytes::<1>(what, offset).map(|[b]| b)
    }

    pub(super) fn u16(&self, what: &'static str, offset: usize) -> Result<u16, KernelError> {
        self.bytes(what, offset).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&self, what: &'static str, offset: usize) -> Result<u32, KernelError> {
        self.bytes(what, offset).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&self, what: &'static str, offset: usize) -> Result<u64, KernelError> {
        self.bytes(what, offset).map(u64::from_le_bytes)
    }
}

/// An error unless `ok`.
pub(super) fn require(
    ok: bool,
    what: &'static str,
    offset: u64,
    found: impl Into<u64>,
    expected: &'static str,
) -> Result<(), KernelError> {
    if ok { Ok(()) } else { Err(KernelError::Field { what, offset, found: found.into(), expected }) }
}
