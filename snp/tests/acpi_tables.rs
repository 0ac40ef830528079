// SPDX-License-Identifier: Apache-2.0
//! The ACPI tables of a direct boot, read by the specification and by the reference compiler.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::process::Command;

use snp::board::Board;
use snp::board::acpi;

/// ACPI 6.5, section 5.2: lengths, checksums, and the way from the root pointer to each table.
#[test]
fn acpi_tables_are_linked_and_sum_to_zero() {
    let area = acpi::tables(&Board::new(512 << 20, 255));
    assert!(area.len() <= 0x1_0000, "they fit below 640 KiB");
    let word =
        |at: usize, len: usize| area[at..at + len].iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    let at = |gpa: u64| usize::try_from(gpa - 0x9_0000).unwrap();
    let sum = |at: usize, len: usize| area[at..at + len].iter().fold(0u8, |s, b| s.wrapping_add(*b));
    assert_eq!(&area[..8], b"RSD PTR ");
    assert_eq!((sum(0, 20), sum(0, 36)), (0, 0));
    let table = |gpa: u64, signature: &[u8]| {
        let at = at(gpa);
        assert_eq!(&area[at..at + 4], signature);
        let len = word(at + 4, 4) as usize;
        assert_eq!(sum(at, len), 0, "{}", String::from_utf8_lossy(signature));
        (at, len)
    };
    let (xsdt, len) = table(word(24, 8), b"XSDT");
    assert_eq!(len, 36 + 2 * 8);
    let (fadt, _) = table(word(xsdt + 36, 8), b"FACP");
    let (madt, madt_len) = table(word(xsdt + 44, 8), b"APIC");
    assert_eq!(word(fadt + 40, 4), word(fadt + 140, 8), "DSDT and X_DSDT");
    table(word(fadt + 140, 8), b"DSDT");
    let facs = at(word(fadt + 36, 4));
    assert_eq!((&area[facs..facs + 4], facs % 64), (&b"FACS"[..], 0));
    assert_eq!(word(fadt + 46, 2), 9, "SCI_INT");
    assert_eq!(word(fadt + 48, 4), 0, "no SMI command: ACPI mode is always on");
    assert_eq!((word(fadt + 56, 4), word(fadt + 64, 4)), (0x600, 0x604), "PM1a event and control blocks");
    assert_eq!((word(fadt + 88, 1), word(fadt + 89, 1)), (4, 2));
    // Reset register: I/O space, 8 bits, port 0x64, value 0xfe, and the flag that says so.
    assert_eq!((word(fadt + 116, 2), word(fadt + 120, 8), word(fadt + 128, 1)), (0x0801, 0x64, 0xfe));
    assert_eq!(word(fadt + 112, 4) >> 10 & 1, 1);

    let mut entries = Vec::new();
    let mut next = madt + 44;
    while next < madt + madt_len {
        entries.push((area[next], next));
        next += usize::from(area[next + 1]);
    }
    let ids: Vec<u8> = entries.iter().filter(|(kind, _)| *kind == 0).map(|(_, at)| area[at + 3]).collect();
    assert_eq!(ids, (0..255).collect::<Vec<u8>>(), "APIC id = vCPU id");
    let ioapic = entries.iter().find(|(kind, _)| *kind == 1).unwrap().1;
    assert_eq!((word(ioapic + 4, 4), word(ioapic + 8, 4)), (0xfec0_0000, 0));
    let overrides: Vec<_> = entries
        .iter()
        .filter(|(kind, _)| *kind == 2)
        .map(|(_, at)| (area[at + 3], word(at + 4, 4), word(at + 8, 2)))
        .collect();
    assert_eq!(overrides, [(9, 9, 0xd)], "the SCI alone, active high, level-triggered; IRQ 0 stays on pin 0");
}

/// The reference compiler of ACPI reads what we wrote. Skipped with a note where it is not installed
/// (acpica-tools).
#[test]
fn iasl_disassembles_the_tables_without_a_complaint() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!(
            "note: iasl is not installed (Debian package acpica-tools), so the tables are not disassembled"
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let area = acpi::tables(&Board::new(512 << 20, 3));
    for signature in [b"DSDT", b"FACP", b"APIC", b"XSDT", b"FACS"] {
        let at = area.windows(4).position(|w| w == signature).unwrap();
        let len = u32::from_le_bytes(area[at + 4..at + 8].try_into().unwrap()) as usize;
        let name = String::from_utf8_lossy(signature).to_lowercase();
        let path = dir.path().join(format!("{name}.dat"));
        std::fs::File::create(&path).unwrap().write_all(&area[at..at + len]).unwrap();
        let run = |args: &[&str], file: &std::path::Path| {
            let output = Command::new("iasl").args(args).arg(file).current_dir(dir.path()).output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            assert!(output.status.success(), "{name}: {text}");
            assert!(!text.contains("Error") || text.contains(" 0 Errors"), "{name}: {text}");
            assert!(!text.contains("rong checksum") && !text.contains("orrect checksum"), "{name}: {text}");
            text
        };
        run(&["-d"], &path);
        let source = std::fs::read_to_string(path.with_extension("dsl")).unwrap();
        if signature == b"DSDT" {
            for expected in ["Name (_S5", "PNP0501", "PNP0B00", "IRQNoFlags", "Device (_SB.C002)", "0x03F8"] {
                assert!(source.contains(expected), "{expected} in\n{source}");
            }
            let text = run(&["-ve"], &path.with_extension("dsl"));
            assert!(text.contains(" 0 Errors"), "{text}");
        }
    }
}
