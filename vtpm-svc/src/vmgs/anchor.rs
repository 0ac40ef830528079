// SPDX-License-Identifier: Apache-2.0
//! The memory outside of the image that makes an older copy, a fork or a second live copy of it noticeable.
//!
//! An image cannot prove by itself that it is the newest one. The anchor remembers, per image, the [`Mark`] that was
//! confirmed last and the one that is being written. A commit announces its mark before the image changes and confirms
//! it after, so an image is acceptable exactly when it is at the confirmed or at the announced mark. Accepting one burns
//! the other, so that two forks of the same generation cannot both live.
//!
//! [`FileAnchor`] keeps this in a file of the host. It is as trustworthy as the folder it lies in: whoever can put back
//! an old image *and* an old anchor is not stopped by it. A key broker implements the same trait with better standing.
//!
//! *Strict* mode makes each announcement durable before the image changes (one more flush per commit). *Leased* mode,
//! the default, lets the operating system write the record when it likes: while the host stays up this is as exact as
//! strict mode, whatever happens to the process; after a power loss the record may be older than the image, and then (and
//! only then, known by the host's boot id) an image that is *ahead* of the record is accepted.

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use super::root::Mark;
use super::root::uuid_text;

/// Why the anchor refused.
#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    /// A second live copy.
    #[error("image {image} is in use by another instance ({holder}); two live copies of one TPM are refused")]
    InUse {
        /// Which image.
        image: String,
        /// Who holds the lease.
        holder: String,
    },
    /// The anchor has no record of the image.
    #[error(
        "no anchor record for image {image} in {folder}: the image comes from another host, or the record was \
         removed. If you know that this copy is the newest, say so with `vmgs restore` or --accept-rollback"
    )]
    Unknown {
        /// Which image.
        image: String,
        /// Where the record was looked for.
        folder: PathBuf,
    },
    /// Neither copy of the record is readable.
    #[error("the anchor record {0} is damaged; inspect the image, then set it again with `vmgs restore`")]
    Damaged(PathBuf),
    /// The operating system refused.
    #[error("anchor {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
}

/// What an anchor knows when an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expectation {
    /// The last confirmed mark.
    pub confirmed: Mark,
    /// The mark that was announced and not confirmed.
    pub pending: Option<Mark>,
    /// The host went down during a lease, so an image that is ahead of the record is possible.
    pub may_be_ahead: bool,
}

impl Expectation {
    /// Whether an image at `mark` is the newest one.
    pub fn accepts(&self, mark: &Mark) -> bool {
        *mark == self.confirmed
            || self.pending == Some(*mark)
            || (self.may_be_ahead && mark.generation > self.confirmed.generation)
    }

    /// In words, for a refusal.
    pub fn in_words(&self) -> String {
        let show = |m: &Mark| format!("{} (root {})", m.generation, short(&m.digest));
        match &self.pending {
            Some(p) if *p != self.confirmed => format!("generation {} or {}", show(&self.confirmed), show(p)),
            _ => format!("generation {}", show(&self.confirmed)),
        }
    }
}

fn short(digest: &[u8; 32]) -> String {
    digest[..4].iter().map(|b| format!("{b:02x}")).collect()
}

/// One live lease on an image's history. Dropping it without [`Anchor::release`] is a crash.
pub trait Anchor: Send {
    /// What is known; `None` for an image that was never anchored here.
    fn expectation(&self) -> Result<Option<Expectation>, AnchorError>;
    /// Says that `next` is about to be written.
    fn announce(&mut self, next: Mark) -> Result<(), AnchorError>;
    /// Says that `mark` is durable, and burns everything else.
    fn confirm(&mut self, mark: Mark) -> Result<(), AnchorError>;
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
    /// At every announcement.
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
    super::root::parse_uuid(text.trim()).unwrap_or([0; 16])
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    sequence: u64,
    leased: bool,
    boot: [u8; 16],
    confirmed: Option<Mark>,
    pending: Option<Mark>,
    pid: u32,
}

