// SPDX-License-Identifier: Apache-2.0
//! A kernel file, told apart and checked: a Linux bzImage or an x86-64 ELF image.
//!
//! bzImage: Linux `Documentation/arch/x86/boot.rst`, boot protocol 2.12 or later (the first with `xloadflags`). ELF: the
//! System V ABI; the PVH note is `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's `elfnote.h`. The file is trusted for nothing: every
//! offset is checked against its length, every address against the others. What fits into a guest's memory is decided
//! later, by [`super::direct`].

use std::ops::Range;
use std::sync::Arc;

use elf::ElfBytes;
use elf::abi;
use elf::endian::AnyEndian;
use elf::file::Class;
use elf::note::Note;

use crate::plan::Bytes;
use crate::plan::PAGE_SIZE;

/// Offset of a bzImage's 64-bit entry point from its load address.
pub const ENTRY_64: u64 = 0x200;

/// Lowest address at which anything of a kernel may be placed: what lies below belongs to the boot data.
pub const LOWEST_LOAD_ADDRESS: u64 = 0x10_0000;

/// Offset of the setup header in a bzImage and in `boot_params`.
pub const SETUP_HEADER: usize = 0x1f1;
/// `boot_params` has other fields from here on, so a setup header cannot reach further.
const SETUP_HEADER_LIMIT: usize = 0x290;
/// Oldest boot protocol that announces a 64-bit entry point (`xloadflags`).
const OLDEST_PROTOCOL: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: the protected-mode part is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// `COMMAND_LINE_SIZE - 1` of x86 Linux, for ELF images, which do not say it.
const ELF_CMDLINE_MAX: u32 = 2047;
/// Highest initrd address that x86 Linux announces, for ELF images, which do not say it.
const ELF_INITRD_ADDR_MAX: u64 = 0x7fff_ffff;
/// Note type `XEN_ELFNOTE_PHYS32_ENTRY`.
const XEN_PHYS32_ENTRY: u64 = 18;
/// Most segments of an ELF image: Linux has five.
const SEGMENTS_MAX: usize = 256;
/// Most notes that are looked at for the PVH entry point: Linux has some twenty.
const NOTES_MAX: usize = 4096;

/// Why a file cannot be booted as a kernel. Offsets are in bytes from the start of the file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KernelError {
    /// Neither format's signature.
    #[error(
        "neither a bzImage ('HdrS' at offset 0x202) nor an ELF image (0x7f 'ELF' at offset 0): \
         give a distribution's vmlinuz or an uncompressed x86-64 vmlinux"
    )]
    UnknownFormat,
    /// A kernel in a wrapper.
    #[error(
        "a unified kernel image (UKI), which firmware starts; cvmm boots what is in it. Take it apart: `objcopy -O binary \
         --only-section=.linux UKI KERNEL`, the same with .initrd for `initrd`; .cmdline holds its command line"
    )]
    Unified,
    /// The file is shorter than it says.
    #[error("truncated: {what} needs the bytes up to offset {needed:#x}, the file has {found:#x}")]
    Truncated {
        /// The part that is missing.
        what: &'static str,
        /// Length that the file should have at least.
        needed: u64,
        /// Length that it has.
        found: u64,
    },
    /// A field has a value that no bootable kernel has.
    #[error("{what} at offset {offset:#x} is {found:#x}, expected {expected}")]
    Field {
        /// The field.
        what: &'static str,
        /// Where it is.
        offset: u64,
        /// Its value.
        found: u64,
        /// What it should be.
        expected: &'static str,
    },
    /// The ELF structure itself does not parse.
    #[error("malformed ELF image: {0}")]
    Elf(String),
    /// A loadable segment that cannot be placed.
    #[error("ELF segment {index}: {file_len:#x} bytes of file, {mem_len:#x} of memory at {gpa:#x}: {why}")]
    Segment {
        /// Index in the program header table.
        index: usize,
        /// Physical address.
        gpa: u64,
        /// Bytes in the file.
        file_len: u64,
        /// Bytes in memory.
        mem_len: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// So many that each further one costs time.
    #[error("the ELF image has more than {SEGMENTS_MAX} loadable segments; a kernel has a few")]
    Segments,
    /// The same bytes of the file in many segments.
    #[error(
        "the ELF image's segments have {found:#x} bytes, more than the {file:#x} of the whole file: they overlap"
    )]
    SegmentBytes {
        /// Bytes in all of them.
        found: u64,
        /// Length of the file.
        file: u64,
    },
    /// Two segments share memory.
    #[error("ELF segments overlap at address {gpa:#x}")]
    SegmentsOverlap {
        /// First shared address.
        gpa: u64,
    },
    /// An ELF image with nothing to load.
    #[error("ELF image without a loadable segment: not a kernel")]
    NothingToLoad,
    /// The entry point lies outside of all segments.
    #[error("ELF entry point {entry:#x} lies in no loadable segment")]
    EntryOutside {
        /// The entry point.
        entry: u64,
    },
}

