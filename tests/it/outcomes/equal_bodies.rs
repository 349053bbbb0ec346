//! The table of equal bodies: what becomes of a call while an equal one is at work, in doubt or undelivered, in each mode
//! and with and without keys; and how one is sent all the same.

use std::net::TcpStream;

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};

use super::{caught, triggers::*};
use crate::{
    callers::{call_from, caller},
    support::*,
};

const KEY_A: &str = "idempotency-key: a\r\n";
const KEY_B: &str = "idempotency-key: b\r\n";

const MODES: [&str; 5] = ["guard", "block", "warn", "off", "require_key"];

/// What becomes of the second call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// 409 `duplicate_suspected`.
    Refused,
    /// Sent, and its answer names the first call.
    Flagged,
    Sent,
    /// 400 `idempotency_key_invalid`.
    NeedsKey,
    /// There is no such first call.
    Absent,
}

use Fate::{Absent, Flagged, NeedsKey, Refused, Sent};

/// The keys of first and second call, and what becomes of the second in each mode.
const EQUAL: [(&str, &str, [Fate; 5]); 4] = [
    ("", "", [Refused, Refused, Flagged, Sent, Absent]),
    (KEY_A, "", [Refused, Refused, Flagged, Sent, NeedsKey]),
    ("", KEY_A, [Refused, Refused, Flagged, Sent, Absent]),
    (KEY_A, KEY_B, [Sent; 5]),
];

/// How it stands with the first call, and what it is therefore told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    AtWork,
    Unknown,
    Undelivered,
}

impl First {
    const ALL: [Self; 3] = [Self::AtWork, Self::Unknown, Self::Undelivered];

    fn outcome_and_retry(self) -> (&'static str, &'static str) {
        match self {
            Self::AtWork | Self::Unknown => ("unknown", "check-first"),
            Self::Undelivered => ("succeeded", "not-needed"),
        }
    }

    /// Brings the first call there; returns its id, and its connection while it is at work.
    fn bring(
        self,
        sandbox: &Sandbox,
        gateway: &Gateway,
        key: &str,
        body: &str,
    ) -> (String, Option<TcpStream>) {
        match self {
            Self::AtWork => {
                script(sandbox, Faults::business(Fault::delayed(60_000).times(1)));
                let held = hold(sandbox, gateway, key, body);
                (newest(gateway), Some(held))
            }
            Self::Unknown => {
                script(sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
                let first = gateway.send(&head(body.len(), key), body);
                assert_eq!(first.outcome(), "unknown", "{first:?}");
                (id(&first).to_owned(), None)
            }
            Self::Undelivered => (leave_undelivered(sandbox, gateway, key, body), None),
        }
    }
}

/// A body that assigns a task of its own.
fn body(task: usize) -> String {
    crate::audit::body(task as u64)
}

fn header<'a>(reply: &'a Reply, name: &str) -> &'a str {
    reply.headers.get(name).map_or("", String::as_str)
}

fn first_id(reply: &Reply) -> &str {
    header(reply, "x-gateway-first-request-id")
}

fn guarded(sandbox: &Sandbox, mode: &str) -> Gateway {
    let gateway = start_ready(sandbox, Setup::default().set("idempotency.without_key", mode));
    let headers = if mode == "require_key" { "idempotency-key: control\r\n" } else { "" };
    assert_eq!(gateway.post_with(headers).outcome(), "succeeded", "the control, with which a token comes");
    gateway
}

#[track_caller]
fn assert_suspected(reply: &Reply, first: &str, outcome: &str, retry: &str) {
    let said = (reply.status, reply.code(), reply.outcome(), header(reply, "x-gateway-retry"));
    assert_eq!(said, (409, "duplicate_suspected", outcome, retry), "{reply:?}");
    assert_eq!((first_id(reply), header(reply, "x-gateway-first-outcome")), (first, outcome));
    assert!(!reply.headers.contains_key("retry-after"), "{reply:?}");
}

