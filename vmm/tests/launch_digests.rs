// SPDX-License-Identifier: Apache-2.0
//! A table of launch digests that stays the same while the code behind it moves.
//!
//! The inputs are made here, byte for byte the same each time, and measured by `cvmm measure`, so no test of
//! an inner function stands in the way of a move. `data/launch_digests.txt` holds what came out. Whoever
//! holds a policy with one of our digests relies on it: the table may be recorded again only where stage0, or
//! what a launch contains, was changed on purpose, and the commit says so. To record it, run this test with
//! `CVMM_RECORD_DIGESTS=1`, and read the difference.
//!
//! Rows that begin with `stage0` contain the binary of stage0, which is compiled by the toolchain in use.
//! With another compiler it may be another binary, and those rows are then not compared; with the same
//! compiler they must agree.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use snp::vmsa::VmsaState;
use test_support::firmware;
use test_support::firmware::Firmware;
use test_support::igvm::seal;
use test_support::kernels;
use test_support::noise;

/// An IGVM file of version 1 with four pages of three types, a parameter area and `vcpus` save areas.
fn igvm(vcpus: u16) -> Vec<u8> {
    let mut headers: Vec<(u32, Vec<u8>)> = vec![
        // Mask 1, VTL 0, SEV-SNP, version 1, no boundary.
        (0x1, [&1u32.to_le_bytes()[..], &[0, 2, 1, 0], &[0; 8]].concat()),
        (0x101, [&0x3_0000u64.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4]].concat()),
    ];
    // Page address, type, whether it has data; the data's offset is filled in below.
    let page = |gpa: u64, kind: u32| {
        [&gpa.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 8], &kind.to_le_bytes()].concat()
    };
    let mut data: Vec<Vec<u8>> = vec![noise(11, 4096), noise(12, 4096)];
    headers.push((0x302, page(0x10_0000, 0)));
    headers.push((0x302, page(0x10_1000, 0)));
    headers.push((0x302, page(0x10_2000, 0)));
    headers.push((0x302, page(0x10_3000, 1)));
    headers.push((0x302, page(0x10_4000, 2)));
    let area = [&0x2000u64.to_le_bytes()[..], &0u32.to_le_bytes(), &[0; 4]].concat();
    headers.push((0x301, area));
    headers
        .push((0x303, [&0x20_0000u64.to_le_bytes()[..], &1u32.to_le_bytes(), &0u32.to_le_bytes()].concat()));
    let state = VmsaState { cr0: 0x31, rip: 0x10_0000, ..VmsaState::reset() };
    for index in 0..vcpus {
        data.push(state.encode().to_vec());
        let gpa = 0xffff_ffff_f000u64.to_le_bytes();
        headers
            .push((0x304, [&gpa[..], &1u32.to_le_bytes(), &[0; 4], &index.to_le_bytes(), &[0; 2]].concat()));
    }
    let size: usize = headers.iter().map(|(_, body)| 8 + body.len().next_multiple_of(8)).sum();
    let mut offset = 24 + size;
    let mut with_data = data.iter();
    for (kind, body) in &mut headers {
        // Two pages have data, at 1 MiB and behind it, and each save area.
        let has = *kind == 0x304 || (*kind == 0x302 && body[1] < 0x20);
        if has {
            body[12..16].copy_from_slice(&(offset as u32).to_le_bytes());
            offset += with_data.next().unwrap().len();
        }
    }
    let mut variable = Vec::new();
    for (kind, body) in &headers {
        variable.extend_from_slice(&kind.to_le_bytes());
        variable.extend_from_slice(&(body.len() as u32).to_le_bytes());
        variable.extend_from_slice(body);
        variable.resize(variable.len().next_multiple_of(8), 0);
    }
    let mut file = b"IGVM".to_vec();
    for word in [1, 24, variable.len() as u32, offset as u32] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(&variable);
    data.iter().for_each(|page| file.extend_from_slice(page));
    seal(&mut file);
    file
}

/// Writes the inputs into `folder`.
fn write_inputs(folder: &Path) {
    let put = |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes).unwrap();
    let mut image = kernels::small_bzimage(noise(1, 70_000));
    put("bzimage", &image.bytes());
    // LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID in the decompressor's code: this kernel accepts memory itself.
    image.tail.extend_from_slice(&kernels::UNACCEPTED);
    put("bzimage-lazy", &image.bytes());
    put("vmlinux", &kernels::small_vmlinux());
    put("initrd", &noise(2, 50_001));
    let sections = vec![
        (0x80_0000, 0x9000, firmware::SEC_MEM),
        (0x80_a000, 0x1000, firmware::SECRETS),
        (0x80_9000, 0x1000, firmware::CPUID),
        (0x81_0000, 0x1000, firmware::KERNEL_HASHES),
        (0x82_0000, 0x3000, firmware::SEC_MEM),
    ];
    let file = Firmware {
        pages: 24,
        seed: 3,
        sections,
        reset_eip: 0xffff_f0a0,
        hashes_base: 0x81_0c00,
        svsm_entry: 0x40,
    };
    put("ovmf", &file.bytes());
    put("igvm-1", &igvm(1));
    put("igvm-4", &igvm(4));
}

