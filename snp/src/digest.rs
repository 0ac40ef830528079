// SPDX-License-Identifier: Apache-2.0
//! The launch digest: what the firmware will report as the guest's measurement, computed from the plan alone.
//!
//! SEV-SNP Firmware ABI 1.58, section 8.17.2, `PAGE_INFO`. The digest starts as 48 zero bytes; each page
//! replaces it by the SHA-384 of a 112-byte structure that holds the previous digest, the hash of the page's
//! contents (zero where contents are not measured), the page type and the address. VMSAs come last, in vCPU
//! order, all at one fixed address.

mod lanes;
mod pages;

use std::fmt;

use sha2::Digest as _;
use sha2::Sha384;

use crate::plan::LaunchPlan;
use crate::plan::PageType;
use crate::plan::PlanError;
use crate::plan::Record;
use crate::vmsa::VMSA_GPA;
use crate::vmsa::VmsaState;

/// A SHA-384 launch digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LaunchDigest(pub [u8; 48]);

impl LaunchDigest {
    /// The digest before the first page.
    pub const START: LaunchDigest = LaunchDigest([0; 48]);

    /// Takes in one page; `contents` is the SHA-384 of the page, or zeros for types whose contents are not
    /// measured.
    pub fn extend(&mut self, page_type: PageType, gpa: u64, contents: &[u8; 48]) {
        let mut info = [0; 112];
        info[..48].copy_from_slice(&self.0);
        info[48..96].copy_from_slice(contents);
        info[96..98].copy_from_slice(&112u16.to_le_bytes());
        info[98] = page_type as u8;
        // Bytes 99 to 103: IMI flag, permissions of VMPL 3, 2 and 1, reserved. All zero for KVM launches.
        info[104..].copy_from_slice(&gpa.to_le_bytes());
        self.0 = Sha384::digest(info).into();
    }
}

impl fmt::Display for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LaunchDigest({self})")
    }
}

/// The digest after every step of a launch: what `--explain` shows and `--diff` compares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Digest after each record, in launch order.
    pub records: Vec<LaunchDigest>,
    /// Digest after each vCPU: element `n - 1` is the launch digest of the same guest with `n` vCPUs.
    pub vcpus: Vec<LaunchDigest>,
}

impl Trace {
    /// The launch digest of the guest with all its vCPUs.
    pub fn launch_digest(&self) -> LaunchDigest {
        self.vcpus.last().or(self.records.last()).copied().unwrap_or(LaunchDigest::START)
    }
}

/// Computes the digest of `plan`.
pub fn launch_digest(plan: &LaunchPlan) -> Result<LaunchDigest, PlanError> {
    Ok(trace(plan)?.launch_digest())
}

/// A plan and its launch digest, made once. It owns every byte that is launched, so what it says of them
/// stays true, whatever becomes of the files that they were read from.
#[derive(Clone, Debug)]
pub struct Measured {
    plan: LaunchPlan,
    digest: LaunchDigest,
}

impl Measured {
    /// Measures `plan`.
    pub fn of(plan: LaunchPlan) -> Result<Self, PlanError> {
        let digest = launch_digest(&plan)?;
        Ok(Measured { plan, digest })
    }

    /// What is launched.
    pub fn plan(&self) -> &LaunchPlan {
        &self.plan
    }

    /// What the guest's reports will show.
    pub fn digest(&self) -> LaunchDigest {
        self.digest
    }

    /// Another plan, made from this one.
    pub fn altered(mut self, alter: impl FnOnce(&mut LaunchPlan)) -> Result<Self, PlanError> {
        alter(&mut self.plan);
        Measured::of(self.plan)
    }

    /// Lets go of what only a launch needs: the contents, of which the guest has its own copy by then.
    pub fn forget_contents(&mut self) {
        self.plan.records = Vec::new();
    }
}

/// Computes the digest of `plan` after every record and every vCPU.
pub fn trace(plan: &LaunchPlan) -> Result<Trace, PlanError> {
    plan.check()?;
    let records = trace_records(&plan.records);
    let mut digest = records.last().copied().unwrap_or(LaunchDigest::START);
    let mut hashed: Option<(&VmsaState, [u8; 48])> = None;
    let mut vcpus = Vec::with_capacity(plan.vcpus.len());
    for vcpu in &plan.vcpus {
        // Application processors are usually alike; one more of them then costs one link of the chain, half a
        // microsecond.
        let contents = match hashed {
            Some((previous, contents)) if previous == vcpu => contents,
            _ => Sha384::digest(vcpu.encode()).into(),
        };
        hashed = Some((vcpu, contents));
        digest.extend(PageType::Vmsa, VMSA_GPA, &contents);
        vcpus.push(digest);
    }
    Ok(Trace { records, vcpus })
}

/// Computes the digest after each of `records`, which must consist of whole pages.
///
/// Unlike a plan's, these records may be VMSA pages: an IGVM file for another hypervisor puts them where it
/// likes.
pub fn trace_records(records: &[Record]) -> Vec<LaunchDigest> {
    let mut digest = LaunchDigest::START;
    let mut after = vec![digest; records.len()];
    pages::for_each_page(records, |index, record, gpa, contents| {
        digest.extend(record.page_type, gpa, contents);
        after[index] = digest;
    });
    after
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PAGE_SIZE;

    /// The chain as section 8.17.2 words it, one page at a time and with nothing but the `sha2` crate.
    fn by_the_book(records: &[Record]) -> LaunchDigest {
        let mut digest = LaunchDigest::START;
        for record in records {
            for offset in (0..record.len).step_by(PAGE_SIZE as usize) {
                let mut page = [0; PAGE_SIZE as usize];
                record.read_page(offset, &mut page);
                let contents =
                    if record.page_type.contents_measured() { Sha384::digest(page).into() } else { [0; 48] };
                digest.extend(record.page_type, record.gpa + offset, &contents);
            }
        }
        digest
    }

    #[test]
    fn parallel_batches_chain_in_launch_order() {
        let bytes = |len: usize, seed: u32| -> Vec<u8> {
            (0..len as u32).map(|i| (i.wrapping_mul(2654435761).wrapping_add(seed) >> 23) as u8).collect()
        };
        let records = vec![
            Record::new(0xffc0_0000, PageType::Normal, bytes(5 << 20, 1), "several batches, rest of a group"),
            Record::empty(0x1000, 0x3000, PageType::Zero, "zero pages in between"),
            Record::new(0x80_0000, PageType::Normal, bytes(4096 * 257 + 5, 2), "a partial page at the end"),
            Record {
                len: 0x8000,
                ..Record::new(0x40_0000, PageType::Normal, bytes(5000, 3), "zeros beyond")
            },
            Record::empty(0x10_0000, 0x1000, PageType::Secrets, "last"),
        ];
        let after = trace_records(&records);
        for n in 1..=records.len() {
            assert_eq!(after[n - 1], by_the_book(&records[..n]), "record {n}");
        }
    }

    #[test]
    fn each_vcpu_count_is_a_prefix_of_the_larger_one() {
        let record = Record::new(0, PageType::Normal, vec![1; 4096], "a");
        let mut ap = VmsaState::reset();
        ap.rip = 0x1000;
        let vcpus = vec![VmsaState::reset(), ap.clone(), ap];
        let all = trace(&LaunchPlan { records: vec![record.clone()], vcpus: vcpus.clone() }).unwrap();
        for n in 1..=3 {
            let plan = LaunchPlan { records: vec![record.clone()], vcpus: vcpus[..n].to_vec() };
            assert_eq!(launch_digest(&plan).unwrap(), all.vcpus[n - 1]);
        }
    }
}
