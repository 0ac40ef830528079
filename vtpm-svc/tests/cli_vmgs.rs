// SPDX-License-Identifier: Apache-2.0
//! `vmgs …` as an operator uses it.

mod common;

use std::path::Path;

use common::GET_RANDOM_8;
use common::STARTUP_CLEAR;
use common::Site;
use common::code;
use common::decoder::decode;
use common::output;
use common::program;
use common::tpm;
use vtpm_svc::vmgs::FsFile;
use vtpm_svc::vmgs::Vmgs;
use vtpm_svc::vmgs::block::BlockFile;

/// A site whose TPM has been made.
fn used() -> Site {
    let site = Site::new();
    run_once(&site);
    site
}

fn run_once(site: &Site) {
    let mut service = site.start(&["--flags", "not-need-init"]);
    let mut s = service.connect_data();
    assert_eq!(code(&tpm(&mut s, STARTUP_CLEAR).expect("startup")), 0);
    assert_eq!(code(&tpm(&mut s, GET_RANDOM_8).expect("random")), 0);
    service.kill();
}

/// Runs a command with the anchor and the key of the site.
fn vmgs(site: &Site, args: &[&str], paths: &[&Path]) -> (bool, String) {
    let anchor = site.path("anchor").display().to_string();
    let args: Vec<&str> = args.iter().copied().chain(["--anchor", &anchor]).collect();
    site.vmgs(&args, paths)
}

#[test]
fn files_go_in_and_out_and_are_listed() {
    let site = used();
    let (image, out) = (site.path("vmgs"), site.path("out"));
    std::fs::write(site.path("in"), b"some variables").expect("write");
    let input = site.path("in").display().to_string();
    let (ok, text) = vmgs(&site, &["import", "--id", "1", "--input", &input], &[&image]);
    assert!(ok, "{text}");
    let (ok, text) = site.vmgs(&["list"], &[&image]);
    assert!(ok && text.contains("BIOS_NVRAM") && text.contains("VTPM_STATE"), "{text}");
    let output_path = out.display().to_string();
    let (ok, text) = site.vmgs(&["export", "--id", "1", "--output", &output_path], &[&image]);
    assert!(ok, "{text}");
    assert_eq!(std::fs::read(&out).expect("read"), b"some variables");
    let (ok, text) = vmgs(&site, &["import", "--id", "62", "--input", &input], &[&image]);
    assert!(!ok && text.contains("written by the store"), "{text}");
}

#[test]
fn check_says_what_it_can_and_cannot_prove() {
    let site = used();
    let image = site.path("vmgs");
    let json = |args: &[&str], key: bool| {
        let mut c = program();
        c.args(["vmgs", "check", "--json", "--anchor"]).arg(site.path("anchor")).arg(&image).args(args);
        if key {
            c.arg("--key-file").arg(site.path("key"));
        }
        let (ok, text) = output(&mut c);
        let end = text.rfind('}').map_or(0, |n| n + 1);
        (ok, serde_json::from_str::<serde_json::Value>(&text[..end]).expect("JSON"))
    };
    let (ok, without) = json(&[], false);
    assert!(ok && without["not_proved"].to_string().contains("without the key"), "{without}");
    let (ok, with) = json(&[], true);
    assert!(ok && with["proved"].to_string().contains("the copy that the anchor expects"), "{with}");
    let mut bytes = std::fs::read(&image).expect("read");
    let newest = if bytes[16] > bytes[512 + 16] { 0 } else { 512 };
    let table = u32::from_le_bytes(bytes[newest + 24..newest + 28].try_into().expect("four")) as usize * 4096;
    let state =
        u32::from_le_bytes(bytes[table + 3840..table + 3844].try_into().expect("four")) as usize * 4096;
    bytes[state + 100] ^= 1;
    std::fs::write(&image, &bytes).expect("write");
    let (ok, damaged) = json(&[], true);
    assert!(!ok && damaged["failed"].to_string().contains("fails authentication"), "{damaged}");
}

/// Who looked is in the history, and who may not write there looks all the same.
#[test]
fn every_look_with_the_key_is_noted_and_none_needs_the_history() {
    let site = used();
    let image = site.path("vmgs");
    let look = |args: &[&str]| {
        let (ok, text) = vmgs(&site, args, &[&image]);
        assert!(ok, "{text}");
        text
    };
    for what in ["check", "list", "inspect"] {
        look(&[what, "--reason", "a question"]);
    }
    look(&["export", "--id", "60", "-o", "/dev/null"]);
    let files = || std::fs::read_dir(site.path("anchor")).expect("folder").flatten().map(|e| e.path());
    let log = files().find(|p| p.extension().is_some_and(|e| e == "log")).expect("a history");
    let text = std::fs::read_to_string(&log).expect("text");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for what in ["check", "list", "inspect", "export"] {
        let line = lines.iter().find(|line| line["event"] == what).expect(what);
        assert!(what == "export" || line["reason"] == "a question", "{line}");
    }
    let check = lines.iter().find(|line| line["event"] == "check").expect("check");
    assert!(check["detail"] == "0 faults" && check["user"].is_u64(), "{check}");
    // A history that nobody can write, root neither.
    std::fs::remove_file(&log).expect("remove");
    std::fs::create_dir(&log).expect("a folder in its place");
    for what in ["check", "list", "inspect"] {
        assert!(look(&[what]).contains("could not be noted"), "{what}");
    }
}

