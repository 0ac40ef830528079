// SPDX-License-Identifier: Apache-2.0
//! Message-signalled interrupts of devices, as KVM takes them.

/// A message-signalled interrupt: a write to the local APICs' range (Intel SDM volume 3, "Message Signalled
/// Interrupts").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address, 0xFEE0_0000 and above.
    pub address: u64,
    /// Data: vector and delivery mode.
    pub data: u32,
}

/// An interrupt number whose event descriptor sends a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiRoute {
    /// The number, above those of the controllers' pins.
    pub gsi: u32,
    /// What is sent.
    pub message: MsiMessage,
}
