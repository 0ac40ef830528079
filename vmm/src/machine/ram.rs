// SPDX-License-Identifier: Apache-2.0
//! Guest RAM as the monitor sees it: the shared side of each region, mapped into the monitor.
//!
//! The guest may change these bytes at any time, so they are only ever copied in or out, never borrowed. In an SNP guest a
//! region's shared side holds a page only while the guest has declared it shared.

use std::io;
use std::sync::Arc;

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

/// All RAM of a guest, in ascending order of address.
#[derive(Clone, Debug)]
pub struct GuestRam {
    regions: Arc<[Region]>,
}

impl GuestRam {
    /// Maps RAM for `ranges` (guest-physical address, bytes).
    pub fn new(ranges: impl IntoIterator<Item = (u64, u64)>) -> io::Result<Self> {
        let mut regions = Vec::new();
        for (gpa, len) in ranges {
            regions.push(Region { gpa, mapping: Arc::new(Mapping::anonymous(len)?) });
        }
        regions.sort_by_key(|r| r.gpa);
        Ok(GuestRam { regions: regions.into() })
    }

    /// The regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Splits a range at region borders and calls `f` with (region index, offset in the region, offset in the range,
    /// length) for each part. Nothing is called unless the whole range is RAM.
    pub fn for_each_part(
        &self,
        gpa: u64,
        len: u64,
        mut f: impl FnMut(usize, u64, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut parts = Vec::new();
        let mut done = 0;
        while done < len {
            let at = gpa.checked_add(done);
            let found = at.and_then(|at| {
                let i = self.regions.iter().position(|r| r.gpa <= at && at < r.end())?;
                Some((i, at - self.regions[i].gpa, (self.regions[i].end() - at).min(len - done)))
            });
            let Some((index, offset, part)) = found else {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, OutsideRam { start: gpa, len }));
            };
            parts.push((index, offset, done, part));
            done += part;
        }
        parts.into_iter().try_for_each(|(index, offset, done, part)| f(index, offset, done, part))
    }

    /// Copies out of guest RAM.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        self.for_each_part(gpa, buf.len() as u64, |index, offset, done, len| {
            let buf = &mut buf[done as usize..(done + len) as usize];
            self.regions[index].mapping.read(offset, buf).map_err(io::Error::other)
        })
    }

    /// As [`GuestRam::read`], by way of the kernel; see [`Mapping::try_read`].
    pub fn try_read(&self, gpa: u64, buf: &mut [u8]) -> io::Result<()> {
        self.for_each_part(gpa, buf.len() as u64, |index, offset, done, len| {
            self.regions[index].mapping.try_read(offset, &mut buf[done as usize..(done + len) as usize])
        })
    }

    /// As [`GuestRam::write`], by way of the kernel; see [`Mapping::try_read`].
    pub fn try_write(&self, gpa: u64, data: &[u8]) -> io::Result<()> {
        self.for_each_part(gpa, data.len() as u64, |index, offset, done, len| {
            self.regions[index].mapping.try_write(offset, &data[done as usize..(done + len) as usize])
        })
    }

    /// Copies into guest RAM.
    pub fn write(&self, gpa: u64, data: &[u8]) -> io::Result<()> {
        self.for_each_part(gpa, data.len() as u64, |index, offset, done, len| {
            let data = &data[done as usize..(done + len) as usize];
            self.regions[index].mapping.write(offset, data).map_err(io::Error::other)
        })
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
