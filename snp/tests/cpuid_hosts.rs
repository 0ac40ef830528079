// SPDX-License-Identifier: Apache-2.0
//! CPUID tables of real hosts against the firmware model: what is refused, to the bit.
//!
//! `data/cpuid` has recorded answers of `KVM_GET_SUPPORTED_CPUID` (with microcode against TSA), corrections
//! that the firmware of real hosts made, and a dump of Bergamo; each file names its source. Where nothing was
//! recorded, KVM's offer is derived from a chip's dump.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its data does not fit")]

use snp::attest::tcb::Product;
use snp::pages::cpuid::CpuidTable;
use snp::pages::cpuid::PageEntry;
use snp::pages::cpuid::SnpCpuid;
use snp::pages::cpuid::encode_page;
use snp::pages::cpuid_diff::CpuidDiff;
use snp::pages::cpuid_diff::Difference;
use snp::pages::cpuid_diff::Page;
use snp::pages::cpuid_entry::CpuidEntry;
use snp::pages::cpuid_entry::Register;
use snp::pages::cpuid_raw::RawCpuid;
use snp_model::firmware::cpuid_page;
use snp_model::firmware::product::Processor;

const SEV: SnpCpuid = SnpCpuid { c_bit: 51, phys_bits: None, coherency_sfw_no: false };

/// What the firmware changes in `page`, which it accepts then.
fn refused(mut page: Page, processor: &Processor) -> Vec<Difference> {
    let offered = page;
    if cpuid_page::check(&mut page, processor, SEV.c_bit) {
        assert_eq!(page, offered);
        return vec![];
    }
    let diff = CpuidDiff::new(&offered, &page).unwrap();
    assert!(!diff.structure);
    assert!(diff.is_made_up(Some(&processor.raw)), "accepted without being asked:\n{diff}");
    assert!(cpuid_page::check(&mut page, processor, SEV.c_bit), "accepted then");
    diff.differences
}

/// The table that `CpuidTable::snp` makes of an offer, and what is refused of it.
fn launch(offered: &[CpuidEntry], processor: &Processor) -> Vec<Difference> {
    let table = CpuidTable::snp(offered, 2, &SEV).unwrap();
    assert!((28..=40).contains(&table.entries().len()), "{} entries", table.entries().len());
    refused(table.page().unwrap(), processor)
}

fn loss(offered: u32, accepted: u32) -> Difference {
    Difference { leaf: 0x8000_0021, subleaf: 0, register: Register::Eax, offered, accepted }
}

/// Leaf, sub-leaf, KVM's flags, EAX, EBX, ECX, EDX.
fn recorded(text: &str) -> Vec<CpuidEntry> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let words: Vec<u32> =
                line.split_whitespace().map(|w| u32::from_str_radix(w, 16).unwrap()).collect();
            let [function, index, flags, eax, ebx, ecx, edx] = words[..] else { panic!("{line}") };
            CpuidEntry { function, index, indexed: flags & 1 != 0, eax, ebx, ecx, edx }
        })
        .collect()
}

/// VERW_CLEAR, and nothing else: published and derived masks do not have it, and both hosts have the
/// microcode.
#[test]
fn of_recorded_tables_only_verw_clear_is_refused() {
    for (name, product, text, expected) in [
        ("6.1", Product::Milan, include_str!("data/cpuid/kvm_offered_milan_linux6.1.txt"), loss(0x65, 0x45)),
        (
            "6.18",
            Product::Milan,
            include_str!("data/cpuid/kvm_offered_milan_linux6.18.txt"),
            loss(0x1800_0065, 0x1800_0045),
        ),
        ("6.1", Product::Genoa, include_str!("data/cpuid/kvm_offered_genoa_linux6.1.txt"), loss(0x65, 0x45)),
        (
            "6.18",
            Product::Genoa,
            include_str!("data/cpuid/kvm_offered_genoa_linux6.18.txt"),
            loss(0x1800_0167, 0x1800_0147),
        ),
    ] {
        let processor = Processor::of_product(product).unwrap();
        assert_eq!(launch(&recorded(text), &processor), [expected], "{product}, Linux {name}");
    }
}

/// A kernel, as far as leaf 0x80000021 goes.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    /// `CPUID_8000_0021_EAX` in `kvm_set_cpu_caps`: bits that are offered if the processor has them.
    features: u32,
    /// Bits that are offered always.
    emulated: u32,
    /// EBX bits that are passed on.
    ebx: u32,
}

/// `arch/x86/kvm/cpuid.c` of Linux 6.12.117: NO_NESTED_DATA_BP, WRMSR_XX_BASE_NS, AUTOIBRS,
/// SRSO_USER_KERNEL_NO of the host; LFENCE_RDTSC, NULL_SEL_CLR_BASE and NO_SMM_CTL_MSR set.
const LINUX_6_12: Kernel =
    Kernel { features: 1 | 1 << 1 | 1 << 8 | 1 << 30, emulated: 1 << 2 | 1 << 6 | 1 << 9, ebx: 0 };
