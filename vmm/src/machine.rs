// SPDX-License-Identifier: Apache-2.0
//! The machine around the vCPUs: its buses and the devices on them.

pub mod certs;
pub mod companion;
pub mod conversion;
pub mod implicit;
pub mod ram;

use std::io;
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::sync::Mutex;

use devices::bus::Bus;
use devices::bus::Overlap;
use devices::i8042;
use devices::power;
use devices::rtc::Rtc;
use devices::serial::Serial;
use snp::board::Board;
use snp::board::Power;
use snp::board::Reset;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::platform::Vm;
use crate::platform::error::CallError;

/// Buses, and the handles that the host side needs.
pub struct Machine {
    /// Ports.
    pub pio: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// The console.
    pub serial: Arc<Mutex<Serial>>,
    /// The clock.
    pub rtc: Arc<Mutex<Rtc>>,
}

/// Why the machine could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// An interrupt could not be connected.
    #[error("cannot connect the interrupt of {device}: {source}")]
    Interrupt {
        /// Which device.
        device: &'static str,
        /// What failed.
        source: CallError,
    },
    /// No event descriptor.
    #[error("cannot make an event descriptor: {0}")]
    EventFd(io::Error),
    /// A mistake in the table of addresses.
    #[error(transparent)]
    Overlap(#[from] Overlap),
}

impl Machine {
    /// Puts the devices of `board` around `vm`; what the guest writes to its serial console goes to `console`.
    pub fn new(vm: &dyn Vm, board: &Board, console: Box<dyn Write + Send>) -> Result<Self, MachineError> {
        let interrupt = EventFd::new(EFD_NONBLOCK).map_err(MachineError::EventFd)?;
        vm.register_irqfd(&interrupt, board.serial.irq.into())
            .map_err(|source| MachineError::Interrupt { device: "the serial port", source })?;
        let serial = Arc::new(Mutex::new(Serial::new(interrupt, console)));

        let mut pio = Bus::default();
        let mut insert =
            |ports: Range<u16>, device| pio.insert(ports.start.into(), ports.len() as u64, device);
        insert(board.serial.ports.clone(), Arc::clone(&serial) as _)?;
        let rtc = Arc::new(Mutex::new(Rtc::default()));
        insert(board.rtc.ports.clone(), Arc::clone(&rtc) as _)?;
        let Power { events, control, soft_off, .. } = &board.power;
        insert(events.start..control.end, Arc::new(Mutex::new(power::Pm1::new(*soft_off))))?;
        let Reset { keyboard, southbridge, .. } = board.reset;
        insert(keyboard..keyboard + 1, Arc::new(Mutex::new(i8042::ResetLine)))?;
        insert(southbridge..southbridge + 1, Arc::new(Mutex::new(power::ResetControl::default())))?;
        Ok(Machine { pio, mmio: Bus::default(), serial, rtc })
    }
}
