// SPDX-License-Identifier: Apache-2.0
//! Direct boot: a Linux kernel, an initrd and a command line, started with no firmware in between.
//!
//! Produces the whole launch: memory contents, registers of every vCPU, and the addresses that the monitor
//! has to know. One function for plain and SNP guests, so that both boot the same way. In an SNP guest
//! everything that the host could have chosen otherwise is a measured page.

use std::ops::Range;
use std::sync::Arc;

use super::bootparams;
use super::bootparams::BootInfo;
use super::entry;
use super::entry::Entry;
use super::entry::Mode;
use super::error::ImageError;
use super::error::VCPUS_MAX;
use super::kernel::ENTRY_64;
use super::kernel::Kernel;
use super::lazy;
use super::lazy::Acceptance;
use super::staged;
use super::staged::StagedBoot;
use crate::board::Board;
use crate::board::Tpm;
use crate::board::acpi;
use crate::board::layout;
use crate::pages::cpuid::C_BITS;
use crate::pages::cpuid::CpuidTable;
use crate::plan::Bytes;
use crate::plan::LaunchPlan;
use crate::plan::PAGE_SIZE;
use crate::plan::PageType;
use crate::plan::Record;
use crate::stage0::inputs;

/// Plain guests' memory ends here at the latest.
const PLAIN_ADDRESS_LIMIT: u64 = 1 << 46;

/// Who makes an SNP guest's RAM usable before the kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validation {
    /// The launch does: all RAM is in the plan, as ZERO pages where nothing else is. Costs one firmware
    /// command for each 4 KiB.
    AllByLaunch,
    /// stage0 does, before the kernel runs, or the kernel itself. The launch takes a dozen pages, whatever
    /// the memory and the files.
    Stage0(Acceptance),
}

/// What makes a guest an SNP guest.
#[derive(Clone, Debug)]
pub struct Snp<'a> {
    /// Position of the C-bit, from the platform.
    pub c_bit: u8,
    /// Leaves for the CPUID page. Its contents are not measured: `None` leaves them out, for a plan that only
    /// gets measured.
    pub cpuid: Option<&'a CpuidTable>,
    /// Who validates RAM.
    pub validation: Validation,
    /// SEV features of every vCPU beside SNP, such as [`crate::vmsa::SEV_FEATURE_SECURE_TSC`].
    pub features: u64,
}

/// The kind of guest.
#[derive(Clone, Debug)]
pub enum Guest<'a> {
    /// No memory encryption; nothing is measured.
    Plain,
    /// SEV-SNP.
    Snp(Snp<'a>),
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct DirectBoot<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The initrd's bytes, if any.
    pub initrd: Option<Arc<Vec<u8>>>,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// Guest memory in bytes, a multiple of 4 KiB.
    pub memory: u64,
    /// Number of vCPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// The TPM that the tables announce, if there is one.
    pub tpm: Option<Tpm>,
    /// Plain or SNP.
    pub guest: Guest<'a>,
}

/// A guest ready to be measured or launched.
#[derive(Clone, Debug)]
pub struct DirectImage {
    /// What enters the guest.
    pub plan: LaunchPlan,
    /// The machine that the guest is told of.
    pub board: Board,
    /// Guest memory, ascending: one range, or two with the device gap in between.
    pub ram: Vec<Range<u64>>,
    /// How the kernel is entered.
    pub entry: Entry,
    /// What goes with the plan if stage0 prepares the guest.
    pub staged: Option<StagedBoot>,
}

