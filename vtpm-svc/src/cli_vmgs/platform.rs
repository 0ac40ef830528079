// SPDX-License-Identifier: Apache-2.0
//! `vmgs ppi` and `vmgs clock`: what an operator asks of the TPM's next start, and the offset of the guest's clock.

use std::path::Path;

use serde_json::Value;
use serde_json::json;

use super::CliError;
use super::Outcome;
use super::at;
use super::open_to_read;
use super::open_to_write;
use crate::control::options::AnchorArgs;
use crate::keys::KeyArgs;
use crate::vmgs::Change;
use crate::vmgs::FileId;
use crate::vmgs::FsFile;
use crate::vmgs::Vmgs;
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
    let stored = |vmgs: &Vmgs<FsFile>| -> Result<Ppi, CliError> {
        let bytes = vmgs.read_optional(FileId::TPM_PPI).map_err(at(file))?;
        let parsed = bytes.map(|b| Ppi::parse(&b)).transpose();
        Ok(parsed.map_err(|e| CliError::Usage(format!("{}: {e}", file.display())))?.unwrap_or_default())
    };
    let Some(number) = request else { return Ok((report(&stored(&open_to_read(file, key)?)?), None)) };
    let mut vmgs = open_to_write(file, key, anchor, anchor.accept())?;
    let mut ppi = stored(&vmgs)?;
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
    vmgs.close().map_err(at(file))?;
    match refusal {
        Some(text) => Err(CliError::Usage(text)),
        None => Ok((report(&ppi), None)),
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
        let mut vmgs = open_to_write(file, key, anchor, anchor.accept())?;
        vmgs.commit(&[Change::Put(FileId::RTC_SKEW, &skew.to_bytes())]).map_err(at(file))?;
        vmgs.close().map_err(at(file))?;
        return Ok((json!({ "seconds_ahead_of_utc": skew.seconds() }), None));
    }
    let bytes = open_to_read(file, key)?.read_optional(FileId::RTC_SKEW).map_err(at(file))?;
    let skew = bytes.map(|b| RtcSkew::parse(&b)).transpose();
    let skew = skew.map_err(|e| CliError::Usage(format!("{}: {e}", file.display())))?;
    Ok((json!({ "seconds_ahead_of_utc": skew.map(RtcSkew::seconds) }), None))
}
