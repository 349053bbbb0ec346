//! Stage 9 over HTTP/2: what counts as sent, what one stream's end means for the others, and who picks the
//! protocol.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::TcpStream,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::Sandbox;

use crate::{
    callers::{change, swap},
    egress::{Gate, Roots},
    exchange::secure_sandbox,
    http2_upstream::{Received, SUCCESS, Upstream, Wire},
    support::*,
};

const NO_ERROR: u32 = 0;
const REFUSED_STREAM: u32 = 7;
const INTERNAL_ERROR: u32 = 2;
const CANCEL: u32 = 8;

/// A gateway before an upstream that may pick HTTP/2; tokens come from the sandbox.
fn start(sandbox: &Sandbox, upstream: &Upstream, setup: Setup) -> Gateway {
    let folder = setup.folder.unwrap_or_else(|| std::sync::Arc::new(tempfile::TempDir::new().unwrap()));
    let ca_file = folder.path().join("upstream-ca.pem");
    std::fs::write(&ca_file, &upstream.ca).unwrap();
    let setup = Setup { base_url: Some(upstream.url()), folder: Some(folder), ..setup };
    start_with(sandbox, setup.set("upstream.ca_file", ca_file.display()))
}

fn auto() -> Setup {
    // One worker, so that it is known how many connections there are.
    Setup::default().set("upstream.http2", "auto").set("server.workers", 1)
}

/// So many calls at once, each in a thread of its own.
fn calls(gateway: &Gateway, count: usize) -> Vec<JoinHandle<Reply>> {
    let address = gateway.address;
    let call = move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
        read_reply(&mut stream)
    };
    (0..count).map(|_| thread::spawn(call)).collect()
}

fn join(calls: Vec<JoinHandle<Reply>>) -> Vec<Reply> {
    calls.into_iter().map(|call| call.join().unwrap()).collect()
}

fn outcomes(replies: &[Reply]) -> Vec<&str> {
    replies.iter().map(Reply::outcome).collect()
}

/// The record of a reply's outcome: what it says, and in how many attempts.
fn recorded(gateway: &Gateway, reply: &Reply) -> (String, u64) {
    let id = &reply.headers["x-gateway-request-id"];
    let record = wait_for("the outcome", || {
        records(&gateway.audit_directory(), "outcome").into_iter().find(|record| record["id"] == **id)
    });
    (record["outcome"].as_str().unwrap().to_owned(), record["attempts"].as_u64().unwrap())
}

/// One intent and one outcome for every request.
fn every_intent_has_its_outcome(gateway: &Gateway, count: usize) {
    assert_eq!(gateway.records("outcome", count).len(), count);
    assert_eq!(gateway.records("intent", count).len(), count);
    let audit = gateway.audit_directory();
    assert_eq!(command(&["audit", "in-doubt", audit.to_str().unwrap()]).0, 0);
}

#[test]
fn http2_request_has_each_header_once_and_no_http1_headers() {
    let sandbox = sandbox();
    let upstream = Upstream::speaking_whole(|_| (200, SUCCESS.into()));
    let gateway = start(&sandbox, &upstream, auto());
    let reply = gateway.post_with("x-userid: 1611917095665261978\r\nauthorization: Bearer theirs\r\n");
    assert_eq!((reply.status, reply.outcome(), reply.body.as_str()), (200, "succeeded", SUCCESS));
    assert_eq!(recorded(&gateway, &reply), ("succeeded".into(), 1));
    let seen = upstream.seen();
    let [request] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!((request.method.as_str(), request.body.as_slice()), ("POST", BODY.as_bytes()));
    assert_eq!(request.uri.to_string(), format!("{}{PATH}", upstream.url()), ":scheme, :authority, :path");
    let mut names: Vec<_> = request.headers.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let expected = [
        "accept",
        "accept-encoding",
        "authorization",
        "content-length",
        "content-type",
        "user-agent",
        "x-app-key",
        "x-userid",
    ];
    assert_eq!(names, expected, "each once, no host, no connection");
    let header = |name: &str| request.headers[name].to_str().unwrap();
    assert_eq!(header("content-length"), BODY.len().to_string());
    assert_eq!(header("x-userid"), "1611917095665261978");
    let token = sandbox.token_calls().len();
    assert!(
        token == 1
            && header("authorization").starts_with("Bearer ")
            && !header("authorization").contains("theirs")
    );
}

