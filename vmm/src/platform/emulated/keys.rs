// SPDX-License-Identifier: Apache-2.0
//! The emulated platform's attestation keys: one chain per host and user, made at first use.
//!
//! No verifier trusts them by default. The file holds a private key and is readable by its owner only.

use std::fs;
use std::io;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use snp_model::chain::Chain;
use snp_model::chain::ChainError;

use crate::events::Events;

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum KeysError {
    /// The file.
    #[error("keys of the emulated platform: {path}: {source}")]
    File { path: PathBuf, source: io::Error },
    /// Its contents.
    #[error("keys of the emulated platform: {path}: {source}; delete the file to have new keys made")]
    Chain { path: PathBuf, source: ChainError },
}

/// Where keys are kept unless the user says otherwise: below `$XDG_STATE_HOME`, or `~/.local/state`.
pub fn default_path() -> PathBuf {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    state.unwrap_or_else(|| home().join(".local/state")).join("cvmm/emulated-platform.pem")
}

/// Reads the keys at `path`, or makes them. Two processes that do so at the same time end up with the same
/// keys.
pub fn load_or_create(path: &Path, events: &Events) -> Result<Chain, KeysError> {
    match fs::read_to_string(path) {
        Ok(text) => parse(path, &text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => create(path, events),
        Err(source) => Err(KeysError::File { path: path.to_owned(), source }),
    }
}

fn parse(path: &Path, text: &str) -> Result<Chain, KeysError> {
    Chain::from_pem(text).map_err(|source| KeysError::Chain { path: path.to_owned(), source })
}

fn create(path: &Path, events: &Events) -> Result<Chain, KeysError> {
    let file = |source| KeysError::File { path: path.to_owned(), source };
    events.note(format_args!(
        "making the emulated platform's attestation keys in {} (once, some seconds)",
        path.display()
    ));
    let bad = |source| KeysError::Chain { path: path.to_owned(), source };
    let chain = Chain::generate(&mut rand_core::OsRng).map_err(bad)?;
    let text = chain.to_pem().map_err(bad)?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(file)?;
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(name);
    let write = || {
        let mut out = fs::File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        // Fails if somebody else was faster; then theirs are the keys.
        fs::hard_link(&temporary, path)
    };
    let linked = write();
    let _ = fs::remove_file(&temporary);
    match linked {
        Ok(()) => Ok(chain),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            parse(path, &fs::read_to_string(path).map_err(file)?)
        }
        Err(source) => Err(file(source)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_damaged_file_is_named_and_kept() {
        let folder = std::env::temp_dir().join(format!("cvmm-keys-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("keys.pem");
        fs::write(&path, "not keys").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let message =
            load_or_create(&path, &Events::silent()).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("keys.pem") && message.contains("delete the file"), "{message}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "not keys");
        fs::remove_dir_all(&folder).unwrap();
    }
}
