// SPDX-License-Identifier: Apache-2.0
//! An L1 with an Intel CPU: Bochs is the one emulator in Debian that has VMX with EPT.
//!
//! Bochs has neither 9p nor virtio. So L1 boots from a CD that holds, besides its kernel and initial ramdisk,
//! copies of the files that jobs name, at their paths and with the libraries that they need; what a job
//! writes stays in L1's memory. The agent's messages go over the second serial port, which Bochs connects to
//! the harness by TCP. Bochs takes a byte from there only when the port has room, so none is lost.

use std::fs;
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use super::Speed;
use crate::initrd;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::workspace::Workspace;

/// What it needs of Debian: the emulator, and what makes a CD that a BIOS boots.
pub const PACKAGES: &[&str] =
    &["bochs", "bochs-term", "bochsbios", "vgabios", "grub-common", "grub-pc-bin", "xorriso"];

/// The emulator itself; `bochs` is a script around it.
const BOCHS: &str = "bochs-bin";

/// L1 is up after about a minute of an idle core; several tests may share it.
pub const BOOT_LIMIT: Duration = Duration::from_secs(900);

/// A core runs about as many instructions in a second as L1's clock has for one, but those that leave a guest
/// take Bochs much longer, and what else runs on the machine slows it down further.
pub(super) const SPEED: Speed = Speed { longer: 3, slower: 5 };

/// Instructions in a second of L1's clock.
const INSTRUCTIONS: u32 = 50_000_000;

/// L1's memory in MiB: the guest's, and whatever jobs write.
const MEMORY: u32 = 2048;

/// The serial port of the agent.
const PORT: &str = "ttyS1";

/// What every L1 needs besides the files of jobs: a shell and what tests call.
const PROGRAMS: &[&str] = &["/bin/sh", "/usr/bin/cat", "/usr/bin/head", "/usr/bin/ls", "/usr/bin/mkdir"];

/// Writes a CD that boots L1 to `iso`.
pub fn build_iso(workspace: &Workspace, files: &[PathBuf], iso: &Path) -> Result<()> {
    let tree = iso.with_extension("tree");
    let boot = tree.join("boot");
    fs::create_dir_all(boot.join("grub")).with_context(|| format!("cannot create {}", boot.display()))?;
    // Under Bochs the generic kernel takes longer to unpack itself (xz) than this one (lz4) to boot.
    let kernel = Kernel::find(workspace, Role::StableCloud)?;
    fs::copy(&kernel.image, boot.join("vmlinuz"))
        .with_context(|| format!("cannot copy {}", kernel.image.display()))?;
    let agent = workspace.guest_program("l1-agent");
    fs::write(boot.join("initrd"), initrd::build(&kernel, &agent, initrd::INTEL_L1_MODULES)?)?;
    fs::write(boot.join("grub/grub.cfg"), menu())?;
    let host = Copies { root: tree.join("host") };
    let working_directory = std::env::current_dir().context("no working directory")?;
    for directory in [Path::new("/dev"), Path::new("/proc"), Path::new("/sys"), &working_directory] {
        host.directory(directory)?;
    }
    for file in PROGRAMS.iter().map(Path::new).chain(files.iter().map(PathBuf::as_path)) {
        host.with_libraries(file)?;
    }
    let made = Command::new("grub-mkrescue").arg("-o").arg(iso).arg(&tree).output();
    let made = made.context("cannot run grub-mkrescue: install Debian's grub-common and xorriso")?;
    if !made.status.success() {
        bail!("grub-mkrescue: {}", String::from_utf8_lossy(&made.stderr));
    }
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))
}

/// GRUB's configuration. The calibration of timers is left out, as in guests: a clock that counts
/// instructions is exact.
fn menu() -> String {
    format!(
        "set timeout=0\nmenuentry l1 {{\n\
         linux /boot/vmlinuz console=ttyS0 panic=-1 mitigations=off nokaslr quiet loglevel=4 tsc=reliable \
         no_timer_check cvmm.agent={PORT} cvmm.root=cdrom\ninitrd /boot/initrd\n}}\n"
    )
}

/// Starts Bochs; it connects to `agent`.
pub fn start(directory: &Path, iso: &Path, console: &Path, agent: SocketAddr) -> Result<Child> {
    let (configuration, commands) = (directory.join("bochsrc"), directory.join("commands"));
    fs::write(&configuration, settings(iso, console, &directory.join("bochs.log"), agent))?;
    // Debian's Bochs has its debugger built in, which waits for a command to go on.
    fs::write(&commands, "c\n")?;
    let log = File::create(super::emulator_log(console)).context("cannot create the emulator's log")?;
    // A serial line has no end that the agent could see: without this Bochs would outlive a harness that is
    // killed.
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", BOCHS])
        .arg("-q")
        .arg("-f")
        .arg(&configuration)
        .arg("-rc")
        .arg(&commands)
        .env("TERM", "vt100")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start setpriv")
}

