// SPDX-License-Identifier: Apache-2.0
//! What can be odd about an image, and which explicit word of an operator each oddity needs.
//!
//! Everything is found first and judged afterwards, so that a refusal and a warning name all of it. Three
//! words exist and none implies another: *adopt* (files that another tool wrote, removed or left in plain
//! text), *rollback* (an image that is not known to be the newest), *repair* (keys that anyone can read).
//! Without an integrity root, lost or never there, nothing proves either, so that needs adopt and rollback
//! together: the first copy of an image that was adopted long ago has no root, and whoever can write its file
//! can give it an id that no anchor knows. A damaged file needs no word: it blocks itself and nothing else.

use super::file_id::FileId;
use super::mark::uuid_text;

/// What an operator may accept explicitly when an image is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Accept {
    /// An image that is older than, or unknown to, the anchor.
    pub rollback: bool,
    /// Files that were added, changed, removed or left in plain text by another tool.
    pub foreign: bool,
    /// An image with keys that anyone can read: to be repaired.
    pub zero_key: bool,
    /// The files that the command is about to replace or remove, one bit each: what is odd about them is over
    /// then.
    pub replacing: u64,
}

impl Accept {
    /// Says that the command replaces or removes this file.
    pub fn replacing(mut self, id: FileId) -> Self {
        self.replacing |= 1 << id.number();
        self
    }
}

/// Where a table lies that opens with the zero key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroKey {
    /// Behind the header that counts: every file is open.
    Active,
    /// Behind the other header.
    Older,
    /// In a block that no header names.
    Freed(u32),
}

impl std::fmt::Display for ZeroKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Active => f.write_str("its table of file keys"),
            Self::Older => f.write_str("the table of file keys behind its older header"),
            Self::Freed(block) => write!(f, "an older table of file keys in block {block}"),
        }
    }
}

/// Something about an image that is not as this program leaves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// The other header slot is damaged; it may have been the newer one.
    MayBeOlder(String),
    /// The other header slot is damaged, but it was the older one.
    DamagedSlot(String),
    /// The image was opened without an anchor.
    NoAnchor,
    /// The older header is wrapped by another key, or in plain text: a change of key was interrupted.
    OldKeyInSlot,
    /// The image was written anew, and not everything of before was overwritten.
    ScrubPending,
    /// A second key opens the image, and the next write takes that away.
    SecondKey,
    /// More writes than one datastore key should see.
    WornKey,
    /// A file that fails authentication or cannot be read.
    Damaged(FileId, String),
    /// A file whose contents are not a record of its kind.
    Malformed(FileId, String),
    /// A file that the tables or the root remember is gone.
    Missing(FileId),
    /// A file is there which the root does not list.
    Unexpected(FileId),
    /// A file that must be encrypted is in plain text.
    Planted(FileId),
    /// A file differs from the root although whoever wrote it had the key.
    Changed(FileId),
    /// No tool that keeps a root has written this image.
    NeverRooted,
    /// The container's id is not the image's.
    FooterId {
        /// Of the container.
        footer: [u8; 16],
        /// Of the root.
        image: [u8; 16],
    },
    /// The image had a root and it is gone or unreadable.
    RootLost(String),
    /// Keys that anyone can read.
    ZeroKey(ZeroKey),
    /// A rollback was accepted.
    RollbackAccepted {
        /// Generation of the image.
        have: u64,
        /// What the anchor expected.
        want: String,
    },
}

/// Which word of the operator a finding needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    Adopt,
    AdoptAndRollback,
    Repair,
}

impl Finding {
    fn needs(&self, accept: &Accept) -> Needs {
        match self {
            Self::Missing(id) | Self::Unexpected(id) | Self::Planted(id) | Self::Changed(id)
                if accept.replacing >> id.number() & 1 == 1 =>
            {
                Needs::Nothing
            }
            Self::Missing(_)
            | Self::Unexpected(_)
            | Self::Planted(_)
            | Self::Changed(_)
            | Self::FooterId { .. } => Needs::Adopt,
            // The id of an image without a root is nobody's word, so the anchor's silence about it says
            // nothing of its age.
            Self::NeverRooted | Self::RootLost(_) => Needs::AdoptAndRollback,
            Self::ZeroKey(_) => Needs::Repair,
            _ => Needs::Nothing,
        }
    }

    /// Whether the image has to be written anew, with the blocks of every earlier generation overwritten.
    pub fn unsettles(&self, accept: &Accept) -> bool {
        // The container's id may be the salt of the key that opens the image, so only a change of key writes
        // it.
        self.needs(accept) != Needs::Nothing && !matches!(self, Self::FooterId { .. })
    }

    /// Whether a rewrite was not finished, so that bytes of before may be in the file.
    pub fn is_cut_short(&self) -> bool {
        matches!(self, Self::OldKeyInSlot | Self::ScrubPending)
    }

