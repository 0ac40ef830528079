// SPDX-License-Identifier: Apache-2.0
//! What an IGVM file has for SEV-SNP, and the digest of it.

use std::ops::Range;

use super::error::IgvmError;
use super::error::ZeroPages;
use crate::digest::LaunchDigest;
use crate::digest::trace_records;
use crate::identity::IdAuth;
use crate::identity::IdBlock;
use crate::plan::Bytes;
use crate::plan::PageType;
use crate::plan::Record;
use crate::policy::GuestPolicy;

/// An IGVM file's part for SEV-SNP.
#[derive(Clone, Debug)]
pub struct Igvm {
    /// Pages and save areas in directive order. A save area is a record of type VMSA.
    pub records: Vec<Record>,
    /// The policy that the file asks for.
    pub policy: Option<GuestPolicy>,
    /// The ID block in the file.
    pub identity: Option<(IdBlock, IdAuth)>,
    /// How pages without data were taken.
    pub zero_pages: ZeroPages,
    /// What KVM could not do with this file; empty if it can launch it.
    pub(super) refusals: Vec<String>,
    /// Pages that are shared when the guest starts. Not measured.
    pub(super) shared: Vec<Record>,
    /// Memory that the guest must have: offset of the directive, and the range.
    pub(super) required: Vec<(usize, Range<u64>)>,
    /// Parameter areas, with the record that each is inserted as.
    pub(super) areas: Vec<Area>,
    /// What the loader writes into them.
    pub(super) parameters: Vec<Parameter>,
}

/// A parameter area.
#[derive(Clone, Debug)]
pub(super) struct Area {
    pub(super) index: u32,
    pub(super) len: u64,
    /// What it holds before parameters are written; empty for zeros.
    pub(super) initial: Bytes,
    /// The record that it was inserted as.
    pub(super) record: Option<usize>,
}

/// A value that the loader writes into an area.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    /// Offset of the directive in the file.
    pub(super) offset: usize,
    pub(super) kind: u32,
    pub(super) area: u32,
    pub(super) byte_offset: u32,
}

impl Igvm {
    /// The launch digest, and the digest after each record.
    pub fn digests(&self) -> (LaunchDigest, Vec<LaunchDigest>) {
        let after = trace_records(&self.records);
        (after.last().copied().unwrap_or(LaunchDigest::START), after)
    }

    /// Compares the file's ID block with its contents and its policy.
    pub fn check_identity(&self) -> Result<(), IgvmError> {
        let Some((block, _)) = &self.identity else { return Ok(()) };
        let (computed, _) = self.digests();
        if block.launch_digest == computed {
            return Ok(());
        }
        let mut other = self.clone();
        for record in &mut other.records {
            let no_data = record.contents.as_slice().is_empty();
            record.page_type = match record.page_type {
                PageType::Zero => PageType::Normal,
                PageType::Normal if no_data => PageType::Zero,
                same => same,
            };
        }
        let hint = if other.digests().0 == block.launch_digest {
            "; with the other convention it matches"
        } else {
            "; with neither convention it matches"
        };
        let (block, zero_pages) = (block.launch_digest, self.zero_pages);
        Err(IgvmError::IdBlockDigest { block, computed, zero_pages, hint })
    }

    /// All pages that enter the guest, measured or not; a save area is none of its memory.
    pub fn pages(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(|r| r.page_type != PageType::Vmsa).chain(&self.shared)
    }
}
