// SPDX-License-Identifier: Apache-2.0
//! Every way in which a guest-state file can be refused, worded for the operator who has to act on it.

use std::io;

use super::format::FileId;

/// Why a guest-state file was not opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum VmgsError {
    /// The operating system refused a read, a write or a flush.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The payload holds no header at all.
    #[error("the image is empty (both headers are zero); create it with `vmgs create`")]
    Empty,
    /// The file is shorter than its own footer says, or is not made of whole sectors.
    #[error("the image is truncated: {0}")]
    Truncated(String),
    /// There is no usable fixed-VHD footer.
    #[error("not a fixed VHD: {0}")]
    NotVhd(String),
    /// A version 1 image, which is a GPT disk.
    #[error("the image has the version 1 layout (a GPT disk), which cannot be opened; convert it first")]
    V1Format,
    /// Every header that is present has a version that this code does not know.
    #[error("header version {0:#010x} is not supported (expected 0x00030000)")]
    UnsupportedVersion(u32),
    /// Neither header slot holds a valid header.
    #[error("no valid header: slot 0 {slot0}; slot 1 {slot1}")]
    NoValidHeader {
        /// Fault of the first slot.
        slot0: String,
        /// Fault of the second slot.
        slot1: String,
    },
    /// Both headers are valid, but neither follows the other.
    #[error("the two headers have sequence numbers {a} and {b}; neither follows the other")]
    SequenceGap {
        /// Sequence number in the first slot.
        a: u32,
        /// Sequence number in the second slot.
        b: u32,
    },
    /// A table entry points outside of the image or claims more bytes than it has blocks.
    #[error("{0}: {1}")]
    OutOfRange(FileId, String),
    /// A table is not what the header or the format says it must be.
    #[error("table {0} is malformed: {1}")]
    BadTable(FileId, String),
    /// A file is larger than this implementation will ever load.
    #[error("{0} claims {1} bytes, more than the 64 MiB limit")]
    TooLarge(FileId, u64),
    /// Two objects claim the same block.
    #[error("{0} and {1} claim the same block {2}")]
    Overlap(FileId, FileId, u32),
    /// The file is not in the image and nothing says that it should be.
    #[error("{0} is not in the image")]
    NotFound(FileId),
    /// The image remembers a file that is gone.
    #[error(
        "{0} was in this image and has been removed without its key: either someone with access to the file \
         deleted it, or a tool deleted it without unlocking the image. Restore a backup, or adopt the loss \
         explicitly"
    )]
    MissingEntry(FileId),
    /// A file is present which the integrity root does not list.
    #[error(
        "{0} was added to the image without the integrity root knowing it; adopt it explicitly or restore a backup"
    )]
    UnexpectedEntry(FileId),
    /// A file that must be encrypted is in plain text.
    #[error(
        "{0} must be encrypted in an encrypted image but is plain text: it may have been planted by someone who \
         has no key. Adopt it only if the image was encrypted after the file was written"
    )]
    UnexpectedPlaintext(FileId),
    /// The header says that nothing is encrypted, the tables say otherwise.
    #[error("the header says the image is not encrypted, but {0} is: the encryption was stripped")]
    EncryptionStripped(FileId),
    /// The caller asked for an encrypted image and this one is not.
    #[error("the image is not encrypted, and this command only serves encrypted ones")]
    NotEncrypted,
    /// The image is encrypted and no key was given.
    #[error("the image is encrypted and no key was given; name one of the key options")]
    KeyNeeded,
    /// No key slot opens with the key given.
    #[error("the key given opens neither key slot of the active header")]
    WrongKey,
    /// Anyone can decrypt this image.
    #[error(
        "the metadata key of this image is all zero, so that anyone can decrypt every file in it without any \
         key. Treat its contents as disclosed: run `vmgs repair`, then replace the TPM's seeds and every secret \
         that it held"
    )]
    ZeroMetadataKey,
    /// Authentication of an encrypted object failed.
    #[error("{0} fails authentication: its bytes, its size, its nonce or its tag were changed")]
    AuthFailed(FileId),
    /// An encrypted object is all zero, as after a hole was punched in the image.
    #[error("{0} is marked as encrypted but holds only zero bytes")]
    ZeroCiphertext(FileId),
    /// The image has no integrity root.
    #[error(
        "the image has no integrity root (file 62): it was made by another tool, or the root was removed. Adopt \
         it explicitly if you trust where it comes from"
    )]
    RootMissing,
    /// The integrity root is present but is not a root.
    #[error("the integrity root is malformed: {0}")]
    RootMismatch(String),
    /// Files differ from the root although whoever wrote them had the key.
    #[error(
        "files {0} were written by a tool that does not keep the integrity root (it had the key). Adopt the \
         change explicitly"
    )]
    ForeignWrite(FileList),
    /// The image is older (or from another branch of history) than the anchor says.
    #[error(
        "stale image: it is at generation {have}, the anchor expects {want}. An older copy was put back, or the \
         newest header is damaged. If this is an intended restore, say so with `vmgs restore` or --accept-rollback"
    )]
    StaleGeneration {
        /// Generation of the image.
        have: u64,
        /// What the anchor knows, in words.
        want: String,
    },
    /// A second instance, a missing anchor record, or an anchor that cannot be used.
    #[error(transparent)]
    Anchor(#[from] super::anchor::AnchorError),
    /// There is no hole that is large enough outside of the blocks that a live header names.
    #[error(
        "no space: {need} blocks in one piece are needed and the image has {capacity} blocks in all; recreate it with a larger --size"
    )]
    NoSpace {
        /// Blocks that did not fit.
        need: u32,
        /// Blocks in the payload.
        capacity: u32,
    },
    /// An earlier write failed; what is on disk is unknown until the image is opened again.
    #[error("an earlier write to the image failed, so nothing more is written; open it again")]
    Poisoned,
    /// The caller asked for something the format cannot hold.
    #[error("{0}")]
    Invalid(String),
    /// The operating system gave no random bytes.
    #[error("no random bytes from the operating system")]
    NoEntropy,
    /// The old key still opens something after a rekey.
    #[error("after the rekey the old key still opens {0}; the rekey is not complete, run it again")]
    OldKeyStillOpens(&'static str),
}

/// A list of file ids that prints as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileList(pub Vec<FileId>);

impl std::fmt::Display for FileList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, id) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{id}")?;
        }
        Ok(())
    }
}

impl VmgsError {
    /// The image file cannot be opened.
    pub fn opening(source: io::Error) -> Self {
        Self::Io { what: "opening the image", source }
    }

    pub(super) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}
