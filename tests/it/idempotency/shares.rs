//! How keys are shared among callers.

use std::fs;

use super::*;
use crate::callers::{call_from, caller};

const OTHER: &str = "127.0.0.2";

/// Two callers; four keys in all. `more` are further keys of the first caller.
fn two_callers(more: &str) -> Setup {
    let config =
        format!("{more}\n{}", caller("other", "127.0.0.2/32", "rate_limit = \"1000/s\"\nburst = 1000"));
    Setup { caller: config, ..Setup::default() }.set("idempotency.max_keys", 4)
}

fn from_other(gateway: &Gateway, name: &str) -> Reply {
    call_from(OTHER, gateway, &key(name))
}

/// New keys that a caller gets, until one is refused.
fn gets(gateway: &Gateway, prefix: &str) -> usize {
    let call = |i: &usize| gateway.post_with(&key(&format!("{prefix}{i}")));
    (0..10).map(|i| call(&i)).take_while(is_taken).count()
}

fn is_taken(reply: &Reply) -> bool {
    let is_taken = reply.outcome() == "succeeded";
    if !is_taken {
        assert_eq!(
            (reply.status, reply.code(), reply.outcome()),
            (503, "idempotency_unavailable", "not_sent"),
            "{reply:?}"
        );
        assert!(reply.headers.contains_key("retry-after"));
    }
    is_taken
}

#[test]
fn caller_at_its_share_gets_no_new_key_while_another_does() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, two_callers(""));
    let first = gateway.post_with(&key("known"));
    assert_eq!(gets(&gateway, "a"), 1, "half of four, with the first one");
    let refused = gateway.post_with(&key("b"));
    assert!(refused.body.contains("this caller holds as many Idempotency-Keys as it may"), "{refused:?}");
    assert_replays(&gateway.post_with(&key("known")), &first);
    assert_eq!(gateway.call().outcome(), "succeeded", "no key is needed");
    let other = from_other(&gateway, "known");
    assert!(is_taken(&other) && is_taken(&from_other(&gateway, "c")));
    assert!(!is_taken(&from_other(&gateway, "d")), "its half is used up, too");
    assert_eq!(sent(&sandbox), 5);
}

#[test]
fn share_is_the_same_after_a_restart() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, two_callers(""));
    let first = gateway.post_with(&key("known"));
    assert!(is_taken(&first) && is_taken(&from_other(&gateway, "a")));
    let again = |gateway: Gateway, max_keys: u32| {
        let setup = Setup { folder: Some(gateway.kill()), ..two_callers("") };
        start_keyed(&sandbox, setup.set("idempotency.max_keys", max_keys))
    };
    let gateway = again(gateway, 4);
    assert_eq!(gets(&gateway, "b"), 1, "one is held");
    let gateway = again(gateway, 2);
    assert_replays(&gateway.post_with(&key("known")), &first);
    assert_eq!(from_other(&gateway, "a").outcome(), "replayed");
    assert!(!is_taken(&gateway.post_with(&key("c"))) && !is_taken(&from_other(&gateway, "c")));
    assert_eq!(gateway.admin("/status").json()["idempotency"]["keys"], 3, "none is dropped");
    let gateway = again(gateway, 4);
    assert!(!is_taken(&gateway.post_with(&key("c"))) && is_taken(&from_other(&gateway, "c")));
}

#[test]
fn single_caller_may_hold_all_keys() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default().set("idempotency.max_keys", 4));
    assert_eq!(gets(&gateway, "a"), 4);
}

#[test]
fn configured_share_replaces_the_default_half() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, two_callers("max_keys = 3"));
    assert_eq!(gets(&gateway, "a"), 3);
    assert!(is_taken(&from_other(&gateway, "b")) && !is_taken(&from_other(&gateway, "c")), "all are used up");
    let alone = Setup { caller: "max_keys = 1".into(), ..Setup::default() };
    assert_eq!(gets(&start_keyed(&sandbox, alone), "a"), 1, "alone, too");
}

#[test]
fn reloaded_share_applies_at_once() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, two_callers("max_keys = 1"));
    assert_eq!(gets(&gateway, "a"), 1);
    let reload = |from: &str, to: &str, count: usize| {
        let file = gateway.folder.path().join("gateway.toml");
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(file.with_extension("new"), text.replace(from, to)).unwrap();
        fs::rename(file.with_extension("new"), file).unwrap();
        gateway.signal("-HUP");
        wait_for("the reload", || {
            let is_reload = |event: &&Value| event["event"] == "reload" && event["result"] == "accepted";
            let events = records(&gateway.audit_directory(), "event");
            (events.iter().filter(is_reload).count() == count).then_some(())
        });
    };
    reload("max_keys = 1\n", "max_keys = 3\n", 1);
    assert_eq!(gets(&gateway, "b"), 2, "and one from before");
    reload("max_keys = 3\n", "", 2);
    assert_eq!(gets(&gateway, "c"), 0, "three are held, of a half of four");
    assert_eq!(gateway.post_with(&key("b1")).outcome(), "replayed");
    assert!(is_taken(&from_other(&gateway, "d")));
}
