// SPDX-License-Identifier: Apache-2.0
//! Strangers' texts, as they may be shown.

/// The text with everything replaced that could move a terminal's cursor: certificates come from strangers, and a name must not
/// be able to paint another verdict over ours.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '\u{fffd}' }).collect()
}
