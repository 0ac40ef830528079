// SPDX-License-Identifier: Apache-2.0
//! The emulated platform's own certificate chain: ARK, ASK and VCEK of the shapes that AMD's have.
//!
//! "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification", AMD publication
//! 57230: RSA-4096 with RSASSA-PSS and SHA-384 for ARK and ASK, a P-384 key with AMD's extensions for the
//! VCEK. Made once per host; the keys of ARK and ASK are dropped at once, so that nobody can extend the chain
//! later. The names say that this is an emulation, and no verifier trusts its root unless it is told to.

use std::str::FromStr as _;
use std::time::Duration;

use p384::ecdsa::Signature;
use p384::ecdsa::SigningKey;
use p384::ecdsa::VerifyingKey;
use p384::ecdsa::signature::Signer as _;
use p384::ecdsa::signature::Verifier as _;
use p384::pkcs8::DecodePrivateKey as _;
use p384::pkcs8::EncodePrivateKey as _;
use p384::pkcs8::LineEnding;
use rand_core::CryptoRngCore;
use rsa::RsaPrivateKey;
use rsa::pss;
use rsa::signature::Keypair as _;
use rsa::signature::RandomizedSigner as _;
use rsa::signature::SignatureEncoding as _;
use sha2::Sha384;
use x509_cert::Certificate;
use x509_cert::TbsCertificate;
use x509_cert::Version;
use x509_cert::der::Decode as _;
use x509_cert::der::DecodePem as _;
use x509_cert::der::Encode as _;
use x509_cert::der::EncodePem as _;
use x509_cert::der::asn1::BitString;
use x509_cert::der::asn1::Ia5StringRef;
use x509_cert::der::asn1::OctetString;
use x509_cert::der::asn1::UtcTime;
use x509_cert::der::oid::AssociatedOid as _;
use x509_cert::der::oid::ObjectIdentifier;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::BasicConstraints;
use x509_cert::ext::pkix::KeyUsage;
use x509_cert::ext::pkix::KeyUsages;
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::DynSignatureAlgorithmIdentifier as _;
use x509_cert::spki::EncodePublicKey as _;
use x509_cert::spki::SubjectPublicKeyInfoOwned;
use x509_cert::time::Time;
use x509_cert::time::Validity;
use zeroize::Zeroizing;

use snp::attest::report::Report;
use snp::attest::report::SIG_ALGO_ECDSA_P384_SHA384;

/// Length of ARK and ASK keys, as AMD's.
const RSA_BITS: usize = 4096;
/// What each name begins with.
const OWNER: &str = "O=cvmm,OU=cvmm EMULATED\\, not AMD";
/// Validity, in seconds after 1970: 2024-01-01 to 2049-01-01. The chain is local to a host, and dates protect
/// nothing here.
const VALID: [u64; 2] = [1_704_067_200, 2_493_072_000];

/// AMD's extensions under 1.3.6.1.4.1.3704.1.
mod oid {
    use super::ObjectIdentifier;

    pub const STRUCT_VERSION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.1");
    pub const PRODUCT_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.2");
    pub const BOOT_LOADER: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.1");
    pub const TEE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.2");
    /// Four versions that AMD reserves; readers such as go-sev-guest demand them all the same.
    pub const RESERVED: [ObjectIdentifier; 4] = [
        ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.4"),
        ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.5"),
        ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.6"),
        ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.7"),
    ];
    pub const SNP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.3");
    pub const MICROCODE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.8");
    pub const HWID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.4");
}

/// Security versions of the platform's parts, in the layout of Milan and Genoa.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcb {
    /// Boot loader.
    pub boot_loader: u8,
    /// Trusted operating system of the secure processor.
    pub tee: u8,
    /// SNP firmware.
    pub snp: u8,
    /// Microcode.
    pub microcode: u8,
}

impl Tcb {
    /// What an emulated platform claims to be.
    pub const EMULATED: Tcb = Tcb { boot_loader: 4, tee: 0, snp: 24, microcode: 219 };

