// SPDX-License-Identifier: Apache-2.0
//! What a guest, or a host towards its guest, hands over: GHCB pages and MSR values, save areas, CPUID pages,
//! stage0's inputs.

use snp::ghcb::msr;
use snp::ghcb::page;
use snp::ghcb::page::Field;
use snp::ghcb::psc;
use snp::ghcb::term;
use snp::pages::cpuid::PageEntry;
use snp::pages::cpuid::decode_page;
use snp::pages::cpuid::encode_page;
use snp::pages::cpuid_diff::CpuidDiff;
use snp::pages::secrets::SecretsPage;
use snp::stage0::InputsPage;
use snp::stage0::e820;
use snp::stage0::inputs;
use snp::stage0::inputs::Inputs;
use snp::stage0::inputs::Item;
use snp::stage0::inputs::Kind;
use snp::stage0::layout;
use snp::vmsa::VmsaState;
use snp_model::nae;

use crate::driver::Seed;
use crate::driver::Target;
use crate::driver::no_repair;
use crate::text;

/// The page at the start of an input; what is missing is zero.
fn page_of(bytes: &[u8]) -> [u8; 4096] {
    let mut page = [0; 4096];
    page.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    page
}

#[test]
fn ghcb_page() {
    // One valid page for each event that cvmm knows, by the exit codes of the GHCB specification, table 7.
    let seeds = [0x27u64, 0x6c, 0x6e, 0x72, 0x77, 0x7b, 0x7c, 0x81, 0x89, 0x400, 0x8000_0001, 0x8000_0002]
        .into_iter()
        .chain([0x8000_0003, 0x8000_0010, 0x8000_0011, 0x8000_0012, 0x8000_0013, 0x8000_fffd])
        .map(|code| {
            let mut page = [0; 4096];
            for (field, value) in [
                (Field::ExitCode, code),
                (Field::ExitInfo1, if code == 0x7b { 0x3f8_0011 } else { 0x1000 }),
                (Field::ExitInfo2, 0x2000),
                (Field::Scratch, 0x3000),
                (Field::Rax, 0),
                (Field::Rbx, 0x4000),
                (Field::Rcx, 1),
                (Field::Rdx, 0),
                (Field::Cpl, 0),
                (Field::Xcr0, 7),
            ] {
                page::set(&mut page, field, value);
            }
            page
        })
        .filter(|page| nae::parse(page).1.is_ok())
        .map(|page| Seed::with_fields(page, [0x1f8..0x200, 0x308..0x338, 0x390..0x400, 0xff0..0x1000]))
        .collect::<Vec<_>>();
    assert!(seeds.len() >= 10, "only {} of the events are valid", seeds.len());
    Target {
        name: "ghcb-page",
        seeds,
        repair: no_repair,
        parse: &|bytes| nae::parse(&page_of(bytes)).1.map(drop).map_err(|why| format!("{why:?}")),
        says: &[],
    }
    .run();
}

#[test]
fn ghcb_msr_and_page_state_change() {
    let entries: Vec<u8> = (0..20u64).flat_map(|i| (i << 12 | ((i % 3) << 52)).to_le_bytes()).collect();
    let header = psc::Header { current: 0, end: 19 }.encode();
    Target {
        name: "ghcb-msr",
        seeds: vec![Seed::with_fields([&header[..], &entries].concat(), [0..8, 8..168])],
        repair: no_repair,
        parse: &|bytes| {
            for word in bytes.as_chunks::<8>().0 {
                let value = u64::from_le_bytes(*word);
                let (request, entry) = (msr::Request::decode(value), psc::Entry::decode(value));
                assert_eq!(msr::Request::decode(request.encode()), request, "what was understood is written");
                let _ = (
                    entry.pages(),
                    entry.encode(),
                    term::SevTerm::decode(value).to_string(),
                    psc::Header::decode(*word),
                );
            }
            Ok(())
        },
        says: &[],
    }
    .run();
}

