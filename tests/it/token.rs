//! Stage 5: the token's life.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults, Habit, Options, Sandbox};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Map, Value, json};

use crate::support::*;

/// Callers at once, for the rows that are about many.
const MANY: usize = 1000;

/// Many callers have a thousand sockets here and, inherited, in the gateway.
fn allow_many_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

/// A gateway that takes many requests at once.
fn start_for_many(sandbox: &Sandbox) -> Gateway {
    allow_many_files();
    start_with(sandbox, Setup::default().set("token.wait", "20s").set("upstream.connect_timeout", "20s"))
}

fn connect(gateway: &Gateway, count: usize) -> Vec<TcpStream> {
    (0..count).map(|_| TcpStream::connect(gateway.address).unwrap()).collect()
}

fn write_all(callers: &mut [TcpStream]) {
    for caller in callers {
        caller.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    }
}

fn read_all(callers: &mut [TcpStream]) -> Vec<Reply> {
    callers.iter_mut().map(read_reply).collect()
}

fn assert_success(reply: &Reply) {
    assert_eq!((reply.status, reply.outcome()), (200, "succeeded"), "{reply:?}");
}

/// The tokens of the upstream's requests, in order.
fn tokens_received(sandbox: &Sandbox) -> Vec<String> {
    let token = |head: Vec<u8>| {
        let head = String::from_utf8(head).unwrap();
        let line = head.lines().find_map(|line| line.strip_prefix("authorization: Bearer "));
        line.unwrap().to_owned()
    };
    sandbox.requests().into_iter().map(|request| token(request.head)).collect()
}

/// No request came with a token that was over: the sandbox answers such a one 401.
fn no_dead_token_was_sent(sandbox: &Sandbox) -> bool {
    sandbox.requests().iter().all(|request| request.status == Some(200))
}

#[test]
fn one_thousand_callers_without_a_token_cause_one_token_call() {
    let sandbox = sandbox();
    script(&sandbox, Faults { token_down: true, ..Faults::default() });
    let gateway = start_for_many(&sandbox);
    let mut callers = connect(&gateway, MANY);
    script(&sandbox, Faults::token(Fault::delayed(500)));
    write_all(&mut callers);
    let answered = sandbox.token_calls().iter().any(|call| call.request.status.is_some());
    assert!(!answered, "all requests were written before the token call was answered");
    read_all(&mut callers).iter().for_each(assert_success);
    assert_eq!((sandbox.token_calls().len(), sandbox.requests().len()), (1, MANY));
    assert_eq!(sandbox.tasks().len(), MANY);
    for outcome in gateway.records("outcome", MANY) {
        assert_eq!((&outcome["outcome"], &outcome["attempts"]), (&json!("succeeded"), &json!(1)));
    }
}

#[test]
fn one_thousand_parallel_401s_cause_one_token_refresh() {
    let sandbox = sandbox();
    let gateway = start_for_many(&sandbox);
    assert_success(&gateway.call());
    let mut callers = connect(&gateway, MANY);
    sandbox.revoke();
    write_all(&mut callers);
    read_all(&mut callers).iter().for_each(assert_success);
    assert_eq!(sandbox.token_calls().len(), 2);
    assert_eq!(sandbox.tasks().len(), 1 + MANY);
    let outcomes = gateway.records("outcome", 1 + MANY);
    let replayed = outcomes.iter().filter(|outcome| outcome["attempts"] == 2).count();
    assert!(outcomes.iter().all(|outcome| outcome["outcome"] == "succeeded"));
    let refused = sandbox.requests().iter().filter(|request| request.status == Some(401)).count();
    assert_eq!(replayed, refused);
    assert!(replayed > 0, "the control: somebody met the 401");
}

