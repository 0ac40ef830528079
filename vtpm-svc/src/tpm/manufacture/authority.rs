// SPDX-License-Identifier: Apache-2.0
//! The host's certificate authority: a key and a self-signed certificate in a folder, made once, whole, and
//! checked each time.
//!
//! Every certificate stays in its TPM for good, so a key that does not belong to `ca.pem` would do lasting
//! damage without a word. Making holds a lock on the folder, and both files come into their places complete
//! and on disk. The key is first: what it needs beside it is made from it alone, so a crash in between, or a
//! lost `ca.pem`, costs nothing. The other way round there is no way back, and the folder is refused.

use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use std::time::Instant;

use p384::ecdsa::SigningKey;
use p384::pkcs8::DecodePrivateKey;
use p384::pkcs8::EncodePrivateKey;
use p384::pkcs8::LineEnding;
use x509_cert::Certificate;
use x509_cert::der::DecodePem;
use x509_cert::der::Encode;
use x509_cert::der::EncodePem;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::AuthorityKeyIdentifier;
use x509_cert::ext::pkix::BasicConstraints;
use x509_cert::ext::pkix::KeyUsage;
use x509_cert::ext::pkix::KeyUsages;
use x509_cert::ext::pkix::SubjectKeyIdentifier;
use x509_cert::name::Name;
use x509_cert::spki::SubjectPublicKeyInfoOwned;
use zeroize::Zeroizing;

use super::certificate::certify;
use super::certificate::extension;
use super::certificate::key_id;
use super::certificate::public_key;
use super::certificate::random;
use super::error::ManufactureError;

/// Neither file is anywhere near as large.
const MOST: u64 = 64 << 10;
/// Longest wait for another process that makes the authority.
const PATIENCE: Duration = Duration::from_secs(10);

/// The host's certificate authority.
pub struct Authority {
    key: SigningKey,
    certificate: Certificate,
}

fn at(path: &Path, problem: impl ToString) -> ManufactureError {
    ManufactureError::Authority { path: path.to_path_buf(), problem: problem.to_string() }
}

/// The two files.
struct Place {
    folder: PathBuf,
    key: PathBuf,
    certificate: PathBuf,
}

impl Authority {
    /// Opens the authority in a folder, or makes one there.
    pub fn open(folder: &Path) -> Result<Self, ManufactureError> {
        let place = Place {
            folder: folder.to_path_buf(),
            key: folder.join("ca-key.pem"),
            certificate: folder.join("ca.pem"),
        };
        if !place.key.exists() || !place.certificate.exists() {
            place.complete()?;
        }
        place.read()
    }

    /// Makes an authority that is not stored anywhere.
    pub fn generate() -> Result<Self, ManufactureError> {
        Self::of_key(SigningKey::random(&mut rand_core::OsRng))
    }

    /// The authority of a key. Its name comes from the key, so that a certificate that is made again has the
    /// same one.
    fn of_key(key: SigningKey) -> Result<Self, ManufactureError> {
        let public = public_key(&key)?;
        let id = key_id(&public)?;
        let mark = hex::encode(&id.as_bytes()[..4]);
        let name = Name::from_str(&format!("CN=cvmm vTPM CA {mark}"))?;
        let extensions = vec![
            extension(false, &SubjectKeyIdentifier(id))?,
            extension(true, &BasicConstraints { ca: true, path_len_constraint: None })?,
            extension(true, &KeyUsage(KeyUsages::KeyCertSign | KeyUsages::CRLSign))?,
        ];
        let certificate = certify(&key, &name, &name, public, extensions)?;
        Ok(Self { key, certificate })
    }

    /// The root certificate, to be given to verifiers.
    pub fn root_pem(&self) -> Result<String, String> {
        self.certificate.to_pem(x509_cert::der::pem::LineEnding::LF).map_err(|e| e.to_string())
    }

    /// Whether the certificate is that of the key.
    fn belongs_together(&self) -> Result<bool, ManufactureError> {
        Ok(self.certificate.tbs_certificate.subject_public_key_info == public_key(&self.key)?)
    }

    /// A certificate for a key of a TPM.
    pub(super) fn issue(
        &self,
        key: SubjectPublicKeyInfoOwned,
        extensions: impl IntoIterator<Item = Extension>,
    ) -> Result<Vec<u8>, ManufactureError> {
        let issuer = AuthorityKeyIdentifier {
            key_identifier: Some(key_id(&public_key(&self.key)?)?),
            ..AuthorityKeyIdentifier::default()
        };
        let extensions = std::iter::once(extension(false, &issuer)?).chain(extensions).collect();
        let name = &self.certificate.tbs_certificate.subject;
        Ok(certify(&self.key, name, &Name::default(), key, extensions)?.to_der()?)
    }
}

