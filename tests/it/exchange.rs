//! Stage 9: faults of the upstream and what they mean; callers that leave; TLS.

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
    time::Duration,
};

use ccsqm_gateway::sandbox::{Options, Sandbox, Tls};
use serde_json::{Value, json};

use crate::support::*;

fn fault(sandbox: &Sandbox, fault: Value) {
    sandbox.faults(serde_json::from_value(json!({ "business": [fault] })).unwrap()).unwrap();
}

/// A script for business calls, and what it must lead to: the caller's status and outcome, how often the
/// upstream was asked, how often the token endpoint was.
type Row = (Value, u16, &'static str, usize, usize);

fn status(status: u16) -> Value {
    json!([{ "status": status, "headers": [["Retry-After", "7"], ["Location", "/elsewhere"]] }])
}

fn body(status: u16, content_type: &str, body: &str) -> Value {
    json!([{ "status": status, "content_type": content_type, "body": body }])
}

fn code(code: Value) -> Value {
    json!([{ "code": code }])
}

/// Every row of the classification of statuses.
fn statuses() -> Vec<Row> {
    let of = |outcome: &'static str, statuses: &[u16]| {
        statuses.iter().map(|s| (status(*s), *s, outcome, 1, 0)).collect::<Vec<_>>()
    };
    [
        of("failed", &[400, 404, 405, 411, 413, 414, 415, 422, 431, 500]),
        of("refused", &[403, 418, 429]),
        of("unknown", &[201, 202, 204, 206, 300, 301, 302, 303, 304, 307, 308]),
        of("unknown", &[402, 406, 407, 408, 409, 410, 412, 416, 417, 421, 423, 425, 426, 428, 451, 499]),
        of("unknown", &[501, 502, 503, 504, 505, 507, 511, 520, 599]),
    ]
    .concat()
}

/// Every form of an answer.
fn answers() -> Vec<Row> {
    let html = "<html>Bad gateway</html>";
    let coded = r#"{"resultCode":"0409000"}"#;
    vec![
        (json!([]), 200, "succeeded", 1, 0),
        (code(json!("unquoted")), 200, "succeeded", 1, 0),
        (code(json!("numeric")), 200, "succeeded", 1, 0),
        (code(json!({ "failure": "0409001" })), 200, "failed", 1, 0),
        (code(json!("absent")), 200, "unknown", 1, 0),
        (code(json!({ "two": ["0409000", "0409001"] })), 200, "unknown", 1, 0),
        (code(json!({ "two": ["0409000", "0409000"] })), 200, "unknown", 1, 0),
        (body(200, "text/html", html), 200, "unknown", 1, 0),
        (body(200, "application/json", ""), 200, "unknown", 1, 0),
        (body(200, "application/json", "[]"), 200, "unknown", 1, 0),
        (body(200, "text/plain", coded), 200, "succeeded", 1, 0),
        (body(500, "application/json", "{}"), 500, "failed", 1, 0),
        (body(500, "text/html", html), 500, "unknown", 1, 0),
        (body(500, "application/json", "[]"), 500, "unknown", 1, 0),
        (body(500, "application/json", ""), 500, "unknown", 1, 0),
        (body(500, "application/json", "{\"resultCode\":"), 500, "unknown", 1, 0),
        (
            json!([{ "headers": [["Content-Encoding", "gzip"]], "body": "\u{1f}\u{fffd}" }]),
            200,
            "unknown",
            1,
            0,
        ),
        (json!([{ "headers": [["Content-Encoding", "gzip"]] }]), 200, "succeeded", 1, 0),
        (json!([{ "headers": [["Content-Encoding", "identity"]] }]), 200, "succeeded", 1, 0),
        (json!([{ "interim": 103 }]), 200, "succeeded", 1, 0),
        (json!([{ "framing": "chunked" }]), 200, "succeeded", 1, 0),
        (json!([{ "framing": { "slow_body_ms": 1 } }]), 200, "succeeded", 1, 0),
        (json!([{ "size": 60_000 }]), 200, "succeeded", 1, 0),
        (json!([{ "size": 60_000, "framing": "chunked" }]), 200, "succeeded", 1, 0),
        (json!([{ "size": 200_000 }]), 200, "succeeded", 1, 0),
        (json!([{ "size": 200_000, "framing": "chunked" }]), 200, "succeeded", 1, 0),
        (json!([{ "status": 500, "size": 200_000 }]), 500, "unknown", 1, 0),
        (json!([{ "delay_ms": 200 }]), 200, "succeeded", 1, 0),
        (json!([{ "then": "close" }]), 200, "succeeded", 1, 0),
        (json!([{ "then": { "close_idle_ms": 0 } }]), 200, "succeeded", 1, 0),
        (
            json!([{ "then": { "extra": "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" } }]),
            200,
            "succeeded",
            1,
            0,
        ),
    ]
}

