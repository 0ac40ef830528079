// SPDX-License-Identifier: Apache-2.0
//! The control and data sockets, as clients see them; side by side with swtpm where that is the reference.

mod common;

use std::io::Read;
use std::io::Write;

use common::GET_RANDOM_8;
use common::STARTUP_CLEAR;
use common::Service;
use common::Site;
use common::code;
use common::control;
use common::output;
use common::tpm;
use common::words;

/// Each request before power-on, after it, and in a row that real clients send; the answers must be swtpm's.
#[test]
fn answers_are_those_of_swtpm() {
    let site = Site::new();
    let ours = site.start(&["--state-export", "allow"]);
    let peer = Service::swtpm(site.dir.path(), &[]);
    let before: &[(&str, Vec<u8>)] = &[
        ("get-established", words(&[4])),
        ("set-locality, short body", vec![0, 0, 0, 5, 2]),
        ("set-locality, padded body", vec![0, 0, 0, 5, 0, 0, 0, 0]),
        ("set-locality 5", vec![0, 0, 0, 5, 5]),
        ("hash-start", words(&[6])),
        ("hash-data", words(&[7, 4, 0])),
        ("hash-end", words(&[8])),
        ("cancel", words(&[9])),
        ("store-volatile", words(&[10])),
        ("reset-established", words(&[11, 0])),
        ("get-stateblob", words(&[12, 1, 1, 0])),
        ("init with a long body", words(&[2, 0, 0])),
        ("unknown", words(&[99])),
        ("stop", words(&[14])),
        ("set-buffersize query", words(&[17, 0])),
        ("set-buffersize 3968", words(&[17, 3968])),
        ("set-buffersize too small", words(&[17, 100])),
        ("set-buffersize 4096", words(&[17, 4096])),
    ];
    let after: &[(&str, Vec<u8>)] = &[
        ("init", words(&[2, 0])),
        ("get-established", words(&[4])),
        ("set-buffersize while running", words(&[17, 4096])),
        ("set-buffersize query", words(&[17, 0])),
        ("cancel", words(&[9])),
        ("store-volatile", words(&[10])),
        ("set-stateblob while running", words(&[13, 0, 1, 0])),
        ("stop", words(&[14])),
        ("init again", words(&[2, 1])),
        ("stop again", words(&[14])),
        ("get-established after stop", words(&[4])),
    ];
    let (mut a, mut b) = (ours.connect_control(), peer.connect_control());
    for (name, message) in before.iter().chain(after) {
        assert_eq!(control(&mut a, message), control(&mut b, message), "{name}");
    }
}

#[test]
fn the_data_channel_before_and_after_power_on() {
    let site = Site::new();
    let service = site.start(&[]);
    let mut data = service.connect_data();
    // What QEMU sends to find out which kind of TPM this is, and the answer that tells it.
    assert_eq!(tpm(&mut data, GET_RANDOM_8).expect("reply"), [0x80, 1, 0, 0, 0, 10, 0, 0, 1, 1]);
    let mut ctrl = service.connect_control();
    assert_eq!(control(&mut ctrl, &words(&[1])), words(&[0, 0x1_ffff]));
    assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]));
    assert_eq!(code(&tpm(&mut data, STARTUP_CLEAR).expect("reply")), 0);
    // Pipelined, then with the prefix, whose reply has the length in front and a zero behind.
    data.write_all(&[GET_RANDOM_8, GET_RANDOM_8].concat()).expect("send");
    let mut both = [0; 40];
    data.read_exact(&mut both).expect("two responses");
    assert_ne!(both[12..20], both[32..40]);
    data.write_all(&[&[0, 0, 0, 8, 0, 0, 0, 0, 12], GET_RANDOM_8].concat()).expect("send");
    let mut prefixed = [0; 28];
    data.read_exact(&mut prefixed).expect("response");
    assert_eq!((&prefixed[..4], &prefixed[24..]), (&[0, 0, 0, 20][..], &[0, 0, 0, 0][..]));
}

#[test]
fn the_monitors_client_drives_ours_and_swtpm_alike() {
    use vtpm_svc::control::client::Client;
    let site = Site::new();
    let ours = site.start(&[]);
    let peer = Service::swtpm_control_only(site.dir.path());
    drop((ours.first.take(), peer.first.take()));
    for path in [&ours.control, &peer.control] {
        let mut client = Client::connect(path).expect("connect");
        for _ in 0..2 {
            client.reset(3968).expect("reset");
            assert_eq!(code(&client.execute(0, STARTUP_CLEAR).expect("startup")), 0);
            assert_eq!(client.execute(3, GET_RANDOM_8).expect("random").len(), 20);
            assert!(!client.control().established().expect("established"));
        }
        client.control().cancel().expect("cancel of nothing");
    }
}

