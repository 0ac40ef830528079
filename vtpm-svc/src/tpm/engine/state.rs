// SPDX-License-Identifier: Apache-2.0
//! TPM state in the guest-state file: one framed blob per file, durable before the TPM answers.
//!
//! Each blob carries a header with its own length and its engine, because a state that was silently padded or
//! cut, or that belongs to another engine, has destroyed TPMs of other products. The permanent state that was
//! last read back and understood is kept a second time, so that an operator has something to go back to.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;

use zeroize::Zeroizing;

use crate::bytes::array;
use crate::lock::lock;
use crate::vmgs::Change;
use crate::vmgs::FileId;
use crate::vmgs::Vmgs;
use crate::vmgs::VmgsError;
use crate::vmgs::block::BlockFile;
use crate::vmgs::records::Ppi;
use crate::vmgs::root::FLAG_PROVISIONED;

use super::store::Blob;
use super::store::StateStore;
use super::store::StoreFailed;
use super::upkeep::Gone;
use super::upkeep::Upkeep;

const MAGIC: &[u8; 8] = b"CVMMVTPM";
const HEADER: usize = 32;

/// Why a stored blob was not used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum FrameError {
    /// Too short or without the magic.
    #[error("{0} bytes that do not begin with the header of a vTPM state")]
    NotAFrame(usize),
    /// A version or an engine that is not ours.
    #[error("version {version}, engine `{engine}` (expected version 1, engine `ltpm`)")]
    Foreign { version: u32, engine: String },
    /// The wrong blob.
    #[error("blob kind {found}, expected {expected}")]
    Kind { found: u32, expected: u32 },
    /// The length does not match.
    #[error("the header promises {promised} bytes, {present} follow it")]
    Length { promised: u64, present: u64 },
}

/// Puts the header in front of a blob.
pub fn frame(blob: Blob, engine_version: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + data.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&1u32.to_le_bytes());
    out.extend_from_slice(b"ltpm");
    out.extend_from_slice(&engine_version.to_le_bytes());
    out.extend_from_slice(&blob.number().to_le_bytes());
    out.extend_from_slice(&(data.len() as u64).to_le_bytes());
    out.extend_from_slice(data);
    out
}

/// Takes the header off and checks every field of it.
pub fn unframe(blob: Blob, bytes: &[u8]) -> Result<&[u8], FrameError> {
    let word = |at: usize| u32::from_le_bytes(array(bytes, at));
    if bytes.len() < HEADER || &bytes[..8] != MAGIC {
        return Err(FrameError::NotAFrame(bytes.len()));
    }
    if word(8) != 1 || &bytes[12..16] != b"ltpm" {
        let engine = bytes[12..16].escape_ascii().to_string();
        return Err(FrameError::Foreign { version: word(8), engine });
    }
    if word(20) != blob.number() {
        return Err(FrameError::Kind { found: word(20), expected: blob.number() });
    }
    let promised = u64::from(word(24)) | u64::from(word(28)) << 32;
    let present = (bytes.len() - HEADER) as u64;
    if promised != present {
        return Err(FrameError::Length { promised, present });
    }
    Ok(&bytes[HEADER..])
}

/// An open image, shared between the TPM's callbacks and the control channel.
pub type SharedVmgs<F> = Arc<Mutex<Vmgs<F>>>;

/// The file that a blob lives in.
pub fn file_of(blob: Blob) -> FileId {
    match blob {
        Blob::Permanent => FileId::VTPM_STATE,
        Blob::Volatile => FileId::VTPM_VOLATILE,
        Blob::Save => FileId::VTPM_SAVE,
    }
}

/// What a TPM that is being powered on has stored so far, and what is to be stored when it stores next.
#[derive(Default)]
struct Held {
    /// Stores of the permanent state stay here for now.
    holding: bool,
    /// The permanent state that was stored meanwhile.
    state: Option<Zeroizing<Vec<u8>>>,
    /// A framed state that the engine has read and understood, to be kept as the one to go back to.
    understood: Option<Zeroizing<Vec<u8>>>,
    /// The physical-presence record, if the start has changed it.
    ppi: Option<Ppi>,
    /// The start is to be a fresh one: a stored volatile state is not there, and goes when the start
    /// succeeds.
    fresh: bool,
}

/// Blobs in a guest-state file.
///
/// Between [`VmgsState::hold`] and [`VmgsState::settle`] the permanent state is kept back, so that powering
/// on is one commit, whatever the engine stores on the way, and a crash in the making of a TPM leaves none
/// rather than half of one. Nothing may be answered in between.
pub struct VmgsState<F> {
    vmgs: SharedVmgs<F>,
    engine_version: u32,
    held: Arc<Mutex<Held>>,
    upkeep: Arc<Upkeep>,
}

