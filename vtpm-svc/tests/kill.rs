// SPDX-License-Identifier: Apache-2.0
//! `kill -9` at random moments of a workload: nothing that was acknowledged is lost, and the image always opens.
//!
//! 60 rounds by default; `VTPM_KILLS=2000` is the full run. Each round starts the service on what the last one left
//! behind, checks it, and kills it at a random moment in the middle of a stream of durable commands.

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

#[test]
fn nothing_acknowledged_is_lost_to_kill_9() {
    let rounds: u64 = std::env::var("VTPM_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let site = Site::new();
    let mut seed = 0x5eed_0000_0000_0001 ^ u64::from(std::process::id());
    println!("seed {seed:#x}");
    // Acknowledged values; one more increment or write may have been under way.
    let (mut counter, mut data) = (None::<u64>, 0u64);
    let mut in_flight = 0;
    for round in 0..rounds {
        let mut service = site.start(&["--flags", "not-need-init"]);
        let mut s = service.connect_data();
        assert_eq!(code(&run(&mut s, STARTUP_CLEAR).expect("startup")), 0, "round {round}: {}", site.log());
        match counter {
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
                assert!((data..=data + 1).contains(&value), "round {round}: {value}, {data}");
                in_flight += u32::from(found != acknowledged || value != data);
                data = value;
            }
        }
        counter = Some(read(&mut s, COUNTER));
        let end = Instant::now() + Duration::from_micros(random(&mut seed, 12_000));
        let killer = {
            let pid = rustix::process::Pid::from_child(&service.child);
            std::thread::spawn(move || {
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
            })
        };
        loop {
            match run(&mut s, &increment()) {
                Ok(r) if code(&r) == 0 => counter = counter.map(|c| c + 1),
                Ok(r) => panic!("round {round}: increment answered {:#x}", code(&r)),
                Err(_) => break,
            }
            match run(&mut s, &write(data + 1)) {
                Ok(r) if code(&r) == 0 => data += 1,
                Ok(r) => panic!("round {round}: write answered {:#x}", code(&r)),
                Err(_) => break,
            }
        }
        killer.join().expect("killer");
        service.child.wait().expect("wait");
    }
    println!(
        "{rounds} kills, counter {counter:?}, data {data}; {in_flight} found the unacknowledged one done"
    );
    let (ok, text) = site.vmgs(&["check", "--anchor"], &[&site.path("anchor"), &site.path("vmgs")]);
    assert!(ok, "{text}");
}
