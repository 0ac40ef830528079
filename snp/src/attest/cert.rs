// SPDX-License-Identifier: Apache-2.0
//! X.509 certificates and revocation lists as AMD issues them, read from DER or PEM.
//!
//! AMD "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification" (57230), chapter 3. Signatures
//! are checked over the bytes as received, never over a re-encoding. A certificate here is only a claim: what it is worth
//! is decided in [`super::chain`].

use std::fmt;
use std::ops::Range;

use p384::ecdsa::VerifyingKey as EcKey;
use p384::ecdsa::signature::Verifier as _;
use rsa::RsaPublicKey;
use rsa::pkcs8::DecodePublicKey as _;
use rsa::pss;
use rsa::traits::PublicKeyParts as _;
use sha2::Sha384;
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode as _;
use x509_cert::der::Encode as _;
use x509_cert::der::Header;
use x509_cert::der::Reader as _;
use x509_cert::der::SliceReader;
use x509_cert::der::asn1::BitString;
use x509_cert::der::oid::ObjectIdentifier;
use x509_cert::der::referenced::OwnedToRef as _;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::BasicConstraints;
use x509_cert::ext::pkix::KeyUsage;
use x509_cert::spki::AlgorithmIdentifierOwned;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::tcb::Product;
use super::tcb::Tcb;
use crate::printable::printable;

/// Largest certificate or list that is read; AMD's are below 8 KiB.
const MAX_LEN: usize = 1 << 20;

const RSASSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const ECDSA_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const DELTA_LIST: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.27");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const BASIC_CONSTRAINTS: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.19");
const KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.15");
const PRODUCT_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.2");
const SPL_BOOTLOADER: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.1");
const SPL_TEE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.2");
const SPL_SNP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.3");
const SPL_MICROCODE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.8");
const SPL_FMC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.9");
const HWID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.4");
const CSP_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.5");

/// Why a certificate, or a signature with it, is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum CertError {
    /// Neither PEM nor DER of a certificate.
    #[error("{what}: {reason}")]
    Format { what: &'static str, reason: String },
    /// An extension that should say something about the chip does not.
    #[error("the certificate '{subject}' has no readable {what} (extension {oid})")]
    Extension { subject: String, what: &'static str, oid: String },
    /// A signature that does not hold.
    #[error("'{subject}' is not signed by '{issuer}': {reason}")]
    NotSigned { subject: String, issuer: String, reason: String },
}

/// A decoded signed structure: certificate or revocation list.
struct Signed<'a> {
    body: &'a [u8],
    algorithm: &'a AlgorithmIdentifierOwned,
    signature: &'a [u8],
}

/// The range of the first element inside the outer sequence: the bytes that are signed.
fn signed_range(der: &[u8]) -> Option<Range<usize>> {
    let mut reader = SliceReader::new(der).ok()?;
    Header::decode(&mut reader).ok()?;
    let start = usize::try_from(reader.position()).ok()?;
    let inner = Header::decode(&mut reader).ok()?;
    let end = usize::try_from((reader.position() + inner.length).ok()?).ok()?;
    (end <= der.len()).then_some(start..end)
}

/// A certificate.
#[derive(Clone)]
pub struct Cert {
    der: Vec<u8>,
    signed: Range<usize>,
    parsed: x509_cert::Certificate,
}

impl Cert {
    /// Reads one certificate in DER.
    pub fn from_der(der: &[u8]) -> Result<Self, CertError> {
        let error = |reason: String| CertError::Format { what: "certificate", reason };
        if der.len() > MAX_LEN {
            return Err(error(format!("{} bytes, expected at most {MAX_LEN}", der.len())));
        }
        let parsed = x509_cert::Certificate::from_der(der).map_err(|e| error(e.to_string()))?;
        let signed = signed_range(der).ok_or_else(|| error("no signed part".into()))?;
        // RFC 5280, 4.2: an extension stands once. Of two, another reader may believe the other one.
        let extensions = parsed.tbs_certificate.extensions.as_deref().unwrap_or_default();
        let twice = (0..).zip(extensions).find(|(at, extension)| {
            extensions.iter().take(*at).any(|other| other.extn_id == extension.extn_id)
        });
        if let Some((_, extension)) = twice {
            return Err(error(format!("extension {} is there twice", extension.extn_id)));
        }
        Ok(Cert { der: der.to_vec(), signed, parsed })
    }

    /// Reads certificates in DER or PEM; a PEM file may hold several.
    pub fn read_all(file: &[u8]) -> Result<Vec<Self>, CertError> {
        pem_blocks(file, "CERTIFICATE", "certificate")?.iter().map(|der| Cert::from_der(der)).collect()
    }

