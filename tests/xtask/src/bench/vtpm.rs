// SPDX-License-Identifier: Apache-2.0
//! vtpm-svc beside stock swtpm: latency of common commands, time from exec to the first answer, resident
//! memory.
//!
//! Both get the same commands over a UNIX socket, in turn, in one run. Durability is not equal: vtpm-svc
//! answers an NV write after two flushes, swtpm 0.7 writes a file, renames it and never flushes. So NV writes
//! are measured with the state on disk, where the flushes count, and in memory (`/dev/shm`), where a flush
//! costs nothing and only the work is compared; and swtpm runs a third time with a preloaded `rename` that
//! flushes file and folder, which is what it would have to do to promise the same.

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use cvmm_tests::workspace::Workspace;

use super::Args;
use super::median;
use super::millis;
use crate::build;
use crate::steps::capture;

/// Commands of each kind per run of a program.
const COUNT: usize = 200;
const OWNER: u32 = 0x4000_0001;
const INDEX: u32 = 0x0150_0020;

/// The two programs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Ours,
    Swtpm,
    /// With [`SHIM`] preloaded.
    FlushedSwtpm,
}

/// `rename(2)` as a program calls it that wants the new contents to be there after a power loss.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <libgen.h>
#include <string.h>
#include <unistd.h>
static void flush(const char *path, int flags) {
    int fd = open(path, flags);
    if (fd >= 0) { fsync(fd); close(fd); }
}
int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    char folder[4096];
    flush(from, O_RDONLY);
    int result = real(from, to);
    strncpy(folder, to, sizeof folder - 1);
    folder[sizeof folder - 1] = 0;
    flush(dirname(folder), O_RDONLY | O_DIRECTORY);
    return result;
}
"#;

/// Compiles [`SHIM`]; there is a C compiler wherever Rust links.
fn shim(folder: &Path) -> Result<PathBuf> {
    let (source, library) = (folder.join("flush.c"), folder.join("flush.so"));
    fs::write(&source, SHIM)?;
    capture(
        Command::new("cc").args(["-shared", "-fPIC", "-O2", "-o"]).arg(&library).arg(&source).arg("-ldl"),
    )
    .context("compiling the flushing rename")?;
    Ok(library)
}

struct Tpm {
    child: Child,
    stream: UnixStream,
    began: Instant,
    first_answer: Duration,
}

impl Drop for Tpm {
    fn drop(&mut self) {
        // It ends with the bench in any case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Tpm {
    fn start(program: Program, files: &Files<'_>, folder: &Path) -> Result<Self> {
        let socket = folder.join("d");
        let mut command = match program {
            Program::Ours => {
                let (key, image, binary) = (folder.join("key"), folder.join("image"), files.binary);
                if !image.exists() {
                    fs::write(&key, [0x42; 32])?;
                    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
                    let mut create = Command::new(binary);
                    create.args(["vmgs", "create", "--size", "1M"]).arg(&image).arg("--key-file").arg(&key);
                    capture(create.arg("--anchor").arg(folder))?;
                }
                let mut c = Command::new(binary);
                c.arg("socket")
                    // What a guest may do in the long run is not what is measured here.
                    .args(["--store-limit", "0"])
                    .arg("--vmgs")
                    .arg(image)
                    .arg("--key-file")
                    .arg(key)
                    .arg("--anchor")
                    .arg(folder);
                c
            }
            Program::Swtpm | Program::FlushedSwtpm => {
                let mut c = Command::new("swtpm");
                if program == Program::FlushedSwtpm {
                    // Its filter has no fsync.
                    c.env("LD_PRELOAD", files.shim).args(["socket", "--seccomp", "action=none"]);
                    c.args(["--tpmstate", &format!("dir={}", folder.display())]);
                } else {
                    c.args(["socket", "--tpmstate", &format!("dir={}", folder.display())]);
                }
                c
            }
        };
        command.args(["--tpm2", "--flags", "not-need-init,startup-clear"]);
        command.args(["--server", &format!("type=unixio,path={}", socket.display())]);
        // One of an earlier start would take the connection and never answer.
        let _ = fs::remove_file(&socket);
        let began = Instant::now();
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) if began.elapsed() < Duration::from_secs(20) => {
                    std::thread::sleep(Duration::from_micros(200))
                }
                Err(e) => return Err(e).context("the TPM is not ready after 20 s"),
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut tpm = Tpm { child, stream, began, first_answer: Duration::ZERO };
        tpm.run(&get_random())?;
        tpm.first_answer = began.elapsed();
        Ok(tpm)
    }

