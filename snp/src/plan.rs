// SPDX-License-Identifier: Apache-2.0
//! The launch plan: everything that enters a guest before its first instruction, in order.
//!
//! Every image kind does nothing but produce a [`LaunchPlan`]. Two interpreters consume it: [`crate::digest`]
//! computes the launch digest, and the monitor's platform executes the launch. So the digest that was
//! predicted is the digest that is launched, by construction. A plain (non-SNP) guest is a plan too; its
//! records are copied and nothing is measured.
//!
//! Order is meaning: the SNP firmware hashes pages in the order of the launch commands
//! (SEV-SNP Firmware ABI Specification, revision 1.58, section 8.17 `SNP_LAUNCH_UPDATE`).

pub mod bytes;
pub mod dump;

use std::borrow::Cow;

pub use crate::page::PAGE_SIZE;
pub use crate::page::PageType;
pub use bytes::Bytes;

use crate::vmsa::VmsaState;

/// One run of pages of one type, entering the guest in ascending order of address.
#[derive(Clone, Debug)]
pub struct Record {
    /// Guest-physical address of the first page, 4 KiB aligned.
    pub gpa: u64,
    /// Length in bytes, a positive multiple of 4 KiB.
    pub len: u64,
    /// What kind of page each one is.
    pub page_type: PageType,
    /// Contents from the start of the run; what lies beyond their end is zero. Empty for ZERO and SECRETS.
    pub contents: Bytes,
    /// What a reader of `cvmm measure --explain` sees, such as "kernel".
    pub name: Cow<'static, str>,
}

impl Record {
    /// A run that holds `contents`, padded with zeros to whole pages.
    pub fn new(
        gpa: u64,
        page_type: PageType,
        contents: impl Into<Bytes>,
        name: impl Into<Cow<'static, str>>,
    ) -> Self {
        let contents = contents.into();
        let len = (contents.as_slice().len() as u64).next_multiple_of(PAGE_SIZE).max(PAGE_SIZE);
        Record { gpa, len, page_type, contents, name: name.into() }
    }

    /// A run with no contents of its own (ZERO, SECRETS).
    pub fn empty(gpa: u64, len: u64, page_type: PageType, name: impl Into<Cow<'static, str>>) -> Self {
        Record { gpa, len, page_type, contents: Bytes::from(Vec::new()), name: name.into() }
    }

    /// Copies the page at `offset` bytes into the run to `page`, zero-filled beyond the contents.
    pub fn read_page(&self, offset: u64, page: &mut [u8; PAGE_SIZE as usize]) {
        let bytes = self.contents.as_slice();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let end = bytes.len().min(start.saturating_add(page.len()));
        let (head, tail) = page.split_at_mut(end - start);
        head.copy_from_slice(&bytes[start..end]);
        tail.fill(0);
    }

    /// Address after the last byte.
    pub fn end(&self) -> u64 {
        self.gpa.saturating_add(self.len)
    }
}

/// Why a plan cannot be measured or launched.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PlanError {
    /// A record does not consist of whole pages.
    #[error(
        "{name}: address {gpa:#x} and length {len:#x} must be multiples of 4 KiB, and the length positive"
    )]
    Unaligned { name: String, gpa: u64, len: u64 },
    /// A record reaches beyond the end of the address space, or its contents beyond the record.
    #[error("{name}: {len:#x} bytes at {gpa:#x} do not fit")]
    TooLong { name: String, gpa: u64, len: u64 },
    /// Two records share a page; the firmware accepts each page once.
    #[error("{first} and {second} both cover guest-physical address {gpa:#x}")]
    Overlap {
        /// The record that comes first in address order.
        first: String,
        second: String,
        gpa: u64,
    },
    /// A VMSA page as a record: only `LAUNCH_FINISH` adds those.
    #[error("{name}: a VMSA page cannot be a record of a plan, KVM adds it when the launch finishes")]
    VmsaRecord { name: String },
    /// A plan with no vCPU cannot run.
    #[error("the plan has no vCPU")]
    NoVcpu,
}

/// What enters a guest before it runs: pages in order, then one register state per vCPU.
#[derive(Clone, Debug, Default)]
pub struct LaunchPlan {
    /// Page records in launch order.
    pub records: Vec<Record>,
    /// Initial state of each vCPU, in vCPU order; index = vCPU id = APIC id.
    pub vcpus: Vec<VmsaState>,
}

impl LaunchPlan {
    /// Number of 4 KiB pages that the firmware takes, VMSAs included: about 1 ms each on hardware.
    pub fn launch_pages(&self) -> u64 {
        self.records.iter().map(|r| r.len / PAGE_SIZE).sum::<u64>() + self.vcpus.len() as u64
    }

    /// Checks what every interpreter relies on: whole pages, no overlap, at least one vCPU.
    pub fn check(&self) -> Result<(), PlanError> {
        if self.vcpus.is_empty() {
            return Err(PlanError::NoVcpu);
        }
        for r in &self.records {
            let (name, gpa, len) = (r.name.to_string(), r.gpa, r.len);
            if r.page_type == PageType::Vmsa {
                return Err(PlanError::VmsaRecord { name });
            }
            if gpa % PAGE_SIZE != 0 || len % PAGE_SIZE != 0 || len == 0 {
                return Err(PlanError::Unaligned { name, gpa, len });
            }
            if gpa.checked_add(len).is_none() || r.contents.as_slice().len() as u64 > len {
                return Err(PlanError::TooLong { name, gpa, len });
            }
        }
        let mut order: Vec<&Record> = self.records.iter().collect();
        order.sort_by_key(|r| r.gpa);
        for pair in order.windows(2) {
            if let [a, b] = pair
                && a.end() > b.gpa
            {
                return Err(PlanError::Overlap {
                    first: a.name.to_string(),
                    second: b.name.to_string(),
                    gpa: b.gpa,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(records: Vec<Record>) -> LaunchPlan {
        LaunchPlan { records, vcpus: vec![VmsaState::reset()] }
    }

    #[test]
    fn overlapping_records_are_refused_whatever_their_order() {
        let a = Record::empty(0x3000, 0x2000, PageType::Zero, "a");
        let b = Record::empty(0x2000, 0x2000, PageType::Zero, "b");
        let error = plan(vec![a, b]).check().unwrap_err();
        assert_eq!(error, PlanError::Overlap { first: "b".into(), second: "a".into(), gpa: 0x3000 });
    }

    #[test]
    fn partial_pages_and_wrapping_ranges_are_refused() {
        assert!(matches!(
            plan(vec![Record::empty(0x800, 0x1000, PageType::Zero, "a")]).check(),
            Err(PlanError::Unaligned { .. })
        ));
        assert!(matches!(
            plan(vec![Record::empty(!0xfff, 0x2000, PageType::Zero, "a")]).check(),
            Err(PlanError::TooLong { .. })
        ));
    }

    #[test]
    fn the_last_page_is_padded_with_zeros() {
        let record = Record::new(0, PageType::Normal, vec![7; 4097], "a");
        assert_eq!(record.len, 8192);
        let mut page = [1; 4096];
        record.read_page(4096, &mut page);
        assert_eq!((page[0], page[1], page[4095]), (7, 0, 0));
    }
}
