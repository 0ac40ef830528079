// SPDX-License-Identifier: Apache-2.0
//! Attestation: what a report says, and where each field lies in it.

pub mod report;
