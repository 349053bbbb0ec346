//! Stage 5: calls that are repeated, with a key and without one; through kills, faults and full tables.

mod delivery;
mod shares;
mod interleavings;
mod soak;

use std::{
    collections::BTreeSet,
    io::Write,
    net::{Shutdown, TcpStream},
    sync::Arc,
    thread,
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{outcomes::triggers::hold, support::*};

/// How many calls the upstream has received.
fn sent(sandbox: &Sandbox) -> usize {
    sandbox.requests().len()
}

fn key(key: &str) -> String {
    format!("idempotency-key: {key}\r\n")
}

fn forced(name: &str, id: &str) -> String {
    key(name) + &format!("idempotency-force: {id}\r\n")
}

fn id(reply: &Reply) -> &str {
    &reply.headers["x-gateway-request-id"]
}

fn first_id(reply: &Reply) -> &str {
    reply.headers.get("x-gateway-first-request-id").map_or("", String::as_str)
}

fn first_outcome(reply: &Reply) -> &str {
    reply.headers.get("x-gateway-first-outcome").map_or("", String::as_str)
}

fn retry(reply: &Reply) -> &str {
    &reply.headers["x-gateway-retry"]
}

/// A body that assigns another task.
fn other_body() -> String {
    BODY.replace("954645333549048833", "1")
}

/// A keyed call can be made once the keys of earlier ones are known.
pub(crate) fn until_keys_are_known(gateway: &Gateway) {
    wait_for("the keys", || {
        let status = gateway.admin("/status").json();
        (status["idempotency"]["rebuilt"] == true).then_some(())
    });
}

fn start_keyed(sandbox: &Sandbox, setup: Setup) -> Gateway {
    let gateway = start_with(sandbox, setup);
    until_keys_are_known(&gateway);
    gateway
}

#[track_caller]
fn assert_replays(reply: &Reply, first: &Reply) {
    assert_eq!(reply.outcome(), "replayed", "{reply:?}");
    assert_eq!((reply.status, &reply.body), (first.status, &first.body));
    assert_eq!(reply.headers.get("content-type"), first.headers.get("content-type"));
    assert_eq!(first_id(reply), id(first));
    assert_ne!(id(reply), id(first));
}

#[test]
fn repeated_key_is_replayed_and_sent_once() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    let first = gateway.post_with(&key("order-7"));
    assert_eq!((first.status, first.outcome(), first_id(&first)), (200, "succeeded", ""));
    assert_replays(&gateway.post_with(&key("order-7")), &first);
    assert_replays(&gateway.post_with(&key("\"order-7\"")), &first);
    assert_eq!(sent(&sandbox), 1);
    assert_eq!(gateway.post_with(&key("order-8")).outcome(), "succeeded", "another key is another task");
    assert_eq!(sent(&sandbox), 2);

    let (intents, outcomes) = (gateway.records("intent", 2), gateway.records("outcome", 2));
    assert_eq!((intents.len(), outcomes.len()), (2, 2), "a replay has neither");
    let of = |name: &str| intents[0][name].as_str().unwrap();
    assert!(of("key").len() == 32 && of("print").len() == 32 && of("id") == id(&first), "{}", intents[0]);
    assert_eq!(outcomes[0]["reply"]["body"], first.body);
    let replays = gateway.records("refusal", 2);
    assert!(
        replays.iter().all(|replay| replay["outcome"] == "replayed" && replay["first"] == id(&first)),
        "{replays:?}"
    );
    let metrics = gateway.admin("/metrics").body;
    assert!(metrics.contains("ccsqm_gateway_idempotency_keys 2"), "{metrics}");
    assert!(
        metrics.contains(r#"requests_total{code="",outcome="replayed",stage="idempotency"} 2"#),
        "{metrics}"
    );
    let trail = records(&gateway.audit_directory(), "").iter().map(Value::to_string).collect::<String>();
    assert!(
        trail.contains("954645333549048833") && !trail.contains("order-7"),
        "a key is recorded as its mark only"
    );
}

#[test]
fn concurrent_calls_with_one_key_are_sent_once() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    gateway.call(); // there is a token
    script(&sandbox, Faults::business(Fault::delayed(500).times(1)));
    let replies: Vec<_> = thread::scope(|scope| {
        let calls: Vec<_> = (0..64).map(|_| scope.spawn(|| gateway.post_with(&key("k")))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert_eq!(sent(&sandbox), 2);
    let first = replies.iter().find(|reply| reply.outcome() == "succeeded").unwrap();
    let waiting: Vec<_> = replies.iter().filter(|reply| reply.code() == "request_in_progress").collect();
    assert!(!waiting.is_empty());
    for reply in &waiting {
        assert_eq!((reply.status, reply.outcome(), first_id(reply)), (409, "unknown", id(first)));
        assert_eq!(reply.headers["retry-after"], "1", "with its key it may be repeated");
    }
    let others = replies.iter().filter(|reply| reply.outcome() == "replayed").count();
    assert_eq!(1 + waiting.len() + others, 64);
    assert_replays(&gateway.post_with(&key("k")), first);
}

#[test]
fn key_is_bound_to_one_body_and_one_operator() {
    let sandbox = sandbox();
    let setup = Setup { caller: "operators = [\"9\"]".into(), ..Setup::default() };
    let gateway = start_keyed(&sandbox, setup);
    let first = gateway.post_with(&key("k"));
    let body = other_body();
    for reply in [
        gateway.send(&head(body.len(), &key("k")), &body),
        gateway.post_with(&(key("k") + "x-userid: 9\r\n")),
    ] {
        assert_eq!((reply.status, reply.code(), reply.outcome()), (422, "idempotency_mismatch", "not_sent"));
        assert_eq!(reply.json()["first_request_id"], id(&first));
    }
    assert_replays(&gateway.post_with(&key("k")), &first);
    assert_eq!(sent(&sandbox), 1);
    assert_eq!(gateway.post_with(&(key("l") + "x-userid: 9\r\n")).outcome(), "succeeded");
}

#[test]
fn unknown_outcome_is_repeated_only_by_force_and_once() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let first = gateway.post_with(&key("k"));
    assert_eq!((first.status, first.outcome()), (502, "unknown"));
    let somebody = gateway.post_with(&key("l"));
    for headers in [key("k"), forced("k", id(&somebody))] {
        let reply = gateway.post_with(&headers);
        assert_eq!((reply.status, reply.code(), reply.outcome()), (409, "outcome_unknown", "unknown"));
        assert_eq!(reply.json()["first_request_id"], id(&first));
        assert!(!reply.headers.contains_key("retry-after"));
    }
    assert_eq!(sent(&sandbox), 2);
    let again = gateway.post_with(&forced("k", id(&first)));
    assert_eq!(again.outcome(), "succeeded");
    assert_eq!(gateway.records("intent", 3)[2]["forced"], id(&first));
    assert_replays(&gateway.post_with(&forced("k", id(&first))), &again);
    assert_replays(&gateway.post_with(&key("k")), &again);
    assert_eq!(sent(&sandbox), 3);
}

#[test]
fn forced_call_that_was_not_done_leaves_the_outcome_unknown() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    script(
        &sandbox,
        Faults::business([Fault::instead(Instead::Reset).times(1), Fault::status(429).times(1)]),
    );
    let first = gateway.post_with(&key("k"));
    assert_eq!(gateway.post_with(&forced("k", id(&first))).outcome(), "refused");
    let check = |gateway: &Gateway| {
        let reply = gateway.post_with(&key("k"));
        assert_eq!((reply.code(), first_id(&reply)), ("outcome_unknown", id(&first)));
    };
    check(&gateway);
    let gateway = start_keyed(&sandbox, Setup { folder: Some(gateway.kill()), ..Setup::default() });
    check(&gateway);
    assert_eq!(sent(&sandbox), 2);
    assert_eq!(gateway.post_with(&forced("k", id(&first))).outcome(), "succeeded");
}

#[test]
fn refused_call_releases_its_key_and_a_failed_one_keeps_it() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    script(&sandbox, Faults::business([Fault::status(429).times(1), Fault::failure("0409001").times(1)]));
    assert_eq!(gateway.post_with(&key("k")).outcome(), "refused");
    let body = other_body();
    let failed = gateway.send(&head(body.len(), &key("k")), &body);
    assert_eq!(failed.outcome(), "failed", "the key was free, for another body, too");
    assert_replays(&gateway.send(&head(body.len(), &key("k")), &body), &failed);
    assert_eq!(sent(&sandbox), 2);
    script(&sandbox, Faults { down: true, ..Faults::default() });
    wait_for("the end of its connections", || (sandbox.connections().open == 0).then_some(()));
    let reply = gateway.post_with(&key("l"));
    assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"));
    script(&sandbox, Faults::default());
    assert_eq!(gateway.post_with(&key("l")).outcome(), "succeeded");
}