    fn run(&mut self, command: &[u8]) -> Result<Vec<u8>> {
        for _ in 0..10 {
            self.stream.write_all(command)?;
            let mut response = vec![0; 10];
            self.stream.read_exact(&mut response)?;
            let word = |at: usize| response[at..at + 4].iter().fold(0u32, |v, b| v << 8 | u32::from(*b));
            let (size, code) = (word(2) as usize, word(6));
            ensure!((10..=4096).contains(&size), "a response of {size} bytes");
            response.resize(size, 0);
            self.stream.read_exact(&mut response[10..])?;
            match code {
                0 => return Ok(response),
                // The TPM tests an algorithm before its first use and asks to send again.
                0x922 => {}
                code => bail!("the TPM answered {code:#x}"),
            }
        }
        bail!("the TPM asks to send again and again")
    }

    /// Resident memory in MiB, and the share of it that is this process' own (proportional set size).
    fn memory_mib(&self) -> Result<(f64, f64)> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id()))?;
        let field = |name: &str| -> Result<f64> {
            let line =
                text.lines().find_map(|l| l.strip_prefix(name)).with_context(|| format!("no {name}"))?;
            Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? / 1024.0)
        };
        Ok((field("Rss:")?, field("Pss:")?))
    }

    /// Times of `COUNT` runs of one command, in microseconds.
    fn times(&mut self, command: impl Fn(u8) -> Vec<u8>) -> Result<Vec<f64>> {
        self.run(&command(0xff))?;
        (0..COUNT)
            .map(|n| {
                let command = command(n as u8);
                let began = Instant::now();
                self.run(&command)?;
                Ok(began.elapsed().as_secs_f64() * 1e6)
            })
            .collect()
    }
}

/// A command; handles are authorised by an empty password each.
fn command(code: u32, handles: &[u32], authorized: usize, parameters: &[u8]) -> Vec<u8> {
    let tag: u16 = if authorized == 0 { 0x8001 } else { 0x8002 };
    let mut c = tag.to_be_bytes().to_vec();
    c.extend([0; 4]);
    c.extend(code.to_be_bytes());
    handles.iter().for_each(|h| c.extend(h.to_be_bytes()));
    if authorized > 0 {
        c.extend((9 * authorized as u32).to_be_bytes());
        (0..authorized).for_each(|_| c.extend([0x40, 0, 0, 9, 0, 0, 0, 0, 0]));
    }
    c.extend(parameters);
    let size = c.len() as u32;
    c[2..6].copy_from_slice(&size.to_be_bytes());
    c
}

fn get_random() -> Vec<u8> {
    command(0x17b, &[], 0, &[0, 16])
}

fn extend() -> Vec<u8> {
    let mut p = vec![0, 0, 0, 1, 0, 0x0b];
    p.extend([0x11; 32]);
    command(0x182, &[16], 1, &p)
}

/// A signing key: `kind` is ECC P-256 or RSA-2048.
fn create_primary(ecc: bool) -> Vec<u8> {
    let mut public = vec![0, if ecc { 0x23 } else { 1 }, 0, 0x0b, 0, 4, 0, 0x72, 0, 0, 0, 0x10];
    if ecc {
        public.extend([0, 0x18, 0, 0x0b, 0, 3, 0, 0x10, 0, 0, 0, 0]);
    } else {
        public.extend([0, 0x14, 0, 0x0b, 8, 0, 0, 0, 0, 0, 0, 0]);
    }
    let mut p = vec![0, 4, 0, 0, 0, 0];
    p.extend((public.len() as u16).to_be_bytes());
    p.extend(public);
    p.extend([0; 6]);
    command(0x131, &[OWNER], 1, &p)
}

fn sign(key: u32) -> Vec<u8> {
    let mut p = vec![0, 32];
    p.extend([0x77; 32]);
    p.extend([0, 0x10, 0x80, 0x24, 0x40, 0, 0, 7, 0, 0]);
    command(0x15d, &[key], 1, &p)
}

fn define() -> Vec<u8> {
    let mut p = vec![0, 0, 0, 14];
    p.extend(INDEX.to_be_bytes());
    // ownerwrite | ownerread, 64 bytes
    p.extend([0, 0x0b, 0, 2, 0, 2, 0, 0, 0, 64]);
    command(0x12a, &[OWNER], 1, &p)
}

/// Writes other bytes each time: a TPM does not store what is there already.
fn nv_write(fill: u8) -> Vec<u8> {
    let mut p = vec![0, 64];
    p.extend([fill; 64]);
    p.extend([0, 0]);
    command(0x137, &[OWNER, INDEX], 1, &p)
}

/// Value that `share` of the samples do not exceed.
fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

const ROWS: [&str; 6] =
    ["GetRandom", "PCR_Extend", "Sign ECC P-256", "Sign RSA-2048", "NV_Write on disk", "NV_Write in memory"];

/// What one program showed.
#[derive(Default)]
struct Samples {
    micros: [Vec<f64>; ROWS.len()],
    start_new: Vec<f64>,
    start_again: Vec<f64>,
    resident: Vec<f64>,
    own: Vec<f64>,
}

/// What the programs need beside their state.
struct Files<'a> {
    binary: &'a Path,
    shim: &'a Path,
}

