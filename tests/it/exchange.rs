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

#[test]
fn every_fault_has_its_outcome_and_its_number_of_attempts() {
    let sandbox = sandbox();
    let gateway = start_with(
        &sandbox,
        Setup::default().set("upstream.timeout", "1s").set("upstream.connect_timeout", "1s"),
    );
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    let code = |code: &str| json!({ "code": { "failure": code } });
    for (script, status, outcome, attempts) in [
        (json!({ "status": 401, "times": 1 }), 200, "succeeded", 2),
        (json!({ "status": 500, "body": "{}", "content_type": "application/json" }), 500, "failed", 1),
        (json!({ "status": 500, "body": "<html>", "content_type": "text/html" }), 500, "unknown", 1),
        (code("0409001"), 200, "failed", 1),
        (json!({ "instead": "reset" }), 502, "unknown", 1),
        (json!({ "instead": "hang" }), 504, "unknown", 1),
        (json!({ "framing": "half_body" }), 502, "unknown", 1),
        (json!({ "framing": "half_head" }), 502, "unknown", 1),
        (json!({ "instead": "close" }), 502, "unknown", 1),
        (json!({ "instead": "garbage" }), 502, "unknown", 1),
        (json!({ "status": 502, "headers": [["Retry-After", "1"]] }), 502, "unknown", 1),
        (json!({ "status": 503, "headers": [["Retry-After", "1"]] }), 503, "unknown", 1),
        (json!({ "status": 302, "headers": [["Location", "/x"]] }), 302, "unknown", 1),
        (json!({ "status": 429 }), 429, "refused", 1),
        (json!({ "status": 403 }), 403, "refused", 1),
        (json!({ "status": 400 }), 400, "failed", 1),
        (json!({ "code": "unquoted" }), 200, "succeeded", 1),
        (json!({ "code": "numeric" }), 200, "succeeded", 1),
        (json!({ "code": "absent" }), 200, "unknown", 1),
        (json!({ "code": { "two": ["0409000", "0409001"] } }), 200, "unknown", 1),
        (json!({ "framing": "chunked" }), 200, "succeeded", 1),
    ] {
        let before = sandbox.requests().len();
        fault(&sandbox, script.clone());
        let reply = gateway.call();
        fault(&sandbox, json!({ "times": 0, "status": 200 }));
        assert_eq!((reply.status, reply.outcome()), (status, outcome), "{script}: {reply:?}");
        assert_eq!(sandbox.requests().len() - before, attempts, "{script}");
        if outcome == "unknown" {
            assert!(!reply.headers.contains_key("retry-after"), "{script}");
        }
        if outcome == "refused" {
            assert!(reply.headers.contains_key("retry-after"), "{script}");
        }
        let id = &reply.headers["x-gateway-request-id"];
        let record = wait_for("the outcome", || {
            records(&gateway.audit_directory(), "outcome").into_iter().find(|record| record["id"] == **id)
        });
        assert_eq!(
            (&record["outcome"], &record["attempts"]),
            (&json!(outcome), &json!(attempts)),
            "{script}"
        );
    }
}

#[test]
fn a_token_that_stays_refused_costs_one_refresh_and_then_none() {
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

#[test]
fn from_the_intent_on_nobody_cancels() {
    for leave in ["fin", "reset", "half-close"] {
        let sandbox = sandbox();
        let gateway = start(&sandbox);
        assert_eq!(gateway.call().outcome(), "succeeded");
        fault(&sandbox, json!({ "delay_ms": 300 }));
        let mut stream = TcpStream::connect(gateway.address).unwrap();
        stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
        if leave != "fin" {
            wait_for("the request", || (sandbox.requests().len() == 2).then_some(()));
        }
        match leave {
            "fin" => drop(stream),
            "reset" => {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                drop(stream);
            }
            _ => {
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!(read_reply(&mut stream).outcome(), "succeeded");
            }
        }
        let outcomes = gateway.records("outcome", 2);
        assert_eq!(outcomes[1]["outcome"], "succeeded", "{leave}");
        assert_eq!(sandbox.requests().len(), 2, "{leave}");
        let audit = gateway.audit_directory();
        assert_eq!(command(&["audit", "in-doubt", audit.to_str().unwrap()]).0, 0, "{leave}");
    }
}

#[test]
fn a_connection_that_the_upstream_closed_is_replaced_unseen() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    fault(&sandbox, json!({ "then": { "close_idle_ms": 0 } }));
    for _ in 0..50 {
        assert_eq!(gateway.call().outcome(), "succeeded");
        wait_for("the upstream's close", || (sandbox.connections().open == 0).then_some(()));
    }
    assert_eq!(sandbox.requests().len(), 50);
}

/// A CA, and a server certificate that it signs.
fn certificate(name: &str, expired: bool) -> (String, Tls) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let mut leaf = CertificateParams::new([name.to_owned()]).unwrap();
    if expired {
        leaf.not_after = date_time_ymd(2020, 1, 1);
    }
    let key = KeyPair::generate().unwrap();
    let leaf = leaf.signed_by(&key, &ca).unwrap();
    (ca.pem(), Tls { cert_pem: leaf.pem(), key_pem: key.serialize_pem() })
}

#[test]
fn nothing_is_sent_to_a_server_whose_certificate_is_not_right() {
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
