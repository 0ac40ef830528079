// SPDX-License-Identifier: Apache-2.0
//! What follows when a guest asks for a reset.

use clap::ValueEnum;

use crate::spec::OnReset;
use crate::spec::RestartSpec;

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
    /// What these options ask for.
    pub fn spec(&self) -> OnReset {
        match self.on_reboot {
            OnReboot::Exit => OnReset::Exit,
            OnReboot::Restart => OnReset::Restart(RestartSpec { max_lives: self.max_lives }),
        }
    }
}
