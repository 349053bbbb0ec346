//! Calls of unknown outcome are resolved by a person: through the control socket of a running gateway, and in a trail that
//! nobody writes.

use std::{
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    audit::verify,
    idempotency::until_keys_are_known,
    outcomes::triggers::{KEY, hold, id, newest, start_ready},
    support::*,
};

fn guarded() -> Setup {
    Setup::default().set("idempotency.without_key", "guard")
}

/// A gateway and the id of a call whose answer broke off.
fn start_with_unknown(sandbox: &Sandbox, key: &str) -> (Gateway, String) {
    let gateway = start_ready(sandbox, guarded());
    let unknown = leave_unknown(sandbox, &gateway, key, BODY);
    (gateway, unknown)
}

fn leave_unknown(sandbox: &Sandbox, gateway: &Gateway, key: &str, body: &str) -> String {
    script(sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let reply = gateway.send(&head(body.len(), key), body);
    assert_eq!(reply.outcome(), "unknown");
    id(&reply).to_owned()
}

/// Starts the gateway of a folder anew, after it was killed or stopped.
fn restart(sandbox: &Sandbox, folder: Arc<TempDir>) -> Gateway {
    start_ready(sandbox, Setup { folder: Some(folder), ..guarded() })
}

fn stop(mut gateway: Gateway) -> Arc<TempDir> {
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    gateway.folder.clone()
}

/// Exit code and what was said.
fn resolve(directory: &Path, id: &str, result: &str, more: &[&str]) -> (i32, String) {
    let words = ["audit", "resolve", directory.to_str().unwrap(), id, result, "--by", "Ann"];
    let (code, told, error) = command(&[&words, more].concat());
    (code, told + &error)
}

fn resolutions(directory: &Path) -> Vec<Value> {
    let mut events = records(directory, "event");
    events.retain(|event| event["event"] == "resolution");
    events
}

fn other_key() -> &'static str {
    "idempotency-key: another\r\n"
}

/// The call is answered for: with its key, and as often as it is repeated, without one.
fn assert_done(sandbox: &Sandbox, gateway: &Gateway, first: &str, key: &str) {
    let before = sandbox.requests().len();
    for _ in 0..2 {
        if !key.is_empty() {
            let reply = gateway.post_with(key);
            assert_eq!((reply.status, reply.outcome()), (200, "replayed"), "{}", reply.text());
            let header = |name: &str| reply.headers[name].clone();
            assert_eq!(header("x-gateway-resolved"), "done");
            assert_eq!(header("x-gateway-first-outcome"), "succeeded");
            assert_eq!(header("x-gateway-first-request-id"), first);
            assert_eq!(header("x-gateway-retry"), "not-needed");
            assert_eq!(reply.json(), json!({ "resultCode": "0409000", "resolved": true }));
        }
        let others = if key.is_empty() { vec!["", other_key()] } else { vec![""] };
        for other in others {
            let reply = gateway.post_with(other);
            assert_eq!((reply.status, reply.code()), (409, "duplicate_suspected"), "{}", reply.text());
            assert_eq!(reply.outcome(), "succeeded");
            assert_eq!(reply.headers["x-gateway-retry"], "not-needed");
            assert_eq!(reply.headers["x-gateway-first-request-id"], first);
        }
    }
    assert_eq!(sandbox.requests().len(), before);
}

fn gauge(gateway: &Gateway, count: usize) {
    let line = format!("ccsqm_gateway_unresolved_outcomes {count}\n");
    wait_for(&line, || gateway.admin("/metrics").body.contains(&line).then_some(()));
}

#[test]
fn resolution_done_is_replayed_at_once_and_after_restarts() {
    for key in [KEY, ""] {
        let sandbox = sandbox();
        let (gateway, first) = start_with_unknown(&sandbox, key);
        gauge(&gateway, 1);
        wait_for("the warning", || gateway.log().contains("the outcome of a call is unknown").then_some(()));
        let audit = gateway.audit_directory();
        let (code, told) = resolve(&audit, &first, "done", &["--note", "task 1 is there"]);
        assert_eq!(code, 0, "{told}");
        gauge(&gateway, 0);
        assert_done(&sandbox, &gateway, &first, key);
        let event = resolutions(&audit).pop().unwrap();
        let own_uid = std::fs::metadata(&audit).map(|found| std::os::unix::fs::MetadataExt::uid(&found));
        for (member, must_be) in [
            ("id", json!(first)),
            ("result", json!("done")),
            ("by", json!("Ann")),
            ("note", json!("task 1 is there")),
            ("uid", json!(own_uid.unwrap())),
            ("caller", json!("qa-console")),
            ("route", json!("appointQualityTask")),
        ] {
            assert_eq!(event[member], must_be, "{member}: {event}");
        }
        assert!(event["print"].is_string() && event["call_time"].is_string(), "{event}");
        assert_eq!(event["key"].is_string(), !key.is_empty(), "{event}");
        let gateway = restart(&sandbox, gateway.kill());
        assert_done(&sandbox, &gateway, &first, key);
        let gateway = restart(&sandbox, stop(gateway));
        assert_done(&sandbox, &gateway, &first, key);
        assert!(verify(&audit).0);
    }
}

