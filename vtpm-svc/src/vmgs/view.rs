// SPDX-License-Identifier: Apache-2.0
//! An image as it is found: unlocked, read in full, compared with itself, and judged by nobody yet.
//!
//! Looking needs no permission. A view lists and reads whatever authenticates, even in an image that no
//! service would serve, and its findings say what is not proved. [`super::store`] builds on it and refuses
//! what was not accepted.

use zeroize::Zeroizing;

use super::block::BlockFile;
use super::crypto;
use super::crypto::Key;
use super::error::VmgsError;
use super::file_id::FileId;
use super::findings::Finding;
use super::findings::ZeroKey;
use super::format::ExtendedTable;
use super::format::Header;
use super::format::HeaderFault;
use super::format::SCRUB_PENDING;
use super::identity::Identity;
use super::image;
use super::image::Layout;
use super::mark::Mark;
use super::records::Ppi;
use super::records::RtcSkew;
use super::root::FLAG_PROVISIONED;
use super::root::Listed;
use super::root::Root;
use super::root::digest;
use super::zero_key;

/// What is known of the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootState {
    /// It is there and authentic.
    Proven(Mark),
    /// No trace of one.
    Never,
    /// There was one.
    Lost,
}

/// An image that was read and compared, and not judged.
pub struct View {
    /// Container, headers, tables.
    pub layout: Layout,
    /// The authentic table of attributes and keys.
    pub extended: ExtendedTable,
    /// The root, or what is known of a lost one; it lists the files as they are, whatever it listed before.
    pub root: Root,
    /// How far the root can be relied on.
    pub state: RootState,
    /// Whether `root.vm` is the image's own word.
    pub vm_known: bool,
    /// The container's id.
    pub container: [u8; 16],
    /// What is odd.
    pub findings: Vec<Finding>,
}

impl View {
    /// Reads everything; fails only if the image cannot be unlocked at all.
    pub fn read<F: BlockFile>(file: &F, key: Option<&Key>) -> Result<Self, VmgsError> {
        let layout = Layout::read(file)?;
        let zero = zero_key::find(file, &layout)?;
        let extended = match zero {
            Some(ZeroKey::Active) => image::unlock_with_zero_key(file, &layout.table)?,
            _ => image::unlock(file, &layout.header, &layout.table, key)?,
        };
        let mut findings: Vec<Finding> = zero.map(Finding::ZeroKey).into_iter().collect();
        header_findings(&layout, key, &mut findings);
        let container = image::unique_id(file)?;
        let (root, state, vm_known) = find_root(file, &layout, &extended, key, container, &mut findings)?;
        let mut view = Self { layout, extended, root, state, vm_known, container, findings };
        view.compare(file)?;
        Ok(view)
    }

    /// Reads a file that authenticates. Whether it belongs there is what the findings say.
    pub fn read_file<F: BlockFile>(&self, file: &F, id: FileId) -> Result<Zeroizing<Vec<u8>>, VmgsError> {
        image::read_file(file, &self.layout.table, &self.extended, id)
    }

    /// The files and their sizes in bytes; whether each is encrypted.
    pub fn list(&self) -> Vec<(FileId, u64, bool)> {
        let files = self.layout.table.files();
        files.map(|(id, e)| (id, e.valid, self.extended.entry(id).encrypted())).collect()
    }

    fn remembers(&self, id: FileId) -> bool {
        let truth = self.extended.entry(id);
        truth.attributes != 0 || truth.key != [0; 32]
    }

    /// Compares every file, contents included, with tables and root, and makes the root list what is there.
    fn compare<F: BlockFile>(&mut self, file: &F) -> Result<(), VmgsError> {
        for id in FileId::files().filter(|id| *id != FileId::ROOT) {
            let entry = *self.layout.table.entry(id);
            if !entry.exists() {
                if self.root.files.remove(&id).is_some() || self.remembers(id) {
                    self.findings.push(Finding::Missing(id));
                }
                continue;
            }
            let attributes = self.extended.entry(id).attributes;
            if self.layout.header.encrypted && !self.extended.entry(id).encrypted() && id.is_secret() {
                self.findings.push(Finding::Planted(id));
            }
            let data = match self.read_file(file, id) {
                Ok(data) => data,
                // Its bytes are of no use to anybody, and no reason to lock the others.
                Err(e) => {
                    let why = match e {
                        e @ (VmgsError::AuthFailed(_) | VmgsError::ZeroCiphertext(_)) => e.to_string(),
                        e => format!("{id}: {e}"),
                    };
                    self.findings.push(Finding::Damaged(id, why));
                    continue;
                }
            };
            let found = Listed { attributes, valid: entry.valid, digest: digest(&data) };
            match self.root.files.insert(id, found) {
                Some(listed) if listed == found => {}
                // Without a proven root nothing was listed, which is one finding and not one for each file.
                _ if !matches!(self.state, RootState::Proven(_)) => {}
                Some(_) => self.findings.push(Finding::Changed(id)),
                None => self.findings.push(Finding::Unexpected(id)),
            }
            if let Some(why) = malformed(id, &data) {
                self.findings.push(Finding::Malformed(id, why));
            }
        }
        // Whatever has become of the TPM's files: an image that had a TPM never gets a new one.
        let unproven = !matches!(self.state, RootState::Proven(_));
        let had_tpm = |id: FileId| match id {
            FileId::VTPM_STATE | FileId::VTPM_STATE_GOOD => true,
            id => unproven && (57..=61).contains(&id.number()),
        };
        if FileId::files()
            .any(|id| had_tpm(id) && (self.layout.table.entry(id).exists() || self.remembers(id)))
        {
            self.root.flags |= FLAG_PROVISIONED;
        }
        Ok(())
    }
}

