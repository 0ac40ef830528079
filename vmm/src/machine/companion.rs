// SPDX-License-Identifier: Apache-2.0
//! What stands beside a VM and outlives it: each VM of a guest gets it anew.

use std::error::Error;
use std::time::Duration;

use super::Machine;

/// What a companion does before a life, in a thread of its own.
pub type Work = Box<dyn FnOnce() -> Result<(), Box<dyn Error + Send + Sync>> + Send>;

/// Something outside of the VM that must start anew with each VM of a guest.
pub trait Companion {
    /// What error messages call it.
    fn name(&self) -> &'static str;
    /// What may take long, or for ever if another process hangs: done before each VM is created, the first
    /// (`life` 1) included, while the monitor listens for signals, and for no longer than the time that is
    /// given with it.
    fn prepare(&mut self, _life: u32) -> Option<(Duration, Work)> {
        None
    }
    /// Called when [`Companion::prepare`] has failed: whether another try may go well, because what failed
    /// can be replaced. The companion counts.
    fn recovers(&mut self) -> bool {
        false
    }
    /// Called for each VM before its launch, the first (`life` 1) included: resets itself, and puts its
    /// devices on the new machine's buses, its memory into the VM. What it was given out of the machine before
    /// it lets go of here: it would keep that VM and its memory alive.
    fn attach(&mut self, life: u32, machine: &Machine) -> Result<(), Box<dyn Error + Send + Sync>>;
}
