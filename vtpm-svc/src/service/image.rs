// SPDX-License-Identifier: Apache-2.0
//! The image of a service, opened for it alone: it is encrypted, belongs to the VM that was named, and its
//! TPM can be read.

use std::path::PathBuf;

use super::error::ServiceError;
use crate::keys::KeyProvider;
use crate::keys::Purpose;
use crate::keys::open::OpenError;
use crate::keys::open::key_of;
use crate::log;
use crate::vmgs::Accept;
use crate::vmgs::AnchorFolder;
use crate::vmgs::Demand;
use crate::vmgs::FileId;
use crate::vmgs::FsFile;
use crate::vmgs::Vmgs;
use crate::vmgs::VmgsError;
use crate::vmgs::history;
use crate::vmgs::root::FLAG_PROVISIONED;

/// Which image is served, and what is demanded of it.
pub struct ImageOptions {
    /// The file.
    pub path: PathBuf,
    /// The VM that it has to belong to.
    pub vm: Option<[u8; 16]>,
    /// Where its key comes from.
    pub key: Box<dyn KeyProvider>,
    /// What knows which copy is the newest.
    pub anchor: AnchorFolder,
    /// What the operator accepts.
    pub accept: Accept,
    /// Why this is done, for the history.
    pub reason: Option<String>,
}

impl ImageOptions {
    /// What the opening may have to wait for, in words.
    pub(super) fn wanted(&self) -> String {
        format!("the key ({}) and the image {} and its anchor", self.key.describe(), self.path.display())
    }
}

/// Opens the image for this service, or refuses it before anything of it or of its anchor was changed.
pub(super) fn open(options: &ImageOptions) -> Result<Vmgs<FsFile>, ServiceError> {
    let ImageOptions { path, vm, key, anchor, accept, reason } = options;
    let at = |source| ServiceError::Image { path: path.display().to_string(), source };
    let file = FsFile::open(path).map_err(VmgsError::opening).map_err(at)?;
    let key = key_of(key.as_ref(), &file, *vm, Purpose::Open).map_err(|e| match e {
        OpenError::Image(source) => at(source),
        OpenError::Key(e) => e.into(),
    })?;
    let demand = Demand { encrypted: true, vm: *vm };
    let mut vmgs = Vmgs::open_for(file, Some(key), Some(anchor), *accept, demand).map_err(at)?;
    for warning in vmgs.warnings() {
        log::warn(&format!("{}: {warning}", path.display()));
    }
    tpm_is_whole(&vmgs).map_err(at)?;
    if vmgs.is_unsettled() {
        // What was adopted once is this program's own from now on.
        vmgs.commit(&[]).map_err(at)?;
    }
    let file = path.display().to_string();
    let event = history::Event {
        what: "serve",
        file: &file,
        root: vmgs.root(),
        findings: vmgs.findings(),
        detail: "",
        reason: reason.as_deref(),
    };
    if let Err(e) = history::record(anchor, &event) {
        log::warn(&format!("the history of {file} could not be written: {e}"));
    }
    Ok(vmgs)
}

/// A TPM that was made is there and can be read; if not, the operator is told of the way back.
fn tpm_is_whole(vmgs: &Vmgs<FsFile>) -> Result<(), VmgsError> {
    let made = vmgs.root().flags & FLAG_PROVISIONED != 0;
    let there = vmgs.list().iter().any(|(id, _, _)| *id == FileId::VTPM_STATE);
    if vmgs.is_damaged(FileId::VTPM_STATE) || (made && !there) {
        let spare = vmgs.read_optional(FileId::VTPM_STATE_GOOD).is_ok_and(|data| data.is_some());
        return Err(VmgsError::TpmLost { spare });
    }
    Ok(())
}
