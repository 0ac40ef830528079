// SPDX-License-Identifier: Apache-2.0
//! How a TPM's run ends and how the next begins: in good order, in the middle, or continued from a saved
//! state.

mod common;

use std::os::unix::net::UnixStream;

use common::STARTUP_CLEAR;
use common::Service;
use common::Site;
use common::code;
use common::control;
use common::output;
use common::tpm;
use common::words;
use vtpm_svc::control::client::Client;
use vtpm_svc::measured;
use vtpm_svc::tpm::commands;
use vtpm_svc::tpm::commands::Bytes;
use vtpm_svc::tpm::commands::CommandError;
use vtpm_svc::tpm::commands::handle;

const INDEX: u32 = 0x0150_0042;
const PIN: &[u8] = b"1234";

fn transport(s: &mut UnixStream) -> impl FnMut(&[u8]) -> Result<Vec<u8>, String> {
    |command| tpm(s, command).map_err(|e| e.to_string())
}

/// An index with a PIN that counts wrong tries: authwrite, authread and no NO_DA (TPM 2.0 Library, part 2,
/// 13.4).
fn make_protected(s: &mut UnixStream) {
    let public = Bytes::default().u32(INDEX).u16(0x0b).u32(0x0004_0004).u16(0).u16(8);
    let p = Bytes::default().sized(PIN).sized(&public.0);
    commands::run(&mut transport(s), "NV_DefineSpace", 0x12a, &[handle::OWNER], &p.0).expect("define");
    assert_eq!(use_pin(s, 0x137, &Bytes::default().sized(b"12345678").u16(0).0), 0, "NV_Write");
}

/// A command on the index, authorised by its PIN.
fn use_pin(s: &mut UnixStream, command: u32, parameters: &[u8]) -> u32 {
    let session = Bytes::default().u32(handle::PASSWORD).u16(0).u8(0).sized(PIN).0;
    let body =
        Bytes::default().u32(INDEX).u32(INDEX).u32(session.len() as u32).raw(&session).raw(parameters).0;
    let c = Bytes::default().u16(0x8002).u32(10 + body.len() as u32).u32(command).raw(&body).0;
    // A TPM that tests itself first wants the command again.
    (0..5).map(|_| code(&tpm(s, &c).expect("response"))).find(|c| *c != 0x922).expect("an answer")
}

fn open_with_pin(s: &mut UnixStream) -> u32 {
    use_pin(s, 0x14e, &Bytes::default().u16(8).u16(0).0)
}

/// `TPM_PT_LOCKOUT_COUNTER`.
fn lockout_counter(s: &mut UnixStream) -> u32 {
    let p = Bytes::default().u32(6).u32(0x20e).u32(1);
    let r = commands::run(&mut transport(s), "GetCapability", 0x17a, &[], &p.0).expect("capability");
    u32::from_be_bytes(r[13..17].try_into().expect("four"))
}

fn signal(service: &mut Service, name: &str) {
    let kill = output(std::process::Command::new("kill").args(["-s", name, &service.child.id().to_string()]));
    assert!(kill.0, "{}", kill.1);
    service.child.wait().expect("wait");
}

#[test]
fn an_object_with_a_pin_survives_ends_without_a_shutdown_by_the_client() {
    let site = Site::new();
    let start = || {
        let service = site.start(&["--flags", "startup-clear"]);
        let data = service.connect_data();
        (service, data)
    };
    let (mut service, mut s) = start();
    make_protected(&mut s);
    for n in 0..20 {
        assert_eq!(open_with_pin(&mut s), 0, "end {n}");
        match n % 4 {
            0 => signal(&mut service, "TERM"),
            1 => {
                assert_eq!(control(&mut service.connect_control(), &words(&[3])), words(&[0]));
                assert!(service.child.wait().expect("wait").success());
            }
            // A reset: at once, or after switching off.
            kind => {
                let mut ctrl = service.connect_control();
                if kind == 2 {
                    assert_eq!(control(&mut ctrl, &words(&[14])), words(&[0]));
                }
                assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]));
                assert_eq!(code(&tpm(&mut s, STARTUP_CLEAR).expect("startup")), 0);
                service.first.set(Some(ctrl));
            }
        }
        if n % 4 < 2 {
            (service, s) = start();
        }
        assert_eq!(lockout_counter(&mut s), 0, "after end {n}");
    }
    // What really breaks off still counts.
    assert_eq!(open_with_pin(&mut s), 0);
    signal(&mut service, "KILL");
    let (_service, mut s) = start();
    assert_eq!(lockout_counter(&mut s), 1);
}

/// `TPM2_Shutdown(STATE)` by the guest, which wants its state back at the next start, is the last word.
#[test]
fn a_shutdown_of_the_client_is_not_followed_by_another() {
    let site = Site::new();
    let mut service = site.start(&["--flags", "startup-clear"]);
    let mut s = service.connect_data();
    extend(&mut s, 4);
    let before = pcr(&mut s, 4);
    let p = Bytes::default().u16(1);
    commands::run(&mut transport(&mut s), "Shutdown", 0x145, &[], &p.0).expect("shutdown");
    signal(&mut service, "TERM");
    let service = site.start(&["--flags", "startup-state"]);
    assert_eq!(pcr(&mut service.connect_data(), 4), before, "resumed");
}

fn extend(s: &mut UnixStream, pcr: u32) {
    commands::pcr_extend(&mut transport(s), pcr, &[(0x0b, vec![7; 32])]).expect("extend");
}