    /// The bytes of the certificate.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The subject's common name.
    pub fn name(&self) -> String {
        common_name(&self.parsed.tbs_certificate.subject)
    }

    /// The issuer's common name.
    pub fn issuer_name(&self) -> String {
        common_name(&self.parsed.tbs_certificate.issuer)
    }

    /// Whether the issuer of this certificate is named like `issuer`'s subject.
    pub fn is_issued_in_the_name_of(&self, issuer: &Cert) -> bool {
        self.parsed.tbs_certificate.issuer == issuer.parsed.tbs_certificate.subject
    }

    /// First and last second of validity, in seconds since 1970.
    pub fn validity(&self) -> (u64, u64) {
        let validity = &self.parsed.tbs_certificate.validity;
        (validity.not_before.to_unix_duration().as_secs(), validity.not_after.to_unix_duration().as_secs())
    }

    /// The period of validity for people.
    pub fn validity_text(&self) -> String {
        let validity = &self.parsed.tbs_certificate.validity;
        format!("{} to {}", validity.not_before, validity.not_after)
    }

    /// Whether it may issue certificates: by its constraints, and by the uses of its key if it says any.
    pub fn is_ca(&self) -> bool {
        let constraints = self.extension(BASIC_CONSTRAINTS).map(BasicConstraints::from_der);
        let signs = |value| KeyUsage::from_der(value).is_ok_and(|usage| usage.key_cert_sign());
        constraints.is_some_and(|value| value.is_ok_and(|value| value.ca))
            && self.extension(KEY_USAGE).is_none_or(signs)
    }

    /// How many certificates may stand between this one and the last of a chain, if it says so.
    pub fn path_length(&self) -> Option<u8> {
        BasicConstraints::from_der(self.extension(BASIC_CONSTRAINTS)?).ok()?.path_len_constraint
    }

    /// Whether it may sign revocation lists: by the uses of its key, if it says any.
    pub fn may_sign_lists(&self) -> bool {
        let signs = |value| KeyUsage::from_der(value).is_ok_and(|usage| usage.crl_sign());
        self.extension(KEY_USAGE).is_none_or(signs)
    }

    /// Whether its key is an RSA key, as those of all authorities of AMD are.
    pub fn has_rsa_key(&self) -> bool {
        self.parsed.tbs_certificate.subject_public_key_info.algorithm.oid == RSA_ENCRYPTION
    }

    /// A critical extension that is not understood here: who does not know it must not use the certificate
    /// (RFC 5280, 4.2).
    pub fn unknown_critical(&self) -> Option<ObjectIdentifier> {
        let extensions = self.parsed.tbs_certificate.extensions.iter().flatten();
        let mut unknown =
            extensions.filter(|e| e.critical && ![BASIC_CONSTRAINTS, KEY_USAGE].contains(&e.extn_id));
        unknown.next().map(|extension| extension.extn_id)
    }

    fn extension(&self, oid: ObjectIdentifier) -> Option<&[u8]> {
        let extensions = self.parsed.tbs_certificate.extensions.as_ref()?;
        let found = extensions.iter().find(|extension| extension.extn_id == oid)?;
        Some(found.extn_value.as_bytes())
    }

    fn missing(&self, what: &'static str, oid: ObjectIdentifier) -> CertError {
        CertError::Extension { subject: self.name(), what, oid: oid.to_string() }
    }

    /// The product that an endorsement certificate is for.
    pub fn product(&self) -> Result<Product, CertError> {
        let name = match self.extension(PRODUCT_NAME) {
            // An IA5String.
            Some([0x16, len, name @ ..]) if usize::from(*len) == name.len() => std::str::from_utf8(name).ok(),
            _ => None,
        };
        name.and_then(Product::from_name).ok_or_else(|| self.missing("product name", PRODUCT_NAME))
    }

