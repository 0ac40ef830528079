// SPDX-License-Identifier: Apache-2.0
//! The launch digest: what the firmware will report as the guest's measurement, computed from the plan alone.
//!
//! SEV-SNP Firmware ABI 1.58, section 8.17.2, `PAGE_INFO`. The digest starts as 48 zero bytes; each page replaces it by the
//! SHA-384 of a 112-byte structure that holds the previous digest, the hash of the page's contents (zero where contents are
//! not measured), the page type and the address. VMSAs come last, in vCPU order, all at one fixed address.

use std::fmt;

use sha2::Digest as _;
use sha2::Sha384;

use crate::plan::LaunchPlan;
use crate::plan::PAGE_SIZE;
use crate::plan::PageType;
use crate::plan::PlanError;

/// The address at which every VMSA is measured, whatever the vCPU.
pub const VMSA_GPA: u64 = 0xffff_ffff_f000;

/// A SHA-384 launch digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LaunchDigest(pub [u8; 48]);

impl LaunchDigest {
    /// The digest before the first page.
    pub const START: LaunchDigest = LaunchDigest([0; 48]);

    /// Takes in one page; `contents` is the SHA-384 of the page, or zeros for types whose contents are not measured.
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
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LaunchDigest({self})")
    }
}

/// Computes the digest of `plan`.
pub fn launch_digest(plan: &LaunchPlan) -> Result<LaunchDigest, PlanError> {
    plan.check()?;
    let mut digest = LaunchDigest::START;
    let mut page = [0; PAGE_SIZE as usize];
    for record in &plan.records {
        for offset in (0..record.len).step_by(PAGE_SIZE as usize) {
            let mut contents = [0; 48];
            if record.page_type.contents_measured() {
                record.read_page(offset, &mut page);
                contents = Sha384::digest(page).into();
            }
            digest.extend(record.page_type, record.gpa + offset, &contents);
        }
    }
    for vcpu in &plan.vcpus {
        digest.extend(PageType::Vmsa, VMSA_GPA, &Sha384::digest(vcpu.encode()).into());
    }
    Ok(digest)
}
