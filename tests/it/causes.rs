//! Why a call failed: one word in reply, trail, metric, `/status` and log.

use std::{
    any::Any,
    collections::HashSet,
    fs,
    io::Write,
    net::{SocketAddr, TcpStream, UdpSocket},
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use ccsqm_gateway::{
    model::cause::Cause,
    sandbox::{Fault, Faults, Framing, Instead, Options, Sandbox},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    callers::{CALLER, CONSOLE, Ca, Identity, Subject, caller, start_with_certificates_and},
    egress::{Proxy, guard},
    exchange::certificate,
    http2_upstream::Upstream,
    outcomes::triggers::with_other_route,
    support::*,
};

/// RFC 9113, section 7.
const REFUSED_STREAM: u32 = 7;

/// Who fails.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Upstream,
    Token,
}
use Side::{Token, Upstream as Business};

/// A gateway whose call fails, and what must live as long.
struct Broken {
    gateway: Gateway,
    _kept: Vec<Box<dyn Any>>,
}

/// One way to fail.
struct Row {
    side: Side,
    cause: Cause,
    start: fn() -> Broken,
}

/// A fresh sandbox and what a row makes of its settings.
fn broken(side: Side, change: impl FnOnce(&Sandbox, Setup) -> Setup) -> Broken {
    let sandbox = sandbox();
    let setup = Setup::default().set("token.wait", "2s").set("upstream.connect_timeout", "1s");
    let setup = match side {
        Business => setup.set("upstream.timeout", "2s"),
        Token => setup.set("token.timeout", "1s"),
    };
    let gateway = start_with(&sandbox, change(&sandbox, setup));
    Broken { gateway, _kept: vec![Box::new(sandbox)] }
}

/// Somewhere else, on one side.
fn at(side: Side, url: String) -> Broken {
    broken(side, |_, setup| elsewhere(side, setup, url))
}

fn elsewhere(side: Side, setup: Setup, url: String) -> Setup {
    match side {
        Business => Setup { base_url: Some(url), ..setup },
        Token => Setup { token_url: Some(format!("{url}/apigovernance/api/oauth/tokenByAkSk")), ..setup },
    }
}

/// A fault of the sandbox, on one side.
fn fault(side: Side, fault: Fault) -> Broken {
    broken(side, |sandbox, setup| {
        let faults = match side {
            Business => Faults::business(fault),
            Token => Faults::token(fault),
        };
        script(sandbox, faults);
        setup
    })
}

/// A server with such a certificate.
fn with_certificate(side: Side, name: &str, is_expired: bool, is_trusted: bool) -> Broken {
    let (ca, tls) = certificate(name, is_expired);
    let secure = Sandbox::start(Options { tls: Some(tls), ..Options::default() }).unwrap();
    let ca = if is_trusted { ca } else { certificate(name, false).0 };
    let mut broken = trusting(side, &ca, secure.address());
    broken._kept.push(Box::new(secure));
    broken
}

/// A gateway that speaks TLS to this address.
fn trusting(side: Side, ca: &str, address: SocketAddr) -> Broken {
    broken(side, |_, setup| {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("ca.pem"), ca).unwrap();
        let setup = Setup { folder: Some(Arc::new(folder)), ..setup }.set("upstream.ca_file", "ca.pem");
        elsewhere(side, setup, format!("https://localhost:{}", address.port()))
    })
}

/// A proxy that answers so.
fn behind_proxy(side: Side, answer: &'static str) -> Broken {
    let proxy = Proxy::start(answer);
    broken(side, |_, setup| {
        let setup = elsewhere(side, setup, "https://localhost:1".into());
        setup.set("upstream.proxy", proxy.url())
    })
}

/// A gateway that sees this file in the place of that one.
fn with_file(side: Side, path: &str, text: &str, url: &str) -> Broken {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let mount = format!("mount --bind {} {path} && exec \"$@\"", file.path().display());
    let through = ["unshare", "--mount", "sh", "-c", &mount, "sh"].map(str::to_owned).into();
    let mut broken = broken(side, |_, setup| elsewhere(side, Setup { through, ..setup }, url.to_owned()));
    broken._kept.push(Box::new(file));
    broken
}

