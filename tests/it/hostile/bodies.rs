//! What is in a body, what its head says of it, how long it is, and what comes behind it.

use super::{BODY, Case, MAX_BODY, as_number, chunked, plain, plain_with, task, with_next};
use crate::support::PATH;

const BARE: &[&str] = &["400 bare"];
const BOTH: &[&str] = &["200", "200"];

pub(super) fn media_types() -> Vec<Case> {
    let control = with_next(&plain());
    let line = "content-type: application/json\r\n";
    let refused = &["415 media_type_unsupported", "200"];
    let typed = |text: &str, answers: &[&'static str]| {
        Case::swap(&control, line, &format!("content-type: {text}\r\n"), answers)
    };
    let mut cases: Vec<_> = [
        "APPLICATION/JSON",
        "application/json;charset=utf-8",
        "application/json ; charset=\"UTF-8\"",
        "application/json;",
        "application/json; ;",
    ]
    .iter()
    .map(|text| typed(text, BOTH))
    .collect();
    cases.extend(
        [
            "",
            "json",
            "*/*",
            "application/*",
            "application/json5",
            "application/jsonp",
            "xapplication/json",
            "application/problem+json",
            "application/json+x",
            "application/x-json",
            "text/json",
            "text/plain",
            "text/html",
            "application/xml",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "multipart/mixed; boundary=application/json",
            "application/octet-stream",
            "message/http",
            "application/json, text/html",
            "text/html, application/json",
            "application/json; charset=utf-16",
            "application/json; charset=latin1",
            "application/json; charset=utf-7",
            "application/json; charset=utf-8; charset=utf-16",
            "application/json; charset",
            "application/json; boundary=x",
            "application/json; x=utf-8",
            "application/json charset=utf-8",
            "application /json",
            "application/ json",
            "application\\json",
            "application/json\u{a0}",
            "application/jso\u{c3}\u{b1}",
            "application/json\tx",
        ]
        .map(|text| typed(text, refused)),
    );
    let more = |lines: &str, answers: &[&'static str]| Case::swap(&control, line, lines, answers);
    cases.extend([
        more("", refused),
        more(&format!("{line}{line}"), refused),
        more(&format!("{line}Content-Type: text/plain\r\n"), refused),
        more(&format!("content-type: text/plain\r\n{line}"), refused),
    ]);
    for coding in
        ["gzip", "br", "deflate", "gzip, gzip", "identity, gzip", "utf-8", "chunked", "identity;q=1"]
    {
        cases.push(more(&format!("{line}content-encoding: {coding}\r\n"), refused));
    }
    // No coding has many names.
    for coding in ["identity", "Identity, identity", ""] {
        cases.push(more(&format!("{line}content-encoding: {coding}\r\n"), BOTH));
    }
    cases
}

/// The bytes of a body; the length of each is its own.
pub(super) fn contents() -> Vec<Case> {
    let of = |from: &str, to: &str, answer: &'static str| {
        assert!(BODY.contains(from), "{from}");
        let hostile = with_next(&plain_with(&BODY.replacen(from, to, 1)));
        let case = Case::swap(&with_next(&plain()), from, to, &[answer, "200"]);
        Case { hostile, ..case }
    };
    let (start, end) = ("{\"quality", "}]}");
    let broken = [
        (start, "\u{ef}\u{bb}\u{bf}{\"quality"),
        (start, "\0{\"quality"),
        (start, "[{\"quality"),
        (start, "\u{ff}\u{fe}{\"quality"),
        (start, "{,\"quality"),
        (start, "/**/{\"quality"),
        (start, "{\"\\ud800\":1,\"quality"),
        (start, "{\"\u{ff}\":1,\"quality"),
        (start, "{\"\u{c0}\u{80}\":1,\"quality"),
        (start, "{\"\0\":1,\"quality"),
        (start, "{'a':1,\"quality"),
        (start, "{a:1,\"quality"),
        (start, "{\"setCountsType\":1,\"quality"),
        (start, "{\"setCounts\\u0054ype\":1,\"quality"),
        (end, "}]}\0"),
        (end, "}]}}"),
        (end, "}],}"),
        (end, "},]}"),
        (end, "}]}{}"),
        (end, "}]}\n{}"),
        (end, "}]}\u{a0}"),
        (end, "}]}//"),
        (end, "}]"),
        (end, "}]]"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":00"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":+0"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":0x0"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":NaN"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":.0"),
    ];
    let against = [
        ("\"isTakeEffect\":0", "\"isTakeEffect\":2"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":-0"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":0.0"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":0e0"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":\"0\""),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":null"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":false"),
        ("\"isTakeEffect\":0", "\"isTakeEffect\":[0]"),
        ("\"isTakeEffect\":0", "\"istakeeffect\":0"),
        (start, "{\"__proto__\":{},\"quality"),
        (start, "{\"\":1,\"quality"),
        (end, "}],\"more\":1}"),
        (end, "},{}]}"),
    ];
    let broken = broken.map(|(from, to)| of(from, to, "400 body_not_json"));
    broken.into_iter().chain(against.map(|(from, to)| of(from, to, "422 contract_violation"))).collect()
}

