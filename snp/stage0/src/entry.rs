// SPDX-License-Identifier: Apache-2.0
//! From the measured start state to Rust: 32-bit protected mode with paging off, then 64-bit mode with the C-bit verified.
//!
//! With paging off every access of an SNP guest is private, so no measured byte needs to know the host's C-bit position. It is
//! taken from the CPUID page, whose contents are not measured, and therefore proved: a random number is written with paging
//! off and must read back through the new mapping (as Linux's `sev_verify_cbit` does).
//!
//! The first page table is one page that serves as all four levels: its entry 0 points to itself, and the other entries map
//! the page of their own number. That maps 4 KiB to 2 MiB to themselves at the cost of one launch page, without executing
//! PVALIDATE before 64-bit mode. The final tables are built in memory that stage0 validated (`paging.rs`).

use core::arch::global_asm;

use crate::layout;
use crate::reason::Reason;

global_asm!(
    r#"
    .section .text.entry, "ax"
    .code32
    .globl stage0_start
stage0_start:
    cli
    cld
    // Leaf 0x8000001F of the CPUID page; its table has 1 to 64 entries of 48 bytes from offset 16 on.
    mov     ecx, dword ptr [{cpuid}]
    mov     eax, {r_cpuid}
    lea     edx, [ecx - 1]
    cmp     edx, 63
    ja      stage0_fail32
    mov     esi, {cpuid} + 16
2:  cmp     dword ptr [esi], 0x8000001f
    je      3f
    add     esi, 48
    dec     ecx
    jnz     2b
    jmp     stage0_fail32
3:  mov     edx, dword ptr [esi + 24]
    and     edx, 0x1a
    cmp     edx, 0x1a
    jne     stage0_fail32
    mov     ebx, dword ptr [esi + 28]
    mov     ecx, ebx
    and     ecx, 63
    sub     ecx, 32
    mov     eax, {r_range}
    cmp     ecx, 51 - 32
    ja      stage0_fail32
    // The C-bit as the upper half of a table entry.
    xor     ebp, ebp
    bts     ebp, ecx
    // A random number in memory, private because paging is off. ESP is free: there is no stack yet.
    mov     ecx, 1000
4:  rdrand  edi
    jnc     12f
    rdrand  esp
    jc      5f
12: dec     ecx
    jnz     4b
    mov     eax, {r_random}
    jmp     stage0_fail32
5:  mov     dword ptr [stage0_probe], edi
    mov     dword ptr [stage0_probe + 4], esp
    // The first page table.
    mov     esi, offset stage0_first_table
    mov     eax, 3
    xor     ecx, ecx
6:  mov     dword ptr [esi + 8 * ecx], eax
    mov     dword ptr [esi + 8 * ecx + 4], ebp
    add     eax, 0x1000
    inc     ecx
    cmp     ecx, 512
    jne     6b
    lea     eax, [esi + 3]
    mov     dword ptr [esi], eax
    // 64-bit mode. OSFXSR and OSXMMEXCPT because compiled code uses SSE2.
    mov     cr3, esi
    mov     eax, cr4
    or      eax, 0x620
    mov     cr4, eax
    mov     ecx, 0xc0000080
    rdmsr
    or      eax, 0x900
    wrmsr
    mov     eax, cr0
    and     eax, 0x9ffffff1
    or      eax, 0x80000003
    mov     cr0, eax
    lgdt    [stage0_gdt_pointer]
    .byte   0xea
    .long   stage0_long
    .word   0x10

    // Ends the guest with the reason in EAX. The code is in bits 23:16 of the request, the reason set in bits 15:12.
stage0_fail32:
    shl     eax, 16
    or      eax, 0x3100
    xor     edx, edx
    mov     ecx, 0xc0010130
7:  wrmsr
    .pushsection .sites, ""
    .long   8f, 0
    .popsection
8:  .byte   0xf3, 0x0f, 0x01, 0xd9
    jmp     7b

    // Where vCPUs other than the first would start from their measured state; Linux gives them another one.
    .globl stage0_park
stage0_park:
    cli
9:  hlt
    jmp     9b

    .code64
stage0_long:
    mov     eax, 0x18
    mov     ds, eax
    mov     es, eax
    mov     ss, eax
    xor     eax, eax
    mov     fs, eax
    mov     gs, eax
    // CR3 with the C-bit, now that it can be loaded with 64 bits.
    shl     rbp, 32
    mov     rax, cr3
    or      rax, rbp
    mov     cr3, rax
    cmp     dword ptr [stage0_probe], edi
    jne     13f
    cmp     dword ptr [stage0_probe + 4], esp
    je      10f
13: mov     edi, {r_wrong}
    jmp     11f
10: mov     esp, offset stage0_first_stack
    mov     rdi, rbp
    call    stage0_prepare
    mov     esp, {stack}
    mov     rdi, rbp
    mov     esi, ebx
    call    stage0_main
11: call    stage0_fail
    ud2

    // stage0_enter(entry, boot_params): the 64-bit boot protocol's state, then the kernel.
    .globl stage0_enter
stage0_enter:
    mov     r8, rdi
    mov     ecx, 0x20
    mov     cr4, rcx
    mov     ecx, 0xc0000080
    rdmsr
    or      eax, 1
    wrmsr
    mov     rax, r8
    xor     ebx, ebx
    xor     ecx, ecx
    xor     edx, edx
    xor     edi, edi
    xor     ebp, ebp
    xor     r8d, r8d
    .globl stage0_hook
stage0_hook:
    // An emulated platform prepares the kernel here; on hardware it is a four-byte no-operation.
    .byte   0x0f, 0x1f, 0x40, 0x00
    jmp     rax

    .section .rodata.gdt, "a"
    .balign 8
stage0_gdt:
    .quad   0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff
stage0_gdt_pointer:
    .word   31
    .long   stage0_gdt
    .long   0

    .section .data.probe, "aw"
    .balign 8
stage0_probe:
    .quad   0

    .section .bss.stack, "aw", @nobits
    .balign 16
    .skip   1024
stage0_first_stack:

    .section .pages, "aw", @nobits
    .balign 4096
stage0_first_table:
    .skip   4096
    .text
    "#,
    cpuid = const layout::CPUID,
    stack = const layout::WORK_END,
    r_cpuid = const Reason::CpuidPage as u32,
    r_range = const Reason::CbitRange as u32,
    r_random = const Reason::NoRandom as u32,
    r_wrong = const Reason::CbitWrong as u32,
);

unsafe extern "C" {
    /// Enters the kernel: its entry in RDI, the address of `boot_params` in RSI.
    pub fn stage0_enter(entry: u64, boot_params: u64) -> !;
    /// End of the image, from the linker script.
    pub static stage0_end: u8;
}