/// A gateway whose resolver hears every question and never answers.
fn with_deaf_resolver(side: Side) -> Broken {
    let (resolver, text) = deaf_resolver();
    let mut broken = with_file(side, "/etc/resolv.conf", &text, "https://ccsqm.example");
    broken._kept.push(Box::new(resolver));
    broken
}

/// A resolver that never answers, and a `resolv.conf` that asks nobody else. Root can have its port.
fn deaf_resolver() -> (UdpSocket, String) {
    let ip = [127, fastrand::u8(1..), fastrand::u8(..), fastrand::u8(1..255)];
    let resolver = UdpSocket::bind(SocketAddr::from((ip, 53))).unwrap();
    let address = resolver.local_addr().unwrap().ip();
    (resolver, format!("nameserver {address}\noptions timeout:30 attempts:1\n"))
}

fn refused_streams() -> Broken {
    let upstream = Upstream::start(|wire, request| wire.reset(request.stream, REFUSED_STREAM));
    let ca = upstream.ca.clone();
    let mut broken = broken(Business, |_, setup| {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("ca.pem"), ca).unwrap();
        let setup = Setup { folder: Some(Arc::new(folder)), ..setup };
        let setup = setup.set("upstream.ca_file", "ca.pem").set("upstream.http2", "auto");
        elsewhere(Business, setup, upstream.url())
    });
    broken._kept.push(Box::new(upstream));
    broken
}

/// A server that refuses the gateway's certificate, of which it has none.
fn without_identity(side: Side) -> Broken {
    let (ca, behind) = (Ca::new(), sandbox());
    let address = guard(&ca, behind.address());
    let mut broken = trusting(side, &ca.0.pem(), address);
    broken._kept.push(Box::new(behind));
    broken
}

const NO_DNS: &str = "hosts: files\n";
const OUTSIDE: &str = "192.0.2.1 localhost\n";
const TLS: &str = "https://127.0.0.1";

