// SPDX-License-Identifier: Apache-2.0
//! One life of a guest: a VM from its creation to its end.
//!
//! An SNP guest cannot be reset: its registers are sealed at launch, and its memory belongs to one firmware
//! context. A guest that asks for a reset ends its VM, and may get another one, launched from the same plan
//! ([`crate::run::monitor`]).

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_bindings::kvm_mp_state;
use snp_model::patch::CodeHints;
use vmm_sys_util::signal::Killable;
use vmm_sys_util::signal::SIGRTMIN;

use crate::events::Events;
use crate::launch;
use crate::launch::Assembled;
use crate::launch::LaunchError;
use crate::launch::tamper::Racer;
use crate::machine::Machine;
use crate::machine::certs::Certificates;
use crate::machine::certs::Source;
use crate::machine::conversion::Conversions;
use crate::machine::dma::Dma;
use crate::machine::implicit::ImplicitSharing;
use crate::machine::ram::GuestRam;
use crate::platform::Platform;
use crate::platform::Vcpu;
use crate::platform::Vm;
use crate::platform::VmKind;
use crate::run::arrival::Arrival;
use crate::run::error::MonitorError;
use crate::run::guest::Guest;
use crate::run::guest::Host;
use crate::run::guest::Load;
use crate::run::prefault;
use crate::run::prefault::PreFault;
use crate::run::vcpu;
use crate::run::vcpu::Shared;
use crate::threads::ThreadError;
use crate::threads::spawn;

/// How long the monitor waits for vCPU threads to notice that the guest is over. They may be stuck writing to
/// a terminal that nobody reads; the process ends all the same.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a vCPU thread is told again: a signal that arrives just before `KVM_RUN` is lost.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// A guest in its VM, launched and not yet running.
pub(crate) struct Booted {
    vcpus: Vec<Box<dyn Vcpu>>,
    pub(crate) shared: Arc<Shared>,
    racer: Option<Racer>,
    /// Keeps the guest's memory mapped for as long as vCPUs may run.
    vm: Arc<dyn Vm>,
    events: Events,
}

/// A guest that runs.
pub(crate) struct Running {
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
    _racer: Option<Racer>,
    vm: Arc<dyn Vm>,
    events: Events,
}

