// SPDX-License-Identifier: Apache-2.0
//! The two views of guest memory: the C-bit is an ordinary address bit of the underlying VM.
//!
//! Each guest page appears at two guest-physical addresses: `gpa`, the shared view, and `gpa | C`, the
//! private view. With *single* backing both show the same memory. With *split* backing each has its own, so
//! that an access through the wrong view finds other data; *strict* ([`super::strict`]) makes it an error at
//! once.
//!
//! On hardware some accesses are private although no C-bit is in the address, because paging is off, or
//! because page walks and instruction fetches always are. Split backing has to bend in two places for them:
//! - the first MiB, where vCPUs start without paging, shows private memory in both views, always, and to the
//!   monitor's devices as well;
//! - until the kernel proper runs (the decompressor loads CR3 without the C-bit), the shared view of a page
//!   that is private shows its private memory too. [`Views::end_alias`] ends that.

#![allow(unsafe_code, reason = "memory slots hand the kernel addresses in this process")]

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::RwLockReadGuard;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use snp_model::memory::GuestMemory;
use snp_model::memory::OutsideRam;
use snp_model::memory::View;
use snp_model::rmp::PageStates;

use super::options::Backing;
use super::options::EmulatedOptions;
use super::region::BackedRegion;
use super::region::LOW_END;
use super::strict::Gate;
use crate::lock::lock;
use crate::platform::error::CallError;
use crate::platform::kvm::KvmVm;
use crate::platform::mapping::Mapping;
use crate::platform::memory::MemorySlot;

/// Most memory slots at a time: each change of a page rebuilds them while the views are aliased, and KVM has
/// 32,764. A guest that alternates shared and private pages needs one for each; Linux' decompressor needs a
/// few.
const SLOTS_MAX: usize = 8192;

/// A memory slot of the underlying VM.
#[derive(Clone, Copy, Hash, PartialEq, Eq)]
struct Slot {
    gpa: u64,
    host: u64,
    len: u64,
}

impl Slot {
    /// The shared side of what the monitor asked for.
    fn of(slot: &MemorySlot) -> Self {
        Slot { gpa: slot.gpa, host: slot.shared.host_address(), len: slot.shared.len() }
    }
}

#[derive(Default)]
struct Slots {
    /// By slot number; `None` is free.
    used: Vec<Option<Slot>>,
    /// The free ones of these.
    free: Vec<usize>,
    /// The shared view's slots are rebuilt from the page states while this holds.
    aliased: bool,
}

/// Guest memory in its two views.
pub struct Views {
    options: EmulatedOptions,
    c_mask: u64,
    regions: RwLock<Vec<BackedRegion>>,
    /// Memory without a private side, such as a device's buffer: not RAM, and an access with the C-bit is a
    /// fault.
    shared_only: RwLock<Vec<MemorySlot>>,
    slots: Mutex<Slots>,
    gate: Gate,
    /// A vCPU looks for the page that it must not touch; the slots are not whole.
    searching: AtomicBool,
}

impl Views {
    /// No memory yet.
    pub fn new(options: EmulatedOptions, c_bit: u8) -> Self {
        Views {
            options,
            c_mask: 1 << c_bit,
            regions: RwLock::default(),
            shared_only: RwLock::default(),
            slots: Mutex::default(),
            gate: Gate::default(),
            searching: AtomicBool::new(false),
        }
    }

