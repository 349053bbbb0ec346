//! Callers that stop in the middle: with their side closed, with it open, and without reading.

use std::{io::Write, net::TcpStream};

use ccsqm_gateway::sandbox::{Fault, Faults};

use super::{BODY, Case, answers, chunked, converse, gateway, plain, prove, table, task, with_next};
use crate::support::{PATH, Setup, sandbox, script, wait_for};

/// Cut in every part of a request.
fn cuts(in_head: &[&'static str], in_body: &[&'static str]) -> Vec<Case> {
    let half = &BODY[..50];
    let size = format!("{:x}", BODY.len());
    let mut cases = vec![Case {
        name: "not a byte".into(),
        hostile: String::new(),
        ..Case::swap(&plain(), "POST", "", &[])
    }];
    for last in [
        "P",
        "POST",
        "POST ",
        "/rest",
        PATH,
        "HTTP/1",
        "HTTP/1.1",
        "HTTP/1.1\r",
        "HTTP/1.1\r\n",
        "ho",
        "host:",
        "local",
        "localhost\r",
        "json\r\n",
        "content-length: ",
        "content-length: 1",
    ] {
        cases.push(Case::cut(&plain(), last, in_head));
    }
    let end = plain().split_once("\r\n\r\n").unwrap().0.len();
    for (more, name) in [
        (0, "behind the last header"),
        (1, "in its line's end"),
        (2, "before the empty line"),
        (3, "in the empty line"),
    ] {
        let hostile = plain()[..end + more].to_owned();
        cases.push(Case { name: name.into(), hostile, ..Case::swap(&plain(), "POST", "", in_head) });
    }
    for last in ["\r\n\r\n", "\r\n\r\n{", half, "}]"] {
        cases.push(Case::cut(&plain(), last, in_body));
    }
    let line = format!("\r\n\r\n{size}");
    for last in [
        "\r\n\r\n",
        &line[..5],
        &line,
        &format!("{line}\r"),
        &format!("{line}\r\n"),
        half,
        "}]}",
        "}]}\r",
        "}]}\r\n",
        "}]}\r\n0",
        "}]}\r\n0\r",
        "}]}\r\n0\r\n",
        "}]}\r\n0\r\n\r",
    ] {
        cases.push(Case::cut(&chunked(), last, in_body));
    }
    cases
}

/// The caller closes its side there.
pub(super) fn halves() -> Vec<Case> {
    cuts(&[], &["400 body_incomplete"])
}

#[test]
fn stalled_sender_is_cut_off_after_its_timeout() {
    let cases =
        cuts(&[], &["408 body_timeout"]).into_iter().map(|case| Case { waits: true, ..case }).collect();
    let (cases, _) = table(vec![("stop", cases)]);
    let sandbox = sandbox();
    let deadlines = ["server.header_timeout", "server.body_timeout", "server.idle_timeout"];
    let setup = deadlines.into_iter().fold(Setup::default(), |setup, key| setup.set(key, "500ms"));
    prove(&sandbox, gateway(&sandbox, setup), &cases, 16);
}

#[test]
fn pipelined_task_is_not_sent_while_a_reply_is_unread() {
    let sandbox = sandbox();
    let gateway = gateway(&sandbox, Setup::default().set("server.idle_timeout", "500ms"));
    let two = with_next(&plain());
    assert_eq!(answers(&converse(&gateway, &two, false)), ["200", "200"], "the control");
    script(&sandbox, Faults::business(Fault::sized(30_000_000)));
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    let others = two.replace(&task(0, 0), &task(0, 1)).replace(&task(1, 0), &task(1, 1));
    stream.write_all(others.as_bytes()).unwrap();
    wait_for("the connection's end", || {
        let closed = "ccsqm_gateway_connections_closed_total{reason=\"idle_timeout\"} 1";
        gateway.admin("/metrics").body.contains(closed).then_some(())
    });
    let outcomes = gateway.records("outcome", 3);
    assert!(outcomes.iter().all(|record| record["outcome"] == "succeeded"), "{outcomes:?}");
    assert_eq!((outcomes.len(), gateway.records("intent", 3).len()), (3, 3));
    let tasks = sandbox.tasks();
    let arrived: Vec<_> = tasks.iter().map(|task| task.task.as_str()).collect();
    assert_eq!(arrived, [task(0, 0), task(1, 0), task(0, 1)]);
}
