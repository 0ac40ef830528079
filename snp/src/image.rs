// SPDX-License-Identifier: Apache-2.0
//! Image kinds: each turns files into a [`crate::plan::LaunchPlan`] and does nothing else.

pub mod guid_table;
pub mod ovmf;
