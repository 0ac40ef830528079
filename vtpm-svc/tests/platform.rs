// SPDX-License-Identifier: Apache-2.0
//! Physical presence, the clock's offset and the platform certificate: asked for through the control socket
//! or the image commands, kept over crashes, done at the next start and only then.

mod common;

use std::os::unix::net::UnixStream;
use std::process::Command;

use common::STARTUP_CLEAR;
use common::Service;
use common::Site;
use common::code;
use common::output;
use common::tpm;
use vtpm_svc::control::client::Client;
use vtpm_svc::control::client::ClientError;
use vtpm_svc::tpm::commands;
use vtpm_svc::tpm::commands::Bytes;
use vtpm_svc::tpm::commands::handle;
use vtpm_svc::tpm::manufacture::place;

const INDEX: u32 = 0x0150_0042;
const CLEAR: u32 = 5;
const SET_PCR_BANKS: u32 = 23;

/// A TPM behind a data socket, as the service's own command builder wants it.
fn transport(s: &mut UnixStream) -> impl FnMut(&[u8]) -> Result<Vec<u8>, String> {
    |command| tpm(s, command).map_err(|e| e.to_string())
}

fn start(site: &Site, more: &[&str]) -> (Service, UnixStream) {
    let service = site.start(&[&["--flags", "startup-clear"], more].concat());
    let data = service.connect_data();
    (service, data)
}

/// Gives the owner a password and defines an index under it.
fn take_ownership(s: &mut UnixStream) {
    let public = Bytes::default().u32(INDEX).u16(0x0b).u32(0x0002_0002).u16(0).u16(8);
    let p = Bytes::default().u16(0).sized(&public.0);
    let mut t = transport(s);
    commands::run(&mut t, "NV_DefineSpace", 0x12a, &[handle::OWNER], &p.0).expect("define");
    let p = Bytes::default().sized(b"secret");
    commands::run(&mut t, "HierarchyChangeAuth", 0x129, &[handle::OWNER], &p.0).expect("owner password");
}

fn is_owned(s: &mut UnixStream) -> bool {
    let mut t = transport(s);
    let index = commands::nv_exists(&mut t, INDEX).expect("read public");
    let p = Bytes::default().sized(b"");
    let empty = commands::run(&mut t, "HierarchyChangeAuth", 0x129, &[handle::OWNER], &p.0).is_ok();
    assert_eq!(index, !empty, "index and owner password come and go together");
    index
}

/// Name of a persistent key.
fn name(s: &mut UnixStream, at: u32) -> Vec<u8> {
    commands::run_with_handles(&mut transport(s), "ReadPublic", 0x173, &[], &[at], &[]).expect("read public")
}

/// Active banks, from `TPM2_GetCapability(TPM_CAP_PCRS)`.
fn banks(s: &mut UnixStream) -> Vec<u16> {
    let p = Bytes::default().u32(5).u32(0).u32(1);
    let r = commands::run(&mut transport(s), "GetCapability", 0x17a, &[], &p.0).expect("capability");
    // more data, capability, count; then algorithm, size of selection, three bytes each.
    r[9..].chunks_exact(6).filter(|c| c[3..] != [0, 0, 0]).map(|c| u16::from_be_bytes([c[0], c[1]])).collect()
}

#[test]
fn a_request_is_done_once_at_the_next_start_and_survives_a_kill() {
    let site = Site::new();
    let ca = site.path("ca").display().to_string();
    let (mut service, mut s) = start(&site, &["--ek-ca", &ca]);
    take_ownership(&mut s);
    let keys = [name(&mut s, place::EK_RSA), name(&mut s, place::AK)];
    let control = Client::connect(&site.path("c")).expect("connect").control();
    assert_eq!(control.ppi().expect("state"), [0, 0, 0, 0]);
    assert_eq!(control.submit_ppi(CLEAR, 0).expect("submit"), 0);
    assert_eq!(control.ppi().expect("state"), [CLEAR, 0, 0, 0]);
    assert!(is_owned(&mut s), "nothing happens before the next start");
    service.kill();

    let (_service, mut s) = start(&site, &[]);
    assert!(!is_owned(&mut s), "{}", site.log());
    assert_eq!(
        [name(&mut s, place::EK_RSA), name(&mut s, place::AK)],
        keys,
        "certified keys are there again"
    );
    take_ownership(&mut s);
    let mut client = Client::connect(&site.path("c")).expect("connect");
    assert_eq!(client.control().ppi().expect("state"), [0, 0, CLEAR, 0], "done, with success");
    client.reset(0).expect("power cycle");
    assert_eq!(code(&client.execute(0, STARTUP_CLEAR).expect("startup")), 0);
    assert!(is_owned(&mut s), "it is not done twice");
}

