// SPDX-License-Identifier: Apache-2.0
//! The CPUID table: one list of leaves for `KVM_SET_CPUID2` and for the CPUID page.
//!
//! An SNP guest trusts the page that the firmware has checked, but asks the hypervisor too, before it has
//! found the page and for the parts that hold APIC ids; so both must come from one table. Layout of the page:
//! SEV-SNP Firmware ABI 1.58, section 8.17.2.6 and table "CPUID_FUNCTION". What the firmware accepts is known
//! from the one that AMD published for Genoa (`snp-model` has the rules): what the processor has, in the
//! leaves of its list. [`CpuidTable::snp`] keeps to that. The table is built from the leaves that the
//! *platform* offers, never from this process's own CPUID instruction.

use super::cpuid_entry::CpuidEntry;
use super::cpuid_entry::Register;
use super::cpuid_raw::RawCpuid;
use crate::plan::PAGE_SIZE;

/// Entries that fit into the page.
pub const MAX_ENTRIES: usize = 64;
/// Possible positions of the C-bit: above what 32-bit code can address, inside of a page-table entry's
/// address.
pub const C_BITS: std::ops::RangeInclusive<u8> = 32..=51;
/// Position of the first entry in the page.
const FIRST_ENTRY: usize = 16;
/// Bytes of an entry.
const ENTRY_LEN: usize = 48;

/// SEV leaf.
const SEV_LEAF: u32 = 0x8000_001f;
/// SEV leaf, EAX: SEV, SEV-ES, SEV-SNP.
const SEV_FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 4;
/// SEV leaf, EBX: caches are coherent, the guest need not flush them after validating a page.
const COHERENCY_SFW_NO: u32 = 1 << 31;
/// Leaf 1, ECX.
const LEAF1_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_RDRAND: u32 = 1 << 30;
const LEAF1_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const LEAF1_HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX.
const SVM: u32 = 1 << 2;
const TOPOEXT: u32 = 1 << 22;
/// Extended APIC id: not offered by KVM (Linux 6.12 to 7.3, `__do_cpuid_func`, gives it all zero), filled in
/// here.
const TOPOLOGY_LEAF: u32 = 0x8000_001e;
/// Leaf 0x80000021, ECX: TSA_SQ_NO and TSA_L1_NO.
const TSA_NO: u32 = 1 << 1 | 1 << 2;
/// Highest basic leaf, and highest sub-leaf of leaf 7, that the firmware has rules for.
const HIGHEST_BASIC: u32 = 0x10;
const HIGHEST_FEATURES: u32 = 1;

/// Components of XCR0 whose sub-leaves are among [`SNP_LEAVES`]: x87, SSE, AVX, AVX-512, protection keys. A
/// guest that finds a component without its sub-leaf ends itself (Linux, `snp_cpuid_calc_xsave_size`).
const XCR0_COMPONENTS: u32 = 0x2e7;

/// Leaves that an SNP guest gets, if the platform offers them: leaf, first and last sub-leaf. The firmware
/// demands that any other leaf of the basic and the extended range is zero (AMD-ASPFW,
/// `cpuid_lookup.c:sanitize_cpuid_entry`); one that is not there reads as zero. In its list, but useless to a
/// guest, are 0x8000000A (see [`CpuidTable::snp`]), 0x8000001B, 0x80000020, 0x80000024; and 0x80000026 only
/// on processors from Genoa on.
const SNP_LEAVES: &[(u32, u32, u32)] = &[
    (0, 0, 0),
    (1, 0, 0),
    (5, 0, 0),
    (6, 0, 0),
    (7, 0, HIGHEST_FEATURES),
    (0xb, 0, 2),
    (0xd, 0, 2),
    (0xd, 5, 7),
    (0xd, 9, 9),
    (0xd, 11, 12),
    (0x8000_0000, 0, 0),
    (0x8000_0001, 0, 0),
    (0x8000_0002, 0, 0),
    (0x8000_0003, 0, 0),
    (0x8000_0004, 0, 0),
    (0x8000_0005, 0, 0),
    (0x8000_0006, 0, 0),
    (0x8000_0007, 0, 0),
    (0x8000_0008, 0, 0),
    (0x8000_0019, 0, 0),
    (0x8000_001a, 0, 0),
    (0x8000_001d, 0, 4),
    (TOPOLOGY_LEAF, 0, 0),
    (0x8000_0021, 0, 0),
    (0x8000_0022, 0, 0),
    (0x8000_0023, 0, 0),
];