#[test]
fn http2_is_offered_only_if_configured_and_http1_used_if_picked() {
    let sandbox = sandbox();
    for (setup, offered) in [(Setup::default(), &["http/1.1"][..]), (auto(), &["h2", "http/1.1"])] {
        let upstream = Upstream::start(|wire, request| wire.answer(request.stream, SUCCESS));
        let gateway = start(&sandbox, &upstream, setup);
        assert_eq!(gateway.call().outcome(), "succeeded");
        assert_eq!(upstream.offers(), [offered]);
        let over = (upstream.heads().len(), upstream.received().len());
        assert_eq!(over, if offered.len() == 1 { (1, 0) } else { (0, 1) });
    }
    // An upstream that picks HTTP/1.1 from the offer, and one that knows no such offers.
    let upstream = Upstream::picking_http1();
    let gateway = start(&sandbox, &upstream, auto());
    assert_eq!(outcomes(&join(calls(&gateway, 20))), ["succeeded"; 20]);
    assert_eq!(upstream.offers()[0], ["h2", "http/1.1"]);
    assert!(
        upstream.heads().iter().all(|head| head.starts_with("POST ") && head.contains("\r\nhost: localhost"))
    );
    every_intent_has_its_outcome(&gateway, 20);
    let before = upstream.offers().len();
    for _ in 0..5 {
        assert_eq!(gateway.call().outcome(), "succeeded");
    }
    assert_eq!(upstream.offers().len(), before, "connections are used again");
    let (sandbox, setup) = secure_sandbox();
    let gateway = start_with(&sandbox, setup.set("upstream.http2", "auto"));
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!(sandbox.requests().len(), 1);
}

#[test]
fn upstream_without_tls_is_called_over_http1() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, auto());
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!(sandbox.requests().len(), 1);
}

#[test]
fn callers_at_a_cold_start_share_one_http2_connection() {
    const CALLERS: usize = 64;
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| {
        // All are there before one is answered, the last first.
        wire.hold(request);
        if wire.held() == CALLERS {
            while let Some(held) = wire.release() {
                wire.answer(held.stream, SUCCESS);
            }
        }
    });
    let gateway = start(&sandbox, &upstream, auto());
    let replies = join(calls(&gateway, CALLERS));
    assert_eq!(outcomes(&replies), ["succeeded"; CALLERS]);
    assert_eq!((upstream.received().len(), upstream.connections()), (CALLERS, 1));
    let streams: HashSet<_> = upstream.received().iter().map(|request| request.stream).collect();
    assert_eq!(streams.len(), CALLERS);
    every_intent_has_its_outcome(&gateway, CALLERS);
}

#[test]
fn refused_stream_is_retried_only_once() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| match request.nth {
        0 => wire.reset(request.stream, REFUSED_STREAM),
        _ => wire.answer(request.stream, SUCCESS),
    });
    let gateway = start(&sandbox, &upstream, auto());
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome()), (200, "succeeded"));
    assert_eq!(recorded(&gateway, &reply), ("succeeded".into(), 1));
    assert_eq!(upstream.received().len(), 2);
    every_intent_has_its_outcome(&gateway, 1);

    let upstream = Upstream::start(|wire, request| wire.reset(request.stream, REFUSED_STREAM));
    let gateway = start(&sandbox, &upstream, auto());
    let reply = gateway.call();
    assert_eq!((reply.status, reply.code(), reply.outcome()), (502, "upstream_unreachable", "not_sent"));
    assert_eq!(recorded(&gateway, &reply), ("not_sent".into(), 0));
    assert_eq!(upstream.received().len(), 2);
    every_intent_has_its_outcome(&gateway, 1);
}

/// Ways to say that the request of a stream was not processed.
const DENIALS: [fn(&Wire, &Received); 2] = [
    |wire, request| wire.reset(request.stream, REFUSED_STREAM),
    |wire, request| wire.go_away(request.stream - 2, 0),
];

#[test]
fn denial_after_an_interim_response_is_not_trusted() {
    let sandbox = sandbox();
    for (way, deny) in DENIALS.into_iter().enumerate() {
        for interim in [None, Some(100), Some(103)] {
            let upstream = Upstream::start(move |wire, request| match request.nth {
                1 => {
                    interim.into_iter().for_each(|status| wire.head(request.stream, status, None));
                    deny(wire, &request);
                }
                _ => wire.answer(request.stream, SUCCESS),
            });
            let gateway = start(&sandbox, &upstream, auto());
            assert_eq!(gateway.call().outcome(), "succeeded");
            let reply = gateway.call();
            let (told, sent) = (recorded(&gateway, &reply), upstream.received().len());
            if interim.is_none() {
                assert_eq!(
                    (told, sent),
                    (("succeeded".into(), 1), 3),
                    "the control of way {way}: sent again once"
                );
                every_intent_has_its_outcome(&gateway, 2);
                continue;
            }
            assert_eq!((reply.status, reply.code(), reply.outcome()), (502, "upstream_broken", "unknown"));
            assert_eq!(reply.headers.get("retry-after"), None);
            assert_eq!((told, sent), (("unknown".into(), 1), 2), "way {way}: nothing is sent again");
            wait_for("the WARN", || {
                gateway.log().contains("has answered on its HTTP/2 stream").then_some(())
            });
            assert_eq!(gateway.call().outcome(), "succeeded", "the next one");
            assert_eq!(upstream.received().last().unwrap().connection, 1, "takes another connection");
            every_intent_has_its_outcome(&gateway, 3);
        }
    }
}

