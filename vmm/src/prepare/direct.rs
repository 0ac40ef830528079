// SPDX-License-Identifier: Apache-2.0
//! A kernel that the monitor boots itself.

use std::sync::Arc;

use snp::image::direct::DirectBoot;
use snp::image::direct::Guest;
use snp::image::direct::Snp;
use snp::image::direct::Validation;
use snp::image::kernel::Kernel;
use snp::image::lazy::Acceptance;
use snp::vmsa::SEV_FEATURE_SECURE_TSC;
use snp_model::patch;
use snp_model::patch::Annotations;

use super::error::PrepareError;
use super::image::LaunchImage;
use super::image::Names;
use super::image::Target;
use crate::events::Events;
use crate::files::read_file;
use crate::spec;
use crate::spec::Accept;
use crate::spec::KernelSpec;
use crate::spec::SnpSpec;
use crate::spec::VmSpec;
use crate::vtpm::measured;

/// Kernel and initrd, read and parsed.
#[derive(Clone, Debug)]
pub struct Files {
    kernel: Kernel,
    initrd: Option<Arc<Vec<u8>>>,
}

impl Files {
    /// Reads both.
    pub fn read(spec: &KernelSpec, events: &Events) -> Result<Self, PrepareError> {
        let wrong = PrepareError::file("boot.direct.kernel", &spec.kernel);
        let bytes = read_file(&spec.kernel, events).map_err(&wrong)?;
        let kernel = Kernel::parse(bytes).map_err(PrepareError::file("boot.direct.kernel", &spec.kernel))?;
        let initrd = match &spec.initrd {
            Some(path) => {
                Some(read_file(path, events).map_err(PrepareError::file("boot.direct.initrd", path))?)
            }
            None => None,
        };
        Ok(Files { kernel, initrd: initrd.map(Arc::new) })
    }

    /// Where the kernel executes SNP instructions.
    pub(super) fn annotate(&self) -> Result<Annotations, PrepareError> {
        patch::annotate(&self.kernel).map_err(PrepareError::request)
    }
}

/// The image of a direct boot, and what announces its TPM.
pub fn direct(
    spec: &VmSpec,
    kernel: &KernelSpec,
    files: &Files,
    target: &Target<'_>,
) -> Result<LaunchImage, PrepareError> {
    let guest = match &spec.snp {
        None => Guest::Plain,
        Some(snp) => Guest::Snp(Snp {
            c_bit: target.c_bit,
            cpuid: target.cpuid,
            validation: validation(snp),
            features: if snp.secure_tsc { SEV_FEATURE_SECURE_TSC } else { 0 },
        }),
    };
    let mut boot = DirectBoot {
        kernel: &files.kernel,
        initrd: files.initrd.clone(),
        cmdline: &kernel.cmdline,
        memory: spec.memory,
        vcpus: spec.cpus,
        tpm: None,
        guest,
    };
    let events = match spec.tpm {
        Some(_) => measured::announce(&mut boot).map_err(PrepareError::request)?,
        None => Vec::new(),
    };
    let mut image = LaunchImage::of_direct(boot.image().map_err(PrepareError::request)?, target.names);
    image.events = events;
    if let Some(snp) = &spec.snp {
        image.inputs = inputs(spec, snp, kernel, files, target);
    }
    Ok(image)
}

fn validation(snp: &SnpSpec) -> Validation {
    match snp.validation {
        spec::Validation::Launch => Validation::AllByLaunch,
        spec::Validation::Stage0 => Validation::Stage0(match snp.accept.unwrap_or_default() {
            Accept::Eager => Acceptance::Eager,
            Accept::Lazy => Acceptance::Lazy,
            Accept::Auto => Acceptance::Auto,
        }),
    }
}

/// Who validates the guest's memory, as the request and the kernel decide it together.
fn accepts(spec: &VmSpec, snp: &SnpSpec, kernel: &Kernel) -> &'static str {
    match validation(snp) {
        Validation::AllByLaunch => "launch",
        Validation::Stage0(acceptance) => match acceptance.resolve(kernel, spec.memory) {
            Some(true) => "lazy",
            _ => "eager",
        },
    }
}

/// What the digest depends on, the number of vCPUs aside.
fn inputs(
    spec: &VmSpec,
    snp: &SnpSpec,
    kernel: &KernelSpec,
    files: &Files,
    target: &Target<'_>,
) -> Vec<(&'static str, String)> {
    if target.names == Names::None {
        return Vec::new();
    }
    let initrd = files.initrd.as_deref();
    vec![
        ("cvmm", env!("CARGO_PKG_VERSION").into()),
        ("stage0 sha256", target.names.of(snp::stage0::BUILT.image)),
        ("memory", format!("{:#x}", spec.memory)),
        ("accept", accepts(spec, snp, &files.kernel).into()),
        ("secure tsc", snp.secure_tsc.to_string()),
        ("cmdline", kernel.cmdline.clone()),
        ("vtpm", spec.tpm.is_some().to_string()),
        ("kernel sha256", target.names.of(files.kernel.file())),
        ("initrd sha256", initrd.map_or("none".into(), |initrd| target.names.of(initrd))),
    ]
}
