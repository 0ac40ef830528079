// SPDX-License-Identifier: Apache-2.0
//! The reset line of a PC's keyboard controller, and nothing else of it.
//!
//! Linux writes the command 0xFE to port 0x64 to reset the machine (`reboot=k`). Reading the status answers
//! 0, "input buffer empty", so that the kernel does not wait; probing for a keyboard fails at once because
//! port 0x60 is not ours.

use crate::bus::Action;
use crate::bus::Device;

const PULSE_RESET: u8 = 0xfe;

/// The controller's command and status port.
pub struct ResetLine;

impl Device for ResetLine {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Option<Action> {
        data.contains(&PULSE_RESET).then_some(Action::Reset)
    }
}