#[test]
fn contradiction_makes_all_denials_of_its_connection_untrusted() {
    let sandbox = sandbox();
    for deny in DENIALS {
        let upstream = Upstream::start(move |wire, request| match request.connection {
            0 => {
                wire.hold(request);
                if wire.held() == 3 {
                    // The last one that came has the highest stream.
                    let mut held: Vec<_> = std::iter::from_fn(|| wire.release()).collect();
                    held.sort_by_key(|request| request.stream);
                    wire.head(held[2].stream, 103, None);
                    deny(wire, &held[2]);
                    wire.reset(held[1].stream, REFUSED_STREAM);
                    wire.answer(held[0].stream, SUCCESS);
                }
            }
            _ => wire.answer(request.stream, SUCCESS),
        });
        let gateway = start(&sandbox, &upstream, auto());
        let mut replies = join(calls(&gateway, 3));
        replies.sort_by_key(|reply| reply.status);
        assert_eq!(outcomes(&replies), ["succeeded", "unknown", "unknown"]);
        assert_eq!((upstream.received().len(), upstream.connections()), (3, 1), "nothing is sent again");
        assert_eq!(gateway.call().outcome(), "succeeded");
        every_intent_has_its_outcome(&gateway, 4);
    }
}

#[test]
fn stream_reset_for_another_reason_is_unknown_and_others_continue() {
    let sandbox = sandbox();
    for reason in [INTERNAL_ERROR, CANCEL] {
        let upstream = Upstream::start(move |wire, request| {
            wire.hold(request);
            if wire.held() == 8 {
                let reset = wire.release().unwrap();
                wire.reset(reset.stream, reason);
                while let Some(held) = wire.release() {
                    wire.answer(held.stream, SUCCESS);
                }
            }
        });
        let gateway = start(&sandbox, &upstream, auto());
        let replies = join(calls(&gateway, 8));
        let (unknown, rest): (Vec<_>, Vec<_>) =
            replies.iter().partition(|reply| reply.outcome() == "unknown");
        assert_eq!((unknown.len(), rest.len()), (1, 7), "{replies:?}");
        assert!(rest.iter().all(|reply| reply.outcome() == "succeeded"));
        assert_eq!((unknown[0].status, unknown[0].code()), (502, "upstream_broken"));
        assert_eq!(unknown[0].headers.get("retry-after"), None);
        assert_eq!(recorded(&gateway, unknown[0]), ("unknown".into(), 1));
        assert_eq!((upstream.received().len(), upstream.connections()), (8, 1), "nothing is sent again");
        every_intent_has_its_outcome(&gateway, 8);
    }
}

#[test]
fn streams_above_a_goaway_are_retried_and_those_below_finish() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| match request.connection {
        0 => {
            wire.hold(request);
            if wire.held() == 10 {
                let mut held: Vec<_> = std::iter::from_fn(|| wire.release()).collect();
                held.sort_by_key(|request| request.stream);
                wire.go_away(held[3].stream, 0);
                for below in &held[..4] {
                    wire.answer(below.stream, SUCCESS);
                }
            }
        }
        _ => wire.answer(request.stream, SUCCESS),
    });
    let gateway = start(&sandbox, &upstream, auto());
    let replies = join(calls(&gateway, 10));
    assert_eq!(outcomes(&replies), ["succeeded"; 10]);
    let received = upstream.received();
    let on = |connection| received.iter().filter(|request| request.connection == connection).count();
    assert_eq!((on(0), on(1), received.len(), upstream.connections()), (10, 6, 16, 2));
    assert!(replies.iter().all(|reply| recorded(&gateway, reply).1 == 1));
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!(upstream.received().last().unwrap().connection, 1, "who said goodbye gets no new stream");
    every_intent_has_its_outcome(&gateway, 11);
}

