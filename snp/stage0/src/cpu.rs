// SPDX-License-Identifier: Apache-2.0
//! The instructions that stage0 needs and Rust does not have, and access to memory by address.
//!
//! Each SNP instruction leaves its address and kind in the section `.sites`, so that the plan can tell an emulated platform
//! where they are. Kinds: 0 VMGEXIT, 1 PVALIDATE.

use core::arch::asm;
use core::arch::global_asm;

use crate::reason::Reason;

const GHCB_MSR: u32 = 0xc001_0130;

/// Ends the guest.
pub fn fail(reason: Reason) -> ! {
    loop {
        msr_protocol(reason.msr());
    }
}

/// For the entry code: ends the guest with the reason whose number is `code`.
#[unsafe(no_mangle)]
extern "C" fn stage0_fail(code: u32) -> ! {
    loop {
        msr_protocol(Reason::Internal.msr() & !0xff_0000 | u64::from(code & 0xff) << 16);
    }
}

/// One exchange of the GHCB MSR protocol: writes `request`, exits, returns the response.
pub fn msr_protocol(request: u64) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the GHCB MSR is the guest's own; the exit changes nothing but that MSR, and shared memory that the compiler is
    // told about by the absence of `nomem`.
    unsafe {
        asm!(
            "wrmsr",
            ".pushsection .sites, \"\"",
            ".long 2f, 0",
            ".popsection",
            "2: .byte 0xf3, 0x0f, 0x01, 0xd9",
            "rdmsr",
            in("ecx") GHCB_MSR,
            inout("eax") request as u32 => low,
            inout("edx") (request >> 32) as u32 => high,
            options(nostack),
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// PVALIDATE of the page at virtual address `address`: the code in EAX, and whether nothing changed (carry flag).
pub fn pvalidate(address: u64, large: bool) -> (u32, bool) {
    let (code, carry): (u64, u8);
    // SAFETY: validating a page gives the guest access to memory that it could not use before; no live data is in it, since
    // each page is validated once.
    unsafe {
        asm!(
            ".pushsection .sites, \"\"",
            ".long 2f, 1",
            ".popsection",
            "2: .byte 0xf2, 0x0f, 0x01, 0xff",
            "setc {carry}",
            carry = out(reg_byte) carry,
            inout("rax") address => code,
            in("rcx") u64::from(large),
            in("rdx") 1u64,
            options(nostack),
        );
    }
    (code as u32, carry != 0)
}

/// Loads the page-table base, which drops every cached translation.
pub fn load_tables(base: u64) {
    // SAFETY: every table that stage0 loads maps its own code, stack and inputs to themselves.
    unsafe { asm!("mov cr3, {}", in(reg) base, options(nostack)) }
}

/// Writes eight bytes at an address that is mapped and validated, and that holds no Rust object.
pub fn write(address: u64, value: u64) {
    // SAFETY: callers pass addresses of checked guest memory outside of stage0's image.
    unsafe { core::ptr::write_volatile(address as *mut u64, value) }
}

/// Reads eight bytes, once.
pub fn read(address: u64) -> u64 {
    // SAFETY: as for `write`; reading plain memory has no effect.
    unsafe { core::ptr::read_volatile(address as *const u64) }
}

/// Reads one byte, once.
pub fn read_byte(address: u64) -> u8 {
    // SAFETY: as for `read`.
    unsafe { core::ptr::read_volatile(address as *const u8) }
}

/// Copies `len` bytes, reading each byte of the source once.
pub fn copy(source: u64, target: u64, len: u64) {
    // SAFETY: the ranges were checked to be RAM that is no part of stage0, and not to overlap.
    unsafe {
        asm!("rep movsb", inout("rsi") source => _, inout("rdi") target => _, inout("rcx") len => _, options(nostack));
    }
}

/// Fills `len` bytes with zeros.
pub fn zero(target: u64, len: u64) {
    // SAFETY: as for `copy`.
    unsafe {
        asm!(
            "rep stosq",
            "mov rcx, rdx",
            "rep stosb",
            inout("rdi") target => _,
            inout("rcx") len / 8 => _,
            in("rdx") len % 8,
            in("rax") 0u64,
            options(nostack),
        );
    }
}

/// The private memory at `address` as bytes.
///
/// # Safety
/// The range must be validated private memory that nothing writes to as long as the slice lives.
pub unsafe fn bytes<'a>(address: u64, len: u64) -> &'a [u8] {
    // SAFETY: by this function's contract; addresses are identity-mapped.
    unsafe { core::slice::from_raw_parts(address as *const u8, len as usize) }
}

/// The private memory at `address` as bytes to be changed.
///
/// # Safety
/// The range must be validated private memory that nothing else refers to as long as the slice lives.
pub unsafe fn bytes_mut<'a>(address: u64, len: u64) -> &'a mut [u8] {
    // SAFETY: by this function's contract; addresses are identity-mapped.
    unsafe { core::slice::from_raw_parts_mut(address as *mut u8, len as usize) }
}

// What compiled code calls for copies, fills and comparisons; `core` brings no such functions for this target.
global_asm!(
    r#"
    .section .text.memory, "ax"
    .globl memcpy
memcpy:
    mov     rax, rdi
    mov     rcx, rdx
    rep movsb
    ret
    .globl memset
memset:
    mov     r8, rdi
    mov     rcx, rdx
    mov     eax, esi
    rep stosb
    mov     rax, r8
    ret
    .globl memcmp
    .globl bcmp
memcmp:
bcmp:
    xor     eax, eax
    mov     rcx, rdx
    test    rcx, rcx
    repe cmpsb
    je      2f
    movzx   eax, byte ptr [rdi - 1]
    movzx   ecx, byte ptr [rsi - 1]
    sub     ecx, eax
    mov     eax, ecx
2:  ret
    .text
    "#
);