/// Linux 7.3.4: also PREFETCHI, AVX512_BMM and ERAPS of the host, and GP_ON_USER_CPUID.
const LINUX_7_3: Kernel = Kernel {
    features: LINUX_6_12.features | 1 << 20 | 1 << 23 | 1 << 24,
    emulated: LINUX_6_12.emulated | 1 << 17,
    ebx: 0x00ff_0000,
};

/// What KVM offers on a chip. Feature registers are not cut down to what KVM passes on, so this is more than
/// the offer; what KVM adds by itself is added (`arch/x86/kvm/cpuid.c`, `kvm_set_cpu_caps` and
/// `__do_cpuid_func`). `forced` are bits of 0x80000021 EAX that the kernel has forced on
/// (`arch/x86/kernel/cpu/amd.c`, `bugs.c`).
fn derived(raw: &RawCpuid, kernel: Kernel, forced: u32) -> Vec<CpuidEntry> {
    let mut offered: Vec<CpuidEntry> = raw.entries().to_vec();
    offered.retain(|e| !matches!(e.function, 5 | 0xf | 0x10 | 0x8000_001b | 0x8000_001f | 0x8000_0020));
    offered.retain(|e| e.function <= 0x8000_0022);
    if raw.get(0x8000_0000, 0)[0] >= 0x8000_001e && raw.get(0x8000_001e, 0) == [0; 4] {
        offered.push(CpuidEntry { function: 0x8000_001e, ..CpuidEntry::default() });
    }
    for (function, eax) in [(0x4000_0000, 0x4000_0001), (0x4000_0001, 0x0100_7efb)] {
        offered.push(CpuidEntry { function, eax, ..CpuidEntry::default() });
    }
    for e in &mut offered {
        match (e.function, e.index) {
            (1, _) => e.ecx |= 1 << 21 | 1 << 24,
            (6, _) => (e.eax, e.ecx) = (4, 0),
            (7, 0) => (e.ebx, e.edx) = (e.ebx | 1 << 1, e.edx | 0xac00_0000),
            (0x8000_0000, _) => e.eax = e.eax.min(0x8000_0022),
            (0x8000_0007, _) => (e.eax, e.ebx, e.ecx) = (0, 0, 0),
            (0x8000_0008, _) => (e.eax, e.ebx, e.edx) = (e.eax | 0x30_0000, e.ebx | 1 << 25, 0),
            (0x8000_000a, _) => (e.eax, e.ebx) = (1, 8),
            (0x8000_001a, _) => e.eax &= 7,
            (0x8000_001e, _) => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            (0x8000_0021, _) => {
                e.eax = e.eax & kernel.features | kernel.emulated | forced;
                e.ebx &= kernel.ebx;
                e.ecx = 6; // TSA_SQ_NO and TSA_L1_NO, as the worst kernels have it.
            }
            (0x8000_0022, _) => (e.eax, e.ebx, e.ecx) = (e.eax & 1, e.ebx & 0xf, 0),
            _ => {}
        }
    }
    offered
}

/// SBPB and IBPB_BRTYPE: forced on with microcode against SRSO; VERW_CLEAR: with microcode against TSA, on
/// Zen 3 and 4.
const SRSO: u32 = 1 << 27 | 1 << 28;
const TSA: u32 = 1 << 5;

#[test]
fn of_derived_tables_only_what_microcode_announces_is_refused() {
    let milan = Processor::of_product(Product::Milan).unwrap();
    let genoa = Processor::of_product(Product::Genoa).unwrap();
    let turin = Processor::of_product(Product::Turin).unwrap();
    let (old, new) = (LINUX_6_12, LINUX_7_3);
    for (processor, kernel, forced, expected) in [
        (&milan, old, 0, None),
        (&milan, old, SRSO, None),
        (&milan, old, SRSO | TSA, Some((0x1800_0065, 0x1800_0045))),
        (&milan, new, SRSO, None),
        (&milan, new, SRSO | TSA, Some((0x1800_0065, 0x1800_0045))),
        (&genoa, old, SRSO, None),
        (&genoa, old, SRSO | TSA, Some((0x1800_0167, 0x1800_0147))),
        (&genoa, new, SRSO | TSA, Some((0x1800_0167, 0x1800_0147))),
        (&turin, old, SRSO, None),
        (&turin, new, SRSO, None),
    ] {
        let expected: Vec<Difference> = expected.into_iter().map(|(o, a)| loss(o, a)).collect();
        let found = launch(&derived(&processor.raw, kernel, forced), processor);
        assert_eq!(found, expected, "{:#x}, {kernel:?}, {forced:#x}", processor.signature);
    }
}

