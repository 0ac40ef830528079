// SPDX-License-Identifier: Apache-2.0
//! Changes of IGVM files (Independent Guest Virtual Machine file format, version 1) that no writer of good
//! files makes.
//!
//! The fixed header has the variable headers' place at byte 8 and their size at 12, the file's size at 16,
//! and at 20 a CRC-32 over fixed and variable headers.

/// Length of the fixed header.
pub const FIXED: usize = 24;

/// The little-endian word at `at`.
pub fn word(file: &[u8], at: usize) -> usize {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize
}

/// The file with one more variable header at the end of the list. All headers then lie behind the data, so
/// that no other offset changes.
pub fn with_header(file: &[u8], kind: u32, body: &[u8]) -> Vec<u8> {
    let (start, size) = (word(file, 8), word(file, 12));
    let mut out = file.to_vec();
    out.resize(out.len().next_multiple_of(8), 0);
    let new_start = out.len();
    out.extend_from_slice(&file[start..start + size]);
    out.resize(out.len().next_multiple_of(8), 0);
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(8), 0);
    let size = (out.len() - new_start) as u32;
    out[8..12].copy_from_slice(&(new_start as u32).to_le_bytes());
    out[12..16].copy_from_slice(&size.to_le_bytes());
    seal(&mut out);
    out
}

/// Makes the file's size and checksum right. A file that is too short for them stays as it is.
pub fn seal(file: &mut [u8]) {
    if file.len() < FIXED {
        return;
    }
    let len = file.len() as u32;
    file[16..20].copy_from_slice(&len.to_le_bytes());
    let start = word(file, 8).min(file.len());
    let end = start.saturating_add(word(file, 12)).min(file.len());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&file[..20]);
    crc.update(&[0; 4]);
    crc.update(&file[start..end]);
    file[20..24].copy_from_slice(&crc.finalize().to_le_bytes());
}
