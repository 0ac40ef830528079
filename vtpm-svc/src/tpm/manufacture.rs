// SPDX-License-Identifier: Apache-2.0
//! Making a TPM: PCR banks, endorsement keys with certificates, an attestation key.
//!
//! The certificates are signed by an authority of this host, made once; its root is `ca.pem` in the folder
//! that the operator names, to be given to verifiers. They say that a key lives in a TPM that this host made,
//! and no more: the host can read that key. Certificates are written only for keys that this code has just
//! created from a template, never for a key found at a handle.
//!
//! TCG EK Credential Profile 2.5 (templates L-1 and L-2, NV indices, certificate fields).

use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::der;
use x509_cert::der::Encode;
use x509_cert::der::Tag;
use x509_cert::der::asn1::Any;
use x509_cert::der::asn1::BitString;
use x509_cert::der::asn1::Ia5String;
use x509_cert::der::asn1::SetOfVec;
use x509_cert::der::asn1::UintRef;
use x509_cert::der::oid::ObjectIdentifier;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::BasicConstraints;
use x509_cert::ext::pkix::ExtendedKeyUsage;
use x509_cert::ext::pkix::KeyUsage;
use x509_cert::ext::pkix::KeyUsages;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::name::RdnSequence;
use x509_cert::name::RelativeDistinguishedName;
use x509_cert::spki::AlgorithmIdentifierOwned;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use self::certificate::extension;
use crate::tpm::commands;
use crate::tpm::commands::Bytes;
use crate::tpm::commands::CommandError;
use crate::tpm::commands::Transport;
use crate::tpm::commands::alg;
use crate::tpm::commands::handle;
use crate::vmgs::mark::uuid_text;

mod authority;
mod certificate;
mod error;
pub mod platform_certificate;

pub use authority::Authority;
pub use error::ManufactureError;

/// Where clients look for certificates and keys.
pub mod place {
    /// NV index of the RSA-2048 EK certificate.
    pub const EK_RSA_CERTIFICATE: u32 = 0x01c0_0002;
    /// NV index of the ECC P-256 EK certificate.
    pub const EK_ECC_CERTIFICATE: u32 = 0x01c0_000a;
    /// NV index of the AK certificate, as on Azure.
    pub const AK_CERTIFICATE: u32 = 0x01c1_01d0;
    /// Persistent handle of the RSA EK.
    pub const EK_RSA: u32 = 0x8101_0001;
    /// Persistent handle of the AK, as on Azure.
    pub const AK: u32 = 0x8100_0003;
}

/// Policy of the EK templates: `PolicySecret(TPM_RH_ENDORSEMENT)`, from the profile.
const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd,
    0x52, 0xd7, 0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];
/// fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt.
const EK_ATTRIBUTES: u32 = 0x0003_00b2;
/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, sign.
const AK_ATTRIBUTES: u32 = 0x0005_0472;
/// rsaEncryption (RFC 8017), id-ecPublicKey and prime256v1 (RFC 5480).
const RSA_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const RSA: u16 = 0x0001;
const ECC: u16 = 0x0023;
const NULL: u16 = 0x0010;

fn ek_rsa() -> Vec<u8> {
    let t = Bytes::default().u16(RSA).u16(alg::SHA256).u32(EK_ATTRIBUTES).sized(&EK_POLICY);
    // AES-128-CFB, no scheme, 2048 bits, default exponent, a unique field of zeros.
    t.u16(6).u16(128).u16(0x43).u16(NULL).u16(2048).u32(0).sized(&[0; 256]).0
}

fn ek_ecc() -> Vec<u8> {
    let t = Bytes::default().u16(ECC).u16(alg::SHA256).u32(EK_ATTRIBUTES).sized(&EK_POLICY);
    // AES-128-CFB, no scheme, P-256, no key derivation, unique fields of zeros.
    t.u16(6).u16(128).u16(0x43).u16(NULL).u16(3).u16(NULL).sized(&[0; 32]).sized(&[0; 32]).0
}

fn ak() -> Vec<u8> {
    let t = Bytes::default().u16(RSA).u16(alg::SHA256).u32(AK_ATTRIBUTES).u16(0);
    // Not a storage key; RSASSA with SHA-256.
    t.u16(NULL).u16(0x14).u16(alg::SHA256).u16(2048).u32(0).u16(0).0
}

/// `SubjectPublicKeyInfo` of the public area that was made from `template`.
fn spki_of(template: &[u8], public: &[u8]) -> Result<SubjectPublicKeyInfoOwned, ManufactureError> {
    let fail = ManufactureError::PublicKey;
    let number = |at: usize| Some(usize::from(*public.get(at)?) << 8 | usize::from(*public.get(at + 1)?));
    // Everything up to the unique field is as in the template.
    let (rsa, unique) = match template.get(..2) {
        Some([0, 1]) => (true, template.len() - template_unique(template, 256)),
        _ => (false, template.len() - 68),
    };
    if public.get(..unique) != template.get(..unique) {
        return Err(fail);
    }
    let field = |at: usize| {
        let len = number(at)?;
        Some((public.get(at + 2..at + 2 + len)?, at + 2 + len))
    };
    let Some((first, next)) = field(unique) else { return Err(fail) };
    if rsa {
        let key = vec![UintRef::new(first)?, UintRef::new(&[1, 0, 1])?].to_der()?;
        return Ok(SubjectPublicKeyInfoOwned {
            algorithm: AlgorithmIdentifierOwned { oid: RSA_KEY, parameters: Some(Any::null()) },
            subject_public_key: BitString::from_bytes(&key)?,
        });
    }
    let Some((second, _)) = field(next) else { return Err(fail) };
    if first.len() > 32 || second.len() > 32 {
        return Err(fail);
    }
    let mut point = [0; 65];
    point[0] = 4;
    point[33 - first.len()..33].copy_from_slice(first);
    point[65 - second.len()..].copy_from_slice(second);
    Ok(SubjectPublicKeyInfoOwned {
        algorithm: AlgorithmIdentifierOwned { oid: EC_KEY, parameters: Some(Any::encode_from(&P_256)?) },
        subject_public_key: BitString::from_bytes(&point)?,
    })
}