/// Bergamo has Genoa's rules, and a signature above: its own.
#[test]
fn bergamo_has_the_masks_of_genoa() {
    let genoa = Processor::of_product(Product::Genoa).unwrap();
    let raw = RawCpuid::parse(include_str!("data/cpuid/bergamo.txt")).unwrap();
    let bergamo = Processor { signature: raw.register(1, 0, Register::Eax), raw: raw.clone(), ..genoa };
    for kernel in [LINUX_6_12, LINUX_7_3] {
        assert_eq!(launch(&derived(&raw, kernel, SRSO), &bergamo), []);
        assert_eq!(launch(&derived(&raw, kernel, SRSO | TSA), &bergamo), [loss(0x1800_0167, 0x1800_0147)]);
    }
}

/// Linux forces VERW_CLEAR on Zen 3 and 4 alone (`amd.c:tsa_init`); on Zen 5 it can come from microcode, with
/// older firmware.
#[test]
fn turin_with_newer_microcode_than_firmware_loses_verw_clear() {
    let turin = Processor::of_product(Product::Turin).unwrap();
    let mut patched = turin.clone();
    patched.raw.add(0x8000_0021, 0, Register::Eax, TSA);
    let found = launch(&derived(&patched.raw, LINUX_7_3, SRSO | TSA), &patched);
    let [Difference { leaf: 0x8000_0021, offered, accepted, .. }] = found[..] else { panic!("{found:?}") };
    assert_eq!(offered ^ accepted, TSA);
}

/// What a table without `CpuidTable::snp` loses on Milan: NO_SMM_CTL_MSR and, from Linux 7.2 on,
/// GP_ON_USER_CPUID.
#[test]
fn bits_that_kvm_emulates_are_refused_on_milan_and_accepted_on_genoa() {
    let register = |product: Product, eax| {
        let entry = PageEntry { eax_in: 0x8000_0021, eax, ..PageEntry::default() };
        refused(encode_page(&[entry]).unwrap(), &Processor::of_product(product).unwrap())
    };
    assert_eq!(register(Product::Milan, 0x1802_0045), [loss(0x1802_0045, 0x1800_0045)]);
    assert_eq!(register(Product::Milan, 0x1802_0265), [loss(0x1802_0265, 0x1800_0045)]);
    assert_eq!(register(Product::Genoa, 0x1802_0347), []);
    assert_eq!(register(Product::Turin, 0x5902_0347), []);
}

/// Corrections that the firmware of real hosts made. Which value the other registers had is not known; zero
/// is accepted.
#[test]
fn refusals_of_real_hosts_come_out_bit_for_bit() {
    let milan = Processor::of_product(Product::Milan).unwrap();
    let mut seen = 0;
    for line in include_str!("data/cpuid/refusals_seen.txt").lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split('|').next().unwrap().split_whitespace().collect();
        let [leaf, subleaf, register, offered, accepted] = fields[..] else { panic!("{line}") };
        let hex = |word| u32::from_str_radix(word, 16).unwrap();
        let mut entry = PageEntry { eax_in: hex(leaf), ecx_in: hex(subleaf), ..PageEntry::default() };
        let register = match register {
            "eax" => Register::Eax,
            "ecx" => Register::Ecx,
            "edx" => Register::Edx,
            other => panic!("{other}"),
        };
        match register {
            Register::Eax => entry.eax = hex(offered),
            Register::Ebx => entry.ebx = hex(offered),
            Register::Ecx => entry.ecx = hex(offered),
            Register::Edx => entry.edx = hex(offered),
        }
        let offered_page = encode_page(&[entry]).unwrap();
        let mut page = offered_page;
        assert!(!cpuid_page::check(&mut page, &milan, SEV.c_bit), "{line}");
        let diff = CpuidDiff::new(&offered_page, &page).unwrap();
        let expected = Difference {
            leaf: hex(leaf),
            subleaf: hex(subleaf),
            register,
            offered: hex(offered),
            accepted: hex(accepted),
        };
        assert_eq!(diff.differences, [expected], "{line}");
        seen += 1;
    }
    assert_eq!(seen, 4);
}

/// A host with COHERENCY_SFW_NO and firmware that does not know the bit; no such processor is known.
#[test]
fn the_coherency_bit_is_lost_and_the_c_bit_stays() {
    let genoa = Processor::of_product(Product::Genoa).unwrap();
    let sev = SnpCpuid { coherency_sfw_no: true, ..SEV };
    let table = CpuidTable::snp(&derived(&genoa.raw, LINUX_7_3, SRSO), 2, &sev).unwrap();
    let mut page = table.page().unwrap();
    let offered = page;
    assert!(!cpuid_page::check(&mut page, &genoa, SEV.c_bit));
    let diff = CpuidDiff::new(&offered, &page).unwrap();
    assert!(diff.is_made_up(None) && cpuid_page::check(&mut page, &genoa, SEV.c_bit));
    let [Difference { leaf: 0x8000_001f, register: Register::Ebx, offered, accepted, .. }] =
        diff.differences[..]
    else {
        panic!("{diff}")
    };
    // The published correction clears bits 11:6 with it, the loss of one address bit that the table tells.
    assert_eq!((offered, accepted), (1 << 31 | 1 << 6 | 51, 51));
}