impl Record {
    fn to_bytes(self) -> [u8; RECORD] {
        let mut b = [0; RECORD];
        b[..8].copy_from_slice(MAGIC);
        b[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        b[16] = self.leased.into();
        b[20..24].copy_from_slice(&self.pid.to_le_bytes());
        b[24..40].copy_from_slice(&self.boot);
        for (mark, at) in [(self.confirmed, 40), (self.pending, 88)] {
            if let Some(mark) = mark {
                b[at] = 1;
                b[at + 8..at + 16].copy_from_slice(&mark.generation.to_le_bytes());
                b[at + 16..at + 48].copy_from_slice(&mark.digest);
            }
        }
        let crc = crc32fast::hash(&b[..RECORD - 4]);
        b[RECORD - 4..].copy_from_slice(&crc.to_le_bytes());
        b
    }

    fn parse(b: &[u8; RECORD]) -> Option<Self> {
        let word = |at: usize| {
            let mut v = [0; 8];
            v.copy_from_slice(&b[at..at + 8]);
            u64::from_le_bytes(v)
        };
        if &b[..8] != MAGIC || crc32fast::hash(&b[..RECORD - 4]).to_le_bytes() != b[RECORD - 4..] {
            return None;
        }
        let mark = |at: usize| {
            let mut digest = [0; 32];
            digest.copy_from_slice(&b[at + 16..at + 48]);
            (b[at] == 1).then(|| Mark { generation: word(at + 8), digest })
        };
        let mut boot = [0; 16];
        boot.copy_from_slice(&b[24..40]);
        Some(Self {
            sequence: word(8),
            leased: b[16] == 1,
            boot,
            confirmed: mark(40),
            pending: mark(88),
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
    found: Option<Record>,
    boot: [u8; 16],
    durability: Durability,
}

impl AnchorFolder {
    /// The record's path.
    pub fn record_path(&self, image: &[u8; 16]) -> PathBuf {
        self.path.join(format!("{}.anchor", uuid_text(image)))
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
        // Whoever can write here can undo what the anchor is for.
        let mut folder = std::fs::DirBuilder::new();
        folder.recursive(true).mode(0o700).create(&from.path).map_err(io(&from.path))?;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io(&path))?;
        let newest = read_newest(&file).map_err(io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let holder = match &newest {
                    Ok(Some(r)) => format!("process {}", r.pid),
                    _ => "unknown".into(),
                };
                return Err(AnchorError::InUse { image: uuid_text(image), holder });
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(AnchorError::Io { path, source }),
        }
        let found = match newest {
            Ok(found) => found,
            Err(()) => return Err(AnchorError::Damaged(path)),
        };
        let boot = boot_id();
        let record = found.unwrap_or(Record {
            sequence: 0,
            leased: false,
            boot,
            confirmed: None,
            pending: None,
            pid: std::process::id(),
        });
        Ok(Self {
            path,
            folder: from.path.clone(),
            image: *image,
            file,
            record,
            found,
            boot,
            durability: from.durability,
        })
    }

    /// The error for an image that this anchor has never seen.
    pub fn unknown(&self) -> AnchorError {
        AnchorError::Unknown { image: uuid_text(&self.image), folder: self.folder.clone() }
    }

    fn write(&mut self, durable: bool) -> Result<(), AnchorError> {
        self.record.sequence += 1;
        self.record.boot = self.boot;
        self.record.pid = std::process::id();
        let at = (self.record.sequence % 2) * SLOT;
        let io = |source| AnchorError::Io { path: self.path.clone(), source };
        self.file.write_all_at(&self.record.to_bytes(), at).map_err(io)?;
        if durable {
            self.file.sync_data().map_err(io)?;
        }
        Ok(())
    }
}

/// The newest readable record: `Ok(None)` for a new file, `Err(())` when both copies are bad.
fn read_newest(file: &File) -> io::Result<Result<Option<Record>, ()>> {
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
    Ok(if newest.is_none() && dirty { Err(()) } else { Ok(newest) })
}

impl Anchor for FileAnchor {
    fn expectation(&self) -> Result<Option<Expectation>, AnchorError> {
        Ok(self.found.and_then(|r| {
            Some(Expectation {
                confirmed: r.confirmed?,
                pending: r.pending,
                may_be_ahead: r.leased && r.boot != self.boot,
            })
        }))
    }

    fn announce(&mut self, next: Mark) -> Result<(), AnchorError> {
        self.record.pending = Some(next);
        // The first record of a lease is durable in both modes: it says that the lease was taken in this boot.
        let durable = self.durability == Durability::Strict || !self.record.leased;
        self.record.leased = true;
        self.write(durable)
    }

    fn confirm(&mut self, mark: Mark) -> Result<(), AnchorError> {
        self.record.confirmed = Some(mark);
        self.record.pending = None;
        self.write(false)
    }

    fn release(&mut self) -> Result<(), AnchorError> {
        self.record.leased = false;
        self.write(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(generation: u64, fill: u8) -> Mark {
        Mark { generation, digest: [fill; 32] }
    }

    fn folder() -> (tempfile::TempDir, AnchorFolder) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("a");
        (dir, AnchorFolder { path, durability: Durability::Leased })
    }

    #[test]
    fn a_second_lease_is_refused_and_names_the_holder() {
        let (_dir, f) = folder();
        let mut a = FileAnchor::lease(&f, &[1; 16]).expect("first");
        a.announce(mark(1, 1)).expect("announce");
        let second = FileAnchor::lease(&f, &[1; 16]).map(|_| ());
        let text = second.expect_err("second").to_string();
        assert!(text.contains(&std::process::id().to_string()), "{text}");
        drop(a);
        FileAnchor::lease(&f, &[1; 16]).expect("after the first ended");
    }

    #[test]
    fn both_sides_of_an_unfinished_commit_are_accepted_until_one_is_confirmed() {
        let (_dir, f) = folder();
        let mut a = FileAnchor::lease(&f, &[1; 16]).expect("lease");
        assert_eq!(a.expectation().expect("read"), None);
        a.confirm(mark(4, 4)).expect("confirm");
        a.announce(mark(5, 5)).expect("announce");
        drop(a);
        let mut a = FileAnchor::lease(&f, &[1; 16]).expect("lease");
        let e = a.expectation().expect("read").expect("known");
        assert!(e.accepts(&mark(4, 4)) && e.accepts(&mark(5, 5)));
        assert!(!e.accepts(&mark(5, 6)) && !e.accepts(&mark(3, 3)) && !e.accepts(&mark(6, 6)));
        a.confirm(mark(5, 5)).expect("confirm");
        drop(a);
        let a = FileAnchor::lease(&f, &[1; 16]).expect("lease");
        assert!(!a.expectation().expect("read").expect("known").accepts(&mark(4, 4)));
    }

    #[test]
    fn an_image_ahead_of_the_record_is_accepted_only_after_the_host_went_down_during_a_lease() {
        let (_dir, f) = folder();
        let mut a = FileAnchor::lease(&f, &[1; 16]).expect("lease");
        a.confirm(mark(4, 4)).expect("confirm");
        a.announce(mark(5, 5)).expect("announce");
        drop(a);
        let mut a = FileAnchor::lease(&f, &[1; 16]).expect("lease");
        a.boot = [0xee; 16];
        let e = a.expectation().expect("read").expect("known");
        assert!(e.accepts(&mark(9, 9)) && !e.accepts(&mark(3, 3)));
        a.release().expect("release");
        drop(a);
        let a = FileAnchor::lease(&f, &[1; 16]).expect("lease");
        assert!(!a.expectation().expect("read").expect("known").accepts(&mark(9, 9)));
    }

    #[test]
    fn one_torn_record_falls_back_to_the_other_and_two_are_damage() {
        let (_dir, f) = folder();
        let mut a = FileAnchor::lease(&f, &[1; 16]).expect("lease");
        a.confirm(mark(1, 1)).expect("confirm");
        a.confirm(mark(2, 2)).expect("confirm");
        let path = a.path.clone();
        drop(a);
        let file = File::options().write(true).open(&path).expect("open");
        file.write_all_at(&[0xff; 8], 30).expect("tear slot 0, which holds generation 2");
        let a = FileAnchor::lease(&f, &[1; 16]).expect("lease");
        assert_eq!(a.expectation().expect("read").expect("known").confirmed, mark(1, 1));
        drop(a);
        file.write_all_at(&[0xff; 8], SLOT + 30).expect("tear slot 1");
        assert!(matches!(FileAnchor::lease(&f, &[1; 16]), Err(AnchorError::Damaged(_))));
    }
}