/// A checked kernel file.
#[derive(Clone, Debug)]
pub enum Kernel {
    /// A bzImage: decompresses itself in the guest.
    BzImage(BzImage),
    /// An uncompressed ELF image.
    Elf(ElfKernel),
}

/// A bzImage, as far as a 64-bit boot loader has to know it.
#[derive(Clone, Debug)]
pub struct BzImage {
    /// The whole file.
    pub file: Arc<Vec<u8>>,
    /// Setup header in the file; the same offsets in `boot_params`.
    pub setup_header: Range<usize>,
    /// Protected-mode part in the file: what gets loaded.
    pub body: Range<usize>,
    /// Compressed kernel in the file, inside `body`.
    pub payload: Range<usize>,
    /// Preferred load address, a multiple of 4 KiB.
    pub pref_address: u64,
    /// Bytes from the load address that the decompressor works in.
    pub init_size: u64,
    /// Longest command line in bytes, without the final zero.
    pub cmdline_max: u32,
    /// Highest address that the initrd may occupy.
    pub initrd_addr_max: u64,
}

/// A loadable segment of an ELF kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub gpa: u64,
    /// Contents in the file.
    pub file: Range<usize>,
    /// Length in memory in bytes; what lies beyond the contents is zero.
    pub mem_len: u64,
}

/// An ELF kernel.
#[derive(Clone, Debug)]
pub struct ElfKernel {
    /// The whole file.
    pub file: Arc<Vec<u8>>,
    /// Loadable segments, ascending, disjoint, not empty.
    pub segments: Vec<Segment>,
    /// Physical address of the 64-bit entry point.
    pub entry: u64,
    /// Physical address of the 32-bit PVH entry point, if the image has that note.
    pub pvh_entry: Option<u32>,
}

impl Kernel {
    /// Tells the format and checks the file.
    pub fn parse(file: impl Into<Arc<Vec<u8>>>) -> Result<Kernel, KernelError> {
        let file = file.into();
        if file.starts_with(b"\x7fELF") {
            ElfKernel::parse(file).map(Kernel::Elf)
        } else if file.get(0x202..0x206) == Some(b"HdrS") {
            BzImage::parse(file).map(Kernel::BzImage)
        } else if has_section(&file, *b".linux\0\0") {
            Err(KernelError::Unified)
        } else {
            Err(KernelError::UnknownFormat)
        }
    }

    /// The whole file.
    pub fn file(&self) -> &Arc<Vec<u8>> {
        match self {
            Kernel::BzImage(kernel) => &kernel.file,
            Kernel::Elf(kernel) => &kernel.file,
        }
    }

    /// Address range that the kernel occupies before it has set up its own memory management.
    pub fn memory(&self) -> Range<u64> {
        match self {
            Kernel::BzImage(k) => {
                let body = k.body.len() as u64;
                k.pref_address..k.pref_address.saturating_add(k.init_size.max(body))
            }
            Kernel::Elf(k) => {
                let start = k.segments.first().map_or(0, |s| s.gpa);
                start..k.segments.last().map_or(start, |s| s.gpa.saturating_add(s.mem_len))
            }
        }
    }

    /// Longest command line in bytes, without the final zero.
    pub fn cmdline_max(&self) -> u32 {
        match self {
            Kernel::BzImage(k) => k.cmdline_max,
            Kernel::Elf(_) => ELF_CMDLINE_MAX,
        }
    }

    /// Highest address that the initrd may occupy.
    pub fn initrd_addr_max(&self) -> u64 {
        match self {
            Kernel::BzImage(k) => k.initrd_addr_max,
            Kernel::Elf(_) => ELF_INITRD_ADDR_MAX,
        }
    }

