// SPDX-License-Identifier: Apache-2.0
//! The monitor: from a user's request to a guest that has ended, and why.
//!
//! The walk of the main job: [`spec`] says what was asked for → [`prepare`] has
//! `snp::image` make a plan, and `snp::digest` its digest → [`platform`] and [`launch`] create the
//! VM from the plan → [`run`] has vCPU threads, each exit goes to one dispatcher → [`run::outcome`] says how
//! it ended.

#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod cli;
pub mod console;
pub mod cpuid;
pub mod doctor;
pub mod events;
mod files;
pub mod launch;
mod lock;
pub mod machine;
pub mod platform;
pub mod prepare;
pub mod run;
pub mod spec;
mod threads;
pub mod vtpm;
