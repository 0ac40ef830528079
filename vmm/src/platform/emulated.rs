// SPDX-License-Identifier: Apache-2.0
//! The emulated platform: SNP guests on an ordinary VM of any KVM host, for development and tests.

use clap::ValueEnum;

use super::kvm::KvmPlatform;

/// What backs the two views of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backing {
    /// One memory: fast, finds no access through the wrong view
    Single,
    /// One for each view: finds them, takes up to twice the memory
    Split,
}

/// How the platform behaves.
#[derive(Clone, Copy, Debug)]
pub struct EmulatedOptions {
    /// What backs the two views.
    pub backing: Backing,
    /// An access through the wrong view is an error at once. Needs split backing.
    pub strict: bool,
}

/// The platform on this host's KVM.
pub struct EmulatedPlatform;

impl EmulatedPlatform {
    /// Opens it.
    pub fn open(_options: EmulatedOptions) -> Result<KvmPlatform, &'static str> {
        Err("the emulated platform is not part of this build")
    }
}
