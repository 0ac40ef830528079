// SPDX-License-Identifier: Apache-2.0
//! A made-up chain of trust in AMD's form, so that reports can be signed whose content a test chooses.

use std::str::FromStr as _;
use std::time::Duration;

use p384::ecdsa::SigningKey;
use p384::ecdsa::signature::Signer as _;
use p384::pkcs8::EncodePublicKey as _;
use rand_core::OsRng;
use snp::attest::cert::Cert;
use snp::attest::report::Report;
use snp::attest::report::ReportBuilder;
use x509_cert::Certificate;
use x509_cert::TbsCertificate;
use x509_cert::Version;
use x509_cert::crl::CertificateList;
use x509_cert::crl::RevokedCert;
use x509_cert::crl::TbsCertList;
use x509_cert::der::Decode as _;
use x509_cert::der::Encode as _;
use x509_cert::der::asn1::BitString;
use x509_cert::der::asn1::GeneralizedTime;
use x509_cert::der::asn1::OctetString;
use x509_cert::der::oid::ObjectIdentifier;
use x509_cert::ext::Extension;
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::AlgorithmIdentifierOwned;
use x509_cert::spki::SubjectPublicKeyInfoOwned;
use x509_cert::time::Time;
use x509_cert::time::Validity;

/// A second at which everything made here is valid.
pub const NOW: u64 = 1_800_000_000;

/// An extension that nobody knows; always critical.
pub const UNKNOWN: &str = "1.3.6.1.4.1.99999.1";

fn oid(text: &str) -> ObjectIdentifier {
    ObjectIdentifier::new(text).unwrap()
}

fn algorithm() -> AlgorithmIdentifierOwned {
    AlgorithmIdentifierOwned { oid: oid("1.2.840.10045.4.3.3"), parameters: None }
}

fn time(seconds: u64) -> Time {
    Time::GeneralTime(GeneralizedTime::from_unix_duration(Duration::from_secs(seconds)).unwrap())
}

fn sign(key: &SigningKey, der: &[u8]) -> BitString {
    let signature: p384::ecdsa::DerSignature = key.sign(der);
    BitString::from_bytes(signature.as_bytes()).unwrap()
}

/// A certificate as [`der`] makes it.
pub fn certificate(
    subject: (&str, &SigningKey),
    issuer: (&str, &SigningKey),
    serial: u8,
    extensions: &[(&str, Vec<u8>)],
) -> Cert {
    Cert::from_der(&der(subject, issuer, serial, extensions)).unwrap()
}

/// DER of a certificate for `subject`, with `extensions` by object identifier.
pub fn der(
    subject: (&str, &SigningKey),
    issuer: (&str, &SigningKey),
    serial: u8,
    extensions: &[(&str, Vec<u8>)],
) -> Vec<u8> {
    let spki = subject.1.verifying_key().to_public_key_der().unwrap();
    let extension = |(id, value): &(&str, Vec<u8>)| Extension {
        extn_id: oid(id),
        critical: *id == UNKNOWN,
        extn_value: OctetString::new(value.clone()).unwrap(),
    };
    let tbs = TbsCertificate {
        version: Version::V3,
        serial_number: SerialNumber::new(&[serial]).unwrap(),
        signature: algorithm(),
        issuer: Name::from_str(&format!("CN={}", issuer.0)).unwrap(),
        validity: Validity { not_before: time(NOW - 1000), not_after: time(NOW + 1000) },
        subject: Name::from_str(&format!("CN={}", subject.0)).unwrap(),
        subject_public_key_info: SubjectPublicKeyInfoOwned::from_der(spki.as_bytes()).unwrap(),
        issuer_unique_id: None,
        subject_unique_id: None,
        extensions: Some(extensions.iter().map(extension).collect()),
    };
    let signature = sign(issuer.1, &tbs.to_der().unwrap());
    let cert = Certificate { tbs_certificate: tbs, signature_algorithm: algorithm(), signature };
    cert.to_der().unwrap()
}

/// DER of a small INTEGER.
pub fn integer(value: u8) -> Vec<u8> {
    if value < 0x80 { vec![2, 1, value] } else { vec![2, 2, 0, value] }
}

const CA: (&str, [u8; 5]) = ("2.5.29.19", [0x30, 3, 1, 1, 0xff]);

