// SPDX-License-Identifier: Apache-2.0
//! Attestation: what a report says, and where each field lies in it.

pub mod baseline;
pub mod cert;
pub mod cert_table;
pub mod chain;
pub mod evidence;
pub mod named;
pub mod policy;
pub mod report;
pub mod tcb;
pub mod verify;
