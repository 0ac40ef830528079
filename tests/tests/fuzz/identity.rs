// SPDX-License-Identifier: Apache-2.0
//! ID blocks, their authentication pages, keys and signatures.

use p384::pkcs8::EncodePrivateKey as _;
use p384::pkcs8::EncodePublicKey as _;
use p384::pkcs8::LineEnding;
use snp::digest::LaunchDigest;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::identity::PublicKey;
use snp::identity::Signature;
use snp::identity::keys::private_from_pem;
use test_support::identity;
use test_support::keys;

use crate::driver::Seed;
use crate::driver::Target;
use crate::driver::no_repair;
use crate::text;

fn block() -> IdBlock {
    identity::id_block(LaunchDigest([0x5a; 48]))
}

#[test]
fn id_block() {
    Target {
        name: "id-block",
        seeds: vec![Seed::new(block().encode())],
        repair: no_repair,
        parse: &|bytes| {
            let block = IdBlock::decode(bytes).map_err(text)?;
            assert_eq!(block.encode(), bytes, "what is accepted is written back as it was");
            Ok(())
        },
        says: &["offset 0x", "expected"],
    }
    .run();
}

#[test]
fn id_auth() {
    let seed = |auth: IdAuth| Seed::with_fields(auth.encode(), [0..80, 64..640, 1600..2300]);
    let block = block();
    Target {
        name: "id-auth",
        seeds: vec![
            seed(IdAuth::sign(&block, &keys::p384(1), Some(&keys::p384(2)))),
            seed(IdAuth::sign(&block, &keys::p384(3), None)),
        ],
        repair: no_repair,
        parse: &|page| {
            let auth = IdAuth::decode(page).map_err(text)?;
            let _ = auth.check_signatures(&block);
            Ok(())
        },
        says: &["offset 0x", "expected"],
    }
    .run();
}

#[test]
fn keys_and_signatures() {
    let private = keys::p384(1).to_pkcs8_pem(LineEnding::LF).unwrap();
    let public = keys::p384(1).verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
    let signature: p384::ecdsa::DerSignature =
        p384::ecdsa::signature::Signer::sign(&keys::p384(1), b"message");
    Target {
        name: "keys",
        seeds: vec![
            Seed::new(private.as_bytes()),
            Seed::new(public),
            Seed::new(signature.as_bytes()),
            Seed::new(Signature::make(&keys::p384(1), b"message").encode()),
        ],
        repair: no_repair,
        parse: &|bytes| {
            let tool = Signature::from_tool(bytes).map(drop);
            let pem = String::from_utf8_lossy(bytes);
            let of_pem = private_from_pem(&pem).map(drop).or(PublicKey::from_pem(&pem).map(drop));
            let fixed = bytes.try_into().map(|bytes| Signature::decode(bytes).map(drop));
            tool.or(fixed.unwrap_or(of_pem)).map_err(text)
        },
        says: &["offset 0x", "expected", "not an ECDSA key", "neither DER"],
    }
    .run();
}