/// The command lines, without `measure --json`. Those in the first list contain stage0.
fn command_lines() -> (Vec<String>, Vec<String>) {
    let mut stage0 = Vec::new();
    let mut fixed = Vec::new();
    for kernel in ["bzimage", "vmlinux"] {
        for memory in ["128M", "512M", "2G", "3G", "5G"] {
            stage0.push(format!("--kernel {kernel} --memory {memory} --accept eager --vcpus 1-16"));
        }
        stage0.push(format!("--kernel {kernel} --initrd initrd --accept eager --vcpus 1,2,16"));
        stage0.push(format!("--kernel {kernel} --cmdline quiet --accept eager --vcpus 1"));
        stage0.push(format!(
            "--kernel {kernel} --initrd initrd --cmdline quiet --vtpm --accept eager --vcpus 1,2,16"
        ));
        stage0.push(format!("--kernel {kernel} --secure-tsc --accept eager --vcpus 1,3"));
        for memory in ["128M", "192M"] {
            let more = "--validation launch --initrd initrd --vcpus 1,16";
            fixed.push(format!("--kernel {kernel} --memory {memory} {more}"));
        }
        fixed.push(format!("--kernel {kernel} --memory 128M --validation launch --vtpm --vcpus 1,4"));
    }
    for memory in ["512M", "3G", "5G", "64G"] {
        stage0.push(format!("--kernel bzimage-lazy --memory {memory} --accept lazy --vcpus 1,2,16"));
        stage0.push(format!("--kernel bzimage-lazy --memory {memory} --accept auto --vcpus 1"));
    }
    stage0.push("--kernel bzimage-lazy --initrd initrd --vtpm --accept lazy --vcpus 1,8".to_owned());
    for vmm in ["cvmm", "qemu"] {
        for model in ["EPYC-Milan", "EPYC-Genoa", "EPYC-v4", "0xb00f21"] {
            fixed.push(format!("--firmware ovmf --vmm {vmm} --vcpu-model {model} --vcpus 1-16"));
        }
    }
    for vmm in ["ec2", "gce", "krun"] {
        fixed.push(format!("--firmware ovmf --vmm {vmm} --vcpus 1-16"));
    }
    for files in ["--kernel bzimage", "--kernel bzimage --initrd initrd", "--kernel bzimage --cmdline quiet"]
    {
        fixed.push(format!("--firmware ovmf --vcpu-model EPYC-Milan {files} --vcpus 1,2"));
    }
    fixed.push("--firmware ovmf --vcpu-model EPYC-Milan --guest-features 0x21 --vcpus 1,2".to_owned());
    for file in ["igvm-1", "igvm-4"] {
        for zero in ["normal", "zero"] {
            fixed.push(format!("--igvm {file} --zero-pages {zero}"));
        }
    }
    (stage0, fixed)
}

/// The digests of one command line, and the SHA-256 of stage0 if it is part of them.
fn measure(folder: &Path, line: &str) -> (Vec<(u64, String)>, Option<String>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvmm"));
    let output =
        command.current_dir(folder).args(["measure", "--json"]).args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "cvmm measure {line}: {}", String::from_utf8_lossy(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let digest = |entry: &serde_json::Value| {
        (entry["vcpus"].as_u64().unwrap(), entry["launch_digest"].as_str().unwrap().to_owned())
    };
    let digests: Vec<(u64, String)> = json["digests"].as_array().unwrap().iter().map(digest).collect();
    assert!(!digests.is_empty(), "cvmm measure {line}");
    (digests, json["inputs"]["stage0 sha256"].as_str().map(str::to_owned))
}

/// The compiler that made stage0, as far as this test can ask it.
fn compiler() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("-V").output();
    output.map_or_else(|_| "unknown".into(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

#[test]
fn digests_are_what_they_were() {
    let folder = tempfile::tempdir().unwrap();
    write_inputs(folder.path());
    let (stage0, fixed) = command_lines();
    let mut shim = String::new();
    let mut rows = String::new();
    for (mark, line) in
        stage0.iter().map(|line| ("stage0", line)).chain(fixed.iter().map(|line| ("fixed", line)))
    {
        let (digests, hash) = measure(folder.path(), line);
        if mark == "stage0" {
            shim = hash.unwrap();
        }
        for (vcpus, digest) in digests {
            writeln!(rows, "{mark} | {line} | {vcpus} | {digest}").unwrap();
        }
    }
    let table = format!("compiler {}\nstage0-sha256 {shim}\n{rows}", compiler());

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/launch_digests.txt");
    if std::env::var_os("CVMM_RECORD_DIGESTS").is_some() {
        fs::write(&path, table).unwrap();
        return;
    }
    let recorded = fs::read_to_string(&path).unwrap();
    let head = |text: &str| text.lines().take(2).map(str::to_owned).collect::<Vec<_>>();
    let (was, is) = (head(&recorded), head(&table));
    let other_compiler = was[0] != is[0] && was[1] != is[1];
    if other_compiler {
        println!("SKIPPED: rows with stage0: it is {} and was {} ({}, {})", is[1], was[1], is[0], was[0]);
    } else {
        assert_eq!(was[1], is[1], "stage0 is another binary: if that is meant, record the table again");
    }
    let compared = |text: &str| -> Vec<String> {
        let kept = text.lines().skip(2).filter(|row| !other_compiler || row.starts_with("fixed"));
        kept.map(str::to_owned).collect()
    };
    let (expected, found) = (compared(&recorded), compared(&table));
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(found, expected, "a launch digest has changed");
    }
    assert_eq!(found.len(), expected.len(), "the table has other rows than were recorded");
}
