// SPDX-License-Identifier: Apache-2.0
//! The TPM 2.0 itself: libtpms behind a safe interface.
//!
//! There is one TPM per process, because the library keeps it in globals; [`Engine::take`] can succeed once. Storing is
//! synchronous: a command that changes the permanent state calls [`StateStore::store`] before it has a response, so a
//! store that returns only when the bytes are durable makes every response durable. If it fails, the library answers
//! this command and all later ones with failure (0x101) until the process is replaced: that is wanted.
//!
//! Whether a TPM may be manufactured is decided before the start and never by the absence of a blob.

mod ffi;
pub mod state;
pub mod upkeep;

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use ffi::Api;
use zeroize::Zeroizing;

/// Why the engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The shared library is missing or too old.
    #[error("cannot load libtpms ({0}); install it (Debian: `apt-get install libtpms0`)")]
    NoLibrary(String),
    /// The library's version is below the oldest that distributions still mend.
    #[error(
        "libtpms {0}.{1}.{2} is too old; 0.9.2 with your distribution's fixes is the oldest that this service accepts"
    )]
    TooOld(u32, u32, u32),
    /// There is one TPM per process.
    #[error("this process already has a TPM")]
    Taken,
    /// The library returned an error code.
    #[error("libtpms answered {words} ({0:#x})", words = result_words(*.0))]
    Refused(u32),
    /// Not possible in this state.
    #[error("the TPM is {0}")]
    State(&'static str),
}

fn result_words(code: u32) -> &'static str {
    match code {
        0x03 => "bad parameter",
        0x09 => "failure",
        0x0a => "bad ordinal",
        0x11 => "out of memory",
        0x15 => "short buffer",
        0x17 => "no space",
        0x1f => "i/o error",
        0x101 => "failure mode",
        0x800 => "retry",
        _ => "an error",
    }
}

/// One of the library's state blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blob {
    /// Seeds, NV, persistent objects.
    Permanent,
    /// PCRs, sessions, transient objects.
    Volatile,
    /// Unused by TPM 2.0, but the library may name it.
    Save,
}

impl Blob {
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "permall" => Some(Self::Permanent),
            "volatilestate" => Some(Self::Volatile),
            "savestate" => Some(Self::Save),
            _ => None,
        }
    }

    /// The number that library and control protocol use.
    pub fn number(self) -> u32 {
        match self {
            Self::Permanent => 1,
            Self::Volatile => 2,
            Self::Save => 4,
        }
    }

    /// The state-blob type of the control protocol (1, 2, 3).
    pub fn from_protocol(kind: u32) -> Option<Self> {
        match kind {
            1 => Some(Self::Permanent),
            2 => Some(Self::Volatile),
            3 => Some(Self::Save),
            _ => None,
        }
    }
}

/// A blob could not be read or written; the details are the store's to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state store failed")]
pub struct StoreFailed;

/// Where blobs are kept.
pub trait StateStore: Send {
    /// Reads a blob; `None` if there is none.
    fn load(&mut self, blob: Blob) -> Result<Option<Zeroizing<Vec<u8>>>, StoreFailed>;
    /// Writes a blob; durable when it returns.
    fn store(&mut self, blob: Blob, data: &[u8]) -> Result<(), StoreFailed>;
    /// Removes a blob and says whether it was there.
    fn delete(&mut self, blob: Blob) -> Result<bool, StoreFailed>;
}

/// One step of a measurement from locality 4.
#[derive(Debug, Clone, Copy)]
pub enum HashStep<'a> {
    /// Resets the dynamic PCRs and begins.
    Start,
    /// More data.
    Data(&'a [u8]),
    /// Extends.
    End,
}

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
    /// The number cannot tell whether a version has the mends of CVE-2023-1017, CVE-2023-1018 and CVE-2025-49133: distributions
    /// put them into a library that goes on calling itself 0.9.2. Whoever builds upstream's own 0.9.2 to 0.9.5 lacks them, and
    /// the cage is what is left then.
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
    /// Whether something was done since the power-on, or since the last `TPM2_Shutdown`, that one has to conclude.
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
    /// Without it the next start takes the end for an attack: it counts as a failed try of every PIN. The TPM is off in any
    /// case; an error says that the next start will take it so.
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

    /// The TPM's state as it is now has been saved to be continued, here or elsewhere. A power-off that follows is no end: a
    /// `TPM2_Shutdown` would change what the saved state belongs to.
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

    /// Whether a blob is one that the library would accept; a volatile state belongs to a permanent one. Only while the TPM
    /// is off.
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
