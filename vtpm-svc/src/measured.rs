// SPDX-License-Identifier: Apache-2.0
//! Measured boot of a guest that has no firmware: the monitor plays its part.
//!
//! With direct kernel boot nobody inside the guest measures what starts it. So before the first vCPU runs,
//! [`Boot`] makes the events that firmware would have logged, [`log`] writes them as a TCG event log, and
//! [`extend`] brings the PCRs to the same values. The log can be made before the TPM exists, and so it can be
//! part of the launch digest.
//!
//! These values are *host-asserted*: they say what the host claims to have loaded. In an SNP guest the launch
//! digest, which the firmware of the CPU vouches for, covers the same files.
//!
//! TCG PC Client Platform Firmware Profile 1.05, chapters 3, 9 and 10.

pub mod authenticode;
pub mod log;

use sha2::Digest;
use sha2::Sha256;
use sha2::Sha384;

use crate::tpm::commands;
use crate::tpm::commands::CommandError;
use crate::tpm::commands::Transport;
use crate::tpm::commands::alg;

/// Event types that are used.
pub mod kind {
    #![allow(missing_docs)]
    pub const NO_ACTION: u32 = 0x03;
    pub const SEPARATOR: u32 = 0x04;
    pub const EVENT_TAG: u32 = 0x06;
    pub const S_CRTM_VERSION: u32 = 0x08;
    pub const IPL: u32 = 0x0d;
    pub const EFI_VARIABLE_DRIVER_CONFIG: u32 = 0x8000_0001;
    pub const EFI_BOOT_SERVICES_APPLICATION: u32 = 0x8000_0003;
    pub const EFI_ACTION: u32 = 0x8000_0007;
    pub const EFI_PLATFORM_FIRMWARE_BLOB: u32 = 0x8000_0008;
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// PCR that is extended.
    pub pcr: u32,
    /// Event type.
    pub kind: u32,
    /// Digest per bank, in the order of [`BANKS`](crate::tpm::commands::BANKS).
    pub digests: Vec<(u16, Vec<u8>)>,
    /// Event data.
    pub data: Vec<u8>,
}

impl Event {
    /// An event whose digests are those of its own data.
    fn of_data(pcr: u32, kind: u32, data: Vec<u8>) -> Self {
        let digests = digests(&data);
        Self { pcr, kind, digests, data }
    }
}

fn digests(data: &[u8]) -> Vec<(u16, Vec<u8>)> {
    vec![(alg::SHA256, Sha256::digest(data).to_vec()), (alg::SHA384, Sha384::digest(data).to_vec())]
}

/// Little-endian UTF-16 with a final zero.
fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

/// What is booted.
#[derive(Debug, Clone)]
pub struct Boot<'a> {
    /// Name and version of the monitor.
    pub monitor: &'a str,
    /// Code of ours that runs in the guest before the kernel, and where it lies.
    pub stage0: Option<(u64, &'a [u8])>,
    /// The kernel file.
    pub kernel: &'a [u8],
    /// Where the kernel lies.
    pub kernel_address: u64,
    /// The initrd, if any.
    pub initrd: Option<&'a [u8]>,
    /// The command line.
    pub cmdline: &'a str,
}

/// `EFI_GLOBAL_VARIABLE`, as bytes.
const GLOBAL: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
/// `EFI_IMAGE_SECURITY_DATABASE_GUID`, as bytes.
const SECURITY: [u8; 16] =
    [0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f];
/// Tag of Linux' EFI stub for the initrd.
const INITRD_TAG: u32 = 0x8f3b_22ec;

fn variable(vendor: [u8; 16], name: &str, value: &[u8]) -> Vec<u8> {
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut data = vendor.to_vec();
    data.extend_from_slice(&(name.len() as u64 / 2).to_le_bytes());
    data.extend_from_slice(&(value.len() as u64).to_le_bytes());
    data.extend_from_slice(&name);
    data.extend_from_slice(value);
    data
}

