// SPDX-License-Identifier: Apache-2.0
//! Keys that are made for tests only: the emulated platform's, and P-384 keys that are the same in every run.

use std::path::Path;
use std::path::PathBuf;
use std::sync::OnceLock;

use p384::ecdsa::SigningKey;
use snp_model::chain::Chain;

/// The emulated platform's chain. RSA keys of full length would take a minute in a debug build.
pub fn platform_chain() -> Chain {
    Chain::generate_with_rsa_bits(&mut rand_core::OsRng, 2048).unwrap()
}

/// Writes the keys of an emulated platform into `folder`: the same ones for the whole process.
pub fn written(folder: &Path) -> PathBuf {
    static KEYS: OnceLock<String> = OnceLock::new();
    let file = folder.join("keys.pem");
    std::fs::write(&file, KEYS.get_or_init(|| platform_chain().to_pem().unwrap())).unwrap();
    file
}

/// A P-384 key that is the same in every run.
pub fn p384(fill: u8) -> SigningKey {
    SigningKey::from_slice(&[fill; 48]).unwrap()
}