    /// Memory for which the file has nothing and that must be zero when the kernel starts. A bzImage clears its own.
    pub fn zeros(&self) -> Vec<Range<u64>> {
        match self {
            Kernel::BzImage(_) => Vec::new(),
            Kernel::Elf(k) => {
                let zeros = k.segments.iter().map(|s| s.gpa + s.file.len() as u64..s.gpa + s.mem_len);
                zeros.filter(|range| !range.is_empty()).collect()
            }
        }
    }

    /// Runs of contents with their addresses, page-aligned, ascending and disjoint.
    pub fn runs(&self) -> Vec<(u64, Bytes)> {
        match self {
            Kernel::BzImage(k) => {
                Bytes::window(&k.file, k.body.clone()).map(|b| (k.pref_address, b)).into_iter().collect()
            }
            Kernel::Elf(k) => k.runs(),
        }
    }
}

/// Whether the file is a PE image with a section of that name (PE format, "MS-DOS Stub", "COFF File Header", "Section Table").
fn has_section(file: &[u8], name: [u8; 8]) -> bool {
    let f = Fields(file);
    let found = || {
        let pe = f.u32("e_lfanew", 0x3c).ok()? as usize;
        let (count, optional) = (f.u16("NumberOfSections", pe + 6).ok()?, f.u16("its header", pe + 20).ok()?);
        let table = pe + 24 + usize::from(optional);
        let is_pe = file.starts_with(b"MZ") && f.bytes::<4>("PE signature", pe).ok()? == *b"PE\0\0";
        let mut names = (0..usize::from(count)).map_while(|i| f.bytes::<8>("section", table + i * 40).ok());
        Some(is_pe && names.any(|section| section == name))
    };
    found().unwrap_or(false)
}

/// Little-endian fields of a file, checked against its length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, what: &'static str, offset: usize) -> Result<[u8; N], KernelError> {
        self.0.get(offset..offset + N).and_then(|b| b.try_into().ok()).ok_or(KernelError::Truncated {
            what,
            needed: (offset + N) as u64,
            found: self.0.len() as u64,
        })
    }

    fn u8(&self, what: &'static str, offset: usize) -> Result<u8, KernelError> {
        self.bytes::<1>(what, offset).map(|[b]| b)
    }

    fn u16(&self, what: &'static str, offset: usize) -> Result<u16, KernelError> {
        self.bytes(what, offset).map(u16::from_le_bytes)
    }

    fn u32(&self, what: &'static str, offset: usize) -> Result<u32, KernelError> {
        self.bytes(what, offset).map(u32::from_le_bytes)
    }

    fn u64(&self, what: &'static str, offset: usize) -> Result<u64, KernelError> {
        self.bytes(what, offset).map(u64::from_le_bytes)
    }
}

/// An error unless `ok`.
fn require(
    ok: bool,
    what: &'static str,
    offset: u64,
    found: impl Into<u64>,
    expected: &'static str,
) -> Result<(), KernelError> {
    if ok { Ok(()) } else { Err(KernelError::Field { what, offset, found: found.into(), expected }) }
}

