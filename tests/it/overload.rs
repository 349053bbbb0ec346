//! More work than the upstream does, and an upstream that is not well.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use crate::{idempotency::until_keys_are_known, support::*};

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
fn open_circuit_breaker_rejects_requests() {
    for status in [502, 503, 504] {
        let sandbox = sandbox();
        let gateway = start_with(&sandbox, with_breaker("1m"));
        script(&sandbox, Faults::business(Fault::status(status)));
        for _ in 0..3 {
            assert_eq!(gateway.call().status, status);
        }
        calls(&gateway, 20).iter().for_each(assert_suspended);
        assert_eq!((sandbox.requests().len(), gateway.records("intent", 3).len()), (3, 3));
        assert_eq!(gateway.admin("/status").json()["upstream"]["suspended"], true);
        let metrics = gateway.admin("/metrics").body;
        for sample in ["circuit_breaker_open 1", "upstream_suspended 1", "upstream_suspensions_total 1"] {
            assert!(metrics.contains(&format!("\nccsqm_gateway_{sample}\n")), "{sample} in {metrics}");
        }
    }
}

#[test]
fn half_open_breaker_sends_one_probe() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, with_breaker("300ms"));
    script(&sandbox, Faults::business([Fault::status(503).times(3), Fault::delayed(500).times(1)]));
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
    let metrics = gateway.admin("/metrics").body;
    for name in ["circuit_breaker_open", "upstream_suspended"] {
        assert!(metrics.contains(&format!("\nccsqm_gateway_{name} 0\n")), "{name} in {metrics}");
    }
}

#[test]
fn unreachable_or_silent_upstream_opens_the_breaker() {
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
    script(&sandbox, Faults::business(Fault::delayed(2000)));
    for _ in 0..3 {
        assert_eq!(gateway.call().code(), "upstream_timeout");
    }
    assert_suspended(&gateway.call());
    assert_eq!(sandbox.requests().len(), 3);
}

#[test]
fn breaker_stays_closed_while_the_upstream_answers() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, with_breaker("1m"));
    for fault in [
        Fault::status(500).with_body("{}"),
        Fault::status(500).with_body("<html>"),
        Fault::status(429),
        Fault::status(403),
        Fault::status(404),
        Fault::status(401),
    ] {
        let shown = shown(std::slice::from_ref(&fault));
        script(&sandbox, Faults::business(fault));
        for _ in 0..6 {
            assert_ne!(gateway.call().code(), "upstream_suspended", "{shown}");
        }
    }
    script(&sandbox, Faults::default());
    assert_eq!(gateway.call().outcome(), "succeeded");
    script(&sandbox, Faults::business(Fault::status(503)));
    (0..3).for_each(|_| drop(gateway.call()));
    assert_suspended(&gateway.call()); // the control
}

#[test]
fn only_status_429_of_the_upstream_shrinks_the_quota() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("quota.rate", "2/s").set("quota.burst", 1000));
    script(&sandbox, Faults::business(Fault::status(403).times(5)));
    for _ in 0..10 {
        assert_ne!(gateway.call().code(), "quota_exhausted", "the control");
    }
    let left = |gateway: &Gateway| {
        let metrics = gateway.admin("/metrics").body;
        ["quota_ratio", "quota_percent"].map(|name| {
            let sample = format!("ccsqm_gateway_{name} ");
            metrics.lines().find_map(|line| line.strip_prefix(&sample)).unwrap().parse::<f64>().unwrap()
        })
    };
    assert_eq!(left(&gateway), [1.0, 100.0]);
    script(&sandbox, Faults::business(Fault::status(429).with_header("Retry-After", "60").times(1)));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome()), (429, "refused"));
    assert_eq!(left(&gateway), [0.5, 50.0]);
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

