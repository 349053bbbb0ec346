//! Heads: single bytes, line ends, names that look like others, and what names or promises something.

use super::{BODY, Case, HEAD_CANARY, OPERATOR, chunked, plain, with_next};

const MAX_HEAD: usize = 16 * 1024;
const BARE: &[&str] = &["400 bare"];
const ONE: &[&str] = &["200"];
const BOTH: &[&str] = &["200", "200"];
const INVALID: &[&str] = &["400 head_invalid"];

/// Every kind of byte that does not belong there, in every part of a head.
pub(super) fn bytes() -> Vec<Case> {
    let mut cases = Vec::new();
    let control = plain().replace("x-mark", &format!("x-userid: {OPERATOR}\r\nx-mark"));
    for byte in
        ['\0', '\x01', '\x08', '\t', '\n', '\x0b', '\x0c', '\r', '\x1b', '\x7f', '\u{80}', '\u{a0}', '\u{ff}']
    {
        // In a value a tab is white space, and from 0x80 on bytes are opaque (RFC 9110 §5.5).
        let is_value = matches!(byte, '\t' | '\u{80}'..);
        let or = |answer| if is_value { answer } else { "400 bare" };
        for (place, answer) in [
            ("PO|ST", "400 bare"),
            ("POST |/", "400 bare"),
            ("qualitytask|/", "400 bare"),
            ("HTTP|/1.1", "400 bare"),
            ("HTTP/1.1|", if byte == '\n' { "400 head_invalid" } else { "400 bare" }), // the head ends there
            ("|host", if byte == '\n' { "400 head_invalid" } else { "400 bare" }),
            ("ho|st", "400 bare"),
            ("host|:", "400 bare"),
            ("local|host", or("421 host_unknown")),
            ("application/|json", or("415 media_type_unsupported")),
            ("content-|length", "400 bare"),
            ("x-user|id", "400 bare"),
            ("161191|709", or("403 operator_denied")),
            ("canary-|of-heads", or("200")),
        ] {
            let (from, to) = (place.replace('|', ""), place.replace('|', &byte.to_string()));
            cases.push(Case::swap(&control, &from, &to, &[answer]));
        }
    }
    cases
}

