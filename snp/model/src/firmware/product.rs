// SPDX-License-Identifier: Apache-2.0
//! The processor that the model's firmware stands on, for its check of CPUID pages.
//!
//! The firmware of AMD compares a guest's table with masks that are built into it (AMD-ASPFW,
//! `cpuid_lookup.h`, published for Genoa in 2023). Held against dumps of two Genoa chips and a Bergamo, the
//! mask of a feature register is what the CPUID instruction of that processor gives, and a few bits more;
//! AMD's Processor Programming References say the same ("CPUID Policy Enforcement"). So a product is a dump
//! of one of its chips, with the surplus as `allow` lines: what is published for Genoa, derived for Milan and
//! Turin. Never the table that a KVM offers, in which bits are made up.

use snp::attest::tcb::Product;
use snp::pages::cpuid_entry::CpuidEntry;
use snp::pages::cpuid_entry::Register;
use snp::pages::cpuid_raw;
use snp::pages::cpuid_raw::DumpError;
use snp::pages::cpuid_raw::RawCpuid;

/// The dump of a product's processor, and what its firmware accepts beyond it.
fn data(product: Product) -> &'static str {
    match product {
        Product::Milan => include_str!("products/milan.txt"),
        Product::Genoa => include_str!("products/genoa.txt"),
        Product::Turin => include_str!("products/turin.txt"),
    }
}

/// What the firmware knows about the processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processor {
    /// What its CPUID instruction gives.
    pub raw: RawCpuid,
    /// The same, and what the firmware accepts beyond it.
    pub limits: RawCpuid,
    /// Family, model and stepping, as in leaf 1 EAX: a guest may have a lower one.
    pub signature: u32,
    /// It has COHERENCY_SFW_NO (leaf 0x8000001F, EBX bit 31), and its firmware knows the bit. No chip of
    /// which a dump is public does; the emulated platform's does, because it has no caches that a guest could
    /// evict.
    pub coherent: bool,
}

impl Processor {
    /// The processor of a product's dump.
    pub fn of_product(product: Product) -> Result<Self, DumpError> {
        let data = data(product);
        let raw = RawCpuid::parse(data)?;
        let signature = raw.register(1, 0, Register::Eax);
        Ok(Processor { limits: with_allowed(raw.clone(), data)?, raw, signature, coherent: false })
    }

    /// The processor of a host that need not be one with SNP.
    pub fn of_host(raw: RawCpuid) -> Result<Self, DumpError> {
        let data = include_str!("products/host.txt");
        let signature = raw.register(1, 0, Register::Eax);
        let mut limits = with_allowed(raw.clone(), data)?;
        // A processor with SNP has the SEV leaf; as high as in the published rules.
        let highest = limits.register(0x8000_0000, 0, Register::Eax);
        limits.add(
            0x8000_0000,
            0,
            Register::Eax,
            if highest < HIGHEST_EXTENDED { HIGHEST_EXTENDED } else { 0 },
        );
        Ok(Processor { raw, limits, signature, coherent: false })
    }

    /// What KVM on `host` would offer if `host` were this processor: without features of the host that this
    /// one lacks. What KVM makes up itself (offered, but not in the host's own CPUID) stays, for the firmware
    /// to judge.
    pub fn offer(&self, offered: &[CpuidEntry], host: &RawCpuid) -> Vec<CpuidEntry> {
        let components = self.common_components(offered);
        let entries = offered.iter().copied().filter_map(|mut e| {
            let (leaf, index) = (e.function, e.index);
            let limit = |register| self.limits.register(leaf, index, register);
            for (l, i, register) in FEATURES.iter().filter(|f| (f.0, f.1) == (leaf, index)) {
                let made_up = !host.register(*l, *i, *register);
                *e.register_mut(*register) &= limit(*register) | made_up;
            }
            for (component, l, i, register, bits) in COMPONENT_FEATURES {
                if (*l, *i) == (leaf, index) && components & 1 << component == 0 {
                    *e.register_mut(*register) &= !bits;
                }
            }
            match (leaf, index) {
                (0 | 0x8000_0000, _) => e.eax = e.eax.min(limit(Register::Eax)),
                (7, 0) => e.eax = e.eax.min(limit(Register::Eax)),
                (0xd, 0) => (e.eax, e.edx) = (e.eax & components, 0),
                (0xd, 2..) if index < 32 && components & 1 << index != 0 => e.ecx &= limit(Register::Ecx),
                // Supervisor states are not in XCR0.
                (0xd, 2..)
                    if (e.eax, e.ebx) != (limit(Register::Eax), limit(Register::Ebx)) || e.ecx & 1 == 0 =>
                {
                    return None;
                }
                (0x8000_0008, _) => {
                    for shift in [0, 8] {
                        let field = (e.eax >> shift & 0xff).min(limit(Register::Eax) >> shift & 0xff);
                        e.eax = e.eax & !(0xff << shift) | field << shift;
                    }
                }
                // No chip says of its caches more than that they are write-back invalidated and inclusive; a
                // CPU that is itself emulated may (QEMU's EPYC models: complex indexing), and the firmware
                // would refuse that.
                (0x8000_001d, 0..=3) => e.edx &= CACHE_PROPERTIES,
                (0x8000_0022, _) => {
                    for (shift, mask) in [(0, 0xf), (4, 0x3f)] {
                        let field = (e.ebx >> shift & mask).min(limit(Register::Ebx) >> shift & mask);
                        e.ebx = e.ebx & !(mask << shift) | field << shift;
                    }
                }
                _ => {}
            }
            Some(e)
        });
        entries.collect()
    }

