// SPDX-License-Identifier: Apache-2.0
//! A software model of what is below an SNP guest: KVM's SEV code, the RMP, and the firmware of the secure
//! processor.
//!
//! State and rules only, no virtual machine: the monitor's emulated platform runs a guest on an ordinary VM,
//! brings each of its SNP instructions here, and does what the [`outcome::Outcome`] says. The rules follow
//! Linux 6.12 (`arch/x86/kvm/svm/sev.c`), the GHCB specification (AMD 56421) and the SEV-SNP Firmware ABI
//! (AMD 56860, revision 1.58); each rule names its source. Everything that a guest writes is hostile: it is
//! copied once and then checked.
//!
//! The model gives no confidentiality and no integrity. Its attestation keys are its own ([`chain`]), and no
//! verifier trusts them by default.

#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod chain;
pub mod commands;
pub mod cpuid;
pub mod errno;
mod exchange;
pub mod faults;
pub mod firmware;
mod launch;
pub mod memory;
pub mod nae;
pub mod outcome;
pub mod patch;
mod psc;
pub mod rmp;
pub mod vcpu;
pub mod vm;