    /// The TCB version for which an endorsement certificate was issued.
    pub fn tcb(&self, product: Product) -> Result<Tcb, CertError> {
        let part = |what: &'static str, oid: ObjectIdentifier| match self.extension(oid) {
            // A DER INTEGER of one byte's value: from 0x80 it has a leading zero.
            Some([2, 1, value]) if *value < 0x80 => Ok(*value),
            Some([2, 2, 0, value]) if *value >= 0x80 => Ok(*value),
            _ => Err(self.missing(what, oid)),
        };
        Ok(Tcb {
            fmc: if product == Product::Turin { Some(part("FMC version", SPL_FMC)?) } else { None },
            bootloader: part("boot loader version", SPL_BOOTLOADER)?,
            tee: part("TEE version", SPL_TEE)?,
            snp: part("SNP firmware version", SPL_SNP)?,
            microcode: part("microcode version", SPL_MICROCODE)?,
        })
    }

    /// The chip for which a VCEK certificate was issued: 64 bytes, on Turin 8.
    pub fn hwid(&self) -> Result<&[u8], CertError> {
        match self.extension(HWID) {
            Some([4, 64, id @ ..]) if id.len() == 64 => Ok(id),
            Some(id) if id.len() == 64 || id.len() == 8 => Ok(id),
            _ => Err(self.missing("hardware id", HWID)),
        }
    }

    /// Whether there is a hardware id: a VCEK has one, a VLEK has not.
    pub fn has_hwid(&self) -> bool {
        self.extension(HWID).is_some()
    }

    /// The cloud provider to whom a VLEK was given.
    pub fn provider(&self) -> Option<String> {
        match self.extension(CSP_ID)? {
            [0x16 | 0x0c, len, name @ ..] if usize::from(*len) == name.len() => {
                Some(String::from_utf8_lossy(name).into_owned())
            }
            _ => None,
        }
    }

    /// The P-384 key of an endorsement certificate, if it has one.
    pub fn endorsement_key(&self) -> Option<EcKey> {
        self.parsed.tbs_certificate.subject_public_key_info.owned_to_ref().try_into().ok()
    }

    /// Whether both are certificates for one key in one name.
    pub fn is_same_authority(&self, other: &Cert) -> bool {
        let (a, b) = (&self.parsed.tbs_certificate, &other.parsed.tbs_certificate);
        a.subject == b.subject && a.subject_public_key_info == b.subject_public_key_info
    }

    /// Whether `list` names this certificate.
    pub fn is_revoked_by(&self, list: &Crl) -> bool {
        let revoked = list.parsed.tbs_cert_list.revoked_certificates.as_deref().unwrap_or_default();
        revoked.iter().any(|entry| entry.serial_number == self.parsed.tbs_certificate.serial_number)
    }

    /// Whether the issuer of this certificate is the one of `list`.
    pub fn shares_issuer_with(&self, list: &Crl) -> bool {
        self.parsed.tbs_certificate.issuer == list.parsed.tbs_cert_list.issuer
    }

    /// Checks that `issuer` signed this certificate.
    pub fn check_signed_by(&self, issuer: &Cert) -> Result<(), CertError> {
        let signed = Signed {
            body: &self.der[self.signed.clone()],
            algorithm: &self.parsed.signature_algorithm,
            signature: whole_bytes(&self.parsed.signature),
        };
        let verdict = if self.parsed.tbs_certificate.signature != self.parsed.signature_algorithm {
            Err("it names two signature algorithms".to_owned())
        } else {
            issuer.check_signature(&signed)
        };
        verdict.map_err(|reason| self.not_signed_by(issuer, reason))
    }

    /// The error of this certificate and its supposed issuer.
    fn not_signed_by(&self, issuer: &Cert, reason: String) -> CertError {
        CertError::NotSigned { subject: self.name(), issuer: issuer.name(), reason }
    }

    fn check_signature(&self, signed: &Signed) -> Result<(), String> {
        let spki: &SubjectPublicKeyInfoOwned = &self.parsed.tbs_certificate.subject_public_key_info;
        let invalid = || "the signature does not match".to_owned();
        match signed.algorithm.oid {
            RSASSA_PSS => {
                let der = spki.to_der().map_err(|e| e.to_string())?;
                let key = RsaPublicKey::from_public_key_der(&der)
                    .map_err(|_| "the issuer has no RSA key".to_owned())?;
                if key.n().bits() != 4096 {
                    return Err(format!("the issuer's RSA key has {} bits, expected 4096", key.n().bits()));
                }
                let signature = pss::Signature::try_from(signed.signature).map_err(|_| invalid())?;
                let key = pss::VerifyingKey::<Sha384>::new_with_salt_len(key, 48);
                key.verify(signed.body, &signature).map_err(|_| invalid())
            }
            ECDSA_SHA384 => {
                let key = self.endorsement_key().ok_or("the issuer has no P-384 key")?;
                let signature = p384::ecdsa::Signature::from_der(signed.signature).map_err(|_| invalid())?;
                key.verify(signed.body, &signature).map_err(|_| invalid())
            }
            other => Err(format!("signature algorithm {other}, expected RSASSA-PSS ({RSASSA_PSS})")),
        }
    }
}

impl fmt::Debug for Cert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cert({}, issued by {})", self.name(), self.issuer_name())
    }
}

/// A certificate revocation list.
#[derive(Clone)]
pub struct Crl {
    der: Vec<u8>,
    signed: Range<usize>,
    parsed: CertificateList,
}