    /// The eight bytes of a report's TCB fields: byte 0 boot loader, 1 TEE, 6 SNP, 7 microcode.
    pub const fn to_u64(self) -> u64 {
        u64::from_le_bytes([self.boot_loader, self.tee, 0, 0, 0, 0, self.snp, self.microcode])
    }
}

/// What is wrong with a stored chain, or with a report.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The RSA keys could not be made.
    #[error("RSA keys for the emulated platform's chain: {0}")]
    Rsa(#[from] rsa::Error),
    /// A certificate could not be encoded or decoded.
    #[error("certificate of the emulated platform's chain: {0}")]
    Der(#[from] x509_cert::der::Error),
    /// A public key could not be encoded.
    #[error("public key of the emulated platform's chain: {0}")]
    Key(#[from] x509_cert::spki::Error),
    /// Signing failed.
    #[error("signature of the emulated platform's chain: {0}")]
    Signature(#[from] rsa::signature::Error),
    /// The stored private key cannot be read.
    #[error("private key of the emulated platform's chain: {0}")]
    PrivateKey(#[from] p384::pkcs8::Error),
    /// A stored chain does not have its parts.
    #[error("the stored chain of the emulated platform {0}")]
    Stored(&'static str),
    /// A report that this VCEK did not sign.
    #[error("the report is not signed by this VCEK: {0}")]
    Report(&'static str),
}

/// The certificates of an emulated platform, in DER.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificates {
    /// Root, self-signed.
    pub ark: Vec<u8>,
    /// Intermediate, signed by the ARK.
    pub ask: Vec<u8>,
    /// The platform's key, signed by the ASK.
    pub vcek: Vec<u8>,
}

/// An emulated platform's chain, with the key that signs reports.
pub struct Chain {
    certificates: Certificates,
    vcek: SigningKey,
    chip_id: [u8; 64],
    tcb: Tcb,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain").field("tcb", &self.tcb).finish_non_exhaustive()
    }
}

impl Chain {
    /// Makes a new chain. Takes seconds: two RSA keys of 4096 bits.
    pub fn generate(rng: &mut impl CryptoRngCore) -> Result<Self, ChainError> {
        Self::generate_with_rsa_bits(rng, RSA_BITS)
    }

    /// As [`Chain::generate`], with RSA keys of another length: 2048 bits take a fraction of a second, for
    /// tests.
    pub fn generate_with_rsa_bits(rng: &mut impl CryptoRngCore, bits: usize) -> Result<Self, ChainError> {
        let tcb = Tcb::EMULATED;
        let mut chip_id = [0; 64];
        rng.fill_bytes(&mut chip_id);
        let ark_key = pss::SigningKey::<Sha384>::new(RsaPrivateKey::new(rng, bits)?);
        let ask_key = pss::SigningKey::<Sha384>::new(RsaPrivateKey::new(rng, bits)?);
        let vcek = SigningKey::random(rng);

        let ca = || -> Result<Vec<Extension>, ChainError> {
            let constraints = BasicConstraints { ca: true, path_len_constraint: None };
            Ok(vec![
                extension(BasicConstraints::OID, true, &constraints.to_der()?)?,
                extension(
                    KeyUsage::OID,
                    true,
                    &KeyUsage(KeyUsages::KeyCertSign | KeyUsages::CRLSign).to_der()?,
                )?,
            ])
        };
        let ark_name = name("ARK-EMULATED")?;
        let ask_name = name("SEV-EMULATED")?;
        let spki = |key: &pss::SigningKey<Sha384>| SubjectPublicKeyInfoOwned::from_key(key.verifying_key());
        let ark = issue(rng, &ark_key, &ark_name, &ark_name, spki(&ark_key)?, 1, ca()?)?;
        let ask = issue(rng, &ark_key, &ark_name, &ask_name, spki(&ask_key)?, 2, ca()?)?;
        let vcek_spki =
            SubjectPublicKeyInfoOwned::from_der(vcek.verifying_key().to_public_key_der()?.as_bytes())?;
        let vcek_cert = issue(
            rng,
            &ask_key,
            &ask_name,
            &name("SEV-VCEK")?,
            vcek_spki,
            0,
            vcek_extensions(tcb, &chip_id)?,
        )?;
        let certificates = Certificates { ark: ark.to_der()?, ask: ask.to_der()?, vcek: vcek_cert.to_der()? };
        Ok(Chain { certificates, vcek, chip_id, tcb })
    }

    /// The certificates.
    pub fn certificates(&self) -> &Certificates {
        &self.certificates
    }

    /// The chip that the VCEK belongs to.
    pub fn chip_id(&self) -> &[u8; 64] {
        &self.chip_id
    }

    /// The TCB version that the VCEK belongs to.
    pub fn tcb(&self) -> Tcb {
        self.tcb
    }

    /// Signs the signed part of a report; big-endian R and S.
    pub fn sign(&self, signed: &[u8]) -> ([u8; 48], [u8; 48]) {
        let signature: Signature = self.vcek.sign(signed);
        let (r, s) = signature.split_bytes();
        (r.into(), s.into())
    }

    /// Secret from which keys for guests are derived.
    pub(crate) fn root_secret(&self) -> Zeroizing<[u8; 48]> {
        Zeroizing::new(self.vcek.to_bytes().into())
    }

    /// The chain as PEM, to be stored where only the platform's owner can read it: three certificates, then
    /// the VCEK's private key.
    pub fn to_pem(&self) -> Result<String, ChainError> {
        let mut out = String::new();
        for der in [&self.certificates.ark, &self.certificates.ask, &self.certificates.vcek] {
            out.push_str(&Certificate::from_der(der)?.to_pem(LineEnding::LF)?);
        }
        out.push_str(&self.vcek.to_pkcs8_pem(LineEnding::LF)?);
        Ok(out)
    }

    /// Reads what [`Chain::to_pem`] wrote, and checks that key and certificates belong together.
    pub fn from_pem(pem: &str) -> Result<Self, ChainError> {
        let mut certificates = Vec::new();
        let mut key = None;
        for block in pem.split_inclusive("-----END ").collect::<Vec<_>>().windows(2) {
            let [block, next] = block else { continue };
            let start =
                block.find("-----BEGIN ").ok_or(ChainError::Stored("has a block without a beginning"))?;
            let end = next.find('\n').map_or(next.len(), |end| end + 1);
            let whole = format!("{}{}", &block[start..], &next[..end]);
            if whole.starts_with("-----BEGIN CERTIFICATE-----") {
                certificates.push(Certificate::from_pem(&whole)?);
            } else {
                key = Some(SigningKey::from_pkcs8_pem(&whole)?);
            }
        }
        let vcek = key.ok_or(ChainError::Stored("has no private key"))?;
        let [ark, ask, cert] = certificates.as_slice() else {
            return Err(ChainError::Stored("does not have three certificates"));
        };
        let public = vcek.verifying_key().to_public_key_der()?;
        if cert.tbs_certificate.subject_public_key_info.to_der()? != public.as_bytes() {
            return Err(ChainError::Stored("has a private key that does not belong to its VCEK"));
        }
        let chip_id =
            find(cert, oid::HWID)?.try_into().map_err(|_| ChainError::Stored("has a bad chip id"))?;
        let spl = |oid| -> Result<u8, ChainError> { Ok(u8::from_der(find(cert, oid)?)?) };
        let tcb = Tcb {
            boot_loader: spl(oid::BOOT_LOADER)?,
            tee: spl(oid::TEE)?,
            snp: spl(oid::SNP)?,
            microcode: spl(oid::MICROCODE)?,
        };
        let certificates = Certificates { ark: ark.to_der()?, ask: ask.to_der()?, vcek: cert.to_der()? };
        Ok(Chain { certificates, vcek, chip_id, tcb })
    }
}

fn name(common: &str) -> Result<Name, ChainError> {
    Ok(Name::from_str(&format!("CN={common},{OWNER}"))?)
}

fn extension(id: ObjectIdentifier, critical: bool, value: &[u8]) -> Result<Extension, ChainError> {
    Ok(Extension { extn_id: id, critical, extn_value: OctetString::new(value)? })
}

/// Extensions of a VCEK: integers and a string in DER, and the chip id as bare bytes.
fn vcek_extensions(tcb: Tcb, chip_id: &[u8; 64]) -> Result<Vec<Extension>, ChainError> {
    let int = |id, value: u8| extension(id, false, &value.to_der()?);
    let [reserved_4, reserved_5, reserved_6, reserved_7] = oid::RESERVED;
    // In the order that AMD's have.
    Ok(vec![
        int(oid::STRUCT_VERSION, 0)?,
        extension(oid::PRODUCT_NAME, false, &Ia5StringRef::new("Milan-EMULATED")?.to_der()?)?,
        int(oid::BOOT_LOADER, tcb.boot_loader)?,
        int(oid::TEE, tcb.tee)?,
        int(reserved_4, 0)?,
        int(reserved_5, 0)?,
        int(reserved_6, 0)?,
        int(reserved_7, 0)?,
        int(oid::SNP, tcb.snp)?,
        int(oid::MICROCODE, tcb.microcode)?,
        extension(oid::HWID, false, chip_id)?,
    ])
}

fn issue(
    rng: &mut impl CryptoRngCore,
    key: &pss::SigningKey<Sha384>,
    issuer: &Name,
    subject: &Name,
    subject_public_key_info: SubjectPublicKeyInfoOwned,
    serial: u8,
    extensions: Vec<Extension>,
) -> Result<Certificate, ChainError> {
    let signature_algorithm = key.signature_algorithm_identifier()?;
    let time = |seconds| -> Result<Time, ChainError> {
        Ok(Time::UtcTime(UtcTime::from_unix_duration(Duration::from_secs(seconds))?))
    };
    let tbs_certificate = TbsCertificate {
        version: Version::V3,
        serial_number: SerialNumber::new(&[serial])?,
        signature: signature_algorithm.clone(),
        issuer: issuer.clone(),
        validity: Validity { not_before: time(VALID[0])?, not_after: time(VALID[1])? },
        subject: subject.clone(),
        subject_public_key_info,
        issuer_unique_id: None,
        subject_unique_id: None,
        extensions: Some(extensions),
    };
    let signature = key.try_sign_with_rng(rng, &tbs_certificate.to_der()?)?;
    let signature = BitString::from_bytes(&signature.to_vec())?;
    Ok(Certificate { tbs_certificate, signature_algorithm, signature })
}

fn find(cert: &Certificate, id: ObjectIdentifier) -> Result<&[u8], ChainError> {
    let extensions = cert.tbs_certificate.extensions.as_deref().unwrap_or_default();
    let found = extensions.iter().find(|e| e.extn_id == id);
    found.map(|e| e.extn_value.as_bytes()).ok_or(ChainError::Stored("lacks an extension of the VCEK"))
}

/// Checks that `vcek` (DER) signed `report`, and that chip and TCB version of the two agree. Nothing more:
/// whether the VCEK can be trusted, and whether the report says what one wants to hear, is for a real
/// verifier.
pub fn verify_report_against_chain(report: &Report, vcek: &[u8]) -> Result<(), ChainError> {
    let cert = Certificate::from_der(vcek)?;
    if report.sig_algo() != SIG_ALGO_ECDSA_P384_SHA384 {
        return Err(ChainError::Report("its signature algorithm is not ECDSA P-384 with SHA-384"));
    }
    let key = cert.tbs_certificate.subject_public_key_info.subject_public_key.raw_bytes();
    let key = VerifyingKey::from_sec1_bytes(key)
        .map_err(|_| ChainError::Report("the certificate's key is not a point of P-384"))?;
    let component = |stored: [u8; 72]| -> Option<[u8; 48]> {
        let (value, rest) = stored.split_first_chunk::<48>()?;
        let mut value = *value;
        value.reverse();
        rest.iter().all(|byte| *byte == 0).then_some(value)
    };
    let signature = component(report.signature_r())
        .zip(component(report.signature_s()))
        .and_then(|(r, s)| Signature::from_scalars(r, s).ok())
        .ok_or(ChainError::Report("its signature is not a pair of P-384 scalars"))?;
    key.verify(report.signed_bytes(), &signature)
        .map_err(|_| ChainError::Report("the signature does not fit the bytes"))?;
    if find(&cert, oid::HWID)? != report.chip_id() {
        return Err(ChainError::Report("the chip ids differ"));
    }
    let spl = |id| -> Result<u8, ChainError> { Ok(u8::from_der(find(&cert, id)?)?) };
    let tcb = Tcb {
        boot_loader: spl(oid::BOOT_LOADER)?,
        tee: spl(oid::TEE)?,
        snp: spl(oid::SNP)?,
        microcode: spl(oid::MICROCODE)?,
    };
    if tcb.to_u64() != report.reported_tcb() {
        return Err(ChainError::Report("the TCB versions differ"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use sev::certs::snp::Verifiable as _;

    use super::*;
    use crate::firmware::testing::platform;

    fn peer(certificates: &Certificates) -> sev::certs::snp::Chain {
        let cert = |der: &[u8]| sev::certs::snp::Certificate::from_der(der).unwrap();
        let ca = sev::certs::snp::ca::Chain { ark: cert(&certificates.ark), ask: cert(&certificates.ask) };
        sev::certs::snp::Chain { ca, vek: cert(&certificates.vcek) }
    }

    #[test]
    fn a_peers_verifier_accepts_the_chain_and_no_other() {
        let platform = platform();
        let chain = &platform.chain;
        peer(chain.certificates()).verify().unwrap();
        let mut forged = chain.certificates().clone();
        // The last byte of the signature.
        *forged.vcek.last_mut().unwrap() ^= 1;
        peer(&forged).verify().unwrap_err();
    }

    #[test]
    fn a_stored_chain_is_read_back() {
        let platform = platform();
        let chain = &platform.chain;
        let again = Chain::from_pem(&chain.to_pem().unwrap()).unwrap();
        assert_eq!(again.certificates(), chain.certificates());
        assert_eq!((again.chip_id(), again.tcb()), (chain.chip_id(), chain.tcb()));
        assert_eq!(again.sign(b"x"), chain.sign(b"x"));
    }

    #[test]
    fn a_damaged_stored_chain_is_refused() {
        let pem = platform().chain.to_pem().unwrap();
        let half = &pem[..pem.len() / 2];
        for bad in ["", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", half] {
            Chain::from_pem(bad).unwrap_err();
        }
        let other = SigningKey::random(&mut rand_core::OsRng).to_pkcs8_pem(LineEnding::LF).unwrap();
        let cut = pem.find("-----BEGIN PRIVATE").unwrap();
        let error = Chain::from_pem(&format!("{}{}", &pem[..cut], other.as_str())).unwrap_err();
        assert!(error.to_string().contains("does not belong"), "{error}");
    }

    #[test]
    fn every_name_says_that_this_is_an_emulation() {
        let platform = platform();
        let chain = &platform.chain;
        let c = chain.certificates();
        for der in [&c.ark, &c.ask, &c.vcek] {
            let tbs = Certificate::from_der(der).unwrap().tbs_certificate;
            for name in [tbs.subject.to_string(), tbs.issuer.to_string()] {
                assert!(name.contains("EMULATED") && name.contains("not AMD"), "{name}");
            }
        }
    }

    #[test]
    #[ignore = "slow: makes RSA keys of AMD's length; run it to learn how long that takes"]
    fn a_chain_of_amds_key_lengths() {
        let start = Instant::now();
        let chain = Chain::generate(&mut rand_core::OsRng).unwrap();
        println!("generated in {:?}", start.elapsed());
        peer(chain.certificates()).verify().unwrap();
    }
}
