// SPDX-License-Identifier: Apache-2.0
//! One vCPU's side of the GHCB protocol: what VMGEXIT does, and which exit it becomes.
//!
//! Stands for `sev_handle_vmgexit` and `sev_handle_vmgexit_msr_protocol` of Linux 6.12 and 7.3; where they
//! differ the model is as strict as the stricter one. A VMGEXIT ends in an [`Outcome`]: either the guest is
//! answered and resumes, or the monitor has to do something and answers by [`VcpuModel::complete`]. The GHCB
//! page is copied once; only the fields that KVM would write are written back, before the guest resumes.

use snp::ghcb::exit::Malformed;
use snp::ghcb::exit::guest_request;
use snp::ghcb::exit::info1;
use snp::ghcb::msr;
use snp::ghcb::msr::PageOperation;
use snp::ghcb::msr::Request;
use snp::ghcb::msr::Response;
use snp::ghcb::page;
use snp::ghcb::page::Field;
use snp::ghcb::psc;
use snp::pages::cpuid_entry::CpuidEntry;
use snp::plan::PAGE_SIZE;

use crate::cpuid::lookup;
use crate::errno::Errno;
use crate::exchange::Exchange;
use crate::exchange::Guest;
use crate::memory::GuestMemory;
use crate::nae;
use crate::nae::Direction;
use crate::nae::Event;
use crate::nae::Inputs;
use crate::outcome::MAP_GPA_ENCRYPTED;
use crate::outcome::MapGpaRange;
use crate::outcome::Outcome;
use crate::outcome::Reply;
use crate::psc::Psc;
use crate::psc::Step;
use crate::vm::VmModel;

/// The error of an unsuccessful MSR page-state change: KVM sets the highest bit of the answer.
const PSC_MSR_ERROR: u32 = 1 << 31;
/// `-KVM_ENOSYS`, the answer to a hypercall that KVM does not know.
const KVM_ENOSYS: i64 = 1000;
/// KVM hands string I/O to the monitor in pieces of at most a page.
const IO_PIECE: usize = PAGE_SIZE as usize;
/// Offset of the type in a guest message, and the type that certificates go with.
const MESSAGE_TYPE: usize = 0x34;
const MESSAGE_REPORT_REQUEST: u8 = 5;

/// What a vCPU waits for.
#[derive(Debug)]
enum Pending {
    PscMsr,
    HoldMsr,
    Psc(Exchange, Psc),
    Hold(Exchange),
    Certs(Exchange, GuestRequest),
    ReadMsr(Exchange),
    WriteMsr(Exchange),
    Io(Exchange, u8, Direction),
    StringIo(Exchange, StringIo),
    Mmio(Exchange, Direction, u64, u8),
    Tsc(Exchange, bool),
}

/// A guest request, its message copied.
#[derive(Debug)]
struct GuestRequest {
    message: Box<[u8; PAGE_SIZE as usize]>,
    response: u64,
}

/// A string access that goes to the monitor piece by piece.
#[derive(Debug)]
struct StringIo {
    port: u16,
    size: u8,
    direction: Direction,
    scratch: u64,
    data: Vec<u8>,
    done: usize,
}

/// One vCPU's GHCB state.
#[derive(Debug)]
pub struct VcpuModel {
    ghcb_msr: u64,
    registered: Option<u64>,
    dr7: u64,
    cpuid: Vec<CpuidEntry>,
    pending: Option<Pending>,
}

impl VcpuModel {
    /// A vCPU after reset: its GHCB MSR holds the SEV_INFO answer (`sev_es_vcpu_reset`). `cpuid` is the table
    /// that the monitor sets by `KVM_SET_CPUID2`.
    pub fn new(vm: &VmModel, cpuid: Vec<CpuidEntry>) -> Self {
        VcpuModel { ghcb_msr: sev_info(vm), registered: None, dr7: 0x400, cpuid, pending: None }
    }

    /// What RDMSR of the GHCB MSR gives.
    pub fn read_ghcb_msr(&self) -> u64 {
        self.ghcb_msr
    }

    /// WRMSR of the GHCB MSR.
    pub fn write_ghcb_msr(&mut self, value: u64) {
        self.ghcb_msr = value;
    }

    /// Replaces the CPUID table.
    pub fn set_cpuid(&mut self, cpuid: Vec<CpuidEntry>) {
        self.cpuid = cpuid;
    }

    /// The vCPU starts from a new VMSA: whatever it waited for is void. GHCB MSR and registration stay, as in
    /// KVM.
    pub fn start_from_vmsa(&mut self) {
        self.pending = None;
    }

