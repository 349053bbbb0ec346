//! How each answer is brought about. Each function takes the header line of a key, or an empty text.

use std::{
    fs,
    io::Write,
    net::TcpStream,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};
use tempfile::TempDir;

use super::Trial;
use crate::{audit::disk::Disk, exchange::leave_by, idempotency::until_keys_are_known, support::*};

pub(crate) const KEY: &str = "idempotency-key: the-key\r\n";

/// Makes a call and notes how often the upstream receives it.
pub(super) fn observe(sandbox: Sandbox, gateway: Gateway, call: impl FnOnce(&Gateway) -> Reply) -> Trial {
    let before = sandbox.requests().len();
    let reply = call(&gateway);
    let received = sandbox.requests().len() - before;
    Trial { sandbox, gateway, reply, first: None, received, end: Box::new(|| ()) }
}

impl Trial {
    fn about(self, first: &str) -> Self {
        Self { first: Some(first.to_owned()), ..self }
    }

    /// Keeps something until the call's traces were looked at.
    fn holding(self, held: impl Sized + 'static) -> Self {
        Self { end: Box::new(move || drop(held)), ..self }
    }
}

pub(crate) fn id(reply: &Reply) -> &str {
    &reply.headers["x-gateway-request-id"]
}

/// A gateway that takes keys.
pub(crate) fn start_ready(sandbox: &Sandbox, setup: Setup) -> Gateway {
    let gateway = start_with(sandbox, setup);
    until_keys_are_known(&gateway);
    gateway
}

/// A call that waits for its answer: returns when the upstream has received it.
pub(crate) fn hold(sandbox: &Sandbox, gateway: &Gateway, headers: &str, body: &str) -> TcpStream {
    let before = sandbox.requests().len();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(gateway.address).unwrap();
        stream.write_all((head(body.len(), headers) + body).as_bytes()).unwrap();
        let is_sent = wait_for("the request", || {
            let is_sent = sandbox.requests().len() > before;
            (is_sent || is_readable(&stream)).then_some(is_sent)
        });
        if is_sent {
            return stream;
        }
        let reply = read_reply(&mut stream);
        assert_eq!(reply.code(), "audit_unavailable", "{reply:?}");
    }
    panic!("the trail is late for each call");
}

/// The id of the call whose intent came last.
pub(crate) fn newest(gateway: &Gateway) -> String {
    let intents = records(&gateway.audit_directory(), "intent");
    intents.last().unwrap()["id"].as_str().unwrap().to_owned()
}

fn with_setup(key: &str, setup: Setup, call: impl FnOnce(&Gateway, &str) -> Reply) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, setup);
    observe(sandbox, gateway, |gateway| call(gateway, key))
}

/// The example request with one text of its head replaced.
fn altered(gateway: &Gateway, key: &str, from: &str, to: &str) -> Reply {
    let head = head(BODY.len(), key);
    assert!(head.contains(from), "{head}");
    gateway.send(&head.replacen(from, to, 1), BODY)
}

fn with_altered(key: &str, from: &str, to: &str) -> Trial {
    with_setup(key, Setup::default(), |gateway, key| altered(gateway, key, from, to))
}

pub(super) fn draining(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default());
    assert_eq!(gateway.call().outcome(), "succeeded");
    script(&sandbox, Faults::business(Fault::delayed(3000)));
    let in_flight = hold(&sandbox, &gateway, "", BODY);
    let request = head(BODY.len(), key) + BODY;
    let mut begun = TcpStream::connect(gateway.address).unwrap();
    begun.write_all(&request.as_bytes()[..30]).unwrap();
    wait_for("two connections", || {
        gateway.admin("/metrics").body.contains("ccsqm_gateway_connections 2").then_some(())
    });
    gateway.signal("-TERM");
    wait_for("the stop", || gateway.log().contains("shutdown started").then_some(()));
    let finish = |_: &Gateway| {
        begun.write_all(&request.as_bytes()[30..]).unwrap();
        read_reply(&mut begun)
    };
    observe(sandbox, gateway, finish).holding(in_flight)
}

pub(super) fn overloaded(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default().set("server.max_in_flight", 2));
    script(&sandbox, Faults::business(Fault::delayed(60_000)));
    let held = [0; 2].map(|_| hold(&sandbox, &gateway, "", BODY));
    observe(sandbox, gateway, |gateway| gateway.post_with(key)).holding(held)
}

