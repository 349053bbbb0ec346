//! Successes whose callers had left before they had the answer: an equal call is told of them, once, and not sent.

use std::{
    io::Read,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use super::*;
use crate::callers::{caller, unix_listener};

/// How a caller leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaves {
    Closes,
    /// Only its sending side; it waits for the answer.
    HalfCloses,
    Resets,
}

fn delayed(sandbox: &Sandbox, delay_ms: u64) {
    script(sandbox, Faults::business(Fault::delayed(delay_ms).times(1)));
}

/// Calls, and leaves once the upstream has the call and `after` is over.
fn call_and_leave(gateway: &Gateway, sandbox: &Sandbox, headers: &str, after: Duration, leaves: Leaves) {
    let begun = Instant::now();
    let mut stream = hold(sandbox, gateway, headers, BODY);
    wait_for("the time to leave", || (begun.elapsed() >= after).then_some(()));
    match leaves {
        Leaves::Closes => drop(stream),
        Leaves::HalfCloses => {
            stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_reply(&mut stream).outcome(), "succeeded");
        }
        Leaves::Resets => {
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            drop(stream);
        }
    }
}

/// Waits until it is on record that a success was not delivered; returns that call's id.
fn undelivered(gateway: &Gateway) -> String {
    wait_for("the event", || {
        let mut events = records(&gateway.audit_directory(), "event").into_iter().rev();
        let event = events.find(|event| event["event"] == "undelivered")?;
        Some(event["id"].as_str().unwrap().to_owned())
    })
}

#[track_caller]
fn assert_told(reply: &Reply) {
    assert_eq!((reply.status, reply.code(), reply.outcome()), (409, "duplicate_suspected", "succeeded"));
    assert_eq!((retry(reply), first_outcome(reply)), ("not-needed", "succeeded"));
}

#[test]
fn duplicate_of_an_undelivered_success_reports_it_once() {
    for leaves in [Leaves::Closes, Leaves::Resets] {
        for after in [0, 150, 200] {
            let sandbox = sandbox();
            let gateway = guarded(&sandbox, "guard");
            gateway.post(&other_body()); // there is a token
            delayed(&sandbox, 400);
            call_and_leave(&gateway, &sandbox, "", Duration::from_millis(after), leaves);
            let first = undelivered(&gateway);
            let told = gateway.call();
            assert_told(&told);
            assert_eq!(sent(&sandbox), 2, "{leaves:?} after {after}");
            assert_eq!(gateway.records("intent", 2)[1]["id"], first);
            assert_eq!(first_id(&told), first);
            let is_it = |refusal: &Value| refusal["id"] == id(&told);
            let refusal = wait_for("the record", || gateway.records("refusal", 1).into_iter().find(is_it));
            let expected = (&json!("not_sent"), &json!("succeeded"));
            assert_eq!((&refusal["outcome"], &refusal["first_outcome"]), expected);
            let again = gateway.call();
            assert_eq!(
                (again.outcome(), first_id(&again)),
                ("succeeded", &*first),
                "told once, then flagged"
            );
            assert_eq!(sent(&sandbox), 3, "{leaves:?} after {after}");
        }
    }
}

#[test]
fn reply_to_a_half_closed_caller_counts_as_delivered() {
    for after in [0, 300] {
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, "guard");
        gateway.post(&other_body()); // there is a token
        delayed(&sandbox, 400);
        call_and_leave(&gateway, &sandbox, "", Duration::from_millis(after), Leaves::HalfCloses);
        let again = wait_for("the end of the first call", || {
            let reply = gateway.call();
            (reply.code() != "duplicate_suspected").then_some(reply)
        });
        assert_eq!(again.outcome(), "succeeded");
        assert!(
            !records(&gateway.audit_directory(), "event").iter().any(|event| event["event"] == "undelivered")
        );
    }
}

#[test]
fn undelivered_keyed_success_is_reported_to_an_unkeyed_duplicate() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    until_keys_are_known(&gateway);
    gateway.post(&other_body()); // there is a token
    for told_by_replay in [false, true] {
        let before = sent(&sandbox);
        let name = key(if told_by_replay { "a" } else { "b" });
        delayed(&sandbox, 300);
        call_and_leave(&gateway, &sandbox, &name, Duration::ZERO, Leaves::Closes);
        if told_by_replay {
            let replay = wait_for("the replay", || {
                let reply = gateway.post_with(&name);
                (reply.outcome() == "replayed").then_some(reply)
            });
            assert_eq!((retry(&replay), first_outcome(&replay)), ("not-needed", "succeeded"));
        } else {
            assert_eq!(gateway.records("intent", before)[before]["id"], undelivered(&gateway));
            assert_told(&gateway.call());
        }
        assert_eq!(sent(&sandbox), before + 1);
        assert_eq!(gateway.call().outcome(), "succeeded");
        assert_eq!(sent(&sandbox), before + 2);
    }
}

#[test]
fn undelivered_success_is_sent_again_only_by_force() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    until_keys_are_known(&gateway);
    gateway.post(&other_body()); // there is a token
    delayed(&sandbox, 300);
    call_and_leave(&gateway, &sandbox, "", Duration::ZERO, Leaves::Closes);
    let first = undelivered(&gateway);
    let again = gateway.post_with(&forced("k", &first));
    assert_eq!(again.outcome(), "succeeded");
    assert_eq!(sent(&sandbox), 3);
}

/// A Unix socket says at once that nobody is there, a TCP socket only when it was written to.
#[test]
fn caller_disconnect_on_a_unix_socket_is_detected() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let path = folder.path().join("gateway.sock");
    let uid = format!("uid:{}", rustix::process::getuid().as_raw());
    let caller = unix_listener(&path) + &caller("local", &uid, "rate_limit = \"1000/s\"\nburst = 1000");
    let setup = Setup { folder: Some(folder), caller, ..Setup::default() };
    let gateway = start_with(&sandbox, setup.set("idempotency.without_key", "guard"));
    gateway.post(&other_body()); // there is a token
    delayed(&sandbox, 300);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    wait_for("the upstream", || (sent(&sandbox) == 2).then_some(()));
    drop(stream);
    let told = wait_for("the end of the first call", || {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let reply = parse_reply(&text);
        (reply.outcome() != "unknown").then_some(reply)
    });
    assert_told(&told);
    assert_eq!(sent(&sandbox), 2);
}