#[test]
fn goaway_connection_takes_no_new_request_and_finishes_its_streams() {
    let sandbox = sandbox();
    for connections in [2, 1] {
        let upstream = Upstream::start(|wire, request| match request.connection {
            0 => {
                wire.go_away(request.stream, 0);
                wire.ping();
                wire.answer_later(request.stream, SUCCESS, Duration::from_secs(1));
            }
            _ => wire.answer(request.stream, SUCCESS),
        });
        let gateway = start(&sandbox, &upstream, auto().set("upstream.max_connections", connections));
        let first = calls(&gateway, 1);
        wait_for("the goodbye", || (upstream.pongs() == 1).then_some(()));
        // Where there may be no other connection, it waits for the end of this one.
        let reply = gateway.call();
        assert_eq!(reply.outcome(), "succeeded", "of {connections}: {reply:?}");
        assert_eq!(recorded(&gateway, &reply), ("succeeded".into(), 1));
        assert_eq!(outcomes(&join(first)), ["succeeded"]);
        let on: Vec<_> = upstream.received().iter().map(|request| request.connection).collect();
        assert_eq!(on, [0, 1], "of {connections}");
        every_intent_has_its_outcome(&gateway, 2);
    }
}

#[test]
fn request_returned_by_a_goaway_waits_for_a_free_connection() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| match (request.connection, request.nth) {
        (0, 0) => wire.hold(request),
        (0, _) => {
            let covered = wire.release().unwrap();
            wire.go_away(covered.stream, 0);
            wire.answer_later(covered.stream, SUCCESS, Duration::from_millis(500));
        }
        _ => wire.answer(request.stream, SUCCESS),
    });
    let gateway = start(&sandbox, &upstream, auto().set("upstream.max_connections", 1));
    let first = calls(&gateway, 1);
    wait_for("the first", || (upstream.received().len() == 1).then_some(()));
    let reply = gateway.call();
    assert_eq!(recorded(&gateway, &reply), ("succeeded".into(), 1), "{reply:?}");
    assert_eq!(outcomes(&join(first)), ["succeeded"]);
    let on: Vec<_> = upstream.received().iter().map(|request| request.connection).collect();
    assert_eq!(on, [0, 0, 1]);
    every_intent_has_its_outcome(&gateway, 2);
}

#[test]
fn ended_connection_frees_its_place_under_the_cap() {
    let sandbox = sandbox();
    let one = || auto().set("upstream.max_connections", 1);
    let upstream = Upstream::start(|wire, request| match (request.nth, request.connection) {
        (0, _) => wire.go_away(0, 0),
        // Said between two requests: the next one is not even written.
        (1, _) => {
            wire.answer(request.stream, SUCCESS);
            wire.go_away(request.stream, 0);
        }
        (_, 2) => wire.answer(request.stream, SUCCESS),
        (_, _) => wire.close(),
    });
    let gateway = start(&sandbox, &upstream, one());
    for _ in 0..3 {
        let reply = gateway.call();
        assert_eq!(recorded(&gateway, &reply), ("succeeded".into(), 1));
    }
    assert_eq!((upstream.received().len(), upstream.connections()), (4, 3));
    every_intent_has_its_outcome(&gateway, 3);

    // Who refuses a stream and stays is asked once more on the same connection, if there can be no other.
    let upstream = Upstream::start(|wire, request| match request.nth {
        0 => wire.reset(request.stream, REFUSED_STREAM),
        _ => wire.answer(request.stream, SUCCESS),
    });
    let gateway = start(&sandbox, &upstream, one());
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!((upstream.received().len(), upstream.connections()), (2, 1));
}

#[test]
fn upstream_that_allows_no_streams_gets_none() {
    let sandbox = sandbox();
    let upstream = Upstream::allowing(0, |_, _| {});
    let gateway = start(&sandbox, &upstream, auto());
    let reply = gateway.call();
    assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"));
    assert_eq!((upstream.received().len(), upstream.connections()), (0, 1));
}

#[test]
fn body_larger_than_a_flow_control_window_is_sent_completely() {
    let sandbox = sandbox();
    let upstream = Upstream::speaking_whole(|_| (200, SUCCESS.into()));
    let gateway = start(&sandbox, &upstream, auto());
    let inspectors: Vec<_> =
        (0..1000).map(|i| format!("{{\"personID\":\"{i:064}\",\"count\":{i}}}")).collect();
    let body = BODY.replace(r#"{"personID":"1600226476732482572","count":2}"#, &inspectors.join(","));
    assert!(body.len() > 65_535);
    assert_eq!(gateway.post(&body).outcome(), "succeeded");
    assert_eq!(upstream.seen()[0].body, body.as_bytes());
}

#[test]
fn covered_streams_are_unknown_if_the_goaway_connection_ends() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| match request.connection {
        0 => {
            wire.go_away(request.stream, 0);
            wire.head(request.stream, 200, Some(SUCCESS.len()));
            wire.data(request.stream, &SUCCESS.as_bytes()[..5], false);
            wire.close();
        }
        _ => wire.answer(request.stream, SUCCESS),
    });
    let gateway = start(&sandbox, &upstream, auto());
    let reply = gateway.call();
    assert_eq!((reply.status, reply.code(), reply.outcome()), (502, "upstream_broken", "unknown"));
    assert_eq!(upstream.received().len(), 1);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control, on a new connection");
    every_intent_has_its_outcome(&gateway, 2);
}