#[test]
fn second_401_starts_a_cooldown_that_uses_the_newest_token() {
    let sandbox = sandbox();
    let gateway = start_for_many(&sandbox);
    assert_success(&gateway.call());
    let refused = |replies: &[Reply]| {
        replies.iter().all(|reply| {
            (reply.status, reply.code(), reply.outcome()) == (502, "credential_rejected", "refused")
                && reply.headers.contains_key("retry-after")
        })
    };
    script(&sandbox, Faults::business(Fault::status(401)));
    let mut callers = connect(&gateway, 100);
    write_all(&mut callers);
    let replies = read_all(&mut callers);
    assert!(refused(&replies), "{replies:?}");
    assert_eq!(sandbox.token_calls().len(), 2, "one refresh for all of them");
    for reply in &replies {
        let seconds: u64 = reply.headers["retry-after"].parse().unwrap();
        assert!(seconds <= 30, "one cool-down for all of them, not one each: {seconds} s");
    }

    let before = sandbox.requests().len();
    let mut callers = connect(&gateway, 100);
    write_all(&mut callers);
    assert!(refused(&read_all(&mut callers)));
    assert_eq!((sandbox.token_calls().len(), sandbox.requests().len()), (2, before + 100));
    let newest = sandbox.token_calls()[1].issued.clone().unwrap();
    assert!(tokens_received(&sandbox)[before..].iter().all(|token| *token == newest));
    let outcomes = gateway.records("outcome", 201);
    assert!(outcomes[101..].iter().all(|outcome| outcome["attempts"] == 1), "{outcomes:?}");

    script(&sandbox, Faults::default());
    assert_success(&gateway.call());
    assert_eq!(sandbox.token_calls().len(), 2);
    sandbox.revoke();
    assert_success(&gateway.call()); // the success ended the cool-down
    assert_eq!(sandbox.token_calls().len(), 3);
}

#[test]
fn reissued_refused_token_is_not_fetched_for_every_401() {
    let sandbox = sandbox();
    script(&sandbox, Faults { habit: Habit::SameUntilExpiry, ..Faults::default() });
    let gateway = start(&sandbox);
    assert_success(&gateway.call());
    script(&sandbox, Faults { habit: Habit::SameUntilExpiry, ..Faults::business(Fault::status(401)) });
    for _ in 0..3 {
        let reply = gateway.call();
        assert_eq!((reply.code(), reply.outcome()), ("credential_rejected", "refused"));
    }
    assert_eq!((sandbox.token_calls().len(), sandbox.requests().len()), (2, 4));
}

#[test]
fn token_endpoint_outage_has_no_effect_until_the_token_expires() {
    let sandbox = sandbox();
    script(&sandbox, Faults { lifetime_ms: Some(4000), ..Faults::default() });
    let begin = Instant::now();
    let gateway = start_with(&sandbox, Setup::default().set("token.wait", "300ms"));
    assert_success(&gateway.call());
    script(&sandbox, Faults { lifetime_ms: Some(4000), token_down: true, ..Faults::default() });
    let mut served = 0;
    let refused = loop {
        let reply = gateway.call();
        if reply.outcome() != "succeeded" {
            break reply;
        }
        served += 1;
        thread::sleep(Duration::from_millis(10)); // the pace of a caller
        assert!(begin.elapsed() < Duration::from_secs(16), "the token has no end");
    };
    // A life of 4 s is used for 3.6 s.
    assert!(begin.elapsed() > Duration::from_millis(3600), "served for {:?}", begin.elapsed());
    assert_eq!((refused.status, refused.code(), refused.outcome()), (503, "token_unavailable", "not_sent"));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(sandbox.requests().len(), 1 + served, "the refused one was not sent");
    script(&sandbox, Faults { lifetime_ms: Some(4000), ..Faults::default() });
    let back = Instant::now();
    wait_for("service", || (gateway.call().outcome() == "succeeded").then_some(()));
    let took = back.elapsed();
    println!("served {served} without the endpoint; served again {took:?} after it came back");
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(no_dead_token_was_sent(&sandbox));
    let outcomes = gateway.records("outcome", 2 + served);
    assert!(outcomes.iter().all(|outcome| outcome["outcome"] == "succeeded"));
    let refusals = gateway.records("refusal", 1);
    assert_eq!(refusals[0]["code"], "token_unavailable");
}

