// SPDX-License-Identifier: Apache-2.0
//! The check of CPUID pages, rule by rule of AMD's published firmware (AMD-ASPFW, `cpuid_lookup.c` and
//! `cpuid_lookup.h`).

use proptest::prelude::*;
use snp::attest::tcb::Product;

use super::*;

fn page(entries: &[Entry]) -> [u8; PAGE_SIZE as usize] {
    let mut page = [0; PAGE_SIZE as usize];
    page[..4].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    for (i, entry) in entries.iter().enumerate() {
        page[ENTRIES + i * ENTRY_LEN..][..ENTRY_LEN].copy_from_slice(&entry.encode());
    }
    page
}

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Entry {
    Entry { function, index, registers: CpuidRegisters { eax, ebx, ecx, edx }, ..Entry::default() }
}

fn genoa() -> Processor {
    Processor::of_product(Product::Genoa).unwrap()
}

/// What comes back for one entry on `processor`; `None` if it is accepted.
fn answer_on(processor: &Processor, e: Entry) -> Option<[u32; 4]> {
    let mut p = page(&[e]);
    let accepted = check(&mut p, processor, 51);
    let back = Entry::decode(p[ENTRIES..].first_chunk().unwrap());
    assert_eq!(
        (back.function, back.index, back.xcr0_in, back.xss_in),
        (e.function, e.index, e.xcr0_in, e.xss_in)
    );
    let r = back.registers;
    assert!(!accepted || r == e.registers, "an accepted entry is not changed");
    (!accepted).then_some([r.eax, r.ebx, r.ecx, r.edx])
}

fn answer(function: u32, index: u32, registers: [u32; 4]) -> Option<[u32; 4]> {
    answer_on(&genoa(), entry(function, index, registers))
}

/// `sev_mcmd.c:snp_mcmd_launch_update`: count and reserved words of the header; the page is not written back.
#[test]
fn a_wrong_header_is_refused_and_the_page_does_not_come_back() {
    let wrong = entry(7, 0, [9, 9, 9, 9]);
    for at in [4, 8, 15] {
        let mut p = page(&[wrong]);
        p[at] = 1;
        let before = p;
        assert!(!check(&mut p, &genoa(), 51), "{at}");
        assert_eq!(p, before);
    }
    let mut p = page(&[]);
    p[0] = 65;
    assert!(!check(&mut p, &genoa(), 51));
    assert!(check(&mut page(&[Entry::default(); 64]), &genoa(), 51));
}

/// `cpuid_lookup.c:sanitize_cpuid_list`: it sets `failed` and changes nothing; only in the two ranges.
#[test]
fn the_reserved_word_of_an_entry_is_refused_and_not_corrected() {
    let mut p = page(&[Entry { reserved: 1, ..entry(0x8000_0002, 0, [1, 2, 3, 4]) }]);
    let before = p;
    assert!(!check(&mut p, &genoa(), 51));
    assert_eq!(p, before);
    assert!(check(&mut page(&[Entry { reserved: 1, ..entry(0x4000_0000, 0, [1; 4]) }]), &genoa(), 51));
}

/// `cpuid_lookup.c:sanitize_cpuid_list` walks `count` entries.
#[test]
fn bytes_behind_the_last_entry_and_duplicates_are_accepted() {
    let mut p = page(&[entry(2, 0, [1; 4]), entry(2, 0, [2; 4])]);
    p[ENTRIES + 2 * ENTRY_LEN..].fill(0xff);
    assert!(check(&mut p, &genoa(), 51));
}

