// SPDX-License-Identifier: Apache-2.0
//! Firmware status codes in words.
//!
//! SEV-SNP Firmware ABI 1.58, section 4.1 (status codes); the values are those of Linux'
//! `include/uapi/linux/psp-sev.h`.

use std::fmt;

/// A status that the firmware answers a command with. Zero is success and therefore no value of this type.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FwStatus(pub u32);

macro_rules! statuses {
    ($($name:ident = $value:literal, $words:literal;)*) => {
        #[allow(missing_docs, reason = "names are those of the specification; the words say what they mean")]
        impl FwStatus {
            $(pub const $name: FwStatus = FwStatus($value);)*

            /// Name and meaning of a known status.
            fn known(self) -> Option<(&'static str, &'static str)> {
                match self.0 {
                    $($value => Some((stringify!($name), $words)),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    INVALID_PLATFORM_STATE = 0x01, "the firmware is not initialised for SNP";
    INVALID_GUEST_STATE = 0x02, "the command does not fit the guest's state: launch commands out of order";
    INVALID_CONFIG = 0x03, "the platform's configuration does not allow this";
    INVALID_LENGTH = 0x04, "a buffer has the wrong length";
    ALREADY_OWNED = 0x05, "the platform has an owner already";
    INVALID_CERTIFICATE = 0x06, "a certificate is not valid";
    POLICY_FAILURE = 0x07, "the platform cannot honour the guest policy, or the ID block names another policy";
    INACTIVE = 0x08, "the guest is not active";
    INVALID_ADDRESS = 0x09, "an address is not valid";
    BAD_SIGNATURE = 0x0a, "a signature over the ID block or the ID key is wrong";
    BAD_MEASUREMENT = 0x0b, "the launch digest differs from the ID block's, or a message failed authentication";
    ASID_OWNED = 0x0c, "the ASID belongs to another guest";
    INVALID_ASID = 0x0d, "the ASID is out of range";
    WBINVD_REQUIRED = 0x0e, "caches must be flushed first (WBINVD)";
    DFFLUSH_REQUIRED = 0x0f, "the data fabric must be flushed first (DF_FLUSH)";
    INVALID_GUEST = 0x10, "the guest context is not valid";
    INVALID_COMMAND = 0x11, "the command is not known";
    ACTIVE = 0x12, "the guest is active";
    HWERROR_PLATFORM = 0x13, "a hardware error: the platform must be reset";
    HWERROR_UNSAFE = 0x14, "a hardware error: the platform is not safe to use";
    UNSUPPORTED = 0x15, "not supported by this firmware";
    INVALID_PARAM = 0x16, "a parameter is not valid; for a CPUID page: an entry was refused";
    RESOURCE_LIMIT = 0x17, "the firmware is out of resources";
    SECURE_DATA_INVALID = 0x18, "the firmware's own stored data is not valid";
    INVALID_PAGE_SIZE = 0x19, "the RMP entry has another page size";
    INVALID_PAGE_STATE = 0x1a, "the RMP entry is in another state";
    INVALID_MDATA_ENTRY = 0x1b, "a metadata entry is not valid";
    INVALID_PAGE_OWNER = 0x1c, "the page belongs to another guest";
    AEAD_OFLOW = 0x1d, "the message sequence number would overflow";
    EXIT_RING_BUFFER = 0x1f, "the firmware left ring-buffer mode";
    RMP_INIT_REQUIRED = 0x20, "the RMP is not initialised";
    BAD_SVN = 0x21, "the ID block's guest SVN is too low";
    BAD_VERSION = 0x22, "the ID block's version is not supported";
    SHUTDOWN_REQUIRED = 0x23, "the firmware must be shut down first";
    UPDATE_FAILED = 0x24, "the firmware update failed";
    RESTORE_REQUIRED = 0x25, "the firmware must be restored first";
    RMP_INITIALIZATION_FAILED = 0x26, "the RMP could not be initialised";
    INVALID_KEY = 0x27, "the key that was asked for does not exist or is disabled";
}

impl FwStatus {
    /// What the `error` field holds when the driver made no firmware call.
    pub const NO_FIRMWARE_CALL: FwStatus = FwStatus(0xffff_ffff);
}

impl fmt::Display for FwStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (*self, self.known()) {
            (FwStatus(0), _) => f.write_str("SUCCESS (0x0)"),
            (FwStatus::NO_FIRMWARE_CALL, _) => f.write_str(
                "no firmware call was made (0xffffffff): look at the ccp driver and the secure processor",
            ),
            (FwStatus(code), Some((name, words))) => write!(f, "{name} ({code:#x}): {words}"),
            (FwStatus(code), None) => write!(f, "unknown firmware status {code:#x}"),
        }
    }
}

impl fmt::Debug for FwStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some((name, _)) => write!(f, "{name}"),
            None => write!(f, "FwStatus({:#x})", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_shown_with_name_number_and_meaning() {
        assert!(FwStatus(0xb).to_string().starts_with("BAD_MEASUREMENT (0xb): the launch digest"));
        assert_eq!(FwStatus(0x1234).to_string(), "unknown firmware status 0x1234");
        assert!(FwStatus(u32::MAX).to_string().contains("no firmware call"));
    }
}