    fn regions(&self) -> RwLockReadGuard<'_, Vec<BackedRegion>> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared_only(&self) -> Vec<Slot> {
        self.shared_only.read().unwrap_or_else(PoisonError::into_inner).iter().map(Slot::of).collect()
    }

    /// One memory backs both views.
    pub fn single(&self) -> bool {
        self.options.backing == Backing::Single
    }

    /// Adds memory that the guest can only see as shared: KVM's slot without a guest_memfd.
    pub fn add_shared_only(&self, vm: &KvmVm, slot: MemorySlot) -> Result<(), CallError> {
        let mut slots = lock(&self.slots);
        let mut memory = self.shared_only.write().unwrap_or_else(PoisonError::into_inner);
        slots.insert(vm, Slot::of(&slot))?;
        memory.push(slot);
        Ok(())
    }

    /// Takes memory away that was added by [`Views::add_shared_only`] with this slot number.
    pub fn remove_shared_only(&self, vm: &KvmVm, number: u32) -> Result<(), CallError> {
        let mut slots = lock(&self.slots);
        let mut memory = self.shared_only.write().unwrap_or_else(PoisonError::into_inner);
        let at = memory.iter().position(|slot| slot.slot == number);
        let at = at.ok_or(CallError::errno("KVM_SET_USER_MEMORY_REGION2 (delete)", libc::EINVAL))?;
        let gone = Slot::of(&memory[at]);
        slots.retain(vm, |slot| *slot != gone)?;
        memory.swap_remove(at);
        Ok(())
    }

    /// Adds a region of RAM in both views.
    pub fn add(&self, vm: &KvmVm, slot: MemorySlot) -> Result<(), CallError> {
        let fail = |source| CallError { call: "mapping the private side of guest RAM", source };
        let (len, gpa) = (slot.shared.len(), slot.gpa);
        if gpa.checked_add(len).is_none_or(|end| end > self.c_mask) {
            return Err(CallError::errno(
                "guest RAM reaches the C-bit of the emulated platform",
                libc::EINVAL,
            ));
        }
        let (private, memfd) = match slot.private {
            Some((memfd, offset)) if !self.single() => {
                // What the monitor writes to shared memory below 1 MiB must be where the guest looks for it.
                let low = LOW_END.saturating_sub(gpa).min(len);
                if low > 0 {
                    slot.shared.overlay(0, low, &memfd, offset).map_err(fail)?;
                }
                (Arc::new(Mapping::file(&memfd, offset, len).map_err(fail)?), Some((memfd, offset)))
            }
            other => (Arc::clone(&slot.shared), other),
        };
        let private_host = private.host_address();
        let region = BackedRegion { gpa, shared: slot.shared, private, memfd };
        if self.options.strict {
            self.gate.add(&region).map_err(protecting)?;
        }
        let mut slots = lock(&self.slots);
        let mut wanted = self.shared_view(&region, None);
        wanted.push(Slot { gpa: gpa | self.c_mask, host: private_host, len });
        self.regions.write().unwrap_or_else(PoisonError::into_inner).push(region);
        wanted.into_iter().try_for_each(|slot| slots.insert(vm, slot))
    }

    /// Slots of the shared view of one region. `states` is given while private pages show their private
    /// memory.
    fn shared_view(&self, region: &BackedRegion, states: Option<&PageStates>) -> Vec<Slot> {
        let mut slots = Vec::new();
        let mut push =
            |range: Range<u64>, mapping: &Mapping| Slot::push(&mut slots, region, range, mapping, 0);
        let all = region.range();
        let middle = all.start.max(LOW_END).min(all.end);
        push(all.start..middle, &region.private);
        match states {
            None => push(middle..all.end, &region.shared),
            Some(states) => states.for_each_run(|run, state| {
                let part = run.start.max(middle)..run.end.min(all.end);
                push(part, if state.private() { &region.private } else { &region.shared });
            }),
        }
        slots
    }

    /// From now on private pages show their private memory in the shared view as well, until
    /// [`Views::end_alias`].
    pub fn begin_alias(&self, vm: &KvmVm, states: &PageStates) -> Result<(), CallError> {
        if self.single() {
            return Ok(());
        }
        lock(&self.slots).aliased = true;
        self.rebuild(vm, states)
    }

    /// Gives each view its own memory, for good. Returns whether there was an alias.
    pub fn end_alias(&self, vm: &KvmVm, states: &PageStates) -> Result<bool, CallError> {
        let was = std::mem::take(&mut lock(&self.slots).aliased);
        if was {
            self.rebuild(vm, states)?;
        }
        Ok(was)
    }

    /// Makes the underlying VM's slots what they should be. No vCPU may be running.
    fn rebuild(&self, vm: &KvmVm, states: &PageStates) -> Result<(), CallError> {
        let mut slots = lock(&self.slots);
        let regions = self.regions();
        let states = slots.aliased.then_some(states);
        let mut wanted: Vec<Slot> = regions.iter().flat_map(|r| self.shared_view(r, states)).collect();
        wanted.extend(self.shared_only());
        slots.replace(vm, &wanted, |slot| slot.gpa & self.c_mask != 0)
    }

    /// Follows a change of the private attribute: strict runs take access away from the stale side, and an
    /// alias is redrawn.
    pub fn attribute_changed(
        &self,
        vm: &KvmVm,
        states: &PageStates,
        range: Range<u64>,
        private: bool,
    ) -> Result<(), CallError> {
        if self.options.strict {
            self.gate.attribute_changed(&self.regions(), states, &range, private).map_err(protecting)?;
        }
        let aliased = lock(&self.slots).aliased;
        if aliased { self.rebuild(vm, states) } else { Ok(()) }
    }

    /// Follows `PVALIDATE`, or the launch of pages.
    pub fn validation_changed(
        &self,
        states: &PageStates,
        range: Range<u64>,
        validated: bool,
    ) -> Result<(), CallError> {
        match (self.options.strict, validated) {
            (false, _) => Ok(()),
            (true, true) => self.gate.validated(&self.regions(), states, range),
            (true, false) => self.gate.rescinded(&self.regions(), &range),
        }
        .map_err(protecting)
    }

    /// See [`Gate::opened`].
    pub fn opened(&self) -> u64 {
        self.gate.opened()
    }

    /// Opens what was validated, after something ran into a closed page; see [`Gate::open`].
    pub fn open(&self, states: &PageStates, seen: u64) -> Result<bool, CallError> {
        self.gate.open(&self.regions(), states, seen).map_err(protecting)
    }

    /// Whether a vCPU looks for the page that it must not touch. What others find in memory then means
    /// nothing.
    pub fn searching(&self) -> bool {
        self.searching.load(Ordering::Acquire)
    }

    /// Leaves only pages that the guest may use in the underlying VM, for good: an access to another one
    /// shows its address, as one to device memory. False if another vCPU has done that.
    pub fn show_allowed_only(&self, vm: &KvmVm, states: &PageStates) -> Result<bool, CallError> {
        if self.searching.swap(true, Ordering::AcqRel) {
            return Ok(false);
        }
        let mut slots = lock(&self.slots);
        let mut wanted = Vec::new();
        for region in self.regions().iter() {
            states.for_each_run_in(region.range(), |run, state| {
                let (low, high) = (run.start..run.end.min(LOW_END), run.start.max(LOW_END)..run.end);
                if state.usable() || !state.private() {
                    Slot::push(&mut wanted, region, low.clone(), &region.private, 0);
                    Slot::push(&mut wanted, region, low, &region.private, self.c_mask);
                }
                if state.usable() {
                    Slot::push(&mut wanted, region, high.clone(), &region.private, self.c_mask);
                }
                if !state.private() {
                    Slot::push(&mut wanted, region, high, &region.shared, 0);
                } else if slots.aliased && state.usable() {
                    Slot::push(&mut wanted, region, high, &region.private, 0);
                }
            });
        }
        // Last, so that none of RAM's slots continues one that can be taken away.
        wanted.extend(self.shared_only());
        slots.replace(vm, &wanted, |_| false)?;
        Ok(true)
    }

    /// Whether the shared view shows private memory now.
    pub fn aliased(&self) -> bool {
        lock(&self.slots).aliased
    }

    /// Splits a range at region borders; all or nothing.
    fn with(
        &self,
        gpa: u64,
        len: u64,
        view: View,
        mut f: impl FnMut(Side<'_>, u64, Range<usize>) -> io::Result<()>,
    ) -> Result<(), OutsideRam> {
        let outside = OutsideRam { gpa, len };
        let regions = self.regions();
        let end = gpa.checked_add(len).ok_or(outside)?;
        let covered: u64 =
            regions.iter().map(|r| r.range().end.min(end).saturating_sub(r.range().start.max(gpa))).sum();
        if covered != len {
            return Err(outside);
        }
        for region in regions.iter() {
            let all = region.range();
            // Cut at the end of the first MiB as well: the views differ above it only.
            for part in [all.start..all.end.min(LOW_END), all.start.max(LOW_END)..all.end] {
                let (start, stop) = (part.start.max(gpa), part.end.min(end));
                if start >= stop {
                    continue;
                }
                let low = start < LOW_END;
                let side = match &region.memfd {
                    Some((memfd, offset)) if self.options.strict && (low || view == View::Private) => {
                        Side::File(memfd, *offset)
                    }
                    _ if low || view == View::Private => Side::Mapping(&region.private),
                    _ => Side::Mapping(&region.shared),
                };
                let buffer = (start - gpa) as usize..(stop - gpa) as usize;
                f(side, start - all.start, buffer).map_err(|_| outside)?;
            }
        }
        Ok(())
    }
}