/// Five times as much work as the upstream does. What is beyond it is refused at once, and costs the rest nothing. The
/// figures are those of the best of three rounds: what else runs on this machine can slow a half of one.
#[test]
fn load_shedding_keeps_full_throughput_at_five_times_the_load() {
    let sandbox = sandbox();
    let setup = Setup::default().set("upstream.max_connections", 4).set("upstream.connect_timeout", "400ms");
    let gateway = start_with(&sandbox, setup);
    script(&sandbox, Faults::business(Fault::delayed(40)));
    let time = Duration::from_secs(3);
    let done = |replies: &[(Reply, Duration)]| {
        replies.iter().filter(|(reply, _)| reply.outcome() == "succeeded").count()
    };
    let round = || {
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
        let is_good = goodput * 10 >= peak * 9 && median < Duration::from_millis(40); // 10 ms, with a margin of four
        if is_good { Ok(()) } else { Err(format!("{goodput} of {peak}, {median:?} to refuse")) }
    };
    let rounds =
        round().or_else(|first| round().or_else(|second| round().map_err(|third| [first, second, third])));
    assert_eq!(rounds, Ok(()));
}

#[test]
fn load_shedding_ends_after_a_slow_period() {
    let sandbox = sandbox();
    let setup = Setup::default().set("upstream.max_connections", 2).set("upstream.connect_timeout", "600ms");
    let gateway = start_with(&sandbox, setup);
    let refused_of_five = || {
        thread::scope(|scope| {
            let callers: Vec<_> = (0..5).map(|_| scope.spawn(|| gateway.call())).collect();
            let replies = callers.into_iter().map(|caller| caller.join().unwrap());
            replies.filter(|reply| reply.code() == "overloaded").count()
        })
    };
    script(&sandbox, Faults::business(Fault::delayed(500)));
    wait_for("one who waits, and no more", || (refused_of_five() == 2).then_some(()));
    script(&sandbox, Faults::business(Fault::delayed(20)));
    wait_for("three who wait", || (refused_of_five() == 0).then_some(()));
}

/// A caller's connection that stays open.
struct Kept(TcpStream);

impl Kept {
    fn open(gateway: &Gateway) -> Self {
        Self(TcpStream::connect(gateway.address).unwrap())
    }

    fn call(&mut self) -> Reply {
        let keep = head(BODY.len(), "").replace("connection: close\r\n", "");
        self.0.write_all((keep + BODY).as_bytes()).unwrap();
        let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            let length = self.0.read(&mut piece).unwrap();
            assert!(length > 0, "closed behind {}", String::from_utf8_lossy(&bytes));
            bytes.extend_from_slice(&piece[..length]);
            let reply = parse_reply(&String::from_utf8_lossy(&bytes));
            if reply
                .headers
                .get("content-length")
                .is_some_and(|length| *length == reply.body.len().to_string())
            {
                return reply;
            }
        }
    }
}

#[test]
fn exhausted_file_descriptors_do_not_affect_open_connections() {
    let sandbox = sandbox();
    let through = vec!["prlimit".to_owned(), "--nofile=64:64".to_owned()];
    let gateway = start_with(&sandbox, Setup { through, ..Setup::default() });
    let mut kept = Kept::open(&gateway);
    assert_eq!(kept.call().outcome(), "succeeded");
    let flood: Vec<_> = (0..200).map(|_| TcpStream::connect(gateway.address).unwrap()).collect();
    wait_for("the flood", || gateway.log().contains("accept failed").then_some(()));
    for _ in 0..20 {
        assert_eq!(kept.call().outcome(), "succeeded");
    }
    drop(flood);
    // The flood's dead connections are accepted and closed one after another: until the last is gone,
    // the other worker may find no descriptor for its first connection to the upstream.
    wait_for("another one who is served", || {
        let reply = gateway.call();
        let served = reply.outcome() == "succeeded";
        assert!(served || reply.outcome() == "not_sent", "{reply:?}");
        served.then_some(())
    });
    wait_for("22 successes on record", || {
        let mut outcomes = gateway.records("outcome", 22);
        outcomes.retain(|record| record["outcome"] == "succeeded");
        (outcomes.len() == 22).then_some(())
    });
    assert_eq!(sandbox.requests().len(), 22);
}

