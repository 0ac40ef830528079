// SPDX-License-Identifier: Apache-2.0
//! A key in a file, and a key in a credential that systemd has decrypted for this unit.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

use zeroize::Zeroizing;

use super::KeyError;
use super::KeyProvider;
use super::KeyRequest;
use crate::vmgs::Key;

/// A key that lies in a file which only its owner may read.
pub struct KeyFile {
    /// The file.
    pub path: PathBuf,
}

/// The longest secret. One byte more is read, so that a longer one is noticed.
pub(super) const MOST: u64 = 4096;

/// Reads a secret, and refuses one that is not its user's alone: others can read it, or have put it there.
pub(super) fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    read(path, 0o077, true)
}

/// Reads a secret; `others` are the rights that nobody else may have, and `ours` whether it has to be this
/// user's or root's.
fn read(path: &Path, others: u32, ours: bool) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    use std::io::Read;
    let io = |source| KeyError::Io { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    let mode = meta.mode() & 0o777;
    if mode & others != 0 {
        return Err(KeyError::Exposed { path: path.to_path_buf(), mode });
    }
    if ours {
        check_owner(path, meta.uid())?;
    }
    // One allocation that never grows, so that no copy of the secret is left behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST as usize + 1));
    file.take(MOST + 1).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// Refuses what belongs to somebody who is neither this user nor root.
fn check_owner(path: &Path, owner: u32) -> Result<(), KeyError> {
    match owner {
        0 => Ok(()),
        id if id == rustix::process::geteuid().as_raw() => Ok(()),
        owner => Err(KeyError::Foreign { path: path.to_path_buf(), owner }),
    }
}

/// Refuses a program that somebody else can change. A name without a folder is looked for in the folders of
/// the system's programs.
pub(super) fn check_program(path: &Path) -> Result<(), KeyError> {
    if !path.as_os_str().as_encoded_bytes().contains(&b'/') {
        return Ok(());
    }
    let meta = std::fs::metadata(path).map_err(|source| KeyError::Io { path: path.to_path_buf(), source })?;
    let mode = meta.mode() & 0o777;
    if mode & 0o022 != 0 {
        return Err(KeyError::Writable { path: path.to_path_buf(), mode });
    }
    check_owner(path, meta.uid())
}

impl KeyProvider for KeyFile {
    fn describe(&self) -> String {
        format!("key file {}", self.path.display())
    }

    fn obtain(&self, _request: &KeyRequest<'_>) -> Result<Key, KeyError> {
        super::decode(self.path.display().to_string(), &read_secret(&self.path)?)
    }
}

/// A key in `$CREDENTIALS_DIRECTORY`, as `LoadCredential=` and `LoadCredentialEncrypted=` provide it.
pub struct Credential {
    /// Name of the credential.
    pub name: String,
}

impl KeyProvider for Credential {
    fn describe(&self) -> String {
        format!("systemd credential {}", self.name)
    }

    fn obtain(&self, _request: &KeyRequest<'_>) -> Result<Key, KeyError> {
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY").filter(|_| !self.name.contains('/'));
        let folder = folder.ok_or_else(|| KeyError::NoCredentials(self.name.clone()))?;
        let path = PathBuf::from(folder).join(&self.name);
        // systemd owns the file and gives this user a right of his own to it, which shows as the group's.
        super::decode(path.display().to_string(), &read(&path, 0o007, false)?)
    }
}
