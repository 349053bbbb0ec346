//! Every deadline and every cap: what lies beyond it is refused or closed, what lies within passes.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{ConnectionFault, Fault, Faults, Framing, Instead};
use serde_json::json;

use crate::{
    exchange::{WAYS, leave_by, secure_sandbox},
    support::*,
};

/// Runs something that must end in its time, with a margin of four.
fn within<T>(promised: Duration, what: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let value = what();
    let took = begin.elapsed();
    // A second for a machine that is busy with something else.
    assert!(took < promised * 4 + Duration::from_secs(1), "{took:?} for {promised:?}");
    value
}

/// Waits until the gateway closes a connection, and says what it wrote before.
fn read_to_close(mut stream: TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn metric(gateway: &Gateway, line: &str) -> bool {
    gateway.admin("/metrics").body.contains(&format!("ccsqm_gateway_{line}"))
}

#[test]
fn slow_request_head_is_cut_off_after_header_timeout() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.header_timeout", "400ms"));
    let whole = head(BODY.len(), "");
    let (first, rest) = whole.split_at(40);
    let mut slow = TcpStream::connect(gateway.address).unwrap();
    slow.write_all(first.as_bytes()).unwrap();
    assert_eq!(within(Duration::from_millis(400), || read_to_close(slow)), "");
    wait_for("the metric", || {
        metric(&gateway, r#"connections_closed_total{reason="header_timeout"} 1"#).then_some(())
    });
    let mut in_time = TcpStream::connect(gateway.address).unwrap();
    in_time.write_all(first.as_bytes()).unwrap();
    in_time.write_all((rest.to_owned() + BODY).as_bytes()).unwrap();
    assert_eq!(read_reply(&mut in_time).outcome(), "succeeded", "the control");
    let silent = TcpStream::connect(gateway.address).unwrap();
    assert_eq!(within(Duration::from_millis(400), || read_to_close(silent)), "");
}

#[test]
fn idle_connection_is_closed_only_after_idle_timeout() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.idle_timeout", "500ms"));
    let keep = head(BODY.len(), "").replace("connection: close\r\n", "") + BODY;
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    for call in 1..=3 {
        stream.write_all(keep.as_bytes()).unwrap();
        wait_for("the answer", || (sandbox.requests().len() == call).then_some(()));
    }
    let text = within(Duration::from_millis(500), || read_to_close(stream));
    assert_eq!(text.matches("HTTP/1.1 200").count(), 3, "{text}");
    wait_for("the metric", || {
        metric(&gateway, r#"connections_closed_total{reason="idle_timeout"} 1"#).then_some(())
    });
}

#[test]
fn slow_request_body_is_rejected_after_body_timeout() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.body_timeout", "300ms"));
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all((head(BODY.len(), "") + &BODY[..50]).as_bytes()).unwrap();
    let reply = within(Duration::from_millis(300), || read_reply(&mut stream));
    assert_eq!((reply.status, reply.code(), reply.outcome()), (408, "body_timeout", "not_sent"));
    assert_eq!(sandbox.requests().len(), 0);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
}

#[test]
fn body_over_max_body_is_rejected_in_any_framing() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.max_body", "1KiB"));
    let padded = |size: usize| format!("{BODY}{}", " ".repeat(size - BODY.len()));
    let chunked = |body: &str| {
        let head = head(0, "").replace("content-length: 0", "transfer-encoding: chunked");
        let body = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
        gateway.send(&head, &body)
    };
    for (size, status, code) in [(1024, 200, ""), (1025, 413, "body_too_large")] {
        let body = padded(size);
        for reply in [gateway.post(&body), chunked(&body)] {
            assert_eq!((reply.status, reply.code()), (status, code), "{size}");
        }
    }
    assert_eq!(sandbox.requests().len(), 2);
}

#[test]
fn request_waits_for_a_token_no_longer_than_token_wait() {
    let sandbox = sandbox();
    script(&sandbox, Faults::token(Fault::instead(Instead::Hang).times(1)));
    let gateway =
        start_with(&sandbox, Setup::default().set("token.wait", "400ms").set("token.timeout", "2s"));
    let reply = within(Duration::from_millis(400), || gateway.call());
    assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "token_unavailable", "not_sent"));
    assert!(reply.headers.contains_key("retry-after"));
    // The call that hangs is given up after `token.timeout`, and the next one brings a token.
    within(Duration::from_secs(3), || {
        wait_for("service", || (gateway.call().outcome() == "succeeded").then_some(()));
    });
    assert_eq!((sandbox.token_calls().len(), sandbox.requests().len()), (2, 1));
}