#[test]
fn each_mode_handles_an_equal_body_as_documented() {
    let mut differences = Vec::new();
    for (place, mode) in MODES.into_iter().enumerate() {
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, mode);
        let mut held = Vec::new();
        let columns = EQUAL.iter().flat_map(|row| First::ALL.map(|first| (row, first)));
        for (number, ((first_key, second_key, fates), first)) in columns.enumerate() {
            if fates[place] == Absent {
                continue;
            }
            // A task and keys of its own, so that no case meets another one.
            let own = |key: &str| key.replace("\r\n", &format!("{number}\r\n"));
            let body = body(1 + number);
            let case = || {
                let (first_id, stream) = first.bring(&sandbox, &gateway, &own(first_key), &body);
                held.extend(stream);
                assert_second(
                    &sandbox,
                    &gateway,
                    (&first_id, first),
                    (&own(second_key), &body),
                    fates[place],
                );
            };
            if let Err(difference) = caught(case) {
                differences
                    .push(format!("{mode}: {first:?}, {first_key:?} then {second_key:?}: {difference}"));
            }
        }
        let metrics = gateway.admin("/metrics").body;
        let mut suspected = metrics.lines().filter(|line| line.contains("code=\"duplicate_suspected\""));
        assert!(suspected.all(|line| line.contains("outcome=\"not_sent\"")), "{metrics}");
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}

/// Makes the second call and looks at what becomes of it.
fn assert_second(
    sandbox: &Sandbox,
    gateway: &Gateway,
    (first, state): (&str, First),
    (key, body): (&str, &str),
    fate: Fate,
) {
    let before = sandbox.requests().len();
    let reply = match state {
        First::Undelivered => call_after(gateway, key, body),
        First::AtWork | First::Unknown => gateway.send(&head(body.len(), key), body),
    };
    let received = sandbox.requests().len() - before;
    match fate {
        Refused => {
            let (outcome, retry) = state.outcome_and_retry();
            assert_suspected(&reply, first, outcome, retry);
        }
        Flagged => assert_eq!((reply.outcome(), first_id(&reply)), ("succeeded", first), "{reply:?}"),
        Sent => assert_eq!((reply.outcome(), first_id(&reply)), ("succeeded", ""), "{reply:?}"),
        NeedsKey => assert_eq!((reply.status, reply.code()), (400, "idempotency_key_invalid")),
        Absent => unreachable!(),
    }
    assert_eq!(received, usize::from(matches!(fate, Flagged | Sent)), "{reply:?}");
}

#[test]
fn only_block_mode_rejects_an_unkeyed_duplicate_after_a_success() {
    for (mode, fate) in MODES.into_iter().zip([Flagged, Refused, Flagged, Sent, NeedsKey]) {
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, mode);
        let first_key = if mode == "require_key" { KEY_A } else { "" };
        let first = gateway.send(&head(body(1).len(), first_key), &body(1));
        assert_eq!(first.outcome(), "succeeded");
        let reply = gateway.post(&body(1));
        match fate {
            Refused => assert_suspected(&reply, id(&first), "succeeded", "not-needed"),
            Flagged => assert_eq!((reply.outcome(), first_id(&reply)), ("succeeded", id(&first)), "{mode}"),
            Sent => assert_eq!((reply.outcome(), first_id(&reply)), ("succeeded", ""), "{mode}"),
            NeedsKey | Absent => assert_eq!(reply.code(), "idempotency_key_invalid", "{mode}"),
        }
        assert_eq!(sandbox.requests().len(), 2 + usize::from(matches!(fate, Flagged | Sent)), "{mode}");
    }
}

#[test]
fn undelivered_success_is_reported_once_before_it_is_sent_again() {
    for (key, way) in [("", "fin"), ("", "reset"), (KEY_A, "fin"), (KEY_A, "reset")] {
        println!("{key:?} after {way}");
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, "guard");
        let first = leave_undelivered_by(way, &sandbox, &gateway, "", &body(1));
        let told = call_after(&gateway, key, &body(1));
        assert_suspected(&told, &first, "succeeded", "not-needed");
        assert_eq!(sandbox.requests().len(), 2, "the control's and the first: nothing was sent again");
        let refusal = gateway.records("refusal", 1).pop().unwrap();
        let said =
            ["outcome", "first", "first_outcome"].map(|name| refusal[name].as_str().unwrap_or_default());
        assert_eq!(said, ["not_sent", &first, "succeeded"], "{refusal}");

        let again = gateway.send(&head(body(1).len(), key), &body(1));
        assert_eq!(
            (again.status, again.outcome()),
            (200, "succeeded"),
            "told once, it is meant twice: {again:?}"
        );
        assert_eq!(sandbox.requests().len(), 3);
    }
}

