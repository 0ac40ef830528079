// SPDX-License-Identifier: Apache-2.0
//! What an IGVM file becomes at a launch by KVM: the plan, and parameters that the loader fills in, shared
//! pages, memory.
//!
//! Parameter areas enter the guest as UNMEASURED pages, so what is written into them is the host's word and
//! changes no digest. A parameter that this machine cannot answer is refused by name rather than left zero:
//! the guest could not tell.

use std::ops::Range;

use super::error::IgvmError;
use super::file::Igvm;
use super::file::Parameter;
use super::header::kind;
use crate::board::Board;
use crate::board::acpi;
use crate::board::layout;
use crate::plan::Bytes;
use crate::plan::LaunchPlan;
use crate::plan::PAGE_SIZE;
use crate::plan::PageType;
use crate::plan::Record;
use crate::vmsa::CR4_MCE;
use crate::vmsa::EFER_SVME;
use crate::vmsa::VMSA_GPA;
use crate::vmsa::VmsaState;

/// What the loader tells the guest, and must have for it.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The machine.
    pub board: &'a Board,
    /// The command line, if the file wants one.
    pub cmdline: &'a str,
    /// The CPUID page.
    pub cpuid: Bytes,
}

/// A file as it is launched.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The plan; its digest is that of [`Igvm::kvm_plan`].
    pub plan: LaunchPlan,
    /// Pages that are shared when the guest starts.
    pub shared: Vec<Record>,
}

/// The name of a parameter, as the specification has it.
fn name(kind: u32) -> &'static str {
    match kind {
        kind::VP_COUNT => "VP_COUNT_PARAMETER",
        kind::SRAT => "SRAT",
        kind::MADT => "MADT",
        kind::MMIO_RANGES => "MMIO_RANGES",
        kind::MEMORY_MAP => "MEMORY_MAP",
        kind::COMMAND_LINE => "COMMAND_LINE",
        kind::SLIT => "SLIT",
        kind::PPTT => "PPTT",
        kind::DEVICE_TREE => "DEVICE_TREE",
        _ => "ENVIRONMENT_INFO",
    }
}

/// Page number and page count of a range.
fn pages(range: &Range<u64>) -> [[u8; 8]; 2] {
    [range.start / PAGE_SIZE, (range.end - range.start) / PAGE_SIZE].map(u64::to_le_bytes)
}

impl Parameter {
    /// What is written, or `None` if this machine has no such thing.
    fn value(&self, facts: &Facts) -> Option<Vec<u8>> {
        match self.kind {
            kind::VP_COUNT => Some(facts.board.vcpus.to_le_bytes().to_vec()),
            kind::MADT => Some(acpi::madt(facts.board)),
            kind::MMIO_RANGES => {
                // Room for two; the second is empty.
                let mut value = pages(&(layout::HOLE_START..layout::HOLE_END)).concat();
                value.resize(32, 0);
                Some(value)
            }
            kind::MEMORY_MAP => {
                // Type, flags and reserved are 0: ordinary memory. An entry of no pages ends the map.
                let entry = |range: &Range<u64>| [pages(range).concat(), vec![0; 8]].concat();
                Some(facts.board.ram().iter().map(entry).chain([vec![0; 24]]).flatten().collect())
            }
            kind::COMMAND_LINE => Some([facts.cmdline.as_bytes(), &[0]].concat()),
            // Bit 0: memory is shared until the guest accepts it. Here it is private.
            kind::ENVIRONMENT_INFO => Some(vec![0; 4]),
            _ => None,
        }
    }

    fn write(&self, facts: &Facts, area: u64, contents: &mut Vec<u8>) -> Result<(), IgvmError> {
        let name = name(self.kind);
        let refuse = |reason| Err(IgvmError::Machine { offset: self.offset, reason });
        let Some(value) = self.value(facts) else {
            return refuse(format!("the file asks for the parameter {name}, which cvmm does not have"));
        };
        let start = self.byte_offset as usize;
        let end = start.saturating_add(value.len());
        if end as u64 > area {
            return refuse(format!(
                "the parameter {name} takes {} bytes from {start:#x} on, but its area has {area:#x}",
                value.len()
            ));
        }
        if contents.len() < end {
            contents.resize(end, 0);
        }
        if let Some(place) = contents.get_mut(start..end) {
            place.copy_from_slice(&value);
        }
        Ok(())
    }
}

