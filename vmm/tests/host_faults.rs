// SPDX-License-Identifier: Apache-2.0
//! What the host may do to a run: full disks, readers that are slow or gone, limits, signals at any time,
//! services that hang. The guest goes on, or the run ends with words; nothing is left behind.
//!
//! Without `/dev/kvm` the tests that run a guest say so and do nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use rustix::process::Pid;
use rustix::process::Signal;
use test_support::code::out;
use test_support::code::power_off;
use test_support::monitor::kvm;
use test_support::tiny;

/// Longest that anything here takes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// `jmp` to itself.
const FOREVER: [u8; 2] = [0xeb, 0xfe];

/// `cvmm` for a guest that executes `code`; the guest's file is in `folder`.
fn cvmm(folder: &Path, code: &[u8]) -> Command {
    let kernel = folder.join("kernel");
    std::fs::write(&kernel, tiny::kernel(code)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvmm"));
    command.args(["--memory", "128M", "--kernel"]).arg(kernel);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn end_of(mut child: Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it did not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A pipe that `child` writes to until its first byte has arrived.
fn first_byte(reader: OwnedFd) -> File {
    let mut file = File::from(reader);
    file.read_exact(&mut [0]).unwrap();
    file
}

fn signal(child: &Child, signal: Signal) {
    rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_log_that_cannot_be_written_does_not_end_the_guest() {
    if kvm().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let child = cvmm(folder.path(), &power_off()).stderr(full()).spawn().unwrap();
    assert_eq!(end_of(child).code(), Some(0));
    // A guest that asks for resets chooses when the monitor says something: twice here, then it is over.
    let mut command = cvmm(folder.path(), &out(0xcf9, 0x06));
    command.args(["--on-reboot", "restart", "--max-lives", "3"]);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    assert_eq!(end_of(command.stderr(writer).spawn().unwrap()).code(), Some(3));
}

#[test]
fn a_log_that_nobody_reads_does_not_keep_signals_from_being_heard() {
    if kvm().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let mut command = cvmm(folder.path(), &out(0xcf9, 0x06));
    command.args(["--on-reboot", "restart"]).stderr(writer);
    let child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    signal(&child, Signal::TERM);
    assert_eq!(end_of(child).code(), Some(143));
}

/// Sends 90,000 bytes to the console: more than a pipe has room for.
fn chatter() -> Vec<u8> {
    // mov ecx, 90000; mov dx, 0x3f8; mov al, 'A'; out dx, al; dec ecx; jnz
    let mut code = vec![0xb9];
    code.extend(90_000u32.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xff, 0xc9, 0x75, 0xfb]);
    [code, power_off()].concat()
}

#[test]
fn a_console_that_does_not_block_loses_nothing_while_its_reader_is_slow() {
    if kvm().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let child = cvmm(folder.path(), &chatter()).stdout(writer).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let mut console = Vec::new();
    File::from(reader).read_to_end(&mut console).unwrap();
    assert_eq!(end_of(child).code(), Some(0));
    assert_eq!(console.len(), 90_000);
}

#[test]
fn a_limit_on_the_size_of_files_is_not_the_guests_end() {
    if kvm().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cvmm = cvmm(folder.path(), &chatter());
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -f 1; exec \"$0\" \"$@\""]).arg(cvmm.get_program()).args(cvmm.get_args());
    shell.stdin(Stdio::null()).stderr(Stdio::null());
    shell.stdout(File::create(folder.path().join("console")).unwrap());
    let status = end_of(shell.spawn().unwrap());
    assert_eq!((status.code(), status.signal()), (Some(0), None));
}

#[test]
fn every_signal_that_ends_programs_ends_the_run_in_order() {
    if kvm().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (which, number) in [
        (Signal::HUP, 1),
        (Signal::INT, 2),
        (Signal::QUIT, 3),
        (Signal::ABORT, 6),
        (Signal::USR1, 10),
        (Signal::USR2, 12),
        (Signal::ALARM, 14),
        (Signal::TERM, 15),
        (Signal::XCPU, 24),
    ] {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let code = [&out(0x3f8, b'x')[..], &FOREVER].concat();
        let child = cvmm(folder.path(), &code).stdout(writer).spawn().unwrap();
        let _console = first_byte(reader);
        signal(&child, which);
        let status = end_of(child);
        assert_eq!((status.code(), status.signal()), (Some(128 + number), None), "signal {number}");
    }
}

/// The words on standard error, and how the process ended.
fn words(command: &mut Command, after: Duration, with: Signal) -> (String, ExitStatus) {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(after);
    signal(&child, with);
    let mut stderr = child.stderr.take().unwrap();
    let status = end_of(child);
    let mut text = String::new();
    stderr.read_to_string(&mut text).unwrap();
    (text, status)
}

#[test]
fn a_signal_while_the_tpm_service_starts_leaves_no_folder_and_no_process() {
    if kvm().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let runtime = folder.path().join("runtime");
    std::fs::create_dir(&runtime).unwrap();
    let (slow, pid) = (folder.path().join("slow"), folder.path().join("pid"));
    std::fs::write(&slow, format!("#!/bin/sh\necho $$ >{}\nsleep 1000 &\nwait\n", pid.display())).unwrap();
    std::fs::set_permissions(&slow, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = cvmm(folder.path(), &power_off());
    command.args(["--vtpm", "--vtpm-svc"]).arg(&slow).env("XDG_RUNTIME_DIR", &runtime);
    let (text, status) = words(&mut command, Duration::from_secs(4), Signal::INT);
    assert_eq!(status.code(), Some(130), "{text}");
    assert!(text.contains("cvmm: waiting for the vTPM service to start"), "{text}");
    assert_eq!(std::fs::read_dir(&runtime).unwrap().count(), 0, "a folder with a key was left");
    let group = std::fs::read_to_string(&pid).unwrap();
    assert_eq!(members(group.trim()), Vec::<String>::new(), "a process was left");
}

/// Processes of a group that have not ended; what is left of one is for init to collect.
fn members(group: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok());
    let stats = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    // Name in parentheses, state, parent, group (proc_pid_stat(5)).
    let in_group = |stat: &String| {
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        fields.get(2) == Some(&group) && fields.first() != Some(&"Z")
    };
    stats.filter(in_group).collect()
}

#[test]
fn a_service_that_does_not_answer_is_waited_for_with_words_and_until_a_signal() {
    if kvm().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let _silent = UnixListener::bind(&socket).unwrap();
    let mut command = cvmm(folder.path(), &power_off());
    command.arg("--vtpm-socket").arg(&socket);
    let (text, status) = words(&mut command, Duration::from_secs(4), Signal::TERM);
    assert_eq!(status.code(), Some(143), "{text}");
    assert!(text.contains("cvmm: waiting for the TPM service to answer"), "{text}");
}

/// Processes that `parent` has started.
fn children(parent: u32) -> Vec<u32> {
    let list = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

#[test]
fn a_tpm_service_that_dies_is_started_again_for_the_next_vm_a_few_times() {
    let cvmm_program = Path::new(env!("CARGO_BIN_EXE_cvmm"));
    if kvm().is_none() || !cvmm_program.with_file_name("vtpm-svc").exists() {
        println!("skipped: no /dev/kvm, or vtpm-svc is not built (cargo build -p vtpm-svc)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    std::fs::write(file("key"), [0x5a; 32]).unwrap();
    std::fs::set_permissions(file("key"), PermissionsExt::from_mode(0o600)).unwrap();
    let mut create = Command::new(cvmm_program);
    create.args(["vmgs", "create"]).arg(file("vm.vmgs")).arg("--key-file").arg(file("key"));
    assert!(create.arg("--anchor").arg(file("anchors")).stdout(Stdio::null()).status().unwrap().success());
    let mut command = cvmm(folder.path(), &out(0xcf9, 0x06));
    command.args(["--on-reboot", "restart", "--vtpm"]).arg(file("vm.vmgs"));
    command.arg("--vtpm-key-file").arg(file("key")).arg("--vtpm-anchor").arg(file("anchors"));
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut log = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    // Each VM asks for a reset at once, and lives for a second; the service is killed in each.
    while std::io::BufRead::read_line(&mut log, &mut text).unwrap() > 0 {
        if text.trim_end().lines().last().is_some_and(|line| line.ends_with("follows")) {
            for service in children(child.id()) {
                let pid = i32::try_from(service).ok().and_then(Pid::from_raw).unwrap();
                rustix::process::kill_process(pid, Signal::KILL).unwrap();
            }
        }
    }
    assert_eq!(end_of(child).code(), Some(1), "{text}");
    assert_eq!(text.matches("it is started again for this VM").count(), 3, "{text}");
    assert!(text.trim_end().lines().last().unwrap().contains("could not follow: the vTPM"), "{text}");
}