#[test]
fn unresolved_call_rejects_duplicates_after_a_kill() {
    let mut differences = Vec::new();
    let guarding = EQUAL.iter().filter(|(_, _, fates)| fates[0] == Refused);
    for ((first_key, second_key, _), first) in guarding.flat_map(|row| First::ALL.map(|first| (row, first))) {
        let case = || {
            let sandbox = sandbox();
            let gateway = guarded(&sandbox, "guard");
            let (first_id, _held) = first.bring(&sandbox, &gateway, first_key, &body(1));
            if first == First::Undelivered {
                until_event(&gateway, "undelivered", &first_id);
            }
            let setup = Setup::default().set("idempotency.without_key", "guard");
            let gateway = start_ready(&sandbox, Setup { folder: Some(gateway.kill()), ..setup });
            assert_second(&sandbox, &gateway, (&first_id, first), (second_key, &body(1)), Refused);
        };
        if let Err(difference) = caught(case) {
            differences.push(format!("{first:?}, {first_key:?} then {second_key:?}: {difference}"));
        }
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn undelivered_success_is_reported_once_despite_a_kill() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    let first = leave_undelivered(&sandbox, &gateway, "", &body(1));
    assert_suspected(&call_after(&gateway, "", &body(1)), &first, "succeeded", "not-needed");
    until_event(&gateway, "delivered", &first);
    let setup = Setup::default().set("idempotency.without_key", "guard");
    let gateway = start_ready(&sandbox, Setup { folder: Some(gateway.kill()), ..setup });
    assert_eq!(sandbox.requests().len(), 2);
    assert_eq!(gateway.post(&body(1)).outcome(), "succeeded");
    assert_eq!(sandbox.requests().len(), 3);
}

fn until_event(gateway: &Gateway, name: &str, id: &str) {
    wait_for(name, || {
        let mut events = records(&gateway.audit_directory(), "event").into_iter();
        events.any(|event| event["event"] == name && event["id"] == id).then_some(())
    });
}

/// The answer to a dry run tells nobody for good: a dry run changes nothing.
#[test]
fn undelivered_success_stays_undelivered_after_a_dry_run() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    let first = leave_undelivered(&sandbox, &gateway, "", &body(1));
    wait_for("the end of the first call", || {
        let rehearsed = rehearse(&gateway, "", &body(1));
        (rehearsed.outcome() == "succeeded").then(|| {
            assert_suspected(&rehearsed, &first, "succeeded", "not-needed");
        })
    });
    let told = call_after(&gateway, "", &body(1));
    assert_suspected(&told, &first, "succeeded", "not-needed");
    assert_eq!(sandbox.requests().len(), 2);
}

/// An answer that the caller has read leaves no doubt: the control of those that were not delivered.
#[test]
fn duplicate_of_a_delivered_success_is_flagged_and_sent() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    let first = gateway.post(&body(1));
    let again = gateway.post(&body(1));
    assert_eq!((again.outcome(), first_id(&again)), ("succeeded", id(&first)));
    assert_eq!(sandbox.requests().len(), 3);
}

fn force(id: &str) -> String {
    format!("idempotency-force: {id}\r\n")
}

#[test]
fn forced_duplicate_is_sent_once_with_and_without_a_key() {
    for keys in [["", ""], [KEY_A, KEY_B]] {
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, "guard");
        let call =
            |key: &str, force: &str| gateway.send(&head(body(1).len(), &(key.to_owned() + force)), &body(1));
        let lose = || script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
        lose();
        let first = call("", "");
        assert_eq!(first.outcome(), "unknown");
        let foreign = gateway.post(&body(2));
        assert_suspected(&call(keys[0], &force(id(&foreign))), id(&first), "unknown", "check-first");
        assert_eq!(sandbox.requests().len(), 3);

        lose();
        let forced = call(keys[0], &force(id(&first)));
        assert_eq!((forced.outcome(), sandbox.requests().len()), ("unknown", 4), "{forced:?}");
        let intent = gateway.records("intent", 4).pop().unwrap();
        assert_eq!((&intent["id"], &intent["forced"]), (&id(&forced).into(), &id(&first).into()), "{intent}");

        // The force was for once: the new doubt is another call's.
        let again = call(keys[0], &force(id(&first)));
        assert_eq!(
            (again.status, again.outcome(), first_id(&again)),
            (409, "unknown", id(&forced)),
            "{again:?}"
        );
        let other = call("", &force(id(&first)));
        assert_suspected(&other, id(&forced), "unknown", "check-first");
        assert_eq!(sandbox.requests().len(), 4);
        let last = call(keys[0], &force(id(&forced)));
        assert_eq!((last.outcome(), sandbox.requests().len()), ("succeeded", 5), "{last:?}");
        // After that nothing is in doubt.
        assert_eq!(call(keys[1], "").outcome(), "succeeded");
    }
}

