// SPDX-License-Identifier: Apache-2.0
//! OVMF firmware files, and what a monitor makes of them: a launch plan.
//!
//! The firmware lies below 4 GiB and is measured first, then come the sections of its SEV metadata in the
//! order in which the file lists them, then one save area per vCPU. Monitors differ in details that change
//! the digest; [`VmmType`] holds them. A file that other tools measure in silence although no launch could
//! have that digest is refused here.

use super::guid_table::GuidTable;
use super::guid_table::Section;
use super::guid_table::TableError;
use crate::image::vmm_type::VcpuSetup;
use crate::image::vmm_type::VmmType;
use crate::pages::hashes::KernelHashes;
use crate::pages::hashes::TABLE_LEN;
use crate::plan::Bytes;
use crate::plan::LaunchPlan;
use crate::plan::PAGE_SIZE;
use crate::plan::PageType;
use crate::plan::PlanError;
use crate::plan::Record;

/// The firmware ends here in the guest.
const FOUR_GIB: u64 = 1 << 32;
/// Start address of the first vCPU: the reset vector.
const BSP_EIP: u32 = 0xffff_fff0;

/// Section types of the SEV metadata.
mod kind {
    pub const SEC_MEM: u32 = 1;
    pub const SECRETS: u32 = 2;
    pub const CPUID: u32 = 3;
    pub const SVSM_CAA: u32 = 4;
    pub const KERNEL_HASHES: u32 = 0x10;
}

/// Why a firmware file, or a launch with it, is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum OvmfError {
    /// The file's own structure.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Not whole pages, or more than there is room for.
    #[error("the file has {len} bytes; expected a positive multiple of 4096, at most 4 GiB")]
    Length { len: usize },
    /// A section type of which nothing is known.
    #[error("offset {offset:#x}: SEV metadata section of type {kind:#x}, expected 1, 2, 3, 4 or 0x10")]
    SectionType { offset: usize, kind: u32 },
    /// A section whose size would be measured differently by different monitors.
    #[error("offset {offset:#x}: section {name} has {size:#x} bytes, expected {expected}")]
    SectionSize { offset: usize, name: &'static str, size: u32, expected: &'static str },
    /// A kernel that would start unmeasured.
    #[error(
        "a kernel is given, but the firmware has no section for its hashes (SNP_KERNEL_HASHES, type 0x10), so the \
         kernel would not be part of the measurement: use a build with kernel hashes (edk2's AmdSevX64), or leave the \
         kernel out"
    )]
    NoKernelHashes,
    /// Hashes would be written where the firmware does not look, or beyond their page.
    #[error(
        "offset {offset:#x}: the firmware reads kernel hashes at {base:#x} ({size} bytes), expected {TABLE_LEN} bytes \
         or more inside its KERNEL_HASHES section, the page at {section:#x}"
    )]
    HashTablePlace { offset: usize, base: u32, size: u32, section: u32 },
    /// The firmware does not say where it expects the hashes.
    #[error(
        "the firmware has a KERNEL_HASHES section, but no entry 7255371f-3a3b-4b04-927b-1da6efa8d454 that says where \
         it reads the hashes"
    )]
    NoHashTable,
    /// More than one vCPU and no place for the others to start.
    #[error(
        "{vcpus} vCPUs, but the firmware has no SEV-ES reset block that says where the second one starts"
    )]
    NoResetBlock { vcpus: u32 },
    /// An SVSM without a start address.
    #[error("the SVSM has no entry a789a612-0597-4c4b-a49f-cbb1fe9d1ddd that says where it starts")]
    NoSvsmEntry,
    /// Addresses that no guest has.
    #[error(
        "an SVSM of {svsm:#x} bytes below a variable store of {vars:#x} bytes: expected whole pages that fit under the \
         firmware, and a start address below 4 GiB"
    )]
    SvsmPlace { svsm: usize, vars: u64 },
    /// The plan as a whole.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// What the launch adds to the firmware.
#[derive(Clone, Copy, Debug)]
pub struct OvmfLaunch<'a> {
    /// Whose launch it is.
    pub vmm: VmmType,
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// CPUID signature and features of each vCPU.
    pub setup: VcpuSetup,
    /// Hashes of the kernel that the monitor hands to the firmware.
    pub kernel: Option<&'a KernelHashes>,
}

/// A firmware file that can start as an SNP guest.
#[derive(Clone, Debug)]
pub struct Ovmf {
    image: Bytes,
    table: GuidTable,
}

