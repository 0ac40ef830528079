// SPDX-License-Identifier: Apache-2.0
//! `vmgs create`, `clone` and `restore`: commands that put a whole file in its place.

use std::io;
use std::path::Path;
use std::path::PathBuf;

use serde_json::json;

use super::CliError;
use super::Done;
use super::Outcome;
use super::ask;
use super::at;
use super::close;
use super::key_for;
use super::needed;
use super::open_to_write;
use crate::cli::anchor::AnchorArgs;
use crate::cli::keys::KeyArgs;
use crate::cli::keys::NewKeyArgs;
use crate::keys::Purpose;
use crate::vmgs::Accept;
use crate::vmgs::Change;
use crate::vmgs::FileId;
use crate::vmgs::FsFile;
use crate::vmgs::Identity;
use crate::vmgs::Key;
use crate::vmgs::View;
use crate::vmgs::Vmgs;
use crate::vmgs::VmgsError;
use crate::vmgs::anchor::AnchorSource;
use crate::vmgs::anchor::Known;
use crate::vmgs::block::BlockFile;
use crate::vmgs::findings::sentences;
use crate::vmgs::format::MAX_SIZE;
use crate::vmgs::format::MIN_SIZE;
use crate::vmgs::image;
use crate::vmgs::mark::uuid_text;
use crate::vmgs::root::FLAG_DISCLOSED;
use crate::vmgs::root::FLAG_EXPORTED;
use crate::vmgs::view::RootState;
use crate::whole_file as place;
use crate::whole_file::Waiting;

/// Makes an image.
pub(super) fn create(
    file: &Path,
    size: u64,
    vm: Option<[u8; 16]>,
    key: &KeyArgs,
    anchor: &AnchorArgs,
) -> Outcome {
    let identity = Identity::fresh(vm).map_err(at(file))?;
    let provider = needed(key.provider(), "key")?;
    let secret = || ask(provider.as_ref(), identity.image, vm, Purpose::Create);
    make_image(file, size, secret, identity, anchor, "create", |_| Ok(()))?;
    Ok(json!({
        "created": file.display().to_string(),
        "image": uuid_text(&identity.image),
        "vm": uuid_text(&identity.vm),
        "payload_bytes": size,
        "anchor": anchor.folder().record_path(&identity.image).display().to_string(),
    })
    .into())
}

/// Makes a file under a temporary name and gives it its own only when it is whole, if nobody else has that by
/// then.
fn make_image(
    path: &Path,
    size: u64,
    secret: impl FnOnce() -> Result<Key, CliError>,
    identity: Identity,
    anchor: &AnchorArgs,
    what: &str,
    fill: impl FnOnce(&mut Vmgs<FsFile>) -> Result<(), CliError>,
) -> Result<(), CliError> {
    place::tell_left_over(path);
    if path.symlink_metadata().is_ok() {
        return Err(place::exists(path).into());
    }
    let secret = secret()?;
    let folder = anchor.folder();
    // An id that was just drawn has no record; if there is one all the same, it is somebody else's.
    let record = folder.record_path(&identity.image);
    let ours = !record.exists();
    let made = || {
        let (waiting, file) = Waiting::make(path, |temporary| FsFile::create(temporary, size + 512))?;
        let mut vmgs = Vmgs::create(file, Some(secret), identity, Some(&folder)).map_err(at(path))?;
        fill(&mut vmgs)?;
        waiting.take_free(path)?;
        Ok(vmgs)
    };
    let made: Result<Vmgs<FsFile>, CliError> = made();
    let vmgs = made.inspect_err(|_| {
        // The record of an image that there is not; nobody asks for it, so its removal may fail.
        if ours {
            let _ = std::fs::remove_file(&record);
        }
    })?;
    // From here on the image is there and needs its record, whatever else fails.
    close(vmgs, path, anchor, what, "")
}

/// Files that make up the identity of a TPM.
fn is_identity(id: FileId) -> bool {
    matches!(
        id,
        FileId::VTPM_STATE
            | FileId::VTPM_STATE_GOOD
            | FileId::VTPM_VOLATILE
            | FileId::VTPM_SAVE
            | FileId::VTPM_MANUFACTURE
            | FileId::TPM_NVRAM
            | FileId::TPM_PPI
    ) || id.name() == Some("TPM_NVRAM_BACKUP")
}

/// How a copy differs from its original.
pub(super) struct Cloning {
    /// The TPM goes with it.
    pub keep: bool,
    /// Payload, if another one.
    pub size: Option<u64>,
    /// The VM that it is for.
    pub vm: Option<[u8; 16]>,
}

