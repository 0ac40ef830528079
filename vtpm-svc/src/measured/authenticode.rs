// SPDX-License-Identifier: Apache-2.0
//! Which bytes of a PE file its Authenticode digest covers: all but the checksum, the certificate table and its entry.
//!
//! "Windows Authenticode Portable Executable Signature Format" 1.0, "Calculating the PE Image Hash". UEFI measures kernels
//! by this digest, so signing a kernel does not change what PCR 4 says of it.

use std::ops::Range;

/// A file that is not a PE file, or one that lies about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("PE file, offset {offset}: expected {expected}")]
pub struct PeError {
    /// Where.
    pub offset: usize,
    /// What should be there.
    pub expected: &'static str,
}

fn number(file: &[u8], offset: usize, n: usize, expected: &'static str) -> Result<usize, PeError> {
    let bytes =
        offset.checked_add(n).and_then(|end| file.get(offset..end)).ok_or(PeError { offset, expected })?;
    Ok(bytes.iter().rev().fold(0, |v, b| v << 8 | usize::from(*b)))
}

/// The spans to hash, in order.
pub fn spans(file: &[u8]) -> Result<Vec<Range<usize>>, PeError> {
    let refuse = |offset, expected| Err(PeError { offset, expected });
    if file.get(..2) != Some(b"MZ") {
        return refuse(0, "`MZ`");
    }
    let pe = number(file, 0x3c, 4, "the offset of the PE header")?;
    if number(file, pe, 4, "`PE`")? != 0x4550 {
        return refuse(pe, "`PE`");
    }
    let sections = number(file, pe + 6, 2, "a section count")?;
    let optional_size = number(file, pe + 20, 2, "the size of the optional header")?;
    let optional = pe + 24;
    // The data directories follow after 96 bytes in 32-bit headers and after 112 in 64-bit ones.
    let directories = match number(file, optional, 2, "a magic number")? {
        0x10b => optional + 96,
        0x20b => optional + 112,
        _ => return refuse(optional, "0x10b or 0x20b"),
    };
    let header_size = number(file, optional + 60, 4, "the size of the headers")?;
    let checksum = optional + 64;
    let count = number(file, directories - 4, 4, "the number of data directories")?;
    if header_size > file.len() || header_size < directories {
        return refuse(optional + 60, "headers within the file");
    }
    let mut certificates = 0;
    let mut out = if count > 4 {
        let entry = directories + 4 * 8;
        certificates = number(file, entry + 4, 4, "the size of the certificate table")?;
        if entry + 8 > header_size {
            return refuse(entry, "a certificate entry within the headers");
        }
        vec![0..checksum, checksum + 4..entry, entry + 8..header_size]
    } else {
        vec![0..checksum, checksum + 4..header_size]
    };
    let mut bodies = Vec::new();
    for n in 0..sections {
        let at = optional + optional_size + n * 40;
        let size = number(file, at + 16, 4, "the size of a section")?;
        let start = number(file, at + 20, 4, "the start of a section")?;
        if size == 0 {
            continue;
        }
        match start.checked_add(size) {
            Some(end) if end <= file.len() => bodies.push(start..end),
            _ => return refuse(at + 16, "a section within the file"),
        }
    }
    bodies.sort_by_key(|span| span.start);
    let hashed = header_size + bodies.iter().map(|span| span.len()).sum::<usize>();
    out.append(&mut bodies);
    let rest = file.len().saturating_sub(certificates);
    if rest > hashed {
        out.push(hashed..rest);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_file_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), named in any::<bool>()) {
            if named && bytes.len() > 0x100 {
                bytes[..2].copy_from_slice(b"MZ");
                bytes[0x3c..0x40].copy_from_slice(&[0x40, 0, 0, 0]);
                bytes[0x40..0x44].copy_from_slice(b"PE\0\0");
                bytes[0x46..0x48].copy_from_slice(&[1, 0]);
                bytes[0x58..0x5a].copy_from_slice(&[0x0b, 2]);
                bytes[0x94..0x98].copy_from_slice(&[0xe0, 0, 0, 0]);
            }
            if let Ok(spans) = spans(&bytes) {
                prop_assert!(spans.iter().all(|s| s.end <= bytes.len() && s.start <= s.end));
            }
        }
    }
}