/// A client gets an answer or a closed connection, the next client is served, and the state is as before.
#[test]
fn hostile_clients_harm_nobody_else() {
    let site = Site::new();
    let service = site.start(&["--flags", "not-need-init,startup-clear"]);
    let mut honest = service.connect_data();
    let mut seed = 7u64;
    for round in 0..300usize {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut junk: Vec<u8> = (0..round % 97).map(|n| (seed >> (n % 8 * 8)) as u8 ^ n as u8).collect();
        let mut data = service.connect_data();
        match round % 3 {
            // A plausible header with a length that lies either way.
            0 => {
                let mut c = vec![0x80, 1];
                c.extend_from_slice(&((seed as u32 >> 3) % 5000).to_be_bytes());
                c.append(&mut junk);
                let _ = data.write_all(&c);
            }
            1 => {
                let _ = data.write_all(&junk);
            }
            _ => {
                let mut ctrl = service.connect_control();
                // Anything but the commands that end, power-cycle or wait for more.
                junk.insert(0, [1, 4, 5, 9, 11, 12, 15, 17, 18, 19, 77][round % 11]);
                let _ = ctrl.write_all(&[&[0, 0, 0], junk.as_slice()].concat());
            }
        }
        drop(data);
    }
    let mut oversize = service.connect_data();
    oversize.write_all(&[0x80, 1, 0, 0, 0x10, 1, 0, 0, 1, 0x7b]).expect("send");
    let mut answer = [0; 10];
    oversize.read_exact(&mut answer).expect("an error, not silence");
    assert_eq!(code(&answer), 0x142, "TPM_RC_COMMAND_SIZE");
    assert!(oversize.read(&mut answer).map_or(true, |n| n == 0), "closed");
    assert_eq!(code(&tpm(&mut honest, GET_RANDOM_8).expect("still served")), 0);
}

#[test]
fn state_leaves_only_when_allowed_and_the_image_remembers_it() {
    let site = Site::new();
    let mut service = site.start(&[]);
    let mut ctrl = service.connect_control();
    assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]));
    assert_eq!(control(&mut ctrl, &words(&[12, 1, 1, 0])), words(&[9]), "refused by default");
    service.kill();
    let service = site.start(&["--state-export", "allow"]);
    let mut ctrl = service.connect_control();
    assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]));
    let reply = control(&mut ctrl, &words(&[12, 1, 1, 0]));
    assert_eq!(reply[..8], [0; 8]);
    assert_eq!(reply.len(), 16 + u32::from_be_bytes(reply[8..12].try_into().expect("four")) as usize);
    // The blob goes back in, in two messages as QEMU sends it; half of it does not.
    assert_eq!(control(&mut ctrl, &words(&[14])), words(&[0]));
    let blob = &reply[16..];
    ctrl.write_all(&words(&[13, 0, 1, blob.len() as u32])).expect("header");
    assert_eq!(control(&mut ctrl, blob), words(&[0]));
    let half = &blob[..blob.len() / 2];
    let mut message = words(&[13, 0, 1, half.len() as u32]);
    message.extend_from_slice(half);
    assert_ne!(control(&mut ctrl, &message), words(&[0]));
    assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]));
    assert_eq!(control(&mut ctrl, &words(&[3])), words(&[0]), "shutdown");
    drop(service);
    let (ok, text) = site.vmgs(&["inspect"], &[&site.path("vmgs")]);
    assert!(ok && text.contains("identity-left-the-image"), "{text}");
}

#[test]
fn debians_control_tool_works_unchanged() {
    let site = Site::new();
    let mut service = site.start(&["--state-export", "allow"]);
    let ioctl = |args: &[&str]| {
        output(
            std::process::Command::new("swtpm_ioctl")
                .args(["--unix", &service.control.display().to_string()])
                .args(args),
        )
    };
    let caps = ioctl(&["-c"]);
    assert!(caps.0 && caps.1.contains("1ffff"), "{}", caps.1);
    for args in [&["-i"][..], &["-e"], &["-l", "2"], &["-v"], &["-h", "data"], &["--info", "1"]] {
        let (ok, text) = ioctl(args);
        assert!(ok, "{args:?}: {text}");
    }
    assert!(ioctl(&["-i"]).0);
    let saved = site.path("saved");
    assert!(ioctl(&["--save", "permanent", &saved.display().to_string()]).0);
    assert!(std::fs::metadata(&saved).expect("saved state").len() > 1000);
    assert!(ioctl(&["--stop"]).0);
    assert!(ioctl(&["--load", "permanent", &saved.display().to_string()]).0);
    assert!(ioctl(&["-i"]).0);
    assert!(ioctl(&["-s"]).0, "shutdown");
    assert!(service.child.wait().expect("wait").success(), "it ends in good order");
}

