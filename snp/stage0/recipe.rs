// SPDX-License-Identifier: Apache-2.0
//! How stage0 is built: one call of the compiler that builds everything else, and the checks of what comes out.
//!
//! Used by crate `snp`'s build script, and by a test that builds twice in different folders and compares. No folder, date or
//! environment enters the result: the sources are given by relative path, all flags are here, and nothing but `core` is
//! linked. It is compiled for the host's own target, the only one that has to be installed.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

/// Bytes of a page.
const PAGE: usize = 4096;
/// Where `link.ld` and `layout.rs` put the image, and the room that it has there.
const BASE: u64 = 0x8_5000;
const ROOM: usize = 7 * PAGE;

/// A built shim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// Whole pages, to be placed at [`BASE`].
    pub image: Vec<u8>,
    /// Address of the first instruction.
    pub entry: u64,
    /// Address of the loop in which other vCPUs would wait.
    pub park: u64,
    /// Address of the no-operation before the jump to the kernel.
    pub hook: u64,
    /// Address and kind of each SNP instruction: 0 VMGEXIT, 1 PVALIDATE.
    pub sites: Vec<(u64, u32)>,
}

/// Compiles the sources in `folder` with the compiler `rustc`, putting files into `out`.
pub fn build(rustc: &Path, folder: &Path, out: &Path) -> Result<Built, String> {
    let elf_path: PathBuf = out.join("stage0.elf");
    let mut command = Command::new(rustc);
    command.current_dir(folder).env_clear();
    // The toolchain's proxy and loader need these; none of them reaches the output.
    for name in ["PATH", "HOME", "RUSTUP_HOME", "CARGO_HOME", "RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.args(["--edition=2024", "--crate-name=stage0", "--crate-type=bin", "src/main.rs"]);
    command.args(["--target=x86_64-unknown-linux-gnu", "--cap-lints=allow"]);
    for option in [
        "panic=abort",
        "opt-level=2",
        "overflow-checks=off",
        "debug-assertions=off",
        "debuginfo=0",
        "codegen-units=1",
        "lto=off",
        "embed-bitcode=no",
        "target-cpu=x86-64",
        // No vector registers: fewer instructions that a KVM which interprets real-mode and unpaged code must know. The
        // compiler warns that floating-point arguments could then not be passed; there are none. Should a later compiler
        // refuse this, drop the line: the entry code enables SSE all the same.
        "target-feature=-sse,-sse2,-mmx",
        "relocation-model=static",
        "code-model=small",
        "force-unwind-tables=no",
        "linker-flavor=ld.lld",
        "linker=rust-lld",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=--no-relax",
        "link-arg=--build-id=none",
        "link-arg=-Tlink.ld",
    ] {
        command.args(["-C", option]);
    }
    let from = folder.to_str().ok_or("the path of stage0's sources is not UTF-8")?;
    command.arg(format!("--remap-path-prefix={from}=stage0")).arg("-o").arg(&elf_path);
    let output = command.output().map_err(|e| format!("cannot run {}: {e}", rustc.display()))?;
    if !output.status.success() {
        return Err(format!("stage0 does not compile:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    let elf = std::fs::read(&elf_path).map_err(|e| format!("cannot read {}: {e}", elf_path.display()))?;
    flatten(&Elf(&elf))
}

/// A little-endian 64-bit ELF file, read with bounds checks.
struct Elf<'a>(&'a [u8]);

/// What is used of a section header.
struct Section {
    name: String,
    kind: u32,
    flags: u64,
    address: u64,
    offset: usize,
    size: usize,
}

impl<'a> Elf<'a> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], String> {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.copied().ok_or_else(|| format!("stage0's ELF file ends before offset {at:#x}"))
    }

    fn u16(&self, at: usize) -> Result<usize, String> {
        Ok(u16::from_le_bytes(self.bytes(at)?).into())
    }

    fn u32(&self, at: usize) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes(at)?))
    }

    fn u64(&self, at: usize) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.bytes(at)?))
    }

    fn text(&self, at: usize) -> Result<String, String> {
        let rest = self.0.get(at..).ok_or("a name lies beyond the end of stage0's ELF file")?;
        let name = rest.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(name).into_owned())
    }

    fn contents(&self, section: &Section) -> Result<&'a [u8], String> {
        let end = section.offset.checked_add(section.size);
        let bytes = end.and_then(|end| self.0.get(section.offset..end));
        bytes.ok_or_else(|| format!("section {} lies beyond the end of stage0's ELF file", section.name))
    }

    fn sections(&self) -> Result<Vec<Section>, String> {
        let (table, count, names) = (self.u64(0x28)? as usize, self.u16(0x3c)?, self.u16(0x3e)?);
        let names = self.u64(table + names * 64 + 0x18)? as usize;
        (0..count)
            .map(|i| {
                let at = table + i * 64;
                Ok(Section {
                    name: self.text(names + self.u32(at)? as usize)?,
                    kind: self.u32(at + 4)?,
                    flags: self.u64(at + 8)?,
                    address: self.u64(at + 0x10)?,
                    offset: self.u64(at + 0x18)? as usize,
                    size: self.u64(at + 0x20)? as usize,
                })
            })
            .collect()
    }
}

