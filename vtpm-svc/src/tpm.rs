// SPDX-License-Identifier: Apache-2.0
//! The TPM that is served: what runs its commands, where its state goes, and what the platform does to it.
//!
//! [`Tpm`] is all that the sockets know of it. A response leaves it only after the engine has returned, and
//! the engine returns only after its store has made the change durable; nothing here may reorder that.

pub mod commands;
pub mod engine;
pub mod error;
pub mod manufacture;
pub mod power;
pub mod presence;
pub mod requests;

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;

use zeroize::Zeroizing;

use crate::lock::lock;
use crate::log;
use crate::vmgs::Change;
use crate::vmgs::block::BlockFile;
use crate::vmgs::records::Submitted;
use crate::vmgs::root::FLAG_EXPORTED;
use engine::Blob;
use engine::Canceller;
use engine::Engine;
use engine::EngineError;
use engine::StateStore;
use engine::state::VmgsState;
use engine::state::WriteError;
use error::TpmError;
use power::Making;
use power::PowerOn;
use power::Startup;
use power::power_off;
use requests::Requests;

/// What clients may do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy {
    /// State blobs may leave and enter (migration).
    pub state_export: bool,
    /// Commands in locality 4 are refused.
    pub reject_locality_4: bool,
}

/// A TPM and the state that it keeps; any thread may use it.
///
/// Locks are taken in this order, where several are held: the engine, `making`, the image
/// ([`VmgsState::vmgs`]). The engine stores while it runs a command, so whoever holds the image must not wait
/// for the engine. `powering` is held for a moment, and nothing is waited for meanwhile.
pub struct Tpm<F> {
    engine: Mutex<Engine>,
    cancel: Canceller,
    state: VmgsState<F>,
    /// Only there until the TPM has been made.
    making: Mutex<Making>,
    policy: Policy,
    requests: Requests<F>,
    /// The TPM is being powered on, and made if it must be.
    powering: Mutex<bool>,
    locality: AtomicU8,
}

impl<F: BlockFile> Tpm<F> {
    /// Wraps an engine that keeps its state in `state`.
    pub fn new(engine: Engine, state: VmgsState<F>, making: Making, policy: Policy) -> Self {
        Self {
            cancel: engine.canceller(),
            engine: Mutex::new(engine),
            requests: Requests::new(state.clone()),
            state,
            making: Mutex::new(making),
            policy,
            powering: Mutex::new(false),
            locality: AtomicU8::new(0),
        }
    }

