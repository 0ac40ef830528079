// SPDX-License-Identifier: Apache-2.0
//! Control requests, handed to the TPM, and its answers in the words of the protocol.
//!
//! Beside swtpm's requests there are ours: the physical-presence request, the offset of the guest's clock,
//! and the dropping of a stored volatile state.

use super::wire;
use super::wire::Request;
use super::wire::Response;
use super::wire::code;
use crate::log;
use crate::tpm::Tpm;
use crate::tpm::engine::Blob;
use crate::tpm::engine::EngineError;
use crate::tpm::engine::HashStep;
use crate::tpm::error::TpmError;
use crate::tpm::power::Startup;
use crate::vmgs::block::BlockFile;
use crate::vmgs::records::RtcSkew;

/// The answer to a request of a control client.
pub(super) fn answer<F: BlockFile>(tpm: &Tpm<F>, request: Request) -> Response {
    respond(tpm, request).unwrap_or_else(|e| Response::refused(refusal(&e)))
}

fn respond<F: BlockFile>(tpm: &Tpm<F>, request: Request) -> Result<Response, TpmError> {
    let done = |()| Response::ok();
    Ok(match request {
        Request::GetCapability => Response::ok().word(wire::CAPABILITIES),
        Request::Init { flags } => {
            let delete = flags & wire::INIT_DELETE_VOLATILE != 0;
            let on = tpm.power_on(delete, Startup::None);
            on.inspect_err(|e| log::error(&format!("powering the TPM on: {e}"))).map(done)?
        }
        Request::Stop => {
            tpm.power_off();
            Response::ok()
        }
        Request::SetLocality(l) => tpm.set_locality(l).map(done)?,
        Request::GetEstablished => Response::ok().bytes(&[tpm.engine().established()?.into(), 0, 0, 0]),
        Request::ResetEstablished(l) if l > 4 => return Err(TpmError::Locality(l)),
        Request::ResetEstablished(l) => tpm.engine().reset_established(l).map(done)?,
        Request::HashStart => tpm.engine().hash(HashStep::Start).map(done)?,
        Request::HashData(data) => tpm.engine().hash(HashStep::Data(&data)).map(done)?,
        Request::HashEnd => tpm.engine().hash(HashStep::End).map(done)?,
        Request::Cancel => tpm.cancel().map(done)?,
        Request::StoreVolatile => tpm.store_volatile().map(done)?,
        Request::GetStateBlob { kind, offset } => match Blob::from_protocol(kind) {
            Some(blob) => {
                let data = tpm.export(blob)?;
                let rest = data.get(offset as usize..).unwrap_or_default();
                Response::ok().word(0).word(data.len() as u32).word(rest.len() as u32).bytes(rest)
            }
            None => Response::refused(code::BAD_PARAMETER),
        },
        Request::SetStateBlob { flags, kind, data } => match Blob::from_protocol(kind) {
            Some(blob) => tpm.import(blob, &data, flags & wire::STATE_ENCRYPTED != 0).map(done)?,
            None => Response::refused(code::BAD_PARAMETER),
        },
        // The state at rest is encrypted, always.
        Request::GetConfig => Response::ok().word(1),
        Request::SetBufferSize(wanted) => {
            let (size, min, max) = tpm.engine().buffer_size(wanted)?;
            Response::ok().word(size).word(min).word(max)
        }
        Request::GetInfo { flags, offset } => {
            // Bits 0 to 2 are the library's own; others have no answer here and are ignored, as the protocol
            // wants.
            let mut text = tpm.engine().info((flags & 7) as u32).into_bytes();
            text.push(0);
            let rest = text.get(offset as usize..).unwrap_or_default();
            Response::ok().word(text.len() as u32).word(rest.len() as u32).bytes(rest)
        }
        // The image is locked from open to close.
        Request::LockStorage => Response::ok(),
        Request::PpiState => {
            let ppi = tpm.requests().ppi()?;
            let words = [ppi.pending, ppi.argument, ppi.last, ppi.last_response];
            words.into_iter().fold(Response::ok(), Response::word)
        }
        Request::PpiSubmit { operation, argument } => {
            Response::ok().word(tpm.submit_ppi(operation, argument)? as u32)
        }
        Request::ClockGet => {
            let skew = tpm.requests().clock()?;
            Response::ok().word(skew.is_some().into()).bytes(&skew.unwrap_or_default().0.to_be_bytes())
        }
        Request::ClockSet(skew) => tpm.requests().set_clock(RtcSkew(skew)).map(done)?,
        Request::Cold => tpm.forget_volatile().map(done)?,
        Request::Shutdown | Request::SetDataFd => Response::refused(code::BAD_ORDINAL),
    })
}

fn refusal(error: &TpmError) -> u32 {
    match error {
        TpmError::Engine(EngineError::Refused(code)) => *code,
        TpmError::Engine(EngineError::State(_)) => code::BAD_ORDINAL,
        TpmError::Locality(_) => code::BAD_LOCALITY,
        TpmError::Value => code::BAD_PARAMETER,
        TpmError::Engine(_) | TpmError::Forbidden | TpmError::Image => code::FAIL,
    }
}
