// SPDX-License-Identifier: Apache-2.0
//! A plan written out, so that a program in another language can compute its digest from first principles.
//!
//! Two streams. One holds JSON lines in launch order, one object each:
//!
//! - `{"kind":"pages","name":"kernel","type":"normal","page_type":1,"gpa":16777216,"len":4096,"offset":0,"bytes":4000}`:
//!   a run of pages. `len` bytes from guest-physical address `gpa`; their first `bytes` bytes are at `offset`
//!   of the other stream, the rest is zero. `type` is a name and `page_type` the firmware's number for it.
//! - `{"kind":"vcpu","index":0,"page_type":2,"gpa":281474976706560,"len":4096,"offset":4000,"bytes":4096}`: a
//!   vCPU's save area, with the address under which it is measured. These come last, in vCPU order.
//!
//! The other stream holds the contents, one after the other. The digest is computed from both as
//! [`crate::digest`] says; this module computes none of it.

use std::io;
use std::io::Write;

use super::LaunchPlan;
use super::PAGE_SIZE;
use super::PageType;
use crate::vmsa::VMSA_GPA;

#[derive(serde::Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line<'a> {
    Pages { name: &'a str, r#type: PageType, page_type: u8, gpa: u64, len: u64, offset: u64, bytes: u64 },
    Vcpu { index: usize, page_type: u8, gpa: u64, len: u64, offset: u64, bytes: u64 },
}

impl LaunchPlan {
    /// Writes the plan's description to `lines` and its contents to `contents`.
    pub fn dump(&self, lines: &mut impl Write, contents: &mut impl Write) -> io::Result<()> {
        let mut offset = 0;
        for record in &self.records {
            let data = record.contents.as_slice();
            let bytes = data.len() as u64;
            contents.write_all(data)?;
            let (r#type, page_type) = (record.page_type, record.page_type as u8);
            let (gpa, len) = (record.gpa, record.len);
            let line = Line::Pages { name: &record.name, r#type, page_type, gpa, len, offset, bytes };
            write_line(lines, &line)?;
            offset += bytes;
        }
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            contents.write_all(&vcpu.encode())?;
            let (page_type, gpa, len) = (PageType::Vmsa as u8, VMSA_GPA, PAGE_SIZE);
            write_line(lines, &Line::Vcpu { index, page_type, gpa, len, offset, bytes: len })?;
            offset += len;
        }
        Ok(())
    }
}

fn write_line(lines: &mut impl Write, line: &Line<'_>) -> io::Result<()> {
    serde_json::to_writer(&mut *lines, line)?;
    lines.write_all(b"\n")
}
