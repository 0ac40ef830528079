// SPDX-License-Identifier: Apache-2.0
//! A bus: which device answers at which address.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

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

/// Two devices at one address.
#[derive(Debug, thiserror::Error)]
#[error("two devices at {base:#x}..{end:#x}")]
pub struct Overlap {
    /// First address of the newcomer.
    pub base: u64,
    /// Address after its last.
    pub end: u64,
}

/// Devices by address. Built once, then only read.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Puts a device at `base..base + len`.
    pub fn insert(&mut self, base: u64, len: u64, device: Shared) -> Result<(), Overlap> {
        let end = base.saturating_add(len);
        let at = self.ranges.partition_point(|r| r.base < base);
        let after_next = self.ranges.get(at).is_some_and(|next| next.base < end);
        let in_previous =
            at.checked_sub(1).and_then(|i| self.ranges.get(i)).is_some_and(|p| p.base + p.len > base);
        if after_next || in_previous {
            return Err(Overlap { base, end });
        }
        self.ranges.insert(at, Range { base, len, device });
        Ok(())
    }

    fn find(&self, addr: u64) -> Option<(&Range, u64)> {
        let at = self.ranges.partition_point(|r| r.base <= addr).checked_sub(1)?;
        let range = self.ranges.get(at)?;
        let offset = addr - range.base;
        (offset < range.len).then_some((range, offset))
    }

    /// A guest's read. Where there is no device, all bits read as one. Returns whether a device answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(addr) {
            Some((range, offset)) => {
                range.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
                true
            }
            None => false,
        }
    }

    /// A guest's write. Where there is no device, it has no effect.
    pub fn write(&self, addr: u64, data: &[u8]) -> Option<Action> {
        let (range, offset) = self.find(addr)?;
        range.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
    }
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
        let mut bus = Bus::default();
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
        let mut bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).unwrap();
        assert!(bus.insert(0x13, 1, echo(1)).is_err());
        assert!(bus.insert(0xf, 2, echo(1)).is_err());
        assert!(bus.insert(0xf, 1, echo(1)).is_ok());
    }
}
