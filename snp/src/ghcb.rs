// SPDX-License-Identifier: Apache-2.0
//! The GHCB protocol: how an SNP guest and its hypervisor talk to each other.
//!
//! "SEV-ES Guest-Hypervisor Communication Block Standardization", AMD publication 56421, revision 2.03, as
//! far as Linux guests and KVM use it. Only values and layouts are here; what a hypervisor answers is in
//! `snp-model`. The files [`msr`], [`page`], [`psc`] and [`exit`] use nothing outside of `core`, so that a
//! guest can share them.

pub mod exit;
pub mod msr;
pub mod page;
pub mod psc;
pub mod term;
