//! Stage 4: the body against the contract, and its bytes on the way.

use crate::support::*;

#[test]
fn one_rejection_lists_all_four_contract_violations() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let body = r#"{"qualityTaskId":"x","setCountsType":2,"isTakeEffect":0,"setCounts":[{"personID":"1"},{"personID":"1"}],"more":1}"#;
    let reply = gateway.post(body);
    assert_eq!((reply.status, reply.code(), reply.outcome()), (422, "contract_violation", "not_sent"));
    let problem = reply.json();
    let mut found: Vec<_> = problem["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["pointer"].as_str().unwrap(), e["code"].as_str().unwrap()))
        .collect();
    found.sort_unstable();
    let expected = [
        ("/more", "additionalProperties"),
        ("/qualityTaskId", "anyOf"),
        ("/setCounts/1/personID", "x-uniqueBy"),
        ("/setCountsType", "const"),
    ];
    assert_eq!(found, expected);
    assert_eq!(sandbox.requests().len(), 0);
}

#[test]
fn upstream_receives_the_exact_bytes_of_the_caller() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    for id in
        ["954645333549048833", "18446744073709551615", "\"954645333549048833\"", "\"18446744073709551615\""]
    {
        let body = BODY.replace("\"954645333549048833\"", id).replace(',', " ,\t");
        assert_eq!(gateway.post(&body).outcome(), "succeeded", "{id}");
        assert_eq!(sandbox.requests().last().unwrap().body, body.as_bytes());
    }
    assert_eq!(gateway.post(&BODY.replace("\"954645333549048833\"", "18446744073709551616")).status, 422);
}

#[test]
fn unacceptable_body_is_rejected_and_its_control_passes() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.body_timeout", "200ms"));
    let plain = head(BODY.len(), "");
    let huge = format!("{{\"a\":\"{}\"}}", "x".repeat(300 * 1024));
    for (head, body, code) in [
        (plain.replace("application/json", "text/plain"), BODY, "media_type_unsupported"),
        (plain.replace("connection", "content-encoding: gzip\r\nconnection"), BODY, "media_type_unsupported"),
        (plain.replace("connection", "expect: something\r\nconnection"), BODY, "expectation_failed"),
        (head(huge.len(), ""), huge.as_str(), "body_too_large"),
        (head(BODY.len() + 1, ""), BODY, "body_timeout"),
        (plain.clone(), &BODY.replace('}', "]"), "body_not_json"),
        (plain.clone(), BODY, ""),
    ] {
        assert_eq!(gateway.send(&head, body).code(), code);
    }
    assert_eq!(sandbox.requests().len(), 1);
}
