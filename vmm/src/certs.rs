// SPDX-License-Identifier: Apache-2.0
//! The certificate table for a guest that asks for it together with its report.
//!
//! `KVM_EXIT_SNP_REQ_CERTS` (Linux 7.0, `Documentation/virt/kvm/api.rst`). The guest chooses address and size of the buffer,
//! so both are checked: only shared RAM is written to. Certificates spare the guest a request to AMD's key server; it must
//! verify them all the same.

use crate::memory::GuestRam;
use crate::memory::PAGE;

/// Where the table comes from.
pub struct Certificates {
    table: Vec<u8>,
    ram: GuestRam,
}

/// Answer to the exit: what goes into `ret`, and the pages that are needed if it is ENOSPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 0, ENOSPC or EIO.
    pub ret: i32,
    /// Pages, for ENOSPC.
    pub npages: u64,
}

impl Certificates {
    /// Offers `table` to a guest with this RAM.
    pub fn new(table: Vec<u8>, ram: GuestRam) -> Self {
        Certificates { table, ram }
    }

    /// Writes the table to the guest's buffer at `gpa`. `is_shared` says whether a page may be written by the host.
    pub fn answer(&self, gpa: u64, npages: u64, is_shared: impl Fn(u64) -> bool) -> Answer {
        let needed = (self.table.len() as u64).div_ceil(PAGE);
        if npages < needed {
            return Answer { ret: libc::ENOSPC, npages: needed };
        }
        let shared = (0..needed)
            .all(|page| page.checked_mul(PAGE).and_then(|o| gpa.checked_add(o)).is_some_and(&is_shared));
        let written = gpa.is_multiple_of(PAGE) && shared && self.ram.write(gpa, &self.table).is_ok();
        Answer { ret: if written { 0 } else { libc::EIO }, npages }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificates() -> Certificates {
        let ram = GuestRam::new([(0, 0x10000)]).unwrap();
        Certificates::new(vec![7; 0x1800], ram)
    }

    #[test]
    fn a_short_buffer_is_told_the_size_and_nothing_is_written() {
        let c = certificates();
        assert_eq!(c.answer(0x1000, 1, |_| true), Answer { ret: libc::ENOSPC, npages: 2 });
        let mut byte = [1];
        c.ram.read(0x1000, &mut byte).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn only_shared_ram_is_written() {
        let c = certificates();
        assert_eq!(c.answer(0x1000, 2, |gpa| gpa != 0x2000).ret, libc::EIO);
        assert_eq!(c.answer(0xf000, 2, |_| true).ret, libc::EIO);
        assert_eq!(c.answer(u64::MAX - 0xfff, 2, |_| true).ret, libc::EIO);
        assert_eq!(c.answer(0x1000, 2, |_| true).ret, 0);
        let mut bytes = [0; 2];
        c.ram.read(0x27ff, &mut bytes).unwrap();
        assert_eq!(bytes, [7, 0]);
    }
}