/// Whether an SNP guest may have this leaf; those of hypervisors always.
fn is_snp_leaf(e: &CpuidEntry) -> bool {
    let checked = e.function <= 0xffff || (0x8000_0000..=0x8000_ffff).contains(&e.function);
    let listed =
        |&(leaf, first, last): &(u32, u32, u32)| leaf == e.function && (first..=last).contains(&e.index);
    !checked || SNP_LEAVES.iter().any(listed)
}

/// Why there is no table.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum CpuidError {
    /// More leaves than the page holds.
    #[error("{count} CPUID leaves, but the CPUID page holds {MAX_ENTRIES}; the leaves are: {leaves}")]
    TooMany { count: usize, leaves: String },
    /// A leaf without which an SNP guest does not start.
    #[error("the platform offers no CPUID leaf {leaf:#x}, which an SNP guest needs: {why}")]
    Missing { leaf: u32, why: &'static str },
    /// The guest's start-up check of the C-bit uses RDRAND.
    #[error("the platform does not offer RDRAND (CPUID leaf 0x1, ECX bit 30), which an SNP guest needs")]
    NoRdrand,
    /// Page-table entries have room for addresses of 52 bits.
    #[error("C-bit {0}: expected a position from 32 to 51")]
    CBit(u8),
    /// A page whose count the guest refuses.
    #[error("CPUID page: count at offset 0 is {0}, expected 1 to 64")]
    Count(u32),
}

/// What the platform decides about an SNP guest's CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnpCpuid {
    /// Position of the C-bit in guest-physical addresses.
    pub c_bit: u8,
    /// Guest's physical address bits (`MAXPHYADDR`); `None` keeps what the platform offers.
    pub phys_bits: Option<u8>,
    /// Tell the guest that it need not evict caches after validating memory.
    pub coherency_sfw_no: bool,
}

/// The leaves of one guest, without the parts that differ between its vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidTable {
    entries: Vec<CpuidEntry>,
}

impl CpuidTable {
    /// A plain guest's table: what the platform offers, the HYPERVISOR bit, and a topology of `vcpus` cores
    /// in one package.
    ///
    /// `host` is the raw CPUID of the processor below, if known. Linux 6.17 and 6.18 offer TSA_SQ_NO and
    /// TSA_L1_NO on every processor, also on those that have the flaw (`arch/x86/kvm/cpuid.c`,
    /// `SYNTHESIZED_F` without a look at the host); a guest that believes it does without its mitigation. So
    /// these two are offered only if the processor says so itself. On a processor without the flaw nothing is
    /// lost: guests know it by family.
    pub fn plain(offered: &[CpuidEntry], vcpus: u32, host: Option<&RawCpuid>) -> CpuidTable {
        let mut table = CpuidTable { entries: offered.to_vec() };
        let tsa = host.map_or(0, |host| host.register(0x8000_0021, 0, Register::Ecx));
        table.entries.iter_mut().filter(|e| e.function == 0x8000_0021).for_each(|e| e.ecx &= !TSA_NO | tsa);
        table.topology(vcpus);
        table
    }