pub(super) fn overloaded_by_connections(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default().set("server.max_connections", 3));
    let held = [0; 3].map(|_| TcpStream::connect(gateway.address).unwrap());
    wait_for("three connections", || {
        gateway.admin("/metrics").body.contains("ccsqm_gateway_connections 3").then_some(())
    });
    observe(sandbox, gateway, |gateway| gateway.post_with(key)).holding(held)
}

pub(super) fn overloaded_upstream(key: &str) -> Trial {
    let setup = Setup::default().set("server.workers", 1).set("upstream.max_connections", 1);
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, setup.set("upstream.connect_timeout", "300ms"));
    script(&sandbox, Faults::business(Fault::delayed(60_000)));
    let held = hold(&sandbox, &gateway, "", BODY);
    observe(sandbox, gateway, |gateway| gateway.post_with(key)).holding(held)
}

pub(super) fn rate_limited(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup { limit: Some(("1/h", 1)), ..Setup::default() });
    // Once: a call that the trail is late for counts, too.
    assert_ne!(gateway.call_once().code(), "rate_limited");
    observe(sandbox, gateway, |gateway| gateway.post_with(key))
}

pub(super) fn quota_exhausted(key: &str) -> Trial {
    let setup = Setup::default().set("quota.rate", "1/h").set("quota.burst", 1);
    with_first(key, setup, Vec::new(), "")
}

pub(super) fn upstream_suspended(key: &str) -> Trial {
    let setup = Setup::default().set("upstream.breaker_failures", 1).set("upstream.breaker_pause", "1m");
    with_first(key, setup, vec![Fault::status(503)], "")
}

/// Another call goes before the one that is looked at, and meets faults.
fn with_first(key: &str, setup: Setup, business: Vec<Fault>, headers: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, setup);
    script(&sandbox, Faults::business(business));
    gateway.post_with(headers);
    observe(sandbox, gateway, |gateway| gateway.post_with(key))
}

pub(super) fn upstream_unreachable(key: &str) -> Trial {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let setup = Setup { base_url: Some(format!("http://{nobody}")), ..Setup::default() };
    with_setup(key, setup, Gateway::post_with)
}

pub(super) fn body_timeout(key: &str) -> Trial {
    let setup = Setup::default().set("server.body_timeout", "200ms");
    with_setup(key, setup, |gateway, key| gateway.send(&head(BODY.len() + 1, key), BODY))
}

pub(super) fn body_incomplete(key: &str) -> Trial {
    with_setup(key, Setup::default(), |gateway, key| {
        gateway.send_and_finish(&head(BODY.len() + 1, key), BODY)
    })
}

pub(super) fn audit_unavailable(key: &str) -> Trial {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_ready(&sandbox, disk.setup("kernel"));
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.records("outcome", 1);
    disk.ask_for("fail-writes", "5");
    let trial = observe(sandbox, gateway, |gateway| gateway.send_once(&head(BODY.len(), key), BODY));
    Trial { end: Box::new(move || disk.no_more("fail-writes")), ..trial }
}

/// With a key the table of keys is full, without one the caller's share of the doubts.
pub(super) fn idempotency_unavailable(key: &str) -> Trial {
    if key.is_empty() {
        return too_many_doubts();
    }
    with_first(key, Setup::default().set("idempotency.max_keys", 1), Vec::new(), "idempotency-key: other\r\n")
}

/// Half of what can be remembered, for a caller that is not alone.
const DOUBTS: usize = 5_000;

fn too_many_doubts() -> Trial {
    const CALLERS: usize = 8;
    let sandbox = sandbox();
    let other = crate::callers::caller("other", "127.0.0.2/32", "");
    let setup = Setup { caller: other, ..Setup::default() };
    let gateway = start_ready(&sandbox, setup.set("idempotency.without_key", "guard"));
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset)));
    thread::scope(|scope| {
        for caller in 0..CALLERS {
            let gateway = &gateway;
            scope.spawn(move || {
                for task in (caller..DOUBTS).step_by(CALLERS) {
                    let reply = gateway.post(&crate::audit::body(task as u64));
                    assert_eq!(reply.outcome(), "unknown", "{reply:?}");
                }
            });
        }
    });
    observe(sandbox, gateway, Gateway::call)
}

pub(super) fn token_unavailable(key: &str) -> Trial {
    let sandbox = sandbox();
    script(&sandbox, Faults { token_down: true, ..Faults::default() });
    let gateway = start_ready(&sandbox, Setup::default().set("token.wait", "100ms"));
    observe(sandbox, gateway, |gateway| gateway.post_with(key))
}