/// A TPM that has been up for this long has settled.
const SETTLED: Duration = Duration::from_secs(4);

impl Samples {
    fn take(&mut self, program: Program, files: &Files<'_>, disk: &Path, memory: &Path) -> Result<()> {
        let mut tpm = Tpm::start(program, files, disk)?;
        self.start_new.push(millis(tpm.first_answer));
        tpm.run(&define())?;
        let mut keys = Vec::new();
        for ecc in [true, false] {
            let r = tpm.run(&create_primary(ecc))?;
            keys.push(r[10..14].iter().fold(0u32, |v, b| v << 8 | u32::from(*b)));
        }
        let commands = [get_random(), extend(), sign(keys[0]), sign(keys[1])];
        for (row, command) in commands.iter().enumerate() {
            self.micros[row].extend(tpm.times(|_| command.clone())?);
        }
        self.micros[4].extend(tpm.times(nv_write)?);
        std::thread::sleep(SETTLED.saturating_sub(tpm.began.elapsed()));
        // Some of everything, so that what serving needs is there.
        for command in commands.iter().chain([&nv_write(1), &nv_write(2)]) {
            tpm.run(command)?;
        }
        let (resident, own) = tpm.memory_mib()?;
        self.resident.push(resident);
        self.own.push(own);
        drop(tpm);
        let tpm = Tpm::start(program, files, disk)?;
        self.start_again.push(millis(tpm.first_answer));
        drop(tpm);
        let mut tpm = Tpm::start(program, files, memory)?;
        tpm.run(&define())?;
        self.micros[5].extend(tpm.times(nv_write)?);
        Ok(())
    }
}

/// A folder that is empty now.
fn empty(path: PathBuf) -> Result<PathBuf> {
    if path.exists() {
        fs::remove_dir_all(&path)?;
    }
    fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}

/// Runs the bench and prints its table.
pub fn run(args: &Args) -> Result<()> {
    let workspace = Workspace::find();
    build::release(&workspace, &["vtpm-svc"])?;
    let binary = workspace.cargo_output(build::PROFILE).join("vtpm-svc");
    let shim = shim(&empty(workspace.work().join("bench-vtpm-shim"))?)?;
    let files = Files { binary: &binary, shim: &shim };
    let programs =
        [("vtpm-svc", Program::Ours), ("swtpm", Program::Swtpm), ("swtpm+fsync", Program::FlushedSwtpm)];
    let mut all: [Samples; 3] = Default::default();
    let shm = PathBuf::from(format!("/dev/shm/cvmm-bench-{}", std::process::id()));
    for _ in 0..args.runs {
        for (samples, (name, program)) in all.iter_mut().zip(programs) {
            let disk = empty(workspace.work().join("bench-vtpm"))?;
            let memory = empty(shm.clone())?;
            samples.take(program, &files, &disk, &memory).context(name)?;
        }
    }
    fs::remove_dir_all(&shm)?;

    let [ours, theirs, flushed] = &all;
    println!("\n{} runs, {COUNT} commands of each kind in each; microseconds", args.runs);
    println!(
        "{:20} {:>12} {:>12} {:>12} {:>12} {:>16} {:>10}",
        "", "ours p50", "ours p99", "swtpm p50", "swtpm p99", "swtpm+fsync p50", "p50 ratio"
    );
    for (row, name) in ROWS.iter().enumerate() {
        let (a, b) = (&ours.micros[row], &theirs.micros[row]);
        let (p50, q50) = (percentile(a, 0.5), percentile(b, 0.5));
        println!(
            "{name:20} {p50:12.0} {:12.0} {q50:12.0} {:12.0} {:16.0} {:10.2}",
            percentile(a, 0.99),
            percentile(b, 0.99),
            percentile(&flushed.micros[row], 0.5),
            p50 / q50
        );
    }
    println!("\n{:34} {:>10} {:>10} {:>12}", "medians", "vtpm-svc", "swtpm", "swtpm+fsync");
    type Column = fn(&Samples) -> &[f64];
    let lines: [(&str, Column); 4] = [
        ("exec to first answer, new TPM, ms", |s| &s.start_new),
        ("exec to first answer, old TPM, ms", |s| &s.start_again),
        ("resident, MiB", |s| &s.resident),
        ("proportional share of it, MiB", |s| &s.own),
    ];
    for (name, of) in lines {
        println!(
            "{name:34} {:10.1} {:10.1} {:12.1}",
            median(of(ours)),
            median(of(theirs)),
            median(of(flushed))
        );
    }
    println!(
        "\nvtpm-svc answers an NV write after two flushes; swtpm does not flush at all, swtpm+fsync flushes file and \
         folder. In memory nobody waits."
    );
    println!(
        "The starts are on disk; the first one includes the making of a new TPM, which vtpm-svc stores durably."
    );
    Ok(())
}
