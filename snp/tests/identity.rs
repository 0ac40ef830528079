// SPDX-License-Identifier: Apache-2.0
//! ID blocks: agreement with `sev-snp-measure`'s `snp-create-id-block` in both directions, and refusal of
//! what is damaged.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use base64ct::Base64;
use base64ct::Encoding as _;
use p384::ecdsa::SigningKey;
use p384::pkcs8::EncodePrivateKey as _;
use p384::pkcs8::EncodePublicKey as _;
use p384::pkcs8::LineEnding;
use proptest::prelude::*;
use rand_core::OsRng;
use snp::digest::LaunchDigest;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::identity::IdMismatch;
use snp::identity::PublicKey;
use snp::identity::Signature;
use snp::identity::keys::private_from_pem;
use snp::policy::GuestPolicy;
use support::python::SevSnpMeasure;
use test_support::identity::id_block;

fn block() -> IdBlock {
    id_block(LaunchDigest([0x5a; 48]))
}

fn keys() -> (SigningKey, SigningKey) {
    (SigningKey::random(&mut OsRng), SigningKey::random(&mut OsRng))
}

#[test]
fn an_id_block_made_by_snp_create_id_block_is_accepted_here() {
    let Some(mut oracle) = SevSnpMeasure::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (id, author) = keys();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("id"), id.to_pkcs8_pem(LineEnding::LF).unwrap().as_bytes()).unwrap();
    // The author's key in the older PEM form, which `openssl ecparam -genkey` writes.
    std::fs::write(path("pkcs8"), author.to_pkcs8_pem(LineEnding::LF).unwrap().as_bytes()).unwrap();
    let mut openssl = std::process::Command::new("openssl");
    openssl.arg("ec").arg("-in").arg(path("pkcs8")).arg("-out").arg(path("author"));
    assert!(openssl.stderr(std::process::Stdio::null()).status().unwrap().success());
    let answer = oracle
        .measure(&[
            ("digest", "5a".repeat(48)),
            ("idkey", path("id").display().to_string()),
            ("authorkey", path("author").display().to_string()),
        ])
        .unwrap();
    let field = |name: &str| {
        let field = answer.split(',').find_map(|f| f.strip_prefix(name)).unwrap();
        Base64::decode_vec(field).unwrap()
    };
    let theirs = IdBlock::decode(&field("id-block=")).unwrap();
    assert_eq!(theirs, IdBlock { family_id: [0; 16], image_id: [0; 16], guest_svn: 0, ..block() });
    let auth = IdAuth::decode(&field("id-auth=")).unwrap();
    auth.check(&theirs, LaunchDigest([0x5a; 48]), GuestPolicy(0x3_0000)).unwrap();
    assert_eq!(auth.id_key.digest().to_vec(), field("id_key_hash="));
    assert_eq!(auth.author.as_ref().unwrap().0.digest().to_vec(), field("author_key="));
    // What was read is written back as it was.
    assert_eq!(auth.encode().to_vec(), field("id-auth="));
    assert_eq!(theirs.encode().to_vec(), field("id-block="));
    // Both PEM forms give the key that signed.
    let read = |name: &str| std::fs::read_to_string(path(name)).unwrap();
    assert_eq!(PublicKey::of(&private_from_pem(&read("id")).unwrap()), auth.id_key);
    assert_eq!(PublicKey::of(&private_from_pem(&read("author")).unwrap()), auth.author.unwrap().0);
}

#[test]
fn our_signatures_verify_in_another_implementation() {
    let Some(mut oracle) = SevSnpMeasure::start() else { return };
    let (id, author) = keys();
    let auth = IdAuth::sign(&block(), &id, Some(&author));
    let case = [("verify", hex::encode(auth.encode())), ("block", hex::encode(block().encode()))];
    assert_eq!(oracle.measure(&case).unwrap(), "verified");
}