/// Why the image was not changed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// It says so itself.
    #[error(transparent)]
    Image(#[from] VmgsError),
    /// It is not there.
    #[error(transparent)]
    Gone(#[from] Gone),
}

impl<F> Clone for VmgsState<F> {
    fn clone(&self) -> Self {
        Self {
            vmgs: self.vmgs.clone(),
            engine_version: self.engine_version,
            held: self.held.clone(),
            upkeep: self.upkeep.clone(),
        }
    }
}

impl<F: BlockFile> VmgsState<F> {
    /// Keeps blobs in `vmgs`; `engine_version` is recorded beside each.
    pub fn new(vmgs: SharedVmgs<F>, engine_version: u32) -> Self {
        Self { vmgs, engine_version, held: Arc::default(), upkeep: Arc::default() }
    }

    /// The same under conditions for its writes.
    #[must_use]
    pub fn with_upkeep(self, upkeep: Upkeep) -> Self {
        Self { upkeep: Arc::new(upkeep), ..self }
    }

    /// The conditions of writes.
    pub fn upkeep(&self) -> &Upkeep {
        &self.upkeep
    }

    /// Changes the image; durable when it returns. Every write of this service goes this way.
    pub fn commit(&self, changes: &[Change<'_>]) -> Result<(), WriteError> {
        self.upkeep.admit()?;
        self.vmgs().commit(changes)?;
        Ok(())
    }

    /// The image.
    pub fn vmgs(&self) -> MutexGuard<'_, Vmgs<F>> {
        lock(&self.vmgs)
    }

    /// The version that is recorded.
    pub fn engine_version(&self) -> u32 {
        self.engine_version
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }

    /// From now on the permanent state stays in memory.
    pub fn hold(&self) {
        *self.held() = Held { holding: true, ..Held::default() };
    }

    /// The permanent state that is held, to be able to go back to it.
    pub fn held_state(&self) -> Option<Zeroizing<Vec<u8>>> {
        self.held().state.clone()
    }

    /// Goes back to an earlier held state, or to the stored one.
    pub fn put_back(&self, state: Option<Zeroizing<Vec<u8>>>) {
        self.held().state = state;
    }

    /// The start that has begun is a fresh one, whatever volatile state is stored.
    pub fn start_afresh(&self) {
        self.held().fresh = true;
    }

    /// Whether the start would continue from a stored volatile state.
    pub fn continues(&self) -> bool {
        let fresh = self.held().fresh;
        !fresh && has_volatile(&self.vmgs())
    }

    /// The physical-presence request that the image has pending. A TPM that is about to continue where it
    /// was, from a volatile state, is not restarted, so nothing is due.
    pub fn pending_ppi(&self) -> Result<Option<Ppi>, VmgsError> {
        if self.continues() {
            return Ok(None);
        }
        let vmgs = self.vmgs();
        let Some(bytes) = vmgs.read_usable(FileId::TPM_PPI)? else { return Ok(None) };
        match Ppi::parse(&bytes) {
            Ok(ppi) => Ok(Some(ppi).filter(|ppi| ppi.pending != 0)),
            Err(e) => {
                crate::log::warn(&format!("the physical-presence request is ignored: {e}"));
                Ok(None)
            }
        }
    }

    /// Stores this record together with the state that it led to.
    pub fn finish_ppi(&self, ppi: Ppi) {
        self.held().ppi = Some(ppi);
    }

    /// Forgets what was held; the image is as it was.
    pub fn abandon(&self) {
        *self.held() = Held::default();
    }

    /// The engine has just started from the stored state, so that is a good one.
    pub fn understood(&self) -> Result<(), VmgsError> {
        let held = self.held().state.clone();
        let framed = match held {
            Some(state) => Zeroizing::new(frame(Blob::Permanent, self.engine_version, &state)),
            None => {
                let vmgs = self.vmgs();
                let digest = |id| vmgs.root().files.get(&id).map(|listed| listed.digest);
                let now = digest(FileId::VTPM_STATE);
                if now.is_none() || now == digest(FileId::VTPM_STATE_GOOD) {
                    return Ok(());
                }
                vmgs.read(FileId::VTPM_STATE)?
            }
        };
        self.held().understood = Some(framed);
        Ok(())
    }

    /// Makes durable what was held, in one commit. The copy of a good state alone is not worth one: it goes
    /// along with the next store.
    pub fn settle(&self, delete_volatile: bool) -> Result<(), WriteError> {
        let Held { state, understood, ppi, fresh, .. } = std::mem::take(&mut *self.held());
        let ppi = ppi.map(Ppi::to_bytes);
        let framed = state.map(|s| Zeroizing::new(frame(Blob::Permanent, self.engine_version, &s)));
        let mut changes = Vec::new();
        if let Some(framed) = &framed {
            changes.push(Change::Put(FileId::VTPM_STATE, framed));
            changes.push(Change::Flag(FLAG_PROVISIONED));
        }
        if let Some(record) = &ppi {
            changes.push(Change::Put(FileId::TPM_PPI, record));
        }
        if (delete_volatile || fresh) && has_volatile(&self.vmgs()) {
            changes.push(Change::Delete(FileId::VTPM_VOLATILE));
        }
        if changes.is_empty() {
            self.held().understood = understood;
            return Ok(());
        }
        if let Some(good) = &understood {
            changes.push(Change::Put(FileId::VTPM_STATE_GOOD, good));
        }
        self.commit(&changes)
    }

    fn failed(what: &str) -> impl FnOnce(WriteError) -> StoreFailed {
        move |e| {
            crate::log::error(&format!("{what}: {e}"));
            StoreFailed
        }
    }
}

impl<F: BlockFile> StateStore for VmgsState<F> {
    fn load(&mut self, blob: Blob) -> Result<Option<Zeroizing<Vec<u8>>>, StoreFailed> {
        let id = file_of(blob);
        if blob == Blob::Permanent
            && let Some(state) = &self.held().state
        {
            return Ok(Some(state.clone()));
        }
        if blob == Blob::Volatile && self.held().fresh {
            return Ok(None);
        }
        let stored = self.vmgs().read_optional(id).map_err(WriteError::from);
        let Some(bytes) = stored.map_err(Self::failed("reading TPM state"))? else { return Ok(None) };
        match unframe(blob, &bytes) {
            Ok(data) => Ok(Some(Zeroizing::new(data.to_vec()))),
            Err(e) => {
                crate::log::error(&format!("{id} is not a usable TPM state: {e}"));
                Err(StoreFailed)
            }
        }
    }

    fn store(&mut self, blob: Blob, data: &[u8]) -> Result<(), StoreFailed> {
        let good = {
            let mut held = self.held();
            if held.holding && blob == Blob::Permanent {
                held.state = Some(Zeroizing::new(data.to_vec()));
                return Ok(());
            }
            held.understood.take()
        };
        let bytes = Zeroizing::new(frame(blob, self.engine_version, data));
        let mut changes = vec![Change::Put(file_of(blob), &bytes), Change::Flag(FLAG_PROVISIONED)];
        if let Some(good) = &good {
            changes.push(Change::Put(FileId::VTPM_STATE_GOOD, good));
        }
        self.commit(&changes).map_err(Self::failed("storing TPM state"))
    }

    fn delete(&mut self, blob: Blob) -> Result<bool, StoreFailed> {
        let id = file_of(blob);
        let existed = self.vmgs().list().iter().any(|(file, _, _)| *file == id);
        if existed {
            self.commit(&[Change::Delete(id)]).map_err(Self::failed("deleting TPM state"))?;
        }
        Ok(existed)
    }
}

fn has_volatile<F: BlockFile>(vmgs: &Vmgs<F>) -> bool {
    vmgs.list().iter().any(|(id, _, _)| *id == FileId::VTPM_VOLATILE)
}

/// Whether this image has never had a TPM: the only case in which one may be made.
pub fn is_virgin<F: BlockFile>(vmgs: &Vmgs<F>) -> bool {
    vmgs.root().flags & FLAG_PROVISIONED == 0
        && !vmgs.list().iter().any(|(id, _, _)| *id == FileId::VTPM_STATE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_cut_or_padded_state_is_refused() {
        let good = frame(Blob::Permanent, 0x902, b"state");
        assert_eq!(unframe(Blob::Permanent, &good), Ok(&b"state"[..]));
        assert_eq!(
            unframe(Blob::Permanent, &good[..good.len() - 1]),
            Err(FrameError::Length { promised: 5, present: 4 })
        );
        let mut padded = good.clone();
        padded.push(0);
        assert_eq!(unframe(Blob::Permanent, &padded), Err(FrameError::Length { promised: 5, present: 6 }));
        assert_eq!(unframe(Blob::Volatile, &good), Err(FrameError::Kind { found: 1, expected: 2 }));
        assert_eq!(unframe(Blob::Permanent, &good[..31]), Err(FrameError::NotAFrame(31)));
        let mut other = good;
        other[12] = b'm';
        assert!(matches!(unframe(Blob::Permanent, &other), Err(FrameError::Foreign { .. })));
    }

    proptest! {
        #[test]
        fn no_frame_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80), magic in any::<bool>()) {
            let mut bytes = bytes;
            if magic && bytes.len() >= 16 {
                bytes[..8].copy_from_slice(MAGIC);
                bytes[8..16].copy_from_slice(b"\x01\0\0\0ltpm");
            }
            let _ = unframe(Blob::Permanent, &bytes);
        }
    }
}