#[test]
fn a_clone_that_is_refused_changes_nothing() {
    let site = used();
    let key = site.path("key").display().to_string();
    let (image, to) = (site.path("large"), site.path("to"));
    let args = ["clone", "--keep-identity", "--size", "4M", "--new-key-file", &key];
    let (ok, text) = vmgs(&site, &args, &[&site.path("vmgs"), &image]);
    assert!(ok, "{text}");
    let big = site.path("big");
    std::fs::write(&big, vec![5; 1_200_000]).expect("write");
    let big = big.display().to_string();
    let (ok, text) = vmgs(&site, &["import", "--id", "40", "-i", &big], &[&image]);
    assert!(ok, "{text}");
    let before = std::fs::read(&image).expect("read");
    let refused = |more: &[&str], why: &str| {
        let (ok, text) = vmgs(&site, &[&["clone", "--keep-identity"], more].concat(), &[&image, &to]);
        assert!(!ok && text.contains(why), "{text}");
        assert!(std::fs::read(&image).expect("read") == before, "{why}: the source was changed");
    };
    refused(&["--new-key-file", &key, "--size", "1M"], "no space");
    refused(&["--new-key-file", "/nonexistent"], "/nonexistent");
    std::fs::write(&to, b"somebody's").expect("write");
    refused(&["--new-key-file", &key], "exists already");
}

