// SPDX-License-Identifier: Apache-2.0
//! The stage0 variant of a direct boot: the launch takes the shim and a page of inputs, everything else is
//! staged.
//!
//! What would be NORMAL pages of a plan that launches all RAM becomes bytes in memory that the host may write
//! to, with their SHA-384 in the measured inputs; stage0 moves them to the same addresses inside the guest.
//! The plan's size depends neither on the files nor on the memory, and nothing in it depends on the position
//! of the C-bit.

use std::ops::Range;

use super::entry;
use super::error::ImageError;
use crate::board::layout;
use crate::plan::Bytes;
use crate::plan::LaunchPlan;
use crate::plan::PAGE_SIZE;
use crate::plan::PageType;
use crate::plan::Record;
use crate::stage0::BUILT;
use crate::stage0::InputsPage;
use crate::stage0::e820;
use crate::stage0::efi;
use crate::stage0::inputs::Inputs;
use crate::stage0::inputs::Item;
use crate::stage0::inputs::Kind;
use crate::stage0::item_hash;
use crate::stage0::layout as stage0;
use crate::stage0::layout::LARGE;
use crate::stage0::reason::Reason;

/// What enters a guest through stage0.
#[derive(Clone, Debug)]
pub struct StagedBoot {
    /// Bytes to be placed in shared memory before the run: guest-physical address and contents. Not measured;
    /// stage0 compares their hashes.
    pub staging: Vec<(u64, Bytes)>,
    /// Memory that is shared at launch, ascending: the GHCB page and the staging ranges. All other RAM is
    /// private.
    pub shared: Vec<Range<u64>>,
    /// What the measured inputs page says.
    pub inputs: InputsPage,
    /// Name of each item of the inputs, in the same order.
    pub names: Vec<String>,
}

impl StagedBoot {
    /// What binds which bytes to the launch digest, for people.
    pub fn explain(&self) -> String {
        let mut text = String::from(
            "Measured by the launch: the pages above with a hash of their contents, that is stage0, its inputs and the vCPUs'\n\
             registers. Of the other pages the launch measures address and type: the CPUID page is checked by the firmware,\n\
             the secrets page is written by it.\n\n\
             Measured through stage0's inputs: stage0 copies these bytes into private memory and ends the guest unless the\n\
             copy has this SHA-384.\n",
        );
        for (item, name) in self.inputs.items.iter().zip(&self.names) {
            let hash = hex::encode(item.hash);
            text.push_str(&format!("  {:#012x} {:>10} bytes  {name:<28} {hash}\n", item.target, item.len));
        }
        let pages = |ranges: &[Range<u64>]| ranges.iter().map(|r| (r.end - r.start) >> 20).sum::<u64>();
        let ram = pages(&self.inputs.ram);
        text.push_str(&match &self.inputs.accept {
            None => format!("Validated by stage0 before the kernel runs: all RAM, {ram} MiB.\n"),
            Some(accept) => format!(
                "Validated by stage0 before the kernel runs: {} of {ram} MiB; the kernel accepts the rest when it needs it.\n",
                pages(accept)
            ),
        });
        text.push_str(&format!(
            "\nControlled by the host: the contents of the CPUID page as far as the firmware allows, all shared memory ({} MiB of\n\
             staging memory until stage0 takes it back), every answer to a request of the guest, all device input, time, and\n\
             whether the guest runs at all.\n",
            pages(&self.shared)
        ));
        text
    }
}

/// A boot that is laid out but not yet split into launch pages and staged bytes.
pub(super) struct Layout<'a> {
    /// What memory holds before the kernel runs.
    pub contents: Vec<Record>,
    /// RAM, ascending.
    pub ram: &'a [Range<u64>],
    /// Where the kernel works.
    pub kernel: Range<u64>,
    /// The kernel's first instruction.
    pub entry: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The CPUID page.
    pub cpuid: Vec<u8>,
    /// For lazy acceptance, what stage0 validates.
    pub accept: Option<Vec<Range<u64>>>,
}

