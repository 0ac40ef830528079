// SPDX-License-Identifier: Apache-2.0
//! What the tests of several packages need: made-up inputs, keys, and guests of a few bytes.
//!
//! A builder is here if tests of two packages use it; what one package's tests share stays beside them.
//! Nothing here is an oracle: an expected value comes from a specification, another tool or a real device,
//! never from a builder. Test programs in `tests/` of any package may use all of it. Tests inside of a
//! package's `src/` are compiled into another copy of that package, so they may use what has no types of
//! their own package in it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

pub mod chain;
pub mod code;
pub mod elf;
pub mod firmware;
#[cfg(feature = "monitor")]
pub mod held;
pub mod identity;
pub mod igvm;
pub mod kernels;
pub mod keys;
#[cfg(feature = "monitor")]
pub mod monitor;
pub mod stage0;
#[cfg(feature = "monitor")]
pub mod tiny;

/// Bytes of a small generator (xorshift of 64 bits): contents that are the same each time and repeat nowhere.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
