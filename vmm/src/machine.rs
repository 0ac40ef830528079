// SPDX-License-Identifier: Apache-2.0
//! The machine around the vCPUs: its buses and the devices on them.

pub mod certs;
pub mod companion;
pub mod conversion;
pub mod implicit;
pub mod ram;

use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;

use devices::bus::Bus;
use devices::bus::Overlap;
use devices::i8042;
use devices::power;
use devices::rtc;
use devices::rtc::Rtc;
use devices::serial;
use devices::serial::Serial;
use snp::image::acpi;
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
    /// Builds the machine of `vm`; what the guest writes to its serial console goes to `console`.
    pub fn new(vm: &dyn Vm, console: Box<dyn Write + Send>) -> Result<Self, MachineError> {
        let interrupt = EventFd::new(EFD_NONBLOCK).map_err(MachineError::EventFd)?;
        vm.register_irqfd(&interrupt, serial::COM1_IRQ)
            .map_err(|source| MachineError::Interrupt { device: "the serial port", source })?;
        let serial = Arc::new(Mutex::new(Serial::new(interrupt, console)));

        let mut pio = Bus::default();
        pio.insert(serial::COM1_PORT, serial::COM1_LEN, Arc::clone(&serial) as _)?;
        let rtc = Arc::new(Mutex::new(Rtc::default()));
        pio.insert(rtc::PORT, rtc::LEN, Arc::clone(&rtc) as _)?;
        pio.insert(i8042::PORT, 1, Arc::new(Mutex::new(i8042::ResetLine)))?;
        let pm1 = power::Pm1::new(acpi::SLP_TYP_S5);
        pio.insert(u64::from(acpi::PM1A_EVENT_PORT), power::PM1_LEN, Arc::new(Mutex::new(pm1)))?;
        pio.insert(power::RESET_PORT, 1, Arc::new(Mutex::new(power::ResetControl::default())))?;
        Ok(Machine { pio, mmio: Bus::default(), serial, rtc })
    }
}
