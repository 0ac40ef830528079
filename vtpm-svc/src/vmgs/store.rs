// SPDX-License-Identifier: Apache-2.0
//! The store: an open image, and the commit that changes it without ever being in danger.
//!
//! A commit writes new copies of the changed files, of both tables and of the root into blocks that *neither* live header
//! names, flushes, writes one header sector into the slot that is not active, and flushes again. Only then does it
//! return, so whoever waits for it may acknowledge. Until the header is whole on disk the old generation is untouched;
//! after that the new one is complete. The blocks of the generation before are free only in the commit after next.
//!
//! A failed write or flush poisons the store: what reached the disk is unknown, so nothing may be acknowledged until the
//! image has been opened again.

use std::collections::BTreeSet;

use zeroize::Zeroizing;

use super::anchor::Anchor;
use super::anchor::AnchorError;
use super::anchor::AnchorSource;
use super::block::BlockFile;
use super::crypto;
use super::crypto::Key;
use super::error::VmgsError;
use super::format::BLOCK;
use super::format::ENTRIES;
use super::format::Entry;
use super::format::ExtendedEntry;
use super::format::ExtendedTable;
use super::format::FIRST_BLOCK;
use super::format::FileId;
use super::format::FileTable;
use super::format::Header;
use super::format::KeySlot;
use super::format::MAX_FILE;
use super::format::SECTOR;
use super::image;
use super::image::Layout;
use super::place::Placer;
use super::place::blocks_of;
use super::root::Listed;
use super::root::Mark;
use super::root::Root;
use super::root::digest;
use super::vhd;

/// Smallest image that `create` makes.
pub const MIN_SIZE: u64 = 1 << 20;
/// Largest image that `create` makes.
pub const MAX_SIZE: u64 = 64 << 20;

/// Who an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The image itself: drawn at creation, never used again, also the container's unique id.
    pub image: [u8; 16],
    /// The VM that it belongs to.
    pub vm: [u8; 16],
}

impl Identity {
    /// A fresh image for a VM; without a VM's id, one is drawn too.
    pub fn fresh(vm: Option<[u8; 16]>) -> Result<Self, VmgsError> {
        let (mut image, mut drawn) = ([0; 16], [0; 16]);
        crypto::fill_random(&mut image)?;
        crypto::fill_random(&mut drawn)?;
        Ok(Self { image, vm: vm.unwrap_or(drawn) })
    }
}

/// One change of a commit.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// Writes a file, encrypted if the image is.
    Put(FileId, &'a [u8]),
    /// Removes a file.
    Delete(FileId),
    /// Sets flag bits of the root.
    Flag(u32),
}

/// What an operator may accept explicitly when an image is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Accept {
    /// An image that is older than, or unknown to, the anchor.
    pub rollback: bool,
    /// Files that were added, changed, removed or left in plain text by another tool; also an image with no root.
    pub foreign: bool,
    /// An image whose metadata key is zero: readable by anyone, and to be repaired.
    pub zero_key: bool,
}

/// Something that was odd but not refused; to be shown or logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// The other header slot is damaged; the next commit replaces it.
    DamagedSlot(String),
    /// The image was opened without an anchor.
    NoAnchor,
    /// The older header is wrapped by another key: a change of key was interrupted. The next commit ends that.
    OldKeyInSlot,
    /// A rollback was accepted.
    RollbackAccepted {
        /// Generation of the image.
        have: u64,
        /// What the anchor expected.
        want: String,
    },
    /// Foreign changes were accepted; the next commit re-roots the image.
    Adopted(String),
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::DamagedSlot(why) => write!(f, "the inactive header slot {why}; the next write replaces it"),
            Self::NoAnchor => {
                f.write_str("opened without an anchor: an older copy cannot be told from the newest")
            }
            Self::OldKeyInSlot => f.write_str(
                "a change of key was interrupted: another key still opens the older header. The next write replaces \
                 that header; `vmgs rekey` again overwrites the old blocks too and proves it",
            ),
            Self::RollbackAccepted { have, want } => {
                write!(f, "ROLLBACK ACCEPTED: the image is at generation {have}, the anchor expected {want}")
            }
            Self::Adopted(what) => write!(f, "ADOPTED: {what}"),
        }
    }
}

