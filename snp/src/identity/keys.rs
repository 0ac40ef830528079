// SPDX-License-Identifier: Apache-2.0
//! ECDSA P-384 keys and signatures in the firmware's form, and in the PEM and DER forms that people keep.
//!
//! The firmware's numbers are little-endian in fields of 72 bytes, of which 48 are used (SEV-SNP Firmware ABI
//! 1.58, chapter 10). Everything that is decoded here may come from a stranger: unused bytes must be zero,
//! points must be on the curve.

use std::fmt;

use p384::ecdsa::SigningKey;
use p384::ecdsa::VerifyingKey;
use p384::ecdsa::signature::Signer as _;
use p384::ecdsa::signature::Verifier as _;
use p384::pkcs8::DecodePrivateKey as _;
use p384::pkcs8::DecodePublicKey as _;
use sha2::Digest as _;
use sha2::Sha384;

use crate::le;
use crate::printable::printable;

/// Length of a public key as the firmware takes and hashes it.
pub const PUBLIC_KEY_LEN: usize = 1028;
/// Length of a signature's field in the auth page.
pub const SIGNATURE_LEN: usize = 512;
/// Curve number of P-384.
const CURVE_P384: u32 = 2;
/// Length of a number's field.
const FIELD: usize = 72;
/// Length of a number of this curve.
const NUMBER: usize = 48;

/// Why a key or signature cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum KeyError {
    /// No PEM block of a wanted kind.
    #[error("expected a PEM file with '{expected}', found {found}")]
    NoPem {
        expected: &'static str,
        /// The label that is there, or that there is none.
        found: String,
    },
    /// A key that cannot be decoded, usually of another kind.
    #[error(
        "the {what} is not an ECDSA key on curve P-384: {reason} (make one with: openssl ecparam -name secp384r1 -genkey -noout)"
    )]
    NotP384 { what: &'static str, reason: String },
    /// A field with a wrong value.
    #[error("offset {offset:#x}: {what} is {found}, expected {expected}")]
    Field {
        /// Offset in the structure that was decoded.
        offset: usize,
        what: &'static str,
        found: String,
        expected: &'static str,
    },
    /// Not a signature in DER, nor 96 bytes of R and S.
    #[error(
        "the signature has {0} bytes and is neither DER (as `openssl dgst -sign` writes) nor 96 bytes of R and S"
    )]
    Signature(usize),
}

fn field_error(offset: usize, what: &'static str, found: String, expected: &'static str) -> KeyError {
    KeyError::Field { offset, what, found, expected }
}

/// The 48 bytes of a number, big-endian, from its field at `offset` in `bytes`.
fn number(bytes: &[u8], offset: usize, what: &'static str) -> Result<[u8; NUMBER], KeyError> {
    let field: [u8; FIELD] =
        le::get(bytes, offset).ok_or_else(|| field_error(offset, what, "cut off".into(), "72 bytes"))?;
    let (low, high) = field.split_at(NUMBER);
    if high.iter().any(|b| *b != 0) {
        return Err(field_error(
            offset + NUMBER,
            what,
            "longer than 48 bytes".into(),
            "zeros after 48 bytes",
        ));
    }
    let mut number = [0; NUMBER];
    number.copy_from_slice(low);
    number.reverse();
    Ok(number)
}

fn put_number(out: &mut [u8], offset: usize, big_endian: &[u8]) {
    for (place, byte) in out[offset..].iter_mut().zip(big_endian.iter().rev()) {
        *place = *byte;
    }
}

/// The part of `text` from the BEGIN line of one of `labels` to its END line, and that label.
fn pem<'a>(
    text: &'a str,
    labels: &[&'static str],
    expected: &'static str,
) -> Result<(&'a str, &'static str), KeyError> {
    for label in labels {
        let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
        if let Some(start) = text.find(&begin)
            && let Some(len) = text[start..].find(&end)
        {
            return Ok((&text[start..start + len + end.len()], label));
        }
    }
    let found = text.split_once("-----BEGIN ").and_then(|(_, rest)| rest.split_once("-----"));
    let found = found.map_or("no PEM block".to_owned(), |(label, _)| format!("'{}'", printable(label)));
    Err(KeyError::NoPem { expected, found })
}

/// Reads a private key: PKCS#8 (`PRIVATE KEY`) or SEC1 (`EC PRIVATE KEY`), not encrypted.
pub fn private_from_pem(text: &str) -> Result<SigningKey, KeyError> {
    let (block, label) =
        pem(text, &["PRIVATE KEY", "EC PRIVATE KEY"], "PRIVATE KEY, or EC PRIVATE KEY, not encrypted")?;
    let not_p384 = |reason: String| KeyError::NotP384 { what: "private key", reason };
    if label == "PRIVATE KEY" {
        SigningKey::from_pkcs8_pem(block).map_err(|e| not_p384(e.to_string()))
    } else {
        let key = p384::SecretKey::from_sec1_pem(block).map_err(|e| not_p384(e.to_string()))?;
        Ok(SigningKey::from(key))
    }
}

