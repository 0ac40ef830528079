// SPDX-License-Identifier: Apache-2.0
//! What to say of an access that a strict run does not allow: which page, through which view, and from where.
//!
//! KVM reports it as EFAULT of `KVM_RUN`, without an address. The instruction has not been executed, so it is
//! tried again with forbidden pages taken out of the VM's memory slots: KVM then takes the access for one to
//! a device, and exits with its address. The run is over in any case; the VM is not used again.

use std::io;
use std::sync::Arc;

use snp_model::rmp::PageState;

use super::EmulatedVcpu;
use super::Step;
use crate::platform::Vcpu;
use crate::platform::error::CallError;
use crate::platform::exit::Exit;
use crate::platform::kvm::decode;

/// How often the access is tried again when a signal interrupts it.
const TRIES: u32 = 8;

/// An access that was found out.
struct Access {
    gpa: u64,
    c_bit: bool,
    state: PageState,
}

impl Access {
    /// What was wrong with it.
    fn words(&self) -> String {
        let view = if self.c_bit { "private" } else { "shared" };
        let state = match (self.state.private(), self.state.validated()) {
            (false, _) => "is shared",
            (true, true) => "is private",
            (true, false) if self.c_bit => {
                "is not validated; SNP hardware raises #VC with error code 0x404 in the guest"
            }
            (true, false) => "is private, and not validated",
        };
        format!("a {view} access to {:#x}, but the page {state}", self.gpa)
    }
}

impl EmulatedVcpu {
    /// The guest made an access that is forbidden: the error that says which.
    pub(super) fn forbidden(&mut self) -> Result<Step, CallError> {
        let rip = self.kvm.get_regs().map(|regs| regs.rip);
        let vm = Arc::clone(&self.vm);
        let what = match vm.views.show_allowed_only(&vm.kvm, &vm.model.pages) {
            // Another vCPU was first, and will say what it did.
            Ok(false) => return Ok(Step::Interrupted),
            Ok(true) => self.access(rip.as_ref().copied().unwrap_or_default()),
            Err(_) => None,
        };
        let what = what.map_or_else(
            || "an access that the page's state forbids (its address could not be found out)".to_owned(),
            |access| access.words(),
        );
        let rip = rip.map_or_else(|_| "an unknown RIP".to_owned(), |rip| format!("RIP {rip:#x}"));
        Err(CallError {
            call: "KVM_RUN",
            source: io::Error::other(format!("strict: at {rip} the guest made {what}")),
        })
    }

    /// Makes the access again and sees where it goes.
    fn access(&mut self, rip: u64) -> Option<Access> {
        let mut tries = 0;
        while let Err(e) = self.kvm.fd.run() {
            self.kvm.fd.set_kvm_immediate_exit(0);
            tries += 1;
            if tries == TRIES || ![libc::EINTR, libc::EAGAIN].contains(&e.errno()) {
                return None;
            }
        }
        let address = match decode(self.kvm.fd.get_kvm_run()) {
            Exit::MmioRead { addr, .. } | Exit::MmioWrite { addr, .. } => addr,
            // It cannot emulate an instruction that it cannot fetch.
            Exit::InternalError { .. } => self.kvm.fd.translate_gva(rip).ok()?.physical_address,
            _ => return None,
        };
        let (gpa, c_bit) = self.split(address);
        let state = self.vm.model.pages.state(gpa)?;
        // While the views are aliased, the address lacks the C-bit of an access that is private on hardware.
        let c_bit = c_bit || (state.private() && self.vm.views.aliased());
        let allowed = if c_bit { state.usable() } else { !state.private() };
        (!allowed).then_some(Access { gpa, c_bit, state })
    }
}
