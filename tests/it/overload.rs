//! More work than the upstream does, and an upstream that is not well.

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

/// So many calls at once.
fn calls(gateway: &Gateway, count: usize) -> Vec<Reply> {
    thread::scope(|scope| {
        let calls: Vec<_> = (0..count).map(|_| scope.spawn(|| gateway.call())).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    })
}

fn with_breaker(pause: &str) -> Setup {
    Setup::default().set("upstream.breaker_failures", 3).set("upstream.breaker_pause", pause)
}

fn assert_suspended(reply: &Reply) {
    let said = (reply.status, reply.code(), reply.outcome());
    assert_eq!(said, (503, "upstream_suspended", "not_sent"), "{reply:?}");
    assert!(reply.headers.contains_key("retry-after"));
    assert_eq!(reply.json()["stage"], "audit");
}

#[test]
fn an_upstream_that_is_down_is_left_alone() {
    for status in [502, 503, 504] {
        let sandbox = sandbox();
        let gateway = start_with(&sandbox, with_breaker("1m"));
        script(&sandbox, json!({ "business": [{ "status": status }] }));
        for _ in 0..3 {
            assert_eq!(gateway.call().status, status);
        }
        calls(&gateway, 20).iter().for_each(assert_suspended);
        assert_eq!((sandbox.requests().len(), gateway.records("intent", 3).len()), (3, 3));
        assert_eq!(gateway.admin("/status").json()["upstream_suspended"], true);
        let metrics = gateway.admin("/metrics").body;
        assert!(metrics.contains("ccsqm_gateway_upstream_suspended 1"), "{metrics}");
        assert!(metrics.contains("ccsqm_gateway_upstream_suspensions_total 1"), "{metrics}");
    }
}

#[test]
fn an_upstream_that_was_left_alone_is_probed_by_one() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, with_breaker("300ms"));
    script(&sandbox, json!({ "business": [{ "status": 503, "times": 3 }, { "delay_ms": 500, "times": 1 }] }));
    for _ in 0..3 {
        assert_eq!(gateway.call().status, 503);
    }
    wait_for("the probe", || {
        let replies = calls(&gateway, 5);
        let succeeded = replies.iter().filter(|reply| reply.outcome() == "succeeded").count();
        assert!(succeeded <= 1, "{succeeded} probes at once");
        replies.iter().filter(|reply| reply.outcome() != "succeeded").for_each(assert_suspended);
        (succeeded == 1).then_some(())
    });
    assert_eq!(sandbox.requests().len(), 4);
    assert!(calls(&gateway, 5).iter().all(|reply| reply.outcome() == "succeeded"), "it is over");
    assert!(gateway.admin("/metrics").body.contains("ccsqm_gateway_upstream_suspended 0"));
}

#[test]
fn an_upstream_that_cannot_be_reached_or_does_not_answer_is_left_alone() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let sandbox = sandbox();
    let setup = Setup { base_url: Some(format!("http://{closed}")), ..with_breaker("1m") };
    let gateway = start_with(&sandbox, setup);
    for _ in 0..3 {
        assert_eq!(gateway.call().code(), "upstream_unreachable");
    }
    assert_suspended(&gateway.call());
    drop(gateway);
    let gateway = start_with(
        &sandbox,
        with_breaker("1m").set("upstream.timeout", "300ms").set("upstream.connect_timeout", "300ms"),
    );
    script(&sandbox, json!({ "business": [{ "delay_ms": 2000 }] }));
    for _ in 0..3 {
        assert_eq!(gateway.call().code(), "upstream_timeout");
    }
    assert_suspended(&gateway.call());
    assert_eq!(sandbox.requests().len(), 3);
}

#[test]
fn an_upstream_that_answers_is_not_left_alone_whatever_it_answers() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, with_breaker("1m"));
    for fault in [
        json!({ "status": 500, "body": "{}" }),
        json!({ "status": 500, "body": "<html>" }),
        json!({ "status": 429 }),
        json!({ "status": 403 }),
        json!({ "status": 404 }),
        json!({ "status": 401 }),
    ] {
        script(&sandbox, json!({ "business": [fault] }));
        for _ in 0..6 {
            assert_ne!(gateway.call().code(), "upstream_suspended", "{fault}");
        }
    }
    script(&sandbox, json!({}));
    assert_eq!(gateway.call().outcome(), "succeeded");
    script(&sandbox, json!({ "business": [{ "status": 503 }] }));
    (0..3).for_each(|_| drop(gateway.call()));
    assert_suspended(&gateway.call()); // the control
}