/// Bochs's configuration. The CPU has VMX, EPT and unrestricted guests; it lacks some registers that Linux
/// and KVM read, which must not be an exception. Debian's Bochs cannot do without a display; this one is a
/// terminal, which may be a file. The other that needs no screen is a VNC server, open to the network. The
/// speaker's sound driver brings Bochs down where there is no sound card.
fn settings(iso: &Path, console: &Path, log: &Path, agent: SocketAddr) -> String {
    format!(
        "config_interface: textconfig\n\
         display_library: term\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest\n\
         cpu: model=corei7_haswell_4770, count=1, ips={INSTRUCTIONS}, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
         memory: guest={MEMORY}, host={MEMORY}\n\
         clock: sync=none\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=cdrom, path=\"{}\", status=inserted\n\
         boot: cdrom\n\
         com1: enabled=1, mode=file, dev=\"{}\"\n\
         com2: enabled=1, mode=socket-client, dev=\"{agent}\"\n\
         sound: driver=dummy, waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy\n\
         speaker: enabled=1, mode=none\n\
         log: \"{}\"\n\
         panic: action=fatal\n\
         error: action=report\n\
         info: action=ignore\n\
         debug: action=ignore\n",
        iso.display(),
        console.display(),
        log.display(),
    )
}

/// Copies of this machine's files below a directory, with the same paths.
struct Copies {
    root: PathBuf,
}

impl Copies {
    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn directory(&self, path: &Path) -> Result<()> {
        self.walk(path).map(|_| ())
    }

    /// Makes what leads to `path`, symbolic links as links, and returns where they lead to.
    fn walk(&self, path: &Path) -> Result<PathBuf> {
        let mut reached = PathBuf::from("/");
        for component in path.components() {
            match component {
                Component::Normal(name) => reached.push(name),
                Component::ParentDir => {
                    reached.pop();
                    continue;
                }
                _ => continue,
            }
            let kind = fs::symlink_metadata(&reached)
                .with_context(|| format!("cannot read {}", reached.display()))?
                .file_type();
            let copy = self.at(&reached);
            if kind.is_symlink() {
                let target = fs::read_link(&reached)?;
                if copy.symlink_metadata().is_err() {
                    symlink(&target, &copy).with_context(|| format!("cannot link {}", copy.display()))?;
                }
                // A link to an absolute path replaces what was reached.
                reached.pop();
                reached = self.walk(&reached.join(target))?;
            } else if kind.is_dir() {
                fs::create_dir_all(&copy).with_context(|| format!("cannot create {}", copy.display()))?;
            }
        }
        Ok(reached)
    }

    fn file(&self, path: &Path) -> Result<()> {
        let path = self.walk(path)?;
        let copy = self.at(&path);
        if !copy.exists() {
            fs::copy(&path, &copy).with_context(|| format!("cannot copy {}", path.display()))?;
        }
        Ok(())
    }

    /// A file, and the libraries that it needs if it is a program or a library.
    fn with_libraries(&self, path: &Path) -> Result<()> {
        self.file(path)?;
        let output = Command::new("ldd").arg(path).output().context("cannot run ldd")?;
        if !output.status.success() {
            // What ldd says of a static program and of whatever is no program at all.
            let words = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(words.contains("not a dynamic executable"), "ldd {}: {words}", path.display());
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.split_whitespace()
            .filter(|word| word.starts_with('/'))
            .try_for_each(|library| self.file(Path::new(library.trim_end_matches(':'))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_copied_as_links_with_what_they_lead_to() {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path().canonicalize().unwrap();
        fs::create_dir(here.join("usr")).unwrap();
        fs::write(here.join("usr/real"), "contents").unwrap();
        symlink("usr", here.join("short")).unwrap();
        symlink("../usr/./real", here.join("usr/name")).unwrap();
        let copies = Copies { root: here.join("copy") };
        copies.with_libraries(&here.join("short/name")).unwrap();
        copies.file(&here.join("short/name")).unwrap();
        let copy = copies.at(&here);
        assert_eq!(fs::read_link(copy.join("short")).unwrap(), Path::new("usr"));
        assert_eq!(fs::read_link(copy.join("usr/name")).unwrap(), Path::new("../usr/./real"));
        assert_eq!(fs::read_to_string(copy.join("short/name")).unwrap(), "contents");
        assert!(copies.file(&here.join("missing")).is_err());
    }
}
