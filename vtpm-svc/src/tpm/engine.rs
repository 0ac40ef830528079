// SPDX-License-Identifier: Apache-2.0
//! The TPM 2.0 itself: libtpms behind a safe interface.
//!
//! There is one TPM per process, because the library keeps it in globals; [`Engine::take`] can succeed once.
//! Storing is synchronous: a command that changes the permanent state calls [`StateStore::store`] before it
//! has a response, so a store that returns only when the bytes are durable makes every response durable. If
//! it fails, the library answers this command and all later ones with failure (0x101) until the process is
//! replaced: that is wanted.
//!
//! Whether a TPM may be manufactured is decided before the start and never by the absence of a blob.

mod error;
mod ffi;
pub mod state;
mod store;
pub mod upkeep;

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

pub use error::EngineError;
pub use ffi::HashStep;
pub use store::Blob;
pub use store::StateStore;
pub use store::StoreFailed;

use ffi::Api;
use zeroize::Zeroizing;

/// Cancels the running command; usable from any thread.
#[derive(Clone, Copy)]
pub struct Canceller(Api);

impl Canceller {
    /// Asks the running command to stop; it then answers with `TPM_RC_CANCELED`, or completes.
    pub fn cancel(&self) -> Result<(), EngineError> {
        self.0.cancel()
    }
}

/// The shared library, loaded but not used yet.
#[derive(Clone, Copy)]
pub struct Library(Api);

impl Library {
    /// Loads it and refuses versions that are older than those that were tried.
    ///
    /// The number cannot tell whether a version has the mends of CVE-2023-1017, CVE-2023-1018 and
    /// CVE-2025-49133: distributions put them into a library that goes on calling itself 0.9.2. Whoever
    /// builds upstream's own 0.9.2 to 0.9.5 lacks them, and the cage is what is left then.
    pub fn load() -> Result<Self, EngineError> {
        let api = Api::load()?;
        let v = api.version();
        if v < 0x00_0902 {
            return Err(EngineError::TooOld(v >> 16 & 0xff, v >> 8 & 0xff, v & 0xff));
        }
        Ok(Self(api))
    }

    /// The library's version as 0x00MMmmpp.
    pub fn version(&self) -> u32 {
        self.0.version()
    }
}

fn response_code(response: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(response.get(6..10)?.try_into().ok()?))
}

/// The TPM of this process.
pub struct Engine {
    api: Api,
    running: bool,
    broken: bool,
    /// Whether something was done since the power-on, or since the last `TPM2_Shutdown`, that one has to
    /// conclude.
    open: bool,
}

/// `TPM2_Shutdown(CLEAR)`.
const SHUTDOWN_CLEAR: [u8; 12] = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x45, 0, 0];
/// Command code of `TPM2_Shutdown`.
const SHUTDOWN: [u8; 4] = [0, 0, 1, 0x45];
/// `TPM_RC_RETRY`: a TPM that tests itself first.
const RC_RETRY: u32 = 0x922;
/// `TPM_RC_INITIALIZE`: it was not started, so there is nothing to shut down.
const RC_INITIALIZE: u32 = 0x100;

static TAKEN: AtomicBool = AtomicBool::new(false);