#[test]
fn pcr_banks_change_at_the_next_start() {
    let site = Site::new();
    let (mut service, mut s) = start(&site, &[]);
    assert_eq!(banks(&mut s), [0x0b, 0x0c]);
    let control = Client::connect(&site.path("c")).expect("connect").control();
    assert_eq!(control.submit_ppi(SET_PCR_BANKS, 1).expect("answer"), 2, "SHA-1 is refused");
    assert_eq!(control.submit_ppi(24, 0).expect("answer"), 1, "a new endorsement seed is not implemented");
    assert_eq!(control.submit_ppi(SET_PCR_BANKS, 2).expect("answer"), 0);
    service.kill();
    let (mut service, mut s) = start(&site, &[]);
    assert_eq!(banks(&mut s), [0x0b]);
    service.kill();
    // The operator's way, while no service runs.
    let image = [site.path("anchor"), site.path("vmgs")];
    let paths = [image[0].as_path(), image[1].as_path()];
    let (ok, text) = site.vmgs(&["ppi", "--request", "23", "--argument", "6", "--anchor"], &paths);
    assert!(ok, "{text}");
    let (ok, text) = site.vmgs(&["ppi", "--request", "23", "--argument", "8", "--anchor"], &paths);
    assert!(!ok && text.contains("SHA-256 (2)"), "{text}");
    let (_service, mut s) = start(&site, &[]);
    assert_eq!(banks(&mut s), [0x0b, 0x0c]);
}

/// The file can be written by other tools, and a guest may have had a hand in it.
#[test]
fn nonsense_in_the_request_file_does_not_keep_the_tpm_from_starting() {
    let site = Site::new();
    let (mut service, mut s) = start(&site, &[]);
    take_ownership(&mut s);
    service.kill();
    let import = |bytes: &[u8]| {
        std::fs::write(site.path("ppi"), bytes).expect("write");
        let image = [site.path("anchor"), site.path("vmgs")];
        let input = site.path("ppi").display().to_string();
        let (ok, text) =
            site.vmgs(&["import", "--id", "2", "-i", &input, "--anchor"], &[&image[0], &image[1]]);
        assert!(ok, "{text}");
    };
    // Operation 24 with an argument.
    let mut record = [0u8; 28];
    (record[0], record[20]) = (24, 7);
    import(&record);
    let (mut service, mut s) = start(&site, &[]);
    assert!(is_owned(&mut s));
    let control = Client::connect(&site.path("c")).expect("connect").control();
    assert_eq!(control.ppi().expect("state"), [0, 0, 24, 0xffff_fff1], "failed, by the interface's number");
    service.kill();
    import(&[5, 0, 0]);
    let (_service, mut s) = start(&site, &[]);
    assert!(is_owned(&mut s));
    assert!(site.log().contains("3 bytes, expected 28"), "{}", site.log());
    let control = Client::connect(&site.path("c")).expect("connect").control();
    assert!(matches!(control.ppi(), Err(ClientError::Refused { code: 9, .. })));
}

#[test]
fn the_clock_s_offset_is_kept() {
    let site = Site::new();
    let mut service = site.start(&[]);
    let control = Client::connect(&site.path("c")).expect("connect").control();
    assert_eq!(control.clock().expect("clock"), None);
    control.set_clock(-36_000_000_000).expect("an hour behind");
    assert!(matches!(control.set_clock(i64::MAX), Err(ClientError::Refused { code: 3, .. })));
    service.kill();
    let image = [site.path("anchor"), site.path("vmgs")];
    let (ok, text) = site.vmgs(&["--json", "clock"], &[&image[1]]);
    assert!(ok && text.contains("\"seconds_ahead_of_utc\": -3600"), "{text}");
    // The eight bytes that OpenVMM reads: -3600 s in 100 ns, little-endian.
    let out = site.path("skew").display().to_string();
    let (ok, text) = site.vmgs(&["export", "--id", "4", "-o", &out], &[&image[1]]);
    assert!(ok, "{text}");
    assert_eq!(std::fs::read(&out).expect("read"), (-36_000_000_000i64).to_le_bytes());
    let (ok, text) = site.vmgs(&["clock", "--set", "-7", "--anchor"], &[&image[0], &image[1]]);
    assert!(ok, "{text}");
    let _service = site.start(&[]);
    let control = Client::connect(&site.path("c")).expect("connect").control();
    assert_eq!(control.clock().expect("clock"), Some(-70_000_000));
}