/// `cpuid_lookup.c:sanitize_cpuid_entry`, `found == false`; ranges of `sanitize_cpuid_list`.
#[test]
fn a_leaf_that_is_not_in_the_list_must_be_zero() {
    for (leaf, index) in [
        (3, 0),
        (0xffff, 0),
        (0x24, 0),
        (7, 2),
        (0xd, 3),
        (0x8000_001d, 5),
        (0x8000_0025, 0),
        (0x8000_ffff, 0),
    ] {
        assert_eq!(answer(leaf, index, [0, 0, 1, 0]), Some([0; 4]), "{leaf:#x}.{index}");
        assert_eq!(answer(leaf, index, [0; 4]), None);
    }
    for leaf in [0x1_0000, 0x4000_0000, 0x4000_0001, 0x7fff_ffff, 0x8001_0000, 0xc000_0000] {
        assert_eq!(answer(leaf, 0, [9; 4]), None, "{leaf:#x}");
    }
    // Leaves 2 and 4 are in the list, with no rule; so is 0x80000026.
    for leaf in [2, 4, 0x8000_0026] {
        assert_eq!(answer(leaf, 0, [9; 4]), None);
    }
    // Milan has nothing above 0x80000023.
    let milan = Processor::of_product(Product::Milan).unwrap();
    assert_eq!(answer_on(&milan, entry(0x8000_0026, 0, [9; 4])), Some([0; 4]));
}

/// `lookup_table`, `CPUID_RULE_LESSTHAN`; `FN00000007_x00_CUSTOM`.
#[test]
fn highest_leaves_are_at_most_the_processors() {
    assert_eq!(answer(0, 0, [0x11, 1, 2, 3]), Some([0x10, 1, 2, 3]));
    assert_eq!(answer(0, 0, [0xd, 1, 2, 3]), None);
    assert_eq!(answer(0x8000_0000, 0, [0x8000_0029, 0, 0, 0]), Some([0x8000_0028, 0, 0, 0]));
    assert_eq!(answer(7, 0, [2, 0, 0, 0]), Some([1, 0, 0, 0]));
}

/// `FN00000001_CUSTOM`, `compare_FMS`, `FMS_MODEL`.
#[test]
fn leaf_1_has_a_signature_up_to_the_processors_and_features_within_its() {
    let leaf1 = |eax, ebx, ecx, edx| answer(1, 0, [eax, ebx, ecx, edx]);
    assert_eq!(leaf1(0xa1_0f11, 0x0102_0800, 0x8000_0000 | 1 << 27 | 1 << 21, 1), None);
    assert_eq!(leaf1(0xa0_0f11, 0x800, 0, 0), None, "an older model");
    assert_eq!(leaf1(0xb0_0f00, 0x800, 0, 0), Some([0xa1_0f11, 0x800, 0, 0]), "a later family");
    assert_eq!(leaf1(0xa1_0f12, 0x800, 0, 0), Some([0xa1_0f11, 0x800, 0, 0]), "a later stepping");
    // Bergamo, model 0xA0, is 10 for the firmware, and Genoa, 0x11, is 2.
    assert_eq!(leaf1(0xaa_0f02, 0x800, 0, 0), Some([0xa1_0f11, 0x800, 0, 0]));
    // Model 0x20 is above 0x11, but counts as 2 as well.
    assert_eq!(leaf1(0xa2_0f01, 0x800, 0, 0), None);
    assert_eq!(leaf1(0x10a1_1f11, 0x800, 0, 0), Some([0xa1_0f11, 0x800, 0, 0]), "reserved bits");
    assert_eq!(leaf1(0xa1_0f11, 0x1001, 0, 0), Some([0xa1_0f11, 0x800, 0, 0]), "CLFLUSH and brand");
    assert_eq!(leaf1(0xa1_0f11, 0x800, 1 << 24 | 1, 1 << 30), Some([0xa1_0f11, 0x800, 1, 0]), "TSC deadline");
}

/// `FN00000007_x00_CUSTOM`; `FN00000007_x00_EDX_DEFAULT` and `_RESERVED`.
#[test]
fn leaf_7_edx_with_any_other_bit_is_answered_with_nothing() {
    let edx = |edx| answer(7, 0, [0, 0, 0, edx]);
    assert_eq!(edx(0x1000_0010), None);
    assert_eq!(edx(0x1000_0011), Some([0; 4]));
    assert_eq!(
        answer(7, 0, [0, 2 | 1 << 3, 0x10 | 1 << 27, 0]),
        Some([0, 1 << 3, 0x10, 0]),
        "TSC_ADJUST; OSPKE"
    );
}

