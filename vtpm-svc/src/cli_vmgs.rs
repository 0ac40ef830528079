// SPDX-License-Identifier: Apache-2.0
//! `vmgs …`: commands on a guest-state file that no service has open.
//!
//! The monitor's binary and `vtpm-svc` both expose these commands; [`run`] is the whole of it. Every command prints one
//! report, as text or (with `--json`) as one JSON object, and fails with one sentence.

mod platform;
mod report;

use std::io::Write;
use std::path::Path;
use std::path::PathBuf;

use clap::Subcommand;
use serde_json::Value;
use serde_json::json;

use crate::control::options::AnchorArgs;
use crate::keys::KeyArgs;
use crate::keys::KeyError;
use crate::keys::KeyProvider;
use crate::keys::KeyRequest;
use crate::keys::NewKeyArgs;
use crate::keys::Purpose;
use crate::vmgs::Accept;
use crate::vmgs::Change;
use crate::vmgs::FileId;
use crate::vmgs::FsFile;
use crate::vmgs::Identity;
use crate::vmgs::Key;
use crate::vmgs::Vmgs;
use crate::vmgs::VmgsError;
use crate::vmgs::anchor::AnchorError;
use crate::vmgs::anchor::AnchorSource;
use crate::vmgs::anchor::Expectation;
use crate::vmgs::image;
use crate::vmgs::root::FLAG_DISCLOSED;
use crate::vmgs::root::FLAG_EXPORTED;
use crate::vmgs::root::parse_uuid;
use crate::vmgs::root::uuid_text;

