// SPDX-License-Identifier: Apache-2.0
//! Starts that wait, and output that does not reach its place.

mod common;

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use common::Site;
use common::output;
use common::program;

/// A hook that does not answer for a long time.
fn slow_hook(site: &Site) -> std::path::PathBuf {
    let hook = site.path("hook");
    std::fs::write(&hook, "#!/bin/sh\nexec sleep 30\n").expect("write");
    std::fs::set_permissions(&hook, PermissionsExt::from_mode(0o700)).expect("mode");
    hook
}

/// Waits until the log has this word.
fn wait_for(site: &Site, word: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !site.log().contains(word) {
        assert!(Instant::now() < deadline, "{word}: {}", site.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_start_that_waits_says_for_what_and_ends_with_who_started_it() {
    let site = Site::new();
    let (ours, theirs) = UnixStream::pair().expect("pair");
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).expect("flag");
    let mut c = program();
    c.args([
        "socket",
        "--tpm2",
        "--terminate",
        "--ctrl",
        &format!("type=unixio,clientfd={}", theirs.as_raw_fd()),
    ]);
    c.arg("--vmgs").arg(site.path("vmgs")).arg("--anchor").arg(site.path("anchor"));
    c.arg("--key-hook").arg(slow_hook(&site));
    let log = std::fs::File::create(site.path("log")).expect("log");
    let started = Instant::now();
    let mut child = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("start");
    drop(theirs);
    wait_for(&site, "waiting for the key hook");
    assert!(started.elapsed() >= Duration::from_secs(2), "a quick start says nothing");
    assert_eq!(site.log().matches("waiting for").count(), 1, "{}", site.log());
    assert!(child.try_wait().expect("wait").is_none());
    drop(ours);
    assert_eq!(child.wait().expect("wait").code(), Some(1));
    assert!(site.log().contains("whoever started the service is gone"), "{}", site.log());
}

/// Whether there is such a process; one that has ended and was not waited for does not count.
fn lives(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// The hook's own process and one that it has started end with the service, whatever ends that.
#[test]
fn a_hook_and_its_children_end_with_who_asks() {
    for end in ["connection", "TERM", "KILL"] {
        let site = Site::new();
        let hook = site.path("hook");
        let text = format!(
            "#!/bin/sh\nsleep 300 &\necho $! $$ >{0}/new; mv {0}/new {0}/pids\nwait\n",
            site.dir.path().display()
        );
        std::fs::write(&hook, text).expect("write");
        std::fs::set_permissions(&hook, PermissionsExt::from_mode(0o700)).expect("mode");
        let (ours, theirs) = UnixStream::pair().expect("pair");
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).expect("flag");
        let mut c = program();
        c.args(["socket", "--tpm2", "--terminate", "--ctrl"]);
        c.arg(format!("type=unixio,clientfd={}", theirs.as_raw_fd()));
        c.arg("--vmgs").arg(site.path("vmgs")).arg("--anchor").arg(site.path("anchor"));
        c.arg("--key-hook").arg(&hook);
        let log = std::fs::File::create(site.path("log")).expect("log");
        let mut child = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("start");
        drop(theirs);
        let deadline = Instant::now() + Duration::from_secs(20);
        let pids = loop {
            match std::fs::read_to_string(site.path("pids")) {
                Ok(pids) => break pids,
                Err(_) => assert!(Instant::now() < deadline, "{}", site.log()),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let pids: Vec<&str> = pids.split_whitespace().collect();
        assert_eq!(pids.len(), 2);
        assert!(pids.iter().all(|pid| lives(pid)), "the hook runs");
        let mut ours = Some(ours);
        match end {
            "connection" => drop(ours.take()),
            signal => {
                assert!(output(Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string())).0)
            }
        }
        assert!(!child.wait().expect("wait").success());
        let deadline = Instant::now() + Duration::from_secs(5);
        while pids.iter().any(|pid| lives(pid)) {
            assert!(Instant::now() < deadline, "{end}: of {pids:?} (child, hook) one still lives");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_start_that_waits_hears_signals() {
    let site = Site::new();
    let mut c = program();
    c.args(["socket", "--tpm2", "--ctrl", &format!("type=unixio,path={}", site.path("c").display())]);
    c.arg("--vmgs").arg(site.path("vmgs")).arg("--anchor").arg(site.path("anchor"));
    c.arg("--key-hook").arg(slow_hook(&site));
    let log = std::fs::File::create(site.path("log")).expect("log");
    let mut child = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("start");
    wait_for(&site, "waiting for the key");
    assert!(output(Command::new("kill").arg(child.id().to_string())).0);
    let started = Instant::now();
    assert!(!child.wait().expect("wait").success());
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(!site.path("c").exists(), "it has made nothing yet");
}

/// The hook takes its time, and meanwhile somebody puts a copy in the image's place.
#[test]
fn an_image_that_is_replaced_while_the_key_is_fetched_is_not_served() {
    let site = Site::new();
    let hook = site.path("hook");
    let swap = format!(
        "#!/bin/sh\ncp {0}/vmgs {0}/copy; mv {0}/copy {0}/vmgs; exec cat {0}/key\n",
        site.dir.path().display()
    );
    std::fs::write(&hook, swap).expect("write");
    std::fs::set_permissions(&hook, PermissionsExt::from_mode(0o700)).expect("mode");
    let mut c = program();
    c.args(["socket", "--tpm2", "--ctrl", &format!("type=unixio,path={}", site.path("c").display())]);
    c.arg("--vmgs").arg(site.path("vmgs")).arg("--anchor").arg(site.path("anchor"));
    let (ok, text) = output(c.arg("--key-hook").arg(&hook));
    assert!(!ok && text.contains("was replaced while it was being opened"), "{text}");
    // The copy is as good as the image was, and nobody holds it.
    let mut service = site.start(&[]);
    service.kill();
}

#[test]
fn a_start_that_waits_for_a_key_file_says_so() {
    let site = Site::new();
    // A pipe in the place of the key: opening it waits for whoever writes.
    let pipe = site.path("pipe");
    assert!(output(Command::new("mkfifo").args(["-m", "600"]).arg(&pipe)).0);
    let mut c = program();
    c.args(["socket", "--tpm2", "--ctrl", &format!("type=unixio,path={}", site.path("c").display())]);
    c.arg("--vmgs").arg(site.path("vmgs")).arg("--anchor").arg(site.path("anchor"));
    c.arg("--key-file").arg(&pipe);
    let log = std::fs::File::create(site.path("log")).expect("log");
    let mut child = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("start");
    wait_for(&site, "starting: waiting for the key (key file");
    std::fs::write(&pipe, common::KEY).expect("the key");
    wait_for(&site, "ready");
    child.kill().expect("kill");
    child.wait().expect("wait");
}

/// What was asked for did not arrive, and the exit code says so.
#[test]
fn capabilities_that_cannot_be_written_are_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    let out = program().args(["socket", "--print-capabilities"]).stdout(full).output().expect("run");
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("writing the capabilities"));
}
