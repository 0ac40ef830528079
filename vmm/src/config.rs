// SPDX-License-Identifier: Apache-2.0
//! What a user may ask for, checked once. Every error names the option, what was found, and what to do.

use std::fs::File;
use std::io;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use snp::image::direct::ImageError;
use snp::image::kernel::Kernel;
use snp::image::kernel::KernelError;

/// Largest kernel or initrd that is read, in bytes.
const FILE_LIMIT: u64 = 4 << 30;

/// A request that cannot be carried out as it stands.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that cannot be read.
    #[error("{option} {path}: {problem}")]
    File {
        /// The option that named it.
        option: &'static str,
        /// The path as given.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A kernel that is not one.
    #[error("--kernel {path}: {source}")]
    Kernel {
        /// The path as given.
        path: PathBuf,
        /// What was found.
        source: KernelError,
    },
    /// Kernel, initrd, command line, memory and vCPUs do not go together.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Something else about an option.
    #[error("{0}")]
    Option(String),
}

/// Reads a file that an option named: a regular file or a pipe, to a limit. A launch owns its bytes: a file that is changed or cut
/// short later changes nothing, and a restart launches the same.
pub fn read_file(option: &'static str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    read_limited(option, path, FILE_LIMIT)
}

fn read_limited(option: &'static str, path: &Path, limit: u64) -> Result<Vec<u8>, ConfigError> {
    let fail = |problem: String| ConfigError::File { option, path: path.to_owned(), problem };
    let why = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => "no such file".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "permission denied: the file must be readable by this user".to_owned()
        }
        _ => e.to_string(),
    };
    let file = File::open(path).map_err(|e| fail(why(e)))?;
    let meta = file.metadata().map_err(|e| fail(why(e)))?;
    let kind = meta.file_type();
    if kind.is_dir() {
        return Err(fail("is a directory, a file is needed".to_owned()));
    }
    if kind.is_char_device() || kind.is_block_device() {
        return Err(fail("is a device, a file is needed".to_owned()));
    }
    let too_long =
        |found: String| fail(format!("has {found} bytes, more than the limit of {} MiB", limit >> 20));
    if meta.len() > limit {
        return Err(too_long(meta.len().to_string()));
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    // A pipe has no length, and a file may grow.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| fail(why(e)))?;
    if bytes.len() as u64 > limit {
        return Err(too_long(format!("at least {}", bytes.len())));
    }
    Ok(bytes)
}

/// The files of a direct boot, read and parsed.
#[derive(Clone, Debug)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: Kernel,
    /// The initrd, if any.
    pub initrd: Option<Arc<Vec<u8>>>,
}

impl BootFiles {
    /// Reads both.
    pub fn read(kernel: &Path, initrd: Option<&Path>) -> Result<Self, ConfigError> {
        let bytes = read_file("--kernel", kernel)?;
        let kernel =
            Kernel::parse(bytes).map_err(|source| ConfigError::Kernel { path: kernel.to_owned(), source })?;
        let initrd = initrd.map(|path| read_file("--initrd", path).map(Arc::new)).transpose()?;
        Ok(BootFiles { kernel, initrd })
    }
}

/// Parses a size such as `512M` or `4G`; without a suffix it is in bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        other => return Err(format!("unknown unit '{other}', expected K, M, G or T (powers of 1024)")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("'{text}' is not a size, expected a number such as 512M or 4G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is larger than 64 bits"))
}

/// Parses 32 bytes in hexadecimal, for `--host-data`.
pub fn parse_hex32(text: &str) -> Result<[u8; 32], String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!("expected 64 hexadecimal digits (32 bytes), found {} characters", digits.len()));
    }
    let mut bytes = [0; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).map_err(|e| e.to_string())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4g"), Ok(4 << 30));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "M", "-1M", "1.5G", "12X", "99999999999T", "0x10M"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn no_more_than_the_limit_is_read_whatever_the_file_is() {
        const LIMIT: u64 = 1 << 20;
        let folder = tempfile::tempdir().unwrap();
        let read = |path: &Path| read_limited("--kernel", path, LIMIT).map_err(|e| e.to_string());
        let device = read(Path::new("/dev/zero")).unwrap_err();
        assert!(device.ends_with("/dev/zero: is a device, a file is needed"), "{device}");
        let sparse = folder.path().join("sparse");
        File::create(&sparse).unwrap().set_len(LIMIT + 1).unwrap();
        assert!(read(&sparse).unwrap_err().contains("has 1048577 bytes"));
        File::create(&sparse).unwrap().set_len(LIMIT).unwrap();
        assert_eq!(read(&sparse).map(|bytes| bytes.len() as u64), Ok(LIMIT));
        // Files of /proc say that they have no bytes, as pipes do.
        assert!(!read(Path::new("/proc/self/maps")).unwrap().is_empty());
        let pipe = |len: u64| {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader)));
            let source = std::thread::spawn(move || {
                let zeros = vec![0; len as usize];
                let _ = io::Write::write_all(&mut File::from(writer), &zeros);
            });
            let result = read(&path).map(|bytes| bytes.len() as u64);
            drop(reader);
            source.join().unwrap();
            result
        };
        assert_eq!(pipe(LIMIT), Ok(LIMIT));
        assert!(pipe(LIMIT * 4).unwrap_err().contains("has at least 1048577 bytes"));
    }

    #[test]
    fn host_data_is_exactly_32_bytes() {
        assert_eq!(parse_hex32(&"a5".repeat(32)), Ok([0xa5; 32]));
        for bad in ["", "a5", &"a5".repeat(33), &"zz".repeat(32), &"é".repeat(32)] {
            assert!(parse_hex32(bad).is_err(), "{bad}");
        }
    }
}
