// SPDX-License-Identifier: Apache-2.0
//! Fuzzing of every parser of input from outside: each test changes valid inputs at random for
//! `CVMM_FUZZ_SECONDS` and expects an answer, never a panic, gigabytes or silence. `docs/testing.md` says how
//! to run one for longer and how to repeat a case.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(missing_docs, reason = "a test program")]

mod attest;
mod driver;
mod firmware;
mod guest;
mod identity;
mod kernel;
mod mutate;
mod tpm;

/// The text of a refusal.
fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