/// How the monitor reaches one side of a page.
enum Side<'a> {
    /// Through its mapping.
    Mapping(&'a Mapping),
    /// Through the file behind it, at an offset: firmware and RMP reach private pages that are closed to the
    /// guest.
    File(&'a OwnedFd, u64),
}

impl GuestMemory for Views {
    fn read(&self, gpa: u64, view: View, buf: &mut [u8]) -> Result<(), OutsideRam> {
        let strict = self.options.strict;
        self.with(gpa, buf.len() as u64, view, |side, offset, range| {
            let buf = buf.get_mut(range).unwrap_or_default();
            match side {
                Side::File(file, start) => read_all(file, start + offset, buf),
                // Another vCPU may hide the page between the model's check and this access.
                Side::Mapping(mapping) if strict => mapping.try_read(offset, buf),
                Side::Mapping(mapping) => mapping.read(offset, buf).map_err(io::Error::other),
            }
        })
    }

    fn write(&self, gpa: u64, view: View, bytes: &[u8]) -> Result<(), OutsideRam> {
        let strict = self.options.strict;
        self.with(gpa, bytes.len() as u64, view, |side, offset, range| {
            let data = bytes.get(range).unwrap_or_default();
            match side {
                Side::File(file, start) => write_all(file, start + offset, data),
                Side::Mapping(mapping) if strict => mapping.try_write(offset, data),
                Side::Mapping(mapping) => mapping.write(offset, data).map_err(io::Error::other),
            }
        })
    }
}

fn read_all(file: &OwnedFd, mut at: u64, mut buf: &mut [u8]) -> io::Result<()> {
    while !buf.is_empty() {
        match rustix::io::pread(file, &mut *buf, at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            done => (buf, at) = (buf.get_mut(done..).unwrap_or_default(), at + done as u64),
        }
    }
    Ok(())
}

fn write_all(file: &OwnedFd, mut at: u64, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::pwrite(file, data, at)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            done => (data, at) = (data.get(done..).unwrap_or_default(), at + done as u64),
        }
    }
    Ok(())
}

