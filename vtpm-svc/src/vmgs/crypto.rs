// SPDX-License-Identifier: Apache-2.0
//! AES-256-GCM as the guest-state format uses it, and the nonce and key rules that keep it secret.
//!
//! Four rules are enforced here so that no caller can break them: a key seals exactly one message
//! ([`seal_once`] draws the key itself), every nonce is twelve fresh random bytes, neither a key nor a nonce
//! is ever all zero, and a ciphertext is never all zero (readers of this format take that for a hole in the
//! disk; for a file of one byte it would happen once in 256 writes). The one key that seals many messages is
//! the datastore key ([`wrap`]): each commit wraps one 32-byte metadata key under a random 96-bit nonce, so
//! it must be rotated long before 2^32 commits.
//!
//! Keys and nonces come from the operating system. [`Draws`] asks for as many bytes at once as a commit
//! needs, because a call per nonce costs more than the encryption that uses it; a byte is handed out once and
//! wiped.

use aes_gcm::Aes256Gcm;
use aes_gcm::KeyInit;
use aes_gcm::Nonce;
use aes_gcm::Tag;
use aes_gcm::aead::AeadInPlace;
use rand_core::OsRng;
use rand_core::RngCore;
use zeroize::Zeroize;
use zeroize::ZeroizeOnDrop;
use zeroize::Zeroizing;

use super::error::VmgsError;
use super::seal::Seal;

/// A 32-byte secret that is wiped when dropped and that no formatter prints.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Key([u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(secret)")
    }
}

impl Key {
    /// Draws a key.
    pub fn random(draws: &mut Draws) -> Result<Self, VmgsError> {
        let mut key = Self([0; 32]);
        draws.fill(&mut key.0)?;
        Ok(key)
    }

    /// Takes over 32 bytes; all zero is not a key.
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<Self, VmgsError> {
        if bytes.iter().all(|b| *b == 0) {
            return Err(VmgsError::Invalid("a key of 32 zero bytes is no key".into()));
        }
        Ok(Self(*bytes))
    }

    /// Takes over exactly 32 bytes of a slice.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, VmgsError> {
        let bytes: &[u8; 32] = bytes
            .try_into()
            .map_err(|_| VmgsError::Invalid(format!("a key has 32 bytes, {} were given", bytes.len())))?;
        Self::from_bytes(bytes)
    }

    /// The secret itself.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Fills a buffer with random bytes and refuses the impossible all-zero result.
pub fn fill_random(buffer: &mut [u8]) -> Result<(), VmgsError> {
    OsRng.try_fill_bytes(buffer).map_err(|_| VmgsError::NoEntropy)?;
    if buffer.iter().all(|b| *b == 0) {
        return Err(VmgsError::NoEntropy);
    }
    Ok(())
}

/// Random bytes of the operating system, fetched some at a time. Belongs to one commit, so no copy of it can
/// outlive a fork.
#[derive(Default)]
pub struct Draws {
    /// What has not been handed out yet.
    ready: Zeroizing<Vec<u8>>,
}

impl Draws {
    /// As many as the kernel gives without being interrupted (getrandom(2)); a usual commit needs 144.
    const AT_ONCE: usize = 256;

    /// Fills a buffer with bytes that nobody gets a second time.
    pub fn fill(&mut self, out: &mut [u8]) -> Result<(), VmgsError> {
        if out.len() > Self::AT_ONCE {
            return fill_random(out);
        }
        if self.ready.len() < out.len() {
            self.ready.zeroize();
            self.ready.resize(Self::AT_ONCE, 0);
            fill_random(&mut self.ready)?;
        }
        let rest = self.ready.len() - out.len();
        out.copy_from_slice(&self.ready[rest..]);
        self.ready[rest..].zeroize();
        self.ready.truncate(rest);
        if out.iter().all(|b| *b == 0) {
            return Err(VmgsError::NoEntropy);
        }
        Ok(())
    }
}

fn encrypt(draws: &mut Draws, key: &Key, plain: &[u8]) -> Result<(Seal, Vec<u8>), VmgsError> {
    let mut seal = Seal::default();
    draws.fill(&mut seal.nonce)?;
    let mut data = plain.to_vec();
    let tag = Aes256Gcm::new((&key.0).into())
        .encrypt_in_place_detached(Nonce::from_slice(&seal.nonce), b"", &mut data)
        .map_err(|_| VmgsError::Invalid("message too long for AES-GCM".into()))?;
    seal.tag.copy_from_slice(&tag);
    Ok((seal, data))
}

