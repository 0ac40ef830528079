// SPDX-License-Identifier: Apache-2.0
//! Where the datastore key comes from.
//!
//! The key is asked for once, before the image is opened, and by name of the image. A provider may be as
//! simple as a file; the interface is shaped so that a key broker fits too, which gives the key only after it
//! has verified an attestation report that answers its challenge ([`Evidence`]).

pub mod file;
pub mod hook;
pub mod open;
pub mod passphrase;

use std::path::PathBuf;

use crate::vmgs::Key;
use crate::vmgs::mark::uuid_text;

/// What the key is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To open an image.
    Open,
    /// To make a new image; a provider that manages keys makes one.
    Create,
    /// To replace the key of an image; a provider that manages keys makes the next one.
    Rekey,
}

impl Purpose {
    /// One word, as hooks get it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Create => "create",
            Self::Rekey => "rekey",
        }
    }
}

/// Proof of where the service runs, made for a broker's challenge.
pub trait Evidence {
    /// An attestation report whose report data is `challenge`.
    fn report(&self, challenge: &[u8; 64]) -> Result<Vec<u8>, KeyError>;
}

/// A request for a key.
pub struct KeyRequest<'a> {
    /// The image's unique id, from its container: public, and bound to the key by whoever gives the key out.
    pub image: [u8; 16],
    /// The VM that the image has to belong to, if the caller knows.
    pub vm: Option<[u8; 16]>,
    /// What the key is for.
    pub purpose: Purpose,
    /// Proof, if the service has any to offer.
    pub evidence: Option<&'a dyn Evidence>,
}

impl KeyRequest<'_> {
    /// The image's id as text.
    pub fn image_text(&self) -> String {
        uuid_text(&self.image)
    }
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum KeyError {
    /// A file cannot be read.
    #[error("key {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// Somebody else may have written it.
    #[error("key {path}: it belongs to user {owner}, and is taken only from this user or root")]
    Foreign { path: PathBuf, owner: u32 },
    /// Somebody else may change the program.
    #[error("key hook {path}: its mode {mode:#o} lets other users change it; run `chmod go-w {path}`")]
    Writable { path: PathBuf, mode: u32 },
    /// Others may read the file.
    #[error("key {path}: its mode {mode:#o} lets other users read it; run `chmod 600 {path}`")]
    Exposed { path: PathBuf, mode: u32 },
    /// The contents are not a key.
    #[error("key {origin}: {found}; expected 32 bytes or 64 hexadecimal digits")]
    NotAKey {
        origin: String,
        /// What was found instead, without showing it.
        found: String,
    },
    /// A passphrase that is no passphrase.
    #[error("the passphrase in {path} {why}")]
    Passphrase { path: PathBuf, why: &'static str },
    /// Key derivation failed.
    #[error("deriving the key from the passphrase: {0}")]
    Derivation(String),
    /// systemd gave no credentials.
    #[error(
        "no credential `{0}`: $CREDENTIALS_DIRECTORY is not set, so this process was not started by systemd with \
         LoadCredential= or LoadCredentialEncrypted="
    )]
    NoCredentials(String),
    /// The hook said no.
    #[error("key hook {program} failed ({status}): {message}")]
    Hook {
        program: PathBuf,
        status: String,
        /// What it printed on standard error, one line.
        message: String,
    },
    /// The hook gave no answer.
    #[error(
        "key hook {program} did not end within {seconds} seconds and was stopped; run it by hand with the request on its \
         standard input to see what it waits for"
    )]
    HookSilent { program: PathBuf, seconds: u64 },
    /// A key of zeros.
    #[error("the key is all zero")]
    Zero,
}

