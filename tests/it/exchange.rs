//! Stage 9: faults of the upstream and what they mean; callers that leave; TLS.

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
    time::Duration,
};

use ccsqm_gateway::sandbox::{Code, Fault, Faults, Framing, Instead, Options, Sandbox, Then, Tls};
use serde_json::json;

use crate::support::*;

fn fault(sandbox: &Sandbox, fault: Fault) {
    script(sandbox, Faults::business(fault));
}

/// A script for business calls, and what it must lead to: the caller's status and outcome, how often the
/// upstream was asked, how often the token endpoint was.
type Row = (Vec<Fault>, u16, &'static str, usize, usize);

fn status(status: u16) -> Vec<Fault> {
    vec![Fault::status(status).with_header("Retry-After", "7").with_header("Location", "/elsewhere")]
}

fn body(status: u16, content_type: &str, body: &str) -> Vec<Fault> {
    vec![Fault { content_type: Some(content_type.to_owned()), ..Fault::status(status).with_body(body) }]
}

fn code(code: Code) -> Vec<Fault> {
    vec![Fault::code(code)]
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
        (vec![], 200, "succeeded", 1, 0),
        (code(Code::Unquoted), 200, "succeeded", 1, 0),
        (code(Code::Numeric), 200, "succeeded", 1, 0),
        (code(Code::Failure("0409001".to_owned())), 200, "failed", 1, 0),
        (code(Code::Absent), 200, "unknown", 1, 0),
        (code(Code::Two("0409000".to_owned(), "0409001".to_owned())), 200, "unknown", 1, 0),
        (code(Code::Two("0409000".to_owned(), "0409000".to_owned())), 200, "unknown", 1, 0),
        (body(200, "text/html", html), 200, "unknown", 1, 0),
        (body(200, "application/json", ""), 200, "unknown", 1, 0),
        (body(200, "application/json", "[]"), 200, "unknown", 1, 0),
        (body(200, "text/plain", coded), 200, "succeeded", 1, 0),
        (body(500, "application/json", "{}"), 500, "failed", 1, 0),
        (body(500, "text/html", html), 500, "unknown", 1, 0),
        (body(500, "application/json", "[]"), 500, "unknown", 1, 0),
        (body(500, "application/json", ""), 500, "unknown", 1, 0),
        (body(500, "application/json", "{\"resultCode\":"), 500, "unknown", 1, 0),
        (vec![Fault::body("\u{1f}\u{fffd}").with_header("Content-Encoding", "gzip")], 200, "unknown", 1, 0),
        (vec![Fault::default().with_header("Content-Encoding", "gzip")], 200, "succeeded", 1, 0),
        (vec![Fault::default().with_header("Content-Encoding", "identity")], 200, "succeeded", 1, 0),
        (vec![Fault { interim: Some(103), ..Fault::default() }], 200, "succeeded", 1, 0),
        (vec![Fault::framing(Framing::Chunked)], 200, "succeeded", 1, 0),
        (vec![Fault::framing(Framing::SlowBody(1))], 200, "succeeded", 1, 0),
        (vec![Fault::sized(60_000)], 200, "succeeded", 1, 0),
        (vec![Fault { size: Some(60_000), ..Fault::framing(Framing::Chunked) }], 200, "succeeded", 1, 0),
        (vec![Fault::sized(200_000)], 200, "succeeded", 1, 0),
        (vec![Fault { size: Some(200_000), ..Fault::framing(Framing::Chunked) }], 200, "succeeded", 1, 0),
        (vec![Fault { size: Some(200_000), ..Fault::status(500) }], 500, "unknown", 1, 0),
        (vec![Fault::delayed(200)], 200, "succeeded", 1, 0),
        (vec![Fault::then(Then::Close)], 200, "succeeded", 1, 0),
        (vec![Fault::then(Then::CloseIdle(0))], 200, "succeeded", 1, 0),
        (
            vec![Fault::then(Then::Extra("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".to_owned()))],
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
        (vec![Fault::instead(Instead::Reset)], 502, "unknown", 1, 0),
        (vec![Fault::instead(Instead::Close)], 502, "unknown", 1, 0),
        (vec![Fault::instead(Instead::Garbage)], 502, "unknown", 1, 0),
        (vec![Fault { interim: Some(103), ..Fault::instead(Instead::Close) }], 502, "unknown", 1, 0),
        (vec![Fault { interim: Some(103), ..Fault::instead(Instead::Reset) }], 502, "unknown", 1, 0),
        (vec![Fault { interim: Some(103), ..Fault::framing(Framing::Cut(0)) }], 502, "unknown", 1, 0),
        (vec![Fault::instead(Instead::Hang)], 504, "unknown", 1, 0),
        (vec![Fault::delayed(5000)], 504, "unknown", 1, 0),
        (vec![Fault::framing(Framing::HalfHead)], 502, "unknown", 1, 0),
        (vec![Fault::framing(Framing::HalfBody)], 502, "unknown", 1, 0),
        (vec![Fault::framing(Framing::Cut(0))], 502, "unknown", 1, 0),
        (vec![Fault::framing(Framing::SlowBody(300))], 504, "unknown", 1, 0),
        (vec![Fault { interim: Some(101), ..Fault::default() }], 502, "unknown", 1, 0),
        (vec![Fault::default().with_header("X-Huge", "x".repeat(1_000_000))], 502, "unknown", 1, 0),
    ]
}

/// Refused tokens: one replay with a different token, under the same intent, and no more.
fn refusals() -> Vec<Row> {
    let first = Fault::status(401).times(1);
    let then = |second| vec![first.clone(), second];
    vec![
        (vec![first.clone()], 200, "succeeded", 2, 1),
        (then(Fault::failure("0409001")), 200, "failed", 2, 1),
        (then(Fault::status(429)), 429, "refused", 2, 1),
        (then(Fault::status(503)), 503, "unknown", 2, 1),
        (then(Fault::instead(Instead::Reset)), 502, "unknown", 2, 1),
        (then(Fault::instead(Instead::Hang)), 504, "unknown", 2, 1),
        (vec![Fault { framing: Some(Framing::HalfBody), ..Fault::status(401) }], 502, "unknown", 1, 0),
        (vec![Fault { then: Some(Then::Close), ..Fault::status(401).times(1) }], 200, "succeeded", 2, 1),
        (vec![Fault { size: Some(2_000_000), ..Fault::status(401).times(1) }], 200, "succeeded", 2, 1),
        (vec![Fault::status(401)], 502, "refused", 2, 1),
        (vec![Fault::status(401)], 502, "refused", 1, 0), // the cool-down: no fetch
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
    for (faults, status, outcome, attempts, refreshes) in rows {
        let shown = shown(&faults).chars().take(200).collect::<String>();
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
        script(&sandbox, Faults::business(faults));
        let reply = gateway.call();
        script(&sandbox, Faults::default());
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
        Fault {
            content_type: Some("text/x-anything".to_owned()),
            ..Fault::body(said)
                .with_header("Set-Cookie", "a=b")
                .with_header("Server", "x")
                .with_header("Authorization", "Bearer x")
                .with_header("WWW-Authenticate", "Bearer")
                .with_header("X-Gateway-Outcome", "failed")
                .with_header("Connection", "x-request-id")
        },
    );
    let reply = gateway.call(); // reading it asserts that every header is on the list of allowed ones
    assert_eq!((reply.status, reply.body.as_str(), reply.outcome()), (200, said, "succeeded"));
    assert_eq!(reply.headers["content-type"], "text/x-anything");
}

#[test]
fn truncated_long_reply_aborts_the_caller_connection() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    fault(&sandbox, Fault { size: Some(300_000), ..Fault::framing(Framing::Cut(200_000)) });
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome()), (200, "succeeded"), "the first 64 KiB decide");
    assert!(
        reply.body.len() < 300_000 && !reply.body.ends_with("0\r\n\r\n"),
        "the caller must see the break"
    );
    let record = &gateway.records("outcome", 1)[0];
    assert_eq!(record["outcome"], "succeeded");
    assert!(record["note"].as_str().unwrap().contains("broke off"), "{record}");
    fault(&sandbox, Fault::sized(300_000));
    assert_eq!(gateway.call().body.len(), 300_000, "the control");
}

#[test]
fn persistently_refused_token_costs_one_refresh_and_then_none() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    let tokens = sandbox.token_calls().len();
    fault(&sandbox, Fault::status(401));
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
        fault(&sandbox, Fault::delayed(300));
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
    fault(&sandbox, Fault::then(Then::CloseIdle(0)));
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
            log.lines().find(|line| line.contains("\"token fetch failed\"")).map(str::to_owned)
        });
        assert!(line.contains(is_there) && !line.contains(is_not_there), "{case}: {line}");
        assert!(line.len() < 600, "{case}: {line}");
    }
}