#[test]
fn kill_right_after_a_reply_still_allows_its_replay() {
    let sandbox = sandbox();
    let (mut folder, mut told) = (None, Vec::new());
    for round in 0..10 {
        let gateway = start_keyed(&sandbox, Setup { folder: folder.take(), ..Setup::default() });
        let reply = format!("{{\"resultCode\":\"0409000\",\"round\":\"é\\\"{round}\"}}");
        script(&sandbox, Faults::business(Fault::body(reply).times(1)));
        told.push(gateway.post_with(&key(&round.to_string())));
        folder = Some(gateway.kill());
    }
    assert_eq!(sent(&sandbox), 10);
    let (base_url, token_url) = (Some(sandbox.url()), Some(sandbox.token_url()));
    drop(sandbox); // nobody is there to ask
    let gateway =
        start_keyed(&crate::support::sandbox(), Setup { folder, base_url, token_url, ..Setup::default() });
    for (round, first) in told.iter().enumerate() {
        assert_eq!(first.outcome(), "succeeded");
        assert_replays(&gateway.post_with(&key(&round.to_string())), first);
    }
}

#[test]
fn kill_during_a_call_leaves_its_outcome_unknown() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    script(&sandbox, Faults::business(Fault::delayed(60_000).times(1)));
    let _held = hold(&sandbox, &gateway, &key("k"), BODY);
    let intent = gateway.records("intent", 1).pop().unwrap();
    let gateway = start_keyed(&sandbox, Setup { folder: Some(gateway.kill()), ..Setup::default() });
    let reply = gateway.post_with(&key("k"));
    assert_eq!((reply.code(), first_id(&reply)), ("outcome_unknown", intent["id"].as_str().unwrap()));
    assert_eq!(gateway.post_with(&key("l")).outcome(), "succeeded");
    assert_eq!(sent(&sandbox), 2);
}