/// An open image.
pub struct Vmgs<F> {
    file: F,
    capacity: u32,
    header: Header,
    active: usize,
    table: FileTable,
    extended: ExtendedTable,
    /// Blocks named by the header slot that is not active.
    other: BTreeSet<u32>,
    key: Option<Key>,
    root: Root,
    anchor: Option<Box<dyn Anchor>>,
    warnings: Vec<Warning>,
    poisoned: bool,
}

impl<F: BlockFile> Vmgs<F> {
    /// Makes an image in `file`, whose length must be that of the payload and a footer.
    ///
    /// Without a key the image is plain text, which only makes sense for exchange with other tools.
    pub fn create(
        mut file: F,
        key: Option<Key>,
        identity: Identity,
        anchors: Option<&dyn AnchorSource>,
    ) -> Result<Self, VmgsError> {
        let Identity { image, vm } = identity;
        let len = file.len().map_err(VmgsError::io("asking for the file's length"))?;
        let payload = len.saturating_sub(vhd::FOOTER as u64);
        if !(MIN_SIZE..=MAX_SIZE).contains(&payload) || payload % BLOCK as u64 != 0 {
            return Err(VmgsError::Invalid(format!(
                "size {payload} is not a multiple of 4096 between 1 MiB and 64 MiB"
            )));
        }
        let write = VmgsError::io("writing a new image");
        let footer = vhd::build(payload, image);
        file.write_at(&[0; 2 * SECTOR], 0).and_then(|()| file.write_at(&footer, payload)).map_err(write)?;
        let mut store = Self {
            file,
            capacity: (payload / BLOCK as u64) as u32,
            header: Header {
                sequence: 0,
                table_block: FIRST_BLOCK,
                encrypted: key.is_some(),
                markers: 0,
                keys: [KeySlot::default(); 2],
            },
            active: 1,
            table: FileTable([Entry::default(); ENTRIES]),
            extended: ExtendedTable::default(),
            other: BTreeSet::new(),
            key,
            root: Root::new(image, vm),
            anchor: anchors.map(|a| a.lease(&image)).transpose()?,
            warnings: Vec::new(),
            poisoned: false,
        };
        store.commit(&[])?;
        Ok(store)
    }

    /// Opens an image, or refuses it without having written anything.
    pub fn open(
        file: F,
        key: Option<Key>,
        anchors: Option<&dyn AnchorSource>,
        accept: Accept,
    ) -> Result<Self, VmgsError> {
        let layout = Layout::read(&file)?;
        let extended = match image::unlock(&file, &layout, key.as_ref()) {
            Err(VmgsError::ZeroMetadataKey) if accept.zero_key => {
                image::unlock_with_zero_key(&file, &layout)?
            }
            other => other?,
        };
        let mut warnings = Vec::new();
        if let Err(fault) = &layout.headers.slots[1 - layout.headers.active]
            && !(layout.header.sequence == 1 && *fault == super::format::HeaderFault::Zero)
        {
            warnings.push(Warning::DamagedSlot(fault.to_string()));
        }
        if let (Ok(older), Some(key)) = (&layout.headers.slots[1 - layout.headers.active], &key) {
            let mut wraps = older.keys.iter().filter(|slot| !slot.is_empty()).peekable();
            if wraps.peek().is_some()
                && !wraps.any(|slot| crypto::open(key.expose(), &slot.seal, &slot.wrapped).is_some())
            {
                warnings.push(Warning::OldKeyInSlot);
            }
        }
        let root = proven_root(&file, &layout, &extended, accept, &mut warnings)?;
        let mut anchor = anchors.map(|a| a.lease(&root.image)).transpose()?;
        match &mut anchor {
            Some(anchor) => judge(anchor.as_mut(), &root, accept, &mut warnings)?,
            None => {
                if layout.headers.may_be_older() && !accept.rollback {
                    return Err(VmgsError::StaleGeneration {
                        have: root.generation,
                        want:
                            "a newer one, perhaps: the other header is damaged and there is no anchor to ask"
                                .into(),
                    });
                }
                warnings.push(Warning::NoAnchor);
            }
        }
        Ok(Self {
            file,
            capacity: layout.capacity,
            active: layout.headers.active,
            header: layout.header,
            table: layout.table,
            extended,
            other: layout.other,
            key,
            root,
            anchor,
            warnings,
            poisoned: false,
        })
    }

