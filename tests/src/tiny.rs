// SPDX-License-Identifier: Apache-2.0
//! A guest of a few hundred bytes, for measuring monitors instead of kernels: an ELF file with a PVH entry that writes one
//! byte to the serial port and halts.
//!
//! The entry is found by a Xen ELF note of type 18, `XEN_ELFNOTE_PHYS32_ENTRY` (xen/include/public/elfnote.h), and begins in
//! 32-bit protected mode with flat segments (docs/misc/pvh.pandoc). Every monitor that boots PVH takes the same file.

/// The byte that the guest writes.
pub const BYTE: u8 = b'!';

/// Physical address of the code.
const LOAD: u64 = 0x10_0000;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const NOTE: usize = HEADER + 2 * PROGRAM_HEADER;

/// The file.
pub fn pvh_guest() -> Vec<u8> {
    let code = [
        0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
        0xb0, BYTE, // mov al, BYTE
        0xee, // out dx, al
        0xfa, // cli
        0xf4, // hlt
        0xeb, 0xfd, // jmp to the hlt
    ];
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&(LOAD as u32).to_le_bytes());
    let code_at = NOTE + note.len();

    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2u16, 62] {
        file.extend_from_slice(&half.to_le_bytes()); // executable, x86-64
    }
    file.extend_from_slice(&1u32.to_le_bytes());
    for long in [LOAD, HEADER as u64, 0] {
        file.extend_from_slice(&long.to_le_bytes()); // entry, program headers, no section headers
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    program_header(&mut file, 4, 4, NOTE, 0, note.len());
    program_header(&mut file, 1, 5, code_at, LOAD, code.len());
    file.extend_from_slice(&note);
    file.extend_from_slice(&code);
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, flags: u32, offset: usize, address: u64, size: usize) {
    file.extend_from_slice(&kind.to_le_bytes());
    file.extend_from_slice(&flags.to_le_bytes());
    for long in [offset as u64, address, address, size as u64, size as u64, 4] {
        file.extend_from_slice(&long.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readelf_sees_two_segments_and_the_note() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny");
        std::fs::write(&path, pvh_guest()).unwrap();
        let output = std::process::Command::new("readelf").args(["-l", "-n"]).arg(&path).output();
        let Ok(output) = output else {
            eprintln!("readelf is not installed: nothing to compare with");
            return;
        };
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("Entry point 0x100000"), "{text}");
        assert!(text.contains("LOAD") && text.contains("NOTE"), "{text}");
        assert!(text.contains("Xen"), "{text}");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
