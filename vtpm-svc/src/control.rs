// SPDX-License-Identifier: Apache-2.0
//! The socket protocol of swtpm, as server and as client: what QEMU, cloud-hypervisor and the TPM tools
//! speak.
//!
//! Two stream sockets. On the *data* socket raw TPM commands and responses follow each other. On the
//! *control* socket a client powers the TPM on and off, sets the locality, hands over a data socket, and so
//! on. [`wire`] has the messages, [`server`] answers them, and [`client`] is what the monitor uses.
//!
//! The locality that a control client sets is the TPM's, as with swtpm, not that of one data client: who
//! needs another one for one command puts the prefix of [`data`] in front of it.

mod answers;
pub mod client;
mod clients;
mod conversation;
pub mod data;
pub mod listen;
pub mod server;
pub mod socket;
pub mod wire;
