// SPDX-License-Identifier: Apache-2.0
//! A running service, or a running swtpm beside it, for the tests of this package.
#![allow(dead_code, clippy::panic)]

pub mod decoder;

use std::io::Read;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

pub const KEY: [u8; 32] = [0xa5; 32];
pub const STARTUP_CLEAR: &[u8] = &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0];
pub const GET_RANDOM_8: &[u8] = &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8];

/// A folder with an image, its key and its anchor.
pub struct Site {
    pub dir: tempfile::TempDir,
}

impl Default for Site {
    fn default() -> Self {
        Self::new()
    }
}

impl Site {
    pub fn new() -> Self {
        let site = Self::without_image();
        let made =
            site.vmgs(&["create", "--size", "1M", "--anchor"], &[&site.path("anchor"), &site.path("vmgs")]);
        assert!(made.0, "{}", made.1);
        site
    }

    pub fn without_image() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::write(dir.path().join("key"), KEY).expect("key");
        std::fs::set_permissions(dir.path().join("key"), std::fs::Permissions::from_mode(0o600))
            .expect("mode");
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `vtpm-svc vmgs …` with this site's key; says whether it succeeded and what it printed.
    pub fn vmgs(&self, args: &[&str], paths: &[&Path]) -> (bool, String) {
        let mut c = program();
        c.arg("vmgs").args(args).args(paths).arg("--key-file").arg(self.path("key"));
        output(&mut c)
    }

    /// Starts the service on the control socket `c` and data socket `d` of this site, and waits until it is
    /// there.
    pub fn start(&self, more: &[&str]) -> Service {
        let mut service = self.launch(more);
        service.wait_until_ready(&self.path("log"));
        service
    }

    /// Starts it and does not wait.
    pub fn launch(&self, more: &[&str]) -> Service {
        let mut c = program();
        c.args(["socket", "--tpm2", "--ctrl", &format!("type=unixio,path={}", self.path("c").display())]);
        c.args(["--server", &format!("type=unixio,path={}", self.path("d").display())]);
        c.arg("--vmgs").arg(self.path("vmgs")).arg("--key-file").arg(self.path("key"));
        c.arg("--anchor").arg(self.path("anchor")).args(more);
        Service::launch(c, &self.path("log"), self.path("c"), self.path("d"))
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

pub fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vtpm-svc"))
}

pub fn output(c: &mut Command) -> (bool, String) {
    let out = c.stdin(Stdio::null()).output().unwrap_or_else(|e| {
        panic!(
            "{:?} does not run ({e}); `cargo xtask setup` installs the tools that tests use",
            c.get_program()
        )
    });
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.success(), text)
}

/// A TPM process, ended when dropped.
pub struct Service {
    pub child: Child,
    pub control: PathBuf,
    pub data: PathBuf,
    /// The connection that showed that it is ready. swtpm serves one control client, so it is used and not
    /// closed.
    pub first: std::cell::Cell<Option<UnixStream>>,
}

impl Service {
    pub fn spawn(c: Command, log: PathBuf, control: PathBuf, data: PathBuf) -> Self {
        let mut service = Self::launch(c, &log, control, data);
        service.wait_until_ready(&log);
        service
    }

    fn launch(mut c: Command, log: &Path, control: PathBuf, data: PathBuf) -> Self {
        for socket in [&control, &data] {
            // A socket of an earlier run must not be taken for this one's.
            let _ = std::fs::remove_file(socket);
        }
        let out = std::fs::File::options().create(true).append(true).open(log).expect("log");
        let child = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(out).spawn().unwrap_or_else(|e| {
            panic!(
                "{:?} does not run ({e}); `cargo xtask setup` installs the tools that tests use",
                c.get_program()
            )
        });
        Self { child, control, data, first: Default::default() }
    }