#[test]
fn disconnected_caller_gets_its_reply_by_replay() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    gateway.call(); // there is a token
    script(&sandbox, Faults::business(Fault::delayed(300).times(1)));
    let stream = hold(&sandbox, &gateway, &key("k"), BODY);
    stream.shutdown(Shutdown::Both).unwrap();
    drop(stream);
    let reply = wait_for("the end of the first call", || {
        let reply = gateway.post_with(&key("k"));
        (reply.code() != "request_in_progress").then_some(reply)
    });
    assert_eq!((reply.status, reply.outcome()), (200, "replayed"));
    assert_eq!(sent(&sandbox), 2);
}

#[test]
fn full_key_table_rejects_only_new_keys() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default().set("idempotency.max_keys", 1));
    let first = gateway.post_with(&key("k"));
    let reply = gateway.post_with(&key("l"));
    assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "idempotency_unavailable", "not_sent"));
    assert!(reply.headers.contains_key("retry-after"));
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_replays(&gateway.post_with(&key("k")), &first);
    let gateway = start_keyed(&sandbox, Setup { folder: Some(gateway.kill()), ..Setup::default() });
    assert_eq!(gateway.post_with(&key("l")).outcome(), "succeeded", "the refused call had claimed nothing");
}

#[test]
fn invalid_idempotency_key_is_rejected() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    let known = id(&gateway.call()).to_owned();
    let long = "k".repeat(255);
    for good in [key("k"), key("\"k\""), key(&long), forced("l", &known)] {
        let reply = gateway.post_with(&good);
        assert!(["succeeded", "replayed"].contains(&reply.outcome()), "{good}: {reply:?}");
    }
    let before = sent(&sandbox);
    for bad in [
        key(""),
        key("\"\""),
        key("a b"),
        key("\"k"),
        key(&(long + "k")),
        key("k\u{e9}"),
        key("k") + &key("k"),
        forced("k", "1"),
        forced("k", &known) + &format!("idempotency-force: {known}\r\n"),
        "idempotency-force: 1\r\n".to_owned(),
    ] {
        let reply = gateway.post_with(&bad);
        assert_eq!(
            (reply.status, reply.code(), reply.outcome()),
            (400, "idempotency_key_invalid", "not_sent"),
            "{bad}"
        );
    }
    assert_eq!(sent(&sandbox), before);
}

