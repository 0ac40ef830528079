// SPDX-License-Identifier: Apache-2.0
//! What the integration tests of this crate share: made-up firmware files, and oracles in other languages.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod chain;
pub mod firmware;
pub mod kernels;
pub mod python;