/// Root, intermediate and a chip's key, with the parts that tests change.
#[derive(Clone)]
pub struct Authority {
    /// Signs the intermediate certificate and revocation lists.
    pub root_key: SigningKey,
    /// Signs endorsements.
    pub intermediate_key: SigningKey,
    /// Signs reports.
    pub chip_key: SigningKey,
    /// The root's certificate, by itself.
    pub root: Cert,
    /// The intermediate's certificate, by the root.
    pub intermediate: Cert,
}

impl Default for Authority {
    fn default() -> Self {
        Authority::new()
    }
}

impl Authority {
    /// With random keys.
    pub fn new() -> Self {
        Authority::with_keys([(); 3].map(|()| SigningKey::random(&mut OsRng)))
    }

    /// With the keys of root, intermediate and chip: the same keys give the same certificates.
    pub fn with_keys([root_key, intermediate_key, chip_key]: [SigningKey; 3]) -> Self {
        let ca = [(CA.0, CA.1.to_vec())];
        let root = certificate(("ARK-Test", &root_key), ("ARK-Test", &root_key), 1, &ca);
        let intermediate = certificate(("SEV-Test", &intermediate_key), ("ARK-Test", &root_key), 2, &ca);
        Authority { root_key, intermediate_key, chip_key, root, intermediate }
    }

    /// An endorsement certificate; `changes` replace or add extensions, an empty value removes one.
    pub fn endorsement(&self, product: &str, changes: &[(&str, Vec<u8>)]) -> Cert {
        let mut extensions = vec![
            ("1.3.6.1.4.1.3704.1.2", [&[0x16, product.len() as u8], product.as_bytes()].concat()),
            ("1.3.6.1.4.1.3704.1.3.1", integer(3)),
            ("1.3.6.1.4.1.3704.1.3.2", integer(0)),
            ("1.3.6.1.4.1.3704.1.3.3", integer(8)),
            ("1.3.6.1.4.1.3704.1.3.8", integer(0xd2)),
            ("1.3.6.1.4.1.3704.1.4", vec![0x77; 64]),
        ];
        for (id, value) in changes {
            extensions.retain(|(other, _)| other != id);
            if !value.is_empty() {
                extensions.push((id, value.clone()));
            }
        }
        let issuer = ("SEV-Test", &self.intermediate_key);
        certificate(("SEV-VCEK", &self.chip_key), issuer, 0, &extensions)
    }

    /// Signs a report.
    pub fn report(&self, builder: ReportBuilder) -> Report {
        let signature: p384::ecdsa::Signature = self.chip_key.sign(builder.signed_bytes());
        let (r, s) = signature.split_bytes();
        Report::parse(&builder.finish(&r.into(), &s.into())).unwrap()
    }

    /// A revocation list in DER, by the root.
    pub fn crl(&self, revoked: &[u8], made: u64, due: u64) -> Vec<u8> {
        self.list(revoked, made, Some(due), None)
    }

    /// A revocation list in DER, by the root; `extension` is its object identifier, and whether it is
    /// critical.
    pub fn list(
        &self,
        revoked: &[u8],
        made: u64,
        due: Option<u64>,
        extension: Option<(&str, bool)>,
    ) -> Vec<u8> {
        self.list_by("ARK-Test", revoked, made, due, extension)
    }

    /// The same in the name of `issuer`, signed with `root_key`.
    pub fn list_by(
        &self,
        issuer: &str,
        revoked: &[u8],
        made: u64,
        due: Option<u64>,
        extension: Option<(&str, bool)>,
    ) -> Vec<u8> {
        let revoke = |serial: &u8| RevokedCert {
            serial_number: SerialNumber::new(&[*serial]).unwrap(),
            revocation_date: time(NOW - 10),
            crl_entry_extensions: None,
        };
        let tbs = TbsCertList {
            version: Version::V2,
            signature: algorithm(),
            issuer: Name::from_str(&format!("CN={issuer}")).unwrap(),
            this_update: time(made),
            next_update: due.map(time),
            revoked_certificates: Some(revoked.iter().map(revoke).collect()),
            crl_extensions: extension.map(|(id, critical)| {
                let extn_value = OctetString::new([5, 0]).unwrap();
                vec![Extension { extn_id: oid(id), critical, extn_value }]
            }),
        };
        let signature = sign(&self.root_key, &tbs.to_der().unwrap());
        let list = CertificateList { tbs_cert_list: tbs, signature_algorithm: algorithm(), signature };
        list.to_der().unwrap()
    }
}
