// SPDX-License-Identifier: Apache-2.0
//! The guest's TPM: a service outside of this process runs it, this module connects it to the guest.
//!
//! With direct boot nobody in the guest measures what starts it, so the monitor plays the firmware's part:
//! [`measured`] makes the event log before the launch (it enters the digest), and [`Companion::attach`]
//! brings the PCRs to the same values before the first vCPU of each VM runs. Commands go through the CRB
//! device; its buffer is one page of memory that guest and monitor share, also in SNP guests.
//!
//! The service also keeps how far the guest has set its clock ahead of the host's ([`clock`]).
//!
//! The service may end or stop answering at any time. Then the guest's TPM reports a fatal error, the monitor
//! says so once, and the guest goes on. A service of ours that has died is started again for the VM that
//! follows a reset, a few times: PCRs start anew there in any case. Before that the guest must do without: a
//! TPM that came back with new PCRs under a running guest would let the guest write its own measurements.
//! What the monitor itself asks it, before each VM, is asked in a thread that nobody waits for longer than
//! three minutes, so that signals are heard meanwhile ([`crate::run::inbox::Inbox`]). The vTPM is worth as
//! much as the host that runs it: see `docs/vtpm.md`.

pub mod backend;
mod clock;
pub mod error;
pub mod measured;
mod presence;
pub mod service;

use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::TryLockError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use clock::Clock;
use devices::tpm_crb;
use devices::tpm_crb::Backend;
use devices::tpm_crb::BackendError;
use devices::tpm_crb::Buffer;
use devices::tpm_crb::Crb;
use devices::tpm_ppi;
use devices::tpm_ppi::Mail;
use devices::tpm_ppi::Ppi;
use devices::tpm_ppi::Submit;
use service::Service;
use snp::board::layout;
use vtpm_svc::control::client::Client;
use vtpm_svc::control::client::ClientError;
use vtpm_svc::control::client::Control;
use vtpm_svc::measured::Event;

use crate::events::Events;
use crate::lock::lock;
use crate::machine::Machine;
use crate::machine::companion::Companion;
use crate::machine::companion::Work;
use crate::platform::mapping::Mapping;
use crate::run::inbox::Inbox;
use crate::threads::spawn;
use crate::vtpm::error::COMMAND_PATIENCE;
use crate::vtpm::error::POWER_ON_PATIENCE;
use crate::vtpm::error::VtpmError;

/// How long a guest's physical-presence request may take to be stored.
const SUBMIT_PATIENCE: Duration = Duration::from_secs(2);
/// How often the end of such a command is looked for.
const COMMAND_PAUSE: Duration = Duration::from_millis(5);
/// A service whose connection has ended is about to end itself.
const DEATH_PATIENCE: Duration = Duration::from_secs(1);
/// How often in a run the service is started again after it has died.
const STARTS_AGAIN: u32 = 3;

/// A TPM that is ready for a VM, and again for the VM that follows a reset.
pub struct Vtpm {
    link: Arc<Link>,
    events: Arc<[Event]>,
    sink: Events,
    /// What was found out when the TPM was powered on.
    found: Arc<Mutex<Found>>,
    service: Option<Service>,
    /// How to start the service again, if its state outlives it.
    again: Option<service::Options>,
    started_again: u32,
}

/// What the service knows beside the TPM.
#[derive(Default)]
struct Found {
    /// `None` until the first VM, or at a service that keeps no clock.
    clock: Option<Clock>,
    mail: Mail,
}

/// The way to the service, shared by the threads that use it.
struct Link {
    client: Mutex<Client>,
    control: Mutex<Control>,
    /// Set when the user has been told that the service is gone.
    told: AtomicBool,
}

impl Vtpm {
    /// The TPM of a service that cvmm starts, and ends with the guest.
    pub fn start(options: &service::Options, events: Vec<Event>, inbox: &Inbox) -> Result<Self, VtpmError> {
        let (client, service) = service::start(options, inbox)?;
        let mut vtpm = Self::new(client, events, Some(service), inbox.events());
        vtpm.again = options.state.is_some().then(|| options.clone());
        if let Some(again) = &mut vtpm.again {
            // What an operator accepted was this image at this moment, not one that is put in its place
            // later.
            again.arguments.retain(|word| word != "--accept-rollback" && word != "--adopt");
        }
        Ok(vtpm)
    }