/// Every way in which no whole answer comes.
fn breaks() -> Vec<Row> {
    vec![
        (json!([{ "instead": "reset" }]), 502, "unknown", 1, 0),
        (json!([{ "instead": "close" }]), 502, "unknown", 1, 0),
        (json!([{ "instead": "garbage" }]), 502, "unknown", 1, 0),
        (json!([{ "interim": 103, "instead": "close" }]), 502, "unknown", 1, 0),
        (json!([{ "interim": 103, "instead": "reset" }]), 502, "unknown", 1, 0),
        (json!([{ "interim": 103, "framing": { "cut": 0 } }]), 502, "unknown", 1, 0),
        (json!([{ "instead": "hang" }]), 504, "unknown", 1, 0),
        (json!([{ "delay_ms": 5000 }]), 504, "unknown", 1, 0),
        (json!([{ "framing": "half_head" }]), 502, "unknown", 1, 0),
        (json!([{ "framing": "half_body" }]), 502, "unknown", 1, 0),
        (json!([{ "framing": { "cut": 0 } }]), 502, "unknown", 1, 0),
        (json!([{ "framing": { "slow_body_ms": 300 } }]), 504, "unknown", 1, 0),
        (json!([{ "interim": 101 }]), 502, "unknown", 1, 0),
        (json!([{ "headers": [["X-Huge", "x".repeat(1_000_000)]] }]), 502, "unknown", 1, 0),
    ]
}

/// Refused tokens: one replay with a different token, under the same intent, and no more.
fn refusals() -> Vec<Row> {
    let first = json!({ "status": 401, "times": 1 });
    let then = |second: Value| json!([first, second]);
    vec![
        (json!([first]), 200, "succeeded", 2, 1),
        (then(json!({ "code": { "failure": "0409001" } })), 200, "failed", 2, 1),
        (then(json!({ "status": 429 })), 429, "refused", 2, 1),
        (then(json!({ "status": 503 })), 503, "unknown", 2, 1),
        (then(json!({ "instead": "reset" })), 502, "unknown", 2, 1),
        (then(json!({ "instead": "hang" })), 504, "unknown", 2, 1),
        (json!([{ "status": 401, "framing": "half_body" }]), 502, "unknown", 1, 0),
        (json!([{ "status": 401, "then": "close", "times": 1 }]), 200, "succeeded", 2, 1),
        (json!([{ "status": 401, "size": 2_000_000, "times": 1 }]), 200, "succeeded", 2, 1),
        (json!([{ "status": 401 }]), 502, "refused", 2, 1),
        (json!([{ "status": 401 }]), 502, "refused", 1, 0), // the cool-down: no fetch
    ]
}

#[test]
fn every_upstream_fault_has_its_outcome_and_attempt_count() {
    let sandbox = sandbox();
    let start = || {
        let short = Setup::default().set("upstream.timeout", "2s").set("upstream.connect_timeout", "2s");
        start_with(&sandbox, short)
    };
    let mut gateway = start();
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    let rows = [statuses(), answers(), breaks(), refusals()].concat();
    for (script, status, outcome, attempts, refreshes) in rows {
        let shown = script.to_string().chars().take(200).collect::<String>();
        if refreshes > 0 {
            // A new one: where several tokens in a row are refused soon, fetches are slowed down.
            gateway = start();
            // A success, so that no cool-down goes on, and no fetch within a second of the last one.
            assert_eq!(gateway.call().outcome(), "succeeded", "{shown}");
            let fetched = sandbox.token_calls().last().unwrap().request.time;
            wait_for("a second since the last fetch", || {
                (fetched.elapsed().unwrap_or_default() >= Duration::from_secs(1)).then_some(())
            });
        }
        let before = (sandbox.requests().len(), sandbox.token_calls().len());
        sandbox.faults(serde_json::from_value(json!({ "business": script })).unwrap()).unwrap();
        let reply = gateway.call();
        sandbox.faults(Default::default()).unwrap();
        assert_eq!((reply.status, reply.outcome()), (status, outcome), "{shown}: {reply:?}");
        let asked = (sandbox.requests().len() - before.0, sandbox.token_calls().len() - before.1);
        assert_eq!(asked, (attempts, refreshes), "{shown}: upstream and token calls");
        let may_repeat = reply.headers.get("retry-after").map(String::as_str);
        match outcome {
            "unknown" => assert_eq!(may_repeat, None, "{shown}: a generic client would assign twice"),
            "refused" => assert!(may_repeat.is_some(), "{shown}"),
            _ => {}
        }
        let id = &reply.headers["x-gateway-request-id"];
        let record = wait_for("the outcome", || {
            records(&gateway.audit_directory(), "outcome").into_iter().find(|record| record["id"] == **id)
        });
        let said = (&record["outcome"], &record["attempts"], &record["status"]);
        assert_eq!(said, (&json!(outcome), &json!(attempts), &json!(status)), "{shown}: {record}");
    }
    let (intents, outcomes) = (gateway.records("intent", 1), gateway.records("outcome", 1));
    assert_eq!(intents.len(), outcomes.len(), "one intent a task, also where it was sent twice");
}

