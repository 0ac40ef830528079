// SPDX-License-Identifier: Apache-2.0
//! The special pages of a launch.

pub mod cpuid;
pub mod cpuid_diff;
pub mod cpuid_entry;
pub mod cpuid_raw;
pub mod hashes;
pub mod secrets;
