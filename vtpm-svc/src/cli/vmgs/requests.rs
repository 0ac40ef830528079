// SPDX-License-Identifier: Apache-2.0
//! `vmgs ppi` and `vmgs clock`: what an operator asks of the TPM's next start, and the offset of the guest's
//! clock.

use std::path::Path;

use serde_json::Value;
use serde_json::json;

use super::CliError;
use super::Looked;
use super::Outcome;
use super::at;
use super::close;
use super::look;
use super::open_to_write;
use crate::cli::anchor::AnchorArgs;
use crate::cli::keys::KeyArgs;
use crate::vmgs::Change;
use crate::vmgs::FileId;
use crate::vmgs::VmgsError;
use crate::vmgs::records::Ppi;
use crate::vmgs::records::RESPONSE_FAILURE;
use crate::vmgs::records::RESPONSE_SUCCESS;
use crate::vmgs::records::RtcSkew;
use crate::vmgs::records::Submitted;

/// Shows the request that is pending and the outcome of the last one; makes one if asked to.
pub(super) fn ppi(
    file: &Path,
    request: Option<u32>,
    argument: u32,
    key: &KeyArgs,
    anchor: &AnchorArgs,
) -> Outcome {
    let Some(number) = request else {
        let looked = look(file, key)?;
        looked.note(file, &anchor.history, "ppi", "");
        return Ok(match looked.record(file, FileId::TPM_PPI)?.map(|b| Ppi::parse(&b)).transpose() {
            Ok(ppi) => report(&ppi.unwrap_or_default()),
            Err(e) => json!({ "fault": e.to_string() }),
        }
        .into());
    };
    let mut vmgs = open_to_write(file, key, anchor, anchor.accept().replacing(FileId::TPM_PPI))?;
    // What cannot be read is no request, and is replaced by this one.
    let stored = vmgs.read_optional(FileId::TPM_PPI).ok().flatten();
    let mut ppi = stored.and_then(|b| Ppi::parse(&b).ok()).unwrap_or_default();
    let refusal = match ppi.submit(number, argument) {
        Submitted::Accepted => {
            vmgs.commit(&[Change::Put(FileId::TPM_PPI, &ppi.to_bytes())]).map_err(at(file))?;
            None
        }
        Submitted::NotImplemented => Some(format!(
            "operation {number} is not one of 0 (withdraw), 5, 14, 21, 22 (clear) and 23 (set PCR banks)"
        )),
        Submitted::Failure => Some(format!(
            "argument {argument:#x} of operation 23 is not a set of the banks SHA-256 (2) and SHA-384 (4)"
        )),
    };
    match refusal {
        Some(text) => {
            vmgs.close().map_err(at(file))?;
            Err(CliError::Usage(text))
        }
        None => {
            close(vmgs, file, anchor, "ppi", &format!("operation {number}, argument {argument:#x}"))?;
            Ok(report(&ppi).into())
        }
    }
}

fn report(ppi: &Ppi) -> Value {
    json!({
        "pending": ppi.pending,
        "argument": ppi.argument,
        "last": ppi.last,
        "last_response": match ppi.last_response {
            RESPONSE_SUCCESS => "success".into(),
            RESPONSE_FAILURE => "failure".into(),
            code => format!("{code:#x}"),
        },
    })
}

/// Shows or sets the offset of the guest's clock.
pub(super) fn clock(file: &Path, set: Option<i64>, key: &KeyArgs, anchor: &AnchorArgs) -> Outcome {
    if let Some(seconds) = set {
        let skew = RtcSkew::from_seconds(seconds).map_err(at(file))?;
        let mut vmgs = open_to_write(file, key, anchor, anchor.accept().replacing(FileId::RTC_SKEW))?;
        vmgs.commit(&[Change::Put(FileId::RTC_SKEW, &skew.to_bytes())]).map_err(at(file))?;
        close(vmgs, file, anchor, "clock", &format!("{seconds} seconds"))?;
        return Ok(json!({ "seconds_ahead_of_utc": skew.seconds() }).into());
    }
    let looked = look(file, key)?;
    looked.note(file, &anchor.history, "clock", "");
    Ok(match looked.record(file, FileId::RTC_SKEW)?.map(|b| RtcSkew::parse(&b)).transpose() {
        Ok(skew) => json!({ "seconds_ahead_of_utc": skew.map(RtcSkew::seconds) }),
        Err(e) => json!({ "seconds_ahead_of_utc": null, "fault": e.to_string() }),
    }
    .into())
}

impl Looked {
    /// A small file that need not exist.
    fn record(&self, path: &Path, id: FileId) -> Result<Option<zeroize::Zeroizing<Vec<u8>>>, CliError> {
        match self.view.read_file(&self.raw, id) {
            Ok(data) => Ok(Some(data)),
            Err(VmgsError::NotFound(_)) => Ok(None),
            Err(e) => Err(at(path)(e)),
        }
    }
}
