// SPDX-License-Identifier: Apache-2.0
//! The attestation report: layout, field access over the received bytes, and a builder for the platform
//! model.
//!
//! SEV-SNP Firmware ABI 1.58, section 7.3, `ATTESTATION_REPORT`; report versions 2, 3 and 5. A [`Report`]
//! keeps the bytes exactly as they were received, because the signature covers those bytes and not a
//! re-encoding of known fields. Nothing in a report may be believed before its signature and its signer were
//! checked.

use std::fmt;

use sha2::Digest as _;
use sha2::Sha384;

use super::named::Mitigations;
use super::named::Version;

/// Length of a report in bytes.
pub const REPORT_LEN: usize = 0x4a0;
/// The signature covers the bytes before this offset.
pub const SIGNED_LEN: usize = 0x2a0;
/// `sig_algo` of ECDSA on P-384 with SHA-384.
pub const SIG_ALGO_ECDSA_P384_SHA384: u32 = 1;
/// Length of a signature component as stored: 48 bytes little-endian, then zeros.
pub const SIG_COMPONENT_LEN: usize = 72;

/// A field's place: offset and length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Offset of the first byte.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

impl Field {
    const fn new(offset: usize, len: usize) -> Self {
        Field { offset, len }
    }
}

/// Places of the report's fields, under the specification's names.
#[allow(missing_docs, reason = "names are those of the specification's table")]
pub mod field {
    use super::Field;
    use super::SIG_COMPONENT_LEN;

    pub const VERSION: Field = Field::new(0x000, 4);
    pub const GUEST_SVN: Field = Field::new(0x004, 4);
    pub const POLICY: Field = Field::new(0x008, 8);
    pub const FAMILY_ID: Field = Field::new(0x010, 16);
    pub const IMAGE_ID: Field = Field::new(0x020, 16);
    pub const VMPL: Field = Field::new(0x030, 4);
    pub const SIG_ALGO: Field = Field::new(0x034, 4);
    pub const CURRENT_TCB: Field = Field::new(0x038, 8);
    pub const PLATFORM_INFO: Field = Field::new(0x040, 8);
    /// Bit 0 author key present, bit 1 chip key masked, bits 4:2 signer (0 VCEK, 1 VLEK, 7 none).
    pub const KEY_INFO: Field = Field::new(0x048, 4);
    pub const REPORT_DATA: Field = Field::new(0x050, 64);
    pub const MEASUREMENT: Field = Field::new(0x090, 48);
    pub const HOST_DATA: Field = Field::new(0x0c0, 32);
    pub const ID_KEY_DIGEST: Field = Field::new(0x0e0, 48);
    pub const AUTHOR_KEY_DIGEST: Field = Field::new(0x110, 48);
    pub const REPORT_ID: Field = Field::new(0x140, 32);
    pub const REPORT_ID_MA: Field = Field::new(0x160, 32);
    pub const REPORTED_TCB: Field = Field::new(0x180, 8);
    /// CPUID family, model, stepping, one byte each; from report version 3.
    pub const CPUID_FMS: Field = Field::new(0x188, 3);
    pub const CHIP_ID: Field = Field::new(0x1a0, 64);
    pub const COMMITTED_TCB: Field = Field::new(0x1e0, 8);
    /// Firmware build, minor, major, one byte each.
    pub const CURRENT_VERSION: Field = Field::new(0x1e8, 3);
    /// Firmware build, minor, major, one byte each.
    pub const COMMITTED_VERSION: Field = Field::new(0x1ec, 3);
    pub const LAUNCH_TCB: Field = Field::new(0x1f0, 8);
    /// From report version 5.
    pub const LAUNCH_MIT_VECTOR: Field = Field::new(0x1f8, 8);
    /// From report version 5.
    pub const CURRENT_MIT_VECTOR: Field = Field::new(0x200, 8);
    /// Reserved, behind R and S: not signed.
    pub const SIGNATURE_REST: Field = Field::new(0x330, 0x170);
    pub const SIGNATURE_R: Field = Field::new(0x2a0, SIG_COMPONENT_LEN);
    pub const SIGNATURE_S: Field = Field::new(0x2e8, SIG_COMPONENT_LEN);
}

/// Why bytes are no report that this crate can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Not the length of a report.
    #[error("an attestation report has {REPORT_LEN} bytes, these are {0}")]
    Length(usize),
    /// A layout that is not known.
    #[error("report version {0} at offset 0x0 is unknown: 2, 3, 4 and 5 can be read")]
    Version(u32),
}

/// Who signed a report, as the report itself says (`key_info` bits 4:2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signer {
    /// The chip's own key.
    Vcek,
    /// A key that AMD gave to the cloud provider.
    Vlek,
    /// No one: the platform does not sign.
    None,
    /// A value that the specification reserves.
    Reserved(u8),
}

/// A report's bytes, as received.
#[derive(Clone, PartialEq, Eq)]
pub struct Report {
    bytes: [u8; REPORT_LEN],
}

