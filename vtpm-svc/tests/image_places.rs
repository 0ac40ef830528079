// SPDX-License-Identifier: Apache-2.0
//! Image files, their names, their owners and their histories: what happens when a command is killed, comes
//! second, meets a link, a full disk or another VM's file.
#![allow(clippy::panic)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use common::KEY;
use common::Site;
use common::program;

/// `vmgs ARGS PATHS` with the site's key and anchor.
fn command(site: &Site, args: &[&str], paths: &[&Path]) -> Command {
    let mut c = program();
    c.arg("vmgs").args(args).args(paths).arg("--key-file").arg(site.path("key"));
    c.arg("--anchor").arg(site.path("anchor"));
    c
}

/// Exit code and output.
fn run(c: &mut Command) -> (i32, String) {
    let out = c.output().expect("run");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text)
}

fn vmgs(site: &Site, args: &[&str], paths: &[&Path]) -> (i32, String) {
    run(&mut command(site, args, paths))
}

fn import(site: &Site, id: &str, image: &Path) -> (i32, String) {
    std::fs::write(site.path("in"), b"something").expect("write");
    let input = site.path("in").display().to_string();
    vmgs(site, &["import", "--id", id, "-i", &input], &[image])
}

fn private(path: &Path, bytes: &[u8]) -> String {
    std::fs::write(path, bytes).expect("write");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("mode");
    path.display().to_string()
}

/// How many kills of each command; a tenth of the service's.
fn kills() -> u64 {
    std::env::var("VTPM_KILLS").ok().and_then(|n| n.parse::<u64>().ok()).unwrap_or(100) / 10
}

/// Starts a command and kills it after a share of the time that it takes.
fn kill_at(mut c: Command, share: u64, of: u64, whole: Duration) {
    let mut child = c.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start");
    let end = Instant::now() + whole.mul_f64(share as f64 / of as f64);
    while Instant::now() < end && child.try_wait().expect("wait").is_none() {
        std::thread::yield_now();
    }
    // It may have ended by itself.
    let _ = child.kill();
    child.wait().expect("wait");
}

#[test]
fn a_restore_that_is_killed_leaves_the_file_or_the_restored_one_and_names_what_it_left() {
    let site = Site::new();
    let (image, backup) = (site.path("vmgs"), site.path("backup"));
    std::fs::copy(&image, &backup).expect("copy");
    assert_eq!(import(&site, "10", &image).0, 0);
    let began = Instant::now();
    let (code, text) = vmgs(&site, &["restore", "--confirm"], &[&backup, &image]);
    assert_eq!(code, 0, "{text}");
    let whole = began.elapsed();
    let (mut left, rounds) = (0, kills());
    for round in 0..rounds {
        kill_at(command(&site, &["restore", "--confirm"], &[&backup, &image]), round, rounds, whole);
        let (code, text) = import(&site, "11", &image);
        assert_eq!(code, 0, "round {round} of {rounds}: {text}");
        let leftovers = std::fs::read_dir(site.dir.path()).expect("folder").flatten();
        for entry in leftovers.filter(|e| e.file_name().to_string_lossy().contains(".new-")) {
            left += 1;
            let (_, text) = vmgs(&site, &["check"], &[&image]);
            assert!(text.contains(&entry.path().display().to_string()), "{text}");
            std::fs::remove_file(entry.path()).expect("remove");
        }
    }
    println!("{rounds} kills, {left} files left");
}

#[test]
fn a_clone_or_a_create_that_is_killed_leaves_the_source_and_no_half_file() {
    let site = Site::new();
    let image = site.path("vmgs");
    let key = site.path("key").display().to_string();
    let rounds = kills();
    for round in 0..rounds {
        let to = site.path(&format!("clone{round}"));
        let whole = Duration::from_millis(40);
        kill_at(
            command(&site, &["clone", "--keep-identity", "--new-key-file", &key], &[&image, &to]),
            round,
            rounds,
            whole,
        );
        assert_eq!(import(&site, "11", &image).0, 0, "the source");
        if to.exists() {
            let (code, text) = import(&site, "11", &to);
            assert_eq!(code, 0, "round {round}: {text}");
        }
        let new = site.path(&format!("new{round}"));
        kill_at(command(&site, &["create", "--size", "1M"], &[&new]), round, rounds, whole);
        if new.exists() {
            let (code, text) = import(&site, "11", &new);
            assert_eq!(code, 0, "round {round}: {text}");
        }
    }
}

