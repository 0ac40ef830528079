// SPDX-License-Identifier: Apache-2.0
//! IGVM files: a launch as a list of directives, which are measured in the order of the file.
//!
//! Format: the `igvm_defs` crate's description of versions 1 and 2 (fixed header, variable headers of type,
//! length and value, file data). The parser here is our own so that the one of the `igvm` crate stays an
//! independent oracle, page data is not copied, and every error has an offset. What is for other platforms in
//! the file is passed over.

mod builder;
mod error;
mod file;
mod header;
mod id_block;
mod launch;

pub use error::IgvmError;
pub use error::ZeroPages;
pub use file::Igvm;
pub use id_block::id_block_header;
pub use launch::Facts;
pub use launch::Loaded;
