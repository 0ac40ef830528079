// SPDX-License-Identifier: Apache-2.0
//! Every step, against a stand-in for cvmm on an SNP host that is not there.
//!
//! The stand-in is a shell script. It answers `doctor`, `measure`, `verify` and `certs` as cvmm does, and a
//! launch with the lines that `l2-init` prints; its reports have nonce, measurement and report id where the
//! firmware has them (SEV-SNP Firmware ABI 1.58, table 23). What a test wants it to do wrong is in its
//! environment's `FAULT`, written into the script.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::Barrier;

use clap::Parser;
use serde_json::Value;

use super::*;

/// `$1` words are looked for in all arguments, as cvmm takes them in any order.
const CVMM: &str = r#"#!/bin/sh
FAULT=@FAULT@
after() { want=$1; shift; while [ $# -gt 0 ]; do [ "$1" = "$want" ] && { echo "$2"; return; }; shift; done; }
repeat() { n=$1; while [ "$n" -gt 0 ]; do printf '%s' "$2"; n=$((n - 1)); done; }
case "$*" in
--version) echo cvmm 0.0.0; exit 0;;
doctor*) cat @DOCTOR@; exit @CODE@;;
certs*) printf 'certificates' > "$(after --out "$@")"; exit 0;;
verify*) case "$*" in *tampered*) exit 1;; *) echo valid; exit 0;; esac;;
esac
cpus=$(after --cpus "$@")
size=$(wc -c < "$(after --initrd "$@")")
# A digest of what is launched: 48 bytes.
digest=$(printf '%090x%04x%02x' 0 "$size" "$cpus")
case "$*" in
measure*) echo "{\"format\": \"cvmm-measurement-1\", \"inputs\": {\"launch pages\": \"$((9 + cpus))\"},
    \"digests\": [{\"vcpus\": $cpus, \"launch_digest\": \"$digest\"}],
    \"pcrs\": {\"sha256\": {\"4\": \"$(repeat 32 c4)\"}}}"; exit 0;;
esac
line=$(after --cmdline "$@")
nonce=${line##*cvmm.report_data=}
[ "$FAULT" = digest ] && digest=$(repeat 48 ee)
report() { printf 'cvmm-guest: report %s%s%s%s%s\n' "$(repeat 80 00)" "$nonce" "$digest" "$(repeat 128 00)" "$(repeat 32 "$1")"; }
online=0; [ "$cpus" -gt 1 ] && online=0-$((cpus - 1))
[ "$FAULT" = aps ] && online=0
echo 'cvmm-guest: kernel 6.12'
echo "cvmm-guest: cpus $online"
echo 'cvmm-guest: log Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP'
case "$line" in
*sleep*) exec @SLEEPER@ ;;
*ext-report*) echo 'cvmm-guest: certificates 636572746966696361746573';;
*tpm,*) pcr=c4; [ "$FAULT" = pcr ] && pcr=00
    echo 'cvmm-guest: tpm_version 2'
    echo "cvmm-guest: tpm_pcr 4 $(repeat 32 $pcr)"
    echo 'cvmm-guest: tpm_log 01'
    echo 'cvmm-guest: tpm_random 01'
    report 01;;
*) echo 'cvmm-guest: cpu_cycle one'; report 01;;
esac
case "$*" in *restart*) report 02;; esac
exit 3
"#;

/// Runs a test's program under the name of a sleeping guest's monitor: a thread for each vCPU. It is this
/// very test binary.
const SLEEPER: &str = "CVMM_KIT_SLEEPER";

struct Host {
    folder: tempfile::TempDir,
}

impl Host {
    fn new(fault: &str, doctor: &str, code: u8) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("doctor.json"), doctor).unwrap();
        fs::write(at("vmlinuz"), "kernel").unwrap();
        fs::write(at("initrd"), "initrd").unwrap();
        fs::write(at("vcek.der"), "certificate").unwrap();
        let test = std::env::current_exe().unwrap();
        let sleeper = format!(
            "env {SLEEPER}=$cpus,$FAULT {} --exact scripted_test::sleeping_monitor --nocapture",
            test.display()
        );
        let script = CVMM
            .replace("@FAULT@", fault)
            .replace("@DOCTOR@", &at("doctor.json").display().to_string())
            .replace("@CODE@", &code.to_string())
            .replace("@SLEEPER@", &sleeper);
        fs::write(at("cvmm"), script).unwrap();
        fs::set_permissions(at("cvmm"), fs::Permissions::from_mode(0o755)).unwrap();
        Host { folder }
    }

    fn snp(fault: &str) -> Self {
        let doctor = r#"{ "verdict": "snp", "checks": [], "facts": { "sev_device": "Granted", "cpu_model": "AMD EPYC 7443P",
            "kernel": "7.3.4", "kvm": { "Ok": { "capabilities": { "req_certs": 1 } } } } }"#;
        Host::new(fault, doctor, 0)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the kit; exit code and report.
    fn run(&self, more: &[&str]) -> (u8, Value) {
        let path = |name: &str| self.at(name).display().to_string();
        let mut words = vec!["run".to_owned()];
        for (option, name) in
            [("--cvmm", "cvmm"), ("--kernel", "vmlinuz"), ("--initrd", "initrd"), ("--output", REPORT)]
        {
            words.extend([option.to_owned(), path(name)]);
        }
        words.extend(more.iter().map(|word| (*word).to_owned()));
        let code = run(&Args::parse_from(words)).unwrap();
        let report = fs::read_to_string(self.at(REPORT)).unwrap();
        (code, serde_json::from_str(&report).unwrap())
    }

    fn leftovers(&self) -> Vec<String> {
        let known = ["cvmm", "doctor.json", "vmlinuz", "initrd", "vcek.der", REPORT];
        let names = fs::read_dir(self.folder.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !known.contains(&name.as_str())).collect()
    }
}