#[test]
fn idle_and_slow_connections_do_not_affect_a_good_caller() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let sandbox = sandbox();
    let setup = Setup::default()
        .set("server.max_connections", 12_000)
        .set("server.header_timeout", "3s")
        .set("server.idle_timeout", "10m");
    let gateway = start_with(&sandbox, setup);
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
    };
    let mut good = Kept::open(&gateway);
    assert_eq!(good.call().outcome(), "succeeded");
    let before = memory();
    let open = |_| {
        let mut caller = Kept::open(&gateway);
        assert_eq!(caller.call().outcome(), "succeeded");
        caller
    };
    let mut idle: Vec<_> = (0..10_000).map(open).collect();
    let each = (memory() - before) / 10; // of a thousand, in KiB: bytes, nearly
    let begin = Instant::now();
    let whole = head(BODY.len(), "");
    let slow: Vec<_> = (0..1000)
        .map(|_| {
            let mut stream = TcpStream::connect(gateway.address).unwrap();
            stream.write_all(&whole.as_bytes()[..60]).unwrap();
            stream
        })
        .collect();
    let closed = || {
        let metrics = gateway.admin("/metrics").body;
        metrics.contains("connections_closed_total{reason=\"header_timeout\"} 1000\n").then_some(())
    };
    wait_for("the end of the slow ones", || {
        assert_eq!(good.call().outcome(), "succeeded");
        assert_eq!(gateway.call().outcome(), "succeeded");
        closed()
    });
    assert!(begin.elapsed() < Duration::from_secs(12), "{:?} for 3 s", begin.elapsed());
    for mut stream in slow {
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    }
    assert_eq!(idle[5000].call().outcome(), "succeeded", "the idle ones are still there");
    assert!(each < 40_000, "{each} bytes for an idle connection");
}

#[test]
fn unfinished_requests_stay_within_the_memory_of_the_examples() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let most = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() / 1024
    };
    let send = |text: &str| {
        let mut stream = TcpStream::connect(gateway.address).unwrap();
        let _ = stream.write_all(text.as_bytes()); // one without room is closed meanwhile
        stream
    };
    let closed = |reason: &str| {
        let metrics = gateway.admin("/metrics").body;
        let name = format!("ccsqm_gateway_connections_closed_total{{reason=\"{reason}\"}} ");
        metrics
            .lines()
            .find_map(|line| line.strip_prefix(&name))
            .map_or(0, |count| count.parse::<usize>().unwrap())
    };
    let half_head = head(0, &format!("x-long: {}", "x".repeat(16_000)))[..16_000].to_owned();
    let heads: Vec<_> = (0..4096).map(|_| send(&half_head)).collect();
    wait_for("the end of heads without room", || (closed("too_many_unfinished") > 500).then_some(()));
    assert_eq!(gateway.call().outcome(), "succeeded", "while heads hold all that they may");
    drop(heads);
    wait_for("their end", || gateway.admin("/metrics").body.contains("_connections 0\n").then_some(()));
    let half_body = head(256 * 1024, "") + &" ".repeat(255 * 1024);
    let mut bodies: Vec<_> = (0..4000).map(|_| send(&half_body)).collect();
    assert_eq!(gateway.call().outcome(), "succeeded", "while bodies hold all that they may");
    let reply = read_reply(bodies.last_mut().unwrap());
    assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "overloaded", "not_sent"));
    drop(bodies);
    let begun = Instant::now();
    assert_eq!(gateway.call().outcome(), "succeeded");
    // It takes less than 1 s. On a busy machine it may take four times that.
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}, of 4 s at most", begun.elapsed());
    assert!(most() < 256, "{} MiB", most());
    let body = format!("{BODY}{}", " ".repeat(200 * 1024));
    assert_eq!(gateway.post(&body).outcome(), "succeeded", "what they held was given back");
}

