// SPDX-License-Identifier: Apache-2.0
//! Tests of the rules that stage0 enforces, on the code that runs in the guest.

use super::*;

#[test]
fn the_small_sha384_agrees_with_the_sha2_crate_around_every_block_boundary() {
    let data: Vec<u8> = (0..1024u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
    for len in 0..data.len() {
        assert_eq!(sha384::sha384(&data[..len]), item_hash(&data[..len]), "{len} bytes");
    }
}