/// A PCR of the SHA-256 bank.
fn pcr(s: &mut UnixStream, number: u8) -> Vec<u8> {
    let mut bits = [0; 3];
    bits[usize::from(number / 8)] = 1 << (number % 8);
    let p = Bytes::default().u32(1).u16(0x0b).u8(3).raw(&bits);
    let r = commands::run(&mut transport(s), "PCR_Read", 0x17e, &[], &p.0).expect("read");
    r[r.len() - 32..].to_vec()
}

/// PCR 4 extended, the state stored, and the TPM switched off.
fn with_saved_state(site: &Site) -> (Service, Vec<u8>) {
    let service = site.start(&[]);
    let (mut ctrl, mut s) = (service.connect_control(), service.connect_data());
    assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]));
    assert_eq!(code(&tpm(&mut s, STARTUP_CLEAR).expect("startup")), 0);
    extend(&mut s, 4);
    let saved = pcr(&mut s, 4);
    assert_eq!(control(&mut ctrl, &words(&[10])), words(&[0]), "store-volatile");
    assert_eq!(control(&mut ctrl, &words(&[14])), words(&[0]), "stop");
    service.first.set(Some(ctrl));
    (service, saved)
}

#[test]
fn a_saved_state_is_continued_by_who_asks_for_it() {
    let site = Site::new();
    let (service, saved) = with_saved_state(&site);
    let (mut ctrl, mut s) = (service.connect_control(), service.connect_data());
    assert_eq!(control(&mut ctrl, &words(&[2, 1])), words(&[0]));
    assert_eq!(pcr(&mut s, 4), saved);
    assert!(site.log().contains("continues from a stored volatile state"), "{}", site.log());
    let refused = measured::extend(&mut transport(&mut s), &[]);
    assert!(
        matches!(refused, Err(CommandError::Running)),
        "measured boot would go on top of it: {refused:?}"
    );
}

#[test]
fn a_power_on_of_the_monitor_is_a_fresh_one() {
    let site = Site::new();
    let (service, _) = with_saved_state(&site);
    drop(service.first.take());
    let mut client = Client::connect(&service.control).expect("connect");
    assert_eq!(client.control().submit_ppi(5, 0).expect("submit"), 0);
    for _ in 0..2 {
        client.reset(0).expect("reset");
        let mut transmit = |command: &[u8]| client.execute(0, command).map_err(|e| e.to_string());
        measured::extend(&mut transmit, &[]).expect("a fresh TPM");
        assert_eq!(pcr(&mut service.connect_data(), 4), [0; 32]);
    }
    assert_eq!(client.control().ppi().expect("state"), [0, 0, 5, 0], "a request is not kept waiting by it");
}

#[test]
fn a_service_that_is_to_start_the_tpm_starts_it_afresh() {
    let site = Site::new();
    let (mut service, _) = with_saved_state(&site);
    signal(&mut service, "TERM");
    for _ in 0..2 {
        let mut service = site.start(&["--flags", "startup-clear"]);
        assert_eq!(pcr(&mut service.connect_data(), 4), [0; 32]);
        service.kill();
    }
}

/// A volatile state that is none, or another TPM's, is refused when it comes, and one that is in the image
/// nevertheless does not keep the TPM from starting.
#[test]
fn a_bad_volatile_state_never_stops_a_start() {
    let site = Site::new();
    let other = Site::new();
    let (mut service, _) = with_saved_state(&other);
    signal(&mut service, "TERM");
    let foreign = other.path("foreign");
    let id = ["export", "--id", "57", "-o", foreign.to_str().expect("path")];
    let exported = other.vmgs(&id, &[&other.path("vmgs")]);
    assert!(exported.0, "{}", exported.1);
    let framed = std::fs::read(&foreign).expect("state");
    // Behind the header of the image's record.
    let foreign = framed[32..].to_vec();

    let (mut service, saved) = with_saved_state(&site);
    signal(&mut service, "TERM");
    let service = site.start(&["--state-export", "allow"]);
    let mut ctrl = service.connect_control();
    let noise = vec![0x5a; 1000];
    for (name, blob) in [("noise", &noise), ("another TPM's", &foreign)] {
        let answer = control(&mut ctrl, &[words(&[13, 0, 2, blob.len() as u32]), blob.clone()].concat());
        assert_ne!(answer, words(&[0]), "{name}");
    }
    // The one that was there still is.
    assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]));
    assert_eq!(pcr(&mut service.connect_data(), 4), saved);
    drop((ctrl, service));

    for (name, record) in [("cut", framed[..100].to_vec()), ("another TPM's", framed.clone())] {
        std::fs::write(site.path("record"), record).expect("write");
        let args = ["import", "--id", "57", "-i"];
        let anchor = site.path("anchor");
        let put = site.vmgs(
            &[
                &args[..],
                &[site.path("record").to_str().expect("path"), "--anchor", anchor.to_str().expect("path")],
            ]
            .concat(),
            &[&site.path("vmgs")],
        );
        assert!(put.0, "{name}: {}", put.1);
        let mut service = site.start(&[]);
        let (mut ctrl, mut s) = (service.connect_control(), service.connect_data());
        assert_eq!(control(&mut ctrl, &words(&[2, 0])), words(&[0]), "{name}: {}", site.log());
        assert_eq!(code(&tpm(&mut s, STARTUP_CLEAR).expect("startup")), 0, "{name}: a fresh TPM");
        service.kill();
        assert!(site.log().contains("cannot be continued"), "{name}: {}", site.log());
    }
}