/// Ways to give no answer, or none that counts; what the caller is told.
#[test]
fn broken_http2_exchange_is_unknown_and_not_retried() {
    type Break = fn(&Wire, &Received);
    let breaks: [(&str, Break, u16); 17] = [
        ("closed", |wire, _| wire.close(), 502),
        (
            "GOAWAY that covers it, then closed",
            |wire, request| {
                wire.go_away(request.stream, 0);
                wire.close();
            },
            502,
        ),
        ("no frames", |wire, _| wire.raw(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()), 502),
        ("no answer", |_, _| {}, 504),
        (
            "half a body",
            |wire, request| {
                wire.head(request.stream, 200, None);
                wire.data(request.stream, b"{\"resultCode\"", false);
                wire.reset(request.stream, INTERNAL_ERROR);
            },
            502,
        ),
        (
            "REFUSED_STREAM behind the head",
            |wire, request| {
                wire.head(request.stream, 200, None);
                wire.data(request.stream, b"{", false);
                wire.reset(request.stream, REFUSED_STREAM);
            },
            502,
        ),
        (
            "REFUSED_STREAM right behind the head",
            |wire, request| {
                wire.head(request.stream, 200, Some(SUCCESS.len()));
                wire.reset(request.stream, REFUSED_STREAM);
            },
            502,
        ),
        (
            "GOAWAY behind the head, then closed",
            |wire, request| {
                wire.head(request.stream, 200, Some(SUCCESS.len()));
                wire.go_away(0, 0);
                wire.close();
            },
            502,
        ),
        (
            "NO_ERROR behind the head",
            |wire, request| {
                wire.head(request.stream, 200, None);
                wire.reset(request.stream, NO_ERROR);
            },
            502,
        ),
        (
            "NO_ERROR behind the head of a refused token",
            |wire, request| {
                wire.head(request.stream, 401, None);
                wire.reset(request.stream, NO_ERROR);
            },
            502,
        ),
        (
            "GOAWAY behind the head of a refused token",
            |wire, request| {
                wire.head(request.stream, 401, None);
                wire.go_away(0, NO_ERROR);
            },
            502,
        ),
        (
            "shorter than its length",
            |wire, request| {
                wire.head(request.stream, 200, Some(1000));
                wire.data(request.stream, SUCCESS.as_bytes(), true);
            },
            502,
        ),
        (
            "longer than its length",
            |wire, request| {
                wire.head(request.stream, 200, Some(3));
                wire.data(request.stream, SUCCESS.as_bytes(), true);
            },
            502,
        ),
        ("a huge head", |wire, request| wire.huge_head(request.stream, 2_000_000), 502),
        ("a flood of CONTINUATION", |wire, request| wire.continuation_flood(request.stream), 502),
        ("interim answers without end", |wire, request| wire.interim_flood(request.stream), 504),
        ("an upgrade that nobody asked for", |wire, request| wire.head(request.stream, 101, None), 504),
    ];
    let sandbox = sandbox();
    for (name, break_off, status) in breaks {
        let upstream = Upstream::start(move |wire, request| match request.nth {
            1 => break_off(wire, &request),
            _ => wire.answer(request.stream, SUCCESS),
        });
        let gateway = start(
            &sandbox,
            &upstream,
            auto().set("upstream.timeout", "2s").set("upstream.connect_timeout", "2s"),
        );
        assert_eq!(gateway.call().outcome(), "succeeded", "the control of {name}");
        let reply = gateway.call();
        assert_eq!((reply.status, reply.outcome()), (status, "unknown"), "{name}: {reply:?}");
        assert_eq!(reply.headers.get("retry-after"), None, "{name}");
        assert_eq!(recorded(&gateway, &reply), ("unknown".into(), 1), "{name}");
        assert_eq!(upstream.received().len(), 2, "{name}: nothing is sent again");
        assert_eq!(gateway.call().outcome(), "succeeded", "{name}: the next one");
        every_intent_has_its_outcome(&gateway, 3);
    }
}

#[test]
fn odd_but_complete_http2_reply_is_accepted() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| {
        wire.head(request.stream, 103, None);
        wire.head(request.stream, 200, None);
        wire.data(request.stream, b"", false);
        for byte in SUCCESS.as_bytes() {
            wire.data(request.stream, &[*byte], false);
        }
        wire.trailers(request.stream);
    });
    let gateway = start(&sandbox, &upstream, auto());
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome(), reply.body.as_str()), (200, "succeeded", SUCCESS));
}