#[test]
fn replay_of_a_long_reply_keeps_its_result_code() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default());
    for (name, size) in [("short", 8 * 1024), ("long", 8 * 1024 + 1), ("very long", 100_000)] {
        let name = key(&name.replace(' ', "-"));
        script(&sandbox, Faults::business(Fault::sized(size).times(1)));
        let first = gateway.post_with(&name);
        assert_eq!((first.outcome(), first.body.len()), ("succeeded", size));
        let again = gateway.post_with(&name);
        if size <= 8 * 1024 {
            assert_replays(&again, &first);
            continue;
        }
        let kept = json!({ "resultCode": "0409000", "truncated": true, "request_id": id(&first) });
        assert_eq!((again.status, again.outcome(), again.json()), (200, "replayed", kept));
    }
    assert_eq!(sent(&sandbox), 3);
}

/// An answer that was pushed out of memory.
#[test]
fn replay_of_an_evicted_reply_keeps_its_result_code() {
    let sandbox = sandbox();
    let gateway = start_keyed(&sandbox, Setup::default().set("idempotency.reply_memory", "64KiB"));
    script(&sandbox, Faults::business(Fault::sized(8000)));
    let count = 200; // the cache is tidied now and then
    let told: Vec<_> = (0..count).map(|i| gateway.post_with(&key(&format!("k{i}")))).collect();
    let again: Vec<_> = (0..count).map(|i| gateway.post_with(&key(&format!("k{i}")))).collect();
    let mut forms = BTreeSet::new();
    for (first, again) in told.iter().zip(&again) {
        assert_eq!((again.outcome(), again.status), ("replayed", 200));
        let is_whole = again.body == first.body;
        assert!(is_whole || again.json()["resultCode"] == "0409000", "{again:?}");
        forms.insert(is_whole);
    }
    assert_eq!(forms.len(), 2, "some are kept and some are not");
    assert_eq!(sent(&sandbox), count);
}

fn guarded(sandbox: &Sandbox, mode: &str) -> Gateway {
    start_keyed(sandbox, Setup::default().set("idempotency.without_key", mode))
}

#[test]
fn unkeyed_duplicate_is_rejected_during_the_first_and_flagged_after() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    let body = other_body();
    gateway.post(&body); // there is a token
    script(&sandbox, Faults::business(Fault::delayed(500).times(1)));
    let first = thread::scope(|scope| {
        let first = scope.spawn(|| gateway.call());
        wait_for("the upstream", || (sent(&sandbox) == 2).then_some(()));
        let equal = gateway.call();
        assert_eq!((equal.status, equal.code(), equal.outcome()), (409, "duplicate_suspected", "unknown"));
        assert_eq!((retry(&equal), first_outcome(&equal)), ("check-first", "unknown"));
        let other = gateway.post(&BODY.replace("954645333549048833", "2"));
        assert_eq!((other.outcome(), first_id(&other)), ("succeeded", ""));
        let first = first.join().unwrap();
        assert_eq!(first_id(&equal), id(&first));
        first
    });
    assert_eq!((first.outcome(), first_id(&first)), ("succeeded", ""));
    let flagged = gateway.call();
    assert_eq!((flagged.outcome(), first_id(&flagged)), ("succeeded", id(&first)));
    assert_eq!(first_outcome(&flagged), "succeeded");
    let intent = &gateway.records("intent", 4)[3];
    assert_eq!((&intent["first"], &intent["first_outcome"]), (&json!(id(&first)), &json!("succeeded")));
    assert_eq!(sent(&sandbox), 4);
}

