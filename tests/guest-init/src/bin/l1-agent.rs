// SPDX-License-Identifier: Apache-2.0
//! Process 1 of the outer guest of a nested run: gives jobs from the harness the host's file system and a
//! KVM.
//!
//! The host's root comes read-only over 9p and becomes the root here, so ordinary dynamically linked programs
//! run; one directory named on the kernel command line (`cvmm.share=PATH`) is mounted writable at the same
//! path. Jobs arrive on a virtio-serial port; when the harness goes away, so does this machine.
//!
//! An emulator without these devices says so on the kernel command line: `cvmm.root=cdrom` is a root made of
//! a CD's directory `host` and of memory that is written to, and with `cvmm.agent=TTY` jobs arrive on a
//! serial port.

use std::collections::HashMap;
use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io::BufReader;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use guest_init::frame;
use guest_init::frame::Hello;
use guest_init::frame::Message;
use guest_init::job;
use guest_init::job::Control;
use guest_init::job::Event;
use guest_init::pid1;
use rustix::mount::MountFlags;
use rustix::system::RebootCommand;
use rustix::termios::OptionalActions;
use rustix::termios::tcgetattr;
use rustix::termios::tcsetattr;

/// The fastest that a PC's serial port goes, in bits per second.
const SPEED: u32 = 115_200;

fn main() {
    if let Err(error) = run() {
        eprintln!("l1-agent: {error:#}");
    }
    eprintln!("l1-agent: powering off");
    let refusal = pid1::end(RebootCommand::PowerOff);
    eprintln!("l1-agent: {refusal:#}");
}

fn run() -> Result<()> {
    pid1::mount_basics("")?;
    for failure in pid1::load_modules() {
        eprintln!("l1-agent: module not loaded: {failure}");
    }
    let port = match command_line_value("cvmm.agent") {
        Some(name) => open_serial(&Path::new("/dev").join(name))?,
        None => find_port()?,
    };
    match command_line_value("cvmm.root").as_deref() {
        Some("cdrom") => enter_cdrom_root()?,
        Some(other) => bail!("cvmm.root={other} is not known"),
        None => enter_host_root()?,
    }
    let hello = Hello {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().into(),
        kvm_error: OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .err()
            .map(|error| format!("/dev/kvm: {error}")),
    };
    eprintln!("l1-agent: ready, kernel {}", hello.kernel);
    serve(port, hello)
}

/// Opens the harness's port: without udev its name is found in sysfs.
fn find_port() -> Result<File> {
    for _ in 0..100 {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == frame::PORT_NAME {
                let device = PathBuf::from("/dev").join(entry.file_name());
                return OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&device)
                    .with_context(|| format!("cannot open {}", device.display()));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("no virtio-serial port named {} appeared within 5 s", frame::PORT_NAME)
}

/// A serial port that hands through every byte as it is.
fn open_serial(device: &Path) -> Result<File> {
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NOCTTY.bits().cast_signed())
        .open(device)
        .with_context(|| format!("cannot open {}", device.display()))?;
    let mut settings = tcgetattr(&port).context("tcgetattr")?;
    settings.make_raw();
    settings.set_speed(SPEED).context("the speed of the serial port")?;
    tcsetattr(&port, OptionalActions::Now, &settings).context("tcsetattr")?;
    Ok(port)
}

fn enter_cdrom_root() -> Result<()> {
    let device = Path::new("/dev/sr0");
    for _ in 0..600 {
        if device.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let none = MountFlags::empty();
    pid1::mount_at("/dev/sr0", "/cdrom", "iso9660", MountFlags::RDONLY, "")?;
    pid1::mount_at("tmpfs", "/written", "tmpfs", none, "mode=755")?;
    for directory in ["/written/upper", "/written/work"] {
        fs::create_dir(directory).with_context(|| format!("cannot create {directory}"))?;
    }
    let layers = "lowerdir=/cdrom/host,upperdir=/written/upper,workdir=/written/work";
    pid1::mount_at("overlay", "/host", "overlay", none, layers)?;
    pid1::mount_basics("/host")?;
    // Writable as they are; a file system of its own would hide copies that lie below.
    for directory in ["/host/tmp", "/host/run"] {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {directory}"))?;
    }
    enter("/host")
}

/// What every root gets, and the change into it.
fn enter(root: &str) -> Result<()> {
    let none = MountFlags::empty();
    pid1::mount_at("tmpfs", &format!("{root}/dev/shm"), "tmpfs", none, "mode=1777")?;
    pid1::mount_at("devpts", &format!("{root}/dev/pts"), "devpts", none, "")?;
    std::os::unix::fs::chroot(root).context("chroot")?;
    std::env::set_current_dir("/").context("chdir")
}

fn enter_host_root() -> Result<()> {
    let options = "trans=virtio,version=9p2000.L,msize=512000";
    let none = MountFlags::empty();
    pid1::mount_at("host", "/host", "9p", MountFlags::RDONLY, &format!("{options},cache=loose"))?;
    pid1::mount_basics("/host")?;
    let share = command_line_value("cvmm.share").context("cvmm.share is not on the kernel command line")?;
    // A file system of its own on /tmp would hide a share that lies below it.
    for directory in ["/tmp", "/run"].into_iter().filter(|directory| !share.starts_with(directory)) {
        pid1::mount_at("tmpfs", &format!("/host{directory}"), "tmpfs", none, "mode=1777")?;
    }
    pid1::mount_at("share", &format!("/host{share}"), "9p", none, &format!("{options},cache=mmap"))?;
    enter("/host")
}

fn command_line_value(name: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).map(String::from)
}

/// Takes messages until the port ends.
fn serve(port: File, hello: Hello) -> Result<()> {
    let writer = Arc::new(Mutex::new(port.try_clone().context("cannot duplicate the port")?));
    let mut reader = BufReader::new(port);
    send(&writer, 0, &Message::Hello(hello));
    let mut jobs: HashMap<u32, Control> = HashMap::new();
    loop {
        let (number, message) = frame::read(&mut reader).context("the harness's port")?;
        match message {
            Message::Start(job) => {
                let writer = Arc::clone(&writer);
                let sink = move |event| {
                    let message = match event {
                        Event::Stdout(bytes) => Message::Stdout(bytes),
                        Event::Stderr(bytes) => Message::Stderr(bytes),
                        Event::Ended(ending, time) => {
                            // What the job wrote to the share must be on the host before its end is known
                            // there.
                            rustix::fs::sync();
                            Message::Ended(ending, time)
                        }
                    };
                    send(&writer, number, &message);
                };
                jobs.insert(number, job::start(&job, sink));
            }
            Message::Stdin(bytes) => {
                if let Some(control) = jobs.get(&number) {
                    if bytes.is_empty() { control.close_stdin() } else { control.write_stdin(&bytes) }
                }
            }
            Message::Signal(signal) => {
                if let Some(control) = jobs.get(&number) {
                    control.signal(signal);
                }
            }
            other => bail!("the harness sent {other:?}, which only an agent sends"),
        }
    }
}

fn send(writer: &Mutex<File>, job: u32, message: &Message) {
    let mut port = writer.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = frame::write(&mut *port, job, message) {
        eprintln!("l1-agent: cannot send: {error}");
    }
}