impl BzImage {
    fn parse(file: Arc<Vec<u8>>) -> Result<BzImage, KernelError> {
        let f = Fields(&file);
        let found = file.len() as u64;
        let boot_flag = f.u16("boot_flag", 0x1fe)?;
        require(boot_flag == 0xaa55, "boot_flag", 0x1fe, boot_flag, "0xaa55")?;
        let version = f.u16("version", 0x206)?;
        require(
            version >= OLDEST_PROTOCOL,
            "version (boot protocol)",
            0x206,
            version,
            "0x20c (Linux 3.8) or later",
        )?;
        let loadflags = f.u8("loadflags", 0x211)?;
        require(loadflags & LOADED_HIGH != 0, "loadflags", 0x211, loadflags, "LOADED_HIGH (bit 0) set")?;
        let xloadflags = f.u16("xloadflags", 0x236)?;
        require(
            xloadflags & XLF_KERNEL_64 != 0,
            "xloadflags",
            0x236,
            xloadflags,
            "XLF_KERNEL_64 (bit 0) set: only kernels with a 64-bit entry point boot here",
        )?;
        let header_end = 0x202 + usize::from(f.u8("jump over the setup header", 0x201)?);
        require(
            (0x268..=SETUP_HEADER_LIMIT).contains(&header_end),
            "end of the setup header",
            0x201,
            header_end as u64,
            "0x268 to 0x290",
        )?;
        f.bytes::<1>("setup header", header_end - 1)?;

        let sectors = match f.u8("setup_sects", 0x1f1)? {
            0 => 4,
            n => usize::from(n),
        };
        let start = (sectors + 1) * 512;
        let len = u64::from(f.u32("syssize", 0x1f4)?) * 16;
        require(len > 0x200, "syssize", 0x1f4, len / 16, "more than the 0x200 bytes before the entry point")?;
        let end = start as u64 + len;
        if end > found {
            return Err(KernelError::Truncated { what: "the protected-mode part", needed: end, found });
        }
        // `end` is at most the length of a buffer in memory, so it fits.
        let body = start..start + len as usize;

        let payload_offset = u64::from(f.u32("payload_offset", 0x248)?);
        let payload_length = u64::from(f.u32("payload_length", 0x24c)?);
        require(
            payload_length >= 4 && payload_offset + payload_length <= len,
            "payload_offset + payload_length",
            0x248,
            payload_offset + payload_length,
            "a payload inside the protected-mode part",
        )?;
        let payload = start + payload_offset as usize..start + (payload_offset + payload_length) as usize;

        let pref_address = f.u64("pref_address", 0x258)?;
        require(
            (LOWEST_LOAD_ADDRESS..1 << 32).contains(&pref_address) && pref_address.is_multiple_of(PAGE_SIZE),
            "pref_address",
            0x258,
            pref_address,
            "a multiple of 4 KiB from 1 MiB to 4 GiB",
        )?;
        let init_size = u64::from(f.u32("init_size", 0x260)?);
        let cmdline_max = f.u32("cmdline_size", 0x238)?;
        let initrd_addr_max = u64::from(f.u32("initrd_addr_max", 0x22c)?);
        let setup_header = SETUP_HEADER..header_end;
        Ok(BzImage {
            setup_header,
            body,
            payload,
            pref_address,
            init_size,
            cmdline_max,
            initrd_addr_max,
            file,
        })
    }

    /// The bytes that get loaded at `pref_address`.
    pub fn body(&self) -> &[u8] {
        &self.file[self.body.clone()]
    }
}

