// SPDX-License-Identifier: Apache-2.0
//! libtpms, found and called: the only unsafe code of the engine.
//!
//! The library is loaded at run time, so that building needs no development package and a host without it
//! gets a sentence instead of a linker error. Declarations follow `libtpms/tpm_library.h`, `tpm_tis.h` and
//! `tpm_memory.h` of version 0.9.2; the ABI carries symbol versions and has only grown since.
//!
//! The library keeps its state in globals and is not thread-safe: [`Api`] hands out raw calls, and
//! [`super::Engine`] (of which there is one per process) makes sure that one thread at a time uses them. The
//! single exception is the cancel call, which sets a flag and is made to be called from another thread.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::ffi::c_char;
use std::ffi::c_int;
use std::ffi::c_uchar;
use std::ffi::c_uint;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;

use libloading::Library;
use zeroize::Zeroize;
use zeroize::Zeroizing;

use crate::lock::lock;

use super::error::EngineError;
use super::store::Blob;
use super::store::StateStore;

/// `TPM_SUCCESS`.
const OK: u32 = 0;
/// `TPM_FAIL`.
const FAIL: u32 = 9;
/// `TPM_RETRY`: from the load callback it means "there is no such blob".
const RETRY: u32 = 0x800;
const FILE: &str = "libtpms.so.0";

#[repr(C)]
struct Callbacks {
    size: c_int,
    nvram_init: extern "C" fn() -> u32,
    nvram_load: unsafe extern "C" fn(*mut *mut c_uchar, *mut u32, u32, *const c_char) -> u32,
    nvram_store: unsafe extern "C" fn(*const c_uchar, u32, u32, *const c_char) -> u32,
    nvram_delete: unsafe extern "C" fn(u32, *const c_char, c_uchar) -> u32,
    io_init: extern "C" fn() -> u32,
    io_locality: unsafe extern "C" fn(*mut u32, u32) -> u32,
    io_presence: unsafe extern "C" fn(*mut c_uchar, u32) -> u32,
}

/// What the callbacks need, beside the library's own globals.
pub(super) struct Host {
    pub(super) store: Box<dyn StateStore>,
    /// Whether an absent permanent state may be answered with "make a new TPM".
    pub(super) may_manufacture: bool,
}

static HOST: Mutex<Option<Host>> = Mutex::new(None);
static LOCALITY: AtomicU8 = AtomicU8::new(0);

/// The callbacks' side of the engine. Never held over a call into the library, which would call back and wait
/// for it.
pub(super) fn host() -> MutexGuard<'static, Option<Host>> {
    lock(&HOST)
}

/// Sets the locality of the next command.
pub(super) fn set_locality(locality: u8) {
    LOCALITY.store(locality, Ordering::SeqCst);
}

/// Which blob the library names.
///
/// # Safety
/// `name` is null or a C string.
unsafe fn blob(name: *const c_char) -> Option<Blob> {
    if name.is_null() {
        return None;
    }
    // SAFETY: the caller passes a C string.
    Blob::from_name(unsafe { CStr::from_ptr(name) }.to_str().ok()?)
}

extern "C" fn succeed() -> u32 {
    OK
}

unsafe extern "C" fn load(data: *mut *mut c_uchar, length: *mut u32, _tpm: u32, name: *const c_char) -> u32 {
    // SAFETY: libtpms passes a string literal.
    let Some(blob) = (unsafe { blob(name) }) else { return FAIL };
    let mut guard = host();
    let Some(host) = guard.as_mut() else { return FAIL };
    let bytes = match host.store.load(blob) {
        Ok(Some(bytes)) => bytes,
        Ok(None) if blob == Blob::Permanent && !host.may_manufacture => return FAIL,
        Ok(None) => return RETRY,
        Err(_) => return FAIL,
    };
    let Ok(len) = u32::try_from(bytes.len()) else { return FAIL };
    // SAFETY: plain allocation; libtpms frees it with free(3), which its TPM_Free is.
    let buffer = unsafe { libc::malloc(bytes.len().max(1)) }.cast::<c_uchar>();
    if buffer.is_null() {
        return FAIL;
    }
    // SAFETY: the buffer was just allocated with at least `bytes.len()` bytes; the out-pointers are libtpms'
    // locals.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len());
        *data = buffer;
        *length = len;
    }
    OK
}