    /// The registered GHCB that the next VMGEXIT is about, if its page is private. On hardware the guest's
    /// own writes to it would have been a memory fault; where they are not noticed, this is when they are
    /// known to have happened.
    pub fn private_ghcb(&self, vm: &VmModel) -> Option<u64> {
        match Request::decode(self.ghcb_msr) {
            Request::GhcbPage { gpa } if self.registered == Some(gpa) => {
                (!vm.pages.all_shared(gpa, PAGE_SIZE)).then_some(gpa)
            }
            _ => None,
        }
    }

    /// The VMGEXIT instruction.
    pub fn vmgexit(&mut self, vm: &VmModel, mem: &dyn GuestMemory) -> Outcome {
        // A guest cannot execute while its previous event waits for the monitor.
        self.pending = None;
        match Request::decode(self.ghcb_msr) {
            // Without a usable GHCB, KVM resumes the guest with no answer.
            Request::GhcbPage { gpa: 0 } => Outcome::Resume,
            Request::GhcbPage { gpa } => self.nae(Guest { vm, mem }, gpa),
            request => self.msr_protocol(vm, request),
        }
    }

    fn msr_protocol(&mut self, vm: &VmModel, request: Request) -> Outcome {
        let response = match request {
            Request::SevInfo => {
                self.ghcb_msr = sev_info(vm);
                return Outcome::Resume;
            }
            Request::Cpuid { function, register } => {
                let r = lookup(&self.cpuid, function, 0, None);
                let value = match register {
                    msr::CpuidRegister::Eax => r.eax,
                    msr::CpuidRegister::Ebx => r.ebx,
                    msr::CpuidRegister::Ecx => r.ecx,
                    msr::CpuidRegister::Edx => r.edx,
                };
                Response::Cpuid { register, value }
            }
            Request::ApResetHold => {
                self.ghcb_msr = Response::ApResetHold { result: 0 }.encode();
                self.pending = Some(Pending::HoldMsr);
                return Outcome::ResetHold;
            }
            Request::PreferredGhcb => Response::PreferredGhcb { frame: msr::NO_PREFERRED_FRAME },
            Request::RegisterGhcb { frame } if vm.faults.refuse_registration.fire() => {
                Response::RegisterGhcb { frame: frame ^ 1 }
            }
            Request::RegisterGhcb { frame } => {
                self.registered = Some(frame * PAGE_SIZE);
                Response::RegisterGhcb { frame }
            }
            Request::PageStateChange { frame, operation } => return self.psc_msr(vm, frame, operation),
            Request::HypervisorFeatures => {
                Response::HypervisorFeatures { features: vm.hypervisor_features() }
            }
            Request::Terminate { .. } => return Outcome::Terminate { data0: self.ghcb_msr },
            // KVM keeps the MSR's value and resumes.
            Request::Unknown { .. } | Request::GhcbPage { .. } => return Outcome::Resume,
        };
        self.ghcb_msr = response.encode();
        Outcome::Resume
    }

    /// `snp_begin_psc_msr`.
    fn psc_msr(&mut self, vm: &VmModel, frame: u64, operation: PageOperation) -> Outcome {
        let encrypted = match operation {
            PageOperation::Private => MAP_GPA_ENCRYPTED,
            PageOperation::Shared => 0,
            PageOperation::Other(_) => return self.finish_psc_msr(false),
        };
        if !vm.hypercall_exits() || vm.faults.psc_error.fire() {
            return self.finish_psc_msr(false);
        }
        self.pending = Some(Pending::PscMsr);
        Outcome::MapGpaRange(MapGpaRange { gpa: frame * PAGE_SIZE, pages: 1, attributes: encrypted })
    }

    fn finish_psc_msr(&mut self, success: bool) -> Outcome {
        let error = if success { 0 } else { PSC_MSR_ERROR };
        self.ghcb_msr = Response::PageStateChange { error }.encode();
        Outcome::Resume
    }

