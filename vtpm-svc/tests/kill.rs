// SPDX-License-Identifier: Apache-2.0
//! `kill -9` at random moments of a workload: nothing that was acknowledged is lost, and the image always
//! opens.
//!
//! 200 rounds by default; `VTPM_KILLS=2000` is the full run, which `cargo xtask test --long` makes. Two TPMs
//! live through half of them each. A round starts the service on what the last one left behind, checks it,
//! and kills it at a random moment: in the middle of a stream of durable commands or, one time in eight,
//! while it starts.

#![allow(clippy::panic)]

mod common;

use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

use common::STARTUP_CLEAR;
use common::Site;
use common::code;
use common::tpm;

const COUNTER: u32 = 0x0150_0001;
const DATA: u32 = 0x0150_0002;
const OWNER: u32 = 0x4000_0001;

/// A command whose handles are all authorised by one empty owner password.
fn command(cc: u32, handles: &[u32], parameters: &[u8]) -> Vec<u8> {
    let mut c = vec![0x80, 2, 0, 0, 0, 0];
    c.extend(cc.to_be_bytes());
    handles.iter().for_each(|h| c.extend(h.to_be_bytes()));
    c.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0]);
    c.extend(parameters);
    let len = c.len() as u32;
    c[2..6].copy_from_slice(&len.to_be_bytes());
    c
}

fn define(index: u32, attributes: u32, size: u8) -> Vec<u8> {
    let mut p = vec![0, 0, 0, 14];
    p.extend(index.to_be_bytes());
    p.extend([0, 0x0b]);
    p.extend(attributes.to_be_bytes());
    p.extend([0, 0, 0, size]);
    command(0x12a, &[OWNER], &p)
}

fn increment() -> Vec<u8> {
    command(0x134, &[OWNER, COUNTER], &[])
}

fn write(value: u64) -> Vec<u8> {
    let mut p = vec![0, 8];
    p.extend(value.to_be_bytes());
    p.extend([0, 0]);
    command(0x137, &[OWNER, DATA], &p)
}

/// Runs a command, and again as long as the TPM says "retry".
fn run(s: &mut UnixStream, c: &[u8]) -> std::io::Result<Vec<u8>> {
    loop {
        let r = tpm(s, c)?;
        if code(&r) != 0x922 {
            return Ok(r);
        }
    }
}

fn read(s: &mut UnixStream, index: u32) -> u64 {
    let r = run(s, &command(0x14e, &[OWNER, index], &[0, 8, 0, 0])).expect("read");
    assert_eq!(code(&r), 0, "reading {index:#x}");
    u64::from_be_bytes(r[16..24].try_into().expect("eight bytes"))
}

fn random(seed: &mut u64, below: u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed % below
}

/// What one TPM has been through.
#[derive(Debug, Default)]
struct History {
    /// Acknowledged values; one more increment or write may have been under way.
    counter: Option<u64>,
    data: u64,
    /// Rounds that found the command under way done.
    unacknowledged_done: u32,
    killed_at_start: u32,
}

/// Kills a process after a time, whatever it does then.
fn kill_after(child: &std::process::Child, micros: u64) -> std::thread::JoinHandle<()> {
    let end = Instant::now() + Duration::from_micros(micros);
    let pid = rustix::process::Pid::from_child(child);
    std::thread::spawn(move || {
        std::thread::sleep(
            end.saturating_duration_since(Instant::now()).saturating_sub(Duration::from_micros(200)),
        );
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
    })
}

fn live_and_die(rounds: u64, mut seed: u64) -> History {
    let site = Site::new();
    println!("seed {seed:#x}");
    let mut h = History::default();
    for round in 0..rounds {
        if h.counter.is_some() && random(&mut seed, 8) == 0 {
            // Nobody has talked to this one, so nothing can have changed.
            let mut service = site.launch(&["--flags", "startup-clear"]);
            kill_after(&service.child, random(&mut seed, 15_000)).join().expect("killer");
            service.child.wait().expect("wait");
            h.killed_at_start += 1;
        }
        let mut service = site.start(&["--flags", "not-need-init"]);
        let mut s = service.connect_data();
        assert_eq!(code(&run(&mut s, STARTUP_CLEAR).expect("startup")), 0, "round {round}: {}", site.log());
        match h.counter {
            None => {
                // Counter (nt = 1) and ordinary index, owner may read and write.
                assert_eq!(code(&run(&mut s, &define(COUNTER, 0x0002_0012, 8)).expect("define")), 0);
                assert_eq!(code(&run(&mut s, &define(DATA, 0x0002_0002, 8)).expect("define")), 0);
                assert_eq!(code(&run(&mut s, &increment()).expect("increment")), 0);
                assert_eq!(code(&run(&mut s, &write(0)).expect("write")), 0);
            }
            Some(acknowledged) => {
                let found = read(&mut s, COUNTER);
                assert!(
                    (acknowledged..=acknowledged + 1).contains(&found),
                    "round {round}: {found}, {acknowledged}"
                );
                let value = read(&mut s, DATA);
                assert!((h.data..=h.data + 1).contains(&value), "round {round}: {value}, {}", h.data);
                h.unacknowledged_done += u32::from(found != acknowledged || value != h.data);
                h.data = value;
            }
        }
        h.counter = Some(read(&mut s, COUNTER));
        let killer = kill_after(&service.child, random(&mut seed, 12_000));
        loop {
            match run(&mut s, &increment()) {
                Ok(r) if code(&r) == 0 => h.counter = h.counter.map(|c| c + 1),
                Ok(r) => panic!("round {round}: increment answered {:#x}", code(&r)),
                Err(_) => break,
            }
            match run(&mut s, &write(h.data + 1)) {
                Ok(r) if code(&r) == 0 => h.data += 1,
                Ok(r) => panic!("round {round}: write answered {:#x}", code(&r)),
                Err(_) => break,
            }
        }
        killer.join().expect("killer");
        service.child.wait().expect("wait");
    }
    let (ok, text) = site.vmgs(&["check", "--anchor"], &[&site.path("anchor"), &site.path("vmgs")]);
    assert!(ok, "{text}");
    h
}

#[test]
fn nothing_acknowledged_is_lost_to_kill_9() {
    let rounds: u64 = std::env::var("VTPM_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let seed = 0x5eed_0000_0000_0001 ^ u64::from(std::process::id()) << 8;
    let began = Instant::now();
    let histories = std::thread::scope(|s| {
        let other = s.spawn(|| live_and_die(rounds / 2, seed ^ 0x2_0000_0000));
        [live_and_die(rounds - rounds / 2, seed), other.join().expect("the other TPM")]
    });
    println!("{rounds} kills under load in {:.0?}: {histories:?}", began.elapsed());
}
