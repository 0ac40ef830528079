// SPDX-License-Identifier: Apache-2.0
//! Certificates as this host signs them: ECDSA on P-384 with SHA-384, without an end (RFC 5280).

use p384::ecdsa::DerSignature;
use p384::ecdsa::SigningKey;
use p384::ecdsa::signature::Signer;
use p384::pkcs8::EncodePublicKey;
use sha2::Digest;
use sha2::Sha256;

use super::der;
use super::error::ManufactureError;

/// Random bytes of the operating system.
pub(super) fn random<const N: usize>() -> Result<[u8; N], ManufactureError> {
    let mut bytes = [0; N];
    crate::vmgs::crypto::fill_random(&mut bytes).map_err(|_| ManufactureError::NoEntropy)?;
    Ok(bytes)
}

/// `SubjectPublicKeyInfo` of a key.
pub(super) fn public_key(key: &SigningKey) -> Result<Vec<u8>, ManufactureError> {
    let document = key.verifying_key().to_public_key_der().map_err(|_| ManufactureError::PublicKey)?;
    Ok(document.as_bytes().to_vec())
}

/// RFC 7093, method 1: the first 20 bytes of SHA-256, here over the whole key information.
pub(super) fn key_id(spki: &[u8]) -> Vec<u8> {
    Sha256::digest(spki)[..20].to_vec()
}

/// A signed certificate; names, key and extensions are in DER.
pub(super) fn certify(
    signer: &SigningKey,
    issuer: &[u8],
    subject: &[u8],
    spki: &[u8],
    extensions: &[Vec<u8>],
) -> Result<Vec<u8>, ManufactureError> {
    let algorithm = der::sequence(&[&der::oid(&[1, 2, 840, 10045, 4, 3, 3])]);
    // Positive, and never longer than the standard's 20 bytes.
    let mut serial = random::<16>()?;
    serial[0] = serial[0] & 0x7f | 0x40;
    // From a fixed day on and, as the profile has it for keys of hardware, without an end.
    let validity =
        der::sequence(&[&der::tagged(0x17, b"240101000000Z"), &der::tagged(0x18, b"99991231235959Z")]);
    let list: Vec<&[u8]> = extensions.iter().map(Vec::as_slice).collect();
    let tbs = der::sequence(&[
        &der::tagged(0xa0, &der::tagged(0x02, &[2])),
        &der::tagged(0x02, &serial),
        &algorithm,
        issuer,
        &validity,
        subject,
        spki,
        &der::tagged(0xa3, &der::sequence(&list)),
    ]);
    let signature: DerSignature = signer.sign(&tbs);
    Ok(der::sequence(&[&tbs, &algorithm, &der::bits(0, signature.as_bytes())]))
}
