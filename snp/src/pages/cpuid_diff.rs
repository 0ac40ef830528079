// SPDX-License-Identifier: Apache-2.0
//! What the firmware would change in a CPUID page that it refused.
//!
//! `SNP_LAUNCH_UPDATE` answers INVALID_PARAM to a page with an entry that it does not accept, and gives the
//! page back with its own values (SEV-SNP Firmware ABI 1.58, section 8.17.2.6). The page is not measured, so
//! to offer that version without a look would let the host decide what the guest believes about its
//! processor. [`CpuidDiff`] shows the differences, and sorts them into three kinds:
//!
//! - bits that KVM made up and the firmware does not know ([`Difference::is_made_up`]): the processor does
//!   not have them in its own CPUID, so the guest loses nothing that is the processor's. They are accepted
//!   without being asked, and named;
//! - what may be accepted on request: features that only disappear, and cache descriptions;
//! - anything else, never. The C-bit can never move, and no bit can be gained.

use std::fmt;

use super::cpuid::CpuidError;
use super::cpuid::PageEntry;
use super::cpuid::decode_page;
use super::cpuid_entry::Register;
use super::cpuid_raw::RawCpuid;
use crate::plan::PAGE_SIZE;

/// A CPUID page.
pub type Page = [u8; PAGE_SIZE as usize];

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
/// Not among them: what a Linux guest needs to start or to be safe, RDRAND and HYPERVISOR (leaf 1, ECX 30 and
/// 31), SYSCALL, NX and LM (leaf 0x80000001, EDX 11, 20, 29), and the whole SEV leaf, in which the host could
/// move the C-bit.
const MAY_DISAPPEAR: &[(u32, Option<u32>, Register, u32)] = &[
    (1, None, Register::Ecx, !(1 << 30 | 1 << 31)),
    (7, Some(0), Register::Ebx, u32::MAX),
    (7, Some(0), Register::Ecx, u32::MAX),
    (7, Some(0), Register::Edx, u32::MAX),
    (7, Some(1), Register::Eax, u32::MAX),
    (0xd, Some(1), Register::Eax, u32::MAX),
    (7, Some(1), Register::Ecx, u32::MAX),
    (7, Some(1), Register::Edx, u32::MAX),
    (7, Some(2), Register::Edx, u32::MAX),
    (0x24, None, Register::Eax, u32::MAX),
    (0x24, None, Register::Ebx, u32::MAX),
    (0x8000_0001, None, Register::Ecx, u32::MAX),
    (0x8000_0001, None, Register::Edx, !(1 << 11 | 1 << 20 | 1 << 29)),
    (0x8000_0007, None, Register::Ebx, u32::MAX),
    (0x8000_0007, None, Register::Edx, u32::MAX),
    (0x8000_0008, None, Register::Eax, GUEST_PHYSICAL),
    (0x8000_0008, None, Register::Ebx, u32::MAX),
    (0x8000_000a, None, Register::Eax, u32::MAX),
    (0x8000_000a, None, Register::Ebx, u32::MAX),
    (0x8000_000a, None, Register::Edx, u32::MAX),
    (0x8000_0021, None, Register::Eax, u32::MAX),
    (0x8000_0021, None, Register::Ebx, u32::MAX),
    (0x8000_0021, None, Register::Ecx, u32::MAX),
    (0x8000_0022, None, Register::Eax, u32::MAX),
    (0x8000_0022, None, Register::Ebx, u32::MAX),
];
/// Leaf 0x80000008, EAX 23:16: GuestPhysAddrSize, which KVM fills in and processors leave zero.
const GUEST_PHYSICAL: u32 = 0x00ff_0000;
const SEV_LEAF: u32 = 0x8000_001f;
const COHERENCY_SFW_NO: u32 = 1 << 31;
/// SEV leaf, EBX 11:6: by how many bits encryption reduces physical addresses.
const REDUCTION: u32 = 0xfc0;
/// Leaf 0x80000021, EAX: VERW_CLEAR, SBPB, IBPB_BRTYPE. They announce microcode, and firmware learns of them
/// later.
const ANNOUNCEMENTS: u32 = 1 << 5 | 1 << 27 | 1 << 28;
/// Registers in which each bit is a feature, and those of its bits that KVM may have made up: leaf, sub-leaf,
/// register, bits.
const MAY_BE_MADE_UP: &[(u32, u32, Register, u32)] = &[
    (1, 0, Register::Ecx, !(1 << 30 | 1 << 31)),
    (7, 0, Register::Ebx, u32::MAX),
    (7, 0, Register::Ecx, u32::MAX),
    (7, 0, Register::Edx, u32::MAX),
    (7, 1, Register::Eax, u32::MAX),
    (7, 1, Register::Ecx, u32::MAX),
    (7, 1, Register::Edx, u32::MAX),
    (0xd, 1, Register::Eax, u32::MAX),
    (0x8000_0001, 0, Register::Ecx, u32::MAX),
    (0x8000_0007, 0, Register::Edx, u32::MAX),
    (0x8000_0008, 0, Register::Eax, GUEST_PHYSICAL),
    (0x8000_0008, 0, Register::Ebx, u32::MAX),
    (0x8000_0021, 0, Register::Eax, u32::MAX),
    (0x8000_0021, 0, Register::Ecx, u32::MAX),
    (0x8000_0022, 0, Register::Eax, u32::MAX),
];
/// Names of bits that are lost in practice (Linux, `arch/x86/include/asm/cpufeatures.h`).
const NAMES: &[(u32, u32, Register, u32, &str)] = &[
    (1, 0, Register::Ecx, 21, "X2APIC"),
    (1, 0, Register::Ecx, 24, "TSC_DEADLINE_TIMER"),
    (7, 0, Register::Ebx, 1, "TSC_ADJUST"),
    (7, 0, Register::Edx, 4, "FSRM"),
    (7, 0, Register::Edx, 26, "SPEC_CTRL"),
    (7, 0, Register::Edx, 27, "INTEL_STIBP"),
    (7, 0, Register::Edx, 29, "ARCH_CAPABILITIES"),
    (7, 0, Register::Edx, 31, "SPEC_CTRL_SSBD"),
    (0x8000_0008, 0, Register::Ebx, 24, "AMD_SSBD"),
    (0x8000_0008, 0, Register::Ebx, 25, "VIRT_SSBD"),
    (0x8000_0008, 0, Register::Ebx, 26, "AMD_SSB_NO"),
    (0x8000_0008, 0, Register::Ebx, 29, "BTC_NO"),
    (0x8000_0008, 0, Register::Ebx, 30, "AMD_IBPB_RET"),
    (SEV_LEAF, 0, Register::Ebx, 31, "COHERENCY_SFW_NO"),
    (0x8000_0021, 0, Register::Eax, 0, "NO_NESTED_DATA_BP"),
    (0x8000_0021, 0, Register::Eax, 1, "WRMSR_XX_BASE_NS"),
    (0x8000_0021, 0, Register::Eax, 2, "LFENCE_RDTSC"),
    (0x8000_0021, 0, Register::Eax, 5, "VERW_CLEAR"),
    (0x8000_0021, 0, Register::Eax, 6, "NULL_SEL_CLR_BASE"),
    (0x8000_0021, 0, Register::Eax, 8, "AUTOIBRS"),
    (0x8000_0021, 0, Register::Eax, 9, "NO_SMM_CTL_MSR"),
    (0x8000_0021, 0, Register::Eax, 17, "GP_ON_USER_CPUID"),
    (0x8000_0021, 0, Register::Eax, 20, "PREFETCHI"),
    (0x8000_0021, 0, Register::Eax, 24, "ERAPS"),
    (0x8000_0021, 0, Register::Eax, 27, "SBPB"),
    (0x8000_0021, 0, Register::Eax, 28, "IBPB_BRTYPE"),
    (0x8000_0021, 0, Register::Eax, 29, "SRSO_NO"),
    (0x8000_0021, 0, Register::Eax, 30, "SRSO_USER_KERNEL_NO"),
    (0x8000_0021, 0, Register::Ecx, 1, "TSA_SQ_NO"),
    (0x8000_0021, 0, Register::Ecx, 2, "TSA_L1_NO"),
];
/// Cache topology: any change may be accepted; hosts have refused it, and it only describes.
const CACHE_LEAF: u32 = 0x8000_001d;

