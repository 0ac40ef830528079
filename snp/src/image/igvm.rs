// SPDX-License-Identifier: Apache-2.0
//! IGVM files: a launch as a list of directives, which are measured in the order of the file.
//!
//! Format: the `igvm_defs` crate's description of versions 1 and 2 (fixed header, variable headers of type, length and
//! value, file data). The parser here is our own so that the one of the `igvm` crate stays an independent oracle, page data
//! is not copied, and every error has an offset. What is for other platforms in the file is passed over.

mod launch;

use std::fmt;
use std::ops::Range;

pub use launch::Facts;
pub use launch::Loaded;

use self::launch::Area;
use self::launch::Parameter;
use crate::digest::LaunchDigest;
use crate::digest::VMSA_GPA;
use crate::digest::trace_records;
use crate::identity::IdAuth;
use crate::identity::IdBlock;
use crate::identity::KeyError;
use crate::identity::PublicKey;
use crate::identity::Signature;
use crate::plan::Bytes;
use crate::plan::LaunchPlan;
use crate::plan::PAGE_SIZE;
use crate::plan::PageType;
use crate::plan::PlanError;
use crate::plan::Record;
use crate::policy::GuestPolicy;
use crate::vmsa::CR4_MCE;
use crate::vmsa::EFER_SVME;
use crate::vmsa::VmsaState;

const MAGIC: u32 = u32::from_le_bytes(*b"IGVM");
/// Types of headers; bit 31 says that a loader may pass over one that it does not know.
mod header {
    pub const OPTIONAL: u32 = 1 << 31;
    pub const SUPPORTED_PLATFORM: u32 = 0x1;
    pub const GUEST_POLICY: u32 = 0x101;
    pub const RELOCATABLE_REGION: u32 = 0x102;
    pub const PAGE_TABLE_RELOCATION: u32 = 0x103;
    pub const LAST_INIT: u32 = 0x107;
    pub const PARAMETER_AREA: u32 = 0x301;
    pub const PAGE_DATA: u32 = 0x302;
    pub const PARAMETER_INSERT: u32 = 0x303;
    pub const VP_CONTEXT: u32 = 0x304;
    pub const REQUIRED_MEMORY: u32 = 0x305;
    pub const VP_COUNT: u32 = 0x307;
    pub const SRAT: u32 = 0x308;
    pub const MADT: u32 = 0x309;
    pub const MMIO_RANGES: u32 = 0x30a;
    pub const SNP_ID_BLOCK: u32 = 0x30b;
    pub const MEMORY_MAP: u32 = 0x30c;
    pub const COMMAND_LINE: u32 = 0x30e;
    pub const SLIT: u32 = 0x30f;
    pub const PPTT: u32 = 0x310;
    pub const DEVICE_TREE: u32 = 0x312;
    pub const ENVIRONMENT_INFO: u32 = 0x313;
    pub const LAST_DIRECTIVE: u32 = 0x313;
}
const PLATFORM_SEV_SNP: u8 = 2;

/// How pages without data enter the guest. The specification says NORMAL pages of zeros, but QEMU and Cloud Hypervisor
/// load them as type ZERO, so one file has two digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPages {
    /// As the specification says.
    Normal,
    /// As QEMU and Cloud Hypervisor do.
    Zero,
}

impl fmt::Display for ZeroPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ZeroPages::Normal => "NORMAL pages of zeros (the IGVM specification)",
            ZeroPages::Zero => "type ZERO (QEMU, Cloud Hypervisor)",
        })
    }
}

