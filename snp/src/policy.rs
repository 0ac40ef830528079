// SPDX-License-Identifier: Apache-2.0
//! The guest policy: what the guest's owner allows the platform to do, enforced by the firmware and shown in
//! reports.
//!
//! SEV-SNP Firmware ABI 1.58, section 4.3 "Guest Policy". Which bits a host's KVM lets through depends on its
//! kernel ([`PolicyRules`]); what is left is for the firmware to decide, such as whether a guest that forbids
//! SMT may run on a host that has it on.

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
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PolicyError {
    /// Not a number.
    #[error("policy '{0}' is not a number of up to 64 bits in hexadecimal, such as 0x30000")]
    NotANumber(String),
    /// Digits that could be meant in hexadecimal.
    #[error("policy '{0}' has no 0x in front: policies are written in hexadecimal; did you mean 0x{0}?")]
    NoPrefix(String),
    /// A policy that no firmware accepts.
    #[error("policy {policy:#x}: bit {bit} ({name}) must be {must}; no firmware accepts it otherwise")]
    Reserved { policy: u64, bit: u32, name: &'static str, must: u8 },
    /// A bit that this host's KVM refuses.
    #[error(
        "policy {policy:#x}: bit {bit} ({name}) is not allowed by this host's KVM (it allows {allowed:#x})"
    )]
    BitRefused { policy: u64, bit: u32, name: &'static str, allowed: u64 },
    /// A bit that has to be set.
    #[error("policy {policy:#x}: bit {bit} ({name}) must be 1{why}; the default policy is 0x30000")]
    BitRequired { policy: u64, bit: u32, name: &'static str, why: &'static str },
}

/// Policies that a kernel's KVM lets through: `sev.c:snp_launch_start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyRules {
    /// Bits that may be set.
    pub allowed: u64,
    /// Bits that have to be set.
    pub required: u64,
}

impl PolicyRules {
    /// Linux 6.12: ABI version, SMT, reserved one, DEBUG; SMT is demanded. The strictest of the kernels from
    /// 6.11 to 7.3.
    pub const LINUX_6_12: PolicyRules = PolicyRules { allowed: 0xb_ffff, required: 0x3_0000 };
    /// Linux 6.17 and 6.18: SINGLE_SOCKET may be set, and SMT is left to the firmware.
    pub const LINUX_6_17: PolicyRules = PolicyRules { allowed: 0x1b_ffff, required: 0x2_0000 };

    /// Linux 6.19 and later say which bits they let through (`KVM_X86_SNP_POLICY_BITS`): those that the
    /// firmware knows as well.
    pub const fn told(allowed: u64) -> PolicyRules {
        PolicyRules { allowed, required: 0x2_0000 }
    }

    /// The rules of a kernel that does not say, by its release, such as `6.12.0-1-amd64`. One that is not
    /// understood gets the strictest.
    pub fn of_release(release: &str) -> PolicyRules {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version >= (6, 17) { Self::LINUX_6_17 } else { Self::LINUX_6_12 }
    }
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

    /// Checks what every firmware does, whatever the kernel lets through (SEV-SNP Firmware ABI 1.58, section
    /// 4.3: bit 17 must be one, bits 26 to 63 zero).
    pub fn check_firmware(self) -> Result<(), PolicyError> {
        let policy = self.0;
        let unknown = policy >> 26;
        let wrong = match (policy >> 17 & 1, unknown) {
            (0, _) => Some((17, 1)),
            (_, 0) => None,
            (_, bits) => Some((26 + bits.trailing_zeros(), 0)),
        };
        wrong.map_or(Ok(()), |(bit, must)| {
            Err(PolicyError::Reserved { policy, bit, name: bit_name(bit), must })
        })
    }

