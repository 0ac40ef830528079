// SPDX-License-Identifier: Apache-2.0
//! What an AP creation does to a vCPU beside its registers: the reset of an INIT.
//!
//! Stands for `kvm_vcpu_reset` with `init_event`, which `vcpu_enter_guest` calls before it loads the guest's
//! VMSA, and for `kvm_lapic_reset` in it (Linux 6.12.117 and 7.3.4, `x86.c` and `lapic.c`). What the monitor
//! had set in the local APIC is gone afterwards, and the guest's shared clocks are off; a guest that counted
//! on either would fail on hardware too.

use kvm_bindings::kvm_debugregs;
use kvm_bindings::kvm_lapic_state;

use super::EmulatedVcpu;
use crate::platform::Vcpu;
use crate::platform::error::CallError;

/// `IA32_APIC_BASE`: the APIC is in x2APIC mode.
const X2APIC_MODE: u64 = 1 << 10;
/// A pin of the local vector table that delivers nothing.
const LVT_MASKED: u32 = 1 << 16;
/// Timer, thermal sensor, performance counters, LINT0, LINT1, error (Intel SDM volume 3, table 11-1).
const LVT: [usize; 6] = [0x320, 0x330, 0x340, 0x350, 0x360, 0x370];
const TASK_PRIORITY: usize = 0x80;
const LOGICAL_DESTINATION: usize = 0xd0;
const DESTINATION_FORMAT: usize = 0xe0;
const SPURIOUS_VECTOR: usize = 0xf0;
/// In-service, trigger mode and interrupt request registers: 256 bits each.
const BITMAPS: [usize; 3] = [0x100, 0x180, 0x200];
const ERROR_STATUS: usize = 0x280;
const INTERRUPT_COMMAND: [usize; 2] = [0x300, 0x310];
const INITIAL_COUNT: usize = 0x380;
const DIVIDE: usize = 0x3e0;
/// KVM's own MSRs of a vCPU: system time, asynchronous page faults, stolen time, end of interrupt, and the
/// interrupt of the second.
const PARAVIRTUAL_MSRS: [u32; 6] = [0x12, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04, 0x4b56_4d06];
/// MSRs that a save area holds and that a guest's may only hold as zero (`VmsaState::decode`): SYSENTER, STAR
/// to SFMASK, FS and GS are loaded with the segments, KERNEL_GS_BASE, TSC_AUX, XSS, DEBUGCTL.
const SAVED_MSRS: [u32; 11] = [
    0x174,
    0x175,
    0x176,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
    0xda0,
    0x1d9,
];
/// DR6 and DR7 after a reset.
const DEBUG_STATUS: u64 = 0xffff_0ff0;
const DEBUG_CONTROL: u64 = 0x400;
/// LINT0 of the first vCPU after any reset (`KVM_X86_QUIRK_LINT0_REENABLED`): ExtINT.
const LINT0: (usize, u32) = (0x350, 0x700);

impl EmulatedVcpu {
    /// Resets local APIC and paravirtual MSRs.
    pub(super) fn reset_by_init(&mut self) -> Result<(), CallError> {
        let x2apic = self.kvm.get_sregs()?.apic_base & X2APIC_MODE != 0;
        let mut lapic = self.kvm.fd.get_lapic().map_err(CallError::of("KVM_GET_LAPIC"))?;
        reset(&mut lapic, x2apic, self.id == 0);
        self.kvm.fd.set_lapic(&lapic).map_err(CallError::of("KVM_SET_LAPIC"))?;
        // A vCPU that is started again must not keep what it had before.
        for msr in PARAVIRTUAL_MSRS.into_iter().chain(SAVED_MSRS) {
            // One that the vCPU does not have is off already.
            let _ = self.kvm.set_msrs(&[(msr, 0)]);
        }
        let debug = kvm_debugregs { dr6: DEBUG_STATUS, dr7: DEBUG_CONTROL, ..Default::default() };
        self.kvm.fd.set_debug_regs(&debug).map_err(CallError::of("KVM_SET_DEBUGREGS"))
    }
}

/// `kvm_lapic_reset`.
fn reset(lapic: &mut kvm_lapic_state, x2apic: bool, first: bool) {
    let mut set = |register: usize, value: u32| {
        for (cell, byte) in lapic.regs.iter_mut().skip(register).zip(value.to_le_bytes()) {
            *cell = byte as std::ffi::c_char;
        }
    };
    for pin in LVT {
        set(pin, LVT_MASKED);
    }
    if first {
        set(LINT0.0, LINT0.1);
    }
    set(DESTINATION_FORMAT, u32::MAX);
    set(SPURIOUS_VECTOR, 0xff);
    set(TASK_PRIORITY, 0);
    if !x2apic {
        set(LOGICAL_DESTINATION, 0);
    }
    for register in [ERROR_STATUS, INITIAL_COUNT, DIVIDE].into_iter().chain(INTERRUPT_COMMAND) {
        set(register, 0);
    }
    for register in BITMAPS.into_iter().flat_map(|first| (0..8).map(move |i| first + 0x10 * i)) {
        set(register, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A monitor that sets an AP's pins (`KVM_SET_LAPIC`) finds them masked after the AP creation.
    #[test]
    fn pins_pending_interrupts_and_the_timer_are_gone_and_the_id_stays() {
        for x2apic in [false, true] {
            let mut lapic = kvm_lapic_state { regs: [0x55; 1024] };
            reset(&mut lapic, x2apic, false);
            let get = |register: usize| {
                let bytes: Vec<u8> = lapic.regs[register..register + 4].iter().map(|b| *b as u8).collect();
                u32::from_le_bytes(bytes.try_into().unwrap())
            };
            assert_eq!(get(0x20), 0x5555_5555, "the ID");
            assert_eq!((get(0x350), get(0x360)), (0x1_0000, 0x1_0000), "LINT0 and LINT1");
            assert_eq!((get(0x270), get(0x170), get(0x1f0)), (0, 0, 0), "IRR, ISR, TMR");
            assert_eq!(
                (get(0x380), get(0xf0), get(0xe0)),
                (0, 0xff, u32::MAX),
                "timer, spurious vector, format"
            );
            assert_eq!(get(0xd0), if x2apic { 0x5555_5555 } else { 0 }, "the x2APIC's logical id is fixed");
        }
    }
}