fn protecting(source: io::Error) -> CallError {
    let call = match source.raw_os_error() {
        // Each run of pages in one state is a mapping of this process.
        Some(libc::ENOMEM) => {
            "mprotect of guest RAM (strict; the guest's shared and private pages alternate so often that the host's \
             vm.max_map_count does not suffice)"
        }
        _ => "mprotect of guest RAM (strict)",
    };
    CallError { call, source }
}

impl Slot {
    /// Adds a slot that shows `range` of `region` at its address, with the bits `mask` set; it may continue
    /// the last one.
    fn push(slots: &mut Vec<Slot>, region: &BackedRegion, range: Range<u64>, mapping: &Mapping, mask: u64) {
        if range.is_empty() {
            return;
        }
        let (gpa, len) = (range.start | mask, range.end - range.start);
        let host = mapping.host_address() + (range.start - region.gpa);
        let continued =
            slots.iter_mut().rev().take(3).find(|s| s.gpa + s.len == gpa && s.host + s.len == host);
        match continued {
            Some(slot) => slot.len += len,
            None => slots.push(Slot { gpa, host, len }),
        }
    }
}

impl Slots {
    fn insert(&mut self, vm: &KvmVm, slot: Slot) -> Result<(), CallError> {
        let free = self.free.last().copied();
        let number = free.unwrap_or(self.used.len());
        // SAFETY: the regions keep their mappings as long as this object, which lives as long as the VM.
        unsafe { vm.set_slot(number as u32, slot.gpa, slot.host, slot.len) }?;
        match self.free.pop().and_then(|i| self.used.get_mut(i)) {
            Some(place) => *place = Some(slot),
            None => self.used.push(Some(slot)),
        }
        Ok(())
    }

    /// Makes the slots those of `wanted`, and the others that are to be kept.
    fn replace(
        &mut self,
        vm: &KvmVm,
        wanted: &[Slot],
        keep: impl Fn(&Slot) -> bool,
    ) -> Result<(), CallError> {
        // Looked at before anything is deleted, so that the guest's memory is whole or the run is over.
        if wanted.len() > SLOTS_MAX {
            let call = "showing the guest its memory: its shared and private pages alternate too often for KVM's memory slots";
            return Err(CallError::errno(call, libc::EINVAL));
        }
        let set: HashSet<Slot> = wanted.iter().copied().collect();
        self.retain(vm, |slot| keep(slot) || set.contains(slot))?;
        let there: HashSet<Slot> = self.used.iter().flatten().copied().collect();
        wanted.iter().filter(|slot| !there.contains(slot)).try_for_each(|slot| self.insert(vm, *slot))
    }

    fn retain(&mut self, vm: &KvmVm, keep: impl Fn(&Slot) -> bool) -> Result<(), CallError> {
        for (number, place) in self.used.iter_mut().enumerate() {
            if let Some(slot) = *place
                && !keep(&slot)
            {
                // SAFETY: length 0 deletes the slot; the kernel no longer refers to the memory.
                unsafe { vm.set_slot(number as u32, slot.gpa, slot.host, 0) }?;
                *place = None;
                self.free.push(number);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "views_test.rs"]
mod views_test;
