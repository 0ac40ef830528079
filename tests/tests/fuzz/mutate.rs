// SPDX-License-Identifier: Apache-2.0
//! How a valid input is changed: bits, numbers, lengths, pieces.

use std::ops::Range;

/// Longest input that changes make.
const LONGEST: usize = 4 << 20;

/// A small generator (SplitMix64): the same seed gives the same cases everywhere.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, 0 if that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() >> 1) as usize % end.max(1)
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// A place in `input`, which is not empty; three times of four in one of its fields.
fn place(rng: &mut Rng, input: &[u8], fields: &[Range<usize>]) -> usize {
    let field = fields.get(rng.below(fields.len())).filter(|_| !rng.one_in(4));
    let field = field.map(|field| field.start..field.end.min(input.len())).filter(|field| !field.is_empty());
    let range = field.unwrap_or(0..input.len());
    range.start + rng.below(range.len())
}

/// A number at which parsers go wrong.
fn extreme(rng: &mut Rng, len: usize) -> u64 {
    let base = match rng.below(6) {
        0 => 0,
        1 => 1 << rng.below(64),
        2 => u64::MAX >> rng.below(64),
        3 => len as u64,
        4 => 0x1000 * rng.below(64) as u64,
        _ => rng.next() >> rng.below(64),
    };
    base.wrapping_add(rng.below(5) as u64).wrapping_sub(2)
}

/// Replaces the number of 1, 2, 4 or 8 bytes at a place, in either byte order.
fn number(rng: &mut Rng, input: &mut [u8], at: usize) {
    let size = (1 << rng.below(4)).min(input.len() - at);
    // Fields lie at multiples of their size more often than not.
    let at = if rng.one_in(2) { at - at % size } else { at };
    let big = rng.one_in(4);
    let field = &mut input[at..at + size];
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(field);
    if big {
        bytes[..size].reverse();
    }
    let value = if rng.one_in(3) {
        let step = 1 + rng.below(16) as u64;
        let old = u64::from_le_bytes(bytes);
        if rng.one_in(2) { old.wrapping_add(step) } else { old.wrapping_sub(step) }
    } else {
        extreme(rng, field.len())
    };
    bytes = value.to_le_bytes();
    if big {
        bytes[..size].reverse();
    }
    field.copy_from_slice(&bytes[..size]);
}

/// Changes `input` one to sixteen times, once in half of the cases; pieces come from `other`.
pub fn mutate(rng: &mut Rng, input: &mut Vec<u8>, fields: &[Range<usize>], other: &[u8]) {
    let changes = if rng.one_in(2) { 1 } else { 2 + rng.below(15) };
    for _ in 0..changes {
        if input.is_empty() {
            input.push(rng.next() as u8);
            continue;
        }
        let at = place(rng, input, fields);
        let longest = 2 << rng.below(8);
        let piece = 1 + rng.below(longest);
        match rng.below(32) {
            0..8 => input[at] ^= 1 << rng.below(8),
            8..12 => input[at] = rng.next() as u8,
            12..22 => number(rng, input, at),
            22 => input.truncate(at),
            23 => {
                let len = input.len().saturating_sub(rng.below(64));
                input.truncate(len);
            }
            24 => drop(input.drain(at..(at + piece).min(input.len()))),
            25 if input.len() < LONGEST => {
                let fill = rng.next() as u8;
                let bytes: Vec<u8> =
                    (0..piece).map(|_| if fill & 1 == 0 { fill } else { rng.next() as u8 }).collect();
                input.splice(at..at, bytes);
            }
            26 if input.len() < LONGEST => {
                let copy = input[at..(at + piece).min(input.len())].to_vec();
                let to = place(rng, input, fields);
                input.splice(to..to, copy);
            }
            27 | 28 => {
                let from = place(rng, input, fields);
                let len = piece.min(input.len() - at.max(from));
                input.copy_within(from..from + len, at);
            }
            29 if !other.is_empty() => {
                let from = at.min(other.len() - 1);
                let len = piece.min(other.len() - from).min(input.len() - at);
                input[at..at + len].copy_from_slice(&other[from..from + len]);
            }
            30 if input.len() < LONGEST => {
                // The start of one and the end of another.
                input.truncate(at);
                input.extend_from_slice(&other[at.min(other.len())..]);
            }
            _ => {
                let end = (at + piece).min(input.len());
                input[at..end].fill(0);
            }
        }
    }
}
