// SPDX-License-Identifier: Apache-2.0
//! The files of an image, by number: which there are, what they are called, and which of them are secret.

/// A number that no user's file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("file id {0} is not between 1 and 62")]
pub struct NotAFile(u32);

/// Number of a file, 0 to 63.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(u8);

impl FileId {
    /// The file table itself.
    pub const FILE_TABLE: Self = Self(0);
    /// UEFI variables.
    pub const BIOS_NVRAM: Self = Self(1);
    /// Physical-presence interface of the TPM.
    pub const TPM_PPI: Self = Self(2);
    /// NV image of the Microsoft TPM engine; never ours.
    pub const TPM_NVRAM: Self = Self(3);
    /// Offset of the guest's clock.
    pub const RTC_SKEW: Self = Self(4);
    /// Volatile state of our TPM engine, kept over a planned restart.
    pub const VTPM_VOLATILE: Self = Self(57);
    /// Saved state of our TPM engine (TPM 1.2 style; unused by TPM 2.0, kept so that no callback fails).
    pub const VTPM_SAVE: Self = Self(58);
    /// What was made at manufacture: certificates and their names.
    pub const VTPM_MANUFACTURE: Self = Self(59);
    /// Permanent state of our TPM engine.
    pub const VTPM_STATE: Self = Self(60);
    /// The permanent state that was last read back successfully.
    pub const VTPM_STATE_GOOD: Self = Self(61);
    /// The integrity root.
    pub const ROOT: Self = Self(62);
    /// The extended file table.
    pub const EXTENDED: Self = Self(63);

    /// A file that a user may name: anything but the two tables.
    pub fn user(id: u32) -> Result<Self, NotAFile> {
        match id {
            1..=62 => Ok(Self(id as u8)),
            _ => Err(NotAFile(id)),
        }
    }

    /// The number.
    pub fn number(self) -> u32 {
        u32::from(self.0)
    }

    /// The number as an index into a table.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// All ids, those of the two tables included.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..64).map(Self)
    }

    /// All ids that hold files: everything but the two tables.
    pub fn files() -> impl Iterator<Item = Self> {
        (1..63).map(Self)
    }

    /// The field's name, where the format or this project gives one.
    pub fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "FILE_TABLE",
            1 => "BIOS_NVRAM",
            2 => "TPM_PPI",
            3 => "TPM_NVRAM",
            4 => "RTC_SKEW",
            5 => "ATTEST",
            6 => "KEY_PROTECTOR",
            7 => "VM_UNIQUE_ID",
            8 => "GUEST_FIRMWARE",
            9 => "CUSTOM_UEFI",
            10 => "GUEST_WATCHDOG",
            11 => "HW_KEY_PROTECTOR",
            13 => "GUEST_SECRET_KEY",
            14 => "HIBERNATION_TOKEN",
            15 => "PLATFORM_SEED",
            16 => "PROVENANCE_DOC",
            17 => "TPM_NVRAM_BACKUP",
            18 => "PROVISIONING_MARKER",
            57 => "VTPM_VOLATILE",
            58 => "VTPM_SAVE",
            59 => "VTPM_MANUFACTURE",
            60 => "VTPM_STATE",
            61 => "VTPM_STATE_GOOD",
            62 => "ROOT",
            63 => "EXTENDED_FILE_TABLE",
            _ => return None,
        })
    }

    /// Whether an encrypted image may never hold this file in plain text.
    pub fn is_secret(self) -> bool {
        matches!(self.0, 1 | 2 | 3 | 13 | 17 | 57..=62)
    }
}

impl std::fmt::Display for FileId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.name() {
            Some(name) => write!(f, "file {} ({name})", self.0),
            None => write!(f, "file {}", self.0),
        }
    }
}
