// SPDX-License-Identifier: Apache-2.0
//! The guest-state file ("VMGS"): a small encrypted file system of at most 62 files, in a fixed VHD.
//!
//! The format is version 3 of the one that OpenVMM reads and writes, so an image of ours opens there and the
//! other way round. What is added stays inside that format: an [integrity root](root) as one more encrypted
//! file, and an [anchor](anchor) outside of the image. What the format leaves open to attack or to power loss
//! is closed by the way [`store`] writes and [`image`] reads. An image is opened in three steps: [`view`]
//! reads and compares all of it and judges nothing, [`findings`] says which words of an operator its oddities
//! need, and the anchor is asked whether it is the newest copy. `docs/vmgs.md` has the user's view.

pub mod anchor;
pub mod block;
pub mod crypto;
pub mod error;
pub mod file_id;
pub mod findings;
pub mod format;
pub mod history;
pub mod identity;
pub mod image;
mod judge;
pub mod mark;
mod place;
pub mod records;
mod rewrite;
pub mod root;
pub mod seal;
pub mod spans;
pub mod store;
pub mod uefi;
pub mod vhd;
pub mod view;
pub mod zero_key;

pub use anchor::AnchorFolder;
pub use block::FsFile;
pub use crypto::Key;
pub use error::VmgsError;
pub use file_id::FileId;
pub use findings::Accept;
pub use findings::Finding;
pub use identity::Identity;
pub use store::Change;
pub use store::Demand;
pub use store::Vmgs;
pub use view::View;

#[cfg(test)]
mod attack_test;
#[cfg(test)]
mod crash_test;
#[cfg(test)]
mod failure_test;
#[cfg(test)]
mod hostile_test;
#[cfg(test)]
mod layouts_test;
