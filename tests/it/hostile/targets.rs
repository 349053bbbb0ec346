//! To whom and for what: hosts, request targets, methods, versions, and bytes that are no HTTP at all.

use super::{Case, plain, with_next};
use crate::support::PATH;

const BARE: &[&str] = &["400 bare"];
const ONE: &[&str] = &["200"];

pub(super) fn hosts() -> Vec<Case> {
    let host = "host: localhost\r\n";
    let named = |value: &str, answers: &[&'static str]| {
        Case::swap(&plain(), host, &format!("host: {value}\r\n"), answers)
    };
    let good = [
        "LOCALHOST",
        "localhost:80",
        "localhost:",
        "localhost:0",
        "localhost:99999",
        " \tlocalhost\t ",
        "127.0.0.1",
        "127.0.0.1:8080",
        "[::1]",
        "[::1]:8080",
    ];
    let foreign = [
        "",
        "evil",
        "evil:80",
        "localhost.evil",
        "evil.localhost",
        "localhost.",
        "localhost..",
        ".localhost",
        "localhost:80:80",
        "localhost:-1",
        "localhost:8o",
        "localhost: 80",
        "localhost :80",
        "localhost:+80",
        "localhost@evil",
        "evil@localhost",
        "user:pass@localhost",
        "localhost/",
        "localhost/evil",
        "localhost?evil",
        "localhost#evil",
        "localhost\\",
        "http://localhost",
        "//localhost",
        "[localhost]",
        "[::1",
        "::1]",
        "::1",
        "::1:80",
        "[::1]x",
        "[::1]:x",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        "[::1%25lo]",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.0.0.1.",
        "127.0.0.1:80:80",
        "localhost, evil",
        "localhost,localhost",
        "localhost evil",
        "%6cocalhost",
        "localhost%00",
        "local\u{ad}host",
        "169.254.169.254",
        "localh\u{c3}\u{b6}st",
        "*",
        "\"localhost\"",
    ];
    let mut cases: Vec<_> = good.iter().map(|value| named(value, ONE)).collect();
    cases.extend(foreign.iter().map(|value| named(value, &["421 host_unknown"])));
    for lines in [
        "",
        "host: localhost\r\nhost: localhost\r\n",
        "host: localhost\r\nHost: evil\r\n",
        "host: evil\r\nhost: localhost\r\n",
        "host:\r\nhost: localhost\r\n",
    ] {
        cases.push(Case::swap(&plain(), host, lines, &["400 head_invalid"]));
    }
    cases.push(named("localhost\r\n evil", BARE));
    cases.push(named("localhost\0", BARE));
    cases
}

pub(super) fn targets() -> Vec<Case> {
    let target = |text: &str, answers: &[&'static str]| {
        let to = text.replace("{}", PATH);
        Case::swap(&plain(), &format!("POST {PATH} "), &format!("POST {to} "), answers)
    };
    let mut cases = Vec::new();
    // Absolute-form, authority-form, and queries: refused on purpose.
    for text in [
        "http://localhost{}",
        "https://localhost{}",
        "HTTP://LOCALHOST{}",
        "http://evil{}",
        "http://evil@localhost{}",
        "http://localhost:80{}",
        "ftp://localhost{}",
        "http://localhost",
        "localhost",
        "localhost:80",
        "evil:443",
        "{}?",
        "{}?x=1",
        "{}?x=1#y",
        "{}??",
        "://localhost{}",
        "mailto:a@evil",
    ] {
        cases.push(target(text, &["400 target_invalid"]));
    }
    // Nothing is decoded, normalised or cut.
    for text in [
        "*",
        "/",
        "//",
        "/.",
        "{}/",
        "{}//",
        "/{}",
        "//localhost{}",
        "/.{}",
        "/..{}",
        "/x/..{}",
        "/%2e%2e{}",
        "{}/.",
        "{}/..",
        "{}/../appointQualityTask",
        "{}%20",
        "{}%00",
        "{}%2f",
        "{}%23",
        "{}%3f",
        "{};a=b",
        "{},",
        "{}.json",
        "{}\\",
        "{}~",
        "{}\"",
        "{}|",
        "{}{",
        "{}&x=1",
        "{}:80",
        "{}@evil",
        "{}\u{c3}\u{a9}",
        "/x{}",
        "/http://localhost{}",
        "{}*",
        "{}%",
        "/apigovernance/api/oauth/tokenByAkSk",
        "/_sandbox/requests",
        "/metrics",
        "/livez",
        "/readyz",
        "/status",
    ] {
        cases.push(target(text, &["404 route_unknown"]));
    }
    let spellings = [
        PATH.to_uppercase(),
        PATH.to_lowercase(),
        PATH.replace("CCSQM", "ccsqm"),
        PATH.replace("CCSQM", "%43CSQM"),
        PATH.replacen('/', "%2f", 2).replacen("%2f", "/", 1),
        PATH.replace("/rest/", "//rest/"),
        PATH.replace("/rest/", "/./rest/"),
        PATH.replace("/rest/", "/x/../rest/"),
        PATH.replace("/rest/", "\\rest\\"),
        PATH.replace("/rest/", "/rest;a/"),
        PATH.replace("appoint", "create"),
        PATH.replace("appoint", "\u{c3}\u{a0}ppoint"),
    ];
    cases.extend(spellings.iter().map(|text| target(text, &["404 route_unknown"])));
    cases.push(target(&format!("/{}", "x".repeat(15_000)), &["404 route_unknown"]));
    cases.push(target(&format!("{{}}{}", "/x".repeat(7_000)), &["404 route_unknown"]));
    cases.push(target(&format!("/{}", "x".repeat(64 * 1024)), &["431 bare"]));
    // Nobody sends a fragment; it is cut off before we see it, and what goes out is our own target.
    cases.push(target("{}#x", ONE));
    cases.push(target("{}#?x=1", ONE));
    for text in [
        "", " ", " {}", "{} ", "{} x", "{}\t", "{}\0", "{}\u{e9}", "{}\u{ff}", "x{}", "\\{}", "http:{}",
        "http://", "?x=1", "#x", "[::1]{}", "{}\r", "{}\n",
    ] {
        cases.push(target(text, BARE));
    }
    cases
}

