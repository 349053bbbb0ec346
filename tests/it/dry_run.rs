//! Dry runs: all that could refuse a request is asked, nothing is sent, spent or remembered.

use ccsqm_gateway::sandbox::{Faults, Options};
use serde_json::{Value, json};

use crate::{idempotency::until_keys_are_known, support::*};

const DRY: &str = "/.gateway/dry-run";

/// A request as it would be sent for good, but with another path.
fn rehearse(gateway: &Gateway, headers: &str, body: &str) -> Reply {
    let real = head(body.len(), headers);
    gateway.send(&real.replacen(PATH, &format!("{DRY}{PATH}"), 1), body)
}

#[test]
fn dry_run_reports_the_request_and_sends_nothing() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let reply = rehearse(&gateway, "", BODY);
    assert_eq!((reply.status, reply.outcome()), (200, "not_sent"), "{reply:?}");
    assert_eq!(sandbox.requests().len(), 0);
    let answer = reply.json();
    assert_eq!((&answer["dry_run"], &answer["would"]), (&json!(true), &json!("be sent")));
    assert_eq!((&answer["caller"], &answer["credential"]), (&json!("qa-console"), &json!("default")));

    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    let received = String::from_utf8(sandbox.requests().remove(0).head).unwrap();
    let secret = |name: &str| ["authorization", "x-app-key"].contains(&name);
    let (mut names, mut secrets) = (Vec::new(), Vec::new());
    for line in received.lines().skip(1).filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        let name = name.to_ascii_lowercase();
        let shown = &answer["request"]["headers"][&name];
        assert_eq!(shown, if secret(&name) { "***" } else { value }, "{name}");
        secrets.extend(secret(&name).then(|| value.trim_start_matches("Bearer ").to_owned()));
        names.push(name);
    }
    assert_eq!(answer["request"]["headers"].as_object().unwrap().len(), names.len());
    assert_eq!(answer["request"]["target"], PATH);
    assert_eq!(answer["request"]["body_size"], BODY.len());
    assert_eq!(secrets.len(), 2);
    secrets.push(Options::default().app_secret);
    assert!(secrets.iter().all(|secret| !secret.is_empty() && !reply.text().contains(secret)));

    let record = &gateway.records("refusal", 1)[0];
    assert_eq!((&record["note"], &record["stage"]), (&json!("dry run"), &json!("quota")));
    assert_eq!((&record["outcome"], &record["code"]), (&json!("not_sent"), &Value::Null));
    assert_eq!(gateway.records("intent", 1).len(), 1, "the control's");
    let metrics = gateway.admin("/metrics").body;
    assert!(metrics.contains(r#"requests_total{code="",outcome="not_sent",stage="quota"} 1"#), "{metrics}");
}

#[test]
fn dry_run_is_rejected_like_the_real_request() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let bad = BODY.replace(r#""isTakeEffect":0"#, r#""isTakeEffect":2"#);
    for (headers, body, code, stage) in [
        ("", bad.as_str(), "contract_violation", "contract"),
        ("", "{", "body_not_json", "contract"),
        ("x-userid: 999\r\n", BODY, "operator_denied", "route"),
        ("origin: http://evil\r\n", BODY, "browser_refused", "admission"),
        ("idempotency-key: a b\r\n", BODY, "idempotency_key_invalid", "idempotency"),
    ] {
        let reply = rehearse(&gateway, headers, body);
        assert_eq!((reply.code(), &reply.json()["stage"]), (code, &json!(stage)));
        assert_eq!(rehearse(&gateway, "", BODY).status, 200, "the control of {code}");
    }
    for (line, code) in [
        (format!("GET {DRY}{PATH}"), "method_not_allowed"),
        (format!("POST {DRY}{PATH}x"), "route_unknown"),
        (format!("POST {DRY}{DRY}{PATH}"), "route_unknown"),
        (format!("POST {DRY}"), "route_unknown"),
        (format!("POST /.gateway/dry-ru{PATH}"), "route_unknown"),
        (format!("POST /.Gateway/dry-run{PATH}"), "route_unknown"),
    ] {
        let reply = gateway.send(&head(BODY.len(), "").replacen(&format!("POST {PATH}"), &line, 1), BODY);
        assert_eq!(reply.code(), code, "{line}");
    }
    sandbox.revoke();
    script(&sandbox, Faults { token_down: true, ..Faults::default() });
    let setup = Setup::default().set("token.wait", "100ms");
    let poor = start_with(&sandbox, setup);
    assert_eq!(rehearse(&poor, "", BODY).code(), "token_unavailable");
    assert_eq!(sandbox.requests().len(), 0);
}

#[test]
fn dry_run_uses_the_caller_limit_but_no_quota() {
    let sandbox = sandbox();
    let setup = Setup::default().set("quota.rate", "1/h").set("quota.burst", 1);
    let gateway = start_with(&sandbox, setup);
    for _ in 0..5 {
        assert_eq!(rehearse(&gateway, "", BODY).status, 200);
    }
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!(rehearse(&gateway, "", BODY).code(), "quota_exhausted");
    assert_eq!(gateway.call().code(), "quota_exhausted", "the control");
    drop(gateway);

    let gateway = start_with(&sandbox, Setup { limit: Some(("1/h", 2)), ..Setup::default() });
    for status in [200, 200, 429] {
        assert_eq!(rehearse(&gateway, "", BODY).status, status);
    }
    assert_eq!(sandbox.requests().len(), 1);
}

#[test]
fn dry_run_reports_earlier_calls_and_claims_no_key() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("idempotency.without_key", "guard"));
    until_keys_are_known(&gateway);
    let key = "idempotency-key: one\r\n";
    for _ in 0..2 {
        assert_eq!(rehearse(&gateway, key, BODY).json()["would"], "be sent");
        assert_eq!(rehearse(&gateway, "", BODY).json()["first_request_id"], Value::Null);
    }
    let first = gateway.post_with(key);
    assert_eq!(first.outcome(), "succeeded");
    let id = &first.headers["x-gateway-request-id"];
    let answer = rehearse(&gateway, key, BODY).json();
    assert_eq!(answer["would"], "be answered as the first call with its key was");
    assert_eq!(answer["first_request_id"], id.as_str());
    let other = BODY.replace("\"count\":2", "\"count\":3");
    assert_eq!(rehearse(&gateway, key, &other).code(), "idempotency_mismatch");

    let unkeyed = gateway.call();
    assert_eq!(unkeyed.outcome(), "succeeded");
    let answer = rehearse(&gateway, "", BODY).json();
    assert_eq!(answer["would"], "be sent");
    assert_eq!(answer["first_request_id"], unkeyed.headers["x-gateway-request-id"].as_str());
    assert_eq!(sandbox.requests().len(), 2);
}

#[test]
fn dry_run_reports_free_space_as_soon_as_a_real_call_does() {
    let sandbox = sandbox();
    let setup = Setup::default().set("idempotency.without_key", "block").set("idempotency.max_keys", 3);
    let gateway = start_with(&sandbox, setup.set("idempotency.fingerprint_window", "1s"));
    until_keys_are_known(&gateway);
    let body = |count: usize| BODY.replace("\"count\":2", &format!("\"count\":{count}"));
    for count in 1..4 {
        assert_eq!(gateway.post(&body(count)).outcome(), "succeeded");
    }
    // Nothing but dry runs comes from here on.
    assert_eq!(rehearse(&gateway, "", &body(4)).code(), "idempotency_unavailable", "the control");
    wait_for("room", || (rehearse(&gateway, "", &body(4)).status == 200).then_some(()));
}