/// Each cause, and more than one way to the commonest.
const ROWS: &[Row] = &[
    Row {
        side: Business,
        cause: Cause::Dns,
        start: || with_file(Business, "/etc/nsswitch.conf", NO_DNS, "https://ccsqm.invalid"),
    },
    Row {
        side: Token,
        cause: Cause::Dns,
        start: || with_file(Token, "/etc/nsswitch.conf", NO_DNS, "https://ccsqm.invalid"),
    },
    Row { side: Business, cause: Cause::Dns, start: || with_deaf_resolver(Business) },
    Row { side: Token, cause: Cause::Dns, start: || with_deaf_resolver(Token) },
    Row {
        side: Business,
        cause: Cause::NotLoopback,
        start: || with_file(Business, "/etc/hosts", OUTSIDE, "http://localhost:1"),
    },
    Row { side: Business, cause: Cause::Refused, start: || at(Business, format!("http://{}", free())) },
    Row { side: Token, cause: Cause::Refused, start: || at(Token, format!("http://{}", free())) },
    // A connection to a group of machines there cannot be.
    Row { side: Business, cause: Cause::Unreachable, start: || at(Business, "https://224.0.0.1".into()) },
    Row { side: Business, cause: Cause::Timeout, start: || fault(Business, Fault::instead(Instead::Hang)) },
    Row { side: Token, cause: Cause::Timeout, start: || fault(Token, Fault::instead(Instead::Hang)) },
    Row { side: Business, cause: Cause::Reset, start: || fault(Business, Fault::instead(Instead::Reset)) },
    Row { side: Token, cause: Cause::Reset, start: || fault(Token, Fault::instead(Instead::Reset)) },
    Row { side: Business, cause: Cause::Local, start: || at(Business, format!("http://{}", free())) },
    Row {
        side: Business,
        cause: Cause::TlsUntrusted,
        start: || with_certificate(Business, "localhost", false, false),
    },
    Row {
        side: Token,
        cause: Cause::TlsUntrusted,
        start: || with_certificate(Token, "localhost", false, false),
    },
    Row {
        side: Business,
        cause: Cause::TlsExpired,
        start: || with_certificate(Business, "localhost", true, true),
    },
    Row {
        side: Business,
        cause: Cause::TlsName,
        start: || with_certificate(Business, "other.test", false, true),
    },
    Row { side: Business, cause: Cause::TlsIdentity, start: || without_identity(Business) },
    Row { side: Token, cause: Cause::TlsIdentity, start: || without_identity(Token) },
    Row {
        side: Business,
        cause: Cause::TlsProtocol,
        start: || {
            broken(Business, |sandbox, setup| {
                elsewhere(Business, setup, format!("{TLS}:{}", sandbox.address().port()))
            })
        },
    },
    Row {
        side: Business,
        cause: Cause::ProxyRefused,
        start: || behind_proxy(Business, "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"),
    },
    Row {
        side: Business,
        cause: Cause::ProxyCredentials,
        start: || behind_proxy(Business, "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"),
    },
    Row {
        side: Token,
        cause: Cause::ProxyCredentials,
        start: || behind_proxy(Token, "HTTP/1.1 407 No\r\nproxy-authenticate: NTLM\r\n\r\n"),
    },
    Row {
        side: Business,
        cause: Cause::ProxyUnreadable,
        start: || behind_proxy(Business, "220 smtp.example.org\r\n\r\n"),
    },
    Row {
        side: Business,
        cause: Cause::ProxyUnreadable,
        start: || behind_proxy(Business, "HTTP/1.1 200 OK\r\n\r\nand more"),
    },
    Row { side: Business, cause: Cause::ProxyCut, start: || behind_proxy(Business, "") },
    Row { side: Token, cause: Cause::ProxyCut, start: || behind_proxy(Token, "HTTP/1.1 200 OK\r\n") },
    Row { side: Business, cause: Cause::NotProcessed, start: refused_streams },
    Row {
        side: Business,
        cause: Cause::ReplyUnreadable,
        start: || fault(Business, Fault::instead(Instead::Garbage)),
    },
    Row {
        side: Token,
        cause: Cause::ReplyUnreadable,
        start: || fault(Token, Fault::instead(Instead::Garbage)),
    },
    Row {
        side: Business,
        cause: Cause::ReplyCut,
        start: || fault(Business, Fault::framing(Framing::HalfBody)),
    },
    Row {
        side: Business,
        cause: Cause::ReplyCut,
        start: || fault(Business, Fault::framing(Framing::HalfHead)),
    },
    Row { side: Token, cause: Cause::ReplyCut, start: || fault(Token, Fault::framing(Framing::HalfBody)) },
    Row { side: Business, cause: Cause::ReplyStatus, start: || fault(Business, Fault::status(503)) },
    Row { side: Business, cause: Cause::TokenRejected, start: || fault(Business, Fault::status(401)) },
    Row { side: Token, cause: Cause::TokenRefused, start: || fault(Token, Fault::status(401)) },
    Row { side: Token, cause: Cause::TokenStatus, start: || fault(Token, Fault::status(500)) },
    Row { side: Token, cause: Cause::TokenUnreadable, start: || fault(Token, Fault::body("<html>")) },
];

/// A call over a connection that is open already, while the process may open no other.
fn call_without_files(gateway: &Gateway) -> Reply {
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all(head(BODY.len(), "").as_bytes()).unwrap();
    wait_for("the head", || (gateway.admin("/status").json()["requests_in_flight"] == 1).then_some(()));
    let limit = |files: &str| {
        let pid = gateway.pid().to_string();
        let run = Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={files}:")]).status();
        assert!(run.unwrap().success());
    };
    limit("1");
    stream.write_all(BODY.as_bytes()).unwrap();
    let reply = read_reply(&mut stream);
    limit("1024");
    reply
}

