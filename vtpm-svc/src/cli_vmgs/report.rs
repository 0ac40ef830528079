// SPDX-License-Identifier: Apache-2.0
//! Reports on an image: one JSON value each, and a plain-text form of any of them.

use serde_json::Value;
use serde_json::json;

use crate::vmgs::AnchorFolder;
use crate::vmgs::FileId;
use crate::vmgs::FsFile;
use crate::vmgs::Key;
use crate::vmgs::Vmgs;
use crate::vmgs::VmgsError;
use crate::vmgs::anchor::AnchorSource;
use crate::vmgs::format::BLOCK;
use crate::vmgs::format::ENCRYPTED;
use crate::vmgs::image;
use crate::vmgs::image::Layout;
use crate::vmgs::root::FLAG_DISCLOSED;
use crate::vmgs::root::FLAG_EXPORTED;
use crate::vmgs::root::FLAG_PROVISIONED;
use crate::vmgs::root::Root;
use crate::vmgs::root::uuid_text;
use crate::vmgs::uefi;

/// The files of an open image.
pub(super) fn files(vmgs: &Vmgs<FsFile>) -> Vec<Value> {
    vmgs.list()
        .into_iter()
        .map(|(id, bytes, encrypted)| {
            json!({ "id": id.number(), "name": id.name(), "bytes": bytes, "encrypted": encrypted })
        })
        .collect()
}

fn flags(root: &Root) -> Vec<&'static str> {
    [
        (FLAG_PROVISIONED, "tpm-provisioned"),
        (FLAG_EXPORTED, "identity-left-the-image"),
        (FLAG_DISCLOSED, "disclosed"),
    ]
    .into_iter()
    .filter(|(bit, _)| root.flags & bit != 0)
    .map(|(_, name)| name)
    .collect()
}

/// What can be seen.
pub(super) fn inspect(file: &FsFile, key: Option<&Key>) -> Result<Value, VmgsError> {
    let layout = Layout::read(file)?;
    let slot = |n: usize| match &layout.headers.slots[n] {
        Ok(h) => json!({
            "sequence": h.sequence,
            "file_table_block": h.table_block,
            "encrypted": h.encrypted,
            "markers": h.markers,
            "key_slots_used": h.keys.iter().filter(|k| !k.is_empty()).count(),
            "active": n == layout.headers.active,
        }),
        Err(fault) => json!({ "fault": fault.to_string() }),
    };
    let used: u64 = layout.table.0.iter().map(|e| u64::from(e.blocks)).sum();
    let mut report = json!({
        "container": { "unique_id": uuid_text(&image::unique_id(file)?), "payload_bytes": layout.payload },
        "headers": [slot(0), slot(1)],
        "bytes_in_use": used * BLOCK as u64,
        "zero_metadata_key": layout.has_zero_metadata_key(file)?,
        "table": layout.table.files().map(|(id, e)| json!({
            "id": id.number(),
            "name": id.name(),
            "bytes": e.valid,
            "block": e.block,
            "encrypted_as_the_table_says": e.attributes & ENCRYPTED != 0,
        })).collect::<Vec<_>>(),
        "vtpm_mode": "host-served",
        "trust": crate::service::TRUST,
    });
    if key.is_some() || !layout.header.encrypted {
        let extended = image::unlock(file, &layout, key)?;
        let root = image::read_root(file, &layout, &extended)?;
        report["root"] = json!({
            "image": uuid_text(&root.image),
            "vm": uuid_text(&root.vm),
            "generation": root.generation,
            "flags": flags(&root),
        });
        let nvram = image::read_file(file, &layout.table, &extended, FileId::BIOS_NVRAM);
        report["uefi_variables"] = match nvram.map(|bytes| uefi::parse(&bytes)) {
            Ok(Ok(variables)) => variables
                .iter()
                .map(|v| json!({ "name": v.name_text(), "bytes": v.data.len(), "attributes": v.attributes }))
                .collect(),
            Ok(Err(e)) => json!({ "fault": e.to_string() }),
            Err(VmgsError::NotFound(_)) => json!([]),
            Err(e) => return Err(e),
        };
    }
    Ok(report)
}

