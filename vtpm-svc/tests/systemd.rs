// SPDX-License-Identifier: Apache-2.0
//! The unit files: understood by systemd, and their command line works with the sockets and the credential
//! that systemd hands over, as an ordinary user without capabilities and without a network.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use common::GET_RANDOM_8;
use common::KEY;
use common::STARTUP_CLEAR;
use common::Site;
use common::code;
use common::control;
use common::output;
use common::tpm;
use common::words;

const VM: &str = "web1";

/// A unit file with this site's paths in the place of the system's.
fn unit(site: &Site, name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/systemd");
    let text = std::fs::read_to_string(folder.join(name)).expect("unit file");
    let here = site.dir.path().display().to_string();
    text.replace("\\\n", " ")
        .replace("/usr/bin/vtpm-svc", env!("CARGO_BIN_EXE_vtpm-svc"))
        .replace("/var/lib/cvmm/vms/%i.vmgs", &format!("{here}/vmgs"))
        .replace("/var/lib/cvmm/anchors", &format!("{here}/anchor"))
        .replace("/run/cvmm/%i", &here)
}

/// Values of one setting, in order.
fn values<'a>(unit: &'a str, name: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')).collect()
}

#[test]
fn systemd_understands_the_units() {
    let site = Site::without_image();
    let mut verify = Command::new("systemd-analyze");
    verify.arg("verify");
    for name in ["vtpm-svc@.service", "vtpm-svc@.socket", "vtpm-image@.service"] {
        let path = site.path(&name.replace('@', &format!("@{VM}")));
        std::fs::write(&path, unit(&site, name)).expect("write");
        verify.arg(path);
    }
    let (ok, text) = output(&mut verify);
    assert!(ok && text.is_empty(), "{text}");
}

/// The user whose sockets they are has to get to them; what is above them is root's.
#[test]
fn the_sockets_can_be_reached_by_their_owner() {
    let site = Site::without_image();
    let sockets = unit(&site, "vtpm-svc@.socket");
    assert_eq!(values(&sockets, "SocketMode"), ["0600"]);
    let mode = u32::from_str_radix(values(&sockets, "DirectoryMode")[0], 8).expect("octal");
    assert_eq!(mode & 0o013, 0o011, "others may go through and may not make anything there");
}

/// The files as they are, under a systemd that runs as the first process, with its users, credentials and
/// sockets.
#[test]
#[ignore = "needs root; boots a systemd of its own in namespaces, over a copy-on-write view of the machine"]
fn the_units_work_as_shipped() {
    let site = Site::without_image();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut boot = Command::new("timeout");
    boot.args(["--kill-after=5", "120", "bash"]).arg(here.join("tests/scripts/systemd-container.sh"));
    boot.arg(env!("CARGO_BIN_EXE_vtpm-svc")).arg(here.join("../resources/systemd")).arg(site.dir.path());
    let (_, text) = output(&mut boot);
    assert!(site.log().ends_with("UNITS-WORK\n"), "{text}\n{}", site.log());
}

#[test]
fn the_unit_s_command_serves_on_sockets_that_systemd_passes() {
    let site = Site::new();
    let (service, sockets) = (unit(&site, "vtpm-svc@.service"), unit(&site, "vtpm-svc@.socket"));
    let listen = values(&sockets, "ListenStream");
    let credential = values(&service, "LoadCredentialEncrypted")[0].split(':').next().expect("name");
    let credentials = site.path("credentials");
    std::fs::create_dir(&credentials).expect("folder");
    std::fs::write(credentials.join(credential), KEY).expect("credential");
    std::fs::set_permissions(credentials.join(credential), PermissionsExt::from_mode(0o400)).expect("mode");

    let mut c = Command::new("systemd-socket-activate");
    listen.iter().for_each(|path| _ = c.arg("--listen").arg(path));
    // What the unit's other settings do, as far as this host lets a test do it without a service manager.
    // Through env, as below: an ordinary user may have no way to a checkout in somebody's home folder.
    let probe = ["env", env!("CARGO_BIN_EXE_vtpm-svc"), "--version"];
    let mut possible = |wrapper: &[&str]| {
        let found = output(Command::new(wrapper[0]).args(&wrapper[1..]).args(probe)).0;
        if found {
            c.args(wrapper);
        } else {
            println!("not possible here: {}", wrapper.join(" "));
        }
        found
    };
    let lockable = possible(&["prlimit", "--memlock=unlimited", "--core=0"]);
    possible(&["unshare", "--net"]);
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all"];
    if possible(&[&["setpriv", "--inh-caps=-all"], &user[..]].concat()) {
        let all = Command::new("chown").args(["-R", "65534:65534"]).arg(site.dir.path()).status();
        assert!(all.expect("chown").success());
    }
    let exec = values(&service, "ExecStart")[0];
    c.arg("env").arg(format!("CREDENTIALS_DIRECTORY={}", credentials.display()));
    c.args(exec.split_ascii_whitespace());
    let log = std::fs::File::create(site.path("log")).expect("log");
    let mut child = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("start");
    let connect = |path: &str| {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match UnixStream::connect(path) {
                Ok(s) => {
                    s.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
                    return s;
                }
                Err(e) => assert!(Instant::now() < deadline, "{path}: {e}; {}", site.log()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let mut ctrl = connect(listen[0]);
    // INIT, then commands on the second socket, then SHUTDOWN.
    assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]), "{}", site.log());
    let mut data = connect(listen[1]);
    assert_eq!(code(&tpm(&mut data, STARTUP_CLEAR).expect("startup")), 0);
    assert_eq!(code(&tpm(&mut data, GET_RANDOM_8).expect("random")), 0);
    assert_eq!(control(&mut ctrl, &words(&[3])), words(&[0]));
    let ended = child.wait().expect("wait");
    let log = site.log();
    assert!(ended.success(), "{log}");
    let locked = !log.contains("memory is not locked");
    assert!(locked || !lockable, "{log}");
    assert_eq!(log.matches("warning").count(), usize::from(!locked), "other protections are had: {log}");
}