fn check(row: &Row) {
    let word = row.cause.as_str();
    let Broken { gateway, .. } = &(row.start)();
    let told = |reply: &Reply| format!("{word}: {reply:?} {}", gateway.log());
    let reply = if row.cause == Cause::Local { call_without_files(gateway) } else { gateway.call() };
    if row.cause == Cause::ReplyStatus {
        assert_eq!(reply.status, 503, "it is passed on: {}", told(&reply));
    } else {
        let problem = serde_json::from_str::<Value>(&reply.body).unwrap_or_default();
        assert_eq!(problem["cause"], word, "{}", told(&reply));
    }
    let id = &reply.headers["x-gateway-request-id"];
    let record = wait_for("its record", || {
        let mut records = records(&gateway.audit_directory(), "");
        records.retain(|record| record["id"] == **id && record["kind"] != "intent");
        records.pop()
    });
    assert_eq!(record["cause"], word, "{record}");

    let metric = match row.side {
        Business => format!("upstream_failures_total{{cause=\"{word}\"}} 1\n"),
        Token => format!("token_fetches_total{{credential=\"default\",result=\"{word}\"}} "),
    };
    let metrics = gateway.admin("/metrics").body;
    assert!(metrics.contains(&metric), "{word}: {metrics}");
    let status = gateway.admin("/status").json();
    let last = match row.side {
        Business => &status["upstream"]["last_error"],
        Token => &status["credentials"][0]["last_error"],
    };
    assert_eq!((&last["cause"], &last["over"]), (&json!(word), &Value::Null), "{status}");
    let line = wait_for("the line", || {
        let log = gateway.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.map(|mut line| line["fields"].take()).find(|line| line["cause"] == word)
    });
    assert_eq!(line["error"], last["detail"], "{line}");
    assert!(line["error"].as_str().unwrap().len() > 5, "{line}");
}

#[test]
fn each_failure_cause_has_the_same_name_in_every_output() {
    let provoked: HashSet<_> = ROWS.iter().map(|row| row.cause).collect();
    let missing: Vec<_> = Cause::ALL.into_iter().filter(|cause| !provoked.contains(cause)).collect();
    assert!(missing.is_empty(), "no row provokes {missing:?}");
    let rows = Mutex::new(ROWS.iter());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(row) = { rows.lock().unwrap().next() } {
                    check(row);
                }
            });
        }
    });
}

/// Many credentials, so that a timer that is sometimes the first to end shows.
#[test]
fn hanging_dns_lookup_always_has_its_own_cause() {
    const CREDENTIALS: usize = 64;
    const FETCHES: u64 = 256;
    let (_resolver, text) = deaf_resolver();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let mount = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", file.path().display());
    let more = |number| {
        format!(
            "[[credentials]]\nname = \"c-{number}\"\napp_key_file = \"app_key\"\napp_secret_file = \"app_secret\"\n"
        )
    };
    let setup = Setup {
        token_url: Some("https://ccsqm.example/token".into()),
        caller: (1..CREDENTIALS).map(more).collect(),
        through: ["unshare", "--mount", "sh", "-c", &mount, "sh"].map(str::to_owned).into(),
        ..Setup::default()
    };
    let gateway = start_with(&sandbox(), setup.set("token.timeout", "50ms"));
    let fetches = |result: &str| -> u64 {
        let metrics = gateway.admin("/metrics").body;
        let lines = metrics.lines().filter(|line| line.contains("token_fetches_total{"));
        let counts = lines.filter(|line| line.contains(result)).filter_map(|line| line.rsplit(' ').next());
        counts.map(|count| count.parse::<u64>().unwrap()).sum()
    };
    let told = wait_for("the fetches", || Some(fetches("result=")).filter(|told| *told >= FETCHES));
    assert_eq!(fetches("result=\"timeout\""), 0, "of {told}");
    assert!(fetches("result=\"dns\"") >= told, "of {told}");
}