    fn nae(&mut self, guest: Guest, gpa: u64) -> Outcome {
        let mut page = Box::new([0; page::SIZE]);
        // KVM cannot map such a page, and resumes the guest.
        if !guest.read(gpa, page.as_mut_slice()) {
            return Outcome::Resume;
        }
        // KVM_RUN fails in Linux 6.12; 7.3 answers the guest with NOT_REGISTERED.
        if self.registered != Some(gpa) {
            return Outcome::RunFails(Errno::EINVAL);
        }
        let (inputs, event) = nae::parse(&page);
        page::set_valid(&mut page, page::Valid::default());
        let mut x = Exchange { gpa, page };
        let r = inputs.registers;
        for (field, value) in
            [(Field::Rax, r.rax), (Field::Rbx, r.rbx), (Field::Rcx, r.rcx), (Field::Rdx, r.rdx)]
        {
            x.set(field, value);
        }
        match event {
            Ok(event) => {
                x.set(Field::ExitInfo1, info1::NO_ACTION);
                x.set(Field::ExitInfo2, 0);
                self.event(guest, x, event, inputs)
            }
            Err(why) => x.refuse(guest, why),
        }
    }

    fn event(&mut self, guest: Guest, mut x: Exchange, event: Event, inputs: Inputs) -> Outcome {
        let vm = guest.vm;
        match event {
            Event::Nothing | Event::NmiComplete => {}
            Event::ReadDr7 => x.set(Field::Rax, self.dr7),
            Event::WriteDr7 { value } => self.dr7 = value,
            Event::Tsc { aux } => return self.wait(Pending::Tsc(x, aux), Outcome::Tsc),
            // The model has no performance counters.
            Event::Rdpmc => x.inject_gp(),
            Event::Cpuid { function, index, xcr0 } => {
                let r = lookup(&self.cpuid, function, index, xcr0);
                for (field, value) in
                    [(Field::Rax, r.eax), (Field::Rbx, r.ebx), (Field::Rcx, r.ecx), (Field::Rdx, r.edx)]
                {
                    x.set(field, value.into());
                }
            }
            Event::Io { port, size, direction } => {
                let data = match direction {
                    Direction::In => vec![0; size.into()],
                    Direction::Out => x.get(Field::Rax).to_le_bytes()[..size.into()].to_vec(),
                };
                return self
                    .wait(Pending::Io(x, size, direction), Outcome::Io { port, size, direction, data });
            }
            Event::StringIo { port, size, direction, count, scratch } => {
                let len = u64::from(count) * u64::from(size);
                let Some(data) = x.scratch(scratch, len) else {
                    return x.refuse(guest, Malformed::InvalidScratchArea);
                };
                return self.string_io(guest, x, StringIo { port, size, direction, scratch, data, done: 0 });
            }
            Event::ReadMsr { index } => return self.wait(Pending::ReadMsr(x), Outcome::ReadMsr { index }),
            Event::WriteMsr { index, value } => {
                return self.wait(Pending::WriteMsr(x), Outcome::WriteMsr { index, value });
            }
            Event::Hypercall => x.set(Field::Rax, KVM_ENOSYS.wrapping_neg() as u64),
            Event::Mmio { gpa, len, direction, scratch } => {
                let Some(bytes) = x.scratch(scratch, len.into()) else {
                    return x.refuse(guest, Malformed::InvalidScratchArea);
                };
                let mut data = [0; 8];
                if direction == Direction::Out {
                    data[..bytes.len()].copy_from_slice(&bytes);
                }
                let outcome = Outcome::Mmio { gpa, len, direction, data };
                return self.wait(Pending::Mmio(x, direction, scratch, len), outcome);
            }
            Event::ResetHold => return self.wait(Pending::Hold(x), Outcome::ResetHold),
            Event::SetJumpTable { address } => vm.set_jump_table(address),
            Event::GetJumpTable => x.set(Field::ExitInfo2, vm.jump_table()),
            Event::Features => x.set(Field::ExitInfo2, vm.hypervisor_features()),
            Event::TooMuchIo => return Outcome::RunFails(Errno::EINVAL),
            Event::Terminate => return Outcome::Terminate { data0: x.gpa },
            Event::Unsupported => return Outcome::RunFails(Errno::EINVAL),
            Event::PageStateChange { scratch } => match Psc::new(&x.page, x.gpa, scratch) {
                None => x.malformed(Malformed::InvalidScratchArea),
                Some(_) if !vm.hypercall_exits() || vm.faults.psc_error.fire() => {
                    x.set(Field::ExitInfo2, psc::ERROR_GENERIC);
                }
                Some(psc) => return self.psc(guest, x, psc),
            },
            Event::GuestRequest { request, response, extended } => {
                return self.guest_request(guest, x, request, response, extended, inputs);
            }
            Event::ApCreation { request, apic_id, vmsa, sev_features } => {
                let (action, valid) = vm.ap_creation(request, apic_id, vmsa, sev_features);
                if !valid {
                    x.malformed(Malformed::InvalidInput);
                }
                let resumed = x.resume(guest);
                return action.map_or(resumed, Outcome::ApCreate);
            }
        }
        x.resume(guest)
    }

