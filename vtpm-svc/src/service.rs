// SPDX-License-Identifier: Apache-2.0
//! One served TPM, from options to its end, in an order that matters.
//!
//! Library, key, image and anchor are opened first, with the rights of whoever started the process. Sockets
//! come when the image is locked, so that a start that fails takes nothing from a service that runs. Then the
//! cage is closed, and only then does the engine see the stored state and are clients served.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::Duration;

use crate::control::listen::Channel;
use crate::control::listen::Open;
use crate::control::listen::SocketError;
use crate::control::server::End;
use crate::control::server::Server;
use crate::control::socket::Stream;
use crate::log;
use crate::process;
use crate::sandbox;
use crate::tpm::Tpm;
use crate::tpm::engine::Engine;
use crate::tpm::engine::Library;
use crate::tpm::engine::state::VmgsState;
use crate::tpm::engine::state::is_virgin;
use crate::tpm::engine::upkeep::Upkeep;
use crate::tpm::manufacture::Authority;
use crate::tpm::manufacture::ManufactureError;
use crate::tpm::manufacture::platform_certificate;
use crate::tpm::power::Making;
use crate::vmgs::FsFile;

pub mod error;
pub mod image;
mod names;
pub mod options;
mod starting;

use error::ServiceError;
use names::Names;
use options::ServiceOptions;
use starting::Starting;

/// What every report of this service about itself has to say.
pub const TRUST: &str = "The vTPM of this VM runs on the host; its operator can read and change its keys, \
                         measurements and storage. It does not protect this VM from the host.";

/// When the start is over for good, also where a client powers the TPM on.
const SETTLED: Duration = Duration::from_secs(3);

/// Runs the service until a client or a signal ends it.
pub fn run(options: &ServiceOptions) -> Result<(), ServiceError> {
    process::one_heap();
    process::close_others(&options.named_descriptors())
        .map_err(ServiceError::io("closing inherited descriptors"))?;
    if let Some(file) = &options.log {
        log::to_file(file.open()?);
    }
    let sockets = Sockets::inherit(options)?;
    let outside = Outside::prepare(options)?;
    let library = Library::load()?;
    // Before there is a secret in this process.
    for missing in process::hide_memory() {
        log::warn(&missing);
    }
    let state = open(options, &library, sockets.lone_client(options.terminate))?;
    serve(options, sockets, outside, library, state.clone()).inspect_err(|_| {
        // Nothing was served, so the lease ends in good order; the error that is there already is the one to
        // tell.
        let _ = state.vmgs().release();
    })
}

/// The two channels.
struct Sockets {
    control: Option<Open>,
    data: Option<Open>,
}

impl Sockets {
    fn inherit(options: &ServiceOptions) -> Result<Self, SocketError> {
        let open = |channel: &Option<Channel>| channel.clone().map(Open::inherit).transpose();
        Ok(Self { control: open(&options.control)?, data: open(&options.data)? })
    }

    /// The connection of the client whose end is the service's.
    fn lone_client(&self, terminate: bool) -> Option<OwnedFd> {
        match &self.control {
            Some(Open::Connected(Stream::Unix(s))) if terminate => s.try_clone().ok().map(OwnedFd::from),
            _ => None,
        }
    }

    fn listen(self, names: &mut Names) -> Result<Self, SocketError> {
        let mut listen =
            |open: Option<Open>| open.map(|open| open.listen(|path| names.add(path))).transpose();
        Ok(Self { control: listen(self.control)?, data: listen(self.data)? })
    }
}

/// What reaches out of the cage, and is there before it closes.
struct Outside {
    /// Whoever waits until everything is ready.
    background: Option<UnixStream>,
    names: Names,
    trim: Option<process::Trim>,
}

impl Outside {
    fn prepare(options: &ServiceOptions) -> Result<Self, ServiceError> {
        // Locks and the anchor's lease belong to the process that serves, so the fork comes first.
        let background = options.daemon.then(process::daemonize).transpose();
        let background = background.map_err(ServiceError::io("going to the background"))?;
        let names = Names::prepare(options.makes_names());
        let names = names.map_err(ServiceError::io("starting a second process"))?;
        Ok(Self { background, names, trim: process::Trim::prepare() })
    }
}

