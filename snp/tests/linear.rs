// SPDX-License-Identifier: Apache-2.0
//! The work for a file grows with its size and no faster, whatever is in it: 4 MiB of the worst input of each
//! kind end in two seconds of one CPU and take less than 64 MiB beside the file.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::time::ClockId;
use snp::board::Board;
use snp::image::direct::DirectBoot;
use snp::image::direct::Guest;
use snp::image::direct::Snp;
use snp::image::direct::Validation;
use snp::image::igvm::Facts;
use snp::image::igvm::Igvm;
use snp::image::igvm::ZeroPages;
use snp::image::kernel::Kernel;
use snp::image::lazy::Acceptance;
use snp::image::ovmf::Ovmf;
use snp::image::ovmf::OvmfLaunch;
use snp::image::vmm_type::VcpuSetup;
use snp::image::vmm_type::VmmType;
use snp::plan::Bytes;
use snp::vmsa::VMSA_GPA;
use snp::vmsa::VmsaState;
use snp_model::patch::annotate;
use snp_model::patch::annotate_code;
use test_support::code::PVALIDATE;
use test_support::firmware::Firmware;
use test_support::igvm::seal;
use test_support::kernels::small_bzimage;

const FILE: usize = 4 << 20;
const TIME: Duration = Duration::from_secs(2);
const MEMORY_KIB: u64 = 64 << 10;

fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Most memory of this process since [`forget_peak`].
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// Memory is counted for the whole process, so the tests take turns.
fn turn() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What `read` says of a file, in time and memory. The file is there already.
fn within(what: &str, read: impl FnOnce() -> String) {
    forget_peak();
    let (begun, before) = (cpu_time(), peak_kib());
    let said = read();
    let (took, grown) = (cpu_time() - begun, peak_kib().saturating_sub(before));
    println!("{what}: {took:?}, {grown} KiB: {said}");
    assert!(took < TIME, "{what}: {took:?}");
    assert!(grown < MEMORY_KIB, "{what}: {grown} KiB");
}

fn said<T>(result: Result<T, impl ToString>) -> String {
    result.map_or_else(|e| e.to_string(), |_| "taken".to_owned())
}

/// Everything that is done with a kernel file, for a plain guest and for an SNP guest.
fn kernel(what: &str, file: Vec<u8>) {
    within(what, || {
        let kernel = match Kernel::parse(file) {
            Ok(kernel) => kernel,
            Err(e) => return e.to_string(),
        };
        let validation = Validation::Stage0(Acceptance::Auto);
        let snp = Snp { c_bit: 51, cpuid: None, validation, features: 0 };
        let boot = |guest| {
            let (cmdline, memory) = ("", 256 << 20);
            DirectBoot { kernel: &kernel, initrd: None, cmdline, memory, vcpus: 1, tpm: None, guest }.image()
        };
        [said(annotate(&kernel)), said(boot(Guest::Plain)), said(boot(Guest::Snp(snp)))].join("; ")
    });
}

/// An ELF kernel of 4 MiB that is filled with `filler`: program headers and section headers of 8-byte words,
/// each made from its number. Offsets are those of the ELF-64 specification. By hand: what tests share writes
/// no file as unsound as these.
fn elf(filler: &[u8], headers: &[[u64; 7]], sections: &[[u64; 8]]) -> Vec<u8> {
    let mut file = filler.repeat(FILE / filler.len());
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let (ph, sh) = (64, 64 + headers.len() * 56);
    for (at, value) in [(16, 2), (18, 62), (52, 64), (54, 56), (56, headers.len()), (58, 64)] {
        put(at, &(value as u16).to_le_bytes());
    }
    put(20, &1u32.to_le_bytes());
    put(24, &0x20_0000u64.to_le_bytes());
    put(32, &(ph as u64).to_le_bytes());
    put(40, &(if sections.is_empty() { 0 } else { sh as u64 }).to_le_bytes());
    put(48, &0u32.to_le_bytes());
    put(60, &(sections.len() as u16).to_le_bytes());
    put(62, &0u16.to_le_bytes());
    for (i, word) in headers.iter().flatten().enumerate() {
        put(ph + i * 8, &word.to_le_bytes());
    }
    for (i, word) in sections.iter().flatten().enumerate() {
        put(sh + i * 8, &word.to_le_bytes());
    }
    file
}

/// A program header: type and flags, offset, virtual and physical address, length in file and memory.
fn program_header(kind: u64, offset: u64, gpa: u64, file: u64, memory: u64) -> [u64; 7] {
    [kind | 5 << 32, offset, gpa, gpa, file, memory, 4]
}

