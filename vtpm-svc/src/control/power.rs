// SPDX-License-Identifier: Apache-2.0
//! Powering the TPM on: making it if it never existed, starting it, and what the platform does before a guest can.
//!
//! All of it is one commit. Nothing is answered before that, so a crash on the way leaves the TPM as it was before, or
//! (a new one) not there yet.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::server::Service;
use super::server::Startup;
use crate::log;
use crate::tpm::commands;
use crate::tpm::engine::Blob;
use crate::tpm::engine::Engine;
use crate::tpm::engine::EngineError;
use crate::tpm::engine::StateStore;
use crate::tpm::engine::state::is_virgin;
use crate::tpm::manufacture;
use crate::tpm::manufacture::Subject;
use crate::tpm::presence;
use crate::vmgs::block::BlockFile;
use crate::vmgs::records;
use crate::vmgs::records::Operation;
use crate::vmgs::records::Ppi;

/// Powers the TPM off in good order, whether or not its user has.
pub(super) fn power_off(engine: &mut Engine) {
    if let Err(e) = engine.shut_down() {
        log::warn(&format!(
            "the TPM was not shut down in good order ({e}); its next start counts that as a failed try of every PIN"
        ));
    }
}

impl<F: BlockFile + 'static> Service<F> {
    /// Powers the TPM on. A TPM is manufactured only if the image says that it never had one.
    ///
    /// `startup` is for a service that starts with a running TPM; at a client's `INIT`, as with swtpm, the client or
    /// the firmware behind it sends `TPM2_Startup`. A TPM that is to be started does not continue from a stored volatile state.
    pub fn power_on(&self, delete_volatile: bool, startup: Startup) -> Result<(), EngineError> {
        let mut engine = self.engine();
        // Nothing that runs from here on is for a client to cancel.
        *self.powering() = true;
        let result = self.power_on_with(&mut engine, delete_volatile, startup);
        *self.powering() = false;
        result
    }

    fn power_on_with(
        &self,
        engine: &mut Engine,
        delete_volatile: bool,
        startup: Startup,
    ) -> Result<(), EngineError> {
        power_off(engine);
        self.state.upkeep().begin();
        let virgin = is_virgin(&self.state.vmgs());
        self.state.hold();
        if startup != Startup::None {
            self.state.start_afresh();
        }
        if self.state.continues() && self.state.clone().load(Blob::Volatile).is_err() {
            // What is wrong with it has been said. The library would take it for absent.
            self.cannot_continue("it cannot be read");
        }
        let continues = self.state.continues();
        let mut started = self.start(engine, virgin, startup);
        if let Err(e) = &started
            && continues
        {
            self.state.hold();
            self.cannot_continue(&e.to_string());
            started = self.start(engine, virgin, startup);
        } else if continues {
            log::warn("the TPM continues from a stored volatile state; its PCRs are those of then");
        }
        let settled = match started {
            Ok(()) => self.state.settle(delete_volatile).map_err(|e| {
                log::error(&format!("storing the state of the TPM that was started: {e}"));
                EngineError::State("stopped, because its state cannot be stored")
            }),
            Err(e) => {
                self.state.abandon();
                Err(e)
            }
        };
        if settled.is_err() {
            engine.stop();
            return settled;
        }
        self.locality.store(0, Ordering::SeqCst);
        if virgin {
            // The authority's key is not needed any more. Until here a start that failed is tried again with it.
            let making = std::mem::take(&mut *self.making.lock().unwrap_or_else(PoisonError::into_inner));
            let certificates = if making.authority.is_some() { "with" } else { "without" };
            log::info(&format!("manufactured a new TPM {certificates} certificates"));
        }
        Ok(())
    }

    fn cannot_continue(&self, why: &str) {
        log::warn(&format!(
            "the stored volatile state cannot be continued ({why}); the TPM starts without it"
        ));
        self.state.start_afresh();
    }

    fn start(&self, engine: &mut Engine, virgin: bool, startup: Startup) -> Result<(), EngineError> {
        if virgin {
            self.make(engine)?;
        }
        let pending = self.state.pending_ppi().map_err(|e| {
            log::error(&format!("reading the physical-presence request: {e}"));
            EngineError::State("stopped, because its image cannot be read")
        })?;
        if let Some(ppi) = pending {
            self.carry_out(engine, ppi);
        }
        engine.start(false)?;
        self.state.understood().map_err(|e| {
            log::error(&format!("reading the TPM's state again: {e}"));
            EngineError::State("stopped, because its state cannot be read")
        })?;
        let startup = match startup {
            Startup::None => return Ok(()),
            Startup::Clear => 0,
            Startup::State => 1,
        };
        let answer = engine.process(0, &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, startup])?;
        match answer.get(6..10) {
            Some([0, 0, 0, 0]) => Ok(()),
            _ => {
                log::error(&format!("TPM2_Startup({startup}) was answered with {:02x?}", answer.get(6..10)));
                Err(EngineError::State("stopped, because it refused TPM2_Startup"))
            }
        }
    }

    /// Does what was asked for, or leaves the TPM as it was and says so in the record.
    fn carry_out(&self, engine: &mut Engine, mut ppi: Ppi) {
        let before = self.state.held_state();
        let done = self.operate(engine, &ppi);
        engine.stop();
        let response = match done {
            Ok(()) => {
                log::warn(&format!("physical-presence operation {} was carried out", ppi.pending));
                records::RESPONSE_SUCCESS
            }
            Err(e) => {
                log::error(&format!("physical-presence operation {} failed: {e}", ppi.pending));
                self.state.put_back(before);
                records::RESPONSE_FAILURE
            }
        };
        ppi.finish(response);
        self.state.finish_ppi(ppi);
    }

    fn operate(&self, engine: &mut Engine, ppi: &Ppi) -> Result<(), String> {
        let operation = Operation::parse(ppi.pending, ppi.argument)
            .map_err(|_| "it is not an operation of this platform".to_owned())?;
        engine.start(false).map_err(|e| e.to_string())?;
        let mut transport = |command: &[u8]| engine.process(0, command).map_err(|e| e.to_string());
        commands::startup_clear(&mut transport)
            .and_then(|()| presence::apply(&mut transport, operation))
            .and_then(|()| commands::shutdown_clear(&mut transport))
            .map_err(|e| e.to_string())
    }

    /// Makes a TPM; its state is held until it is complete.
    fn make(&self, engine: &mut Engine) -> Result<(), EngineError> {
        let making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let made = engine.start(true).map_err(|e| e.to_string()).and_then(|()| {
            let mut transport = |command: &[u8]| engine.process(0, command).map_err(|e| e.to_string());
            let platform = making.platform_certificate.as_deref();
            let vm = self.state.vmgs().root().vm;
            let subject = Subject { version: self.state.engine_version(), vm };
            manufacture::finish(&mut transport, making.authority.as_ref(), platform, subject)
                .map_err(|e| e.to_string())
        });
        engine.stop();
        made.map_err(|e| {
            log::error(&format!("manufacturing the TPM: {e}"));
            EngineError::State("not made")
        })
    }
}
