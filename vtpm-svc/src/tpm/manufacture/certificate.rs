// SPDX-License-Identifier: Apache-2.0
//! Certificates as this host signs them: ECDSA on P-384 with SHA-384, without an end (RFC 5280).

use p384::ecdsa::DerSignature;
use p384::ecdsa::SigningKey;
use p384::ecdsa::signature::Signer;
use p384::pkcs8::EncodePublicKey;
use sha2::Digest;
use sha2::Sha256;
use x509_cert::Certificate;
use x509_cert::TbsCertificate;
use x509_cert::Version;
use x509_cert::der;
use x509_cert::der::DateTime;
use x509_cert::der::Decode;
use x509_cert::der::Encode;
use x509_cert::der::asn1::BitString;
use x509_cert::der::asn1::OctetString;
use x509_cert::der::asn1::UtcTime;
use x509_cert::der::oid::AssociatedOid;
use x509_cert::der::oid::ObjectIdentifier;
use x509_cert::ext::Extension;
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::AlgorithmIdentifierOwned;
use x509_cert::spki::SubjectPublicKeyInfoOwned;
use x509_cert::time::Time;
use x509_cert::time::Validity;

use super::error::ManufactureError;

/// ecdsa-with-SHA384 (RFC 5758).
const SIGNATURE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");

/// Random bytes of the operating system.
pub(super) fn random<const N: usize>() -> Result<[u8; N], ManufactureError> {
    let mut bytes = [0; N];
    crate::vmgs::crypto::fill_random(&mut bytes).map_err(|_| ManufactureError::NoEntropy)?;
    Ok(bytes)
}

/// What a certificate of a key says of it.
pub(super) fn public_key(key: &SigningKey) -> Result<SubjectPublicKeyInfoOwned, ManufactureError> {
    let document = key.verifying_key().to_public_key_der().map_err(|_| ManufactureError::PublicKey)?;
    Ok(SubjectPublicKeyInfoOwned::from_der(document.as_bytes())?)
}

/// RFC 7093, method 1: the first 20 bytes of SHA-256, here over the whole key information.
pub(super) fn key_id(key: &SubjectPublicKeyInfoOwned) -> der::Result<OctetString> {
    OctetString::new(&Sha256::digest(key.to_der()?)[..20])
}

/// An extension with this value.
pub(super) fn extension<T: AssociatedOid + Encode>(critical: bool, value: &T) -> der::Result<Extension> {
    Ok(Extension { extn_id: T::OID, critical, extn_value: OctetString::new(value.to_der()?)? })
}

/// A signed certificate.
pub(super) fn certify(
    signer: &SigningKey,
    issuer: &Name,
    subject: &Name,
    subject_public_key_info: SubjectPublicKeyInfoOwned,
    extensions: Vec<Extension>,
) -> Result<Certificate, ManufactureError> {
    let signature_algorithm = AlgorithmIdentifierOwned { oid: SIGNATURE, parameters: None };
    // Positive, and never longer than the standard's 20 bytes.
    let mut serial = random::<16>()?;
    serial[0] = serial[0] & 0x7f | 0x40;
    // From a fixed day on and, as the profile has it for keys of hardware, without an end.
    let begin = UtcTime::from_date_time(DateTime::new(2024, 1, 1, 0, 0, 0)?)?;
    let tbs_certificate = TbsCertificate {
        version: Version::V3,
        serial_number: SerialNumber::new(&serial)?,
        signature: signature_algorithm.clone(),
        issuer: issuer.clone(),
        validity: Validity { not_before: Time::UtcTime(begin), not_after: Time::INFINITY },
        subject: subject.clone(),
        subject_public_key_info,
        issuer_unique_id: None,
        subject_unique_id: None,
        extensions: Some(extensions),
    };
    let signature: DerSignature = signer.sign(&tbs_certificate.to_der()?);
    let signature = BitString::from_bytes(signature.as_bytes())?;
    Ok(Certificate { tbs_certificate, signature_algorithm, signature })
}
