// SPDX-License-Identifier: Apache-2.0
//! What a host can change without anybody looking at the launch digest: stage0 says what is wrong, and the
//! kernel never runs.

use snp::stage0::layout;
use snp::stage0::reason::Reason;

use crate::host::End;
use crate::host::Host;
use crate::rig::Change;
use crate::rig::E820;
use crate::rig::HIGH;
use crate::rig::HIGH_LEN;
use crate::rig::KERNEL;
use crate::rig::LARGE;
use crate::rig::MEMORY;
use crate::rig::PAGE;
use crate::rig::Rig;
use crate::rig::boot_params;
use crate::rig::set_e820;

fn refusal(mut rig: Rig, prepare: Change) -> End {
    rig.run(&mut Host { prepare, ..Host::default() })
}

fn terminated(host: Host) -> End {
    let mut host = host;
    Rig::new().run(&mut host)
}

#[test]
fn one_flipped_bit_in_any_staged_item_is_refused_in_its_own_words() {
    let cases: [(usize, Reason); 4] = [
        (0, Reason::HashKernel),
        (1, Reason::HashInitrd),
        (2, Reason::HashCmdline),
        (3, Reason::HashBootData),
    ];
    for (index, reason) in cases {
        for last in [false, true] {
            let mut rig = Rig::new();
            let item = rig.inputs.items[index];
            let at = if last { item.source + item.len - 1 } else { item.source };
            rig.shared.at(at, 1)[0] ^= 0x10;
            assert_eq!(rig.run(&mut Host::default()), End::Terminated(reason));
        }
    }
}

#[test]
fn one_flipped_bit_in_the_measured_hash_is_refused() {
    // On hardware the launch digest differs already; this is what happens if nobody looked at the digest.
    let mut rig = Rig::new();
    rig.inputs.items[0].hash[47] ^= 1;
    assert_eq!(rig.run(&mut Host::default()), End::Terminated(Reason::HashKernel));
}

#[test]
fn a_page_that_was_validated_before_ends_the_guest() {
    // In scratch memory, in low memory, in the middle of a large page, at the very end, in staging memory.
    let middle = 9 * LARGE + 5 * PAGE;
    for gpa in [layout::WORK, 0x1000, middle, HIGH + HIGH_LEN - PAGE] {
        let mut rig = Rig::new();
        rig.validated[(gpa / PAGE) as usize] = true;
        assert_eq!(rig.run(&mut Host::default()), End::Terminated(Reason::AlreadyValidated), "{gpa:#x}");
    }
}

#[test]
fn a_cpuid_page_without_a_usable_leaf_is_refused() {
    let cases: [(Change, Reason); 5] = [
        (|rig| rig.private.at(layout::CPUID, 4).fill(0), Reason::CpuidPage),
        (|rig| rig.private.at(layout::CPUID, 1)[0] = 65, Reason::CpuidPage),
        (|rig| rig.private.at(layout::CPUID, 1)[0] = 1, Reason::CpuidPage),
        (|rig| rig.private.at(layout::CPUID + 16 + 48 + 24, 1)[0] = 0xa, Reason::CpuidPage),
        (|rig| rig.private.at(layout::CPUID + 16 + 48 + 28, 1)[0] = 31, Reason::CbitRange),
    ];
    for (prepare, reason) in cases {
        assert_eq!(refusal(Rig::new(), prepare), End::Terminated(reason));
    }
}

#[test]
fn inputs_that_would_have_stage0_write_over_itself_are_refused() {
    let cases: [(Change, Reason); 5] = [
        (|rig| rig.private.at(layout::INPUTS, 1)[0] = 0, Reason::InputsHeader),
        (|rig| rig.inputs.items[1].target = layout::IMAGE, Reason::ItemTarget),
        (|rig| rig.inputs.items[1].target = layout::WORK, Reason::ItemTarget),
        (|rig| rig.inputs.items[1].source = KERNEL, Reason::ItemSource),
        (|rig| rig.inputs.excluded.truncate(1), Reason::ExcludedTable),
    ];
    for (change, reason) in cases {
        let prepare: Change = |_| {};
        let mut rig = Rig::new();
        if reason == Reason::InputsHeader {
            assert_eq!(refusal(rig, change), End::Terminated(reason));
        } else {
            change(&mut rig);
            assert_eq!(refusal(rig, prepare), End::Terminated(reason));
        }
    }
}

#[test]
fn a_memory_map_that_lies_is_refused_inside_the_guest() {
    let ram = (0, 0x8_0000, 1);
    let cases: [(&[E820], Reason); 8] = [
        (&[], Reason::E820Count),
        (&[ram, (layout::GHCB, PAGE, 1)], Reason::E820CoversStage0),
        (&[ram, (0x7_f000, 0x2000, 2)], Reason::E820Overlap),
        (&[ram, (u64::MAX - 0xfff, 0x2000, 1)], Reason::E820Overflow),
        (&[ram, (0x10_0000, MEMORY, 1)], Reason::E820NotRam),
        (&[ram, (3 << 30, 0x1000, 3)], Reason::E820NotRam),
        (&[ram, (0x8_0000, 0x1_0000, 1)], Reason::E820CoversStage0),
        (&[ram, (0x8_0000, 0x1_0000, 7)], Reason::E820Type),
    ];
    for (map, reason) in cases {
        let mut page = boot_params();
        page[0x2d0..].fill(0);
        set_e820(&mut page, map);
        assert_eq!(refusal(Rig::with(page), |_| {}), End::Terminated(reason));
    }
    // The same by a list of setup_data that leads out of what was measured.
    let mut page = boot_params();
    page[0x250..0x258].copy_from_slice(&0x9000u64.to_le_bytes());
    assert_eq!(refusal(Rig::with(page), |_| {}), End::Terminated(Reason::SetupData));
}

#[test]
fn a_hypervisor_that_breaks_the_protocol_ends_the_guest() {
    let bad_version = Host { sev_info: 1 << 48 | 1 << 32 | 1, ..Host::default() };
    assert_eq!(terminated(bad_version), End::Terminated(Reason::GhcbVersion));
    let error = Host { psc_error: true, ..Host::default() };
    assert_eq!(terminated(error), End::Terminated(Reason::PageStateChange));
}
