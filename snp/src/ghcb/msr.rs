// SPDX-License-Identifier: Apache-2.0
//! The GHCB MSR protocol: requests and answers that fit into one 64-bit value.
//!
//! GHCB specification, section 2.3.1. The low 12 bits of the GHCB MSR name the request; zero there means that
//! the MSR holds the address of a GHCB page. Uses `core` only.

/// The GHCB MSR.
pub const MSR_GHCB: u32 = 0xc001_0130;
/// The MSR in which a guest reads which SEV features are active.
pub const MSR_SEV_STATUS: u32 = 0xc001_0131;

/// Bits that name the request or answer.
pub const INFO_MASK: u64 = 0xfff;
/// Frame number that means "no preference" in [`Response::PreferredGhcb`].
pub const NO_PREFERRED_FRAME: u64 = (1 << 52) - 1;

const FRAME_MASK_40: u64 = (1 << 40) - 1;

/// Registers of a CPUID request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names")]
#[repr(u8)]
pub enum CpuidRegister {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

/// What a page-state change asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOperation {
    /// Make the page private: value 1.
    Private,
    /// Make the page shared: value 2.
    Shared,
    /// Any other value; KVM knows none of them.
    Other(u8),
}

impl PageOperation {
    /// From the 4-bit field.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 0xf {
            1 => PageOperation::Private,
            2 => PageOperation::Shared,
            other => PageOperation::Other(other),
        }
    }

    /// The 4-bit field.
    pub const fn bits(self) -> u8 {
        match self {
            PageOperation::Private => 1,
            PageOperation::Shared => 2,
            PageOperation::Other(other) => other & 0xf,
        }
    }
}

/// A request of the guest, as found in the MSR at VMGEXIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The MSR holds the address of a GHCB page: no MSR request at all.
    GhcbPage {
        /// Guest-physical address, 4 KiB aligned.
        gpa: u64,
    },
    /// 0x002: protocol versions and C-bit position.
    SevInfo,
    /// 0x004: one register of a CPUID function, sub-leaf 0.
    Cpuid {
        /// CPUID function.
        function: u32,
        /// Register asked for.
        register: CpuidRegister,
    },
    /// 0x006: hold this vCPU until it is started.
    ApResetHold,
    /// 0x010: which address shall the GHCB have?
    PreferredGhcb,
    /// 0x012: the GHCB will be at this frame.
    RegisterGhcb {
        /// Guest frame number, 52 bits.
        frame: u64,
    },
    /// 0x014: change the state of one 4 KiB page.
    PageStateChange {
        /// Guest frame number, 40 bits.
        frame: u64,
        /// What to change it to.
        operation: PageOperation,
    },
    /// 0x080: hypervisor features.
    HypervisorFeatures,
    /// 0x100: the guest gives up.
    Terminate {
        /// Reason code set, 4 bits.
        set: u8,
        /// Reason code.
        code: u8,
    },
    /// Anything else, an answer's number included. KVM leaves the MSR as it is and resumes the guest.
    Unknown {
        /// The whole MSR value.
        value: u64,
    },
}

impl Request {
    /// Reads a request from the MSR's value. Every value is some request.
    pub const fn decode(value: u64) -> Self {
        match value & INFO_MASK {
            0x000 => Request::GhcbPage { gpa: value },
            0x002 => Request::SevInfo,
            0x004 => Request::Cpuid { function: (value >> 32) as u32, register: register(value) },
            0x006 => Request::ApResetHold,
            0x010 => Request::PreferredGhcb,
            0x012 => Request::RegisterGhcb { frame: value >> 12 },
            0x014 => Request::PageStateChange {
                frame: value >> 12 & FRAME_MASK_40,
                operation: PageOperation::from_bits((value >> 52) as u8),
            },
            0x080 => Request::HypervisorFeatures,
            0x100 => Request::Terminate { set: (value >> 12 & 0xf) as u8, code: (value >> 16) as u8 },
            _ => Request::Unknown { value },
        }
    }

    /// The value that a guest writes to the MSR.
    pub const fn encode(self) -> u64 {
        match self {
            Request::GhcbPage { gpa } => gpa & !INFO_MASK,
            Request::SevInfo => 0x002,
            Request::Cpuid { function, register } => {
                (function as u64) << 32 | (register as u64) << 30 | 0x004
            }
            Request::ApResetHold => 0x006,
            Request::PreferredGhcb => 0x010,
            Request::RegisterGhcb { frame } => frame << 12 | 0x012,
            Request::PageStateChange { frame, operation } => {
                (operation.bits() as u64) << 52 | (frame & FRAME_MASK_40) << 12 | 0x014
            }
            Request::HypervisorFeatures => 0x080,
            Request::Terminate { set, code } => (code as u64) << 16 | (set as u64 & 0xf) << 12 | 0x100,
            Request::Unknown { value } => value,
        }
    }
}

