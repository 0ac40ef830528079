// SPDX-License-Identifier: Apache-2.0
//! Evidence as people hold it: a report alone, with a certificate table behind it, or in the envelope of a
//! paravisor; certificates as files or as a table.
//!
//! Every form is told by its first bytes or its length, and none is believed: what comes out is checked as if
//! it had been given piece by piece. Forms: GHCB specification, section 4.1.8.1 (the table), which is also
//! what the kernel's `tsm` interface gives as `auxblob`; the attestation data of Azure's confidential VMs
//! (`HCLA`), read from Microsoft's published headers and a public example.

use sha2::Digest as _;
use sha2::Sha256;
use sha2::Sha384;
use sha2::Sha512;

use super::cert::Cert;
use super::cert::CertError;
use super::cert_table;
use super::cert_table::Kind;
use super::cert_table::TableError;
use super::report::REPORT_LEN;
use super::report::Report;
use super::report::ReportError;
use crate::le;

/// First bytes of an envelope.
const ENVELOPE: &[u8; 4] = b"HCLA";
/// Length of the envelope's header; the report follows.
const ENVELOPE_HEADER: usize = 0x20;
/// Where the kind of request stands in the header, and its value for SNP.
const REQUEST: (usize, u32) = (0x0c, 2);
/// Length of the header of the runtime data: five words of 32 bits.
const DATA_HEADER: usize = 0x14;

/// Why bytes are no evidence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum EvidenceError {
    /// Of no form.
    #[error(
        "{0} bytes that are no evidence: expected a report (1184 bytes, or 2368 hexadecimal digits), a report with a certificate table \
         behind it, or an envelope that begins with 'HCLA'"
    )]
    Form(usize),
    /// No report where one should be.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// No table behind the report.
    #[error("behind the report, counted from offset 0x4a0: {0}")]
    Table(#[from] TableError),
    /// A file of certificates.
    #[error(transparent)]
    Certificates(#[from] CertError),
    /// A certificate of a table.
    #[error("the table's {kind}: {source}")]
    Cert { kind: Kind, source: CertError },
    /// An envelope that is cut, or for something else.
    #[error("the envelope at offset {offset:#x}: {reason}")]
    Envelope { offset: usize, reason: &'static str },
}

/// What a paravisor had signed along: `report_data` is its hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeData {
    /// Kind of hash: 1 SHA-256, 2 SHA-384, 3 SHA-512.
    pub hash_kind: u32,
    /// The data, a JSON text.
    pub bytes: Vec<u8>,
}

impl RuntimeData {
    /// What `report_data` must be: the hash, then zeros. `None` for a kind that is not known.
    pub fn hash(&self) -> Option<[u8; 64]> {
        let mut out = [0; 64];
        match self.hash_kind {
            1 => out[..32].copy_from_slice(&Sha256::digest(&self.bytes)),
            2 => out[..48].copy_from_slice(&Sha384::digest(&self.bytes)),
            3 => out.copy_from_slice(&Sha512::digest(&self.bytes)),
            _ => return None,
        }
        Some(out)
    }
}

/// A report and what came with it.
#[derive(Clone, Debug)]
pub struct Collected {
    /// The report.
    pub report: Report,
    /// Certificates from the same file.
    pub certificates: Vec<Cert>,
    /// Data from the same file.
    pub runtime_data: Option<RuntimeData>,
}

/// Reads a report in any of its forms.
pub fn read(file: &[u8]) -> Result<Collected, EvidenceError> {
    let plain = |report: &[u8]| {
        Ok(Collected { report: Report::parse(report)?, certificates: Vec::new(), runtime_data: None })
    };
    if file.starts_with(ENVELOPE) {
        return envelope(file);
    }
    match file.split_at_checked(REPORT_LEN) {
        Some((report, [])) => plain(report),
        Some((_, rest))
            if rest.len() >= REPORT_LEN
                && file.iter().all(|b| b.is_ascii_hexdigit() || b.is_ascii_whitespace()) =>
        {
            let digits: Vec<u8> = file.iter().copied().filter(u8::is_ascii_hexdigit).collect();
            let bytes = hex::decode(digits).map_err(|_| EvidenceError::Form(file.len()))?;
            plain(&bytes)
        }
        Some((report, table)) => {
            let mut collected = plain(report)?;
            collected.certificates = certificates_of(cert_table::parse(table)?)?;
            Ok(collected)
        }
        None => Err(EvidenceError::Form(file.len())),
    }
}

/// Reads certificates: DER, PEM, or a table.
pub fn read_certificates(file: &[u8]) -> Result<Vec<Cert>, EvidenceError> {
    // A table begins with a GUID of one of its kinds.
    let kinds = [Kind::ARK, Kind::ASK, Kind::VCEK, Kind::VLEK, Kind::CRL];
    if kinds.iter().any(|kind| file.starts_with(&kind.0)) {
        return certificates_of(cert_table::parse(file)?);
    }
    Ok(Cert::read_all(file)?)
}

fn certificates_of(table: Vec<(Kind, &[u8])>) -> Result<Vec<Cert>, EvidenceError> {
    let known = [Kind::ARK, Kind::ASK, Kind::VCEK, Kind::VLEK];
    let certificates = table.into_iter().filter(|(kind, _)| known.contains(kind));
    certificates
        .map(|(kind, der)| Cert::from_der(der).map_err(|source| EvidenceError::Cert { kind, source }))
        .collect()
}

fn word(file: &[u8], offset: usize) -> Result<u32, EvidenceError> {
    let cut = EvidenceError::Envelope { offset, reason: "expected four more bytes, found the end" };
    le::get(file, offset).map(u32::from_le_bytes).ok_or(cut)
}

fn envelope(file: &[u8]) -> Result<Collected, EvidenceError> {
    let (offset, snp) = REQUEST;
    if word(file, offset)? != snp {
        return Err(EvidenceError::Envelope { offset, reason: "expected 2: an SNP report" });
    }
    let data = ENVELOPE_HEADER + REPORT_LEN;
    let report = file.get(ENVELOPE_HEADER..data).ok_or(EvidenceError::Envelope {
        offset: ENVELOPE_HEADER,
        reason: "expected a report of 1184 bytes, found the end",
    })?;
    // Size of all, version, kind of report, kind of hash, size of what follows.
    let (hash_kind, length) = (word(file, data + 12)?, word(file, data + 16)? as usize);
    let start = data + DATA_HEADER;
    let bytes =
        start.checked_add(length).and_then(|end| file.get(start..end)).ok_or(EvidenceError::Envelope {
            offset: data + 16,
            reason: "the runtime data is longer than the file",
        })?;
    let runtime_data = (length > 0).then(|| RuntimeData { hash_kind, bytes: bytes.to_vec() });
    Ok(Collected { report: Report::parse(report)?, certificates: Vec::new(), runtime_data })
}
