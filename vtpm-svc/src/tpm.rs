// SPDX-License-Identifier: Apache-2.0
//! The TPM that is served: what runs its commands, where its state goes, and what the platform does to it.

pub mod commands;
pub mod engine;
pub mod manufacture;
pub mod presence;
