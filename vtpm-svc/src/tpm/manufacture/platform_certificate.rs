// SPDX-License-Identifier: Apache-2.0
//! The platform certificate: who made the platform that the TPM sits in, as a file that the operator has from
//! there.
//!
//! TCG Platform Certificate Profile 1.1 (an X.509 attribute certificate, RFC 5755, or a public-key
//! certificate). Its signature is not judged here: the issuer is the platform's maker, whom only a verifier
//! can know. What is checked is that the file is one certificate in DER and nothing else, and that the engine
//! can hold it.

use std::io::Read;
use std::path::Path;
use std::path::PathBuf;

use x509_cert::der::Decode;
use x509_cert::der::Reader;
use x509_cert::der::SliceReader;
use x509_cert::der::Tag;
use x509_cert::der::Tagged;
use x509_cert::der::asn1::AnyRef;

/// First NV index of platform certificates (TCG Registry of Reserved TPM 2.0 Handles and Localities).
pub const INDEX: u32 = 0x01c0_8000;
/// Largest NV index of the engine.
pub const LARGEST: usize = 2048;

/// A file that cannot be a platform certificate.
#[derive(Debug, thiserror::Error)]
#[error("platform certificate {path}: {problem}")]
pub struct PlatformError {
    path: PathBuf,
    problem: String,
}

/// Reads and checks the file.
pub fn read(path: &Path) -> Result<Vec<u8>, PlatformError> {
    let refuse = |problem: String| PlatformError { path: path.to_path_buf(), problem };
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(LARGEST as u64 + 1).read_to_end(&mut bytes))
        .map_err(|e| refuse(e.to_string()))?;
    check(&bytes).map_err(refuse)?;
    Ok(bytes)
}

/// Whether these bytes are one X.509 certificate of either kind, in DER.
fn check(bytes: &[u8]) -> Result<(), String> {
    if bytes.len() > LARGEST {
        return Err(format!("more than {LARGEST} bytes, which is what an index of this TPM holds"));
    }
    if bytes.starts_with(b"-----") {
        return Err("this is PEM; convert it to DER first".into());
    }
    let not_der = |e: x509_cert::der::Error| format!("not a certificate in DER: {e}");
    let whole = AnyRef::from_der(bytes).map_err(not_der)?;
    let fields = elements(whole).map_err(not_der)?;
    let tags: Vec<Tag> = fields.iter().map(|f| f.tag()).collect();
    // Both kinds are signed in the same way: contents, algorithm, signature.
    if whole.tag() != Tag::Sequence || tags != [Tag::Sequence, Tag::Sequence, Tag::BitString] {
        return Err("not a certificate in DER: expected contents, algorithm and signature".into());
    }
    let contents = elements(fields[0]).map_err(not_der)?;
    // An attribute certificate begins with its version, 1; a public-key certificate with a tagged version.
    let attribute = contents.first().is_some_and(|v| v.tag() == Tag::Integer && v.value() == [1]);
    if attribute && contents.get(1).is_some_and(|holder| holder.tag() == Tag::Sequence) {
        return Ok(());
    }
    x509_cert::Certificate::from_der(bytes)
        .map(|_| ())
        .map_err(|e| format!("neither an attribute certificate nor a public-key certificate: {e}"))
}

fn elements(sequence: AnyRef<'_>) -> x509_cert::der::Result<Vec<AnyRef<'_>>> {
    let mut reader = SliceReader::new(sequence.value())?;
    let mut out = Vec::new();
    while !reader.is_finished() {
        out.push(AnyRef::decode(&mut reader)?);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An attribute certificate laid out by hand after RFC 5755, section 4.1: version 1, a holder, the rest
    /// left out.
    const ATTRIBUTE: &[u8] = &[
        0x30, 0x11, // signed
        0x30, 0x09, 0x02, 0x01, 0x01, 0x30, 0x04, 0xa1, 0x02, 0x04, 0x00, // contents
        0x30, 0x02, 0x06, 0x00, // algorithm
        0x03, 0x00, // signature
    ];

    #[test]
    fn an_attribute_certificate_is_taken_and_what_is_almost_one_is_not() {
        check(ATTRIBUTE).expect("an attribute certificate");
        let refuse = |bytes: &[u8]| check(bytes).expect_err("refused");
        assert!(refuse(&[ATTRIBUTE, &[0]].concat()).contains("DER"), "a byte behind it");
        assert!(refuse(&ATTRIBUTE[..18]).contains("DER"), "a byte missing");
        assert!(refuse(b"-----BEGIN ATTRIBUTE CERTIFICATE-----").contains("PEM"));
        assert!(refuse(&[0x30; 2049]).contains("2048"));
        assert!(refuse(&[]).contains("DER"));
        let mut version_two = ATTRIBUTE.to_vec();
        version_two[6] = 2;
        assert!(refuse(&version_two).contains("neither"));
    }

    proptest! {
        #[test]
        fn no_file_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), at in 0usize..19, v in any::<u8>()) {
            let _ = check(&bytes);
            bytes.clear();
            bytes.extend_from_slice(ATTRIBUTE);
            bytes[at] = v;
            let _ = check(&bytes);
        }
    }
}