#[test]
fn hanging_upstream_handshake_times_out_with_nothing_sent() {
    let (secure, setup) = secure_sandbox();
    let gateway = start_with(&secure, setup.set("upstream.connect_timeout", "400ms"));
    let fault = ConnectionFault { times: Some(1), after: 0, delay_ms: 0, instead: Instead::Hang };
    script(&secure, Faults { connections: vec![fault], ..Faults::default() });
    let reply = within(Duration::from_millis(400), || gateway.call());
    assert_eq!((reply.status, reply.code(), reply.outcome()), (502, "upstream_unreachable", "not_sent"));
    assert_eq!(gateway.records("refusal", 1)[0]["code"], "upstream_unreachable");
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    assert_eq!(secure.requests().len(), 1);
}

#[test]
fn unreachable_upstream_is_reported_at_once_with_nothing_sent() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    script(&sandbox, Faults { down: true, ..Faults::default() });
    wait_for("the end of open connections", || (sandbox.connections().open == 0).then_some(()));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.code(), reply.outcome()), (502, "upstream_unreachable", "not_sent"));
    script(&sandbox, Faults::default());
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!((sandbox.requests().len(), gateway.records("intent", 2).len()), (2, 2));
}

#[test]
fn connections_over_max_connections_get_503_until_one_closes() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.max_connections", 3));
    let held: Vec<_> = (0..3).map(|_| TcpStream::connect(gateway.address).unwrap()).collect();
    wait_for("three connections", || metric(&gateway, "connections 3").then_some(()));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "overloaded", "not_sent"));
    assert!(reply.headers.contains_key("retry-after"));
    assert_eq!(sandbox.requests().len(), 0);
    drop(held);
    // Those that wait to be accepted take a place for a moment, though nobody is there any more.
    wait_for("room", || (gateway.call().outcome() == "succeeded").then_some(()));
}

#[test]
fn requests_over_max_in_flight_get_503_until_one_finishes() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.max_in_flight", 2));
    assert_eq!(gateway.call().outcome(), "succeeded");
    script(&sandbox, Faults::business(Fault::delayed(1500)));
    thread::scope(|scope| {
        let held: Vec<_> = (0..2).map(|_| scope.spawn(|| gateway.call())).collect();
        wait_for("two in flight", || (sandbox.requests().len() == 3).then_some(()));
        let reply = gateway.call();
        assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "overloaded", "not_sent"));
        assert!(reply.headers.contains_key("retry-after"));
        for held in held {
            assert_eq!(held.join().unwrap().outcome(), "succeeded");
        }
    });
    assert_eq!(sandbox.requests().len(), 3);
    script(&sandbox, Faults::default());
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
}

#[test]
fn upstream_connections_stay_under_their_cap_with_a_bounded_wait() {
    let sandbox = sandbox();
    let capped = |wait: &str| {
        Setup::default().set("upstream.max_connections", 2).set("upstream.connect_timeout", wait)
    };
    let together = |gateway: &Gateway| -> Vec<Reply> {
        thread::scope(|scope| {
            let calls: Vec<_> = (0..6).map(|_| scope.spawn(|| gateway.call())).collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        })
    };
    script(&sandbox, Faults::business(Fault::delayed(1500)));
    let gateway = start_with(&sandbox, capped("300ms"));
    let replies = together(&gateway);
    let (served, refused): (Vec<_>, Vec<_>) =
        replies.iter().partition(|reply| reply.outcome() == "succeeded");
    // With two workers each has one of the two, and all callers may have met at one of them.
    assert!((1..=2).contains(&served.len()), "{} served", served.len());
    for reply in refused {
        assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "overloaded", "not_sent"));
    }
    assert_eq!(sandbox.requests().len(), served.len());
    script(&sandbox, Faults::business(Fault::delayed(50)));
    let gateway = start_with(&sandbox, capped("5s"));
    assert!(together(&gateway).iter().all(|reply| reply.outcome() == "succeeded"), "who waits is served");
    assert!(metric(&gateway, "upstream_connects_total{result=\"ok\"} "), "it is counted");
}

#[test]
fn rejected_caller_gets_its_reply_while_still_sending() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    for size in [100 * 1024, 400 * 1024, 2 * 1024 * 1024] {
        let body = "x".repeat(size);
        let plain = head(size, "").replace("application/json", "text/plain");
        let reply = gateway.send(&plain, &body);
        assert_eq!((reply.status, reply.code()), (415, "media_type_unsupported"), "{size}");
    }
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
}

#[test]
fn connection_stays_usable_after_a_rejection_with_a_read_body() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let keep =
        |headers: &str, body: &str| head(body.len(), headers).replace("connection: close\r\n", "") + body;
    let refused = keep("", &"x".repeat(50_000)).replace("application/json", "text/plain");
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all((refused + &keep("", BODY)).as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let text = read_to_close(stream);
    assert!(text.starts_with("HTTP/1.1 415") && text.matches("HTTP/1.1 200").count() == 1, "{text}");
    assert_eq!(sandbox.requests()[0].body, BODY.as_bytes());
}

