// SPDX-License-Identifier: Apache-2.0
//! Requests for certificates: what is written where, what the guest is told, and who may change the file
//! meanwhile.

use std::fs;
use std::ops::Range;
use std::process::Command;

use snp::attest::cert_table::Kind;

use super::*;
use crate::machine::conversion::Conversions;
use crate::machine::ram::GuestRam;
use crate::platform::scripted::ScriptedVm;

const TABLE_LEN: usize = 0x1800;

fn table(byte: u8) -> Vec<u8> {
    let table = cert_table::encode(&[(Kind::VCEK, &[byte; TABLE_LEN - 48])]);
    assert_eq!(table.len(), TABLE_LEN);
    table
}

/// All of it shared, but for the pages in `private`.
fn memory(private: Range<u64>) -> Dma {
    let ram = GuestRam::new([(0, 0x10000)]).unwrap();
    let shared = [0..private.start, private.end..0x10000];
    let vm = Arc::new(ScriptedVm::default());
    Dma::new(ram.clone(), Some(Arc::new(Conversions::new(vm, ram, Vec::new(), &shared))))
}

fn certificates() -> Certificates {
    Certificates::new(Source::Table(Arc::new(table(7))), memory(0..0))
}

fn told(answer: &Answer) -> (i32, u64) {
    (answer.ret, answer.npages)
}

struct Filed {
    path: PathBuf,
    certificates: Certificates,
    _folder: tempfile::TempDir,
}

fn filed() -> Filed {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("certs");
    fs::write(&path, table(7)).unwrap();
    let file = CertFile::open(&path, &Events::silent()).unwrap();
    Filed {
        path,
        certificates: Certificates::new(Source::File(Arc::new(file)), memory(0..0)),
        _folder: folder,
    }
}

impl Filed {
    fn ask(&self) -> Answer {
        self.certificates.answer(0x1000, 4)
    }

    fn byte(&self) -> u8 {
        let mut byte = [0];
        self.certificates.dma.read_slice(&mut byte, GuestAddress(0x1000 + 0x100)).unwrap();
        byte[0]
    }
}

#[test]
fn a_short_buffer_is_told_the_size_and_nothing_is_written() {
    let c = certificates();
    assert_eq!(told(&c.answer(0x1000, 1)), (libc::ENOSPC, 2));
    let mut byte = [1];
    c.dma.read_slice(&mut byte, GuestAddress(0x1000)).unwrap();
    assert_eq!(byte, [0]);
}

#[test]
fn only_shared_ram_is_written() {
    let c = certificates();
    let partly = Certificates::new(c.source.clone(), memory(0x2000..0x3000));
    assert_eq!(partly.answer(0x1000, 2).ret, libc::EIO);
    assert_eq!(c.answer(0xf000, 2).ret, libc::EIO);
    assert_eq!(c.answer(0x1001, 4).ret, libc::EIO);
    assert_eq!(c.answer(u64::MAX - 0xfff, 2).ret, libc::EIO);
    assert_eq!(c.answer(0x1000, u64::MAX).ret, 0);
    let mut bytes = [0; 2];
    c.dma.read_slice(&mut bytes, GuestAddress(0x27ff)).unwrap();
    assert_eq!(bytes, [7, 0]);
}

#[test]
fn a_file_is_read_at_each_request() {
    let f = filed();
    assert_eq!((f.ask().ret, f.byte()), (0, 7));
    fs::write(&f.path, table(9)).unwrap();
    assert_eq!((f.ask().ret, f.byte()), (0, 9));
    // Replaced by another file, as `mv` does it.
    let other = f.path.with_extension("new");
    fs::write(&other, table(11)).unwrap();
    fs::rename(&other, &f.path).unwrap();
    assert_eq!((f.ask().ret, f.byte()), (0, 11));
}

#[test]
fn a_file_that_is_no_table_is_refused_and_the_guest_gets_an_error() {
    let f = filed();
    for (bytes, words) in [
        (vec![], "offset 0x0: expected an entry"),
        ([vec![1; 24], vec![0; 24]].concat(), "expected it between"),
        (vec![0; FILE_LIMIT as usize + 1], "expected a file of 24 to 65536 bytes"),
    ] {
        fs::write(&f.path, &bytes).unwrap();
        let error = CertFile::open(&f.path, &Events::silent()).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(told(&f.ask()), (libc::EIO, 4));
        assert_eq!(f.byte(), 0, "nothing is written");
    }
    fs::remove_file(&f.path).unwrap();
    assert!(matches!(CertFile::open(&f.path, &Events::silent()), Err(CertsError::File { .. })));
    assert_eq!(f.ask().ret, libc::EIO);
    rustix::fs::mknodat(rustix::fs::CWD, &f.path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(CertFile::open(&f.path, &Events::silent()), Err(CertsError::Size(_))));
    fs::remove_file(&f.path).unwrap();
    fs::write(&f.path, table(5)).unwrap();
    assert_eq!((f.ask().ret, f.byte()), (0, 5));
}

/// Whether util-linux's `flock` gets a lock of this kind on the file from another process.
fn flock(path: &Path, kind: &str) -> bool {
    let status = Command::new("flock").args(["--nonblock", kind]).arg(path).arg("true").status();
    status.expect("util-linux's flock").success()
}

#[test]
fn the_file_is_locked_shared_until_the_answer_is_dropped() {
    let f = filed();
    assert!(flock(&f.path, "--exclusive"), "nobody holds it");
    let (first, second) = (f.ask(), f.ask());
    assert!(!flock(&f.path, "--exclusive"));
    assert!(flock(&f.path, "--shared"));
    drop(first);
    assert!(!flock(&f.path, "--exclusive"), "the other request still holds it");
    drop(second);
    assert!(flock(&f.path, "--exclusive"));
    // Nothing was delivered, so nothing is held.
    let refused = f.certificates.answer(0x1000, 1);
    assert_eq!(refused.ret, libc::ENOSPC);
    assert!(refused.held.is_none());
}

#[test]
fn a_file_that_is_being_changed_makes_the_guest_come_back() {
    let f = filed();
    let writer = File::options().write(true).open(&f.path).unwrap();
    rustix::fs::flock(&writer, FlockOperation::LockExclusive).unwrap();
    assert_eq!(told(&f.ask()), (libc::EAGAIN, 4));
    assert!(matches!(CertFile::open(&f.path, &Events::silent()), Err(CertsError::Locked(_))));
    drop(writer);
    assert_eq!(f.ask().ret, 0);
}

#[test]
fn locks_of_fcntl_count_too() {
    let f = filed();
    // A process of its own, as fcntl's older locks belong to processes; it says when it has the lock.
    let script = "import fcntl, sys\n\
                  f = open(sys.argv[1], 'r+')\n\
                  fcntl.lockf(f, fcntl.LOCK_EX)\n\
                  print('locked', flush=True)\n\
                  sys.stdin.read()\n";
    let child = Command::new("python3")
        .args(["-c", script])
        .arg(&f.path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("skipped: no python3");
        return;
    };
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 7]).unwrap();
    assert_eq!(f.ask().ret, libc::EAGAIN);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert_eq!(f.ask().ret, 0);
}