#[test]
fn of_two_creates_one_wins_and_its_key_opens_the_file() {
    let site = Site::without_image();
    for round in 0..10u8 {
        let image = site.path(&format!("image{round}"));
        let keys = [1, 2].map(|n| {
            let path = site.path(&format!("key{round}-{n}"));
            private(&path, &[round * 2 + n; 32])
        });
        let children = keys.clone().map(|key| {
            let mut c = program();
            c.args(["vmgs", "create", "--size", "1M", "--key-file", &key]).arg(&image);
            c.arg("--anchor").arg(site.path("anchor")).stdout(Stdio::null()).stderr(Stdio::piped());
            c.spawn().expect("start")
        });
        let ends = children.map(|c| c.wait_with_output().expect("end"));
        let won: Vec<usize> = (0..2).filter(|n| ends[*n].status.success()).collect();
        assert_eq!(won.len(), 1, "{ends:?}");
        let loser = String::from_utf8_lossy(&ends[1 - won[0]].stderr).into_owned();
        assert!(ends[1 - won[0]].status.code() == Some(2) && loser.contains("exists already"), "{loser}");
        let opened = run(program().args(["vmgs", "list", "--key-file", &keys[won[0]]]).arg(&image));
        assert_eq!(opened.0, 0, "{}", opened.1);
    }
    // A link that leads nowhere is a name too.
    symlink("nowhere", site.path("link")).expect("link");
    assert_eq!(vmgs(&site, &["create"], &[&site.path("link")]).0, 2);
    let left = std::fs::read_dir(site.dir.path()).expect("folder").flatten();
    assert_eq!(left.filter(|e| e.file_name().to_string_lossy().contains(".new-")).count(), 0);
    let records = std::fs::read_dir(site.path("anchor")).expect("anchors").flatten();
    assert_eq!(records.filter(|e| e.path().extension().is_some_and(|x| x == "anchor")).count(), 10);
}

#[test]
fn a_damaged_anchor_record_has_the_ways_out_that_its_message_names() {
    for way in ["restore", "--accept-rollback"] {
        let site = Site::new();
        let image = site.path("vmgs");
        assert_eq!(import(&site, "10", &image).0, 0);
        let record = std::fs::read_dir(site.path("anchor"))
            .expect("anchors")
            .flatten()
            .find(|e| e.path().extension().is_some_and(|x| x == "anchor"))
            .expect("record")
            .path();
        let mut bytes = std::fs::read(&record).expect("read");
        bytes[30] ^= 1;
        bytes[4096 + 30] ^= 1;
        std::fs::write(&record, bytes).expect("damage");
        let (code, text) = import(&site, "10", &image);
        assert!(code == 5 && text.contains("damaged") && text.contains(way), "{text}");
        let (code, text) = match way {
            "restore" => vmgs(&site, &["restore", "--confirm"], &[&image, &image]),
            _ => vmgs(&site, &["clock", "--set", "1", way], &[&image]),
        };
        assert_eq!(code, 0, "{way}: {text}");
        assert_eq!(import(&site, "10", &image).0, 0);
    }
}

