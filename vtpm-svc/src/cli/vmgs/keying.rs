// SPDX-License-Identifier: Apache-2.0
//! `vmgs rekey` and `repair`: every key of an image becomes another one, and nothing of before is left in the
//! file.

use std::path::Path;

use serde_json::json;

use super::CliError;
use super::Outcome;
use super::ask;
use super::at;
use super::close;
use super::needed;
use super::open_to_write;
use super::open_with;
use crate::cli::anchor::AnchorArgs;
use crate::cli::keys::KeyArgs;
use crate::cli::keys::NewKeyArgs;
use crate::keys::KeyProvider;
use crate::keys::Purpose;
use crate::keys::open::key_of;
use crate::vmgs::Accept;
use crate::vmgs::Finding;
use crate::vmgs::FsFile;
use crate::vmgs::Key;
use crate::vmgs::Vmgs;
use crate::vmgs::VmgsError;
use crate::vmgs::image;
use crate::vmgs::root::FLAG_DISCLOSED;

/// Replaces the key.
pub(super) fn rekey(file: &Path, key: &KeyArgs, new_key: &NewKeyArgs, anchor: &AnchorArgs) -> Outcome {
    let provider = needed(new_key.provider(), "new key")?;
    let (mut vmgs, secret) = open_for_new_key(file, key, provider.as_ref(), anchor, anchor.accept())?;
    let mark = vmgs.rekey(secret, 0).map_err(at(file))?;
    close(vmgs, file, anchor, "rekey", "")?;
    Ok(json!({
        "rekeyed": file.display().to_string(),
        "generation": mark.generation,
        "proved": "the old key opens neither header, and every byte of an older generation is overwritten",
        "not_proved": "copies of this file that were made earlier can still be read with the old key",
    })
    .into())
}

/// Opens an image whose key changes, and gives the new key. If the change was begun before and cut short, the
/// new key is already the one that opens it, and the same command has to end what it began.
fn open_for_new_key(
    file: &Path,
    key: &KeyArgs,
    new: &dyn KeyProvider,
    anchor: &AnchorArgs,
    accept: Accept,
) -> Result<(Vmgs<FsFile>, Key), CliError> {
    let old = match open_to_write(file, key, anchor, accept) {
        Ok(vmgs) => {
            let secret = ask(new, vmgs.root().image, None, Purpose::Rekey)?;
            return Ok((vmgs, secret));
        }
        Err(e) => e,
    };
    if !matches!(old, CliError::Image { source: VmgsError::WrongKey | VmgsError::KeyNeeded, .. }) {
        return Err(old);
    }
    let raw = FsFile::open(file).map_err(VmgsError::opening).map_err(at(file))?;
    let unlocks = |secret: &Key| image::key_opens(&raw, secret).unwrap_or(false);
    // Whatever is wrong with the new key, what was asked first was refused for the old one. Not asked for as
    // a new one: who makes keys would make the next one, for an image that keeps its own.
    let Some(secret) = key_of(new, &raw, None, Purpose::Open).ok().filter(unlocks) else { return Err(old) };
    let vmgs = open_with(raw, file, Some(secret.clone()), anchor, accept)?;
    Ok((vmgs, secret))
}

/// Only a key that anyone knows discloses what an image holds.
fn needs_repair(vmgs: &Vmgs<FsFile>) -> bool {
    vmgs.findings().iter().any(|f| matches!(f, Finding::ZeroKey(_)))
}

/// Replaces the keys of an image that anyone can read.
pub(super) fn repair(
    file: &Path,
    force: bool,
    key: &KeyArgs,
    new_key: &NewKeyArgs,
    anchor: &AnchorArgs,
) -> Outcome {
    let provider = needed(new_key.provider(), "new key")?;
    let accept = Accept { zero_key: true, ..anchor.accept() };
    let (mut vmgs, secret) = open_for_new_key(file, key, provider.as_ref(), anchor, accept)?;
    if !needs_repair(&vmgs) && !force {
        return Err(CliError::Usage(format!(
            "{} needs no repair, and a repair would mark its contents as disclosed for good; `vmgs rekey` changes the key. \
             --force repairs it all the same",
            file.display()
        )));
    }
    let accepted = vmgs.warnings();
    let mark = vmgs.rekey(secret, FLAG_DISCLOSED).map_err(at(file))?;
    close(vmgs, file, anchor, "repair", "")?;
    Ok(json!({
        "repaired": file.display().to_string(),
        "generation": mark.generation,
        "found": accepted,
        "disclosed": "anyone who has an earlier copy can read everything in it: make a new TPM (vmgs clone \
                      without --keep-identity) and replace every secret that this one protected",
    })
    .into())
}