    /// The TPM of a service that listens on the control socket `path`; it is left running.
    pub fn connect(path: &Path, events: Vec<Event>, inbox: &Inbox) -> Result<Self, VtpmError> {
        let socket = path.to_owned();
        let client = inbox
            .attend("the TPM service to answer", POWER_ON_PATIENCE, move || Client::connect(&socket))
            .map_err(|source| VtpmError::Unattended { program: path.display().to_string(), source })?
            .map_err(|source| VtpmError::Socket { path: path.to_owned(), source })?;
        Ok(Self::new(client, events, None, inbox.events()))
    }

    fn new(client: Client, events: Vec<Event>, service: Option<Service>, sink: &Events) -> Self {
        let control = Mutex::new(client.control());
        let link = Arc::new(Link { client: Mutex::new(client), control, told: AtomicBool::new(false) });
        let found = Arc::default();
        Vtpm {
            link,
            events: events.into(),
            sink: sink.clone(),
            found,
            service,
            again: None,
            started_again: 0,
        }
    }

    fn control(&self) -> Control {
        lock(&self.link.control).clone()
    }

    /// Starts a service again that has died. What is returned must be connected to.
    fn start_again(&mut self) -> Result<Option<(UnixStream, String)>, VtpmError> {
        let Some(status) = self.service.as_mut().and_then(Service::ended) else { return Ok(None) };
        let Some(options) = self.again.as_ref().filter(|_| self.started_again < STARTS_AGAIN) else {
            return Ok(None);
        };
        self.started_again += 1;
        self.sink.warn(format_args!(
            "the vTPM service has ended ({status}); it is started again for this VM (time {} of {STARTS_AGAIN} at most)",
            self.started_again
        ));
        let (connection, name, service) = service::start_again(options)?;
        self.service = Some(service);
        Ok(Some((connection, name)))
    }

    /// Gives the TPM to a machine: registers on its bus, the buffer page as memory.
    fn connect_devices(&self, machine: &Machine) -> Result<(), VtpmError> {
        let host = |what| move |source| VtpmError::Host { what, source };
        let page = Mapping::anonymous(tpm_crb::BUFFER_LEN as u64).map_err(host("the buffer page"))?;
        let page = Arc::new(page);
        machine.slots.add(layout::TPM_BUFFER.into(), &page)?;
        let backend = Box::new(ServiceBackend(Arc::clone(&self.link), self.sink.clone()));
        let cancel = self.canceller().map_err(host("a thread"))?;
        let crb = Crb::new(Arc::new(Page(page)), layout::TPM_BUFFER.into(), backend, cancel);
        let crb = crb.map_err(host("a thread"))?;
        machine.mmio.insert(layout::TPM_REGISTERS.into(), tpm_crb::LEN, Arc::new(Mutex::new(crb)))?;
        let ppi = Ppi::new(lock(&self.found).mail, self.submitter().map_err(host("a thread"))?);
        machine.mmio.insert(layout::TPM_PRESENCE.into(), tpm_ppi::LEN, Arc::new(Mutex::new(ppi)))?;
        Ok(())
    }

    /// What the device calls with a request.
    fn submitter(&self) -> io::Result<Submit> {
        let (control, sink) = (self.control(), self.sink.clone());
        presence::submitter(SUBMIT_PATIENCE, move |operation, argument, hears| {
            if let Err(e) = control.submit_ppi_for(operation, argument, hears) {
                sink.warn(format_args!(
                    "a physical-presence request of the guest (operation {operation}) was stored too late and could not be taken back: {e}; \
                     see what waits with `cvmm vmgs ppi`"
                ));
            }
        })
    }

    /// What the device calls to cancel. It must not wait for the service, so a thread does.
    fn canceller(&self) -> io::Result<Box<dyn Fn() + Send>> {
        let (wanted, orders) = mpsc::sync_channel(1);
        let control = self.control();
        spawn("tpm-cancel".into(), move || {
            // A service that is gone is reported by whoever waits for the command.
            orders.iter().for_each(|()| drop(control.cancel()));
        })
        .map_err(|e| e.0)?;
        Ok(Box::new(move || {
            // Full: a cancel is on its way already.
            let _ = wanted.try_send(());
        }))
    }
}