    fn wait_until_ready(&mut self, log: &Path) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(mut s) = UnixStream::connect(&self.control) {
                s.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
                // A socket exists before anyone serves it. GET_CAPABILITY is answered with two words.
                let answer = s.write_all(&words(&[1])).and_then(|()| s.read_exact(&mut [0; 8]));
                if answer.is_ok() {
                    self.first = Some(s).into();
                    return;
                }
            }
            let ended = self.child.try_wait().expect("wait");
            let text = || std::fs::read_to_string(log).unwrap_or_default();
            assert!(ended.is_none(), "the service ended: {}", text());
            assert!(Instant::now() < deadline, "the service is not ready: {}", text());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// swtpm that waits for its data socket to be handed over.
    pub fn swtpm_control_only(dir: &Path) -> Self {
        Self::swtpm_with(dir, &[], false)
    }

    /// swtpm on the same kind of sockets.
    pub fn swtpm(dir: &Path, more: &[&str]) -> Self {
        Self::swtpm_with(dir, more, true)
    }

    fn swtpm_with(dir: &Path, more: &[&str], server: bool) -> Self {
        let (control, data) = (dir.join("sc"), dir.join("sd"));
        std::fs::create_dir_all(dir.join("state")).expect("folder");
        let mut c = Command::new("swtpm");
        c.args(["socket", "--tpm2", "--seccomp", "action=none"]);
        c.args(["--tpmstate", &format!("dir={}", dir.join("state").display())]);
        c.args(["--ctrl", &format!("type=unixio,path={}", control.display())]);
        if server {
            c.args(["--server", &format!("type=unixio,path={}", data.display())]);
        }
        c.args(more);
        Self::spawn(c, dir.join("swtpm-log"), control, data)
    }

    pub fn connect_control(&self) -> UnixStream {
        self.first.take().unwrap_or_else(|| connect(&self.control))
    }

    pub fn connect_data(&self) -> UnixStream {
        connect(&self.data)
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The two sockets come up one after the other, so a refusal is worth a second try.
fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(5);
    let s = loop {
        match UnixStream::connect(path) {
            Ok(s) => break s,
            Err(e) => assert!(Instant::now() < deadline, "connecting to {}: {e}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    s.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    s
}

/// Sends a control message and returns what comes back in one piece.
pub fn control(s: &mut UnixStream, message: &[u8]) -> Vec<u8> {
    s.write_all(message).expect("send");
    let mut reply = vec![0; 1 << 16];
    let n = loop {
        match s.read(&mut reply) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            other => break other.expect("reply"),
        }
    };
    reply.truncate(n);
    reply
}

/// A control message of words.
pub fn words(w: &[u32]) -> Vec<u8> {
    w.iter().flat_map(|w| w.to_be_bytes()).collect()
}

/// Sends a TPM command and returns the whole response.
pub fn tpm(s: &mut UnixStream, command: &[u8]) -> std::io::Result<Vec<u8>> {
    s.write_all(command)?;
    let mut head = [0; 10];
    s.read_exact(&mut head)?;
    let len = u32::from_be_bytes(head[2..6].try_into().expect("four")) as usize;
    let mut response = head.to_vec();
    response.resize(len, 0);
    s.read_exact(&mut response[10..])?;
    Ok(response)
}

pub fn code(response: &[u8]) -> u32 {
    u32::from_be_bytes(response[6..10].try_into().expect("a response has ten bytes"))
}

/// Two neighbouring free ports: tpm2-tools expects control one above data.
pub fn neighbouring_ports() -> (u16, u16) {
    loop {
        let a = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = a.local_addr().expect("address").port();
        if port < 65_000 && std::net::TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return (port, port + 1);
        }
    }
}

/// A TPM process on TCP, ready for data clients on `port`.
pub fn serve_tcp(site: &Site, mut c: Command, port: u16) -> Service {
    let log = std::fs::File::create(site.path("log")).expect("log");
    let child = c.stderr(log).spawn().expect("start");
    let service =
        Service { child, control: Default::default(), data: Default::default(), first: Default::default() };
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "not ready: {}", site.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    service
}
