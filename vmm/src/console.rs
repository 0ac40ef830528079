// SPDX-License-Identifier: Apache-2.0
//! The guest's console.

pub mod stdio;
pub mod terminal;