pub(super) fn methods() -> Vec<Case> {
    let method =
        |text: &str, answers: &[&'static str]| Case::swap(&with_next(&plain()), "POST", text, answers);
    let mut cases: Vec<_> = [
        "post",
        "Post",
        "GET",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "TRACE",
        "POSTX",
        "XPOST",
        "P",
        "PRI",
        "PROPFIND",
        "M-SEARCH",
        "X-HTTP-METHOD",
        "POST|",
        "#POST",
        "!",
    ]
    .iter()
    .map(|text| method(text, &["405 method_not_allowed", "200"]))
    .collect();
    cases.push(Case::swap(&plain(), "POST", "HEAD", &["405 method_not_allowed"]));
    cases.push(Case::swap(&plain(), "POST", "CONNECT", &["405 method_not_allowed"]));
    cases.push(Case::swap(
        &plain(),
        &format!("POST {PATH}"),
        "CONNECT localhost:80",
        &["400 target_invalid"],
    ));
    for text in [
        "",
        "POST\t",
        "PO ST",
        "\"POST\"",
        "POST:",
        "(POST)",
        "POST\u{a0}",
        "POST\0",
        "P\u{d0}\u{9e}ST",
        "POST\r\n",
        "GET / POST",
        "POST ",
    ] {
        cases.push(method(text, BARE));
    }
    cases
}

pub(super) fn versions() -> Vec<Case> {
    let version =
        |text: &str, answers: &[&'static str]| Case::swap(&with_next(&plain()), "HTTP/1.1", text, answers);
    let mut cases: Vec<_> = [
        "HTTP/0.9",
        "HTTP/1.2",
        "HTTP/1.9",
        "HTTP/2.0",
        "HTTP/3.0",
        "HTTP/2",
        "HTTP/1",
        "HTTP/1.",
        "HTTP/11",
        "HTTP/1.10",
        "HTTP/1.1x",
        "HTTP/1.1.1",
        "HTTP/01.1",
        "HTTP/1.01",
        "HTTP/1,1",
        "HTTP/+1.1",
        "HTTP/1.-1",
        "HTTP/1.1;",
        "http/1.1",
        "Http/1.1",
        "HTTPS/1.1",
        "HTTP 1.1",
        "HTTP\\1.1",
        "HTTP/ 1.1",
        "HTTP /1.1",
        "TTP/1.1",
        " HTTP/1.1",
        "HTTP/1.1 ",
        "HTTP/1.1\t",
        "ICY",
        "RTSP/1.0",
        "1.1",
        "x HTTP/1.1",
        "HTTP/1.1 HTTP/1.1",
        "HTTP/\u{c2}\u{b9}.1",
    ]
    .iter()
    .map(|text| version(text, BARE))
    .collect();
    cases.push(version("HTTP/1.0", &["400 head_invalid"]));
    cases.push(version("HTTP/1.0\r\nconnection: keep-alive", &["400 head_invalid"]));
    cases.push(Case::swap(&plain(), " HTTP/1.1\r\n", "\r\n", BARE));
    cases
}

/// Other protocols on our port, with a good request behind them.
pub(super) fn prefaces() -> Vec<Case> {
    let before = |text: &str, answers: &[&'static str]| Case::insert(&plain(), "POST", text, answers);
    vec![
        before("\x16\x03\x01\x02\0\x01\0\x01\u{fc}\x03\x03", BARE),
        before("\x16\x03\x03\0\x01\x01", BARE),
        before("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[]),
        before("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", &[]),
        before("PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\n", BARE),
        before("PROXY UNKNOWN\r\n", BARE),
        before("\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", BARE),
        before("\x05\x01\0", BARE),
        before("SSH-2.0-OpenSSH_9.6\r\n", BARE),
        before("PING\r\n", BARE),
        before("*1\r\n$4\r\nPING\r\n", BARE),
        before("EHLO evil\r\n", BARE),
        before("GET /\r\n", BARE),
        before("{}", BARE),
        before("HTTP/1.1 200 OK\r\n\r\n", BARE),
        before("\0", BARE),
        before("\u{ff}\u{fe}", BARE),
        before("POST", &["405 method_not_allowed"]),
    ]
}