/// Each on a gateway of its own, whose last error it then is.
#[test]
fn failed_caller_handshake_reports_its_cause_and_certificate_names() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let raw = |bytes: &'static [u8]| {
        move |gateway: &Gateway| {
            let mut stream = TcpStream::connect(gateway.second.unwrap()).unwrap();
            stream.write_all(bytes).unwrap();
            if bytes.len() > 3 {
                read_reply(&mut stream);
            }
        }
    };
    let with = |trusted: &Ca, identity: Option<Identity>| {
        let trusted = trusted.0.der().clone();
        move |gateway: &Gateway| {
            let call = Ca::call_trusting(&trusted, gateway.second.unwrap(), identity.as_ref());
            assert!(call.is_none());
        }
    };
    type Way<'a> = Box<dyn Fn(&Gateway) + 'a>;
    let ways: Vec<(&str, &str, bool, Way<'_>)> = vec![
        ("no certificate", "tls_untrusted", false, Box::new(with(&ca, None))),
        ("another CA", "tls_untrusted", true, Box::new(with(&ca, Some(Ca::new().issue(CALLER))))),
        (
            "revoked",
            "tls_untrusted",
            true,
            Box::new(with(&ca, Some(ca.issue(Subject { serial: 666, ..CALLER })))),
        ),
        (
            "expired",
            "tls_expired",
            true,
            Box::new(with(&ca, Some(ca.issue(Subject { is_expired: true, ..CALLER })))),
        ),
        ("trusts another CA", "tls_identity", false, Box::new(with(&Ca::new(), Some(ca.issue(CALLER))))),
        (
            "plain HTTP that reads nothing",
            "tls_protocol",
            false,
            Box::new(|gateway: &Gateway| {
                let mut stream = TcpStream::connect(gateway.second.unwrap()).unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
            }),
        ),
        (
            "plain HTTP that stays",
            "tls_protocol",
            false,
            Box::new(|gateway: &Gateway| {
                let mut stream = TcpStream::connect(gateway.second.unwrap()).unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
                assert!(wait_for("the 400", || is_readable(&stream).then_some(true)));
                wait_for("its end", || gateway.log().contains("handshake failed").then_some(()));
            }),
        ),
        ("plain HTTP", "tls_protocol", false, Box::new(raw(b"POST / HTTP/1.1\r\nhost: localhost\r\n\r\n"))),
        ("no TLS at all", "tls_protocol", false, Box::new(raw(b"\x05\x01\x00 and more"))),
        ("says half and waits", "timeout", false, Box::new(raw(b"\x16\x03\x01\x02\x00\x01"))),
        ("says half and leaves", "reset", false, Box::new(raw(b"\x16\x03\x01"))),
    ];
    for (what, cause, is_named, fail) in ways {
        let setup = Setup::default().set("server.header_timeout", "1s");
        let gateway = start_with_certificates_and(&sandbox, &ca, &ca.revoke(&[666], 2124), setup);
        // A probe of the port is no failure that somebody could mend, however it leaves.
        drop(TcpStream::connect(gateway.second.unwrap()).unwrap());
        let resets = socket2::Socket::from(TcpStream::connect(gateway.second.unwrap()).unwrap());
        resets.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(resets);
        wait_for("its end", || {
            gateway.admin("/metrics").body.contains("{reason=\"tls_failed\"} 2\n").then_some(())
        });
        assert!(gateway.admin("/status").json()["caller_tls"]["last_error"].is_null(), "{what}");
        fail(&gateway);
        let line = wait_for("the line", || {
            let log = gateway.log();
            let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.map(|mut line| line["fields"].take()).find(|line| line["cause"].is_string())
        });
        assert_eq!((&line["cause"], line["peer"].is_string()), (&json!(cause), true), "{what}: {line}");
        let text = line["error"].as_str().unwrap();
        assert_eq!(text.contains(CONSOLE), is_named, "{what}: {line}");
        let metrics = gateway.admin("/metrics").body;
        assert!(
            metrics.contains(&format!("caller_tls_failures_total{{cause=\"{cause}\"}} 1\n")),
            "{metrics}"
        );
        let last = gateway.admin("/status").json()["caller_tls"]["last_error"].take();
        assert_eq!((&last["cause"], &last["detail"]), (&json!(cause), &json!(text)), "{what}");
    }
}