/// The next calls meet these faults, or none.
fn lose(sandbox: &Sandbox, times: u64) {
    script(sandbox, Faults::business(Fault::instead(Instead::Reset).times(times)));
}

/// The first body under test, with these headers.
fn call(gateway: &Gateway, headers: &str) -> Reply {
    gateway.send(&head(body(1).len(), headers), &body(1))
}

/// The same trail, in a new process.
fn restarted(sandbox: &Sandbox, gateway: Gateway) -> Gateway {
    let setup = Setup::default().set("idempotency.without_key", "guard");
    start_ready(sandbox, Setup { folder: Some(gateway.kill()), ..setup })
}

/// Waits until as many outcomes are on record.
fn until_on_record(gateway: &Gateway, count: usize) {
    gateway.records("outcome", count);
}

#[test]
fn unresolved_keyed_call_is_forced_once_with_or_without_its_key() {
    for is_lost in [false, true] {
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, "guard");
        lose(&sandbox, 1 + u64::from(is_lost));
        let first = call(&gateway, KEY_A);
        let successor = call(&gateway, &force(id(&first)));
        let outcome = if is_lost { "unknown" } else { "succeeded" };
        assert_eq!((first.outcome(), successor.outcome()), ("unknown", outcome), "{successor:?}");
        script(&sandbox, Faults::default());
        until_on_record(&gateway, 3);
        // Of a successor that is open the call is told; one that succeeded leaves the doubt of the key as it is.
        let expected = match is_lost {
            false => ("outcome_unknown", id(&first)),
            true => ("duplicate_suspected", id(&successor)),
        };
        let again = |gateway: &Gateway| {
            let again = call(gateway, &(KEY_A.to_owned() + &force(id(&first))));
            assert_eq!((again.status, again.outcome()), (409, "unknown"), "{again:?}");
            assert_eq!((again.code(), first_id(&again)), expected, "{again:?}");
        };
        again(&gateway);
        let rehearsed = rehearse(&gateway, &(KEY_A.to_owned() + &force(id(&first))), &body(1));
        assert_eq!((rehearsed.code(), first_id(&rehearsed)), expected, "{rehearsed:?}");
        again(&restarted(&sandbox, gateway));
        assert_eq!(sandbox.requests().len(), 3);
    }
}

#[test]
fn unkeyed_call_rejects_duplicates_while_its_keyed_repeat_is_unknown() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    lose(&sandbox, 2);
    let first = call(&gateway, "");
    let successor = call(&gateway, &(KEY_A.to_owned() + &force(id(&first))));
    assert_eq!((first.outcome(), successor.outcome()), ("unknown", "unknown"));
    assert_suspected(&call(&gateway, KEY_B), id(&successor), "unknown", "check-first");
    until_on_record(&gateway, 3);
    let gateway = restarted(&sandbox, gateway);
    assert_suspected(&call(&gateway, KEY_B), id(&successor), "unknown", "check-first");
    assert_eq!(sandbox.requests().len(), 3);
    let last = call(&gateway, &(KEY_B.to_owned() + &force(id(&successor))));
    assert_eq!((last.outcome(), sandbox.requests().len()), ("succeeded", 4), "{last:?}");
    let other = call(&gateway, "idempotency-key: c\r\n");
    assert_eq!(
        (other.outcome(), sandbox.requests().len()),
        ("succeeded", 5),
        "nothing is in doubt: {other:?}"
    );
}

