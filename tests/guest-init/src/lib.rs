// SPDX-License-Identifier: Apache-2.0
//! What runs as process 1 inside test guests, and what it shares with the harness outside.
//!
//! Two programs are built from here, both static: `l1-agent` boots the outer guest (L1) of a nested run and
//! executes jobs there; `l2-init` is the whole user space of the guests that cvmm itself boots. [`job`] runs
//! a command with a time limit and is the same code on the host and in L1; [`frame`] carries it over a byte
//! stream.

pub mod console;
pub mod frame;
pub mod job;
pub mod pid1;
pub mod sev_guest;
pub mod tpm;
