// SPDX-License-Identifier: Apache-2.0
//! The command line of `vtpm-svc socket`, in swtpm's style, so that scripts written for swtpm need few
//! changes.
//!
//! `--ctrl` and `--server` take comma-separated settings. What swtpm has and this service has not is refused
//! with a sentence that names the replacement, never ignored.

use std::io;
use std::io::Write;
use std::os::fd::RawFd;
use std::path::PathBuf;

use super::anchor::AnchorArgs;
use super::keys::KeyArgs;
use crate::control::listen::Channel;
use crate::service;
use crate::service::TRUST;
use crate::service::error::ServiceError;
use crate::service::image::ImageOptions;
use crate::service::options::LogFile;
use crate::service::options::ServiceOptions;
use crate::tpm::Policy;
use crate::tpm::power::Startup;
use crate::vmgs::mark::parse_uuid;

/// Options of `vtpm-svc socket`.
#[derive(Debug, Clone, clap::Args)]
pub struct SocketArgs {
    /// Serve a TPM 2.0; the only kind there is
    #[arg(long)]
    pub tpm2: bool,
    /// Control channel: type=unixio,path=PATH[,mode=0600][,terminate] | type=unixio,fd=N |
    /// type=unixio,clientfd=N | type=tcp,port=N[,bindaddr=127.0.0.1]
    #[arg(long, value_name = "SETTINGS")]
    pub ctrl: Option<String>,
    /// Data channel: type=unixio,path=PATH[,mode=0600] | type=tcp,port=N[,bindaddr=127.0.0.1] |
    /// type=unixio,fd=N
    #[arg(long, value_name = "SETTINGS")]
    pub server: Option<String>,
    /// not-need-init, startup-clear, startup-state, startup-none
    #[arg(long, value_delimiter = ',', value_name = "FLAG")]
    pub flags: Vec<String>,
    /// Guest-state file; make one with `vmgs create`
    #[arg(long, value_name = "FILE")]
    pub vmgs: Option<PathBuf>,
    /// Id of the VM that the image has to belong to; another VM's image is refused
    #[arg(long, value_name = "UUID")]
    pub vm_uuid: Option<String>,
    /// Where the datastore key comes from
    #[command(flatten)]
    pub key: KeyArgs,
    /// How newer and older copies of the image are told apart
    #[command(flatten)]
    pub anchor: AnchorArgs,
    /// reject-locality-4, allow-set-locality
    #[arg(long, value_delimiter = ',', value_name = "SETTING")]
    pub locality: Vec<String>,
    /// Whether state blobs may leave and enter through the control channel (live migration); recorded in the
    /// image
    #[arg(long, value_name = "POLICY", value_parser = ["deny", "allow"], default_value = "deny")]
    pub state_export: String,
    /// End when the control client is gone
    #[arg(short = 't', long)]
    pub terminate: bool,
    /// Most stores of the guest's state a second in the long run, ten seconds' worth at once; 0 is no limit.
    /// Each is two flushes of the host's disk, and a guest that wants more waits
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub store_limit: u32,
    /// Go to the background once everything is ready
    #[arg(short = 'd', long)]
    pub daemon: bool,
    /// file=PATH: write the process id there
    #[arg(long, value_name = "SETTINGS")]
    pub pid: Option<String>,
    /// file=PATH[,level=N][,truncate]: write the log there
    #[arg(long, value_name = "SETTINGS")]
    pub log: Option<String>,
    /// action=kill or action=none
    #[arg(long, value_name = "SETTINGS", default_value = "action=kill")]
    pub seccomp: String,
    /// Folder of the host's certificate authority (made if missing): a new TPM gets EK and AK certificates
    /// from it
    #[arg(long, value_name = "DIR")]
    pub ek_ca: Option<PathBuf>,
    /// Platform certificate of the maker, in DER: a new TPM carries it in NV index 0x01C08000
    #[arg(long, value_name = "FILE")]
    pub platform_cert: Option<PathBuf>,
    /// Print what this program can do, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
    /// Not taken: state is kept in the guest-state file (--vmgs)
    #[arg(long, hide = true, value_name = "SETTINGS")]
    pub tpmstate: Option<String>,
    /// Not taken: the key of the state is --key-file
    #[arg(long = "key", hide = true, value_name = "SETTINGS")]
    pub swtpm_key: Option<String>,
    /// Not taken: start as that user
    #[arg(short = 'r', long, hide = true, value_name = "USER")]
    pub runas: Option<String>,
    /// Options of swtpm that have another form here, or none
    #[command(flatten)]
    pub foreign: ForeignArgs,
}