    /// An SNP guest's table: without what the firmware refuses or the guest must not see, with the SEV leaf.
    ///
    /// SVM is not offered, though the firmware allows it: a guest whose state KVM cannot see cannot have
    /// guests of its own, and VMRUN would only be one more exit that ends it. Two bits that KVM emulates for
    /// plain guests go on every processor: NO_SMM_CTL_MSR, because Milan's firmware has refused it, and
    /// GP_ON_USER_CPUID (offered from Linux 7.2 on), because Milan lacks it too, and because it is not true
    /// here: the guest answers CPUID by itself, with a #VC handler, and KVM cannot make it fault.
    pub fn snp(offered: &[CpuidEntry], vcpus: u32, sev: &SnpCpuid) -> Result<CpuidTable, CpuidError> {
        let mut table = CpuidTable::plain(offered, vcpus, None);
        table.entries.retain(is_snp_leaf);
        // The firmware demands x87 and SSE state in leaf 0xD, which a KVM without XSAVE leaves empty.
        if table.get(0xd, 0).is_none_or(|e| e.eax & 3 != 3) {
            table.entries.retain(|e| e.function != 0xd);
        }
        let topology_extensions = table.get(0x8000_0001, 0).is_some_and(|e| e.ecx & TOPOEXT != 0);
        if topology_extensions && table.get(TOPOLOGY_LEAF, 0).is_none() {
            table.entries.push(CpuidEntry { function: TOPOLOGY_LEAF, ..CpuidEntry::default() });
        }
        for e in &mut table.entries {
            match (e.function, e.index) {
                (0, _) => e.eax = e.eax.min(HIGHEST_BASIC),
                (1, _) => e.ecx &= !LEAF1_TSC_DEADLINE,
                (7, 0) => {
                    e.eax = e.eax.min(HIGHEST_FEATURES);
                    e.ebx &= !(1 << 1); // TSC_ADJUST
                    e.ecx &= !(1 << 16); // LA57: spares direct boot the switch of paging levels
                    // FSRM and, on Turin, VP2INTERSECT. The rest, SPEC_CTRL and its kind, is Intel's place
                    // for what AMD has in leaf 0x80000008; one such bit, and the firmware answers with zero.
                    e.edx &= 1 << 4 | 1 << 8;
                }
                // The guest adds up the size of its own XSAVE area; this is the legacy area and the header.
                (0xd, 0) => (e.eax, e.ebx, e.edx) = (e.eax & XCR0_COMPONENTS, 0x240, 0),
                (0xd, 1) => e.ebx = 0x240,
                (0x8000_0000, _) => e.eax = e.eax.max(SEV_LEAF),
                (0x8000_0001, _) => e.ecx &= !SVM,
                (0x8000_0008, _) => {
                    e.ebx &= !(1 << 25); // virtual SSBD
                    if let Some(bits) = sev.phys_bits {
                        e.eax = e.eax & !0xff | u32::from(bits);
                    }
                }
                (0x8000_0021, _) => {
                    e.eax &= !(1 << 9 | 1 << 17); // NO_SMM_CTL_MSR, GP_ON_USER_CPUID
                    e.ecx = 0;
                }
                _ => {}
            }
        }
        table.entries.retain(|e| !e.is_empty() || topology_extensions && e.function == TOPOLOGY_LEAF);
        table.entries.push(CpuidEntry {
            function: SEV_LEAF,
            eax: SEV_FEATURES,
            ebx: u32::from(sev.c_bit) | 1 << 6 | if sev.coherency_sfw_no { COHERENCY_SFW_NO } else { 0 },
            ..CpuidEntry::default()
        });
        table.entries.sort_by_key(|e| (e.function, e.index));
        table.check_snp(sev.c_bit)?;
        Ok(table)
    }

    fn check_snp(&self, c_bit: u8) -> Result<(), CpuidError> {
        const NEEDED: [(u32, &str); 5] = [
            (0, "highest basic leaf"),
            (1, "features"),
            (0x4000_0000, "highest hypervisor leaf"),
            (0x8000_0000, "highest extended leaf"),
            (0x8000_0008, "physical address bits"),
        ];
        for (leaf, why) in NEEDED {
            if self.get(leaf, 0).is_none() {
                return Err(CpuidError::Missing { leaf, why });
            }
        }
        if self.get(1, 0).is_none_or(|e| e.ecx & LEAF1_RDRAND == 0) {
            return Err(CpuidError::NoRdrand);
        }
        if !C_BITS.contains(&c_bit) {
            return Err(CpuidError::CBit(c_bit));
        }
        if self.entries.len() > MAX_ENTRIES {
            let leaves: Vec<String> = self.entries.iter().map(CpuidEntry::to_string).collect();
            return Err(CpuidError::TooMany { count: leaves.len(), leaves: leaves.join(", ") });
        }
        Ok(())
    }

