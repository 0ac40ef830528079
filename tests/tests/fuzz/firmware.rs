// SPDX-License-Identifier: Apache-2.0
//! Firmware files: OVMF's table and metadata, SVSM, IGVM.

use cvmm_tests::workspace::Workspace;
use igvm::IgvmDirectiveHeader;
use igvm::IgvmFile;
use igvm::IgvmInitializationHeader;
use igvm::IgvmPlatformHeader;
use igvm::IgvmRevision;
use igvm::snp_defs::SevVmsa;
use igvm_defs::IGVM_VHS_PARAMETER_INSERT;
use igvm_defs::IGVM_VHS_SUPPORTED_PLATFORM;
use igvm_defs::IgvmPageDataFlags;
use igvm_defs::IgvmPageDataType;
use igvm_defs::IgvmPlatformType;
use snp::digest::LaunchDigest;
use snp::digest::launch_digest;
use snp::identity::IdAuth;
use snp::image::guid_table::GuidTable;
use snp::image::igvm::Igvm;
use snp::image::igvm::ZeroPages;
use snp::image::igvm::id_block_header;
use snp::image::ovmf::Ovmf;
use snp::image::ovmf::OvmfLaunch;
use snp::image::ovmf::Svsm;
use snp::image::vmm_type::VcpuSetup;
use snp::image::vmm_type::VmmType;
use snp::pages::hashes::KernelHashes;
use snp::plan::Bytes;
use snp::plan::LaunchPlan;
use snp::vmsa::VMSA_GPA;
use snp::vmsa::VmsaState;
use test_support::firmware::CPUID;
use test_support::firmware::Firmware;
use test_support::firmware::KERNEL_HASHES;
use test_support::firmware::SEC_MEM;
use test_support::firmware::SECRETS;
use test_support::identity::id_block;
use test_support::igvm::seal;
use test_support::igvm::with_header;
use test_support::igvm::word;
use test_support::keys;
use zerocopy::FromBytes as _;

use crate::driver::Seed;
use crate::driver::Target;
use crate::driver::no_repair;
use crate::text;

const SETUP: VcpuSetup = VcpuSetup { signature: 0xa0_0f11, sev_features: 1 };
/// What a refusal of a firmware file says: where, or what is missing.
const FIRMWARE_SAYS: &[&str] = &["offset 0x", "expected", "has no", "overlap", "0x"];

/// Made-up firmware, and Debian's where it is unpacked.
fn files() -> Vec<Seed> {
    let sections = vec![
        (0x80_0000, 0x9000, SEC_MEM),
        (0x80_a000, 0x1000, SECRETS),
        (0x80_b000, 0x1000, CPUID),
        (0x80_c000, 0x1000, KERNEL_HASHES),
    ];
    let firmware = Firmware {
        pages: 2,
        seed: 3,
        sections,
        reset_eip: 0x80_b004,
        hashes_base: 0x80_cc00,
        svsm_entry: 0x40,
    };
    let few =
        Firmware { pages: 1, seed: 9, sections: vec![(0x80_0000, 0x1000, SEC_MEM)], ..firmware.clone() };
    let mut files: Vec<Vec<u8>> = vec![firmware.bytes(), few.bytes()];
    let debian = Workspace::find().work().join("ovmf/usr/share/ovmf/OVMF.fd");
    // Its last pages are a whole file to the parser.
    files.extend(
        std::fs::read(debian).ok().and_then(|file| file.last_chunk::<0x4000>().map(|end| end.to_vec())),
    );
    let seed = |bytes: Vec<u8>| {
        let len = bytes.len();
        // The table, the metadata in front of it, and its place in Debian's file.
        Seed::with_fields(bytes, [len - 0xe0..len - 32, len - 0x8a0..len - 0x7f0, len - 0x600..len - 0x400])
    };
    files.into_iter().map(seed).collect()
}

/// Hashes what a plan holds, if that is not too much for one case.
fn digest(plan: &LaunchPlan) {
    if plan.launch_pages() < 300 {
        let _ = launch_digest(plan);
    }
}

#[test]
fn guid_table() {
    Target {
        name: "guid-table",
        seeds: files(),
        repair: no_repair,
        parse: &|file| GuidTable::parse(file).map(drop).map_err(text),
        says: FIRMWARE_SAYS,
    }
    .run();
}