    fn wait(&mut self, pending: Pending, outcome: Outcome) -> Outcome {
        self.pending = Some(pending);
        outcome
    }

    fn psc(&mut self, guest: Guest, mut x: Exchange, mut psc: Psc) -> Outcome {
        match psc.next() {
            Step::Exit(range) => self.wait(Pending::Psc(x, psc), Outcome::MapGpaRange(range)),
            Step::End(info2) => {
                psc.write_back(guest);
                x.set(Field::ExitInfo2, info2);
                x.resume(guest)
            }
        }
    }

    fn string_io(&mut self, guest: Guest, x: Exchange, io: StringIo) -> Outcome {
        let piece = io.data.get(io.done..io.data.len().min(io.done + IO_PIECE)).unwrap_or_default();
        if piece.is_empty() {
            if io.direction == Direction::In {
                guest.write(io.scratch, &io.data);
            }
            return x.resume(guest);
        }
        let data = if io.direction == Direction::In { vec![0; piece.len()] } else { piece.to_vec() };
        let outcome = Outcome::Io { port: io.port, size: io.size, direction: io.direction, data };
        self.wait(Pending::StringIo(x, io), outcome)
    }

    /// `snp_handle_guest_req` and `snp_handle_ext_guest_req`.
    fn guest_request(
        &mut self,
        guest: Guest,
        mut x: Exchange,
        request: u64,
        response: u64,
        extended: bool,
        inputs: Inputs,
    ) -> Outcome {
        let vm = guest.vm;
        if vm.faults.guest_request_busy.fire() {
            x.set(Field::ExitInfo2, guest_request::BUSY << 32);
            return x.resume(guest);
        }
        let mut message = Box::new([0; PAGE_SIZE as usize]);
        // KVM reads the shared side of the page. Where the page is private that side is empty, and so is this
        // message.
        if !guest.read(request, message.as_mut_slice()) && vm.pages.state(request).is_none() {
            return Outcome::RunFails(Errno::EIO);
        }
        let certificates = extended && message[MESSAGE_TYPE] == MESSAGE_REPORT_REQUEST;
        let request = GuestRequest { message, response };
        if !certificates {
            return send(guest, x, request);
        }
        let (gpa, npages) = (inputs.registers.rax, inputs.registers.rbx);
        let valid = inputs.valid.has(Field::Rax) && inputs.valid.has(Field::Rbx);
        if !valid || !gpa.is_multiple_of(PAGE_SIZE) {
            return x.refuse(guest, Malformed::InvalidInput);
        }
        if vm.certs_enabled() {
            return self.wait(Pending::Certs(x, request), Outcome::ReqCerts { gpa, npages });
        }
        // Without certificates the guest gets an empty table: one entry of zeros.
        if npages > 0 && !guest.write(gpa, &[0; 24]) && vm.pages.state(gpa).is_none() {
            return Outcome::RunFails(Errno::EIO);
        }
        send(guest, x, request)
    }

