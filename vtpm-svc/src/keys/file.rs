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

/// Reads a secret, and refuses one that every user of the host can read.
pub(super) fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    use std::io::Read;
    let io = |source| KeyError::Io { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let mode = file.metadata().map_err(io)?.mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(KeyError::Exposed { path: path.to_path_buf(), mode });
    }
    // One allocation that never grows, so that no copy of the secret is left behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST as usize + 1));
    file.take(MOST + 1).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
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
        super::decode(path.display().to_string(), &read_secret(&path)?)
    }
}
