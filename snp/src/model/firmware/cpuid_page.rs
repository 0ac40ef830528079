// SPDX-License-Identifier: Apache-2.0
//! The firmware's check of a CPUID page.
//!
//! SEV-SNP Firmware ABI 1.58, section 8.17.2.6 (CPUID page) and the "CPUID policy" of AMD's Processor Programming
//! References: a guest must not be told of features that its processor does not have or that the firmware withholds from
//! SNP guests. The page is not measured, so this check is all that stands behind it. A refused page comes back with the
//! values that the firmware would accept.
//!
//! AMD does not publish the whole policy. The model checks what is known from hosts that refused tables, and compares
//! feature bits with the host's where it was told those.

use crate::model::cpuid::CpuidRegisters;
use crate::pages::cpuid::CpuidEntry;

/// Most entries that fit.
pub const MAX_ENTRIES: usize = 64;
/// First byte of the first entry.
pub const ENTRIES: usize = 16;
/// Length of an entry.
pub const ENTRY_LEN: usize = 48;

const PAGE: usize = 4096;
const TSC_DEADLINE: u32 = 1 << 24;
const TSC_ADJUST: u32 = 1 << 1;
const VIRT_SSBD: u32 = 1 << 25;
const PCM_SUPPORTED: u32 = 1 << 9;
/// SEV, SEV-ES and SNP in EAX of 0x8000_001F.
const SEV_FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 4;
/// Leaves of hypervisors: the firmware does not look into them.
const HYPERVISOR: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_ffff;

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
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
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

/// Checks `page`; if it is refused, makes it what would be accepted and returns false.
pub fn check(page: &mut [u8; PAGE], host: &[CpuidEntry], c_bit: u8) -> bool {
    let count = u32::from_le_bytes([page[0], page[1], page[2], page[3]]) as usize;
    if count > MAX_ENTRIES {
        // Nothing sensible can be offered instead.
        return false;
    }
    let mut accepted = page[4..ENTRIES].iter().all(|byte| *byte == 0);
    page[4..ENTRIES].fill(0);
    let (entries, rest) = page[ENTRIES..].split_at_mut(count * ENTRY_LEN);
    let (entries, _) = entries.as_chunks_mut::<ENTRY_LEN>();
    for bytes in entries {
        let entry = Entry::decode(bytes);
        let correct = corrected(entry, host, c_bit);
        if correct != entry {
            accepted = false;
            *bytes = correct.encode();
        }
    }
    // What lies behind the last entry is reserved.
    let unused = MAX_ENTRIES * ENTRY_LEN - count * ENTRY_LEN;
    if rest[..unused].iter().any(|byte| *byte != 0) {
        accepted = false;
        rest[..unused].fill(0);
    }
    accepted
}

/// `entry` as the firmware would accept it.
fn corrected(entry: Entry, host: &[CpuidEntry], c_bit: u8) -> Entry {
    let mut e = Entry { reserved: 0, ..entry };
    if HYPERVISOR.contains(&e.function) {
        return e;
    }
    let find = |function, index| {
        host.iter()
            .find(|h| h.function == function && (!h.indexed || h.index == index))
            .map(CpuidRegisters::from)
    };
    let r = &mut e.registers;
    // Feature bits must be among the host's, where those are known.
    if let Some(h) = find(e.function, e.index) {
        match (e.function, e.index) {
            (1, _) | (0x8000_0001, _) => {
                r.ecx &= h.ecx | HYPERVISOR_BIT;
                r.edx &= h.edx;
            }
            (7, 0) => {
                r.ebx &= h.ebx;
                r.ecx &= h.ecx;
                r.edx &= h.edx;
            }
            (7, 1) | (0xd, 1) | (0x8000_0021, _) => r.eax &= h.eax,
            (0x8000_0008, _) => r.ebx &= h.ebx,
            _ => {}
        }
    }
    // What is withheld from SNP guests, seen as refusals on hosts.
    match (e.function, e.index) {
        (1, _) => r.ecx &= !TSC_DEADLINE,
        (7, 0) => {
            r.ebx &= !TSC_ADJUST;
            r.edx = 0;
        }
        // EBX is the size for XCR0_IN and XSS_IN, of which x87 and SSE need no more than the legacy area.
        (0xd, 0 | 1) if e.xcr0_in & !3 == 0 && e.xss_in == 0 => r.ebx = 0x240,
        (0x8000_0008, _) => r.ebx &= !VIRT_SSBD,
        (0x8000_001f, _) => {
            r.eax |= SEV_FEATURES;
            r.ebx = r.ebx & !0x3f | u32::from(c_bit & 0x3f);
        }
        (0x8000_0021, _) => {
            r.eax &= !PCM_SUPPORTED;
            r.ecx = 0;
        }
        (0x8000_0026, _) => *r = CpuidRegisters::default(),
        _ => {}
    }
    e
}