#[test]
fn nothing_after_an_ambiguous_request_is_processed() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let plain = head(BODY.len(), "").replace("connection: close\r\n", "") + BODY;
    let length = format!("content-length: {}", BODY.len());
    let framed = |coding: &str, last: &str| {
        let head = plain.replace(&length, coding).replace(BODY, "");
        format!("{head}{:x}\r\n{BODY}\r\n{last}", BODY.len())
    };
    let chunked = "transfer-encoding: chunked";
    for (case, first, code) in [
        ("a control", plain.clone(), ""),
        ("a chunked control", framed(chunked, "0\r\n\r\n"), ""),
        ("two codings", framed("transfer-encoding: chunked, chunked", "0\r\n\r\n"), "head_invalid"),
        ("two hosts", plain.replace("host:", "host: localhost\r\nhost:"), "head_invalid"),
        ("Connection", plain.replace("host:", "connection: x-userid\r\nhost:"), "head_invalid"),
        ("HTTP/1.0", plain.replace("HTTP/1.1", "HTTP/1.0\r\nconnection: keep-alive"), "head_invalid"),
        ("a trailer", framed(chunked, "0\r\nx-more: a\r\n\r\n"), "x-gateway-error: trailers"),
        // hyper takes what follows the bare LF, up to the next empty line, for trailers.
        (
            "a bare LF",
            framed(chunked, "0\r\n\nGET / HTTP/1.1\r\nhost: localhost\r\n\r\n"),
            "x-gateway-error: trailers",
        ),
        (
            "a bare LF behind a trailer",
            framed(chunked, "0\r\na: b\r\n\nGET\r\n\r\n"),
            "x-gateway-error: trailers",
        ),
    ] {
        let before = sandbox.requests().len();
        let mut stream = TcpStream::connect(gateway.address).unwrap();
        stream.write_all((first + &plain).as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let text = read_to_close(stream);
        let (answers, sent) = if code.is_empty() { (2, 2) } else { (1, 0) };
        assert_eq!(text.matches("x-gateway-request-id: ").count(), answers, "{case}: {text}");
        assert_eq!(
            text.contains("connection: close") && text.contains(code),
            !code.is_empty(),
            "{case}: {text}"
        );
        assert_eq!(sandbox.requests().len() - before, sent, "{case}");
    }
}

#[test]
fn oversized_or_invalid_head_is_rejected_and_counted() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let huge = format!("x-huge: {}\r\n", "x".repeat(200_000));
    for (sent, status) in [
        (head(0, &huge), "431"),
        ("\x16\x03\x01\x02\x00".into(), "400"),
        ("PRI * HTTP/2.0\r\n\r\n".into(), ""),
    ] {
        let mut stream = TcpStream::connect(gateway.address).unwrap();
        let _ = stream.write_all(sent.as_bytes());
        let _ = stream.shutdown(Shutdown::Write);
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let said = text.split(' ').nth(1).unwrap_or_default();
        assert!(said == status || (status.is_empty() && !text.contains(" 200 ")), "{status}: {text}");
    }
    wait_for("the metric", || {
        metric(&gateway, r#"connections_closed_total{reason="head_invalid"} 3"#).then_some(())
    });
    assert_eq!(sandbox.requests().len(), 0);
    let sized = |size: usize| {
        let frame = head(BODY.len(), "x-large: \r\n").len();
        gateway.post_with(&format!("x-large: {}\r\n", "x".repeat(size - frame))).status
    };
    assert_eq!([sized(8_000), sized(16 * 1024), sized(16 * 1024 + 1)], [200, 200, 431]);
}

#[test]
fn caller_that_does_not_read_loses_only_its_connection() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.idle_timeout", "500ms"));
    script(&sandbox, Faults::business(Fault::sized(30_000_000).times(1)));
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    wait_for("the connection's end", || {
        metric(&gateway, r#"connections_closed_total{reason="idle_timeout"} 1"#).then_some(())
    });
    let record = &gateway.records("outcome", 1)[0];
    assert_eq!(record["outcome"], "succeeded", "{record}");
    wait_for("its room", || metric(&gateway, "requests_in_flight 0").then_some(()));
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
}

#[test]
fn slow_long_reply_is_not_treated_as_an_idle_connection() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.idle_timeout", "1s"));
    // 64 KiB at once would decide; the rest comes as slowly as the caller reads it.
    script(&sandbox, Faults::business(Fault::sized(20_000_000)));
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    let (begin, mut read, mut piece) = (Instant::now(), 0, vec![0; 256 * 1024]);
    loop {
        match stream.read(&mut piece).unwrap() {
            0 => break,
            bytes => read += bytes,
        }
        if begin.elapsed() < Duration::from_secs(3) {
            thread::sleep(Duration::from_millis(50)); // a slow caller, not a wait for something
        }
    }
    assert!(read > 20_000_000, "{read} bytes");
}

