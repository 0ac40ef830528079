// SPDX-License-Identifier: Apache-2.0
//! `vmgs export`, `import` and `delete`: one file out of an image, into it, or away.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;
use serde_json::json;
use zeroize::Zeroizing;

use super::CliError;
use super::Done;
use super::Outcome;
use super::at;
use super::close;
use super::io_at;
use super::look;
use super::open_to_write;
use super::report;
use crate::cli::anchor::AnchorArgs;
use crate::cli::anchor::HistoryArgs;
use crate::cli::keys::KeyArgs;
use crate::vmgs::Change;
use crate::vmgs::FileId;
use crate::vmgs::VmgsError;
use crate::vmgs::format::MAX_FILE;
use crate::whole_file;
use crate::whole_file::Readers;

/// Copies a file out. What is not proved of it is said, and no reason to keep it back.
pub(super) fn export(file: &Path, id: u32, output: &Path, key: &KeyArgs, history: &HistoryArgs) -> Outcome {
    let id = FileId::user(id).map_err(VmgsError::from).map_err(at(file))?;
    let looked = look(file, key)?;
    let data = looked.view.read_file(&looked.raw, id).map_err(at(file))?;
    looked.note(file, history, "export", &format!("{id} to {}", output.display()));
    if output == Path::new("-") {
        return Ok(Done { report: Value::Null, raw: Some(data), verdict: None });
    }
    whole_file::write(output, &data, Readers::Owner)?;
    Ok(json!({
        "exported": id.to_string(),
        "bytes": data.len(),
        "to": output.display().to_string(),
        "not_proved": report::not_proved(&looked.view),
    })
    .into())
}

/// Copies a file in.
pub(super) fn import(file: &Path, id: u32, input: &Path, key: &KeyArgs, anchor: &AnchorArgs) -> Outcome {
    let id = FileId::user(id).map_err(VmgsError::from).map_err(at(file))?;
    let data = read_bounded(input, id)?;
    let mut vmgs = open_to_write(file, key, anchor, anchor.accept().replacing(id))?;
    let mark = vmgs.commit(&[Change::Put(id, &data)]).map_err(at(file))?;
    close(vmgs, file, anchor, "import", &format!("{id}, {} bytes", data.len()))?;
    Ok(json!({ "imported": id.to_string(), "bytes": data.len(), "generation": mark.generation }).into())
}

/// Whatever the input is, no more of it is read than a file of an image can have.
fn read_bounded(input: &Path, id: FileId) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let mut data = Zeroizing::new(Vec::new());
    File::open(input).and_then(|f| f.take(MAX_FILE + 1).read_to_end(&mut data)).map_err(io_at(input))?;
    if data.len() as u64 > MAX_FILE {
        return Err(CliError::Usage(format!(
            "{} has more than the {MAX_FILE} bytes that {id} can have",
            input.display()
        )));
    }
    Ok(data)
}

/// Removes files, also such as cannot be read.
pub(super) fn delete(file: &Path, ids: &[u32], confirm: bool, key: &KeyArgs, anchor: &AnchorArgs) -> Outcome {
    let ids: Vec<FileId> = ids
        .iter()
        .map(|n| FileId::user(*n))
        .collect::<Result<_, _>>()
        .map_err(VmgsError::from)
        .map_err(at(file))?;
    if ids.contains(&FileId::ROOT) {
        return Err(at(file)(VmgsError::Invalid(format!("{} is written by the store itself", FileId::ROOT))));
    }
    if ids.contains(&FileId::VTPM_STATE) && !confirm {
        return Err(CliError::Verdict(format!(
            "nothing was changed: {} is the TPM itself, with every key and secret in it, and this image never gets another \
             one. Repeat with --confirm to remove it",
            FileId::VTPM_STATE
        )));
    }
    let accept = ids.iter().fold(anchor.accept(), |accept, id| accept.replacing(*id));
    let mut vmgs = open_to_write(file, key, anchor, accept)?;
    // One that is gone already, and missed, is forgotten.
    let missed = |id: &FileId| vmgs.findings().contains(&crate::vmgs::Finding::Missing(*id));
    if let Some(id) = ids.iter().find(|id| !vmgs.list().iter().any(|(x, _, _)| x == *id) && !missed(id)) {
        return Err(at(file)(VmgsError::NotFound(*id)));
    }
    let changes: Vec<Change<'_>> = ids.iter().map(|id| Change::Delete(*id)).collect();
    let mark = vmgs.commit(&changes).map_err(at(file))?;
    let names: Vec<String> = ids.iter().map(ToString::to_string).collect();
    close(vmgs, file, anchor, "delete", &names.join(", "))?;
    Ok(json!({ "deleted": names, "generation": mark.generation }).into())
}
