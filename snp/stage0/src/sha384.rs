// SPDX-License-Identifier: Apache-2.0
//! SHA-384 (FIPS 180-4, sections 4.1.3, 5.3.4 and 6.4) in little code.
//!
//! The shim is measured page by page, so it carries the smallest form that is still fast: no allocation, no table but the
//! constants, no processor feature. The unit tests of crate `snp` compare it with the `sha2` crate.

const K: [u64; 80] = [
    0x428a2f98d728ae22,
    0x7137449123ef65cd,
    0xb5c0fbcfec4d3b2f,
    0xe9b5dba58189dbbc,
    0x3956c25bf348b538,
    0x59f111f1b605d019,
    0x923f82a4af194f9b,
    0xab1c5ed5da6d8118,
    0xd807aa98a3030242,
    0x12835b0145706fbe,
    0x243185be4ee4b28c,
    0x550c7dc3d5ffb4e2,
    0x72be5d74f27b896f,
    0x80deb1fe3b1696b1,
    0x9bdc06a725c71235,
    0xc19bf174cf692694,
    0xe49b69c19ef14ad2,
    0xefbe4786384f25e3,
    0x0fc19dc68b8cd5b5,
    0x240ca1cc77ac9c65,
    0x2de92c6f592b0275,
    0x4a7484aa6ea6e483,
    0x5cb0a9dcbd41fbd4,
    0x76f988da831153b5,
    0x983e5152ee66dfab,
    0xa831c66d2db43210,
    0xb00327c898fb213f,
    0xbf597fc7beef0ee4,
    0xc6e00bf33da88fc2,
    0xd5a79147930aa725,
    0x06ca6351e003826f,
    0x142929670a0e6e70,
    0x27b70a8546d22ffc,
    0x2e1b21385c26c926,
    0x4d2c6dfc5ac42aed,
    0x53380d139d95b3df,
    0x650a73548baf63de,
    0x766a0abb3c77b2a8,
    0x81c2c92e47edaee6,
    0x92722c851482353b,
    0xa2bfe8a14cf10364,
    0xa81a664bbc423001,
    0xc24b8b70d0f89791,
    0xc76c51a30654be30,
    0xd192e819d6ef5218,
    0xd69906245565a910,
    0xf40e35855771202a,
    0x106aa07032bbd1b8,
    0x19a4c116b8d2d0c8,
    0x1e376c085141ab53,
    0x2748774cdf8eeb99,
    0x34b0bcb5e19b48a8,
    0x391c0cb3c5c95a63,
    0x4ed8aa4ae3418acb,
    0x5b9cca4f7763e373,
    0x682e6ff3d6b2b8a3,
    0x748f82ee5defb2fc,
    0x78a5636f43172f60,
    0x84c87814a1f0ab72,
    0x8cc702081a6439ec,
    0x90befffa23631e28,
    0xa4506cebde82bde9,
    0xbef9a3f7b2c67915,
    0xc67178f2e372532b,
    0xca273eceea26619c,
    0xd186b8c721c0c207,
    0xeada7dd6cde0eb1e,
    0xf57d4f7fee6ed178,
    0x06f067aa72176fba,
    0x0a637dc5a2c898a6,
    0x113f9804bef90dae,
    0x1b710b35131c471b,
    0x28db77f523047d84,
    0x32caab7b40c72493,
    0x3c9ebe0a15c9bebc,
    0x431d67c49c100d4c,
    0x4cc5d4becb3e42b6,
    0x597f299cfc657e2a,
    0x5fcb6fab3ad6faec,
    0x6c44198c4a475817,
];

const START: [u64; 8] = [
    0xcbbb9d5dc1059ed8,
    0x629a292a367cd507,
    0x9159015a3070dd17,
    0x152fecd8f70e5939,
    0x67332667ffc00b31,
    0x8eb44a8768581511,
    0xdb0c2e0d64f98fa7,
    0x47b5481dbefa4fa4,
];

/// Bytes that the compression function takes at a time.
const BLOCK: usize = 128;

fn compress(state: &mut [u64; 8], block: &[u8; BLOCK]) {
    let mut w = [0u64; 16];
    let (words, _) = block.as_chunks::<8>();
    for (word, bytes) in w.iter_mut().zip(words) {
        *word = u64::from_be_bytes(*bytes);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    let (rounds, _) = K.as_chunks::<16>();
    for (round, constants) in rounds.iter().enumerate() {
        for (i, k) in constants.iter().enumerate() {
            // The schedule is kept in 16 words: word t replaces word t - 16. Masks keep each index below 16.
            if round > 0 {
                let (near, far) = (w[(i + 14) & 15], w[(i + 1) & 15]);
                let s1 = near.rotate_right(19) ^ near.rotate_right(61) ^ (near >> 6);
                let s0 = far.rotate_right(1) ^ far.rotate_right(8) ^ (far >> 7);
                w[i & 15] = w[i & 15].wrapping_add(s0).wrapping_add(w[(i + 9) & 15]).wrapping_add(s1);
            }
            let t1 = h
                .wrapping_add(e.rotate_right(14) ^ e.rotate_right(18) ^ e.rotate_right(41))
                .wrapping_add((e & f) ^ (!e & g))
                .wrapping_add(*k)
                .wrapping_add(w[i & 15]);
            let t2 = (a.rotate_right(28) ^ a.rotate_right(34) ^ a.rotate_right(39))
                .wrapping_add((a & b) ^ (a & c) ^ (b & c));
            (h, g, f, e) = (g, f, e, d.wrapping_add(t1));
            (d, c, b, a) = (c, b, a, t1.wrapping_add(t2));
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

/// The hash of `data`.
pub fn sha384(data: &[u8]) -> [u8; 48] {
    let mut state = START;
    let (blocks, tail) = data.as_chunks::<BLOCK>();
    for block in blocks {
        compress(&mut state, block);
    }
    let mut last = [0u8; BLOCK];
    for (to, from) in last.iter_mut().zip(tail.iter().chain(&[0x80])) {
        *to = *from;
    }
    // The length in bits, 16 bytes big-endian, ends the last block; a tail of 112 bytes and more leaves no room for it.
    if tail.len() >= BLOCK - 16 {
        compress(&mut state, &last);
        last = [0; BLOCK];
    }
    let bits = (data.len() as u64).wrapping_mul(8).to_be_bytes();
    for (to, from) in last.iter_mut().rev().zip(bits.iter().rev()) {
        *to = *from;
    }
    compress(&mut state, &last);
    let mut digest = [0; 48];
    let (words, _) = digest.as_chunks_mut::<8>();
    for (to, word) in words.iter_mut().zip(state) {
        *to = word.to_be_bytes();
    }
    digest
}
