// SPDX-License-Identifier: Apache-2.0
//! Builders of valid inputs, which the measurement library's own tests use as well.

#![allow(dead_code, reason = "the fuzz targets use a part of them")]

#[path = "../../../snp/tests/support/chain.rs"]
pub mod chain;
#[path = "../../../snp/tests/support/firmware.rs"]
pub mod firmware;
#[path = "../../../snp/tests/support/kernels.rs"]
pub mod kernels;