    /// Kinds of findings that are told as one sentence with a list of files.
    fn listed(&self) -> Option<(FileId, &'static str)> {
        Some(match self {
            Self::Missing(id) => (
                *id,
                "was in this image and has been removed without its key: either someone with access to the file deleted \
                 it, or a tool deleted it without keeping the integrity root",
            ),
            Self::Unexpected(id) => (*id, "added to the image without the integrity root knowing it"),
            Self::Planted(id) => (
                *id,
                "must be encrypted in an encrypted image but is plain text: it may have been planted by someone who has no \
                 key",
            ),
            Self::Changed(id) => {
                (*id, "written by a tool that does not keep the integrity root (it had the key)")
            }
            _ => return None,
        })
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::MayBeOlder(why) => write!(f, "the other header slot {why}: it may have been the newer one"),
            Self::DamagedSlot(why) => write!(f, "the inactive header slot {why}; the next write replaces it"),
            Self::NoAnchor => {
                f.write_str("opened without an anchor: an older copy cannot be told from the newest")
            }
            Self::OldKeyInSlot => f.write_str(
                "a change of key was interrupted: the older header still opens with another key, or with none. The next command \
                 that opens it to write, and the next start of its service, ends that and overwrites what it opens",
            ),
            Self::ScrubPending => f.write_str(
                "the image was written anew (a change of key, a repair or an adoption) and that was cut short: bytes of before \
                 may still be in the file. The next command that opens it to write, and the next start of its service, \
                 overwrites them",
            ),
            Self::SecondKey => f.write_str(
                "a second key, added by another tool, opens this image; the next write by this program ends that",
            ),
            Self::WornKey => f.write_str(
                "this key has sealed more than two thousand million generations; change it with `vmgs rekey`",
            ),
            Self::Damaged(id, why) if *id == FileId::VTPM_STATE => write!(
                f,
                "{why}. This is the TPM's state; file 61 holds the one that was last read back. `vmgs export --id 61 -o \
                 F` and `vmgs import --id 60 -i F` go back to it"
            ),
            Self::Damaged(id, why) => write!(
                f,
                "{why}. Only this file is blocked; put it back with `vmgs import --id {0}`, or remove it with `vmgs \
                 delete --id {0}`",
                id.number()
            ),
            Self::Malformed(id, why) => write!(f, "{id} is no record and is not used: {why}"),
            Self::NeverRooted => f.write_str(
                "the image has no integrity root (file 62), and never had one: another tool made it, and nothing proves which files \
                 belong to it, nor that it is the newest copy",
            ),
            Self::FooterId { footer, image } => write!(
                f,
                "the container's id {} is not the image's own {}: the last 512 bytes were changed (`vmgs rekey` writes \
                 them anew)",
                uuid_text(footer),
                uuid_text(image)
            ),
            Self::RootLost(why) => write!(
                f,
                "the integrity root (file 62) was kept in this image and is lost ({why}): nothing proves which files \
                 belong to it, nor that it is the newest copy"
            ),
            Self::ZeroKey(place) => write!(
                f,
                "{place} opens with a key of zeros, so that anyone can read the files of this image without any key. \
                 Treat its contents as disclosed: run `vmgs repair`, then replace the TPM's seeds and every secret that \
                 it held"
            ),
            Self::RollbackAccepted { have, want } => {
                write!(f, "ROLLBACK ACCEPTED: the image is at generation {have}, the anchor expected {want}")
            }
            other => match other.listed() {
                Some((id, what)) => write!(f, "{id}: {what}"),
                None => Ok(()),
            },
        }
    }
}

/// One sentence for each kind, with all files of that kind.
pub fn sentences<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut lists: Vec<(&'static str, Vec<FileId>)> = Vec::new();
    for finding in findings {
        match finding.listed() {
            None => out.push(finding.to_string()),
            Some((id, what)) => match lists.iter_mut().find(|(w, _)| *w == what) {
                Some((_, ids)) => ids.push(id),
                None => lists.push((what, vec![id])),
            },
        }
    }
    out.extend(lists.into_iter().map(|(what, ids)| {
        let names: Vec<String> = ids.iter().map(ToString::to_string).collect();
        format!("{}: {what}", names.join(", "))
    }));
    out
}

/// What is odd about an image that was not opened, and the words that would have to be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Everything that needs a word, accepted or not: a backup ends all of it, so all of it is told.
    pub findings: Vec<Finding>,
    needs_repair: bool,
    options: Option<&'static str>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&sentences(&self.findings).join("; "))?;
        match (self.needs_repair, self.options) {
            (true, None) => Ok(()),
            (true, Some(options)) => write!(f, ". For the rest, the repair needs {options}"),
            (false, options) => write!(
                f,
                ". Put a backup back with `vmgs restore`, or accept exactly this with {}",
                options.unwrap_or("--adopt")
            ),
        }
    }
}

impl std::error::Error for Refusal {}

/// Refuses everything that was not accepted, in one answer.
pub fn decide(findings: &[Finding], accept: &Accept) -> Result<(), Refusal> {
    let zero_key = findings.iter().any(|f| matches!(f, Finding::ZeroKey(_)));
    let accepted = |finding: &Finding| match finding.needs(accept) {
        Needs::Nothing => true,
        // Nothing in an image whose keys anyone knows is anybody's; that it has no root is no news to who
        // repairs it.
        Needs::AdoptAndRollback if *finding == Finding::NeverRooted && zero_key && accept.zero_key => true,
        Needs::Adopt => accept.foreign,
        Needs::AdoptAndRollback => accept.foreign && accept.rollback,
        Needs::Repair => accept.zero_key,
    };
    let refused: Vec<Needs> = findings.iter().filter(|f| !accepted(f)).map(|f| f.needs(accept)).collect();
    if refused.is_empty() {
        return Ok(());
    }
    let told = findings.iter().filter(|f| f.needs(accept) != Needs::Nothing);
    Err(Refusal {
        findings: told.cloned().collect(),
        needs_repair: refused.contains(&Needs::Repair),
        options: if refused.contains(&Needs::AdoptAndRollback) {
            Some("--adopt and --accept-rollback together")
        } else if refused.contains(&Needs::Adopt) {
            Some("--adopt")
        } else {
            None
        },
    })
}