impl ElfKernel {
    fn parse(file: Arc<Vec<u8>>) -> Result<ElfKernel, KernelError> {
        let f = Fields(&file);
        let class = f.u8("EI_CLASS", 4)?;
        require(class == abi::ELFCLASS64, "EI_CLASS", 4, class, "2: a 64-bit image")?;
        let data = f.u8("EI_DATA", 5)?;
        require(data == abi::ELFDATA2LSB, "EI_DATA", 5, data, "1: little-endian")?;
        let e_type = f.u16("e_type", 16)?;
        require(
            e_type == abi::ET_EXEC || e_type == abi::ET_DYN,
            "e_type",
            16,
            e_type,
            "2 or 3: an executable, not an object or core file",
        )?;
        let machine = f.u16("e_machine", 18)?;
        require(machine == abi::EM_X86_64, "e_machine", 18, machine, "62: x86-64")?;

        let parsed = ElfBytes::<AnyEndian>::minimal_parse(&file).map_err(elf_error)?;
        if parsed.ehdr.class != Class::ELF64 {
            return Err(KernelError::Elf("not a 64-bit image".to_owned()));
        }
        let mut segments = Vec::new();
        let mut virtual_ranges = Vec::new();
        let mut pvh_entry = None;
        let (mut notes_left, mut contents) = (NOTES_MAX, 0u64);
        for (index, phdr) in parsed.segments().into_iter().flatten().enumerate() {
            if phdr.p_type == abi::PT_NOTE && pvh_entry.is_none() {
                // A note that does not parse is as good as none: the 64-bit entry point is always there.
                if let Ok(mut notes) = parsed.segment_data_as_notes(&phdr) {
                    while pvh_entry.is_none()
                        && notes_left > 0
                        && let Some(note) = notes.next()
                    {
                        notes_left -= 1;
                        pvh_entry = pvh_note(note);
                    }
                }
            }
            if phdr.p_type != abi::PT_LOAD || phdr.p_memsz == 0 {
                continue;
            }
            let refuse = |why| KernelError::Segment {
                index,
                gpa: phdr.p_paddr,
                file_len: phdr.p_filesz,
                mem_len: phdr.p_memsz,
                why,
            };
            if phdr.p_filesz > phdr.p_memsz {
                return Err(refuse("more bytes in the file than in memory"));
            }
            if phdr.p_paddr < LOWEST_LOAD_ADDRESS {
                return Err(refuse("below 1 MiB, where the boot data lie"));
            }
            if phdr.p_paddr.checked_add(phdr.p_memsz).is_none() {
                return Err(refuse("beyond the end of the address space"));
            }
            let end = phdr.p_offset.checked_add(phdr.p_filesz).ok_or_else(|| refuse("file range wraps"))?;
            if end > file.len() as u64 {
                return Err(KernelError::Truncated {
                    what: "an ELF segment",
                    needed: end,
                    found: file.len() as u64,
                });
            }
            if segments.len() == SEGMENTS_MAX {
                return Err(KernelError::Segments);
            }
            contents += phdr.p_filesz;
            segments.push(Segment {
                gpa: phdr.p_paddr,
                file: phdr.p_offset as usize..end as usize,
                mem_len: phdr.p_memsz,
            });
            virtual_ranges.push((phdr.p_vaddr, phdr.p_paddr, phdr.p_memsz));
        }
        if contents > file.len() as u64 {
            return Err(KernelError::SegmentBytes { found: contents, file: file.len() as u64 });
        }
        segments.sort_by_key(|s| s.gpa);
        if segments.is_empty() {
            return Err(KernelError::NothingToLoad);
        }
        for pair in segments.windows(2) {
            if let [a, b] = pair
                && a.gpa + a.mem_len > b.gpa
            {
                return Err(KernelError::SegmentsOverlap { gpa: b.gpa });
            }
        }

        // Linux gives the entry point as a physical address; images linked otherwise give the virtual one.
        let e_entry = parsed.ehdr.e_entry;
        let inside = |start: u64, len: u64| e_entry.checked_sub(start).is_some_and(|d| d < len);
        let entry = if segments.iter().any(|s| inside(s.gpa, s.mem_len)) {
            Some(e_entry)
        } else {
            virtual_ranges
                .iter()
                .find(|(vaddr, _, len)| inside(*vaddr, *len))
                .map(|(vaddr, paddr, _)| e_entry - vaddr + paddr)
        }
        .ok_or(KernelError::EntryOutside { entry: e_entry })?;
        let pvh_entry = pvh_entry
            .filter(|e| segments.iter().any(|s| (s.gpa..s.gpa + s.mem_len).contains(&u64::from(*e))));
        Ok(ElfKernel { segments, entry, pvh_entry, file })
    }

    /// Contents by page: segments that share a page are merged, all others stay windows of the file.
    fn runs(&self) -> Vec<(u64, Bytes)> {
        let mut runs: Vec<(u64, Vec<&Segment>)> = Vec::new();
        let mut last_page = None;
        for segment in self.segments.iter().filter(|s| !s.file.is_empty()) {
            let first = segment.gpa & !(PAGE_SIZE - 1);
            match runs.last_mut() {
                Some((_, run)) if last_page == Some(first) => run.push(segment),
                _ => runs.push((first, vec![segment])),
            }
            last_page = Some((segment.gpa + segment.file.len() as u64 - 1) & !(PAGE_SIZE - 1));
        }
        runs.into_iter().map(|(gpa, run)| (gpa, self.run_bytes(gpa, &run))).collect()
    }

    fn run_bytes(&self, gpa: u64, run: &[&Segment]) -> Bytes {
        if let [only] = run
            && only.gpa == gpa
            && let Some(window) = Bytes::window(&self.file, only.file.clone())
        {
            return window;
        }
        let mut buffer = Vec::new();
        for segment in run {
            buffer.resize((segment.gpa - gpa) as usize, 0);
            buffer.extend_from_slice(&self.file[segment.file.clone()]);
        }
        Bytes::from(buffer)
    }
}

fn elf_error(error: elf::ParseError) -> KernelError {
    KernelError::Elf(error.to_string())
}

/// The 32-bit entry address, if `note` is Xen's.
fn pvh_note(note: Note<'_>) -> Option<u32> {
    let Note::Unknown(note) = note else { return None };
    if note.name.strip_suffix(b"\0") != Some(b"Xen") || note.n_type != XEN_PHYS32_ENTRY {
        return None;
    }
    match note.desc.len() {
        4 => note.desc.try_into().ok().map(u32::from_le_bytes),
        8 => note.desc.try_into().ok().map(u64::from_le_bytes).and_then(|v| u32::try_from(v).ok()),
        _ => None,
    }
}