#[test]
fn save_area() {
    let state = VmsaState { cr0: 0x31, rip: 0x10_0000, ..VmsaState::reset() };
    Target {
        name: "save-area",
        seeds: vec![
            Seed::with_fields(state.encode(), [0..0xa0, 0xcb..0x200, 0x3b0..0x3f0]),
            Seed::new(VmsaState::reset().encode()),
        ],
        repair: no_repair,
        parse: &|bytes| {
            let page = page_of(bytes);
            let state = VmsaState::decode(&page).map_err(text)?;
            assert_eq!(state.encode(), page, "what is loaded is all that is there");
            Ok(())
        },
        says: &["offset 0x"],
    }
    .run();
}

#[test]
fn cpuid_page() {
    let leaf = |eax_in, ecx_in| PageEntry {
        eax_in,
        ecx_in,
        xcr0_in: u64::from(eax_in == 0xd),
        xss_in: 0,
        eax: 0x10,
        ebx: 0x756e_6547,
        ecx: u32::MAX,
        edx: 0x178b_fbff,
    };
    let page = encode_page(&[leaf(0, 0), leaf(1, 0), leaf(7, 0), leaf(0xd, 0), leaf(0xd, 1)]).unwrap();
    Target {
        name: "cpuid-page",
        seeds: vec![Seed::with_fields(page, [0..16, 16..256])],
        repair: no_repair,
        parse: &|bytes| {
            let returned = page_of(bytes);
            let diff = CpuidDiff::new(&page, &returned).map_err(text)?;
            assert_eq!(
                diff.differences.is_empty() && !diff.structure,
                returned == page,
                "a change goes unnoticed"
            );
            let _ = (diff.is_acceptable(), decode_page(&returned), SecretsPage::decode(&returned));
            Ok(())
        },
        says: &["offset 0 is"],
    }
    .run();
}

/// Inputs of a small guest that stage0 takes.
fn inputs_page() -> InputsPage {
    const LARGE: u64 = layout::LARGE;
    let item = |kind, source, target, len| Item { kind, source, target, len, mem_len: len, hash: [0; 48] };
    InputsPage {
        entry: (16 << 20) + 0x200,
        boot_params: 0x7000,
        ram: vec![0..64 << 20, 4 << 30..5 << 30],
        excluded: vec![layout::CPUID..layout::SECRETS + layout::PAGE, layout::INPUTS..layout::IMAGE_END],
        staging: vec![layout::GHCB..layout::GHCB + layout::PAGE, 4 * LARGE..6 * LARGE],
        accept: None,
        items: vec![
            item(Kind::Kernel, 4 * LARGE, 16 << 20, 0x10_0000),
            item(Kind::BootData, 5 * LARGE, 0x7000, 0x1000),
        ],
    }
}

#[test]
fn stage0_inputs() {
    let lazy = InputsPage {
        accept: Some(vec![0..4 * layout::LARGE, 8 * layout::LARGE..10 * layout::LARGE]),
        ..inputs_page()
    };
    let seeds = [inputs_page(), lazy].map(|page| page.encode().unwrap());
    let seeds: Vec<Vec<u8>> =
        seeds.into_iter().filter(|page| Inputs(page).check(layout::IMAGE_END).is_ok()).collect();
    Target {
        name: "stage0-inputs",
        seeds: seeds.into_iter().map(|page| Seed::with_fields(page, [0..256, 0..1024])).collect(),
        repair: no_repair,
        parse: &|bytes| {
            let page = page_of(bytes);
            let inputs = Inputs(&page);
            let answer = inputs.check(layout::IMAGE_END);
            let _ = inputs.items().count();
            for span in inputs.spans(inputs::RAM) {
                let mut at = span.start;
                for _ in 0..50 {
                    let Some(piece) = inputs.next_piece(span, at) else { break };
                    assert!(at <= piece.start && piece.start < piece.end && piece.end <= span.end);
                    at = piece.end;
                }
            }
            let _ = e820::check(&page, inputs);
            let element = page.get(..16).unwrap_or(&[]);
            let _ = e820::check_setup_data(&page, inputs, |_| element);
            answer.map_err(|reason| format!("{reason:?}"))
        },
        says: &[],
    }
    .run();
}
