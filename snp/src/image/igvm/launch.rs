// SPDX-License-Identifier: Apache-2.0
//! What an IGVM file needs at run time beside its measured pages: parameters that the loader fills in, shared pages, memory.
//!
//! Parameter areas enter the guest as UNMEASURED pages, so what is written into them is the host's word and changes no
//! digest. A parameter that this machine cannot answer is refused by name rather than left zero: the guest could not tell.

use std::ops::Range;

use super::Builder;
use super::Header;
use super::Igvm;
use super::IgvmError;
use super::header;
use super::u32_at;
use super::u64_at;
use crate::board::Board;
use crate::board::acpi;
use crate::board::layout;
use crate::plan::Bytes;
use crate::plan::LaunchPlan;
use crate::plan::PAGE_SIZE;
use crate::plan::PageType;
use crate::plan::Record;

/// Most bytes of parameters in a file: each area is held in memory, and each of its pages costs a link of the digest's chain.
const PARAMETERS_MAX: u64 = 16 << 20;
/// Most parameters that a file asks for: there are eleven kinds.
const DIRECTIVES_MAX: usize = 4096;

/// Most parameter areas of a file: each directive about one looks for it among all.
const AREAS_MAX: usize = 256;

/// A parameter area.
#[derive(Clone, Debug)]
pub(super) struct Area {
    index: u32,
    len: u64,
    /// What it holds before parameters are written; empty for zeros.
    initial: Bytes,
    /// The record that it was inserted as.
    record: Option<usize>,
}

/// A value that the loader writes into an area.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    /// Offset of the directive in the file.
    offset: usize,
    kind: u32,
    area: u32,
    byte_offset: u32,
}

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
        header::VP_COUNT => "VP_COUNT_PARAMETER",
        header::SRAT => "SRAT",
        header::MADT => "MADT",
        header::MMIO_RANGES => "MMIO_RANGES",
        header::MEMORY_MAP => "MEMORY_MAP",
        header::COMMAND_LINE => "COMMAND_LINE",
        header::SLIT => "SLIT",
        header::PPTT => "PPTT",
        header::DEVICE_TREE => "DEVICE_TREE",
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
            header::VP_COUNT => Some(facts.board.vcpus.to_le_bytes().to_vec()),
            header::MADT => Some(acpi::madt(facts.board)),
            header::MMIO_RANGES => {
                // Room for two; the second is empty.
                let mut value = pages(&(layout::HOLE_START..layout::HOLE_END)).concat();
                value.resize(32, 0);
                Some(value)
            }
            header::MEMORY_MAP => {
                // Type, flags and reserved are 0: ordinary memory. An entry of no pages ends the map.
                let entry = |range: &Range<u64>| [pages(range).concat(), vec![0; 8]].concat();
                Some(facts.board.ram().iter().map(entry).chain([vec![0; 24]]).flatten().collect())
            }
            header::COMMAND_LINE => Some([facts.cmdline.as_bytes(), &[0]].concat()),
            // Bit 0: memory is shared until the guest accepts it. Here it is private.
            header::ENVIRONMENT_INFO => Some(vec![0; 4]),
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
    /// All pages that enter the guest, measured or not; a save area is none of its memory.
    pub fn pages(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(|r| r.page_type != PageType::Vmsa).chain(&self.shared)
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

impl Builder<'_> {
    pub(super) fn parameter_area(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(16)?;
        let (len, index) = (u64_at(header.body, 0), u32_at(header.body, 8));
        let total: u64 = self.igvm.areas.iter().map(|area| area.len).sum();
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || len > PARAMETERS_MAX - total.min(PARAMETERS_MAX) {
            let expected = "whole pages, all areas together at most 16 MiB";
            return Err(header.error(0, "size of a parameter area", len, expected));
        }
        if self.igvm.areas.len() == AREAS_MAX {
            let expected = format!("at most {AREAS_MAX} areas");
            return Err(header.error(8, "index of one parameter area more", index.into(), expected));
        }
        if self.igvm.areas.iter().any(|area| area.index == index) {
            return Err(header.error(8, "index of a parameter area", index.into(), "a new one"));
        }
        let initial = match u32_at(header.body, 12) {
            0 => Bytes::from(Vec::new()),
            _ => self.data(header, 12, len as usize)?,
        };
        self.igvm.areas.push(Area { index, len, initial, record: None });
        Ok(())
    }

    pub(super) fn parameter_insert(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(16)?;
        if u32_at(header.body, 8) & self.mask == 0 {
            return Ok(());
        }
        let gpa = self.address(header, u64_at(header.body, 0))?;
        let index = u32_at(header.body, 12);
        let next = self.igvm.records.len();
        let area = self.igvm.areas.iter_mut().find(|area| area.index == index);
        let area = area.ok_or_else(|| {
            header.error(12, "index of a parameter area", index.into(), "one that was declared before")
        })?;
        if area.record.is_some() {
            let expected = "an area that is inserted once";
            return Err(header.error(12, "index of a parameter area", index.into(), expected));
        }
        area.record = Some(next);
        self.igvm.records.push(Record::empty(gpa, area.len, PageType::Unmeasured, "parameters"));
        Ok(())
    }

    pub(super) fn parameter(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(8)?;
        let (area, byte_offset) = (u32_at(header.body, 0), u32_at(header.body, 4));
        if !self.igvm.areas.iter().any(|known| known.index == area) {
            let expected = "one that was declared before";
            return Err(header.error(0, "index of a parameter area", area.into(), expected));
        }
        if self.igvm.parameters.len() == DIRECTIVES_MAX {
            let expected = format!("at most {DIRECTIVES_MAX} parameters");
            return Err(header.error(0, "area of one parameter more", area.into(), expected));
        }
        self.igvm.parameters.push(Parameter {
            offset: header.offset,
            kind: header.kind(),
            area,
            byte_offset,
        });
        Ok(())
    }

    pub(super) fn required_memory(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(24)?;
        if u32_at(header.body, 8) & self.mask != 0 {
            let start = self.address(header, u64_at(header.body, 0))?;
            let len = u64::from(u32_at(header.body, 12));
            if self.igvm.required.len() == DIRECTIVES_MAX {
                let expected = format!("at most {DIRECTIVES_MAX} ranges");
                return Err(header.error(0, "address of one range of required memory more", start, expected));
            }
            self.igvm.required.push((header.offset, start..start.saturating_add(len)));
        }
        Ok(())
    }
}