/// Lengthens the kernel's records over the memory behind them that must be zero. Nothing else clears it:
/// memory that stage0 has validated holds what the host left there.
pub(super) fn add_zeros(contents: &mut Vec<Record>, zeros: &[Range<u64>]) {
    for zero in zeros {
        let start = zero.start & !(PAGE_SIZE - 1);
        // The page of the next record has zeros up to that record's contents.
        let next = contents.iter().map(|r| r.gpa).filter(|gpa| *gpa > start).min().unwrap_or(u64::MAX);
        let end = zero.end.next_multiple_of(PAGE_SIZE).min(next);
        let before = contents.iter_mut().filter(|r| r.gpa <= start && start <= r.end());
        match before.max_by_key(|r| r.gpa) {
            Some(record) => record.len = record.len.max(end - record.gpa),
            None => {
                let zero = Record::new(start, PageType::Normal, vec![0], "kernel");
                contents.push(Record { len: end - start, ..zero });
            }
        }
    }
}

/// Writes the tables of lazy acceptance as stage0 will, to find out now whether it can.
fn check_lazy(boot_params: &[u8], inputs: Inputs<'_>) -> Result<(), Reason> {
    let room = |start: u64, end: u64| vec![0; (end - start) as usize];
    efi::unaccepted(&mut room(stage0::UNACCEPTED, stage0::UNACCEPTED_END), inputs)?;
    let mut tables = room(stage0::EFI_TABLES, stage0::EFI_TABLES_END);
    efi::announce(&mut tables, &mut boot_params.to_vec(), inputs)
}

impl Layout<'_> {
    /// The plan, and what goes with it.
    pub fn build(self) -> Result<(LaunchPlan, StagedBoot), ImageError> {
        let contents: Vec<&Record> =
            self.contents.iter().filter(|r| !r.contents.as_slice().is_empty()).collect();
        let low_top = self.ram.first().map_or(0, |r| r.end);
        let places = place(&contents, low_top)?;
        let items: Vec<Item> =
            contents.iter().zip(&places).map(|(record, source)| self.item(record, *source)).collect();

        let image_end = stage0::IMAGE + BUILT.image.len() as u64;
        let ghcb = stage0::GHCB..stage0::GHCB + PAGE_SIZE;
        let shared: Vec<Range<u64>> = std::iter::once(ghcb).chain(staging_ranges(&items)).collect();
        let inputs = InputsPage {
            entry: self.entry,
            boot_params: layout::BOOT_PARAMS,
            ram: self.ram.to_vec(),
            excluded: vec![stage0::CPUID..stage0::SECRETS + PAGE_SIZE, stage0::INPUTS..image_end],
            staging: shared.clone(),
            accept: self.accept.map(|accept| merge(accept.into_iter().chain(shared.clone()), self.ram)),
            items,
        };
        let page = inputs.encode()?;
        Inputs(&page).check(image_end).map_err(|reason| ImageError::Stage0(reason.words()))?;
        let boot_params = contents.iter().find(|r| r.gpa == layout::BOOT_PARAMS);
        let map = boot_params.map_or(&[][..], |r| r.contents.as_slice());
        e820::check(map, Inputs(&page)).map_err(|reason| ImageError::Stage0(reason.words()))?;
        let header = |at: u64| match contents.iter().find(|r| r.gpa <= at && at < r.end()) {
            Some(r) => r.contents.as_slice().get((at - r.gpa) as usize..).unwrap_or_default(),
            None => &[],
        };
        e820::check_setup_data(map, Inputs(&page), header)
            .map_err(|reason| ImageError::Stage0(reason.words()))?;
        if Inputs(&page).lazy() {
            check_lazy(map, Inputs(&page)).map_err(|reason| ImageError::Stage0(reason.words()))?;
        }

        let records = vec![
            Record::new(stage0::IMAGE, PageType::Normal, BUILT.image.to_vec(), "stage0"),
            Record::new(stage0::INPUTS, PageType::Normal, page, "stage0 inputs"),
            Record::new(stage0::CPUID, PageType::Cpuid, self.cpuid, "CPUID page"),
            Record::empty(stage0::SECRETS, PAGE_SIZE, PageType::Secrets, "secrets page"),
        ];
        let shim = StagedBoot {
            staging: contents.iter().zip(&places).map(|(r, source)| (*source, r.contents.clone())).collect(),
            shared,
            inputs,
            names: contents.iter().map(|r| r.name.to_string()).collect(),
        };
        let vcpus = entry::stage0_vcpus(self.vcpus, BUILT.entry, BUILT.park);
        Ok((LaunchPlan { records, vcpus }, shim))
    }

    fn item(&self, record: &Record, source: u64) -> Item {
        let bytes = record.contents.as_slice();
        let kind = match record.gpa {
            layout::CMDLINE => Kind::Cmdline,
            layout::ACPI => Kind::Acpi,
            gpa if gpa < layout::HIGH_START => Kind::BootData,
            gpa if self.kernel.contains(&gpa) => Kind::Kernel,
            _ => Kind::Initrd,
        };
        let len = bytes.len() as u64;
        Item { kind, source, target: record.gpa, len, mem_len: record.len, hash: item_hash(bytes) }
    }
}