/// swtpm's own certificate maker plays the platform's manufacturer; tpm2-tools reads the index where its
/// users look.
#[test]
fn a_platform_certificate_is_read_back_from_its_index() {
    let site = Site::new();
    let made = output(Command::new("sh").current_dir(site.dir.path()).args([
        "-euc",
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout k.pem -out issuer.pem -subj /CN=maker -days 10 2>/dev/null
         openssl pkey -in k.pem -pubout -out pub.pem
         swtpm_cert --type platform --tpm2 --pubkey pub.pem --signkey k.pem --issuercert issuer.pem \
            --out-cert platform.der --days 10 --tpm-manufacturer id:00001014 --tpm-model swtpm \
            --tpm-version id:20191023 --platform-manufacturer Maker --platform-model Board --platform-version 1",
    ]));
    assert!(made.0, "{}", made.1);
    let der = site.path("platform.der");
    let certificate = std::fs::read(&der).expect("certificate");
    let (port, control) = common::neighbouring_ports();
    let mut c = common::program();
    c.args(["socket", "--tpm2", "--flags", "startup-clear", "--platform-cert"]).arg(&der);
    c.args(["--server", &format!("type=tcp,port={port}"), "--ctrl", &format!("type=tcp,port={control}")]);
    c.arg("--vmgs").arg(site.path("vmgs")).arg("--key-file").arg(site.path("key"));
    c.arg("--anchor").arg(site.path("anchor"));
    let _service = common::serve_tcp(&site, c, port);
    let read = output(
        Command::new("sh")
            .current_dir(site.dir.path())
            .env("TPM2TOOLS_TCTI", format!("swtpm:host=127.0.0.1,port={port}"))
            .args([
                "-euc",
                "tpm2_nvread 0x1c08000 -C 0x1c08000 -o back.der
                 if tpm2_nvundefine -Q 0x1c08000 -C o 2>/dev/null; then exit 9; fi
                 tpm2_nvreadpublic 0x1c08000",
            ]),
    );
    assert!(read.0, "{}\n{}", read.1, site.log());
    assert_eq!(std::fs::read(site.path("back.der")).expect("read back"), certificate);
    assert!(read.1.contains("platformcreate") && read.1.contains("authread"), "{}", read.1);

    // A file that is none is refused before there is a TPM.
    let other = Site::new();
    std::fs::write(other.path("bad"), &certificate[1..]).expect("write");
    let mut c = common::program();
    c.args(["socket", "--tpm2", "--server", &format!("type=unixio,path={}", other.path("d").display())]);
    c.arg("--platform-cert").arg(other.path("bad"));
    c.arg("--vmgs").arg(other.path("vmgs")).arg("--key-file").arg(other.path("key"));
    let (ok, text) = output(c.arg("--anchor").arg(other.path("anchor")));
    assert!(!ok && text.contains("platform certificate") && text.contains("DER"), "{text}");
}

/// A guest that writes the register in a loop: the host neither stores nor says anything for what changes
/// nothing, and not often for what does.
#[test]
fn a_guest_cannot_fill_the_host_s_disk_or_log_with_requests() {
    let site = Site::new();
    let (mut service, _) = start(&site, &[]);
    let control = Client::connect(&site.path("c")).expect("connect").control();
    for _ in 0..500 {
        assert_eq!(control.submit_ppi(CLEAR, 0).expect("submit"), 0);
    }
    assert_eq!(site.log().matches("physical-presence operation").count(), 1, "{}", site.log());
    let answers: Vec<u32> =
        (0..500).map(|n| control.submit_ppi(5 + 9 * (n % 2), 0).expect("submit")).collect();
    assert!(answers.contains(&2), "at some point it is refused");
    assert!(site.log().lines().count() < 40, "{}", site.log());
    // The last one that was accepted waits.
    let [pending, ..] = control.ppi().expect("state");
    assert!(matches!(pending, 5 | 14));
    service.kill();
    let generation = |text: &str| {
        let (_, rest) = text.split_once("generation").expect("a generation");
        let digits: String =
            rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().expect("number")
    };
    let (ok, text) = site.vmgs(&["inspect"], &[&site.path("vmgs")]);
    assert!(ok && generation(&text) < 40, "{text}");
}

/// Each store is two flushes of the host's disk, so a guest that stores in a loop is slowed down. The clock
/// stands for it here.
#[test]
fn stores_have_a_bound_in_the_long_run() {
    let site = Site::new();
    let (_service, _) = start(&site, &["--store-limit", "20"]);
    let control = Client::connect(&site.path("c")).expect("connect").control();
    let begun = std::time::Instant::now();
    for n in 0..240 {
        control.set_clock(n).expect("set");
    }
    // Ten seconds' worth at once, then twenty a second.
    let took = begun.elapsed().as_millis();
    assert!(took >= 1500, "{took} ms");
    let begun = std::time::Instant::now();
    for _ in 0..200 {
        control.set_clock(239).expect("set");
    }
    assert!(begun.elapsed().as_millis() < 1500, "nothing changes, so nothing is stored");
}

/// `mv copy image`: the service goes on in a file that nobody will ever open again.
#[test]
fn an_image_that_was_replaced_takes_no_more_writes() {
    let site = Site::new();
    let (mut service, mut s) = start(&site, &[]);
    std::fs::copy(site.path("vmgs"), site.path("copy")).expect("copy");
    std::fs::rename(site.path("copy"), site.path("vmgs")).expect("replace");
    let control = Client::connect(&site.path("c")).expect("connect").control();
    assert!(matches!(control.set_clock(1), Err(ClientError::Refused { .. })));
    let public = Bytes::default().u32(INDEX).u16(0x0b).u32(0x0002_0002).u16(0).u16(8);
    let p = Bytes::default().u16(0).sized(&public.0);
    let refused = commands::run(&mut transport(&mut s), "NV_DefineSpace", 0x12a, &[handle::OWNER], &p.0);
    assert!(refused.is_err(), "not acknowledged");
    assert!(site.log().contains("removed or replaced"), "{}", site.log());
    control.shutdown().expect("shutdown");
    assert_eq!(service.child.wait().expect("wait").code(), Some(1));
}
