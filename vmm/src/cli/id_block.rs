// SPDX-License-Identifier: Apache-2.0
//! `cvmm id-block`: make, sign, show and check ID blocks.
//!
//! With the keys at hand one `sign` does all. For keys kept elsewhere there are two steps: `new` writes the
//! block, which any tool can sign (`openssl dgst -sha384 -sign`), and `sign --block-signature` puts what it
//! wrote into the auth page.

use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;

use base64ct::Base64;
use base64ct::Encoding as _;
use snp::digest::LaunchDigest;
use snp::explain::Explanation;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::identity::PublicKey;
use snp::identity::Signature;
use snp::identity::keys::private_from_pem;
use snp::image::igvm::id_block_header;
use snp::policy::GuestPolicy;

use super::Failure;
use super::note;
use super::out::write;
use crate::files::read_limited;
use crate::prepare;

/// Exit code: the ID block is not right.
const EXIT_REFUSED: u8 = 1;
/// Largest file that is read.
const FILE_MAX: u64 = 64 << 20;

/// Options of `cvmm id-block`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum Command {
    /// Write a block: 96 bytes that name one digest, one policy and your version number
    New(New),
    /// Sign a block and write its auth page
    Sign(Sign),
    /// Show a block, and its auth page if given, in words
    Show(Show),
    /// Check signatures, and digest and policy if given; exit code 0 only if all is right
    Check(CheckArgs),
}

#[derive(clap::Args, Clone, Debug)]
struct New {
    /// Launch digest in hex, or a file of `cvmm measure --json` with one digest
    #[arg(long, value_name = "HEX|FILE")]
    digest: String,
    /// Guest policy
    #[arg(long, value_name = "BITS", default_value = "0x30000")]
    policy: GuestPolicy,
    /// Family id, up to 16 bytes of text or 32 hex digits
    #[arg(long, value_name = "ID", default_value = "", value_parser = parse_id)]
    family_id: [u8; 16],
    /// Image id, up to 16 bytes of text or 32 hex digits
    #[arg(long, value_name = "ID", default_value = "", value_parser = parse_id)]
    image_id: [u8; 16],
    /// Security version number of the guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    svn: u32,
    /// File for the block
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(clap::Args, Clone, Debug)]
struct Sign {
    /// The block: 96 bytes, or the same in base64
    #[arg(value_name = "BLOCK")]
    block: PathBuf,
    /// ID key in PEM: the private key, or the public one with --block-signature
    #[arg(long, value_name = "FILE")]
    id_key: PathBuf,
    /// Signature over the block, made elsewhere: DER, or 96 bytes of R and S
    #[arg(long, value_name = "FILE")]
    block_signature: Option<PathBuf>,
    /// Author key in PEM: the private key, or the public one with --author-signature
    #[arg(long, value_name = "FILE")]
    author_key: Option<PathBuf>,
    /// The author key's signature over the ID key (see `--write-id-key`), made elsewhere
    #[arg(long, value_name = "FILE", requires = "author_key")]
    author_signature: Option<PathBuf>,
    /// Write the 1028 bytes of the ID key that an author key signs, and stop
    #[arg(long, value_name = "FILE", conflicts_with = "out")]
    write_id_key: Option<PathBuf>,
    /// File for the auth page
    #[arg(long, value_name = "FILE", required_unless_present = "write_id_key")]
    out: Option<PathBuf>,
}

#[derive(clap::Args, Clone, Debug)]
struct Show {
    /// The block: 96 bytes, or the same in base64
    #[arg(value_name = "BLOCK")]
    block: PathBuf,
    /// The auth page: 4096 bytes, or the same in base64
    #[arg(value_name = "AUTH")]
    auth: Option<PathBuf>,
    /// Print what QEMU's sev-snp-guest object takes: id-block and id-auth in base64
    #[arg(long, requires = "auth")]
    qemu: bool,
    /// Write the body of an IGVM file's SNP_ID_BLOCK header, for compatibility mask 1
    #[arg(long, value_name = "FILE", requires = "auth")]
    igvm: Option<PathBuf>,
}