impl Difference {
    fn lost(&self) -> u32 {
        self.offered & !self.accepted
    }

    /// Whether what is lost is not the processor's: KVM made it up, or offers it earlier than the firmware
    /// learns of it. `host` is the raw CPUID of the processor; without it, only the second kind is known.
    ///
    /// - The bits are features that the processor does not have (`arch/x86/kvm/cpuid.c`, `SYNTHESIZED_F` and
    ///   `EMULATED_F`).
    /// - They are VERW_CLEAR, SBPB or IBPB_BRTYPE, whether the processor has them or not. Linux forces them
    ///   on where microcode has the mitigation (`arch/x86/kernel/cpu/amd.c`), and microcode may set them
    ///   itself; published firmware knows them weeks to months later. A guest without them takes its
    ///   processor for one without that microcode, which costs speed.
    /// - It is COHERENCY_SFW_NO, and the C-bit is as offered. A guest without it evicts caches that need not
    ///   be evicted. The published firmware clears bits 11:6 with it, which it does not look at otherwise
    ///   (`cpuid_lookup.c:FN8000001F_CUSTOM`); they describe the host's addresses, and an SNP guest makes no
    ///   use of them.
    pub fn is_made_up(&self, host: Option<&RawCpuid>) -> bool {
        let (lost, gained) = (self.lost(), self.accepted & !self.offered);
        if gained != 0 || lost == 0 {
            return false;
        }
        let key = (self.leaf, self.subleaf, self.register);
        if key == (SEV_LEAF, 0, Register::Ebx) {
            return lost & COHERENCY_SFW_NO != 0 && lost & !(COHERENCY_SFW_NO | REDUCTION) == 0;
        }
        let Some((.., bits)) = MAY_BE_MADE_UP.iter().find(|(l, s, r, _)| (*l, *s, *r) == key) else {
            return false;
        };
        let early = if key == (0x8000_0021, 0, Register::Eax) { ANNOUNCEMENTS } else { 0 };
        let lacking = host.map_or(0, |host| !host.register(self.leaf, self.subleaf, self.register));
        lost & !(lacking & bits | early) == 0
    }