/// Bytes of an RSA template's unique field, its length included.
fn template_unique(template: &[u8], longest: usize) -> usize {
    let full = longest + 2;
    let padded =
        template.len() > full && template[template.len() - full..][..2] == (longest as u16).to_be_bytes();
    if padded { full } else { 2 }
}

/// What a certificate says of the TPM.
#[derive(Debug, Clone, Copy)]
pub struct Subject {
    /// The engine's version.
    pub version: u32,
    /// The VM that the TPM belongs to.
    pub vm: [u8; 16],
}

/// The subject alternative name of a TPM's certificate: who made it, what it is, which version; and whose it is, without which
/// a quote of one VM could be shown for another's.
fn tpm_name(subject: Subject) -> der::Result<SubjectAltName> {
    let Subject { version, vm } = subject;
    let part = |oid: &str, text: &str| -> der::Result<RelativeDistinguishedName> {
        let oid = ObjectIdentifier::new(oid)?;
        let value = Any::new(Tag::Utf8String, text.as_bytes())?;
        Ok(RelativeDistinguishedName(SetOfVec::try_from(vec![AttributeTypeAndValue { oid, value }])?))
    };
    let name = RdnSequence(vec![
        part("2.23.133.2.1", "id:49424D00")?,
        part("2.23.133.2.2", "cvmm host-served vTPM")?,
        part("2.23.133.2.3", &format!("id:{version:08X}"))?,
    ]);
    // RFC 9562, section 4.
    let vm = Ia5String::new(&format!("urn:uuid:{}", uuid_text(&vm)))?;
    Ok(SubjectAltName(vec![GeneralName::DirectoryName(name), GeneralName::UniformResourceIdentifier(vm)]))
}

fn extensions(subject: Subject, usage: KeyUsages, purpose: &str) -> der::Result<[Extension; 4]> {
    Ok([
        extension(true, &tpm_name(subject)?)?,
        extension(true, &BasicConstraints { ca: false, path_len_constraint: None })?,
        extension(true, &KeyUsage(usage.into()))?,
        extension(false, &ExtendedKeyUsage(vec![ObjectIdentifier::new(purpose)?]))?,
    ])
}

/// Finishes a TPM that has just been manufactured and started. It must be powered off and on afterwards.
///
/// A platform certificate comes from [`platform_certificate::read`].
pub fn finish(
    tpm: &mut dyn Transport,
    authority: Option<&Authority>,
    platform_certificate: Option<&[u8]>,
    subject: Subject,
) -> Result<(), ManufactureError> {
    commands::startup_clear(tpm)?;
    if let Some(authority) = authority {
        certify_keys(tpm, authority, subject)?;
    }
    if let Some(certificate) = platform_certificate {
        commands::nv_store(tpm, platform_certificate::INDEX, certificate)?;
    }
    commands::pcr_allocate(tpm, &commands::BANKS.map(|(bank, _)| bank))?;
    commands::shutdown_clear(tpm)?;
    Ok(())
}

/// Makes the persistent keys again that this host certified, if it did.
pub fn restore_keys(tpm: &mut dyn Transport) -> Result<(), CommandError> {
    for (template, certificate, at) in
        [(ek_rsa(), place::EK_RSA_CERTIFICATE, place::EK_RSA), (ak(), place::AK_CERTIFICATE, place::AK)]
    {
        if commands::nv_exists(tpm, certificate)? {
            let (object, _) = commands::create_primary(tpm, handle::ENDORSEMENT, &template)?;
            commands::persist(tpm, object, at)?;
            commands::flush(tpm, object)?;
        }
    }
    Ok(())
}

fn certify_keys(
    tpm: &mut dyn Transport,
    authority: &Authority,
    subject: Subject,
) -> Result<(), ManufactureError> {
    const EK_PURPOSE: &str = "2.23.133.8.1";
    const AK_PURPOSE: &str = "2.23.133.8.3";
    let keys = [
        (ek_rsa(), KeyUsages::KeyEncipherment, EK_PURPOSE, place::EK_RSA_CERTIFICATE, Some(place::EK_RSA)),
        (ek_ecc(), KeyUsages::KeyAgreement, EK_PURPOSE, place::EK_ECC_CERTIFICATE, None),
        (ak(), KeyUsages::DigitalSignature, AK_PURPOSE, place::AK_CERTIFICATE, Some(place::AK)),
    ];
    for (template, usage, purpose, index, persistent) in keys {
        let (object, public) = commands::create_primary(tpm, handle::ENDORSEMENT, &template)?;
        let spki = spki_of(&template, &public)?;
        let certificate = authority.issue(spki, extensions(subject, usage, purpose)?)?;
        commands::nv_store(tpm, index, &certificate)?;
        if let Some(at) = persistent {
            commands::persist(tpm, object, at)?;
        }
        commands::flush(tpm, object)?;
    }
    Ok(())
}
