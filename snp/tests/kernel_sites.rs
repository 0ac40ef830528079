// SPDX-License-Identifier: Apache-2.0
//! Finding and patching SNP instructions: in made-up kernels of each compression, and in Debian's.
//!
//! The tools that compress are the ones that the kernel's build uses; the numbers for Debian's kernels were
//! counted by hand from disassemblies of these packages.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io;

use snp::image::kernel::Kernel;
use snp_model::patch::Annotations;
use snp_model::patch::CodeMemory;
use snp_model::patch::Opcode;
use snp_model::patch::PatchError;
use snp_model::patch::Ports;
use snp_model::patch::Site;
use snp_model::patch::SiteError;
use snp_model::patch::annotate;
use snp_model::patch::decompress;
use snp_model::patch::decompress::DecompressError;
use test_support::code::PVALIDATE;
use test_support::code::RMPADJUST;
use test_support::code::VMGEXIT;
use test_support::elf::Segment;
use test_support::elf::executable;
use test_support::kernels::compress;
use test_support::kernels::debian_kernels;
use test_support::kernels::small_bzimage;
use test_support::kernels::small_vmlinux;

/// What the kernel's build does for each format: the tool's output, then the size unless the format has it at
/// its end.
fn payload(tool: &str, args: &[&str], vmlinux: &[u8]) -> Option<Vec<u8>> {
    let mut payload = compress(tool, args, vmlinux)?;
    if tool != "gzip" {
        payload.extend_from_slice(&(vmlinux.len() as u32).to_le_bytes());
    }
    Some(payload)
}

const TOOLS: [(&str, &[&str]); 4] = [
    ("gzip", &["-n", "-9"]),
    ("xz", &["--check=crc32", "--x86", "--lzma2=dict=32MiB"]),
    ("zstd", &["-22", "--ultra", "-q"]),
    ("lz4", &["-l", "-9", "-c"]),
];

/// Memory that holds a loaded image.
struct Loaded {
    base: u64,
    bytes: Vec<u8>,
    writes: usize,
}

impl Loaded {
    fn window(&mut self, gpa: u64, len: usize) -> io::Result<&mut [u8]> {
        let start = gpa.checked_sub(self.base).and_then(|s| usize::try_from(s).ok());
        let range = start.and_then(|s| self.bytes.get_mut(s..s.checked_add(len)?));
        range.ok_or_else(|| io::Error::other("no memory there"))
    }
}