/// What a caller sends behind a whole request, and stops. In one piece with it, with the last byte of its body, and behind a
/// chunked body.
#[test]
fn bytes_after_a_complete_request_count_as_unfinished() {
    const CALLERS: usize = 400;
    let behind = format!("POST {PATH} HTTP/1.1\r\nx-long: {}", "x".repeat(11_000));
    let whole = head(BODY.len(), "").replace("connection: close\r\n", "");
    let chunked = whole.replace(&format!("content-length: {}", BODY.len()), "transfer-encoding: chunked");
    let chunk = format!("{:x}\r\n{BODY}\r\n0\r\n\r\n", BODY.len());
    let (most, last) = BODY.split_at(BODY.len() - 1);
    let (most_chunks, last_chunk) = chunk.split_at(chunk.len() - 1);
    let sandbox = sandbox();
    // 400 times 7 KiB, beyond the first 4 of each, fit into one budget and not into the other.
    for (budget, has_room) in [("1MiB", false), ("32MiB", true)] {
        for (how, first, second) in [
            ("in one piece", whole.clone() + BODY, ""),
            ("with the last byte", whole.clone() + most, last),
            ("behind chunks", chunked.clone() + most_chunks, last_chunk),
        ] {
            let gateway = start_with(&sandbox, Setup::default().set("server.max_unfinished", budget));
            let open = |_| {
                let mut stream = TcpStream::connect(gateway.address).unwrap();
                let middle = if second.is_empty() { &behind[..] } else { "" };
                stream.write_all((first.clone() + middle).as_bytes()).unwrap();
                stream
            };
            let mut streams: Vec<_> = (0..CALLERS).map(open).collect();
            wait_for("their requests", || {
                let metrics = gateway.admin("/metrics").body;
                let line = metrics.lines().find_map(|line| line.strip_prefix("ccsqm_gateway_connections "));
                (line == Some(&CALLERS.to_string()) || second.is_empty()).then_some(())
            });
            if !second.is_empty() {
                for stream in &mut streams {
                    let _ = stream.write_all((second.to_owned() + &behind).as_bytes());
                }
            }
            let mut ended = 0;
            for stream in &mut streams {
                let mut reply = [0; 1024];
                let length = stream.read(&mut reply).unwrap();
                let reply = String::from_utf8_lossy(&reply[..length]);
                assert!(reply.starts_with("HTTP/1.1 200"), "{how}: each request is served: {reply}");
                ended += usize::from(reply.contains("connection: close"));
            }
            let closed = || {
                let metrics = gateway.admin("/metrics").body;
                let name = "ccsqm_gateway_connections_closed_total{reason=\"too_many_unfinished\"} ";
                let line = metrics.lines().find_map(|line| line.strip_prefix(name));
                line.map_or(0, |count| count.parse::<usize>().unwrap())
            };
            if has_room {
                assert_eq!((ended, closed()), (0, 0), "{how}: the control");
            } else {
                wait_for("the end of those without room", || (closed() > 200).then_some(()));
            }
            println!("{budget}, {how}: {ended} told, {} closed", closed());
            drop(streams);
            wait_for("their end", || {
                gateway.admin("/metrics").body.contains("_connections 0\n").then_some(())
            });
            let body = format!("{BODY}{}", " ".repeat(200 * 1024));
            assert_eq!(gateway.post(&body).outcome(), "succeeded", "{how}: what they held was given back");
        }
    }
}

/// A machine that was suspended is one whose wall clock has jumped.
#[test]
fn wall_clock_jumps_affect_only_the_token() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let clock = folder.path().join("clock");
    let library = compile("overload/clock");
    let through =
        ["env", &format!("LD_PRELOAD={}", library.display()), &format!("CLOCK={}", clock.display())];
    let setup =
        Setup { through: through.map(str::to_owned).into(), folder: Some(folder), ..Setup::default() };
    let gateway = start_with(&sandbox, setup);
    let mut kept = Kept::open(&gateway);
    let key = |number: usize| format!("idempotency-key: key-{number}\r\n");
    until_keys_are_known(&gateway);
    assert_eq!(gateway.post_with(&key(0)).outcome(), "succeeded");
    for (number, hours) in [1, -1, 2, 0, -2].into_iter().enumerate() {
        std::fs::write(&clock, (hours * 3600).to_string()).unwrap();
        assert_eq!(kept.call().outcome(), "succeeded", "{hours} h");
        assert_eq!(gateway.post_with(&key(number + 1)).outcome(), "succeeded", "{hours} h");
        for earlier in 0..=number + 1 {
            assert_eq!(gateway.post_with(&key(earlier)).outcome(), "replayed", "{hours} h");
        }
    }
    assert!(sandbox.requests().iter().all(|request| request.status == Some(200)), "no dead token was sent");
    assert!(sandbox.token_calls().len() >= 2, "the control: the clock has jumped");
    assert_eq!(sandbox.requests().len(), 11);
    let times: Vec<_> =
        gateway.records("intent", 11).iter().map(|intent| intent["time"].to_string()).collect();
    assert!(times.is_sorted(), "records are timed by the clock of the start");
    let audit = gateway.audit_directory();
    assert_eq!(command(&["audit", "verify", audit.to_str().unwrap()]).0, 0);
    assert_eq!(command(&["audit", "in-doubt", audit.to_str().unwrap()]).0, 0);
}