unsafe extern "C" fn store(data: *const c_uchar, length: u32, _tpm: u32, name: *const c_char) -> u32 {
    // SAFETY: libtpms passes a string literal.
    let Some(blob) = (unsafe { blob(name) }) else { return FAIL };
    if data.is_null() {
        return FAIL;
    }
    // SAFETY: libtpms passes a buffer of `length` bytes that lives over this call.
    let bytes = unsafe { std::slice::from_raw_parts(data, length as usize) };
    match host().as_mut().map(|h| h.store.store(blob, bytes)) {
        Some(Ok(())) => OK,
        _ => FAIL,
    }
}

unsafe extern "C" fn delete(_tpm: u32, name: *const c_char, must_exist: c_uchar) -> u32 {
    // SAFETY: libtpms passes a string literal.
    let Some(blob) = (unsafe { blob(name) }) else { return FAIL };
    match host().as_mut().map(|h| h.store.delete(blob)) {
        Some(Ok(existed)) if existed || must_exist == 0 => OK,
        _ => FAIL,
    }
}

unsafe extern "C" fn locality(out: *mut u32, _tpm: u32) -> u32 {
    // SAFETY: the out-pointer is libtpms' local.
    unsafe { *out = u32::from(LOCALITY.load(Ordering::SeqCst)) };
    OK
}

