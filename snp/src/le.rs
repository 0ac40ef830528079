// SPDX-License-Identifier: Apache-2.0
//! Little-endian fields of pages, files and messages.

/// `N` bytes from `at` on, if there are as many.
pub fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// The same of bytes whose length is known to suffice: zeros if it does not.
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    get(bytes, at).unwrap_or([0; N])
}

/// Two bytes as a number; see [`array()`].
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

/// Four bytes as a number; see [`array()`].
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

/// Eight bytes as a number; see [`array()`].
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}
