// SPDX-License-Identifier: Apache-2.0
//! The memory outside of the image that makes an older copy, a fork or a second live copy of it noticeable.
//!
//! An image cannot prove by itself that it is the newest one. The anchor remembers, per image, the [`Mark`]
//! that was confirmed last and the one that is being written. A commit announces its mark before the image
//! changes and confirms it after, so an image is acceptable exactly when it is at the confirmed or at the
//! announced mark. Accepting one burns the other, so that two forks of the same generation cannot both live.
//!
//! [`FileAnchor`] keeps this in a file of the host. It is as trustworthy as the folder it lies in: whoever
//! can put back an old image *and* an old anchor is not stopped by it. A key broker implements the same trait
//! with better standing.
//!
//! *Strict* mode makes each announcement durable before the image changes, and each confirmation before the
//! commit is acknowledged (two more flushes per commit). *Leased* mode, the default, lets the operating
//! system write the record when it likes: while the host stays up this is as exact as strict mode, whatever
//! happens to the process; after a power loss the record may be older than the image, and then (and only
//! then, known by the host's boot id) an image that is *ahead* of every generation in the record is accepted,
//! if it names the recorded one as the one before it where it should.
//!
//! The record is read under its lock: what was read before could be another instance's past.

use std::fs::File;
use std::fs::TryLockError;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use crate::bytes::array;

use super::block::soon;
use super::mark::Mark;
use super::mark::uuid_text;

/// Why the anchor refused.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum AnchorError {
    /// A second live copy.
    #[error("image {image} is in use by another instance ({holder}); two live copies of one TPM are refused")]
    InUse { image: String, holder: String },
    /// The anchor has no record of the image.
    #[error(
        "no anchor record for image {image} in {folder}: the image comes from another host, or the record was \
         removed. If you know that this copy is the newest, say so with `vmgs restore` or --accept-rollback"
    )]
    Unknown { image: String, folder: PathBuf },
    /// Neither copy of the record is readable.
    #[error(
        "the anchor record {0} is damaged, so nothing says which copy of the image is the newest. If you know that this one \
         is, say so with --accept-rollback (which writes the record anew) or with `vmgs restore FILE FILE --confirm`"
    )]
    Damaged(PathBuf),
    /// Somebody else may change the records.
    #[error("the anchor folder {path} {why}, who could undo what it is for; {cure}")]
    Folder { path: PathBuf, why: String, cure: String },
    /// The operating system refused.
    #[error("anchor {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// What an anchor knows when an image is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// This image was never anchored here.
    Nothing,
    /// There is a record and it cannot be read.
    Damaged,
    /// A record.
    Record(Expectation),
}

/// A record's word on which image is the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expectation {
    /// The last confirmed mark.
    pub confirmed: Option<Mark>,
    /// The mark that was announced and not confirmed.
    pub pending: Option<Mark>,
    /// The highest generation that was ever announced.
    pub highest: u64,
    /// The host went down during a lease, so an image that is ahead of the record is possible.
    pub may_be_ahead: bool,
    /// What the image was once, and so is for good.
    pub facts: Facts,
}

/// What is true of an image from some generation on, whatever an older copy of it says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// It is encrypted.
    pub sealed: bool,
    /// A TPM was made in it.
    pub provisioned: bool,
}

impl Expectation {
    /// Whether an image at `mark`, that names `previous` as the root before it, is the newest one.
    pub fn accepts(&self, mark: &Mark, previous: &[u8; 32]) -> bool {
        if self.marks().any(|m| m == mark) {
            return true;
        }
        let next_to_newest = self.highest.checked_add(1) == Some(mark.generation);
        let mut newest = self.marks().filter(|m| m.generation == self.highest).peekable();
        let continues = !next_to_newest || newest.peek().is_none() || newest.any(|m| m.digest == *previous);
        self.may_be_ahead && mark.generation > self.highest && continues
    }

    fn marks(&self) -> impl Iterator<Item = &Mark> {
        self.confirmed.iter().chain(&self.pending)
    }

