// SPDX-License-Identifier: Apache-2.0
//! Reading a file's directives, one after another: each is checked and becomes pages, parameters or what KVM
//! could not do.

use super::error::IgvmError;
use super::error::ZeroPages;
use super::file::Area;
use super::file::Igvm;
use super::file::Parameter;
use super::header::Header;
use super::header::headers;
use super::header::kind;
use super::id_block;
use crate::le::u16_at;
use crate::le::u32_at;
use crate::le::u64_at;
use crate::plan::Bytes;
use crate::plan::PAGE_SIZE;
use crate::plan::PageType;
use crate::plan::Record;
use crate::policy::GuestPolicy;

const PLATFORM_SEV_SNP: u8 = 2;

/// Most bytes of parameters in a file: each area is held in memory, and each of its pages costs a link of the
/// digest's chain.
const PARAMETERS_MAX: u64 = 16 << 20;
/// Most parameters that a file asks for: there are eleven kinds.
const DIRECTIVES_MAX: usize = 4096;

/// Most parameter areas of a file: each directive about one looks for it among all.
const AREAS_MAX: usize = 256;

/// The file's mask for SEV-SNP, and what KVM cannot do of what it wants there.
fn platform(headers: &[Header<'_>]) -> Result<(u32, Vec<String>), IgvmError> {
    let platform = headers.iter().filter(|header| header.kind() == kind::SUPPORTED_PLATFORM);
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
    Ok((mask.ok_or(IgvmError::NotForSnp)?, refusals))
}

impl Igvm {
    /// Reads the file's part for SEV-SNP.
    pub fn parse(file: &Bytes, zero_pages: ZeroPages) -> Result<Self, IgvmError> {
        let headers = headers(file.as_slice())?;
        let (mask, refusals) = platform(&headers)?;
        let mut builder = Builder {
            file,
            mask,
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
        match header.kind() {
            kind::SUPPORTED_PLATFORM => Ok(()),
            kind::GUEST_POLICY => {
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
            kind::RELOCATABLE_REGION | kind::PAGE_TABLE_RELOCATION => {
                if ours(0) {
                    self.refuse(|| "it wants to be relocated, which changes its digest".into());
                }
                Ok(())
            }
            kind::PARAMETER_AREA => self.parameter_area(header),
            kind::PAGE_DATA => self.page_data(header),
            kind::PARAMETER_INSERT => self.parameter_insert(header),
            kind::VP_CONTEXT => self.vp_context(header),
            kind::REQUIRED_MEMORY => self.required_memory(header),
            kind::VP_COUNT..=kind::MMIO_RANGES
            | kind::MEMORY_MAP
            | kind::COMMAND_LINE..=kind::PPTT
            | kind::DEVICE_TREE..=kind::ENVIRONMENT_INFO => self.parameter(header),
            kind::SNP_ID_BLOCK => self.id_block(header),
            // Parameters that the loader fills in, and other platforms' headers: nothing that an SNP launch
            // measures.
            kind::GUEST_POLICY..=kind::LAST_INIT | kind::PARAMETER_AREA..=kind::LAST_DIRECTIVE => Ok(()),
            _ if header.kind & kind::OPTIONAL != 0 => Ok(()),
            found => Err(IgvmError::Field {
                offset: header.offset - 8,
                what: "type of a header",
                found: found.into(),
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
        let (page_type, name) = match u16_at(body, 20) {
            0 if unmeasured => (PageType::Unmeasured, "unmeasured page data"),
            0 if no_data && self.igvm.zero_pages == ZeroPages::Zero => (PageType::Zero, "page without data"),
            0 if no_data => (PageType::Normal, "page without data"),
            0 => (PageType::Normal, "page data"),
            1 => (PageType::Secrets, "secrets page"),
            2 | 3 => (PageType::Cpuid, "CPUID page"),
            other => return Err(header.error(20, "data type of a page", other.into(), "0 to 3")),
        };
        // Pages one after another, in the guest and in the file, are one record: a 1 GiB file has few of
        // them.
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
        let index = u16_at(header.body, 16);
        if index != 0 {
            self.refuse(|| format!("it has a save area of vCPU {index}, KVM takes that of vCPU 0 only"));
        }
        let contents = self.data(header, 12, PAGE_SIZE as usize)?;
        self.igvm.records.push(Record::new(gpa, PageType::Vmsa, contents, format!("vCPU {index}")));
        Ok(())
    }

    fn id_block(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(id_block::LEN)?;
        if u32_at(header.body, 0) & self.mask == 0 {
            return Ok(());
        }
        if self.igvm.identity.is_some() {
            return Err(header.error(0, "ID block for this platform", 2, "one"));
        }
        self.igvm.identity = Some(id_block::read(header, self.igvm.policy.unwrap_or_default())?);
        Ok(())
    }

    fn parameter_area(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(16)?;
        let (len, index) = (u64_at(header.body, 0), u32_at(header.body, 8));
        let total: u64 = self.igvm.areas.iter().map(|area| area.len).sum();
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || len > PARAMETERS_MAX - total.min(PARAMETERS_MAX) {
            let expected = "whole pages, all areas together at most 16 MiB";
            return Err(header.error(0, "size of a parameter area", len, expected));
        }
        if self.igvm.areas.len() == AREAS_MAX {
            let expected = format!("at most {AREAS_MAX} areas");
            return Err(header.error(8, "index of one parameter area more", index.into(), expected));
        }
        if self.igvm.areas.iter().any(|area| area.index == index) {
            return Err(header.error(8, "index of a parameter area", index.into(), "a new one"));
        }
        let initial = match u32_at(header.body, 12) {
            0 => Bytes::from(Vec::new()),
            _ => self.data(header, 12, len as usize)?,
        };
        self.igvm.areas.push(Area { index, len, initial, record: None });
        Ok(())
    }

    fn parameter_insert(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(16)?;
        if u32_at(header.body, 8) & self.mask == 0 {
            return Ok(());
        }
        let gpa = self.address(header, u64_at(header.body, 0))?;
        let index = u32_at(header.body, 12);
        let next = self.igvm.records.len();
        let area = self.igvm.areas.iter_mut().find(|area| area.index == index);
        let area = area.ok_or_else(|| {
            header.error(12, "index of a parameter area", index.into(), "one that was declared before")
        })?;
        if area.record.is_some() {
            let expected = "an area that is inserted once";
            return Err(header.error(12, "index of a parameter area", index.into(), expected));
        }
        area.record = Some(next);
        self.igvm.records.push(Record::empty(gpa, area.len, PageType::Unmeasured, "parameters"));
        Ok(())
    }

    fn parameter(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(8)?;
        let (area, byte_offset) = (u32_at(header.body, 0), u32_at(header.body, 4));
        if !self.igvm.areas.iter().any(|known| known.index == area) {
            let expected = "one that was declared before";
            return Err(header.error(0, "index of a parameter area", area.into(), expected));
        }
        if self.igvm.parameters.len() == DIRECTIVES_MAX {
            let expected = format!("at most {DIRECTIVES_MAX} parameters");
            return Err(header.error(0, "area of one parameter more", area.into(), expected));
        }
        self.igvm.parameters.push(Parameter {
            offset: header.offset,
            kind: header.kind(),
            area,
            byte_offset,
        });
        Ok(())
    }

    fn required_memory(&mut self, header: &Header) -> Result<(), IgvmError> {
        header.expect_len(24)?;
        if u32_at(header.body, 8) & self.mask != 0 {
            let start = self.address(header, u64_at(header.body, 0))?;
            let len = u64::from(u32_at(header.body, 12));
            if self.igvm.required.len() == DIRECTIVES_MAX {
                let expected = format!("at most {DIRECTIVES_MAX} ranges");
                return Err(header.error(0, "address of one range of required memory more", start, expected));
            }
            self.igvm.required.push((header.offset, start..start.saturating_add(len)));
        }
        Ok(())
    }
}
