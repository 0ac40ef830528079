// SPDX-License-Identifier: Apache-2.0
//! Control commands of ours, beside swtpm's: the physical-presence request and the offset of the guest's clock.
//!
//! They live in the guest-state file, so the service that holds it open is the only one who can keep them; the monitor
//! asks for them here. An answer means that the change is durable, as for every other write.

use super::server::Service;
use super::wire::Response;
use super::wire::code;
use crate::log;
use crate::tpm::engine::Blob;
use crate::tpm::engine::StateStore;
use crate::tpm::engine::state::WriteError;
use crate::vmgs::Change;
use crate::vmgs::FileId;
use crate::vmgs::VmgsError;
use crate::vmgs::block::BlockFile;
use crate::vmgs::records::Ppi;
use crate::vmgs::records::RecordError;
use crate::vmgs::records::RtcSkew;
use crate::vmgs::records::Submitted;

#[derive(Debug, thiserror::Error)]
enum PlatformError {
    #[error(transparent)]
    Image(#[from] VmgsError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Record(#[from] RecordError),
}

fn failed(what: &str, error: &PlatformError) -> Response {
    log::often(&format!("{what}: {error}"));
    Response::refused(code::FAIL)
}

impl<F: BlockFile + 'static> Service<F> {
    fn stored_ppi(&self) -> Result<Ppi, PlatformError> {
        let stored = self.state.vmgs().read_usable(FileId::TPM_PPI)?;
        Ok(stored.map(|bytes| Ppi::parse(&bytes)).transpose()?.unwrap_or_default())
    }

    pub(super) fn ppi(&self) -> Response {
        match self.stored_ppi() {
            Ok(ppi) => {
                let words = [ppi.pending, ppi.argument, ppi.last, ppi.last_response];
                words.into_iter().fold(Response::ok(), Response::word)
            }
            Err(e) => failed("reading the physical-presence request", &e),
        }
    }

    pub(super) fn submit_ppi(&self, operation: u32, argument: u32) -> Response {
        // A TPM that is being powered on may be carrying out the last request.
        let _engine = self.engine();
        let submitted = self.stored_ppi().and_then(|mut ppi| {
            let before = ppi;
            let answer = ppi.submit(operation, argument);
            if answer == Submitted::Accepted && ppi != before {
                // The guest decides how often it asks; the host's disk and log are not its own. Taking a request back is always
                // possible, and bounded by the requests that there were.
                if operation != 0 && !self.requests.allow() {
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
        match submitted {
            Ok(answer) => Response::ok().word(answer as u32),
            Err(e) => failed("storing the physical-presence request", &e),
        }
    }

    /// A volatile state that was stored is for the power-on that continues it; here somebody wants another one.
    pub(super) fn forget_volatile(&self) -> Response {
        let engine = self.engine();
        if engine.is_running() {
            return Response::refused(code::BAD_ORDINAL);
        }
        match self.state.clone().delete(Blob::Volatile) {
            Ok(existed) => {
                if existed {
                    log::warn("a stored volatile state was dropped: the TPM starts anew");
                }
                Response::ok()
            }
            Err(_) => Response::refused(code::FAIL),
        }
    }

    pub(super) fn clock(&self) -> Response {
        let stored = self.state.vmgs().read_usable(FileId::RTC_SKEW);
        let skew = stored.map_err(PlatformError::from).and_then(|bytes| {
            Ok(bytes.map(|bytes| RtcSkew::parse(&bytes)).transpose()?.and_then(RtcSkew::checked))
        });
        match skew {
            Ok(skew) => {
                let known = skew.is_some();
                Response::ok().word(known.into()).bytes(&skew.unwrap_or_default().0.to_be_bytes())
            }
            Err(e) => failed("reading the clock's offset", &e),
        }
    }

    pub(super) fn set_clock(&self, skew: RtcSkew) -> Response {
        let Some(skew) = skew.checked() else { return Response::refused(code::BAD_PARAMETER) };
        let bytes = skew.to_bytes();
        let stored = self.state.vmgs().read_usable(FileId::RTC_SKEW).map_err(PlatformError::from);
        let stored = stored.and_then(|now| match now {
            Some(now) if **now == bytes => Ok(()),
            _ => Ok(self.state.commit(&[Change::Put(FileId::RTC_SKEW, &bytes)])?),
        });
        match stored {
            Ok(()) => Response::ok(),
            Err(e) => failed("storing the clock's offset", &e),
        }
    }
}