impl Boot<'_> {
    /// The events, in the order in which firmware has them.
    pub fn events(&self) -> Vec<Event> {
        let mut events = vec![Event::of_data(0, kind::S_CRTM_VERSION, utf16(self.monitor))];
        if let Some((address, bytes)) = self.stage0 {
            let mut data = address.to_le_bytes().to_vec();
            data.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            let kind = kind::EFI_PLATFORM_FIRMWARE_BLOB;
            events.push(Event { pcr: 0, kind, digests: digests(bytes), data });
        }
        // Secure Boot is off and its variables are empty: nothing verifies a directly booted kernel's
        // signature.
        for (vendor, name, value) in [
            (GLOBAL, "SecureBoot", &[0u8][..]),
            (GLOBAL, "PK", &[]),
            (GLOBAL, "KEK", &[]),
            (SECURITY, "db", &[]),
            (SECURITY, "dbx", &[]),
        ] {
            events.push(Event::of_data(7, kind::EFI_VARIABLE_DRIVER_CONFIG, variable(vendor, name, value)));
        }
        events.push(separator(7));
        // Verifiers want this action before the first application, also where there is no boot menu.
        let action = b"Calling EFI Application from Boot Option".to_vec();
        events.push(Event::of_data(4, kind::EFI_ACTION, action));
        events.extend((0..7).map(separator));
        events.push(self.kernel_event());
        if let Some(initrd) = self.initrd {
            let name = b"Linux initrd\0";
            let mut data = INITRD_TAG.to_le_bytes().to_vec();
            data.extend_from_slice(&(name.len() as u32).to_le_bytes());
            data.extend_from_slice(name);
            events.push(Event { pcr: 9, kind: kind::EVENT_TAG, digests: digests(initrd), data });
        }
        events.push(Event::of_data(12, kind::IPL, utf16(self.cmdline)));
        for action in ["Exit Boot Services Invocation", "Exit Boot Services Returned with Success"] {
            events.push(Event::of_data(5, kind::EFI_ACTION, action.as_bytes().to_vec()));
        }
        events
    }

    fn kernel_event(&self) -> Event {
        let digests = match authenticode::spans(self.kernel) {
            Ok(spans) => {
                let (mut a, mut b) = (Sha256::new(), Sha384::new());
                for span in spans {
                    a.update(&self.kernel[span.clone()]);
                    b.update(&self.kernel[span]);
                }
                vec![(alg::SHA256, a.finalize().to_vec()), (alg::SHA384, b.finalize().to_vec())]
            }
            // Not a PE file (an ELF kernel): the digest of the whole file.
            Err(_) => digests(self.kernel),
        };
        // UEFI_IMAGE_LOAD_EVENT: location, length, link-time address, length of the device path, which is
        // only an end node.
        let mut data = Vec::new();
        for word in [self.kernel_address, self.kernel.len() as u64, 0, 4] {
            data.extend_from_slice(&word.to_le_bytes());
        }
        data.extend_from_slice(&[0x7f, 0xff, 4, 0]);
        Event { pcr: 4, kind: kind::EFI_BOOT_SERVICES_APPLICATION, digests, data }
    }
}

fn separator(pcr: u32) -> Event {
    Event::of_data(pcr, kind::SEPARATOR, vec![0; 4])
}

/// Starts and tests the TPM, extends its PCRs with the events, and takes the platform hierarchy away from the
/// guest, as firmware does before it hands over.
pub fn extend(tpm: &mut dyn Transport, events: &[Event]) -> Result<(), CommandError> {
    commands::startup_clear(tpm)?;
    commands::self_test(tpm)?;
    for event in events.iter().filter(|e| e.kind != kind::NO_ACTION) {
        commands::pcr_extend(tpm, event.pcr, &event.digests)?;
    }
    commands::disable_platform(tpm)
}

/// The PCR values that the events lead to, in one bank; PCRs that no event names are left out.
pub fn replay(events: &[Event], bank: u16) -> std::collections::BTreeMap<u32, Vec<u8>> {
    let mut pcrs = std::collections::BTreeMap::new();
    for event in events.iter().filter(|e| e.kind != kind::NO_ACTION) {
        let Some((_, digest)) = event.digests.iter().find(|(alg, _)| *alg == bank) else { continue };
        let value = pcrs.entry(event.pcr).or_insert_with(|| vec![0; digest.len()]);
        value.extend_from_slice(digest);
        *value = match bank {
            alg::SHA384 => Sha384::digest(&*value).to_vec(),
            _ => Sha256::digest(&*value).to_vec(),
        };
    }
    pcrs
}
