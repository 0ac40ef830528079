// SPDX-License-Identifier: Apache-2.0
//! The service as a child of this process: found, started with a private connection, ended with the guest.
//!
//! The control connection is one end of a socket pair that the child inherits. No name in any file system
//! leads to it, so nobody else can use it and nothing is left behind; and when this process ends, however it
//! ends, the connection closes and the service ends by itself, its state on disk.

use std::ffi::OsString;
use std::io;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use rustix::io::FdFlags;
use rustix::process::Pid;
use rustix::process::Signal;
use vtpm_svc::control::client::Client;
use vtpm_svc::control::client::Control;
use vtpm_svc::vmgs::AnchorFolder;
use vtpm_svc::vmgs::FsFile;
use vtpm_svc::vmgs::Identity;
use vtpm_svc::vmgs::Key;
use vtpm_svc::vmgs::Vmgs;
use vtpm_svc::vmgs::VmgsError;
use vtpm_svc::vmgs::anchor::Durability;

use super::error::POWER_ON_PATIENCE;
use super::error::VtpmError;
use crate::events::Events;
use crate::run::inbox::Inbox;

/// Name of the program.
const PROGRAM: &str = "vtpm-svc";
/// How long the service may take to put its state in order at the end.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a service that has not served anything yet.
const START_END_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it is looked after meanwhile.
const END_INTERVAL: Duration = Duration::from_millis(2);
/// Bytes of the image of a TPM that forgets.
const FRESH_SIZE: u64 = 4 << 20;

/// How to start the service.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The program, if it is not the one beside cvmm or in `PATH`.
    pub program: Option<PathBuf>,
    /// The guest-state file; without one the TPM is new, and forgotten at the end.
    pub state: Option<PathBuf>,
    /// The service's further options: key, anchor, certificates.
    pub arguments: Vec<OsString>,
}

/// A service that runs.
pub struct Service(Child);

/// The program: as asked for, beside this one, or wherever `PATH` has it.
fn program(asked: Option<&Path>) -> PathBuf {
    if let Some(path) = asked {
        return path.to_owned();
    }
    let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name(PROGRAM));
    beside.filter(|path| path.exists()).unwrap_or_else(|| PROGRAM.into())
}

/// A service that has been started and has not answered yet.
struct Started {
    child: Child,
    connection: UnixStream,
    name: String,
    /// Names that it may still have to open.
    _fresh: Option<Fresh>,
}

/// Starts the program, with the control connection as its only inheritance.
fn spawn(options: &Options) -> Result<Started, VtpmError> {
    let fresh = options.state.is_none().then(Fresh::make).transpose()?;
    let path = program(options.program.as_deref());
    let name = path.display().to_string();
    let failed = |source: io::Error| VtpmError::Start {
        program: name.clone(),
        hint: match source.kind() {
            io::ErrorKind::NotFound => {
                ": it is neither beside cvmm nor in PATH; install it, or give `vtpm_svc` FILE"
            }
            _ => "",
        },
        source,
    };
    let (connection, theirs) = UnixStream::pair().map_err(failed)?;
    // The child must inherit its end. No other thread of this process starts programs meanwhile.
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).map_err(|e| failed(e.into()))?;
    let mut command = Command::new(&path);
    command.args(["socket", "--tpm2", "--terminate", "--ctrl"]);
    command.arg(format!("type=unixio,clientfd={}", theirs.as_raw_fd()));
    match (&options.state, &fresh) {
        (Some(state), _) => command.arg("--vmgs").arg(state),
        (None, Some(fresh)) => fresh.name(&mut command),
        (None, None) => &mut command,
    };
    command.args(&options.arguments);
    // A group of its own: what a terminal sends to the monitor (Ctrl-C) must not end the TPM before the
    // guest.
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let child = command.spawn().map_err(failed)?;
    Ok(Started { child, connection, name, _fresh: fresh })
}

