// SPDX-License-Identifier: Apache-2.0
//! How a guest finds its TPM and the log of what was measured before it ran.
//!
//! Table `TPM2` of the TCG ACPI Specification 1.3, and a device `MSFT0101` whose resources Linux' `tpm_crb` compares with
//! it. The registers lie in the device gap, which no table or memory map describes as memory, so an SNP guest maps them
//! shared. The event log lies beside the tables in ACPI memory: private, and part of what is measured at launch.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml;

use super::ppi;

/// A TPM with a command-response buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tpm {
    /// Guest-physical address of the register page.
    pub registers: u32,
    /// Guest-physical address of the buffer page.
    pub buffer: u32,
    /// Guest-physical address of the page with the registers of the physical-presence interface.
    pub presence: u32,
    /// The event log, at most [`LOG_MAX`] bytes; empty if nothing was measured.
    pub log: Vec<u8>,
}

/// Longest event log that finds room beside the tables.
pub const LOG_MAX: usize = 16 << 10;
/// Offset of the control area in the register page.
const CONTROL_AREA: u64 = 0x40;
/// Start method: command-response buffer.
const START_METHOD: u32 = 7;
const PAGE: u32 = 0x1000;

/// AML that is bytes already.
struct Written(Vec<u8>);

impl Aml for Written {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl Tpm {
    /// The device in the DSDT.
    pub(super) fn device(&self, body: &mut Vec<u8>) {
        let pages = [self.registers, self.buffer].map(|base| aml::Memory32Fixed::new(true, base, PAGE));
        let resources = aml::ResourceTemplate::new(vec![&pages[0], &pages[1]]);
        aml::Device::new(
            "_SB_.TPM_".into(),
            vec![
                &aml::Name::new("_HID".into(), &"MSFT0101"),
                &aml::Name::new("_UID".into(), &0u8),
                &aml::Name::new("_STA".into(), &0x0fu8),
                &aml::Name::new("_CRS".into(), &resources),
                &Written(ppi::methods(self.presence)),
            ],
        )
        .to_aml_bytes(body);
    }

    /// What follows the header of table `TPM2` when the log lies at `log`.
    pub(super) fn body(&self, log: u64) -> Vec<u8> {
        let mut body = Vec::new();
        // Platform class 0, client: the profile that the event log follows; two reserved bytes.
        body.extend_from_slice(&0u32.to_le_bytes());
        body.extend_from_slice(&(u64::from(self.registers) + CONTROL_AREA).to_le_bytes());
        body.extend_from_slice(&START_METHOD.to_le_bytes());
        body.extend_from_slice(&[0; 12]);
        if !self.log.is_empty() {
            body.extend_from_slice(&(self.log.len() as u32).to_le_bytes());
            body.extend_from_slice(&log.to_le_bytes());
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::super::tables;
    use super::*;
    use crate::image::layout;

    fn find(area: &[u8], signature: &[u8; 4]) -> Vec<u8> {
        let at = (0..area.len()).step_by(64).find(|at| area[*at..].starts_with(signature)).expect("table");
        let len = u32::from_le_bytes(area[at + 4..at + 8].try_into().expect("four")) as usize;
        area[at..at + len].to_vec()
    }

    fn tpm(log: Vec<u8>) -> Tpm {
        Tpm { registers: 0xfed4_0000, buffer: 0xfed4_6000, presence: 0xfed4_5000, log }
    }

    #[test]
    fn the_table_points_to_the_control_area_and_to_the_log() {
        let area = tables(2, Some(&tpm(b"the log".to_vec())));
        let table = find(&area, b"TPM2");
        assert_eq!(table.len(), 76);
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum");
        assert_eq!(table[40..48], 0xfed4_0040u64.to_le_bytes());
        assert_eq!(table[48..52], 7u32.to_le_bytes());
        assert_eq!(table[64..68], 7u32.to_le_bytes());
        let log = u64::from_le_bytes(table[68..76].try_into().expect("eight")) - layout::ACPI;
        assert_eq!(&area[log as usize..][..7], b"the log");
        assert_eq!(find(&tables(2, Some(&tpm(Vec::new()))), b"TPM2").len(), 64, "no log, no address");
    }

    #[test]
    fn everything_fits_with_the_most_processors_and_the_longest_log() {
        let area = tables(255, Some(&tpm(vec![1; LOG_MAX])));
        assert!(area.len() as u64 <= layout::ACPI_END - layout::ACPI, "{:#x}", area.len());
    }

    #[test]
    fn without_a_tpm_there_is_no_trace_of_one() {
        let area = tables(2, None);
        assert!(!area.windows(8).any(|w| w == b"MSFT0101") && !area.windows(4).any(|w| w == b"TPM2"));
        let with = tables(2, Some(&tpm(Vec::new())));
        assert!(find(&with, b"DSDT").windows(8).any(|w| w == b"MSFT0101"));
    }
}
