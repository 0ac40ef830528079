// SPDX-License-Identifier: Apache-2.0
//! How calls through the seam fail: as the kernel would, by an errno, and for SEV commands by the firmware's
//! status.

use std::fmt;
use std::io;

/// A KVM call that failed, with the call's name.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub struct CallError {
    /// Name of the ioctl or system call.
    pub call: &'static str,
    /// What the kernel (or the model of it) answered.
    pub source: io::Error,
}

impl CallError {
    /// A function that wraps an errno of `kvm-ioctls` for `map_err`.
    pub fn of(call: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> CallError {
        move |e| CallError { call, source: io::Error::from_raw_os_error(e.errno()) }
    }

    /// From a raw errno value.
    pub fn errno(call: &'static str, errno: i32) -> CallError {
        CallError { call, source: io::Error::from_raw_os_error(errno) }
    }
}

/// A SEV command that failed: the errno, and the firmware's status in `kvm_sev_cmd.error`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SevError {
    /// The command, such as `SNP_LAUNCH_UPDATE`.
    pub command: &'static str,
    /// The errno of the ioctl.
    pub errno: i32,
    /// The firmware status; 0 means that the firmware gave no verdict.
    pub firmware: u32,
}

impl std::error::Error for SevError {}

impl fmt::Display for SevError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.command, io::Error::from_raw_os_error(self.errno))?;
        match self.firmware {
            0 => write!(f, " (no verdict of the firmware: KVM refused it)"),
            code => {
                write!(f, " (firmware status {code:#x}: {})", snp::firmware_status::FwStatus(code))
            }
        }
    }
}