#[test]
fn ovmf() {
    let hashes = KernelHashes::of(b"kernel", b"initrd", b"cmdline");
    Target {
        name: "ovmf",
        seeds: files(),
        repair: no_repair,
        parse: &|file| {
            let ovmf = Ovmf::parse(Bytes::from(file.to_vec())).map_err(text)?;
            let _ = (ovmf.gpa(), ovmf.boot_code());
            for kernel in [None, Some(&hashes)] {
                if let Ok(plan) =
                    ovmf.plan(&OvmfLaunch { vmm: VmmType::Qemu, vcpus: 2, setup: SETUP, kernel })
                {
                    digest(&plan);
                }
            }
            let launch = OvmfLaunch { vmm: VmmType::Ec2, vcpus: 1, setup: SETUP, kernel: None };
            ovmf.plan(&launch).map(drop).map_err(text)
        },
        says: FIRMWARE_SAYS,
    }
    .run();
}

#[test]
fn svsm() {
    let ovmf = Ovmf::parse(Bytes::from(files().remove(1).bytes)).unwrap();
    Target {
        name: "svsm",
        // Debian's firmware is no SVSM.
        seeds: files().into_iter().take(2).collect(),
        repair: no_repair,
        parse: &|file| {
            let svsm = Svsm::parse(&ovmf, Bytes::from(file.to_vec()), 0x1000).map_err(text)?;
            digest(&svsm.plan(2, SETUP).map_err(text)?);
            Ok(())
        },
        says: FIRMWARE_SAYS,
    }
    .run();
}

/// Files of the `igvm` crate: pages of every kind, a parameter area, vCPUs, and one with an ID block.
fn igvm_files() -> Vec<Seed> {
    const MASK: u32 = 1;
    let page = |gpa, data_type, data: Vec<u8>| IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: MASK,
        flags: IgvmPageDataFlags::new(),
        data_type,
        data,
    };
    let state = VmsaState { cr0: 0x31, rip: 0x10_0000, ..VmsaState::reset() };
    let vcpu = |vp_index| IgvmDirectiveHeader::SnpVpContext {
        gpa: VMSA_GPA,
        compatibility_mask: MASK,
        vp_index,
        vmsa: Box::new(SevVmsa::read_from_bytes(&state.encode()).unwrap()),
    };
    let pages = vec![
        page(0x10_0000, IgvmPageDataType::NORMAL, vec![0x90; 4096]),
        page(0x10_1000, IgvmPageDataType::NORMAL, vec![]),
        page(0x10_2000, IgvmPageDataType::SECRETS, vec![]),
        page(0x10_3000, IgvmPageDataType::CPUID_DATA, vec![]),
    ];
    let area = vec![
        IgvmDirectiveHeader::ParameterArea {
            number_of_bytes: 0x2000,
            parameter_area_index: 0,
            initial_data: vec![7; 100],
        },
        IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
            gpa: 0x20_0000,
            compatibility_mask: MASK,
            parameter_area_index: 0,
        }),
    ];
    let platform = || {
        vec![IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask: MASK,
            highest_vtl: 0,
            platform_type: IgvmPlatformType::SEV_SNP,
            platform_version: 1,
            shared_gpa_boundary: 0,
        })]
    };
    let policy =
        || vec![IgvmInitializationHeader::GuestPolicy { policy: 0x3_0000, compatibility_mask: MASK }];
    let write = |directives: Vec<IgvmDirectiveHeader>| {
        let mut bytes = Vec::new();
        let file = IgvmFile::new(IgvmRevision::V1, platform(), policy(), directives).unwrap();
        file.serialize(&mut bytes).unwrap();
        bytes
    };
    let plain = write([pages.clone(), vec![vcpu(0)]].concat());
    let full = write([pages, area, vec![vcpu(0), vcpu(1)]].concat());
    let block = id_block(LaunchDigest([3; 48]));
    let auth = IdAuth::sign(&block, &keys::p384(1), Some(&keys::p384(2)));
    let signed = with_header(&plain, 0x30b, &id_block_header(&block, &auth, MASK));
    [plain, full, signed]
        .into_iter()
        .map(|bytes| {
            let (start, size) = (word(&bytes, 8), word(&bytes, 12));
            Seed::with_fields(bytes, vec![0..24, start..start + size])
        })
        .collect()
}

#[test]
fn igvm() {
    Target {
        name: "igvm",
        seeds: igvm_files(),
        repair: seal,
        parse: &|file| {
            let bytes = Bytes::from(file.to_vec());
            let igvm = Igvm::parse(&bytes, ZeroPages::Normal).map_err(text)?;
            if let Err(error) = igvm.check_identity() {
                assert!(error.to_string().contains("digest"), "{error}");
            }
            let _ = igvm.digests();
            match igvm.kvm_plan() {
                Ok(plan) => digest(&plan),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
            Ok(())
        },
        says: &["offset 0x", "SUPPORTED_PLATFORM", "overlap", "expected"],
    }
    .run();
}
