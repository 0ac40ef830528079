// SPDX-License-Identifier: Apache-2.0
//! Options of a run that try a guest: what it did, counted, and how it bears a dishonest host.

use crate::launch::tamper::Tamper;

/// The options.
#[derive(clap::Args, Clone, Debug)]
pub struct Trials {
    /// Print at the end what the guest did with its pages, as a line of JSON
    #[arg(long)]
    pub statistics: bool,
    /// Alter one bit after everything was measured and checked: in a launch page (stage0, hashes), in staged
    /// bytes (kernel, initrd, cmdline, boot-params, acpi), or in staged bytes over and over (ITEM@race)
    #[arg(long, value_name = "WHAT", hide = true)]
    pub tamper: Option<Tamper>,
}