#[test]
fn a_rekey_leaves_nothing_to_the_old_key() {
    let site = used();
    let image = site.path("vmgs");
    let new = [0x33u8; 32];
    std::fs::write(site.path("new"), new.map(|b| format!("{b:02x}")).concat()).expect("write");
    std::fs::set_permissions(site.path("new"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .expect("mode");
    let path = site.path("new").display().to_string();
    let (ok, text) = vmgs(&site, &["rekey", "--new-key-file", &path], &[&image]);
    assert!(ok && text.contains("not proved"), "{text}");
    let bytes = std::fs::read(&image).expect("read");
    assert!(decode(&bytes, &common::KEY).is_err());
    assert!(decode(&bytes, &new).expect("decode").files.contains_key(&60));
    let (ok, text) = site.vmgs(&["list"], &[&image]);
    assert!(!ok && text.contains("opens neither key slot"), "{text}");
}

#[test]
fn a_clone_has_its_own_identity_unless_told_to_keep_it() {
    let site = used();
    let key = site.path("key").display().to_string();
    let clone = |to: &str, more: &[&str]| {
        let args: Vec<&str> =
            ["clone", "--new-key-file", &key].into_iter().chain(more.iter().copied()).collect();
        let (ok, text) = vmgs(&site, &args, &[&site.path("vmgs"), &site.path(to)]);
        assert!(ok, "{text}");
        (decode(&std::fs::read(site.path(to)).expect("read"), &common::KEY).expect("decode").files, text)
    };
    let (fresh, text) = clone("fresh", &[]);
    assert!(!fresh.contains_key(&60) && !fresh.contains_key(&61), "{text}");
    let (kept, text) = clone("kept", &["--keep-identity"]);
    let original =
        decode(&std::fs::read(site.path("vmgs")).expect("read"), &common::KEY).expect("decode").files;
    assert!(kept[&60] == original[&60] && text.contains("same TPM"), "{text}");
    // Each has an image id of its own: bytes 16 to 32 of the root.
    assert!(fresh[&62][16..32] != original[&62][16..32] && kept[&62][16..32] != original[&62][16..32]);
    // The clone with a new identity makes its TPM at first start.
    std::fs::rename(site.path("fresh"), site.path("vmgs")).expect("rename");
    run_once(&site);
    let made = decode(&std::fs::read(site.path("vmgs")).expect("read"), &common::KEY).expect("decode").files;
    assert!(made[&60] != original[&60]);
}

#[test]
fn a_restore_states_the_loss_first_and_moves_history_on() {
    let site = used();
    let (image, backup) = (site.path("vmgs"), site.path("backup"));
    std::fs::copy(&image, &backup).expect("copy");
    run_once(&site);
    std::fs::write(site.path("in"), b"x").expect("write");
    let input = site.path("in").display().to_string();
    assert!(vmgs(&site, &["import", "--id", "5", "--input", &input], &[&image]).0);
    let newest = std::fs::read(&image).expect("read");

    let (ok, text) = vmgs(&site, &["restore"], &[&backup, &image]);
    assert!(
        !ok && text.contains("everything written in generations") && text.contains("--confirm"),
        "{text}"
    );
    assert!(std::fs::read(&image).expect("read") == newest, "nothing was changed");

    let (ok, text) = vmgs(&site, &["restore", "--confirm"], &[&backup, &image]);
    assert!(ok, "{text}");
    run_once(&site);
    // What was the newest before the restore is the stale one now.
    std::fs::write(&image, &newest).expect("write");
    let (ok, text) = vmgs(&site, &["import", "--id", "5", "--input", &input], &[&image]);
    assert!(!ok && text.contains("stale image"), "{text}");
}

#[test]
fn a_restore_leaves_running_and_foreign_images_alone() {
    let (site, other) = (used(), used());
    let (image, backup) = (site.path("vmgs"), site.path("backup"));
    std::fs::copy(&image, &backup).expect("copy");
    let foreign = other.path("vmgs");
    let before = std::fs::read(&foreign).expect("read");
    let (ok, text) = vmgs(&site, &["restore", "--confirm"], &[&backup, &foreign]);
    assert!(!ok && text.contains("move it away first"), "{text}");
    assert!(std::fs::read(&foreign).expect("read") == before);
    // Also if its lease is another's: the file itself is held.
    let _running = other.start(&[]);
    let (ok, text) = vmgs(&site, &["restore", "--confirm"], &[&backup, &foreign]);
    assert!(!ok && text.contains("another process has this file open"), "{text}");
}

/// `kill -9` at random moments of a change of key: one of the two keys opens everything, and repeating the
/// change ends with an old key that opens nothing.
#[test]
fn a_rekey_that_is_killed_leaves_one_key_that_works() {
    let site = used();
    let image = site.path("vmgs");
    let write_key = |name: &str, fill: u8| {
        let path = site.path(name);
        std::fs::write(&path, [fill; 32]).expect("key");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("mode");
        path.display().to_string()
    };
    let rekey = |new: &str| {
        let mut c = program();
        c.args(["vmgs", "rekey"]).arg(&image).arg("--key-file").arg(site.path("key"));
        c.arg("--anchor").arg(site.path("anchor")).args(["--new-key-file", new]);
        c
    };
    let began = std::time::Instant::now();
    let mut taken = 0;
    for round in 0..16u64 {
        let fill = 0x60 + round as u8;
        let new = write_key("new", fill);
        let mut child = rekey(&new)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("start");
        // The first has all the time it needs; the others end at moments spread over about that time.
        let whole = if round == 0 { 1_000_000 } else { 24_000 };
        let until = std::time::Duration::from_micros(whole * (round * 7 % 16 + 1) / 16);
        let moment = std::time::Instant::now() + until;
        while std::time::Instant::now() < moment && child.try_wait().expect("wait").is_none() {
            std::thread::yield_now();
        }
        // It may have ended by itself.
        let _ = child.kill();
        child.wait().expect("wait");
        let old_works = site.vmgs(&["list"], &[&image]).0;
        if !old_works {
            taken += 1;
            std::fs::rename(&new, site.path("key")).expect("the new key is the key");
        }
        let (ok, text) = site.vmgs(&["export", "--id", "60", "-o", "/dev/null"], &[&image]);
        assert!(ok, "round {round}, {taken} taken, {:?}: {text}", began.elapsed());
    }
    let new = write_key("new", 0x7f);
    let (ok, text) = output(&mut rekey(&new));
    assert!(ok && text.contains("opens neither header"), "{text}");
    let (ok, text) = site.vmgs(&["list"], &[&image]);
    assert!(!ok && text.contains("key"), "{text}");
}

/// A file of the host on which only some more operations succeed.
struct Cut(FsFile, usize);

impl Cut {
    fn step(&mut self) -> std::io::Result<()> {
        self.1 = self.1.checked_sub(1).ok_or_else(|| std::io::Error::other("cut"))?;
        Ok(())
    }
}

impl BlockFile for Cut {
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.0.read_at(buffer, offset)
    }
    fn write_at(&mut self, data: &[u8], offset: u64) -> std::io::Result<()> {
        self.step()?;
        self.0.write_at(data, offset)
    }
    fn sync(&mut self) -> std::io::Result<()> {
        self.step()?;
        self.0.sync()
    }
}

/// The same command again, old key and new key as before, ends a change of key wherever it was cut short.
#[test]
fn a_rekey_that_was_cut_short_is_ended_by_the_same_command() {
    let site = used();
    let image = site.path("vmgs");
    let new = site.path("new");
    std::fs::write(&new, [0x77; 32]).expect("key");
    std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("mode");
    let old = vtpm_svc::vmgs::Key::from_bytes(
        std::fs::read(site.path("key")).expect("key").as_slice().try_into().expect("32 bytes"),
    )
    .expect("key");
    let anchors = vtpm_svc::vmgs::AnchorFolder { path: site.path("anchor"), durability: Default::default() };
    let before = std::fs::read(&image).expect("image");
    let record = std::fs::read_dir(site.path("anchor")).expect("folder").flatten().map(|e| e.path());
    let record = record.into_iter().find(|p| p.extension().is_some_and(|e| e == "anchor")).expect("a record");
    let kept = std::fs::read(&record).expect("record");
    let (mut told, mut ended) = (0, 0);
    for left in 0.. {
        std::fs::write(&image, &before).expect("image");
        std::fs::write(&record, &kept).expect("record");
        let file = Cut(FsFile::open(&image).expect("open"), left);
        let mut v = Vmgs::open(file, Some(old.clone()), Some(&anchors), Default::default()).expect("open");
        let done = v.rekey(vtpm_svc::vmgs::Key::from_bytes(&[0x77; 32]).expect("key"), 0).is_ok();
        drop(v);
        let (ok, text) = site.vmgs(&["check"], &[&image]);
        let taken = !ok && text.contains("neither key slot");
        if taken {
            let (_, text) = output(program().args(["vmgs", "check"]).arg(&image));
            told += usize::from(text.contains("bytes of before may still be in the file"));
        }
        let new = new.display().to_string();
        let (ok, text) = vmgs(&site, &["rekey", "--new-key-file", &new], &[&image]);
        let nothing_to_do = taken && text.contains("the key that the image has");
        assert!(ok || nothing_to_do, "{left} operations: {text}");
        ended += usize::from(taken && ok);
        let (ok, text) = site.vmgs(&["list"], &[&image]);
        assert!(!ok && text.contains("neither key slot"), "{left} operations: {text}");
        if done {
            break;
        }
    }
    assert!(told > 4 && ended > 4, "{told}, {ended}");
}

#[test]
fn mistakes_are_answered_in_words() {
    let site = Site::new();
    let (ok, text) = vmgs(&site, &["create"], &[&site.path("vmgs")]);
    assert!(!ok && text.contains("exists already"), "{text}");
    let (ok, text) = vmgs(&site, &["create", "--size", "100M"], &[&site.path("other")]);
    assert!(!ok && text.contains("1M to 64M"), "{text}");
    let (ok, text) =
        output(program().args(["vmgs", "create", "/nonexistent/x", "--anchor"]).arg(site.path("anchor")));
    assert!(!ok && text.contains("--key-file"), "{text}");
    let (ok, text) = site.vmgs(&["list"], &[&site.path("key")]);
    assert!(!ok && text.contains("truncated"), "{text}");
}

/// Who makes keys when it is asked for them is told for whom, and is not asked for a new one where no key
/// changes.
#[test]
fn a_hook_is_told_of_the_vm_and_not_asked_for_a_new_key_that_is_not_taken() {
    use std::os::unix::fs::PermissionsExt;
    let site = used();
    let (hook, asked) = (site.path("hook"), site.path("asked"));
    let text = format!("#!/bin/sh\ncat >>{}\necho {}\n", asked.display(), "5a".repeat(32));
    std::fs::write(&hook, text).expect("write");
    std::fs::set_permissions(&hook, PermissionsExt::from_mode(0o700)).expect("mode");
    let run = |command: &str, args: &[&str], image: &Path| {
        let mut c = program();
        c.args(["vmgs", command]).arg(image).arg("--anchor").arg(site.path("anchor")).args(args);
        output(&mut c)
    };
    let hook = hook.to_str().expect("path");
    let vm = "6b1f1a4e-0d4c-4f0e-9a57-0f3d1c2b3a49";
    let (ok, text) = run("create", &["--vm-uuid", vm, "--key-hook", hook], &site.path("other"));
    assert!(ok, "{text}");
    let question = std::fs::read_to_string(&asked).expect("asked");
    assert!(question.contains(&format!("\"vm\":\"{vm}\"")) && question.contains("create"), "{question}");

    std::fs::remove_file(&asked).expect("remove");
    let wrong = site.path("wrong");
    std::fs::write(&wrong, [7; 32]).expect("write");
    std::fs::set_permissions(&wrong, PermissionsExt::from_mode(0o600)).expect("mode");
    let args = ["--key-file", wrong.to_str().expect("path"), "--new-key-hook", hook];
    let (ok, text) = run("rekey", &args, &site.path("vmgs"));
    assert!(!ok && text.contains("opens neither key slot"), "{text}");
    let question = std::fs::read_to_string(&asked).unwrap_or_default();
    assert!(!question.contains("rekey"), "the hook was asked for a key that nothing takes: {question}");
}
