// SPDX-License-Identifier: Apache-2.0
//! Non-automatic exits: from the bytes of a GHCB page to one checked event.
//!
//! Stands for `sev_es_sync_from_ghcb` and `sev_es_validate_vmgexit` of Linux 6.12
//! (`sev_es_are_required_ghcb_fields_valid` of 7.3), and for the operand checks of the handlers behind them.
//! Pure: the page is a copy, and every byte of it is hostile.

use snp::ghcb::exit;
use snp::ghcb::exit::Malformed;
use snp::ghcb::exit::svm;
use snp::ghcb::page;
use snp::ghcb::page::Field;

/// Registers that go both ways through the GHCB. Those that the guest did not mark valid read as zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
}

/// Direction of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest reads.
    In,
    /// The guest writes.
    Out,
}

/// One event, with the operands that it needs, all checked for what the event allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields are the operands of the GHCB specification's events")]
pub enum Event {
    ReadDr7,
    WriteDr7 {
        value: u64,
    },
    /// RDTSC, or RDTSCP if `aux`.
    Tsc {
        aux: bool,
    },
    Rdpmc,
    Cpuid {
        function: u32,
        index: u32,
        xcr0: Option<u64>,
    },
    /// INVD, WBINVD, MONITOR, MWAIT, and accesses of no bytes: nothing to do.
    Nothing,
    /// One access of `size` bytes.
    Io {
        port: u16,
        size: u8,
        direction: Direction,
    },
    /// `count` accesses of `size` bytes; data is at `scratch`.
    StringIo {
        port: u16,
        size: u8,
        direction: Direction,
        count: u32,
        scratch: u64,
    },
    ReadMsr {
        index: u32,
    },
    WriteMsr {
        index: u32,
        value: u64,
    },
    Hypercall,
    Mmio {
        gpa: u64,
        len: u8,
        direction: Direction,
        scratch: u64,
    },
    NmiComplete,
    ResetHold,
    SetJumpTable {
        address: u64,
    },
    GetJumpTable,
    Features,
    Terminate,
    PageStateChange {
        scratch: u64,
    },
    GuestRequest {
        request: u64,
        response: u64,
        /// Address and number of pages for certificates, of an extended request.
        extended: bool,
    },
    ApCreation {
        request: u32,
        apic_id: u32,
        vmsa: u64,
        sev_features: u64,
    },
    /// String I/O of more bytes than an int counts: KVM_RUN fails.
    TooMuchIo,
    /// The guest says that it got a #VC it cannot handle: KVM_RUN fails.
    Unsupported,
}

/// What was in the page beside the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// Registers, zero where not valid.
    pub registers: Registers,
    /// Which fields were valid.
    pub valid: page::Valid,
}

/// Reads the event in `ghcb`.
pub fn parse(ghcb: &[u8; page::SIZE]) -> (Inputs, Result<Event, Malformed>) {
    let valid = page::valid(ghcb);
    let value = |field| if valid.has(field) { page::get(ghcb, field) } else { 0 };
    let registers = Registers {
        rax: value(Field::Rax),
        rbx: value(Field::Rbx),
        rcx: value(Field::Rcx),
        rdx: value(Field::Rdx),
    };
    let inputs = Inputs { registers, valid };
    if page::usage(ghcb) != 0 {
        return (inputs, Err(Malformed::InvalidUsage));
    }
    (inputs, event(ghcb, &inputs))
}

