// SPDX-License-Identifier: Apache-2.0
//! What is run, and for whom: a guest that is ready to be created, and the host's side of it.

use std::io::Write;
use std::time::Duration;

use snp::board::Board;
use snp::digest::Measured;
use snp::plan::LaunchPlan;
use snp_model::patch::CodeHints;

use super::inbox::Inbox;
use crate::events::Events;
use crate::launch::LaunchOptions;
use crate::launch::Staged;
use crate::machine::certs::Source;
use crate::machine::companion::Companion;

/// A guest that is ready to be created.
pub struct Guest {
    /// What enters it, and how.
    pub load: Load,
    /// The machine that it runs on.
    pub board: Board,
    /// RAM, and what firmware has beside it: guest-physical address and bytes of each range.
    pub ram: Vec<(u64, u64)>,
    /// CPUID of each vCPU.
    pub cpuid: Vec<Vec<kvm_bindings::kvm_cpuid_entry2>>,
}

/// What enters a guest.
pub enum Load {
    /// A plan that is copied into the memory of a plain guest.
    Plain(LaunchPlan),
    /// The launch of an SNP guest.
    Snp(Box<SnpLaunch>),
}

/// The launch of an SNP guest.
pub struct SnpLaunch {
    /// What is launched.
    pub measured: Measured,
    /// How.
    pub options: LaunchOptions,
    /// What it finds in shared memory when it starts.
    pub staged: Staged,
    /// For the emulated platform: what is known of its code.
    pub code: CodeHints,
}

impl Guest {
    /// Lets go of everything that only a launch needs: kernel and initrd, of which the guest has its own copy
    /// by then.
    pub(super) fn forget_contents(&mut self) {
        match &mut self.load {
            Load::Plain(plan) => plan.records = Vec::new(),
            Load::Snp(snp) => {
                snp.measured.forget_contents();
                snp.staged = Staged::default();
            }
        }
    }

    /// The launch, if it is an SNP guest.
    pub fn snp(&self) -> Option<&SnpLaunch> {
        match &self.load {
            Load::Plain(_) => None,
            Load::Snp(snp) => Some(snp),
        }
    }
}

/// The host's side of a guest.
pub struct Host {
    /// Takes what the guest writes to its console.
    pub console: Box<dyn Write + Send>,
    /// Standard input is the console's keyboard.
    pub interactive: bool,
    /// What follows when the guest asks for a reset; `None`: the run ends.
    pub restart: Option<Restart>,
    /// Certificates that an SNP guest may ask for; `None`: those that the platform knows, if any.
    pub certificates: Option<Source>,
    /// What starts anew with each VM, in this order.
    pub companions: Vec<Box<dyn Companion>>,
    /// Where signals arrive, if they are caught already; `None`: the run catches them.
    pub inbox: Option<Inbox>,
    /// Where is told what happens.
    pub events: Events,
}

impl Host {
    /// A host that has a console and nothing else.
    pub fn new(console: Box<dyn Write + Send>) -> Self {
        Host {
            console,
            interactive: false,
            restart: None,
            certificates: None,
            companions: Vec::new(),
            inbox: None,
            events: Events::silent(),
        }
    }
}

/// A reset is answered by a new VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// How many VMs there may be, the first one included; `None`: any number.
    pub lives: Option<u32>,
    /// Shortest time from one VM's start to the next one's, for guests that do nothing but reset: launches
    /// are work for the one SNP firmware of a host.
    pub pace: Duration,
}