pub(super) fn sizes() -> Vec<Case> {
    let padded = |size: usize| format!("{BODY}{}", " ".repeat(size - BODY.len()));
    let sized = |size: usize| with_next(&plain_with(&padded(size)));
    let chunks = |size: usize, piece: usize| {
        let body = padded(size);
        let pieces: String = body
            .as_bytes()
            .chunks(piece)
            .map(|piece| format!("{:x}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)))
            .collect();
        let start = chunked().split_once("\r\n\r\n").unwrap().0.to_owned();
        with_next(&format!("{start}\r\n\r\n{pieces}0\r\n\r\n"))
    };
    let mut cases = Vec::new();
    for over in [1, 2, 1000, 100_000] {
        // What is read and thrown away leaves the connection clean.
        let large = ["413 body_too_large", "200"];
        for (control, hostile, framing) in [
            (sized(MAX_BODY), sized(MAX_BODY + over), "a length"),
            (chunks(MAX_BODY, 200_000), chunks(MAX_BODY + over, 200_000), "one chunk"),
            (chunks(MAX_BODY, 1000), chunks(MAX_BODY + over, 1000), "chunks"),
        ] {
            let case = Case::swap(&control, "POST", "POST", &large);
            let name = format!("{over} over the limit, by {framing}");
            cases.push(Case { name, hostile, body: padded(MAX_BODY), ..case });
        }
    }
    let case = Case::swap(&sized(MAX_BODY), "POST", "POST", &["413 body_too_large"]);
    let (name, hostile) = ("more than is thrown away".to_owned(), sized(MAX_BODY + 300_000));
    cases.push(Case { name, hostile, body: padded(MAX_BODY), ..case });
    cases
}

/// What is behind a request is the next one, unless nobody can say where it begins.
pub(super) fn pipelines() -> Vec<Case> {
    let three = with_next(&plain()) + &as_number(2, &plain());
    let all = ["200"; 3];
    let last = format!("POST {PATH}");
    // A change to the first, or to the last, of three.
    let first = |from: &str, to: &str, answers: &[&'static str]| Case::swap(&three, from, to, answers);
    let second = |from: &str, to: &str, answers: &[&'static str]| {
        let control = with_next(&plain());
        let (one, next) = control.split_at(plain().len());
        Case {
            hostile: one.to_owned() + &next.replacen(from, to, 1),
            ..Case::swap(&control, from, to, answers)
        }
    };
    let length = format!("content-length: {}", BODY.len());
    let behind =
        |text: &str, answers: &[&'static str]| Case::swap(&plain(), "}]}", &format!("}}]}}{text}"), answers);
    vec![
        first("x-mark", "x-other", &all),
        first("json", "text", &["415 media_type_unsupported", "200", "200"]),
        first(&last, "POST /nowhere", &["404 route_unknown", "200", "200"]),
        first("\"setCountsType\":1", "\"setCountsType\":2", &["422 contract_violation", "200", "200"]),
        first("}]}", "}]]", &["400 body_not_json", "200", "200"]),
        first("host: localhost", "host: evil-host", &["421 host_unknown", "200", "200"]),
        first("x-mark", "x-userid: 9\r\nx-mark", &["403 operator_denied", "200", "200"]),
        // Nobody can say how others read an ambiguous head, so that nothing behind it is believed.
        first("host: localhost\r\n", "", &["400 head_invalid"]),
        first("x-mark", "connection: host\r\nx-mark", &["400 head_invalid"]),
        first("x-mark", "connection: close\r\nx-mark", &["200"]),
        first("x-mark", "expect: x\r\nx-mark", &["417 expectation_failed"]),
        first("HTTP/1.1", "HTTP/1.0\r\nconnection: keep-alive", &["400 head_invalid"]),
        first(&length, "content-length: +1", BARE),
        second("x-mark", "x-other", BOTH),
        second("json", "text", &["200", "415 media_type_unsupported"]),
        second("host: localhost", "host: evil-host", &["200", "421 host_unknown"]),
        second(&length, "content-length: +1", &["200", "400 bare"]),
        second(&length, "content-length: 4096", &["200", "400 body_incomplete"]),
        second(&length, "transfer-encoding: chunked", &["200", "400 body_incomplete"]),
        second("POST", "\0", &["200", "400 bare"]),
        second("HTTP/1.1", "HTTP/1.0", &["200", "400 head_invalid"]),
        second(&task(1, 0), "x", &["200", "400 body_incomplete"]),
        behind("\0", &["200", "400 bare"]),
        behind("}", &["200", "400 bare"]),
        behind("\r\n", &["200"]),
        behind("\r\n\r\n\r\n", &["200"]),
        behind("GET / HTTP/1.1\r\n\r\n", &["200", "400 head_invalid"]),
        behind("GET / HTTP/1.1\r\nhost: localhost\r\n\r\n", &["200", "404 route_unknown"]),
        behind("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &["200"]),
        behind("\x16\x03\x01\x02\0", &["200", "400 bare"]),
        behind("POST", &["200"]),
        behind(&"x".repeat(64 * 1024), &["200", "431 bare"]),
    ]
}