fn event(ghcb: &[u8; page::SIZE], inputs: &Inputs) -> Result<Event, Malformed> {
    let need = |field| page::get_if_valid(ghcb, field).ok_or(Malformed::MissingInput);
    let need_all = |fields: &[Field]| fields.iter().try_for_each(|field| need(*field).map(drop));
    let (code, info1, info2) = (need(Field::ExitCode)?, need(Field::ExitInfo1)?, need(Field::ExitInfo2)?);
    let scratch = if inputs.valid.has(Field::Scratch) { page::get(ghcb, Field::Scratch) } else { 0 };
    let registers = inputs.registers;
    Ok(match code {
        svm::READ_DR7 => Event::ReadDr7,
        svm::WRITE_DR7 => Event::WriteDr7 { value: need(Field::Rax)? },
        svm::RDTSC => Event::Tsc { aux: false },
        svm::RDTSCP => Event::Tsc { aux: true },
        svm::RDPMC => {
            need(Field::Rcx)?;
            Event::Rdpmc
        }
        svm::CPUID => {
            let (function, index) = (need(Field::Rax)? as u32, need(Field::Rcx)? as u32);
            let xcr0 = page::get_if_valid(ghcb, Field::Xcr0);
            if registers.rax == 0xd && xcr0.is_none() {
                return Err(Malformed::MissingInput);
            }
            Event::Cpuid { function, index, xcr0 }
        }
        svm::INVD | svm::WBINVD => Event::Nothing,
        svm::MONITOR => {
            need_all(&[Field::Rax, Field::Rcx, Field::Rdx])?;
            Event::Nothing
        }
        svm::MWAIT => {
            need_all(&[Field::Rax, Field::Rcx])?;
            Event::Nothing
        }
        svm::IOIO => io(inputs, info1, info2, need(Field::Scratch))?,
        svm::MSR => {
            let index = need(Field::Rcx)? as u32;
            if info1 == 0 {
                Event::ReadMsr { index }
            } else {
                let (low, high) = (need(Field::Rax)?, need(Field::Rdx)?);
                Event::WriteMsr { index, value: high << 32 | low & 0xffff_ffff }
            }
        }
        svm::VMMCALL => {
            need_all(&[Field::Rax, Field::Cpl])?;
            Event::Hypercall
        }
        exit::MMIO_READ | exit::MMIO_WRITE => {
            need(Field::Scratch)?;
            let direction = if code == exit::MMIO_READ { Direction::In } else { Direction::Out };
            match info2 {
                0 => Event::Nothing,
                1..=8 => Event::Mmio { gpa: info1, len: info2 as u8, direction, scratch },
                _ => return Err(Malformed::InvalidInput),
            }
        }
        exit::NMI_COMPLETE => Event::NmiComplete,
        exit::AP_RESET_HOLD => Event::ResetHold,
        exit::AP_JUMP_TABLE => match info1 {
            0 => Event::SetJumpTable { address: info2 },
            1 => Event::GetJumpTable,
            _ => return Err(Malformed::InvalidInput),
        },
        exit::HYPERVISOR_FEATURES => Event::Features,
        exit::TERMINATION => Event::Terminate,
        exit::UNSUPPORTED_EVENT => Event::Unsupported,
        exit::PAGE_STATE_CHANGE => Event::PageStateChange { scratch: need(Field::Scratch)? },
        exit::GUEST_REQUEST | exit::EXTENDED_GUEST_REQUEST => {
            // "Missing input" in Linux 6.12.
            if !info1.is_multiple_of(4096) || !info2.is_multiple_of(4096) || info1 == info2 {
                return Err(Malformed::InvalidInput);
            }
            let extended = code == exit::EXTENDED_GUEST_REQUEST;
            Event::GuestRequest { request: info1, response: info2, extended }
        }
        exit::AP_CREATION => {
            let (request, apic_id) = (info1 as u32, (info1 >> 32) as u32);
            if request != exit::ap_creation::DESTROY {
                need(Field::Rax)?;
            }
            Event::ApCreation { request, apic_id, vmsa: info2, sev_features: registers.rax }
        }
        _ => return Err(Malformed::InvalidEvent),
    })
}

/// Exit info 1 of an I/O event (APM volume 2, section 15.10.2): bit 0 IN, bit 2 string, bits 6:4 size, bits
/// 31:16 port.
fn io(inputs: &Inputs, info1: u64, info2: u64, scratch: Result<u64, Malformed>) -> Result<Event, Malformed> {
    let direction = if info1 & 1 != 0 { Direction::In } else { Direction::Out };
    let string = info1 & 1 << 2 != 0;
    if string {
        scratch?;
    } else if direction == Direction::Out && !inputs.valid.has(Field::Rax) {
        return Err(Malformed::MissingInput);
    }
    let (port, size) = ((info1 >> 16) as u16, (info1 >> 4 & 7) as u8);
    // The bits' value is the size in bytes. KVM resumes the guest at once for none, and does not look whether
    // it is only one.
    match size {
        0 => return Ok(Event::Nothing),
        1 | 2 | 4 => {}
        _ => return Err(Malformed::InvalidInput),
    }
    if !string {
        return Ok(Event::Io { port, size, direction });
    }
    // sev_es_string_io: count and bytes are ints.
    let count = u32::try_from(info2).ok().filter(|count| *count <= i32::MAX as u32);
    let Some(count) =
        count.filter(|count| count.checked_mul(size.into()).is_some_and(|b| b <= i32::MAX as u32))
    else {
        return Ok(Event::TooMuchIo);
    };
    if count == 0 {
        return Ok(Event::Nothing);
    }
    Ok(Event::StringIo { port, size, direction, count, scratch: scratch? })
}
