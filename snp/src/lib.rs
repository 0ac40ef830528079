// SPDX-License-Identifier: Apache-2.0
//! What AMD SEV-SNP is, with no virtual machine in it.
//!
//! This crate turns files into launch plans, computes launch digests, and reads attestation reports. It opens
//! no device and depends on no KVM crate, so a policy author or a verifier can use it on any machine.

#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod attest;
pub mod board;
pub mod digest;
pub mod explain;
pub mod firmware_status;
pub mod ghcb;
mod guid;
pub mod identity;
pub mod image;
pub mod le;
mod page;
pub mod pages;
pub mod plan;
pub mod policy;
mod printable;
pub mod stage0;
pub mod vmsa;
