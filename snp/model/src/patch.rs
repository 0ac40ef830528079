// SPDX-License-Identifier: Apache-2.0
//! Where a guest's code executes SNP instructions, and how the emulated platform makes them trap.
//!
//! A processor without SNP takes VMGEXIT for a VMMCALL and faults on PVALIDATE and RMPADJUST, so the emulated
//! platform replaces each by a write to a port: `OUT port, AL` and a two-byte NOP, which change no register
//! and no flag. None of this is measured; the launch digest is that of the original bytes.

mod code;
pub mod decompress;
mod kernel;
mod stage0;

pub use code::CodeMemory;
pub use code::HANDOVER;
pub use code::HOOK;
pub use code::Opcode;
pub use code::PatchError;
pub use code::Ports;
pub use code::Site;
pub use code::SiteError;
pub use code::SiteList;
pub use kernel::Annotations;
pub use kernel::Decompressor;
pub use kernel::annotate;
pub use kernel::annotate_code;
pub use stage0::Stage0Sites;
pub use stage0::stage0_sites;

/// What the emulated platform has to know about a guest's code beside its pages; nothing by default. Never
/// measured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CodeHints {
    /// The kernel, or firmware. `None`: code that has no SNP instruction to replace.
    pub kernel: Option<Annotations>,
    /// The guest begins in this build's stage0, which hands over to the kernel.
    pub stage0: bool,
}
