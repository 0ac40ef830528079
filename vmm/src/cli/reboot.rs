// SPDX-License-Identifier: Apache-2.0
//! What follows when a guest asks for a reset.

use std::time::Duration;

use clap::ValueEnum;

use crate::monitor::Restart;

/// A guest that does nothing but reset gets one VM in this time.
const PACE: Duration = Duration::from_secs(1);

/// Options about resets.
#[derive(clap::Args, Clone, Debug)]
pub struct RebootArgs {
    /// When the guest asks for a reset: end with exit code 3, or launch it anew in a new VM
    #[arg(long, value_enum, default_value = "exit")]
    on_reboot: OnReboot,
    /// With --on-reboot restart: end with exit code 3 at the reset of VM number N; for tests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), hide = true)]
    max_lives: Option<u32>,
}

/// What follows a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnReboot {
    /// The run ends
    Exit,
    /// A new VM, launched from the same files read at the start: the launch digest stays the same
    Restart,
}

impl RebootArgs {
    /// As the monitor takes it.
    pub fn restart(&self) -> Option<Restart> {
        match self.on_reboot {
            OnReboot::Exit => None,
            OnReboot::Restart => Some(Restart { lives: self.max_lives, pace: PACE }),
        }
    }
}