#[test]
fn wrong_command_lines_say_what_to_do() {
    let site = Site::new();
    let run = |args: &[&str]| output(common::program().arg("socket").args(args));
    let image = site.path("vmgs").display().to_string();
    for (args, word) in [
        (&["--tpm2", "--ctrl", "type=unixio,path=/tmp/x", "--tpmstate", "dir=/tmp"][..], "--vmgs"),
        (&["--ctrl", "type=unixio,path=/tmp/x"], "tpm2"),
        (&["--tpm2", "--server", "type=tcp,port=1,bindaddr=0.0.0.0", "--vmgs", &image], "loopback"),
        (&["--tpm2", "--vmgs", &image], "nothing to serve on"),
    ] {
        let (ok, text) = run(args);
        assert!(!ok && text.contains(word), "{args:?}: {text}");
    }
    // Each option of swtpm that has no counterpart says what to do instead.
    for (args, word) in [
        (&["-p", "2321"][..], "--server type=tcp,port=N"),
        (&["--fd", "3"], "clientfd=N"),
        (&["--migration-key", "file=k"], "--state-export"),
        (&["--chroot", "/tmp"], "gives up the whole file system"),
        (&["--profile", "name=x"], "no profiles"),
        (&["--print-profiles"], "no profiles"),
        (&["--pcap", "file=x"], "not recorded"),
        (&["--print-states"], "vmgs list"),
        (&["--print-info", "1"], "swtpm_ioctl"),
        (&["--runas", "nobody"], "start the service as that user"),
        (&["--key", "file=k"], "--key-file"),
    ] {
        let (ok, text) = run(&[&["--tpm2", "--vmgs", &image][..], args].concat());
        let option = args[0].trim_start_matches('-');
        assert!(!ok && text.contains(word) && text.contains(option), "{args:?}: {text}");
        assert!(!text.contains("Usage"), "{args:?}: {text}");
    }
    let socket = format!("type=unixio,path={}", site.path("s").display());
    let (ok, text) = run(&["--tpm2", "--ctrl", &socket, "--vmgs", &image]);
    assert!(!ok && text.contains("--key-file"), "{text}");
}

#[test]
fn a_second_instance_and_an_old_copy_are_refused() {
    let site = Site::new();
    let mut first = site.start(&["--flags", "not-need-init"]);
    let mut again = common::program();
    again.args(["socket", "--tpm2", "--ctrl", &format!("type=unixio,path={}", site.path("c2").display())]);
    again.arg("--key-file").arg(site.path("key")).arg("--anchor").arg(site.path("anchor")).arg("--vmgs");
    let refuse = |c: &mut std::process::Command, image: &str, word: &str| {
        let (ok, text) = output(c.arg(site.path(image)));
        assert!(!ok && text.contains(word), "{image}: {text}");
    };
    let fresh = |c: &std::process::Command| {
        let mut n = std::process::Command::new(c.get_program());
        n.args(c.get_args());
        n
    };
    refuse(&mut fresh(&again), "vmgs", "another process has this file open");
    std::fs::copy(site.path("vmgs"), site.path("copy")).expect("copy");
    refuse(&mut fresh(&again), "copy", "two live copies");
    // The original moves on; the copy is then an older one.
    let mut ctrl = first.connect_control();
    assert_eq!(control(&mut ctrl, &words(&[10])), words(&[0]), "a write");
    first.kill();
    refuse(&mut fresh(&again), "copy", "stale image");
    let service = site.start(&["--flags", "not-need-init"]);
    drop(service);
    // A TPM that existed is never made anew because its state is gone.
    let gone = site.path("gone");
    std::fs::copy(site.path("vmgs"), &gone).expect("copy");
    let mut image = std::fs::read(&gone).expect("read");
    let newest = if image[16] > image[512 + 16] { 0 } else { 512 };
    let table = u32::from_le_bytes(image[newest + 24..newest + 28].try_into().expect("four")) as usize * 4096;
    image[table + 60 * 64..table + 61 * 64].fill(0);
    std::fs::write(&gone, &image).expect("write");
    refuse(&mut fresh(&again), "gone", "file 60 (VTPM_STATE): was in this image and has been removed");
}

