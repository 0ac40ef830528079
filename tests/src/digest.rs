// SPDX-License-Identifier: Apache-2.0
//! The launch digest once more, written from the firmware specification and sharing no code with cvmm.
//!
//! Input is the plan as `cvmm measure --dump` writes it: a line of JSON per run of pages, and a file with
//! their contents. The rule is SEV-SNP Firmware ABI 1.58, section 8.17.2: per page a 112-byte `PAGE_INFO`
//! with the digest so far, the hash of the contents (zero for page types whose contents are not measured),
//! length, type, VMPL permissions and address; SHA-384 over it is the next digest.

use std::io::BufRead;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
pub use guest_init::console::hex;
pub use guest_init::console::unhex;
use serde::Deserialize;
use sha2::Digest;
use sha2::Sha384;

const PAGE: usize = 4096;

/// Table 67: the types whose contents are hashed are NORMAL (1) and VMSA (2).
const MEASURED: [u8; 2] = [1, 2];

/// One line of a dump: a run of pages, in launch order.
#[derive(Deserialize)]
struct Run {
    /// The firmware's number of the page type.
    page_type: u8,
    /// Address of the first page.
    gpa: u64,
    /// Bytes of the run.
    len: u64,
    /// Where its contents are in the other file.
    offset: u64,
    /// How many bytes of contents there are; the rest of the run is zero.
    bytes: u64,
}

/// Computes the digest of a dump, in hexadecimal.
pub fn of_dump(lines: impl BufRead, contents: &[u8]) -> Result<String> {
    let mut digest = [0u8; 48];
    let mut vmsas = 0;
    for (number, line) in lines.lines().enumerate() {
        let number = number + 1;
        let run: Run = serde_json::from_str(&line?).with_context(|| format!("line {number} of the dump"))?;
        digest = extend(digest, &run, contents).with_context(|| format!("line {number} of the dump"))?;
        vmsas += usize::from(run.page_type == 2);
    }
    ensure!(vmsas > 0, "the dump has no vCPU");
    Ok(hex(&digest))
}

fn extend(mut digest: [u8; 48], run: &Run, contents: &[u8]) -> Result<[u8; 48]> {
    let (start, bytes, len) = (run.offset as usize, run.bytes as usize, run.len as usize);
    let data = contents.get(start..start + bytes).context("contents beyond the end of their file")?;
    ensure!(len > 0 && len.is_multiple_of(PAGE) && bytes <= len, "{len} bytes of pages, {bytes} of contents");
    for at in (0..len).step_by(PAGE) {
        let mut page = [0; PAGE];
        let part = &data[at.min(bytes)..(at + PAGE).min(bytes)];
        page[..part.len()].copy_from_slice(part);
        let hash: [u8; 48] =
            if MEASURED.contains(&run.page_type) { Sha384::digest(page).into() } else { [0; 48] };
        let mut info = Vec::with_capacity(112);
        info.extend_from_slice(&digest);
        info.extend_from_slice(&hash);
        info.extend_from_slice(&112u16.to_le_bytes());
        info.push(run.page_type);
        // IMI flag; permissions of VMPL 3, 2, 1; reserved.
        info.extend_from_slice(&[0; 5]);
        info.extend_from_slice(&(run.gpa + at as u64).to_le_bytes());
        digest = Sha384::digest(&info).into();
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_dumps_are_errors() {
        let vcpu = r#"{"page_type":2,"gpa":0,"len":4096,"offset":0,"bytes":4096}"#;
        assert!(of_dump(vcpu.as_bytes(), &[0; 4096]).is_ok());
        assert!(of_dump(vcpu.as_bytes(), &[0; 4095]).is_err(), "contents missing");
        assert!(of_dump(&b""[..], &[]).is_err(), "no vCPU");
        let half = r#"{"page_type":1,"gpa":0,"len":2048,"offset":0,"bytes":0}"#;
        assert!(of_dump(half.as_bytes(), &[]).is_err(), "half a page");
    }

    #[test]
    fn a_contents_bit_an_address_and_a_type_all_change_the_digest() {
        let digest = |page_type: u8, gpa: u64, byte: u8| {
            let line = |kind: u8, gpa: u64| {
                format!(r#"{{"page_type":{kind},"gpa":{gpa},"len":4096,"offset":0,"bytes":4096}}"#)
            };
            let dump = format!("{}\n{}\n", line(page_type, gpa), line(2, 1 << 47));
            of_dump(dump.as_bytes(), &[byte; 4096]).unwrap()
        };
        let all = [digest(1, 0, 0), digest(1, 0, 1), digest(1, 4096, 0), digest(3, 0, 0), digest(4, 0, 0)];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}