#[test]
fn a_restored_file_keeps_owner_mode_and_links() {
    let site = Site::new();
    let (image, backup, link) = (site.path("vmgs"), site.path("backup"), site.path("link"));
    std::fs::copy(&image, &backup).expect("copy");
    std::fs::set_permissions(&backup, std::fs::Permissions::from_mode(0o644)).expect("mode");
    symlink(&image, &link).expect("link");
    let root = rustix::process::geteuid().is_root();
    if root {
        std::os::unix::fs::chown(&image, Some(65534), Some(65534)).expect("owner");
    }
    let owner = std::fs::metadata(&image).expect("image").uid();
    let (code, text) = vmgs(&site, &["restore", "--confirm"], &[&backup, &link]);
    assert_eq!(code, 0, "{text}");
    assert!(link.symlink_metadata().expect("link").is_symlink());
    let now = image.symlink_metadata().expect("image");
    assert_eq!((now.is_file(), now.mode() & 0o777, now.uid()), (true, 0o600, owner));
    assert_eq!(import(&site, "10", &link).0, 0);
}

#[test]
fn an_exported_file_is_its_owners_alone_and_follows_no_link() {
    let site = Site::new();
    let image = site.path("vmgs");
    assert_eq!(import(&site, "10", &image).0, 0);
    let out = site.path("out");
    std::fs::write(&out, b"public").expect("write");
    std::fs::set_permissions(&out, std::fs::Permissions::from_mode(0o644)).expect("mode");
    let path = out.display().to_string();
    let (code, text) = vmgs(&site, &["export", "--id", "10", "-o", &path], &[&image]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(std::fs::metadata(&out).expect("out").mode() & 0o777, 0o600);
    assert_eq!(std::fs::read(&out).expect("read"), b"something");
    symlink(site.path("planted"), site.path("link")).expect("link");
    let link = site.path("link").display().to_string();
    let (code, text) = vmgs(&site, &["export", "--id", "10", "-o", &link], &[&image]);
    assert!(code == 2 && text.contains("symbolic link") && !site.path("planted").exists(), "{text}");
    // The root of a sound image can be looked at like any other file.
    let (code, text) = vmgs(&site, &["export", "--id", "62", "-o", &path], &[&image]);
    assert!(code == 0 && std::fs::read(&out).expect("root").starts_with(b"CVMMROOT"), "{text}");
}

#[test]
fn output_that_did_not_reach_its_place_is_an_error() {
    let site = Site::new();
    let image = site.path("vmgs");
    assert_eq!(import(&site, "10", &image).0, 0);
    for args in [&["export", "--id", "10", "-o", "-"][..], &["check"], &["list", "--json"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").expect("full");
        let out = command(&site, args, &[&image]).stdout(full).output().expect("run");
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && text.contains("standard output"), "{args:?}: {text}");
    }
    let (code, text) = vmgs(&site, &["import", "--id", "10", "-i", "/dev/zero"], &[&image]);
    assert!(code == 2 && text.contains("67108864"), "{text}");
}

#[test]
fn each_kind_of_failure_has_its_exit_code_and_its_words() {
    let site = Site::new();
    let image = site.path("vmgs");
    private(&site.path("other"), &[0x44; 32]);
    let other = site.path("other").display().to_string();
    let with_key = |key: &str, args: &[&str]| {
        let mut c = program();
        c.arg("vmgs").args(args).arg(&image).args(["--key-file", key]);
        run(&mut c)
    };
    let key = site.path("key").display().to_string();
    assert_eq!(with_key(&other, &["list"]).0, 4, "wrong key");
    assert_eq!(with_key("/nonexistent", &["list"]).0, 4, "no key");
    let (code, text) = vmgs(&site, &["rekey", "--new-key-file", &key], &[&image]);
    assert!(code == 2 && text.contains("the key that the image has"), "{text}");
    let (code, text) = vmgs(&site, &["list"], &[site.dir.path()]);
    assert!(code == 1 && text.contains("directory"), "{text}");
    assert_eq!(vmgs(&site, &["restore"], &[&image, &image]).0, 3, "nothing was done");
    // Another folder of records: none there, then an older one.
    let elsewhere = site.path("elsewhere");
    let with_anchor = |folder: &Path, args: &[&str]| {
        let mut c = program();
        c.arg("vmgs").args(args).arg(&image).args(["--key-file", &key]).arg("--anchor").arg(folder);
        run(&mut c)
    };
    let (code, text) = with_anchor(&elsewhere, &["clock", "--set", "1"]);
    assert!(code == 5 && text.contains(&elsewhere.display().to_string()), "{text}");
    assert_eq!(with_anchor(&elsewhere, &["clock", "--set", "1", "--accept-rollback"]).0, 0);
    let (code, text) = with_anchor(&site.path("anchor"), &["clock", "--set", "2"]);
    assert!(code == 5 && text.contains("ahead of the anchor") && text.contains("--anchor"), "{text}");
    let service = Site::new();
    let running = service.start(&[]);
    let (code, text) = vmgs(&service, &["list"], &[&service.path("vmgs")]);
    assert!(code == 6 && text.contains("another process has this file open"), "{text}");
    drop(running);
    let (code, text) = vmgs(&service, &["check"], &[&service.path("vmgs")]);
    assert!(code == 0 && text.contains("failed:\n  nothing"), "{text}");
}

#[test]
fn an_image_is_served_to_its_own_vm_only() {
    let site = Site::without_image();
    let [ours, theirs] = ["00112233-4455-6677-8899-aabbccddeeff", "99999999-4455-6677-8899-aabbccddeeff"];
    for (file, vm) in [("vmgs", ours), ("b", theirs)] {
        let (code, text) = vmgs(&site, &["create", "--size", "1M", "--vm-uuid", vm], &[&site.path(file)]);
        assert_eq!(code, 0, "{text}");
    }
    let records = |site: &Site| {
        let list = std::fs::read_dir(site.path("anchor")).expect("anchors").flatten();
        let mut all: Vec<_> = list.map(|e| (e.path(), std::fs::read(e.path()).expect("record"))).collect();
        all.sort();
        all
    };
    let before = records(&site);
    std::fs::rename(site.path("vmgs"), site.path("a")).expect("away");
    std::fs::rename(site.path("b"), site.path("vmgs")).expect("another VM's file in its place");
    let mut c = program();
    c.args(["socket", "--tpm2", "--vm-uuid", ours, "--server"]);
    c.arg(format!("type=unixio,path={}", site.path("x").display()));
    c.arg("--vmgs").arg(site.path("vmgs")).arg("--key-file").arg(site.path("key"));
    c.arg("--anchor").arg(site.path("anchor"));
    let (code, text) = run(&mut c);
    assert!(code != 0 && text.contains(theirs) && text.contains(ours), "{text}");
    assert!(records(&site) == before, "no anchor was touched");
    std::fs::rename(site.path("a"), site.path("vmgs")).expect("its own");
    let mut service = site.start(&["--vm-uuid", ours]);
    service.kill();
}

#[test]
fn who_did_what_and_why_is_noted_beside_the_record() {
    let site = Site::new();
    let image = site.path("vmgs");
    assert_eq!(import(&site, "10", &image).0, 0);
    assert_eq!(vmgs(&site, &["list", "--reason", "ticket 7"], &[&image]).0, 0);
    let (code, text) = vmgs(&site, &["delete", "--id", "10"], &[&image]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = vmgs(&site, &["delete", "--id", "10"], &[&image]);
    assert!(code == 5 && text.contains("file 10 (GUEST_WATCHDOG) is not in the image"), "{text}");
    let (code, text) = vmgs(&site, &["delete", "--id", "60"], &[&image]);
    assert!(code == 3 && text.contains("--confirm"), "{text}");
    let log = std::fs::read_dir(site.path("anchor"))
        .expect("anchors")
        .flatten()
        .find(|e| e.path().extension().is_some_and(|x| x == "log"))
        .expect("log");
    let lines: Vec<serde_json::Value> = std::fs::read_to_string(log.path())
        .expect("text")
        .lines()
        .map(|l| serde_json::from_str(l).expect("JSON"))
        .collect();
    let events: Vec<&str> = lines.iter().filter_map(|l| l["event"].as_str()).collect();
    assert_eq!(events, ["create", "import", "list", "delete"]);
    assert_eq!(lines[2]["reason"], "ticket 7");
    assert!(!format!("{lines:?}").contains(&KEY.map(|b| format!("{b:02x}")).concat()));
}

/// A file that claims terabytes has 16 KiB on disk, and takes its reader no more than any other.
#[test]
fn a_sparse_giant_costs_its_reader_nothing() {
    let site = Site::new();
    let small = std::fs::read(site.path("vmgs")).expect("read");
    let giant = site.path("giant");
    let payload: u64 = 1 << 42;
    let file = std::fs::File::create(&giant).expect("create");
    use std::os::unix::fs::FileExt;
    file.write_all_at(&small[..1 << 16], 0).expect("beginning");
    let mut footer = small[small.len() - 512..].to_vec();
    footer[48..56].copy_from_slice(&payload.to_be_bytes());
    let sum: u32 =
        footer.iter().enumerate().filter(|(n, _)| !(64..68).contains(n)).map(|(_, b)| u32::from(*b)).sum();
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    if file.write_all_at(&footer, payload).is_err() {
        println!("this file system has no files of {payload} bytes");
        return;
    }
    // Both tables claim every block that they can.
    let mut claims = small[..1 << 16].to_vec();
    for slot in [0, 512] {
        let block =
            u32::from_le_bytes(claims[slot + 24..slot + 28].try_into().expect("four")) as usize * 4096;
        if claims[slot] != 0 && block != 0 {
            claims[block + 40 * 64..block + 40 * 64 + 8].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0x20]);
        }
    }
    file.write_all_at(&claims, 0).expect("claims");
    let began = Instant::now();
    // 256 MiB of address space would not hold a set of that many blocks.
    let mut c = Command::new("sh");
    c.arg("-c").arg("ulimit -v 262144; exec \"$@\"").arg("sh").arg(env!("CARGO_BIN_EXE_vtpm-svc"));
    c.args(["vmgs", "check"]).arg(&giant).arg("--key-file").arg(site.path("key"));
    c.arg("--anchor").arg(site.path("anchor"));
    let (code, text) = run(&mut c);
    assert!(code == 3 && text.contains("64 MiB limit"), "{code}: {text}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// A bit that flipped in a file that is not the TPM's state costs that file and not the TPM.
#[test]
fn a_damaged_file_of_the_platform_stops_no_tpm() {
    let site = Site::new();
    let image = site.path("vmgs");
    let start = |what: &str| {
        let mut service = site.start(&["--flags", "not-need-init"]);
        let mut s = service.connect_data();
        let answer = common::tpm(&mut s, common::STARTUP_CLEAR).expect("startup");
        assert_eq!(common::code(&answer), 0, "{what}: {}", site.log());
        service.kill();
    };
    start("made");
    assert_eq!(vmgs(&site, &["clock", "--set", "1"], &[&image]).0, 0);
    assert_eq!(vmgs(&site, &["ppi", "--request", "5"], &[&image]).0, 0);
    start("request");
    assert_eq!(import(&site, "1", &image).0, 0);
    let whole = std::fs::read(&image).expect("read");
    for id in [1, 2, 4, 61] {
        let mut bytes = whole.clone();
        let word = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().expect("four")) as usize;
        let newest = if word(&bytes, 16) > word(&bytes, 512 + 16) { 0 } else { 512 };
        let entry = word(&bytes, newest + 24) * 4096 + id * 64;
        assert_ne!(word(&bytes, entry + 4), 0, "file {id} is there");
        let at = word(&bytes, entry) * 4096;
        bytes[at] ^= 1;
        std::fs::write(&image, &bytes).expect("write");
        let accept = ["--accept-rollback"];
        let (code, text) = vmgs(&site, &["clock", "--set", "2", accept[0]], &[&image]);
        assert!(code == 0 && text.contains(&format!("file {id} ")), "{text}");
        start(&format!("file {id}"));
        let number = id.to_string();
        let (code, text) = vmgs(&site, &["delete", "--id", &number], &[&image]);
        assert!(code == 0 || id == 4 || id == 61, "{text}");
        assert_eq!(vmgs(&site, &["check"], &[&image]).0, 0);
    }
}
