// SPDX-License-Identifier: Apache-2.0
//! Which bytes of a PE file its Authenticode digest covers: all but the checksum, the certificate table and
//! its entry.
//!
//! "Windows Authenticode Portable Executable Signature Format" 1.0, "Calculating the PE Image Hash". UEFI
//! measures kernels by this digest, so signing a kernel does not change what PCR 4 says of it.

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
    // Sorted and apart, so that no byte is hashed twice: else 65,535 sections over one large file are as many
    // passes over it.
    bodies.sort_by_key(|span| span.start);
    let mut free = header_size;
    for body in &bodies {
        if body.start < free {
            return refuse(body.start, "a section behind the headers and the section before it");
        }
        free = body.end;
    }
    let hashed = header_size + bodies.iter().map(|span| span.len()).sum::<usize>();
    out.append(&mut bodies);
    match file.len().checked_sub(certificates) {
        Some(rest) if rest > hashed => out.push(hashed..rest),
        Some(rest) if rest == hashed => {}
        _ => return refuse(file.len(), "room for the certificate table behind what is hashed"),
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 64-bit headers of 0x200 bytes, sections as (size, start), and a certificate table of that size said to
    /// be at the end.
    fn pe(len: usize, sections: &[(u32, u32)], certificates: u32) -> Vec<u8> {
        let mut f = vec![0; len];
        let mut put = |at: usize, bytes: &[u8]| f[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"MZ");
        put(0x3c, &[0x40]);
        put(0x40, b"PE");
        put(0x46, &(sections.len() as u16).to_le_bytes());
        put(0x54, &[0xf0]);
        put(0x58, &[0x0b, 2]);
        put(0x94, &0x1000u32.to_le_bytes());
        put(0xc4, &[16]);
        put(0xec, &certificates.to_le_bytes());
        for (n, (size, start)) in sections.iter().enumerate() {
            put(0x148 + 40 * n + 16, &size.to_le_bytes());
            put(0x148 + 40 * n + 20, &start.to_le_bytes());
        }
        f
    }

    #[test]
    fn no_byte_is_hashed_twice() {
        let spans_of = |sections: &[(u32, u32)], certificates| spans(&pe(0x4000, sections, certificates));
        let apart = spans_of(&[(0x1000, 0x2000), (0x1000, 0x1000)], 0x800).expect("two sections");
        assert_eq!(apart[3..], [0x1000..0x2000, 0x2000..0x3000, 0x3000..0x3800]);
        for overlapping in [&[(0x1000, 0x1000), (0x1000, 0x1fff)][..], &[(0x1000, 0xfff)]] {
            let error = spans_of(overlapping, 0).expect_err("overlap").to_string();
            assert!(error.contains("a section behind"), "{error}");
        }
        // All of the file once more for each of the sections that fit into a table.
        let all = vec![(0x3_0000, 0x1000); 60_000];
        assert!(spans(&pe(0x4000 + 40 * 60_000, &all, 0)).is_err());
        for certificates in [0x3001, 0x4000, u32::MAX] {
            let error = spans_of(&[], certificates).expect_err("too large").to_string();
            assert!(error.contains("certificate table"), "{error}");
        }
    }

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
                prop_assert!(spans.windows(2).all(|w| w[0].end <= w[1].start));
                prop_assert!(spans.iter().map(|s| s.len()).sum::<usize>() <= bytes.len());
            }
        }
    }
}