/// Bit 31 of function 1 ECX: no processor has it, and guests must see it.
const HYPERVISOR_BIT: u32 = 1 << 31;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(entries: &[Entry]) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[..4].copy_from_slice(&(entries.len() as u32).to_le_bytes());
        for (i, entry) in entries.iter().enumerate() {
            page[ENTRIES + i * ENTRY_LEN..][..ENTRY_LEN].copy_from_slice(&entry.encode());
        }
        page
    }

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> Entry {
        Entry { function, registers: CpuidRegisters { eax, ebx, ecx, edx }, ..Entry::default() }
    }

    fn sev() -> Entry {
        leaf(0x8000_001f, 0x1a, 0x8000_0000 | 1 << 6 | 51, 0, 0)
    }

    #[test]
    fn a_stripped_table_is_accepted_unchanged() {
        let mut p = page(&[leaf(0, 0x10, 0, 0, 0), leaf(1, 0xa0_0f11, 0, 1 << 31, 0), sev()]);
        let before = p;
        assert!(check(&mut p, &[], 51));
        assert_eq!(p, before);
    }

    #[test]
    fn a_refused_table_comes_back_as_one_that_is_accepted() {
        let wrong = [
            leaf(1, 0, 0, TSC_DEADLINE, 0),
            leaf(7, 0, TSC_ADJUST, 0, 1 << 26),
            Entry { index: 1, xcr0_in: 1, ..leaf(0xd, 0xf, 0x340, 0, 0) },
            leaf(0x8000_0008, 0, VIRT_SSBD, 0, 0),
            leaf(0x8000_0021, PCM_SUPPORTED, 0, 1, 0),
            leaf(0x8000_0026, 1, 1, 1, 1),
            leaf(0x8000_001f, 0x1a, 39, 0, 0),
            Entry { reserved: 1, ..leaf(0x4000_0000, 0, 0, 0, 0) },
        ];
        for entry in wrong {
            let mut p = page(&[entry]);
            assert!(!check(&mut p, &[], 51), "{entry:x?}");
            assert!(check(&mut p, &[], 51), "{entry:x?}");
        }
    }

    #[test]
    fn a_feature_that_the_host_lacks_is_refused() {
        let host = CpuidEntry { function: 1, ecx: 1, edx: 1, ..CpuidEntry::default() };
        assert!(check(&mut page(&[leaf(1, 0, 0, 1 << 31 | 1, 1)]), &[host], 51));
        let mut p = page(&[leaf(1, 0, 0, 3, 1)]);
        assert!(!check(&mut p, &[host], 51));
        assert_eq!(p[ENTRIES + 32], 1, "ECX without the bit that the host lacks");
    }

    #[test]
    fn more_than_64_entries_and_reserved_bytes_are_refused() {
        let mut p = page(&[]);
        p[0] = 65;
        assert!(!check(&mut p, &[], 51));
        for at in [4, 15, ENTRIES, ENTRIES + 64 * ENTRY_LEN - 1] {
            let mut p = page(&[]);
            p[at] = 1;
            assert!(!check(&mut p, &[], 51), "{at}");
        }
    }

    proptest! {
        #[test]
        fn any_page_is_accepted_after_one_correction_or_has_too_many_entries(
            count in 0u32..70, bytes in proptest::collection::vec(any::<u8>(), PAGE), c_bit in 32u8..52
        ) {
            let mut p: [u8; PAGE] = bytes.try_into().unwrap();
            p[..4].copy_from_slice(&count.to_le_bytes());
            if !check(&mut p, &[], c_bit) && count <= 64 {
                prop_assert!(check(&mut p, &[], c_bit));
            }
        }
    }
}