pub(super) fn token_unavailable_after_a_refusal(key: &str) -> Trial {
    let sandbox = sandbox();
    let setup = Setup::default().set("token.wait", "300ms").set("upstream.timeout", "10s");
    let gateway = start_ready(&sandbox, setup);
    assert_eq!(gateway.call().outcome(), "succeeded");
    sandbox.revoke();
    script(&sandbox, Faults { token_down: true, ..Faults::default() });
    observe(sandbox, gateway, |gateway| gateway.post_with(key))
}

/// A caller that closes its own side while its request waits has left, but may still read.
pub(super) fn caller_left(key: &str) -> Trial {
    let sandbox = sandbox();
    script(&sandbox, Faults::token(Fault::instead(Instead::Hang)));
    let gateway = start_ready(&sandbox, Setup::default().set("token.wait", "30s"));
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all((head(BODY.len(), key) + BODY).as_bytes()).unwrap();
    // Who closes its side right behind its request has only nothing more to say.
    let sent = Instant::now();
    wait_for("the wait for a token", || {
        let is_in_flight = gateway.admin("/metrics").body.contains("ccsqm_gateway_requests_in_flight 1");
        (is_in_flight && sent.elapsed() > Duration::from_millis(400)).then_some(())
    });
    observe(sandbox, gateway, |_| leave_by("half-close", stream).unwrap())
}

pub(super) fn credential_refused(key: &str) -> Trial {
    let sandbox = sandbox();
    sandbox.secret("sandbox-app-key", "another-secret");
    let gateway = start_ready(&sandbox, Setup::default());
    observe(sandbox, gateway, |gateway| gateway.post_with(key))
}

pub(super) fn credential_rejected(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default());
    assert_eq!(gateway.call().outcome(), "succeeded");
    script(&sandbox, Faults::business(Fault::status(401)));
    observe(sandbox, gateway, |gateway| gateway.post_with(key))
}

pub(super) fn browser_refused(key: &str) -> Trial {
    with_altered(key, "host:", "origin: http://evil\r\nhost:")
}

pub(super) fn caller_denied(key: &str) -> Trial {
    with_setup(key, Setup { peer: "127.0.0.2/32", ..Setup::default() }, Gateway::post_with)
}

/// A second route, for callers of whom `caller` tells.
pub(crate) fn with_other_route(caller: &str) -> Setup {
    let folder = Arc::new(TempDir::new().unwrap());
    let contract = format!("{}/config/contracts/appointQualityTask.json", env!("CARGO_MANIFEST_DIR"));
    fs::copy(contract, folder.path().join("contract.json")).unwrap();
    Setup { caller: OTHER_ROUTE.to_owned() + caller, folder: Some(folder), ..Setup::default() }
}

pub(super) fn route_denied(key: &str) -> Trial {
    let setup = with_other_route(&crate::callers::caller("other", "127.0.0.2/32", ""));
    with_setup(key, setup, |gateway, key| altered(gateway, key, PATH, OTHER_PATH))
}

pub(super) fn operator_denied(key: &str) -> Trial {
    with_altered(key, "host:", "x-userid: 999\r\nhost:")
}

pub(super) fn frozen_caller(key: &str) -> Trial {
    with_setup(key, Setup { caller: "frozen = true".into(), ..Setup::default() }, Gateway::post_with)
}

pub(super) fn frozen_route(key: &str) -> Trial {
    let route = "[[routes]]\nname = \"appointQualityTask\"\nfrozen = true";
    with_setup(key, Setup { caller: route.into(), ..Setup::default() }, Gateway::post_with)
}

pub(super) fn head_invalid(key: &str) -> Trial {
    with_altered(key, "host: localhost", "host: localhost\r\nhost: localhost")
}

pub(super) fn host_unknown(key: &str) -> Trial {
    with_altered(key, "host: localhost", "host: evil")
}

pub(super) fn header_missing(key: &str) -> Trial {
    let caller = "require_header = \"x-ccsqm-gateway\"".into();
    with_setup(key, Setup { caller, ..Setup::default() }, Gateway::post_with)
}

pub(super) fn route_unknown(key: &str) -> Trial {
    with_altered(key, PATH, &format!("{PATH}/"))
}

pub(super) fn method_not_allowed(key: &str) -> Trial {
    with_altered(key, "POST", "PUT")
}