/// A section of code: SHT_PROGBITS, SHF_ALLOC and SHF_EXECINSTR, offset and length.
fn section(offset: u64, len: u64) -> [u64; 8] {
    [1 << 32, 6, 0, offset, len, 0, 1, 0]
}

#[test]
fn four_mib_of_elf_kernel() {
    let _turn = turn();
    const MANY: u64 = 60_000;
    let len = FILE as u64;
    let load = program_header(1, 0, 0x20_0000, len, len);
    // Notes of no name and no contents, twelve bytes each, in an area that each header names.
    let notes = program_header(4, 4 << 10, 0, len - (4 << 10), 0);
    kernel("note headers", elf(&[0; 16], &[vec![load], vec![notes; MANY as usize]].concat(), &[]));
    let tiny = |i: u64| program_header(1, i, 0x20_0000 + i * 0x800, 1, 2);
    kernel("tiny segments", elf(&[0x90], &(0..MANY).map(tiny).collect::<Vec<_>>(), &[]));
    let whole = |i: u64| program_header(1, 0, 0x20_0000 + i * (len + 0x800), len, len);
    kernel("segments over the whole file", elf(&[0x90], &(0..200).map(whole).collect::<Vec<_>>(), &[]));
    let paged = |i: u64| program_header(1, i * 0x4000, 0x20_0000 + i * 0x800, 0x4000, 0x800);
    kernel("more in the file than in memory", elf(&[0x90], &(0..255).map(paged).collect::<Vec<_>>(), &[]));

    let all = section(0, len);
    kernel("code sections over the whole file", elf(&PVALIDATE, &[load], &vec![all; MANY as usize]));
    kernel("code that is PVALIDATE only", elf(&PVALIDATE, &[load], &[all]));
    let byte = |i: u64| section(i, 1);
    kernel("code sections of a byte", elf(&PVALIDATE, &[load], &(0..MANY).map(byte).collect::<Vec<_>>()));
}

#[test]
fn four_mib_of_bzimage() {
    let _turn = turn();
    // As much as is ever decompressed for a payload of that length, and what is inside is the worst ELF
    // image.
    for (what, inflated) in [("as much as is taken", 12 * FILE - 4096), ("too much", 16 * FILE)] {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&elf(&PVALIDATE, &[program_header(1, 0, 0x20_0000, 64, 64)], &[])).unwrap();
        encoder.write_all(&vec![0; inflated - FILE]).unwrap();
        let gzip = encoder.finish().unwrap();
        // The size stands at the end; what lies between makes up the length.
        let mut payload = gzip;
        payload.resize(FILE, 0);
        payload.extend_from_slice(&(inflated as u32).to_le_bytes());
        kernel(what, small_bzimage(payload).bytes());
    }
    kernel("a payload of PVALIDATE", small_bzimage(PVALIDATE.repeat(FILE / 4)).bytes());
    let mut image = small_bzimage(vec![0x28; 64]);
    image.head = PVALIDATE.repeat(FILE / 4);
    kernel("a decompressor of PVALIDATE", image.bytes());
    image.head = [0x4c, 0x89, 0xfe, 0xff, 0xe0].repeat(FILE / 5);
    kernel("a decompressor of hooks", image.bytes());
}

#[test]
fn four_mib_of_firmware() {
    let _turn = turn();
    let launch = |file: Vec<u8>| {
        let ovmf = match Ovmf::parse(Bytes::from(file)) {
            Ok(ovmf) => ovmf,
            Err(e) => return e.to_string(),
        };
        let setup = VcpuSetup { signature: 0xa00f11, sev_features: 1 };
        let plan = ovmf.plan(&OvmfLaunch { vmm: VmmType::Qemu, vcpus: 1, setup, kernel: None });
        format!("{}, {} sites", said(plan), annotate_code([ovmf.boot_code()]).kernel.sites.len())
    };
    let firmware = |sections| Firmware {
        pages: FILE / 4096,
        seed: 3,
        sections,
        reset_eip: 0,
        hashes_base: 0,
        svsm_entry: 0,
    };
    let few = (0..256).map(|i| (0x80_0000 + i * 0x1000, 0x1000, 1)).collect();
    let taken = firmware(few).bytes();
    within("as many sections as are taken", || launch(taken));

    // All of the file is sections: the metadata is at its start, and its size and number say so.
    let mut sections = firmware(vec![(0x80_0000, 0x1000, 1)]).bytes();
    let at = sections.windows(4).position(|w| w == b"ASEV").unwrap();
    let metadata = sections[at..at + 16].to_vec();
    let distance = ((FILE - at) as u32).to_le_bytes();
    let place = (at..FILE - 4).rev().find(|i| sections[*i..*i + 4] == distance).unwrap();
    for (i, section) in sections[16..at].chunks_exact_mut(12).enumerate() {
        let fields = [0x80_0000 + i as u32 * 0x1000, 0x1000, 1];
        section.copy_from_slice(fields.map(u32::to_le_bytes).as_flattened());
    }
    sections[..16].copy_from_slice(&metadata);
    let count = (at as u32 - 16) / 12;
    sections[4..8].copy_from_slice(&(16 + 12 * count).to_le_bytes());
    sections[12..16].copy_from_slice(&count.to_le_bytes());
    sections[place..place + 4].copy_from_slice(&(FILE as u32).to_le_bytes());
    within("sections over sections", || launch(sections));

    let mut code = firmware(vec![(0x80_0000, 0x1000, 1)]).bytes();
    code[..FILE - 0x1000].copy_from_slice(&PVALIDATE.repeat((FILE - 0x1000) / 4));
    within("code that is PVALIDATE only", || launch(code));
}

