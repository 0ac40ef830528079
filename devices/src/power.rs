// SPDX-License-Identifier: Apache-2.0
//! ACPI power management: the PM1 registers, by which a guest switches itself off, and the reset register.
//!
//! ACPI 6.5, section 4.8.3. No power-management event ever happens, so the status register always reads 0.

use crate::bus::Action;
use crate::bus::Device;

/// Bytes of the PM1 event block followed by the PM1 control block.
const PM1_LEN: usize = 6;
/// PM1_CNT.SCI_EN: the machine is in ACPI mode. There is no other.
const SCI_EN: u16 = 1;
/// PM1_CNT.SLP_EN: enter the sleep state that SLP_TYP (bits 12:10) names.
const SLP_EN: u16 = 1 << 13;

/// PM1a: status at offset 0, enable at 2, control at 4, two bytes each.
pub struct Pm1 {
    s5: u16,
    registers: [u8; PM1_LEN],
}

impl Pm1 {
    /// `s5` is the value of SLP_TYP for soft off, as the DSDT's `_S5` says.
    pub fn new(s5: u8) -> Self {
        Pm1 { s5: u16::from(s5), registers: [0; PM1_LEN] }
    }

    fn control(&self) -> u16 {
        u16::from_le_bytes([self.registers[4], self.registers[5]])
    }
}

impl Device for Pm1 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut image = self.registers;
        image[4..6].copy_from_slice(&((self.control() & !SLP_EN) | SCI_EN).to_le_bytes());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = image.get(offset as usize + i).copied().unwrap_or(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        for (i, &byte) in data.iter().enumerate() {
            match offset as usize + i {
                0 | 1 => {} // Status bits are cleared by writing ones; none is ever set.
                at => {
                    if let Some(register) = self.registers.get_mut(at) {
                        *register = byte;
                    }
                }
            }
        }
        let control = self.control();
        let off = control & SLP_EN != 0 && (control >> 10) & 7 == self.s5;
        self.registers[5] &= !(SLP_EN >> 8) as u8;
        off.then_some(Action::PowerOff)
    }
}

/// RST_CPU: the transition to 1 resets the machine.
const RST_CPU: u8 = 1 << 2;

/// The reset control register of a PC's southbridge, one byte wide.
#[derive(Default)]
pub struct ResetControl(u8);

impl Device for ResetControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Option<Action> {
        let before = self.0;
        self.0 = data.first().copied().unwrap_or(before);
        (self.0 & !before & RST_CPU != 0).then_some(Action::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_s5_sleep_type_switches_off() {
        let mut pm1 = Pm1::new(5);
        assert_eq!(pm1.write(4, &(SLP_EN | 3 << 10).to_le_bytes()), None);
        assert_eq!(pm1.write(4, &(5u16 << 10).to_le_bytes()), None);
        assert_eq!(pm1.write(4, &(SLP_EN | 5 << 10).to_le_bytes()), Some(Action::PowerOff));
    }

    #[test]
    fn the_machine_is_in_acpi_mode_and_without_events() {
        let mut pm1 = Pm1::new(5);
        pm1.write(0, &[0xff; 4]);
        let mut data = [0; 8];
        pm1.read(0, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff, 1, 0, 0xff, 0xff]);
    }

    #[test]
    fn a_rising_reset_bit_resets() {
        let mut reset = ResetControl::default();
        assert_eq!(reset.write(0, &[2]), None);
        assert_eq!(reset.write(0, &[6]), Some(Action::Reset));
        assert_eq!(reset.write(0, &[6]), None);
    }
}