#[test]
fn gateway_handles_every_token_habit_under_load() {
    thread::scope(|scope| {
        for habit in [Habit::Independent, Habit::SameUntilExpiry, Habit::LastWins] {
            scope.spawn(move || println!("{habit:?}: {}", survive(habit)));
        }
    });
}

/// Twenty seconds of load on one server's habit. Tells the figures.
fn survive(habit: Habit) -> String {
    const CALLERS: usize = 4;
    let sandbox = sandbox();
    script(&sandbox, Faults { habit, lifetime_ms: Some(6000), ..Faults::default() });
    let gateway = start(&sandbox);
    let begin = Instant::now();
    let served = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                while begin.elapsed() < Duration::from_secs(20) {
                    let reply = gateway.call();
                    assert_eq!(reply.outcome(), "succeeded", "{habit:?}: {reply:?} {}", gateway.log());
                    served.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(10)); // leaves the machine to the other tests, too
                }
            });
        }
    });
    let served = usize::try_from(served.into_inner()).unwrap();
    let outcomes = wait_for("the outcomes", || {
        let mut outcomes = records(&gateway.audit_directory(), "outcome");
        // A call that the trail was late for, as on a busy machine, was not sent, and was made again.
        outcomes.retain(|outcome| outcome["code"] != "audit_unavailable");
        (outcomes.len() >= served).then_some(outcomes)
    });
    let replayed = outcomes.iter().filter(|outcome| outcome["attempts"] != 1).count();
    let fetches = sandbox.token_calls().len();
    assert!(served > 500, "{habit:?}: {served} is no load");
    assert!((4..=12).contains(&fetches), "{habit:?}: {fetches} token calls");
    assert_eq!(outcomes.len(), served, "{habit:?}");
    assert!(outcomes.iter().all(|outcome| outcome["outcome"] == "succeeded"), "{habit:?}");
    assert_eq!(sandbox.tasks().len(), served, "{habit:?}");
    // Its own next token ends the one before.
    let status = gateway.admin("/status").json();
    assert!(status["credentials"][0]["contested"].is_null(), "{habit:?}: {status}");
    if habit == Habit::Independent {
        assert!(no_dead_token_was_sent(&sandbox));
    }
    format!("{served} served, {replayed} replayed, {fetches} token calls")
}

/// Calls gateways that share a credential, each one call after the other, while something is waited for. Returns how many succeeded.
fn call_both_while(gateways: &[Gateway], wait: impl FnOnce()) -> usize {
    let (begun, stop, succeeded) = (Instant::now(), AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for gateway in gateways {
            let (stop, succeeded) = (&stop, &succeeded);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) && begun.elapsed() < Duration::from_secs(60) {
                    let reply = gateway.call();
                    // Refused is what was refused twice: both fetched at once.
                    assert!(["succeeded", "refused"].contains(&reply.outcome()), "{reply:?}");
                    succeeded.fetch_add(usize::from(reply.outcome() == "succeeded"), Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(20)); // the pace of a caller
                }
            });
        }
        wait();
        stop.store(true, Ordering::Relaxed);
    });
    succeeded.into_inner()
}