/// An IGVM file of 4 MiB that is headers of one kind, after one that says that it is for SEV-SNP.
fn igvm(kind: u32, body: impl Fn(u64) -> Vec<u8>) -> Vec<u8> {
    let mut headers: Vec<u8> = Vec::new();
    let push = |headers: &mut Vec<u8>, kind: u32, body: &[u8]| {
        headers.extend_from_slice(&kind.to_le_bytes());
        headers.extend_from_slice(&(body.len() as u32).to_le_bytes());
        headers.extend_from_slice(body);
        headers.resize(headers.len().next_multiple_of(8), 0);
        headers.len()
    };
    push(&mut headers, 1, &[&1u32.to_le_bytes()[..], &[0, 2, 0, 0], &[0; 8]].concat());
    // One parameter area, for those that need one.
    push(&mut headers, 0x301, &[&(16u64 << 20).to_le_bytes()[..], &[0; 8]].concat());
    let mut number = 0;
    while push(&mut headers, kind, &body(number)) < FILE - 0x2000 {
        number += 1;
    }
    // A save area last, as KVM adds it; its page is the last of the file.
    let data = (24 + headers.len() + 28).next_multiple_of(4096) as u32;
    push(
        &mut headers,
        0x304,
        &[&VMSA_GPA.to_le_bytes()[..], &1u32.to_le_bytes(), &data.to_le_bytes(), &[0; 4]].concat(),
    );
    let total = data + 4096;
    let words = [u32::from_le_bytes(*b"IGVM"), 1, 24, headers.len() as u32, total];
    let mut file = words.map(u32::to_le_bytes).concat();
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(&headers);
    file.resize(data as usize, 0);
    file.extend_from_slice(&VmsaState { cr0: 0x31, rip: 0x10_0000, ..VmsaState::reset() }.encode());
    seal(&mut file);
    file
}

#[test]
fn four_mib_of_igvm() {
    let _turn = turn();
    let read = |what: &str, file: Vec<u8>| {
        within(what, || {
            let igvm = match Igvm::parse(&Bytes::from(file), ZeroPages::Normal) {
                Ok(igvm) => igvm,
                Err(e) => return e.to_string(),
            };
            let board = Board::new(1 << 30, 1);
            let facts = Facts { board: &board, cmdline: "", cpuid: Bytes::from(Vec::new()) };
            said(igvm.launch(&facts))
        });
    };
    let page = |gpa: u64, offset: u32, flags: u32| {
        [&gpa.to_le_bytes()[..], &1u32.to_le_bytes(), &offset.to_le_bytes(), &flags.to_le_bytes(), &[0; 4]]
            .concat()
    };
    read("scattered pages", igvm(0x302, |i| page(i * 0x2000, 0x1000, 0)));
    read("the same page", igvm(0x302, |_| page(0x10_0000, 0, 0)));
    read("shared pages", igvm(0x302, |i| page(i * 0x2000, 0x1000, 4)));
    let context = |i: u64| {
        [
            &(i * 0x1000).to_le_bytes()[..],
            &1u32.to_le_bytes(),
            &0x1000u32.to_le_bytes(),
            &(i as u16).to_le_bytes(),
            &[0; 2],
        ]
        .concat()
    };
    read("save areas", igvm(0x304, context));
    read("parameters", igvm(0x307, |_| [0u32, (16 << 20) - 4].map(u32::to_le_bytes).concat()));
    read("required memory", igvm(0x305, |i| page(i * 0x2000, 0x1000, 0)));
    read("relocations", igvm(0x102, |_| 1u64.to_le_bytes().to_vec()));
    read("ignored headers", igvm(0x8000_0400, |_| Vec::new()));
}