    /// What was odd at open.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// The integrity root.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Whether files are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.header.encrypted
    }

    /// Blocks in the payload.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The files and their sizes in bytes; whether each is encrypted.
    pub fn list(&self) -> Vec<(FileId, u64, bool)> {
        self.table.files().map(|(id, e)| (id, e.valid, self.extended.entry(id).encrypted())).collect()
    }

    /// Reads a file and compares it with the root.
    pub fn read(&self, id: FileId) -> Result<Zeroizing<Vec<u8>>, VmgsError> {
        let data = image::read_file(&self.file, &self.table, &self.extended, id)?;
        match self.root.files.get(&id) {
            Some(listed) if listed.digest == digest(&data) => Ok(data),
            _ => Err(VmgsError::ForeignWrite(super::error::FileList(vec![id]))),
        }
    }

    /// Reads a file that need not exist.
    pub fn read_optional(&self, id: FileId) -> Result<Option<Zeroizing<Vec<u8>>>, VmgsError> {
        match self.read(id) {
            Ok(data) => Ok(Some(data)),
            Err(VmgsError::NotFound(_)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Applies all changes at once; when it returns they are durable.
    pub fn commit(&mut self, changes: &[Change<'_>]) -> Result<Mark, VmgsError> {
        self.write_generation(changes, None)
    }

    /// Replaces the datastore key, and with it every key in the image.
    ///
    /// Both header slots then carry only the new key, the blocks of older generations are overwritten, and the old key
    /// has been tried on what is left and has failed. The caller must have stored the new key safely *before*.
    pub fn rekey(&mut self, new: Key) -> Result<Mark, VmgsError> {
        let old_key = self.key.clone();
        let old_header = self.header.clone();
        let mark = self.write_generation(&[], Some(new))?;
        // The second header names the same tables, so that the slot with the old wrap disappears.
        let (next, slot) = self.next_header(self.header.table_block, self.header.keys);
        self.write_header(&next, slot)?;
        self.header = next;
        self.active = slot;
        self.other = image::named_blocks(&self.header, &self.table);
        self.scrub()?;
        if let Some(old) = old_key {
            self.prove_dead(&old, &old_header)?;
        }
        Ok(mark)
    }

    /// The next commit's generation will be above this one.
    pub fn raise_generation(&mut self, above: u64) {
        self.root.generation = self.root.generation.max(above);
    }

    /// Ends the lease in good order; nothing can be written after it.
    pub fn release(&mut self) -> Result<(), VmgsError> {
        if let Some(anchor) = &mut self.anchor
            && !self.poisoned
        {
            anchor.release()?;
        }
        self.poisoned = true;
        Ok(())
    }

    /// Ends the lease in good order and gives the file back.
    pub fn close(mut self) -> Result<F, VmgsError> {
        self.release()?;
        Ok(self.file)
    }

    fn write_generation(&mut self, changes: &[Change<'_>], new_key: Option<Key>) -> Result<Mark, VmgsError> {
        if self.poisoned {
            return Err(VmgsError::Poisoned);
        }
        let encrypted = self.header.encrypted || new_key.is_some();
        let (mut table, mut extended, mut root) =
            (self.table.clone(), self.extended.clone(), self.root.clone());
        let mut live = image::named_blocks(&self.header, &self.table);
        if self.header.sequence == 0 {
            live.clear();
        }
        // Files, root and two tables, to lie in one extent if there is one.
        let mut expected = 3;
        for change in changes {
            if let Change::Put(_, data) = change {
                expected += blocks_of(data.len());
            }
        }
        let mut placer = Placer::new(self.capacity, [&live, &self.other], encrypted, expected);
        let mut put = |id: FileId, data: &[u8], table: &mut FileTable, extended: &mut ExtendedTable| {
            let (entry, truth) = placer.file(data)?;
            table.0[id.index()] = entry;
            let attributes = truth.attributes;
            *extended.entry_mut(id) = truth;
            Ok::<_, VmgsError>(Listed { attributes, valid: entry.valid, digest: digest(data) })
        };
        if new_key.is_some() {
            for (id, _) in self.table.files().filter(|(id, _)| *id != FileId::ROOT) {
                let data = self.read(id)?;
                let listed = put(id, &data, &mut table, &mut extended)?;
                root.files.insert(id, listed);
            }
        }
        for change in changes {
            match change {
                Change::Put(id, data) => {
                    check_put(*id, data, encrypted)?;
                    let listed = put(*id, data, &mut table, &mut extended)?;
                    root.files.insert(*id, listed);
                }
                Change::Delete(id) => {
                    table.0[id.index()] = Entry::default();
                    *extended.entry_mut(*id) = ExtendedEntry::default();
                    root.files.remove(id);
                }
                Change::Flag(bits) => root.flags |= bits,
            }
        }
        // A lost file that was adopted leaves no trace in the new table either.
        for id in FileId::files().filter(|id| !table.entry(*id).exists()) {
            *extended.entry_mut(id) = ExtendedEntry::default();
        }
        root.previous = if root.generation == 0 { [0; 32] } else { self.root.mark().digest };
        root.generation += 1;
        put(FileId::ROOT, &root.to_bytes(), &mut table, &mut extended)?;
        let key = new_key.or_else(|| self.key.clone());
        let keys = placer.tables(&mut table, &extended, key.as_ref())?;

        let mark = root.mark();
        if let Some(anchor) = &mut self.anchor {
            anchor.announce(mark)?;
        }
        self.write_all(&placer.runs())?;
        let was_encrypted = std::mem::replace(&mut self.header.encrypted, encrypted);
        let (next, slot) = self.next_header(table.entry(FileId::FILE_TABLE).block, keys);
        if let Err(e) = self.write_header(&next, slot) {
            self.header.encrypted = was_encrypted;
            return Err(e);
        }
        self.other = live;
        (self.header, self.active) = (next, slot);
        (self.table, self.extended, self.root, self.key) = (table, extended, root, key);
        if let Some(anchor) = &mut self.anchor {
            anchor.confirm(mark)?;
        }
        Ok(mark)
    }

    fn next_header(&self, table_block: u32, keys: [KeySlot; 2]) -> (Header, usize) {
        let sequence = self.header.sequence.wrapping_add(1);
        // Bit 0 of the markers asks the next opener to clear it, which a commit does.
        let header = Header {
            sequence,
            table_block,
            encrypted: self.header.encrypted,
            markers: self.header.markers & !1,
            keys,
        };
        (header, 1 - self.active)
    }

    fn write_all(&mut self, writes: &[(u32, Vec<u8>)]) -> Result<(), VmgsError> {
        for (block, data) in writes {
            let at = u64::from(*block) * BLOCK as u64;
            self.guard(|f| f.write_at(data, at), "writing a file of the image")?;
        }
        self.guard(BlockFile::sync, "flushing the image")
    }

    fn write_header(&mut self, header: &Header, slot: usize) -> Result<(), VmgsError> {
        let sector = header.to_sector();
        self.guard(|f| f.write_at(&sector, (slot * SECTOR) as u64), "writing a header")?;
        self.guard(BlockFile::sync, "flushing a header")
    }

    /// Runs one disk operation; a failure poisons the store for good.
    fn guard(
        &mut self,
        run: impl FnOnce(&mut F) -> std::io::Result<()>,
        what: &'static str,
    ) -> Result<(), VmgsError> {
        let result = run(&mut self.file);
        if result.is_err() {
            self.poisoned = true;
        }
        result.map_err(VmgsError::io(what))
    }

    /// Overwrites every block that no header names.
    fn scrub(&mut self) -> Result<(), VmgsError> {
        let live = image::named_blocks(&self.header, &self.table);
        for block in (FIRST_BLOCK..self.capacity).filter(|b| !live.contains(b)) {
            if image::read_block(&self.file, block)?.iter().any(|b| *b != 0) {
                self.guard(|f| f.write_at(&[0; BLOCK], u64::from(block) * BLOCK as u64), "scrubbing")?;
            }
        }
        self.guard(BlockFile::sync, "flushing the scrubbed blocks")
    }

    /// Tries the old key on everything that is on disk.
    fn prove_dead(&self, old: &Key, old_header: &Header) -> Result<(), VmgsError> {
        let layout = Layout::read(&self.file)?;
        for header in layout.headers.slots.iter().flatten() {
            for slot in &header.keys {
                if crypto::open(old.expose(), &slot.seal, &slot.wrapped).is_some() {
                    return Err(VmgsError::OldKeyStillOpens("a header"));
                }
            }
        }
        // The metadata key that the old header wraps must not open the current table either.
        let entry = layout.table.entry(FileId::EXTENDED);
        let block = image::read_block(&self.file, entry.block)?;
        for slot in old_header.keys.iter().filter(|slot| !slot.is_empty()) {
            let Some(metadata) = crypto::open(old.expose(), &slot.seal, &slot.wrapped) else { continue };
            let mut metadata_key = Zeroizing::new([0; 32]);
            metadata_key.copy_from_slice(&metadata);
            if crypto::open(&metadata_key, &entry.seal, &block).is_some() {
                return Err(VmgsError::OldKeyStillOpens("the extended file table"));
            }
        }
        Ok(())
    }
}

fn check_put(id: FileId, data: &[u8], encrypted: bool) -> Result<(), VmgsError> {
    if id == FileId::ROOT || id == FileId::FILE_TABLE || id == FileId::EXTENDED {
        return Err(VmgsError::Invalid(format!("{id} is written by the store itself")));
    }
    if data.len() as u64 > MAX_FILE {
        return Err(VmgsError::TooLarge(id, data.len() as u64));
    }
    if data.is_empty() && encrypted {
        return Err(VmgsError::Invalid(format!(
            "{id}: an encrypted file of no bytes could never be read back; delete it"
        )));
    }
    Ok(())
}

/// Root and files are consistent, or the operator has accepted that they are not.
fn proven_root<F: BlockFile>(
    file: &F,
    layout: &Layout,
    extended: &ExtendedTable,
    accept: Accept,
    warnings: &mut Vec<Warning>,
) -> Result<Root, VmgsError> {
    image::check_files(layout, extended, false).or_else(|e| adopt_or(e, accept, warnings))?;
    let mut root = match image::read_root(file, layout, extended) {
        Ok(root) => root,
        Err(e @ (VmgsError::RootMissing | VmgsError::RootMismatch(_))) => {
            adopt_or(e, accept, warnings)?;
            let fresh = Identity::fresh(None)?;
            Root::new(fresh.image, fresh.vm)
        }
        Err(e) => return Err(e),
    };
    let differences = image::compare(file, layout, extended, &root)?;
    let (missing, adoptable) = (differences.missing.clone(), {
        let mut ids = differences.unexpected.clone();
        ids.extend(&differences.changed);
        ids
    });
    if let Err(e) = differences.refuse() {
        adopt_or(e, accept, warnings)?;
        for id in missing {
            root.files.remove(&id);
        }
        for id in adoptable {
            let data = image::read_file(file, &layout.table, extended, id)?;
            let listed = Listed {
                attributes: extended.entry(id).attributes,
                valid: data.len() as u64,
                digest: digest(&data),
            };
            root.files.insert(id, listed);
        }
    }
    Ok(root)
}

fn adopt_or(error: VmgsError, accept: Accept, warnings: &mut Vec<Warning>) -> Result<(), VmgsError> {
    if !accept.foreign {
        return Err(error);
    }
    warnings.push(Warning::Adopted(error.to_string()));
    Ok(())
}

/// Asks the anchor whether this image is the newest, and burns every other.
fn judge(
    anchor: &mut dyn Anchor,
    root: &Root,
    accept: Accept,
    warnings: &mut Vec<Warning>,
) -> Result<(), VmgsError> {
    let mark = root.mark();
    let expectation = anchor.expectation()?;
    let adopted = warnings.iter().any(|w| matches!(w, Warning::Adopted(_)));
    match expectation {
        Some(e) if e.accepts(&mark) => {}
        // An adopted image is not the one that was written last, by definition; its generation must still be.
        Some(e) if adopted && root.generation == e.confirmed.generation => {}
        Some(e) if accept.rollback => {
            warnings.push(Warning::RollbackAccepted { have: mark.generation, want: e.in_words() });
        }
        Some(e) => return Err(VmgsError::StaleGeneration { have: mark.generation, want: e.in_words() }),
        None if accept.rollback || (adopted && root.generation == 0) => {
            warnings.push(Warning::RollbackAccepted {
                have: mark.generation,
                want: "nothing (no record)".into(),
            });
        }
        None => {
            return Err(AnchorError::Unknown {
                image: super::root::uuid_text(&root.image),
                folder: "the anchor folder".into(),
            }
            .into());
        }
    }
    anchor.confirm(mark)?;
    Ok(())
}
