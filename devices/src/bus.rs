// SPDX-License-Identifier: Apache-2.0
//! A bus: which device answers at which address.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::RwLock;

/// What the machine should do because a device was told so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off.
    PowerOff,
}

/// Something that answers at addresses.
pub trait Device: Send {
    /// The guest reads `data.len()` bytes (1 to 8, more for string instructions) at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action>;
}

/// The same device may sit at several addresses, and the host side may hold it too.
pub type Shared = Arc<Mutex<dyn Device>>;

struct Range {
    base: u64,
    len: u64,
    device: Shared,
}

/// Two devices at one address, or a device at none: its range is empty, or ends beyond the last address.
#[derive(Debug, thiserror::Error)]
#[error("two devices at {base:#x}..{end:#x}")]
pub struct Overlap {
    /// First address of the newcomer.
    pub base: u64,
    /// Address after its last.
    pub end: u64,
}

/// Devices by address. A device may be moved while vCPUs use the bus, by another device of the same bus as
/// well: no lock of the bus is held while a device answers.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Vec<Range>>,
}

impl Bus {
    /// Puts a device at `base..base + len`.
    pub fn insert(&self, base: u64, len: u64, device: Shared) -> Result<(), Overlap> {
        place(&mut self.ranges.write().unwrap_or_else(PoisonError::into_inner), Range { base, len, device })
    }

    /// Takes the device away that begins at `base`. An access that has begun still ends in it.
    pub fn remove(&self, base: u64) -> Option<Shared> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.iter().position(|range| range.base == base)?;
        Some(ranges.remove(at).device)
    }

    /// Moves the device that begins at `from` to `to`. Where it cannot be, it stays where it is. False: there
    /// is none.
    pub fn relocate(&self, from: u64, to: u64) -> Result<bool, Overlap> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = ranges.iter().position(|range| range.base == from) else { return Ok(false) };
        let old = ranges.remove(at);
        let (len, device) = (old.len, Arc::clone(&old.device));
        let placed = place(&mut ranges, Range { base: to, len, device });
        if placed.is_err() {
            ranges.insert(at, old);
        }
        placed.map(|()| true)
    }

    fn find(&self, addr: u64) -> Option<(Shared, u64)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.partition_point(|r| r.base <= addr).checked_sub(1)?;
        let range = ranges.get(at)?;
        let offset = addr - range.base;
        (offset < range.len).then(|| (Arc::clone(&range.device), offset))
    }

    /// A guest's read. Where there is no device, all bits read as one. Returns whether a device answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(addr) {
            Some((device, offset)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
                true
            }
            None => false,
        }
    }

    /// A guest's write. Where there is no device, it has no effect.
    pub fn write(&self, addr: u64, data: &[u8]) -> Option<Action> {
        let (device, offset) = self.find(addr)?;
        device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
    }
}

/// Adds a range in its place.
fn place(ranges: &mut Vec<Range>, new: Range) -> Result<(), Overlap> {
    // Guests choose addresses, also the last ones.
    let overlap = Overlap { base: new.base, end: new.base.saturating_add(new.len) };
    let Some(last) = new.len.checked_sub(1).and_then(|rest| new.base.checked_add(rest)) else {
        return Err(overlap);
    };
    let at = ranges.partition_point(|r| r.base < new.base);
    let after_next = ranges.get(at).is_some_and(|next| next.base <= last);
    let in_previous =
        at.checked_sub(1).and_then(|i| ranges.get(i)).is_some_and(|p| new.base - p.base < p.len);
    if after_next || in_previous {
        return Err(overlap);
    }
    ranges.insert(at, new);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);
    impl Device for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill((self.0 + offset) as u8);
        }
        fn write(&mut self, offset: u64, _data: &[u8]) -> Option<Action> {
            (offset == 1).then_some(Action::Reset)
        }
    }

    fn echo(n: u64) -> Shared {
        Arc::new(Mutex::new(Echo(n)))
    }

    #[test]
    fn an_access_reaches_the_device_of_its_address_only() {
        let bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).unwrap();
        bus.insert(0x14, 2, echo(100)).unwrap();
        let mut byte = [0];
        assert!(bus.read(0x13, &mut byte));
        assert_eq!(byte, [4]);
        assert!(bus.read(0x14, &mut byte));
        assert_eq!(byte, [100]);
        assert!(!bus.read(0x16, &mut byte));
        assert_eq!(byte, [0xff]);
        assert_eq!(bus.write(0x15, &[0]), Some(Action::Reset));
        assert_eq!(bus.write(0xf, &[0]), None);
    }

    #[test]
    fn overlapping_devices_are_refused() {
        let bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).unwrap();
        assert!(bus.insert(0x13, 1, echo(1)).is_err());
        assert!(bus.insert(0xf, 2, echo(1)).is_err());
        assert!(bus.insert(0xf, 1, echo(1)).is_ok());
    }

    #[test]
    fn a_device_moves_unless_another_one_is_there() {
        let bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).unwrap();
        bus.insert(0x20, 4, echo(100)).unwrap();
        let mut byte = [0];
        assert!(bus.relocate(0x10, 0x1d).is_err());
        assert!(bus.read(0x11, &mut byte), "it has stayed");
        // Its own place is no obstacle.
        assert!(bus.relocate(0x10, 0x12).unwrap());
        assert!(!bus.read(0x11, &mut byte));
        assert!(bus.read(0x15, &mut byte));
        assert_eq!(byte, [4]);
        assert!(!bus.relocate(0x10, 0x40).unwrap(), "nothing begins there any more");
        assert!(bus.remove(0x12).is_some());
        assert!(!bus.read(0x12, &mut byte));
        assert!(bus.insert(0x10, 4, echo(1)).is_ok());
    }

    #[test]
    fn the_last_addresses_are_addresses_and_what_lies_beyond_is_not() {
        let bus = Bus::default();
        bus.insert(u64::MAX - 3, 4, echo(1)).unwrap();
        assert!(bus.read(u64::MAX, &mut [0]));
        assert!(bus.insert(u64::MAX, 1, echo(1)).is_err());
        bus.insert(0x10, 4, echo(1)).unwrap();
        assert!(bus.relocate(0x10, u64::MAX - 2).is_err());
        assert!(bus.remove(u64::MAX - 3).is_some());
        assert!(bus.relocate(0x10, u64::MAX - 2).is_err());
        assert!(bus.read(0x10, &mut [0]), "it has stayed");
    }

    /// One in the way of another would hide it: the one that begins last answers.
    #[test]
    fn a_device_without_addresses_has_no_place() {
        let bus = Bus::default();
        assert!(bus.insert(0x10, 0, echo(1)).is_err());
        bus.insert(0x10, 4, echo(1)).unwrap();
        assert!(bus.insert(0x12, 0, echo(1)).is_err());
        assert!(bus.read(0x13, &mut [0]));
    }

    /// What a configuration space does when the guest writes a base address register.
    struct Mover(Arc<Bus>);
    impl Device for Mover {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, data: &[u8]) -> Option<Action> {
            self.0.relocate(0x10, data[0].into()).unwrap();
            None
        }
    }

    #[test]
    fn a_device_may_move_others_of_its_bus_while_it_answers() {
        let bus = Arc::new(Bus::default());
        bus.insert(0x10, 4, echo(1)).unwrap();
        bus.insert(0, 1, Arc::new(Mutex::new(Mover(Arc::clone(&bus))))).unwrap();
        bus.write(0, &[0x30]);
        assert!(bus.read(0x31, &mut [0]));
    }
}
