// SPDX-License-Identifier: Apache-2.0
//! Fields of records that are read from a file.

/// The `N` bytes at an offset that the caller has checked.
pub(crate) fn array<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut v = [0; N];
    v.copy_from_slice(&b[at..at + N]);
    v
}
