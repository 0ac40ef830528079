// SPDX-License-Identifier: Apache-2.0
//! The utilities of IBM's TSS, unchanged, against this service and against swtpm, step by step in one run.
//!
//! Debian's package has the utilities of the regression suite but not its scripts, so `scripts/tss.sh` drives
//! them through the suite's subjects. Two things are compared: that each step does what the script expects,
//! and that both TPMs say the same, response codes included.

mod common;

use std::path::Path;
use std::process::Command;

use common::Service;
use common::Site;
use common::output;

fn serve(site: &Site, ours: bool, (data, control): (u16, u16)) -> Service {
    let mut c = if ours { common::program() } else { Command::new("swtpm") };
    c.args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"]);
    c.args(["--ctrl", &format!("type=tcp,port={control}"), "--server", &format!("type=tcp,port={data}")]);
    if ours {
        c.arg("--vmgs").arg(site.path("vmgs")).arg("--key-file").arg(site.path("key"));
        c.arg("--anchor").arg(site.path("anchor"));
    } else {
        c.args(["--seccomp", "action=none", "--tpmstate", &format!("dir={}", site.dir.path().display())]);
    }
    common::serve_tcp(site, c, data)
}

fn drive(site: &Site, ours: bool) -> (bool, String) {
    let ports = common::neighbouring_ports();
    let _service = serve(site, ours, ports);
    let work = site.path(if ours { "ours" } else { "swtpm" });
    std::fs::create_dir_all(&work).expect("folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/tss.sh");
    let mut c = Command::new("timeout");
    c.args(["300", "sh"]).arg(script).arg(ports.1.to_string()).current_dir(&work);
    c.env("TPM_INTERFACE_TYPE", "socsim").env("TPM_SERVER_TYPE", "raw").env("TPM_SERVER_NAME", "127.0.0.1");
    c.env("TPM_COMMAND_PORT", ports.0.to_string());
    // Sessions are used by one process after the other, which the utilities do not support with encrypted
    // files.
    c.env("TPM_DATA_DIR", &work).env("TPM_ENCRYPT_SESSIONS", "0");
    let (ok, text) = output(&mut c);
    // Messages about a missing file give its path.
    (ok, text.replace(&work.display().to_string(), "WORK"))
}

#[test]
fn ibms_utilities_see_no_difference_from_swtpm() {
    let (site, peer) = (Site::new(), Site::without_image());
    let (ours, theirs) = std::thread::scope(|s| {
        let theirs = s.spawn(|| drive(&peer, false));
        (drive(&site, true), theirs.join().expect("thread"))
    });
    assert!(ours.1.contains("steps, 0 unexpected"), "{}\n{}", ours.1, site.log());
    let lines = ours.1.lines().zip(theirs.1.lines());
    if let Some((n, (a, b))) = lines.enumerate().find(|(_, (a, b))| a != b) {
        let before = ours.1.lines().take(n + 1).filter(|l| l.contains(" -> ")).last().unwrap_or_default();
        panic!("after `{before}` ours says `{a}`, swtpm `{b}`\n{}", site.log());
    }
    assert_eq!(ours.1, theirs.1);
    assert!(ours.0 && theirs.0);
}