#[test]
fn refused_token_without_a_successor_has_the_cause_of_the_fetch() {
    for (fault, cause) in
        [(Fault::status(500).after(1), "token_status"), (Fault::instead(Instead::Reset).after(1), "reset")]
    {
        let sandbox = sandbox();
        script(&sandbox, Faults { token: vec![fault], ..Faults::business(Fault::status(401).times(1)) });
        let gateway = start(&sandbox);
        let reply = gateway.call();
        let said = (reply.status, reply.code(), reply.outcome());
        assert_eq!(said, (503, "token_unavailable", "refused"), "{reply:?}");
        assert_eq!(reply.json()["cause"], cause, "{reply:?}");
        assert!(!reply.body.contains("purchased"), "{reply:?}");
        assert_eq!(gateway.records("outcome", 1)[0]["cause"], cause);
    }
}

#[test]
fn refusal_record_describes_the_error_to_fix() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let gateway = start_with_certificates_and(&sandbox, &ca, &ca.revoke(&[], 2124), Setup::default());
    let refused = |gateway: &Gateway, reply: Reply| {
        let id = reply.headers["x-gateway-request-id"].clone();
        let found = || records(&gateway.audit_directory(), "refusal").into_iter().find(|it| it["id"] == *id);
        wait_for("the refusal", found)
    };
    let at = |target: &str, method: &str| {
        let head = head(2, "").replace(&format!("POST {PATH}"), &format!("{method} {target}"));
        refused(&gateway, gateway.send(&head, "{}"))
    };
    let record = at("/no/such/path", "POST");
    assert_eq!((&record["code"], &record["path"]), (&json!("route_unknown"), &json!("/no/such/path")));
    let record = at(&format!("{PATH}?secret=x"), "POST");
    assert_eq!((&record["code"], &record["path"]), (&json!("target_invalid"), &json!(PATH)), "no query");
    let record = at(PATH, "PUT");
    assert_eq!((&record["code"], &record["path"]), (&json!("method_not_allowed"), &json!(PATH)));
    let record = at(&format!("/{}", "x".repeat(500)), "POST");
    assert_eq!(record["path"].as_str().unwrap().len(), 128, "cut");
    assert_eq!(at("/a\"\u{9b}b", "POST")["path"], "/a\"\u{9b}b");
    let trail = fs::read_to_string(crate::audit::segments(&gateway.audit_directory()).pop().unwrap());
    assert!(trail.unwrap().contains(r#""path":"/a\"\u009bb""#), "escaped");

    let body = r#"{"qualityTaskId":7.5,"setCountsType":9,"isTakeEffect":5,"mine":"a-value","setCounts":[{"personID":"1","count":-2,"own":1},{}]}"#;
    let record = refused(&gateway, gateway.post(body));
    let errors = record["errors"].as_array().unwrap();
    assert_eq!((errors.len(), &record["code"]), (5, &json!("contract_violation")), "{record}");
    assert!(errors.iter().all(|it| it["pointer"].is_string() && it["code"].is_string()), "{record}");
    assert!(errors.contains(&json!({ "pointer": "/setCountsType", "code": "const" })), "{record}");
    assert!(errors.contains(&json!({ "pointer": "", "code": "additionalProperties" })), "{record}");
    assert!(
        !record.to_string().contains("mine")
            && !record.to_string().contains("a-value")
            && !record.to_string().contains("7.5"),
        "{record}"
    );

    let stranger = ca.issue(Subject { names: &["dns.qa.internal", "spiffe://example.org/qa/x"], ..CALLER });
    let reply = ca.call(gateway.second.unwrap(), Some(&stranger)).unwrap();
    let record = refused(&gateway, reply);
    assert_eq!(record["names"], json!(["spiffe://example.org/qa/x", "dns:dns.qa.internal"]), "{record}");
    let reply = ca.call(gateway.second.unwrap(), Some(&ca.issue(CALLER))).unwrap();
    assert_eq!(reply.outcome(), "succeeded", "the control");
    assert!(gateway.records("intent", 1)[0]["names"].is_null());

    let setup = with_other_route(&caller("other", "127.0.0.2/32", ""));
    let gateway = start_with(&sandbox, setup);
    let record = refused(&gateway, gateway.send(&head(2, "").replace(PATH, OTHER_PATH), "{}"));
    assert_eq!((&record["code"], &record["path"]), (&json!("route_denied"), &json!(OTHER_PATH)), "{record}");
}

#[test]
fn readme_lists_every_failure_cause() {
    let readme = include_str!("../../README.md");
    let begin = readme.find("| cause | means |").unwrap();
    let table = readme[begin..].split("\n\n").next().unwrap();
    let listed: Vec<_> = table.lines().skip(2).map(|line| line.split('`').nth(1).unwrap()).collect();
    assert_eq!(listed, Cause::ALL.map(Cause::as_str));
}

/// The token that the upstream quotes was replaced meanwhile, and is good all the same.
#[test]
fn upstream_error_text_that_quotes_a_sent_token_is_withheld() {
    let sandbox = sandbox();
    script(&sandbox, Faults { lifetime_ms: Some(6_000), ..Faults::default() });
    // What the upstream says, once it may.
    let says = Arc::new(Mutex::new(None::<String>));
    let upstream = Upstream::start({
        let says = says.clone();
        move |wire, _| {
            let debug = wait_for("the text", || says.lock().unwrap().clone());
            let mut frame = vec![0, 0, 0, 7, 0, 0, 0, 0, 0]; // GOAWAY
            frame[2] = u8::try_from(8 + debug.len()).unwrap();
            frame.extend([0; 4]); // no stream was processed
            frame.extend(11_u32.to_be_bytes()); // ENHANCE_YOUR_CALM
            frame.extend(debug.as_bytes());
            wire.raw(frame);
        }
    });
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("ca.pem"), &upstream.ca).unwrap();
    let setup = Setup { base_url: Some(upstream.url()), folder: Some(Arc::new(folder)), ..Setup::default() };
    let gateway = start_with(&sandbox, setup.set("upstream.ca_file", "ca.pem").set("upstream.http2", "auto"));
    wait_for("a token", || (gateway.admin("/readyz").status == 200).then_some(()));
    let call = || {
        assert_eq!(gateway.call().outcome(), "not_sent");
        let status = gateway.admin("/status").json();
        status["upstream"]["last_error"]["detail"].as_str().unwrap().to_owned()
    };
    *says.lock().unwrap() = Some("nothing in particular".into());
    let said = call();
    assert!(said.contains("nothing in particular"), "the control: {said}");
    *says.lock().unwrap() = None;
    let generation = || gateway.admin("/status").json()["credentials"][0]["generation"].as_u64();
    let (said, token) = thread::scope(|scope| {
        // One that was just fetched, so that the call has it and not the next one.
        let known = sandbox.token_calls().len();
        let (before, token) = wait_for("a fresh token", || {
            let calls = sandbox.token_calls();
            let is_fresh = calls.len() > known && generation() == Some(calls.len() as u64);
            is_fresh.then(|| (calls.len(), calls.last().unwrap().issued.clone().unwrap()))
        });
        let received = upstream.received().len();
        let calls = scope.spawn(call);
        wait_for("the request", || (upstream.received().len() > received).then_some(()));
        assert_eq!(sandbox.token_calls().len(), before, "it was sent with the token that is to be quoted");
        wait_for("another token", || (generation() > Some(before as u64)).then_some(()));
        *says.lock().unwrap() = Some(token.clone());
        (calls.join().unwrap(), token)
    });
    assert!(said.contains("quotes the credential") && !said.contains(&token), "{said}");
    assert!(!gateway.log().contains(&token), "{}", gateway.log());
}

#[test]
fn ended_failure_reports_when_it_ended() {
    let sandbox = sandbox();
    script(&sandbox, Faults::business(Fault::instead(Instead::Garbage).times(1)));
    let gateway = start(&sandbox);
    let last = || gateway.admin("/status").json()["upstream"]["last_error"].take();
    assert!(last().is_null(), "none yet");
    assert_eq!(gateway.call().json()["cause"], "reply_unreadable");
    assert!(last()["since"].is_string() && last()["over"].is_null());
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!(last()["cause"], "reply_unreadable");
    assert!(last()["over"].is_string());
}
