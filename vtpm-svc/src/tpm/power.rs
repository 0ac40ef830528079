// SPDX-License-Identifier: Apache-2.0
//! Powering the TPM on: making it if it never existed, starting it, and what the platform does before a guest
//! can.
//!
//! All of it is one commit. Nothing is answered before that, so a crash on the way leaves the TPM as it was
//! before, or (a new one) not there yet.

use super::commands;
use super::engine::Blob;
use super::engine::Engine;
use super::engine::EngineError;
use super::engine::StateStore;
use super::engine::state::VmgsState;
use super::engine::state::is_virgin;
use super::manufacture;
use super::manufacture::Authority;
use super::manufacture::Subject;
use super::presence;
use crate::log;
use crate::vmgs::block::BlockFile;
use crate::vmgs::records;
use crate::vmgs::records::Operation;
use crate::vmgs::records::Ppi;

/// What `TPM2_Startup` the service sends by itself when it starts with a running TPM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Startup {
    /// None: firmware does it.
    #[default]
    None,
    /// `TPM_SU_CLEAR`.
    Clear,
    /// `TPM_SU_STATE`.
    State,
}

/// What a new TPM gets when it is made.
#[derive(Default)]
pub struct Making {
    /// Signs certificates for its keys.
    pub authority: Option<Authority>,
    /// Goes into it as it is.
    pub platform_certificate: Option<Vec<u8>>,
}

/// Powers the TPM off in good order, whether or not its user has.
pub(super) fn power_off(engine: &mut Engine) {
    if let Err(e) = engine.shut_down() {
        log::warn(&format!(
            "the TPM was not shut down in good order ({e}); its next start counts that as a failed try of every PIN"
        ));
    }
}

/// One power-on, with all that it works on.
pub(super) struct PowerOn<'a, F> {
    pub(super) engine: &'a mut Engine,
    pub(super) state: &'a VmgsState<F>,
    /// Spent when a TPM has been made.
    pub(super) making: &'a mut Making,
    pub(super) startup: Startup,
}

impl<F: BlockFile> PowerOn<'_, F> {
    /// Powers the TPM on; `delete_volatile` drops a stored volatile state once it has been read.
    pub(super) fn run(mut self, delete_volatile: bool) -> Result<(), EngineError> {
        power_off(self.engine);
        self.state.upkeep().begin();
        let virgin = is_virgin(&self.state.vmgs());
        self.state.hold();
        if self.startup != Startup::None {
            self.state.start_afresh();
        }
        if self.state.continues() && self.state.clone().load(Blob::Volatile).is_err() {
            // What is wrong with it has been said. The library would take it for absent.
            self.cannot_continue("it cannot be read");
        }
        let continues = self.state.continues();
        let mut started = self.start(virgin);
        if let Err(e) = &started
            && continues
        {
            self.state.hold();
            self.cannot_continue(&e.to_string());
            started = self.start(virgin);
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
            self.engine.stop();
            return settled;
        }
        if virgin {
            // The authority's key is not needed any more. Until here a start that failed is tried again with
            // it.
            let making = std::mem::take(self.making);
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

    fn start(&mut self, virgin: bool) -> Result<(), EngineError> {
        if virgin {
            self.make()?;
        }
        let pending = self.state.pending_ppi().map_err(|e| {
            log::error(&format!("reading the physical-presence request: {e}"));
            EngineError::State("stopped, because its image cannot be read")
        })?;
        if let Some(ppi) = pending {
            self.carry_out(ppi);
        }
        self.engine.start(false)?;
        self.state.understood().map_err(|e| {
            log::error(&format!("reading the TPM's state again: {e}"));
            EngineError::State("stopped, because its state cannot be read")
        })?;
        let startup = match self.startup {
            Startup::None => return Ok(()),
            Startup::Clear => 0,
            Startup::State => 1,
        };
        let answer = self.engine.process(0, &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, startup])?;
        match answer.get(6..10) {
            Some([0, 0, 0, 0]) => Ok(()),
            _ => {
                log::error(&format!("TPM2_Startup({startup}) was answered with {:02x?}", answer.get(6..10)));
                Err(EngineError::State("stopped, because it refused TPM2_Startup"))
            }
        }
    }

    /// Does what was asked for, or leaves the TPM as it was and says so in the record.
    fn carry_out(&mut self, mut ppi: Ppi) {
        let before = self.state.held_state();
        let done = self.operate(&ppi);
        self.engine.stop();
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

    fn operate(&mut self, ppi: &Ppi) -> Result<(), String> {
        let operation = Operation::parse(ppi.pending, ppi.argument)
            .map_err(|_| "it is not an operation of this platform".to_owned())?;
        self.engine.start(false).map_err(|e| e.to_string())?;
        let mut transport = |command: &[u8]| self.engine.process(0, command).map_err(|e| e.to_string());
        commands::startup_clear(&mut transport)
            .and_then(|()| presence::apply(&mut transport, operation))
            .and_then(|()| commands::shutdown_clear(&mut transport))
            .map_err(|e| e.to_string())
    }

    /// Makes a TPM; its state is held until it is complete.
    fn make(&mut self) -> Result<(), EngineError> {
        let Self { engine, state, making, .. } = self;
        let made = engine.start(true).map_err(|e| e.to_string()).and_then(|()| {
            let mut transport = |command: &[u8]| engine.process(0, command).map_err(|e| e.to_string());
            let platform = making.platform_certificate.as_deref();
            let vm = state.vmgs().root().vm;
            let subject = Subject { version: state.engine_version(), vm };
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
