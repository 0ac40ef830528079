// SPDX-License-Identifier: Apache-2.0
//! stage0 on the native KVM, against a small host of its own: what it validates, what it refuses, how it
//! hands over.
//!
//! The host ([`host`], on the memory of a [`rig`]) is an oracle: a few hundred lines that share nothing with
//! the monitor or with `snp_model`, and must not: separate backings for the private and the shared view of
//! each page, one flag per page for "validated", and the handful of GHCB requests that stage0 makes. The
//! kernel is a few bytes that report the state they were entered with. So the tests need `/dev/kvm` but no
//! Linux guest, and they also run on a KVM that is too slow for one.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::single_range_in_vec_init,
    reason = "a test fails where its host fails"
)]

mod boots;
mod host;
mod refusals;
mod rig;