unsafe extern "C" fn presence(out: *mut c_uchar, _tpm: u32) -> u32 {
    // SAFETY: the out-pointer is libtpms' local.
    unsafe { *out = 0 };
    OK
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

/// The library's functions.
#[derive(Clone, Copy)]
pub(super) struct Api {
    get_version: unsafe extern "C" fn() -> u32,
    choose: unsafe extern "C" fn(c_int) -> u32,
    register: unsafe extern "C" fn(*mut Callbacks) -> u32,
    main_init: unsafe extern "C" fn() -> u32,
    terminate: unsafe extern "C" fn(),
    process: unsafe extern "C" fn(*mut *mut c_uchar, *mut u32, *mut u32, *mut c_uchar, u32) -> u32,
    volatile_all: unsafe extern "C" fn(*mut *mut c_uchar, *mut u32) -> u32,
    cancel: unsafe extern "C" fn() -> u32,
    get_info: unsafe extern "C" fn(c_int) -> *mut c_char,
    buffer_size: unsafe extern "C" fn(u32, *mut u32, *mut u32) -> u32,
    set_state: unsafe extern "C" fn(c_int, *const c_uchar, u32) -> u32,
    get_state: unsafe extern "C" fn(c_int, *mut *mut c_uchar, *mut u32) -> u32,
    validate: unsafe extern "C" fn(c_int, c_uint) -> u32,
    hash_start: unsafe extern "C" fn() -> u32,
    hash_data: unsafe extern "C" fn(*const c_uchar, u32) -> u32,
    hash_end: unsafe extern "C" fn() -> u32,
    established: unsafe extern "C" fn(*mut c_uchar) -> u32,
    reset_established: unsafe extern "C" fn() -> u32,
    free: unsafe extern "C" fn(*mut c_uchar),
    debug_fd: unsafe extern "C" fn(c_int),
}

fn words(result: u32) -> Result<(), EngineError> {
    if result == OK { Ok(()) } else { Err(EngineError::Refused(result)) }
}

impl Api {
    /// Loads the library and looks up every function that is used.
    pub(super) fn load() -> Result<Self, EngineError> {
        // SAFETY: libtpms' initialisers touch nothing but its own data. The library is never unloaded, so the
        // function pointers below stay valid for the life of the process.
        let library: &'static Library = match unsafe { Library::new(FILE) } {
            Ok(l) => Box::leak(Box::new(l)),
            Err(e) => return Err(EngineError::NoLibrary(e.to_string())),
        };
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the field's type is the C declaration of this symbol.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|e| EngineError::NoLibrary(format!("{FILE} lacks {}: {e}", $name)))?
            };
        }
        Ok(Self {
            get_version: symbol!("TPMLIB_GetVersion"),
            choose: symbol!("TPMLIB_ChooseTPMVersion"),
            register: symbol!("TPMLIB_RegisterCallbacks"),
            main_init: symbol!("TPMLIB_MainInit"),
            terminate: symbol!("TPMLIB_Terminate"),
            process: symbol!("TPMLIB_Process"),
            volatile_all: symbol!("TPMLIB_VolatileAll_Store"),
            cancel: symbol!("TPMLIB_CancelCommand"),
            get_info: symbol!("TPMLIB_GetInfo"),
            buffer_size: symbol!("TPMLIB_SetBufferSize"),
            set_state: symbol!("TPMLIB_SetState"),
            get_state: symbol!("TPMLIB_GetState"),
            validate: symbol!("TPMLIB_ValidateState"),
            hash_start: symbol!("TPM_IO_Hash_Start"),
            hash_data: symbol!("TPM_IO_Hash_Data"),
            hash_end: symbol!("TPM_IO_Hash_End"),
            established: symbol!("TPM_IO_TpmEstablished_Get"),
            reset_established: symbol!("TPM_IO_TpmEstablished_Reset"),
            free: symbol!("TPM_Free"),
            debug_fd: symbol!("TPMLIB_SetDebugFD"),
        })
    }

    /// Version as 0x00MMmmpp.
    pub(super) fn version(&self) -> u32 {
        // SAFETY: no arguments, no state.
        unsafe { (self.get_version)() }
    }

    /// Chooses TPM 2.0 and registers the callbacks.
    pub(super) fn prepare(&self) -> Result<(), EngineError> {
        // On a failure the library would print the whole command, which may carry a secret, to standard
        // error.
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            // SAFETY: the descriptor is given away for good.
            unsafe { (self.debug_fd)(std::os::fd::IntoRawFd::into_raw_fd(null)) };
        }
        let mut callbacks = Callbacks {
            size: size_of::<Callbacks>() as c_int,
            nvram_init: succeed,
            nvram_load: load,
            nvram_store: store,
            nvram_delete: delete,
            io_init: succeed,
            io_locality: locality,
            io_presence: presence,
        };
        // SAFETY: 1 is TPMLIB_TPM_VERSION_2; the callback struct is copied by the library.
        unsafe {
            words((self.choose)(1))?;
            words((self.register)(&mut callbacks))
        }
    }

    pub(super) fn main_init(&self) -> Result<(), EngineError> {
        // SAFETY: callbacks are registered; one thread at a time is the Engine's promise.
        words(unsafe { (self.main_init)() })
    }

    pub(super) fn terminate(&self) {
        // SAFETY: as above; harmless when not running.
        unsafe { (self.terminate)() }
    }

    /// Runs a command. The slice is copied, because the library takes a pointer to mutable bytes.
    pub(super) fn process(&self, command: &[u8]) -> Result<Vec<u8>, EngineError> {
        // It may carry a password.
        let mut private = Zeroizing::new(command.to_vec());
        self.collect(|out, len| {
            let mut room = 0;
            // SAFETY: `private` has the length given; the library allocates the response.
            unsafe { (self.process)(out, len, &mut room, private.as_mut_ptr(), private.len() as u32) }
        })
    }

    /// Runs a call that returns an allocated buffer, and takes the buffer over.
    fn collect(&self, call: impl FnOnce(*mut *mut c_uchar, *mut u32) -> u32) -> Result<Vec<u8>, EngineError> {
        let (mut buffer, mut len) = (std::ptr::null_mut(), 0);
        let result = call(&mut buffer, &mut len);
        let bytes = if buffer.is_null() {
            Vec::new()
        } else {
            // SAFETY: the library says that `len` bytes at `buffer` are valid; it gave the buffer away.
            let theirs = unsafe { std::slice::from_raw_parts_mut(buffer, len as usize) };
            let ours = theirs.to_vec();
            // What was unsealed, or a whole state, must not stay in the heap.
            theirs.zeroize();
            ours
        };
        // SAFETY: allocated by the library, or null, and not used again.
        unsafe { (self.free)(buffer) };
        words(result).map(|()| bytes)
    }

    pub(super) fn volatile_all(&self) -> Result<Vec<u8>, EngineError> {
        // SAFETY: out-pointers are locals of `collect`.
        self.collect(|out, len| unsafe { (self.volatile_all)(out, len) })
    }

    pub(super) fn get_state(&self, blob: Blob) -> Result<Vec<u8>, EngineError> {
        // SAFETY: out-pointers are locals of `collect`.
        self.collect(|out, len| unsafe { (self.get_state)(blob.number() as c_int, out, len) })
    }

    pub(super) fn set_state(&self, blob: Blob, data: &[u8]) -> Result<(), EngineError> {
        // SAFETY: the library copies `data`.
        words(unsafe { (self.set_state)(blob.number() as c_int, data.as_ptr(), data.len() as u32) })
    }

    /// Forgets states that were set and not used.
    ///
    /// Setting a null state would not do: the library takes that for "start without one" and manufactures a
    /// new TPM. Changing the version and back drops all cached states, and is refused while a TPM runs.
    pub(super) fn forget_states(&self) -> Result<(), EngineError> {
        // SAFETY: 0 and 1 are the two values of the enumeration.
        unsafe {
            words((self.choose)(0))?;
            words((self.choose)(1))
        }
    }

    pub(super) fn validate(&self, blob: Blob) -> Result<(), EngineError> {
        // SAFETY: plain integers.
        words(unsafe { (self.validate)(blob.number() as c_int, 0) })
    }

    /// The current, smallest and largest size of the command buffer; 0 asks.
    pub(super) fn buffer_size(&self, wanted: u32) -> (u32, u32, u32) {
        let (mut min, mut max) = (0, 0);
        // SAFETY: out-pointers are locals.
        let size = unsafe { (self.buffer_size)(wanted, &mut min, &mut max) };
        (size, min, max)
    }

    pub(super) fn info(&self, flags: u32) -> String {
        // SAFETY: plain integer in; the result is null or an allocated C string.
        let text = unsafe { (self.get_info)(flags as c_int) };
        if text.is_null() {
            return String::new();
        }
        // SAFETY: a C string of the library's.
        let owned = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        // SAFETY: allocated by the library with malloc(3), not used again.
        unsafe { (self.free)(text.cast()) };
        owned
    }

    pub(super) fn hash(&self, step: HashStep<'_>) -> Result<(), EngineError> {
        // SAFETY: the data slice lives over the call.
        words(unsafe {
            match step {
                HashStep::Start => (self.hash_start)(),
                HashStep::Data(d) => (self.hash_data)(d.as_ptr(), d.len() as u32),
                HashStep::End => (self.hash_end)(),
            }
        })
    }

    pub(super) fn established(&self) -> Result<bool, EngineError> {
        let mut bit = 0;
        // SAFETY: the out-pointer is a local.
        words(unsafe { (self.established)(&mut bit) }).map(|()| bit != 0)
    }

    pub(super) fn reset_established(&self) -> Result<(), EngineError> {
        // SAFETY: no arguments.
        words(unsafe { (self.reset_established)() })
    }

    /// May be called from any thread while a command runs.
    pub(super) fn cancel(&self) -> Result<(), EngineError> {
        // SAFETY: sets a flag that the command's long loops poll.
        words(unsafe { (self.cancel)() })
    }
}