#[test]
fn unkeyed_duplicate_is_rejected_while_the_first_is_unresolved() {
    let sandbox = sandbox();
    let setup = || {
        Setup::default().set("idempotency.without_key", "guard").set("idempotency.fingerprint_window", "1s")
    };
    let gateway = start_with(&sandbox, setup());
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let first = gateway.call();
    assert_eq!(first.outcome(), "unknown");
    let equal = gateway.call();
    assert_eq!((equal.code(), first_id(&equal)), ("duplicate_suspected", id(&first)));
    let gateway = start_with(&sandbox, Setup { folder: Some(gateway.kill()), ..setup() });
    until_keys_are_known(&gateway);
    let equal = gateway.call();
    assert_eq!((equal.code(), first_id(&equal)), ("duplicate_suspected", id(&first)), "after a restart, too");
    let keyed = gateway.post_with(&key("k"));
    assert_eq!((keyed.code(), first_id(&keyed)), ("duplicate_suspected", id(&first)), "with a key, too");
    assert_eq!(gateway.post(&other_body()).outcome(), "succeeded", "the control");
    assert_eq!(sent(&sandbox), 2);
    let forced = gateway.post_with(&format!("idempotency-force: {}\r\n", id(&first)));
    assert_eq!(forced.outcome(), "succeeded");
    assert_eq!(gateway.records("intent", 3)[2]["forced"], id(&first));
    assert_eq!(gateway.call().outcome(), "succeeded", "flagged, since nothing is in doubt");
    assert_eq!(sent(&sandbox), 4);
}

#[test]
fn kill_during_an_unkeyed_call_rejects_duplicates_from_the_start() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    script(&sandbox, Faults::business(Fault::delayed(60_000).times(1)));
    let _held = hold(&sandbox, &gateway, "", BODY);
    let intent = gateway.records("intent", 1).pop().unwrap();
    let setup = Setup::default().set("idempotency.without_key", "guard");
    let gateway = start_with(&sandbox, Setup { folder: Some(gateway.kill()), ..setup });
    let equal = gateway.call();
    assert_eq!((equal.code(), first_id(&equal)), ("duplicate_suspected", intent["id"].as_str().unwrap()));
    assert_eq!(gateway.post(&other_body()).outcome(), "succeeded");
    assert_eq!(sent(&sandbox), 2);
}

#[test]
fn each_mode_handles_unkeyed_calls_as_documented() {
    for (mode, while_unknown, after_success) in [
        ("guard", "duplicate_suspected", ""),
        ("block", "duplicate_suspected", "duplicate_suspected"),
        ("warn", "", ""),
        ("off", "", ""),
        ("require_key", "idempotency_key_invalid", "idempotency_key_invalid"),
    ] {
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, mode);
        gateway.call();
        let reply = gateway.call();
        assert_eq!(reply.code(), after_success, "{mode}");
        let is_flagged = !first_id(&reply).is_empty();
        assert_eq!(is_flagged, !["off", "require_key"].contains(&mode), "{mode}");
        script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
        let body = other_body();
        gateway.post(&body);
        assert_eq!(gateway.post(&body).code(), while_unknown, "{mode}");
    }
}

#[test]
fn block_mode_rejects_unkeyed_calls_beyond_max_keys_until_expiry() {
    let sandbox = sandbox();
    for (mode, is_bounded) in [("guard", false), ("block", true)] {
        let setup = Setup::default().set("idempotency.without_key", mode).set("idempotency.max_keys", 3);
        let gateway = start_with(&sandbox, setup.set("idempotency.fingerprint_window", "8s"));
        until_keys_are_known(&gateway);
        let bodies: Vec<_> =
            (1..5).map(|count| BODY.replace("\"count\":2", &format!("\"count\":{count}"))).collect();
        for body in &bodies[..3] {
            assert_eq!(gateway.post(body).outcome(), "succeeded", "{mode}");
        }
        let reply = gateway.post(&bodies[3]);
        if !is_bounded {
            assert_eq!(reply.outcome(), "succeeded", "the control");
            continue;
        }
        let said = (reply.status, reply.code(), reply.outcome());
        assert_eq!(said, (503, "idempotency_unavailable", "not_sent"), "{reply:?}");
        assert_eq!(gateway.post(&bodies[0]).code(), "duplicate_suspected", "none is forgotten");
        let keyed = gateway.send(&head(bodies[3].len(), "idempotency-key: one\r\n"), &bodies[3]);
        assert_eq!(keyed.outcome(), "succeeded", "a key needs no room among them: {keyed:?}");
        wait_for("room", || (gateway.post(&bodies[3]).outcome() == "succeeded").then_some(()));
    }
}