    /// The monitor's answer to the last outcome. An answer that does not fit the outcome fails the run: that
    /// is a mistake of the caller.
    pub fn complete(&mut self, vm: &VmModel, mem: &dyn GuestMemory, reply: Reply) -> Outcome {
        let guest = Guest { vm, mem };
        match (self.pending.take(), reply) {
            (Some(Pending::PscMsr | Pending::Psc(..)), Reply::MapGpaRange { ret })
                if !valid_map_gpa_ret(ret) =>
            {
                Outcome::RunFails(Errno::EINVAL)
            }
            (Some(Pending::PscMsr), Reply::MapGpaRange { ret }) => self.finish_psc_msr(ret == 0),
            (Some(Pending::Psc(x, mut psc)), Reply::MapGpaRange { ret: 0 }) => {
                psc.range_done();
                if vm.faults.psc_stop.fire() {
                    psc.write_back(guest);
                    return x.resume(guest);
                }
                self.psc(guest, x, psc)
            }
            (Some(Pending::Psc(mut x, psc)), Reply::MapGpaRange { .. }) => {
                psc.write_back(guest);
                x.set(Field::ExitInfo2, psc::ERROR_GENERIC);
                x.resume(guest)
            }
            (Some(Pending::HoldMsr), Reply::Wake) => {
                self.ghcb_msr = Response::ApResetHold { result: 1 }.encode();
                Outcome::Resume
            }
            (Some(Pending::Hold(mut x)), Reply::Wake) => {
                x.set(Field::ExitInfo2, 1);
                x.resume(guest)
            }
            (Some(Pending::Certs(x, request)), Reply::Certs { ret, npages }) => {
                certificates_done(guest, x, request, Errno(ret), npages)
            }
            (Some(Pending::ReadMsr(mut x)), Reply::ReadMsr(value)) => {
                match value {
                    Some(value) => {
                        x.set(Field::Rax, value & 0xffff_ffff);
                        x.set(Field::Rdx, value >> 32);
                    }
                    None => x.inject_gp(),
                }
                x.resume(guest)
            }
            (Some(Pending::WriteMsr(mut x)), Reply::WriteMsr(done)) => {
                if !done {
                    x.inject_gp();
                }
                x.resume(guest)
            }
            (Some(Pending::Io(mut x, size, direction)), Reply::Io(data)) => {
                if direction == Direction::In {
                    x.set(Field::Rax, port_value(x.get(Field::Rax), size, &data));
                }
                x.resume(guest)
            }
            (Some(Pending::StringIo(x, mut io)), Reply::Io(data)) => {
                let end = io.data.len().min(io.done + IO_PIECE);
                let piece = io.data.get_mut(io.done..end).unwrap_or_default();
                if io.direction == Direction::In {
                    let len = piece.len().min(data.len());
                    piece[..len].copy_from_slice(&data[..len]);
                }
                io.done = end;
                self.string_io(guest, x, io)
            }
            (Some(Pending::Mmio(x, direction, scratch, len)), Reply::Mmio(data)) => {
                if direction == Direction::In {
                    guest.write(scratch, &data[..usize::from(len).min(data.len())]);
                }
                x.resume(guest)
            }
            (Some(Pending::Tsc(mut x, with_aux)), Reply::Tsc { tsc, aux }) => {
                x.set(Field::Rax, tsc & 0xffff_ffff);
                x.set(Field::Rdx, tsc >> 32);
                if with_aux {
                    x.set(Field::Rcx, aux.into());
                }
                x.resume(guest)
            }
            _ => Outcome::RunFails(Errno::EINVAL),
        }
    }
}

/// Answers to a range's conversion that KVM takes (`x86.h:kvm_is_valid_map_gpa_range_ret`, Linux 7.2 and
/// 7.3); 6.12 takes any.
fn valid_map_gpa_ret(ret: u64) -> bool {
    i32::try_from(ret).is_ok_and(|ret| [0, Errno::EINVAL.0, Errno::EAGAIN.0].contains(&ret))
}

/// The SEV_INFO answer.
fn sev_info(vm: &VmModel) -> u64 {
    let (min, max) = vm.ghcb_versions();
    Response::SevInfo { max, min, c_bit: vm.c_bit() }.encode()
}

/// RAX after IN: 32-bit values clear the upper half, smaller ones keep the rest (`kvm_fast_pio_in`).
fn port_value(rax: u64, size: u8, data: &[u8]) -> u64 {
    let size = usize::from(size);
    let mut bytes = if size < 4 { rax.to_le_bytes() } else { [0; 8] };
    for (byte, value) in bytes.iter_mut().take(size).zip(data) {
        *byte = *value;
    }
    u64::from_le_bytes(bytes)
}

/// `snp_handle_guest_req`: the message goes to the firmware, its answer to the guest.
fn send(guest: Guest, mut x: Exchange, request: GuestRequest) -> Outcome {
    match guest.vm.guest_message(&request.message) {
        Ok(response) => {
            if !guest.write(request.response, &response[..])
                && guest.vm.pages.state(request.response).is_none()
            {
                return Outcome::RunFails(Errno::EIO);
            }
        }
        Err(status) => x.set(Field::ExitInfo2, status.0.into()),
    }
    x.resume(guest)
}

/// `snp_req_certs_complete` (Linux 7.0): the monitor has written certificates, or says why not.
fn certificates_done(
    guest: Guest,
    mut x: Exchange,
    request: GuestRequest,
    ret: Errno,
    npages: u64,
) -> Outcome {
    let error = match ret {
        Errno(0) => return send(guest, x, request),
        Errno::ENOSPC => {
            x.set(Field::Rbx, npages);
            guest_request::INVALID_LEN
        }
        Errno::EAGAIN => guest_request::BUSY,
        Errno::EIO => guest_request::GENERIC,
        _ => return Outcome::RunFails(Errno::EINVAL),
    };
    x.set(Field::ExitInfo2, error << 32);
    x.resume(guest)
}

#[cfg(test)]
#[path = "vcpu_test.rs"]
mod tests;
