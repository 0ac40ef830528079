// SPDX-License-Identifier: Apache-2.0
//! SHA-384 of eight pages at a time, one page per 64-bit lane of a 512-bit register.
//!
//! The pages of a launch are hashed independently of each other, and no CPU has SHA-512 instructions in the
//! field yet, so one message at a time leaves most of a wide vector unit idle. Written over plain arrays that
//! the compiler turns into AVX-512, this is more than three times as fast per core as the best single-message
//! implementation measured (see `docs/measurement.md`). It hashes nothing but whole pages; everything else,
//! and every CPU without AVX-512, uses the `sha2` crate, against which the tests check this code. Algorithm:
//! FIPS 180-4, section 6.4 and 6.5.

#![allow(
    unsafe_code,
    reason = "a function compiled for AVX-512 may be called only after asking the CPU for it"
)]

use crate::plan::PAGE_SIZE;

/// Pages hashed at once.
pub(super) const LANES: usize = 8;

/// One page as the hash takes it.
pub(super) type Page = [u8; PAGE_SIZE as usize];

/// FIPS 180-4, section 4.2.3: the first 64 bits of the fractional parts of the cube roots of the first 80
/// primes.
const K: [u64; 80] = [
    0x428a_2f98_d728_ae22,
    0x7137_4491_23ef_65cd,
    0xb5c0_fbcf_ec4d_3b2f,
    0xe9b5_dba5_8189_dbbc,
    0x3956_c25b_f348_b538,
    0x59f1_11f1_b605_d019,
    0x923f_82a4_af19_4f9b,
    0xab1c_5ed5_da6d_8118,
    0xd807_aa98_a303_0242,
    0x1283_5b01_4570_6fbe,
    0x2431_85be_4ee4_b28c,
    0x550c_7dc3_d5ff_b4e2,
    0x72be_5d74_f27b_896f,
    0x80de_b1fe_3b16_96b1,
    0x9bdc_06a7_25c7_1235,
    0xc19b_f174_cf69_2694,
    0xe49b_69c1_9ef1_4ad2,
    0xefbe_4786_384f_25e3,
    0x0fc1_9dc6_8b8c_d5b5,
    0x240c_a1cc_77ac_9c65,
    0x2de9_2c6f_592b_0275,
    0x4a74_84aa_6ea6_e483,
    0x5cb0_a9dc_bd41_fbd4,
    0x76f9_88da_8311_53b5,
    0x983e_5152_ee66_dfab,
    0xa831_c66d_2db4_3210,
    0xb003_27c8_98fb_213f,
    0xbf59_7fc7_beef_0ee4,
    0xc6e0_0bf3_3da8_8fc2,
    0xd5a7_9147_930a_a725,
    0x06ca_6351_e003_826f,
    0x1429_2967_0a0e_6e70,
    0x27b7_0a85_46d2_2ffc,
    0x2e1b_2138_5c26_c926,
    0x4d2c_6dfc_5ac4_2aed,
    0x5338_0d13_9d95_b3df,
    0x650a_7354_8baf_63de,
    0x766a_0abb_3c77_b2a8,
    0x81c2_c92e_47ed_aee6,
    0x9272_2c85_1482_353b,
    0xa2bf_e8a1_4cf1_0364,
    0xa81a_664b_bc42_3001,
    0xc24b_8b70_d0f8_9791,
    0xc76c_51a3_0654_be30,
    0xd192_e819_d6ef_5218,
    0xd699_0624_5565_a910,
    0xf40e_3585_5771_202a,
    0x106a_a070_32bb_d1b8,
    0x19a4_c116_b8d2_d0c8,
    0x1e37_6c08_5141_ab53,
    0x2748_774c_df8e_eb99,
    0x34b0_bcb5_e19b_48a8,
    0x391c_0cb3_c5c9_5a63,
    0x4ed8_aa4a_e341_8acb,
    0x5b9c_ca4f_7763_e373,
    0x682e_6ff3_d6b2_b8a3,
    0x748f_82ee_5def_b2fc,
    0x78a5_636f_4317_2f60,
    0x84c8_7814_a1f0_ab72,
    0x8cc7_0208_1a64_39ec,
    0x90be_fffa_2363_1e28,
    0xa450_6ceb_de82_bde9,
    0xbef9_a3f7_b2c6_7915,
    0xc671_78f2_e372_532b,
    0xca27_3ece_ea26_619c,
    0xd186_b8c7_21c0_c207,
    0xeada_7dd6_cde0_eb1e,
    0xf57d_4f7f_ee6e_d178,
    0x06f0_67aa_7217_6fba,
    0x0a63_7dc5_a2c8_98a6,
    0x113f_9804_bef9_0dae,
    0x1b71_0b35_131c_471b,
    0x28db_77f5_2304_7d84,
    0x32ca_ab7b_40c7_2493,
    0x3c9e_be0a_15c9_bebc,
    0x431d_67c4_9c10_0d4c,
    0x4cc5_d4be_cb3e_42b6,
    0x597f_299c_fc65_7e2a,
    0x5fcb_6fab_3ad6_faec,
    0x6c44_198c_4a47_5817,
];

