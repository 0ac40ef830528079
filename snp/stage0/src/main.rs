// SPDX-License-Identifier: Apache-2.0
//! stage0: the measured shim that prepares an SEV-SNP guest for a directly booted Linux kernel.
//!
//! The launch measures this program, its inputs and nothing else, so the launch takes the same few pages for every kernel and
//! every memory size. In the guest it validates RAM, takes kernel, initrd, command line, boot parameters and ACPI tables over
//! from memory that the host can write to, and enters the kernel only if each of them has the hash in the measured inputs.
//! It trusts the CPU and the measured inputs; everything else is the host's word. A refusal ends the guest with a code
//! (`reason.rs`). It executes no CPUID, no port access and no instruction that needs a #VC handler, since it has none.
//!
//! Files without hardware access are also compiled into crate `snp`, where they are tested.
#![no_std]
#![no_main]

mod cpu;
mod e820;
mod efi;
mod entry;
mod ghcb;
mod inputs;
mod layout;
mod paging;
mod reason;
mod sha384;
mod validate;

use cpu::fail;
use inputs::Inputs;
use inputs::Item;
use inputs::STAGING;
use inputs::Span;
use layout::PAGE;
use paging::Tables;
use reason::Reason;

/// Runs on the first tables: makes scratch memory usable and builds the final tables in it.
#[unsafe(no_mangle)]
extern "C" fn stage0_prepare(c_mask: u64) {
    for page in (layout::WORK..layout::WORK_END).step_by(PAGE as usize) {
        validate::page(page);
    }
    cpu::zero(layout::WORK, layout::WORK_END - layout::WORK);
    Tables::build(c_mask);
}

/// Runs on the final tables. `leaf_ebx` is EBX of CPUID leaf 0x8000001F.
#[unsafe(no_mangle)]
extern "C" fn stage0_main(c_mask: u64, leaf_ebx: u32) -> ! {
    match run(Tables::built(c_mask), leaf_ebx) {
        Ok(never) => match never {},
        Err(reason) => fail(reason),
    }
}

fn run(tables: Tables, leaf_ebx: u32) -> Result<core::convert::Infallible, Reason> {
    // SAFETY: the inputs page is a launch page, private and never written.
    let inputs = Inputs(unsafe { cpu::bytes(layout::INPUTS, PAGE) });
    // SAFETY: the address of a symbol of the linker script, never read.
    let image_end = unsafe { &raw const entry::stage0_end } as u64;
    inputs.check(image_end)?;
    // COHERENCY_SFW_NO: the CPU does not need the cache-line eviction of CVE-2025-38560.
    let ram = validate::Ram { tables, evict: leaf_ebx >> 31 == 0 };
    for span in inputs.spans(inputs.to_validate()) {
        let mut at = span.start;
        while let Some(piece) = inputs.next_piece(span, at) {
            ram.validate(piece)?;
            at = piece.end;
        }
    }
    clear_low_memory(inputs);
    for item in inputs.items() {
        take_over(&item)?;
    }
    // SAFETY: boot_params is part of an item, private by now, and changes only after this borrow.
    let boot_params = unsafe { cpu::bytes(inputs.boot_params(), PAGE) };
    e820::check(boot_params, inputs)?;
    // SAFETY: the walk asks for bytes of items only, which are private by now and do not change during it.
    e820::check_setup_data(boot_params, inputs, |at| unsafe { cpu::bytes(at, e820::SETUP_DATA_LEN) })?;
    if inputs.lazy() {
        announce_unaccepted(inputs)?;
    }
    ghcb::register();
    for span in inputs.spans(STAGING).skip(1) {
        ghcb::make_private(span);
        ram.validate(span)?;
    }
    ghcb::make_page_private(layout::GHCB);
    ram.validate(Span { start: layout::GHCB, end: layout::GHCB + PAGE })?;
    cpu::zero(layout::GHCB, PAGE);
    // SAFETY: the kernel at the entry point is the measured one, and the tables map it, boot_params and itself.
    unsafe { entry::stage0_enter(inputs.entry(), inputs.boot_params()) }
}

/// Leaves the rest of RAM to the kernel, by tables in low memory, which is zero but for the items.
fn announce_unaccepted(inputs: Inputs<'_>) -> Result<(), Reason> {
    // SAFETY: three ranges of validated private memory, apart from each other and from all else: no item may lie in the first
    // two, and boot_params is part of an item that nothing else refers to.
    let (tables, table, boot_params) = unsafe {
        (
            cpu::bytes_mut(layout::EFI_TABLES, layout::EFI_TABLES_END - layout::EFI_TABLES),
            cpu::bytes_mut(layout::UNACCEPTED, layout::UNACCEPTED_END - layout::UNACCEPTED),
            cpu::bytes_mut(inputs.boot_params(), PAGE),
        )
    };
    efi::unaccepted(table, inputs)?;
    efi::announce(tables, boot_params, inputs)
}

/// Linux reads BIOS variables in the first page, and new private memory holds what the host wants it to hold.
fn clear_low_memory(inputs: Inputs<'_>) {
    let low = Span { start: 0, end: 0x10_0000 };
    let mut at = 0;
    while let Some(piece) = inputs.next_piece(low, at) {
        cpu::zero(piece.start, piece.end - piece.start);
        at = piece.end;
    }
}

/// Copies an item into private memory and compares the hash of the copy: what the host does to the source afterwards, or
/// did in between, is of no effect.
fn take_over(item: &Item) -> Result<(), Reason> {
    cpu::copy(paging::shared(item.source), item.target, item.len);
    cpu::zero(item.target + item.len, item.mem_len - item.len);
    // SAFETY: the target is validated private memory outside of everything else, as `Inputs::check` made sure.
    let kept = unsafe { cpu::bytes(item.target, item.len) };
    if sha384::sha384(kept) == item.hash { Ok(()) } else { Err(item.kind.mismatch()) }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    fail(Reason::Internal)
}