#[test]
fn resolution_not_done_allows_the_call_at_once_and_after_a_restart() {
    for key in [KEY, ""] {
        for is_restarted in [false, true] {
            let sandbox = sandbox();
            let (mut gateway, first) = start_with_unknown(&sandbox, key);
            assert_eq!(gateway.post_with(key).status, 409, "the control: it stands in the way");
            let (code, told) = resolve(&gateway.audit_directory(), &first, "not-done", &[]);
            assert_eq!(code, 0, "{told}");
            gauge(&gateway, 0);
            if is_restarted {
                gateway = restart(&sandbox, gateway.kill());
            }
            let reply = gateway.post_with(key);
            assert_eq!(reply.outcome(), "succeeded", "{}", reply.text());
        }
    }
}

#[test]
fn resolution_works_on_a_stopped_trail_and_after_a_kill() {
    for key in [KEY, ""] {
        for result in ["done", "not-done"] {
            for is_killed in [false, true] {
                let sandbox = sandbox();
                let gateway = start_ready(&sandbox, guarded());
                let (folder, first) = if is_killed {
                    script(&sandbox, Faults::business(Fault::delayed(60_000).times(1)));
                    let _held = hold(&sandbox, &gateway, key, BODY);
                    let first = newest(&gateway);
                    (gateway.kill(), first)
                } else {
                    let first = leave_unknown(&sandbox, &gateway, key, BODY);
                    (stop(gateway), first)
                };
                let audit = folder.path().join("audit");
                let (code, told) = resolve(&audit, &first, result, &[]);
                assert_eq!(code, 0, "{told}");
                assert!(verify(&audit).0);
                assert_eq!(command(&["audit", "unresolved", audit.to_str().unwrap()]).0, 0);
                let gateway = restart(&sandbox, folder);
                gauge(&gateway, 0);
                match result {
                    "done" => assert_done(&sandbox, &gateway, &first, key),
                    _ => assert_eq!(gateway.post_with(key).outcome(), "succeeded"),
                }
            }
        }
    }
}

#[test]
fn exactly_one_of_two_concurrent_resolutions_succeeds() {
    let sandbox = sandbox();
    let (gateway, first) = start_with_unknown(&sandbox, KEY);
    let audit = gateway.audit_directory();
    let told = thread::scope(|scope| {
        let (audit, first) = (&audit, &first);
        let both = ["done", "not-done"].map(|result| scope.spawn(move || resolve(audit, first, result, &[])));
        both.map(|one| one.join().unwrap())
    });
    let loser = told.iter().position(|(code, _)| *code != 0).expect("one is refused");
    assert_eq!(told[1 - loser].0, 0, "{told:?}");
    let winner = ["done", "not-done"][1 - loser];
    assert!(told[loser].1.contains(&format!("was resolved as {winner} by Ann")), "{told:?}");
    let recorded = resolutions(&audit);
    assert_eq!(recorded.len(), 1);
    assert_eq!(recorded[0]["result"], winner);
}