    /// The lost bits with their names, such as `VERW_CLEAR (bit 5)`.
    pub fn lost_bits(&self) -> String {
        let name = |bit: u32| {
            let key = (self.leaf, self.subleaf, self.register, bit);
            let named = NAMES.iter().find(|(l, s, r, b, _)| (*l, *s, *r, *b) == key);
            named.map_or(format!("bit {bit}"), |(.., name)| format!("{name} (bit {bit})"))
        };
        let bits: Vec<String> = (0..32).filter(|bit| self.lost() >> bit & 1 == 1).map(name).collect();
        bits.join(", ")
    }

    /// Whether the list of changes that are acceptable on request has this one.
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
    /// Compares the page that was offered with the page that came back. An error if the latter is no CPUID
    /// page at all.
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

    /// Whether every difference may be accepted on request, and there is one.
    pub fn is_acceptable(&self) -> bool {
        self.all(|d| d.is_acceptable() || d.is_made_up(None))
    }

    /// Whether every difference is one that KVM made up, so that the page may be accepted without being
    /// asked; see [`Difference::is_made_up`].
    pub fn is_made_up(&self, host: Option<&RawCpuid>) -> bool {
        self.all(|d| d.is_made_up(host))
    }

    fn all(&self, good: impl Fn(&Difference) -> bool) -> bool {
        !self.structure && !self.differences.is_empty() && self.differences.iter().all(good)
    }