#[test]
fn reply_passes_unchanged_except_for_private_headers() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let said = "{\"resultCode\" : 0409000,\t\"resultDesc\":\"\u{4efb}\u{52a1}\"} ";
    fault(
        &sandbox,
        json!({ "body": said, "content_type": "text/x-anything", "headers": [
            ["Set-Cookie", "a=b"], ["Server", "x"], ["Authorization", "Bearer x"], ["WWW-Authenticate", "Bearer"], ["X-Gateway-Outcome", "failed"], ["Connection", "x-request-id"],
        ] }),
    );
    let reply = gateway.call(); // reading it asserts that every header is on the list of allowed ones
    assert_eq!((reply.status, reply.body.as_str(), reply.outcome()), (200, said, "succeeded"));
    assert_eq!(reply.headers["content-type"], "text/x-anything");
}

#[test]
fn truncated_long_reply_aborts_the_caller_connection() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    fault(&sandbox, json!({ "size": 300_000, "framing": { "cut": 200_000 } }));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome()), (200, "succeeded"), "the first 64 KiB decide");
    assert!(
        reply.body.len() < 300_000 && !reply.body.ends_with("0\r\n\r\n"),
        "the caller must see the break"
    );
    let record = &gateway.records("outcome", 1)[0];
    assert_eq!(record["outcome"], "succeeded");
    assert!(record["note"].as_str().unwrap().contains("broke off"), "{record}");
    fault(&sandbox, json!({ "size": 300_000 }));
    assert_eq!(gateway.call().body.len(), 300_000, "the control");
}

#[test]
fn persistently_refused_token_costs_one_refresh_and_then_none() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    let tokens = sandbox.token_calls().len();
    fault(&sandbox, json!({ "status": 401 }));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.code(), reply.outcome()), (502, "credential_rejected", "refused"));
    assert_eq!((sandbox.requests().len(), sandbox.token_calls().len()), (3, tokens + 1));
    assert_eq!(gateway.call().code(), "credential_rejected");
    assert_eq!((sandbox.requests().len(), sandbox.token_calls().len()), (4, tokens + 1), "the cool-down");
}

/// Ways to leave.
pub(crate) const WAYS: [&str; 3] = ["fin", "reset", "half-close"];

/// Leaves; who only half-closed still gets an answer.
pub(crate) fn leave_by(way: &str, mut stream: TcpStream) -> Option<Reply> {
    match way {
        "fin" => drop(stream),
        "reset" => {
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            drop(stream);
        }
        _ => {
            stream.shutdown(Shutdown::Write).unwrap();
            return Some(read_reply(&mut stream));
        }
    }
    None
}

#[test]
fn caller_disconnect_after_the_intent_cancels_nothing() {
    for leave in WAYS {
        let sandbox = sandbox();
        let gateway = start(&sandbox);
        assert_eq!(gateway.call().outcome(), "succeeded");
        fault(&sandbox, json!({ "delay_ms": 300 }));
        let mut stream = TcpStream::connect(gateway.address).unwrap();
        stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
        if leave != "fin" {
            wait_for("the request", || (sandbox.requests().len() == 2).then_some(()));
        }
        if let Some(reply) = leave_by(leave, stream) {
            assert_eq!(reply.outcome(), "succeeded");
        }
        let outcomes = gateway.records("outcome", 2);
        assert_eq!(outcomes[1]["outcome"], "succeeded", "{leave}");
        assert_eq!(sandbox.requests().len(), 2, "{leave}");
        let audit = gateway.audit_directory();
        assert_eq!(command(&["audit", "in-doubt", audit.to_str().unwrap()]).0, 0, "{leave}");
    }
}

#[test]
fn closed_upstream_connection_is_replaced_transparently() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    fault(&sandbox, json!({ "then": { "close_idle_ms": 0 } }));
    for _ in 0..50 {
        assert_eq!(gateway.call().outcome(), "succeeded");
        wait_for("the upstream's close", || (sandbox.connections().open == 0).then_some(()));
    }
    assert_eq!(sandbox.requests().len(), 50);
}