/// Options of swtpm that are not taken. They are parsed so that each can be answered with a sentence.
#[derive(Debug, Clone, Default, clap::Args)]
#[allow(missing_docs)]
pub struct ForeignArgs {
    #[arg(short = 'p', long, hide = true, value_name = "PORT")]
    pub port: Option<String>,
    #[arg(short = 'f', long, hide = true, value_name = "FD")]
    pub fd: Option<String>,
    #[arg(long, hide = true, value_name = "SETTINGS")]
    pub migration_key: Option<String>,
    #[arg(short = 'R', long, hide = true, value_name = "DIR")]
    pub chroot: Option<String>,
    #[arg(long, hide = true, value_name = "SETTINGS")]
    pub profile: Option<String>,
    #[arg(long, hide = true, value_name = "SETTINGS")]
    pub pcap: Option<String>,
    #[arg(long, hide = true)]
    pub print_states: bool,
    #[arg(long, hide = true)]
    pub print_profiles: bool,
    #[arg(long, hide = true, value_name = "FLAGS")]
    pub print_info: Option<String>,
}

impl ForeignArgs {
    /// The first that was given, and what to do instead.
    fn answer(&self) -> Option<(&'static str, &'static str)> {
        [
            (self.port.is_some(), "port", "give the data channel as --server type=tcp,port=N"),
            (
                self.fd.is_some(),
                "fd",
                "give the data channel as --server type=unixio,clientfd=N if it is connected, fd=N if it listens",
            ),
            (
                self.migration_key.is_some(),
                "migration-key",
                "state that leaves with --state-export allow is not encrypted again: send it through a channel that is",
            ),
            (
                self.chroot.is_some(),
                "chroot",
                "is not needed: the service gives up the whole file system before it reads the TPM's state",
            ),
            (self.profile.is_some(), "profile", "the engine (libtpms 0.9) has no profiles"),
            (self.print_profiles, "print-profiles", "the engine (libtpms 0.9) has no profiles"),
            (
                self.pcap.is_some(),
                "pcap",
                "commands can carry passwords and are not recorded; record at the client, for instance with the TCTI `pcap` of \
                 tpm2-tss",
            ),
            (self.print_states, "print-states", "`vtpm-svc vmgs list FILE --key-file FILE` shows what the image holds"),
            (
                self.print_info.is_some(),
                "print-info",
                "ask the service that runs: `swtpm_ioctl --unix SOCKET --info FLAGS`",
            ),
        ]
        .into_iter()
        .find_map(|(given, option, answer)| given.then_some((option, answer)))
    }
}

/// A setting that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{option}: {problem}")]
pub struct OptionError {
    /// The option's name.
    pub option: &'static str,
    /// What is wrong with it and what would be right.
    pub problem: String,
}

