// SPDX-License-Identifier: Apache-2.0
//! The command line: the only place where options are parsed. Everything below it takes plain values.

pub mod anchor;
pub mod keys;
pub mod socket;
pub mod vmgs;
