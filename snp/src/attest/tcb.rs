// SPDX-License-Identifier: Apache-2.0
//! Processor generations and their TCB versions: the same eight bytes mean different things on Turin.
//!
//! SEV-SNP Firmware ABI 1.58, section 2.2 (`TCB_VERSION`), and the product table of AMD's VCEK certificate
//! specification (57230), section 3.1, for the mapping from CPUID to product.

use std::fmt;

/// A processor generation with its own root of trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Product {
    /// EPYC 7003.
    Milan,
    /// EPYC 9004 and 8004 (Genoa, Bergamo, Siena).
    Genoa,
    /// EPYC 9005.
    Turin,
}

impl Product {
    /// All of them.
    pub const ALL: [Product; 3] = [Product::Milan, Product::Genoa, Product::Turin];

    /// The product with this CPUID family and model, as reports of version 3 and later name them.
    pub fn from_cpuid(family: u8, model: u8) -> Option<Self> {
        match (family, model) {
            (0x19, 0x00..=0x0f) => Some(Product::Milan),
            (0x19, 0x10..=0x1f | 0xa0..=0xaf) => Some(Product::Genoa),
            (0x1a, 0x00..=0x11) => Some(Product::Turin),
            _ => None,
        }
    }

    /// The product that a certificate names, such as `Milan-B0`.
    pub fn from_name(name: &str) -> Option<Self> {
        let base = name.split('-').next().unwrap_or_default();
        Product::ALL.into_iter().find(|product| product.to_string() == base)
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Product::Milan => "Milan",
            Product::Genoa => "Genoa",
            Product::Turin => "Turin",
        })
    }
}

/// Security version numbers of the parts of a platform. Higher is newer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tcb {
    /// Firmware of the FMC; on Turin only.
    pub fmc: Option<u8>,
    /// Boot loader of the secure processor.
    pub bootloader: u8,
    /// Its operating system.
    pub tee: u8,
    /// The SNP firmware.
    pub snp: u8,
    /// The cores' microcode.
    pub microcode: u8,
}

impl Tcb {
    /// Reads the eight bytes of a report's field.
    pub fn from_raw(raw: u64, product: Product) -> Self {
        let b = raw.to_le_bytes();
        match product {
            Product::Milan | Product::Genoa => {
                Tcb { fmc: None, bootloader: b[0], tee: b[1], snp: b[6], microcode: b[7] }
            }
            Product::Turin => {
                Tcb { fmc: Some(b[0]), bootloader: b[1], tee: b[2], snp: b[3], microcode: b[7] }
            }
        }
    }

    /// Whether no part is older than in `minimum`.
    pub fn at_least(&self, minimum: &Tcb) -> bool {
        self.fmc.unwrap_or(0) >= minimum.fmc.unwrap_or(0)
            && self.bootloader >= minimum.bootloader
            && self.tee >= minimum.tee
            && self.snp >= minimum.snp
            && self.microcode >= minimum.microcode
    }
}

impl fmt::Display for Tcb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(fmc) = self.fmc {
            write!(f, "fmc {fmc} ")?;
        }
        write!(
            f,
            "bootloader {} tee {} snp {} microcode {}",
            self.bootloader, self.tee, self.snp, self.microcode
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_counts() {
        let minimum = Tcb { fmc: Some(1), bootloader: 2, tee: 3, snp: 4, microcode: 5 };
        assert!(minimum.at_least(&minimum));
        for older in [
            Tcb { fmc: Some(0), ..minimum },
            Tcb { bootloader: 1, ..minimum },
            Tcb { tee: 2, ..minimum },
            Tcb { snp: 3, ..minimum },
            Tcb { microcode: 4, bootloader: 255, ..minimum },
        ] {
            assert!(!older.at_least(&minimum), "{older}");
        }
    }

    #[test]
    fn siena_and_bergamo_use_genoas_root() {
        assert_eq!(Product::from_cpuid(0x19, 0xa0), Some(Product::Genoa));
        assert_eq!(Product::from_cpuid(0x1a, 0x12), None);
        assert_eq!(Product::from_name("Milan-B0"), Some(Product::Milan));
        assert_eq!(Product::from_name("Milano"), None);
    }
}
