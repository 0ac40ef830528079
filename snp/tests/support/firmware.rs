// SPDX-License-Identifier: Apache-2.0
//! Firmware files with valid SEV metadata, made from scratch after edk2's layout, without the code under test.

use proptest::prelude::*;

pub const PAGE: u32 = 0x1000;
pub const SEC_MEM: u32 = 1;
pub const SECRETS: u32 = 2;
pub const CPUID: u32 = 3;
pub const SVSM_CAA: u32 = 4;
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
    pub pages: usize,
    pub seed: u64,
    /// {gpa, size, type} in file order.
    pub sections: Vec<(u32, u32, u32)>,
    pub reset_eip: u32,
    pub hashes_base: u32,
    pub svsm_entry: u32,
}

impl Firmware {
    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut x = self.seed | 1;
        let mut file: Vec<u8> = Vec::with_capacity(self.pages * PAGE as usize);
        while file.len() < self.pages * PAGE as usize {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            file.extend_from_slice(&x.to_le_bytes());
        }
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

/// Firmware with random sections that do not overlap, all low in memory, and at most one page for hashes.
pub fn any_firmware() -> impl Strategy<Value = Firmware> {
    let section = (0u32..4, 1u32..5, prop_oneof![Just(SEC_MEM), Just(SECRETS), Just(CPUID), Just(SVSM_CAA)]);
    (
        1usize..40,
        any::<u64>(),
        proptest::collection::vec(section, 0..12),
        proptest::option::of((0u32..12, 0u32..0x1000 - 176)),
        0x1000u32..0xffff_fff0,
        any::<u64>(),
    )
        .prop_map(|(pages, seed, gaps, hashes, reset_eip, order)| {
            let mut next = 0x80_0000;
            let mut sections = Vec::new();
            for (gap, pages, kind) in gaps {
                let pages = if kind == SECRETS || kind == CPUID { 1 } else { pages };
                next += gap * PAGE;
                sections.push((next, pages * PAGE, kind));
                next += pages * PAGE;
            }
            // File order is the launch order and need not be the order of addresses.
            let mut x = order | 1;
            for i in (1..sections.len()).rev() {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1);
                sections.swap(i, (x >> 33) as usize % (i + 1));
            }
            let mut hashes_base = 0;
            if let Some((place, offset)) = hashes {
                let place = (place as usize).min(sections.len());
                sections.insert(place, (next, PAGE, KERNEL_HASHES));
                hashes_base = next + offset;
            }
            Firmware { pages, seed, sections, reset_eip, hashes_base, svsm_entry: 0x40 }
        })
}
