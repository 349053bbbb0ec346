//! Stage 5: the token's life.

use std::{
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::Sandbox;
use serde_json::{Value, json};

use crate::support::*;

fn script(sandbox: &Sandbox, faults: Value) {
    sandbox.faults(serde_json::from_value(faults).unwrap()).unwrap();
}

#[test]
fn many_callers_at_a_cold_start_make_one_token_call() {
    let sandbox = sandbox();
    script(&sandbox, json!({ "token": [{ "delay_ms": 500 }] }));
    let gateway = start(&sandbox);
    let outcomes: Vec<String> = thread::scope(|scope| {
        let callers: Vec<_> = (0..200).map(|_| scope.spawn(|| gateway.call().outcome().to_owned())).collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).collect()
    });
    assert!(outcomes.iter().all(|outcome| outcome == "succeeded"), "{outcomes:?}");
    assert_eq!(sandbox.token_calls().len(), 1);
}

#[test]
fn a_token_endpoint_that_is_down_costs_nothing_while_the_token_lives() {
    let sandbox = sandbox();
    script(&sandbox, json!({ "lifetime_ms": 3000 }));
    let gateway = start_with(&sandbox, Setup::default().set("token.wait", "300ms"));
    assert_eq!(gateway.call().outcome(), "succeeded");
    script(&sandbox, json!({ "lifetime_ms": 3000, "token_down": true }));
    let down = Instant::now();
    while down.elapsed() < Duration::from_millis(1500) {
        assert_eq!(gateway.call().outcome(), "succeeded");
    }
    let refused = wait_for("the token's end", || Some(gateway.call()).filter(|reply| reply.status != 200));
    assert_eq!((refused.status, refused.code(), refused.outcome()), (503, "token_unavailable", "not_sent"));
    assert!(refused.headers.contains_key("retry-after"));
    script(&sandbox, json!({ "lifetime_ms": 3000 }));
    let back = Instant::now();
    wait_for("service", || (gateway.call().outcome() == "succeeded").then_some(()));
    assert!(back.elapsed() < Duration::from_secs(20), "{:?}", back.elapsed());
}

#[test]
fn every_token_habit_is_survived() {
    thread::scope(|scope| {
        for habit in ["independent", "same_until_expiry", "last_wins"] {
            scope.spawn(move || {
                let sandbox = sandbox();
                script(&sandbox, json!({ "habit": habit, "lifetime_ms": 6000 }));
                let gateway = start(&sandbox);
                let begin = Instant::now();
                let mut calls = 0;
                while begin.elapsed() < Duration::from_secs(14) {
                    let reply = gateway.call();
                    assert_eq!(reply.outcome(), "succeeded", "{habit}: {reply:?} {}", gateway.log());
                    calls += 1;
                }
                let fetches = sandbox.token_calls().len();
                assert!(
                    calls > 100 && (2..=9).contains(&fetches),
                    "{habit}: {calls} calls, {fetches} fetches"
                );
            });
        }
    });
}

#[test]
fn a_changed_secret_is_tried_before_it_replaces_the_old() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    let secret = gateway.folder.path().join("app_secret");
    std::fs::write(&secret, "wrong").unwrap();
    let change = |count: usize| {
        wait_for("the trial", || {
            let events = records(&gateway.audit_directory(), "event");
            let changes: Vec<_> =
                events.into_iter().filter(|event| event["event"] == "secret_change").collect();
            changes.get(count).map(|event| event["result"].clone())
        })
    };
    assert_eq!(change(0), "refused");
    assert_eq!(gateway.call().outcome(), "succeeded", "the old token serves on");
    sandbox.secret("sandbox-app-key", "new-secret");
    std::fs::write(&secret, "new-secret\n").unwrap();
    assert_eq!(change(1), "accepted");
    assert_eq!(gateway.call().outcome(), "succeeded");
}
