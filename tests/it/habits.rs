//! The other side's habits, which are no faults: each is taken, or refused with the true reason.

use std::{
    io::Write,
    net::TcpStream,
    time::{Duration, SystemTime},
};

use ccsqm_gateway::sandbox::{Fault, Faults};

use crate::support::*;

const GZIP: &str = "\u{1f}\u{fffd}not JSON";

#[test]
fn reply_with_any_spelling_of_identity_coding_is_read() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let coded = |codings: &[&str], body: Option<&str>| {
        let mut fault = Fault { body: body.map(str::to_owned), ..Fault::default() };
        for coding in codings {
            fault = fault.with_header("Content-Encoding", *coding);
        }
        script(&sandbox, Faults::business(fault));
        gateway.call().outcome().to_owned()
    };
    for codings in [&[][..], &[""], &["identity"], &["Identity"], &["IDENTITY, identity"], &["identity", ""]]
    {
        assert_eq!(coded(codings, None), "succeeded", "{codings:?}");
        assert_eq!(coded(codings, Some(GZIP)), "unknown", "the control: {codings:?}");
    }
    assert_eq!(coded(&["gzip"], Some(GZIP)), "unknown");
    assert_eq!(coded(&["gzip"], None), "succeeded", "it is not coded, whatever its head says");
    // Nor is the caller told that it is: its client would fail on it, and call again.
    let reply = gateway.post_with("idempotency-key: told-to-be-gzip\r\n");
    assert!(reply.outcome() == "succeeded" && !reply.headers.contains_key("content-encoding"), "{reply:?}");
    let again = gateway.post_with("idempotency-key: told-to-be-gzip\r\n");
    assert_eq!((again.outcome(), &again.body), ("replayed", &reply.body));
    assert_eq!(coded(&["gzip"], Some(r#"{"resultCode":"0409001"}"#)), "failed");
}

#[test]
fn request_may_state_identity_coding_and_any_spelling_of_utf8() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let call = |headers: &str| {
        let head = head(BODY.len(), "").replace("content-type: application/json\r\n", headers);
        let reply = gateway.send(&head, BODY);
        (reply.status, reply.json()["detail"].as_str().unwrap_or_default().to_owned())
    };
    let json = "content-type: application/json\r\n";
    for good in ["content-encoding: identity\r\n", "content-encoding: Identity\r\n", "content-encoding:\r\n"]
    {
        assert_eq!(call(&format!("{json}{good}")).0, 200, "{good}");
    }
    assert_eq!(call("content-type: application/json; charset=utf8\r\n").0, 200);
    let (status, detail) = call(&format!("{json}content-encoding: gzip\r\n"));
    assert!(status == 415 && detail.contains("Content-Encoding"), "{detail}");
    let (status, detail) = call("content-type: application/json; charset=latin1\r\n");
    assert!(status == 415 && detail.contains("charset=utf-8"), "{detail}");
    let (status, detail) = call(&format!("{json}{json}"));
    assert!(status == 415 && detail.contains("more than once"), "{detail}");
    assert_eq!(sandbox.requests().len(), 4);
}

#[test]
fn coded_token_reply_is_reported_and_identity_is_requested() {
    let sandbox = sandbox();
    script(&sandbox, Faults::token(Fault::body(GZIP).with_header("Content-Encoding", "gzip")));
    let gateway = start_with(&sandbox, Setup::default().set("token.wait", "1s"));
    assert_eq!(gateway.call().json()["cause"], "token_unreadable");
    wait_for("the reason", || gateway.log().contains("has the content coding \\\"gzip\\\"").then_some(()));
    let asked = &sandbox.token_calls()[0];
    assert!(
        String::from_utf8_lossy(&asked.request.head)
            .to_lowercase()
            .contains("\r\naccept-encoding: identity\r\n"),
        "{asked:?}"
    );

    script(&sandbox, Faults::token(Fault::default().with_header("Content-Encoding", "Identity")));
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
}

#[test]
fn date_in_retry_after_delays_token_calls() {
    let date = |after: u64| httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(after));
    for (value, calls) in [(Some(date(3600)), 1..=1), (Some("3600".into()), 1..=1), (None, 2..=9)] {
        let sandbox = sandbox();
        let fault = Fault::status(503);
        let fault = match &value {
            Some(value) => fault.with_header("Retry-After", value),
            None => fault,
        };
        script(&sandbox, Faults::token(fault));
        let gateway = start_with(&sandbox, Setup::default().set("token.wait", "3s"));
        let reply = gateway.call();
        assert_eq!(reply.code(), "token_unavailable", "{value:?}");
        if value.is_some() {
            let wait: u64 = reply.headers["retry-after"].parse().unwrap();
            assert!((50..=60).contains(&wait), "{value:?}: {wait}");
        }
        assert!(calls.contains(&sandbox.token_calls().len()), "{value:?}: {}", sandbox.token_calls().len());
    }
}

#[test]
fn admin_probe_may_use_the_head_method() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
    let ask = |method: &str, path: &str| {
        let mut stream = TcpStream::connect(gateway.admin).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stream, &mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse::<u16>().unwrap(), body.len(), head.to_lowercase())
    };
    for path in ["/livez", "/readyz", "/metrics", "/status"] {
        let (status, length, head) = ask("HEAD", path);
        assert!(status == 200 && length == 0 && head.contains("content-length: "), "{path}: {head}");
        assert!(ask("GET", path).1 > 0, "the control");
    }
    assert_eq!(ask("HEAD", "/nowhere").0, 404);
    let (status, _, head) = ask("POST", "/livez");
    assert!(status == 405 && head.contains("allow: get, head"), "{head}");
}