/// A source of keys.
pub trait KeyProvider {
    /// For messages.
    fn describe(&self) -> String;
    /// Whether it says by itself that it waits for somebody.
    fn tells_of_its_wait(&self) -> bool {
        false
    }
    /// Gives the key, or says why not.
    fn obtain(&self, request: &KeyRequest<'_>) -> Result<Key, KeyError>;
}

/// Whether there are as many different bytes as in a sentence.
fn varied(bytes: &[u8]) -> bool {
    bytes.iter().collect::<std::collections::BTreeSet<_>>().len() > 8
}

/// A key from bytes that are either the key itself or its hexadecimal form.
fn decode(origin: String, bytes: &[u8]) -> Result<Key, KeyError> {
    let zero = |_| KeyError::Zero;
    let printable = |b: &u8| b.is_ascii_graphic() || *b == b' ';
    match bytes.split_last() {
        Some((b'\n', line)) if line.len() == 31 && line.iter().all(printable) => {
            let found = "a line of 31 characters, as of a passphrase (--passphrase-file takes one)".into();
            return Err(KeyError::NotAKey { origin, found });
        }
        _ if bytes.len() == 32 && bytes.iter().all(printable) && varied(bytes) => crate::log::warn(&format!(
            "key {origin}: its 32 bytes are all printable; a passphrase belongs to --passphrase-file"
        )),
        _ => {}
    }
    if let Ok(raw) = <&[u8; 32]>::try_from(bytes) {
        return Key::from_bytes(raw).map_err(zero);
    }
    let text = bytes.trim_ascii();
    let not_a_key = |found: String| KeyError::NotAKey { origin: origin.clone(), found };
    if text.len() != 64 {
        return Err(not_a_key(format!("{} bytes", bytes.len())));
    }
    let mut raw = zeroize::Zeroizing::new([0; 32]);
    for (out, pair) in raw.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |b: u8| char::from(b).to_digit(16);
        let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else {
            return Err(not_a_key("64 characters that are not all hexadecimal digits".into()));
        };
        *out = (high << 4 | low) as u8;
    }
    Key::from_bytes(&raw).map_err(zero)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A program that one thread is writing cannot be run, and a process that another thread starts in that
    /// moment has it open for writing; so these tests take turns.
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn request() -> KeyRequest<'static> {
        KeyRequest { image: [0x11; 16], vm: Some([0x22; 16]), purpose: Purpose::Open, evidence: None }
    }

    fn write(dir: &tempfile::TempDir, name: &str, data: &[u8], mode: u32) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, data).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("mode");
        path
    }

    #[test]
    fn raw_and_hexadecimal_files_are_the_same_key() {
        let dir = tempfile::tempdir().expect("tempdir");
        let raw = write(&dir, "raw", &[0xab; 32], 0o600);
        let hex = write(&dir, "hex", format!("{}\n", "ab".repeat(32)).as_bytes(), 0o600);
        let key = |path| file::KeyFile { path }.obtain(&request()).expect("key");
        assert_eq!(key(raw).expose(), key(hex).expose());
    }

    #[test]
    fn poor_key_files_are_refused_without_being_shown() {
        let dir = tempfile::tempdir().expect("tempdir");
        let refuse = |name: &str, data: &[u8], mode| {
            let path = write(&dir, name, data, mode);
            file::KeyFile { path }.obtain(&request()).expect_err("refused").to_string()
        };
        assert!(refuse("open", &[1; 32], 0o644).contains("chmod 600"));
        assert!(refuse("group", &[1; 32], 0o640).contains("chmod 600"));
        assert!(refuse("short", b"hunter2", 0o600).contains("7 bytes"));
        assert!(!refuse("nothex", &[b'z'; 64], 0o600).contains("zzz"), "the contents are not printed");
        assert!(refuse("zero", &[0; 32], 0o600).contains("zero"));
    }

    #[test]
    fn keys_and_hooks_of_other_users_are_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = write(&dir, "hook", b"#!/bin/sh\n", 0o775);
        let error = hook::Hook::new(path).obtain(&request()).expect_err("refused").to_string();
        assert!(error.contains("chmod go-w"), "{error}");
        let (key, program) =
            (write(&dir, "key", &[1; 32], 0o600), write(&dir, "theirs", b"#!/bin/sh\n", 0o755));
        // Only root can give a file away.
        if [&key, &program].iter().any(|path| std::os::unix::fs::chown(path, Some(54321), None).is_err()) {
            return;
        }
        let error = file::KeyFile { path: key }.obtain(&request()).expect_err("refused").to_string();
        assert!(error.contains("belongs to user 54321"), "{error}");
        let error = hook::Hook::new(program).obtain(&request()).expect_err("refused").to_string();
        assert!(error.contains("belongs to user 54321"), "{error}");
    }

    /// Expected value from the reference program:
    /// `printf correct horse | argon2 <salt> -id -t 3 -m 16 -p 1 -l 32`, computed with Python's argon2-cffi
    /// (`hash_secret_raw`).
    #[test]
    fn a_passphrase_gives_the_argon2id_key_of_the_reference_implementation() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = write(&dir, "pass", b"correct horse\nignored\n", 0o600);
        let key = passphrase::Passphrase { path }.obtain(&request()).expect("key");
        let hex = hex::encode(key.expose());
        assert_eq!(hex, "89a939de1ca01a9432f87603f247ff01f8a62125c2741c3edd53c1ce319c809c");
    }

    #[test]
    fn a_hook_gets_the_request_and_gives_the_key_or_a_reason() {
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let dir = tempfile::tempdir().expect("tempdir");
        let good = write(
            &dir,
            "good",
            b"#!/bin/sh\nread -r q\ncase $q in *'\"purpose\":\"open\"'*'\"vm\":\"22222222-2222-'*) printf %064d 1;; esac\n",
            0o700,
        );
        let key = hook::Hook::new(good).obtain(&request()).expect("key");
        assert_eq!(key.expose()[31], 1);
        let bad =
            write(&dir, "bad", b"#!/bin/sh\necho 'policy: debug guests get no key' >&2\nexit 3\n", 0o700);
        let text = hook::Hook::new(bad).obtain(&request()).expect_err("refused").to_string();
        assert!(text.contains("policy: debug guests") && text.contains('3'), "{text}");
    }

    /// The reason comes first and is long, the key after it: neither pipe may fill up while the other is
    /// read.
    #[test]
    fn a_hook_that_talks_much_is_heard_to_its_end() {
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let dir = tempfile::tempdir().expect("tempdir");
        let script = b"#!/bin/sh\nhead -c 300000 /dev/zero >&2\nprintf %064d 1\n";
        let path = write(&dir, "hook", script, 0o700);
        assert_eq!(hook::Hook::new(path).obtain(&request()).expect("key").expose()[31], 1);
        let endless = write(&dir, "endless", b"#!/bin/sh\nexec cat /dev/zero\n", 0o700);
        let text = hook::Hook::new(endless).obtain(&request()).expect_err("no key").to_string();
        assert!(text.contains("signal") || text.contains("bytes"), "{text}");
    }

    #[test]
    fn a_hook_without_an_end_is_stopped_and_a_child_that_it_leaves_is_not_waited_for() {
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let dir = tempfile::tempdir().expect("tempdir");
        let began = std::time::Instant::now();
        let sleeper = write(&dir, "sleeper", b"#!/bin/sh\nexec sleep 600\n", 0o700);
        let limit = std::time::Duration::from_secs(1);
        let silent = hook::Hook { program: sleeper, limit }.obtain(&request());
        assert!(matches!(silent, Err(KeyError::HookSilent { seconds: 1, .. })));
        let leaves = write(&dir, "leaves", b"#!/bin/sh\nsleep 20 &\nprintf %064d 1\n", 0o700);
        assert_eq!(hook::Hook::new(leaves).obtain(&request()).expect("key").expose()[31], 1);
        assert!(began.elapsed() < std::time::Duration::from_secs(15), "{:?}", began.elapsed());
    }

    #[test]
    fn text_is_not_taken_for_a_key_nor_cut_off_as_a_passphrase() {
        let dir = tempfile::tempdir().expect("tempdir");
        let text = write(&dir, "text", b"correct horse battery staple 12\n", 0o600);
        let found = file::KeyFile { path: text }.obtain(&request()).expect_err("refused").to_string();
        assert!(found.contains("passphrase") && !found.contains("horse"), "{found}");
        let refused = |name: &str, bytes: &[u8]| {
            let path = write(&dir, name, bytes, 0o600);
            passphrase::Passphrase { path }.obtain(&request()).expect_err("refused").to_string()
        };
        assert!(refused("long", &[b'x'; 4097]).contains("4096"));
        assert!(refused("dos", b"correct horse\r\n").contains("carriage return"));
        assert!(refused("none", b"\nsecond line").contains("empty"));
    }
}
