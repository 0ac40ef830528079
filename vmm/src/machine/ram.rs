// SPDX-License-Identifier: Apache-2.0
//! Guest RAM as the monitor sees it: the shared side of each region, mapped into the monitor.
//!
//! The guest may change these bytes at any time, so they are only ever copied in or out, never borrowed. In
//! an SNP guest a region's shared side holds a page only while the guest has declared it shared. Devices
//! reach it by [`super::dma`] only.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion as _;

use crate::platform::mapping::Mapping;
use crate::platform::mapping::OutsideRam;

/// A region of guest RAM.
#[derive(Clone, Debug)]
pub struct Region {
    /// Guest-physical address.
    pub gpa: u64,
    /// Its shared side.
    pub mapping: Arc<Mapping>,
}

impl Region {
    /// Address after the last byte.
    pub fn end(&self) -> u64 {
        self.gpa + self.mapping.len()
    }
}

/// A part of a range that lies in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Index of the region.
    pub region: usize,
    /// Where the part begins in the region, in bytes.
    pub offset: u64,
    /// Where it begins in the range.
    pub done: u64,
    /// Its length.
    pub len: u64,
}

impl Part {
    /// The bytes of a buffer for the range that belong to this part.
    fn bytes(&self) -> Range<usize> {
        self.done as usize..(self.done + self.len) as usize
    }
}

/// All RAM of a guest, in ascending order of address.
#[derive(Clone, Debug)]
pub struct GuestRam {
    regions: Arc<[Region]>,
    memory: GuestMemoryMmap,
}

impl GuestRam {
    /// Maps RAM for `ranges` (guest-physical address, bytes).
    pub fn new(ranges: impl IntoIterator<Item = (u64, u64)>) -> io::Result<Self> {
        let invalid = |e| io::Error::new(io::ErrorKind::InvalidInput, e);
        let mut regions = Vec::new();
        let mut placed = Vec::new();
        for (gpa, len) in ranges {
            let mapping = Arc::new(Mapping::anonymous(len)?);
            placed.push(Arc::new(mapping.at_address(gpa).ok_or(io::ErrorKind::InvalidInput)?));
            regions.push(Region { gpa, mapping });
        }
        regions.sort_by_key(|region| region.gpa);
        placed.sort_by_key(|region| region.start_addr());
        let memory = GuestMemoryMmap::from_arc_regions(placed).map_err(invalid)?;
        Ok(GuestRam { regions: regions.into(), memory })
    }

    /// The regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// As `vm-memory` has it.
    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// A range, split at the borders of regions; an error unless all of it is RAM.
    pub fn parts(&self, gpa: u64, len: u64) -> io::Result<impl Iterator<Item = Part>> {
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, OutsideRam { start: gpa, len });
        let end = gpa.checked_add(len).ok_or_else(outside)?;
        let first = self.regions.partition_point(|region| region.end() <= gpa);
        let part = move |(region, known): (usize, &Region)| {
            let (start, stop) = (known.gpa.max(gpa), known.end().min(end));
            let offset = start - known.gpa;
            (start < stop).then(|| Part { region, offset, done: start - gpa, len: stop - start })
        };
        let parts = || {
            let regions = self.regions.iter().enumerate().skip(first);
            regions.take_while(move |(_, known)| known.gpa < end).filter_map(part)
        };
        // Regions do not overlap.
        if parts().map(|part| part.len).sum::<u64>() == len { Ok(parts()) } else { Err(outside()) }
    }

    fn mapping(&self, part: &Part) -> &Mapping {
        &self.regions[part.region].mapping
    }

    fn check(&self, gpa: u64, len: usize) -> io::Result<()> {
        self.parts(gpa, len as u64).map(drop)
    }

    /// Copies out of guest RAM.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(gpa, buf.len())?;
        self.memory.read_slice(buf, GuestAddress(gpa)).map_err(io::Error::other)
    }

    /// Copies into guest RAM.
    pub fn write(&self, gpa: u64, data: &[u8]) -> io::Result<()> {
        self.check(gpa, data.len())?;
        self.memory.write_slice(data, GuestAddress(gpa)).map_err(io::Error::other)
    }

    /// As [`GuestRam::read`], by way of the kernel; see [`Mapping::try_read`].
    pub fn try_read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut parts = self.parts(gpa, buf.len() as u64)?;
        parts.try_for_each(|part| self.mapping(&part).try_read(part.offset, &mut buf[part.bytes()]))
    }

    /// As [`GuestRam::write`], by way of the kernel; see [`Mapping::try_read`].
    pub fn try_write(&self, gpa: u64, data: &[u8]) -> io::Result<()> {
        let mut parts = self.parts(gpa, data.len() as u64)?;
        parts.try_for_each(|part| self.mapping(&part).try_write(part.offset, &data[part.bytes()]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_may_span_adjacent_regions_but_not_a_hole() {
        let ram = GuestRam::new([(0x0, 0x2000), (0x2000, 0x1000), (0x10000, 0x1000)]).unwrap();
        ram.write(0x1ffe, &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        ram.read(0x1ffe, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
        assert!(ram.write(0x2ffe, &[1, 2, 3, 4]).is_err());
        assert!(ram.read(u64::MAX - 1, &mut back).is_err());
        let mut head = [9; 2];
        ram.read(0x2ffe, &mut head).unwrap();
        assert_eq!(head, [0, 0], "a refused write must not have started");
    }
}