    /// The engine, for what is its own alone; nobody else's command runs meanwhile.
    pub fn engine(&self) -> MutexGuard<'_, Engine> {
        lock(&self.engine)
    }

    fn powering(&self) -> MutexGuard<'_, bool> {
        lock(&self.powering)
    }

    /// What the image keeps for others.
    pub fn requests(&self) -> &Requests<F> {
        &self.requests
    }

    /// Powers the TPM on. A TPM is manufactured only if the image says that it never had one.
    ///
    /// `startup` is for a service that starts with a running TPM; at a client's `INIT`, as with swtpm, the
    /// client or the firmware behind it sends `TPM2_Startup`. A TPM that is to be started does not continue
    /// from a stored volatile state.
    pub fn power_on(&self, delete_volatile: bool, startup: Startup) -> Result<(), EngineError> {
        let mut engine = self.engine();
        // Nothing that runs from here on is for a client to cancel.
        *self.powering() = true;
        let mut making = lock(&self.making);
        let on = PowerOn { engine: &mut engine, state: &self.state, making: &mut making, startup };
        let result = on.run(delete_volatile).inspect(|()| self.locality.store(0, Ordering::SeqCst));
        *self.powering() = false;
        result
    }

    /// Powers the TPM off in good order.
    pub fn power_off(&self) {
        power_off(&mut self.engine());
    }

    /// Powers the TPM off and ends the anchor's lease in good order.
    pub fn retire(&self) -> Result<(), WriteError> {
        self.power_off();
        self.state.vmgs().release()?;
        Ok(self.state.upkeep().look()?)
    }

    fn admit(&self, locality: u8) -> Result<(), TpmError> {
        let admitted = locality < 4 || (locality == 4 && !self.policy.reject_locality_4);
        if admitted { Ok(()) } else { Err(TpmError::Locality(locality)) }
    }

    /// Sets the locality of commands that come without one.
    pub fn set_locality(&self, locality: u8) -> Result<(), TpmError> {
        self.admit(locality)?;
        self.locality.store(locality, Ordering::SeqCst);
        Ok(())
    }

    /// Runs one command.
    pub fn execute(&self, locality: Option<u8>, command: &[u8]) -> Result<Vec<u8>, TpmError> {
        let locality = locality.unwrap_or_else(|| self.locality.load(Ordering::SeqCst));
        self.admit(locality)?;
        Ok(self.engine().process(locality, command)?)
    }

    /// Cancels the command that runs. Does not wait for the engine: that is the point of it.
    pub fn cancel(&self) -> Result<(), TpmError> {
        let off = self.engine.try_lock().is_ok_and(|engine| !engine.is_running());
        // While the TPM is being powered on, the commands that run are the platform's. The lock is held over
        // the call, which only sets a flag.
        let powering = self.powering();
        if off || *powering {
            return Err(EngineError::State("off").into());
        }
        Ok(self.cancel.cancel()?)
    }

    /// Stores the volatile state, for a later power-on that continues from it.
    pub fn store_volatile(&self) -> Result<(), TpmError> {
        let mut engine = self.engine();
        if !engine.is_running() {
            return Err(EngineError::State("off").into());
        }
        let blob = engine.state(Blob::Volatile)?;
        self.state.clone().store(Blob::Volatile, &blob).map_err(|_| TpmError::Image)?;
        engine.saved();
        Ok(())
    }

    /// A volatile state that was stored is for the power-on that continues it; here somebody wants another
    /// one.
    pub fn forget_volatile(&self) -> Result<(), TpmError> {
        let engine = self.engine();
        if engine.is_running() {
            return Err(EngineError::State("running").into());
        }
        if self.state.clone().delete(Blob::Volatile).map_err(|_| TpmError::Image)? {
            log::warn("a stored volatile state was dropped: the TPM starts anew");
        }
        Ok(())
    }

    /// A blob of the running TPM, to go on elsewhere.
    pub fn export(&self, blob: Blob) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let mut engine = self.engine();
        if !engine.is_running() {
            return Err(EngineError::State("off").into());
        }
        if !self.policy.state_export {
            log::often(
                "a client asked for TPM state; refused (start with --state-export allow to permit it)",
            );
            return Err(TpmError::Forbidden);
        }
        let data = match blob {
            Blob::Save => Zeroizing::default(),
            _ => engine.state(blob)?,
        };
        log::warn(&format!(
            "TPM state ({blob:?}) leaves through the control channel: this identity can now live twice"
        ));
        self.state.commit(&[Change::Flag(FLAG_EXPORTED)]).map_err(|e| {
            log::error(&format!("recording the export: {e}"));
            TpmError::Image
        })?;
        if blob == Blob::Volatile {
            // It goes on elsewhere.
            engine.saved();
        }
        Ok(data)
    }

    /// Replaces a blob of a TPM that is off. An encrypted one is never taken.
    pub fn import(&self, blob: Blob, data: &[u8], encrypted: bool) -> Result<(), TpmError> {
        let mut engine = self.engine();
        if engine.is_running() {
            return Err(EngineError::State("running").into());
        }
        if !self.policy.state_export || encrypted {
            log::often("a client tried to replace TPM state; refused");
            return Err(TpmError::Forbidden);
        }
        if data.is_empty() {
            return Ok(());
        }
        let valid = match blob {
            Blob::Permanent => engine.validate(blob, data, None),
            // A volatile state is worth nothing without the permanent one that it was saved with.
            Blob::Volatile => match self.state.clone().load(Blob::Permanent) {
                Ok(Some(permanent)) => engine.validate(blob, data, Some(&permanent)),
                Ok(None) => Err(EngineError::State("without the permanent state that this one belongs to")),
                Err(_) => return Err(TpmError::Image),
            },
            Blob::Save => Ok(()),
        };
        valid.inspect_err(|e| {
            log::warn(&format!("TPM state ({blob:?}) from the control channel is not valid: {e}"));
        })?;
        log::warn(&format!("TPM state ({blob:?}) was replaced through the control channel"));
        self.state.clone().store(blob, data).map_err(|_| TpmError::Image)
    }

    /// Keeps a physical-presence request for the next start.
    pub fn submit_ppi(&self, operation: u32, argument: u32) -> Result<Submitted, TpmError> {
        // A TPM that is being powered on may be carrying out the last request.
        let _engine = self.engine();
        self.requests.submit_ppi(operation, argument)
    }
}
