// SPDX-License-Identifier: Apache-2.0
//! The VMSA encoder against the structure of the `igvm` crate, which was written by other people for the same
//! page.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use igvm::snp_defs::SevFeatures;
use igvm::snp_defs::SevSelector;
use igvm::snp_defs::SevVmsa;
use proptest::prelude::*;
use snp::vmsa::Segment;
use snp::vmsa::VmsaState;
use zerocopy::FromZeros as _;
use zerocopy::IntoBytes as _;

/// The same registers in the other structure; fields that are not named stay zero.
fn theirs(s: &VmsaState) -> SevVmsa {
    let segment =
        |s: &Segment| SevSelector { selector: s.selector, attrib: s.attrib, limit: s.limit, base: s.base };
    let mut v = SevVmsa::new_zeroed();
    (v.es, v.cs, v.ss) = (segment(&s.es), segment(&s.cs), segment(&s.ss));
    (v.ds, v.fs, v.gs) = (segment(&s.ds), segment(&s.fs), segment(&s.gs));
    (v.gdtr, v.ldtr, v.idtr, v.tr) = (segment(&s.gdtr), segment(&s.ldtr), segment(&s.idtr), segment(&s.tr));
    v.cpl = s.cpl;
    (v.efer, v.cr4, v.cr3, v.cr0) = (s.efer, s.cr4, s.cr3, s.cr0);
    (v.dr7, v.dr6, v.rflags, v.rip) = (s.dr7, s.dr6, s.rflags, s.rip);
    v.pat = s.g_pat;
    (v.rax, v.rcx, v.rdx, v.rbx) = (s.rax, s.rcx, s.rdx, s.rbx);
    (v.rsp, v.rbp, v.rsi, v.rdi) = (s.rsp, s.rbp, s.rsi, s.rdi);
    [v.r8, v.r9, v.r10, v.r11, v.r12, v.r13, v.r14, v.r15] = s.r8_r15;
    v.sev_features = SevFeatures::from_bits(s.sev_features);
    v.xcr0 = s.xcr0;
    v.mxcsr = s.mxcsr;
    v.x87_fcw = s.x87_fcw;
    v
}

fn check(state: &VmsaState) -> bool {
    let page = state.encode();
    let theirs = theirs(state);
    let bytes = theirs.as_bytes();
    page[..bytes.len()] == *bytes && page[bytes.len()..].iter().all(|b| *b == 0)
}

#[test]
fn the_reset_state_is_laid_out_as_others_lay_it_out() {
    assert!(check(&VmsaState::reset()));
}

fn any_segment() -> impl Strategy<Value = Segment> {
    any::<(u16, u16, u32, u64)>()
        .prop_map(|(selector, attrib, limit, base)| Segment::new(selector, attrib, limit, base))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Every field gets a value of its own, so that no two can be swapped unnoticed.
    #[test]
    fn every_register_is_where_others_put_it(
        segments in proptest::collection::vec(any_segment(), 10),
        words in proptest::collection::vec(any::<u64>(), 28),
        (cpl, mxcsr, x87_fcw) in any::<(u8, u32, u16)>(),
    ) {
        let s = |i: usize| segments[i];
        let w = |i: usize| words[i];
        let state = VmsaState {
            es: s(0), cs: s(1), ss: s(2), ds: s(3), fs: s(4), gs: s(5), gdtr: s(6), ldtr: s(7), idtr: s(8), tr: s(9),
            cpl, efer: w(0), cr4: w(1), cr3: w(2), cr0: w(3), dr7: w(4), dr6: w(5), rflags: w(6), rip: w(7),
            g_pat: w(8), rax: w(9), rcx: w(10), rdx: w(11), rbx: w(12), rsp: w(13), rbp: w(14), rsi: w(15), rdi: w(16),
            r8_r15: words[17..25].try_into().unwrap(), sev_features: w(25), xcr0: w(26), mxcsr, x87_fcw,
        };
        prop_assert!(check(&state));
    }
}
