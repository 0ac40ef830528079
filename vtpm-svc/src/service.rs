// SPDX-License-Identifier: Apache-2.0
//! `vtpm-svc socket`: from options to a served TPM, in an order that matters.
//!
//! Library, key, image and anchor are opened first, with the rights of whoever started the process. Sockets come when the
//! image is locked, so that a start that fails takes nothing from a service that runs. Then the cage is closed, and only then
//! does the engine see the stored state and are clients served.

use std::io;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::Duration;

use crate::cli::socket as options;
use crate::cli::socket::Channel;
use crate::cli::socket::OptionError;
use crate::cli::socket::SocketArgs;
use crate::control::server::End;
use crate::control::server::Server;
use crate::control::socket::Stream;
use crate::keys::KeyError;
use crate::keys::Purpose;
use crate::keys::open::OpenError;
use crate::keys::open::key_of;
use crate::log;
use crate::process;
use crate::sandbox;
use crate::tpm::Policy;
use crate::tpm::Tpm;
use crate::tpm::engine::Engine;
use crate::tpm::engine::EngineError;
use crate::tpm::engine::Library;
use crate::tpm::engine::state::VmgsState;
use crate::tpm::engine::state::is_virgin;
use crate::tpm::engine::upkeep::Upkeep;
use crate::tpm::manufacture::ManufactureError;
use crate::tpm::power::Making;
use crate::tpm::power::Startup;
use crate::vmgs::Demand;
use crate::vmgs::FileId;
use crate::vmgs::FsFile;
use crate::vmgs::Vmgs;
use crate::vmgs::VmgsError;
use crate::vmgs::history;
use crate::vmgs::root::FLAG_PROVISIONED;
use crate::vmgs::root::parse_uuid;

mod channels;
mod names;
mod starting;

use channels::Open;
use names::Names;
use starting::Starting;

/// What every report of this service about itself has to say.
pub const TRUST: &str = "The vTPM of this VM runs on the host; its operator can read and change its keys, \
                         measurements and storage. It does not protect this VM from the host.";

