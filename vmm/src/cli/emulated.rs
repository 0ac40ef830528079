// SPDX-License-Identifier: Apache-2.0
//! The options of the emulated platform.

use std::path::PathBuf;

use crate::spec::Backing;
use crate::spec::EmulatedProduct;
use crate::spec::EmulatedSpec;
use crate::spec::Pvalidate2m;

/// The options.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Emulated platform")]
pub struct EmulatedArgs {
    /// One memory for both views of a page, or one for each
    #[arg(long, value_enum, default_value = "single")]
    backing: Backing,
    /// Stop at the first access through the wrong view, or to memory that the guest has not validated (needs
    /// split backing)
    #[arg(long)]
    strict: bool,
    /// How PVALIDATE of 2 MiB is answered
    #[arg(long, value_enum, default_value = "accept")]
    pvalidate_2m: Pvalidate2m,
    /// Processor that the guest is told of, and whose firmware checks its CPUID page
    #[arg(long, value_enum, default_value = "genoa")]
    product: EmulatedProduct,
    /// File with the platform's attestation keys, made if absent
    /// [default: ~/.local/state/cvmm/emulated-platform.pem]
    #[arg(long, value_name = "FILE")]
    emulated_keys: Option<PathBuf>,
}

impl EmulatedArgs {
    /// What these options ask for.
    pub fn spec(&self, statistics: bool) -> EmulatedSpec {
        EmulatedSpec {
            backing: self.backing,
            strict: self.strict,
            pvalidate_2m: self.pvalidate_2m,
            product: self.product,
            keys: self.emulated_keys.clone(),
            statistics,
        }
    }
}