#[test]
fn gateways_that_contest_tokens_detect_it_and_back_off() {
    const SAID: &str = "another client, such as a second gateway, fetches tokens with the same app key";
    let sandbox = sandbox();
    script(&sandbox, Faults { habit: Habit::LastWins, lifetime_ms: Some(30_000), ..Faults::default() });
    let setup = || Setup::default().set("token.wait", "6s");
    let gateways = [start_with(&sandbox, setup()), start_with(&sandbox, setup())];
    let contested = |gateway: &Gateway| gateway.admin("/status").json()["credentials"][0]["contested"].take();
    let gauge = |gateway: &Gateway, value: u8| {
        let line = format!("ccsqm_gateway_token_contested{{credential=\"default\"}} {value}\n");
        gateway.admin("/metrics").body.contains(&line)
    };
    for gateway in &gateways {
        assert!(contested(gateway).is_null() && gauge(gateway, 0), "the control");
    }
    let succeeded = call_both_while(&gateways, || {
        for gateway in &gateways {
            let found = wait_for("the notice", || Some(contested(gateway)).filter(Value::is_object));
            assert!(found["detail"].as_str().unwrap().contains(SAID), "{found}");
            assert!(found["since"].is_string() && found["over"].is_null() && gauge(gateway, 1), "{found}");
        }
        // From here on each leaves the other's token alone for 3 s at least.
        let (before, begun) = (sandbox.token_calls().len(), Instant::now());
        wait_for("some time", || (begun.elapsed() > Duration::from_secs(15)).then_some(()));
        let calls = sandbox.token_calls().len() - before;
        println!("{before} token calls until both noticed, {calls} in the 15 s behind that");
        assert!((2..=6).contains(&calls), "{calls} token calls in 15 s");
    });
    assert_eq!(sandbox.tasks().len(), succeeded, "no task twice, and none that was not told");
    for gateway in &gateways {
        let lines: Vec<_> =
            gateway.log().lines().filter(|line| line.contains(SAID)).map(str::to_owned).collect();
        assert!(lines.len() == 1 && lines[0].contains("WARN"), "{lines:?}");
    }
    // The other one is gone: a token lasts.
    let [gateway, other] = gateways;
    other.kill();
    assert_eq!(gateway.call().outcome(), "succeeded");
    wait_for("the end of it", || {
        assert_eq!(gateway.call().outcome(), "succeeded");
        contested(&gateway)["over"].is_string().then_some(())
    });
    assert!(gauge(&gateway, 0));
}

/// A way to the sandbox on which a proxy refuses each request whose body has a mark.
struct Refusing(SocketAddr);

const MARK: &str = "77777777";

impl Refusing {
    fn start(sandbox: &Sandbox, status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, upstream) = (listener.local_addr().unwrap(), sandbox.address());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || pass_on(stream, upstream, status));
            }
        });
        Self(address)
    }

    fn url(&self) -> String {
        format!("http://{}", self.0)
    }
}

fn pass_on(mut stream: TcpStream, upstream: SocketAddr, status: u16) -> Option<()> {
    let mut upstream = TcpStream::connect(upstream).ok()?;
    loop {
        let request = read_message(&mut stream)?;
        if request.contains(MARK) {
            stream.write_all(format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\n\r\n").as_bytes()).ok()?;
        } else {
            upstream.write_all(request.as_bytes()).ok()?;
            stream.write_all(read_message(&mut upstream)?.as_bytes()).ok()?;
        }
    }
}

/// A request or an answer of stated length.
fn read_message(stream: &mut TcpStream) -> Option<String> {
    let mut message = Vec::new();
    while !message.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        message.push(byte[0]);
    }
    let head = String::from_utf8(message).unwrap();
    let mut fields = head.lines().filter_map(|line| line.split_once(": "));
    let (_, length) = fields.find(|(name, _)| name.eq_ignore_ascii_case("content-length")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).ok()?;
    Some(head + std::str::from_utf8(&body).unwrap())
}

#[test]
fn calls_refused_with_any_token_start_no_contest_and_block_no_other() {
    thread::scope(|scope| {
        for (habit, status) in [(Habit::Independent, 403), (Habit::LastWins, 401)] {
            scope.spawn(move || refuse_some_of_many(habit, status));
        }
    });
}