impl Report {
    /// Takes `bytes` as a report if length and version are known. Says nothing about the signature.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        let bytes: [u8; REPORT_LEN] = bytes.try_into().map_err(|_| ReportError::Length(bytes.len()))?;
        let report = Report { bytes };
        match report.version() {
            2..=5 => Ok(report),
            other => Err(ReportError::Version(other)),
        }
    }

    /// All bytes.
    pub fn as_bytes(&self) -> &[u8; REPORT_LEN] {
        &self.bytes
    }

    /// The bytes that the signature covers.
    pub fn signed_bytes(&self) -> &[u8] {
        &self.bytes[..SIGNED_LEN]
    }

    /// SHA-384 of the signed bytes, by which a report is told from others. Not of all bytes: for a signature
    /// (R, S) there is a second one, (R, n - S), that anybody can make and that is as good.
    pub fn identity(&self) -> [u8; 48] {
        Sha384::digest(self.signed_bytes()).into()
    }

    /// The bytes of one field.
    pub fn bytes_of(&self, field: Field) -> &[u8] {
        self.bytes.get(field.offset..field.offset.saturating_add(field.len)).unwrap_or_default()
    }

    /// A field as an array of exactly its length; zeros if `N` is not that length.
    fn array<const N: usize>(&self, field: Field) -> [u8; N] {
        self.bytes_of(field).try_into().unwrap_or([0; N])
    }

    fn u32_at(&self, field: Field) -> u32 {
        u32::from_le_bytes(self.array(field))
    }

    fn u64_at(&self, field: Field) -> u64 {
        u64::from_le_bytes(self.array(field))
    }

    /// Report version.
    pub fn version(&self) -> u32 {
        self.u32_at(field::VERSION)
    }
    /// The owner's security version number, from the ID block.
    pub fn guest_svn(&self) -> u32 {
        self.u32_at(field::GUEST_SVN)
    }
    /// Guest policy; see [`crate::policy::GuestPolicy`].
    pub fn policy(&self) -> u64 {
        self.u64_at(field::POLICY)
    }
    /// Family, from the ID block.
    pub fn family_id(&self) -> [u8; 16] {
        self.array(field::FAMILY_ID)
    }
    /// Image, from the ID block.
    pub fn image_id(&self) -> [u8; 16] {
        self.array(field::IMAGE_ID)
    }
    /// Privilege level that the requester asked for: 0 to 3, or `0xffff_ffff` for a report that the host
    /// asked for.
    pub fn vmpl(&self) -> u32 {
        self.u32_at(field::VMPL)
    }
    /// Signature algorithm.
    pub fn sig_algo(&self) -> u32 {
        self.u32_at(field::SIG_ALGO)
    }
    /// TCB version running now, in the byte order of the product.
    pub fn current_tcb(&self) -> u64 {
        self.u64_at(field::CURRENT_TCB)
    }
    /// Platform bits: SMT, TSME, ECC and others.
    pub fn platform_info(&self) -> u64 {
        self.u64_at(field::PLATFORM_INFO)
    }
    /// `key_info`; see [`Report::signer`].
    pub fn key_info(&self) -> u32 {
        self.u32_at(field::KEY_INFO)
    }
    /// Who signed, as the report says.
    pub fn signer(&self) -> Signer {
        match (self.key_info() >> 2 & 7) as u8 {
            0 => Signer::Vcek,
            1 => Signer::Vlek,
            7 => Signer::None,
            other => Signer::Reserved(other),
        }
    }
    /// What the guest asked to have signed.
    pub fn report_data(&self) -> [u8; 64] {
        self.array(field::REPORT_DATA)
    }
    /// Launch digest.
    pub fn measurement(&self) -> [u8; 48] {
        self.array(field::MEASUREMENT)
    }
    /// What the host gave at launch.
    pub fn host_data(&self) -> [u8; 32] {
        self.array(field::HOST_DATA)
    }
    /// SHA-384 of the ID key, zero without an ID block.
    pub fn id_key_digest(&self) -> [u8; 48] {
        self.array(field::ID_KEY_DIGEST)
    }
    /// SHA-384 of the author key, zero without one.
    pub fn author_key_digest(&self) -> [u8; 48] {
        self.array(field::AUTHOR_KEY_DIGEST)
    }
    /// Identifies this guest until it ends.
    pub fn report_id(&self) -> [u8; 32] {
        self.array(field::REPORT_ID)
    }
    /// The migration agent's report id, all ones without an agent.
    pub fn report_id_ma(&self) -> [u8; 32] {
        self.array(field::REPORT_ID_MA)
    }
    /// TCB version from which the signing key is derived.
    pub fn reported_tcb(&self) -> u64 {
        self.u64_at(field::REPORTED_TCB)
    }
    /// CPUID family, model and stepping; from version 3.
    pub fn cpuid_fms(&self) -> Option<[u8; 3]> {
        (self.version() >= 3).then(|| self.array(field::CPUID_FMS))
    }
    /// The chip, zero where the platform masks it; on Turin 8 bytes, then zeros.
    pub fn chip_id(&self) -> [u8; 64] {
        self.array(field::CHIP_ID)
    }
    /// Lowest TCB version to which the platform can go back.
    pub fn committed_tcb(&self) -> u64 {
        self.u64_at(field::COMMITTED_TCB)
    }
    /// Firmware to which the platform has committed itself.
    pub fn committed_firmware(&self) -> Version {
        let [build, minor, major] = self.array(field::COMMITTED_VERSION);
        Version { major, minor, build }
    }
    /// Mitigations at launch and now; from version 5.
    pub fn mitigations(&self) -> Option<Mitigations> {
        let both = Mitigations {
            launch: self.u64_at(field::LAUNCH_MIT_VECTOR),
            current: self.u64_at(field::CURRENT_MIT_VECTOR),
        };
        (self.version() >= 5).then_some(both)
    }
    /// TCB version when the guest was launched or imported.
    pub fn launch_tcb(&self) -> u64 {
        self.u64_at(field::LAUNCH_TCB)
    }
    /// Signature component R, little-endian in 72 bytes.
    pub fn signature_r(&self) -> [u8; SIG_COMPONENT_LEN] {
        self.array(field::SIGNATURE_R)
    }
    /// Signature component S, little-endian in 72 bytes.
    pub fn signature_s(&self) -> [u8; SIG_COMPONENT_LEN] {
        self.array(field::SIGNATURE_S)
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let measurement = hex::encode(self.measurement());
        write!(
            f,
            "Report(version {}, policy {:#x}, measurement {measurement})",
            self.version(),
            self.policy()
        )
    }
}