    /// In words, for a refusal.
    pub fn in_words(&self) -> String {
        let show = |m: &Mark| format!("{} (root {})", m.generation, short(&m.digest));
        match (&self.confirmed, &self.pending) {
            (Some(c), Some(p)) if p != c => format!("generation {} or {}", show(c), show(p)),
            (Some(m), _) | (None, Some(m)) => format!("generation {}", show(m)),
            (None, None) => "nothing".into(),
        }
    }
}

fn short(digest: &[u8; 32]) -> String {
    hex::encode(&digest[..4])
}

/// One live lease on an image's history. Dropping it without [`Anchor::release`] is a crash.
pub trait Anchor: Send {
    /// What is known of the image.
    fn known(&self) -> Known;
    /// Where it is known, for messages.
    fn place(&self) -> String;
    /// The refusal of an image of which nothing is known, or nothing readable.
    fn refusal(&self) -> AnchorError;
    /// Says that `next` is about to be written.
    fn announce(&mut self, next: Mark) -> Result<(), AnchorError>;
    /// Says that `mark` is durable, and burns everything else.
    fn confirm(&mut self, mark: Mark, facts: Facts) -> Result<(), AnchorError>;
    /// Makes the record durable and ends the lease in good order.
    fn release(&mut self) -> Result<(), AnchorError>;
}

/// Gives out leases.
pub trait AnchorSource {
    /// Takes the only lease on an image.
    fn lease(&self, image: &[u8; 16]) -> Result<Box<dyn Anchor>, AnchorError>;
}

/// How often the record is made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// At the start and at the end of the lease.
    #[default]
    Leased,
    /// At every announcement and every confirmation.
    Strict,
}

/// A folder with one record per image.
#[derive(Debug, Clone)]
pub struct AnchorFolder {
    /// The folder.
    pub path: PathBuf,
    /// How often records are made durable.
    pub durability: Durability,
}

const RECORD: usize = 512;
const SLOT: u64 = 4096;
const MAGIC: &[u8; 8] = b"CVMMANCH";

/// Identity of this boot of the host; changes exactly when unsynced writes may have been lost.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    super::mark::parse_uuid(text.trim()).unwrap_or([0; 16])
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    sequence: u64,
    leased: bool,
    boot: [u8; 16],
    confirmed: Option<Mark>,
    pending: Option<Mark>,
    highest: u64,
    facts: Facts,
    pid: u32,
}

impl Record {
    fn to_bytes(self) -> [u8; RECORD] {
        let mut b = [0; RECORD];
        b[..8].copy_from_slice(MAGIC);
        b[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        b[16] = self.leased.into();
        b[17] = self.facts.sealed.into();
        b[18] = self.facts.provisioned.into();
        b[20..24].copy_from_slice(&self.pid.to_le_bytes());
        b[24..40].copy_from_slice(&self.boot);
        for (mark, at) in [(self.confirmed, 40), (self.pending, 88)] {
            if let Some(mark) = mark {
                b[at] = 1;
                b[at + 8..at + 16].copy_from_slice(&mark.generation.to_le_bytes());
                b[at + 16..at + 48].copy_from_slice(&mark.digest);
            }
        }
        b[136..144].copy_from_slice(&self.highest.to_le_bytes());
        let crc = crc32fast::hash(&b[..RECORD - 4]);
        b[RECORD - 4..].copy_from_slice(&crc.to_le_bytes());
        b
    }

    fn parse(b: &[u8; RECORD]) -> Option<Self> {
        let word = |at: usize| u64::from_le_bytes(array(b, at));
        if &b[..8] != MAGIC || crc32fast::hash(&b[..RECORD - 4]).to_le_bytes() != b[RECORD - 4..] {
            return None;
        }
        let mark =
            |at: usize| (b[at] == 1).then(|| Mark { generation: word(at + 8), digest: array(b, at + 16) });
        let boot = array(b, 24);
        let (confirmed, pending) = (mark(40), mark(88));
        let named = confirmed.iter().chain(&pending).map(|m| m.generation).max().unwrap_or(0);
        Some(Self {
            sequence: word(8),
            leased: b[16] == 1,
            boot,
            confirmed,
            pending,
            highest: word(136).max(named),
            facts: Facts { sealed: b[17] == 1, provisioned: b[18] == 1 },
            pid: (word(16) >> 32) as u32,
        })
    }
}

/// A lease on one record of an [`AnchorFolder`]; the lease is a file lock and ends with the process.
pub struct FileAnchor {
    path: PathBuf,
    folder: PathBuf,
    image: [u8; 16],
    file: File,
    record: Record,
    found: Found,
    boot: [u8; 16],
    durability: Durability,
    /// The record on disk says that this lease was taken.
    announced: bool,
    /// How often the record was made durable.
    flushes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    Damaged,
    Record(Record),
}

impl AnchorFolder {
    /// The record's path.
    pub fn record_path(&self, image: &[u8; 16]) -> PathBuf {
        self.path.join(format!("{}.anchor", uuid_text(image)))
    }