/// Line ends, folded lines, white space where none belongs.
pub(super) fn lines() -> Vec<Case> {
    let control = with_next(&plain());
    let swap = |from: &str, to: &str, answers: &[&'static str]| Case::swap(&control, from, to, answers);
    let mut cases = Vec::new();
    for line in ["HTTP/1.1\r\n", "localhost\r\n", "json\r\n", "heads\r\n"] {
        let start = line.trim_end();
        let ended = |end: &str, answers: &[&'static str]| swap(line, &format!("{start}{end}"), answers);
        cases.extend([
            ended("\n", BOTH), // a recipient may take it for a line's end (RFC 9112 §2.2)
            ended("\r", BARE),
            ended("\r\r\n", BARE),
            ended("\n\r", BARE),
            ended("\0\r\n", BARE),
            ended("\r\n \r\n", BARE),
            ended("\r\n\tfolded\r\n", BARE),
            ended("\n folded\r\n", BARE),
            ended("\r\n: nameless\r\n", BARE),
            ended("\r\nno colon\r\n", BARE),
            ended("\r\n\0\r\n", BARE),
        ]);
    }
    for name in ["host", "content-type", "x-mark", "content-length"] {
        for odd in [" {}", "\t{}", "{} ", "{}\t", "{}\u{a0}", "\"{}\"", "{}\r\n"] {
            let to = odd.replace("{}", name);
            cases.push(swap(&format!("{name}:"), &format!("{to}:"), BARE));
        }
    }
    // An empty line ends the head, whatever is behind it.
    for (name, answers) in [
        ("host", INVALID),
        ("content-type", &["415 media_type_unsupported", "400 bare"]),
        ("x-mark", &["400 body_not_json", "400 bare"]),
    ] {
        cases.push(swap(&format!("{name}:"), &format!("\r\n{name}:"), answers));
    }
    let hidden = |line: &str, answers: &[&'static str]| {
        Case::swap(&plain(), "x-mark: ", &format!("x-mark: a{line}\r\nx-mark: "), answers)
    };
    cases.extend([
        hidden("\nx-userid: 999", &["403 operator_denied"]),
        hidden("\rx-userid: 999", BARE),
        hidden("\n\rx-userid: 999", BARE),
        hidden("\ntransfer-encoding: chunked", &["400 body_incomplete"]),
        hidden("\rtransfer-encoding: chunked", BARE),
        hidden("\ncontent-length: 0", BARE),
        hidden("\nhost: evil", INVALID),
        hidden("\nconnection: x-userid", INVALID),
        swap("\r\n\r\n", "\n\n", BOTH),
        swap("\r\n\r\n", "\r\n\n", BOTH),
        swap("\r\n\r\n", "\n\r\n", BOTH),
        swap("\r\n\r\n", "\r\n\r", BARE),
        swap("\r\n\r\n", "\r\n \r\n", BARE),
    ]);
    for (start, answers) in [
        ("\r\n", BOTH),
        ("\r\n\r\n\r\n", BOTH),
        ("\n", BOTH),
        ("\r", BARE),
        (" ", BARE),
        ("\t", BARE),
        ("\0", BARE),
        ("\r\n ", BARE),
        ("\u{ef}\u{bb}\u{bf}", BARE),
    ] {
        cases.push(Case::insert(&control, "POST", start, answers));
    }
    cases
}

/// A caller's own credentials, in every spelling: dropped, and counted.
pub(super) fn credentials() -> Vec<Case> {
    let mut cases = Vec::new();
    for name in [
        "authorization",
        "proxy-authorization",
        "cookie",
        "x-api-key",
        "x-app-key",
        "x-app-secret",
        "x-auth-token",
        "x-access-token",
    ] {
        let underscored = name.contains('-').then(|| name.replace('-', "_"));
        for spelling in [name.to_owned(), name.to_uppercase()].into_iter().chain(underscored) {
            cases.push(Case::header(&format!("{spelling}: Bearer {HEAD_CANARY}"), ONE));
        }
    }
    cases
}

/// Headers that look like one of ours, or like one that others obey: none arrives, and none is obeyed.
pub(super) fn names() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(
        [
            "x_userid: 999",
            "x-user-id: 999",
            "xuserid: 999",
            "x-userid-: 999",
            "x--userid: 999",
            "x.userid: 999",
            "content_length: 0",
            "content-length-: 0",
            "contentlength: 0",
            "transfer_encoding: chunked",
            "transfer-encoding-: chunked",
            "transferencoding: chunked",
            "content_type: text/plain",
            "host-: evil",
            "http_host: evil",
            "x-host: evil",
            "x-forwarded-host: evil",
            "x-forwarded-for: 10.0.0.1",
            "x-forwarded-proto: https",
            "x-forwarded-user: root",
            "x-real-ip: 10.0.0.1",
            "x-remote-user: root",
            "forwarded: for=10.0.0.1;host=evil",
            "via: 1.1 evil",
            "x-original-url: /evil",
            "x-rewrite-url: /evil",
            "x-http-method: GET",
            "x-http-method-override: DELETE",
            "x-method-override: DELETE",
            "x-gateway-outcome: succeeded",
            "x-gateway-request-id: 0",
            "x-tenantspaceid: 999",
            "accept: text/html",
            "accept-encoding: gzip",
            "user-agent: evil",
            "range: bytes=0-1",
            "if-match: *",
            "max-forwards: 0",
            "alt-svc: h2=\":1\"",
            "te: trailers, gzip",
            "trailer: content-length, authorization",
            "keep-alive: x-userid",
            "proxy-connection: x-userid, authorization",
            "sec-fetch-mode: cors",
            "referer: http://evil/",
        ]
        .map(|line| Case::header(line, ONE)),
    );
    cases.extend(
        [
            "authorization : Bearer x",
            "x-userid\x0b: 999",
            "x-userid\u{ad}: 999",
            "\u{d1}\u{85}-userid: 999",              // a Cyrillic letter
            "transfer-encod\u{c4}\u{b1}ng: chunked", // a dotless i
            "authorization\u{a0}: Bearer x",
            "x-userid(comment): 999",
            "x-userid/: 999",
            "x-userid@: 999",
            "x-userid;: 999",
            "x-userid=999",
        ]
        .map(|line| Case::header(line, BARE)),
    );
    cases.extend(
        [
            "origin: http://evil",
            "Origin: null",
            "sec-fetch-site: cross-site",
            "SEC-FETCH-SITE: none",
            "origin:",
        ]
        .map(|line| Case::header(line, &["403 browser_refused"])),
    );
    cases
}

/// Who acts.
pub(super) fn operators() -> Vec<Case> {
    let named = |value: &str, answers: &[&'static str]| Case::header(&format!("x-userid: {value}"), answers);
    let denied = &["403 operator_denied"];
    let mut cases: Vec<_> = [
        "999".to_owned(),
        String::new(),
        "*".into(),
        "null".into(),
        format!("{OPERATOR}, 999"),
        format!("{OPERATOR},{OPERATOR}"),
        format!("0{OPERATOR}"),
        format!("+{OPERATOR}"),
        format!("{OPERATOR}0"),
        format!("{OPERATOR};a"),
        format!("\"{OPERATOR}\""),
        format!("{OPERATOR}\u{a0}"),
        format!("{OPERATOR} x"),
    ]
    .iter()
    .map(|value| named(value, denied))
    .collect();
    cases.extend([
        named(OPERATOR, ONE),
        named(&format!(" \t{OPERATOR}\t "), ONE),
        Case::header(&format!("X-USERID:{OPERATOR}"), ONE),
        named(&format!("{OPERATOR}\r\nx-userid: {OPERATOR}"), INVALID),
        named(&format!("{OPERATOR}\r\nX-UserId: 999"), INVALID),
        named(&format!("999\r\nx-userid: {OPERATOR}"), INVALID),
        named(&format!("\r\nx-userid: {OPERATOR}"), INVALID),
        named(&format!("{OPERATOR}\r\n "), BARE),
    ]);
    cases
}

/// `Connection` that names what somebody relies on: one who obeys it would change who acts, or what.
pub(super) fn connections() -> Vec<Case> {
    let control = with_next(&plain().replace("x-mark", &format!("x-userid: {OPERATOR}\r\nx-mark")));
    let with = |lines: &str, answers: &[&'static str]| {
        Case::insert(&control, "x-userid", &format!("{lines}\r\n"), answers)
    };
    let mut cases = Vec::new();
    for name in ["authorization", "x-app-key", "x-userid", "host", "content-length", "content-type"] {
        let upper = name.to_uppercase();
        cases.extend(
            [
                format!("connection: {name}"),
                format!("Connection:{upper}"),
                format!("connection: close, {name}"),
                format!("connection: {name},keep-alive"),
                format!("connection: ,\t{name}\t,"),
                format!("connection: keep-alive\r\nconnection: {name}"),
                format!("connection: {name}\r\nconnection: keep-alive"),
            ]
            .map(|line| with(&line, INVALID)),
        );
    }
    cases.push(with("connection: keep-alive, \u{ff}", INVALID));
    cases.push(with("connection: \u{e9}", INVALID));
    // What is no token names nothing, and what nobody relies on may go.
    for line in [
        "connection: x-mark",
        "connection: te, trailers",
        "connection: keep-alive",
        "connection: ",
        "connection: ,,,",
        "connection: \"x-userid\"",
        "connection: x-userid;q=1",
        "connection: x_userid",
        "keep-alive: timeout=5, x-userid",
        "proxy-connection: x-userid",
        "te: x-userid",
    ] {
        cases.push(with(line, BOTH));
    }
    for line in [
        "connection: close",
        "connection: x-mark, close",
        "connection: CLOSE",
        "connection: keep-alive\r\nconnection: close",
    ] {
        cases.push(with(line, ONE));
    }
    cases.push(Case::header("connection: transfer-encoding", ONE));
    cases
}

/// Offers of another protocol: none is taken, and what is behind the request is a request.
pub(super) fn upgrades() -> Vec<Case> {
    let control = with_next(&plain());
    let mut cases: Vec<_> = [
        "upgrade: h2c",
        "connection: upgrade\r\nupgrade: h2c",
        "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__",
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        "connection: upgrade\r\nupgrade: TLS/1.3",
        "connection: upgrade\r\nupgrade: HTTP/2.0, h2c",
        "connection: upgrade",
        "http2-settings: AAMAAABkAAQAAP__",
    ]
    .iter()
    .map(|lines| Case::insert(&control, "x-mark", &format!("{lines}\r\n"), BOTH))
    .collect();
    let upgraded = plain().replace("x-mark", "connection: upgrade\r\nupgrade: h2c\r\nx-mark");
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0";
    cases.push(Case::swap(&upgraded, "}]}", &format!("}}]}}{preface}"), ONE));
    cases.push(Case::insert(&with_next(&upgraded), "x-mark", "connection: x-userid\r\n", INVALID));
    cases
}

/// Promises to wait. Who waits for `100 Continue` is told so only if its head is good.
pub(super) fn expectations() -> Vec<Case> {
    let continued = &["100", "200", "200"];
    let failed = &["417 expectation_failed"];
    let control = with_next(&plain());
    let with = |lines: &str, answers: &[&'static str]| {
        Case::insert(&control, "x-mark", &format!("{lines}\r\n"), answers)
    };
    let expects = plain().replace("x-mark", "expect: 100-continue\r\nx-mark");
    let length = format!("content-length: {}", BODY.len());
    vec![
        with("expect: 100-continue", continued),
        with("EXPECT: 100-CONTINUE", continued),
        with("expect: 100-continue\r\nexpect: 100-continue", continued),
        with("expect: ", failed),
        with("expect: 100", failed),
        with("expect: 200-ok", failed),
        with("expect: 100-continue, 100-continue", failed),
        with("expect: 100-continue;a", failed),
        with("expect: \"100-continue\"", failed),
        with("expect: 100-continue\r\nexpect: 200-ok", failed),
        with("expect: 200-ok\r\nexpect: 100-continue", failed),
        with("expect: 100-continue\x0b", BARE),
        Case::insert(&with_next(&chunked()), "x-mark", "expect: 100-continue\r\n", continued),
        Case::swap(&with_next(&expects), "json", "text", &["415 media_type_unsupported"]),
        Case::swap(&with_next(&expects), "host: localhost", "host: evil", &["421 host_unknown"]),
        Case::swap(&with_next(&expects), "HTTP/1.1", "HTTP/1.0", INVALID),
        Case::swap(&expects, &length, "content-length: 4097", &["413 body_too_large"]),
        Case::swap(&expects, &length, "content-length: 0", &["400 body_not_json", "400 bare"]),
    ]
}

/// Heads at their bounds and over them.
pub(super) fn sizes() -> Vec<Case> {
    let long = |length: usize| format!("x-long: {}", "x".repeat(length));
    let many = |count: usize| vec!["x-many: a"; count].join("\r\n");
    let large = &["431 bare"];
    let fixed = plain().len() - BODY.len() + long(0).len() + 2;
    vec![
        Case::header(&long(MAX_HEAD - fixed), ONE),
        Case::header(&long(MAX_HEAD - fixed + 1), large),
        Case::header(&long(1_000_000), large),
        Case::header(&many(95), ONE), // with the others, 99
        Case::header(&many(97), large),
        Case::header(&many(1000), large),
        Case::header(&format!("{}: a", "x".repeat(8_000)), ONE),
        Case::header(&format!("{}: a", "x".repeat(MAX_HEAD)), large),
        Case::header(&vec![long(1000); 90].join("\r\n"), large),
        Case::swap(&plain(), "POST", &"X".repeat(MAX_HEAD), large),
        Case::insert(&plain(), "POST", &"\r\n".repeat(MAX_HEAD / 2), large),
    ]
}