fn refuse_some_of_many(habit: Habit, status: u16) {
    const BAD: usize = 6;
    let sandbox = sandbox();
    script(&sandbox, Faults { habit, ..Faults::default() });
    let way = Refusing::start(&sandbox, status);
    // In a contest, calls would wait for 10 s at least.
    let setup = Setup { base_url: Some(way.url()), token_url: Some(sandbox.token_url()), ..Setup::default() }
        .set("token.wait", "20s")
        .set("token.refused_statuses", "[401, 403]");
    let gateway = start_with(&sandbox, setup);
    assert_success(&gateway.call());
    let good = |count: &AtomicUsize| {
        let begun = Instant::now();
        assert_success(&gateway.call());
        assert!(begun.elapsed() < Duration::from_secs(8), "{habit:?}: {:?}", begun.elapsed());
        count.fetch_add(1, Ordering::Relaxed);
    };
    let (begun, stop, count) = (Instant::now(), AtomicBool::new(false), AtomicUsize::new(1));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) && begun.elapsed() < Duration::from_secs(60) {
                    good(&count);
                    thread::sleep(Duration::from_millis(10)); // the pace of a caller
                }
            });
        }
        let bad = BODY.replace("\"count\":2", &format!("\"count\":{MARK}"));
        for _ in 0..BAD {
            let reply = gateway.post(&bad);
            let said = (reply.status, reply.code(), reply.outcome());
            assert_eq!(said, (502, "credential_rejected", "refused"), "{habit:?}: {reply:?}");
            good(&count); // ends the cool-down
        }
        stop.store(true, Ordering::Relaxed);
    });
    let count = count.into_inner();
    assert_eq!(sandbox.tasks().len(), count, "{habit:?}");
    assert_eq!(
        sandbox.token_calls().len(),
        1 + BAD,
        "{habit:?}: the control: each was sent with a fresh one, too"
    );
    let outcomes = gateway.records("outcome", count + BAD);
    let refused: Vec<_> = outcomes.iter().filter(|outcome| outcome["outcome"] == "refused").collect();
    assert!(refused.len() == BAD && refused.iter().all(|outcome| outcome["attempts"] == 2), "{refused:?}");
    let status = gateway.admin("/status").json();
    assert!(status["credentials"][0]["contested"].is_null(), "{habit:?}: {status}");
    let metrics = gateway.admin("/metrics").body;
    assert!(metrics.contains("ccsqm_gateway_token_contested{credential=\"default\"} 0\n"), "{habit:?}");
    assert!(!gateway.log().contains("another client, such as a second gateway"), "{habit:?}");
}

#[test]
fn changed_secret_is_tried_before_it_replaces_the_old_one() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_success(&gateway.call());
    let secret = gateway.folder.path().join("app_secret");
    fs::write(&secret, "wrong").unwrap();
    let change = |count: usize| {
        wait_for("the trial", || {
            let events = records(&gateway.audit_directory(), "event");
            let changes: Vec<_> =
                events.into_iter().filter(|event| event["event"] == "secret_change").collect();
            changes.get(count).map(|event| event["result"].clone())
        })
    };
    assert_eq!(change(0), "refused");
    wait_for("its log line", || gateway.log().contains("the old secret stays in use").then_some(()));
    assert_success(&gateway.call()); // the old token serves on
    sandbox.secret("sandbox-app-key", "new-secret");
    fs::write(&secret, "new-secret\n").unwrap();
    assert_eq!(change(1), "accepted");
    assert_success(&gateway.call());
    let calls = sandbox.token_calls();
    assert_eq!(calls.len(), 3, "the trial's token is the new token");
    assert_eq!(tokens_received(&sandbox).last(), calls[2].issued.as_ref());
    for hidden in ["new-secret", "sandbox-app-secret"] {
        assert!(!gateway.log().contains(hidden));
    }
}