    /// Checks the policy as `KVM_SEV_SNP_LAUNCH_START` will.
    pub fn check_kvm(self, rules: PolicyRules) -> Result<(), PolicyError> {
        let policy = self.0;
        let PolicyRules { allowed, required } = rules;
        let refused = policy & !allowed;
        if refused != 0 {
            let bit = refused.trailing_zeros();
            return Err(PolicyError::BitRefused { policy, bit, name: bit_name(bit), allowed });
        }
        let missing = required & !policy;
        if missing != 0 {
            let bit = missing.trailing_zeros();
            let why = if bit == 16 { " on hosts with a kernel before Linux 6.17" } else { "" };
            return Err(PolicyError::BitRequired { policy, bit, name: bit_name(bit), why });
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
            None if !s.is_empty() && s.bytes().all(|b| b.is_ascii_hexdigit()) => {
                return Err(PolicyError::NoPrefix(s.to_owned()));
            }
            _ => return Err(PolicyError::NotANumber(s.to_owned())),
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
        assert_eq!(GuestPolicy::DEFAULT.check_kvm(PolicyRules::LINUX_6_12), Ok(()));
    }

    #[test]
    fn an_offending_bit_is_named() {
        let error = GuestPolicy(0x13_0000).check_kvm(PolicyRules::LINUX_6_12).unwrap_err();
        assert!(error.to_string().contains("SINGLE_SOCKET"), "{error}");
        let error = GuestPolicy(0x1_0000).check_kvm(PolicyRules::LINUX_6_12).unwrap_err();
        assert!(matches!(error, PolicyError::BitRequired { bit: 17, .. }));
    }

    /// Linux 6.12.117, 7.2.13 and 7.3.4, `sev.c:snp_launch_start`; 6.17.8 and 6.18.15 as 7.3 without the
    /// attribute.
    #[test]
    fn smt_is_demanded_before_linux_6_17_only() {
        let no_smt = GuestPolicy(0x2_0000);
        for release in ["6.11.0", "6.12.117", "6.16.0-rc1", "", "bogus"] {
            let error = no_smt.check_kvm(PolicyRules::of_release(release)).unwrap_err();
            assert!(
                error.to_string().contains("SMT) must be 1 on hosts with a kernel before Linux 6.17"),
                "{error}"
            );
        }
        for release in ["6.17.0", "6.18.15-cloud-amd64", "7.0.0", "10.1"] {
            assert_eq!(no_smt.check_kvm(PolicyRules::of_release(release)), Ok(()), "{release}");
            assert_eq!(
                GuestPolicy(0x13_0000).check_kvm(PolicyRules::of_release(release)),
                Ok(()),
                "{release}"
            );
        }
        // What the attribute says is all that counts; bit 17 is always demanded.
        let told = PolicyRules::told(0x3fb_ffff);
        assert_eq!(GuestPolicy(0x3fa_0000).check_kvm(told), Ok(()));
        assert!(GuestPolicy(0x1_0000).check_kvm(told).is_err());
        assert!(GuestPolicy(0x7_0000).check_kvm(told).is_err(), "MIGRATE_MA");
    }

    /// `30000` could be meant either way; one of the two would be signed without a word.
    #[test]
    fn policies_are_written_in_hexadecimal() {
        assert_eq!("0x30000".parse(), Ok(GuestPolicy(0x30000)));
        for bad in ["30000", "196608", "0", "b0000"] {
            let error = bad.parse::<GuestPolicy>().unwrap_err();
            assert!(error.to_string().contains(&format!("did you mean 0x{bad}?")), "{error}");
        }
        for bad in ["", "0x", "0x+1", "policy", "0x10000000000000000", "+5"] {
            assert_eq!(bad.parse::<GuestPolicy>(), Err(PolicyError::NotANumber(bad.to_owned())));
        }
    }

    /// SEV-SNP Firmware ABI 1.58, section 4.3.
    #[test]
    fn reserved_bits_are_as_firmware_wants_them() {
        assert_eq!(GuestPolicy::DEFAULT.check_firmware(), Ok(()));
        assert_eq!(GuestPolicy(0x3ff_ffff).check_firmware(), Ok(()));
        for (policy, bit, must) in
            [(0, 17, 1), (0x1_0000, 17, 1), (1 << 26 | 1 << 17, 26, 0), (1 << 63 | 1 << 17, 63, 0)]
        {
            let error = GuestPolicy(policy).check_firmware().unwrap_err();
            let found =
                matches!(error, PolicyError::Reserved { bit: b, must: m, .. } if (b, m) == (bit, must));
            assert!(found, "{policy:#x}: {error}");
        }
    }
}
