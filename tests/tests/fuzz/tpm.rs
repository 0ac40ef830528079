// SPDX-License-Identifier: Apache-2.0
//! What the TPM and its service read: guest-state images, control messages, commands, event logs, UEFI
//! variables, PE files.

use std::sync::Arc;
use std::sync::Mutex;

use devices::bus::Device as _;
use devices::tpm_crb::BUFFER_LEN;
use devices::tpm_crb::Backend;
use devices::tpm_crb::BackendError;
use devices::tpm_crb::Buffer;
use devices::tpm_crb::Crb;
use vtpm_svc::control::data;
use vtpm_svc::control::wire;
use vtpm_svc::measured::Boot;
use vtpm_svc::measured::authenticode;
use vtpm_svc::measured::log;
use vtpm_svc::tpm::engine::Blob;
use vtpm_svc::tpm::engine::state;
use vtpm_svc::vmgs::Accept;
use vtpm_svc::vmgs::Change;
use vtpm_svc::vmgs::FileId;
use vtpm_svc::vmgs::Identity;
use vtpm_svc::vmgs::Key;
use vtpm_svc::vmgs::Vmgs;
use vtpm_svc::vmgs::block::MemFile;
use vtpm_svc::vmgs::uefi;

use crate::driver::Seed;
use crate::driver::Target;
use crate::driver::no_repair;
use crate::text;

const MIB: usize = 1 << 20;
const SECRET: &[u8] = b"the seed of the endorsement hierarchy";

fn image(key: Option<Key>) -> Vec<u8> {
    let who = Identity { image: [5; 16], vm: [9; 16] };
    let mut image = Vmgs::create(MemFile(vec![0; MIB + 512]), key, who, None).unwrap();
    image.commit(&[Change::Put(FileId::VTPM_STATE, SECRET)]).unwrap();
    image.commit(&[Change::Put(FileId::BIOS_NVRAM, b"variables")]).unwrap();
    image.close().unwrap().0
}

fn put32(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The headers' checksums, by the format's description: CRC-32 at 12 over 168 bytes of each of the first two
/// sectors.
fn seal_headers(image: &mut [u8]) {
    for at in [0, 512] {
        if at + 168 > image.len() {
            return;
        }
        put32(image, at + 12, 0);
        let crc = crc32fast::hash(&image[at..at + 168]);
        put32(image, at + 12, crc);
    }
}

#[test]
fn vmgs_image() {
    let key = || Key::from_bytes(&[7; 32]).unwrap();
    let seed = |bytes: Vec<u8>| {
        let tables = |slot: usize| {
            let block = u32::from_le_bytes(bytes[slot * 512 + 24..][..4].try_into().unwrap()) as usize;
            block * 4096..block * 4096 + 1024
        };
        let fields = vec![0..168, 0..168, 512..680, tables(0), tables(1), 0..12 * 4096, MIB..MIB + 512];
        Seed::with_fields(bytes, fields)
    };
    Target {
        name: "vmgs-image",
        seeds: vec![seed(image(Some(key()))), seed(image(None))],
        repair: seal_headers,
        parse: &|bytes| {
            // Both kinds are opened with what their owner would use.
            let accept = Accept { rollback: true, foreign: true, ..Accept::default() };
            let encrypted = Vmgs::open(MemFile(bytes.to_vec()), Some(key()), None, accept);
            let image = match encrypted {
                Ok(image) => image,
                Err(first) => {
                    Vmgs::open(MemFile(bytes.to_vec()), None, None, accept).map_err(|_| text(first))?
                }
            };
            for (id, _, _) in image.list() {
                let file = image.read(id);
                if image.is_encrypted() && id == FileId::VTPM_STATE {
                    assert!(
                        file.map_or(true, |file| file.as_slice() == SECRET),
                        "other contents than were sealed"
                    );
                }
            }
            Ok(())
        },
        says: &[],
    }
    .run();
}

#[test]
fn control_message() {
    let message = |command: u32, body: &[u8]| Seed::new([&command.to_be_bytes()[..], body].concat());
    let mut seeds: Vec<Seed> =
        [1u32, 3, 4, 6, 8, 9, 10, 14, 15, 16, 19].map(|command| message(command, &[])).into();
    seeds.push(message(2, &[0, 0, 0, 1]));
    seeds.push(message(5, &[3]));
    seeds.push(message(7, &[0, 0, 0, 5, b'h', b'e', b'l', b'l', b'o']));
    seeds.push(message(11, &[2]));
    seeds.push(message(12, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]));
    seeds.push(message(13, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3]));
    seeds.push(message(17, &4096u32.to_be_bytes()));
    seeds.push(message(18, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]));
    Target {
        name: "control-message",
        seeds,
        repair: no_repair,
        parse: &|bytes| match wire::parse(bytes) {
            wire::Parsed::Whole(_) => Ok(()),
            // Memory is set aside for what a message announces, so that has to have a bound.
            wire::Parsed::Announces(total) => {
                assert!(
                    total > bytes.len() && total <= wire::MAX_STATE as usize + 64,
                    "{total} bytes announced"
                );
                Ok(())
            }
            wire::Parsed::Short(total) => {
                assert!(total > bytes.len() && total <= 16, "{total} bytes wanted");
                Ok(())
            }
            wire::Parsed::Refused(code) | wire::Parsed::Lost(code) => Err(format!("TPM result code {code}")),
        },
        says: &[],
    }
    .run();
}