/// Finds room for the bytes of each record, from 2 MiB up, in low RAM that holds none of them in the end.
/// Records come in the order of their sizes, the largest first, each into the lowest gap that takes it;
/// results are in the order of `contents`.
fn place(contents: &[&Record], low_top: u64) -> Result<Vec<u64>, ImageError> {
    let mut used: Vec<Range<u64>> = contents.iter().map(|r| r.gpa..r.end()).collect();
    used.sort_by_key(|r| r.start);
    let mut gaps: Vec<Range<u64>> = Vec::new();
    let mut at = LARGE;
    for range in used.iter().chain([&(low_top..u64::MAX)]) {
        let end = range.start & !(LARGE - 1);
        if at < end {
            gaps.push(at..end);
        }
        at = at.max(range.end.checked_next_multiple_of(LARGE).unwrap_or(u64::MAX));
    }
    let mut order: Vec<usize> = (0..contents.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(contents[*i].len));
    let mut places = vec![0; contents.len()];
    for i in order {
        let len = contents[i].len;
        let gap = gaps
            .iter_mut()
            .find(|gap| gap.end - gap.start >= len)
            .ok_or_else(|| ImageError::StagingFit { name: contents[i].name.to_string(), len })?;
        places[i] = gap.start;
        gap.start += len;
    }
    Ok(places)
}

/// The 2 MiB ranges that hold the sources of `items`.
fn staging_ranges(items: &[Item]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = items
        .iter()
        .map(|item| (item.source & !(LARGE - 1))..(item.source + item.len).next_multiple_of(LARGE))
        .collect();
    ranges.sort_by_key(|r| r.start);
    ranges.dedup_by(|next, last| {
        let joined = next.start <= last.end;
        if joined {
            last.end = last.end.max(next.end);
        }
        joined
    });
    ranges
}

/// The union of `ranges`, rounded out to 2 MiB and cut to RAM, ascending.
fn merge(ranges: impl IntoIterator<Item = Range<u64>>, ram: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut cut: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let (start, end) = (range.start & !(LARGE - 1), range.end.next_multiple_of(LARGE));
        cut.extend(ram.iter().map(|r| start.max(r.start)..end.min(r.end)).filter(|r| r.start < r.end));
    }
    cut.sort_by_key(|r| r.start);
    cut.dedup_by(|next, last| {
        let joined = next.start <= last.end;
        if joined {
            last.end = last.end.max(next.end);
        }
        joined
    });
    cut
}