    /// One package of `vcpus` cores with one thread each, in the leaves where Linux looks for it.
    fn topology(&mut self, vcpus: u32) {
        let vcpus = vcpus.clamp(1, 1 << 16);
        let shift = vcpus.next_power_of_two().trailing_zeros();
        self.entries.retain(|e| !matches!(e.function, 0xb | 0x1f));
        for (index, eax, ebx, ecx) in [(0, 0, 1, 0x100), (1, shift, vcpus, 0x201)] {
            self.entries.push(CpuidEntry {
                function: 0xb,
                index,
                indexed: true,
                eax,
                ebx,
                ecx,
                ..CpuidEntry::default()
            });
        }
        for e in &mut self.entries {
            match e.function {
                1 => {
                    e.ecx |= LEAF1_HYPERVISOR;
                    e.ebx = e.ebx & 0x0000_ffff | vcpus.min(255) << 16;
                    e.edx = if vcpus > 1 { e.edx | LEAF1_HTT } else { e.edx & !LEAF1_HTT };
                }
                0x8000_0008 => e.ecx = shift << 12 | (vcpus - 1).min(255),
                _ => {}
            }
        }
    }

    /// The leaves, with APIC ids of vCPU 0.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// The answer for a leaf and sub-leaf.
    pub fn get(&self, function: u32, index: u32) -> Option<&CpuidEntry> {
        self.entries.iter().find(|e| e.function == function && (!e.indexed || e.index == index))
    }

    /// Position of the C-bit that the table tells; `None` in a plain guest's table.
    pub fn c_bit(&self) -> Option<u8> {
        self.get(SEV_LEAF, 0).map(|e| (e.ebx & 0x3f) as u8)
    }

    /// The leaves for `KVM_SET_CPUID2` of the vCPU with this APIC id.
    pub fn for_vcpu(&self, apic_id: u32) -> Vec<CpuidEntry> {
        let mut entries = self.entries.clone();
        for e in &mut entries {
            match e.function {
                1 => e.ebx = e.ebx & 0x00ff_ffff | apic_id << 24,
                0xb => e.edx = apic_id,
                TOPOLOGY_LEAF => {
                    e.eax = apic_id;
                    // Core id, with one thread per core.
                    e.ebx = apic_id & 0xff;
                    e.ecx = 0;
                }
                _ => {}
            }
        }
        entries
    }

    /// The CPUID page. A table of [`CpuidTable::snp`] always fits.
    pub fn page(&self) -> Result<[u8; PAGE_SIZE as usize], CpuidError> {
        encode_page(&self.for_vcpu(0).iter().map(PageEntry::from).collect::<Vec<_>>())
    }
}

/// An entry of the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageEntry {
    /// Leaf.
    pub eax_in: u32,
    /// Sub-leaf.
    pub ecx_in: u32,
    /// XCR0 for which the answer holds; 1 in leaf 0xd, sub-leaves 0 and 1, else 0.
    pub xcr0_in: u64,
    /// XSS for which the answer holds.
    pub xss_in: u64,
    /// Answer.
    pub eax: u32,
    /// Answer.
    pub ebx: u32,
    /// Answer.
    pub ecx: u32,
    /// Answer.
    pub edx: u32,
}

impl From<&CpuidEntry> for PageEntry {
    fn from(e: &CpuidEntry) -> Self {
        let &CpuidEntry { function, index, indexed: _, eax, ebx, ecx, edx } = e;
        let xcr0_in = u64::from(function == 0xd && index <= 1);
        PageEntry { eax_in: function, ecx_in: index, xcr0_in, xss_in: 0, eax, ebx, ecx, edx }
    }
}

/// Writes a page; an error if the entries do not fit or are none.
pub fn encode_page(entries: &[PageEntry]) -> Result<[u8; PAGE_SIZE as usize], CpuidError> {
    if entries.is_empty() || entries.len() > MAX_ENTRIES {
        return Err(CpuidError::Count(u32::try_from(entries.len()).unwrap_or(u32::MAX)));
    }
    let mut page = [0; PAGE_SIZE as usize];
    page[..4].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    for (e, out) in entries.iter().zip(page[FIRST_ENTRY..].chunks_exact_mut(ENTRY_LEN)) {
        for (i, word) in [e.eax_in, e.ecx_in].into_iter().enumerate() {
            out[i * 4..][..4].copy_from_slice(&word.to_le_bytes());
        }
        out[8..16].copy_from_slice(&e.xcr0_in.to_le_bytes());
        out[16..24].copy_from_slice(&e.xss_in.to_le_bytes());
        for (i, word) in [e.eax, e.ebx, e.ecx, e.edx].into_iter().enumerate() {
            out[24 + i * 4..][..4].copy_from_slice(&word.to_le_bytes());
        }
    }
    Ok(page)
}

