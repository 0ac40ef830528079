// SPDX-License-Identifier: Apache-2.0
//! The CPUID table: one list of leaves for `KVM_SET_CPUID2` and for the CPUID page.
//!
//! An SNP guest trusts the page that the firmware has checked, but asks the hypervisor too, before it has found the page and
//! for the parts that hold APIC ids; so both must come from one table. Layout of the page: SEV-SNP Firmware ABI 1.58, section
//! 8.17.2.6 and table "CPUID_FUNCTION". Which bits the firmware refuses is written down nowhere in one place; the list in
//! [`CpuidTable::snp`] is what several monitors have found. The table is built from the leaves that the *platform* offers,
//! never from this process's own CPUID instruction.

use std::fmt;

use crate::plan::PAGE_SIZE;

/// Entries that fit into the page.
pub const MAX_ENTRIES: usize = 64;
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

/// One leaf and its answer, the way `KVM_SET_CPUID2` takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// Leaf.
    pub function: u32,
    /// Sub-leaf.
    pub index: u32,
    /// The answer depends on the sub-leaf (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
    pub indexed: bool,
    /// Answer.
    pub eax: u32,
    /// Answer.
    pub ebx: u32,
    /// Answer.
    pub ecx: u32,
    /// Answer.
    pub edx: u32,
}

impl CpuidEntry {
    fn is_empty(&self) -> bool {
        self.eax | self.ebx | self.ecx | self.edx == 0
    }
}

impl fmt::Display for CpuidEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.function)?;
        if self.indexed { write!(f, ".{:#x}", self.index) } else { Ok(()) }
    }
}

/// Why there is no table.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CpuidError {
    /// More leaves than the page holds.
    #[error("{count} CPUID leaves, but the CPUID page holds {MAX_ENTRIES}; the leaves are: {leaves}")]
    TooMany {
        /// How many there are.
        count: usize,
        /// All of them.
        leaves: String,
    },
    /// A leaf without which an SNP guest does not start.
    #[error("the platform offers no CPUID leaf {leaf:#x}, which an SNP guest needs: {why}")]
    Missing {
        /// The leaf.
        leaf: u32,
        /// What for.
        why: &'static str,
    },
    /// The guest's start-up check of the C-bit uses RDRAND.
    #[error("the platform does not offer RDRAND (CPUID leaf 0x1, ECX bit 30), which an SNP guest needs")]
    NoRdrand,
    /// The C-bit must be the highest physical address bit or below.
    #[error(
        "C-bit {c_bit} with {phys_bits} physical address bits: the C-bit must lie in 32..{phys_bits} \
         and must fit CPUID leaf 0x8000001f"
    )]
    CBit {
        /// Position of the C-bit.
        c_bit: u8,
        /// Guest's physical address bits.
        phys_bits: u8,
    },
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
    /// A plain guest's table: what the platform offers, the HYPERVISOR bit, and a topology of `vcpus` cores in one package.
    pub fn plain(offered: &[CpuidEntry], vcpus: u32) -> CpuidTable {
        let mut table = CpuidTable { entries: offered.to_vec() };
        table.topology(vcpus);
        table
    }

    /// An SNP guest's table: without what the firmware refuses or the guest must not see, with the SEV leaf.
    pub fn snp(offered: &[CpuidEntry], vcpus: u32, sev: &SnpCpuid) -> Result<CpuidTable, CpuidError> {
        let mut table = CpuidTable::plain(offered, vcpus);
        table.entries.retain(|e| e.function != 0x8000_0026 && e.function != SEV_LEAF);
        for e in &mut table.entries {
            match (e.function, e.index) {
                (1, _) => e.ecx &= !LEAF1_TSC_DEADLINE,
                (7, 0) => {
                    e.ebx &= !(1 << 1); // TSC_ADJUST
                    e.ecx &= !(1 << 16); // LA57: spares direct boot the switch of paging levels
                    e.edx = 0; // SPEC_CTRL family
                }
                // The guest adds up the size of its own XSAVE area; this is the legacy area and the header.
                (0xd, 0 | 1) => e.ebx = 0x240,
                (0x8000_0000, _) => e.eax = e.eax.max(SEV_LEAF),
                (0x8000_0008, _) => {
                    e.ebx &= !(1 << 25); // virtual SSBD
                    if let Some(bits) = sev.phys_bits {
                        e.eax = e.eax & !0xff | u32::from(bits);
                    }
                }
                (0x8000_0021, _) => {
                    e.eax &= !(1 << 9);
                    e.ecx = 0;
                }
                _ => {}
            }
        }
        table.entries.retain(|e| !e.is_empty());
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
        let phys_bits = self.get(0x8000_0008, 0).map_or(0, |e| e.eax as u8);
        if !(32..64).contains(&c_bit) || c_bit > phys_bits.max(51) || self.c_bit() != Some(c_bit) {
            return Err(CpuidError::CBit { c_bit, phys_bits });
        }
        if self.entries.len() > MAX_ENTRIES {
            let leaves: Vec<String> = self.entries.iter().map(CpuidEntry::to_string).collect();
            return Err(CpuidError::TooMany { count: leaves.len(), leaves: leaves.join(", ") });
        }
        Ok(())
    }

    /// One package of `vcpus` cores with one thread each, in the leaves where Linux looks for it.
    fn topology(&mut self, vcpus: u32) {
        let vcpus = vcpus.max(1);
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
                0x8000_001e => {
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

/// Reads a page; an error if its count is one that a guest refuses. Reserved fields are ignored, as Linux does.
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