#[test]
fn caller_that_reads_a_long_reply_too_slowly_sees_it_aborted() {
    let sandbox = sandbox();
    // Long enough for a busy machine to read the part that decides.
    let slow = Setup::default().set("upstream.timeout", "4s");
    let gateway = start_with(&sandbox, slow);
    script(&sandbox, Faults::business(Fault { size: Some(30_000_000), ..Fault::framing(Framing::Chunked) }));
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    let record = &gateway.records("outcome", 1)[0];
    assert_eq!(record["outcome"], "succeeded");
    assert!(record["note"].as_str().is_some_and(|note| note.contains("caller")), "{record}");
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    assert!(bytes.len() < 30_000_000 && !bytes.ends_with(b"0\r\n\r\n"), "{} bytes", bytes.len());
}

/// Sends a whole request and leaves once `waits` says that it waits for something.
fn leave(gateway: &Gateway, way: &str, waits: impl Fn() -> bool) -> Option<Reply> {
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    // Who closes its side at once has only nothing more to say.
    let sent = Instant::now();
    wait_for("the wait", || (waits() && sent.elapsed() > Duration::from_millis(400)).then_some(()));
    leave_by(way, stream)
}

#[test]
fn caller_disconnect_while_waiting_for_a_token_sends_nothing() {
    for way in WAYS {
        let sandbox = sandbox();
        script(&sandbox, Faults::token(Fault::delayed(1500).times(1)));
        let gateway = start(&sandbox);
        thread::scope(|scope| {
            let stays = scope.spawn(|| gateway.call());
            wait_for("the token call", || (sandbox.token_calls().len() == 1).then_some(()));
            let in_flight = || metric(&gateway, "requests_in_flight 2");
            if let Some(reply) = leave(&gateway, way, in_flight) {
                assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "caller_left", "not_sent"));
            }
            let refusal = gateway.records("refusal", 1).remove(0);
            assert_eq!(
                (&refusal["code"], &refusal["stage"]),
                (&json!("caller_left"), &json!("token")),
                "{way}"
            );
            assert_eq!(stays.join().unwrap().outcome(), "succeeded", "the control");
        });
        assert_eq!(sandbox.requests().len(), 1, "{way}");
    }
}

#[test]
fn caller_disconnect_while_waiting_for_a_connection_sends_nothing() {
    for way in WAYS {
        let (secure, setup) = secure_sandbox();
        let gateway = start_with(&secure, setup);
        wait_for("the token", || (gateway.admin("/readyz").status == 200).then_some(()));
        // The handshake waits for a second, then fails: the request is refused in any case.
        let fault = ConnectionFault { times: Some(1), after: 0, delay_ms: 1000, instead: Instead::Close };
        script(&secure, Faults { connections: vec![fault], ..Faults::default() });
        let before = secure.connections().accepted;
        if let Some(reply) = leave(&gateway, way, || secure.connections().accepted > before) {
            assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "caller_left", "not_sent"));
        }
        assert_eq!(gateway.records("refusal", 1)[0]["code"], "caller_left", "{way}");
        let reply = gateway.call();
        assert_eq!(reply.outcome(), "succeeded", "the control after {way}: {reply:?} {}", gateway.log());
        assert_eq!(secure.requests().len(), 1, "{way}");
    }
}

#[test]
fn half_closed_caller_may_wait_for_its_reply() {
    let sandbox = sandbox();
    script(&sandbox, Faults::token(Fault::delayed(800).times(1)));
    let gateway = start(&sandbox);
    let keep = head(BODY.len(), "").replace("connection: close\r\n", "");
    assert_eq!(gateway.send_and_finish(&keep, BODY).outcome(), "succeeded");
}

#[test]
fn peers_that_only_connect_cannot_exhaust_file_descriptors() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.max_connections", 10));
    let files = || std::fs::read_dir(format!("/proc/{}/fd", gateway.id())).unwrap().count();
    let before = files();
    let held: Vec<_> = (0..500).map(|_| TcpStream::connect(gateway.address).unwrap()).collect();
    wait_for("the surplus to be closed", || {
        metric(&gateway, r#"connections_closed_total{reason="overloaded"} "#).then_some(())
    });
    assert!(files() < before + 150, "{} files", files() - before);
    drop(held);
    // The control. Some of them may not be accepted yet, and take the places once more.
    wait_for("room", || {
        let mut stream = TcpStream::connect(gateway.address).ok()?;
        stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).ok()?;
        (read_reply(&mut stream).outcome() == "succeeded").then_some(())
    });
}
