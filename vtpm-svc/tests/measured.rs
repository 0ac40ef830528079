// SPDX-License-Identifier: Apache-2.0
//! Measured boot: log, PCRs and other parsers agree.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::Site;
use common::output;
use vtpm_svc::control::client::Client;
use vtpm_svc::measured;
use vtpm_svc::measured::Boot;
use vtpm_svc::tpm::commands;
use vtpm_svc::tpm::commands::alg;

/// A small PE file: headers of 0x200 bytes, one section of 0x200, and 8 bytes of certificates behind it.
fn pe() -> Vec<u8> {
    let mut f = vec![0u8; 0x408];
    f[..2].copy_from_slice(b"MZ");
    f[0x3c] = 0x40;
    f[0x40..0x44].copy_from_slice(b"PE\0\0");
    f[0x44..0x46].copy_from_slice(&[0x64, 0x86]);
    f[0x46] = 1;
    f[0x54] = 0xf0;
    f[0x58..0x5a].copy_from_slice(&[0x0b, 2]);
    f[0x58 + 60..0x58 + 64].copy_from_slice(&0x200u32.to_le_bytes());
    f[0x58 + 64..0x58 + 68].copy_from_slice(&0x1234_5678u32.to_le_bytes());
    f[0x58 + 108] = 16;
    let certificates = 0x58 + 112 + 32;
    f[certificates..certificates + 4].copy_from_slice(&0x400u32.to_le_bytes());
    f[certificates + 4..certificates + 8].copy_from_slice(&8u32.to_le_bytes());
    let section = 0x58 + 0xf0;
    f[section + 16..section + 20].copy_from_slice(&0x200u32.to_le_bytes());
    f[section + 20..section + 24].copy_from_slice(&0x200u32.to_le_bytes());
    f[0x200..0x400].fill(0xc3);
    f[0x400..].fill(0xee);
    f
}

fn boot(kernel: &[u8]) -> Boot<'_> {
    Boot {
        monitor: "cvmm test",
        stage0: Some((0xf_0000, b"stage0's code")),
        kernel,
        kernel_address: 0x10_0000,
        initrd: Some(b"an initrd"),
        cmdline: "console=ttyS0 root=/dev/vda",
    }
}

/// Value of one PCR of one bank, read from the TPM.
fn pcr(client: &mut Client, bank: u16, n: u32) -> Vec<u8> {
    let mut select = [0; 3];
    select[n as usize / 8] = 1 << (n % 8);
    let mut p = vec![0, 0, 0, 1];
    p.extend(bank.to_be_bytes());
    p.push(3);
    p.extend(select);
    let mut transport = |c: &[u8]| client.execute(0, c).map_err(|e| e.to_string());
    let answer = commands::run(&mut transport, "PCR_Read", 0x17e, &[], &p).expect("PCR_Read");
    // Update counter, selection (count, bank, size, bits), digest count, length, digest.
    answer.get(4 + 4 + 2 + 1 + 3 + 4 + 2..).unwrap_or_default().to_vec()
}

#[test]
fn the_tpm_holds_what_the_log_says_and_the_guest_cannot_use_the_platform_hierarchy() {
    let site = Site::new();
    let service = site.start(&[]);
    let mut client = Client::connect(&service.control).expect("connect");
    client.reset(0).expect("power on");
    let kernel = pe();
    let events = boot(&kernel).events();
    measured::extend(&mut |c: &[u8]| client.execute(0, c).map_err(|e| e.to_string()), &events)
        .expect("extend");
    for (bank, size) in vtpm_svc::tpm::commands::BANKS {
        let expected = measured::replay(&events, bank);
        assert_eq!(expected.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7, 9, 12]);
        for n in 0..16 {
            let want = expected.get(&n).cloned().unwrap_or_else(|| vec![0; size]);
            assert_eq!(pcr(&mut client, bank, n), want, "PCR {n} of bank {bank:#x}");
        }
    }
    assert!(pcr(&mut client, alg::SHA1, 0).len() < 20, "a bank that nobody extends does not exist");
    let mut transport = |c: &[u8]| client.execute(0, c).map_err(|e| e.to_string());
    let denied = commands::pcr_allocate(&mut transport, &[alg::SHA1]).expect_err("platform hierarchy");
    assert!(denied.to_string().contains("0x185"), "TPM_RC_HIERARCHY for handle 1: {denied}");
}

/// tpm2-tools reads the log and computes the same PCRs from it.
#[test]
fn tpm2_eventlog_accepts_the_log_and_computes_the_same_pcrs() {
    let site = Site::without_image();
    let kernel = pe();
    let events = boot(&kernel).events();
    let path = site.path("log.bin");
    std::fs::write(&path, measured::log::write(&events)).expect("write");
    let (ok, text) = output(Command::new("tpm2_eventlog").arg(&path));
    assert!(ok, "{text}");
    assert!(text.contains("EV_EFI_BOOT_SERVICES_APPLICATION") && text.contains("Spec ID Event03"), "{text}");
    let pcrs = text.split("\npcrs:").nth(1).expect("PCR section");
    for (name, bank) in [("sha256", alg::SHA256), ("sha384", alg::SHA384)] {
        let section = pcrs.split(&format!("{name}:")).nth(1).expect(name);
        for (n, value) in measured::replay(&events, bank) {
            let hex: String = value.iter().map(|b| format!("{b:02x}")).collect();
            let line = section.lines().find(|l| l.trim().starts_with(&format!("{n} "))).expect("PCR");
            assert!(line.contains(&format!("0x{hex}")), "PCR {n}: {line}, expected {hex}");
        }
    }
}

/// The digest leaves out the checksum, the certificate entry and the certificates, and nothing else.
#[test]
fn signing_a_kernel_does_not_change_its_digest() {
    let digest = |f: &[u8]| {
        let events = boot(f).events();
        events
            .iter()
            .find(|e| e.kind == measured::kind::EFI_BOOT_SERVICES_APPLICATION)
            .expect("kernel")
            .digests
            .clone()
    };
    let kernel = pe();
    let reference = digest(&kernel);
    for (at, same) in
        [(0x98, true), (0xc8 + 32, true), (0x404, true), (0x97, false), (0x9c, false), (0x3ff, false)]
    {
        let mut changed = kernel.clone();
        changed[at] ^= 0x10;
        assert_eq!(digest(&changed) == reference, same, "byte {at:#x}");
    }
}

/// A real kernel, by the tool that signs kernels.
#[test]
#[ignore = "needs pesign and a kernel in CVMM_KERNEL; `cargo xtask test` runs it"]
fn pesign_computes_the_same_digest() {
    use sha2::Digest;
    let path = PathBuf::from(std::env::var_os("CVMM_KERNEL").expect("CVMM_KERNEL"));
    let kernel = std::fs::read(&path).expect("kernel");
    let mut hash = sha2::Sha256::new();
    for span in measured::authenticode::spans(&kernel).expect("a PE file") {
        hash.update(&kernel[span]);
    }
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let (ok, text) = output(Command::new("pesign").args(["--hash", "--in"]).arg(&path));
    assert!(ok && text.contains(&hex), "{text}, ours {hex}");
}