/// Parses `--ctrl` or `--server`; the second result is whether `terminate` was among the settings.
fn channel(option: &'static str, text: &str) -> Result<(Channel, bool), OptionError> {
    let refuse = |problem: String| Err(OptionError { option, problem });
    let (mut kind, mut path, mut port, mut address, mut mode) = ("", None, None, None, 0o600);
    let (mut fd, mut client, mut terminate) = (None, None, false);
    for setting in text.split(',').filter(|s| !s.is_empty()) {
        let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
        let number = |what: &str| {
            value
                .parse()
                .map_err(|_| OptionError { option, problem: format!("{what} `{value}` is not a number") })
        };
        match name {
            "type" if matches!(value, "unixio" | "tcp") => kind = value,
            "type" => return refuse(format!("type `{value}` is not unixio or tcp")),
            "path" => path = Some(PathBuf::from(value)),
            "port" => port = Some(number("port")?),
            "bindaddr" => address = Some(value),
            "fd" => fd = Some(number("fd")?),
            "clientfd" => client = Some(number("clientfd")?),
            "terminate" => terminate = true,
            "mode" => match u32::from_str_radix(value, 8) {
                Ok(m) if m <= 0o777 => mode = m,
                _ => return refuse(format!("mode `{value}` is not an octal file mode")),
            },
            _ => return refuse(format!("setting `{name}` is not known here")),
        }
    }
    let as_fd = |n: i64| i32::try_from(n).ok().filter(|n| *n > 2);
    let channel = match (kind, path, port, fd, client) {
        ("unixio" | "", None, None, Some(n), None) => as_fd(n).map(Channel::Listening),
        ("unixio" | "", None, None, None, Some(n)) => as_fd(n).map(Channel::Connected),
        ("unixio", Some(path), None, None, None) => Some(Channel::Unix { path, mode }),
        // As with swtpm, a port needs no type.
        ("tcp" | "", None, Some(port), None, None) => {
            let address: std::net::IpAddr = match address.unwrap_or("127.0.0.1").parse() {
                Ok(a) => a,
                Err(_) => return refuse(format!("bindaddr `{}` is not an address", address.unwrap_or(""))),
            };
            if !address.is_loopback() {
                return refuse(format!(
                    "bindaddr {address} is not a loopback address, and a TPM belongs on no other"
                ));
            }
            match u16::try_from(port) {
                Ok(port) => Some(Channel::Tcp { address: (address, port).into() }),
                Err(_) => return refuse(format!("port {port} is not between 0 and 65535")),
            }
        }
        _ => None,
    };
    match channel {
        Some(c) => Ok((c, terminate)),
        None => {
            refuse(format!("`{text}` needs type=unixio with path=, fd= or clientfd=, or type=tcp with port="))
        }
    }
}

/// Takes one setting (`file=`) out of a settings string.
fn file_setting(option: &'static str, text: &str) -> Result<PathBuf, OptionError> {
    text.split(',')
        .find_map(|s| s.strip_prefix("file="))
        .map(PathBuf::from)
        .ok_or_else(|| OptionError { option, problem: format!("`{text}` has no file=PATH") })
}

impl SocketArgs {
    /// What clients may do, and what to send to the TPM if it is to run from the start.
    fn policy(&self) -> Result<(Policy, Option<Startup>), OptionError> {
        let refuse = |option, problem: &str| Err(OptionError { option, problem: problem.into() });
        if self.tpmstate.is_some() {
            return refuse(
                "tpmstate",
                "state is kept in a guest-state file: use --vmgs FILE --key-file FILE",
            );
        }
        if self.swtpm_key.is_some() {
            return refuse("key", "the key of the state is given with --key-file FILE");
        }
        if self.runas.is_some() {
            return refuse("runas", "start the service as that user (see the systemd units)");
        }
        if let Some((option, answer)) = self.foreign.answer() {
            return refuse(option, answer);
        }
        if !self.tpm2 {
            return refuse("tpm2", "is required: this service has no TPM 1.2");
        }
        let mut policy = Policy { state_export: self.state_export == "allow", ..Policy::default() };
        let mut running = None;
        for flag in &self.flags {
            match flag.as_str() {
                "not-need-init" => running = running.or(Some(Startup::None)),
                // As with swtpm, asking for a start-up implies a TPM that runs.
                "startup-clear" => running = Some(Startup::Clear),
                "startup-state" => running = Some(Startup::State),
                "startup-none" => {}
                other => {
                    return Err(OptionError {
                        option: "flags",
                        problem: format!("`{other}` is not known here"),
                    });
                }
            }
        }
        for setting in &self.locality {
            match setting.as_str() {
                "reject-locality-4" => policy.reject_locality_4 = true,
                "allow-set-locality" => {}
                other => {
                    return Err(OptionError {
                        option: "locality",
                        problem: format!("`{other}` is not known here"),
                    });
                }
            }
        }
        if !matches!(self.seccomp.as_str(), "action=kill" | "action=none") {
            return refuse("seccomp", "expected action=kill or action=none");
        }
        Ok((policy, running))
    }
    /// What the service is to do: everything that can be judged without opening anything.
    fn options(&self) -> Result<ServiceOptions, SocketCliError> {
        let (policy, startup) = self.policy()?;
        let (mut control, mut terminate) = (None, self.terminate);
        if let Some(text) = &self.ctrl {
            let (channel, asked) = channel("ctrl", text)?;
            terminate |= asked;
            control = Some(channel);
        }
        let data = self.server.as_deref().map(|text| channel("server", text)).transpose()?.map(|(c, _)| c);
        if control.is_none() && data.is_none() {
            return Err(SocketCliError::Missing("nothing to serve on: give --ctrl, --server or both"));
        }
        let path = self.vmgs.clone().ok_or(SocketCliError::Missing(
            "--vmgs FILE is required; make one with `vtpm-svc vmgs create`",
        ))?;
        let vm = self.vm_uuid.as_deref().map(parse_uuid).transpose();
        let vm = vm.map_err(|e| OptionError { option: "vm-uuid", problem: e.to_string() })?;
        let key = self.key.provider().ok_or(SocketCliError::Missing(
            "a key is needed: --key-file, --passphrase-file, --key-credential or --key-hook",
        ))?;
        let (anchor, accept) = (self.anchor.folder(), self.anchor.accept());
        let log = self.log.as_deref().map(|text| {
            let truncate = text.split(',').any(|s| s == "truncate");
            file_setting("log", text).map(|path| LogFile { path, truncate })
        });
        Ok(ServiceOptions {
            image: ImageOptions { path, vm, key, anchor, accept, reason: self.anchor.history.reason.clone() },
            control,
            data,
            descriptors: std::env::args_os()
                .filter_map(|argument| descriptor_in(argument.to_str()?))
                .collect(),
            policy,
            terminate,
            startup,
            store_limit: self.store_limit,
            authority: self.ek_ca.clone(),
            platform_certificate: self.platform_cert.clone(),
            daemon: self.daemon,
            pid: self.pid.as_deref().map(|text| file_setting("pid", text)).transpose()?,
            log: log.transpose()?,
            seccomp: self.seccomp != "action=none",
        })
    }
}