/// The command line of a service on the usual sockets of a site, with another image.
fn socket_command(site: &Site, image: &str) -> std::process::Command {
    let mut c = common::program();
    c.args(["socket", "--tpm2", "--ctrl", &format!("type=unixio,path={}", site.path("c").display())]);
    c.args(["--server", &format!("type=unixio,path={}", site.path("d").display())]);
    c.arg("--vmgs").arg(site.path(image)).arg("--key-file").arg(site.path("key"));
    c.arg("--anchor").arg(site.path("anchor"));
    c
}

#[test]
fn a_start_that_fails_leaves_the_sockets_of_a_service_that_runs() {
    let site = Site::new();
    let service = site.start(&["--flags", "startup-clear", "--terminate"]);
    let mut kept = service.connect_control();
    let made =
        site.vmgs(&["create", "--size", "1M", "--anchor"], &[&site.path("anchor"), &site.path("other")]);
    assert!(made.0, "{}", made.1);
    for (image, word) in [
        ("vmgs", "another process has this file open"),
        ("none", "none"),
        ("other", "another process serves on it"),
    ] {
        let (ok, text) = output(&mut socket_command(&site, image));
        assert!(!ok && text.contains(word), "{image}: {text}");
        assert_eq!(code(&tpm(&mut service.connect_data(), GET_RANDOM_8).expect("served")), 0, "{image}");
    }
    // Nor was it ended by a look: with `--terminate` a control client that goes away ends it.
    assert_eq!(control(&mut kept, &words(&[1])), words(&[0, 0x1_ffff]));
}

#[test]
fn names_that_the_service_made_go_with_it() {
    let site = Site::new();
    let (pid, held) = (site.path("pid"), format!("file={}", site.path("pid").display()));
    for end in ["shutdown", "signal", "kill", "none is left in the way"] {
        let mut service = site.start(&["--pid", &held, "--flags", "startup-clear"]);
        assert_eq!(std::fs::read_to_string(&pid).expect("pid").trim(), service.child.id().to_string());
        match end {
            "kill" => {
                service.kill();
                assert!(site.path("c").exists() && pid.exists(), "killed: nobody cleans up");
                continue;
            }
            "signal" => {
                let kill = output(std::process::Command::new("kill").arg(service.child.id().to_string()));
                assert!(kill.0, "{}", kill.1);
            }
            _ => assert_eq!(control(&mut service.connect_control(), &words(&[3])), words(&[0])),
        }
        assert!(service.child.wait().expect("wait").success(), "{end}: {}", site.log());
        for name in ["c", "d", "pid"] {
            assert!(!site.path(name).exists(), "{end}: {name}");
        }
    }
}

#[test]
fn the_background_begins_when_the_service_is_ready_and_failure_is_said() {
    let site = Site::new();
    let held = format!("file={}", site.path("pid").display());
    let log = format!("file={}", site.path("log").display());
    let mut c = socket_command(&site, "vmgs");
    c.args(["--daemon", "--pid", &held, "--log", &log, "--flags", "startup-clear"]);
    assert!(c.status().expect("run").success(), "{}", site.log());
    // No waiting: it is there.
    let mut data = std::os::unix::net::UnixStream::connect(site.path("d")).expect("connect");
    assert_eq!(code(&tpm(&mut data, GET_RANDOM_8).expect("served")), 0);
    let mut second = socket_command(&site, "vmgs");
    second.args(["--daemon", "--log", &log]);
    assert_eq!(second.status().expect("run").code(), Some(1), "{}", site.log());
    let mut ctrl = std::os::unix::net::UnixStream::connect(site.path("c")).expect("connect");
    assert_eq!(control(&mut ctrl, &words(&[3])), words(&[0]));
}

/// A file that the parent had open is not there any more in the process that parses hostile bytes.
#[test]
fn descriptors_that_were_left_open_are_closed() {
    let site = Site::new();
    let mut sh = std::process::Command::new("sh");
    // 8 is a mistake of the parent's; 9 is where the key comes from.
    sh.args(["-c", "exec 8</etc/passwd 9<\"$1\"; shift; exec \"$@\"", "sh"]).arg(site.path("key"));
    sh.arg(env!("CARGO_BIN_EXE_vtpm-svc")).args(["socket", "--tpm2", "--key-file", "/dev/fd/9", "--ctrl"]);
    sh.arg(format!("type=unixio,path={}", site.path("c").display())).arg("--vmgs").arg(site.path("vmgs"));
    sh.arg("--anchor").arg(site.path("anchor"));
    let service = Service::spawn(sh, site.path("log"), site.path("c"), site.path("d"));
    let names =
        output(std::process::Command::new("ls").arg("-l").arg(format!("/proc/{}/fd", service.child.id())));
    // Only root may look into a process without core dumps.
    if names.0 {
        assert!(names.1.contains("/vmgs") && !names.1.contains("passwd"), "{}", names.1);
    }
}