/// Makes a second VM's image.
pub(super) fn clone(
    file: &Path,
    to: &Path,
    how: Cloning,
    key: &KeyArgs,
    new_key: &NewKeyArgs,
    anchor: &AnchorArgs,
) -> Outcome {
    let keep = how.keep;
    if to.symlink_metadata().is_ok() {
        return Err(place::exists(to).into());
    }
    let provider = needed(new_key.provider(), "new key")?;
    let mut source = open_to_write(file, key, anchor, anchor.accept())?;
    let identity = Identity::fresh(how.vm).map_err(at(to))?;
    let flags = source.root().flags;
    let (mut left, mut damaged, mut copied) = (Vec::new(), Vec::new(), Vec::new());
    for (id, bytes, _) in source.list().into_iter().filter(|(id, _, _)| *id != FileId::ROOT) {
        if is_identity(id) && !keep {
            left.push(id.to_string());
        } else if source.is_damaged(id) || bytes == 0 {
            damaged.push(id.to_string());
        } else {
            copied.push((id, source.read(id).map_err(at(file))?));
        }
    }
    let size = how.size.unwrap_or_else(|| (u64::from(source.capacity()) * 4096).clamp(MIN_SIZE, MAX_SIZE));
    let secret = || ask(provider.as_ref(), identity.image, how.vm, Purpose::Create);
    make_image(to, size, secret, identity, anchor, "clone", |target| {
        let mut changes: Vec<Change<'_>> = copied.iter().map(|(id, data)| Change::Put(*id, data)).collect();
        // What was disclosed before is disclosed in every copy of it.
        changes.push(Change::Flag(if keep { flags | FLAG_EXPORTED } else { flags & FLAG_DISCLOSED }));
        let ready = target.prepare(&changes).map_err(at(to))?;
        if keep {
            // Before there is a second one, so that no end in between leaves two that do not know of each
            // other; and after everything that can be refused.
            source.commit(&[Change::Flag(FLAG_EXPORTED)]).map_err(at(file))?;
        }
        target.write(ready).map(|_| ()).map_err(at(to))
    })?;
    close(
        source,
        file,
        anchor,
        "clone",
        &format!("to {}, image {}", to.display(), uuid_text(&identity.image)),
    )?;
    Ok(json!({
        "cloned": to.display().to_string(),
        "image": uuid_text(&identity.image),
        "vm": uuid_text(&identity.vm),
        "identity": if keep { "kept: two VMs now have the same TPM" } else { "new: a TPM is made at first start" },
        "copied": copied.iter().map(|(id, _)| id.to_string()).collect::<Vec<_>>(),
        "left_out": left,
        "damaged_or_empty_and_left_out": damaged,
    })
    .into())
}

/// What is said of a backup before it takes a file's place.
fn loss(view: &View, known: &Known, backup: &Path, confirm: bool) -> serde_json::Value {
    let have = view.root.generation;
    let (lost, newest) = match known {
        Known::Nothing => (
            "unknown: the anchor has no record of this image, so nothing says how old the backup is"
                .to_owned(),
            None,
        ),
        Known::Damaged => (
            "unknown: the anchor's record of this image is damaged, so nothing says how old the backup is"
                .into(),
            None,
        ),
        Known::Record(e) => {
            let lost = match view.state {
                RootState::Proven(mark) if e.accepts(&mark, &view.root.previous) => {
                    "nothing: the backup is the newest copy".into()
                }
                _ if e.highest > have => format!(
                    "everything written in generations {} to {}: TPM keys and counters, NV data and UEFI variables",
                    have + 1,
                    e.highest
                ),
                _ => "another branch of this image's history".to_owned(),
            };
            (lost, Some(e.highest))
        }
    };
    json!({
        "backup": backup.display().to_string(),
        "image": uuid_text(&view.root.image),
        "vm": uuid_text(&view.root.vm),
        "backup_generation": have,
        "newest_generation": newest,
        "lost": lost,
        "not_proved": sentences(&view.findings),
        "restored": confirm,
    })
}

/// Where a file really is: a link to it stays a link.
fn behind_links(file: &Path) -> Result<PathBuf, CliError> {
    match file.symlink_metadata() {
        Ok(m) if m.is_symlink() => std::fs::canonicalize(file).map_err(|source| CliError::Io {
            path: format!("{} is a symbolic link that leads nowhere", file.display()),
            source,
        }),
        _ => Ok(file.to_path_buf()),
    }
}