#[test]
fn timed_out_stream_is_reset_and_its_connection_stays_in_use() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| match request.nth {
        0 => {}
        _ => wire.answer(request.stream, SUCCESS),
    });
    let gateway = start(
        &sandbox,
        &upstream,
        auto().set("upstream.timeout", "2s").set("upstream.connect_timeout", "2s"),
    );
    let slow = calls(&gateway, 1);
    wait_for("the slow one", || (upstream.received().len() == 1).then_some(()));
    assert_eq!(outcomes(&join(calls(&gateway, 5))), ["succeeded"; 5]);
    let slow = join(slow).remove(0);
    assert_eq!((slow.status, slow.code(), slow.outcome()), (504, "upstream_timeout", "unknown"));
    let stream = upstream.received()[0].stream;
    wait_for("the reset", || upstream.resets().contains(&(0, stream, CANCEL)).then_some(()));
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!((upstream.received().len(), upstream.connections()), (7, 1));
    every_intent_has_its_outcome(&gateway, 7);
}

#[test]
fn dead_connection_costs_only_one_request() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| {
        wire.answer(request.stream, SUCCESS);
        if request.nth == 0 {
            wire.fall_silent();
        }
    });
    // No PING is due within the exchange.
    let setup = auto().set("upstream.timeout", "2s").set("upstream.connect_timeout", "2s");
    let gateway = start(&sandbox, &upstream, setup);
    assert_eq!(gateway.call().outcome(), "succeeded");
    let reply = gateway.call();
    assert_eq!((reply.code(), reply.outcome()), ("upstream_timeout", "unknown"));
    assert_eq!(gateway.call().outcome(), "succeeded", "on a new connection");
    assert_eq!((upstream.received().len(), upstream.connections()), (2, 2));
    every_intent_has_its_outcome(&gateway, 3);
}

#[test]
fn connection_with_an_unanswered_ping_is_abandoned() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| match request.nth {
        0 => wire.fall_silent(),
        _ => wire.answer(request.stream, SUCCESS),
    });
    let gateway = start(&sandbox, &upstream, auto().set("upstream.connect_timeout", "1s"));
    let begin = Instant::now();
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome()), (502, "unknown"), "{reply:?}");
    assert!(begin.elapsed() < Duration::from_secs(10), "well before upstream.timeout: {:?}", begin.elapsed());
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!((upstream.received().len(), upstream.connections()), (2, 2));

    // The control: who answers a PING is waited for.
    let upstream = Upstream::start(|_, _| {});
    let setup = auto().set("upstream.connect_timeout", "1s").set("upstream.timeout", "4s");
    let gateway = start(&sandbox, &upstream, setup);
    assert_eq!(gateway.call().code(), "upstream_timeout");
    assert!(upstream.pings() > 0);
}

#[test]
fn refused_token_is_replaced_on_the_same_connection() {
    let sandbox = sandbox();
    let upstream = Upstream::speaking_whole(|request| match request.nth {
        0 => (401, "{}".into()),
        _ => (200, SUCCESS.into()),
    });
    let gateway = start(&sandbox, &upstream, auto());
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome()), (200, "succeeded"), "{reply:?}");
    assert_eq!(recorded(&gateway, &reply), ("succeeded".into(), 2));
    let seen = upstream.seen();
    assert_eq!((seen.len(), upstream.connections()), (2, 1));
    assert_ne!(seen[0].headers["authorization"], seen[1].headers["authorization"]);
    every_intent_has_its_outcome(&gateway, 1);
}

#[test]
fn long_reply_is_complete_and_stalled_readers_block_no_other() {
    const LONG: usize = 3_000_000;
    let sandbox = sandbox();
    let upstream = Upstream::speaking_whole(|request| match request.body.len() == BODY.len() {
        true => (200, SUCCESS.into()),
        false => (200, format!("{SUCCESS}{}", " ".repeat(LONG - SUCCESS.len())).into()),
    });
    let gateway = start(&sandbox, &upstream, auto());
    let longer = BODY.replace(":2}", ": 2}");
    let lazy: Vec<_> = (0..100)
        .map(|_| {
            let mut stream = narrow(&gateway);
            stream.write_all((head(longer.len(), "") + &longer).as_bytes()).unwrap();
            stream.read_exact(&mut [0; 12]).unwrap(); // its head is here: the rest waits
            stream
        })
        .collect();
    let begin = Instant::now();
    assert_eq!(outcomes(&join(calls(&gateway, 20))), ["succeeded"; 20]);
    assert!(begin.elapsed() < Duration::from_secs(7), "before upstream.timeout ends the others");
    assert_eq!(gateway.post(&longer).body.len(), LONG);
    assert_eq!(upstream.connections(), 1);
    let mut read = Vec::new();
    lazy.into_iter().next().unwrap().read_to_end(&mut read).unwrap();
    assert!(read.len() > LONG, "it waited: {}", read.len());
}