/// Creates the VM of the guest's life number `life` and launches the guest in it; what it writes goes to
/// `console`.
pub(crate) fn boot(
    platform: &dyn Platform,
    guest: &Guest,
    console: Box<dyn Write + Send>,
    host: &mut Host,
    life: u32,
) -> Result<Booted, MonitorError> {
    let create = |step| move |source| MonitorError::Create { step, source };
    let snp = guest.snp();
    let kind = if snp.is_some() { VmKind::Snp } else { VmKind::Plain };
    let no_hints = CodeHints::default();
    let code = snp.map_or(&no_hints, |snp| &snp.code);
    let vm = platform.create_vm(kind, code).map_err(create("creating the VM"))?;
    if let Some(snp) = snp {
        let commands = vm.snp_commands().map_err(create("creating the VM"))?;
        launch::init_snp(commands, snp.measured.plan())?;
    }
    let certificates = match snp {
        Some(_) => host.certificates.clone().or_else(|| platform.certificates().map(Source::Table)),
        None => None,
    };
    if let Some(commands) = vm.snp().filter(|_| certificates.is_some()) {
        // After INIT2 and before any vCPU (`snp_enable_certs`).
        commands.snp_enable_req_certs().map_err(|source| LaunchError::Sev {
            step: "offering certificates to the guest".into(),
            source,
        })?;
    }
    let ram = GuestRam::new(guest.ram.iter().copied()).map_err(MonitorError::Ram)?;
    let memfds = launch::add_memory(vm.as_ref(), &ram, snp.is_some())?;
    // After the memory: a slot that comes later waits until the kernel has done with the buses that it has
    // replaced here (an SRCU grace period, one or two timer ticks).
    vm.create_irqchip().map_err(create("creating the interrupt controllers"))?;
    let mut vcpus = Vec::new();
    for (id, cpuid) in (0u32..).zip(&guest.cpuid) {
        let mut vcpu = vm.create_vcpu(id).map_err(create("creating a vCPU"))?;
        vcpu.set_cpuid(cpuid).map_err(create("setting a vCPU's CPUID"))?;
        vcpu.set_lint().map_err(create("setting a vCPU's APIC"))?;
        if id != 0 && snp.is_some_and(|snp| !snp.options.firmware) {
            // KVM carries out an AP creation for a vCPU that is halted, not for one that waits for an INIT
            // (Linux 6.12 to 7.3, `x86.c:kvm_arch_vcpu_ioctl_run`).
            let halted = kvm_mp_state { mp_state: KVM_MP_STATE_HALTED };
            vcpu.set_mp_state(halted).map_err(create("halting a vCPU until the guest starts it"))?;
        }
        vcpus.push(vcpu);
    }
    let conversions =
        snp.map(|snp| Arc::new(Conversions::new(Arc::clone(&vm), ram.clone(), memfds, &snp.staged.shared)));
    let dma = Dma::new(ram.clone(), conversions.clone());
    let machine = Machine::new(&vm, &guest.board, dma.clone(), console)?;
    for companion in &mut host.companions {
        companion
            .attach(life, &machine)
            .map_err(|problem| MonitorError::Companion { name: companion.name(), problem })?;
    }
    match &guest.load {
        Load::Plain(plan) => launch::load_plain(plan, &ram, &mut vcpus)?,
        Load::Snp(snp) => {
            let prepared = Assembled {
                vm: vm.as_ref(),
                measured: &snp.measured,
                staged: &snp.staged,
                ram: &ram,
                vcpus: &mut vcpus,
                cpuid: &guest.cpuid,
            };
            if let Some(diff) = launch::launch_snp(prepared, &snp.options)? {
                match diff.is_made_up(snp.options.host_cpuid.as_ref()) {
                    true => host.events.note(diff.lost_note()),
                    false => host.events.warn(format_args!(
                        "`accept_cpuid`: launched with the firmware's CPUID values:\n{diff}"
                    )),
                }
            }
        }
    }
    let racer = snp.and_then(|snp| snp.staged.raced).map(|gpa| Racer::start(ram.clone(), gpa));
    let racer = racer.transpose().map_err(ThreadError)?;
    let certificates = certificates.map(|source| Certificates::new(source, dma));
    let implicit = snp.filter(|snp| snp.options.firmware).map(|_| ImplicitSharing::new(&host.events));
    let pre_fault = snp.map(|snp| {
        PreFault::new(prefault::private_part(&snp.options.validated_at_start, &snp.staged.shared))
    });
    let stop = AtomicBool::new(false);
    let shared = Arc::new(Shared { machine, conversions, implicit, pre_fault, certificates, stop });
    Ok(Booted { vcpus, shared, racer, vm, events: host.events.clone() })
}

impl Booted {
    /// Starts the vCPUs, each in its thread; the first that ends the guest says so to `events`.
    pub(crate) fn start(self, life: u32, events: &Sender<Arrival>) -> Result<Running, MonitorError> {
        let mut running = Running {
            threads: Vec::new(),
            shared: self.shared,
            _racer: self.racer,
            vm: self.vm,
            events: self.events,
        };
        for (id, mut vcpu) in (0u32..).zip(self.vcpus) {
            let (shared, events) = (Arc::clone(&running.shared), events.clone());
            let thread = spawn(format!("vcpu{id}"), move || {
                let result = match vcpu::run(id, vcpu.as_mut(), &shared) {
                    Ok(None) => return,
                    Ok(Some(outcome)) => Ok(outcome),
                    Err(e) => Err(e),
                };
                let _ = events.send(Arrival::Ended { life, result });
            });
            match thread {
                Ok(thread) => running.threads.push(thread),
                Err(e) => {
                    running.stop();
                    return Err(e.into());
                }
            }
        }
        Ok(running)
    }
}

impl Running {
    /// Stops the vCPUs and takes the VM apart. False if a vCPU does not come back: then its VM is still
    /// there.
    pub(crate) fn stop(self) -> bool {
        self.shared.stop.store(true, Ordering::Release);
        let deadline = Instant::now() + STOP_TIMEOUT;
        while self.threads.iter().any(|t| !t.is_finished()) {
            if Instant::now() >= deadline {
                return false;
            }
            for thread in self.threads.iter().filter(|t| !t.is_finished()) {
                let _ = thread.kill(SIGRTMIN());
            }
            thread::sleep(KICK_INTERVAL);
        }
        if let Some(statistics) = self.vm.statistics() {
            self.events.note(format_args!("statistics {statistics}"));
        }
        for thread in self.threads {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        true
    }
}
