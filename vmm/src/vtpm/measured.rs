// SPDX-License-Identifier: Apache-2.0
//! What a direct boot measures into the TPM, from exactly what the launch uses.
//!
//! The log is the same for a run and for `cvmm measure`: it depends on the files, the command line that the
//! kernel gets, the shim and this program's version, and on nothing of the TPM.

use snp::board::Tpm;
use snp::board::acpi::tpm::LOG_MAX;
use snp::image::direct::DirectBoot;
use snp::image::direct::Guest;
use snp::image::direct::Validation;
use snp::image::error::ImageError;
use snp::stage0;
use vtpm_svc::measured::Boot;
use vtpm_svc::measured::Event;
use vtpm_svc::measured::log;

/// Why there is no event log.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum MeasuredError {
    /// The boot is not possible.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No room beside the ACPI tables.
    #[error(
        "`tpm`: the event log has {found} bytes, but there is room for {LOG_MAX}: \
         most of it is the command line; shorten it"
    )]
    LogLength { found: usize },
}

/// The monitor's identity in PCR 0.
const MONITOR: &str = concat!("cvmm ", env!("CARGO_PKG_VERSION"));

/// Announces the TPM to the guest of `boot`, event log included, and returns the events for its PCRs.
pub fn announce(boot: &mut DirectBoot<'_>) -> Result<Vec<Event>, MeasuredError> {
    let shim = match &boot.guest {
        Guest::Snp(snp) if matches!(snp.validation, Validation::Stage0(_)) => {
            Some((stage0::layout::IMAGE, stage0::BUILT.image))
        }
        _ => None,
    };
    let cmdline = boot.kernel_cmdline()?;
    let events = Boot {
        monitor: MONITOR,
        stage0: shim,
        kernel: boot.kernel.file(),
        kernel_address: boot.kernel.memory().start,
        initrd: boot.initrd.as_deref().map(Vec::as_slice),
        cmdline: &cmdline,
    }
    .events();
    let log = log::write(&events);
    if log.len() > LOG_MAX {
        return Err(MeasuredError::LogLength { found: log.len() });
    }
    boot.tpm = Some(Tpm::new(log));
    Ok(events)
}