/// Why an IGVM file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IgvmError {
    /// A field with a wrong value.
    #[error("offset {offset:#x}: {what} is {found:#x}, expected {expected}")]
    Field {
        /// Offset in the file.
        offset: usize,
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What would have been right.
        expected: String,
    },
    /// The file ends too early.
    #[error("offset {offset:#x}: the file ends in {what}, expected {expected} more bytes")]
    CutOff {
        /// Offset in the file.
        offset: usize,
        /// What is cut off.
        what: &'static str,
        /// Bytes that should be there.
        expected: usize,
    },
    /// Made for other platforms.
    #[error("the file has no SUPPORTED_PLATFORM header for SEV-SNP")]
    NotForSnp,
    /// A key or signature in the file's ID block.
    #[error("offset {offset:#x}: the ID block's {what}: {source}")]
    IdBlock {
        /// Offset of the directive.
        offset: usize,
        /// Which part.
        what: &'static str,
        /// What is wrong with it.
        source: KeyError,
    },
    /// The ID block in the file is for something else than the file.
    #[error(
        "the file's ID block is for digest {block}, but the file has {computed} with pages without data as {zero_pages}{hint}"
    )]
    IdBlockDigest {
        /// Digest in the block.
        block: LaunchDigest,
        /// Digest of the directives.
        computed: LaunchDigest,
        /// The convention used.
        zero_pages: ZeroPages,
        /// Whether the other convention would match.
        hint: &'static str,
    },
    /// Something that KVM cannot take into an SNP guest.
    #[error("KVM cannot launch this file: {0}")]
    Kvm(String),
    /// Something that the file wants of a machine which this one does not have.
    #[error("offset {offset:#x}: {reason}")]
    Machine {
        /// Offset of the directive in the file.
        offset: usize,
        /// What is missing, and what to do.
        reason: String,
    },
    /// The records as a plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// An IGVM file's part for SEV-SNP.
#[derive(Clone, Debug)]
pub struct Igvm {
    /// Pages and save areas in directive order. A save area is a record of type VMSA.
    pub records: Vec<Record>,
    /// The policy that the file asks for.
    pub policy: Option<GuestPolicy>,
    /// The ID block in the file.
    pub identity: Option<(IdBlock, IdAuth)>,
    /// How pages without data were taken.
    pub zero_pages: ZeroPages,
    /// What KVM could not do with this file; empty if it can launch it.
    refusals: Vec<String>,
    /// Pages that are shared when the guest starts. Not measured.
    shared: Vec<Record>,
    /// Memory that the guest must have: offset of the directive, and the range.
    required: Vec<(usize, Range<u64>)>,
    /// Parameter areas, with the record that each is inserted as.
    areas: Vec<Area>,
    /// What the loader writes into them.
    parameters: Vec<Parameter>,
}

fn bytes<const N: usize>(data: &[u8], at: usize) -> [u8; N] {
    data.get(at..).and_then(|d| d.first_chunk()).copied().unwrap_or([0; N])
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(data, at))
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(data, at))
}

/// One variable header.
#[derive(Clone, Copy)]
struct Header<'a> {
    /// Offset of its body in the file.
    offset: usize,
    kind: u32,
    body: &'a [u8],
}

impl Header<'_> {
    /// The type, without the bit that says "optional".
    fn kind(&self) -> u32 {
        self.kind & !header::OPTIONAL
    }

    fn error(&self, at: usize, what: &'static str, found: u64, expected: impl Into<String>) -> IgvmError {
        IgvmError::Field { offset: self.offset + at, what, found, expected: expected.into() }
    }

    /// Refuses a body of another length than the type has.
    fn expect_len(&self, len: usize) -> Result<(), IgvmError> {
        if self.body.len() != len {
            return Err(IgvmError::Field {
                offset: self.offset - 4,
                what: "length of a header",
                found: self.body.len() as u64,
                expected: format!("{len:#x} for type {:#x}", self.kind),
            });
        }
        Ok(())
    }
}