impl Ovmf {
    /// Reads the file's table and metadata, and checks every section.
    pub fn parse(image: Bytes) -> Result<Self, OvmfError> {
        let file = image.as_slice();
        let table = GuidTable::parse(file)?;
        let len = file.len();
        if !(len as u64).is_multiple_of(PAGE_SIZE) || len as u64 > FOUR_GIB {
            return Err(OvmfError::Length { len });
        }
        table.sections.iter().try_for_each(check_section)?;
        Ok(Ovmf { image, table })
    }

    /// Where the firmware begins in the guest.
    pub fn gpa(&self) -> u64 {
        FOUR_GIB - self.len()
    }

    fn len(&self) -> u64 {
        self.image.as_slice().len() as u64
    }

    /// The part of the file that runs as it is, with its address: the firmware volume that has the reset
    /// vector. What other volumes hold is compressed. A file without volumes is code as a whole.
    pub fn boot_code(&self) -> (u64, &[u8]) {
        let file = self.image.as_slice();
        // A volume's header has its length (u64) at 32 and "_FVH" at 40 (UEFI Platform Initialization 1.7,
        // volume 3, 3.2.1).
        let ends_the_file = |at: &usize| {
            let header = file.get(*at..).and_then(|f| f.first_chunk::<48>());
            header.and_then(|h| h.last_chunk::<16>()).is_some_and(|fields| {
                let (len, signature) = fields.split_at(8);
                signature.starts_with(b"_FVH") && len == ((file.len() - at) as u64).to_le_bytes()
            })
        };
        let start = (0..file.len()).step_by(PAGE_SIZE as usize).rev().find(ends_the_file).unwrap_or(0);
        (self.gpa() + start as u64, &file[start..])
    }

    /// The SEV metadata, in file order.
    pub fn sections(&self) -> &[Section] {
        &self.table.sections
    }

    /// Where the second and later vCPUs start.
    pub fn reset_eip(&self) -> Option<u32> {
        self.table.reset_eip.filter(|eip| *eip != 0)
    }

    /// The plan of a launch with this firmware.
    pub fn plan(&self, launch: &OvmfLaunch) -> Result<LaunchPlan, OvmfError> {
        let mut records = vec![Record::new(self.gpa(), PageType::Normal, self.image.clone(), "firmware")];
        self.push_sections(launch.vmm, launch.kernel, &mut records)?;
        let mut vcpus = vec![launch.vmm.reset_state(BSP_EIP, launch.setup)];
        if launch.vcpus > 1 {
            let eip = self.reset_eip().ok_or(OvmfError::NoResetBlock { vcpus: launch.vcpus })?;
            vcpus.resize(launch.vcpus as usize, launch.vmm.reset_state(eip, launch.setup));
        }
        vcpus.truncate(launch.vcpus as usize);
        let plan = LaunchPlan { records, vcpus };
        plan.check()?;
        Ok(plan)
    }

    fn push_sections(
        &self,
        vmm: VmmType,
        kernel: Option<&KernelHashes>,
        records: &mut Vec<Record>,
    ) -> Result<(), OvmfError> {
        let mut after_all = Vec::new();
        let mut hashes_placed = false;
        for section in &self.table.sections {
            let (gpa, len) = (u64::from(section.gpa), u64::from(section.size));
            let empty = |page_type, name: &'static str| Record::empty(gpa, len, page_type, name);
            records.push(match (section.kind, kernel) {
                (kind::SEC_MEM, _) if vmm == VmmType::Gce => empty(PageType::Unmeasured, "SEC memory"),
                (kind::SEC_MEM, _) => empty(PageType::Zero, "SEC memory"),
                (kind::SECRETS, _) => empty(PageType::Secrets, "secrets page"),
                (kind::CPUID, _) if vmm == VmmType::Ec2 => {
                    after_all.push(empty(PageType::Cpuid, "CPUID page"));
                    continue;
                }
                (kind::CPUID, _) => empty(PageType::Cpuid, "CPUID page"),
                (kind::SVSM_CAA, _) => empty(PageType::Zero, "SVSM calling area"),
                (kind::KERNEL_HASHES, None) => empty(PageType::Zero, "kernel hashes (no kernel)"),
                (kind::KERNEL_HASHES, Some(hashes)) => {
                    hashes_placed = true;
                    let page = self.hashes_page(section, hashes)?;
                    Record::new(gpa, PageType::Normal, page, "kernel hashes")
                }
                (kind, _) => return Err(OvmfError::SectionType { offset: section.offset, kind }),
            });
        }
        records.append(&mut after_all);
        if kernel.is_some() && !hashes_placed {
            return Err(OvmfError::NoKernelHashes);
        }
        Ok(())
    }

