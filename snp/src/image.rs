// SPDX-License-Identifier: Apache-2.0
//! Image kinds: each turns files into a [`crate::plan::LaunchPlan`] and does nothing else.
//!
//! [`direct`] boots a Linux kernel with no firmware in between; `kernel`, `entry`, `bootparams`, `lazy` and
//! `staged` are its parts. [`ovmf`] launches a firmware file, [`igvm`] a file that is a launch. Where things
//! are is the [`crate::board`]'s.

pub mod bootparams;
pub mod direct;
pub mod entry;
pub mod error;
pub mod guid_table;
pub mod igvm;
pub mod kernel;
pub mod lazy;
pub mod ovmf;
pub mod regions;
pub mod staged;
pub mod vcpu_model;
pub mod vmm_type;
