// SPDX-License-Identifier: Apache-2.0
//! The monitor: from a user's request to a guest that has ended, and why.
//!
//! The walk of the main job: [`spec`] says what was asked for → [`prepare`] has
//! `snp::image` make a plan, and `snp::digest` its digest → [`platform`] and [`launch`] create the
//! VM from the plan → [`vcpu`] threads run it, and each exit goes to one dispatcher → [`outcome`] says how it ended.

#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod certs;
pub mod cli;
pub mod conversion;
pub mod cpuid;
pub mod doctor;
pub mod events;
mod files;
pub mod implicit;
pub mod launch;
mod life;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod note;
pub mod outcome;
pub mod platform;
pub mod prefault;
pub mod prepare;
pub mod registers;
pub mod spec;
pub mod tamper;
pub mod terminal;
pub mod vcpu;
pub mod vtpm;