/// The number in `/dev/fd/N` or `/proc/self/fd/N`, as shells and programs hand files over.
fn descriptor_in(argument: &str) -> Option<RawFd> {
    let (_, rest) = argument.split_once("/fd/")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Why `vtpm-svc socket` failed.
#[derive(Debug, thiserror::Error)]
pub enum SocketCliError {
    /// An option.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// A required option is missing.
    #[error("{0}")]
    Missing(&'static str),
    /// Standard output.
    #[error("writing the capabilities: {0}")]
    Print(#[from] io::Error),
    /// The service.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// Runs the service until a client or a signal ends it.
pub fn run(args: &SocketArgs) -> Result<(), SocketCliError> {
    if args.print_capabilities {
        let mut out = io::stdout().lock();
        writeln!(out, "{}", capabilities())?;
        return Ok(out.flush()?);
    }
    Ok(service::run(&args.options()?)?)
}

fn capabilities() -> serde_json::Value {
    serde_json::json!({
        "type": "swtpm",
        "program": "vtpm-svc",
        "version": env!("CARGO_PKG_VERSION"),
        "vtpm_mode": "host-served",
        "trust": TRUST,
        "features": ["tpm-2.0", "cmdarg-seccomp", "flags-opt-startup", "nvram-backend-vmgs"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_in_swtpm_style() {
        let unix = Channel::Unix { path: "/run/c".into(), mode: 0o660 };
        assert_eq!(channel("ctrl", "type=unixio,path=/run/c,mode=0660,terminate"), Ok((unix, true)));
        let tcp = Channel::Tcp { address: "127.0.0.1:2321".parse().expect("address") };
        assert_eq!(channel("server", "type=tcp,port=2321"), Ok((tcp.clone(), false)));
        assert_eq!(channel("server", "port=2321"), Ok((tcp, false)));
        assert_eq!(channel("ctrl", "type=unixio,fd=3"), Ok((Channel::Listening(3), false)));
    }

    #[test]
    fn wrong_settings_say_what_is_wrong() {
        for (text, word) in [
            ("type=tcp,port=2321,bindaddr=0.0.0.0", "loopback"),
            ("type=tcp,port=70000", "65535"),
            ("type=cuse", "unixio or tcp"),
            ("type=unixio", "path="),
            ("type=unixio,path=/a,colour=red", "colour"),
            ("type=unixio,path=/a,mode=999", "octal"),
            ("type=unixio,fd=1", "fd="),
        ] {
            let error = channel("ctrl", text).expect_err(text).to_string();
            assert!(error.contains(word) && error.starts_with("--ctrl"), "{error}");
        }
    }
}
