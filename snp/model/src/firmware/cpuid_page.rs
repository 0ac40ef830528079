// SPDX-License-Identifier: Apache-2.0
//! The firmware's check of a CPUID page.
//!
//! SEV-SNP Firmware ABI 1.58, section 8.17.2.6 (CPUID page) and the "CPUID policy" of AMD's Processor
//! Programming References: a guest must not be told of features that its processor does not have or that the
//! firmware withholds from SNP guests. The page is not measured, so this check is all that stands behind it.
//! A refused page comes back with the values that the firmware would accept, most of the time.
//!
//! AMD-ASPFW, `sev_mcmd.c:snp_mcmd_launch_update` and `cpuid_lookup.c:sanitize_cpuid_list`, for the page;
//! module `rules` for the entries.

mod rules;

use snp::le;
use snp::plan::PAGE_SIZE;

use crate::cpuid::CpuidRegisters;
use crate::firmware::product::Processor;

/// Most entries that fit.
pub const MAX_ENTRIES: usize = 64;
/// First byte of the first entry.
pub const ENTRIES: usize = 16;
/// Length of an entry.
pub const ENTRY_LEN: usize = 48;

/// Leaves that are looked at (`CPUID_STD_RANGE`, `CPUID_EXT_RANGE`). Others, those of hypervisors among them,
/// may say anything.
const RANGES: [std::ops::RangeInclusive<u32>; 2] = [0..=0xffff, 0x8000_0000..=0x8000_ffff];

/// One entry of the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "names are those of the specification")]
pub struct Entry {
    pub function: u32,
    pub index: u32,
    pub xcr0_in: u64,
    pub xss_in: u64,
    pub registers: CpuidRegisters,
    pub reserved: u64,
}

impl Entry {
    /// Reads an entry.
    pub fn decode(bytes: &[u8; ENTRY_LEN]) -> Self {
        let u32_at = |at| le::u32_at(bytes, at);
        let u64_at = |at| le::u64_at(bytes, at);
        Entry {
            function: u32_at(0),
            index: u32_at(4),
            xcr0_in: u64_at(8),
            xss_in: u64_at(16),
            registers: CpuidRegisters { eax: u32_at(24), ebx: u32_at(28), ecx: u32_at(32), edx: u32_at(36) },
            reserved: u64_at(40),
        }
    }

    /// The entry's bytes.
    pub fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        let r = self.registers;
        bytes[0..4].copy_from_slice(&self.function.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.index.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.xcr0_in.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.xss_in.to_le_bytes());
        for (i, value) in [r.eax, r.ebx, r.ecx, r.edx].into_iter().enumerate() {
            bytes[24 + i * 4..28 + i * 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[40..48].copy_from_slice(&self.reserved.to_le_bytes());
        bytes
    }
}

/// Checks `page`; if it is refused, makes it what comes back and returns false.
///
/// A page with a wrong header comes back as it is. So does the reserved word of an entry, which alone gets a
/// page refused. What lies behind the last entry is not looked at, and a leaf may be there twice.
pub fn check(page: &mut [u8; PAGE_SIZE as usize], processor: &Processor, c_bit: u8) -> bool {
    let count = le::u32_at(page, 0) as usize;
    if count > MAX_ENTRIES || page[4..ENTRIES].iter().any(|byte| *byte != 0) {
        return false;
    }
    let mut accepted = true;
    let (entries, _) = page[ENTRIES..ENTRIES + count * ENTRY_LEN].as_chunks_mut::<ENTRY_LEN>();
    for bytes in entries {
        let entry = Entry::decode(bytes);
        if RANGES.iter().all(|range| !range.contains(&entry.function)) {
            continue;
        }
        let (registers, good) = rules::judge(&entry, processor, c_bit);
        accepted &= entry.reserved == 0 && good;
        *bytes = Entry { registers, ..entry }.encode();
    }
    accepted
}

#[cfg(test)]
#[path = "cpuid_page_test.rs"]
mod tests;
