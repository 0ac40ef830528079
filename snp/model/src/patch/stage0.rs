// SPDX-License-Identifier: Apache-2.0
//! Where stage0 executes SNP instructions: its build says so.

use snp::stage0::BUILT;

use super::code::CodeMemory;
use super::code::HANDOVER;
use super::code::Opcode;
use super::code::PatchError;
use super::code::Ports;
use super::code::Site;
use super::code::SiteList;
use super::code::expect;
use super::code::read;
use super::code::write;

/// What the emulated platform has to know about stage0, beside its page. Never measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage0Sites {
    /// Its instructions; offsets are guest-physical addresses.
    pub sites: SiteList,
    /// Guest-physical address of [`HANDOVER`]. The kernel may be patched once it is reached, and not before:
    /// until then stage0 compares the kernel with its hash.
    pub handover: u64,
}

impl Stage0Sites {
    /// Patches stage0 in launched memory: `OUT port, AL` and a two-byte NOP at each place.
    pub fn patch_at_launch(&self, memory: &mut impl CodeMemory, ports: &Ports) -> Result<(), PatchError> {
        let found: [u8; 4] = read(memory, self.handover)?;
        expect("stage0's end", self.handover, self.handover, &HANDOVER, &found)?;
        self.sites.patch(memory, 0, ports)?;
        write(memory, self.handover, &ports.patched_handover())
    }
}

/// Where this build's stage0 is to be patched.
pub fn stage0_sites() -> Stage0Sites {
    let site = |(gpa, kind): &(u64, u32)| Site {
        offset: *gpa,
        opcode: if *kind == 0 { Opcode::Vmgexit } else { Opcode::Pvalidate },
    };
    let mut sites: Vec<Site> = BUILT.sites.iter().map(site).collect();
    sites.sort_by_key(|site| site.offset);
    Stage0Sites { sites: SiteList { sites, entry_offset: BUILT.entry }, handover: BUILT.hook }
}