/// Not a test by itself: what the stand-in becomes while its guest sleeps.
#[test]
fn sleeping_monitor() {
    let Ok(order) = std::env::var(SLEEPER) else { return };
    let (cpus, fault) = order.split_once(',').unwrap();
    let spin = fault == "spin";
    let cpus: usize = cpus.parse().unwrap();
    // A thread gives itself its name.
    let named = Arc::new(Barrier::new(cpus + 1));
    let vcpu = |id: usize| {
        let named = Arc::clone(&named);
        let body = move || {
            named.wait();
            loop {
                if !(spin && id == 1) {
                    std::thread::sleep(std::time::Duration::from_secs(1));
                }
            }
        };
        std::thread::Builder::new().name(format!("vcpu{id}")).spawn(body).unwrap()
    };
    let threads: Vec<std::thread::JoinHandle<()>> = (0..cpus).map(vcpu).collect();
    named.wait();
    println!("\ncvmm-guest: sleeping");
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn states(report: &Value) -> Vec<(&str, &str)> {
    let steps = report["steps"].as_array().unwrap();
    steps.iter().map(|s| (s["step"].as_str().unwrap(), s["state"].as_str().unwrap())).collect()
}

#[test]
fn a_good_host_passes_every_step_and_leaves_one_file() {
    let host = Host::snp("none");
    let certs = host.at("vcek.der").display().to_string();
    let (code, report) = host.run(&["--certs", &certs]);
    let expected = [
        "measure 1 vCPU",
        "measure 2 vCPU",
        "measure 8 vCPU",
        "launch 1 vCPU",
        "launch 2 vCPU",
        "launch 8 vCPU",
        "verify",
        "tampered initrd",
        "reboot",
        "certificates",
        "tpm",
        "idle guest",
    ];
    assert_eq!(states(&report), expected.map(|name| (name, "passed")), "{report:#}");
    assert_eq!(code, 0);
    assert_eq!((&report["rehearsal"], &report["refused"]), (&Value::Bool(false), &Value::Null));
    assert_eq!(report["doctor"]["facts"]["cpu_model"], "AMD EPYC 7443P");
    assert!(report["evidence"]["launch-8 report"].as_str().unwrap().len() >= 2 * 0x160);
    assert_eq!(report["steps"][11]["detail"]["vcpu_busy_share"].as_array().unwrap().len(), 8);
    assert_eq!(host.leftovers(), [] as [&str; 0]);
}

#[test]
fn without_certificates_their_steps_are_skipped_and_say_so() {
    let (code, report) = Host::snp("none").run(&["--cpus", "1"]);
    let skipped: Vec<_> = states(&report).into_iter().filter(|(_, state)| *state == "skipped").collect();
    assert_eq!(skipped, [("verify", "skipped"), ("certificates", "skipped")]);
    assert_eq!(code, 0);
}

/// Each of these was, or would be, the first thing to go wrong on hardware.
#[test]
fn what_goes_wrong_fails_its_step_and_no_other() {
    for (fault, cpus, step, words) in [
        ("aps", "1,2", "launch 2 vCPU", "not every vCPU was started"),
        ("digest", "1", "launch 1 vCPU", "predicted was"),
        ("pcr", "1", "tpm", "PCR 4 is"),
        ("spin", "2", "idle guest", "vcpu1 is busy"),
    ] {
        let (code, report) = Host::snp(fault).run(&["--cpus", cpus]);
        let found = report["steps"].as_array().unwrap().iter().find(|s| s["step"] == step).unwrap();
        assert_eq!((code, &found["state"]), (FAILED, &Value::from("FAILED")), "{report:#}");
        assert!(found["detail"].as_str().unwrap().contains(words), "{found}");
        assert_eq!(report["failed"], true);
        let first = states(&report).into_iter().find(|(_, state)| *state == "FAILED");
        assert_eq!(first, Some((step, "FAILED")));
    }
}

#[test]
fn a_host_without_snp_is_refused_with_a_report_and_no_launch() {
    let doctor = r#"{ "verdict": "emulation", "summary": "SNP guests cannot be launched on this host",
        "checks": [{ "area": "snp", "what": "/dev/sev", "found": "does not exist", "fix": "", "status": "missing",
        "decides": true }], "facts": {} }"#;
    let host = Host::new("none", doctor, 10);
    let (code, report) = host.run(&[]);
    assert_eq!(code, REFUSED);
    assert_eq!(
        report["refused"],
        "SNP guests cannot be launched on this host\n  missing: /dev/sev: does not exist. "
    );
    assert_eq!(report["steps"], Value::Array(Vec::new()));
    assert_eq!(host.leftovers(), [] as [&str; 0]);
}

#[test]
fn the_report_of_a_rehearsal_cannot_be_taken_for_an_acceptance() {
    let doctor = r#"{ "verdict": "emulation", "checks": [], "facts": {} }"#;
    let (code, report) = Host::new("none", doctor, 10).run(&["--rehearse", "--cpus", "1"]);
    assert_eq!((code, &report["rehearsal"]), (0, &Value::Bool(true)));
}

/// The whole kit runs from anywhere: nothing it writes depends on where it is started.
#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let host = Host::snp("none");
    let nowhere = Path::new("/proc/no/such/folder/report.json").display().to_string();
    let cvmm = host.at("cvmm").display().to_string();
    let error = run(&Args::parse_from(["run", "--cvmm", &cvmm, "--output", &nowhere])).unwrap_err();
    assert!(format!("{error:#}").contains("/proc/no/such/folder"), "{error:#}");
}