/// Checks the fixed header and splits the variable headers.
fn headers(file: &[u8]) -> Result<Vec<Header<'_>>, IgvmError> {
    let cut =
        |offset: usize, what: &'static str, expected: usize| IgvmError::CutOff { offset, what, expected };
    let field = |offset: usize, what: &'static str, expected: String| IgvmError::Field {
        offset,
        what,
        found: u32_at(file, offset).into(),
        expected,
    };
    if file.len() < 24 {
        return Err(cut(file.len(), "the fixed header", 24 - file.len()));
    }
    if u32_at(file, 0) != MAGIC {
        return Err(field(0, "magic number", format!("{MAGIC:#x} ('IGVM')")));
    }
    let fixed = match u32_at(file, 4) {
        1 => 24,
        2 if file.len() < 32 => return Err(cut(file.len(), "the fixed header", 32 - file.len())),
        2 if u32_at(file, 24) != 0 => return Err(field(24, "architecture", "0 (x86-64)".into())),
        2 if u32_at(file, 28) != PAGE_SIZE as u32 => return Err(field(28, "page size", "0x1000".into())),
        2 => 32,
        _ => return Err(field(4, "format version", "1 or 2".into())),
    };
    let (start, size) = (u32_at(file, 8) as usize, u32_at(file, 12) as usize);
    if u32_at(file, 16) as usize != file.len() {
        return Err(field(16, "total file size", format!("{:#x}, as the file has", file.len())));
    }
    if start < fixed || start > file.len() || start % 8 != 0 {
        let expected = format!("a multiple of 8 from {fixed:#x} to {:#x}", file.len());
        return Err(field(8, "offset of the variable headers", expected));
    }
    let variable = file[start..].get(..size);
    let variable = variable.ok_or_else(|| {
        field(12, "size of the variable headers", format!("at most {:#x}", file.len() - start))
    })?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&file[..20]);
    crc.update(&[0; 4]);
    crc.update(&file[24..fixed]);
    crc.update(variable);
    let crc = crc.finalize();
    if crc != u32_at(file, 20) {
        return Err(field(20, "checksum", format!("{crc:#x}")));
    }

    let mut found = Vec::new();
    let mut at = 0;
    while at < variable.len() {
        if variable.len() - at < 8 {
            return Err(cut(start + at, "a variable header", 8 - (variable.len() - at)));
        }
        let (kind, len) = (u32_at(variable, at), u32_at(variable, at + 4) as usize);
        let body = variable[at + 8..].get(..len).ok_or_else(|| IgvmError::Field {
            offset: start + at + 4,
            what: "length of a header",
            found: len as u64,
            expected: format!("at most {:#x}", variable.len() - at - 8),
        })?;
        found.push(Header { offset: start + at + 8, kind, body });
        // The next header begins at a multiple of 8; the last one need not be padded.
        at += 8 + len.next_multiple_of(8);
    }
    Ok(found)
}

impl Igvm {
    /// Reads the file's part for SEV-SNP.
    pub fn parse(file: &Bytes, zero_pages: ZeroPages) -> Result<Self, IgvmError> {
        let headers = headers(file.as_slice())?;
        let platform = headers.iter().filter(|h| h.kind & !header::OPTIONAL == header::SUPPORTED_PLATFORM);
        let mut mask = None;
        let mut refusals = Vec::new();
        for platform in platform {
            platform.expect_len(16)?;
            if platform.body[5] != PLATFORM_SEV_SNP {
                continue;
            }
            if mask.is_some() {
                return Err(platform.error(5, "platform type", 2, "one SEV-SNP platform in a file"));
            }
            let this = u32_at(platform.body, 0);
            if !this.is_power_of_two() {
                return Err(platform.error(0, "compatibility mask", this.into(), "one bit"));
            }
            mask = Some(this);
            if platform.body[4] != 0 {
                refusals.push(format!("its highest VTL is {}, KVM has VTL 0 only", platform.body[4]));
            }
            let boundary = u64_at(platform.body, 8);
            if boundary != 0 {
                refusals.push(format!("it has a shared GPA boundary ({boundary:#x}), KVM has none"));
            }
        }
        let mut builder = Builder {
            file,
            mask: mask.ok_or(IgvmError::NotForSnp)?,
            igvm: Igvm {
                records: Vec::new(),
                policy: None,
                identity: None,
                zero_pages,
                refusals,
                shared: Vec::new(),
                required: Vec::new(),
                areas: Vec::new(),
                parameters: Vec::new(),
            },
        };
        for header in &headers {
            builder.take(header)?;
        }
        Ok(builder.igvm)
    }

    /// The launch digest, and the digest after each record.
    pub fn digests(&self) -> (LaunchDigest, Vec<LaunchDigest>) {
        let after = trace_records(&self.records);
        (after.last().copied().unwrap_or(LaunchDigest::START), after)
    }

    /// Compares the file's ID block with its contents and its policy.
    pub fn check_identity(&self) -> Result<(), IgvmError> {
        let Some((block, _)) = &self.identity else { return Ok(()) };
        let (computed, _) = self.digests();
        if block.launch_digest == computed {
            return Ok(());
        }
        let mut other = self.clone();
        for record in &mut other.records {
            let no_data = record.contents.as_slice().is_empty();
            record.page_type = match record.page_type {
                PageType::Zero => PageType::Normal,
                PageType::Normal if no_data => PageType::Zero,
                same => same,
            };
        }
        let hint = if other.digests().0 == block.launch_digest {
            "; with the other convention it matches"
        } else {
            "; with neither convention it matches"
        };
        let (block, zero_pages) = (block.launch_digest, self.zero_pages);
        Err(IgvmError::IdBlockDigest { block, computed, zero_pages, hint })
    }

