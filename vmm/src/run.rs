// SPDX-License-Identifier: Apache-2.0
//! Running a guest: [`monitor`] walks through its lives, each a VM ([`life`]) with its vCPU threads
//! ([`vcpu`]), until there is an [`outcome`]. What the main thread waits for meanwhile arrives in its
//! [`inbox`].

mod arrival;
pub mod error;
pub mod guest;
pub mod inbox;
mod life;
pub mod monitor;
pub mod outcome;
pub mod prefault;
mod signals;
pub mod vcpu;