    /// The page of `section` with the table of hashes where the firmware will look for it.
    fn hashes_page(&self, section: &Section, hashes: &KernelHashes) -> Result<Vec<u8>, OvmfError> {
        if u64::from(section.size) != PAGE_SIZE {
            return Err(size_error(section, "KERNEL_HASHES", "one page, 0x1000"));
        }
        let (offset, base, size) = self.table.hash_table.ok_or(OvmfError::NoHashTable)?;
        let mut page = vec![0; PAGE_SIZE as usize];
        let at = base.checked_sub(section.gpa);
        match at.and_then(|at| page.get_mut(at as usize..)?.get_mut(..TABLE_LEN)) {
            Some(place) if size as usize >= TABLE_LEN => place.copy_from_slice(&hashes.table()),
            _ => return Err(OvmfError::HashTablePlace { offset, base, size, section: section.gpa }),
        }
        Ok(page)
    }
}

/// Firmware under an SVSM: both are measured, the SVSM's metadata counts, and the SVSM starts on every vCPU.
///
/// This is the launch of COCONUT-SVSM's QEMU as `sev-snp-measure` models it in its mode `snp:svsm`.
#[derive(Clone, Debug)]
pub struct Svsm {
    ovmf: Ovmf,
    svsm: Ovmf,
    svsm_gpa: u64,
    entry: u32,
}

impl Svsm {
    /// Puts the SVSM file below the variable store of `vars_size` bytes, which lies below the firmware.
    pub fn parse(ovmf: &Ovmf, svsm: Bytes, vars_size: u64) -> Result<Self, OvmfError> {
        let svsm = Ovmf::parse(svsm)?;
        let misplaced = || OvmfError::SvsmPlace { svsm: svsm.image.as_slice().len(), vars: vars_size };
        let below = vars_size.checked_add(svsm.len()).and_then(|n| ovmf.gpa().checked_sub(n));
        let svsm_gpa = below.filter(|gpa| gpa.is_multiple_of(PAGE_SIZE)).ok_or_else(misplaced)?;
        let offset = svsm.table.svsm_entry.ok_or(OvmfError::NoSvsmEntry)?;
        let entry = svsm_gpa.checked_add(offset.into()).and_then(|at| u32::try_from(at).ok());
        let entry = entry.ok_or_else(misplaced)?;
        Ok(Svsm { ovmf: ovmf.clone(), svsm, svsm_gpa, entry })
    }

    /// The plan of a launch with `vcpus` vCPUs.
    pub fn plan(&self, vcpus: u32, setup: VcpuSetup) -> Result<LaunchPlan, OvmfError> {
        let mut records = vec![
            Record::new(self.ovmf.gpa(), PageType::Normal, self.ovmf.image.clone(), "firmware"),
            Record::new(self.svsm_gpa, PageType::Normal, self.svsm.image.clone(), "SVSM"),
        ];
        self.svsm.push_sections(VmmType::Qemu, None, &mut records)?;
        let state = crate::image::vmm_type::svsm_state(self.entry, setup);
        let plan = LaunchPlan { records, vcpus: vec![state; vcpus as usize] };
        plan.check()?;
        Ok(plan)
    }
}

fn size_error(section: &Section, name: &'static str, expected: &'static str) -> OvmfError {
    OvmfError::SectionSize { offset: section.offset, name, size: section.size, expected }
}

fn check_section(section: &Section) -> Result<(), OvmfError> {
    // For SECRETS and CPUID, tools measure one page whatever the size says and monitors all of it: only one
    // page is clear.
    let (name, one_page) = match section.kind {
        kind::SEC_MEM => ("SEC_MEM", false),
        kind::SECRETS => ("SECRETS", true),
        kind::CPUID => ("CPUID", true),
        kind::SVSM_CAA => ("SVSM_CAA", false),
        kind::KERNEL_HASHES => ("KERNEL_HASHES", false),
        kind => return Err(OvmfError::SectionType { offset: section.offset, kind }),
    };
    let size = u64::from(section.size);
    if one_page && size != PAGE_SIZE {
        return Err(size_error(section, name, "one page, 0x1000"));
    }
    if section.kind == kind::SVSM_CAA && size == 0 {
        let expected = "a page or more. A build for Intel TDX alone (edk2's IntelTdxX64) has an empty one and does not run as an SNP \
                        guest: take OvmfPkgX64 or AmdSevX64";
        return Err(size_error(section, name, expected));
    }
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
        return Err(size_error(section, name, "a positive multiple of 0x1000"));
    }
    Ok(())
}