#[test]
fn no_error_reset_of_a_long_reply_aborts_the_caller_connection() {
    const LONG: usize = 200_000;
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| {
        wire.head(request.stream, 200, None);
        wire.blanks_behind(SUCCESS.as_bytes(), request.stream, LONG, move |wire| match request.nth {
            0 => wire.reset(request.stream, NO_ERROR),
            _ => {
                wire.data(request.stream, b"", true);
                wire.reset(request.stream, NO_ERROR);
            }
        });
    });
    // A connection each, so that each has its first window.
    let gateway = start(&sandbox, &upstream, auto().set("upstream.idle_timeout", "10ms"));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.outcome()), (200, "succeeded"), "the first 64 KiB decide");
    assert!(!reply.body.ends_with("0\r\n\r\n"), "the caller must see the break");
    let record = &gateway.records("outcome", 1)[0];
    assert!(record["note"].as_str().unwrap().contains("broke off"), "{record}");
    wait_for("the close", || open_connections(&gateway, 0));
    let reply = gateway.call();
    assert!(reply.body.ends_with("0\r\n\r\n") && reply.body.len() > LONG, "the control");
    assert!(gateway.records("outcome", 2)[1]["note"].is_null());
}

#[test]
fn single_stream_upstream_is_called_on_up_to_max_connections() {
    const CONNECTIONS: usize = 4;
    let sandbox = sandbox();
    let upstream = Upstream::allowing(1, |wire, request| {
        wire.answer_later(request.stream, SUCCESS, Duration::from_millis(20));
    });
    let gateway = start(&sandbox, &upstream, auto().set("upstream.max_connections", CONNECTIONS));
    let replies = join(calls(&gateway, 40));
    assert_eq!(outcomes(&replies), ["succeeded"; 40]);
    assert_eq!((upstream.received().len(), upstream.most_open()), (40, 1));
    assert!((2..=CONNECTIONS).contains(&upstream.connections()), "{}", upstream.connections());
    every_intent_has_its_outcome(&gateway, 40);
}

#[test]
fn bounded_wait_for_a_stream_ends_with_nothing_sent() {
    let sandbox = sandbox();
    let upstream = Upstream::allowing(1, |_, _| {});
    let setup = auto().set("upstream.max_connections", 1).set("upstream.connect_timeout", "1s");
    let gateway = start(&sandbox, &upstream, setup.set("upstream.timeout", "5s"));
    let first = calls(&gateway, 1);
    wait_for("the first", || (upstream.received().len() == 1).then_some(()));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "overloaded", "not_sent"));
    assert_eq!((upstream.received().len(), upstream.connections()), (1, 1));
    assert_eq!(outcomes(&join(first)), ["unknown"]);
}

#[test]
fn restarted_upstream_is_used_again_over_http2_or_http1() {
    let sandbox = sandbox();
    let answer = |wire: &Wire, request: Received| wire.answer(request.stream, SUCCESS);
    let upstream = Upstream::start(answer);
    let gateway = start(&sandbox, &upstream, auto());
    assert_eq!(outcomes(&join(calls(&gateway, 8))), ["succeeded"; 8]);
    for http2 in [true, false, true] {
        upstream.stop();
        wait_for("the end of the connections", || open_connections(&gateway, 0));
        let reply = gateway.call();
        assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"), "while it is away");
        upstream.restart(http2);
        assert_eq!(outcomes(&join(calls(&gateway, 8))), ["succeeded"; 8], "HTTP/2: {http2}");
    }
    let sent = upstream.received().len() + upstream.heads().len();
    assert_eq!(sent, 32, "each once");
}

#[test]
fn idle_closed_http2_connection_is_replaced_transparently() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| {
        wire.answer(request.stream, SUCCESS);
        wire.close();
    });
    let gateway = start(&sandbox, &upstream, auto());
    for count in 1..=30 {
        assert_eq!(gateway.call().outcome(), "succeeded", "number {count}");
        wait_for("the upstream's close", || (upstream.ended() == count).then_some(()));
    }
    assert_eq!((upstream.received().len(), upstream.connections()), (30, 30));
}

#[test]
fn idle_http2_connection_is_closed_after_idle_timeout() {
    let sandbox = sandbox();
    let upstream = Upstream::start(|wire, request| wire.answer(request.stream, SUCCESS));
    let gateway = start(&sandbox, &upstream, auto().set("upstream.idle_timeout", "200ms"));
    assert_eq!(gateway.call().outcome(), "succeeded");
    wait_for("the close", || open_connections(&gateway, 0));
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!((upstream.received().len(), upstream.connections()), (2, 2));
}