pub(super) fn target_invalid(key: &str) -> Trial {
    with_altered(key, PATH, &format!("{PATH}?x=1"))
}

pub(super) fn body_too_large(key: &str) -> Trial {
    let huge = format!("{{\"a\":\"{}\"}}", "x".repeat(300 * 1024));
    with_setup(key, Setup::default(), |gateway, key| gateway.send(&head(huge.len(), key), &huge))
}

pub(super) fn media_type_unsupported(key: &str) -> Trial {
    with_altered(key, "application/json", "text/plain")
}

pub(super) fn expectation_failed(key: &str) -> Trial {
    with_altered(key, "host:", "expect: something\r\nhost:")
}

pub(super) fn trailers(key: &str) -> Trial {
    let chunked = format!("{:x}\r\n{BODY}\r\n0\r\nx-more: 1\r\n\r\n", BODY.len());
    with_setup(key, Setup::default(), |gateway, key| {
        let head = head(0, key).replace("content-length: 0", "transfer-encoding: chunked");
        gateway.send(&head, &chunked)
    })
}

fn with_body(key: &str, body: &str) -> Trial {
    with_setup(key, Setup::default(), |gateway, key| gateway.send(&head(body.len(), key), body))
}

pub(super) fn body_not_json(key: &str) -> Trial {
    with_body(key, &BODY.replace('}', "]"))
}

pub(super) fn contract_violation(key: &str) -> Trial {
    with_body(key, &BODY.replace("\"setCountsType\":1", "\"setCountsType\":2"))
}

/// With a key it breaks the rules; without one it is needed.
pub(super) fn idempotency_key_invalid(key: &str) -> Trial {
    let (mode, headers) = match key {
        "" => ("require_key", ""),
        _ => ("guard", "idempotency-key: two words\r\n"),
    };
    with_setup(headers, Setup::default().set("idempotency.without_key", mode), Gateway::post_with)
}

pub(super) fn idempotency_force_invalid(key: &str) -> Trial {
    let headers = format!("{key}idempotency-force: no-id\r\n");
    with_setup(&headers, Setup::default().set("idempotency.without_key", "guard"), Gateway::post_with)
}

pub(super) fn idempotency_mismatch(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default());
    let first = gateway.post_with(key);
    let other = BODY.replace("954645333549048833", "1");
    observe(sandbox, gateway, |gateway| gateway.send(&head(other.len(), key), &other)).about(id(&first))
}

pub(super) fn request_in_progress(key: &str) -> Trial {
    at_work(key, key, "off")
}

pub(super) fn outcome_unknown(key: &str) -> Trial {
    after_unknown(key, key, "off")
}

pub(super) fn duplicate_of_one_at_work(key: &str) -> Trial {
    at_work("", key, "guard")
}

pub(super) fn duplicate_of_an_unknown_one(key: &str) -> Trial {
    after_unknown("", key, "guard")
}

fn at_work(first_key: &str, key: &str, mode: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default().set("idempotency.without_key", mode));
    script(&sandbox, Faults::business(Fault::delayed(60_000).times(1)));
    let held = hold(&sandbox, &gateway, first_key, BODY);
    let first = newest(&gateway);
    observe(sandbox, gateway, |gateway| gateway.post_with(key)).about(&first).holding(held)
}

fn after_unknown(first_key: &str, key: &str, mode: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default().set("idempotency.without_key", mode));
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let first = gateway.post_with(first_key);
    assert_eq!(first.outcome(), "unknown", "{first:?}");
    observe(sandbox, gateway, |gateway| gateway.post_with(key)).about(id(&first))
}

/// Makes a call whose caller closes its connection before its answer comes; returns its id when it is on record that it
/// succeeded.
pub(super) fn leave_undelivered(sandbox: &Sandbox, gateway: &Gateway, key: &str, body: &str) -> String {
    leave_undelivered_by("fin", sandbox, gateway, key, body)
}

/// The same, for a way to leave: `fin` or `reset`.
pub(super) fn leave_undelivered_by(
    way: &str,
    sandbox: &Sandbox,
    gateway: &Gateway,
    key: &str,
    body: &str,
) -> String {
    script(sandbox, Faults::business(Fault::delayed(200).times(1)));
    leave_by(way, hold(sandbox, gateway, key, body));
    let first = newest(gateway);
    let outcome = wait_for("the outcome", || {
        records(&gateway.audit_directory(), "outcome").into_iter().find(|record| record["id"] == first)
    });
    assert_eq!(outcome["outcome"], "succeeded", "{outcome}");
    first
}

