// SPDX-License-Identifier: Apache-2.0
//! Products against the published masks, and what is offered to a guest of one product on another host.

use Register::*;

use super::*;

/// The masks of AMD-ASPFW `cpuid_lookup.h` (`FN*_DEFAULT` of registers under the mask rule, August 2023).
/// OSXSAVE, in the dump because an operating system ran, is outside of the mask there and never looked at.
#[test]
fn genoas_dump_and_its_allow_lines_are_the_published_masks() {
    let genoa = Processor::of_product(Product::Genoa).unwrap();
    for (leaf, subleaf, register, mask) in [
        (1, 0, Ecx, 0x76fa_320b | 1 << 27),
        (1, 0, Edx, 0x178b_fbff),
        (6, 0, Eax, 4),
        (6, 0, Ecx, 1),
        (7, 0, Ebx, 0xf1bf_97a9),
        (7, 0, Ecx, 0x0041_5fce),
        (7, 0, Edx, 0x1000_0010),
        (7, 1, Eax, 0x20),
        (0xd, 0, Eax, 0x2e7),
        (0xd, 1, Eax, 0xf),
        (0xd, 1, Ecx, 0x1800),
        (0xd, 5, Ecx, 3),
        (0xd, 6, Ecx, 3),
        (0xd, 7, Ecx, 3),
        (0x8000_0001, 0, Ecx, 0x75c2_37ff),
        (0x8000_0001, 0, Edx, 0x2fd3_fbff),
        (0x8000_0007, 0, Ebx, 0x3b),
        (0x8000_0007, 0, Edx, 0x6799),
        (0x8000_0008, 0, Ebx, 0x79be_f35f),
        (0x8000_000a, 0, Edx, 0x1fbf_bcff),
        (0x8000_001b, 0, Eax, 0xbff),
        (0x8000_001f, 0, Eax, 0x030f_ffff),
        (0x8000_0020, 3, Ecx, 0x7f),
        (0x8000_0021, 0, Eax, 0x1806_2fcf),
        (0x8000_0022, 0, Eax, 7),
        (0x8000_0023, 0, Eax, 1),
        (0x8000_0024, 1, Eax, 0x1ff),
    ] {
        assert_eq!(genoa.limits.register(leaf, subleaf, register), mask, "{leaf:#x}.{subleaf} {register}");
    }
}

#[test]
fn every_product_has_its_signature_and_bad_allow_lines_are_named() {
    let signatures = Product::ALL.map(|p| Processor::of_product(p).unwrap().signature);
    assert_eq!(signatures, [0xa0_0f11, 0xa1_0f11, 0xb0_0f21]);
    for line in ["allow 1 0 rax 1", "allow 1 0 eax", "allow 1 eax 1"] {
        let error = with_allowed(RawCpuid::default(), &format!("# x\n{line}")).unwrap_err();
        assert_eq!((error.line, error.text.as_str()), (2, line));
    }
    assert!(Processor::of_host(RawCpuid::default()).is_ok());
}

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    CpuidEntry { function, index, indexed: true, eax, ebx, ecx, edx }
}

/// Features of the host that Genoa lacks go; a bit that the host's own CPUID lacks is KVM's and stays.
#[test]
fn an_offer_has_no_feature_that_the_product_lacks_but_what_kvm_made_up() {
    let genoa = Processor::of_product(Product::Genoa).unwrap();
    // An Intel host: HLE (7.0 EBX 4) and MOVDIRI (7.0 ECX 27) are not Genoa's; TSC_ADJUST is its own, X2APIC
    // KVM's.
    let host = RawCpuid::parse("1 0 306c3 0 0 0\n7 0 0 13 8000004 0\n").unwrap();
    let offered = [
        leaf(0, 0, [0x1f, 0, 0, 0]),
        leaf(1, 0, [0x306c3, 0, 1 << 21, 0]),
        leaf(7, 0, [2, 0x13, 0x0800_0004, 1 << 26]),
        leaf(0x8000_0021, 0, [0x20, 0, 0, 0]),
        leaf(0x8000_0008, 0, [0x3936, 0, 0, 0]),
    ];
    let got = genoa.offer(&offered, &host);
    assert_eq!(got[0].eax, 0x10);
    assert_eq!(got[1], offered[1], "the signature is the host's");
    assert_eq!((got[2].eax, got[2].ebx, got[2].ecx, got[2].edx), (1, 1, 4, 1 << 26));
    assert_eq!(got[3].eax, 0x20, "VERW_CLEAR is made up: the firmware shall refuse it");
    assert_eq!(got[4].eax, 0x3934);
}

/// Intel SDM volume 1, 13.5.6 and 13.5.7, has AVX-512 state at 0x440, 0x480, 0x680, and PKRU at 0xA80.
#[test]
fn a_component_at_another_place_goes_with_its_features() {
    let genoa = Processor::of_product(Product::Genoa).unwrap();
    let host = RawCpuid::parse("7 0 0 ffffffff ffffffff 0\n").unwrap();
    let offered = [
        leaf(7, 0, [1, u32::MAX, u32::MAX, 0]),
        leaf(7, 1, [0x20, 0, 0, 0]),
        leaf(0xd, 0, [0x2e7, 0x240, 0xa88, 0]),
        leaf(0xd, 1, [0x1f, 0x240, 0x1900, 0]),
        leaf(0xd, 2, [0x100, 0x240, 0, 0]),
        leaf(0xd, 5, [0x40, 0x440, 0, 0]),
        leaf(0xd, 6, [0x200, 0x480, 0, 0]),
        leaf(0xd, 7, [0x400, 0x680, 0, 0]),
        leaf(0xd, 8, [0x80, 0, 1, 0]),
        leaf(0xd, 9, [8, 0xa80, 0, 0]),
        leaf(0xd, 11, [0x10, 0, 1, 0]),
    ];
    let got = genoa.offer(&offered, &host);
    let kept: Vec<(u32, u32)> = got.iter().map(|e| (e.function, e.index)).collect();
    assert_eq!(kept, [(7, 0), (7, 1), (0xd, 0), (0xd, 1), (0xd, 2), (0xd, 11)]);
    assert_eq!(got[1].eax, 0, "no AVX512_BF16");
    assert_eq!(got[0].ebx & 1 << 16, 0, "no AVX512F");
    assert_eq!(got[0].ecx & 0x18, 0, "no PKU");
    assert_eq!(got[0].ebx & 1 << 5, 1 << 5, "AVX2 stays");
    assert_eq!(got[2].eax, 7);
}

#[test]
fn a_products_own_table_is_offered_as_it_is() {
    for product in Product::ALL {
        let processor = Processor::of_product(product).unwrap();
        let own = processor.raw.entries().to_vec();
        assert_eq!(processor.offer(&own, &processor.raw), own, "{product}");
    }
}

/// QEMU's EPYC-Rome has 6 there; NVIDIA's nvtrust issue 91 has the same value from a guest's model, and the
/// firmware's answer.
#[test]
fn an_emulated_cpu_s_cache_properties_are_not_taken_for_a_chip_s() {
    let genoa = Processor::of_product(Product::Genoa).unwrap();
    let got = genoa.offer(&[leaf(0x8000_001d, 3, [0x1_4163, 0x3c0_003f, 0x7fff, 6])], &RawCpuid::default());
    assert_eq!(got[0].edx, 2);
}
