// SPDX-License-Identifier: Apache-2.0
//! Parts of a report that a policy names one by one: bits of the platform and of the guest policy, firmware
//! versions.
//!
//! SEV-SNP Firmware ABI 1.58: table 24 (`PLATFORM_INFO`), section 4.3 (guest policy), table 23
//! (`COMMITTED_BUILD`, `COMMITTED_MINOR`, `COMMITTED_MAJOR`).

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::Deserializer;
use serde::de::Error as _;

/// A bit of [`PLATFORM_INFO`](super::report::field::PLATFORM_INFO): what the platform does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlatformBit {
    /// SMT is on.
    Smt,
    /// Transparent SME is on.
    Tsme,
    /// Memory has ECC.
    Ecc,
    /// Energy cannot be read (RAPL is off).
    RaplOff,
    /// Ciphertext is hidden from the host.
    CiphertextHiding,
    /// Memory modules were searched for aliased addresses since the last reset.
    AliasCheck,
    /// Trusted I/O is on.
    Tio,
}

impl PlatformBit {
    /// All that have a name.
    pub const ALL: &[PlatformBit] = &[
        PlatformBit::Smt,
        PlatformBit::Tsme,
        PlatformBit::Ecc,
        PlatformBit::RaplOff,
        PlatformBit::CiphertextHiding,
        PlatformBit::AliasCheck,
        PlatformBit::Tio,
    ];

    /// Number of the bit.
    pub fn bit(self) -> u32 {
        match self {
            PlatformBit::Smt => 0,
            PlatformBit::Tsme => 1,
            PlatformBit::Ecc => 2,
            PlatformBit::RaplOff => 3,
            PlatformBit::CiphertextHiding => 4,
            PlatformBit::AliasCheck => 5,
            PlatformBit::Tio => 7,
        }
    }
}

/// A bit of the guest policy that has no rule of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestBit {
    /// Only on a host with one socket.
    SingleSocket,
    /// CXL devices may be there.
    CxlAllow,
    /// Memory is encrypted with AES-256 in XTS mode.
    Aes256Xts,
    /// Energy must not be readable.
    RaplDis,
    /// Ciphertext must be hidden.
    CiphertextHiding,
    /// The host must not swap the guest's pages.
    PageSwapDisable,
}

impl GuestBit {
    /// All that have a name.
    pub const ALL: &[GuestBit] = &[
        GuestBit::SingleSocket,
        GuestBit::CxlAllow,
        GuestBit::Aes256Xts,
        GuestBit::RaplDis,
        GuestBit::CiphertextHiding,
        GuestBit::PageSwapDisable,
    ];

    /// Number of the bit.
    pub fn bit(self) -> u32 {
        match self {
            GuestBit::SingleSocket => 20,
            GuestBit::CxlAllow => 21,
            GuestBit::Aes256Xts => 22,
            GuestBit::RaplDis => 23,
            GuestBit::CiphertextHiding => 24,
            GuestBit::PageSwapDisable => 25,
        }
    }
}

/// Bits that must be set, and bits that must not be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bits<B> {
    /// Set.
    #[serde(default = "Vec::new")]
    pub require: Vec<B>,
    /// Not set.
    #[serde(default = "Vec::new")]
    pub forbid: Vec<B>,
}

impl<B> Default for Bits<B> {
    fn default() -> Self {
        Bits { require: Vec::new(), forbid: Vec::new() }
    }
}

impl<B: Copy + fmt::Debug> Bits<B> {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.require.is_empty() && self.forbid.is_empty()
    }

    /// What is asked for.
    pub fn expected(&self) -> String {
        let list = |bits: &[B]| bits.iter().map(|bit| format!("{bit:?}")).collect::<Vec<_>>().join(", ");
        match (self.require.as_slice(), self.forbid.as_slice()) {
            (require, []) => list(require),
            ([], forbid) => format!("not {}", list(forbid)),
            (require, forbid) => format!("{}; not {}", list(require), list(forbid)),
        }
    }

    /// What `value` has otherwise, bits by `number`; empty if all is as asked for.
    pub fn violations(&self, value: u64, number: impl Fn(B) -> u32) -> Vec<String> {
        let is_set = |bit: B| value >> number(bit) & 1 != 0;
        let missing =
            self.require.iter().filter(|bit| !is_set(**bit)).map(|bit| format!("{bit:?} is not set"));
        let present = self.forbid.iter().filter(|bit| is_set(**bit)).map(|bit| format!("{bit:?} is set"));
        missing.chain(present).collect()
    }
}

/// A version of two or three numbers, compared from the left: `1.55` or `1.55.38`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Major.
    pub major: u8,
    /// Minor.
    pub minor: u8,
    /// Build.
    pub build: u8,
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error =
            || format!("'{:.20}' is no version such as 1.55 or 1.55.38", crate::printable::printable(text));
        let parts: Vec<u8> =
            text.split('.').map(|part| part.parse().map_err(|_| error())).collect::<Result<_, _>>()?;
        match parts.as_slice() {
            [major, minor] => Ok(Version { major: *major, minor: *minor, build: 0 }),
            [major, minor, build] => Ok(Version { major: *major, minor: *minor, build: *build }),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.build)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A version of the firmware's interface, as a guest policy asks for it: `1.55`. It has no build number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    /// Major.
    pub major: u8,
    /// Minor.
    pub minor: u8,
}

impl FromStr for Interface {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Option<Vec<u8>> = text.split('.').map(|part| part.parse().ok()).collect();
        match parts.as_deref() {
            Some([major, minor]) => Ok(Interface { major: *major, minor: *minor }),
            _ => Err(format!(
                "'{:.20}' is no interface version such as 1.55; builds belong into minimum_firmware",
                crate::printable::printable(text)
            )),
        }
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl<'de> Deserialize<'de> for Interface {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Mitigation bits that must be there, as firmware defines them for each product; from report version 5.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mitigations {
    /// When the guest was launched.
    pub launch: u64,
    /// Now.
    pub current: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_from_the_left() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        assert!(version("1.55.38") > version("1.55.37") && version("2.0") > version("1.99.99"));
        assert_eq!(version("1.55"), version("1.55.0"));
        for bad in ["1", "1.2.3.4", "1.256", "a.b", "", "1..2", "1.-2", "1.2\u{1b}"] {
            assert!(bad.parse::<Version>().is_err_and(|e| !e.contains('\u{1b}')), "{bad}");
        }
    }

    #[test]
    fn what_is_missing_and_what_is_too_much_is_named() {
        let bits = Bits { require: vec![PlatformBit::AliasCheck], forbid: vec![PlatformBit::Smt] };
        assert_eq!(bits.expected(), "AliasCheck; not Smt");
        assert_eq!(bits.violations(0x20, PlatformBit::bit), [] as [&str; 0]);
        assert_eq!(bits.violations(0x01, PlatformBit::bit), ["AliasCheck is not set", "Smt is set"]);
    }
}
