// SPDX-License-Identifier: Apache-2.0
//! The record of an image's history: who is accepted, what is durable, and what another instance can do in
//! between.
#![allow(clippy::panic)]

use super::*;

thread_local! {
    static BETWEEN: std::cell::RefCell<Option<Box<dyn FnOnce()>>> = const { std::cell::RefCell::new(None) };
}

/// Lets a test act as another instance at the moment that matters.
pub(super) fn between_lock_and_read() {
    if let Some(act) = BETWEEN.with(|b| b.borrow_mut().take()) {
        act();
    }
}

const FACTS: Facts = Facts { sealed: true, provisioned: false };

fn mark(generation: u64, fill: u8) -> Mark {
    Mark { generation, digest: [fill; 32] }
}

fn folder() -> (tempfile::TempDir, AnchorFolder) {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("a");
    (dir, AnchorFolder { path, durability: Durability::Leased })
}

fn record(a: &FileAnchor) -> Expectation {
    match a.known() {
        Known::Record(e) => e,
        other => panic!("{other:?}"),
    }
}

fn lease(f: &AnchorFolder) -> FileAnchor {
    FileAnchor::lease(f, &[1; 16]).expect("lease")
}

#[test]
fn a_second_lease_is_refused_and_names_the_holder() {
    let (_dir, f) = folder();
    let mut a = lease(&f);
    a.announce(mark(1, 1)).expect("announce");
    let second = FileAnchor::lease(&f, &[1; 16]).map(|_| ());
    let text = second.expect_err("second").to_string();
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    drop(a);
    FileAnchor::lease(&f, &[1; 16]).expect("after the first ended");
}

#[test]
fn both_sides_of_an_unfinished_commit_are_accepted_until_one_is_confirmed() {
    let (_dir, f) = folder();
    let mut a = lease(&f);
    assert_eq!(a.known(), Known::Nothing);
    a.confirm(mark(4, 4), FACTS).expect("confirm");
    a.announce(mark(5, 5)).expect("announce");
    drop(a);
    let mut a = lease(&f);
    let e = record(&a);
    let accepts = |m| e.accepts(&m, &[0; 32]);
    assert!(accepts(mark(4, 4)) && accepts(mark(5, 5)) && e.facts == FACTS);
    assert!(!accepts(mark(5, 6)) && !accepts(mark(3, 3)) && !accepts(mark(6, 6)));
    a.confirm(mark(5, 5), FACTS).expect("confirm");
    drop(a);
    assert!(!record(&lease(&f)).accepts(&mark(4, 4), &[0; 32]));
}

#[test]
fn an_image_ahead_of_the_record_is_accepted_only_after_the_host_went_down_during_a_lease() {
    let (_dir, f) = folder();
    let mut a = lease(&f);
    a.confirm(mark(4, 4), FACTS).expect("confirm");
    a.announce(mark(5, 5)).expect("announce");
    drop(a);
    let mut a = lease(&f);
    a.boot = [0xee; 16];
    let e = record(&a);
    assert!(e.accepts(&mark(9, 9), &[0; 32]) && !e.accepts(&mark(3, 3), &[0; 32]));
    // Where the record knows the one before, the image has to name it.
    assert!(e.accepts(&mark(6, 6), &[5; 32]) && !e.accepts(&mark(6, 6), &[4; 32]));
    a.release().expect("release");
    drop(a);
    assert!(!record(&lease(&f)).accepts(&mark(9, 9), &[0; 32]));
}

/// After a rollback that was accepted, the branch that was given up is no newer image.
#[test]
fn what_was_given_up_never_counts_as_ahead() {
    let (_dir, f) = folder();
    let mut a = lease(&f);
    a.announce(mark(9, 9)).expect("announce");
    a.confirm(mark(9, 9), FACTS).expect("confirm");
    a.confirm(mark(4, 4), FACTS).expect("an operator accepts an older one");
    drop(a);
    let mut a = lease(&f);
    a.boot = [0xee; 16];
    assert!(record(&a).may_be_ahead && !record(&a).accepts(&mark(9, 9), &[0; 32]));
}

#[test]
fn a_lease_after_an_unclean_end_is_durable_again_from_its_first_announcement() {
    let (_dir, f) = folder();
    let mut a = lease(&f);
    a.announce(mark(1, 1)).expect("announce");
    drop(a);
    let mut a = lease(&f);
    assert!(a.record.leased && !a.announced, "what the record says of the lease before is not this one's");
    let before = a.flushes;
    a.announce(mark(2, 2)).expect("announce");
    assert_eq!(a.flushes, before + 1, "the first announcement of a lease is flushed");
    a.confirm(mark(2, 2), FACTS).expect("confirm");
    a.announce(mark(3, 3)).expect("announce");
    assert_eq!(a.flushes, before + 1, "later ones are not");
}

#[test]
fn a_strict_anchor_flushes_what_it_announces_and_what_it_confirms() {
    let (_dir, mut f) = folder();
    f.durability = Durability::Strict;
    let mut a = lease(&f);
    for n in 1..4 {
        a.announce(mark(n, 1)).expect("announce");
        a.confirm(mark(n, 1), FACTS).expect("confirm");
        assert_eq!(u64::from(a.flushes), 2 * n);
    }
}

/// Between the lock of one instance and its reading of the record there is no other instance's write: whoever
/// tries in that moment is refused, and what was written before is what is read.
#[test]
fn the_record_is_read_under_its_lock() {
    let (_dir, f) = folder();
    let mut a = lease(&f);
    a.confirm(mark(4, 4), FACTS).expect("confirm");
    drop(a);
    let (other, refused) = (f.clone(), std::rc::Rc::new(std::cell::Cell::new(false)));
    let seen = refused.clone();
    BETWEEN.with(|b| {
        *b.borrow_mut() = Some(Box::new(move || {
            seen.set(matches!(FileAnchor::lease(&other, &[1; 16]), Err(AnchorError::InUse { .. })));
        }));
    });
    assert_eq!(record(&lease(&f)).confirmed, Some(mark(4, 4)));
    assert!(refused.get());
}

#[test]
fn one_torn_record_falls_back_to_the_other_and_two_are_damage_that_can_be_written_anew() {
    let (_dir, f) = folder();
    let mut a = lease(&f);
    a.confirm(mark(1, 1), FACTS).expect("confirm");
    a.confirm(mark(2, 2), FACTS).expect("confirm");
    let path = a.path.clone();
    drop(a);
    let file = File::options().write(true).open(&path).expect("open");
    file.write_all_at(&[0xff; 8], 30).expect("tear slot 0, which holds generation 2");
    assert_eq!(record(&lease(&f)).confirmed, Some(mark(1, 1)));
    file.write_all_at(&[0xff; 8], SLOT + 30).expect("tear slot 1");
    let mut a = lease(&f);
    assert_eq!(a.known(), Known::Damaged);
    assert!(a.refusal().to_string().contains("--accept-rollback"));
    a.confirm(mark(7, 7), FACTS).expect("anew");
    drop(a);
    assert_eq!(record(&lease(&f)).confirmed, Some(mark(7, 7)));
}

#[test]
fn a_folder_that_others_can_write_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, f) = folder();
    drop(lease(&f));
    std::fs::set_permissions(&f.path, std::fs::Permissions::from_mode(0o777)).expect("mode");
    let text = FileAnchor::lease(&f, &[1; 16]).map(|_| ()).expect_err("refused").to_string();
    assert!(text.contains("chmod go-w"), "{text}");
}
