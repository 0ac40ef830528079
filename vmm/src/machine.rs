// SPDX-License-Identifier: Apache-2.0
//! The machine around the vCPUs: its buses and the devices on them.

pub mod certs;
pub mod companion;
pub mod conversion;
pub mod dma;
pub mod implicit;
pub mod interrupts;
pub mod ram;
pub mod slots;
pub mod window;

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
use snp::board::pci;

use self::dma::Dma;
use self::interrupts::InterruptError;
use self::interrupts::Interrupts;
use self::slots::Slots;
use self::window::Window;
use crate::platform::Vm;

/// What stands around a VM's vCPUs. Everything that devices need of the VM is given out here.
pub struct Machine {
    /// Ports.
    pub pio: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// The console.
    pub serial: Arc<Mutex<Serial>>,
    /// The clock.
    pub rtc: Arc<Mutex<Rtc>>,
    /// The guest's memory, for devices.
    pub dma: Dma,
    /// Memory of devices in the guest.
    pub slots: Slots,
    /// Addresses of devices that have none by custom.
    pub addresses: Window,
    /// Interrupts of devices.
    pub interrupts: Arc<Interrupts>,
    /// The VM, for doorbells ([`Vm::register_ioevent`]).
    pub vm: Arc<dyn Vm>,
}

/// Why the machine could not be put together.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum MachineError {
    /// An interrupt could not be connected.
    #[error("cannot connect the interrupt of {device}: {source}")]
    Interrupt { device: &'static str, source: InterruptError },
    /// A mistake in the table of addresses.
    #[error(transparent)]
    Overlap(#[from] Overlap),
}

impl Machine {
    /// Puts the devices of `board` around `vm`, whose memory is `dma`'s; what the guest writes to its serial
    /// console goes to `console`.
    pub fn new(
        vm: &Arc<dyn Vm>,
        board: &Board,
        dma: Dma,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        let interrupts = Interrupts::new(vm);
        let interrupt = interrupts
            .pin(board.serial.irq.into())
            .map_err(|source| MachineError::Interrupt { device: "the serial port", source })?;
        let serial = Arc::new(Mutex::new(Serial::new(interrupt, console)));

        let pio = Bus::default();
        let insert = |ports: Range<u16>, device| pio.insert(ports.start.into(), ports.len() as u64, device);
        insert(board.serial.ports.clone(), Arc::clone(&serial) as _)?;
        let rtc = Arc::new(Mutex::new(Rtc::default()));
        insert(board.rtc.ports.clone(), Arc::clone(&rtc) as _)?;
        let Power { events, control, soft_off, .. } = &board.power;
        insert(events.start..control.end, Arc::new(Mutex::new(power::Pm1::new(*soft_off))))?;
        let Reset { keyboard, southbridge, .. } = board.reset;
        insert(keyboard..keyboard + 1, Arc::new(Mutex::new(i8042::ResetLine)))?;
        insert(southbridge..southbridge + 1, Arc::new(Mutex::new(power::ResetControl::default())))?;
        let slots = Slots::new(vm, dma.regions());
        Ok(Machine {
            pio,
            mmio: Bus::default(),
            serial,
            rtc,
            dma,
            slots,
            addresses: Window::new(pci::BARS),
            interrupts,
            vm: Arc::clone(vm),
        })
    }
}
