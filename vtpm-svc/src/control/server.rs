// SPDX-License-Identifier: Apache-2.0
//! The server: one thread per client, one engine behind a lock, cancel beside it.
//!
//! A response leaves only after the engine has returned, and the engine returns only after its store has made the
//! change durable; nothing here may reorder that. Clients are not trusted: messages are bounded before they are read,
//! the number of clients is limited, and a client that misbehaves loses its connection and nothing else.

use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::clients::Clients;
use super::clients::MAX_CLIENTS;
use super::clients::Seat;
use super::data;
use super::data::Received;
use super::power::power_off;
use super::socket::Listener;
use super::socket::Stream;
use super::wire;
use super::wire::Request;
use super::wire::Response;
use super::wire::code;
use crate::log;
use crate::pace::Pace;
use crate::tpm::engine::Blob;
use crate::tpm::engine::Canceller;
use crate::tpm::engine::Engine;
use crate::tpm::engine::EngineError;
use crate::tpm::engine::HashStep;
use crate::tpm::engine::StateStore;
use crate::tpm::engine::state::VmgsState;
use crate::tpm::engine::state::WriteError;
use crate::tpm::manufacture::Authority;
use crate::vmgs::Change;
use crate::vmgs::block::BlockFile;
use crate::vmgs::records::RtcSkew;
use crate::vmgs::root::FLAG_EXPORTED;

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

/// A physical-presence request is for the next start, so a person who makes some in a row is served.
const REQUEST_INTERVAL: Duration = Duration::from_secs(10);
const REQUEST_BURST: u32 = 16;

/// What clients may do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy {
    /// State blobs may leave and enter through the control channel (migration).
    pub state_export: bool,
    /// Commands in locality 4 are refused.
    pub reject_locality_4: bool,
    /// The service ends when the control client, or the last of several, is gone.
    pub terminate: bool,
}

/// What a new TPM gets when it is made.
#[derive(Default)]
pub struct Making {
    /// Signs certificates for its keys.
    pub authority: Option<Authority>,
    /// Goes into it as it is.
    pub platform_certificate: Option<Vec<u8>>,
}

/// Why the service ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A control client asked for it.
    Shutdown,
    /// The client is gone and `terminate` was asked for.
    ClientGone,
    /// A signal.
    Signal,
}

/// Everything that the threads share.
pub struct Service<F> {
    engine: Mutex<Engine>,
    cancel: Canceller,
    pub(super) state: VmgsState<F>,
    /// Only there until the TPM has been made.
    pub(super) making: Mutex<Making>,
    pub(super) policy: Policy,
    pub(super) control_clients: AtomicUsize,
    /// How often the guest may change its physical-presence request.
    pub(super) requests: Pace,
    /// The TPM is being powered on, and made if it must be.
    pub(super) powering: Mutex<bool>,
    pub(super) locality: AtomicU8,
    data_fd_in_use: AtomicBool,
    end: Sender<End>,
}

/// A listening socket and what is done with its clients.
struct Acceptor<F> {
    listener: Listener,
    name: &'static str,
    serve: fn(&Arc<Service<F>>, Stream, &Seat),
    clients: Arc<Clients>,
}

impl<F> Acceptor<F> {
    fn new(listener: Listener, name: &'static str, serve: fn(&Arc<Service<F>>, Stream, &Seat)) -> Arc<Self> {
        Arc::new(Self { listener, name, serve, clients: Arc::default() })
    }
}

