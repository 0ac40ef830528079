// SPDX-License-Identifier: Apache-2.0
//! Kernel files: bzImage headers, ELF headers, compressed payloads.

use snp::image::kernel::Kernel;
use snp_model::patch::annotate;
use snp_model::patch::decompress::extract_vmlinux;
use test_support::elf::Segment;
use test_support::elf::executable;
use test_support::elf::pvh_note;
use test_support::kernels::compress;
use test_support::kernels::small_bzimage;
use test_support::kernels::small_vmlinux;

use crate::driver::Seed;
use crate::driver::Target;
use crate::driver::no_repair;
use crate::text;

/// What a refusal of a kernel says.
const SAYS: &[&str] = &[
    "offset 0x",
    "expected",
    "malformed ELF image",
    "ELF segment",
    "0x",
    "loadable segment",
    "last four bytes say",
    "use one compressed by",
];

/// Reads a kernel and whatever can be asked of one; nothing may lie outside of the file.
fn read(file: &[u8]) -> Result<(), String> {
    let kernel = Kernel::parse(file.to_vec()).map_err(text)?;
    let memory = kernel.memory();
    assert!(memory.start >= 0x10_0000 && memory.start <= memory.end);
    let mut end = 0;
    for (gpa, bytes) in kernel.runs() {
        assert!(gpa % 4096 == 0 && gpa >= end, "runs are aligned, ascending and disjoint");
        end = (gpa + bytes.as_slice().len() as u64).next_multiple_of(4096);
    }
    let _ = (kernel.zeros(), kernel.cmdline_max(), kernel.initrd_addr_max());
    if let Err(error) = annotate(&kernel) {
        assert!(!error.to_string().is_empty());
    }
    Ok(())
}

#[test]
fn bzimage() {
    let payload = compress("gzip", &["-9n"], &small_vmlinux()).unwrap_or_else(|| vec![7; 64]);
    let header = [0x1f1..0x26c, 0x200..0x240, 0x248..0x268];
    Target {
        name: "bzimage",
        seeds: vec![
            Seed::with_fields(small_bzimage(vec![0x28; 64]).bytes(), header.clone()),
            Seed::with_fields(small_bzimage(payload).bytes(), header),
        ],
        repair: no_repair,
        parse: &read,
        says: SAYS,
    }
    .run();
}

#[test]
fn elf_headers() {
    let pvh = executable(0x20_0000, &[Segment::new(0x20_0000, vec![0; 8])], &[], &pvh_note(0x20_0000));
    let vmlinux = small_vmlinux();
    let sections = vmlinux.len() - 3 * 64..vmlinux.len();
    Target {
        name: "elf",
        seeds: vec![
            Seed::with_fields(vmlinux, [16..64, 64..176, sections]),
            Seed::with_fields(pvh, vec![16..64, 64..220]),
        ],
        repair: no_repair,
        parse: &read,
        says: SAYS,
    }
    .run();
}

#[test]
fn compressed_kernel() {
    let vmlinux = small_vmlinux();
    let size = (vmlinux.len() as u32).to_le_bytes();
    let mut seeds = Vec::new();
    for (tool, args, has_size) in [
        ("gzip", &["-9n"] as &[&str], true),
        ("xz", &["--check=crc32"], false),
        ("zstd", &["-19", "--no-progress"], false),
        ("lz4", &["-l"], false),
    ] {
        let Some(mut payload) = compress(tool, args, &vmlinux) else { continue };
        if !has_size {
            payload.extend_from_slice(&size);
        }
        let len = payload.len();
        let file = small_bzimage(payload).bytes();
        let start = 1024 + 0x240;
        let seed =
            Seed::with_fields(file, [start..start + 32, start..start + len, start + len - 12..start + len]);
        // The made-up LZ4 stream is in the kernel's legacy form where the tool knows it.
        if payload_reads(&seed.bytes).is_ok() {
            seeds.push(seed);
        } else {
            println!("note: the {tool} stream of this machine's tool is not one that is read");
        }
    }
    assert!(!seeds.is_empty(), "neither gzip, xz, zstd nor lz4 is installed");
    Target { name: "decompress", seeds, repair: no_repair, parse: &payload_reads, says: SAYS }.run();
}

fn payload_reads(file: &[u8]) -> Result<(), String> {
    let Kernel::BzImage(image) = Kernel::parse(file.to_vec()).map_err(text)? else {
        return Err("expected a bzImage".into());
    };
    let vmlinux = extract_vmlinux(&image).map_err(text)?;
    let _ = Kernel::parse(vmlinux);
    Ok(())
}
