// SPDX-License-Identifier: Apache-2.0
//! A 16550A serial port: `vm-superio`'s, on our bus.

use std::io;
use std::io::Write;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Action;
use crate::bus::Device;

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port; what the guest sends goes to a writer.
pub struct Serial {
    port: vm_superio::Serial<Interrupt, vm_superio::serial::NoEvents, Box<dyn Write + Send>>,
}

impl Serial {
    /// A port that raises its interrupt on `interrupt` and sends to `out`.
    pub fn new(interrupt: EventFd, out: Box<dyn Write + Send>) -> Self {
        Serial { port: vm_superio::Serial::new(Interrupt(interrupt), out) }
    }

    /// Takes in bytes for the guest, as many as its FIFO has room for; returns how many.
    pub fn receive(&mut self, input: &[u8]) -> usize {
        let room = self.port.fifo_capacity().min(input.len());
        match input.get(..room) {
            // The guest may be in loopback mode, in which a real port drops input too.
            Some(part) if room > 0 => self.port.enqueue_raw_bytes(part).unwrap_or(part.len()),
            _ => 0,
        }
    }
}

impl Device for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = self.port.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        for &byte in data {
            // A closed or full output must not stop the guest: the byte is lost, as on a line nobody listens
            // to.
            let _ = self.port.write(offset as u8, byte);
        }
        None
    }
}
