// SPDX-License-Identifier: Apache-2.0
//! Image kinds: each turns files into a [`crate::plan::LaunchPlan`] and does nothing else.
//!
//! [`direct`] boots a Linux kernel with no firmware in between; `kernel`, `layout`, `entry`, `bootparams` and `acpi` are its
//! parts, and `sites` with `decompress` says what the emulated platform has to know beside the plan. [`ovmf`] launches a firmware file.

pub mod acpi;
pub mod bootparams;
pub mod direct;
pub mod entry;
pub mod error;
pub mod guid_table;
pub mod igvm;
pub mod kernel;
pub mod layout;
pub mod lazy;
pub mod ovmf;
pub mod regions;
pub mod shim;
pub mod vcpu_model;
pub mod vmm_type;
