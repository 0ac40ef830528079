// SPDX-License-Identifier: Apache-2.0
//! Why a guest gave up, in words.
//!
//! A guest ends itself either by GHCB MSR request 0x100, which carries a reason code set and a reason code,
//! or by a GHCB event, of which KVM passes on only the page's address. Set 0 is the GHCB specification's
//! (section 2.3.1, termination request), set 1 is Linux's (`arch/x86/include/asm/sev-common.h`), set
//! [`STAGE0_SET`] is our own shim's.

use std::fmt;

use super::msr::Request;
use crate::stage0::reason::REASON_SET;
use crate::stage0::reason::Reason;

/// Reason code set of our own measured shim, stage0.
pub const STAGE0_SET: u8 = REASON_SET;

/// What `KVM_SYSTEM_EVENT_SEV_TERM` says in its one data word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SevTerm {
    /// By MSR protocol.
    Msr {
        /// Reason code set.
        set: u8,
        /// Reason code.
        code: u8,
    },
    /// By GHCB event: only the host kernel's log knows the reason.
    Ghcb {
        /// Address of the GHCB page.
        gpa: u64,
    },
    /// A value that no guest request explains.
    Unknown {
        /// The value.
        data0: u64,
    },
}

impl SevTerm {
    /// Reads the data word of the system event.
    pub fn decode(data0: u64) -> Self {
        match Request::decode(data0) {
            Request::Terminate { set, code } => SevTerm::Msr { set, code },
            Request::GhcbPage { gpa } => SevTerm::Ghcb { gpa },
            _ => SevTerm::Unknown { data0 },
        }
    }
}

/// Reasons of the specification's set 0.
fn general(code: u8) -> Option<&'static str> {
    Some(match code {
        0 => {
            "the guest gave no reason: an early #VC exception that it could not handle, or CPUID lacks the SEV leaf or its bits"
        }
        1 => "the guest does not accept the GHCB protocol versions that were offered",
        2 => {
            "the guest found no usable SNP support: a hypervisor feature bit is missing, the confidential-computing blob has a wrong magic number or is missing (as after kexec or kdump, which do not pass it on), or an active SEV feature is unknown to this kernel"
        }
        _ => return None,
    })
}

/// Linux's reasons, set 1.
fn linux(code: u8) -> Option<&'static str> {
    Some(match code {
        0 => "Linux could not register its GHCB's address",
        1 => {
            "a page-state change failed: the monitor refused it, or KVM's exit for it (KVM_CAP_EXIT_HYPERCALL) is not enabled"
        }
        2 => "PVALIDATE failed: the page was validated already, or is not private",
        3 => "Linux does not run at VMPL 0",
        4 => "the CPUID page is missing, shorter than 4096 bytes, or does not hold 1 to 64 entries",
        5 => "the hypervisor did not answer a question about CPUID",
        6 => "the secrets page is missing or its length is not 4096",
        7 => {
            "there is no SVSM in the secrets page although Linux does not seem to run at VMPL 0; with a directly booted kernel: its first private page is not usable"
        }
        8 => "the secrets page names an SVSM that runs at VMPL 0, where Linux itself runs",
        9 => "the SVSM's calling area is not aligned",
        _ => return None,
    })
}

/// stage0's reasons, set [`STAGE0_SET`], from the shim's own source.
fn stage0(code: u8) -> Option<&'static str> {
    Reason::ALL.iter().find(|reason| **reason as u8 == code).map(|reason| reason.words())
}

impl fmt::Display for SevTerm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            SevTerm::Msr { set, code } => {
                let (origin, words) = match set {
                    0 => ("general", general(code)),
                    1 => ("Linux", linux(code)),
                    STAGE0_SET => ("stage0", stage0(code)),
                    _ => ("unknown set", None),
                };
                write!(f, "the guest ended itself, reason {set}:{code} ({origin}): ")?;
                f.write_str(words.unwrap_or("a reason that this version does not know"))
            }
            SevTerm::Ghcb { gpa } => write!(
                f,
                "the guest ended itself by a GHCB event (page at {gpa:#x}); KVM does not pass the reason on, see the host's kernel log"
            ),
            SevTerm::Unknown { data0 } => {
                write!(f, "the guest ended itself, with the unknown value {data0:#x}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 0x41100 is what a Linux 6.12 decompressor sent when it found zero entries in the CPUID page.
    #[test]
    fn an_empty_cpuid_page_is_named() {
        let words = SevTerm::decode(0x4_1100).to_string();
        assert!(words.contains("1:4") && words.contains("CPUID page"), "{words}");
    }

    /// Set 3, code 0x20, request 0x100 in the positions that the GHCB specification gives them.
    #[test]
    fn a_refusal_of_stage0_is_told_in_words() {
        let words = SevTerm::decode(0x20_3100).to_string();
        assert!(
            words.contains("stage0") && words.contains("kernel is not the one that was measured"),
            "{words}"
        );
    }

    #[test]
    fn a_termination_by_page_points_to_the_kernel_log() {
        assert_eq!(SevTerm::decode(0x1ff0_5000), SevTerm::Ghcb { gpa: 0x1ff0_5000 });
        assert!(SevTerm::decode(0x1ff0_5000).to_string().contains("host's kernel log"));
    }

    #[test]
    fn unknown_sets_and_codes_are_said_to_be_unknown() {
        for data0 in [0xff_1100, 0x7_7100, 0x15] {
            assert!(SevTerm::decode(data0).to_string().contains("know"), "{data0:#x}");
        }
    }
}