/// Opens and locks the image. `client` is the only one who can use the service; if it goes, so does this
/// process.
fn open(
    options: &ServiceOptions,
    library: &Library,
    client: Option<OwnedFd>,
) -> Result<VmgsState<FsFile>, ServiceError> {
    let image = &options.image;
    let starting = Starting::watch(&image.wanted(), image.key.tells_of_its_wait(), client)
        .map_err(ServiceError::io("starting a thread"))?;
    // Before the image is opened, so that one which is replaced while a key hook is asked is noticed.
    let upkeep = Upkeep::of(&image.path, options.store_limit);
    let mut vmgs = image::open(image)?;
    drop(starting);
    if !upkeep.is_at(&image.path) {
        // Nothing was written through this lease; what is wrong is told below.
        let _ = vmgs.release();
        return Err(ServiceError::Replaced(image.path.display().to_string()));
    }
    Ok(VmgsState::new(Arc::new(Mutex::new(vmgs)), library.version()).with_upkeep(upkeep))
}

/// The TPM of an image, and all that is needed to make it if there is none yet.
fn equip(
    options: &ServiceOptions,
    library: Library,
    state: VmgsState<FsFile>,
) -> Result<Tpm<FsFile>, ServiceError> {
    // The authority's key is in this process only if there is a TPM to make, and only until it is made.
    let folder = options.authority.as_deref().filter(|_| is_virgin(&state.vmgs()));
    let authority = folder.map(Authority::open).transpose()?;
    let platform = options.platform_certificate.as_deref().map(platform_certificate::read).transpose();
    let making = Making { authority, platform_certificate: platform.map_err(ManufactureError::from)? };
    let engine = Engine::take(library, Box::new(state.clone()))?;
    Ok(Tpm::new(engine, state, making, options.policy))
}

/// Makes the sockets, closes the cage and serves.
fn serve(
    options: &ServiceOptions,
    sockets: Sockets,
    outside: Outside,
    library: Library,
    state: VmgsState<FsFile>,
) -> Result<(), ServiceError> {
    let Outside { background, mut names, trim } = outside;
    // From here on an end is an orderly one.
    process::block_signals().map_err(ServiceError::io("blocking signals"))?;
    // The image is locked: this is the process that serves it, and may replace what an earlier one left.
    let Sockets { control, data } = sockets.listen(&mut names)?;
    if let Some(file) = &options.pid {
        std::fs::write(file, format!("{}\n", std::process::id()))
            .map_err(ServiceError::io(format!("pid file {}", file.display())))?;
        names.add(file);
    }

    let tpm = equip(options, library, state)?;
    for missing in sandbox::close(options.seccomp)? {
        log::warn(&missing);
    }
    log::info(TRUST);
    if let Some(startup) = options.startup {
        tpm.power_on(false, startup)?;
    }
    let (ended, end) = mpsc::channel();
    let server = Arc::new(Server::new(tpm, options.terminate, ended.clone()));
    match control {
        Some(Open::Listening(l)) => server.serve_control(l),
        Some(Open::Connected(s)) => server.serve_control_stream(s),
        Some(Open::Wanted(_)) | None => {}
    }
    thread("signals", move || {
        if process::wait_for_signal().is_ok() {
            // The receiver lives until the process ends.
            let _ = ended.send(End::Signal);
        }
    })?;
    let (last, image) = (server.clone(), options.image.path.clone());
    let ending = thread("end", move || wait_for_the_end(&end, trim, names, &last, &image))?;
    log::info("ready");
    if let Some(mut started) = background {
        // Whoever started it may be gone by now.
        let _ = started.write_all(&[1]);
    }
    // A client may be waiting already, so the thread that runs serves it.
    match data {
        Some(Open::Listening(l)) => server.serve_data_here(l),
        Some(Open::Connected(s)) => server.serve_data_stream(s),
        Some(Open::Wanted(_)) | None => {}
    }
    drop(server);
    // It ends the process, and with it this wait.
    let _ = ending.join();
    Ok(())
}

fn thread<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>, ServiceError> {
    std::thread::Builder::new().name(name.into()).spawn(run).map_err(ServiceError::io("starting a thread"))
}

/// Ends the process when a client or a signal wants it, wherever the other threads are.
fn wait_for_the_end(
    end: &mpsc::Receiver<End>,
    mut trim: Option<process::Trim>,
    mut names: Names,
    server: &Server<FsFile>,
    path: &Path,
) {
    let why = end.recv_timeout(SETTLED).or_else(|_| {
        if let Some(Err(e)) = trim.as_mut().map(process::Trim::run) {
            log::warn(&format!("giving memory back: {e}"));
        }
        end.recv()
    });
    // A closed channel cannot be: a sender lives in the service.
    log::info(&format!("ending ({:?})", why.unwrap_or(End::Signal)));
    let retired = server.tpm().retire();
    names.remove();
    match retired {
        Ok(()) => std::process::exit(0),
        Err(e) => {
            log::error(&format!("{}: {e}", path.display()));
            std::process::exit(1);
        }
    }
}
