// SPDX-License-Identifier: Apache-2.0
//! `sev-snp-measure` as an oracle: one Python process that answers one line per case.
//!
//! The tool is installed by the test setup into `target/cvmm/venv` (see `tests/xtask`), or found through
//! `CVMM_ORACLE_PYTHON`, the path of a Python interpreter that can import it.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::path::PathBuf;
use std::process::Child;
use std::process::ChildStdin;
use std::process::ChildStdout;
use std::process::Command;
use std::process::Stdio;

/// Reads `key=value` fields separated by tabs, answers with a digest in hex or `error: ...`.
const SERVER: &str = r#"
import sys
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from sevsnpmeasure import guest, id_block, vcpu_types
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmm_types import VMMType
vmm = {"qemu": VMMType.QEMU, "ec2": VMMType.ec2, "gce": VMMType.gce}
print("ready", flush=True)
for line in sys.stdin:
    case = dict(field.split("=", 1) for field in line.rstrip("\n").split("\t"))
    try:
        if "idkey" in case:
            # Block and auth page in base64, then the keys' digests in base64.
            out = id_block.snp_calc_id_block(bytes.fromhex(case["digest"]), case["idkey"], case["authorkey"])
            print(out.replace("\n", ",").replace(": ", "="), flush=True)
            continue
        if "verify" in case:
            # An independent reading of our auth page: who signed what?
            page, block = bytes.fromhex(case["verify"]), bytes.fromhex(case["block"])
            def key(at):
                x, y = (int.from_bytes(page[at + 4 + i * 72:at + 76 + i * 72], "little") for i in (0, 1))
                return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
            def check(key, at, message):
                r, s = (int.from_bytes(page[at + i * 72:at + 72 + i * 72], "little") for i in (0, 1))
                key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
            check(key(576), 64, block)
            check(key(2176), 1664, page[576:1604])
            print("verified", flush=True)
            continue
        mode = SevMode.SEV_SNP_SVSM if "svsm" in case else SevMode.SEV_SNP
        cpu = case["cpu"]
        sig = int(cpu, 0) if cpu.startswith("0x") else vcpu_types.CPU_SIGS[cpu]
        print(guest.calc_launch_digest(
            mode, int(case["vcpus"]), sig, case["ovmf"], case.get("kernel"), case.get("initrd"),
            case.get("append"), int(case["features"], 0), vmm_type=vmm[case["vmm"]],
            svsm_file=case.get("svsm", ""), ovmf_vars_size=int(case.get("vars", "0"))).hex(), flush=True)
    except Exception as e:
        print("error:", repr(e).replace("\n", " "), flush=True)
"#;

/// A running oracle.
pub struct SevSnpMeasure {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

fn interpreter() -> PathBuf {
    match std::env::var_os("CVMM_ORACLE_PYTHON") {
        Some(path) => path.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/cvmm/venv/bin/python"),
    }
}

impl SevSnpMeasure {
    /// Starts the oracle; `None`, with a note on standard error, where it is not installed.
    pub fn start() -> Option<Self> {
        let python = interpreter();
        let spawned = Command::new(&python)
            .args(["-c", SERVER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(e) => {
                eprintln!("SKIPPED: sev-snp-measure is not installed ({}: {e})", python.display());
                return None;
            }
        };
        let input = child.stdin.take()?;
        let output = BufReader::new(child.stdout.take()?);
        let mut oracle = SevSnpMeasure { child, input, output };
        if oracle.line() != "ready" {
            eprintln!("SKIPPED: {} cannot import sevsnpmeasure", python.display());
            return None;
        }
        Some(oracle)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Digest in hex (or another line that the server's script promises), or what went wrong.
    pub fn measure(&mut self, case: &[(&str, String)]) -> Result<String, String> {
        let fields: Vec<String> = case.iter().map(|(key, value)| format!("{key}={value}")).collect();
        writeln!(self.input, "{}", fields.join("\t")).unwrap();
        let line = self.line();
        if line.starts_with("error:") { Err(line) } else { Ok(line) }
    }
}

impl Drop for SevSnpMeasure {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
