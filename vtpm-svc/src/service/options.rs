// SPDX-License-Identifier: Apache-2.0
//! What a service is to do, in plain values, whoever asks for it.

use std::fs::File;
use std::os::fd::RawFd;
use std::path::PathBuf;

use super::error::ServiceError;
use super::image::ImageOptions;
use crate::control::listen::Channel;
use crate::tpm::Policy;
use crate::tpm::power::Startup;

/// A served TPM.
pub struct ServiceOptions {
    /// The image.
    pub image: ImageOptions,
    /// Where control clients come from.
    pub control: Option<Channel>,
    /// Where data clients come from.
    pub data: Option<Channel>,
    /// Inherited descriptors that stay open, beside the channels': files that are named as `/dev/fd/N`.
    pub descriptors: Vec<RawFd>,
    /// What clients may do with the TPM.
    pub policy: Policy,
    /// The service ends when the control client is gone.
    pub terminate: bool,
    /// The TPM is powered on at once, and started like this.
    pub startup: Option<Startup>,
    /// Most stores of the guest's state a second in the long run; 0 is no limit.
    pub store_limit: u32,
    /// Folder of the authority that certifies the keys of a new TPM.
    pub authority: Option<PathBuf>,
    /// File of the platform certificate that goes into a new TPM.
    pub platform_certificate: Option<PathBuf>,
    /// The process goes to the background when everything is ready.
    pub daemon: bool,
    /// Where the process id is written.
    pub pid: Option<PathBuf>,
    /// Where the log is written, if not to standard error.
    pub log: Option<LogFile>,
    /// System calls that are not needed end the process.
    pub seccomp: bool,
}

/// A file that the log goes to.
pub struct LogFile {
    /// Its path.
    pub path: PathBuf,
    /// What was in it goes.
    pub truncate: bool,
}

impl LogFile {
    pub(super) fn open(&self) -> Result<File, ServiceError> {
        let Self { path, truncate } = self;
        let file = File::options().create(true).append(!truncate).write(true).truncate(*truncate).open(path);
        file.map_err(ServiceError::io(format!("log {}", path.display())))
    }
}

impl ServiceOptions {
    fn channels(&self) -> impl Iterator<Item = &Channel> {
        self.control.iter().chain(&self.data)
    }

    /// Inherited descriptors that are wanted.
    pub(super) fn named_descriptors(&self) -> Vec<RawFd> {
        let channels = self.channels().filter_map(|channel| match channel {
            Channel::Listening(fd) | Channel::Connected(fd) => Some(*fd),
            Channel::Unix { .. } | Channel::Tcp { .. } => None,
        });
        channels.chain(self.descriptors.iter().copied()).collect()
    }

    /// Whether names come into the file system that have to go at the end.
    pub(super) fn makes_names(&self) -> bool {
        self.pid.is_some() || self.channels().any(|channel| matches!(channel, Channel::Unix { .. }))
    }
}