#[derive(clap::Args, Clone, Debug)]
struct CheckArgs {
    /// The block: 96 bytes, or the same in base64
    #[arg(value_name = "BLOCK")]
    block: PathBuf,
    /// The auth page: 4096 bytes, or the same in base64
    #[arg(value_name = "AUTH")]
    auth: PathBuf,
    /// Launch digest that it must name: hex, or a file of `cvmm measure --json` with one digest
    #[arg(long, value_name = "HEX|FILE")]
    digest: Option<String>,
    /// Policy that it must name
    #[arg(long, value_name = "BITS")]
    policy: Option<GuestPolicy>,
}

fn parse_id(text: &str) -> Result<[u8; 16], String> {
    let mut id = [0; 16];
    if text.len() == 32 && hex::decode_to_slice(text, &mut id).is_ok() {
        return Ok(id);
    }
    match id.get_mut(..text.len()) {
        Some(start) => {
            start.copy_from_slice(text.as_bytes());
            Ok(id)
        }
        None => Err(format!("{} bytes, expected up to 16, or 32 hex digits", text.len())),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    read_limited(path, FILE_MAX, &note::events())
        .map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))
}

fn read_text(path: &Path) -> Result<String, Failure> {
    String::from_utf8(read(path)?).map_err(|_| Failure::Usage(format!("{}: not a PEM file", path.display())))
}

/// A file's contents in a form, with the file's name in the error.
fn parsed<T, E: std::fmt::Display>(path: &Path, result: Result<T, E>) -> Result<T, Failure> {
    result.map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))
}

fn digest(text: &str) -> Result<LaunchDigest, Failure> {
    let mut bytes = [0; 48];
    if hex::decode_to_slice(text, &mut bytes).is_ok() {
        return Ok(LaunchDigest(bytes));
    }
    let path = Path::new(text);
    if !path.exists() {
        let error = format!("--digest '{text:.100}': neither 96 hex digits nor a file");
        return Err(Failure::Usage(error));
    }
    let explanation = parsed(path, Explanation::parse(&read_text(path)?))?;
    let [one] = explanation.digests.as_slice() else {
        return Err(Failure::Usage(format!(
            "{text}: {} digests, expected one: an ID block is for one number of vCPUs",
            explanation.digests.len()
        )));
    };
    parsed(path, hex::decode_to_slice(&one.launch_digest, &mut bytes))?;
    Ok(LaunchDigest(bytes))
}

fn read_block(path: &Path) -> Result<IdBlock, Failure> {
    Ok(prepare::read_block("snp.id_block.block", path, &note::events())?)
}

fn read_auth(path: &Path) -> Result<IdAuth, Failure> {
    Ok(prepare::read_auth("snp.id_block.auth", path, &note::events())?)
}

/// Carries the command out.
pub fn main(args: &Args) -> Result<u8, Failure> {
    match &args.command {
        Command::New(new) => {
            new.policy.check_firmware().map_err(Failure::usage)?;
            let block = IdBlock {
                launch_digest: digest(&new.digest)?,
                family_id: new.family_id,
                image_id: new.image_id,
                guest_svn: new.svn,
                policy: new.policy,
            };
            write(&new.out, &block.encode())?;
            Ok(0)
        }
        Command::Sign(sign) => sign_block(sign),
        Command::Show(show) => show_block(show),
        Command::Check(check) => check_block(check),
    }
}

