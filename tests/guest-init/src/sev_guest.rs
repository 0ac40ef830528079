// SPDX-License-Identifier: Apache-2.0
//! Asks `/dev/sev-guest` for reports and keys, as Linux defines it (include/uapi/linux/sev-guest.h;
//! message contents: SEV-SNP Firmware ABI 1.58, chapter 7).
//!
//! The three requests are ioctls whose argument holds addresses of a request and a response buffer; issuing
//! them is the one thing here that the compiler cannot check.
#![allow(unsafe_code)]

use std::fs::File;
use std::fs::OpenOptions;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::io::Errno;
use rustix::ioctl;
use rustix::ioctl::Opcode;
use rustix::ioctl::Updater;

/// Bytes of an attestation report.
pub const REPORT_SIZE: usize = 0x4a0;
/// Bytes of a derived key.
pub const KEY_SIZE: usize = 32;

/// Offset of the payload in both kinds of response.
const PAYLOAD: usize = 0x20;
/// Linux takes certificate buffers of up to four pages.
const CERTIFICATE_PAGES: usize = 4;
const PAGE: usize = 4096;

/// `struct snp_guest_request_ioctl`.
#[repr(C)]
struct Envelope {
    version: u8,
    request: u64,
    response: u64,
    /// Firmware's error in the low half, the hypervisor's in the high half.
    error: u64,
}

/// `struct snp_report_req`.
#[repr(C)]
struct ReportRequest {
    user_data: [u8; 64],
    vmpl: u32,
    reserved: [u8; 28],
}

/// `struct snp_ext_report_req`.
#[repr(C)]
struct ExtendedReportRequest {
    report: ReportRequest,
    certificates: u64,
    length: u32,
}

/// `struct snp_derived_key_req`.
#[repr(C)]
struct KeyRequest {
    root_key_select: u32,
    reserved: u32,
    guest_field_select: u64,
    vmpl: u32,
    guest_svn: u32,
    tcb_version: u64,
}

const GET_REPORT: Opcode = ioctl::opcode::read_write::<Envelope>(b'S', 0);
const GET_DERIVED_KEY: Opcode = ioctl::opcode::read_write::<Envelope>(b'S', 1);
const GET_EXT_REPORT: Opcode = ioctl::opcode::read_write::<Envelope>(b'S', 2);

/// Where the kernel's driver is found.
pub const DEVICE: &str = "/dev/sev-guest";

/// The opened device.
pub struct SevGuest {
    device: File,
}

impl SevGuest {
    /// Opens the device.
    pub fn open() -> Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE).context(DEVICE)?;
        Ok(SevGuest { device })
    }

    /// A report that carries `user_data`.
    pub fn report(&self, user_data: [u8; 64]) -> Result<[u8; REPORT_SIZE]> {
        let request = ReportRequest { user_data, vmpl: 0, reserved: [0; 28] };
        let mut response = [0; 4000];
        // SAFETY: the kernel reads a `snp_report_req` and writes at most 4000 bytes; both live until the call
        // returns.
        let answer =
            unsafe { self.call::<GET_REPORT>(&raw const request as u64, response.as_mut_ptr() as u64) };
        answer?;
        report_in(&response)
    }

    /// A report with the certificate table that the host attaches; the table is empty if it attaches none.
    pub fn extended_report(&self, user_data: [u8; 64]) -> Result<([u8; REPORT_SIZE], Vec<u8>)> {
        let mut table = vec![0; CERTIFICATE_PAGES * PAGE];
        let mut response = [0; 4000];
        let mut request = ExtendedReportRequest {
            report: ReportRequest { user_data, vmpl: 0, reserved: [0; 28] },
            certificates: table.as_mut_ptr() as u64,
            length: table.len() as u32,
        };
        // SAFETY: the kernel reads and writes a `snp_ext_report_req`, writes at most 4000 bytes to the
        // response and `length` bytes to the certificate table; all three live until the call returns.
        let answer =
            unsafe { self.call::<GET_EXT_REPORT>(&raw mut request as u64, response.as_mut_ptr() as u64) };
        answer.with_context(|| format!("certificates need {} bytes", request.length))?;
        Ok((report_in(&response)?, table))
    }

    /// A key derived from the chip's key and the measurement (field select bit 3).
    pub fn derived_key(&self) -> Result<[u8; KEY_SIZE]> {
        let request = KeyRequest {
            root_key_select: 0,
            reserved: 0,
            guest_field_select: 1 << 3,
            vmpl: 0,
            guest_svn: 0,
            tcb_version: 0,
        };
        let mut response = [0; 64];
        // SAFETY: the kernel reads a `snp_derived_key_req` and writes at most 64 bytes; both live until the
        // call returns.
        let answer =
            unsafe { self.call::<GET_DERIVED_KEY>(&raw const request as u64, response.as_mut_ptr() as u64) };
        answer?;
        check_status(&response)?;
        let mut key = [0; KEY_SIZE];
        key.copy_from_slice(&response[PAYLOAD..PAYLOAD + KEY_SIZE]);
        Ok(key)
    }

    /// Issues one request.
    ///
    /// # Safety
    /// `request` and `response` must be addresses of live buffers of the types and sizes that `OPCODE`
    /// demands.
    unsafe fn call<const OPCODE: Opcode>(&self, request: u64, response: u64) -> Result<()> {
        let mut envelope = Envelope { version: 1, request, response, error: 0 };
        // SAFETY: OPCODE is one of the three requests above, all of which take an `Envelope`; the caller
        // vouches for the buffers that it points to.
        let result: Result<(), Errno> =
            unsafe { ioctl::ioctl(&self.device, Updater::<OPCODE, Envelope>::new(&mut envelope)) };
        result.with_context(|| {
            format!(
                "firmware error {:#x}, hypervisor error {:#x}",
                envelope.error as u32,
                envelope.error >> 32
            )
        })
    }
}

fn check_status(response: &[u8]) -> Result<()> {
    match response {
        [0, 0, 0, 0, ..] => Ok(()),
        [a, b, c, d, ..] => bail!("firmware status {:#x}", u32::from_le_bytes([*a, *b, *c, *d])),
        _ => bail!("a response without a status"),
    }
}

fn report_in(response: &[u8; 4000]) -> Result<[u8; REPORT_SIZE]> {
    check_status(response)?;
    let mut report = [0; REPORT_SIZE];
    report.copy_from_slice(&response[PAYLOAD..PAYLOAD + REPORT_SIZE]);
    Ok(report)
}