    /// What is known of an image, for who only looks: nothing is made, locked or changed.
    pub fn look(&self, image: &[u8; 16]) -> Result<Known, AnchorError> {
        let path = self.record_path(image);
        let found = match File::open(&path) {
            Ok(file) => read_newest(&file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing),
            Err(e) => Err(e),
        };
        found.map(|f| known(f, boot_id())).map_err(|source| AnchorError::Io { path, source })
    }
}

impl AnchorSource for AnchorFolder {
    fn lease(&self, image: &[u8; 16]) -> Result<Box<dyn Anchor>, AnchorError> {
        Ok(Box::new(FileAnchor::lease(self, image)?))
    }
}

impl FileAnchor {
    /// Takes the lease; the record is created if there is none (which is not the same as being accepted).
    pub fn lease(from: &AnchorFolder, image: &[u8; 16]) -> Result<Self, AnchorError> {
        let path = from.record_path(image);
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| AnchorError::Io { path, source }
        };
        let mut folder = std::fs::DirBuilder::new();
        folder.recursive(true).mode(0o700).create(&from.path).map_err(io(&from.path))?;
        only_ours(&from.path, &std::fs::metadata(&from.path).map_err(io(&from.path))?)?;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io(&path))?;
        match soon(|| file.try_lock()) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = match read_newest(&file) {
                    Ok(Found::Record(r)) => format!("process {}", r.pid),
                    _ => "unknown".into(),
                };
                return Err(AnchorError::InUse { image: uuid_text(image), holder });
            }
            Err(TryLockError::Error(source)) => return Err(AnchorError::Io { path, source }),
        }
        #[cfg(test)]
        tests::between_lock_and_read();
        let found = read_newest(&file).map_err(io(&path))?;
        if found == Found::Nothing {
            // A record whose name is lost with the power would make the image unknown.
            File::open(&from.path).and_then(|d| d.sync_all()).map_err(io(&from.path))?;
        }
        let boot = boot_id();
        let record = match found {
            Found::Record(record) => record,
            _ => Record {
                sequence: 0,
                leased: false,
                boot,
                confirmed: None,
                pending: None,
                highest: 0,
                facts: Facts::default(),
                pid: std::process::id(),
            },
        };
        Ok(Self {
            path,
            folder: from.path.clone(),
            image: *image,
            file,
            record,
            found,
            boot,
            durability: from.durability,
            announced: false,
            flushes: 0,
        })
    }

    fn write(&mut self, durable: bool) -> Result<(), AnchorError> {
        self.record.sequence += 1;
        self.record.boot = self.boot;
        self.record.pid = std::process::id();
        let at = (self.record.sequence % 2) * SLOT;
        // Of a damaged record neither half may come back as the newest one.
        if self.found == Found::Damaged {
            self.found = Found::Nothing;
            let io = |source| AnchorError::Io { path: self.path.clone(), source };
            self.file.write_all_at(&[0; RECORD], SLOT - at).map_err(io)?;
        }
        let io = |source| AnchorError::Io { path: self.path.clone(), source };
        self.file.write_all_at(&self.record.to_bytes(), at).map_err(io)?;
        if durable {
            self.file.sync_data().map_err(io)?;
            self.flushes += 1;
        }
        Ok(())
    }
}