fn sign_block(args: &Sign) -> Result<u8, Failure> {
    let id_pem = read_text(&args.id_key)?;
    let id_key = parsed(&args.id_key, PublicKey::from_pem(&id_pem))?;
    if let Some(path) = &args.write_id_key {
        write(path, &id_key.encode())?;
        return Ok(0);
    }
    let block = read_block(&args.block)?;
    let block_signature = match &args.block_signature {
        Some(path) => parsed(path, Signature::from_tool(&read(path)?))?,
        None => Signature::make(&parsed(&args.id_key, private_from_pem(&id_pem))?, &block.encode()),
    };
    let author = match &args.author_key {
        Some(key_path) => {
            let pem = read_text(key_path)?;
            let key = parsed(key_path, PublicKey::from_pem(&pem))?;
            let signature = match &args.author_signature {
                Some(path) => parsed(path, Signature::from_tool(&read(path)?))?,
                None => Signature::make(&parsed(key_path, private_from_pem(&pem))?, &id_key.encode()),
            };
            Some((key, signature))
        }
        None => None,
    };
    let auth = IdAuth { block_signature, id_key, author };
    // A signature that was made elsewhere may be over something else: the firmware would say so only at
    // launch.
    auth.check_signatures(&block).map_err(Failure::usage)?;
    if let Some(out) = &args.out {
        write(out, &auth.encode())?;
    }
    Ok(0)
}

fn show_block(args: &Show) -> Result<u8, Failure> {
    let block = read_block(&args.block)?;
    let auth = match &args.auth {
        Some(path) => Some(read_auth(path)?),
        None => None,
    };
    if let Some(auth) = auth.as_ref().filter(|_| args.qemu || args.igvm.is_some())
        && let Err(error) = auth.check_signatures(&block)
    {
        note::warn(format_args!("{error}; firmware refuses a launch with these files"));
    }
    if let (Some(path), Some(auth)) = (&args.igvm, &auth) {
        write(path, &id_block_header(&block, auth, 1))?;
    }
    let mut out = String::new();
    match &auth {
        Some(auth) if args.qemu => {
            let encode = |bytes: &[u8]| Base64::encode_string(bytes);
            // QEMU (qapi/qom.json, SevSnpGuestProperties) looks at the author's key only if it is told to.
            let author = if auth.author.is_some() { ",author-key-enabled=on" } else { "" };
            out.push_str(&format!(
                "id-block={},id-auth={}{author}\n",
                encode(&block.encode()),
                encode(&auth.encode())
            ));
        }
        _ => {
            let text =
                |id: &[u8; 16]| String::from_utf8_lossy(id).trim_end_matches('\0').escape_debug().to_string();
            out.push_str(&format!("launch digest  {}\n", block.launch_digest));
            out.push_str(&format!("policy         {}\n", block.policy));
            out.push_str(&format!("guest svn      {}\n", block.guest_svn));
            out.push_str(&format!(
                "family id      {} '{}'\n",
                hex::encode(block.family_id),
                text(&block.family_id)
            ));
            out.push_str(&format!(
                "image id       {} '{}'\n",
                hex::encode(block.image_id),
                text(&block.image_id)
            ));
            if let Some(auth) = &auth {
                out.push_str(&format!("id key         {}\n", hex::encode(auth.id_key.digest())));
                let author = auth.author.as_ref().map_or("none".into(), |(key, _)| hex::encode(key.digest()));
                out.push_str(&format!("author key     {author}\n"));
                let signatures = match auth.check_signatures(&block) {
                    Ok(()) => "good".to_owned(),
                    Err(error) => error.to_string(),
                };
                out.push_str(&format!("signatures     {signatures}\n"));
            }
        }
    }
    std::io::stdout().write_all(out.as_bytes()).map_err(Failure::monitor)?;
    Ok(0)
}

fn check_block(args: &CheckArgs) -> Result<u8, Failure> {
    let block = read_block(&args.block)?;
    let auth = read_auth(&args.auth)?;
    let launch = args.digest.as_deref().map(digest).transpose()?.unwrap_or(block.launch_digest);
    if let Err(error) = block.policy.check_firmware() {
        return answer(error, EXIT_REFUSED);
    }
    match auth.check(&block, launch, args.policy.unwrap_or(block.policy)) {
        Ok(()) => answer("good", 0),
        Err(mismatch) => answer(mismatch, EXIT_REFUSED),
    }
}

/// Prints an answer; the result is the exit code.
fn answer(text: impl std::fmt::Display, code: u8) -> Result<u8, Failure> {
    std::io::stdout().write_all(format!("{text}\n").as_bytes()).map_err(Failure::monitor)?;
    Ok(code)
}