/// Why the service did not start or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Command line.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The id of a VM that is none.
    #[error("--vm-uuid: {0}")]
    VmUuid(String),
    /// A required option is missing.
    #[error("{0}")]
    Missing(&'static str),
    /// A socket.
    #[error("socket {what}: {source}")]
    Socket {
        /// Which.
        what: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The operating system.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The image.
    #[error("{path}: {source}")]
    Image {
        /// The image.
        path: String,
        /// What is wrong with it.
        source: VmgsError,
    },
    /// Somebody put another file in its place.
    #[error("{0}: the image was replaced while it was being opened; start again")]
    Replaced(String),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Certificates.
    #[error(transparent)]
    Manufacture(#[from] crate::tpm::manufacture::ManufactureError),
    /// The cage.
    #[error(transparent)]
    Sandbox(#[from] sandbox::SandboxError),
}

/// When the start is over for good, also where a client powers the TPM on.
const SETTLED: Duration = Duration::from_secs(3);

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServiceError {
    move |source| ServiceError::Io { what: what.into(), source }
}

/// Opens the image for this service, or refuses it before anything of it or of its anchor was changed.
fn open_image(args: &SocketArgs, path: &Path) -> Result<Vmgs<FsFile>, ServiceError> {
    let at = |source| ServiceError::Image { path: path.display().to_string(), source };
    let vm = args.vm_uuid.as_deref().map(parse_uuid).transpose();
    let vm = vm.map_err(|e| ServiceError::VmUuid(e.to_string()))?;
    let file = FsFile::open(path).map_err(VmgsError::opening).map_err(at)?;
    let provider = args.key.provider().ok_or(ServiceError::Missing(
        "a key is needed: --key-file, --passphrase-file, --key-credential or --key-hook",
    ))?;
    let key = key_of(provider.as_ref(), &file, vm, Purpose::Open).map_err(|e| match e {
        OpenError::Image(source) => at(source),
        OpenError::Key(e) => e.into(),
    })?;
    let demand = Demand { encrypted: true, vm };
    let folder = args.anchor.folder();
    let mut vmgs =
        Vmgs::open_for(file, Some(key), Some(&folder), args.anchor.accept(), demand).map_err(at)?;
    for warning in vmgs.warnings() {
        log::warn(&format!("{}: {warning}", path.display()));
    }
    tpm_is_whole(&vmgs).map_err(at)?;
    if vmgs.is_unsettled() {
        // What was adopted once is this program's own from now on.
        vmgs.commit(&[]).map_err(at)?;
    }
    let file = path.display().to_string();
    let event = history::Event {
        what: "serve",
        file: &file,
        root: vmgs.root(),
        findings: vmgs.findings(),
        detail: "",
        reason: args.anchor.history.reason.as_deref(),
    };
    if let Err(e) = history::record(&folder, &event) {
        log::warn(&format!("the history of {file} could not be written: {e}"));
    }
    Ok(vmgs)
}

/// A TPM that was made is there and can be read; if not, the operator is told of the way back.
fn tpm_is_whole(vmgs: &Vmgs<FsFile>) -> Result<(), VmgsError> {
    let made = vmgs.root().flags & FLAG_PROVISIONED != 0;
    let there = vmgs.list().iter().any(|(id, _, _)| *id == FileId::VTPM_STATE);
    if vmgs.is_damaged(FileId::VTPM_STATE) || (made && !there) {
        let spare = vmgs.read_optional(FileId::VTPM_STATE_GOOD).is_ok_and(|data| data.is_some());
        return Err(VmgsError::TpmLost { spare });
    }
    Ok(())
}

/// Runs the service until a client or a signal ends it.
pub fn run(args: &SocketArgs) -> Result<(), ServiceError> {
    process::one_heap();
    if args.print_capabilities {
        let mut out = io::stdout().lock();
        return writeln!(out, "{}", capabilities())
            .and_then(|()| out.flush())
            .map_err(io_error("writing the capabilities"));
    }
    let (policy, running) = args.policy()?;
    let (mut control, mut terminate) = (None, args.terminate);
    if let Some(text) = &args.ctrl {
        let (channel, asked) = options::channel("ctrl", text)?;
        terminate |= asked;
        control = Some(channel);
    }
    let data = args.server.as_deref().map(|t| options::channel("server", t)).transpose()?.map(|(c, _)| c);
    if control.is_none() && data.is_none() {
        return Err(ServiceError::Missing("nothing to serve on: give --ctrl, --server or both"));
    }
    let path = args
        .vmgs
        .as_deref()
        .ok_or(ServiceError::Missing("--vmgs FILE is required; make one with `vtpm-svc vmgs create`"))?;
    let pid = args.pid.as_deref().map(|t| options::file_setting("pid", t)).transpose()?;
    let named =
        pid.is_some() || [&control, &data].into_iter().flatten().any(|c| matches!(c, Channel::Unix { .. }));
    process::close_others(&named_descriptors(&[&control, &data]))
        .map_err(io_error("closing inherited descriptors"))?;
    if let Some(text) = &args.log {
        let path = options::file_setting("log", text)?;
        let truncate = text.split(',').any(|s| s == "truncate");
        let file = std::fs::File::options()
            .create(true)
            .append(!truncate)
            .write(true)
            .truncate(truncate)
            .open(&path);
        log::to_file(file.map_err(io_error(format!("log {}", path.display())))?);
    }
    let control = control.map(Open::inherit).transpose()?;
    let data = data.map(Open::inherit).transpose()?;
    // Locks and the anchor's lease belong to the process that serves, so the fork comes first.
    let background =
        args.daemon.then(process::daemonize).transpose().map_err(io_error("going to the background"))?;
    let names = Names::prepare(named).map_err(io_error("starting a second process"))?;
    let trim = process::Trim::prepare();
    let library = Library::load()?;
    // Before there is a secret in this process.
    for missing in process::hide_memory() {
        log::warn(&missing);
    }
    let client = lone_client(terminate, control.as_ref());
    let starting = Starting::watch(&wanted(args, path), args.key.key_hook.is_some(), client)
        .map_err(io_error("starting a thread"))?;
    // Before the image is opened, so that one which is replaced while a key hook is asked is noticed.
    let upkeep = Upkeep::of(path, args.store_limit);
    let mut vmgs = open_image(args, path)?;
    drop(starting);
    if !upkeep.is_at(path) {
        // Nothing was written through this lease; what is wrong is told below.
        let _ = vmgs.release();
        return Err(ServiceError::Replaced(path.display().to_string()));
    }
    let vmgs = Arc::new(Mutex::new(vmgs));
    let state = VmgsState::new(vmgs, library.version()).with_upkeep(upkeep);
    let opened =
        Opened { state, library, policy, terminate, running, control, data, pid, names, background, trim };
    let state = opened.state.clone();
    opened.serve(args, path).inspect_err(|_| {
        // Nothing was served, so the lease ends in good order; the error that is there already is the one to tell.
        let _ = state.vmgs().release();
    })
}

/// A service whose image is open, and locked for it.
struct Opened {
    state: VmgsState<FsFile>,
    library: Library,
    policy: Policy,
    terminate: bool,
    running: Option<Startup>,
    control: Option<Open>,
    data: Option<Open>,
    pid: Option<PathBuf>,
    names: Names,
    background: Option<UnixStream>,
    trim: Option<process::Trim>,
}

impl Opened {
    /// Makes the sockets, closes the cage and serves.
    fn serve(self, args: &SocketArgs, path: &Path) -> Result<(), ServiceError> {
        let Self {
            state,
            library,
            policy,
            terminate,
            running,
            control,
            data,
            pid,
            mut names,
            background,
            trim,
        } = self;
        // From here on an end is an orderly one.
        process::block_signals().map_err(io_error("blocking signals"))?;
        // The image is locked: this is the process that serves it, and may replace what an earlier one left.
        let control = control.map(|c| c.listen(&mut names)).transpose()?;
        let data = data.map(|c| c.listen(&mut names)).transpose()?;
        if let Some(file) = pid {
            std::fs::write(&file, format!("{}\n", std::process::id()))
                .map_err(io_error(format!("pid file {}", file.display())))?;
            names.add(&file);
        }

        // The authority's key is in this process only if there is a TPM to make, and only until it is made.
        let folder = args.ek_ca.as_deref().filter(|_| is_virgin(&state.vmgs()));
        let authority = folder.map(crate::tpm::manufacture::Authority::open).transpose()?;
        let platform = args
            .platform_cert
            .as_deref()
            .map(crate::tpm::manufacture::platform_certificate::read)
            .transpose();
        let making = Making { authority, platform_certificate: platform.map_err(ManufactureError::from)? };
        let engine = Engine::take(library, Box::new(state.clone()))?;
        let (ended, end) = mpsc::channel();
        let tpm = Tpm::new(engine, state, making, policy);
        for missing in sandbox::close(args.seccomp != "action=none")? {
            log::warn(&missing);
        }
        log::info(TRUST);
        if let Some(startup) = running {
            tpm.power_on(false, startup)?;
        }
        let server = Arc::new(Server::new(tpm, terminate, ended.clone()));
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
        let (last, image) = (server.clone(), path.to_path_buf());
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
}

/// What the opening of the image may have to wait for, in words.
fn wanted(args: &SocketArgs, path: &Path) -> String {
    let key = args.key.provider().map(|provider| format!("the key ({}) and ", provider.describe()));
    format!("{}the image {} and its anchor", key.unwrap_or_default(), path.display())
}

/// The connection of the client whose end is the service's.
fn lone_client(terminate: bool, control: Option<&Open>) -> Option<OwnedFd> {
    match control {
        Some(Open::Connected(Stream::Unix(s))) if terminate => s.try_clone().ok().map(OwnedFd::from),
        _ => None,
    }
}

/// Descriptors that the command line names, as channels or in the way of `/dev/fd/N`; the others are not wanted.
fn named_descriptors(channels: &[&Option<Channel>]) -> Vec<RawFd> {
    let of_channel = |channel: &Channel| match channel {
        Channel::Listening(fd) | Channel::Connected(fd) => Some(*fd),
        Channel::Unix { .. } | Channel::Tcp { .. } => None,
    };
    let mut all: Vec<RawFd> = channels.iter().filter_map(|c| c.as_ref().and_then(of_channel)).collect();
    all.extend(std::env::args_os().filter_map(|argument| descriptor_in(argument.to_str()?)));
    all
}

/// The number in `/dev/fd/N` or `/proc/self/fd/N`, as shells and programs hand files over.
fn descriptor_in(argument: &str) -> Option<RawFd> {
    let (_, rest) = argument.split_once("/fd/")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn thread<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>, ServiceError> {
    std::thread::Builder::new().name(name.into()).spawn(run).map_err(io_error("starting a thread"))
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

fn capabilities() -> serde_json::Value {
    serde_json::json!({
        "type": "swtpm",
        "program": "vtpm-svc",
        "version": env!("CARGO_PKG_VERSION"),
        "vtpm_mode": "host-served",
        "trust": TRUST,
        "features": ["tpm-2.0", "cmdarg-seccomp", "flags-opt-startup", "nvram-backend-vmgs"],
    })
}
