// SPDX-License-Identifier: Apache-2.0
//! How a guest finds its TPM and the log of what was measured before it ran.
//!
//! Table `TPM2` of the TCG ACPI Specification 1.3, and a device `MSFT0101` whose resources Linux' `tpm_crb`
//! compares with it. The registers lie in the device gap, which no table or memory map describes as memory,
//! so an SNP guest maps them shared. The event log lies beside the tables in ACPI memory: private, and part
//! of what is measured at launch.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml;

use super::ppi;
use crate::board::Tpm;
use crate::plan::PAGE_SIZE;

/// Longest event log that finds room beside the tables.
pub const LOG_MAX: usize = 16 << 10;
/// Offset of the control area in the register page.
const CONTROL_AREA: u64 = 0x40;
/// Start method: command-response buffer.
const START_METHOD: u32 = 7;

/// AML that is bytes already.
struct Written(Vec<u8>);

impl Aml for Written {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The device in the DSDT.
pub(super) fn device(tpm: &Tpm, body: &mut Vec<u8>) {
    let page = |base| aml::Memory32Fixed::new(true, base, PAGE_SIZE as u32);
    let (registers, buffer) = (page(tpm.registers), page(tpm.buffer));
    let resources = aml::ResourceTemplate::new(vec![&registers, &buffer]);
    aml::Device::new(
        "_SB_.TPM_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"MSFT0101"),
            &aml::Name::new("_UID".into(), &0u8),
            &aml::Name::new("_STA".into(), &0x0fu8),
            &aml::Name::new("_CRS".into(), &resources),
            &Written(ppi::methods(tpm.presence)),
        ],
    )
    .to_aml_bytes(body);
}

/// What follows the header of table `TPM2` when the log lies at `log`.
pub(super) fn body(tpm: &Tpm, log: u64) -> Vec<u8> {
    let mut body = Vec::new();
    // Platform class 0, client: the profile that the event log follows; two reserved bytes.
    body.extend_from_slice(&0u32.to_le_bytes());
    body.extend_from_slice(&(u64::from(tpm.registers) + CONTROL_AREA).to_le_bytes());
    body.extend_from_slice(&START_METHOD.to_le_bytes());
    body.extend_from_slice(&[0; 12]);
    if !tpm.log.is_empty() {
        body.extend_from_slice(&(tpm.log.len() as u32).to_le_bytes());
        body.extend_from_slice(&log.to_le_bytes());
    }
    body
}

#[cfg(test)]
mod tests {
    use super::super::tables;
    use super::*;
    use crate::board::Board;
    use crate::board::layout;

    fn find(area: &[u8], signature: &[u8; 4]) -> Vec<u8> {
        let at = (0..area.len()).step_by(64).find(|at| area[*at..].starts_with(signature)).expect("table");
        let len = u32::from_le_bytes(area[at + 4..at + 8].try_into().expect("four")) as usize;
        area[at..at + len].to_vec()
    }

    fn with_tpm(vcpus: u32, log: Vec<u8>) -> Vec<u8> {
        tables(&Board { tpm: Some(Tpm::new(log)), ..Board::new(layout::MEMORY_MIN, vcpus) })
    }

    #[test]
    fn the_table_points_to_the_control_area_and_to_the_log() {
        let area = with_tpm(2, b"the log".to_vec());
        let table = find(&area, b"TPM2");
        assert_eq!(table.len(), 76);
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum");
        assert_eq!(table[40..48], 0xfed4_0040u64.to_le_bytes());
        assert_eq!(table[48..52], 7u32.to_le_bytes());
        assert_eq!(table[64..68], 7u32.to_le_bytes());
        let log = u64::from_le_bytes(table[68..76].try_into().expect("eight")) - layout::ACPI;
        assert_eq!(&area[log as usize..][..7], b"the log");
        assert_eq!(find(&with_tpm(2, Vec::new()), b"TPM2").len(), 64, "no log, no address");
    }

    #[test]
    fn everything_fits_with_the_most_processors_and_the_longest_log() {
        let area = with_tpm(255, vec![1; LOG_MAX]);
        assert!(area.len() as u64 <= layout::ACPI_END - layout::ACPI, "{:#x}", area.len());
    }

    #[test]
    fn without_a_tpm_there_is_no_trace_of_one() {
        let area = tables(&Board::new(layout::MEMORY_MIN, 2));
        assert!(!area.windows(8).any(|w| w == b"MSFT0101") && !area.windows(4).any(|w| w == b"TPM2"));
        let with = with_tpm(2, Vec::new());
        assert!(find(&with, b"DSDT").windows(8).any(|w| w == b"MSFT0101"));
    }
}
