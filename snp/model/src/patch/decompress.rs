// SPDX-License-Identifier: Apache-2.0
//! The kernel inside a bzImage, decompressed: zstd, xz, gzip and LZ4 (legacy frames).
//!
//! The payload's last four bytes are the decompressed size, little-endian: appended by the kernel's build,
//! or, for gzip, the format's own trailer. The size is checked against [`MAX_DECOMPRESSED`] and against the
//! payload's own length before anything is decompressed, and nothing beyond it is ever produced, so a crafted
//! payload cannot take all memory. A memory limit for the formats' dictionaries does the rest.

use std::io::Read;

use snp::image::kernel::BzImage;

/// Largest decompressed kernel in bytes. Debian's are about 60 MiB.
pub const MAX_DECOMPRESSED: u64 = 512 << 20;
/// Largest ratio of the decompressed kernel to the compressed one, beside [`ALWAYS`]. Real kernels have 3
/// (LZ4) to 8 (xz).
const MAX_RATIO: u64 = 12;
/// A kernel of this size may be compressed as well as it can be: bytes.
const ALWAYS: u64 = 4 << 20;
/// Largest dictionary or window that a decompressor may take. The kernel's build uses up to 128 MiB.
const MAX_WINDOW: u64 = 256 << 20;

/// Formats that the kernel's build offers, with their first bytes.
const MAGICS: [(&[u8], Format); 7] = [
    (b"\x28\xb5\x2f\xfd", Format::Zstd),
    (b"\xfd7zXZ\0", Format::Xz),
    (b"\x1f\x8b", Format::Gzip),
    (b"\x02\x21\x4c\x18", Format::Lz4),
    (b"BZh", Format::Unsupported("bzip2")),
    (b"\x5d\0\0", Format::Unsupported("lzma")),
    (b"\x89LZO", Format::Unsupported("lzo")),
];

#[derive(Clone, Copy)]
enum Format {
    Zstd,
    Xz,
    Gzip,
    Lz4,
    Unsupported(&'static str),
}

/// Why a payload cannot be decompressed. Offsets are in bytes from the start of the kernel file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum DecompressError {
    /// No known signature.
    #[error(
        "the compressed kernel at offset {offset:#x} begins with {found:02x?}: \
         not zstd, xz, gzip or LZ4; use a kernel compressed by one of these, or its vmlinux"
    )]
    UnknownFormat { offset: usize, found: Vec<u8> },
    /// A format of the kernel's build that is not supported.
    #[error("the kernel is compressed by {0}; use one compressed by zstd, xz, gzip or LZ4, or its vmlinux")]
    Unsupported(&'static str),
    /// Too large.
    #[error(
        "the last four bytes of the compressed kernel say that it has {size} bytes, expected at most {limit}, as kernels have \
         that are compressed to this length"
    )]
    TooLarge { limit: u64, size: u64 },
    /// The stream itself is broken.
    #[error("the compressed kernel at offset {offset:#x} does not decompress: {reason}")]
    Broken { offset: usize, reason: String },
    /// The stream holds another number of bytes than the file says.
    #[error("the compressed kernel decompresses to {found} bytes, but its last four bytes say {expected}")]
    SizeMismatch {
        expected: u64,
        /// As decompressed; at most one more than expected.
        found: u64,
    },
}

/// Decompresses the kernel inside `image`: an ELF image, perhaps with relocations behind it.
pub fn extract_vmlinux(image: &BzImage) -> Result<Vec<u8>, DecompressError> {
    let offset = image.payload.start;
    let payload = &image.file[image.payload.clone()];
    let format = MAGICS.iter().find(|(magic, _)| payload.starts_with(magic)).map(|(_, format)| *format);
    let format = format.ok_or_else(|| DecompressError::UnknownFormat {
        offset,
        found: payload.iter().take(8).copied().collect(),
    })?;
    if let Format::Unsupported(name) = format {
        return Err(DecompressError::Unsupported(name));
    }
    let broken = |reason: String| DecompressError::Broken { offset, reason };
    let (stream, size) = payload.split_last_chunk().ok_or_else(|| broken("shorter than its size".into()))?;
    let size = u64::from(u32::from_le_bytes(*size));
    let limit = (payload.len() as u64 * MAX_RATIO).clamp(ALWAYS, MAX_DECOMPRESSED);
    if size > limit {
        return Err(DecompressError::TooLarge { limit, size });
    }
    let out = match format {
        Format::Zstd => {
            let mut decoder = ruzstd::decoding::FrameDecoder::new();
            decoder.set_max_window_size(MAX_WINDOW);
            let stream = ruzstd::decoding::StreamingDecoder::new_with_decoder(stream, decoder);
            collect(stream.map_err(|e| broken(e.to_string()))?, size)
        }
        Format::Xz => {
            collect(lzma_rust2::XzReader::new_mem_limit(stream, false, (MAX_WINDOW >> 10) as u32), size)
        }
        // The size is part of gzip's own trailer.
        Format::Gzip => collect(flate2::read::GzDecoder::new(payload), size),
        Format::Lz4 | Format::Unsupported(_) => collect(lz4_flex::frame::FrameDecoder::new(stream), size),
    }
    .map_err(|e| broken(e.to_string()))?;
    let found = out.len() as u64;
    if found == size { Ok(out) } else { Err(DecompressError::SizeMismatch { expected: size, found }) }
}

/// Reads `size` bytes, and one more if there is one.
fn collect(stream: impl Read, size: u64) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::new();
    stream.take(size + 1).read_to_end(&mut out)?;
    Ok(out)
}
