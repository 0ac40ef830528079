// SPDX-License-Identifier: Apache-2.0
//! The board: processors, memory and devices of a guest's machine, and where each of them is.
//!
//! One [`Board`] is what the ACPI tables, the memory map, the parameters of an IGVM file and the monitor's
//! buses are made from, so that the guest is told of what is there. Every address, port and interrupt number
//! stands here or in [`layout`] and nowhere else; devices know offsets into their own ranges only.

pub mod acpi;
pub mod layout;
pub mod pci;

use std::ops::Range;

/// A device of the ISA bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsaDevice {
    /// Its ports.
    pub ports: Range<u16>,
    /// Its interrupt, edge-triggered and active high.
    pub irq: u8,
}

/// ACPI power management: the PM1a registers. ACPI specification 6.5, section 4.8.3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Power {
    /// Event block: status at the first port, enable at the next word. Reads as zero; writes have no effect.
    pub events: Range<u16>,
    /// Control block, one word, right behind the event block.
    pub control: Range<u16>,
    /// Value of SLP_TYP for S5, soft off.
    pub soft_off: u8,
    /// Interrupt of ACPI events, active high and level-triggered.
    pub sci: u8,
}

/// Ways to reset the machine, one port each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reset {
    /// The keyboard controller's command port, which the ACPI tables name and `reboot=k` uses.
    pub keyboard: u16,
    /// Byte whose write to that port resets the machine: pulse the reset line.
    pub keyboard_pulse: u8,
    /// The southbridge's reset control register.
    pub southbridge: u16,
}

/// A TPM with a command-response buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tpm {
    /// Guest-physical address of the register page.
    pub registers: u32,
    /// Guest-physical address of the buffer page.
    pub buffer: u32,
    /// Guest-physical address of the page with the registers of the physical-presence interface.
    pub presence: u32,
    /// The event log, at most [`acpi::tpm::LOG_MAX`] bytes; empty if nothing was measured.
    pub log: Vec<u8>,
}

impl Tpm {
    /// The TPM at its usual place.
    pub fn new(log: Vec<u8>) -> Self {
        let (registers, buffer) = (layout::TPM_REGISTERS, layout::TPM_BUFFER);
        Tpm { registers, buffer, presence: layout::TPM_PRESENCE, log }
    }
}

/// The machine of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Board {
    /// RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs; their APIC ids count from 0.
    pub vcpus: u32,
    /// The first serial line.
    pub serial: IsaDevice,
    /// The real-time clock: index port, then data port.
    pub rtc: IsaDevice,
    /// How the guest switches itself off.
    pub power: Power,
    /// How it resets itself.
    pub reset: Reset,
    /// The TPM, if there is one.
    pub tpm: Option<Tpm>,
}

/// e820 types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Type {
    /// Usable memory.
    Ram = 1,
    /// Not to be touched by the memory management; Linux maps it shared.
    Reserved = 2,
    /// ACPI tables; Linux maps it private.
    Acpi = 3,
}

impl Board {
    /// A board with `memory` bytes of RAM and `vcpus` vCPUs, and no TPM.
    pub fn new(memory: u64, vcpus: u32) -> Self {
        Board {
            memory,
            vcpus,
            serial: IsaDevice { ports: 0x3f8..0x400, irq: 4 },
            rtc: IsaDevice { ports: 0x70..0x72, irq: 8 },
            power: Power { events: 0x600..0x604, control: 0x604..0x606, soft_off: 5, sci: 9 },
            reset: Reset { keyboard: 0x64, keyboard_pulse: 0xfe, southbridge: 0xcf9 },
            tpm: None,
        }
    }

    /// The guest's memory as ranges, ascending: one below the device gap, one above it if needed.
    pub fn ram(&self) -> Vec<Range<u64>> {
        let low = self.memory.min(layout::HOLE_START);
        let high = layout::HOLE_END..layout::HOLE_END.saturating_add(self.memory - low);
        [0..low, high].into_iter().filter(|range| !range.is_empty()).collect()
    }

    /// The memory map that Linux gets, ascending and disjoint.
    pub fn e820(&self) -> Vec<(Range<u64>, E820Type)> {
        let mut map = vec![
            (0..layout::RESERVED, E820Type::Ram),
            (layout::RESERVED..layout::ACPI, E820Type::Reserved),
            (layout::ACPI..layout::ACPI_END, E820Type::Acpi),
            (layout::ACPI_END..layout::HIGH_START, E820Type::Reserved),
        ];
        for range in self.ram() {
            let start = if range.start == 0 { layout::HIGH_START } else { range.start };
            map.push((start..range.end, E820Type::Ram));
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PAGE_SIZE;

    fn assert_disjoint(mut ranges: Vec<(&str, Range<u64>)>) {
        ranges.sort_by_key(|(_, range)| range.start);
        for pair in ranges.windows(2) {
            assert!(pair[0].1.end <= pair[1].1.start, "{pair:x?}");
        }
        assert!(ranges.iter().all(|(_, range)| !range.is_empty()), "{ranges:x?}");
    }

    #[test]
    fn no_two_ranges_of_the_board_overlap() {
        let page = |at: u32| u64::from(at)..u64::from(at) + PAGE_SIZE;
        for memory in [layout::MEMORY_MIN, 3 << 30, 4 << 30, 1 << 40] {
            let board = Board { tpm: Some(Tpm::new(Vec::new())), ..Board::new(memory, 1) };
            let tpm = board.tpm.clone().expect("given");
            let devices = [
                ("window of PCI's base addresses", pci::BARS),
                ("PCI configuration space", pci::ECAM),
                ("IOAPIC", page(layout::IOAPIC)),
                ("local APIC", page(layout::LOCAL_APIC)),
                ("registers of the TPM", page(tpm.registers)),
                ("presence interface of the TPM", page(tpm.presence)),
                ("buffer of the TPM", page(tpm.buffer)),
                ("firmware", layout::FIRMWARE),
            ];
            let gap = layout::HOLE_START..layout::HOLE_END;
            for (name, range) in &devices {
                assert!(
                    gap.start <= range.start && range.end <= gap.end,
                    "{name} is outside of the device gap"
                );
            }
            let ram = board.ram().into_iter().map(|range| ("RAM", range));
            assert_disjoint(ram.chain(devices).collect());
            assert_disjoint(board.e820().into_iter().map(|(range, _)| ("e820", range)).collect());
        }
    }

    #[test]
    fn no_two_devices_have_a_port_or_an_interrupt_in_common() {
        let board = Board::new(layout::MEMORY_MIN, 1);
        let wide = |ports: &Range<u16>| u64::from(ports.start)..u64::from(ports.end);
        let one = |port: u16| u64::from(port)..u64::from(port) + 1;
        assert_disjoint(vec![
            ("serial line", wide(&board.serial.ports)),
            ("clock", wide(&board.rtc.ports)),
            ("power events", wide(&board.power.events)),
            ("power control", wide(&board.power.control)),
            ("keyboard controller", one(board.reset.keyboard)),
            ("reset control", one(board.reset.southbridge)),
        ]);
        assert_eq!(board.power.events.end, board.power.control.start, "the device is one");
        assert_disjoint(
            [board.serial.irq, board.rtc.irq, board.power.sci].map(|irq| ("", one(irq.into()))).into(),
        );
    }
}