/// Calls again until the first call is no longer at work: its outcome is on record a moment earlier.
pub(super) fn call_after(gateway: &Gateway, key: &str, body: &str) -> Reply {
    wait_for("the end of the first call", || {
        let reply = gateway.send(&head(body.len(), key), body);
        (reply.status != 409 || reply.outcome() != "unknown").then_some(reply)
    })
}

pub(super) fn duplicate_of_an_undelivered_one(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default().set("idempotency.without_key", "guard"));
    assert_eq!(
        gateway.post(&BODY.replace("954645333549048833", "1")).outcome(),
        "succeeded",
        "there is a token"
    );
    let first = leave_undelivered(&sandbox, &gateway, "", BODY);
    observe(sandbox, gateway, |gateway| call_after(gateway, key, BODY)).about(&first)
}

pub(super) fn duplicate_of_a_resolved_one(key: &str) -> Trial {
    after_resolution("", key)
}

pub(super) fn replayed_after_resolution(key: &str) -> Trial {
    after_resolution(key, key)
}

fn after_resolution(first_key: &str, key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default().set("idempotency.without_key", "guard"));
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let first = gateway.post_with(first_key);
    let audit = gateway.audit_directory();
    let resolved = command(&["audit", "resolve", audit.to_str().unwrap(), id(&first), "done", "--by", "Ann"]);
    assert_eq!(resolved.0, 0, "{resolved:?}");
    observe(sandbox, gateway, |gateway| gateway.post_with(key)).about(id(&first))
}

pub(super) fn duplicate_that_is_blocked(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default().set("idempotency.without_key", "block"));
    let first = gateway.call();
    assert_eq!(first.outcome(), "succeeded");
    observe(sandbox, gateway, |gateway| gateway.post_with(key)).about(id(&first))
}

/// The disk fails while the call is at the upstream.
pub(super) fn answer_not_on_record(key: &str) -> Trial {
    let (sandbox, disk) = (sandbox(), Arc::new(Disk::new()));
    let setup = disk.setup("kernel").set("upstream.timeout", "2s").set("upstream.connect_timeout", "2s");
    let gateway = start_ready(&sandbox, setup);
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.records("outcome", 1);
    script(&sandbox, Faults::business(Fault::delayed(500).times(1)));
    let before = sandbox.requests().len();
    let mut stream = hold(&sandbox, &gateway, key, BODY);
    disk.ask_for("fail-writes", "5");
    let trial = observe(sandbox, gateway, |_| read_reply(&mut stream));
    let received = trial.sandbox.requests().len() - before;
    Trial { received, end: Box::new(move || disk.no_more("fail-writes")), ..trial }
}

pub(super) fn upstream_timeout(key: &str) -> Trial {
    let setup = Setup::default().set("upstream.timeout", "500ms").set("upstream.connect_timeout", "500ms");
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, setup);
    script(&sandbox, Faults::business(Fault::instead(Instead::Hang)));
    observe(sandbox, gateway, |gateway| gateway.post_with(key))
}

pub(super) fn upstream_broken(key: &str) -> Trial {
    passed(key, Fault::instead(Instead::Reset))
}

/// The upstream answers as the fault says.
pub(super) fn passed(key: &str, fault: Fault) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default());
    script(&sandbox, Faults::business(fault));
    observe(sandbox, gateway, |gateway| gateway.post_with(key))
}

pub(super) fn replayed(key: &str, fault: Fault) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default());
    script(&sandbox, Faults::business(fault));
    let first = gateway.post_with(key);
    observe(sandbox, gateway, |gateway| gateway.post_with(key)).about(id(&first))
}

pub(super) fn dry_run(key: &str) -> Trial {
    with_setup(key, Setup::default(), |gateway, key| rehearse(gateway, key, BODY))
}

pub(super) fn dry_run_of_a_duplicate(key: &str) -> Trial {
    let sandbox = sandbox();
    let gateway = start_ready(&sandbox, Setup::default().set("idempotency.without_key", "guard"));
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let first = gateway.call();
    observe(sandbox, gateway, |gateway| rehearse(gateway, key, BODY)).about(id(&first))
}

/// Sends a body as a dry run.
pub(super) fn rehearse(gateway: &Gateway, headers: &str, body: &str) -> Reply {
    let head = head(body.len(), headers).replacen(PATH, &format!("/.gateway/dry-run{PATH}"), 1);
    gateway.send(&head, body)
}
