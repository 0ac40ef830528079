// SPDX-License-Identifier: Apache-2.0
//! Why the engine did not do what it was asked, with the library's codes in words.

/// Why the engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The shared library is missing or too old.
    #[error("cannot load libtpms ({0}); install it (Debian: `apt-get install libtpms0`)")]
    NoLibrary(String),
    /// The library's version is below the oldest that distributions still mend.
    #[error(
        "libtpms {0}.{1}.{2} is too old; 0.9.2 with your distribution's fixes is the oldest that this service accepts"
    )]
    TooOld(u32, u32, u32),
    /// There is one TPM per process.
    #[error("this process already has a TPM")]
    Taken,
    /// The library returned an error code.
    #[error("libtpms answered {words} ({0:#x})", words = result_words(*.0))]
    Refused(u32),
    /// Not possible in this state.
    #[error("the TPM is {0}")]
    State(&'static str),
}

fn result_words(code: u32) -> &'static str {
    match code {
        0x03 => "bad parameter",
        0x09 => "failure",
        0x0a => "bad ordinal",
        0x11 => "out of memory",
        0x15 => "short buffer",
        0x17 => "no space",
        0x1f => "i/o error",
        0x101 => "failure mode",
        0x800 => "retry",
        _ => "an error",
    }
}