/// `TPM2_GetRandom` of 16 bytes.
const GET_RANDOM: [u8; 12] = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 16];

#[test]
fn command_stream() {
    let prefixed = [&[0, 0, 0, 8, 2, 0, 0, 0, 12][..], &GET_RANDOM].concat();
    Target {
        name: "command-stream",
        seeds: vec![
            Seed::with_fields([GET_RANDOM; 3].concat(), [0..10, 12..22]),
            Seed::with_fields([&prefixed[..], &GET_RANDOM].concat(), [0..20, 21..31]),
        ],
        repair: no_repair,
        parse: &|bytes| {
            let mut stream = bytes;
            loop {
                let left = stream.len();
                match data::receive(&mut stream).map_err(text)? {
                    data::Received::Command(incoming) => {
                        assert!(incoming.command.len() >= 10 && stream.len() < left);
                    }
                    data::Received::BadLength => return Err("length outside of 10 to 4096".into()),
                    data::Received::End => return Ok(()),
                }
            }
        },
        says: &[],
    }
    .run();
}

struct Page(Mutex<Vec<u8>>);

impl Buffer for Page {
    fn read(&self, offset: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.0.lock().unwrap()[offset..offset + out.len()]);
    }
    fn write(&self, offset: usize, data: &[u8]) {
        self.0.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
    }
}

/// Answers as long as the command's last byte asks for, and checks what it gets.
struct Checker;

impl Backend for Checker {
    fn execute(&mut self, _locality: u8, command: &[u8]) -> Result<Vec<u8>, BackendError> {
        let size = u32::from_be_bytes(command[2..6].try_into().unwrap()) as usize;
        assert!(command.len() == size && (10..=BUFFER_LEN).contains(&size), "a command of {}", command.len());
        match command.last() {
            Some(0) => Err(BackendError("the TPM is gone".into())),
            Some(n) => Ok(vec![0x80; usize::from(*n) * 20]),
            None => Err(BackendError(String::new())),
        }
    }
}

/// Accesses to a CRB: each record is an offset (2 bytes), a length with the direction in its top bit (1), a
/// spare byte, and a value (4); what is left of the first bytes is the command in the guest's page.
#[test]
fn crb_accesses() {
    let access =
        |offset: u16, value: u32| [&offset.to_le_bytes()[..], &[4, 0], &value.to_le_bytes()].concat();
    let read = |offset: u16| [&offset.to_le_bytes()[..], &[0x84, 0, 0, 0, 0, 0]].concat();
    let mut script = [0; 16].to_vec();
    script[..12].copy_from_slice(&GET_RANDOM);
    for (offset, value) in [(0x08, 1), (0x40, 1), (0x4c, 1), (0x48, 1), (0x48, 0), (0x40, 2), (0x08, 2)] {
        script.extend(access(offset, value));
        script.extend(read(0x44));
        script.extend(read(0x4c));
    }
    let page = Arc::new(Page(Mutex::new(vec![0; BUFFER_LEN])));
    let crb = Crb::new(page.clone(), 0xfed4_6000, Box::new(Checker), Box::new(|| {})).unwrap();
    let crb = Mutex::new(crb);
    Target {
        name: "crb",
        seeds: vec![Seed::with_fields(script, [0..16, 16..200])],
        repair: no_repair,
        parse: &|bytes| {
            let mut crb = crb.lock().unwrap();
            crb.reset();
            let (command, script) = bytes.split_at(bytes.len().min(16));
            page.write(0, command);
            for record in script.as_chunks::<8>().0 {
                let offset = u64::from(u16::from_le_bytes([record[0], record[1]]));
                let mut data = [0; 16];
                let len = usize::from(record[2] & 0x7f).clamp(1, 16);
                if record[2] >> 7 == 1 {
                    crb.read(offset, &mut data[..len]);
                } else {
                    data[..4].copy_from_slice(&record[4..]);
                    assert!(crb.write(offset, &data[..len]).is_none());
                }
            }
            // The device's own thread takes the command; a panic there would leave START set for ever.
            let mut start = [1; 4];
            for _ in 0..100_000 {
                crb.read(0x4c, &mut start);
                if start == [0; 4] {
                    return Ok(());
                }
                std::thread::yield_now();
            }
            panic!("the command is not done");
        },
        says: &[],
    }
    .run();
}

