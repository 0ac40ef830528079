// SPDX-License-Identifier: Apache-2.0
//! How the emulated platform behaves, and what it stands for.

use std::path::PathBuf;

use serde::Deserialize;
use serde::Serialize;
use snp::attest::tcb::Product;
use snp::policy::PolicyRules;
use snp_model::rmp::TwoMib;

/// The kernel that the model stands for.
pub const POLICY_RULES: PolicyRules = PolicyRules::LINUX_6_12;
/// SEV features that guests may have beside SNP.
pub const VMSA_FEATURES: u64 = 0;

/// What backs the two views of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// One memory: fast, finds no access through the wrong view.
    #[default]
    Single,
    /// One for each view: finds them, takes up to twice the memory.
    Split,
}

/// How the platform behaves.
#[derive(Clone, Debug)]
pub struct EmulatedOptions {
    /// What backs the two views.
    pub backing: Backing,
    /// An access through the wrong view is an error at once. Needs split backing.
    pub strict: bool,
    /// How `PVALIDATE` of 2 MiB is answered.
    pub two_mib: TwoMib,
    /// Say at the end what the guest did with its pages.
    pub statistics: bool,
    /// The file with the platform's attestation keys; made if it does not exist.
    pub keys: PathBuf,
    /// The processor that guests are told of and that the firmware checks CPUID pages against; `None` for
    /// this host's own.
    pub product: Option<Product>,
}
