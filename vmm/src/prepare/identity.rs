// SPDX-License-Identifier: Apache-2.0
//! The ID block of a launch: the one that the request names, or the one in the file.

use std::path::Path;

use base64ct::Base64;
use base64ct::Encoding as _;
use snp::digest::Measured;
use snp::digest::trace;
use snp::explain::Explanation;
use snp::explain::diff;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::identity::IdMismatch;
use snp::identity::block::AUTH_LEN;
use snp::identity::block::BLOCK_LEN;
use snp::policy::GuestPolicy;

use super::error::PrepareError;
use super::error::read;
use super::image::LaunchImage;
use crate::events::Event;
use crate::events::Events;
use crate::spec::IdBlockSpec;
use crate::spec::SnpSpec;

/// The bytes in a file: binary, or in base64 as QEMU takes them, alone or behind `name=` in a list of
/// properties.
fn unwrapped(file: &[u8], name: &str, len: usize) -> Vec<u8> {
    if file.len() == len {
        return file.to_vec();
    }
    let decoded = std::str::from_utf8(file).ok().and_then(|text| {
        let mut properties = text.trim().split(',').map(str::trim);
        let text = properties.clone().find_map(|p| p.strip_prefix(name)?.strip_prefix('='));
        let text: String = text.or_else(|| properties.next())?.split_ascii_whitespace().collect();
        Base64::decode_vec(&text).ok()
    });
    // What is neither goes to the parser as it is, whose message says what is wrong.
    decoded.unwrap_or_else(|| file.to_vec())
}

/// The block in a file.
pub fn read_block(field: &'static str, path: &Path, events: &Events) -> Result<IdBlock, PrepareError> {
    let bytes = unwrapped(read(field, path, events)?.as_slice(), "id-block", BLOCK_LEN);
    IdBlock::decode(&bytes).map_err(PrepareError::file(field, path))
}

/// The auth page in a file.
pub fn read_auth(field: &'static str, path: &Path, events: &Events) -> Result<IdAuth, PrepareError> {
    let bytes = unwrapped(read(field, path, events)?.as_slice(), "id-auth", AUTH_LEN);
    IdAuth::decode(&bytes).map_err(PrepareError::file(field, path))
}

/// The ID block of the launch.
pub(super) fn identity(
    snp: &SnpSpec,
    image: &mut LaunchImage,
    measured: &Measured,
    policy: GuestPolicy,
    events: &Events,
) -> Result<Option<(IdBlock, IdAuth)>, PrepareError> {
    if let Some(files) = &snp.id_block {
        let identity = check(files, image, measured, policy, events)?;
        if let Some((in_file, _)) = &image.identity {
            if *in_file != identity.0 {
                return Err(PrepareError::file("snp.id_block.block", &files.block)(
                    "the IGVM file has an ID block with other ids or version numbers; leave this one out to launch with the file's, \
                     or take the block out of the file",
                ));
            }
            let text = "`id_block` says the same as the ID block in the IGVM file; its keys are used";
            image.notes.push(Event::Note(text.into()));
        }
        return Ok(Some(identity));
    }
    if let Some((block, auth)) = &image.identity {
        auth.check(block, measured.digest(), policy)
            .map_err(|e| PrepareError::Request(format!("the ID block in the IGVM file: {}", told(&e))))?;
        image.notes.push(Event::Note("the launch uses the ID block in the IGVM file".into()));
    }
    Ok(image.identity.clone())
}

/// What does not match.
fn told(mismatch: &IdMismatch) -> String {
    let more = match mismatch {
        IdMismatch::Digest { .. } => "; `cvmm measure --diff` shows where the two launches part",
        _ => "",
    };
    format!("{mismatch}{more}")
}

/// Finds out what the firmware would answer, before anything is launched; a digest that differs is explained.
fn check(
    files: &IdBlockSpec,
    image: &LaunchImage,
    measured: &Measured,
    policy: GuestPolicy,
    events: &Events,
) -> Result<(IdBlock, IdAuth), PrepareError> {
    let block = read_block("snp.id_block.block", &files.block, events)?;
    let auth = read_auth("snp.id_block.auth", &files.auth, events)?;
    let mismatch = match auth.check(&block, measured.digest(), policy) {
        Ok(()) => return Ok((block, auth)),
        Err(mismatch) => mismatch,
    };
    let mut message = told(&mismatch);
    if let (IdMismatch::Digest { .. }, Some(path)) = (&mismatch, &files.reference) {
        const FIELD: &str = "snp.id_block.reference";
        let text = read(FIELD, path, events)?;
        let text = std::str::from_utf8(text.as_slice()).map_err(PrepareError::file(FIELD, path))?;
        let reference = Explanation::parse(text).map_err(PrepareError::file(FIELD, path))?;
        let plan = measured.plan();
        let trace = trace(plan).map_err(PrepareError::host)?;
        let mut ours = Explanation::new(&plan.records, &plan.vcpus, &trace);
        // What a launch does not record is taken to be the same.
        ours.inputs.clone_from(&reference.inputs);
        ours.inputs.extend(image.inputs.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        match diff(&reference, &ours) {
            Some(divergence) => message.push_str(&format!("\n{divergence}")),
            None => message
                .push_str("\nthis launch is the one in the reference, so the block was made for another one"),
        }
    }
    Err(PrepareError::Request(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_and_both_forms_of_base64_are_the_same_bytes() {
        let bytes: Vec<u8> = (0..96).collect();
        let text = Base64::encode_string(&bytes);
        let wrapped = format!("{}\n{}\n", &text[..64], &text[64..]);
        let line = format!("id-block={text},id-auth=AAAA\n");
        for form in
            [bytes.clone(), text.clone().into_bytes(), wrapped.into_bytes(), line.clone().into_bytes()]
        {
            assert_eq!(unwrapped(&form, "id-block", 96), bytes);
        }
        assert_eq!(unwrapped(line.as_bytes(), "id-auth", 4096), [0; 3]);
        assert_eq!(unwrapped(b"no base64!", "id-block", 96), b"no base64!");
    }
}