/// A P-384 public key.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// The public half of `key`.
    pub fn of(key: &SigningKey) -> Self {
        PublicKey(*key.verifying_key())
    }

    /// Reads a public key (`PUBLIC KEY`), or takes the public half of a private one.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        match pem(text, &["PUBLIC KEY"], "PUBLIC KEY, or a private key") {
            Ok((block, _)) => {
                let key = VerifyingKey::from_public_key_pem(block);
                key.map(PublicKey)
                    .map_err(|e| KeyError::NotP384 { what: "public key", reason: e.to_string() })
            }
            Err(error) => private_from_pem(text).map(|key| PublicKey::of(&key)).map_err(|e| match e {
                KeyError::NoPem { .. } => error,
                other => other,
            }),
        }
    }

    /// Reads the firmware's form.
    pub fn decode(bytes: &[u8; PUBLIC_KEY_LEN]) -> Result<Self, KeyError> {
        let curve = le::u32_at(bytes, 0);
        if curve != CURVE_P384 {
            return Err(field_error(0, "curve", curve.to_string(), "2 (P-384)"));
        }
        let x = number(bytes, 4, "X coordinate")?;
        let y = number(bytes, 4 + FIELD, "Y coordinate")?;
        if let Some(at) = bytes[4 + 2 * FIELD..].iter().position(|b| *b != 0) {
            return Err(field_error(
                4 + 2 * FIELD + at,
                "unused byte of a public key",
                "not zero".into(),
                "0",
            ));
        }
        Self::from_coordinates(&x, &y).ok_or_else(|| {
            field_error(4, "public key", "not a point of the curve".into(), "a point of P-384")
        })
    }

    /// The key with these big-endian coordinates, if they are a point of the curve.
    pub fn from_coordinates(x: &[u8; NUMBER], y: &[u8; NUMBER]) -> Option<Self> {
        let point = p384::EncodedPoint::from_affine_coordinates(x.into(), y.into(), false);
        VerifyingKey::from_encoded_point(&point).ok().map(PublicKey)
    }

    /// The firmware's form.
    pub fn encode(&self) -> [u8; PUBLIC_KEY_LEN] {
        let mut bytes = [0; PUBLIC_KEY_LEN];
        let point = self.0.to_encoded_point(false);
        bytes[..4].copy_from_slice(&CURVE_P384.to_le_bytes());
        if let (Some(x), Some(y)) = (point.x(), point.y()) {
            put_number(&mut bytes, 4, x);
            put_number(&mut bytes, 4 + FIELD, y);
        }
        bytes
    }

    /// What reports show as `id_key_digest` or `author_key_digest`.
    pub fn digest(&self) -> [u8; 48] {
        Sha384::digest(self.encode()).into()
    }

    /// Whether `signature` is this key's over `message`.
    pub fn verifies(&self, message: &[u8], signature: &Signature) -> bool {
        self.0.verify(message, &signature.0).is_ok()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", hex::encode(self.digest()))
    }
}

/// An ECDSA P-384 signature with SHA-384.
#[derive(Clone, PartialEq, Eq)]
pub struct Signature(p384::ecdsa::Signature);

impl Signature {
    /// The signature as the `p384` crate takes it.
    pub(crate) fn inner(&self) -> &p384::ecdsa::Signature {
        &self.0
    }

    /// Signs `message`.
    pub fn make(key: &SigningKey, message: &[u8]) -> Self {
        Signature(key.sign(message))
    }

    /// Reads what signing tools write: DER, or 96 bytes of big-endian R and S.
    pub fn from_tool(bytes: &[u8]) -> Result<Self, KeyError> {
        let parsed = match bytes.len() {
            96 => p384::ecdsa::Signature::from_slice(bytes),
            _ => p384::ecdsa::Signature::from_der(bytes),
        };
        parsed.map(Signature).map_err(|_| KeyError::Signature(bytes.len()))
    }

    /// Reads R and S, 72 bytes each, as reports, auth pages and IGVM files hold them.
    pub fn from_fields(r_and_s: &[u8; 2 * FIELD]) -> Result<Self, KeyError> {
        let r = number(r_and_s, 0, "signature component R")?;
        let s = number(r_and_s, FIELD, "signature component S")?;
        p384::ecdsa::Signature::from_scalars(r, s).map(Signature).map_err(|_| {
            field_error(0, "signature", "zero or too large".into(), "R and S below the curve's order")
        })
    }

    /// Reads the firmware's form.
    pub fn decode(bytes: &[u8; SIGNATURE_LEN]) -> Result<Self, KeyError> {
        let (numbers, rest) = bytes.split_at(2 * FIELD);
        if let Some(at) = rest.iter().position(|b| *b != 0) {
            return Err(field_error(2 * FIELD + at, "unused byte of a signature", "not zero".into(), "0"));
        }
        let numbers = numbers.first_chunk().ok_or(KeyError::Signature(bytes.len()))?;
        Self::from_fields(numbers)
    }

    /// R and S, 72 bytes each.
    pub fn fields(&self) -> [u8; 2 * FIELD] {
        let mut bytes = [0; 2 * FIELD];
        let (r, s) = self.0.split_bytes();
        put_number(&mut bytes, 0, &r);
        put_number(&mut bytes, FIELD, &s);
        bytes
    }

    /// The firmware's form.
    pub fn encode(&self) -> [u8; SIGNATURE_LEN] {
        let mut bytes = [0; SIGNATURE_LEN];
        bytes[..2 * FIELD].copy_from_slice(&self.fields());
        bytes
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = self.0.split_bytes();
        write!(f, "Signature({}, {})", hex::encode(r), hex::encode(s))
    }
}