#[test]
fn a_block_for_another_launch_is_refused_with_its_own_reason() {
    let (id, author) = keys();
    let auth = IdAuth::sign(&block(), &id, Some(&author));
    let (digest, policy) = (block().launch_digest, block().policy);
    assert_eq!(auth.check(&block(), digest, policy), Ok(()));
    let other = LaunchDigest([1; 48]);
    assert!(matches!(auth.check(&block(), other, policy), Err(IdMismatch::Digest { .. })));
    let debug = GuestPolicy(0xb_0000);
    assert!(matches!(auth.check(&block(), digest, debug), Err(IdMismatch::Policy { .. })));
    let forged = IdBlock { guest_svn: 8, ..block() };
    assert_eq!(auth.check(&forged, digest, policy), Err(IdMismatch::BlockSignature));
    let stranger = IdAuth::sign(&block(), &author, Some(&author));
    let mixed = IdAuth { author: auth.author.clone(), ..stranger };
    assert_eq!(mixed.check(&block(), digest, policy), Err(IdMismatch::AuthorSignature));
}

#[test]
fn every_single_bit_flip_in_the_auth_page_is_noticed() {
    let (id, author) = keys();
    let auth = IdAuth::sign(&block(), &id, Some(&author));
    let page = auth.encode();
    let used = [0..80, 500..700, 1600..1680, 2170..2330, 4090..4096];
    for offset in used.into_iter().flatten() {
        let mut damaged = page;
        damaged[offset] ^= 1 << (offset % 8);
        let noticed = match IdAuth::decode(&damaged) {
            Ok(auth) => auth.check_signatures(&block()).is_err(),
            Err(_) => true,
        };
        assert!(noticed, "offset {offset:#x}");
    }
}

#[test]
fn keys_of_other_kinds_are_refused_with_advice() {
    let p256 = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIGyEYDtQmjMGDDIiGk44S3uKCP5jW1hEtR28fT5Ey5DJoAoGCCqGSM49\nAwEHoUQDQgAEs0ZUpZGtJvvbWgvxRvR9TUhmTq+8uKGXFh1B9y8iWeNgoXwFWJQT\nWpvBGd8A6PRwGwbrpVrRFhDEdGZfGMLkyA==\n-----END EC PRIVATE KEY-----\n";
    let error = private_from_pem(p256).unwrap_err().to_string();
    assert!(error.contains("secp384r1"), "{error}");
    let error =
        private_from_pem("-----BEGIN RSA PRIVATE KEY-----\nAA==\n-----END RSA PRIVATE KEY-----").unwrap_err();
    assert!(error.to_string().contains("'RSA PRIVATE KEY'"), "{error}");
    assert!(PublicKey::from_pem("nothing").unwrap_err().to_string().contains("no PEM block"));
}

#[test]
fn signatures_of_offline_tools_are_read_as_der_or_raw() {
    let (id, _) = keys();
    let message = block().encode();
    let ours = Signature::make(&id, &message);
    let der = p384::ecdsa::signature::Signer::<p384::ecdsa::DerSignature>::sign(&id, &message);
    assert_eq!(Signature::from_tool(der.as_bytes()).unwrap(), ours);
    let raw = p384::ecdsa::signature::Signer::<p384::ecdsa::Signature>::sign(&id, &message).to_bytes();
    assert_eq!(Signature::from_tool(&raw).unwrap(), ours);
    let public = id.verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
    assert!(PublicKey::from_pem(&public).unwrap().verifies(&message, &ours));
    assert!(Signature::from_tool(&[0x30; 20]).is_err());
}

proptest! {
    #![proptest_config(support::config(500))]

    #[test]
    fn arbitrary_bytes_never_panic(
        mut page in proptest::collection::vec(any::<u8>(), 4096),
        quiet in any::<bool>(),
        short in proptest::collection::vec(any::<u8>(), 0..200),
        text in "(-----BEGIN (EC )?PRIVATE KEY-----)?[ -~\n]{0,80}(-----END (EC )?PRIVATE KEY-----)?",
    ) {
        if quiet {
            // Past the reserved bytes and the algorithm, so that keys and signatures are looked at.
            page[..64].fill(0);
            page[0] = 1;
            page[4] = 1;
            for range in [208..576, 1604..1664, 1808..2176, 3204..4096] {
                page[range].fill(0);
            }
        }
        let _ = IdAuth::decode(&page);
        let _ = IdAuth::decode(&short);
        let _ = IdBlock::decode(&short);
        let _ = Signature::from_tool(&short);
        let _ = private_from_pem(&text);
        let _ = PublicKey::from_pem(&text);
    }
}
