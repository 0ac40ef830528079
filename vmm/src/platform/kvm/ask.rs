// SPDX-License-Identifier: Apache-2.0
//! Two questions that `kvm-ioctls` has no call for: KVM's system attributes, and the SNP firmware's status.
//!
//! Linux, `Documentation/virt/kvm/api.rst` (`KVM_GET_DEVICE_ATTR` on the system descriptor) and
//! `include/uapi/linux/psp-sev.h` (`SEV_ISSUE_CMD` with `SNP_PLATFORM_STATUS`). Nothing is changed by either.

#![allow(unsafe_code, reason = "ioctls that hand the kernel addresses of our structs")]

use std::fs::File;
use std::io;

use kvm_bindings::KVM_X86_GRP_SEV;
use kvm_bindings::KVMIO;
use kvm_bindings::kvm_device_attr;
use kvm_ioctls::Kvm;
use serde::Deserialize;
use serde::Serialize;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;
use vmm_sys_util::ioctl_iowr_nr;

ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iowr_nr!(SEV_ISSUE_CMD, b'S' as u32, 0, SevIssueCmd);

/// `SNP_PLATFORM_STATUS`, the tenth command of the enumeration.
const SNP_PLATFORM_STATUS: u32 = 9;

/// `struct sev_issue_cmd`.
#[repr(C, packed)]
struct SevIssueCmd {
    cmd: u32,
    data: u64,
    error: u32,
}

const _: () = assert!(size_of::<SevIssueCmd>() == 16);

/// A system attribute of KVM's SEV group; `None` if this kernel does not have it.
pub(super) fn sev_attribute(kvm: &Kvm, attr: u32) -> Option<u64> {
    let mut value = 0u64;
    let question = kvm_device_attr {
        flags: 0,
        group: KVM_X86_GRP_SEV,
        attr: attr.into(),
        addr: std::ptr::from_mut(&mut value) as u64,
    };
    // SAFETY: the kernel reads `question`, and writes at most the 8 bytes of `value`, which outlives the
    // call.
    let result = unsafe { ioctl_with_ref(kvm, KVM_GET_DEVICE_ATTR(), &question) };
    // Read through a pointer: the compiler has not seen the kernel's write.
    // SAFETY: `value` is a valid, initialised integer.
    (result == 0).then(|| unsafe { std::ptr::read_volatile(&value) })
}

/// What the SNP firmware says about itself: `struct sev_user_data_snp_status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformStatus {
    /// Version of the firmware's ABI: major and minor.
    pub api: (u8, u8),
    /// 0 is uninitialised, 1 initialised.
    pub state: u8,
    /// The RMP is initialised.
    pub rmp_initialized: bool,
    /// The firmware's build number.
    pub build: u32,
    /// Reports carry no chip id.
    pub mask_chip_id: bool,
    /// Reports are not signed.
    pub mask_chip_key: bool,
    /// A VLEK is loaded.
    pub vlek: bool,
    /// Guests that the firmware has now.
    pub guests: u32,
    /// Version of the trusted computing base that runs.
    pub current_tcb: u64,
    /// The one that reports show.
    pub reported_tcb: u64,
}

impl PlatformStatus {
    /// Decodes the 32 bytes of the struct.
    pub fn decode(raw: [u8; 32]) -> Self {
        let word = |at: usize| raw.iter().skip(at).take(4).rev().fold(0u32, |v, b| v << 8 | u32::from(*b));
        let long = |at: usize| u64::from(word(at + 4)) << 32 | u64::from(word(at));
        let flags = word(8);
        PlatformStatus {
            api: (raw[0], raw[1]),
            state: raw[2],
            rmp_initialized: raw[3] & 1 != 0,
            build: word(4),
            mask_chip_id: flags & 1 != 0,
            mask_chip_key: flags & 2 != 0,
            vlek: flags & 4 != 0,
            guests: word(12),
            current_tcb: long(16),
            reported_tcb: long(24),
        }
    }
}

/// Asks the firmware through `/dev/sev`; the error is in words.
pub fn platform_status(sev: &File) -> Result<PlatformStatus, String> {
    let mut raw = [0u8; 32];
    let mut cmd = SevIssueCmd { cmd: SNP_PLATFORM_STATUS, data: raw.as_mut_ptr() as u64, error: 0 };
    // SAFETY: the kernel reads and writes `cmd`, and writes the 32 bytes of the status to `raw`; both outlive
    // the call.
    let result = unsafe { ioctl_with_mut_ref(sev, SEV_ISSUE_CMD(), &mut cmd) };
    let error = io::Error::last_os_error();
    if result != 0 {
        let firmware = match cmd.error {
            0 | u32::MAX => "the firmware was not reached".to_owned(),
            code => format!("firmware status {code:#x}: {}", snp::firmware_status::FwStatus(code)),
        };
        return Err(format!("SNP_PLATFORM_STATUS: {error} ({firmware})"));
    }
    // SAFETY: `raw` is a valid, initialised array; the compiler has not seen the kernel's write.
    Ok(PlatformStatus::decode(unsafe { std::ptr::read_volatile(&raw) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_decoded_at_the_offsets_of_psp_sev_h() {
        let mut raw = [0; 32];
        raw[..4].copy_from_slice(&[1, 55, 1, 0xff]);
        raw[4..8].copy_from_slice(&23u32.to_le_bytes());
        raw[8] = 0b101;
        raw[12..16].copy_from_slice(&7u32.to_le_bytes());
        raw[16..24].copy_from_slice(&0x4818_0000_0000_0004u64.to_le_bytes());
        raw[24..32].copy_from_slice(&0x4718_0000_0000_0003u64.to_le_bytes());
        let status = PlatformStatus::decode(raw);
        assert_eq!((status.api, status.state, status.rmp_initialized), ((1, 55), 1, true));
        assert_eq!((status.build, status.guests), (23, 7));
        assert_eq!((status.mask_chip_id, status.mask_chip_key, status.vlek), (true, false, true));
        assert_eq!(status.current_tcb, 0x4818_0000_0000_0004);
        assert_eq!(status.reported_tcb, 0x4718_0000_0000_0003);
    }
}
