// SPDX-License-Identifier: Apache-2.0
//! The service that gives a guest its TPM 2.0 and its guest-state file from outside the guest.
//!
//! One process per guest: [`tpm`] is the TPM (libtpms, and what the platform does to it), [`vmgs`] the
//! encrypted file that its state lives in, [`keys`] where that file's key comes from, [`control`] the
//! sockets. [`service`] puts them together and [`sandbox`] locks the door behind it. [`measured`] plays the
//! firmware's part of a measured boot. [`cli`] is the command line of the service, and of what an operator
//! does to a guest-state file; nothing below it knows an option parser.
//!
//! What this protects against, and what it does not, is said in [`service::TRUST`] and in `docs/vtpm.md`.

mod bytes;
pub mod cli;
pub mod control;
pub mod keys;
mod lock;
pub mod log;
pub mod measured;
pub mod pace;
pub mod process;
pub mod sandbox;
pub mod service;
pub mod tpm;
pub mod vmgs;
pub mod whole_file;