/// Refuses a folder that somebody else could change.
fn only_ours(path: &Path, folder: &std::fs::Metadata) -> Result<(), AnchorError> {
    use std::os::unix::fs::MetadataExt;
    let refuse = |why: String, cure: String| AnchorError::Folder { path: path.to_path_buf(), why, cure };
    let own = rustix::process::geteuid().as_raw();
    if folder.uid() != own && folder.uid() != 0 {
        return Err(refuse(
            format!("belongs to user {}", folder.uid()),
            format!("run as that user, or name a folder of user {own} with --anchor"),
        ));
    }
    if folder.mode() & 0o022 != 0 {
        return Err(refuse(
            "can be written by other users".into(),
            format!("run `chmod go-w {}`", path.display()),
        ));
    }
    Ok(())
}

/// The newest readable record.
fn read_newest(file: &File) -> io::Result<Found> {
    let mut newest: Option<Record> = None;
    let mut dirty = false;
    for at in [0, SLOT] {
        let mut b = [0; RECORD];
        match file.read_exact_at(&mut b, at) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(e) => return Err(e),
        }
        if b == [0; RECORD] {
            continue;
        }
        match Record::parse(&b) {
            Some(r) if newest.is_none_or(|n| r.sequence > n.sequence) => newest = Some(r),
            Some(_) => {}
            None => dirty = true,
        }
    }
    Ok(match newest {
        Some(record) => Found::Record(record),
        None if dirty => Found::Damaged,
        None => Found::Nothing,
    })
}

fn known(found: Found, boot: [u8; 16]) -> Known {
    match found {
        Found::Record(r) if r.confirmed.is_some() || r.pending.is_some() => Known::Record(Expectation {
            confirmed: r.confirmed,
            pending: r.pending,
            highest: r.highest,
            may_be_ahead: r.leased && r.boot != boot,
            facts: r.facts,
        }),
        Found::Damaged => Known::Damaged,
        _ => Known::Nothing,
    }
}

impl Anchor for FileAnchor {
    fn known(&self) -> Known {
        known(self.found, self.boot)
    }

    fn place(&self) -> String {
        self.folder.display().to_string()
    }

    fn refusal(&self) -> AnchorError {
        match self.found {
            Found::Damaged => AnchorError::Damaged(self.path.clone()),
            _ => AnchorError::Unknown { image: uuid_text(&self.image), folder: self.folder.clone() },
        }
    }

    fn announce(&mut self, next: Mark) -> Result<(), AnchorError> {
        self.record.pending = Some(next);
        self.record.highest = self.record.highest.max(next.generation);
        // The first announcement of a lease is durable in both modes: it says that the lease was taken in
        // this boot. What an unclean end has left in the record says nothing of the kind.
        let durable = self.durability == Durability::Strict || !self.announced;
        self.record.leased = true;
        self.write(durable)?;
        self.announced = true;
        Ok(())
    }

    fn confirm(&mut self, mark: Mark, facts: Facts) -> Result<(), AnchorError> {
        let news = self.record.confirmed != Some(mark) || self.record.pending.is_some();
        self.record.confirmed = Some(mark);
        self.record.pending = None;
        self.record.highest = self.record.highest.max(mark.generation);
        self.record.facts.sealed |= facts.sealed;
        self.record.facts.provisioned |= facts.provisioned;
        // At the start of a lease, what is burnt here must stay burnt.
        self.write(self.durability == Durability::Strict || (news && !self.announced))
    }

    fn release(&mut self) -> Result<(), AnchorError> {
        self.record.leased = false;
        self.write(true)
    }
}

#[cfg(test)]
#[path = "anchor_test.rs"]
mod tests;
