// SPDX-License-Identifier: Apache-2.0
//! The guest policy: what the guest's owner allows the platform to do, enforced by the firmware and shown in reports.
//!
//! SEV-SNP Firmware ABI 1.58, section 4.3 "Guest Policy". Which bits a host's KVM lets through depends on its kernel;
//! [`GuestPolicy::check_kvm`] follows `snp_launch_start` of Linux 6.12 (`SNP_POLICY_MASK_VALID`).

use std::fmt;
use std::str::FromStr;

/// The 64 policy bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestPolicy(pub u64);

/// Name and meaning of each single-bit field, low bit first.
const BITS: [(u32, &str); 10] = [
    (16, "SMT"),
    (17, "RESERVED_MUST_BE_ONE"),
    (18, "MIGRATE_MA"),
    (19, "DEBUG"),
    (20, "SINGLE_SOCKET"),
    (21, "CXL_ALLOW"),
    (22, "AES_256_XTS"),
    (23, "RAPL_DIS"),
    (24, "CIPHERTEXT_HIDING"),
    (25, "PAGE_SWAP_DISABLE"),
];

/// Why a policy cannot be launched.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PolicyError {
    /// Not a number.
    #[error("policy '{0}' is not a number: give up to 64 bits, such as 0x30000")]
    NotANumber(String),
    /// A bit that this host's KVM refuses.
    #[error(
        "policy {policy:#x}: bit {bit} ({name}) is not allowed by this host's KVM (it allows {allowed:#x})"
    )]
    BitRefused {
        /// The policy asked for.
        policy: u64,
        /// The first offending bit.
        bit: u32,
        /// Its name.
        name: &'static str,
        /// All bits that may be set.
        allowed: u64,
    },
    /// A bit that has to be set.
    #[error("policy {policy:#x}: bit {bit} ({name}) must be 1; the default policy is 0x30000")]
    BitRequired {
        /// The policy asked for.
        policy: u64,
        /// The missing bit.
        bit: u32,
        /// Its name.
        name: &'static str,
    },
}

fn bit_name(bit: u32) -> &'static str {
    match BITS.iter().find(|(b, _)| *b == bit) {
        Some((_, name)) => name,
        None if bit < 8 => "ABI_MINOR",
        None if bit < 16 => "ABI_MAJOR",
        None => "reserved",
    }
}

impl GuestPolicy {
    /// SMT allowed, the bit that must be one, and nothing else.
    pub const DEFAULT: GuestPolicy = GuestPolicy(0x3_0000);
    /// Bits that Linux 6.12 lets through: ABI version, SMT, reserved one, DEBUG.
    pub const KVM_6_12_ALLOWED: u64 = 0xb_ffff;
    /// Bits that Linux demands: reserved one and, because it does not support hosts without it, SMT.
    pub const KVM_REQUIRED: u64 = 0x3_0000;

    /// The host may read and write guest memory by debug commands.
    pub fn debug(self) -> bool {
        self.0 & 1 << 19 != 0
    }

    /// The guest may be associated with a migration agent.
    pub fn migrate_ma(self) -> bool {
        self.0 & 1 << 18 != 0
    }

    /// SMT is allowed on the host.
    pub fn smt(self) -> bool {
        self.0 & 1 << 16 != 0
    }

    /// Checks the policy as `KVM_SEV_SNP_LAUNCH_START` will, with the bits `allowed` by the host.
    pub fn check_kvm(self, allowed: u64) -> Result<(), PolicyError> {
        let policy = self.0;
        let refused = policy & !allowed;
        if refused != 0 {
            let bit = refused.trailing_zeros();
            return Err(PolicyError::BitRefused { policy, bit, name: bit_name(bit), allowed });
        }
        let missing = Self::KVM_REQUIRED & !policy;
        if missing != 0 {
            let bit = missing.trailing_zeros();
            return Err(PolicyError::BitRequired { policy, bit, name: bit_name(bit) });
        }
        Ok(())
    }
}

impl Default for GuestPolicy {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl FromStr for GuestPolicy {
    type Err = PolicyError;

    fn from_str(s: &str) -> Result<Self, PolicyError> {
        let parsed = match s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
            Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16),
            Some(_) => return Err(PolicyError::NotANumber(s.to_owned())),
            None => s.parse(),
        };
        parsed.map(GuestPolicy).map_err(|_| PolicyError::NotANumber(s.to_owned()))
    }
}

impl fmt::Display for GuestPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_policy_is_launchable_on_linux_6_12() {
        assert_eq!(GuestPolicy::DEFAULT.check_kvm(GuestPolicy::KVM_6_12_ALLOWED), Ok(()));
    }

    #[test]
    fn an_offending_bit_is_named() {
        let error = GuestPolicy(0x13_0000).check_kvm(GuestPolicy::KVM_6_12_ALLOWED).unwrap_err();
        assert!(error.to_string().contains("SINGLE_SOCKET"), "{error}");
        let error = GuestPolicy(0x1_0000).check_kvm(GuestPolicy::KVM_6_12_ALLOWED).unwrap_err();
        assert!(matches!(error, PolicyError::BitRequired { bit: 17, .. }));
    }

    #[test]
    fn text_is_parsed_as_hex_or_decimal() {
        assert_eq!("0x30000".parse(), Ok(GuestPolicy(0x30000)));
        assert_eq!("196608".parse(), Ok(GuestPolicy(0x30000)));
        for bad in ["", "0x", "0x+1", "policy", "0x10000000000000000"] {
            assert!(bad.parse::<GuestPolicy>().is_err(), "{bad}");
        }
    }
}