impl DirectBoot<'_> {
    /// Lays out the guest.
    pub fn image(&self) -> Result<DirectImage, ImageError> {
        let mut image = self.lay_out()?;
        if let Guest::Snp(snp) = &self.guest {
            image.plan.vcpus.iter_mut().for_each(|state| state.sev_features |= snp.features);
        }
        Ok(image)
    }

    fn lay_out(&self) -> Result<DirectImage, ImageError> {
        let mode = self.check()?;
        let lazy = self.lazy()?;
        let board = Board { tpm: self.tpm.clone(), ..Board::new(self.memory, self.vcpus) };
        let ram = board.ram();
        let initrd = self.place_initrd()?;
        let entry = self.entry();
        let snp = match &self.guest {
            Guest::Plain => None,
            Guest::Snp(snp) => Some(snp),
        };

        let info =
            BootInfo { kernel: self.kernel, initrd: initrd.clone(), board: &board, cc_blob: snp.is_some() };
        let normal = |gpa: u64, contents: Vec<u8>, name: &'static str| {
            Record::new(gpa, PageType::Normal, contents, name)
        };
        let mut records = vec![match entry {
            Entry::Long(_) => normal(layout::BOOT_PARAMS, bootparams::boot_params(&info), "boot_params"),
            Entry::Pvh(_) => normal(layout::BOOT_PARAMS, bootparams::pvh_start_info(&info), "PVH start info"),
        }];
        records.push(normal(layout::GDT, entry::gdt_page(entry), "descriptor table"));
        if let Entry::Long(_) = entry {
            let c_mask = snp.map_or(0, |s| 1 << s.c_bit);
            records.push(normal(layout::PAGE_TABLES, entry::page_tables(c_mask), "page tables"));
        }
        let mut cmdline = self.cmdline_text(lazy).into_bytes();
        cmdline.push(0);
        records.push(normal(layout::CMDLINE, cmdline, "command line"));
        if let Some(snp) = snp {
            let page = snp.cpuid.map(CpuidTable::page).transpose()?;
            let page = page.map_or_else(Vec::new, |page| page.to_vec());
            records.push(normal(layout::CC_BLOB, bootparams::cc_blob(), "confidential-computing blob"));
            records.push(Record::new(layout::CPUID, PageType::Cpuid, page, "CPUID page"));
            records.push(Record::empty(layout::SECRETS, PAGE_SIZE, PageType::Secrets, "secrets page"));
            records.push(normal(layout::SETUP_DATA, bootparams::setup_data(), "setup_data"));
        }
        records.push(normal(layout::ACPI, acpi::tables(&board), "ACPI tables"));
        for (gpa, bytes) in self.kernel.runs() {
            records.push(Record::new(gpa, PageType::Normal, bytes, "kernel"));
        }
        if let Some(bytes) = &self.initrd
            && let Some(window) = Bytes::window(bytes, 0..bytes.len())
        {
            records.push(Record::new(initrd.start, PageType::Normal, window, "initrd"));
        }
        match snp.map(|s| s.validation) {
            Some(Validation::Stage0(_)) => return self.with_stage0(records, board, entry, &initrd, lazy),
            Some(Validation::AllByLaunch) => {
                let gaps = gaps(&ram, &records);
                records
                    .extend(gaps.into_iter().map(|gap| {
                        Record::empty(gap.start, gap.end - gap.start, PageType::Zero, "free RAM")
                    }));
            }
            None => {}
        }

        let plan = LaunchPlan { records, vcpus: entry::vcpus(self.vcpus, entry, mode) };
        plan.check()?;
        Ok(DirectImage { plan, board, ram, entry, staged: None })
    }

    /// The same contents, but handed over by stage0: it brings its own tables, and launch pages stay launch
    /// pages.
    fn with_stage0(
        &self,
        mut records: Vec<Record>,
        board: Board,
        entry: Entry,
        initrd: &Range<u64>,
        lazy: bool,
    ) -> Result<DirectImage, ImageError> {
        let ram = board.ram();
        let cpuid = records.iter().find(|r| r.page_type == PageType::Cpuid);
        let cpuid = cpuid.map_or_else(Vec::new, |r| r.contents.as_slice().to_vec());
        records.retain(|r| {
            r.page_type == PageType::Normal && ![layout::GDT, layout::PAGE_TABLES].contains(&r.gpa)
        });
        staged::add_zeros(&mut records, &self.kernel.zeros());
        let layout = staged::Layout {
            contents: records,
            ram: &ram,
            kernel: self.kernel.memory(),
            entry: match entry {
                Entry::Long(entry) => entry,
                Entry::Pvh(entry) => entry.into(),
            },
            vcpus: self.vcpus,
            cpuid,
            accept: lazy.then(|| lazy::accepted(&self.kernel.memory(), initrd, &ram)),
        };
        let (plan, staged) = layout.build()?;
        plan.check()?;
        Ok(DirectImage { plan, board, ram, entry, staged: Some(staged) })
    }

    /// Whether the kernel is to accept most of its memory by itself.
    fn lazy(&self) -> Result<bool, ImageError> {
        match &self.guest {
            Guest::Snp(Snp { validation: Validation::Stage0(Acceptance::Lazy), .. })
                if self.memory > lazy::MEMORY_MAX =>
            {
                Err(ImageError::LazyMemory(self.memory))
            }
            Guest::Snp(Snp { validation: Validation::Stage0(acceptance), .. }) => {
                acceptance.resolve(self.kernel, self.memory).ok_or(ImageError::NotLazy)
            }
            _ => Ok(false),
        }
    }

    /// The command line that the kernel will get: `cmdline`, and what lazy acceptance adds to it.
    pub fn kernel_cmdline(&self) -> Result<String, ImageError> {
        Ok(self.cmdline_text(self.lazy()?))
    }

    /// The command line as the kernel gets it.
    fn cmdline_text(&self, lazy: bool) -> String {
        match (lazy, self.cmdline) {
            (false, text) => text.to_owned(),
            (true, "") => lazy::CMDLINE.to_owned(),
            (true, text) => format!("{text} {}", lazy::CMDLINE),
        }
    }

    /// Checks all that does not depend on the layout.
    fn check(&self) -> Result<Mode, ImageError> {
        let (mode, address_limit) = match &self.guest {
            Guest::Plain => (Mode::Plain, PLAIN_ADDRESS_LIMIT),
            Guest::Snp(Snp { c_bit, cpuid, validation, .. }) => {
                let table = cpuid.and_then(CpuidTable::c_bit);
                if !C_BITS.contains(c_bit) || (cpuid.is_some() && table != Some(*c_bit)) {
                    return Err(ImageError::CBit { c_bit: *c_bit, table });
                }
                let limit = match validation {
                    // What stage0's page of inputs can describe.
                    Validation::Stage0(_) => inputs::ADDRESS_END.min(1 << c_bit),
                    Validation::AllByLaunch => 1 << c_bit,
                };
                (Mode::Snp { c_mask: 1 << c_bit }, limit)
            }
        };
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(ImageError::Vcpus(self.vcpus));
        }
        let max = address_limit - (layout::HOLE_END - layout::HOLE_START);
        let found = self.memory;
        if !(layout::MEMORY_MIN..=max).contains(&found) || !found.is_multiple_of(PAGE_SIZE) {
            return Err(ImageError::Memory { found, max });
        }
        let max = self.kernel.cmdline_max().min(layout::CMDLINE_LIMIT);
        let found = self.cmdline_text(self.lazy()?).len();
        if found > max as usize {
            return Err(ImageError::CmdlineLength { found, max });
        }
        if let Some(offset) = self.cmdline.find('\0') {
            return Err(ImageError::CmdlineNul(offset));
        }
        let (top, kernel) = (self.low_top(), self.kernel.memory());
        if kernel.end > top {
            return Err(ImageError::KernelFit { start: kernel.start, end: kernel.end, top });
        }
        Ok(mode)
    }

    fn low_top(&self) -> u64 {
        self.memory.min(layout::HOLE_START)
    }

    /// As high as possible in low RAM; empty if there is no initrd.
    fn place_initrd(&self) -> Result<Range<u64>, ImageError> {
        let Some(bytes) = &self.initrd else { return Ok(0..0) };
        let len = bytes.len() as u64;
        if len == 0 {
            return Err(ImageError::InitrdEmpty);
        }
        let floor = self.kernel.memory().end.next_multiple_of(PAGE_SIZE);
        let end = self.low_top().min(self.kernel.initrd_addr_max().saturating_add(1)) & !(PAGE_SIZE - 1);
        match end.checked_sub(len).map(|start| start & !(PAGE_SIZE - 1)) {
            Some(start) if start >= floor => Ok(start..start + len),
            _ => {
                let most = layout::HOLE_START.min(self.kernel.initrd_addr_max().saturating_add(1));
                let advice = match end < most && floor.saturating_add(len) <= most {
                    true => " or more `memory`",
                    false => {
                        ". More memory does not help: the kernel, or the device gap, leaves no more room for it"
                    }
                };
                Err(ImageError::InitrdFit { len, start: floor, end, advice })
            }
        }
    }

    fn entry(&self) -> Entry {
        match (self.kernel, &self.guest) {
            (Kernel::BzImage(k), _) => Entry::Long(k.pref_address + ENTRY_64),
            (Kernel::Elf(k), Guest::Plain) => k.pvh_entry.map_or(Entry::Long(k.entry), Entry::Pvh),
            (Kernel::Elf(k), Guest::Snp(_)) => Entry::Long(k.entry),
        }
    }
}

/// The parts of `ram` that no record covers, ascending.
fn gaps(ram: &[Range<u64>], records: &[Record]) -> Vec<Range<u64>> {
    let mut covered: Vec<Range<u64>> = records.iter().map(|r| r.gpa..r.end()).collect();
    covered.sort_by_key(|r| r.start);
    let mut gaps = Vec::new();
    for range in ram {
        let mut at = range.start;
        for used in covered.iter().filter(|u| u.start < range.end && u.end > range.start) {
            if used.start > at {
                gaps.push(at..used.start);
            }
            at = at.max(used.end);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
    }
    gaps
}