/// Starts the service and connects to it. When this returns, the service has read its files and is in its
/// cage. A signal, or a service that hangs, ends that; then nothing of it is left.
pub fn start(options: &Options, inbox: &Inbox) -> Result<(Client, Service), VtpmError> {
    // What is fresh has been opened by the service at the end; its names are not needed any more, and go.
    let Started { mut child, connection, name, _fresh } = spawn(options)?;
    let ours = connection.try_clone();
    let own_name = name.clone();
    let answer = inbox
        .attend("the vTPM service to start", POWER_ON_PATIENCE, move || Client::over(connection, &own_name));
    let answer = answer.map_err(|source| {
        // It ends by itself when the connection ends, unless it hangs.
        let _ = ours.and_then(|connection| connection.shutdown(Shutdown::Both));
        wait(&mut child, START_END_TIMEOUT);
        VtpmError::Unattended { program: name.clone(), source }
    })?;
    match answer {
        Ok(client) => Ok((client, Service(child))),
        // The connection is closed, so the service ends, or has ended with a message of its own.
        Err(error) => match wait(&mut child, END_TIMEOUT) {
            Some(status) if !status.success() => Err(VtpmError::Ended { program: name, status }),
            _ => Err(error.into()),
        },
    }
}

/// Starts the service again. Whoever calls this connects over what is returned, and has the service's name
/// for messages.
pub fn start_again(options: &Options) -> Result<(UnixStream, String, Service), VtpmError> {
    let Started { child, connection, name, _fresh } = spawn(options)?;
    Ok((connection, name, Service(child)))
}

/// Waits for the child's end. `None`: it did not end in time, and was killed.
fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) => thread::sleep(END_INTERVAL),
            Err(_) => break,
        }
    }
    // Its helpers too, such as a program that asks for the key: they are in its group.
    let _ = rustix::process::kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.kill();
    let _ = child.wait();
    None
}

impl Service {
    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }

    /// Whether it has ended by then.
    pub fn ends_within(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.ended().is_none() {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(END_INTERVAL);
        }
        true
    }

    /// Ends the service: asked first, then waited for, killed if it does not answer.
    pub fn end(mut self, control: Control, events: &Events) {
        // A service that hangs would keep these requests waiting, so a thread makes them. If there is no
        // thread, or the service is gone already, the wait below settles it.
        let _ = thread::Builder::new().name("tpm-end".into()).spawn(move || {
            // A command that still runs has nobody who waits for it.
            let _ = control.cancel();
            let _ = control.shutdown();
        });
        if wait(&mut self.0, END_TIMEOUT).is_none() {
            events.warn("the vTPM service did not end and was killed; what it has answered is on disk");
        }
    }
}

/// The files of a TPM that is new and will be forgotten: a folder that only this user can look into.
struct Fresh(PathBuf);

impl Fresh {
    fn make() -> Result<Self, VtpmError> {
        let io = |what| move |e: io::Error| VtpmError::Fresh { what, reason: e.to_string() };
        let image = |e: VmgsError| VtpmError::Fresh { what: "making its state", reason: e.to_string() };
        let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let mut unique = [0; 8];
        vtpm_svc::vmgs::crypto::fill_random(&mut unique).map_err(image)?;
        let fresh = Fresh(base.join(format!("cvmm-vtpm-{}", hex::encode(unique))));
        // Fails if it exists: what somebody else has put there is never used.
        std::fs::DirBuilder::new().mode(0o700).create(&fresh.0).map_err(io("making a folder"))?;
        let mut secret = zeroize::Zeroizing::new([0; 32]);
        vtpm_svc::vmgs::crypto::fill_random(secret.as_mut_slice()).map_err(image)?;
        let key = Key::from_bytes(&secret).map_err(image)?;
        std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(fresh.0.join("key"))
            .and_then(|mut file| file.write_all(key.expose()))
            .map_err(io("writing its key"))?;
        let anchor = AnchorFolder { path: fresh.0.join("anchors"), durability: Durability::Leased };
        FsFile::create(&fresh.0.join("state"), FRESH_SIZE + 512)
            .map_err(VmgsError::opening)
            .and_then(|file| Vmgs::create(file, Some(key), Identity::fresh(None)?, Some(&anchor)))
            .and_then(Vmgs::close)
            .map_err(image)?;
        Ok(fresh)
    }

    /// Names the files to the service.
    fn name<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let file = |name| self.0.join(name);
        command.arg("--vmgs").arg(file("state")).arg("--key-file").arg(file("key"));
        command.arg("--anchor").arg(file("anchors"))
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // Nothing else knows these names; a folder that stays is of no use to anyone.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