/// Reads a page; an error if its count is one that a guest refuses. Reserved fields are ignored, as Linux
/// does.
pub fn decode_page(page: &[u8; PAGE_SIZE as usize]) -> Result<Vec<PageEntry>, CpuidError> {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |value, b| value << 8 | u32::from(*b));
    let count = word(&page[..4]);
    if count == 0 || count as usize > MAX_ENTRIES {
        return Err(CpuidError::Count(count));
    }
    let long = |bytes: &[u8]| u64::from(word(&bytes[4..8])) << 32 | u64::from(word(&bytes[..4]));
    Ok(page[FIRST_ENTRY..]
        .chunks_exact(ENTRY_LEN)
        .take(count as usize)
        .map(|e| PageEntry {
            eax_in: word(&e[..4]),
            ecx_in: word(&e[4..8]),
            xcr0_in: long(&e[8..16]),
            xss_in: long(&e[16..24]),
            eax: word(&e[24..28]),
            ebx: word(&e[28..32]),
            ecx: word(&e[32..36]),
            edx: word(&e[36..40]),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEV: SnpCpuid = SnpCpuid { c_bit: 51, phys_bits: Some(0x30), coherency_sfw_no: false };

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidEntry {
        CpuidEntry { function, index: 0, indexed: false, eax, ebx, ecx, edx }
    }

    fn sub(function: u32, index: u32, registers: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = registers;
        CpuidEntry { function, index, indexed: true, eax, ebx, ecx, edx }
    }

    /// A cut of what KVM offers on an EPYC 7313, with every bit set that has to go.
    fn offered() -> Vec<CpuidEntry> {
        vec![
            leaf(0, 0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
            leaf(1, 0xa0_0f11, 0x0510_0800, 0x7fff_ffff, 0x178b_fbff),
            sub(7, 0, [0, 0x219c_97ab, 0x0041_060c, 0xac00_0010]),
            sub(0xb, 0, [1, 2, 0x100, 9]),
            sub(0xb, 1, [7, 32, 0x201, 9]),
            sub(0xd, 0, [7, 0x340, 0x340, 0]),
            sub(0xd, 1, [0xf, 0x340, 0, 0]),
            sub(0xd, 2, [0x100, 0x240, 0, 0]),
            leaf(2, 0, 0, 0, 0),
            leaf(0x4000_0000, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
            leaf(0x4000_0001, 0x0100_7efb, 0, 0, 0),
            leaf(0x8000_0000, 0x8000_001e, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
            leaf(0x8000_0001, 0xa0_0f11, 0x4000_0000, 0x00c0_03f7, 0x2fd3_fbff),
            leaf(0x8000_0008, 0x3030_3030, 0x1bef_d205, 0x700f, 0),
            leaf(0x8000_000a, 1, 8, 0, 0x0001_04bb),
            leaf(0x8000_001e, 0, 0, 0, 0),
            leaf(0x8000_001f, 0x0101_fd3f, 0x4173, 0x1fd, 6),
            leaf(0x8000_0021, 0x2_0245, 0, 0xff, 0),
            leaf(0x8000_0026, 1, 2, 3, 4),
        ]
    }

    fn table() -> CpuidTable {
        CpuidTable::snp(&offered(), 4, &SEV).unwrap()
    }

    #[test]
    fn what_the_firmware_refuses_is_stripped_and_nothing_else() {
        let t = table();
        let get = |function, index| *t.get(function, index).unwrap();
        assert_eq!(get(1, 0).ecx, 0xfeff_ffff, "no TSC deadline; HYPERVISOR set; all others kept");
        assert_eq!(
            get(7, 0),
            sub(7, 0, [0, 0x219c_97a9, 0x0040_060c, 0x10]),
            "no TSC_ADJUST, LA57, SPEC_CTRL"
        );
        assert_eq!((get(0xd, 0).ebx, get(0xd, 1).ebx), (0x240, 0x240));
        assert_eq!(get(0xd, 2), sub(0xd, 2, [0x100, 0x240, 0, 0]), "sub-leaves of components stay");
        assert_eq!(get(0x8000_0008, 0).ebx, 0x19ef_d205, "no virtual SSBD");
        assert_eq!(get(0x8000_0021, 0), leaf(0x8000_0021, 0x45, 0, 0, 0));
        assert_eq!(get(0x8000_0001, 0).ecx, 0x00c0_03f3, "no SVM");
        for dropped in [0x8000_000a, 0x8000_0026] {
            assert_eq!(t.get(dropped, 0), None);
        }
        assert_eq!(t.get(2, 0), None, "no empty leaf");
        assert_eq!(get(0x4000_0001, 0).eax, 0x0100_7efb, "paravirtual features stay");
    }

    #[test]
    fn the_sev_leaf_says_snp_and_where_the_c_bit_is() {
        let t = table();
        assert_eq!(t.get(0x8000_001f, 0), Some(&leaf(0x8000_001f, 0x1a, 1 << 6 | 51, 0, 0)));
        assert_eq!(t.get(0x8000_0000, 0).unwrap().eax, 0x8000_001f, "or Linux does not look at it");
        assert_eq!(t.get(0x8000_0008, 0).unwrap().eax, 0x3030_3030);
        assert_eq!(t.c_bit(), Some(51));
        let sev = SnpCpuid { c_bit: 39, phys_bits: Some(40), coherency_sfw_no: true };
        let t = CpuidTable::snp(&offered(), 1, &sev).unwrap();
        assert_eq!(t.get(0x8000_001f, 0).unwrap().ebx, 1 << 31 | 1 << 6 | 39);
        assert_eq!(t.get(0x8000_0008, 0).unwrap().eax & 0xff, 40);
    }

    #[test]
    fn a_plain_guest_keeps_its_leaves_and_gets_the_hypervisor_bit() {
        let t = CpuidTable::plain(&offered(), 1, None);
        assert_eq!(t.get(1, 0).unwrap().ecx, u32::MAX);
        assert_eq!(t.get(7, 0), offered().iter().find(|e| e.function == 7));
        assert_eq!(t.get(0x8000_0001, 0).unwrap().ecx, 0x00c0_03f7, "SVM too");
        assert_eq!(t.get(0x8000_001f, 0).unwrap().eax, 0x0101_fd3f);
    }

    /// Linux 6.17.8 and 6.18.15, `arch/x86/kvm/cpuid.c`, `CPUID_8000_0021_ECX`: 6 on every host.
    #[test]
    fn a_plain_guest_hears_of_no_immunity_that_its_processor_lacks() {
        let ecx =
            |host: Option<&RawCpuid>| CpuidTable::plain(&offered(), 1, host).get(0x8000_0021, 0).unwrap().ecx;
        let raw = |ecx| RawCpuid::parse(&format!("80000021 0 0 0 {ecx:x} 0")).unwrap();
        assert_eq!(ecx(None), 0xf9);
        assert_eq!(ecx(Some(&raw(0))), 0xf9);
        assert_eq!(ecx(Some(&raw(2))), 0xfb);
        assert_eq!(ecx(Some(&raw(6))), 0xff);
    }

    /// AMD-ASPFW, `cpuid_lookup.c`: 7.2, 0x24, 0x80000025 are in no table; 0x80000024 and 0x80000020 are of
    /// no use.
    #[test]
    fn an_snp_guest_gets_only_leaves_that_the_firmware_knows() {
        let mut more = offered();
        let unknown =
            [(7, 2), (0x14, 0), (0x1d, 0), (0x24, 0), (0x8000_0020, 0), (0x8000_0024, 0), (0x8000_0025, 0)];
        more.extend(unknown.map(|(function, index)| sub(function, index, [1; 4])));
        more.iter_mut().filter(|e| e.function == 0).for_each(|e| e.eax = 0x24);
        more.iter_mut().filter(|e| (e.function, e.index) == (7, 0)).for_each(|e| e.eax = 2);
        let t = CpuidTable::snp(&more, 4, &SEV).unwrap();
        for (function, index) in unknown {
            assert_eq!(t.get(function, index), None, "{function:#x}");
        }
        assert_eq!((t.get(0, 0).unwrap().eax, t.get(7, 0).unwrap().eax), (0x10, 1));
    }

    /// Linux, `arch/x86/kvm/cpuid.c`, `case 0xd` without a permitted XCR0: the leaf is there, and empty.
    #[test]
    fn a_kvm_without_xsave_has_no_leaf_for_it() {
        let mut none = offered();
        none.retain(|e| e.function != 0xd);
        none.push(sub(0xd, 0, [0, 0x240, 0x240, 0]));
        assert_eq!(CpuidTable::snp(&none, 1, &SEV).unwrap().get(0xd, 0), None);
    }

    /// Linux, `arch/x86/kvm/cpuid.c`, `case 0x8000001e`: all zero, with TOPOEXT offered.
    #[test]
    fn the_topology_leaf_is_there_whenever_the_processor_has_topology_extensions() {
        let mut without = offered();
        without.retain(|e| e.function != 0x8000_001e);
        let t = CpuidTable::snp(&without, 4, &SEV).unwrap();
        let third = t.for_vcpu(3).into_iter().find(|e| e.function == 0x8000_001e).unwrap();
        assert_eq!((third.eax, third.ebx, third.ecx, third.edx), (3, 3, 0, 0));
        without.iter_mut().filter(|e| e.function == 0x8000_0001).for_each(|e| e.ecx &= !(1 << 22));
        assert_eq!(CpuidTable::snp(&without, 4, &SEV).unwrap().get(0x8000_001e, 0), None);
    }

    #[test]
    fn each_vcpu_sees_its_own_apic_id_and_all_the_same_topology() {
        for (id, entries) in [0, 3].map(|id| (id, table().for_vcpu(id))) {
            let get = |function, index| {
                *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
            };
            assert_eq!(get(1, 0).ebx, id << 24 | 4 << 16 | 0x0800);
            assert_eq!(get(0xb, 0), sub(0xb, 0, [0, 1, 0x100, id]), "one thread in a core");
            assert_eq!(get(0xb, 1), sub(0xb, 1, [2, 4, 0x201, id]), "four cores in a package, two bits");
            assert_eq!((get(0x8000_001e, 0).eax, get(0x8000_001e, 0).ebx), (id, id));
            assert_eq!(get(0x8000_0008, 0).ecx, 2 << 12 | 3);
        }
    }

    #[test]
    fn the_page_and_kvm_get_the_same_answers() {
        let t = table();
        let page = decode_page(&t.page().unwrap()).unwrap();
        let kvm = t.for_vcpu(0);
        assert_eq!(page.len(), kvm.len());
        for (p, k) in page.iter().zip(&kvm) {
            assert_eq!((p.eax_in, p.ecx_in), (k.function, k.index));
            assert_eq!((p.eax, p.ebx, p.ecx, p.edx), (k.eax, k.ebx, k.ecx, k.edx));
            let xsave_size = k.function == 0xd && k.index <= 1;
            assert_eq!((p.xcr0_in, p.xss_in), (u64::from(xsave_size), 0));
        }
    }

    /// Linux: `struct snp_cpuid_table` and `struct snp_cpuid_fn`.
    #[test]
    fn the_page_is_laid_out_as_the_guest_reads_it() {
        let e = PageEntry { eax_in: 1, ecx_in: 2, xcr0_in: 3, xss_in: 4, eax: 5, ebx: 6, ecx: 7, edx: 8 };
        let page = encode_page(&[e, e]).unwrap();
        let mut entry = Vec::new();
        entry.extend_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
        entry.extend_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        entry.extend_from_slice(&[5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0]);
        entry.extend_from_slice(&[0; 8]);
        assert_eq!(page[..16], [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((&page[16..64], &page[64..112]), (&entry[..], &entry[..]));
        assert!(page[112..].iter().all(|b| *b == 0));
    }

    #[test]
    fn too_many_leaves_are_listed_and_never_cut() {
        let mut many = offered();
        many.extend((0..60).map(|i| leaf(0x4000_0100 + i, i + 1, 0, 0, 0)));
        let error = CpuidTable::snp(&many, 1, &SEV).unwrap_err();
        let CpuidError::TooMany { count, leaves } = &error else { panic!("{error}") };
        assert!(*count > 64 && leaves.contains("0x4000013b") && leaves.contains("0xd.0x2"), "{error}");
        many.truncate(many.len() - (count - 64));
        assert_eq!(CpuidTable::snp(&many, 1, &SEV).unwrap().entries().len(), 64);
    }

    #[test]
    fn a_platform_without_a_needed_leaf_is_refused() {
        for leaf in [0, 1, 0x4000_0000, 0x8000_0000, 0x8000_0008] {
            let some: Vec<_> = offered().into_iter().filter(|e| e.function != leaf).collect();
            let error = CpuidTable::snp(&some, 1, &SEV).unwrap_err();
            assert!(matches!(error, CpuidError::Missing { leaf: l, .. } if l == leaf), "{error}");
        }
        let mut dull = offered();
        dull[1].ecx &= !(1 << 30);
        assert_eq!(CpuidTable::snp(&dull, 1, &SEV), Err(CpuidError::NoRdrand));
        let wild = SnpCpuid { c_bit: 77, ..SEV };
        assert!(matches!(CpuidTable::snp(&offered(), 1, &wild), Err(CpuidError::CBit(77))));
    }

    #[test]
    fn pages_with_a_count_that_guests_refuse_are_errors() {
        let mut page = table().page().unwrap();
        for count in [0u32, 65, u32::MAX] {
            page[..4].copy_from_slice(&count.to_le_bytes());
            assert_eq!(decode_page(&page), Err(CpuidError::Count(count)));
        }
        assert_eq!(encode_page(&[]), Err(CpuidError::Count(0)));
        assert_eq!(encode_page(&[PageEntry::default(); 65]), Err(CpuidError::Count(65)));
    }

    fn any_entry() -> impl Strategy<Value = CpuidEntry> {
        let function = prop_oneof![
            (0u32..0x20),
            (0x4000_0000u32..0x4000_0002),
            (0x8000_0000u32..0x8000_0028),
            any::<u32>()
        ];
        (function, 0u32..3, any::<bool>(), any::<[u32; 4]>())
            .prop_map(|(function, index, indexed, r)| CpuidEntry { function, index, indexed, ..sub(0, 0, r) })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_page_decodes_or_is_refused_and_comes_back_the_same(
            bytes in proptest::collection::vec(any::<u8>(), PAGE_SIZE as usize),
            count in 0u32..70,
        ) {
            let mut page: [u8; PAGE_SIZE as usize] = bytes.try_into().unwrap();
            page[..4].copy_from_slice(&count.to_le_bytes());
            match decode_page(&page) {
                Ok(entries) => {
                    prop_assert_eq!(entries.len(), count as usize);
                    prop_assert_eq!(decode_page(&encode_page(&entries).unwrap()).unwrap(), entries);
                }
                Err(error) => {
                    prop_assert_eq!(error, CpuidError::Count(count));
                    prop_assert!(count == 0 || count > 64);
                }
            }
        }

        #[test]
        fn any_platforms_leaves_give_a_table_that_a_guest_accepts_or_an_error(
            mut entries in proptest::collection::vec(any_entry(), 0..80),
            real in any::<bool>(),
            vcpus in 0u32..300,
            c_bit in any::<u8>(),
        ) {
            if real {
                entries.extend(offered());
            }
            let sev = SnpCpuid { c_bit, ..SEV };
            if let Ok(table) = CpuidTable::snp(&entries, vcpus, &sev) {
                let page = decode_page(&table.page().unwrap()).unwrap();
                prop_assert!(page.iter().any(|e| e.eax_in == 0x8000_001f && e.eax == 0x1a));
                prop_assert!(page.iter().filter(|e| e.eax_in == 1).all(|e| e.ecx & 1 << 24 == 0));
                prop_assert!(page.iter().all(|e| e.eax_in != 0x8000_0026));
                prop_assert_eq!(table.for_vcpu(u32::MAX).len(), page.len());
            }
        }
    }
}