/// `lookup_table`, `CPUID_Fn00000007_x01`.
#[test]
fn leaf_7_1_has_features_in_eax_alone() {
    assert_eq!(answer(7, 1, [0x30, 1, 2, 4]), Some([0x20, 0, 0, 0]));
    let turin = Processor::of_product(Product::Turin).unwrap();
    assert_eq!(answer_on(&turin, entry(7, 1, [0x30, 0, 0, 0])), None);
}

/// `FN0000000D_X00_CUSTOM`, `FN0000000D_X01_CUSTOM`.
#[test]
fn sizes_of_the_xsave_area_follow_the_inputs() {
    let sub = |index, xcr0_in, xss_in, eax, ebx, ecx| {
        answer_on(&genoa(), Entry { xcr0_in, xss_in, ..entry(0xd, index, [eax, ebx, ecx, 0]) })
    };
    for (xcr0, size) in
        [(1, 0x240), (3, 0x240), (7, 0x340), (0x27, 0x380), (0x67, 0x580), (0xe7, 0x980), (0x2e7, 0x988)]
    {
        assert_eq!(sub(0, xcr0, 0, 7, size, 0x988), None, "{xcr0:#x}");
        assert_eq!(sub(0, xcr0, 0, 7, size + 1, 0), Some([7, size, 0, 0]));
    }
    assert_eq!(sub(0, 1, 0, 4, 0x240, 0), Some([7, 0x240, 0, 0]), "x87 and SSE must be set");
    assert_eq!(sub(0, 1, 0, 0x6_02e7, 0x240, 0), Some([0x2e7, 0x240, 0, 0]), "no AMX");
    for (xcr0, xss, size) in
        [(1, 0, 0x240), (7, 0, 0x340), (0x2e7, 0, 0x988), (1, 1 << 11, 0x250), (7, 3 << 11, 0x368)]
    {
        assert_eq!(sub(1, xcr0, xss, 0xf, size, 0x1800), None, "{xcr0:#x} {xss:#x}");
    }
    assert_eq!(sub(1, 1, 0, 0x1f, 0x350, 0x1900), Some([0xf, 0x240, 0x1800, 0]));
}

/// `lookup_table`, `CPUID_Fn0000000D_x02` to `_x0C`: `CPUID_RULE_EXACT`.
#[test]
fn components_of_the_xsave_area_are_exact() {
    for (index, registers) in [
        (2, [0x100, 0x240, 0, 0]),
        (5, [0x40, 0x340, 2, 0]),
        (6, [0x200, 0x380, 0, 0]),
        (7, [0x400, 0x580, 3, 0]),
        (9, [8, 0x980, 0, 0]),
        (11, [0x10, 0, 1, 0]),
        (12, [0x18, 0, 1, 0]),
    ] {
        assert_eq!(answer(0xd, index, registers), None, "{index}");
        let mut wrong = registers;
        wrong[1] += 0x40;
        assert_eq!(answer(0xd, index, wrong), Some(registers), "{index}");
    }
    assert_eq!(answer(0xd, 11, [0; 4]), Some([0x10, 0, 1, 0]), "zero is no answer either");
}

