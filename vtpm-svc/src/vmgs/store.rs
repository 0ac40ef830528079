// SPDX-License-Identifier: Apache-2.0
//! The store: an open image, and the commit that changes it without ever being in danger.
//!
//! A commit writes new copies of the changed files, of both tables and of the root into blocks that *neither*
//! live header names, flushes, writes one header sector into the slot that is not active, and flushes again.
//! Only then does it return, so whoever waits for it may acknowledge. Until the header is whole on disk the
//! old generation is untouched; after that the new one is complete. The blocks of the generation before are
//! free only in the commit after next.
//!
//! A failed write or flush poisons the store: what reached the disk is unknown, so nothing may be
//! acknowledged until the image has been opened again.

use zeroize::Zeroizing;

use super::anchor::Anchor;
use super::anchor::AnchorSource;
use super::anchor::Facts;
use super::anchor::Known;
use super::block::BlockFile;
use super::crypto::Key;
use super::error::VmgsError;
use super::file_id::FileId;
use super::findings::Accept;
use super::findings::Finding;
use super::findings::ZeroKey;
use super::findings::decide;
use super::findings::sentences;
use super::format::BLOCK;
use super::format::ENTRIES;
use super::format::Entry;
use super::format::ExtendedEntry;
use super::format::ExtendedTable;
use super::format::FIRST_BLOCK;
use super::format::FileTable;
use super::format::Header;
use super::format::KeySlot;
use super::format::MAX_FILE;
use super::format::MAX_SIZE;
use super::format::MIN_SIZE;
use super::format::SCRUB_PENDING;
use super::format::SECTOR;
use super::identity::Identity;
use super::image;
use super::judge::judge;
use super::mark::Mark;
use super::mark::uuid_text;
use super::place::Placer;
use super::place::blocks_of;
use super::root::FLAG_PROVISIONED;
use super::root::Listed;
use super::root::Root;
use super::root::digest;
use super::spans::Spans;
use super::vhd;
use super::view::RootState;
use super::view::View;

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

/// What an image has to be for whoever opens it; compared before the anchor is touched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// It must be encrypted.
    pub encrypted: bool,
    /// It must belong to this VM.
    pub vm: Option<[u8; 16]>,
}

/// An open image.
pub struct Vmgs<F> {
    pub(super) file: F,
    pub(super) payload: u64,
    pub(super) capacity: u32,
    pub(super) header: Header,
    pub(super) active: usize,
    pub(super) table: FileTable,
    extended: ExtendedTable,
    /// Blocks named by the header slot that is not active.
    pub(super) other: Spans,
    pub(super) key: Option<Key>,
    pub(super) root: Root,
    /// The root as it stands on disk, if it does.
    mark: Option<Mark>,
    /// The container's id.
    pub(super) container: [u8; 16],
    anchor: Option<Box<dyn Anchor>>,
    findings: Vec<Finding>,
    accept: Accept,
    poisoned: bool,
    /// Nothing is on disk yet, so no block is in use.
    fresh: bool,
    /// What was adopted is not the store's own yet: the next commit writes everything anew.
    unsettled: bool,
    /// A rewrite, of this program or another one, was not finished.
    pub(super) cut_short: bool,
    /// The file is not where its anchor will look for it yet.
    unplaced: bool,
}

/// What a new generation is made of.
pub(super) struct Generation<'a> {
    pub changes: &'a [Change<'a>],
    /// The key from now on, if it is another one.
    pub new_key: Option<Key>,
    /// Every file is written anew, under a new key of its own.
    pub all: bool,
}

