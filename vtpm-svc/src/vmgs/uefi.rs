// SPDX-License-Identifier: Apache-2.0
//! UEFI variables as file 1 holds them: records back to back, unaligned, with nothing behind the last.
//!
//! A record: type u32 = 0, length u32, attributes u32, time (16 bytes), vendor GUID (16 bytes), bytes of name
//! u16, bytes of data u16, the name in UTF-16 with its final zero, the data. The contents come from firmware
//! and so from the guest.

/// Bytes in front of the name.
const HEADER: usize = 48;
/// Longest name in bytes, the final zero included.
const NAME_MAX: usize = 2048;
/// Longest data.
const DATA_MAX: usize = 32_768;
/// The file stays below this size.
const FILE_MAX: usize = 131_072;

/// One variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    /// Attribute bits of the UEFI specification.
    pub attributes: u32,
    /// `EFI_TIME` of the last authenticated write.
    pub time: [u8; 16],
    /// Vendor GUID as stored.
    pub vendor: [u8; 16],
    /// UTF-16 code units, without the final zero.
    pub name: Vec<u16>,
    /// The value.
    pub data: Vec<u8>,
}

impl Variable {
    /// The name, with what is not Unicode replaced.
    pub fn name_text(&self) -> String {
        String::from_utf16_lossy(&self.name)
    }
}

/// A file of variables that is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("UEFI variables, offset {offset}: expected {expected}")]
pub struct RecordError {
    /// Where.
    pub offset: usize,
    /// What should be there.
    pub expected: &'static str,
}

fn number(bytes: &[u8], at: usize, n: usize) -> usize {
    bytes[at..at + n].iter().rev().fold(0, |v, b| v << 8 | usize::from(*b))
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Reads all records.
pub fn parse(file: &[u8]) -> Result<Vec<Variable>, RecordError> {
    let refuse = |offset, expected| Err(RecordError { offset, expected });
    if file.len() >= FILE_MAX {
        return refuse(FILE_MAX, "the end of the file");
    }
    let mut out = Vec::new();
    let mut at = 0;
    while at < file.len() {
        let rest = &file[at..];
        if rest.len() < HEADER {
            return refuse(at, "a whole record");
        }
        if number(rest, 0, 4) != 0 {
            return refuse(at, "record type 0");
        }
        let length = number(rest, 4, 4);
        if !(HEADER..=rest.len()).contains(&length) {
            return refuse(at + 4, "a length within the file");
        }
        let (name, data) = (number(rest, 44, 2), number(rest, 46, 2));
        if name + data != length - HEADER {
            return refuse(at + 44, "sizes of name and data that add up to the length");
        }
        if name > NAME_MAX || data > DATA_MAX {
            return refuse(at + 44, "sizes within the limits");
        }
        let units: Vec<u16> =
            rest[HEADER..HEADER + name].chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
        match units.split_last() {
            Some((0, name_units)) if name % 2 == 0 => out.push(Variable {
                attributes: number(rest, 8, 4) as u32,
                time: take(rest, 12),
                vendor: take(rest, 28),
                name: name_units.to_vec(),
                data: rest[HEADER + name..length].to_vec(),
            }),
            _ => return refuse(at + HEADER, "a name with a final zero"),
        }
        at += length;
    }
    Ok(out)
}

/// Writes records, or says which does not fit.
pub fn write(variables: &[Variable]) -> Result<Vec<u8>, RecordError> {
    let mut out = Vec::new();
    for v in variables {
        let name = v.name.len() * 2 + 2;
        if name > NAME_MAX || v.data.len() > DATA_MAX {
            return Err(RecordError { offset: out.len(), expected: "name and data within the limits" });
        }
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&((HEADER + name + v.data.len()) as u32).to_le_bytes());
        out.extend_from_slice(&v.attributes.to_le_bytes());
        out.extend_from_slice(&v.time);
        out.extend_from_slice(&v.vendor);
        out.extend_from_slice(&(name as u16).to_le_bytes());
        out.extend_from_slice(&(v.data.len() as u16).to_le_bytes());
        v.name.iter().chain(&[0]).for_each(|unit| out.extend_from_slice(&unit.to_le_bytes()));
        out.extend_from_slice(&v.data);
        if out.len() >= FILE_MAX {
            return Err(RecordError { offset: FILE_MAX, expected: "the end of the file" });
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Laid out by hand: a variable `A` with the value 7.
    fn record() -> Vec<u8> {
        let mut r = vec![0, 0, 0, 0, 53, 0, 0, 0, 7, 0, 0, 0];
        r.extend([0x11; 16]);
        r.extend([0x22; 16]);
        r.extend([4, 0, 1, 0, b'A', 0, 0, 0, 7]);
        r
    }

    #[test]
    fn a_record_reads_and_writes_back() {
        let two = [record(), record()].concat();
        let variables = parse(&two).expect("records");
        assert_eq!(
            (variables.len(), variables[1].name_text().as_str(), variables[1].data.as_slice()),
            (2, "A", &[7][..])
        );
        assert_eq!(write(&variables).expect("write"), two);
        assert!(parse(&[]).expect("none").is_empty());
    }

    #[test]
    fn each_lie_has_its_offset() {
        let patched = |at: usize, v: u8| {
            let mut r = record();
            r[at] = v;
            parse(&r).expect_err("refused").offset
        };
        assert_eq!(patched(0, 1), 0, "type");
        assert_eq!(patched(4, 54), 4, "length past the end");
        assert_eq!(patched(4, 47), 4, "length below the header");
        assert_eq!(patched(46, 2), 44, "sizes that do not add up");
        assert_eq!(patched(50, 1), 48, "no final zero");
        let stray = [record(), vec![0; 7]].concat();
        assert_eq!(parse(&stray).expect_err("stray bytes").offset, 53);
        assert!(parse(&vec![0; FILE_MAX]).is_err());
    }

    proptest! {
        #[test]
        fn no_file_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), patch in 0usize..53, v in any::<u8>()) {
            let _ = parse(&bytes);
            let mut r = record();
            r[patch] = v;
            if let Ok(variables) = parse(&r) {
                prop_assert_eq!(write(&variables).expect("what was read fits"), r);
            }
        }
    }
}