const fn register(value: u64) -> CpuidRegister {
    match value >> 30 & 3 {
        0 => CpuidRegister::Eax,
        1 => CpuidRegister::Ebx,
        2 => CpuidRegister::Ecx,
        _ => CpuidRegister::Edx,
    }
}

/// An answer of the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// 0x001: protocol versions and C-bit position.
    SevInfo {
        /// Highest protocol version.
        max: u16,
        /// Lowest protocol version.
        min: u16,
        /// Position of the C-bit.
        c_bit: u8,
    },
    /// 0x005: a CPUID register's value.
    Cpuid {
        /// The register.
        register: CpuidRegister,
        /// Its value.
        value: u32,
    },
    /// 0x007: the vCPU was started; zero means that it was not by SIPI.
    ApResetHold {
        /// 52 bits.
        result: u64,
    },
    /// 0x011: preferred frame, or [`NO_PREFERRED_FRAME`].
    PreferredGhcb {
        /// Guest frame number.
        frame: u64,
    },
    /// 0x013: the registered frame; any other frame than the one asked for means refusal.
    RegisterGhcb {
        /// Guest frame number.
        frame: u64,
    },
    /// 0x015: result of a page-state change, zero on success.
    PageStateChange {
        /// Error code.
        error: u32,
    },
    /// 0x081: feature bits, see [`super::exit::features`].
    HypervisorFeatures {
        /// 52 bits.
        features: u64,
    },
    /// Any other value.
    Unknown {
        /// The whole MSR value.
        value: u64,
    },
}

impl Response {
    /// Reads an answer from the MSR's value.
    pub const fn decode(value: u64) -> Self {
        match value & INFO_MASK {
            0x001 => Response::SevInfo {
                max: (value >> 48) as u16,
                min: (value >> 32) as u16,
                c_bit: (value >> 24) as u8,
            },
            0x005 => Response::Cpuid { register: register(value), value: (value >> 32) as u32 },
            0x007 => Response::ApResetHold { result: value >> 12 },
            0x011 => Response::PreferredGhcb { frame: value >> 12 },
            0x013 => Response::RegisterGhcb { frame: value >> 12 },
            0x015 => Response::PageStateChange { error: (value >> 32) as u32 },
            0x081 => Response::HypervisorFeatures { features: value >> 12 },
            _ => Response::Unknown { value },
        }
    }

    /// The value that the guest finds in the MSR.
    pub const fn encode(self) -> u64 {
        match self {
            Response::SevInfo { max, min, c_bit } => {
                (max as u64) << 48 | (min as u64) << 32 | (c_bit as u64) << 24 | 0x001
            }
            Response::Cpuid { register, value } => (value as u64) << 32 | (register as u64) << 30 | 0x005,
            Response::ApResetHold { result } => result << 12 | 0x007,
            Response::PreferredGhcb { frame } => frame << 12 | 0x011,
            Response::RegisterGhcb { frame } => frame << 12 | 0x013,
            Response::PageStateChange { error } => (error as u64) << 32 | 0x015,
            Response::HypervisorFeatures { features } => features << 12 | 0x081,
            Response::Unknown { value } => value,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Values that unmodified Linux 6.12 sent and that it accepted as answers, recorded in a real boot.
    #[test]
    fn recorded_values_decode_to_their_meaning() {
        assert_eq!(
            Request::decode(0x0020_0000_03a0_0014),
            Request::PageStateChange { frame: 0x3a00, operation: PageOperation::Shared }
        );
        assert_eq!(
            Request::decode(0x0010_0000_1f23_8014),
            Request::PageStateChange { frame: 0x1f238, operation: PageOperation::Private }
        );
        assert_eq!(Request::decode(0x3a0_0012), Request::RegisterGhcb { frame: 0x3a00 });
        assert_eq!(Response::RegisterGhcb { frame: 0x3a00 }.encode(), 0x3a0_0013);
        assert_eq!(Response::HypervisorFeatures { features: 3 }.encode(), 0x3081);
        assert_eq!(Response::SevInfo { max: 2, min: 1, c_bit: 39 }.encode(), 0x0002_0001_2700_0001);
        assert_eq!(Request::Terminate { set: 1, code: 4 }.encode(), 0x4_1100);
    }

    proptest! {
        #[test]
        fn any_value_decodes_and_a_decoded_request_keeps_its_meaning(value: u64) {
            let request = Request::decode(value);
            prop_assert_eq!(Request::decode(request.encode()), request);
            let response = Response::decode(value);
            prop_assert_eq!(Response::decode(response.encode()), response);
        }
    }
}
