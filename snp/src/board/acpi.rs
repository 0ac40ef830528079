// SPDX-License-Identifier: Apache-2.0
//! The ACPI tables: processors, interrupt controllers, serial port, clock, power-off and reset.
//!
//! ACPI specification 6.5, chapter 5. SNP guests read neither MP tables nor ROMs, so processors and the
//! IOAPIC are known only from here. The fixed hardware is the smallest that Linux takes for a complete
//! machine: no SMI command (ACPI mode is always on), no power-management timer, no events.
//!
//! IRQ 0 keeps its number, as in KVM's default routing; there is no override to pin 2.

mod ppi;
pub mod tpm;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::FADTBuilder;
use acpi_tables::fadt::Flags;
use acpi_tables::gas::AccessSize;
use acpi_tables::gas::AddressSpace;
use acpi_tables::gas::GAS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::Board;
use super::layout;

const OEM_ID: [u8; 6] = *b"CVMM  ";
const OEM_TABLE_ID: [u8; 8] = *b"CVMMTBL ";
const OEM_REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH`: ISA devices yes, keyboard controller no, VGA no.
const BOOT_ARCH: u16 = 1 | 1 << 2;

/// A system table from its signature and what follows the header.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut sdt = Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// Descriptor of one ISA interrupt: edge-triggered, active high, exclusive. ACPI 6.5, section 6.4.2.1.
struct IsaIrq(u8);

impl Aml for IsaIrq {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.byte(0x22);
        sink.word(1 << self.0);
    }
}

fn dsdt(board: &Board) -> Vec<u8> {
    let mut body = Vec::new();
    let s5 = aml::Package::new(vec![&board.power.soft_off, &0u8, &0u8, &0u8]);
    aml::Name::new("_S5_".into(), &s5).to_aml_bytes(&mut body);

    for (name, id, device) in [("_SB_.COM1", "PNP0501", &board.serial), ("_SB_.RTC0", "PNP0B00", &board.rtc)]
    {
        let port = device.ports.start;
        let resources = (aml::IO::new(port, port, 1, device.ports.len() as u8), IsaIrq(device.irq));
        let resources = aml::ResourceTemplate::new(vec![&resources.0, &resources.1]);
        aml::Device::new(
            name.into(),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new(id)),
                &aml::Name::new("_UID".into(), &0u8),
                &aml::Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(&mut body);
    }
    for cpu in 0..board.vcpus {
        aml::Device::new(
            format!("_SB_.C{cpu:03X}").as_str().into(),
            vec![&aml::Name::new("_HID".into(), &"ACPI0007"), &aml::Name::new("_UID".into(), &cpu)],
        )
        .to_aml_bytes(&mut body);
    }
    if let Some(tpm) = &board.tpm {
        tpm::device(tpm, &mut body);
    }
    table(*b"DSDT", 2, &body)
}

/// Multiple APIC description table: ACPI 6.5, section 5.2.12. APIC id = vCPU id.
pub(crate) fn madt(board: &Board) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    let mut body = Vec::new();
    body.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..board.vcpus {
        // Type 0, local APIC. At most 255 vCPUs, so ids fit in a byte.
        body.extend_from_slice(&[0, 8, id as u8, id as u8]);
        body.extend_from_slice(&ENABLED.to_le_bytes());
    }
    // Type 1, IOAPIC 0, interrupts from 0.
    body.extend_from_slice(&[1, 12, 0, 0]);
    body.extend_from_slice(&layout::IOAPIC.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // Type 2, override: the SCI keeps its number and is active high (1), level-triggered (3 << 2).
    body.extend_from_slice(&[2, 10, 0, board.power.sci]);
    body.extend_from_slice(&u32::from(board.power.sci).to_le_bytes());
    body.extend_from_slice(&0x000du16.to_le_bytes());
    // Type 4, local NMI: every processor's LINT1.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    table(*b"APIC", 4, &body)
}

fn fadt(board: &Board, facs: u64, dsdt: u64) -> Vec<u8> {
    let ports = |ports: &Range<u16>, access| {
        GAS::new(AddressSpace::SystemIo, ports.len() as u8 * 8, 0, access, u64::from(ports.start))
    };
    let (events, control) = (&board.power.events, &board.power.control);
    let keyboard = board.reset.keyboard..board.reset.keyboard + 1;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = u16::from(board.power.sci).into();
    fadt.pm1a_evt_blk = u32::from(events.start).into();
    fadt.pm1_evt_len = events.len() as u8;
    fadt.x_pm1a_evt_blk = ports(events, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(control.start).into();
    fadt.pm1_cnt_len = control.len() as u8;
    fadt.x_pm1a_cnt_blk = ports(control, AccessSize::WordAccess);
    // No C2, no C3.
    fadt.p_lvl2_lat = 0x0fff.into();
    fadt.p_lvl3_lat = 0x0fff.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = ports(&keyboard, AccessSize::ByteAccess);
    fadt.reset_value = board.reset.keyboard_pulse;
    bytes(&fadt.finalize())
}

/// All tables as they lie from [`layout::ACPI`] on; the root pointer is first.
pub fn tables(board: &Board) -> Vec<u8> {
    let mut area = vec![0; 64];
    let mut place = |table: &[u8]| {
        // The FACS must be 64-byte aligned; the others do not mind.
        area.resize(area.len().next_multiple_of(64), 0);
        let address = layout::ACPI + area.len() as u64;
        area.extend_from_slice(table);
        address
    };
    let facs = place(&bytes(&FACS::new()));
    let dsdt = place(&dsdt(board));
    let fadt = place(&fadt(board, facs, dsdt));
    let madt = place(&madt(board));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Some(tpm) = &board.tpm {
        let log = place(&tpm.log);
        xsdt.add_entry(place(&table(*b"TPM2", 4, &tpm::body(tpm, log))));
    }
    let xsdt = place(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    area[..rsdp.len()].copy_from_slice(&rsdp);
    area
}
