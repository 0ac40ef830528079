// SPDX-License-Identifier: Apache-2.0
//! x86 code of a few bytes, assembled by hand.

/// The SNP instructions, AMD64 Architecture Programmer's Manual volume 3: exit to the hypervisor.
pub const VMGEXIT: [u8; 4] = [0xf3, 0x0f, 0x01, 0xd9];
/// Validate a page.
pub const PVALIDATE: [u8; 4] = [0xf2, 0x0f, 0x01, 0xff];
/// Change what other privilege levels may do with a page.
pub const RMPADJUST: [u8; 4] = [0xf3, 0x0f, 0x01, 0xfe];

/// VMGEXIT as the emulated platform's patches leave it: `out 0xe4, al`, and a NOP of two bytes.
pub const PATCHED_VMGEXIT: [u8; 4] = [0xe6, 0xe4, 0x66, 0x90];
/// `mov ecx, 0xc0010130; wrmsr`
pub const WRITE_GHCB_MSR: [u8; 7] = [0xb9, 0x30, 0x01, 0x01, 0xc0, 0x0f, 0x30];

/// `ud2`: with no interrupt table, a triple fault.
pub const CRASH: [u8; 2] = [0x0f, 0x0b];

/// `mov dx, PORT; mov al, VALUE; out dx, al`, for 32-bit and 64-bit mode.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [lo, hi] = port.to_le_bytes();
    vec![0x66, 0xba, lo, hi, 0xb0, value, 0xee]
}

/// Switches off: `SLP_EN` with sleep type 5 to PM1a_CNT, as the FADT and `_S5` of cvmm's machine say. For
/// 32-bit and 64-bit mode.
pub fn power_off() -> Vec<u8> {
    // mov dx, 0x604; mov ax, 0x3400; out dx, ax
    vec![0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef]
}

/// Writes `value` to the GHCB MSR and exits to the hypervisor, in the form that the emulated platform's
/// patches leave.
pub fn ghcb_msr(value: u64) -> Vec<u8> {
    let mut code = vec![0xb8]; // mov eax, low
    code.extend((value as u32).to_le_bytes());
    code.push(0xba); // mov edx, high
    code.extend(((value >> 32) as u32).to_le_bytes());
    code.extend(WRITE_GHCB_MSR);
    code.extend(PATCHED_VMGEXIT);
    code
}