const SHT_SYMTAB: u32 = 2;
const SHT_STRTAB: u32 = 3;
const SHT_RELA: u32 = 4;
const SHT_REL: u32 = 9;
const SHF_ALLOC: u64 = 2;

/// Turns the ELF file into pages, refusing anything that the page image could not carry.
fn flatten(elf: &Elf<'_>) -> Result<Built, String> {
    let sections = elf.sections()?;
    let find = |name: &str| {
        sections.iter().find(|s| s.name == name).ok_or_else(|| format!("stage0 has no section {name}"))
    };
    for section in &sections {
        if [SHT_RELA, SHT_REL].contains(&section.kind) {
            return Err(format!("stage0 has relocations ({}): it must run where it is linked", section.name));
        }
        if section.flags & SHF_ALLOC != 0 && section.size != 0 && section.name != ".image" {
            return Err(format!("section {} of stage0 lies outside of the image: see link.ld", section.name));
        }
    }
    let section = find(".image")?;
    let image = elf.contents(section)?.to_vec();
    if section.address != BASE || image.len() % PAGE != 0 || image.len() > ROOM {
        let (address, len) = (section.address, image.len());
        return Err(format!(
            "stage0's image is {len:#x} bytes at {address:#x}: at most {ROOM:#x} at {BASE:#x}"
        ));
    }
    let sites = elf
        .contents(find(".sites")?)?
        .chunks_exact(8)
        .map(|entry| {
            let word = |at: usize| entry[at..at + 4].iter().rev().fold(0u32, |n, b| n << 8 | u32::from(*b));
            (u64::from(word(0)), word(4))
        })
        // Of a function that was inlined everywhere and then dropped, the linker leaves an offset in place of an address.
        .filter(|(address, _)| *address >= BASE)
        .collect::<Vec<_>>();
    check_sites(&image, &sites)?;
    let symbols = sections.iter().find(|s| s.kind == SHT_SYMTAB).ok_or("stage0 has no symbols")?;
    let names =
        sections.iter().find(|s| s.kind == SHT_STRTAB && s.name == ".strtab").ok_or("stage0 has no names")?;
    let symbol = |wanted: &str| {
        for i in 0..symbols.size / 24 {
            let at = symbols.offset + i * 24;
            if elf.text(names.offset + elf.u32(at)? as usize)? == wanted {
                return elf.u64(at + 8);
            }
        }
        Err(format!("stage0 has no symbol {wanted}"))
    };
    for i in 0..symbols.size / 24 {
        let name = elf.text(names.offset + elf.u32(symbols.offset + i * 24)? as usize)?;
        if name.contains("panicking") || name.contains("rust_begin_unwind") {
            return Err(format!("stage0 can panic: {name} is linked into it"));
        }
    }
    Ok(Built {
        entry: symbol("stage0_start")?,
        park: symbol("stage0_park")?,
        hook: symbol("stage0_hook")?,
        image,
        sites,
    })
}

/// Each listed site holds its instruction, and no instruction is missing from the list.
fn check_sites(image: &[u8], sites: &[(u64, u32)]) -> Result<(), String> {
    const OPCODES: [[u8; 4]; 2] = [[0xf3, 0x0f, 0x01, 0xd9], [0xf2, 0x0f, 0x01, 0xff]];
    for (kind, opcode) in OPCODES.iter().enumerate() {
        let mut listed: Vec<u64> = sites.iter().filter(|s| s.1 as usize == kind).map(|s| s.0).collect();
        listed.sort_unstable();
        let found: Vec<u64> =
            image.windows(4).zip(BASE..).filter(|(bytes, _)| bytes == opcode).map(|(_, at)| at).collect();
        if listed != found || found.is_empty() {
            return Err(format!("stage0's list of {opcode:02x?} is {listed:x?}, but they are at {found:x?}"));
        }
    }
    Ok(())
}