#[test]
fn resolution_that_contradicts_the_known_outcome_is_rejected() {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, guarded());
    let succeeded = id(&gateway.post(&BODY.replace("954645333549048833", "1"))).to_owned();
    let first = leave_unknown(&sandbox, &gateway, KEY, BODY);
    script(&sandbox, Faults::business(Fault::delayed(60_000).times(1)));
    let _held = hold(&sandbox, &gateway, "", &BODY.replace("954645333549048833", "2"));
    let (at_work, nobody) = (newest(&gateway), "01890a5d-ac96-774b-bcce-b302099a8057");
    let audit = gateway.audit_directory();
    for (id, result, more, code, text) in [
        (&*succeeded, "done", &[][..], 1, "the outcome of this call is known: succeeded"),
        (&*at_work, "done", &[], 1, "in progress"),
        (nobody, "done", &[], 1, "the trail has no call"),
        (&*first, "not-done", &[], 0, "resolved as not-done (record"),
        (&*first, "not-done", &[], 0, "was resolved as not-done before, by Ann"),
        (&*first, "done", &[], 1, "`--correct`"),
        (&*first, "done", &["--correct"], 0, "resolved as done (record"),
        (&*first, "done", &["--control", "/nowhere"], 1, "does not answer"),
        (&*first, "done", &["--note", "a\nb"], 1, "on one line"),
    ] {
        let (exit, told) = resolve(&audit, id, result, more);
        assert_eq!(exit, code, "{told}");
        assert!(told.contains(text), "{told}");
    }
    let results: Vec<_> = resolutions(&audit).iter().map(|event| text(&event["result"])).collect();
    assert_eq!(results, ["not-done", "done"]);
    assert_done(&sandbox, &gateway, &first, KEY);
    // The same of the stopped trail.
    let folder = gateway.kill();
    for (id, result, code) in
        [(&*first, "done", 0), (&*first, "not-done", 1), (&*succeeded, "done", 1), (nobody, "done", 1)]
    {
        let (exit, told) = resolve(&audit, id, result, &[]);
        assert_eq!(exit, code, "{told}");
    }
    assert_eq!(resolutions(&audit).len(), 2);
    drop(folder);
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[test]
fn control_socket_is_private_bounded_and_replaced_when_stale() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let path = folder.path().join("elsewhere.sock");
    let setup = |folder| Setup { folder: Some(folder), ..guarded() }.set("admin.control", path.display());
    let gateway = start_ready(&sandbox, setup(folder));
    let first = leave_unknown(&sandbox, &gateway, KEY, BODY);
    wait_for("the socket", || path.exists().then_some(()));
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    for request in ["nonsense\n".to_owned(), "x".repeat(8192), r#"{"do":"dance"}"#.to_owned() + "\n"] {
        let mut stream = UnixStream::connect(&path).unwrap();
        let _ = stream.write_all(request.as_bytes());
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&answer).unwrap()["ok"], false, "{answer}");
    }
    let folder = gateway.kill();
    assert!(path.exists(), "the control: a kill leaves it behind");
    let gateway = start_ready(&sandbox, setup(folder));
    let (code, told) = resolve(&gateway.audit_directory(), &first, "done", &[]);
    assert_eq!(code, 0, "found through the audit directory: {told}");
    let audit = gateway.audit_directory();
    let (code, told, _) = command(&["audit", "accept-clock", audit.to_str().unwrap(), "--json"]);
    assert_eq!(
        (code, serde_json::from_str::<Value>(&told).unwrap()["ok"].clone()),
        (0, json!(true)),
        "{told}"
    );
    stop(gateway);
    assert!(!path.exists());
}

#[test]
fn resolution_without_a_control_socket_requires_a_stopped_gateway() {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, guarded().set("admin.control", "off"));
    let first = leave_unknown(&sandbox, &gateway, "", BODY);
    let audit = gateway.audit_directory();
    let (code, told) = resolve(&audit, &first, "done", &[]);
    assert_eq!(code, 1);
    assert!(told.contains("a gateway writes this trail"), "{told}");
    let _folder = stop(gateway);
    assert_eq!(resolve(&audit, &first, "done", &[]).0, 0);
}

#[test]
fn resolution_after_a_stop_leaves_no_success_undelivered() {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, guarded());
    let first = leave_unknown(&sandbox, &gateway, KEY, BODY);
    let other = BODY.replace("954645333549048833", "1");
    assert_eq!(gateway.post(&other).outcome(), "succeeded");
    let folder = stop(gateway);
    assert_eq!(resolve(&folder.path().join("audit"), &first, "done", &[]).0, 0);
    let gateway = restart(&sandbox, folder);
    until_keys_are_known(&gateway);
    assert_eq!(gateway.post(&other).outcome(), "succeeded", "its caller knows of the first one");
}