    /// The plan with which KVM launches this file, if it can.
    pub fn kvm_plan(&self) -> Result<LaunchPlan, IgvmError> {
        let refuse = |reason: String| Err(IgvmError::Kvm(reason));
        if let Some(reason) = self.refusals.first() {
            return refuse(reason.clone());
        }
        let Some((vmsa, pages)) =
            self.records.split_last().filter(|(last, _)| last.page_type == PageType::Vmsa)
        else {
            return refuse("its last page is no save area (VP_CONTEXT); KVM adds the save area last".into());
        };
        if let Some(other) = pages.iter().find(|record| record.page_type == PageType::Vmsa) {
            return refuse(format!(
                "it has a second save area, at {:#x}; KVM takes one, of the first vCPU",
                other.gpa
            ));
        }
        if vmsa.gpa != VMSA_GPA {
            return refuse(format!("its save area is at {:#x}; KVM measures it at {VMSA_GPA:#x}", vmsa.gpa));
        }
        let mut page = [0; PAGE_SIZE as usize];
        vmsa.read_page(0, &mut page);
        let state = kvm_state(&page).map_err(IgvmError::Kvm)?;
        let plan = LaunchPlan { records: pages.to_vec(), vcpus: vec![state] };
        plan.check()?;
        if !self.shared.is_empty() {
            // A page is private or shared. One that is both would fail in the middle of the launch, without a reason.
            let all = plan.records.iter().chain(&self.shared).cloned().collect();
            LaunchPlan { records: all, vcpus: plan.vcpus.clone() }.check()?;
        }
        Ok(plan)
    }
}

/// The registers in a save area, or what KVM could not put into the page that it builds.
fn kvm_state(page: &[u8; PAGE_SIZE as usize]) -> Result<VmsaState, String> {
    let state = VmsaState::decode(page).map_err(|refusal| format!("its save area: {refusal}"))?;
    if let Some(at) = state.encode().iter().zip(page).position(|(ours, file)| ours != file) {
        return Err(format!(
            "its save area sets byte {at:#x} to {:#x}, which the monitor cannot import",
            page[at]
        ));
    }
    if state.sev_features & 2 != 0 {
        return Err("its save area uses virtual top of memory (sev_features bit 1), KVM does not".into());
    }
    if state.sev_features & 1 == 0 {
        return Err("its save area lacks sev_features bit 0 (SNP), which KVM sets".into());
    }
    if state.efer & EFER_SVME == 0 || state.cr4 & CR4_MCE == 0 {
        return Err("its save area lacks EFER.SVME (0x1000) or CR4.MCE (0x40), which KVM sets".into());
    }
    if state.cr0 != 0x31 && state.cr0 != 0x30 && state.cr0 & (1 << 31) == 0 {
        return Err(format!("its save area has CR0 {:#x}, expected 0x30, 0x31 or paging", state.cr0));
    }
    if state.dr7 != 0x400 {
        return Err(format!("its save area has DR7 {:#x}, KVM refuses all but 0x400", state.dr7));
    }
    let reset = VmsaState::reset();
    for (name, found, kept) in
        [("DR6", state.dr6, reset.dr6), ("MXCSR", state.mxcsr.into(), reset.mxcsr.into())]
    {
        if found != kept {
            return Err(format!(
                "its save area has {name} {found:#x}; KVM keeps its reset value {kept:#x} and has no call to set it"
            ));
        }
    }
    Ok(state)
}

/// What has been read so far.
struct Builder<'a> {
    file: &'a Bytes,
    mask: u32,
    igvm: Igvm,
}