/// FIPS 180-4, section 5.3.4: the initial hash value of SHA-384.
const IV: [u64; 8] = [
    0xcbbb_9d5d_c105_9ed8,
    0x629a_292a_367c_d507,
    0x9159_015a_3070_dd17,
    0x152f_ecd8_f70e_5939,
    0x6733_2667_ffc0_0b31,
    0x8eb4_4a87_6858_1511,
    0xdb0c_2e0d_64f9_8fa7,
    0x47b5_481d_befa_4fa4,
];

/// The same word of eight messages.
#[derive(Clone, Copy)]
struct Words([u64; LANES]);

impl Words {
    #[inline(always)]
    fn splat(word: u64) -> Self {
        Words([word; LANES])
    }

    #[inline(always)]
    fn map(self, f: impl Fn(u64) -> u64) -> Self {
        Words(self.0.map(f))
    }

    #[inline(always)]
    fn zip(mut self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a = f(*a, b);
        }
        self
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, u64::wrapping_add)
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        self.zip(other, |a, b| a ^ b)
    }

    #[inline(always)]
    fn rotations(self, first: u32, second: u32, third: u32) -> Self {
        self.map(|x| x.rotate_right(first) ^ x.rotate_right(second) ^ x.rotate_right(third))
    }

    #[inline(always)]
    fn schedule(self, first: u32, second: u32, shift: u32) -> Self {
        self.map(|x| x.rotate_right(first) ^ x.rotate_right(second) ^ (x >> shift))
    }
}

/// The compression function of FIPS 180-4, section 6.4.2; `w` is the message block and is used up.
#[inline(always)]
fn compress(state: &mut [Words; 8], w: &mut [Words; 16]) {
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (round, constants) in K.chunks_exact(16).enumerate() {
        for (i, k) in constants.iter().enumerate() {
            if round > 0 {
                let s0 = w[(i + 1) % 16].schedule(1, 8, 7);
                let s1 = w[(i + 14) % 16].schedule(19, 61, 6);
                w[i] = w[i].add(s0).add(w[(i + 9) % 16]).add(s1);
            }
            let choice = e.zip(f, |e, f| e & f).xor(e.zip(g, |e, g| !e & g));
            let t1 = h.add(e.rotations(14, 18, 41)).add(choice).add(Words::splat(*k)).add(w[i]);
            let either = a.zip(b, |a, b| a | b).zip(c, |ab, c| ab & c);
            let majority = a.zip(b, |a, b| a & b).zip(either, |both, either| both | either);
            let t2 = a.rotations(28, 34, 39).add(majority);
            h = g;
            g = f;
            f = e;
            e = d.add(t1);
            d = c;
            c = b;
            b = a;
            a = t1.add(t2);
        }
    }
    for (s, word) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *s = s.add(word);
    }
}

#[inline(always)]
fn hash(pages: &[&Page; LANES]) -> [[u8; 48]; LANES] {
    let mut state = IV.map(Words::splat);
    for block in (0..PAGE_SIZE as usize).step_by(128) {
        let mut w = [Words::splat(0); 16];
        for (lane, page) in pages.iter().enumerate() {
            let words = page[block..block + 128].as_chunks::<8>().0;
            for (word, bytes) in w.iter_mut().zip(words) {
                word.0[lane] = u64::from_be_bytes(*bytes);
            }
        }
        compress(&mut state, &mut w);
    }
    // The padding of a message of exactly one page: a one bit, zeros, the length in bits.
    let mut w = [Words::splat(0); 16];
    w[0] = Words::splat(1 << 63);
    w[15] = Words::splat(PAGE_SIZE * 8);
    compress(&mut state, &mut w);

    let mut digests = [[0; 48]; LANES];
    for (lane, digest) in digests.iter_mut().enumerate() {
        for (bytes, word) in digest.chunks_exact_mut(8).zip(&state) {
            bytes.copy_from_slice(&word.0[lane].to_be_bytes());
        }
    }
    digests
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn hash_avx512(pages: &[&Page; LANES]) -> [[u8; 48]; LANES] {
    hash(pages)
}

/// Hashes eight pages if the CPU can do so faster than one by one.
pub(super) fn hash_eight(pages: &[&Page; LANES]) -> Option<[[u8; 48]; LANES]> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
    {
        // SAFETY: the CPU has just said that it has every feature that the function is compiled for.
        return Some(unsafe { hash_avx512(pages) });
    }
    let _ = pages;
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sha2::Digest as _;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn eight_lanes_agree_with_the_sha2_crate(seed in any::<u64>(), quiet_lane in 0..LANES) {
            let mut x = seed | 1;
            let mut pages = vec![[0u8; PAGE_SIZE as usize]; LANES];
            for (lane, page) in pages.iter_mut().enumerate() {
                for byte in page.iter_mut().filter(|_| lane != quiet_lane) {
                    x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    *byte = (x >> 56) as u8;
                }
            }
            let refs: [&Page; LANES] = std::array::from_fn(|i| &pages[i]);
            let expected: Vec<[u8; 48]> = pages.iter().map(|p| sha2::Sha384::digest(p).into()).collect();
            // The portable form runs on every CPU, the vector form where there is one.
            prop_assert_eq!(&hash(&refs)[..], &expected[..]);
            if let Some(digests) = hash_eight(&refs) {
                prop_assert_eq!(&digests[..], &expected[..]);
            }
        }
    }
}