fn boot() -> Boot<'static> {
    Boot {
        monitor: "cvmm test",
        stage0: Some((0x1000, b"stage0")),
        kernel: b"not a PE file",
        kernel_address: 0x10_0000,
        initrd: Some(b"initrd"),
        cmdline: "console=ttyS0",
    }
}

#[test]
fn event_log() {
    Target {
        name: "event-log",
        seeds: vec![
            Seed::new(log::write(&boot().events())),
            Seed::with_fields(log::write(&[]), [0..32, 32..80]),
        ],
        repair: no_repair,
        parse: &|bytes| {
            let events = log::parse(bytes).map_err(text)?;
            let _ = vtpm_svc::measured::replay(&events, 0x0b);
            Ok(())
        },
        says: &["offset"],
    }
    .run();
}

#[test]
fn pe_file() {
    let mut file = vec![0x90; 0x600];
    file[..0x200].fill(0);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x3c, &0x40u32.to_le_bytes());
    put(0x40, b"PE\0\0");
    put(0x46, &1u16.to_le_bytes()); // one section
    put(0x54, &0xf0u16.to_le_bytes()); // size of the optional header
    put(0x58, &0x20bu16.to_le_bytes()); // PE32+
    put(0x94, &0x200u32.to_le_bytes()); // size of the headers
    put(0xc4, &16u32.to_le_bytes()); // data directories
    put(0x158, &0x400u32.to_le_bytes()); // size of the section's data
    put(0x15c, &0x200u32.to_le_bytes()); // and its place
    Target {
        name: "pe-file",
        seeds: vec![Seed::with_fields(file, [0x3c..0x60, 0x94..0x98, 0xc4..0xf8, 0x148..0x170])],
        repair: no_repair,
        parse: &|bytes| {
            let spans = authenticode::spans(bytes).map_err(text)?;
            assert!(spans.iter().all(|span| span.start <= span.end && span.end <= bytes.len()));
            Ok(())
        },
        says: &["offset", "expected"],
    }
    .run();
}

#[test]
fn uefi_variables() {
    let variable = |name: &str, data: &[u8]| uefi::Variable {
        attributes: 7,
        time: [0; 16],
        vendor: [0x61; 16],
        name: name.encode_utf16().collect(),
        data: data.to_vec(),
    };
    let file = uefi::write(&[variable("BootOrder", &[0, 0, 1, 0]), variable("db", &[1; 200])]).unwrap();
    Target {
        name: "uefi-variables",
        seeds: vec![Seed::with_fields(file, [0..80, 70..140])],
        repair: no_repair,
        parse: &|bytes| {
            let variables = uefi::parse(bytes).map_err(text)?;
            let _: Vec<String> = variables.iter().map(uefi::Variable::name_text).collect();
            Ok(())
        },
        says: &["offset"],
    }
    .run();
}

#[test]
fn tpm_state() {
    Target {
        name: "tpm-state",
        seeds: vec![Seed::with_fields(state::frame(Blob::Permanent, 0x902, &[9; 64]), [0..16, 16..32])],
        repair: no_repair,
        parse: &|bytes| state::unframe(Blob::Permanent, bytes).map(drop).map_err(text),
        says: &[],
    }
    .run();
}