/// `lookup_table` and `*_RESERVED` of leaves 5, 6, 0xB, 0xF, 0x10, 0x80000006, 0x80000019 to 0x8000001E,
/// 0x80000020.
#[test]
fn reserved_bits_of_describing_leaves_are_refused() {
    for (leaf, index, offered, accepted) in [
        (5, 0, [0x1_0040, 0x1_0040, 7, 0x111], [0x40, 0x40, 3, 0x11]),
        (6, 0, [0x44, 1, 9, 1], [4, 0, 1, 0]),
        (0xb, 1, [0x27, 0x1_0002, 0x1_0201, 9], [7, 2, 0x201, 9]),
        (0xf, 0, [1, 0xff, 1, 3], [0, 0xff, 0, 2]),
        (0xf, 1, [0x214, 1, 2, 0xf], [0x14, 1, 2, 7]),
        (0x10, 0, [1, 0xf, 1, 1], [0, 6, 0, 0]),
        (0x10, 1, [0x2f, 9, 0xf, 0x1_000f], [0xf, 9, 4, 0xf]),
        (0x8000_0001, 0, [0, 0x4fff_ffff, 0, 0], [0, 0x4000_0000, 0, 0]),
        (0x8000_0006, 0, [1, 2, 3, 0xc03_9140], [1, 2, 3, 0xc00_9140]),
        (0x8000_0007, 0, [1, 0xff, 5, 0xffff_ffff], [0, 0x3b, 5, 0x6799]),
        (0x8000_000a, 0, [0x101, 9, 1, 0xffff_ffff], [1, 9, 0, 0x1fbf_bcff]),
        (0x8000_0019, 0, [1, 2, 3, 4], [1, 2, 0, 0]),
        (0x8000_001a, 0, [0xe, 1, 1, 1], [6, 0, 0, 0]),
        (0x8000_001b, 0, [0xfff, 1, 1, 1], [0xbff, 0, 0, 0]),
        (0x8000_001d, 0, [0xffff_ffff, 1, 2, 7], [0x03ff_c3ff, 1, 2, 3]),
        (0x8000_001d, 4, [0x1f, 1, 2, 3], [0xf, 0, 2, 0]),
        (0x8000_001e, 0, [9, 0x1_0001, 0xfff, 1], [9, 1, 0x7ff, 0]),
        (0x8000_0020, 0, [1, 0xff, 1, 1], [0, 0x1e, 0, 0]),
        (0x8000_0020, 3, [1, 9, 0xff, 1], [0, 9, 0x7f, 0]),
        (0x8000_0021, 0, [0, 0x1fff, 0x86, 1], [0, 0xfff, 0, 0]),
        (0x8000_0023, 0, [3, 9, 1, 1], [1, 9, 0, 0]),
    ] {
        assert_eq!(answer(leaf, index, offered), Some(accepted), "{leaf:#x}.{index}");
        assert_eq!(answer(leaf, index, accepted), None, "{leaf:#x}.{index}");
    }
}

/// `FN80000001_CUSTOM`, `FN80000001_ECX_RESERVED`.
#[test]
fn leaf_80000001_allows_svm_and_topology_but_not_what_amd_dropped() {
    let features = 1 << 2 | 1 << 22 | 1 << 23;
    assert_eq!(answer(0x8000_0001, 0, [0xa1_0f11, 0x4000_0000, features, 1 << 29]), None);
    let refused = 1 << 14 | 0xf << 18 | 1 << 31;
    assert_eq!(answer(0x8000_0001, 0, [0, 0, features | refused, 0]).unwrap()[2], features | 1 << 22);
}

/// `FN80000008_CUSTOM`, `FN80000008_EBX_RESERVED`.
#[test]
fn leaf_80000008_is_checked_field_by_field() {
    assert_eq!(answer(0x8000_0008, 0, [0xff_3934, 0x1 << 8, 0x3_f0ff, 0x1_0007]), None);
    let refused = 1 << 25 | 1 << 26 | 1 << 11 | 1 << 7 | 1 << 5;
    assert_eq!(
        answer(0x8000_0008, 0, [0x01ff_4035, refused | 1, 0xffff_ffff, 0xff02_0008]),
        Some([0xff_3934, 1, 0x3_f0ff, 0x1_0007])
    );
}