#[test]
fn show_lists_every_record_of_a_request() {
    let sandbox = sandbox();
    let (gateway, first) = start_with_unknown(&sandbox, KEY);
    let audit = gateway.audit_directory();
    assert_eq!(gateway.post_with(KEY).code(), "outcome_unknown");
    assert_eq!(resolve(&audit, &first, "done", &[]).0, 0);
    assert_eq!(gateway.post_with(KEY).outcome(), "replayed");
    let words = ["audit", "show", audit.to_str().unwrap(), &first];
    let (told, lines) = wait_for("the records", || {
        let (code, told, _) = command(&words);
        assert_eq!(code, 0);
        let lines: Vec<_> = told.lines().map(str::to_owned).collect();
        (lines.len() == 5).then_some((told, lines))
    });
    for (line, parts) in lines.iter().zip([
        &["intent", "caller qa-console", "task"][..],
        &["outcome", "outcome unknown", "code upstream_broken", "upstream "],
        &["refusal of ", "which follows it", "code outcome_unknown"],
        &["resolution", "result done", "by Ann"],
        &["refusal of ", "outcome replayed", "first_outcome succeeded"],
    ]) {
        assert!(parts.iter().all(|part| line.contains(part)), "{parts:?}: {told}");
    }
    let (code, told, _) = command(&[&words[..], &["--json"]].concat());
    assert_eq!((code, told.lines().count()), (0, 5));
    assert!(told.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
    let nobody = "01890a5d-ac96-774b-bcce-b302099a8057";
    assert_eq!(command(&["audit", "show", audit.to_str().unwrap(), nobody]).0, 1);
}

#[test]
fn unresolved_calls_survive_segments_and_restarts_when_redacted() {
    let sandbox = sandbox();
    let setup = |folder| {
        let setup = Setup { folder, ..guarded() }.set("audit.segment_size", "64KiB");
        setup.set("audit.fields.operator", "omit")
    };
    let gateway = start_ready(&sandbox, setup(None));
    let first = leave_unknown(&sandbox, &gateway, KEY, BODY);
    let second = leave_unknown(&sandbox, &gateway, "", &BODY.replace("954645333549048833", "7"));
    let fill = |gateway: &Gateway, from: u64| {
        for task in from..from + 200 {
            let body = BODY.replace("954645333549048833", &task.to_string());
            assert_eq!(gateway.post(&body).outcome(), "succeeded");
        }
        // A call without a key is answered before its outcome is committed: a kill would make the last one unknown.
        let of = |kind: &str| records(&gateway.audit_directory(), kind).len();
        wait_for("all outcomes", || (of("outcome") == of("intent")).then_some(()));
    };
    fill(&gateway, 1000);
    let gateway = start_ready(&sandbox, setup(Some(gateway.kill())));
    fill(&gateway, 2000);
    let audit = gateway.audit_directory();
    let count = || crate::audit::segments(&audit).len();
    assert!(count() > 4, "{}", count());
    gauge(&gateway, 2);
    let (code, told, _) = command(&["audit", "unresolved", audit.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(told.contains(&first) && told.contains(&second), "{told}");
    assert_eq!(resolve(&audit, &first, "done", &[]).0, 0);
    assert_eq!(resolve(&audit, &second, "done", &[]).0, 0);
    fill(&gateway, 3000);
    let gateway = start_ready(&sandbox, setup(Some(gateway.kill())));
    assert_done(&sandbox, &gateway, &first, KEY);
    let reply = gateway.post(&BODY.replace("954645333549048833", "7"));
    assert_eq!((reply.status, reply.outcome()), (409, "succeeded"));
}

#[test]
fn command_does_not_wait_for_a_full_control_socket() {
    let sandbox = sandbox();
    let (gateway, unknown) = start_with_unknown(&sandbox, "");
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("s");
    let _queue = crate::check::full_queue(&socket);
    let resolve = |more: &[&str]| {
        let audit = gateway.audit_directory();
        let words = ["audit", "resolve", audit.to_str().unwrap(), &unknown, "done", "--by", "a"];
        let mut child = Command::new(BINARY);
        let mut child = Running(child.args(words).args(more).stderr(Stdio::piped()).spawn().unwrap());
        let code = wait_for("the end", || child.0.try_wait().unwrap()).code();
        let mut said = String::new();
        child.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (code, said)
    };
    let (code, said) = resolve(&["--control", socket.to_str().unwrap()]);
    assert!(code == Some(1) && said.contains("does not answer"), "{said}");
    assert_eq!(resolve(&[]).0, Some(0), "the control");
}
