// SPDX-License-Identifier: Apache-2.0
//! What the firmware would change in a CPUID page that it refused.
//!
//! `SNP_LAUNCH_UPDATE` answers INVALID_PARAM to a page with an entry that it does not accept, and gives the page back with
//! its own values (SEV-SNP Firmware ABI 1.58, section 8.17.2.6). The page is not measured, so to offer that version without a
//! look would let the host decide what the guest believes about its processor. [`CpuidDiff`] shows the differences, and
//! says which of them are on a list of what may be accepted: features that only disappear, and cache descriptions.

use std::fmt;

use super::cpuid::CpuidError;
use super::cpuid::PageEntry;
use super::cpuid::decode_page;
use crate::plan::PAGE_SIZE;

/// A CPUID page.
pub type Page = [u8; PAGE_SIZE as usize];

/// A register of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        })
    }
}

/// One register for which the firmware has another value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Leaf.
    pub leaf: u32,
    /// Sub-leaf.
    pub subleaf: u32,
    /// Register.
    pub register: Register,
    /// What the monitor offered.
    pub offered: u32,
    /// What the firmware would accept.
    pub accepted: u32,
}

/// Every difference between the offered page and the one that came back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidDiff {
    /// The registers, in the page's order.
    pub differences: Vec<Difference>,
    /// The pages differ in something else as well: count, leaves, sub-leaves, XCR0, XSS, or reserved bytes.
    pub structure: bool,
}

/// Feature bits that may disappear: leaf, sub-leaf if it matters, register, bits.
///
/// Not among them: what a Linux guest needs to start or to be safe, RDRAND and HYPERVISOR (leaf 1, ECX 30 and 31), and the
/// whole SEV leaf, in which the host could move the C-bit.
const MAY_DISAPPEAR: &[(u32, Option<u32>, Register, u32)] = &[
    (1, None, Register::Ecx, !(1 << 30 | 1 << 31)),
    (7, Some(0), Register::Ebx, u32::MAX),
    (7, Some(0), Register::Ecx, u32::MAX),
    (7, Some(0), Register::Edx, u32::MAX),
    (7, Some(1), Register::Eax, u32::MAX),
    (0xd, Some(1), Register::Eax, u32::MAX),
    (0x8000_0008, None, Register::Ebx, u32::MAX),
    (0x8000_0021, None, Register::Eax, u32::MAX),
    (0x8000_0021, None, Register::Ecx, u32::MAX),
];
/// Cache topology: any change may be accepted; hosts have refused it, and it only describes.
const CACHE_LEAF: u32 = 0x8000_001d;

impl Difference {
    /// Whether the list of acceptable changes has this one.
    pub fn is_acceptable(&self) -> bool {
        if self.leaf == CACHE_LEAF {
            return true;
        }
        let (lost, gained) = (self.offered & !self.accepted, self.accepted & !self.offered);
        gained == 0
            && MAY_DISAPPEAR.iter().any(|(leaf, subleaf, register, bits)| {
                *leaf == self.leaf
                    && subleaf.is_none_or(|s| s == self.subleaf)
                    && *register == self.register
                    && lost & !bits == 0
            })
    }
}

impl CpuidDiff {
    /// Compares the page that was offered with the page that came back. An error if the latter is no CPUID page at all.
    pub fn new(offered: &Page, returned: &Page) -> Result<Self, CpuidError> {
        let (before, after) = (decode_page(offered)?, decode_page(returned)?);
        let key = |e: &PageEntry| (e.eax_in, e.ecx_in, e.xcr0_in, e.xss_in);
        let mut diff = CpuidDiff::default();
        let mut explained = *offered;
        for (i, (b, a)) in before.iter().zip(&after).enumerate() {
            diff.structure |= key(b) != key(a);
            for (n, (register, offered, accepted)) in [
                (Register::Eax, b.eax, a.eax),
                (Register::Ebx, b.ebx, a.ebx),
                (Register::Ecx, b.ecx, a.ecx),
                (Register::Edx, b.edx, a.edx),
            ]
            .into_iter()
            .enumerate()
            {
                // Entries of 48 bytes from offset 16, results from offset 24 of each.
                if let Some(bytes) =
                    explained.get_mut(16 + i * 48 + 24 + n * 4..).and_then(<[u8]>::first_chunk_mut)
                {
                    *bytes = accepted.to_le_bytes();
                }
                if offered != accepted {
                    let (leaf, subleaf) = (b.eax_in, b.ecx_in);
                    diff.differences.push(Difference { leaf, subleaf, register, offered, accepted });
                }
            }
        }
        // Whatever the registers do not explain is a change of the page's structure.
        diff.structure |= explained != *returned;
        Ok(diff)
    }

