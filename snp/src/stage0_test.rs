// SPDX-License-Identifier: Apache-2.0
//! Tests of the rules that stage0 enforces, on the code that runs in the guest.

#![allow(clippy::single_range_in_vec_init, reason = "a list of one range is what is meant")]

use inputs::EXCLUDED;
use inputs::ITEM_COUNT;
use inputs::ITEM_LEN;
use inputs::ITEMS;
use inputs::Inputs;
use inputs::Kind;
use inputs::RAM;
use inputs::STAGING;
use inputs::Span;
use layout::LARGE;
use layout::PAGE;
use proptest::prelude::*;
use reason::Reason;

use super::*;

#[test]
fn the_small_sha384_agrees_with_the_sha2_crate_around_every_block_boundary() {
    let data: Vec<u8> = (0..1024u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
    for len in 0..data.len() {
        assert_eq!(sha384::sha384(&data[..len]), item_hash(&data[..len]), "{len} bytes");
    }
}

const TOP: u64 = 64 << 20;
const KERNEL: u64 = 16 << 20;

/// Inputs of a small guest that pass every check.
fn good() -> InputsPage {
    let item = |kind, source, target, len| Item { kind, source, target, len, mem_len: len, hash: [0; 48] };
    InputsPage {
        entry: KERNEL + 0x200,
        boot_params: 0x7000,
        ram: vec![0..TOP, 4 << 30..5 << 30],
        excluded: vec![layout::CPUID..layout::SECRETS + PAGE, layout::INPUTS..layout::IMAGE_END],
        staging: vec![layout::GHCB..layout::GHCB + PAGE, 4 * LARGE..6 * LARGE],
        accept: None,
        items: vec![
            item(Kind::Kernel, 4 * LARGE, KERNEL, 0x10_0000),
            item(Kind::BootData, 5 * LARGE, 0x7000, 0x1000),
        ],
    }
}

/// Puts two numbers into a place of the inputs.
type Change = fn(&mut InputsPage, u64, u64);

fn check(page: &InputsPage) -> Result<(), Reason> {
    Inputs(&page.encode().unwrap()).check(layout::IMAGE_END)
}

#[test]
fn each_rule_of_the_inputs_has_its_own_refusal() {
    assert_eq!(check(&good()), Ok(()));
    type Change = fn(&mut InputsPage);
    let cases: &[(&str, Change, Reason)] = &[
        ("no RAM", |p| p.ram.clear(), Reason::RamTable),
        ("RAM that does not start at zero", |p| p.ram[0].start = PAGE, Reason::RamTable),
        ("RAM in half pages", |p| p.ram[0].end += 0x800, Reason::RamTable),
        ("RAM out of order", |p| p.ram.swap(0, 1), Reason::RamTable),
        ("overlapping RAM", |p| p.ram[1].start = TOP - PAGE, Reason::RamTable),
        ("RAM beyond the address space", |p| p.ram[1].end = 1 << 47, Reason::RamTable),
        ("RAM that wraps", |p| p.ram[1].end = PAGE, Reason::RamTable),
        ("launch pages outside of RAM", |p| p.excluded.push(TOP..TOP + PAGE), Reason::ExcludedTable),
        ("stage0 half covered", |p| p.excluded[1].end = layout::IMAGE + PAGE, Reason::ExcludedTable),
        ("CPUID page not covered", |p| p.excluded[0].start += PAGE, Reason::ExcludedTable),
        (
            "launch page in scratch memory",
            |p| p.excluded.insert(0, layout::WORK..layout::WORK + PAGE),
            Reason::ExcludedTable,
        ),
        ("GHCB page not first", |p| p.staging.rotate_left(1), Reason::StagingTable),
        ("staging in small pages", |p| p.staging[1].end += PAGE, Reason::StagingTable),
        ("staging outside of RAM", |p| p.staging[1] = TOP..TOP + LARGE, Reason::StagingTable),
        ("staging above 4 GiB", |p| p.staging.push(4 << 30..(4 << 30) + LARGE), Reason::StagingTable),
        (
            "launch page in staging memory",
            |p| p.excluded.push(5 * LARGE..5 * LARGE + PAGE),
            Reason::StagingTable,
        ),
        ("empty item", |p| p.items[0].len = 0, Reason::ItemTable),
        ("item longer than its memory", |p| p.items[0].mem_len = 1, Reason::ItemTable),
        (
            "item that wraps",
            |p| (p.items[0].len, p.items[0].mem_len) = (u64::MAX, u64::MAX),
            Reason::ItemTable,
        ),
        ("item from private memory", |p| p.items[0].source = 7 * LARGE, Reason::ItemSource),
        (
            "item from the GHCB page",
            |p| (p.items[1].source, p.items[1].len) = (layout::GHCB, 8),
            Reason::ItemSource,
        ),
        ("item onto staging memory", |p| p.items[0].target = 5 * LARGE, Reason::ItemTarget),
        ("item onto stage0", |p| p.items[1].target = layout::INPUTS, Reason::ItemTarget),
        ("item onto the page tables", |p| p.items[1].target = layout::WORK, Reason::ItemTarget),
        ("item onto the EFI tables", |p| p.items[1].target = layout::EFI_TABLES, Reason::ItemTarget),
        ("item onto another", |p| p.items[1].target = KERNEL + 0x1000, Reason::ItemTarget),
        ("item outside of RAM", |p| p.items[1].target = TOP, Reason::ItemTarget),
        ("entry outside of the kernel", |p| p.entry = KERNEL + 0x10_0000, Reason::EntryPoint),
        ("entry in other data", |p| p.entry = 0x7000, Reason::EntryPoint),
        ("boot_params in the kernel", |p| p.boot_params = KERNEL, Reason::ItemTable),
        ("accept list without low memory", |p| p.accept = Some(vec![LARGE..TOP]), Reason::AcceptTable),
        ("accept list without staging", |p| p.accept = Some(vec![0..2 * LARGE]), Reason::AcceptTable),
        ("accept list outside of RAM", |p| p.accept = Some(vec![0..TOP + LARGE]), Reason::AcceptTable),
        ("item that is not accepted", |p| p.accept = Some(vec![0..6 * LARGE]), Reason::ItemTarget),
    ];
    for (name, change, reason) in cases {
        let mut page = good();
        change(&mut page);
        assert_eq!(check(&page), Err(*reason), "{name}");
    }
    let mut bytes = good().encode().unwrap();
    bytes[ITEMS] = 99;
    assert_eq!(Inputs(&bytes).check(layout::IMAGE_END), Err(Reason::ItemTable), "unknown kind");
    for (at, value) in [(0, 0), (24, 2), (RAM.count, 5), (EXCLUDED.count, 5), (ITEM_COUNT, 17), (40, 1)] {
        let mut bytes = good().encode().unwrap();
        bytes[at] = value;
        assert_eq!(Inputs(&bytes).check(layout::IMAGE_END), Err(Reason::InputsHeader), "byte {at}");
    }
}

/// `boot_params` with one e820 entry and a `setup_data` list that begins at `first`.
fn boot_params(map: (u64, u64, u32), first: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    page[e820::ENTRIES] = 1;
    let entry: Vec<u8> = [&map.0.to_le_bytes()[..], &map.1.to_le_bytes(), &map.2.to_le_bytes()].concat();
    page[e820::TABLE..e820::TABLE + entry.len()].copy_from_slice(&entry);
    page[e820::SETUP_DATA..e820::SETUP_DATA + 8].copy_from_slice(&first.to_le_bytes());
    page
}

#[test]
fn a_memory_map_that_gives_the_efi_tables_or_the_ghcb_page_away_is_refused() {
    let page = good().encode().unwrap();
    let check = |start: u64, len: u64| e820::check(&boot_params((start, len, 1), 0), Inputs(&page));
    assert_eq!(check(layout::GHCB, PAGE), Err(Reason::E820CoversStage0));
    assert_eq!(check(layout::EFI_TABLES + PAGE, 1), Err(Reason::E820CoversStage0));
    assert_eq!(check(layout::BLOCK_END, PAGE), Ok(()));
    assert_eq!(check(0, layout::BLOCK), Ok(()));
}

#[test]
fn a_setup_data_list_stays_in_measured_boot_data_ends_and_leaves_the_map_alone() {
    // The element of the image builder: Linux's SETUP_CC_BLOB with 12 bytes.
    const AT: u64 = 0x7800;
    let page = good().encode().unwrap();
    let walk = |first: u64, next: u64, kind: u32, len: u32| {
        let element = [&next.to_le_bytes()[..], &kind.to_le_bytes(), &len.to_le_bytes()].concat();
        e820::check_setup_data(&boot_params((0, PAGE, 1), first), Inputs(&page), |_| &*element.clone().leak())
    };
    assert_eq!(walk(0, 0, 0, 0), Ok(()), "no list");
    assert_eq!(walk(AT, 0, 7, 12), Ok(()));
    assert_eq!(walk(0x8000 - 16, 0, 9, 0), Ok(()), "up to the end of the item");
    let cases: [(&str, u64, u64, u32, u32); 7] = [
        ("adds to the map", AT, 0, 1, 20),
        ("a circle", AT, AT, 7, 12),
        ("outside of every item", 0x9000, 0, 7, 12),
        ("in the kernel's item", KERNEL, 0, 7, 12),
        ("header beyond the item", 0x8000 - 15, 0, 7, 0),
        ("contents beyond the item", 0x8000 - 16, 0, 7, 1),
        ("an address that wraps", u64::MAX - 3, 0, 7, u32::MAX),
    ];
    for (name, first, next, kind, len) in cases {
        assert_eq!(walk(first, next, kind, len), Err(Reason::SetupData), "{name}");
    }
    assert_eq!(walk(AT, 0x9000, 7, 12), Err(Reason::SetupData), "the second element");
}

#[test]
fn arithmetic_holds_at_the_ends_of_its_range() {
    // stage0 is built without overflow checks, so what checks these numbers must not wrap.
    let extremes = [0, 1, PAGE - 1, PAGE, 1 << 46, 1 << 63, u64::MAX - PAGE, u64::MAX - 1, u64::MAX];
    for a in extremes {
        for b in extremes {
            let spans: [(&str, Change); 5] = [
                ("RAM", |p, a, b| p.ram[1] = a..b),
                ("launch pages", |p, a, b| p.excluded[1] = a..b),
                ("staging", |p, a, b| p.staging[1] = a..b),
                ("source", |p, a, b| (p.items[0].source, p.items[0].len, p.items[0].mem_len) = (a, b, b)),
                ("target", |p, a, b| (p.items[0].target, p.items[0].mem_len) = (a, b)),
            ];
            for (name, change) in spans {
                let mut page = good();
                change(&mut page, a, b);
                // An empty second range of RAM would be the only one of these to pass; it is refused like the
                // others.
                assert!(check(&page).is_err(), "{name} {a:#x} {b:#x}");
            }
            let inputs = good().encode().unwrap();
            let map = e820::check(&boot_params((a, b, 1), 0), Inputs(&inputs));
            let good = b != 0 && a.checked_add(b).is_some_and(|end| end <= layout::BLOCK);
            assert_eq!(map.is_ok(), good, "e820 {a:#x} {b:#x}");
        }
    }
}

#[test]
fn lists_that_do_not_fit_the_page_are_named() {
    let page = InputsPage { ram: vec![0..PAGE; 5], ..good() };
    assert_eq!(page.encode(), Err(TooMany { what: "RAM ranges", room: 4, needed: 5 }));
    assert!(ITEMS + inputs::ITEMS_MAX * ITEM_LEN <= PAGE as usize);
}

#[test]
fn the_layout_is_the_one_of_the_image_builder_and_of_the_linker_script() {
    use crate::board::layout as image;
    assert_eq!((layout::CPUID, layout::SECRETS), (image::CPUID, image::SECRETS));
    const {
        assert!(image::RESERVED <= layout::BLOCK && layout::BLOCK_END <= image::ACPI);
        assert!(image::SETUP_DATA + PAGE <= layout::INPUTS);
    }
    assert!(image::CMDLINE + u64::from(image::CMDLINE_LIMIT) < layout::UNACCEPTED);
    assert!(BUILT.image.len() as u64 <= layout::IMAGE_END - layout::IMAGE);
    assert_eq!(BUILT.entry, layout::IMAGE);
}

#[test]
fn reasons_have_distinct_codes_and_the_msr_value_of_the_ghcb_specification() {
    let mut codes: Vec<u8> = Reason::ALL.iter().map(|reason| *reason as u8).collect();
    codes.dedup();
    assert_eq!(codes.len(), Reason::ALL.len());
    // Set 3 in bits 15:12, code 0x20 in bits 23:16, request 0x100.
    assert_eq!(Reason::HashKernel.msr(), 0x0020_3100);
}

#[test]
fn every_reason_is_documented_with_its_code() {
    let text = include_str!("../../docs/stage0.md");
    for reason in Reason::ALL {
        let row = format!("| 3:{0} ({0:#04x}) | {1} |", *reason as u8, reason.words());
        assert!(text.contains(&row), "docs/stage0.md lacks: {row}");
    }
}

/// The pages that stage0 validates one way or another, by the obvious way: a set of addresses.
fn pages(spans: impl IntoIterator<Item = Span>) -> std::collections::BTreeSet<u64> {
    spans.into_iter().flat_map(|span| (span.start..span.end).step_by(PAGE as usize)).collect()
}

proptest! {
    #[test]
    fn hostile_input_pages_are_refused_or_used_without_a_panic(
        edits in prop::collection::vec((0..PAGE as usize, any::<u8>()), 0..200),
        from_good in any::<bool>(),
    ) {
        let mut bytes = if from_good { good().encode().unwrap() } else { vec![0; PAGE as usize] };
        for (at, value) in edits {
            bytes[at] = value;
        }
        let inputs = Inputs(&bytes);
        let _ = inputs.check(layout::IMAGE_END);
        let _ = inputs.items().count();
        for span in inputs.spans(RAM) {
            let mut at = span.start;
            for _ in 0..100 {
                let Some(piece) = inputs.next_piece(span, at) else { break };
                prop_assert!(at <= piece.start && piece.start < piece.end && piece.end <= span.end);
                at = piece.end;
            }
        }
        let _ = e820::check(&bytes, inputs);
        let element = bytes.get(..16).unwrap_or(&[]);
        let _ = e820::check_setup_data(&bytes, inputs, |_| element);
    }

    #[test]
    fn pieces_holes_and_nothing_else_make_up_ram(
        staging in 1u64..12, staging_len in 1u64..8, extra in prop::option::of(0x100u64..0x200), odd in 0u64..5,
    ) {
        let mut page = good();
        page.ram = vec![0..TOP + odd * PAGE];
        page.staging[1] = staging * LARGE..(staging + staging_len) * LARGE;
        if let Some(extra) = extra {
            page.excluded.push(extra * PAGE..(extra + 1) * PAGE);
        }
        let bytes = page.encode().unwrap();
        let inputs = Inputs(&bytes);
        prop_assume!(!matches!(inputs.check(layout::IMAGE_END), Err(Reason::StagingTable | Reason::ExcludedTable)));
        let ram = inputs.spans(RAM).next().unwrap();
        let (mut found, mut at) = (std::collections::BTreeSet::new(), 0);
        while let Some(piece) = inputs.next_piece(ram, at) {
            for gpa in pages([piece]) {
                prop_assert!(found.insert(gpa), "{:#x} twice", gpa);
            }
            at = piece.end;
        }
        let work = Span { start: layout::WORK, end: layout::WORK_END };
        let holes = pages(inputs.spans(EXCLUDED).chain(inputs.spans(STAGING)).chain([work]));
        prop_assert!(found.is_disjoint(&holes));
        let all: std::collections::BTreeSet<u64> = found.union(&holes).copied().collect();
        prop_assert_eq!(all, pages([ram]));
    }
}

/// The bits that are set in a table of unaccepted memory, read as Linux's documentation of the table
/// describes it.
fn unaccepted_units(table: &[u8]) -> Vec<u64> {
    let number =
        |at: usize, len: usize| table[at..at + len].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    assert_eq!((number(0, 4), number(4, 4), number(8, 8)), (1, LARGE, 0), "version, unit size, base");
    let bytes = number(16, 8);
    assert_eq!(bytes % 8, 0);
    (0..bytes * 8).filter(|unit| table[24 + (unit / 8) as usize] >> (unit % 8) & 1 == 1).collect()
}

fn lazy(accept: Vec<Range<u64>>) -> InputsPage {
    InputsPage { accept: Some(accept), ..good() }
}

fn unaccepted(page: &InputsPage) -> Result<Vec<u64>, Reason> {
    let bytes = page.encode().unwrap();
    assert_eq!(Inputs(&bytes).check(layout::IMAGE_END), Ok(()));
    let mut table = vec![0; (layout::UNACCEPTED_END - layout::UNACCEPTED) as usize];
    efi::unaccepted(&mut table, Inputs(&bytes))?;
    Ok(unaccepted_units(&table))
}

#[test]
fn the_unaccepted_table_is_the_complement_of_what_was_validated() {
    // 64 MiB of low RAM, of which [0, 20 MiB) and [24, 26 MiB) are validated, and one GiB from 4 GiB on.
    let units = unaccepted(&lazy(vec![0..10 * LARGE, 12 * LARGE..13 * LARGE])).unwrap();
    let expected: Vec<u64> = [10, 11].into_iter().chain(13..32).chain(2048..2560).collect();
    assert_eq!(units, expected, "the device gap below 4 GiB has no bit");
}

#[test]
fn a_unit_that_is_validated_in_part_is_refused() {
    let page = lazy(vec![0..10 * LARGE + PAGE]);
    assert_eq!(unaccepted(&page), Err(Reason::AcceptTable));
    let mut page = lazy(vec![0..10 * LARGE]);
    page.ram[0].end += PAGE;
    assert_eq!(unaccepted(&page), Err(Reason::AcceptTable), "an end of RAM within a unit must be validated");
    page.accept = Some(vec![0..10 * LARGE, TOP..TOP + PAGE]);
    assert!(!unaccepted(&page).unwrap().contains(&32));
}

#[test]
fn more_memory_than_the_bitmap_has_bits_for_is_refused() {
    let mut page = lazy(vec![0..10 * LARGE]);
    page.ram[1].end = 2 << 40;
    assert_eq!(unaccepted(&page), Err(Reason::LazyTables));
}

#[test]
fn the_memory_map_offers_only_validated_memory_to_the_decompressor() {
    let bytes = lazy(vec![0..10 * LARGE]).encode().unwrap();
    let mut boot_params = vec![0; PAGE as usize];
    let map: [(u64, u64, u32); 4] =
        [(0, 0x8_0000, 1), (0x8_0000, 0x1_0000, 2), (0x9_0000, 0x1_0000, 3), (0x10_0000, TOP - 0x10_0000, 1)];
    boot_params[0x1e8] = map.len() as u8;
    for (i, (start, len, kind)) in map.iter().enumerate() {
        let entry = &mut boot_params[0x2d0 + i * 20..];
        entry[..8].copy_from_slice(&start.to_le_bytes());
        entry[8..16].copy_from_slice(&len.to_le_bytes());
        entry[16..20].copy_from_slice(&kind.to_le_bytes());
    }
    let mut tables = vec![0; (layout::EFI_TABLES_END - layout::EFI_TABLES) as usize];
    efi::announce(&mut tables, &mut boot_params, Inputs(&bytes)).unwrap();

    // As Linux's struct efi_info has it: signature, system table, descriptor size and version, map, its size,
    // upper halves.
    let word = |at: usize| u32::from_le_bytes(boot_params[at..at + 4].try_into().unwrap()) as u64;
    assert_eq!(&boot_params[0x1c0..0x1c4], b"EL64");
    assert_eq!((word(0x1c4), word(0x1c8), word(0x1cc)), (layout::EFI_TABLES, 40, 1));
    assert_eq!((word(0x1d8), word(0x1dc)), (0, 0));
    assert_eq!(&tables[..8], b"IBI SYST");
    let long = |at: usize| u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
    assert_eq!(long(104) as u32, 1, "one configuration table");
    let configuration = (long(112) - layout::EFI_TABLES) as usize;
    assert_eq!(tables[configuration..configuration + 16], efi::UNACCEPTED_GUID);
    assert_eq!(long(configuration + 16), layout::UNACCEPTED);
    assert_eq!((long(88), long(96)), (0, 0), "no runtime services, no boot services");

    let start = (word(0x1d0) - layout::EFI_TABLES) as usize;
    let descriptors: Vec<(u64, u64, u32)> = (start..start + word(0x1d4) as usize)
        .step_by(40)
        .map(|at| {
            assert_eq!(
                (long(at + 16), long(at + 32)),
                (0, 8),
                "no virtual address, write-back, no RUNTIME attribute"
            );
            (long(at + 8), long(at + 24) * PAGE, long(at) as u32)
        })
        .collect();
    let expected = [
        (0, 0x8_0000, 7),
        (0x8_0000, 0x1_0000, 0),
        (0x9_0000, 0x1_0000, 9),
        (0x10_0000, 10 * LARGE - 0x10_0000, 7),
        (10 * LARGE, TOP - 10 * LARGE, 2),
    ];
    assert_eq!(descriptors, expected);
}

proptest! {
    #[test]
    fn no_accept_list_makes_the_efi_tables_panic_or_offer_validated_memory(
        edits in prop::collection::vec((0..448usize, any::<u8>()), 0..40), units in 5u64..30,
    ) {
        let mut bytes = lazy(vec![0..units * LARGE]).encode().unwrap();
        for (at, value) in edits {
            bytes[at] = value;
        }
        let inputs = Inputs(&bytes);
        let mut table = vec![0; (layout::UNACCEPTED_END - layout::UNACCEPTED) as usize];
        let mut tables = vec![0; (layout::EFI_TABLES_END - layout::EFI_TABLES) as usize];
        let done = efi::unaccepted(&mut table, inputs);
        let _ = efi::announce(&mut tables, &mut bytes.clone(), inputs);
        if inputs.check(layout::IMAGE_END).is_ok() && inputs.lazy() && done.is_ok() {
            for unit in unaccepted_units(&table) {
                let span = Span { start: unit * LARGE, end: (unit + 1) * LARGE };
                prop_assert!(inputs.inside(RAM, span) && !inputs.touches(inputs::ACCEPT, span));
                prop_assert!(!inputs.touches(EXCLUDED, span) && !inputs.touches(STAGING, span));
            }
        }
    }
}