impl Crl {
    /// The bytes of the list.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Reads a list in DER or PEM.
    pub fn read(file: &[u8]) -> Result<Self, CertError> {
        let error = |reason: String| CertError::Format { what: "revocation list", reason };
        let blocks = pem_blocks(file, "X509 CRL", "revocation list")?;
        let [der] = blocks.as_slice() else {
            return Err(error(format!("{} lists in one file, expected 1", blocks.len())));
        };
        let parsed = CertificateList::from_der(der).map_err(|e| error(e.to_string()))?;
        let signed = signed_range(der).ok_or_else(|| error("no signed part".into()))?;
        // RFC 5280, section 5.2: a critical extension changes what the list says, such as "only what is new"
        // or "of others too".
        let list = &parsed.tbs_cert_list;
        let of_entries = list.revoked_certificates.iter().flatten().map(|entry| &entry.crl_entry_extensions);
        let extensions = of_entries.chain([&list.crl_extensions]).flatten().flatten();
        // One of changes (5.2.4) is none for us, whether it says critical or not.
        let not_plain = |extension: &&Extension| extension.critical || extension.extn_id == DELTA_LIST;
        if let Some(unknown) = extensions.into_iter().find(not_plain) {
            return Err(error(format!("extension {}, expected a plain, complete list", unknown.extn_id)));
        }
        Ok(Crl { der: der.clone(), signed, parsed })
    }

    /// The issuer's common name.
    pub fn issuer_name(&self) -> String {
        common_name(&self.parsed.tbs_cert_list.issuer)
    }

    /// When it was made and when the next one is due, in seconds since 1970.
    pub fn period(&self) -> (u64, Option<u64>) {
        let list = &self.parsed.tbs_cert_list;
        let next = list.next_update.map(|time| time.to_unix_duration().as_secs());
        (list.this_update.to_unix_duration().as_secs(), next)
    }

    /// Checks that `issuer` made this list.
    pub fn check_signed_by(&self, issuer: &Cert) -> Result<(), CertError> {
        let signed = Signed {
            body: &self.der[self.signed.clone()],
            algorithm: &self.parsed.signature_algorithm,
            signature: whole_bytes(&self.parsed.signature),
        };
        let verdict = if self.parsed.tbs_cert_list.issuer != issuer.parsed.tbs_certificate.subject {
            Err(format!("it is issued by '{}'", self.issuer_name()))
        } else if self.parsed.tbs_cert_list.signature != self.parsed.signature_algorithm {
            Err("it names two signature algorithms".to_owned())
        } else if !issuer.may_sign_lists() {
            Err("its key may not sign revocation lists".to_owned())
        } else {
            issuer.check_signature(&signed)
        };
        verdict.map_err(|reason| CertError::NotSigned {
            subject: "revocation list".into(),
            issuer: issuer.name(),
            reason,
        })
    }
}

impl fmt::Debug for Crl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Crl(issued by {})", self.issuer_name())
    }
}

fn common_name(name: &x509_cert::name::Name) -> String {
    let attributes = name.0.iter().flat_map(|part| part.0.iter());
    let value = attributes.filter(|a| a.oid == COMMON_NAME).map(|a| a.value.value()).next();
    printable(&value.map_or_else(|| name.to_string(), |bytes| String::from_utf8_lossy(bytes).into_owned()))
}

/// The bytes of a signature; none if it claims unused bits in the last one, which no signature has.
fn whole_bytes(signature: &BitString) -> &[u8] {
    signature.as_bytes().unwrap_or_default()
}

/// The DER structures of a file that holds one in DER, or PEM blocks with `label`.
fn pem_blocks(file: &[u8], label: &str, what: &'static str) -> Result<Vec<Vec<u8>>, CertError> {
    use base64ct::Encoding as _;
    let error = |reason: String| CertError::Format { what, reason };
    if file.len() > MAX_LEN {
        return Err(error(format!("{} bytes, expected at most {MAX_LEN}", file.len())));
    }
    if file.first() == Some(&0x30) {
        return Ok(vec![file.to_vec()]);
    }
    let text = std::str::from_utf8(file).map_err(|_| error("neither PEM nor DER".into()))?;
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let mut blocks = Vec::new();
    for part in text.split(&begin).skip(1) {
        let (body, _) = part.split_once(&end).ok_or_else(|| error(format!("a block without '{end}'")))?;
        let base64: String = body.split_whitespace().collect();
        blocks.push(base64ct::Base64::decode_vec(&base64).map_err(|e| error(e.to_string()))?);
    }
    if blocks.is_empty() {
        return Err(error(format!("neither DER nor a PEM block '{begin}'")));
    }
    Ok(blocks)
}