    /// Whether every difference may be accepted, and there is one.
    pub fn is_acceptable(&self) -> bool {
        !self.structure
            && !self.differences.is_empty()
            && self.differences.iter().all(Difference::is_acceptable)
    }
}

/// A table, one line for each register.
impl fmt::Display for CpuidDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "  {:<10}  {:<8}  {:<8}  {:<10}  {:<10}",
            "leaf", "sub-leaf", "register", "offered", "accepted"
        )?;
        for d in &self.differences {
            let list = if d.is_acceptable() { "" } else { "  (not on the list of acceptable changes)" };
            write!(
                f,
                "\n  {:<#10x}  {:<#8x}  {:<8}  {:<#010x}  {:<#010x}{list}",
                d.leaf, d.subleaf, d.register, d.offered, d.accepted
            )?;
        }
        if self.structure {
            write!(f, "\n  the firmware also changed the page's count, leaves or reserved bytes")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::cpuid::encode_page;
    use super::*;

    fn page(entries: &[(u32, u32, [u32; 4])]) -> Page {
        let entry = |&(eax_in, ecx_in, [eax, ebx, ecx, edx]): &(u32, u32, [u32; 4])| PageEntry {
            eax_in,
            ecx_in,
            eax,
            ebx,
            ecx,
            edx,
            ..PageEntry::default()
        };
        encode_page(&entries.iter().map(entry).collect::<Vec<_>>()).unwrap()
    }

    /// The refusal of NVIDIA's nvtrust issue 91: an EPYC 7443P and EDX of 0x8000001D, sub-leaf 3.
    #[test]
    fn a_cache_description_may_be_accepted() {
        let offered = page(&[(0x8000_001d, 3, [0x1_4163, 0x3c0_003f, 0x7fff, 1])]);
        let diff =
            CpuidDiff::new(&offered, &page(&[(0x8000_001d, 3, [0x1_4163, 0x3c0_003f, 0x7fff, 0])])).unwrap();
        assert_eq!(
            diff.differences,
            [Difference { leaf: 0x8000_001d, subleaf: 3, register: Register::Edx, offered: 1, accepted: 0 }]
        );
        assert!(diff.is_acceptable());
    }

    #[test]
    fn features_may_go_but_not_come_and_some_must_stay() {
        let offered = page(&[(1, 0, [0, 0, 0xc100_0000, 0])]);
        let returned = |ecx| CpuidDiff::new(&offered, &page(&[(1, 0, [0, 0, ecx, 0])])).unwrap();
        assert!(returned(0xc000_0000).is_acceptable());
        for ecx in [0xc100_0001, 0x8100_0000, 0x4100_0000] {
            let diff = returned(ecx);
            assert!(!diff.is_acceptable(), "{ecx:#x}");
            assert!(diff.to_string().contains("not on the list"), "{diff}");
        }
        // The SEV leaf says where the C-bit is.
        let sev = |ebx| page(&[(0x8000_001f, 0, [0x1a, ebx, 0, 0])]);
        assert!(!CpuidDiff::new(&sev(51), &sev(47)).unwrap().is_acceptable());
    }

    #[test]
    fn a_change_that_is_not_in_a_register_is_never_acceptable() {
        let offered = page(&[(7, 0, [0, 2, 0, 0])]);
        let good = page(&[(7, 0, [0, 0, 0, 0])]);
        for at in [0, 4, 16, 20, 24, 32, 56, 64, 4095] {
            let mut returned = good;
            returned[at] ^= 1;
            if let Ok(diff) = CpuidDiff::new(&offered, &returned) {
                assert!(diff.structure && !diff.is_acceptable(), "{at}");
            }
        }
        assert!(!CpuidDiff::new(&offered, &offered).unwrap().is_acceptable());
    }

    proptest! {
        #[test]
        fn any_page_can_come_back(bytes in proptest::collection::vec(any::<u8>(), 4096), count in 0u8..70) {
            let offered = page(&[(7, 0, [0, 2, 0, 0])]);
            let mut returned: Page = bytes.try_into().unwrap();
            returned[..4].copy_from_slice(&[count, 0, 0, 0]);
            if let Ok(diff) = CpuidDiff::new(&offered, &returned) {
                let _ = (diff.to_string(), diff.is_acceptable());
            }
        }
    }
}
