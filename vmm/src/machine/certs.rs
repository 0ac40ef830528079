// SPDX-License-Identifier: Apache-2.0
//! The certificate table for a guest that asks for it together with its report.
//!
//! `KVM_EXIT_SNP_REQ_CERTS` (Linux 7.0, `Documentation/virt/kvm/api.rst`). The guest chooses address and size
//! of the buffer, so both are checked: only shared RAM is written to. Certificates spare the guest a request
//! to AMD's key server; it must verify them all the same.
//!
//! The table of a file is read at each request, so that it can be replaced while guests run. It must belong
//! to the key that signs the report, and that key can change at any time, by a firmware update for example.
//! The kernel's documentation therefore recommends a lock: the monitor holds a shared one on the file from
//! before it reads until the firmware has answered the guest's request; whoever changes the key holds an
//! exclusive one meanwhile. [`Held`] is that lock.

#![allow(unsafe_code, reason = "one fcntl for which rustix has no name: F_OFD_SETLK")]

use std::fs::File;
use std::io;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;

use rustix::fs::FlockOperation;
use snp::attest::cert_table;
use snp::attest::cert_table::TableError;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;

use crate::events::Events;
use crate::lock::lock;
use crate::machine::dma::Dma;
use crate::platform::mapping::PAGE;

/// Largest file that is taken, in bytes; five certificates have less than 10 KiB.
pub const FILE_LIMIT: u64 = 64 << 10;
/// What Linux guests have room for (`SEV_FW_BLOB_MAX_SIZE`).
pub const LINUX_GUEST_LIMIT: u64 = 16 << 10;

/// Why there is no table at the moment.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum CertsError {
    /// Somebody changes it now.
    #[error("{} is locked exclusively: its certificates, or the key that they belong to, are being changed", .0.display())]
    Locked(PathBuf),
    /// The file.
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    /// Not a file that can be read whole.
    #[error("{}: expected a file of 24 to {FILE_LIMIT} bytes", .0.display())]
    Size(PathBuf),
    /// What it holds.
    #[error("{} is no table of certificates (GHCB specification, 4.1.8.1): {source}. `cvmm certs` makes one", path.display())]
    Table { path: PathBuf, source: TableError },
}

impl CertsError {
    /// What the guest is told: to come back later, or that there is nothing.
    fn errno(&self) -> i32 {
        if matches!(self, CertsError::Locked(_)) { libc::EAGAIN } else { libc::EIO }
    }
}

/// A file that must not be changed while this lives.
#[derive(Debug)]
pub struct Held {
    _file: File,
}

/// A file with a table.
pub struct CertFile {
    path: PathBuf,
    /// The last complaint: a guest may ask as often as it likes.
    complaint: Mutex<String>,
    events: Events,
}

impl CertFile {
    /// The file at `path`, which must hold a table now.
    pub fn open(path: &Path, events: &Events) -> Result<Self, CertsError> {
        let file = CertFile { path: path.to_owned(), complaint: Mutex::default(), events: events.clone() };
        let (table, _held) = file.read()?;
        if table.len() as u64 > LINUX_GUEST_LIMIT {
            events.warn(format_args!(
                "`certs` {}: {} bytes, Linux guests have room for {LINUX_GUEST_LIMIT}",
                path.display(),
                table.len()
            ));
        }
        Ok(file)
    }

    /// Reads and checks the table, under a lock that the caller keeps until the firmware has answered.
    fn read(&self) -> Result<(Vec<u8>, Held), CertsError> {
        let path = &self.path;
        let fail = |source| CertsError::File { path: path.clone(), source };
        // A pipe in its place must not make a vCPU wait.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(fail)?;
        if !file.metadata().map_err(fail)?.is_file() {
            return Err(CertsError::Size(path.clone()));
        }
        // Tools after the kernel's documentation use fcntl's locks, flock(1) and shell scripts the other
        // kind.
        for locked in [
            lock_ofd(&file),
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).map_err(Into::into),
        ] {
            match locked.map_err(|e: io::Error| (e.raw_os_error(), e)) {
                Ok(()) => {}
                Err((Some(libc::EAGAIN | libc::EACCES), _)) => return Err(CertsError::Locked(path.clone())),
                Err((_, e)) => return Err(fail(e)),
            }
        }
        let mut table = Vec::new();
        (&file).take(FILE_LIMIT + 1).read_to_end(&mut table).map_err(fail)?;
        if table.len() as u64 > FILE_LIMIT {
            return Err(CertsError::Size(path.clone()));
        }
        cert_table::parse(&table).map_err(|source| CertsError::Table { path: path.clone(), source })?;
        Ok((table, Held { _file: file }))
    }

    /// Says what is wrong on standard error, unless that was the last thing said.
    fn complain(&self, error: Option<&CertsError>) {
        let text = error.map(ToString::to_string).unwrap_or_default();
        let mut last = lock(&self.complaint);
        if *last != text {
            if !text.is_empty() {
                self.events.warn(format_args!("the guest asked for certificates and got none: {text}"));
            }
            *last = text;
        }
    }
}

/// A shared lock of the open file, not of the process: two vCPUs may ask at once, and the first to close its
/// file must not take the other's lock with it.
fn lock_ofd(file: &File) -> io::Result<()> {
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK reads `lock`, which outlives the call, and does nothing to memory.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where tables come from.
#[derive(Clone)]
pub enum Source {
    /// A file, read at each request.
    File(Arc<CertFile>),
    /// A table that the platform knows.
    Table(Arc<Vec<u8>>),
}

/// Answers a guest's requests.
pub struct Certificates {
    source: Source,
    dma: Dma,
}

/// Answer to the exit: what goes into `ret`, the pages that are needed if it is ENOSPC, and the lock.
#[derive(Debug)]
pub struct Answer {
    /// 0, ENOSPC, EAGAIN or EIO.
    pub ret: i32,
    /// Pages, for ENOSPC.
    pub npages: u64,
    /// To be dropped when the firmware has answered the request.
    pub held: Option<Held>,
}

impl Certificates {
    /// Offers the tables of `source` to a guest with this memory.
    pub fn new(source: Source, dma: Dma) -> Self {
        Certificates { source, dma }
    }

    /// Writes the table to the guest's buffer at `gpa`.
    pub fn answer(&self, gpa: u64, npages: u64) -> Answer {
        match &self.source {
            Source::Table(table) => self.deliver(table, None, gpa, npages),
            Source::File(file) => {
                let read = file.read();
                file.complain(read.as_ref().err());
                match read {
                    Ok((table, held)) => self.deliver(&table, Some(held), gpa, npages),
                    Err(e) => Answer { ret: e.errno(), npages, held: None },
                }
            }
        }
    }

    fn deliver(&self, table: &[u8], held: Option<Held>, gpa: u64, npages: u64) -> Answer {
        let needed = (table.len() as u64).div_ceil(PAGE);
        if npages < needed {
            return Answer { ret: libc::ENOSPC, npages: needed, held: None };
        }
        match gpa.is_multiple_of(PAGE) && self.dma.write_slice(table, GuestAddress(gpa)).is_ok() {
            true => Answer { ret: 0, npages, held },
            false => Answer { ret: libc::EIO, npages, held: None },
        }
    }
}

#[cfg(test)]
#[path = "certs_test.rs"]
mod tests;
