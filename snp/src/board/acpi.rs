// SPDX-License-Identifier: Apache-2.0
//! The ACPI tables: processors, interrupt controllers, serial port, clock, power-off and reset.
//!
//! ACPI specification 6.5, chapter 5. SNP guests read neither MP tables nor ROMs, so processors and the IOAPIC are known
//! only from here. The fixed hardware is the smallest that Linux takes for a complete machine: no SMI command (ACPI mode is
//! always on), no power-management timer, no events. The device that implements the ports uses the constants below.
//!
//! IRQ 0 keeps its number, as in KVM's default routing; there is no override to pin 2.

mod ppi;
pub mod tpm;

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

use self::tpm::Tpm;
use super::layout;

/// PM1a event block: status at this port, enable at the next word. Reads as zero; writes have no effect.
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// Bytes of the event block.
pub const PM1A_EVENT_LEN: u8 = 4;
/// PM1a control block, one word: [`PM1_SCI_EN`] reads as one.
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// Bytes of the control block.
pub const PM1A_CONTROL_LEN: u8 = 2;
/// Control bit: power-management events raise the SCI, that is, ACPI mode is on.
pub const PM1_SCI_EN: u16 = 1;
/// Control bits: sleep type, shifted into place.
pub const PM1_SLP_TYP_MASK: u16 = 7 << 10;
/// Control bit: enter the sleep type.
pub const PM1_SLP_EN: u16 = 1 << 13;
/// Sleep type of S5, soft off.
pub const SLP_TYP_S5: u8 = 5;
/// Reset register: the keyboard controller's command port, which `reboot=k` uses as well.
pub const RESET_PORT: u16 = 0x64;
/// Byte whose write to the reset register resets the machine: pulse the reset line.
pub const RESET_VALUE: u8 = 0xfe;
/// Interrupt of ACPI events, active high and level-triggered.
pub const SCI_IRQ: u8 = 9;
/// First port of the serial line, eight in all.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the serial line.
pub const SERIAL_IRQ: u8 = 4;
/// Index port of the real-time clock; data follows.
pub const RTC_PORT: u16 = 0x70;
/// Interrupt of the real-time clock.
pub const RTC_IRQ: u8 = 8;

/// Whether a write of `value` to [`PM1A_CONTROL_PORT`] turns the machine off.
pub fn is_power_off(value: u16) -> bool {
    value & PM1_SLP_EN != 0 && value & PM1_SLP_TYP_MASK == u16::from(SLP_TYP_S5) << 10
}

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

fn dsdt(vcpus: u32, tpm: Option<&Tpm>) -> Vec<u8> {
    let mut body = Vec::new();
    let s5 = aml::Package::new(vec![&SLP_TYP_S5, &0u8, &0u8, &0u8]);
    aml::Name::new("_S5_".into(), &s5).to_aml_bytes(&mut body);

    for (name, id, port, ports, irq) in
        [("_SB_.COM1", "PNP0501", SERIAL_PORT, 8, SERIAL_IRQ), ("_SB_.RTC0", "PNP0B00", RTC_PORT, 2, RTC_IRQ)]
    {
        let resources = (aml::IO::new(port, port, 1, ports), IsaIrq(irq));
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
    for cpu in 0..vcpus {
        aml::Device::new(
            format!("_SB_.C{cpu:03X}").as_str().into(),
            vec![&aml::Name::new("_HID".into(), &"ACPI0007"), &aml::Name::new("_UID".into(), &cpu)],
        )
        .to_aml_bytes(&mut body);
    }
    if let Some(tpm) = tpm {
        tpm.device(&mut body);
    }
    table(*b"DSDT", 2, &body)
}

/// Multiple APIC description table: ACPI 6.5, section 5.2.12. APIC id = vCPU id.
pub(super) fn madt(vcpus: u32) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    let mut body = Vec::new();
    body.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..vcpus {
        // Type 0, local APIC. At most 255 vCPUs, so ids fit in a byte.
        body.extend_from_slice(&[0, 8, id as u8, id as u8]);
        body.extend_from_slice(&ENABLED.to_le_bytes());
    }
    // Type 1, IOAPIC 0, interrupts from 0.
    body.extend_from_slice(&[1, 12, 0, 0]);
    body.extend_from_slice(&layout::IOAPIC.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // Type 2, override: the SCI keeps its number and is active high (1), level-triggered (3 << 2).
    body.extend_from_slice(&[2, 10, 0, SCI_IRQ]);
    body.extend_from_slice(&u32::from(SCI_IRQ).to_le_bytes());
    body.extend_from_slice(&0x000du16.to_le_bytes());
    // Type 4, local NMI: every processor's LINT1.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    table(*b"APIC", 4, &body)
}

fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let port =
        |port: u16, bits: u8, access| GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port));
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
    fadt.sci_int = u16::from(SCI_IRQ).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = PM1A_EVENT_LEN;
    fadt.x_pm1a_evt_blk = port(PM1A_EVENT_PORT, PM1A_EVENT_LEN * 8, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = PM1A_CONTROL_LEN;
    fadt.x_pm1a_cnt_blk = port(PM1A_CONTROL_PORT, PM1A_CONTROL_LEN * 8, AccessSize::WordAccess);
    // No C2, no C3.
    fadt.p_lvl2_lat = 0x0fff.into();
    fadt.p_lvl3_lat = 0x0fff.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    bytes(&fadt.finalize())
}

/// All tables as they lie from [`layout::ACPI`] on; the root pointer is first.
pub fn tables(vcpus: u32, tpm: Option<&Tpm>) -> Vec<u8> {
    let mut area = vec![0; 64];
    let mut place = |table: &[u8]| {
        // The FACS must be 64-byte aligned; the others do not mind.
        area.resize(area.len().next_multiple_of(64), 0);
        let address = layout::ACPI + area.len() as u64;
        area.extend_from_slice(table);
        address
    };
    let facs = place(&bytes(&FACS::new()));
    let dsdt = place(&dsdt(vcpus, tpm));
    let fadt = place(&fadt(facs, dsdt));
    let madt = place(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Some(tpm) = tpm {
        let log = place(&tpm.log);
        xsdt.add_entry(place(&table(*b"TPM2", 4, &tpm.body(log))));
    }
    let xsdt = place(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    area[..rsdp.len()].copy_from_slice(&rsdp);
    area
}