/// Some services tell a wrong secret by a 200 whose body says so.
#[test]
fn third_status_200_without_a_token_counts_as_a_refusal() {
    let (long, secret) = (format!("CODE\u{202e}{}", "7".repeat(10_000)), Options::default().app_secret);
    for (body, says) in [
        (json!({ "resultCode": "1007", "resultDesc": "wrong secret" }), "; its code is 1007"),
        (json!({ "AccessToken": "", "error_code": long }), "; its code is CODE\\u202e777"),
        (json!({ "AccessToken": "tökén" }), "its AccessToken is not valid by RFC 6750"),
        (json!({ "code": format!("no {secret}") }), "quotes the credential"),
    ] {
        let sandbox = sandbox();
        script(&sandbox, Faults::token(Fault::body(body.to_string())));
        let gateway = start_with(&sandbox, Setup::default().set("token.wait", "20s"));
        let reply = gateway.call();
        let said = (reply.status, reply.code(), reply.outcome(), reply.json()["cause"].clone());
        assert_eq!(said, (502, "credential_refused", "not_sent", json!("token_refused")), "{reply:?}");
        let wait: u64 = reply.headers["retry-after"].parse().unwrap();
        assert!((1..=30).contains(&wait), "{reply:?}");
        let status = gateway.admin("/status").json();
        let last = &status["credentials"][0]["last_error"];
        let detail = last["detail"].as_str().unwrap();
        assert!(last["cause"] == "token_refused" && detail.contains(says), "{status}");
        assert!(detail.len() < 300 && !detail.contains(&secret), "{status}");
        wait_for("the log line", || {
            gateway.log().lines().any(|line| line.contains("token_refused") && line.len() < 600).then_some(())
        });
        assert!(!gateway.log().contains(&secret) && !gateway.log().contains(&long));
        let begun = Instant::now();
        wait_for("more calls", || {
            assert_eq!(gateway.call().code(), "credential_refused");
            (begun.elapsed() > Duration::from_secs(4)).then_some(())
        });
        assert_eq!((sandbox.token_calls().len(), sandbox.requests().len()), (3, 0), "{body}");
    }
}

#[test]
fn foreign_200_or_two_without_a_token_count_as_no_refusal() {
    let sandbox = sandbox();
    let unreadable = Fault::body("<html>").times(3);
    script(&sandbox, Faults::token([unreadable, Fault::body("{}").times(2)]));
    let gateway = start_with(&sandbox, Setup::default().set("token.wait", "30s"));
    assert_success(&gateway.call());
    assert_eq!(sandbox.token_calls().len(), 6);
}

#[test]
fn token_too_short_to_search_for_is_reported_once() {
    for (length, told) in [(15, 1), (16, 0)] {
        let sandbox = sandbox();
        let token = |first: char| {
            let token = format!("{first}{}", "0".repeat(length - 1));
            let with =
                Map::from_iter([("AccessToken".to_owned(), json!(token)), ("Expires".to_owned(), json!(2))]);
            Fault { with, ..Fault::default().times(1) }
        };
        script(&sandbox, Faults::token([token('a'), token('b'), token('c')]));
        let gateway = start(&sandbox);
        let new = |log: &str| log.matches("\"new token\"").count();
        wait_for("three tokens", || (new(&gateway.log()) >= 3).then_some(()));
        let log = gateway.log();
        let said =
            "the token of credential default has fewer than 16 bytes: replies that quote it are not noticed";
        assert_eq!(log.matches(said).count(), told, "{length}: {log}");
        assert!(!log.contains(&"0".repeat(length - 1)), "it is not quoted");
    }
}

#[test]
fn missing_or_unusable_secret_fails_the_start() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let config = folder.path().join("gateway.toml");
    let config = config.to_str().unwrap();
    assert_eq!(command(&["check", "--config", config]).0, 0, "the control");
    for (file, content, reason) in [
        ("app_secret", None, "there is no such file"),
        ("app_key", None, "there is no such file"),
        ("app_secret", Some(""), "is empty"),
        ("app_secret", Some("\n"), "is empty"),
        ("app_key", Some("two\nlines"), "holds more than one line"),
    ] {
        let path = folder.path().join(file);
        let good = fs::read(&path).unwrap();
        match content {
            None => fs::remove_file(&path).unwrap(),
            Some(content) => fs::write(&path, content).unwrap(),
        }
        for verb in ["check", "serve"] {
            let (code, _, error) = command(&[verb, "--config", config]);
            assert_eq!(code, 78, "{file} {content:?} {verb}: {error}");
            assert!(error.contains(reason), "{file} {content:?} {verb}: {error}");
            assert!(!error.contains("lines"), "{error}");
        }
        fs::write(&path, good).unwrap();
    }
}
