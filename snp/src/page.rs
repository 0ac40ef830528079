// SPDX-License-Identifier: Apache-2.0
//! The page that a launch takes, and the kinds of it.

use std::fmt;

/// Size of the page that the firmware measures, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Page types of `SNP_LAUNCH_UPDATE`; the values are those of the firmware and of KVM's
/// `KVM_SEV_SNP_PAGE_TYPE_*` (SEV-SNP Firmware ABI 1.58, table 67).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum PageType {
    /// Contents are measured.
    Normal = 1,
    /// A vCPU's save area. Never a record of a plan: KVM adds it at `LAUNCH_FINISH`.
    Vmsa = 2,
    /// A page of zeros; the address is measured, the contents are not.
    Zero = 3,
    /// Contents come from the host and are not measured.
    Unmeasured = 4,
    /// Filled by the firmware with the guest's message keys.
    Secrets = 5,
    /// CPUID table: checked by the firmware, not measured.
    Cpuid = 6,
}

impl PageType {
    /// Whether the page's contents enter the digest.
    pub fn contents_measured(self) -> bool {
        matches!(self, PageType::Normal | PageType::Vmsa)
    }
}

impl fmt::Display for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PageType::Normal => "NORMAL",
            PageType::Vmsa => "VMSA",
            PageType::Zero => "ZERO",
            PageType::Unmeasured => "UNMEASURED",
            PageType::Secrets => "SECRETS",
            PageType::Cpuid => "CPUID",
        })
    }
}