/// A sandbox behind TLS, its token endpoint too, and a gateway's configuration that trusts it.
pub(crate) fn secure_sandbox() -> (Sandbox, Setup) {
    let (ca, tls) = certificate("localhost", false);
    let secure =
        Sandbox::start(Options { tls: Some(tls), token_listener: true, ..Options::default() }).unwrap();
    let folder = std::sync::Arc::new(tempfile::TempDir::new().unwrap());
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, ca).unwrap();
    let base_url = Some(secure.url().replace("127.0.0.1", "localhost"));
    let token_url = Some(secure.token_url().replace("127.0.0.1", "localhost"));
    let setup = Setup { base_url, token_url, folder: Some(folder), ..Setup::default() };
    (secure, setup.set("upstream.ca_file", ca_file.display()))
}

/// A CA, and a server certificate that it signs.
pub(crate) fn certificate(name: &str, expired: bool) -> (String, Tls) {
    certificate_of([name.to_owned()].into(), expired)
}

/// The same with several names.
fn certificate_of(names: Vec<String>, expired: bool) -> (String, Tls) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let mut leaf = CertificateParams::new(names).unwrap();
    if expired {
        leaf.not_after = date_time_ymd(2020, 1, 1);
    }
    let key = KeyPair::generate().unwrap();
    let leaf = leaf.signed_by(&key, &ca).unwrap();
    (ca.pem(), Tls { cert_pem: leaf.pem(), key_pem: key.serialize_pem() })
}

#[test]
fn nothing_is_sent_to_a_server_with_an_invalid_certificate() {
    let plain = sandbox();
    for (case, name, expired, trusted) in [
        ("control", "localhost", false, true),
        ("unknown CA", "localhost", false, false),
        ("wrong name", "other.example", false, true),
        ("expired", "localhost", true, true),
    ] {
        let (ca, tls) = certificate(name, expired);
        let (other, _) = certificate("localhost", false);
        let secure = Sandbox::start(Options { tls: Some(tls), ..Options::default() }).unwrap();
        let folder = std::sync::Arc::new(tempfile::TempDir::new().unwrap());
        let ca_file = folder.path().join("ca.pem");
        std::fs::write(&ca_file, if trusted { ca } else { other }).unwrap();
        let base_url = format!("https://localhost:{}", secure.address().port());
        // The control takes its token from the TLS sandbox, too; the others from the plain one, so that
        // they get as far as the upstream.
        let token_url = (case == "control").then(|| secure.token_url().replace("127.0.0.1", "localhost"));
        let setup = Setup { base_url: Some(base_url), token_url, folder: Some(folder), ..Setup::default() }
            .set("upstream.ca_file", ca_file.display());
        let gateway = start_with(&plain, setup);
        let reply = gateway.call();
        if case == "control" {
            assert_eq!(reply.outcome(), "succeeded", "{reply:?}");
            continue;
        }
        assert_eq!(
            (reply.status, reply.code(), reply.outcome()),
            (502, "upstream_unreachable", "not_sent"),
            "{case}"
        );
        assert_eq!(secure.connections().application_bytes, 0, "{case}");
    }
}

/// The names in its certificate are the other side's words.
#[test]
fn logged_names_of_the_token_endpoint_are_cut_and_hold_no_secret() {
    let plain = sandbox();
    let many = |first: &str| {
        let others = (0..100).map(|number| format!("name-{number}.example.org"));
        [first.to_owned()].into_iter().chain(others).collect::<Vec<_>>()
    };
    let secret = Options::default().app_secret;
    for (case, names, is_there, is_not_there) in [
        ("many names", many("first.example.org"), "first.example.org", "name-50.example.org"),
        ("a name that quotes", many(&secret), "quotes the credential", &*secret),
        ("the control", vec!["last.example.org".to_owned()], "last.example.org", "(cut)"),
    ] {
        let (ca, tls) = certificate_of(names, false);
        let secure = Sandbox::start(Options { tls: Some(tls), ..Options::default() }).unwrap();
        let folder = std::sync::Arc::new(tempfile::TempDir::new().unwrap());
        let ca_file = folder.path().join("ca.pem");
        std::fs::write(&ca_file, ca).unwrap();
        let token_url = Some(secure.token_url().replace("127.0.0.1", "localhost"));
        let setup = Setup { token_url, folder: Some(folder), ..Setup::default() };
        let gateway = start_with(&plain, setup.set("upstream.ca_file", ca_file.display()));
        let line = wait_for("the warning", || {
            let log = gateway.log();
            log.lines().find(|line| line.contains("\"no token\"")).map(str::to_owned)
        });
        assert!(line.contains(is_there) && !line.contains(is_not_there), "{case}: {line}");
        assert!(line.len() < 600, "{case}: {line}");
    }
}
