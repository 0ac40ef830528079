// SPDX-License-Identifier: Apache-2.0
//! Shipped minimums: what AMD's bulletins ask of a platform whose reports are to be believed.
//!
//! A policy names the baseline that its author looked at, such as `baseline = "2025-02"`, by the month of its
//! newest bulletin. A later version of this program may bring later baselines and never changes one, so a
//! policy means the same for ever. A product that no bulletin of a baseline speaks of is not held against it,
//! and the verdict says so.
//!
//! Sources, read in other projects' words and not on AMD's pages: AMD-SB-3015 (BadRAM, CVE-2024-21944), whose
//! firmware sets the alias-check bit of PLATFORM_INFO (virtee/snphost, thread 108); AMD-SB-3019 (signature
//! verification of microcode, CVE-2024-56161), which asks for the SNP part of the TCB given here
//! (microsoft/CCF, thread 6812). Bulletins without numbers that could be found are not here.

use serde::Deserialize;
use serde::Deserializer;
use serde::de::Error as _;

use super::named::PlatformBit;
use super::tcb::Product;
use crate::printable::printable;

/// One demand of one bulletin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// Of whom.
    pub product: Product,
    /// Where it stands.
    pub bulletin: &'static str,
    /// What.
    pub demand: Demand,
}

/// What a platform must show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// A bit of PLATFORM_INFO.
    Platform(PlatformBit),
    /// The SNP part of reported, committed and launch TCB is not lower.
    Snp(u8),
}

/// The demands of one month.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// Year and month.
    pub name: &'static str,
    /// In the order of bulletins.
    pub lines: &'static [Line],
}

const fn line(product: Product, bulletin: &'static str, demand: Demand) -> Line {
    Line { product, bulletin, demand }
}

/// All baselines, oldest first.
pub const ALL: &[Baseline] = &[Baseline {
    name: "2025-02",
    lines: &[
        line(Product::Milan, "AMD-SB-3015", Demand::Platform(PlatformBit::AliasCheck)),
        line(Product::Genoa, "AMD-SB-3015", Demand::Platform(PlatformBit::AliasCheck)),
        line(Product::Milan, "AMD-SB-3019", Demand::Snp(0x18)),
        line(Product::Genoa, "AMD-SB-3019", Demand::Snp(0x17)),
    ],
}];

impl Baseline {
    /// The baseline of that name, or the names that there are.
    pub fn named(name: &str) -> Result<Baseline, String> {
        ALL.iter().find(|baseline| baseline.name == name).copied().ok_or_else(|| {
            let names: Vec<&str> = ALL.iter().map(|baseline| baseline.name).collect();
            format!(
                "'{:.20}' is no baseline that this program knows; it knows {}",
                printable(name),
                names.join(", ")
            )
        })
    }

    /// What it asks of a product.
    pub fn of(&self, product: Product) -> impl Iterator<Item = Line> {
        self.lines.iter().copied().filter(move |line| line.product == product)
    }
}

impl<'de> Deserialize<'de> for Baseline {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Baseline::named(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
