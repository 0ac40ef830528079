// SPDX-License-Identifier: Apache-2.0
//! The service that gives a guest its TPM 2.0 and its guest-state file from outside the guest.

pub mod engine;
pub mod log;
pub mod vmgs;