    /// What a guest lost, in one line, whose page with these differences was accepted because KVM made them
    /// up.
    pub fn lost_note(&self) -> String {
        let lost: Vec<String> = self
            .differences
            .iter()
            .map(|d| format!("leaf {:#x}.{:#x} {}: {}", d.leaf, d.subleaf, d.register, d.lost_bits()))
            .collect();
        format!(
            "note: the firmware does not know these CPUID bits and took them away; the guest runs without them: {}",
            lost.join("; ")
        )
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
            let list = if d.is_acceptable() || d.is_made_up(None) {
                ""
            } else {
                "  (not on the list of acceptable changes)"
            };
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
        let offered = page(&[(0x8000_001d, 3, [0xb_c163, 0x3c0_003f, 0x7fff, 6])]);
        let diff =
            CpuidDiff::new(&offered, &page(&[(0x8000_001d, 3, [0xb_c163, 0x3c0_003f, 0x7fff, 2])])).unwrap();
        assert_eq!(
            diff.differences,
            [Difference { leaf: 0x8000_001d, subleaf: 3, register: Register::Edx, offered: 6, accepted: 2 }]
        );
        assert!(diff.is_acceptable());
        assert!(!diff.is_made_up(Some(&RawCpuid::default())), "no feature: only on request");
    }

    fn difference(leaf: u32, register: Register, offered: u32, accepted: u32) -> Difference {
        Difference { leaf, subleaf: 0, register, offered, accepted }
    }

    /// Linux 6.18.30 on Milan: `tsa_init` forces VERW_CLEAR on, and the processor's leaf does not have it.
    #[test]
    fn a_bit_that_the_processor_lacks_is_accepted_without_being_asked() {
        let milan = RawCpuid::parse("80000021 0 204d 0 0 0\n1 0 a00f11 0 0 0").unwrap();
        let lost = |offered, accepted| difference(0x8000_0021, Register::Eax, offered, accepted);
        let both = lost(0x1802_0265, 0x1802_0045);
        assert!(both.is_made_up(Some(&milan)));
        assert_eq!(both.lost_bits(), "VERW_CLEAR (bit 5), NO_SMM_CTL_MSR (bit 9)");
        assert!(!both.is_made_up(None), "bit 9 could be the processor's own");
        assert!(!lost(0x204d, 0x204c).is_made_up(Some(&milan)), "NO_NESTED_DATA_BP is");
        assert!(!lost(0x265, 0x1045).is_made_up(Some(&milan)), "no bit may be gained");
        // What a guest cannot do without stays, though no processor has HYPERVISOR.
        assert!(!difference(1, Register::Ecx, 1 << 31, 0).is_made_up(Some(&milan)));
        assert!(!difference(1, Register::Ecx, 1 << 30, 0).is_made_up(Some(&milan)));
        assert!(difference(1, Register::Ecx, 1 << 24, 0).is_made_up(Some(&milan)));
        // Numbers are no features.
        assert!(!difference(0x8000_0008, Register::Eax, 0x3030, 0x3020).is_made_up(Some(&milan)));
        assert!(difference(0x8000_0008, Register::Eax, 0x30_3030, 0x3030).is_made_up(Some(&milan)));
        assert!(!difference(0, Register::Eax, 0x10, 0).is_made_up(Some(&milan)));
    }

    /// A processor whose microcode sets VERW_CLEAR, and older firmware; SBPB and IBPB_BRTYPE were learnt the
    /// same way.
    #[test]
    fn announcements_of_microcode_are_accepted_even_if_the_processor_has_them() {
        let turin = RawCpuid::parse("80000021 0 ffffffff 0 0 0").unwrap();
        let lost = |bits: u32| difference(0x8000_0021, Register::Eax, u32::MAX, !bits);
        for host in [None, Some(&turin)] {
            assert!(lost(1 << 5 | 1 << 27 | 1 << 28).is_made_up(host));
            for bit in (0..32).filter(|bit| ![5, 27, 28].contains(bit)) {
                assert!(!lost(1 << bit).is_made_up(host), "{bit}");
            }
        }
    }

