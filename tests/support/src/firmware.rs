// SPDX-License-Identifier: Apache-2.0
//! Firmware files with valid SEV metadata, made from scratch after edk2's layout, without the code under
//! test.

use crate::noise;

/// Bytes of a page.
pub const PAGE: u32 = 0x1000;
/// A section of RAM that the firmware uses before it knows of any other.
pub const SEC_MEM: u32 = 1;
/// The secrets page's section.
pub const SECRETS: u32 = 2;
/// The CPUID page's section.
pub const CPUID: u32 = 3;
/// The calling area of an SVSM.
pub const SVSM_CAA: u32 = 4;
/// The page for the hashes of kernel, initrd and command line.
pub const KERNEL_HASHES: u32 = 0x10;

const FOOTER: &str = "96b582de-1fb2-45f7-baea-a366c55a082d";
const SEV_METADATA: &str = "dc886566-984a-4798-a75e-5585a7bf67cc";
const HASH_TABLE: &str = "7255371f-3a3b-4b04-927b-1da6efa8d454";
const RESET_BLOCK: &str = "00f771de-1a7e-4fcb-890e-68c77e2fb44e";
const SVSM_INFO: &str = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd";

/// A GUID as firmware stores it, from its text.
fn guid(text: &str) -> Vec<u8> {
    let groups: Vec<Vec<u8>> = text
        .split('-')
        .map(|g| (0..g.len()).step_by(2).map(|i| u8::from_str_radix(&g[i..i + 2], 16).unwrap()).collect())
        .collect();
    let mut bytes = Vec::new();
    for (i, mut group) in groups.into_iter().enumerate() {
        if i < 3 {
            group.reverse();
        }
        bytes.extend(group);
    }
    bytes
}

/// What a firmware file contains.
#[derive(Clone, Debug)]
pub struct Firmware {
    /// Its size.
    pub pages: usize,
    /// Of the bytes that nothing else is in.
    pub seed: u64,
    /// {gpa, size, type} in file order.
    pub sections: Vec<(u32, u32, u32)>,
    /// Where vCPUs other than the first begin.
    pub reset_eip: u32,
    /// Address of the table of hashes; 0 without one.
    pub hashes_base: u32,
    /// Offset of an SVSM's entry point in the file.
    pub svsm_entry: u32,
}

impl Firmware {
    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = noise(self.seed, self.pages * PAGE as usize);
        let mut metadata = b"ASEV".to_vec();
        metadata.extend_from_slice(&(16 + 12 * self.sections.len() as u32).to_le_bytes());
        metadata.extend_from_slice(&1u32.to_le_bytes());
        metadata.extend_from_slice(&(self.sections.len() as u32).to_le_bytes());
        for (gpa, size, kind) in &self.sections {
            for word in [gpa, size, kind] {
                metadata.extend_from_slice(&word.to_le_bytes());
            }
        }
        // The metadata lies somewhere in the last page, before the table.
        let metadata_from_end = 0x800 + metadata.len() as u32;
        let at = file.len() - metadata_from_end as usize;
        file[at..at + metadata.len()].copy_from_slice(&metadata);

        let mut table = Vec::new();
        let mut entry = |guid_text: &str, data: &[u8]| {
            table.extend_from_slice(data);
            table.extend_from_slice(&(data.len() as u16 + 18).to_le_bytes());
            table.extend(guid(guid_text));
        };
        // An entry that no one knows must be passed over.
        entry("11111111-2222-3333-4444-555566667777", &[0xab; 7]);
        entry(SVSM_INFO, &self.svsm_entry.to_le_bytes());
        entry(HASH_TABLE, &[self.hashes_base.to_le_bytes(), 0x400u32.to_le_bytes()].concat());
        entry(SEV_METADATA, &metadata_from_end.to_le_bytes());
        entry(RESET_BLOCK, &self.reset_eip.to_le_bytes());
        let len = table.len() as u16 + 18;
        table.extend_from_slice(&len.to_le_bytes());
        table.extend(guid(FOOTER));
        let at = file.len() - 32 - table.len();
        file[at..at + table.len()].copy_from_slice(&table);
        file
    }
}
