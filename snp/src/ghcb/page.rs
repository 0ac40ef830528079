// SPDX-License-Identifier: Apache-2.0
//! The GHCB page: where each field lies, and which fields are marked valid.
//!
//! GHCB specification, section 2.6 (layout) and table 3 (valid bitmap). A field counts only if its bit in the
//! valid bitmap is set; the bit's number is the field's offset divided by eight. Uses `core` only.

/// Size of the page.
pub const SIZE: usize = 4096;
/// Where the valid bitmap lies, 16 bytes.
pub const VALID_BITMAP: usize = 0x3f0;
/// First byte of the buffer that both sides share.
pub const SHARED_BUFFER: usize = 0x800;
/// First byte after the shared buffer.
pub const SHARED_BUFFER_END: usize = 0xff0;
/// Protocol version, a u16.
pub const PROTOCOL_VERSION: usize = 0xffa;
/// Usage, a u32; zero is the only one that is defined for guests of KVM.
pub const USAGE: usize = 0xffc;

/// Fields of the save area, named by their offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "names are those of the specification's table")]
#[repr(u16)]
pub enum Field {
    Cpl = 0x0cb,
    Rax = 0x1f8,
    Rcx = 0x308,
    Rdx = 0x310,
    Rbx = 0x318,
    Rsi = 0x330,
    ExitCode = 0x390,
    ExitInfo1 = 0x398,
    ExitInfo2 = 0x3a0,
    Scratch = 0x3a8,
    Xcr0 = 0x3e8,
}

impl Field {
    /// Offset in the page; [`Field::Cpl`] is one byte long, all others are eight.
    pub const fn offset(self) -> usize {
        self as usize
    }

    /// Bit of the field in the valid bitmap.
    pub const fn bit(self) -> usize {
        self.offset() / 8
    }
}

/// The valid bitmap, copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Valid(pub u128);

impl Valid {
    /// Whether `field` is marked.
    pub const fn has(self, field: Field) -> bool {
        self.0 >> field.bit() & 1 != 0
    }

    /// Marks `field`.
    pub const fn set(&mut self, field: Field) {
        self.0 |= 1 << field.bit();
    }
}

/// The valid bitmap of `page`.
pub fn valid(page: &[u8; SIZE]) -> Valid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&page[VALID_BITMAP..VALID_BITMAP + 16]);
    Valid(u128::from_le_bytes(bytes))
}

/// Replaces the valid bitmap of `page`.
pub fn set_valid(page: &mut [u8; SIZE], valid: Valid) {
    page[VALID_BITMAP..VALID_BITMAP + 16].copy_from_slice(&valid.0.to_le_bytes());
}

/// The value of `field`, marked valid or not.
pub fn get(page: &[u8; SIZE], field: Field) -> u64 {
    let offset = field.offset();
    if matches!(field, Field::Cpl) {
        return page[offset] as u64;
    }
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[offset..offset + 8]);
    u64::from_le_bytes(bytes)
}

/// The value of `field` if it is marked valid.
pub fn get_if_valid(page: &[u8; SIZE], field: Field) -> Option<u64> {
    if valid(page).has(field) { Some(get(page, field)) } else { None }
}

/// Writes `field` and marks it valid.
pub fn set(page: &mut [u8; SIZE], field: Field, value: u64) {
    let offset = field.offset();
    if matches!(field, Field::Cpl) {
        page[offset] = value as u8;
    } else {
        page[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
    let mut bits = valid(page);
    bits.set(field);
    set_valid(page, bits);
}

/// Usage of the page.
pub fn usage(page: &[u8; SIZE]) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[USAGE..USAGE + 4]);
    u32::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit numbers as the specification lists them (quadword offsets of the save area).
    #[test]
    fn valid_bits_are_quadword_numbers() {
        for (field, bit) in [
            (Field::Cpl, 25),
            (Field::Rax, 63),
            (Field::Rcx, 97),
            (Field::Rdx, 98),
            (Field::Rbx, 99),
            (Field::Rsi, 102),
            (Field::ExitCode, 114),
            (Field::ExitInfo1, 115),
            (Field::ExitInfo2, 116),
            (Field::Scratch, 117),
            (Field::Xcr0, 125),
        ] {
            assert_eq!(field.bit(), bit, "{field:?}");
        }
    }

    #[test]
    fn writing_a_field_marks_only_that_field() {
        let mut page = [0; SIZE];
        set(&mut page, Field::Rax, 7);
        assert_eq!(get_if_valid(&page, Field::Rax), Some(7));
        assert_eq!(get_if_valid(&page, Field::Rbx), None);
        assert_eq!(page[VALID_BITMAP + 7], 0x80);
    }
}
