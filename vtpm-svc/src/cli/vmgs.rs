// SPDX-License-Identifier: Apache-2.0
//! `vmgs …`: commands on a guest-state file that no service has open.
//!
//! The monitor's binary and `vtpm-svc` both expose these commands; [`run`] is the whole of it. Every command
//! prints one report, as text or (with `--json`) as one JSON object, and fails with one sentence.

mod copies;
mod files;
mod keying;
mod report;
mod requests;

use std::io::Write;
use std::path::Path;
use std::path::PathBuf;

use clap::Subcommand;
use serde_json::Value;
use serde_json::json;

use crate::cli::anchor::AnchorArgs;
use crate::cli::anchor::HistoryArgs;
use crate::cli::keys::KeyArgs;
use crate::cli::keys::NewKeyArgs;
use crate::keys::KeyError;
use crate::keys::KeyProvider;
use crate::keys::KeyRequest;
use crate::keys::Purpose;
use crate::keys::open::OpenError;
use crate::keys::open::key_of;
use crate::vmgs::Accept;
use crate::vmgs::FsFile;
use crate::vmgs::Key;
use crate::vmgs::View;
use crate::vmgs::Vmgs;
use crate::vmgs::VmgsError;
use crate::vmgs::anchor::AnchorError;
use crate::vmgs::findings::sentences;
use crate::vmgs::history;
use crate::vmgs::mark::parse_uuid;
use crate::vmgs::view::RootState;
use crate::whole_file as place;
use crate::whole_file::PlaceError;

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
        #[command(flatten)]
        history: HistoryArgs,
    },
    /// Prove what can be proved, and say what cannot
    Check {
        /// The image
        file: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        history: HistoryArgs,
    },
    /// List the files
    List {
        /// The image
        file: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        history: HistoryArgs,
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
        #[command(flatten)]
        history: HistoryArgs,
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
    /// Remove files from the image
    Delete {
        /// The image
        file: PathBuf,
        /// Number of the file; can be repeated
        #[arg(long, required = true)]
        id: Vec<u32>,
        /// Also remove the TPM's state (60): the VM never gets another one in this image
        #[arg(long)]
        confirm: bool,
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
        /// Size of the new payload [default: as this one]
        #[arg(long, value_parser = parse_size)]
        size: Option<u64>,
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
    /// Re-encrypt an image with keys that anyone can read; its contents stay marked as disclosed
    Repair {
        /// The image
        file: PathBuf,
        /// Also an image that needs no repair
        #[arg(long)]
        force: bool,
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
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum CliError {
    /// The image.
    #[error("{path}: {source}")]
    Image { path: String, source: VmgsError },
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The anchor.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// Another file.
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// The command line.
    #[error("{0}")]
    Usage(String),
    /// `restore` without `--confirm`, or `check` that found something.
    #[error("{0}")]
    Verdict(String),
}

impl From<PlaceError> for CliError {
    fn from(error: PlaceError) -> Self {
        match error {
            PlaceError::Usage(text) => Self::Usage(text),
            PlaceError::Io { path, source } => Self::Io { path, source },
        }
    }
}

impl CliError {
    /// The exit code, as docs/vmgs.md has it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io { .. } => 1,
            Self::Usage(_) => 2,
            Self::Verdict(_) => 3,
            Self::Key(_) => 4,
            Self::Anchor(e) => anchor_code(e),
            Self::Image { source, .. } => match source {
                VmgsError::Io { source, .. } if source.kind() == std::io::ErrorKind::WouldBlock => 6,
                VmgsError::Io { .. } | VmgsError::NoEntropy | VmgsError::NoSpace { .. } => 1,
                VmgsError::Invalid(_) | VmgsError::SameKey => 2,
                VmgsError::KeyNeeded | VmgsError::WrongKey => 4,
                VmgsError::Anchor(e) => anchor_code(e),
                _ => 5,
            },
        }
    }
}

fn anchor_code(error: &AnchorError) -> u8 {
    match error {
        AnchorError::Io { .. } => 1,
        AnchorError::InUse { .. } => 6,
        _ => 5,
    }
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

/// Asks for a key; `vm` is what the command line says of the VM.
fn ask(
    provider: &dyn KeyProvider,
    image: [u8; 16],
    vm: Option<[u8; 16]>,
    purpose: Purpose,
) -> Result<Key, CliError> {
    Ok(provider.obtain(&KeyRequest { image, vm, purpose, evidence: None })?)
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
    key_of(provider.as_ref(), file, None, Purpose::Open).map(Some).map_err(|e| match e {
        OpenError::Image(source) => at(path)(source),
        OpenError::Key(e) => e.into(),
    })
}

/// An image that somebody looks at.
struct Looked {
    raw: FsFile,
    view: View,
}

/// Reads an image that needs nobody's permission to be looked at, and says what is odd about it.
fn look(path: &Path, key: &KeyArgs) -> Result<Looked, CliError> {
    let raw = FsFile::open_read_only(path).map_err(VmgsError::opening).map_err(at(path))?;
    let key = key_for(&raw, path, key)?;
    let view = View::read(&raw, key.as_ref()).map_err(at(path))?;
    for sentence in sentences(&view.findings) {
        crate::log::warn(&format!("{}: {sentence}", path.display()));
    }
    Ok(Looked { raw, view })
}

impl Looked {
    /// Notes who looked, if this image has a place for it here. To look needs no permission to change, so
    /// what cannot be noted is said and stops nobody.
    fn note(&self, path: &Path, history: &HistoryArgs, what: &str, detail: &str) {
        let folder = history.folder();
        if self.view.state == RootState::Never || !folder.path.exists() {
            return;
        }
        let file = path.display().to_string();
        let (root, findings) = (&self.view.root, &self.view.findings[..]);
        let reason = history.reason.as_deref();
        let event = history::Event { what, file: &file, root, findings, detail, reason };
        if let Err(e) = history::record(&folder, &event) {
            crate::log::warn(&format!("that {file} was looked at could not be noted in its history: {e}"));
        }
    }
}

fn open_to_write(
    path: &Path,
    key: &KeyArgs,
    anchor: &AnchorArgs,
    accept: Accept,
) -> Result<Vmgs<FsFile>, CliError> {
    let file = FsFile::open(path).map_err(VmgsError::opening).map_err(at(path))?;
    let key = key_for(&file, path, key)?;
    open_with(file, path, key, anchor, accept)
}

fn open_with(
    file: FsFile,
    path: &Path,
    key: Option<Key>,
    anchor: &AnchorArgs,
    accept: Accept,
) -> Result<Vmgs<FsFile>, CliError> {
    let vmgs = Vmgs::open(file, key, Some(&anchor.folder()), accept).map_err(at(path))?;
    for warning in vmgs.warnings() {
        crate::log::warn(&format!("{}: {warning}", path.display()));
    }
    Ok(vmgs)
}

/// Ends a command that has changed an image, and notes what it did.
fn close(
    mut vmgs: Vmgs<FsFile>,
    path: &Path,
    anchor: &AnchorArgs,
    what: &str,
    detail: &str,
) -> Result<(), CliError> {
    let file = path.display().to_string();
    let event = history::Event {
        what,
        file: &file,
        root: vmgs.root(),
        findings: vmgs.findings(),
        detail,
        reason: anchor.history.reason.as_deref(),
    };
    if let Err(e) = history::record(&anchor.folder(), &event) {
        crate::log::warn(&format!("the history of {file} could not be written: {e}"));
    }
    vmgs.release().map_err(at(path))
}

fn vm_uuid(text: &Option<String>) -> Result<Option<[u8; 16]>, CliError> {
    text.as_deref().map(parse_uuid).transpose().map_err(|e| CliError::Usage(format!("--vm-uuid: {e}")))
}

/// What a command has to say.
struct Done {
    /// What it did or found.
    report: Value,
    /// A file's bytes, in the place of a report.
    raw: Option<zeroize::Zeroizing<Vec<u8>>>,
    /// Why it counts as failed all the same.
    verdict: Option<String>,
}

impl From<Value> for Done {
    fn from(report: Value) -> Self {
        Self { report, raw: None, verdict: None }
    }
}

type Outcome = Result<Done, CliError>;

/// Runs one command.
pub fn run(args: &VmgsArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let done = execute(&args.command)?;
    let written = match &done.raw {
        Some(bytes) => out.write_all(bytes),
        None if args.json => writeln!(out, "{:#}", done.report),
        None => out.write_all(report::as_text(&done.report).as_bytes()),
    };
    match written.and_then(|()| out.flush()) {
        // A reader that went away does not want the rest of a report; of a file it would have too little.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe && done.raw.is_none() => {}
        other => other.map_err(io_at(Path::new("standard output")))?,
    }
    done.verdict.map_or(Ok(()), |v| Err(CliError::Verdict(v)))
}

fn execute(command: &Command) -> Outcome {
    match command {
        Command::Create { file, size, vm_uuid: vm, key, anchor } => {
            copies::create(file, *size, vm_uuid(vm)?, key, anchor)
        }
        Command::Inspect { file, key, history } => {
            let raw = FsFile::open_read_only(file).map_err(VmgsError::opening).map_err(at(file))?;
            let key = key_for(&raw, file, key)?;
            place::tell_left_over(file);
            let (report, view) = report::inspect(&raw, key.as_ref()).map_err(at(file))?;
            if let Some(view) = view {
                Looked { raw, view }.note(file, history, "inspect", "");
            }
            Ok(report.into())
        }
        Command::Check { file, key, history } => {
            let raw = FsFile::open_read_only(file).map_err(VmgsError::opening).map_err(at(file))?;
            let key = key_for(&raw, file, key)?;
            place::tell_left_over(file);
            let (report, view) = report::check(&raw, key.as_ref(), &history.folder());
            let faults = report["failed"].as_array().map_or(0, Vec::len);
            if let Some(view) = view {
                Looked { raw, view }.note(file, history, "check", &format!("{faults} faults"));
            }
            let verdict = (faults > 0).then(|| format!("{}: the check found a fault", file.display()));
            Ok(Done { verdict, ..report.into() })
        }
        Command::List { file, key, history } => {
            let looked = look(file, key)?;
            looked.note(file, history, "list", "");
            Ok(json!({
                "files": report::files(&looked.view.list()),
                "not_proved": report::not_proved(&looked.view),
            })
            .into())
        }
        Command::Export { file, id, output, key, history } => files::export(file, *id, output, key, history),
        Command::Import { file, id, input, key, anchor } => files::import(file, *id, input, key, anchor),
        Command::Delete { file, id, confirm, key, anchor } => files::delete(file, id, *confirm, key, anchor),
        Command::Rekey { file, key, new_key, anchor } => keying::rekey(file, key, new_key, anchor),
        Command::Clone { file, to, keep_identity, size, vm_uuid: vm, key, new_key, anchor } => {
            let (keep, size, vm) = (*keep_identity, *size, vm_uuid(vm)?);
            copies::clone(file, to, copies::Cloning { keep, size, vm }, key, new_key, anchor)
        }
        Command::Ppi { file, request, argument, key, anchor } => {
            requests::ppi(file, *request, *argument, key, anchor)
        }
        Command::Clock { file, set, key, anchor } => requests::clock(file, *set, key, anchor),
        Command::Restore { backup, file, confirm, key, anchor } => {
            copies::restore(backup, file, *confirm, key, anchor)
        }
        Command::Repair { file, force, key, new_key, anchor } => {
            keying::repair(file, *force, key, new_key, anchor)
        }
    }
}
