// SPDX-License-Identifier: Apache-2.0
//! The launch digest once more, written from the firmware specification and sharing no code with cvmm.
//!
//! Input is the plan as `cvmm measure --dump` writes it; the rule is SEV-SNP Firmware ABI 1.58, section 8.17.2: per page a
//! 112-byte `PAGE_INFO` with the digest so far, the hash of the contents (zero for page types whose contents are not
//! measured), length, type, VMPL permissions and address; SHA-384 over it is the next digest.

use std::io::BufRead;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use serde::Deserialize;
use sha2::Digest;
use sha2::Sha384;

/// One line of a dump: a page, in launch order.
#[derive(Deserialize)]
struct Page {
    gpa: u64,
    /// The firmware's number of the page type.
    #[serde(rename = "type")]
    page_type: u8,
    /// The contents in hexadecimal, of a page type whose contents are measured.
    data: Option<String>,
}

/// Table 67: the types whose contents are hashed are NORMAL (1) and VMSA (2).
const MEASURED: [u8; 2] = [1, 2];

/// Computes the digest of a dump, in hexadecimal.
pub fn of_dump(dump: impl BufRead) -> Result<String> {
    let mut digest = [0u8; 48];
    for (number, line) in dump.lines().enumerate() {
        let page: Page =
            serde_json::from_str(&line?).with_context(|| format!("line {} of the dump", number + 1))?;
        digest = extend(&digest, &page).with_context(|| format!("line {} of the dump", number + 1))?;
    }
    Ok(hex(&digest))
}

fn extend(digest: &[u8; 48], page: &Page) -> Result<[u8; 48]> {
    let contents: [u8; 48] = if MEASURED.contains(&page.page_type) {
        let data = unhex(page.data.as_deref().context("a measured page without data")?)?;
        if data.len() != 4096 {
            bail!("{} bytes in a page", data.len());
        }
        Sha384::digest(&data).into()
    } else {
        [0; 48]
    };
    let mut info = Vec::with_capacity(112);
    info.extend_from_slice(digest);
    info.extend_from_slice(&contents);
    info.extend_from_slice(&112u16.to_le_bytes());
    info.push(page.page_type);
    // IMI flag; permissions of VMPL 3, 2, 1; reserved.
    info.extend_from_slice(&[0; 5]);
    info.extend_from_slice(&page.gpa.to_le_bytes());
    Ok(Sha384::digest(&info).into())
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of a hexadecimal string.
pub fn unhex(text: &str) -> Result<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        bail!("not an even number of hexadecimal digits");
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).context("not a hexadecimal digit"))
        .collect()
}