impl Builder<'_> {
    fn take(&mut self, header: &Header) -> Result<(), IgvmError> {
        let body = header.body;
        let ours = |at: usize| u32_at(body, at) & self.mask != 0;
        match header.kind & !header::OPTIONAL {
            header::SUPPORTED_PLATFORM => Ok(()),
            header::GUEST_POLICY => {
                header.expect_len(16)?;
                if ours(8) {
                    if self.igvm.policy.is_some() || self.igvm.identity.is_some() {
                        let expected = "one policy, before the ID block";
                        return Err(header.error(0, "another guest policy", u64_at(body, 0), expected));
                    }
                    self.igvm.policy = Some(GuestPolicy(u64_at(body, 0)));
                }
                Ok(())
            }
            header::RELOCATABLE_REGION | header::PAGE_TABLE_RELOCATION => {
                if ours(0) {
                    self.refuse(|| "it wants to be relocated, which changes its digest".into());
                }
                Ok(())
            }
            header::PARAMETER_AREA => self.parameter_area(header),
            header::PAGE_DATA => self.page_data(header),
            header::PARAMETER_INSERT => self.parameter_insert(header),
            header::VP_CONTEXT => self.vp_context(header),
            header::REQUIRED_MEMORY => self.required_memory(header),
            header::VP_COUNT..=header::MMIO_RANGES
            | header::MEMORY_MAP
            | header::COMMAND_LINE..=header::PPTT
            | header::DEVICE_TREE..=header::ENVIRONMENT_INFO => self.parameter(header),
            header::SNP_ID_BLOCK => self.id_block(header),
            // Parameters that the loader fills in, and other platforms' headers: nothing that an SNP launch measures.
            header::GUEST_POLICY..=header::LAST_INIT | header::PARAMETER_AREA..=header::LAST_DIRECTIVE => {
                Ok(())
            }
            _ if header.kind & header::OPTIONAL != 0 => Ok(()),
            kind => Err(IgvmError::Field {
                offset: header.offset - 8,
                what: "type of a header",
                found: kind.into(),
                expected: "a known type, or an optional one (bit 31)".into(),
            }),
        }
    }

    /// Notes why KVM could not launch the file. The first reason is told.
    fn refuse(&mut self, reason: impl FnOnce() -> String) {
        if self.igvm.refusals.is_empty() {
            self.igvm.refusals.push(reason());
        }
    }

    fn address(&self, header: &Header, gpa: u64) -> Result<u64, IgvmError> {
        if !gpa.is_multiple_of(PAGE_SIZE) || gpa >= 1 << 52 {
            return Err(header.error(0, "guest-physical address", gpa, "a page address below 2^52"));
        }
        Ok(gpa)
    }

    /// `len` bytes of the file's data, whose offset is at `at` in the header.
    fn data(&self, header: &Header, at: usize, len: usize) -> Result<Bytes, IgvmError> {
        let offset = u32_at(header.body, at) as usize;
        self.file.sub(offset..offset.saturating_add(len)).ok_or_else(|| {
            let last = self.file.as_slice().len().saturating_sub(len);
            header.error(at, "file offset of a page", offset as u64, format!("at most {last:#x}"))
        })
    }

    fn page_data(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(24)?;
        let body = header.body;
        let (gpa, offset, flags) = (u64_at(body, 0), u32_at(body, 12), u32_at(body, 16));
        if u32_at(body, 8) & self.mask == 0 {
            return Ok(());
        }
        let gpa = self.address(header, gpa)?;
        let (large, unmeasured, shared) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        if large {
            return Err(header.error(16, "flags of a page", flags.into(), "a 4 KiB page (bit 0 clear)"));
        }
        if flags >> 3 != 0 {
            return Err(header.error(16, "flags of a page", flags.into(), "bits 0 to 2 only"));
        }
        let no_data = offset == 0;
        let contents =
            if no_data { Bytes::from(Vec::new()) } else { self.data(header, 12, PAGE_SIZE as usize)? };
        if shared {
            self.igvm.shared.push(Record::new(gpa, PageType::Unmeasured, contents, "shared page data"));
            return Ok(());
        }
        let (page_type, name) = match u16::from_le_bytes(bytes(body, 20)) {
            0 if unmeasured => (PageType::Unmeasured, "unmeasured page data"),
            0 if no_data && self.igvm.zero_pages == ZeroPages::Zero => (PageType::Zero, "page without data"),
            0 if no_data => (PageType::Normal, "page without data"),
            0 => (PageType::Normal, "page data"),
            1 => (PageType::Secrets, "secrets page"),
            2 | 3 => (PageType::Cpuid, "CPUID page"),
            other => return Err(header.error(20, "data type of a page", other.into(), "0 to 3")),
        };
        // Pages one after another, in the guest and in the file, are one record: a 1 GiB file has few of them.
        if let Some(last) = self.igvm.records.last_mut()
            && last.name == name
            && last.page_type == page_type
            && last.end() == gpa
            && last.contents.join(&contents)
        {
            last.len += PAGE_SIZE;
            return Ok(());
        }
        self.igvm.records.push(Record { gpa, len: PAGE_SIZE, page_type, contents, name: name.into() });
        Ok(())
    }

    fn vp_context(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(20)?;
        if u32_at(header.body, 8) & self.mask == 0 {
            return Ok(());
        }
        let gpa = self.address(header, u64_at(header.body, 0))?;
        let index = u16::from_le_bytes(bytes(header.body, 16));
        if index != 0 {
            self.refuse(|| format!("it has a save area of vCPU {index}, KVM takes that of vCPU 0 only"));
        }
        let contents = self.data(header, 12, PAGE_SIZE as usize)?;
        self.igvm.records.push(Record::new(gpa, PageType::Vmsa, contents, format!("vCPU {index}")));
        Ok(())
    }

    fn id_block(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(696)?;
        let body = header.body;
        if u32_at(body, 0) & self.mask == 0 {
            return Ok(());
        }
        if self.igvm.identity.is_some() {
            return Err(header.error(0, "ID block for this platform", 2, "one"));
        }
        for (at, what, expected, counts) in [
            (88, "ID block version", 1, true),
            (96, "ID key algorithm", 1, true),
            (100, "author key algorithm", 1, body[4] == 1),
            (248, "curve of the ID key", 2, true),
        ] {
            if counts && u32_at(body, at) != expected {
                return Err(header.error(at, what, u32_at(body, at).into(), expected.to_string()));
            }
        }
        let part =
            |what: &'static str| move |source| IgvmError::IdBlock { offset: header.offset, what, source };
        let key = |at: usize, what: &'static str| {
            // The file's form has four bytes more after the curve.
            let mut form = [0; crate::identity::keys::PUBLIC_KEY_LEN];
            form[..4].copy_from_slice(&body[at..at + 4]);
            form[4..148].copy_from_slice(&body[at + 8..at + 152]);
            PublicKey::decode(&form).map_err(part(what))
        };
        let signature =
            |at: usize, what: &'static str| Signature::from_fields(&bytes(body, at)).map_err(part(what));
        let author = match body[4] {
            0 => None,
            1 => Some((key(544, "author key")?, signature(400, "author key's signature")?)),
            other => return Err(header.error(4, "author key flag", other.into(), "0 or 1")),
        };
        let block = IdBlock {
            launch_digest: LaunchDigest(bytes(body, 8)),
            family_id: bytes(body, 56),
            image_id: bytes(body, 72),
            guest_svn: u32_at(body, 92),
            policy: self.igvm.policy.unwrap_or_default(),
        };
        let auth =
            IdAuth { block_signature: signature(104, "signature")?, id_key: key(248, "ID key")?, author };
        self.igvm.identity = Some((block, auth));
        Ok(())
    }
}

/// The body of an SNP_ID_BLOCK header for a file with this compatibility mask.
pub fn id_block_header(block: &IdBlock, auth: &IdAuth, compatibility_mask: u32) -> Vec<u8> {
    let mut body = vec![0; 696];
    let mut put = |at: usize, value: &[u8]| body[at..at + value.len()].copy_from_slice(value);
    let key = |at: usize, key: &PublicKey, put: &mut dyn FnMut(usize, &[u8])| {
        let form = key.encode();
        put(at, &form[..4]);
        put(at + 8, &form[4..148]);
    };
    put(0, &compatibility_mask.to_le_bytes());
    put(8, &block.launch_digest.0);
    put(56, &block.family_id);
    put(72, &block.image_id);
    put(88, &1u32.to_le_bytes());
    put(92, &block.guest_svn.to_le_bytes());
    put(96, &1u32.to_le_bytes());
    put(104, &auth.block_signature.fields());
    key(248, &auth.id_key, &mut put);
    if let Some((author, signature)) = &auth.author {
        put(4, &[1]);
        put(100, &1u32.to_le_bytes());
        put(400, &signature.fields());
        key(544, author, &mut put);
    }
    body
}