/// Options of `vmgs`.
#[derive(Debug, clap::Args)]
pub struct VmgsArgs {
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an image; its TPM is made when the service first starts with it
    Create {
        /// The new file
        file: PathBuf,
        /// Size of the payload: 1M to 64M
        #[arg(long, default_value = "4M", value_parser = parse_size)]
        size: u64,
        /// Id of the VM [default: a random one]
        #[arg(long, value_name = "UUID")]
        vm_uuid: Option<String>,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
    /// Show what can be seen, with or without the key
    Inspect {
        /// The image
        file: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Prove what can be proved, and say what cannot
    Check {
        /// The image
        file: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
    /// List the files
    List {
        /// The image
        file: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Copy one file out of the image
    Export {
        /// The image
        file: PathBuf,
        /// Number of the file
        #[arg(long)]
        id: u32,
        /// Where to write it; `-` is standard output
        #[arg(long, short)]
        output: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Copy one file into the image
    Import {
        /// The image
        file: PathBuf,
        /// Number of the file
        #[arg(long)]
        id: u32,
        /// Where to read it
        #[arg(long, short)]
        input: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
    /// Replace the key: every key inside changes too, and the old one opens nothing afterwards
    Rekey {
        /// The image
        file: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        new_key: NewKeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
    /// Make a second VM's image out of this one; it gets its own TPM unless told otherwise
    Clone {
        /// The image
        file: PathBuf,
        /// The new file
        to: PathBuf,
        /// Copy the TPM's seeds, keys and storage too: both VMs will be the same to every verifier
        #[arg(long)]
        keep_identity: bool,
        /// Id of the new VM [default: a random one]
        #[arg(long, value_name = "UUID")]
        vm_uuid: Option<String>,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        new_key: NewKeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
    /// Show or make a physical-presence request: what is done to the TPM when it starts next
    Ppi {
        /// The image
        file: PathBuf,
        /// 5 clears the TPM (owner, storage keys, lockout), 23 sets the PCR banks, 0 withdraws a request
        #[arg(long, value_name = "OPERATION")]
        request: Option<u32>,
        /// For operation 23: 2 for SHA-256, 4 for SHA-384, 6 for both
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        argument: u32,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
    /// Show or set how far the guest's clock is from UTC
    Clock {
        /// The image
        file: PathBuf,
        /// Seconds that the guest's clock is ahead
        #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
        set: Option<i64>,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
    /// Put a backup in the place of an image and make it the newest one; says first what is lost
    Restore {
        /// The backup
        backup: PathBuf,
        /// The image that it replaces (it may be missing)
        file: PathBuf,
        /// Do it; without this the loss is stated and nothing is changed
        #[arg(long)]
        confirm: bool,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
    /// Re-encrypt an image whose metadata key was zero; its contents stay marked as disclosed
    Repair {
        /// The image
        file: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        new_key: NewKeyArgs,
        #[command(flatten)]
        anchor: AnchorArgs,
    },
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The image.
    #[error("{path}: {source}")]
    Image {
        /// The file.
        path: String,
        /// What is wrong.
        source: VmgsError,
    },
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The anchor.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// Another file.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The command line.
    #[error("{0}")]
    Usage(String),
    /// `restore` without `--confirm`, or `check` that found something.
    #[error("{0}")]
    Verdict(String),
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['M', 'm']);
    match (digits.parse::<u64>(), digits.len() != text.len()) {
        (Ok(n @ 1..=64), true) => Ok(n << 20),
        (Ok(n), false) if (1 << 20..=64 << 20).contains(&n) && n % 4096 == 0 => Ok(n),
        _ => Err("expected 1M to 64M, or a number of bytes that is a multiple of 4096".into()),
    }
}

fn at(path: &Path) -> impl FnOnce(VmgsError) -> CliError {
    let path = path.display().to_string();
    move |source| CliError::Image { path, source }
}

fn io_at(path: &Path) -> impl FnOnce(std::io::Error) -> CliError {
    let path = path.display().to_string();
    move |source| CliError::Io { path, source }
}

fn ask(provider: &dyn KeyProvider, image: [u8; 16], purpose: Purpose) -> Result<Key, CliError> {
    Ok(provider.obtain(&KeyRequest { image, purpose, evidence: None })?)
}

fn needed(provider: Option<Box<dyn KeyProvider>>, what: &str) -> Result<Box<dyn KeyProvider>, CliError> {
    provider.ok_or_else(|| {
        CliError::Usage(format!(
            "a {what} is needed: --{0}-file, --{1}passphrase-file, --{0}-credential or --{0}-hook",
            what.replace(' ', "-"),
            if what.starts_with("new") { "new-" } else { "" }
        ))
    })
}

fn key_for(file: &FsFile, path: &Path, args: &KeyArgs) -> Result<Option<Key>, CliError> {
    let Some(provider) = args.provider() else { return Ok(None) };
    ask(provider.as_ref(), image::unique_id(file).map_err(at(path))?, Purpose::Open).map(Some)
}

/// Opens an image to read it; the anchor is left alone, so a running service is not disturbed by a shared lock failing.
fn open_to_read(path: &Path, key: &KeyArgs) -> Result<Vmgs<FsFile>, CliError> {
    let file = FsFile::open_read_only(path).map_err(VmgsError::opening).map_err(at(path))?;
    let key = key_for(&file, path, key)?;
    Vmgs::open(file, key, None, Accept { rollback: true, ..Accept::default() }).map_err(at(path))
}

fn open_to_write(
    path: &Path,
    key: &KeyArgs,
    anchor: &AnchorArgs,
    accept: Accept,
) -> Result<Vmgs<FsFile>, CliError> {
    let file = FsFile::open(path).map_err(VmgsError::opening).map_err(at(path))?;
    let key = key_for(&file, path, key)?;
    let vmgs = Vmgs::open(file, key, Some(&anchor.folder()), accept).map_err(at(path))?;
    for warning in vmgs.warnings() {
        crate::log::warn(&format!("{}: {warning}", path.display()));
    }
    Ok(vmgs)
}

/// Makes a file under a temporary name and gives it its own only when it is whole.
fn make_image(
    path: &Path,
    size: u64,
    key: Key,
    identity: Identity,
    anchor: &dyn AnchorSource,
    fill: impl FnOnce(&mut Vmgs<FsFile>) -> Result<(), VmgsError>,
) -> Result<(), CliError> {
    if path.exists() {
        return Err(CliError::Usage(format!("{} exists already", path.display())));
    }
    let temporary = beside(path);
    let made = FsFile::create(&temporary, size + 512)
        .map_err(VmgsError::opening)
        .and_then(|file| Vmgs::create(file, Some(key), identity, Some(anchor)))
        .and_then(|mut vmgs| {
            fill(&mut vmgs)?;
            vmgs.close().map(|_| ())
        });
    if let Err(e) = made {
        // What is half made is of no use; a failure to remove it changes nothing about the error.
        let _ = std::fs::remove_file(&temporary);
        return Err(at(path)(e));
    }
    move_into_place(&temporary, path)
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".new-{}", std::process::id()));
    path.with_file_name(name)
}

fn move_into_place(from: &Path, to: &Path) -> Result<(), CliError> {
    std::fs::rename(from, to).map_err(io_at(to))?;
    let folder = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(folder).and_then(|d| d.sync_all()).map_err(io_at(folder))
}

fn vm_uuid(text: &Option<String>) -> Result<Option<[u8; 16]>, CliError> {
    text.as_deref().map(parse_uuid).transpose().map_err(|e| CliError::Usage(format!("--vm-uuid: {e}")))
}

/// Runs one command.
pub fn run(args: &VmgsArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let (report, verdict) = execute(&args.command)?;
    let text = if args.json { format!("{report:#}\n") } else { report::as_text(&report) };
    // A reader that went away does not want the report.
    let _ = out.write_all(text.as_bytes());
    verdict.map_or(Ok(()), |v| Err(CliError::Verdict(v)))
}

type Outcome = Result<(Value, Option<String>), CliError>;

fn execute(command: &Command) -> Outcome {
    let done = |report: Value| Ok((report, None));
    match command {
        Command::Create { file, size, vm_uuid: vm, key, anchor } => {
            let identity = Identity::fresh(vm_uuid(vm)?).map_err(at(file))?;
            let secret = ask(needed(key.provider(), "key")?.as_ref(), identity.image, Purpose::Create)?;
            make_image(file, *size, secret, identity, &anchor.folder(), |_| Ok(()))?;
            done(json!({
                "created": file.display().to_string(),
                "image": uuid_text(&identity.image),
                "vm": uuid_text(&identity.vm),
                "payload_bytes": size,
                "anchor": anchor.folder().record_path(&identity.image).display().to_string(),
            }))
        }
        Command::Inspect { file, key } => {
            let raw = FsFile::open_read_only(file).map_err(VmgsError::opening).map_err(at(file))?;
            let key = key_for(&raw, file, key)?;
            done(report::inspect(&raw, key.as_ref()).map_err(at(file))?)
        }
        Command::Check { file, key, anchor } => {
            let raw = FsFile::open_read_only(file).map_err(VmgsError::opening).map_err(at(file))?;
            let key = key_for(&raw, file, key)?;
            let report = report::check(&raw, key.as_ref(), &anchor.folder());
            let failed = report["failed"].as_array().is_some_and(|f| !f.is_empty());
            Ok((report, failed.then(|| format!("{}: the check found a fault", file.display()))))
        }
        Command::List { file, key } => {
            let vmgs = open_to_read(file, key)?;
            done(json!({ "files": report::files(&vmgs) }))
        }
        Command::Export { file, id, output, key } => {
            let vmgs = open_to_read(file, key)?;
            let id = FileId::user(*id).map_err(at(file))?;
            let data = vmgs.read(id).map_err(at(file))?;
            write_private(output, &data)?;
            if output == Path::new("-") {
                return done(Value::Null);
            }
            done(
                json!({ "exported": id.to_string(), "bytes": data.len(), "to": output.display().to_string() }),
            )
        }
        Command::Import { file, id, input, key, anchor } => {
            let id = FileId::user(*id).map_err(at(file))?;
            let data = zeroize::Zeroizing::new(std::fs::read(input).map_err(io_at(input))?);
            let mut vmgs = open_to_write(file, key, anchor, anchor.accept())?;
            let mark = vmgs.commit(&[Change::Put(id, &data)]).map_err(at(file))?;
            vmgs.close().map_err(at(file))?;
            done(json!({ "imported": id.to_string(), "bytes": data.len(), "generation": mark.generation }))
        }
        Command::Rekey { file, key, new_key, anchor } => {
            let generation = replace_key(file, key, new_key, anchor, anchor.accept(), &[])?;
            done(json!({
                "rekeyed": file.display().to_string(),
                "generation": generation,
                "proved": "the old key opens neither header, and every older block is overwritten",
                "not_proved": "copies of this file that were made earlier can still be read with the old key",
            }))
        }
        Command::Clone { file, to, keep_identity, vm_uuid: vm, key, new_key, anchor } => {
            clone(file, to, *keep_identity, vm_uuid(vm)?, key, new_key, anchor)
        }
        Command::Ppi { file, request, argument, key, anchor } => {
            platform::ppi(file, *request, *argument, key, anchor)
        }
        Command::Clock { file, set, key, anchor } => platform::clock(file, *set, key, anchor),
        Command::Restore { backup, file, confirm, key, anchor } => {
            restore(backup, file, *confirm, key, anchor)
        }
        Command::Repair { file, key, new_key, anchor } => {
            let accept = Accept { zero_key: true, foreign: true, ..anchor.accept() };
            let generation =
                replace_key(file, key, new_key, anchor, accept, &[Change::Flag(FLAG_DISCLOSED)])?;
            done(json!({
                "repaired": file.display().to_string(),
                "generation": generation,
                "disclosed": "anyone who has an earlier copy can read everything in it: make a new TPM (vmgs clone \
                              without --keep-identity) and replace every secret that this one protected",
            }))
        }
    }
}

fn replace_key(
    file: &Path,
    key: &KeyArgs,
    new_key: &NewKeyArgs,
    anchor: &AnchorArgs,
    accept: Accept,
    before: &[Change<'_>],
) -> Result<u64, CliError> {
    let provider = needed(new_key.provider(), "new key")?;
    let raw = FsFile::open_read_only(file).map_err(VmgsError::opening).map_err(at(file))?;
    let image = image::unique_id(&raw).map_err(at(file))?;
    drop(raw);
    let secret = ask(provider.as_ref(), image, Purpose::Rekey)?;
    let mut vmgs = open_to_write(file, key, anchor, accept)?;
    vmgs.commit(before).map_err(at(file))?;
    let mark = vmgs.rekey(secret).map_err(at(file))?;
    vmgs.close().map_err(at(file))?;
    Ok(mark.generation)
}

fn write_private(path: &Path, data: &[u8]) -> Result<(), CliError> {
    use std::os::unix::fs::OpenOptionsExt;
    if path == Path::new("-") {
        return std::io::stdout().write_all(data).map_err(io_at(path));
    }
    let file = std::fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(path);
    file.and_then(|mut f| f.write_all(data)).map_err(io_at(path))
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

fn clone(
    file: &Path,
    to: &Path,
    keep: bool,
    vm: Option<[u8; 16]>,
    key: &KeyArgs,
    new_key: &NewKeyArgs,
    anchor: &AnchorArgs,
) -> Outcome {
    let source = open_to_write(file, key, anchor, anchor.accept())?;
    let identity = Identity::fresh(vm).map_err(at(to))?;
    let provider = needed(new_key.provider(), "new key")?;
    let secret = ask(provider.as_ref(), identity.image, Purpose::Create)?;
    let flags = source.root().flags;
    let (mut copied, mut left) = (Vec::new(), Vec::new());
    let size = u64::from(source.capacity()) * 4096;
    make_image(to, size, secret, identity, &anchor.folder(), |target| {
        for (id, _, _) in source.list().into_iter().filter(|(id, _, _)| *id != FileId::ROOT) {
            if is_identity(id) && !keep {
                left.push(id.to_string());
                continue;
            }
            target.commit(&[Change::Put(id, &source.read(id)?)])?;
            copied.push(id.to_string());
        }
        if keep {
            target.commit(&[Change::Flag(flags | FLAG_EXPORTED)])?;
        }
        Ok(())
    })?;
    let mut source = source;
    if keep {
        source.commit(&[Change::Flag(FLAG_EXPORTED)]).map_err(at(file))?;
    }
    source.close().map_err(at(file))?;
    Ok((
        json!({
            "cloned": to.display().to_string(),
            "image": uuid_text(&identity.image),
            "vm": uuid_text(&identity.vm),
            "identity": if keep { "kept: two VMs now have the same TPM" } else { "new: a TPM is made at first start" },
            "copied": copied,
            "left_out": left,
        }),
        None,
    ))
}

fn restore(backup: &Path, file: &Path, confirm: bool, key: &KeyArgs, anchor: &AnchorArgs) -> Outcome {
    let source = open_to_read(backup, key)?;
    let (have, image) = (source.root().mark(), source.root().image);
    let folder = anchor.folder();
    let lease = folder.lease(&image)?;
    let expectation = lease.expectation()?;
    drop(lease);
    let newest = expectation.map(|e: Expectation| {
        e.pending.map_or(e.confirmed.generation, |p| p.generation.max(e.confirmed.generation))
    });
    let lost = match newest {
        None => {
            "unknown: the anchor has no record of this image, so nothing says how old the backup is".into()
        }
        Some(n) if n > have.generation => format!(
            "everything written in generations {} to {n}: TPM keys and counters, NV data and UEFI variables",
            have.generation + 1
        ),
        Some(_) if expectation.is_some_and(|e| e.accepts(&have)) => {
            "nothing: the backup is the newest copy".into()
        }
        Some(_) => "another branch of this image's history".to_owned(),
    };
    let mut report = json!({
        "backup": backup.display().to_string(),
        "image": uuid_text(&image),
        "backup_generation": have.generation,
        "newest_generation": newest,
        "lost": lost,
        "restored": confirm,
    });
    drop(source);
    if !confirm {
        return Ok((report, Some("nothing was changed; repeat with --confirm to accept the loss".into())));
    }
    // Held until the end: a service that runs on the file would go on with a file that has no name any more.
    let replaced = match FsFile::open(file) {
        Ok(raw) => Some(raw),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(at(file)(VmgsError::opening(e))),
    };
    // What is too damaged to say whose it is may be replaced; that is what backups are for.
    let other = replaced.as_ref().and_then(|raw| image::unique_id(raw).ok()).filter(|id| *id != image);
    if let Some(other) = other {
        return Err(CliError::Usage(format!(
            "{} is image {} and not {}, of which {} is a backup; move it away first",
            file.display(),
            uuid_text(&other),
            uuid_text(&image),
            backup.display()
        )));
    }
    let temporary = beside(file);
    std::fs::copy(backup, &temporary).map_err(io_at(&temporary))?;
    let accept = Accept { rollback: true, ..anchor.accept() };
    let restored = open_to_write(&temporary, key, anchor, accept).and_then(|mut vmgs| {
        // A generation number is never used twice, so that no copy from before can be taken for the restored one.
        vmgs.raise_generation(newest.unwrap_or(0));
        let mark = vmgs.commit(&[]).map_err(at(file))?;
        vmgs.close().map_err(at(file)).map(|_| mark.generation)
    });
    let generation = match restored {
        Ok(g) => g,
        Err(e) => {
            // As in `make_image`.
            let _ = std::fs::remove_file(&temporary);
            return Err(e);
        }
    };
    move_into_place(&temporary, file)?;
    report["generation"] = generation.into();
    Ok((report, None))
}