    /// AMD-ASPFW, `cpuid_lookup.c:FN8000001F_CUSTOM`, and Linux, `arch/x86/kvm/cpuid.c`, which clears EBX
    /// 31:6 itself.
    #[test]
    fn of_the_sev_leaf_only_the_coherency_bit_may_go() {
        let host = RawCpuid::default();
        let ebx = |offered, accepted| {
            let d = difference(SEV_LEAF, Register::Ebx, offered, accepted);
            (d.is_made_up(Some(&host)), d.is_made_up(None))
        };
        let offered = COHERENCY_SFW_NO | 1 << 6 | 51;
        assert_eq!(ebx(offered, 1 << 6 | 51), (true, true));
        assert_eq!(ebx(offered, 51), (true, true), "the published firmware's answer");
        assert_eq!(ebx(offered, COHERENCY_SFW_NO | 51), (false, false), "not by itself");
        for accepted in [1 << 6 | 50, 1 << 6 | 55, COHERENCY_SFW_NO | 1 << 6 | 50, 0] {
            assert_eq!(ebx(offered, accepted), (false, false), "{accepted:#x}");
        }
        assert!(!difference(SEV_LEAF, Register::Eax, 0x1a, 0x0a).is_made_up(Some(&host)));
        assert!(!difference(SEV_LEAF, Register::Ecx, 1, 0).is_made_up(Some(&host)));
        // On request it is acceptable together with others of the list; the C-bit never.
        let diff = |accepted| {
            let offered = page(&[(7, 0, [0, 2, 0, 0]), (SEV_LEAF, 0, [0x1a, offered, 0, 0])]);
            CpuidDiff::new(&offered, &page(&[(7, 0, [0; 4]), (SEV_LEAF, 0, [0x1a, accepted, 0, 0])])).unwrap()
        };
        assert!(diff(1 << 6 | 51).is_acceptable());
        assert!(!diff(1 << 6 | 50).is_acceptable());
        assert!(diff(1 << 6 | 50).to_string().contains("not on the list"));
    }

    #[test]
    fn what_was_accepted_is_named_bit_by_bit() {
        let offered = page(&[(0x8000_0021, 0, [0x1800_0065, 0, 0, 0])]);
        let diff = CpuidDiff::new(&offered, &page(&[(0x8000_0021, 0, [0x1800_0045, 0, 0, 0])])).unwrap();
        let note = diff.lost_note();
        assert!(
            note.starts_with("note: ") && note.ends_with("leaf 0x80000021.0x0 EAX: VERW_CLEAR (bit 5)"),
            "{note}"
        );
    }

    #[test]
    fn the_list_has_harmless_losses_and_not_what_a_guest_needs() {
        let acceptable =
            |leaf, register, offered, accepted| difference(leaf, register, offered, accepted).is_acceptable();
        for (leaf, register) in [
            (0x8000_0001, Register::Ecx),
            (0x8000_0007, Register::Edx),
            (0x8000_000a, Register::Ebx),
            (0x8000_0021, Register::Ebx),
            (0x8000_0022, Register::Ebx),
            (0x24, Register::Ebx),
        ] {
            assert!(acceptable(leaf, register, 0xf0f, 0xf00), "{leaf:#x}");
            assert!(!acceptable(leaf, register, 0xf00, 0xf0f), "{leaf:#x}");
        }
        for needed in [11, 20, 29] {
            assert!(!acceptable(0x8000_0001, Register::Edx, u32::MAX, !(1 << needed)));
        }
        assert!(acceptable(0x8000_0001, Register::Edx, u32::MAX, !(1 << 26)));
        assert!(acceptable(0x8000_0008, Register::Eax, 0x30_3030, 0x3030));
        assert!(!acceptable(0x8000_0008, Register::Eax, 0x30_3030, 0x30_3010));
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
                let _ = (diff.to_string(), diff.is_acceptable(), diff.lost_note());
            }
        }
    }
}
