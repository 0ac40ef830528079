// SPDX-License-Identifier: Apache-2.0
//! What is kept for others in the guest-state file: the physical-presence request and the offset of the
//! guest's clock.
//!
//! The service that holds the file open is the only one who can keep them, so the monitor asks it to. An
//! answer means that the change is durable, as for every other write.

use std::time::Duration;

use super::engine::state::VmgsState;
use super::engine::state::WriteError;
use super::error::TpmError;
use crate::log;
use crate::pace::Pace;
use crate::vmgs::Change;
use crate::vmgs::FileId;
use crate::vmgs::VmgsError;
use crate::vmgs::block::BlockFile;
use crate::vmgs::records::Ppi;
use crate::vmgs::records::RecordError;
use crate::vmgs::records::RtcSkew;
use crate::vmgs::records::Submitted;

/// A physical-presence request is for the next start, so a person who makes some in a row is served.
const REQUEST_INTERVAL: Duration = Duration::from_secs(10);
const REQUEST_BURST: u32 = 16;

#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error(transparent)]
    Image(#[from] VmgsError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Record(#[from] RecordError),
}

fn failed(what: &str) -> impl FnOnce(RequestError) -> TpmError {
    move |error| {
        log::often(&format!("{what}: {error}"));
        TpmError::Image
    }
}

/// The requests of one guest.
pub struct Requests<F> {
    state: VmgsState<F>,
    /// How often the guest may change its physical-presence request.
    pace: Pace,
}

impl<F: BlockFile> Requests<F> {
    pub(super) fn new(state: VmgsState<F>) -> Self {
        Self { state, pace: Pace::new(REQUEST_INTERVAL, REQUEST_BURST) }
    }

    fn stored_ppi(&self) -> Result<Ppi, RequestError> {
        let stored = self.state.vmgs().read_usable(FileId::TPM_PPI)?;
        Ok(stored.map(|bytes| Ppi::parse(&bytes)).transpose()?.unwrap_or_default())
    }

    /// The physical-presence request that is pending, and the outcome of the last one.
    pub fn ppi(&self) -> Result<Ppi, TpmError> {
        self.stored_ppi().map_err(failed("reading the physical-presence request"))
    }

    /// Keeps a physical-presence request for the next start. No start may be under way.
    pub(super) fn submit_ppi(&self, operation: u32, argument: u32) -> Result<Submitted, TpmError> {
        let submitted = self.stored_ppi().and_then(|mut ppi| {
            let before = ppi;
            let answer = ppi.submit(operation, argument);
            if answer == Submitted::Accepted && ppi != before {
                // The guest decides how often it asks; the host's disk and log are not its own. Taking a
                // request back is always possible, and bounded by the requests that there were.
                if operation != 0 && !self.pace.allow() {
                    log::often("physical-presence requests come too often; one was refused");
                    return Ok(Submitted::Failure);
                }
                log::often(&format!(
                    "physical-presence operation {operation} was asked for; it is done at the next start of the TPM"
                ));
                self.state.commit(&[Change::Put(FileId::TPM_PPI, &ppi.to_bytes())])?;
            }
            Ok(answer)
        });
        submitted.map_err(failed("storing the physical-presence request"))
    }

    /// The offset of the guest's clock, if one is known.
    pub fn clock(&self) -> Result<Option<RtcSkew>, TpmError> {
        let stored = self.state.vmgs().read_usable(FileId::RTC_SKEW);
        let skew = stored.map_err(RequestError::from).and_then(|bytes| {
            Ok(bytes.map(|bytes| RtcSkew::parse(&bytes)).transpose()?.and_then(RtcSkew::checked))
        });
        skew.map_err(failed("reading the clock's offset"))
    }

    /// Keeps the offset of the guest's clock.
    pub fn set_clock(&self, skew: RtcSkew) -> Result<(), TpmError> {
        let bytes = skew.checked().ok_or(TpmError::Value)?.to_bytes();
        let stored = self.state.vmgs().read_usable(FileId::RTC_SKEW).map_err(RequestError::from);
        let stored = stored.and_then(|now| match now {
            Some(now) if **now == bytes => Ok(()),
            _ => Ok(self.state.commit(&[Change::Put(FileId::RTC_SKEW, &bytes)])?),
        });
        stored.map_err(failed("storing the clock's offset"))
    }
}