/// `FN8000001F_CUSTOM`: the C-bit is strict, bits 11:6 free, at most four VMPLs, the upper half reserved;
/// wrong low bits stay.
#[test]
fn the_sev_leaf_has_the_platforms_c_bit_and_keeps_wrong_bits() {
    let ebx = |ebx| answer(0x8000_001f, 0, [0x1a, ebx, 9, 9]).map(|[_, ebx, ..]| ebx);
    for good in [51, 1 << 6 | 51, 0xfc0 | 51, 4 << 12 | 51] {
        assert_eq!(ebx(good), None, "{good:#x}");
    }
    assert_eq!(ebx(5 << 12 | 51), Some(4 << 12 | 51));
    assert_eq!(ebx(1 << 31 | 1 << 6 | 51), Some(51), "COHERENCY_SFW_NO, and the free bits with it");
    assert_eq!(ebx(47), Some(47 | 51), "0x3f: refused again");
    assert_eq!(ebx(47 | 51), Some(47 | 51), "and nothing is changed");
    let coherent = Processor { coherent: true, ..genoa() };
    let sev = entry(0x8000_001f, 0, [0x1a, 1 << 31 | 1 << 6 | 51, 0, 0]);
    assert_eq!(answer_on(&coherent, sev), None);
    assert_eq!(answer(0x8000_001f, 0, [0xffff_ffff, 51, 0, 0]).unwrap()[0], 0x030f_ffff);
}

/// `lookup_table`, `CPUID_Fn80000021`; the masks of other chips are their dumps.
#[test]
fn what_kvm_makes_up_in_80000021_is_refused_where_the_chip_lacks_it() {
    let eax = |product: Product, eax| {
        let answer =
            answer_on(&Processor::of_product(product).unwrap(), entry(0x8000_0021, 0, [eax, 0, 0, 0]));
        answer.map_or(eax, |[eax, ..]| eax)
    };
    // VERW_CLEAR (5), SRSO_NO (29): Genoa refuses them and takes 9, 17, 27, 28.
    assert_eq!(eax(Product::Genoa, 0x3802_0367), 0x1802_0347);
    // Milan lacks NO_SMM_CTL_MSR (9) and GP_ON_USER_CPUID (17) as well.
    assert_eq!(eax(Product::Milan, 0x1802_0265), 0x1800_0045);
    assert_eq!(eax(Product::Turin, 0x5902_0347), 0x5902_0347);
}

/// `FN80000022_CUSTOM`.
#[test]
fn leaf_80000022_has_at_most_the_processors_counters() {
    assert_eq!(answer(0x8000_0022, 0, [1, 6, 9, 0]), None);
    assert_eq!(answer(0x8000_0022, 0, [9, 0xffff_ffff, 9, 1]), Some([1, 0xffff_fd06, 9, 0]));
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let leaf = prop_oneof![0u32..0x12, 0x8000_0000u32..0x8000_0028, any::<u32>()];
    let small = prop_oneof![Just(0u64), any::<u64>()];
    (leaf, 0u32..14, any::<u64>(), any::<u64>(), any::<[u32; 4]>(), small).prop_map(
        |(function, index, xcr0_in, xss_in, r, reserved)| Entry {
            xcr0_in,
            xss_in,
            reserved,
            ..entry(function, index, r)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// But for the two things that the firmware refuses and does not mend: reserved words, and bits 5:0 of
    /// the SEV leaf's EBX.
    #[test]
    fn what_comes_back_is_accepted(
        entries in proptest::collection::vec(any_entry(), 0..64), product in 0usize..3,
    ) {
        let processor = Processor::of_product(Product::ALL[product]).unwrap();
        let mut p = page(&entries);
        let seen = |e: &Entry| RANGES.iter().any(|range| range.contains(&e.function));
        let stuck = entries.iter().any(|e| {
            let sev = (e.function, e.index) == (0x8000_001f, 0);
            seen(e) && (e.reserved != 0 || sev && e.registers.ebx & 0x3f & !51 != 0)
        });
        let before = p;
        if check(&mut p, &processor, 51) {
            prop_assert_eq!(p, before);
        } else {
            prop_assert_eq!(check(&mut p, &processor, 51), !stuck);
        }
    }

    #[test]
    fn any_page_is_checked(bytes in proptest::collection::vec(any::<u8>(), PAGE_SIZE as usize), count in 0u32..70, c_bit in 0u8..64) {
        let mut p: [u8; PAGE_SIZE as usize] = bytes.try_into().unwrap();
        p[..4].copy_from_slice(&count.to_le_bytes());
        check(&mut p, &genoa(), c_bit);
    }
}