impl Companion for Vtpm {
    fn name(&self) -> &'static str {
        "the vTPM"
    }

    /// Powers the TPM on as at a reset of the machine, and measures the boot into it.
    fn prepare(&mut self, _life: u32) -> Option<(Duration, Work)> {
        let new = self.start_again();
        let link = Arc::clone(&self.link);
        let (events, found) = (Arc::clone(&self.events), Arc::clone(&self.found));
        let sink = self.sink.clone();
        let work = move || -> Result<(), VtpmError> {
            if let Some((connection, name)) = new? {
                let client = Client::over(connection, &name)?;
                *lock(&link.control) = client.control();
                *lock(&link.client) = client;
                link.told.store(false, Ordering::Release);
                // It stores through the old connection.
                lock(&found).clock = None;
            }
            let control = lock(&link.control).clone();
            power_on(&link, &control, &events)?;
            let mail = mail(&control)?;
            let clock = match lock(&found).clock {
                Some(_) => None,
                None => Clock::new(&control, &sink)?,
            };
            let mut found = lock(&found);
            found.mail = mail;
            found.clock = found.clock.take().or(clock);
            Ok(())
        };
        Some((POWER_ON_PATIENCE, Box::new(move || Ok(work()?))))
    }

    /// The service may have died while it was asked.
    fn recovers(&mut self) -> bool {
        if self.again.is_none() || self.started_again >= STARTS_AGAIN {
            return false;
        }
        self.service.as_mut().is_some_and(|service| service.ends_within(DEATH_PATIENCE))
    }

    /// Gives the TPM to the VM.
    fn attach(&mut self, _life: u32, machine: &Machine) -> Result<(), Box<dyn Error + Send + Sync>> {
        if let Some(clock) = &lock(&self.found).clock {
            lock(&machine.rtc).keep(clock.ahead(), Some(clock.store()));
        }
        Ok(self.connect_devices(machine)?)
    }
}

/// Off, on, and the PCRs as the event log says.
fn power_on(link: &Link, control: &Control, events: &[Event]) -> Result<(), VtpmError> {
    // A command of the guest before the reset may still be running.
    control.cancel().or_else(|e| match e {
        // Before the first power-on there is nothing to cancel.
        ClientError::Refused { .. } => Ok(()),
        other => Err(other),
    })?;
    let deadline = Instant::now() + COMMAND_PATIENCE;
    let mut client = loop {
        match link.client.try_lock() {
            Ok(client) => break client,
            Err(TryLockError::Poisoned(client)) => break client.into_inner(),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Err(VtpmError::Busy),
            Err(TryLockError::WouldBlock) => thread::sleep(COMMAND_PAUSE),
        }
    };
    client.reset(tpm_crb::BUFFER_LEN as u32)?;
    let mut transmit = |command: &[u8]| client.execute(0, command).map_err(|e| e.to_string());
    Ok(vtpm_svc::measured::extend(&mut transmit, events)?)
}

/// What waits and what was done of the guest's physical-presence requests; nothing at a service that does not
/// know them.
fn mail(control: &Control) -> Result<Mail, VtpmError> {
    match control.ppi() {
        Ok([request, _, last, response]) => Ok(Mail { request, last, response }),
        Err(ClientError::Refused { .. }) => Ok(Mail::default()),
        Err(e) => Err(e.into()),
    }
}

impl Drop for Vtpm {
    /// The guest is over: a service that was started for it ends, its state on disk.
    fn drop(&mut self) {
        self.link.told.store(true, Ordering::Release);
        if let Some(clock) = &lock(&self.found).clock {
            clock.settle();
        }
        if let Some(service) = self.service.take() {
            service.end(self.control(), &self.sink);
        }
    }
}

/// The way to the service, for the device's thread.
struct ServiceBackend(Arc<Link>, Events);

impl Backend for ServiceBackend {
    fn execute(&mut self, locality: u8, command: &[u8]) -> Result<Vec<u8>, BackendError> {
        lock(&self.0.client).execute(locality, command).map_err(|e| {
            if !self.0.told.swap(true, Ordering::AcqRel) {
                self.1
                    .warn(format_args!("the vTPM service is gone ({e}); the guest's TPM fails from now on"));
            }
            BackendError(e.to_string())
        })
    }
}

/// The shared page, for the device.
struct Page(Arc<Mapping>);

impl Buffer for Page {
    fn read(&self, offset: usize, out: &mut [u8]) {
        // The device keeps within the page.
        let _ = self.0.read(offset as u64, out);
    }

    fn write(&self, offset: usize, data: &[u8]) {
        let _ = self.0.write(offset as u64, data);
    }
}