fn malformed(id: FileId, data: &[u8]) -> Option<String> {
    let error = match id {
        FileId::TPM_PPI => Ppi::parse(data).err(),
        FileId::RTC_SKEW => RtcSkew::parse(data).err(),
        _ => None,
    };
    error.map(|e| format!("{} bytes, expected {}", e.found, e.expected))
}

fn header_findings(layout: &Layout, key: Option<&Key>, findings: &mut Vec<Finding>) {
    if layout.header.markers & SCRUB_PENDING != 0 {
        findings.push(Finding::ScrubPending);
    }
    match &layout.headers.slots[1 - layout.headers.active] {
        Err(fault) if layout.headers.may_be_older() => findings.push(Finding::MayBeOlder(fault.to_string())),
        Err(HeaderFault::Zero) => {}
        Err(fault) => findings.push(Finding::DamagedSlot(fault.to_string())),
        Ok(older) if layout.header.encrypted && !older.encrypted => findings.push(Finding::OldKeyInSlot),
        Ok(older) => {
            if let Some(key) = key {
                let mut wraps = older.keys.iter().filter(|slot| !slot.is_empty()).peekable();
                if wraps.peek().is_some()
                    && !wraps.any(|slot| crypto::open(key.expose(), &slot.seal, &slot.wrapped).is_some())
                {
                    findings.push(Finding::OldKeyInSlot);
                }
            }
        }
    }
    if layout.header.keys.iter().filter(|slot| !slot.is_empty()).count() > 1 {
        findings.push(Finding::SecondKey);
    }
}

/// The root, or the best that is known without it.
fn find_root<F: BlockFile>(
    file: &F,
    layout: &Layout,
    extended: &ExtendedTable,
    key: Option<&Key>,
    container: [u8; 16],
    findings: &mut Vec<Finding>,
) -> Result<(Root, RootState, bool), VmgsError> {
    let truth = extended.entry(FileId::ROOT);
    let remembered = truth.attributes != 0 || truth.key != [0; 32];
    let entry = layout.table.entry(FileId::ROOT);
    let why = if layout.header.encrypted && entry.exists() && !truth.encrypted() {
        // Whoever has no key can write what he likes into a root in plain text.
        findings.push(Finding::Planted(FileId::ROOT));
        None
    } else {
        match image::read_root(file, &layout.table, extended) {
            Ok(Some(root)) => {
                if root.image != container {
                    findings.push(Finding::FooterId { footer: container, image: root.image });
                }
                if root.worn() {
                    findings.push(Finding::WornKey);
                }
                let mark = root.mark();
                return Ok((root, RootState::Proven(mark), true));
            }
            Ok(None) if remembered => Some("its entry was removed from the file table".to_owned()),
            Ok(None) => None,
            Err(e) => Some(e.to_string()),
        }
    };
    // The generation before knows whose image this is, if it still opens.
    // In plain text it could be anybody's word, so it has to be sealed as the newer one is.
    let alike = |header: &Header| header.encrypted == layout.header.encrypted;
    let older = layout.other.as_ref().filter(|(header, _)| alike(header)).and_then(|(header, table)| {
        let extended = image::unlock(file, header, table, key).ok()?;
        let sealed = !header.encrypted || extended.entry(FileId::ROOT).encrypted();
        image::read_root(file, table, &extended).ok().flatten().filter(|_| sealed)
    });
    let why = match (why, &older) {
        (None, Some(_)) => Some("the generation before has one".to_owned()),
        (why, _) => why,
    };
    let Some(why) = why else {
        findings.push(Finding::NeverRooted);
        let fresh = Identity::fresh(None)?;
        let image = if container == [0; 16] { fresh.image } else { container };
        return Ok((Root::new(image, fresh.vm), RootState::Never, false));
    };
    findings.push(Finding::RootLost(why));
    let vm_known = older.is_some();
    let root = match older {
        Some(older) => Root { files: Default::default(), ..older },
        None => Root::new(container, Identity::fresh(None)?.vm),
    };
    Ok((root, RootState::Lost, vm_known))
}
