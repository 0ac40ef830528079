// SPDX-License-Identifier: Apache-2.0
//! Options that say where a datastore key comes from.

use std::path::PathBuf;

use crate::keys::KeyProvider;
use crate::keys::file::Credential;
use crate::keys::file::KeyFile;
use crate::keys::hook::Hook;
use crate::keys::passphrase::Passphrase;

/// The key options of the command line; exactly one must be given.
#[derive(Debug, Clone, Default, clap::Args)]
#[group(multiple = false)]
pub struct KeyArgs {
    /// File with the datastore key: 32 bytes, or 64 hexadecimal digits
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// File whose first line is a passphrase; the key is derived from it with argon2id
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// Name of a systemd credential that holds the key (LoadCredential=, LoadCredentialEncrypted=)
    #[arg(long, value_name = "NAME")]
    pub key_credential: Option<String>,
    /// Program that prints the key; it gets the request as JSON on standard input
    #[arg(long, value_name = "PROGRAM")]
    pub key_hook: Option<PathBuf>,
}

impl KeyArgs {
    /// The provider that was chosen, if any.
    pub fn provider(&self) -> Option<Box<dyn KeyProvider>> {
        provider_of(&self.key_file, &self.passphrase_file, &self.key_credential, &self.key_hook)
    }
}

/// The key options for the key that takes over; only used when a key is replaced or an image is copied.
#[derive(Debug, Clone, Default, clap::Args)]
#[group(multiple = false)]
pub struct NewKeyArgs {
    /// File with the new datastore key
    #[arg(long, value_name = "FILE")]
    pub new_key_file: Option<PathBuf>,
    /// File whose first line is the new passphrase
    #[arg(long, value_name = "FILE")]
    pub new_passphrase_file: Option<PathBuf>,
    /// Name of a systemd credential that holds the new key
    #[arg(long, value_name = "NAME")]
    pub new_key_credential: Option<String>,
    /// Program that prints the new key
    #[arg(long, value_name = "PROGRAM")]
    pub new_key_hook: Option<PathBuf>,
}

impl NewKeyArgs {
    /// The provider that was chosen, if any.
    pub fn provider(&self) -> Option<Box<dyn KeyProvider>> {
        provider_of(
            &self.new_key_file,
            &self.new_passphrase_file,
            &self.new_key_credential,
            &self.new_key_hook,
        )
    }
}

fn provider_of(
    key_file: &Option<PathBuf>,
    passphrase: &Option<PathBuf>,
    credential: &Option<String>,
    program: &Option<PathBuf>,
) -> Option<Box<dyn KeyProvider>> {
    if let Some(path) = key_file {
        return Some(Box::new(KeyFile { path: path.clone() }));
    }
    if let Some(path) = passphrase {
        return Some(Box::new(Passphrase { path: path.clone() }));
    }
    if let Some(name) = credential {
        return Some(Box::new(Credential { name: name.clone() }));
    }
    program.as_ref().map(|path| Box::new(Hook::new(path.clone())) as Box<dyn KeyProvider>)
}