/// Encrypts `plain` under a key that is drawn for this one message.
///
/// An empty message has a tag too. Other readers of this format cannot read such a file back, so the store
/// never makes one; it only keeps those that another tool has left.
pub fn seal_once(draws: &mut Draws, plain: &[u8]) -> Result<(Key, Seal, Vec<u8>), VmgsError> {
    loop {
        let key = Key::random(draws)?;
        let (seal, data) = encrypt(draws, &key, plain)?;
        if data.is_empty() || data.iter().any(|b| *b != 0) {
            return Ok((key, seal, data));
        }
    }
}

/// Wraps one key under another, with a fresh nonce.
pub fn wrap(draws: &mut Draws, under: &Key, key: &Key) -> Result<(Seal, [u8; 32]), VmgsError> {
    loop {
        let (seal, data) = encrypt(draws, under, &key.0)?;
        let mut wrapped = [0; 32];
        wrapped.copy_from_slice(&data);
        if wrapped != [0; 32] {
            return Ok((seal, wrapped));
        }
    }
}

/// The key stream of the zero key and the zero nonce, which is what zeros are encrypted to.
pub(super) fn zero_key_stream(len: usize) -> Result<Vec<u8>, VmgsError> {
    let mut stream = vec![0; len];
    Aes256Gcm::new(&[0; 32].into())
        .encrypt_in_place_detached(Nonce::from_slice(&[0; 12]), b"", &mut stream)
        .map_err(|_| VmgsError::Invalid("message too long for AES-GCM".into()))?;
    Ok(stream)
}

/// Decrypts; `None` when authentication fails.
pub fn open(key: &[u8; 32], seal: &Seal, data: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut plain = Zeroizing::new(data.to_vec());
    Aes256Gcm::new(key.into())
        .decrypt_in_place_detached(
            Nonce::from_slice(&seal.nonce),
            b"",
            &mut plain,
            Tag::from_slice(&seal.tag),
        )
        .ok()?;
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NIST's "The Galois/Counter Mode of Operation" (McGrew, Viega), test case 14: zero key, zero nonce, one
    /// zero block.
    #[test]
    fn opens_the_published_aes_256_vector() {
        let ct = hex("cea7403d4d606b6e074ec5d3baf39d18");
        let mut seal = Seal::default();
        seal.tag.copy_from_slice(&hex("d0d1c8a799996bf0265b98b5d48ab919"));
        assert_eq!(open(&[0; 32], &seal, &ct).expect("authentic").as_slice(), &[0; 16]);
        seal.tag[0] ^= 1;
        assert!(open(&[0; 32], &seal, &ct).is_none());
    }

    #[test]
    fn a_one_byte_file_never_becomes_a_zero_byte() {
        let mut draws = Draws::default();
        for _ in 0..4096 {
            let (key, seal, ct) = seal_once(&mut draws, &[0x5a]).expect("seal");
            assert_ne!(ct, [0]);
            assert_ne!(seal.nonce, [0; 12]);
            assert_eq!(open(key.expose(), &seal, &ct).expect("open").as_slice(), &[0x5a]);
        }
    }

    #[test]
    fn zero_keys_are_refused_and_empty_messages_are_authenticated() {
        assert!(Key::from_bytes(&[0; 32]).is_err());
        assert!(Key::from_slice(&[1; 31]).is_err());
        let (key, seal, data) = seal_once(&mut Draws::default(), &[]).expect("a tag alone");
        assert!(data.is_empty() && open(key.expose(), &seal, &[]).is_some());
        assert!(open(&[1; 32], &seal, &[]).is_none(), "an empty message is authenticated too");
    }

    #[test]
    fn no_random_byte_is_handed_out_twice() {
        let mut draws = Draws::default();
        let mut seen = std::collections::BTreeSet::new();
        for n in 0..500 {
            let mut out = [0; 32];
            let len = if n % 3 == 0 { 12 } else { 32 };
            draws.fill(&mut out[..len]).expect("random");
            // Eight bytes that repeat are no accident: the chance is below 2^-46 over the whole test.
            assert!(seen.insert(out[..8].to_vec()) && seen.insert(out[len - 8..len].to_vec()), "draw {n}");
        }
        assert!(draws.ready.len() < Draws::AT_ONCE);
    }

    #[test]
    fn a_key_does_not_print() {
        assert_eq!(format!("{:?}", Key::from_bytes(&[0x41; 32]).expect("key")), "Key(secret)");
    }

    fn hex(s: &str) -> Vec<u8> {
        (0..s.len()).step_by(2).map(|n| u8::from_str_radix(&s[n..n + 2], 16).expect("hex")).collect()
    }
}