impl CodeMemory for Loaded {
    fn read(&mut self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.copy_from_slice(self.window(gpa, bytes.len())?);
        Ok(())
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.writes += 1;
        self.window(gpa, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }
}

fn small_annotated() -> (Vec<u8>, Annotations) {
    let payload = payload("gzip", &["-n"], &small_vmlinux()).expect("gzip is part of every Debian");
    let file = small_bzimage(payload).bytes();
    let annotations = annotate(&Kernel::parse(file.clone()).unwrap()).unwrap();
    (file[1024..].to_vec(), annotations)
}

#[test]
fn every_compression_of_the_kernels_build_is_read() {
    let vmlinux = small_vmlinux();
    for (tool, args) in TOOLS {
        let Some(payload) = payload(tool, args, &vmlinux) else { continue };
        let Kernel::BzImage(image) = Kernel::parse(small_bzimage(payload).bytes()).unwrap() else { panic!() };
        assert!(decompress::extract_vmlinux(&image).unwrap() == vmlinux, "{tool}");
    }
}

#[test]
fn sites_are_found_in_code_only_and_relative_to_the_load_address() {
    let (_, annotations) = small_annotated();
    // Offsets as written in `small_vmlinux`; the copies in its data segment are not sites.
    let site = |offset, opcode| Site { offset, opcode };
    assert_eq!(
        annotations.kernel.sites,
        [site(0x10, Opcode::Vmgexit), site(0x20, Opcode::Pvalidate), site(0x31, Opcode::Rmpadjust)]
    );
    assert_eq!(annotations.kernel.entry_offset, 8);
    assert_eq!(annotations.kernel.base_from_entry(0x2_3450_0008), 0x2_3450_0000);
    let decompressor = annotations.decompressor.unwrap();
    let tail = decompressor.payload.end;
    assert_eq!(decompressor.payload.start, 0x240);
    assert_eq!(decompressor.hook, tail + 0x20);
    assert_eq!(
        decompressor.sites.sites,
        [site(0x210, Opcode::Vmgexit), site(tail + 4, Opcode::Pvalidate), site(tail + 9, Opcode::Rmpadjust)]
    );
}

#[test]
fn launch_patches_the_decompressor_and_leaves_the_payload_alone() {
    let (body, annotations) = small_annotated();
    let mut memory = Loaded { base: annotations.load, bytes: body.clone(), writes: 0 };
    annotations.patch_at_launch(&mut memory, &Ports::default()).unwrap();
    let d = annotations.decompressor.as_ref().unwrap();
    let tail = d.payload.end as usize;
    // OUT imm8, AL is E6 ib; 66 90 and 90 are NOPs (AMD64 manual, volume 3).
    assert_eq!(memory.bytes[0x210..0x214], [0xe6, 0xe4, 0x66, 0x90]);
    assert_eq!(memory.bytes[tail + 4..tail + 8], [0xe6, 0xe5, 0x66, 0x90]);
    assert_eq!(memory.bytes[tail + 9..tail + 13], [0xe6, 0xe6, 0x66, 0x90]);
    assert_eq!(memory.bytes[tail + 0x20..tail + 0x25], [0xe6, 0xe7, 0x90, 0xff, 0xe0]);
    let changed = memory.bytes.iter().zip(&body).filter(|(a, b)| a != b).count();
    assert_eq!(changed, 3 * 4 + 3, "nothing else changes");
}

#[test]
fn one_site_with_other_bytes_means_that_nothing_is_patched() {
    let (body, annotations) = small_annotated();
    let mut memory = Loaded { base: annotations.load, bytes: body, writes: 0 };
    let last = annotations.decompressor.as_ref().unwrap().sites.sites[2].offset as usize;
    memory.bytes[last] = 0xcc;
    let error = annotations.patch_at_launch(&mut memory, &Ports::default()).unwrap_err();
    assert!(matches!(&error, PatchError::Mismatch { offset, found, .. }
        if *offset == last as u64 && found[..] == [0xcc, 0x0f, 0x01, 0xfe]));
    assert!(error.to_string().contains("Rmpadjust"), "{error}");
    assert_eq!(memory.writes, 0);
}

#[test]
fn a_kernel_outside_of_memory_is_an_error() {
    let (body, annotations) = small_annotated();
    for base in [annotations.load + 0x1000_0000, 0, u64::MAX - 2] {
        let mut memory = Loaded { base: annotations.load, bytes: body.clone(), writes: 0 };
        let error = annotations.kernel.patch(&mut memory, base, &Ports::default()).unwrap_err();
        assert!(matches!(error, PatchError::Memory { .. }), "{error}");
    }
}

#[test]
fn a_kernel_without_one_kind_of_instruction_is_refused() {
    let kinds = [(VMGEXIT, Opcode::Vmgexit), (PVALIDATE, Opcode::Pvalidate), (RMPADJUST, Opcode::Rmpadjust)];
    for (bytes, kind) in kinds {
        let text: Vec<u8> = kinds.iter().filter(|(b, _)| *b != bytes).flat_map(|(b, _)| *b).collect();
        let len = text.len() as u64;
        let file = executable(0x20_0000, &[Segment::new(0x20_0000, text)], &[(0, 0..len, true)], &[]);
        let error = annotate(&Kernel::parse(file).unwrap()).unwrap_err();
        assert!(
            matches!(error, SiteError::NoSite { opcode, place: "the kernel" } if opcode == kind),
            "{error}"
        );

        let mut image = small_bzimage(payload("gzip", &[], &small_vmlinux()).unwrap());
        for part in [&mut image.head, &mut image.tail] {
            if let Some(at) = part.windows(4).position(|w| w == bytes) {
                part[at] = 0x90;
            }
        }
        let error = annotate(&Kernel::parse(image.bytes()).unwrap()).unwrap_err();
        assert!(
            matches!(error, SiteError::NoSite { opcode, place: "the decompressor" } if opcode == kind),
            "{error}"
        );
    }
}

#[test]
fn instructions_inside_the_payload_are_not_the_decompressors() {
    let mut image = small_bzimage(payload("gzip", &[], &small_vmlinux()).unwrap());
    let at = image.head.windows(4).position(|w| w == VMGEXIT).unwrap();
    image.head[at] = 0x90;
    image.payload.extend_from_slice(&VMGEXIT);
    let error = annotate(&Kernel::parse(image.bytes()).unwrap()).unwrap_err();
    assert!(matches!(error, SiteError::NoSite { opcode: Opcode::Vmgexit, .. }), "{error}");
}

#[test]
fn the_hook_must_be_there_exactly_once() {
    let image = small_bzimage(payload("gzip", &[], &small_vmlinux()).unwrap());
    let mut none = image.clone();
    none.tail[0x20] = 0x90;
    let mut two = image.clone();
    two.head[0x220..0x225].copy_from_slice(&[0x4c, 0x89, 0xfe, 0xff, 0xe0]);
    for (image, count) in [(none, 0), (two, 2)] {
        let error = annotate(&Kernel::parse(image.bytes()).unwrap()).unwrap_err();
        assert!(matches!(error, SiteError::Hook { found } if found == count), "{error}");
    }
}

#[test]
fn a_kernel_without_section_headers_is_refused() {
    let text = [VMGEXIT, PVALIDATE, RMPADJUST].concat();
    let file = executable(0x20_0000, &[Segment::new(0x20_0000, text)], &[], &[]);
    let error = annotate(&Kernel::parse(file).unwrap()).unwrap_err();
    assert!(matches!(error, SiteError::Sections(_)), "{error}");
}

fn extract(payload: Vec<u8>) -> Result<Vec<u8>, DecompressError> {
    let Kernel::BzImage(image) = Kernel::parse(small_bzimage(payload).bytes()).unwrap() else { panic!() };
    decompress::extract_vmlinux(&image)
}

#[test]
fn unknown_and_unsupported_compressions_are_refused_by_name() {
    let error = extract(b"not compressed at all".to_vec()).unwrap_err().to_string();
    assert!(error.contains("at offset 0x640 begins with [6e, 6f, 74"), "{error}");
    for (magic, name) in [(&b"BZh91AY"[..], "bzip2"), (b"\x5d\0\0\0\x02", "lzma"), (b"\x89LZO\0\r\n", "lzo")]
    {
        let error = extract(magic.to_vec()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("zstd, xz, gzip or LZ4"), "{error}");
    }
}

#[test]
fn a_payload_cannot_make_us_produce_more_than_it_says() {
    // 64 MiB of zeros, which every format makes tiny, with a size that says 1000.
    let zeros = vec![0; 64 << 20];
    for (tool, args) in TOOLS {
        let Some(mut payload) = compress(tool, args, &zeros) else { continue };
        if tool == "gzip" {
            let at = payload.len() - 4;
            payload.truncate(at);
        }
        payload.extend_from_slice(&1000u32.to_le_bytes());
        let error = extract(payload.clone()).unwrap_err();
        assert!(
            matches!(error, DecompressError::SizeMismatch { expected: 1000, found: 1001 }),
            "{tool}: {error}"
        );
        let at = payload.len() - 4;
        payload[at..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(extract(payload).unwrap_err(), DecompressError::TooLarge { .. }), "{tool}");
    }
}

#[test]
fn truncated_and_corrupted_payloads_are_errors() {
    let vmlinux = small_vmlinux();
    for (tool, args) in TOOLS {
        let Some(whole) = payload(tool, args, &vmlinux) else { continue };
        for keep in (6..whole.len() - 5).step_by(7) {
            let mut payload = whole[..keep].to_vec();
            payload.extend_from_slice(&(vmlinux.len() as u32).to_le_bytes());
            assert!(extract(payload).is_err(), "{tool} cut at {keep}");
        }
        for at in (0..whole.len()).step_by(3) {
            let mut payload = whole.clone();
            payload[at] ^= 0x55;
            // Not every format has a checksum; whatever comes out has the size that was asked for.
            if let Ok(bytes) = extract(payload) {
                assert_eq!(bytes.len(), vmlinux.len(), "{tool} changed at {at}");
            }
        }
    }
}

/// VMGEXIT, PVALIDATE, RMPADJUST in the kernel proper and in the decompressor, by version.
const DEBIAN_COUNTS: [(&str, [usize; 3], [usize; 3], u64); 2] =
    [("6.1.", [16, 1, 3], [14, 2, 1], 0), ("6.12.95", [18, 3, 6], [17, 1, 2], 0xb53)];

#[test]
fn debian_kernels_have_the_known_sites() {
    for path in debian_kernels() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let version = name.trim_start_matches("vmlinuz-");
        let Some((_, kernel, decompressor, entry)) =
            DEBIAN_COUNTS.iter().find(|(prefix, ..)| version.starts_with(prefix))
        else {
            println!("note: no counts are known for {name}");
            continue;
        };
        let parsed = Kernel::parse(std::fs::read(&path).unwrap()).unwrap();
        let found = annotate(&parsed).unwrap();
        assert_eq!(Opcode::ALL.map(|op| found.kernel.count(op)), *kernel, "{name}: kernel");
        assert_eq!(found.kernel.entry_offset, *entry, "{name}: entry point");
        let part = found.decompressor.clone().unwrap();
        assert_eq!(Opcode::ALL.map(|op| part.sites.count(op)), *decompressor, "{name}: decompressor");
        assert!(part.hook > part.payload.end, "{name}: the hook lies behind the payload");

        // The same kernel, booted without its decompressor, has the same list.
        let Kernel::BzImage(image) = &parsed else { panic!("{name} is no bzImage") };
        let vmlinux = decompress::extract_vmlinux(image).unwrap();
        let direct = annotate(&Kernel::parse(vmlinux).unwrap()).unwrap();
        assert_eq!(direct.kernel, found.kernel, "{name}");
        assert_eq!((direct.load, direct.decompressor), (0x100_0000, None), "{name}");
    }
}
