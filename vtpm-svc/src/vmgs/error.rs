// SPDX-License-Identifier: Apache-2.0
//! Every way in which a guest-state file can be refused, worded for the operator who has to act on it.

use std::io;

use super::file_id::FileId;
use super::file_id::NotAFile;
use super::findings::Refusal;

/// Why a guest-state file was not opened, read or written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum VmgsError {
    /// The operating system refused a read, a write or a flush.
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
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
    NoValidHeader { slot0: String, slot1: String },
    /// Both headers are valid, but neither follows the other.
    #[error("the two headers have sequence numbers {a} and {b}; neither follows the other")]
    SequenceGap { a: u32, b: u32 },
    /// A table entry points outside of the image or claims more bytes than it has blocks.
    #[error("{0}: {1}")]
    OutOfRange(FileId, String),
    /// A table is not what the header or the format says it must be.
    #[error("table {0} is malformed: {1}")]
    BadTable(FileId, String),
    /// A file is larger than this implementation will ever load.
    #[error("{0} claims {1} bytes, more than the 64 MiB limit")]
    TooLarge(FileId, u64),
    /// The files together are larger than this implementation will ever load.
    #[error(
        "the files of the image claim {0} bytes together, more than the 64 MiB that are read of one image"
    )]
    TooMuch(u64),
    /// Two objects claim the same block.
    #[error("{0} and {1} claim the same block {2}")]
    Overlap(FileId, FileId, u32),
    /// The file is not in the image and nothing says that it should be.
    #[error("{0} is not in the image")]
    NotFound(FileId),
    /// A table is gone without which nothing can be opened.
    #[error("{0} has been removed, and nothing opens without it. Put a backup back with `vmgs restore`")]
    MissingEntry(FileId),
    /// The image is odd in ways that the operator has not accepted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The image belongs to another VM than the one that it is opened for.
    #[error(
        "this image belongs to VM {found}, and VM {wanted} was asked for: it is another VM's file. Put the right one \
         here, or name the VM that it belongs to"
    )]
    OtherVm { found: String, wanted: String },
    /// The anchor knows this image as an encrypted one.
    #[error(
        "this image is in plain text, and the anchor knows it as an encrypted one: its encryption was stripped, or the \
         file was planted. Put an encrypted backup back with `vmgs restore`"
    )]
    Stripped,
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
    #[error(
        "the key given opens neither key slot of the active header: it is another image's key, or (for a passphrase, \
         which is salted with it) the container's id in the last 512 bytes was changed"
    )]
    WrongKey,
    /// The TPM was made and its state is not there or not readable.
    #[error(
        "the TPM's state (file 60) is damaged or gone, and no new TPM takes its place. {}",
        if *spare {
            "File 61 holds the state that was last read back: `vmgs export --id 61 -o F`, then `vmgs import --id 60 -i F`, \
             go back to it"
        } else {
            "File 61, the copy of it, cannot be read either: put a backup of the image back with `vmgs restore`, or make an image \
             with a new TPM with `vmgs clone`"
        }
    )]
    TpmLost {
        /// The copy in file 61 can be read.
        spare: bool,
    },
    /// Authentication of an encrypted object failed.
    #[error("{0} fails authentication: its bytes, its size, its nonce or its tag were changed")]
    AuthFailed(FileId),
    /// An encrypted object is all zero, as after a hole was punched in the image.
    #[error("{0} is marked as encrypted but holds only zero bytes")]
    ZeroCiphertext(FileId),
    /// The integrity root is present but is not a root.
    #[error("the integrity root is malformed: {0}")]
    RootMismatch(String),
    /// A file is not what was there when the image was opened.
    #[error("{0} changed while the image was open: somebody else writes to this file")]
    Changed(FileId),
    /// The image is older (or from another branch of history) than the anchor says.
    #[error(
        "stale image: it is at generation {have}, the anchor {folder} expects {want}. An older copy was put back, or the \
         newest header is damaged. If this is an intended restore, say so with `vmgs restore` or --accept-rollback"
    )]
    StaleGeneration { have: u64, want: String, folder: String },
    /// The image is newer than the anchor says, or of another branch.
    #[error(
        "the image is at generation {have}, ahead of the anchor {folder}, which expects {want}: it was used with another \
         anchor meanwhile (root and other users have different ones by default; name the right one with --anchor), or \
         this is another branch of its history. If this copy is the one to go on with, say so with --accept-rollback"
    )]
    AheadOfAnchor { have: u64, want: String, folder: String },
    /// A second instance, a missing anchor record, or an anchor that cannot be used.
    #[error(transparent)]
    Anchor(#[from] super::anchor::AnchorError),
    /// There is no hole that is large enough outside of the blocks that a live header names.
    #[error(
        "no space: {need} blocks in one piece are needed and the image has {capacity} blocks in all; make a larger copy \
         with `vmgs clone --keep-identity --size`, or remove a file with `vmgs delete`"
    )]
    NoSpace { need: u32, capacity: u32 },
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
    /// Bytes of an earlier generation are left.
    #[error("after the rewrite block {0} still holds bytes of an earlier generation; run the command again")]
    OldBytesLeft(u64),
    /// A file cannot be written anew because it cannot be read.
    #[error(
        "{0} cannot be carried over, so nothing was changed ({1}). Put it back with `vmgs import --id {n}` or remove it with \
         `vmgs delete --id {n}`, then run this again", n = .0.number()
    )]
    NotCarried(FileId, String),
    /// Too large to be written anew.
    #[error(
        "an image of {0} bytes is not rewritten in place; copy it with `vmgs clone --keep-identity --size 64M`"
    )]
    TooLargeToRewrite(u64),
    /// The new key is the old one.
    #[error("the new key is the key that the image has; nothing was changed")]
    SameKey,
    /// The counter of generations has no next value.
    #[error("generation {0} is the last one that an image can have; make a new one with `vmgs clone`")]
    LastGeneration(u64),
}

impl VmgsError {
    /// A new image cannot be written.
    pub fn creating(source: io::Error) -> Self {
        Self::Io { what: "writing a new image", source }
    }

    /// The image file cannot be opened.
    pub fn opening(source: io::Error) -> Self {
        Self::Io { what: "opening the image", source }
    }

    pub(super) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

impl From<NotAFile> for VmgsError {
    fn from(error: NotAFile) -> Self {
        Self::Invalid(error.to_string())
    }
}