#[test]
fn caller_disconnect_does_not_affect_an_http2_exchange() {
    let sandbox = sandbox();
    for leave in crate::exchange::WAYS {
        let upstream = Upstream::start(|wire, request| {
            wire.answer_later(request.stream, SUCCESS, Duration::from_millis(300));
        });
        let gateway = start(&sandbox, &upstream, auto());
        let mut stream = TcpStream::connect(gateway.address).unwrap();
        stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
        wait_for("the request", || (upstream.received().len() == 1).then_some(()));
        crate::exchange::leave_by(leave, stream);
        assert_eq!(gateway.records("outcome", 1)[0]["outcome"], "succeeded", "{leave}");
        assert_eq!(upstream.resets(), [], "{leave}");
        every_intent_has_its_outcome(&gateway, 1);
    }
}

#[test]
fn nothing_is_sent_over_http2_with_an_invalid_server_certificate() {
    let sandbox = sandbox();
    let (mut upstream, other) = (Upstream::start(|_, _| {}), Upstream::start(|_, _| {}));
    upstream.ca.clone_from(&other.ca);
    let gateway = start(&sandbox, &upstream, auto());
    let reply = gateway.call();
    assert_eq!((reply.status, reply.code(), reply.outcome()), (502, "upstream_unreachable", "not_sent"));
    assert_eq!((upstream.received().len(), upstream.connections()), (0, 0));
}

/// A connection on which the kernel keeps little of what nobody reads.
fn narrow(gateway: &Gateway) -> TcpStream {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&gateway.address.into()).unwrap();
    socket.into()
}

/// Whether the gateway holds so many upstream connections.
fn open_connections(gateway: &Gateway, count: usize) -> Option<()> {
    let metrics = gateway.admin("/metrics").body;
    metrics.contains(&format!("ccsqm_gateway_upstream_connections {count}\n")).then_some(())
}

#[test]
fn changed_roots_drain_an_http2_connection() {
    let sandbox = sandbox();
    let held = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let keep = held.clone();
    let upstream = Upstream::start(move |wire, request| match request.nth {
        1 => keep.lock().unwrap().push((wire.clone(), request.stream)),
        _ => wire.answer(request.stream, SUCCESS),
    });
    let gateway = start(&sandbox, &upstream, auto().set("upstream.idle_timeout", "1h"));
    assert_eq!(gateway.call().outcome(), "succeeded");
    let in_flight = calls(&gateway, 1);
    wait_for("the request", || (upstream.received().len() == 2).then_some(()));
    assert_eq!(upstream.offers().len(), 1, "the control: one connection for all");
    let (other, _) = crate::exchange::certificate("localhost", false);
    swap(&gateway.folder, "upstream-ca.pem", &(upstream.ca.clone() + &other));
    assert_eq!(change(&gateway, 1), "accepted");
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!(upstream.offers().len(), 2, "a new connection");
    swap(&gateway.folder, "upstream-ca.pem", &other);
    assert_eq!(change(&gateway, 2), "accepted");
    let reply = gateway.call_once();
    assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"), "{reply:?}");
    let (wire, stream) = held.lock().unwrap().pop().unwrap();
    wire.answer(stream, SUCCESS);
    assert_eq!(outcomes(&join(in_flight)), ["succeeded"], "what is in flight comes to its end");
    every_intent_has_its_outcome(&gateway, 3);
}

#[test]
fn changed_roots_replace_a_refused_token_only_on_a_new_connection() {
    for roots in Roots::ALL {
        let sandbox = sandbox();
        let upstream = Upstream::speaking_whole(|request| match request.nth {
            0 => (401, "{}".into()),
            _ => (200, SUCCESS.into()),
        });
        let gate = Gate::before(&sandbox.token_url());
        let setup = Setup { token_url: Some(gate.url.clone()), ..auto() };
        let gateway = start(&sandbox, &upstream, setup.set("token.timeout", "30s"));
        wait_for("the first token", || (sandbox.token_calls().len() == 1).then_some(()));
        gate.shut();
        let call = calls(&gateway, 1);
        gate.wait_for_somebody();
        roots.happen(&gateway, "upstream-ca.pem");
        gate.open();
        let reply = join(call).remove(0);
        let (requests, connections) = (upstream.seen().len(), upstream.connections());
        let expected = match roots {
            Roots::Stay => ("succeeded", 2, 1),
            Roots::Grow => ("succeeded", 2, 2),
            Roots::Change => ("refused", 1, 1),
        };
        assert_eq!((reply.outcome(), requests, connections), expected, "{roots:?}: {reply:?}");
        assert_eq!(sandbox.token_calls().len(), 2, "{roots:?}: there was a fresh token");
        every_intent_has_its_outcome(&gateway, 1);
    }
}
