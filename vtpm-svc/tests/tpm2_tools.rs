// SPDX-License-Identifier: Apache-2.0
//! tpm2-tools over loopback TCP, unchanged, against this service and against swtpm.

mod common;

use std::path::Path;
use std::process::Command;

use common::Site;
use common::output;

fn script(dir: &Path, port: u16) -> (bool, String) {
    let work = dir.join(format!("work{port}"));
    std::fs::create_dir_all(&work).expect("folder");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/tpm2.sh");
    let tcti = format!("swtpm:host=127.0.0.1,port={port}");
    output(
        Command::new("timeout").args(["120", "sh"]).arg(file).current_dir(work).env("TPM2TOOLS_TCTI", tcti),
    )
}

/// The script passes here and on swtpm, step by step alike.
#[test]
fn a_users_script_passes_as_it_does_on_swtpm() {
    let site = Site::new();
    let mut results = Vec::new();
    for ours in [true, false] {
        let (data, ctrl) = common::neighbouring_ports();
        let sockets = [format!("type=tcp,port={ctrl}"), format!("type=tcp,port={data}")];
        let mut c = if ours { common::program() } else { Command::new("swtpm") };
        c.args(["socket", "--tpm2", "--ctrl", &sockets[0], "--server", &sockets[1]]);
        c.args(["--flags", "not-need-init,startup-clear"]);
        if ours {
            c.arg("--vmgs").arg(site.path("vmgs")).arg("--key-file").arg(site.path("key"));
            c.arg("--anchor").arg(site.path("anchor"));
        } else {
            c.args(["--seccomp", "action=none", "--tpmstate", &format!("dir={}", site.dir.path().display())]);
        }
        let _service = common::serve_tcp(&site, c, data);
        results.push(script(site.dir.path(), data));
    }
    assert!(results[0].0, "ours: {}", results[0].1);
    assert_eq!(results[0].1, results[1].1, "swtpm prints something else");
    assert!(results[0].1.contains("all steps passed\n"));
}
