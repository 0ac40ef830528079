// SPDX-License-Identifier: Apache-2.0
//! A guest of a few hundred bytes, for measuring monitors instead of kernels: an ELF file with a PVH entry
//! that writes one byte to the serial port and halts.
//!
//! The entry is found by a Xen ELF note of type 18, `XEN_ELFNOTE_PHYS32_ENTRY`
//! (xen/include/public/elfnote.h), and begins in 32-bit protected mode with flat segments
//! (docs/misc/pvh.pandoc). Every monitor that boots PVH takes the same file.

use test_support::elf;
use test_support::elf::Segment;

/// The byte that the guest writes.
pub const BYTE: u8 = b'!';

/// Physical address of the code.
const LOAD: u64 = 0x10_0000;

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
    elf::executable(LOAD, &[Segment::flat(LOAD, code.to_vec())], &[], &elf::pvh_note(LOAD as u32))
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
