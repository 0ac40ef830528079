// SPDX-License-Identifier: Apache-2.0
//! The firmware of the secure processor: launch contexts, special pages, guest messages, reports.
//!
//! SEV-SNP Firmware ABI Specification (AMD 56860), revision 1.58.

pub mod status;