    /// Components of XCR0 that both have, at the same place of the XSAVE area.
    fn common_components(&self, offered: &[CpuidEntry]) -> u32 {
        let both = offered.iter().find(|e| (e.function, e.index) == (0xd, 0)).map_or(0, |e| e.eax)
            & self.limits.register(0xd, 0, Register::Eax);
        let same = |index: u32| {
            let [eax, ebx, ..] = self.limits.get(0xd, index);
            offered.iter().any(|e| (e.function, e.index) == (0xd, index) && (e.eax, e.ebx) == (eax, ebx))
        };
        let mut components = both & 3;
        components |= (2..32).filter(|i| both & 1 << i != 0 && same(*i)).fold(0, |bits, i| bits | 1 << i);
        // The three components of AVX-512 come together.
        if components & AVX512_COMPONENTS == AVX512_COMPONENTS {
            components
        } else {
            components & !AVX512_COMPONENTS
        }
    }
}

/// Highest extended leaf of the published rules.
const HIGHEST_EXTENDED: u32 = 0x8000_0028;
/// Leaf 0x8000001D, EDX (APM volume 3, E.4.15).
const CACHE_PROPERTIES: u32 = 0x3;
/// Components 5, 6 and 7.
const AVX512_COMPONENTS: u32 = 0xe0;
/// Features that need a component of XCR0: its number, leaf, sub-leaf, register, bits. AVX-512 with BF16 and
/// VP2INTERSECT, and protection keys.
const COMPONENT_FEATURES: &[(u32, u32, u32, Register, u32)] = &[
    (5, 7, 0, Register::Ebx, 0xdc23_0000),
    (5, 7, 0, Register::Ecx, 0x5842),
    (5, 7, 0, Register::Edx, 1 << 8),
    (5, 7, 1, Register::Eax, 1 << 5),
    (9, 7, 0, Register::Ecx, 0x18),
];
/// Registers in which each bit is a feature.
const FEATURES: &[(u32, u32, Register)] = &[
    (1, 0, Register::Ecx),
    (1, 0, Register::Edx),
    (7, 0, Register::Ebx),
    (7, 0, Register::Ecx),
    (7, 0, Register::Edx),
    (7, 1, Register::Eax),
    (7, 1, Register::Ebx),
    (7, 1, Register::Ecx),
    (7, 1, Register::Edx),
    (0xd, 1, Register::Eax),
    (0xd, 1, Register::Ecx),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0007, 0, Register::Ebx),
    (0x8000_0007, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
    (0x8000_000a, 0, Register::Edx),
    (0x8000_0021, 0, Register::Eax),
    (0x8000_0021, 0, Register::Ecx),
    (0x8000_0022, 0, Register::Eax),
    (0x8000_0023, 0, Register::Eax),
];

/// `raw` with the `allow` lines of `data`.
fn with_allowed(mut raw: RawCpuid, data: &str) -> Result<RawCpuid, DumpError> {
    for (line, text) in cpuid_raw::lines(data).filter(|(_, text)| text.starts_with("allow ")) {
        let hex = |word: Option<&str>| word.and_then(|w| u32::from_str_radix(w, 16).ok());
        let mut words = text.split_whitespace().skip(1);
        let (leaf, subleaf) = (hex(words.next()), hex(words.next()));
        let register = words.next().and_then(|word| match word {
            "eax" => Some(Register::Eax),
            "ebx" => Some(Register::Ebx),
            "ecx" => Some(Register::Ecx),
            "edx" => Some(Register::Edx),
            _ => None,
        });
        let (Some(leaf), Some(subleaf), Some(register), Some(bits)) =
            (leaf, subleaf, register, hex(words.next()))
        else {
            let expected = "'allow', leaf, sub-leaf, register and bits";
            return Err(DumpError { line, text: text.into(), expected });
        };
        raw.add(leaf, subleaf, register, bits);
    }
    Ok(raw)
}

#[cfg(test)]
#[path = "product_test.rs"]
mod tests;
