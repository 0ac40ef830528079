// SPDX-License-Identifier: Apache-2.0
//! Devices of the machine, with no KVM type in sight.
//!
//! A device is told of accesses by offset into its own range and raises interrupts through an event
//! descriptor. Accesses come from the guest and may have any width; a device answers what it does not know as
//! a bus without a device would.

#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod bus;
pub mod i8042;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod tpm_crb;
pub mod tpm_ppi;