impl<F: BlockFile + 'static> Service<F> {
    /// Wraps an engine that keeps its state in `state`.
    pub fn new(
        engine: Engine,
        state: VmgsState<F>,
        making: Making,
        policy: Policy,
        end: Sender<End>,
    ) -> Self {
        Self {
            cancel: engine.canceller(),
            engine: Mutex::new(engine),
            state,
            making: Mutex::new(making),
            policy,
            control_clients: AtomicUsize::new(0),
            requests: Pace::new(REQUEST_INTERVAL, REQUEST_BURST),
            powering: Mutex::new(false),
            locality: AtomicU8::new(0),
            data_fd_in_use: AtomicBool::new(false),
            end,
        }
    }

    pub(super) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn powering(&self) -> MutexGuard<'_, bool> {
        self.powering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vmgs(&self) -> MutexGuard<'_, crate::vmgs::Vmgs<F>> {
        self.state.vmgs()
    }

    pub(super) fn finish(&self, why: End) {
        // The receiver is gone only when the service is ending anyway.
        let _ = self.end.send(why);
    }

    /// Serves data clients until the process ends, from a thread of its own.
    pub fn serve_data(self: &Arc<Self>, listener: Listener) {
        self.spawn("data", move |service| service.serve_data_here(listener));
    }

    /// Serves data clients, the first of them on this thread: a client that is waiting already is answered without a
    /// change of threads. Returns when that client is gone; others are then served by other threads.
    pub fn serve_data_here(self: &Arc<Self>, listener: Listener) {
        self.accept_loop(Acceptor::new(listener, "data", |service, stream, seat| {
            service.data_client(stream, Some(seat));
        }));
    }

    /// Serves control clients until the process ends.
    pub fn serve_control(self: &Arc<Self>, listener: Listener) {
        self.spawn("control", move |service| {
            service.accept_loop(Acceptor::new(listener, "control", |service, stream, seat| {
                service.control_client(stream, Some(seat));
            }));
        });
    }

    /// Serves one data client that is connected already.
    pub fn serve_data_stream(self: &Arc<Self>, stream: Stream) {
        self.spawn("data", move |service| service.data_client(stream, None));
    }

    /// Powers the TPM off and ends the anchor's lease in good order.
    pub fn retire(&self) -> Result<(), WriteError> {
        power_off(&mut self.engine());
        self.vmgs().release()?;
        Ok(self.state.upkeep().look()?)
    }

    /// Serves one control client that is connected already.
    pub fn serve_control_stream(self: &Arc<Self>, stream: Stream) {
        self.spawn("control", move |service| service.control_client(stream, None));
    }

    /// Whether there is a thread for it now.
    fn spawn(self: &Arc<Self>, name: &str, run: impl FnOnce(&Arc<Self>) + Send + 'static) -> bool {
        let service = self.clone();
        let spawned = std::thread::Builder::new().name(name.into()).spawn(move || run(&service));
        if let Err(e) = &spawned {
            log::error(&format!("no thread for a {name} client: {e}"));
        }
        spawned.is_ok()
    }

    /// Waits for a client, leaves the next one to a new thread, and serves this one.
    fn accept_loop(self: &Arc<Self>, acceptor: Arc<Acceptor<F>>) {
        let Acceptor { listener, name, serve, clients } = &*acceptor;
        loop {
            let stream = match listener.accept() {
                Ok(stream) => stream,
                Err(e) => {
                    log::often(&format!("accepting a {name} client: {e}"));
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    continue;
                }
            };
            // One thread at a time takes places: the one that accepts.
            let seat = match clients.admit(&stream) {
                Ok(Some(seat)) => seat,
                Ok(None) => {
                    log::often(&format!(
                        "more than {MAX_CLIENTS} {name} clients are at work; one was turned away"
                    ));
                    continue;
                }
                Err(e) => {
                    log::often(&format!("taking a {name} client: {e}"));
                    continue;
                }
            };
            let next = acceptor.clone();
            let relieved = self.spawn(name, move |service| service.accept_loop(next));
            if relieved {
                return serve(self, stream, &seat);
            }
        }
    }

    fn data_client(self: &Arc<Self>, mut stream: Stream, seat: Option<&Seat>) {
        let Ok(incoming) = stream.try_clone() else { return };
        // A command usually comes in one piece, and is then read with one system call.
        let mut incoming = std::io::BufReader::with_capacity(data::MAX_COMMAND, incoming);
        loop {
            let received = data::receive(&mut incoming);
            if let Some(seat) = seat {
                seat.busy();
            }
            let (reply, last) = match received {
                Ok(Received::Command(incoming)) => {
                    let locality = incoming.prefix.unwrap_or_else(|| self.locality.load(Ordering::SeqCst));
                    let response = self.execute(locality, &incoming.command);
                    (data::encode(&response, incoming.prefix.is_some()), false)
                }
                Ok(Received::BadLength) => (data::bad_length(), true),
                Ok(Received::End) | Err(_) => return,
            };
            // Before the answer is sent: a client that does not take it is idle.
            if let Some(seat) = seat {
                seat.answered();
            }
            if stream.write_all(&reply).is_err() {
                return;
            }
            if last {
                return stream.take_leave();
            }
        }
    }

    fn execute(&self, locality: u8, command: &[u8]) -> Vec<u8> {
        if locality > 4 || (locality == 4 && self.policy.reject_locality_4) {
            return data::failure();
        }
        let mut engine = self.engine();
        if !engine.is_running() {
            return data::before_init();
        }
        match engine.process(locality, command) {
            Ok(response) if (data::HEADER..=data::MAX_COMMAND).contains(&response.len()) => response,
            Ok(_) | Err(_) => data::failure(),
        }
    }

    pub(super) fn take_data_fd(self: &Arc<Self>, fd: Option<std::os::fd::OwnedFd>) -> Response {
        let Some(fd) = fd else { return Response::refused(code::BAD_PARAMETER) };
        if self.data_fd_in_use.swap(true, Ordering::SeqCst) {
            return Response::refused(code::IO);
        }
        let stream = match Stream::handed_over(fd) {
            Ok(stream) => stream,
            Err(e) => {
                log::error(&format!("the data socket that a client handed over: {e}"));
                self.data_fd_in_use.store(false, Ordering::SeqCst);
                return Response::refused(code::IO);
            }
        };
        let spawned = self.spawn("data", move |service| {
            service.data_client(stream, None);
            service.data_fd_in_use.store(false, Ordering::SeqCst);
        });
        if spawned {
            return Response::ok();
        }
        self.data_fd_in_use.store(false, Ordering::SeqCst);
        Response::refused(code::IO)
    }

    pub(super) fn answer(&self, request: Request) -> Response {
        let done = |result: Result<(), EngineError>| match result {
            Ok(()) => Response::ok(),
            Err(e) => refusal(&e),
        };
        match request {
            Request::GetCapability => Response::ok().word(wire::CAPABILITIES),
            Request::Init { flags } => {
                let delete = flags & wire::INIT_DELETE_VOLATILE != 0;
                done(self.power_on(delete, Startup::None).inspect_err(|e| {
                    log::error(&format!("powering the TPM on: {e}"));
                }))
            }
            Request::Stop => {
                power_off(&mut self.engine());
                Response::ok()
            }
            Request::SetLocality(l) if l > 4 => Response::refused(code::BAD_LOCALITY),
            Request::SetLocality(4) if self.policy.reject_locality_4 => Response::refused(code::BAD_LOCALITY),
            Request::SetLocality(l) => {
                self.locality.store(l, Ordering::SeqCst);
                Response::ok()
            }
            Request::GetEstablished => match self.engine().established() {
                Ok(bit) => Response::ok().bytes(&[bit.into(), 0, 0, 0]),
                Err(e) => refusal(&e),
            },
            Request::ResetEstablished(l) if l > 4 => Response::refused(code::BAD_LOCALITY),
            Request::ResetEstablished(l) => done(self.engine().reset_established(l)),
            Request::HashStart => done(self.engine().hash(HashStep::Start)),
            Request::HashData(data) => done(self.engine().hash(HashStep::Data(&data))),
            Request::HashEnd => done(self.engine().hash(HashStep::End)),
            Request::Cancel => self.cancel_command(),
            Request::StoreVolatile => done(self.store_volatile()),
            Request::GetStateBlob { kind, offset } => self.export(kind, offset),
            Request::SetStateBlob { flags, kind, data } => self.import(flags, kind, &data),
            // The state at rest is encrypted, always.
            Request::GetConfig => Response::ok().word(1),
            Request::SetBufferSize(wanted) => match self.engine().buffer_size(wanted) {
                Ok((size, min, max)) => Response::ok().word(size).word(min).word(max),
                Err(e) => refusal(&e),
            },
            Request::GetInfo { flags, offset } => self.info(flags, offset),
            // The image is locked from open to close.
            Request::LockStorage => Response::ok(),
            Request::PpiState => self.ppi(),
            Request::PpiSubmit { operation, argument } => self.submit_ppi(operation, argument),
            Request::ClockGet => self.clock(),
            Request::ClockSet(skew) => self.set_clock(RtcSkew(skew)),
            Request::Cold => self.forget_volatile(),
            Request::Shutdown | Request::SetDataFd => Response::refused(code::BAD_ORDINAL),
        }
    }

    /// Does not wait for the engine: that is the point of it.
    fn cancel_command(&self) -> Response {
        let off = self.engine.try_lock().is_ok_and(|engine| !engine.is_running());
        // While the TPM is being powered on, the commands that run are the platform's. The lock is held over the call, which
        // only sets a flag.
        let powering = self.powering();
        if off || *powering {
            return Response::refused(code::BAD_ORDINAL);
        }
        match self.cancel.cancel() {
            Ok(()) => Response::ok(),
            Err(e) => refusal(&e),
        }
    }

    fn store_volatile(&self) -> Result<(), EngineError> {
        let mut engine = self.engine();
        if !engine.is_running() {
            return Err(EngineError::State("off"));
        }
        let blob = engine.state(Blob::Volatile)?;
        self.state.clone().store(Blob::Volatile, &blob).map_err(|_| EngineError::Refused(9))?;
        engine.saved();
        Ok(())
    }

    fn export(&self, kind: u32, offset: u32) -> Response {
        let Some(blob) = Blob::from_protocol(kind) else { return Response::refused(code::BAD_PARAMETER) };
        let mut engine = self.engine();
        if !engine.is_running() {
            return Response::refused(code::BAD_ORDINAL);
        }
        if !self.policy.state_export {
            log::often(
                "a client asked for TPM state; refused (start with --state-export allow to permit it)",
            );
            return Response::refused(code::FAIL);
        }
        let data = match blob {
            Blob::Save => zeroize::Zeroizing::default(),
            _ => match engine.state(blob) {
                Ok(data) => data,
                Err(e) => return refusal(&e),
            },
        };
        log::warn(&format!(
            "TPM state ({blob:?}) leaves through the control channel: this identity can now live twice"
        ));
        if let Err(e) = self.state.commit(&[Change::Flag(FLAG_EXPORTED)]) {
            log::error(&format!("recording the export: {e}"));
            return Response::refused(code::FAIL);
        }
        if blob == Blob::Volatile {
            // It goes on elsewhere.
            engine.saved();
        }
        let rest = data.get(offset as usize..).unwrap_or_default();
        Response::ok().word(0).word(data.len() as u32).word(rest.len() as u32).bytes(rest)
    }

    fn import(&self, flags: u32, kind: u32, data: &[u8]) -> Response {
        let Some(blob) = Blob::from_protocol(kind) else { return Response::refused(code::BAD_PARAMETER) };
        let mut engine = self.engine();
        if engine.is_running() {
            return Response::refused(code::BAD_ORDINAL);
        }
        if !self.policy.state_export || flags & wire::STATE_ENCRYPTED != 0 {
            log::often("a client tried to replace TPM state; refused");
            return Response::refused(code::FAIL);
        }
        if data.is_empty() {
            return Response::ok();
        }
        let valid = match blob {
            Blob::Permanent => engine.validate(blob, data, None),
            // A volatile state is worth nothing without the permanent one that it was saved with.
            Blob::Volatile => match self.state.clone().load(Blob::Permanent) {
                Ok(Some(permanent)) => engine.validate(blob, data, Some(&permanent)),
                Ok(None) => Err(EngineError::State("without the permanent state that this one belongs to")),
                Err(_) => return Response::refused(code::FAIL),
            },
            Blob::Save => Ok(()),
        };
        if let Err(e) = valid {
            log::warn(&format!("TPM state ({blob:?}) from the control channel is not valid: {e}"));
            return refusal(&e);
        }
        log::warn(&format!("TPM state ({blob:?}) was replaced through the control channel"));
        match self.state.clone().store(blob, data) {
            Ok(()) => Response::ok(),
            Err(_) => Response::refused(code::FAIL),
        }
    }

    fn info(&self, flags: u64, offset: u32) -> Response {
        // Bits 0 to 2 are the library's own; others have no answer here and are ignored, as the protocol wants.
        let mut text = self.engine().info((flags & 7) as u32).into_bytes();
        text.push(0);
        let rest = text.get(offset as usize..).unwrap_or_default();
        Response::ok().word(text.len() as u32).word(rest.len() as u32).bytes(rest)
    }
}

fn refusal(error: &EngineError) -> Response {
    Response::refused(match error {
        EngineError::Refused(code) => *code,
        EngineError::State(_) => code::BAD_ORDINAL,
        _ => code::FAIL,
    })
}