/// What can be proved; each failed step ends the chain, because the next one would build on it.
pub(super) fn check(file: &FsFile, key: Option<&Key>, anchors: &AnchorFolder) -> Value {
    let mut proved: Vec<String> = Vec::new();
    let mut failed: Vec<String> = Vec::new();
    let mut open: Vec<String> = Vec::new();
    if let Err(e) = check_chain(file, key, anchors, &mut proved, &mut open) {
        failed.push(e.to_string());
    }
    json!({ "proved": proved, "not_proved": open, "failed": failed })
}

fn check_chain(
    file: &FsFile,
    key: Option<&Key>,
    anchors: &AnchorFolder,
    proved: &mut Vec<String>,
    open: &mut Vec<String>,
) -> Result<(), VmgsError> {
    let layout = Layout::read(file)?;
    proved.push("container, headers and file table are well formed, in range and disjoint".into());
    match &layout.headers.slots[1 - layout.headers.active] {
        Ok(h) if h.keys != layout.header.keys => {
            open.push(
                "the inactive header wraps other keys: normal after a write, but after a rekey run it again"
                    .into(),
            );
        }
        Ok(_) => proved.push("both headers carry the same wrapped key".into()),
        Err(fault) if layout.headers.may_be_older() => {
            open.push(format!("the inactive header slot {fault}: it may have been the newer one"));
        }
        Err(_) => {}
    }
    if layout.has_zero_metadata_key(file)? {
        return Err(VmgsError::ZeroMetadataKey);
    }
    if layout.header.encrypted {
        proved.push("the file tables do not open with the zero key".into());
    }
    if layout.header.encrypted && key.is_none() {
        open.push("without the key: that any file is genuine, present, or the newest".into());
        return Ok(());
    }
    let extended = image::unlock(file, &layout, key)?;
    image::check_files(&layout, &extended, false)?;
    proved.push(
        "the key opens the image; no encrypted file was removed and no plain-text file was planted".into(),
    );
    let root = image::read_root(file, &layout, &extended)?;
    image::compare(file, &layout, &extended, &root)?.refuse()?;
    proved.push(format!(
        "every file is authentic and listed in the integrity root of generation {}",
        root.generation
    ));
    if root.flags & FLAG_DISCLOSED != 0 {
        open.push("secrecy: the contents were readable without a key before they were repaired".into());
    }
    if root.flags & FLAG_EXPORTED != 0 {
        open.push("uniqueness: the TPM's state has left this image at least once".into());
    }
    if !anchors.record_path(&root.image).exists() {
        open.push(format!("freshness: no anchor record in {}", anchors.path.display()));
        return Ok(());
    }
    let expectation = anchors.lease(&root.image)?.expectation()?;
    match expectation {
        Some(e) if e.accepts(&root.mark()) => proved.push("it is the copy that the anchor expects".into()),
        Some(e) => {
            return Err(VmgsError::StaleGeneration { have: root.generation, want: e.in_words() });
        }
        None => open.push("freshness: the anchor record is empty".into()),
    }
    Ok(())
}

/// Any report as indented text.
pub(super) fn as_text(report: &Value) -> String {
    let mut out = String::new();
    write(report, 0, &mut out);
    out
}

fn write(value: &Value, depth: usize, out: &mut String) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            for (name, v) in map {
                let name = name.replace('_', " ");
                if v.is_object() || v.is_array() {
                    out.push_str(&format!("{pad}{name}:\n"));
                    write(v, depth + 1, out);
                } else {
                    out.push_str(&format!("{pad}{name}: {}\n", scalar(v)));
                }
            }
        }
        Value::Array(list) if list.is_empty() => out.push_str(&format!("{pad}-\n")),
        Value::Array(list) => {
            for v in list {
                match v {
                    Value::Object(map) => {
                        let line: Vec<String> =
                            map.iter().map(|(k, v)| format!("{k}={}", scalar(v))).collect();
                        out.push_str(&format!("{pad}- {}\n", line.join(" ")));
                    }
                    v => out.push_str(&format!("{pad}- {}\n", scalar(v))),
                }
            }
        }
        Value::Null => {}
        v => out.push_str(&format!("{pad}{}\n", scalar(v))),
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => "-".into(),
        v => v.to_string(),
    }
}