/// Puts a backup in the place of an image.
///
/// What is checked is what was copied. The anchor hears of the copy before it has its name and confirms it
/// after, so that at each moment the file that bears the name is acceptable.
pub(super) fn restore(
    backup: &Path,
    file: &Path,
    confirm: bool,
    key: &KeyArgs,
    anchor: &AnchorArgs,
) -> Outcome {
    place::tell_left_over(file);
    let folder = anchor.folder();
    let raw = FsFile::open_read_only(backup).map_err(VmgsError::opening).map_err(at(backup))?;
    let key = key_for(&raw, backup, key)?;
    if !confirm {
        let view = View::read(&raw, key.as_ref()).map_err(at(backup))?;
        let known = folder.look(&view.root.image)?;
        let verdict = Some("nothing was changed; repeat with --confirm to accept the loss".to_owned());
        return Ok(Done { verdict, ..loss(&view, &known, backup, false).into() });
    }
    let real = behind_links(file)?;
    let (waiting, copy) = Waiting::make(&real, |temporary| copy(&raw, temporary))?;
    drop(raw);
    let view = View::read(&copy, key.as_ref()).map_err(at(backup))?;
    // Held until the end: a service that runs on the file would go on with a file that has no name any more.
    let replaced = match FsFile::open(&real) {
        Ok(raw) => Some(raw),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(at(file)(VmgsError::opening(e))),
    };
    not_anothers(&view, replaced.as_ref(), backup, file)?;
    if let Some(old) = &replaced {
        old.file().metadata().and_then(|old| place::inherit(copy.file(), &old)).map_err(|source| {
            CliError::Io {
                path: format!("giving the restored file the owner and mode of {}", file.display()),
                source,
            }
        })?;
    }
    let lease = folder.lease(&view.root.image)?;
    if matches!(lease.known(), Known::Record(e) if e.facts.sealed) && !view.layout.header.encrypted {
        // In its place every later open would refuse it, and the good file would be gone.
        return Err(at(backup)(VmgsError::Stripped));
    }
    let mut report = loss(&view, &lease.known(), backup, true);
    // To restore is to say that an older image is meant.
    let accept = Accept { rollback: true, ..anchor.accept() };
    let mut vmgs = Vmgs::open(copy, key, None, accept).map_err(at(backup))?;
    vmgs.lease_unplaced(lease);
    let mark = vmgs.commit(&[]).map_err(at(file))?;
    match replaced {
        Some(_) => waiting.replace(&real)?,
        None => waiting.take_free(&real)?,
    }
    vmgs.placed().map_err(at(file))?;
    close(vmgs, file, anchor, "restore", &format!("from {}", backup.display()))?;
    report["generation"] = mark.generation.into();
    Ok(report.into())
}

/// What is too damaged to say whose it is may be replaced; that is what backups are for.
fn not_anothers(view: &View, replaced: Option<&FsFile>, backup: &Path, file: &Path) -> Result<(), CliError> {
    let image = view.root.image;
    let other = replaced.and_then(|raw| image::unique_id(raw).ok());
    match other.filter(|id| *id != image && *id != view.container) {
        Some(other) => Err(CliError::Usage(format!(
            "{} is image {} and not {}, of which {} is a backup; move it away first",
            file.display(),
            uuid_text(&other),
            uuid_text(&image),
            backup.display()
        ))),
        None => Ok(()),
    }
}

fn copy(from: &FsFile, to: &Path) -> io::Result<FsFile> {
    let len = from.len()?;
    if len > MAX_SIZE + 512 {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "larger than any image that is restored (64 MiB)",
        ));
    }
    let mut new = FsFile::create(to, len)?;
    let mut buffer = vec![0; 1 << 16];
    let mut at = 0;
    while at < len {
        let piece = usize::try_from(len - at).unwrap_or(usize::MAX).min(buffer.len());
        from.read_at(&mut buffer[..piece], at)?;
        new.write_at(&buffer[..piece], at)?;
        at += piece as u64;
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmgs::anchor::Anchor;
    use crate::vmgs::anchor::AnchorError;
    use crate::vmgs::anchor::Facts;
    use crate::vmgs::mark::Mark;
    use clap::Parser;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        anchor: AnchorArgs,
    }

    /// An anchor whose medium fails at the very end.
    struct Fails;

    impl Anchor for Fails {
        fn known(&self) -> Known {
            Known::Nothing
        }
        fn place(&self) -> String {
            String::new()
        }
        fn refusal(&self) -> AnchorError {
            AnchorError::Damaged(PathBuf::new())
        }
        fn announce(&mut self, _: Mark) -> Result<(), AnchorError> {
            Ok(())
        }
        fn confirm(&mut self, _: Mark, _: Facts) -> Result<(), AnchorError> {
            Ok(())
        }
        fn release(&mut self) -> Result<(), AnchorError> {
            Err(self.refusal())
        }
    }

    #[test]
    fn an_image_that_has_its_name_keeps_its_record_whatever_fails_afterwards() {
        let dir = tempfile::tempdir().expect("tempdir");
        let folder = dir.path().join("anchor");
        let words = Words::parse_from(["test", "--anchor", &folder.display().to_string()]);
        let (path, identity) = (dir.path().join("vmgs"), Identity::fresh(None).expect("identity"));
        let record = words.anchor.folder().record_path(&identity.image);
        let key = || Ok(Key::from_bytes(&[7; 32]).expect("key"));
        let make = |fill: &dyn Fn(&mut Vmgs<FsFile>) -> Result<(), CliError>| {
            make_image(&path, 1 << 20, key, identity, &words.anchor, "create", fill)
        };
        // Before the image has its name, its record goes with it.
        assert!(make(&|_| Err(CliError::Usage("no".into()))).is_err());
        assert!(!path.exists() && !record.exists());
        let failed = make(&|vmgs| {
            vmgs.lease_unplaced(Box::new(Fails));
            vmgs.placed().map_err(at(&path))
        });
        assert!(failed.is_err() && path.exists() && record.exists(), "{failed:?}");
        // Somebody else's record is not this command's to remove.
        std::fs::remove_file(&path).expect("remove");
        assert!(make(&|_| Err(CliError::Usage("no".into()))).is_err());
        assert!(record.exists());
    }
}