/// A commit that is sealed and has its place, and is not written.
pub struct Prepared {
    table: FileTable,
    extended: ExtendedTable,
    root: Root,
    key: Option<Key>,
    /// What the generation before names.
    live: Spans,
    runs: Vec<(u32, Vec<u8>)>,
    header: Header,
    touched: Vec<FileId>,
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
            payload,
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
            other: Spans::default(),
            key,
            root: Root::new(image, vm),
            mark: None,
            container: image,
            anchor: anchors.map(|a| a.lease(&image)).transpose()?,
            findings: Vec::new(),
            accept: Accept::default(),
            poisoned: false,
            fresh: true,
            unsettled: false,
            cut_short: false,
            unplaced: false,
        };
        store.commit(&[])?;
        Ok(store)
    }

    /// Opens an image, or refuses it without having written anything. A rewrite that was cut short is
    /// finished.
    pub fn open(
        file: F,
        key: Option<Key>,
        anchors: Option<&dyn AnchorSource>,
        accept: Accept,
    ) -> Result<Self, VmgsError> {
        Self::open_for(file, key, anchors, accept, Demand::default())
    }

    /// Opens an image that has to be a certain one.
    pub fn open_for(
        file: F,
        key: Option<Key>,
        anchors: Option<&dyn AnchorSource>,
        accept: Accept,
        demand: Demand,
    ) -> Result<Self, VmgsError> {
        let mut view = View::read(&file, key.as_ref())?;
        if demand.encrypted && !view.layout.header.encrypted {
            return Err(VmgsError::NotEncrypted);
        }
        decide(&view.findings, &accept)?;
        match demand.vm {
            Some(vm) if !view.vm_known => view.root.vm = vm,
            Some(vm) if vm != view.root.vm => {
                return Err(VmgsError::OtherVm { found: uuid_text(&view.root.vm), wanted: uuid_text(&vm) });
            }
            _ => {}
        }
        let mut anchor = anchors.map(|a| a.lease(&view.root.image)).transpose()?;
        let may_be_older = view.findings.iter().position(|f| matches!(f, Finding::MayBeOlder(_)));
        match &mut anchor {
            Some(anchor) => {
                let above = judge(anchor.as_mut(), &mut view, &accept)?;
                // A number is never used twice, so that no copy from before can be taken for this one.
                view.root.generation = view.root.generation.max(above);
                if let Some(n) = may_be_older
                    && let Finding::MayBeOlder(why) = &view.findings[n]
                {
                    view.findings[n] = Finding::DamagedSlot(why.clone());
                }
            }
            None if may_be_older.is_some() && !accept.rollback => {
                return Err(VmgsError::StaleGeneration {
                    have: view.root.generation,
                    want: "a newer one, perhaps, as the other header is damaged".into(),
                    folder: "(there is none)".into(),
                });
            }
            None => view.findings.push(Finding::NoAnchor),
        }
        let unsettled = view.findings.iter().any(|f| f.unsettles(&accept));
        // A key that opens nothing, which a table that anyone can read does not need, says nothing of the
        // older header.
        let anyone = view.findings.contains(&Finding::ZeroKey(ZeroKey::Active));
        let cut_short = view.layout.header.markers & SCRUB_PENDING != 0
            || view.findings.iter().any(Finding::is_cut_short) && !anyone;
        let other = view.layout.other_spans();
        let View { layout, extended, root, state, container, findings, .. } = view;
        let mut store = Self {
            file,
            payload: layout.payload,
            capacity: layout.capacity,
            active: layout.headers.active,
            header: layout.header,
            table: layout.table,
            extended,
            other,
            key,
            root,
            mark: match state {
                RootState::Proven(mark) => Some(mark),
                _ => None,
            },
            container,
            anchor,
            findings,
            accept,
            poisoned: false,
            fresh: false,
            unsettled,
            cut_short,
            unplaced: false,
        };
        // What is not settled is written anew by the next commit, and this with it.
        if !store.unsettled && store.cut_short && store.payload <= MAX_SIZE {
            store.finish_rewrite()?;
            store.mark_whole()?;
        }
        Ok(store)
    }

    /// What was odd at open.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// What was odd at open, in sentences.
    pub fn warnings(&self) -> Vec<String> {
        let adopted = |f: &&Finding| f.unsettles(&self.accept) && !matches!(f, Finding::ZeroKey(_));
        let (adopted, told): (Vec<_>, Vec<_>) = self.findings.iter().partition(adopted);
        let adopted = sentences(adopted).into_iter().map(|text| format!("ADOPTED: {text}"));
        adopted.chain(sentences(told)).collect()
    }

    /// Whether something was adopted that the next commit will write anew.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled
    }

    /// Whether the root stands in the image.
    pub(super) fn is_rooted(&self) -> bool {
        self.mark.is_some()
    }

    /// Whether a file is there and cannot be read.
    pub fn is_damaged(&self, id: FileId) -> bool {
        self.findings.iter().any(|f| matches!(f, Finding::Damaged(d, _) if *d == id))
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
            _ if id == FileId::ROOT => Ok(data),
            Some(listed) if listed.digest == digest(&data) => Ok(data),
            _ => Err(VmgsError::Changed(id)),
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

    /// Reads a file that its owner can do without: one that is damaged, which was said when the image was
    /// opened, counts as one that is not there.
    pub fn read_usable(&self, id: FileId) -> Result<Option<Zeroizing<Vec<u8>>>, VmgsError> {
        match self.read_optional(id) {
            Err(VmgsError::AuthFailed(_) | VmgsError::ZeroCiphertext(_)) => Ok(None),
            other => other,
        }
    }

    /// Applies all changes at once; when it returns they are durable.
    ///
    /// The first commit after something was adopted also writes every file anew and overwrites what was there
    /// before.
    pub fn commit(&mut self, changes: &[Change<'_>]) -> Result<Mark, VmgsError> {
        if self.unsettled {
            return self.rewrite(changes, None);
        }
        self.write_generation(Generation { changes, new_key: None, all: false })
    }

    /// Takes a lease for a file that is not in its place yet: what is committed is announced, and confirmed
    /// only by [`Vmgs::placed`]. Until then the anchor accepts what is in that place as well. The next
    /// generation is above all that the anchor knows.
    pub fn lease_unplaced(&mut self, anchor: Box<dyn Anchor>) {
        if let Known::Record(e) = anchor.known() {
            self.root.generation = self.root.generation.max(e.highest);
            if e.facts.provisioned {
                self.root.flags |= FLAG_PROVISIONED;
            }
        }
        self.anchor = Some(anchor);
        self.unplaced = true;
    }

    /// Says that the file is where it belongs.
    pub fn placed(&mut self) -> Result<(), VmgsError> {
        self.unplaced = false;
        let facts = self.facts();
        match (&mut self.anchor, self.mark) {
            (Some(anchor), Some(mark)) => Ok(anchor.confirm(mark, facts)?),
            _ => Ok(()),
        }
    }

    /// Ends the lease in good order; nothing can be written after it.
    pub fn release(&mut self) -> Result<(), VmgsError> {
        if let Some(anchor) = &mut self.anchor
            && !self.poisoned
            && !self.unplaced
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

    /// Places and seals a commit without writing any of it: whatever can be refused is refused here.
    pub fn prepare(&self, changes: &[Change<'_>]) -> Result<Prepared, VmgsError> {
        self.plan(Generation { changes, new_key: None, all: self.unsettled })
    }

    /// Writes what was prepared; nothing may have been committed since.
    pub fn write(&mut self, prepared: Prepared) -> Result<Mark, VmgsError> {
        if self.unsettled || prepared.root.generation != self.root.next_generation()? {
            return Err(VmgsError::Invalid("a commit was prepared for another generation".into()));
        }
        self.write_planned(prepared)
    }

    pub(super) fn write_generation(&mut self, next: Generation<'_>) -> Result<Mark, VmgsError> {
        let prepared = self.plan(next)?;
        self.write_planned(prepared)
    }

    fn plan(&self, next: Generation<'_>) -> Result<Prepared, VmgsError> {
        if self.poisoned {
            return Err(VmgsError::Poisoned);
        }
        let Generation { changes, new_key, all } = next;
        let encrypted = self.header.encrypted || new_key.is_some();
        let (mut table, mut extended, mut root) =
            (self.table.clone(), self.extended.clone(), self.root.clone());
        let live = if self.fresh { Spans::default() } else { Spans::named(&self.header, &self.table) };
        let touched = |id: FileId| {
            changes.iter().any(|c| matches!(c, Change::Put(x, _) | Change::Delete(x) if *x == id))
        };
        let carried: Vec<FileId> = self
            .table
            .files()
            .map(|(id, _)| id)
            .filter(|id| all && *id != FileId::ROOT && !touched(*id))
            .collect();
        // Files, root and two tables, to lie in one extent if there is one.
        let mut expected = 3;
        for change in changes {
            if let Change::Put(_, data) = change {
                expected += blocks_of(data.len());
            }
        }
        expected += carried.iter().map(|id| self.table.entry(*id).blocks).sum::<u32>();
        let mut placer = Placer::new(self.capacity, &live.union(&self.other), encrypted, expected);
        let mut put = |id: FileId, data: &[u8], table: &mut FileTable, extended: &mut ExtendedTable| {
            let (entry, truth) = placer.file(data)?;
            table.0[id.index()] = entry;
            let attributes = truth.attributes;
            *extended.entry_mut(id) = truth;
            Ok::<_, VmgsError>(Listed { attributes, valid: entry.valid, digest: digest(data) })
        };
        for id in carried {
            let data = self.read(id).map_err(|e| VmgsError::NotCarried(id, e.to_string()))?;
            let listed = put(id, &data, &mut table, &mut extended)?;
            root.files.insert(id, listed);
        }
        // Who puts a TPM's state in or takes it away says that there was a TPM: such an image never gets a
        // new one.
        if touched(FileId::VTPM_STATE) || touched(FileId::VTPM_STATE_GOOD) {
            root.flags |= FLAG_PROVISIONED;
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
        root.previous = self.mark.map_or([0; 32], |mark| mark.digest);
        root.generation = root.next_generation()?;
        if new_key.is_some() {
            root.keyed_anew();
        }
        put(FileId::ROOT, &root.to_bytes(), &mut table, &mut extended)?;
        let key = new_key.or_else(|| self.key.clone());
        let keys = placer.tables(&mut table, &extended, key.as_ref())?;
        let mut header = self.next_header(table.entry(FileId::FILE_TABLE).block, keys, encrypted);
        if all {
            header.markers |= SCRUB_PENDING;
        }
        let touched = FileId::files().filter(|id| touched(*id)).collect();
        Ok(Prepared { table, extended, root, key, live, runs: placer.runs(), header, touched })
    }

    fn write_planned(&mut self, planned: Prepared) -> Result<Mark, VmgsError> {
        let Prepared { table, extended, root, key, live, runs, header, touched } = planned;
        let mark = root.mark();
        if let Some(anchor) = &mut self.anchor {
            anchor.announce(mark)?;
        }
        self.write_all(&runs)?;
        self.write_header(header)?;
        self.other = live;
        (self.table, self.extended, self.root, self.key) = (table, extended, root, key);
        self.mark = Some(mark);
        self.fresh = false;
        self.findings.retain(|f| !matches!(f, Finding::Damaged(id, _) if touched.contains(id)));
        let facts = self.facts();
        if let Some(anchor) = &mut self.anchor
            && !self.unplaced
        {
            anchor.confirm(mark, facts)?;
        }
        Ok(mark)
    }

    fn facts(&self) -> Facts {
        Facts { sealed: self.header.encrypted, provisioned: self.root.flags & FLAG_PROVISIONED != 0 }
    }

    pub(super) fn next_header(&self, table_block: u32, keys: [KeySlot; 2], encrypted: bool) -> Header {
        // Bit 0 of the markers asks the next opener to clear it, which a commit does.
        Header {
            sequence: self.header.sequence.wrapping_add(1),
            table_block,
            encrypted,
            markers: self.header.markers & !1,
            keys,
        }
    }

    fn write_all(&mut self, writes: &[(u32, Vec<u8>)]) -> Result<(), VmgsError> {
        for (block, data) in writes {
            let at = u64::from(*block) * BLOCK as u64;
            self.guard(|f| f.write_at(data, at), "writing a file of the image")?;
        }
        self.guard(BlockFile::sync, "flushing the image")
    }

    /// Writes a header into the slot that is not active, which it then is.
    pub(super) fn write_header(&mut self, header: Header) -> Result<(), VmgsError> {
        let (sector, slot) = (header.to_sector(), 1 - self.active);
        self.guard(|f| f.write_at(&sector, (slot * SECTOR) as u64), "writing a header")?;
        self.guard(BlockFile::sync, "flushing a header")?;
        (self.header, self.active) = (header, slot);
        Ok(())
    }

    /// Runs one disk operation; a failure poisons the store for good.
    pub(super) fn guard(
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

    /// Everything in the image is the store's own from now on.
    pub(super) fn settled(&mut self) {
        self.unsettled = false;
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
