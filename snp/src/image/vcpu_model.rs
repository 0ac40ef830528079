// SPDX-License-Identifier: Apache-2.0
//! vCPU models and their CPUID signatures, up to Turin.
//!
//! The model enters the digest only as its signature, CPUID leaf 1 EAX, which KVM and QEMU leave in RDX when
//! a vCPU starts. Families, models and steppings are those of QEMU's `builtin_x86_defs`; the encoding is that
//! of AMD's CPUID specification (publication 25481), Fn0000_0001_EAX.

/// Base name, number of versions that QEMU or the `sev` crate know, family, model, stepping.
const MODELS: [(&str, u32, u32, u32, u32); 6] = [
    ("EPYC", 5, 0x17, 0x01, 2),
    ("EPYC-IBPB", 0, 0x17, 0x01, 2),
    ("EPYC-Rome", 5, 0x17, 0x31, 0),
    ("EPYC-Milan", 3, 0x19, 0x01, 1),
    ("EPYC-Genoa", 2, 0x19, 0x11, 0),
    ("EPYC-Turin", 2, 0x1a, 0x00, 0),
];

/// The signature of a CPU: CPUID leaf 1 EAX.
pub const fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    let (base, extended) = if family > 0xf { (0xf, family - 0xf) } else { (family, 0) };
    (extended & 0xff) << 20 | (model >> 4 & 0xf) << 16 | base << 8 | (model & 0xf) << 4 | (stepping & 0xf)
}

/// Neither a model's name nor a number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "vCPU model '{name}' is not known: give one of {known}, with or without a version such as -v2, or a CPUID signature such as 0xa20f10"
)]
pub struct UnknownModel {
    name: String,
    known: String,
}

/// The signature of a model given by QEMU's name (`EPYC-Milan-v2`) or as a number (`0xa00f11`).
pub fn parse(name: &str) -> Result<u32, UnknownModel> {
    if let Some(hex) = name.strip_prefix("0x").filter(|hex| !hex.starts_with('+'))
        && let Ok(signature) = u32::from_str_radix(hex, 16)
    {
        return Ok(signature);
    }
    let lower = name.to_ascii_lowercase();
    let (base, version) = match lower.rsplit_once("-v") {
        Some((base, version)) => (base, version.parse::<u32>().ok()),
        None => (lower.as_str(), Some(0)),
    };
    let found = MODELS.iter().find(|(model, versions, ..)| {
        model.eq_ignore_ascii_case(base)
            && version.is_some_and(|v| v <= *versions && (v > 0 || base == lower))
    });
    match found {
        Some(&(_, _, family, model, stepping)) => Ok(signature(family, model, stepping)),
        None => Err(UnknownModel { name: name.to_owned(), known: names().join(", ") }),
    }
}

/// Base names of the known models.
pub fn names() -> Vec<&'static str> {
    MODELS.iter().map(|(name, ..)| *name).collect()
}

/// The base name whose signature this is, if any.
pub fn name_of(wanted: u32) -> Option<&'static str> {
    MODELS.iter().find(|(_, _, f, m, s)| signature(*f, *m, *s) == wanted).map(|(name, ..)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of CPUID leaf 1 EAX as the processors themselves report them.
    #[test]
    fn signatures_are_those_of_the_processors() {
        assert_eq!(parse("EPYC"), Ok(0x0080_0f12));
        assert_eq!(parse("EPYC-Rome"), Ok(0x0083_0f10));
        assert_eq!(parse("EPYC-Milan-v2"), Ok(0x00a0_0f11));
        assert_eq!(parse("epyc-genoa"), Ok(0x00a1_0f10));
        assert_eq!(parse("EPYC-Turin"), Ok(0x00b0_0f00));
        assert_eq!(parse("0xb00f21"), Ok(0x00b0_0f21));
        // Digits alone could be meant in either base.
        assert!(parse("11538192").is_err() && parse("800012").is_err());
    }

    #[test]
    fn names_that_no_monitor_knows_are_refused() {
        for bad in
            ["", "EPYC-", "EPYC-v0", "EPYC-v6", "EPYC-Turin-v", "EPYC-IBPB-v1", "0x", "0x+1", "-1", "Turin"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