impl Place {
    /// Makes what is missing, alone.
    fn complete(&self) -> Result<(), ManufactureError> {
        std::fs::create_dir_all(&self.folder).map_err(|e| at(&self.folder, e))?;
        let lock = File::open(&self.folder).map_err(|e| at(&self.folder, e))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(std::fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) => return Err(at(&self.folder, format!("waiting for who makes it: {e}"))),
            }
        }
        // Whoever held the lock may have made it.
        if !self.key.exists() {
            if self.certificate.exists() {
                return Err(at(
                    &self.certificate,
                    "its key, ca-key.pem, is not there: put it back, or name another folder; TPMs that are made then have \
                     another authority",
                ));
            }
            let key = SigningKey::random(&mut rand_core::OsRng);
            let pem = key.to_pkcs8_pem(LineEnding::LF).map_err(|e| at(&self.key, e))?;
            self.put(&self.key, 0o600, pem.as_bytes())?;
        }
        if !self.certificate.exists() {
            let text =
                Authority::of_key(self.read_key()?)?.root_pem().map_err(|e| at(&self.certificate, e))?;
            self.put(&self.certificate, 0o644, text.as_bytes())?;
        }
        lock.sync_all().map_err(|e| at(&self.folder, e))
    }

    /// Puts a file in its place: whole, on disk, and only if nothing is there.
    fn put(&self, path: &Path, mode: u32, bytes: &[u8]) -> Result<(), ManufactureError> {
        let mark = hex::encode(random::<8>()?);
        let temporary = self.folder.join(format!(".new-{mark}"));
        let written = File::options().write(true).create_new(true).mode(mode).open(&temporary);
        let linked = written.and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::hard_link(&temporary, path)
        });
        // What cannot be removed has no name that anybody looks for.
        let _ = std::fs::remove_file(&temporary);
        linked.map_err(|e| at(path, e))
    }

    fn read_key(&self) -> Result<SigningKey, ManufactureError> {
        let file = File::open(&self.key).map_err(|e| at(&self.key, e))?;
        let mode = file.metadata().map_err(|e| at(&self.key, e))?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(at(
                &self.key,
                format!(
                    "others can read it (mode {mode:04o}), and could make certificates: `chmod 600` it, or name another folder if \
                     somebody has"
                ),
            ));
        }
        let pem = Zeroizing::new(limited(file).map_err(|e| at(&self.key, e))?);
        SigningKey::from_pkcs8_pem(&pem)
            .map_err(|e| at(&self.key, format!("it is not a P-384 key in PKCS #8: {e}")))
    }

    fn read(&self) -> Result<Authority, ManufactureError> {
        let key = self.read_key()?;
        let text = File::open(&self.certificate).and_then(limited).map_err(|e| at(&self.certificate, e))?;
        let certificate = Certificate::from_pem(text).map_err(|e| at(&self.certificate, e))?;
        let authority = Authority { key, certificate };
        if !authority.belongs_together()? {
            return Err(at(
                &self.certificate,
                "it is not the certificate of ca-key.pem: what that key signs cannot be verified with it. If no TPM was made with \
                 this key, remove both; else remove ca.pem, and it is made again from the key",
            ));
        }
        Ok(authority)
    }
}

/// The text of a file of a sensible size.
fn limited(file: File) -> io::Result<String> {
    let mut text = String::with_capacity(4 << 10);
    file.take(MOST + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MOST { Err(io::Error::other("it is too large")) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn problem(folder: &Path) -> String {
        Authority::open(folder).err().expect("refused").to_string()
    }

    #[test]
    fn many_who_make_it_at_once_get_the_same_one() {
        let dir = tempfile::tempdir().expect("folder");
        let folder = dir.path().join("ca");
        let roots: Vec<String> = std::thread::scope(|scope| {
            let open = || Authority::open(&folder).expect("open").root_pem().expect("text");
            let all: Vec<_> = (0..12).map(|_| scope.spawn(open)).collect();
            all.into_iter().map(|t| t.join().expect("join")).collect()
        });
        assert!(roots.windows(2).all(|w| w[0] == w[1]));
        assert_eq!(std::fs::read_to_string(folder.join("ca.pem")).expect("root"), roots[0]);
        assert_eq!(std::fs::read_dir(&folder).expect("list").count(), 2, "nothing is left over");
    }

    #[test]
    fn a_certificate_of_another_key_is_refused() {
        let dir = tempfile::tempdir().expect("folder");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        Authority::open(&a).expect("one");
        Authority::open(&b).expect("another");
        std::fs::copy(a.join("ca.pem"), b.join("ca.pem")).expect("copy");
        assert!(problem(&b).contains("not the certificate of ca-key.pem"), "{}", problem(&b));
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().expect("folder");
        Authority::open(dir.path()).expect("one");
        for mode in [0o640, 0o604] {
            let key = dir.path().join("ca-key.pem");
            std::fs::set_permissions(&key, PermissionsExt::from_mode(mode)).expect("mode");
            assert!(problem(dir.path()).contains("others can read it"), "{mode:o}");
        }
    }

    #[test]
    fn a_lost_certificate_is_made_again_with_the_same_name_and_a_lost_key_is_not() {
        let dir = tempfile::tempdir().expect("folder");
        let first = Authority::open(dir.path()).expect("one").certificate.tbs_certificate;
        std::fs::remove_file(dir.path().join("ca.pem")).expect("remove");
        let second = Authority::open(dir.path()).expect("again").certificate.tbs_certificate;
        assert_eq!(first.subject, second.subject);
        assert_eq!(first.subject_public_key_info, second.subject_public_key_info);
        std::fs::remove_file(dir.path().join("ca-key.pem")).expect("remove");
        assert!(problem(dir.path()).contains("put it back"));
        assert!(dir.path().join("ca.pem").exists());
    }
}
