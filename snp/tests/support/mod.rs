// SPDX-License-Identifier: Apache-2.0
//! What the integration tests of this crate share: firmware at random, real reports, and oracles in other
//! languages.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod firmware;
pub mod python;
pub mod reports;

/// A property test's setting: `cases` random cases, or as many times more as `CVMM_FUZZ_FACTOR` says.
pub fn config(cases: u32) -> proptest::test_runner::Config {
    let factor =
        std::env::var("CVMM_FUZZ_FACTOR").ok().and_then(|text| text.parse::<u32>().ok()).unwrap_or(1);
    let cases = cases.saturating_mul(factor.max(1));
    proptest::test_runner::Config { cases, failure_persistence: None, ..Default::default() }
}