impl Igvm {
    /// The plan with which KVM launches this file, if it can.
    pub fn kvm_plan(&self) -> Result<LaunchPlan, IgvmError> {
        let refuse = |reason: String| Err(IgvmError::Kvm(reason));
        if let Some(reason) = self.refusals.first() {
            return refuse(reason.clone());
        }
        let Some((vmsa, pages)) =
            self.records.split_last().filter(|(last, _)| last.page_type == PageType::Vmsa)
        else {
            return refuse("its last page is no save area (VP_CONTEXT); KVM adds the save area last".into());
        };
        if let Some(other) = pages.iter().find(|record| record.page_type == PageType::Vmsa) {
            return refuse(format!(
                "it has a second save area, at {:#x}; KVM takes one, of the first vCPU",
                other.gpa
            ));
        }
        if vmsa.gpa != VMSA_GPA {
            return refuse(format!("its save area is at {:#x}; KVM measures it at {VMSA_GPA:#x}", vmsa.gpa));
        }
        let mut page = [0; PAGE_SIZE as usize];
        vmsa.read_page(0, &mut page);
        let state = kvm_state(&page).map_err(IgvmError::Kvm)?;
        let plan = LaunchPlan { records: pages.to_vec(), vcpus: vec![state] };
        plan.check()?;
        if !self.shared.is_empty() {
            // A page is private or shared. One that is both would fail in the middle of the launch, without a
            // reason.
            let all = plan.records.iter().chain(&self.shared).cloned().collect();
            LaunchPlan { records: all, vcpus: plan.vcpus.clone() }.check()?;
        }
        Ok(plan)
    }

    /// The file as it is launched on a machine with `facts`, if KVM and the machine can.
    pub fn launch(&self, facts: &Facts) -> Result<Loaded, IgvmError> {
        let mut plan = self.kvm_plan()?;
        let memory = facts.board.ram();
        for (offset, range) in &self.required {
            let covered = memory.iter().any(|ram| ram.start <= range.start && range.end <= ram.end);
            if !covered {
                let reason = format!(
                    "the file requires memory at {:#x}..{:#x}, which this guest does not have; give more `memory`",
                    range.start, range.end
                );
                return Err(IgvmError::Machine { offset: *offset, reason });
            }
        }
        for record in plan.records.iter_mut().filter(|r| r.page_type == PageType::Cpuid) {
            record.contents = facts.cpuid.clone();
        }
        for area in &self.areas {
            let Some(record) = area.record.and_then(|at| plan.records.get_mut(at)) else { continue };
            let mut contents = area.initial.as_slice().to_vec();
            for parameter in self.parameters.iter().filter(|p| p.area == area.index) {
                parameter.write(facts, area.len, &mut contents)?;
            }
            record.contents = contents.into();
        }
        Ok(Loaded { plan, shared: self.shared.clone() })
    }
}

/// The registers in a save area, or what KVM could not put into the page that it builds.
fn kvm_state(page: &[u8; PAGE_SIZE as usize]) -> Result<VmsaState, String> {
    let state = VmsaState::decode(page).map_err(|refusal| format!("its save area: {refusal}"))?;
    if let Some(at) = state.encode().iter().zip(page).position(|(ours, file)| ours != file) {
        return Err(format!(
            "its save area sets byte {at:#x} to {:#x}, which the monitor cannot import",
            page[at]
        ));
    }
    if state.sev_features & 2 != 0 {
        return Err("its save area uses virtual top of memory (sev_features bit 1), KVM does not".into());
    }
    if state.sev_features & 1 == 0 {
        return Err("its save area lacks sev_features bit 0 (SNP), which KVM sets".into());
    }
    if state.efer & EFER_SVME == 0 || state.cr4 & CR4_MCE == 0 {
        return Err("its save area lacks EFER.SVME (0x1000) or CR4.MCE (0x40), which KVM sets".into());
    }
    if state.cr0 != 0x31 && state.cr0 != 0x30 && state.cr0 & (1 << 31) == 0 {
        return Err(format!("its save area has CR0 {:#x}, expected 0x30, 0x31 or paging", state.cr0));
    }
    if state.dr7 != 0x400 {
        return Err(format!("its save area has DR7 {:#x}, KVM refuses all but 0x400", state.dr7));
    }
    let reset = VmsaState::reset();
    for (name, found, kept) in
        [("DR6", state.dr6, reset.dr6), ("MXCSR", state.mxcsr.into(), reset.mxcsr.into())]
    {
        if found != kept {
            return Err(format!(
                "its save area has {name} {found:#x}; KVM keeps its reset value {kept:#x} and has no call to set it"
            ));
        }
    }
    Ok(state)
}
