// SPDX-License-Identifier: Apache-2.0
//! Clients that misbehave: messages that are refused, bodies that come apart or never, silence, sockets of
//! event loops.

mod common;

use std::io::Read;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::GET_RANDOM_8;
use common::STARTUP_CLEAR;
use common::Site;
use common::code;
use common::control;
use common::tpm;
use common::words;
use vtpm_svc::control::socket::Stream;

/// Everything that the service says before it closes the connection.
fn rest(s: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    // A reset is an end as well.
    let _ = s.read_to_end(&mut all);
    all
}

/// The body of a refused message is somebody's data (of a migration stream, say). Here it is made of
/// commands: end the service, and clear the TPM at the next start.
#[test]
fn the_body_of_a_refused_message_is_never_run() {
    let site = Site::new();
    let service = site.start(&["--flags", "startup-clear", "--state-export", "allow"]);
    let ppi = words(&[0x4356_4d02, 5, 0]);
    let clear_at_each_piece: Vec<u8> =
        std::iter::repeat_n([ppi.as_slice(), &[0; 4160 - 12]].concat(), 150).flatten().collect();
    let end: Vec<u8> = words(&[3]).repeat(150 << 10);
    let too_long = |head: &[u32], body: &[u8]| [words(head), body.to_vec()].concat();
    for (name, message, answer) in [
        ("state of 600 KiB", too_long(&[13, 0, 1, 600 << 10], &end), 0x17),
        ("state of 600 KiB with requests", too_long(&[13, 0, 1, 600 << 10], &clear_at_each_piece), 0x17),
        ("data of 5,000 bytes", too_long(&[7, 5000], &end[..5000]), 0x17),
        ("data of 4 bytes that are more", too_long(&[7, 4], &end[..20_000]), 0x17),
        ("a command that nobody knows", too_long(&[99], &end[..20_000]), 0x17),
        ("a state that breaks off", words(&[13, 0]), 3),
    ] {
        let mut s = UnixStream::connect(service.control.as_path()).expect("connect");
        s.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        // The service may have closed before all of it is sent.
        let _ = s.write_all(&message);
        let got = rest(&mut s);
        assert_eq!(got, words(&[answer]), "{name}: one answer, then the end");
    }
    let mut s = service.connect_control();
    assert_eq!(control(&mut s, &words(&[0x4356_4d01])), words(&[0; 5]), "no request waits");
    assert_eq!(code(&tpm(&mut service.connect_data(), GET_RANDOM_8).expect("served")), 0);
}

#[test]
fn a_body_may_come_after_its_command() {
    let site = Site::new();
    let service = site.start(&[]);
    let mut s = service.connect_control();
    for (command, body) in [(17, words(&[0])), (5, vec![0]), (2, words(&[0])), (7, words(&[0]))] {
        s.write_all(&words(&[command])).expect("command");
        std::thread::sleep(Duration::from_millis(20));
        let answer = control(&mut s, &body);
        assert_eq!(answer[..4], [0; 4], "command {command}");
    }
    assert_eq!(control(&mut s, &words(&[4])).len(), 8, "still in step");
}

/// As a client with an event loop makes it; swtpm serves it too.
#[test]
fn a_data_socket_that_does_not_wait_is_served() {
    let site = Site::new();
    let service = site.start(&[]);
    let s = service.connect_control();
    let (mut ours, theirs) = UnixStream::pair().expect("pair");
    theirs.set_nonblocking(true).expect("flag");
    let mut ctrl = Stream::Unix(s);
    ctrl.send_with_fd(&words(&[16]), &OwnedFd::from(theirs)).expect("send");
    let mut answer = [0xff; 4];
    ctrl.read_exact(&mut answer).expect("answer");
    assert_eq!(answer, [0; 4]);
    // Nothing is there to be read for a while.
    std::thread::sleep(Duration::from_millis(300));
    ctrl.write_all(&words(&[2, 0])).expect("init");
    ctrl.read_exact(&mut answer).expect("answer");
    assert_eq!(answer, [0; 4]);
    ours.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    assert_eq!(code(&tpm(&mut ours, STARTUP_CLEAR).expect("served")), 0);
}

#[test]
fn silent_clients_do_not_keep_others_out() {
    let site = Site::new();
    let service = site.start(&["--flags", "startup-clear"]);
    // One that has spoken stays, however long it is silent.
    let mut spoken = service.connect_data();
    assert_eq!(code(&tpm(&mut spoken, GET_RANDOM_8).expect("served")), 0);
    let connect = |path: &std::path::Path| UnixStream::connect(path).expect("connect");
    let held: Vec<_> = (0..16).flat_map(|_| [connect(&service.data), connect(&service.control)]).collect();
    std::thread::sleep(Duration::from_millis(2500));
    for _ in 0..3 {
        assert_eq!(code(&tpm(&mut service.connect_data(), GET_RANDOM_8).expect("data")), 0);
        let mut s = connect(&service.control);
        s.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        assert_eq!(control(&mut s, &words(&[1])), words(&[0, 0x1_ffff]));
    }
    assert_eq!(code(&tpm(&mut spoken, GET_RANDOM_8).expect("still served")), 0);
    drop(held);
}

