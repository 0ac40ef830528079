// SPDX-License-Identifier: Apache-2.0
//! The secrets page: the keys by which a guest talks to the firmware.
//!
//! SEV-SNP Firmware ABI 1.58, section 8.17.2.5, and Linux `struct snp_secrets_page`. On hardware the firmware
//! writes it; the software model builds the same page here. The guest owns the OS area and may write anything
//! there.

use crate::le;
use crate::plan::PAGE_SIZE;

/// Version of the layout without SVSM fields filled in.
pub const VERSION: u32 = 3;
/// Number of message keys, one per VMPL.
pub const VMPCK_COUNT: usize = 4;

const VMPCK: usize = 0x20;
const OS_AREA: usize = 0xa0;

/// What the firmware puts into the page. Fields that are not here are zero.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretsPage {
    /// Layout version.
    pub version: u32,
    /// Bit 0: the guest was migrated in.
    pub flags: u32,
    /// CPUID signature of the platform (family, model, stepping).
    pub fms: u32,
    /// Hypervisor's workaround bits, as passed to the launch.
    pub gosvw: [u8; 16],
    /// Message keys by VMPL.
    pub vmpck: [[u8; 32]; VMPCK_COUNT],
}

impl std::fmt::Debug for SecretsPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let SecretsPage { version, flags, fms, .. } = self;
        write!(f, "SecretsPage {{ version: {version}, flags: {flags:#x}, fms: {fms:#x}, keys not shown }}")
    }
}

impl SecretsPage {
    /// The page as it enters the guest.
    pub fn encode(&self) -> [u8; PAGE_SIZE as usize] {
        let mut page = [0; PAGE_SIZE as usize];
        page[..4].copy_from_slice(&self.version.to_le_bytes());
        page[4..8].copy_from_slice(&self.flags.to_le_bytes());
        page[8..12].copy_from_slice(&self.fms.to_le_bytes());
        page[0x10..0x20].copy_from_slice(&self.gosvw);
        page[VMPCK..OS_AREA].copy_from_slice(self.vmpck.as_flattened());
        page
    }

    /// Reads a page back. Total: every page is some secrets page.
    pub fn decode(page: &[u8; PAGE_SIZE as usize]) -> SecretsPage {
        let word = |offset| le::u32_at(page, offset);
        let mut vmpck = [[0; 32]; VMPCK_COUNT];
        vmpck.as_flattened_mut().copy_from_slice(&page[VMPCK..OS_AREA]);
        SecretsPage { version: word(0), flags: word(4), fms: word(8), gosvw: le::array(page, 0x10), vmpck }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_keys_are_where_the_guest_looks_for_them() {
        let vmpck = [[0xa0; 32], [0xa1; 32], [0xa2; 32], [0xa3; 32]];
        let page = SecretsPage { version: 3, flags: 0, fms: 0x00a2_0f12, gosvw: [7; 16], vmpck }.encode();
        // Offsets of Linux's struct snp_secrets_page.
        assert_eq!(page[0x08..0x0c], [0x12, 0x0f, 0xa2, 0x00]);
        assert_eq!(page[0x10..0x20], [7; 16]);
        for (i, offset) in [0x20, 0x40, 0x60, 0x80].into_iter().enumerate() {
            assert_eq!(page[offset..offset + 32], vmpck[i]);
        }
        assert!(page[0xa0..].iter().all(|b| *b == 0), "the OS area starts out empty");
    }

    #[test]
    fn keys_do_not_get_into_logs() {
        let page =
            SecretsPage { version: 3, flags: 0, fms: 0, gosvw: [0; 16], vmpck: [[0xab; 32]; VMPCK_COUNT] };
        let text = format!("{page:?}").to_lowercase();
        assert!(!text.contains("171") && !text.contains("abab"), "{text}");
    }

    proptest! {
        #[test]
        fn every_page_decodes_and_what_was_encoded_comes_back(
            bytes in proptest::collection::vec(any::<u8>(), PAGE_SIZE as usize),
        ) {
            let page: [u8; PAGE_SIZE as usize] = bytes.try_into().unwrap();
            let secrets = SecretsPage::decode(&page);
            prop_assert_eq!(&SecretsPage::decode(&secrets.encode()), &secrets);
            prop_assert_eq!(&secrets.encode()[0x20..0xa0], &page[0x20..0xa0]);
        }
    }
}