impl Engine {
    /// Becomes the process' TPM; nothing of the state is read yet.
    pub fn take(library: Library, store: Box<dyn StateStore>) -> Result<Self, EngineError> {
        let Library(api) = library;
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(EngineError::Taken);
        }
        *ffi::host() = Some(ffi::Host { store, may_manufacture: false });
        api.prepare()?;
        Ok(Self { api, running: false, broken: false, open: false })
    }

    /// The library's version as 0x00MMmmpp.
    pub fn version(&self) -> u32 {
        self.api.version()
    }

    /// A handle that cancels from other threads.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.api)
    }

    /// Whether commands are accepted.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Powers the TPM on (again). `may_manufacture` allows making a new one if there is no permanent state.
    pub fn start(&mut self, may_manufacture: bool) -> Result<(), EngineError> {
        self.stop();
        if self.broken {
            return Err(EngineError::State("out of order"));
        }
        if let Some(host) = ffi::host().as_mut() {
            host.may_manufacture = may_manufacture;
        }
        ffi::set_locality(0);
        let result = self.api.main_init();
        self.running = result.is_ok();
        self.open = false;
        result
    }

    /// Powers the TPM off as a platform does: with `TPM2_Shutdown`, if whoever used it has not sent that.
    ///
    /// Without it the next start takes the end for an attack: it counts as a failed try of every PIN. The TPM
    /// is off in any case; an error says that the next start will take it so.
    pub fn shut_down(&mut self) -> Result<(), EngineError> {
        let concluded = self.conclude();
        self.stop();
        concluded
    }

    fn conclude(&mut self) -> Result<(), EngineError> {
        for _ in 0..5 {
            if !self.running || !self.open {
                break;
            }
            match response_code(&self.process(0, &SHUTDOWN_CLEAR)?) {
                Some(0 | RC_INITIALIZE) => break,
                Some(RC_RETRY) => {}
                Some(code) => return Err(EngineError::Refused(code)),
                None => return Err(EngineError::State("without an answer to TPM2_Shutdown")),
            }
        }
        Ok(())
    }

    /// The TPM's state as it is now has been saved to be continued, here or elsewhere. A power-off that
    /// follows is no end: a `TPM2_Shutdown` would change what the saved state belongs to.
    pub fn saved(&mut self) {
        self.open = false;
    }

    /// Powers the TPM off at once; the volatile state is lost.
    pub fn stop(&mut self) {
        if self.running {
            self.api.terminate();
            self.running = false;
        }
    }

    /// Runs one command.
    pub fn process(&mut self, locality: u8, command: &[u8]) -> Result<Vec<u8>, EngineError> {
        self.need_running()?;
        ffi::set_locality(locality);
        let response = self.api.process(command);
        let shutdown = command.get(6..10) == Some(&SHUTDOWN[..]);
        self.open = !(shutdown && response.as_deref().is_ok_and(|r| response_code(r) == Some(0)));
        response
    }

    /// Current, smallest and largest command buffer; a change is possible only while the TPM is off.
    pub fn buffer_size(&mut self, wanted: u32) -> Result<(u32, u32, u32), EngineError> {
        if wanted != 0 && self.running {
            return Err(EngineError::State("running"));
        }
        Ok(self.api.buffer_size(wanted))
    }

    /// A copy of a state blob of the running TPM.
    pub fn state(&self, blob: Blob) -> Result<Zeroizing<Vec<u8>>, EngineError> {
        let state = match blob {
            Blob::Volatile => self.api.volatile_all(),
            _ => self.api.get_state(blob),
        };
        state.map(Zeroizing::new)
    }

    /// Whether a blob is one that the library would accept; a volatile state belongs to a permanent one. Only
    /// while the TPM is off.
    pub fn validate(&mut self, blob: Blob, data: &[u8], permanent: Option<&[u8]>) -> Result<(), EngineError> {
        if self.running {
            return Err(EngineError::State("running"));
        }
        let base = permanent.map_or(Ok(()), |state| self.api.set_state(Blob::Permanent, state));
        let result =
            base.and_then(|()| self.api.set_state(blob, data)).and_then(|()| self.api.validate(blob));
        if let Err(e) = self.api.forget_states() {
            // A blob that lingers in the library could become the TPM's state: better no TPM.
            self.broken = true;
            return Err(e);
        }
        result
    }

    /// The library's description of itself, as JSON.
    pub fn info(&self, flags: u32) -> String {
        self.api.info(flags)
    }

    /// One step of a locality-4 measurement.
    pub fn hash(&mut self, step: HashStep<'_>) -> Result<(), EngineError> {
        self.need_running()?;
        self.open = true;
        ffi::set_locality(4);
        let result = self.api.hash(step);
        ffi::set_locality(0);
        result
    }

    /// Whether a dynamic launch has happened since the flag was reset.
    pub fn established(&self) -> Result<bool, EngineError> {
        self.need_running()?;
        self.api.established()
    }

    /// Resets that flag, from a locality that may.
    pub fn reset_established(&mut self, locality: u8) -> Result<(), EngineError> {
        self.need_running()?;
        ffi::set_locality(locality);
        let result = self.api.reset_established();
        ffi::set_locality(0);
        result
    }

    fn need_running(&self) -> Result<(), EngineError> {
        if self.running { Ok(()) } else { Err(EngineError::State("off")) }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        *ffi::host() = None;
        TAKEN.store(false, Ordering::SeqCst);
    }
}