#[test]
fn call_of_another_key_is_not_repeated_by_force() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "guard");
    lose(&sandbox, 1);
    let first = call(&gateway, KEY_A);
    let other = call(&gateway, &(KEY_B.to_owned() + &force(id(&first))));
    assert_eq!((first.outcome(), other.outcome()), ("unknown", "succeeded"), "{other:?}");
    let intent = gateway.records("intent", 3).pop().unwrap();
    assert!(intent["id"] == id(&other) && intent["forced"].is_null(), "{intent}");
    assert_suspected(&call(&gateway, ""), id(&first), "unknown", "check-first");
    until_on_record(&gateway, 3);
    let gateway = restarted(&sandbox, gateway);
    assert_suspected(&call(&gateway, ""), id(&first), "unknown", "check-first");
    let again = call(&gateway, &(KEY_A.to_owned() + &force(id(&first))));
    assert_eq!((again.outcome(), sandbox.requests().len()), ("succeeded", 4), "the control: {again:?}");
}

#[test]
fn forced_duplicate_of_an_undelivered_success_is_sent() {
    for key in ["", KEY_A] {
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, "guard");
        let first = leave_undelivered(&sandbox, &gateway, "", &body(1));
        let reply = call_after(&gateway, &(key.to_owned() + &force(&first)), &body(1));
        assert_eq!((reply.outcome(), sandbox.requests().len()), ("succeeded", 3), "{reply:?}");
        assert_eq!(gateway.records("intent", 3)[2]["forced"], first);
    }
}

#[test]
fn block_mode_repeats_a_success_by_force_once() {
    let sandbox = sandbox();
    let gateway = guarded(&sandbox, "block");
    let first = gateway.post(&body(1));
    let call = |id: &str| gateway.send(&head(body(1).len(), &force(id)), &body(1));
    let forced = call(id(&first));
    assert_eq!((forced.outcome(), sandbox.requests().len()), ("succeeded", 3), "{forced:?}");
    assert_eq!(gateway.records("intent", 3)[2]["forced"], id(&first));
    let again = call(id(&first));
    assert_suspected(&again, id(&forced), "succeeded", "not-needed");
    assert_eq!(sandbox.requests().len(), 3);
}

#[test]
fn call_in_flight_is_not_repeated_by_force() {
    for key in ["", KEY_A] {
        let sandbox = sandbox();
        let gateway = guarded(&sandbox, "guard");
        let (first, _held) = First::AtWork.bring(&sandbox, &gateway, "", &body(1));
        let reply = gateway.send(&head(body(1).len(), &(key.to_owned() + &force(&first))), &body(1));
        assert_suspected(&reply, &first, "unknown", "check-first");
        assert_eq!(sandbox.requests().len(), 2);
    }
}

#[test]
fn force_must_name_a_call_of_the_same_caller_and_route() {
    for key in ["", KEY_A] {
        let sandbox = sandbox();
        let setup = with_other_route(&caller("other", "127.0.0.2/32", ""));
        let setup =
            Setup { caller: setup.caller.replace("routes = [\"app", "routes = [\"other\", \"app"), ..setup };
        let gateway = start_ready(&sandbox, setup.set("idempotency.without_key", "guard"));
        script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(3)));
        let of_another_caller = gateway.call();
        let here = |headers: &str| call_from("127.0.0.2", &gateway, headers);
        let of_another_route = elsewhere(&gateway, OTHER_PATH);
        let first = here("");
        for lost in [&of_another_caller, &of_another_route, &first] {
            assert_eq!(lost.outcome(), "unknown", "{lost:?}");
        }
        for foreign in [&of_another_caller, &of_another_route] {
            let reply = here(&(key.to_owned() + &force(id(foreign))));
            assert_suspected(&reply, id(&first), "unknown", "check-first");
        }
        assert_eq!(sandbox.requests().len(), 3);
        let reply = here(&(key.to_owned() + &force(id(&first))));
        assert_eq!((reply.outcome(), sandbox.requests().len()), ("succeeded", 4), "the control: {reply:?}");
    }
}

/// The example request of the second caller, on another route.
fn elsewhere(gateway: &Gateway, path: &str) -> Reply {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.2:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.connect(&gateway.address.into()).unwrap();
    let mut stream = TcpStream::from(socket);
    let request = head(BODY.len(), "").replacen(PATH, path, 1) + BODY;
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    read_reply(&mut stream)
}
