// SPDX-License-Identifier: Apache-2.0
//! The options of the emulated platform.

use std::path::PathBuf;

use clap::ValueEnum;

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
    backing: BackingName,
    /// Stop at the first access through the wrong view, or to memory that the guest has not validated (needs split backing)
    #[arg(long)]
    strict: bool,
    /// How PVALIDATE of 2 MiB is answered
    #[arg(long, value_enum, default_value = "accept")]
    pvalidate_2m: Pvalidate2mName,
    /// Processor that the guest is told of, and whose firmware checks its CPUID page
    #[arg(long, value_enum, default_value = "genoa")]
    product: ProductName,
    /// File with the platform's attestation keys, made if absent [default: ~/.local/state/cvmm/emulated-platform.pem]
    #[arg(long, value_name = "FILE")]
    emulated_keys: Option<PathBuf>,
}

/// A processor with SNP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProductName {
    /// EPYC 7003
    Milan,
    /// EPYC 9004, whose firmware AMD has published
    Genoa,
    /// EPYC 9005
    Turin,
    /// This host's own, whatever it is
    Host,
}

/// What backs the two views of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BackingName {
    /// One memory: fast, finds no access through the wrong view
    Single,
    /// One for each view: finds them, takes up to twice the memory
    Split,
}

/// Answer to `PVALIDATE` of 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pvalidate2mName {
    /// Size mismatch, as a Linux 6.12 host answers: its RMP entries are all 4 KiB
    Refuse,
    /// Done at once
    Accept,
}

impl EmulatedArgs {
    /// What these options ask for.
    pub fn spec(&self, statistics: bool) -> EmulatedSpec {
        EmulatedSpec {
            backing: match self.backing {
                BackingName::Single => Backing::Single,
                BackingName::Split => Backing::Split,
            },
            strict: self.strict,
            pvalidate_2m: match self.pvalidate_2m {
                Pvalidate2mName::Refuse => Pvalidate2m::Refuse,
                Pvalidate2mName::Accept => Pvalidate2m::Accept,
            },
            product: match self.product {
                ProductName::Milan => EmulatedProduct::Milan,
                ProductName::Genoa => EmulatedProduct::Genoa,
                ProductName::Turin => EmulatedProduct::Turin,
                ProductName::Host => EmulatedProduct::Host,
            },
            keys: self.emulated_keys.clone(),
            statistics,
        }
    }
}