/// As many as there are places, on each socket: they ask until their answers fill the socket, and never read.
#[test]
fn clients_that_never_read_do_not_keep_others_out() {
    let site = Site::new();
    let service = site.start(&["--flags", "startup-clear"]);
    let flood = |path: &std::path::Path, message: &[u8]| {
        let mut s = UnixStream::connect(path).expect("connect");
        s.set_write_timeout(Some(Duration::from_millis(200))).expect("timeout");
        // Until nothing goes any more: the service is waiting for this client to read.
        while s.write_all(message).is_ok() {}
        s
    };
    let held: Vec<_> = (0..16)
        .flat_map(|_| [flood(&service.data, GET_RANDOM_8), flood(&service.control, &words(&[1]))])
        .collect();
    let served = |path: &std::path::Path, message: &[u8]| {
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        loop {
            let mut s = UnixStream::connect(path).expect("connect");
            s.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
            let mut answer = [0; 8];
            if s.write_all(message).and_then(|()| s.read_exact(&mut answer)).is_ok() {
                return answer;
            }
            assert!(std::time::Instant::now() < deadline, "nobody else is served");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    assert_eq!(served(&service.data, GET_RANDOM_8)[..6], [0x80, 1, 0, 0, 0, 20]);
    assert_eq!(served(&service.control, &words(&[1])), words(&[0, 0x1_ffff])[..]);
    drop(held);
}

#[test]
fn with_terminate_the_last_control_client_ends_the_service() {
    let site = Site::new();
    let mut service = site.start(&["--terminate"]);
    let mut first = service.connect_control();
    let mut second = UnixStream::connect(&service.control).expect("connect");
    second.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    assert_eq!(control(&mut second, &words(&[1])), words(&[0, 0x1_ffff]));
    drop(second);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(control(&mut first, &words(&[1])), words(&[0, 0x1_ffff]), "one is left");
    drop(first);
    assert!(service.child.wait().expect("wait").success(), "{}", site.log());
}

/// What runs while the TPM is being made belongs to the platform.
#[test]
fn nobody_cancels_the_making_of_a_tpm() {
    let site = Site::new();
    let service = site.start(&["--ek-ca", site.path("ca").to_str().expect("path")]);
    let path = service.control.clone();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let canceller = std::thread::spawn(move || {
        let mut s = UnixStream::connect(path).expect("connect");
        let mut refused = 0;
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            refused += u32::from(control(&mut s, &words(&[9])) == words(&[0x0a]));
        }
        refused
    });
    assert_eq!(control(&mut service.connect_control(), &words(&[2, 0])), words(&[0]), "{}", site.log());
    drop(stop);
    assert!(canceller.join().expect("join") > 0, "it has tried");
    assert!(site.log().contains("with certificates"), "{}", site.log());
}

/// After an answer that is none the client cannot know what the next bytes belong to.
#[test]
fn the_client_gives_up_a_connection_that_is_out_of_step() {
    use vtpm_svc::control::client::Client;
    use vtpm_svc::control::client::ClientError;
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let server = std::thread::spawn(move || {
        let mut ctrl = Stream::Unix(theirs);
        let (_, fd) = ctrl.receive(64).expect("set-datafd");
        ctrl.write_all(&words(&[0])).expect("answer");
        ctrl.receive(64).expect("get-capability");
        ctrl.write_all(&words(&[0, 0x1_ffff])).expect("answer");
        let mut data = UnixStream::from(fd.expect("a descriptor"));
        data.read_exact(&mut [0; 12]).expect("command");
        // A length that cannot be, and then something that looks like an answer to the next command.
        data.write_all(&[0x80, 1, 0, 0, 0, 3, 0, 0, 0, 0]).expect("nonsense");
        let _ = data.write_all(&[0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0]);
        rest(&mut data)
    });
    let mut client = Client::over(ours, "a bad service").expect("connect");
    assert!(matches!(client.execute(0, GET_RANDOM_8), Err(ClientError::Malformed)));
    assert!(matches!(client.execute(0, GET_RANDOM_8), Err(ClientError::Closed)));
    assert!(server.join().expect("join").is_empty(), "nothing was sent after it");
}
