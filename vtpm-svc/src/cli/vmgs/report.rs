// SPDX-License-Identifier: Apache-2.0
//! Reports on an image: one JSON value each, and a plain-text form of any of them.

use serde_json::Value;
use serde_json::json;

use crate::vmgs::AnchorFolder;
use crate::vmgs::FileId;
use crate::vmgs::Finding;
use crate::vmgs::FsFile;
use crate::vmgs::Key;
use crate::vmgs::View;
use crate::vmgs::VmgsError;
use crate::vmgs::anchor::AnchorError;
use crate::vmgs::anchor::Known;
use crate::vmgs::findings::Accept;
use crate::vmgs::findings::ZeroKey;
use crate::vmgs::findings::sentences;
use crate::vmgs::format::BLOCK;
use crate::vmgs::format::ENCRYPTED;
use crate::vmgs::format::SCRUB_PENDING;
use crate::vmgs::image;
use crate::vmgs::image::Layout;
use crate::vmgs::mark::uuid_text;
use crate::vmgs::root::FLAG_DISCLOSED;
use crate::vmgs::root::FLAG_EXPORTED;
use crate::vmgs::root::FLAG_PROVISIONED;
use crate::vmgs::root::Root;
use crate::vmgs::uefi;
use crate::vmgs::view::RootState;
use crate::vmgs::zero_key;

/// Files of an image.
pub(super) fn files(list: &[(FileId, u64, bool)]) -> Vec<Value> {
    list.iter()
        .map(|(id, bytes, encrypted)| {
            json!({ "id": id.number(), "name": id.name(), "bytes": bytes, "encrypted": encrypted })
        })
        .collect()
}

/// What a look without the anchor cannot vouch for.
pub(super) fn not_proved(view: &View) -> Vec<String> {
    let mut out = sentences(&view.findings);
    out.push("that this is the newest copy (`vmgs check` asks the anchor)".into());
    out
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

/// What can be seen, and with the key what there is behind it.
pub(super) fn inspect(file: &FsFile, key: Option<&Key>) -> Result<(Value, Option<View>), VmgsError> {
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
    let zero = zero_key::find(file, &layout)?;
    let mut report = json!({
        "container": { "unique_id": uuid_text(&image::unique_id(file)?), "payload_bytes": layout.payload },
        "headers": [slot(0), slot(1)],
        "bytes_in_use": used * BLOCK as u64,
        "zero_metadata_key": zero == Some(ZeroKey::Active),
        "open_to_anyone": zero.map(|place| place.to_string()),
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
    if key.is_none() && layout.header.encrypted {
        return Ok((report, None));
    }
    let view = View::read(file, key)?;
    report["not_proved"] = not_proved(&view).into();
    report["root"] = match view.state {
        RootState::Proven(_) => json!({
            "image": uuid_text(&view.root.image),
            "vm": uuid_text(&view.root.vm),
            "generation": view.root.generation,
            "flags": flags(&view.root),
        }),
        _ => Value::Null,
    };
    let nvram = view.read_file(file, FileId::BIOS_NVRAM);
    report["uefi_variables"] = match nvram.map(|bytes| uefi::parse(&bytes)) {
        Ok(Ok(variables)) => variables
            .iter()
            .map(|v| json!({ "name": v.name_text(), "bytes": v.data.len(), "attributes": v.attributes }))
            .collect(),
        Ok(Err(e)) => json!({ "fault": e.to_string() }),
        Err(VmgsError::NotFound(_)) => json!([]),
        Err(e) => json!({ "fault": e.to_string() }),
    };
    Ok((report, Some(view)))
}

/// What can be proved. Each step builds on the one before; the files' own faults are told side by side.
pub(super) fn check(file: &FsFile, key: Option<&Key>, anchors: &AnchorFolder) -> (Value, Option<View>) {
    let mut said = Said::default();
    let mut seen = None;
    if let Err(e) = check_chain(file, key, anchors, &mut said, &mut seen) {
        said.failed.push(e.to_string());
    }
    (json!({ "proved": said.proved, "not_proved": said.open, "failed": said.failed }), seen)
}

#[derive(Default)]
struct Said {
    proved: Vec<String>,
    open: Vec<String>,
    failed: Vec<String>,
}

fn check_chain(
    file: &FsFile,
    key: Option<&Key>,
    anchors: &AnchorFolder,
    said: &mut Said,
    seen: &mut Option<View>,
) -> Result<(), VmgsError> {
    let layout = Layout::read(file)?;
    said.proved.push("container, headers and file table are well formed, in range and disjoint".into());
    match &layout.headers.slots[1 - layout.headers.active] {
        Ok(h) if h.keys != layout.header.keys => said.open.push(
            "that no older key opens the file: the inactive header wraps other keys, which is normal after a write; after \
             a rekey, run it again"
                .into(),
        ),
        Ok(_) => said.proved.push("both headers carry the same wrapped key".into()),
        Err(_) => {}
    }
    if layout.header.encrypted && key.is_none() {
        if layout.header.markers & SCRUB_PENDING != 0 {
            said.open.push(Finding::ScrubPending.to_string());
        }
        match zero_key::find(file, &layout)? {
            Some(place) => said.failed.push(Finding::ZeroKey(place).to_string()),
            None => said.proved.push("no table in the file opens with the zero key".into()),
        }
        said.open.push("without the key: that any file is genuine, present, or the newest".into());
        return Ok(());
    }
    let view = &*seen.insert(View::read(file, key)?);
    let (faults, odd): (Vec<&Finding>, Vec<&Finding>) = view.findings.iter().partition(|f| {
        matches!(f, Finding::Damaged(..) | Finding::Malformed(..))
            || f.unsettles(&Accept::default())
            || matches!(f, Finding::FooterId { .. })
    });
    said.open.extend(sentences(odd));
    if layout.header.encrypted && !faults.iter().any(|f| matches!(f, Finding::ZeroKey(_))) {
        said.proved.push("the key opens the image, and no table in the file opens with the zero key".into());
    }
    said.failed.extend(sentences(faults.iter().copied()));
    if faults.is_empty() {
        said.proved.push(format!(
            "every file is authentic and listed in the integrity root of generation {}",
            view.root.generation
        ));
    }
    if view.root.flags & FLAG_DISCLOSED != 0 {
        said.open.push("secrecy: the contents were readable without a key before they were repaired".into());
    }
    if view.root.flags & FLAG_EXPORTED != 0 {
        said.open.push("uniqueness: the TPM's state has left this image at least once".into());
    }
    let RootState::Proven(mark) = view.state else { return Ok(()) };
    match anchors.look(&view.root.image)? {
        Known::Record(e) if e.accepts(&mark, &view.root.previous) => {
            said.proved.push("it is the copy that the anchor expects".into());
        }
        Known::Record(e) => {
            let (have, want, folder) = (mark.generation, e.in_words(), anchors.path.display().to_string());
            return Err(if have > e.highest {
                VmgsError::AheadOfAnchor { have, want, folder }
            } else {
                VmgsError::StaleGeneration { have, want, folder }
            });
        }
        Known::Damaged => {
            return Err(AnchorError::Damaged(anchors.record_path(&view.root.image)).into());
        }
        Known::Nothing => {
            said.open.push(format!("freshness: no anchor record in {}", anchors.path.display()))
        }
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
        Value::Array(list) if list.is_empty() => out.push_str(&format!("{pad}nothing\n")),
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