#[test]
fn a_429_of_the_upstream_shrinks_the_quota_and_other_refusals_do_not() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("quota.rate", "2/s").set("quota.burst", 1000));
    script(&sandbox, json!({ "business": [{ "status": 403, "times": 5 }] }));
    for _ in 0..10 {
        assert_ne!(gateway.call().code(), "quota_exhausted", "the control");
    }
    let percent = |gateway: &Gateway| {
        let metrics = gateway.admin("/metrics").body;
        let line = metrics.lines().find(|line| line.starts_with("ccsqm_gateway_quota_percent ")).unwrap();
        line.rsplit(' ').next().unwrap().parse::<u32>().unwrap()
    };
    assert_eq!(percent(&gateway), 100);
    let fault = json!({ "status": 429, "headers": [["Retry-After", "60"]], "times": 1 });
    script(&sandbox, json!({ "business": [fault] }));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome()), (429, "refused"));
    assert_eq!(percent(&gateway), 50);
    let reply = gateway.call();
    assert_eq!((reply.code(), reply.outcome()), ("quota_exhausted", "not_sent"));
    assert_eq!(reply.headers["retry-after"], "1", "one a second is left of two");
    assert_eq!(sandbox.requests().len(), 11);
}

/// Calls at a steady rate from many threads, whatever becomes of each; what came of them and how long it took.
fn offer(gateway: &Gateway, threads: u32, each: Duration, time: Duration) -> Vec<(Reply, Duration)> {
    let begin = Instant::now();
    thread::scope(|scope| {
        let callers: Vec<_> = (0..threads)
            .map(|i| {
                scope.spawn(move || {
                    let (mut replies, mut next) = (Vec::new(), begin + each * i / threads);
                    while next < begin + time {
                        thread::sleep(next.saturating_duration_since(Instant::now()));
                        let sent = Instant::now();
                        replies.push((gateway.call(), sent.elapsed()));
                        next = (next + each).max(Instant::now());
                    }
                    replies
                })
            })
            .collect();
        callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect()
    })
}

/// Five times as much work as the upstream does. What is beyond it is refused at once, and costs the rest nothing.
#[test]
fn under_five_times_the_load_as_much_is_done_and_the_rest_is_refused_at_once() {
    let sandbox = sandbox();
    let setup = Setup::default().set("upstream.max_connections", 4).set("upstream.connect_timeout", "400ms");
    let gateway = start_with(&sandbox, setup);
    script(&sandbox, json!({ "business": [{ "delay_ms": 40 }] }));
    let time = Duration::from_secs(3);
    let done = |replies: &[(Reply, Duration)]| {
        replies.iter().filter(|(reply, _)| reply.outcome() == "succeeded").count()
    };
    let peak = done(&offer(&gateway, 8, Duration::ZERO, time));
    let before = sandbox.requests().len();
    let replies = offer(&gateway, 100, Duration::from_millis(200), time);
    let goodput = done(&replies);
    let mut refused: Vec<_> = replies.iter().filter(|(reply, _)| reply.code() == "overloaded").collect();
    refused.sort_by_key(|(_, took)| *took);
    let median = refused[refused.len() / 2].1;
    assert_eq!(goodput + refused.len(), replies.len());
    assert!(refused.iter().all(|(reply, _)| reply.outcome() == "not_sent" && reply.status == 503));
    assert_eq!(sandbox.requests().len() - before, goodput);
    assert!(refused.len() > 2 * goodput, "{} refused, {goodput} done", refused.len());
    assert!(goodput * 10 >= peak * 9, "{goodput} of {peak}");
    assert!(median < Duration::from_millis(40), "{median:?}"); // 10 ms, with a margin of four
}