impl From<&Report> for ReportBuilder {
    /// The report's signed part, to be signed anew.
    fn from(report: &Report) -> Self {
        let mut bytes = Box::new(report.bytes);
        bytes[SIGNED_LEN..].fill(0);
        ReportBuilder { bytes }
    }
}

/// Puts a report together, field by field. All bytes that are not set are zero.
#[derive(Clone, Debug)]
pub struct ReportBuilder {
    bytes: Box<[u8; REPORT_LEN]>,
}

impl ReportBuilder {
    /// An all-zero report of `version`, to be signed with ECDSA P-384.
    pub fn new(version: u32) -> Self {
        ReportBuilder { bytes: Box::new([0; REPORT_LEN]) }
            .set(field::VERSION, &version.to_le_bytes())
            .set(field::SIG_ALGO, &SIG_ALGO_ECDSA_P384_SHA384.to_le_bytes())
    }

    /// Sets a field; a value that is too short is filled up with zeros, one that is too long is cut.
    #[must_use]
    pub fn set(mut self, field: Field, value: &[u8]) -> Self {
        if let Some(place) = self.bytes.get_mut(field.offset..field.offset.saturating_add(field.len)) {
            let len = value.len().min(place.len());
            place.fill(0);
            place[..len].copy_from_slice(&value[..len]);
        }
        self
    }

    /// What is to be signed.
    pub fn signed_bytes(&self) -> &[u8] {
        &self.bytes[..SIGNED_LEN]
    }

    /// The finished report, with a signature given as big-endian components.
    pub fn finish(self, r: &[u8; 48], s: &[u8; 48]) -> [u8; REPORT_LEN] {
        let (mut r, mut s) = (*r, *s);
        r.reverse();
        s.reverse();
        *self.set(field::SIGNATURE_R, &r).set(field::SIGNATURE_S, &s).bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_reports_of_a_known_version_are_read() {
        assert_eq!(Report::parse(&[0; 100]), Err(ReportError::Length(100)));
        let mut bytes = [0; REPORT_LEN];
        assert_eq!(Report::parse(&bytes), Err(ReportError::Version(0)));
        bytes[0] = 6;
        assert_eq!(Report::parse(&bytes), Err(ReportError::Version(6)));
        bytes[0] = 2;
        assert_eq!(Report::parse(&bytes).unwrap().cpuid_fms(), None);
        bytes[0] = 3;
        assert_eq!(Report::parse(&bytes).unwrap().cpuid_fms(), Some([0; 3]));
    }

    #[test]
    fn the_signature_is_stored_little_endian_after_the_signed_part() {
        let mut r = [0; 48];
        r[47] = 0x11;
        let mut s = [0; 48];
        s[0] = 0x22;
        let report = ReportBuilder::new(2).finish(&r, &s);
        // Offsets from the firmware ABI's signature table: R at 0x2a0, S at 0x2e8.
        assert_eq!(report[0x2a0], 0x11);
        assert_eq!(report[0x2e8 + 47], 0x22);
        assert_eq!(report.iter().filter(|b| **b != 0).count(), 4, "version, sig_algo, R and S");
    }
}
