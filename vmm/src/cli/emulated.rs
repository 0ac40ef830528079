// SPDX-License-Identifier: Apache-2.0
//! The options of the emulated platform.

use std::path::PathBuf;

use clap::ValueEnum;
use snp::attest::tcb::Product;
use snp::model::rmp::TwoMib;

use super::Failure;
use crate::platform::emulated;
use crate::platform::emulated::Backing;
use crate::platform::emulated::EmulatedOptions;

/// The options.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Emulated platform")]
pub struct EmulatedArgs {
    /// One memory for both views of a page, or one for each
    #[arg(long, value_enum, default_value = "single")]
    pub backing: Backing,
    /// Stop at the first access through the wrong view, or to memory that the guest has not validated (needs split backing)
    #[arg(long)]
    strict: bool,
    /// How PVALIDATE of 2 MiB is answered
    #[arg(long, value_enum, default_value = "accept")]
    pvalidate_2m: Pvalidate2m,
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

impl ProductName {
    fn product(self) -> Option<Product> {
        match self {
            ProductName::Milan => Some(Product::Milan),
            ProductName::Genoa => Some(Product::Genoa),
            ProductName::Turin => Some(Product::Turin),
            ProductName::Host => None,
        }
    }
}

/// Answer to `PVALIDATE` of 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pvalidate2m {
    /// Size mismatch, as a Linux 6.12 host answers: its RMP entries are all 4 KiB
    Refuse,
    /// Done at once
    Accept,
}

impl From<Pvalidate2m> for TwoMib {
    fn from(answer: Pvalidate2m) -> Self {
        match answer {
            Pvalidate2m::Refuse => TwoMib::SizeMismatch,
            Pvalidate2m::Accept => TwoMib::Accept,
        }
    }
}

impl EmulatedArgs {
    /// Refuses options that contradict each other.
    pub fn check(&self) -> Result<(), Failure> {
        if self.strict && self.backing == Backing::Single {
            return Err(Failure::Usage(
                "--strict needs --backing split: one memory for both views cannot tell them apart".into(),
            ));
        }
        Ok(())
    }

    /// As the platform takes them.
    pub fn options(&self, statistics: bool) -> EmulatedOptions {
        EmulatedOptions {
            backing: self.backing,
            strict: self.strict,
            two_mib: self.pvalidate_2m.into(),
            statistics,
            keys: self.emulated_keys.clone().unwrap_or_else(emulated::default_keys_path),
            product: self.product.product(),
        }
    }
}
