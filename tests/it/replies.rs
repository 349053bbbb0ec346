//! How the other side writes its replies: where a body ends, and what stands in a head. Each is passed on as what it is, or
//! refused with the true reason.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};
use serde_json::{Value, json};
use socket2::SockRef;
use tempfile::TempDir;

use crate::{
    http2_upstream::{SUCCESS, Upstream},
    support::*,
};

/// A server without TLS that answers each request with the bytes that it is told.
struct Server {
    address: SocketAddr,
    answer: Arc<Mutex<Answer>>,
    heads: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone, Default)]
struct Answer {
    bytes: String,
    /// The end of the connection is that of the body.
    closes: bool,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (answer, heads) = (Arc::<Mutex<Answer>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let server = Self { address, answer: answer.clone(), heads: heads.clone() };
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answer, heads) = (answer.clone(), heads.clone());
                thread::spawn(move || serve(stream, &answer, &heads));
            }
        });
        server
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A gateway before it, which calls it once without a fault.
    fn gateway(&self, sandbox: &Sandbox) -> Gateway {
        let gateway = start_with(sandbox, Setup { base_url: Some(self.url()), ..Setup::default() });
        self.answers(plain("", SUCCESS));
        assert_eq!(gateway.call().outcome(), "succeeded", "the control");
        gateway
    }

    fn answers(&self, bytes: String) {
        *self.answer.lock().unwrap() = Answer { bytes, closes: false };
    }

    fn requests(&self) -> usize {
        self.heads.lock().unwrap().len()
    }
}

fn serve(mut stream: TcpStream, answer: &Mutex<Answer>, heads: &Mutex<Vec<String>>) -> Option<()> {
    loop {
        let head = read_head(&mut stream)?;
        stream.read_exact(&mut vec![0; length_in(&head)]).ok()?;
        heads.lock().unwrap().push(head);
        let Answer { bytes, closes } = answer.lock().unwrap().clone();
        stream.write_all(bytes.as_bytes()).ok()?;
        if closes {
            return stream.shutdown(Shutdown::Write).ok();
        }
    }
}

fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}

fn length_in(head: &str) -> usize {
    head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap()
}

/// A reply of just these lines of a head.
fn reply(lines: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{lines}\r\n{body}")
}

/// A reply that states its length, and these lines.
fn plain(lines: &str, body: &str) -> String {
    reply(&format!("content-length: {}\r\n{lines}", body.len()), body)
}

/// So many more lines.
fn fields(count: usize) -> String {
    (0..count).map(|number| format!("x-more-{number}: a\r\n")).collect()
}

/// A success of so many bytes, none of which is like another one in its place.
fn success(size: usize) -> String {
    let text = (SUCCESS.len()..size).map(|place| char::from(b'a' + (place % 23) as u8));
    SUCCESS.replace("success", &format!("success{}", text.collect::<String>()))
}

fn chunked(body: &str) -> String {
    let (front, back) = body.split_at(body.len() / 2);
    format!("{:x}\r\n{front}\r\n{:x}\r\n{back}\r\n0\r\n\r\n", front.len(), back.len())
}

/// The body that a caller sees.
fn decoded(reply: &Reply) -> Option<String> {
    match (reply.headers.get("content-length"), reply.headers.get("transfer-encoding")) {
        (Some(length), None) => {
            Some(reply.body.clone()).filter(|body| body.len() == length.parse::<usize>().unwrap())
        }
        (None, Some(coding)) if coding == "chunked" => {
            let (mut rest, mut body) = (&*reply.body, String::new());
            loop {
                let (size, more) = rest.split_once("\r\n")?;
                let size = usize::from_str_radix(size, 16).ok()?;
                body.push_str(more.get(..size)?);
                rest = more.get(size..)?.strip_prefix("\r\n")?;
                if size == 0 {
                    return Some(body).filter(|_| rest.is_empty());
                }
            }
        }
        other => panic!("{other:?}"),
    }
}

/// The record of a reply.
fn recorded(gateway: &Gateway, reply: &Reply) -> Value {
    let id = &reply.headers["x-gateway-request-id"];
    wait_for("the outcome", || {
        records(&gateway.audit_directory(), "outcome").into_iter().find(|record| record["id"] == **id)
    })
}

#[test]
fn content_length_passes_only_if_valid_and_framing_the_body() {
    let (sandbox, server) = (sandbox(), Server::start());
    let gateway = server.gateway(&sandbox);
    for size in [100, 70_000, 300_000] {
        let body = success(size);
        assert_eq!(body.len(), size);
        let (stated, chunks) = (format!("content-length: {size}\r\n"), chunked(&body));
        let coding = "transfer-encoding: chunked\r\n";
        // The head's lines, what is behind it, whether the connection ends there; whether the stated length is the body's.
        let cases = [
            (stated.clone(), &body, false, true),
            (format!("content-length: \t{size} \t\r\n"), &body, false, true),
            (coding.into(), &chunks, false, false),
            (String::new(), &body, true, false),
            (format!("content-length: 10\r\n{coding}"), &chunks, false, false),
            (format!("{coding}content-length: 10\r\n"), &chunks, false, false),
            (format!("{coding}content-length: +10\r\n"), &chunks, false, false),
            (format!("{coding}content-length: 400000\r\n"), &chunks, false, false),
            (format!("{coding}{stated}"), &chunks, false, false),
            (format!("{coding}content-length: 10\r\n{stated}"), &chunks, false, false),
            ("transfer-encoding: identity\r\ncontent-length: 10\r\n".into(), &body, true, false),
            (format!("{stated}{stated}"), &body, false, false),
            (format!("content-length: {size}, {size}\r\n"), &body, false, false),
            (format!("content-length: 0{size}\r\n"), &body, false, false),
        ];
        for (lines, sent, closes, is_stated) in cases {
            let (before, answer) = (server.requests(), reply(&lines, sent));
            *server.answer.lock().unwrap() = Answer { bytes: answer, closes };
            let reply = gateway.call();
            let told = format!("{size} bytes, {lines:?}: {:?}", reply.headers);
            assert_eq!((reply.status, reply.outcome()), (200, "succeeded"), "{told}");
            assert_eq!(decoded(&reply).as_ref(), Some(&body), "{told}");
            // Of a reply that was read whole, the gateway knows the length itself.
            let is_known = is_stated || size < 65_536;
            assert_eq!(reply.headers.contains_key("content-length"), is_known, "{told}");
            assert_eq!(server.requests(), before + 1, "{told}");
            let record = recorded(&gateway, &reply);
            assert_eq!((&record["outcome"], &record["note"]), (&json!("succeeded"), &Value::Null), "{told}");
        }
    }
}

/// Replies that say what they may not, and what the operator is told of each. A length is what a body is cut by, so that a
/// wrong one makes the whole connection unsafe (RFC 9112, section 6.3).
fn unreadable() -> Vec<(String, &'static str)> {
    let length = SUCCESS.len();
    let invalid = "invalid content-length";
    let bounds = "64 KiB or 256 fields";
    let of_length = |length: String| (reply(&format!("content-length: {length}\r\n"), SUCCESS), invalid);
    vec![
        of_length(format!("+{length}")),
        of_length(format!("-{length}")),
        of_length(String::new()),
        of_length(format!("{length} {length}")),
        of_length(format!("{length};")),
        of_length(format!("{length}, {}", length + 1)),
        of_length("18446744073709551616".into()),
        (plain("content-length: 10\r\n", SUCCESS), invalid),
        (
            reply("content-length: 18446744073709551615\r\n", SUCCESS),
            "a Content-Length that no body can have",
        ),
        (plain(&fields(255), SUCCESS), bounds), // with the two others, 257
        (plain(&format!("x-large: {}\r\n", "x".repeat(65_536)), SUCCESS), bounds),
        (plain("x-folded: a\r\n b\r\n", SUCCESS), "invalid HTTP header"),
        (plain(" x-more: a\r\n", SUCCESS), "invalid HTTP header"),
        (plain("x more: a\r\n", SUCCESS), "invalid HTTP header"),
        (plain(": a\r\n", SUCCESS), "invalid HTTP header"),
        (plain("x-more\r\n", SUCCESS), "invalid HTTP header"),
        (plain("x-more: a\0\r\n", SUCCESS), "invalid HTTP header"),
        (reply("transfer-encoding: chunked\r\n", "+5\r\n"), "Invalid chunk size"),
        (reply("", SUCCESS).replace("200", "2000"), "status"),
        (reply("", SUCCESS).replace("HTTP/1.1", "HTTP/3.1"), "version"),
        (reply("transfer-encoding: chunked\r\n", "0\r\n\r\n").replace("/1.1", "/1.0"), "transfer-encoding"),
    ]
}

/// Heads that are odd, and can be read. The first ones are beyond what hyper reads by itself.
fn readable(body: &str) -> Vec<String> {
    vec![
        plain(&fields(99), body), // with the two others, 101
        plain(&fields(254), body),
        plain("x-more : a\r\n", body),
        plain("x-more \t : a\r\n", body),
        plain("", body).replace("content-length", "content-length "),
        plain(&format!("x-large: {}\r\n", "x".repeat(65_000)), body),
        plain("x-more:\r\n", body),
        plain("x-more:a\r\n", body),
        plain("x-more: a\u{e9}\r\n", body),
        plain("", body).replace("\r\n", "\n"),
        plain("", body).replace("200 OK", "200"),
        format!("HTTP/1.1 103 Early Hints\r\nlink : a\r\n{}\r\n{}", fields(255), plain(&fields(254), body)),
    ]
}

#[test]
fn reply_with_256_fields_or_blanks_before_colons_is_read() {
    let (sandbox, server) = (sandbox(), Server::start());
    let gateway = server.gateway(&sandbox);
    for answer in readable(SUCCESS) {
        server.answers(answer.clone());
        let reply = gateway.call();
        let told = format!("{answer:.200}: {reply:?}");
        assert_eq!((reply.outcome(), &*reply.body), ("succeeded", SUCCESS), "{told}");
    }
}

#[test]
fn unreadable_reply_is_reported_as_unreadable_not_as_truncated() {
    let (sandbox, server) = (sandbox(), Server::start());
    let gateway = server.gateway(&sandbox);
    let last_error = || gateway.admin("/status").json()["upstream"]["last_error"].take();
    for (answer, reason) in unreadable() {
        let before = server.requests();
        server.answers(answer.clone());
        let reply = gateway.call();
        let told = format!("{answer:.200}: {reply:?} {}", last_error());
        let said = (reply.status, reply.code(), reply.outcome(), &*reply.headers["x-gateway-retry"]);
        assert_eq!(said, (502, "upstream_broken", "unknown", "check-first"), "{told}");
        let problem = reply.json();
        assert_eq!(problem["cause"], "reply_unreadable", "{told}");
        assert!(problem["title"].as_str().unwrap().contains("cannot be read"), "{told}");
        assert!(problem["detail"].as_str().unwrap().contains("its answer cannot be read"), "{told}");
        assert_eq!(server.requests(), before + 1, "nothing is sent again: {told}");
        assert_eq!(recorded(&gateway, &reply)["cause"], "reply_unreadable", "{told}");
        let detail = last_error()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(reason), "{reason:?} is missing: {told}");
        let log = wait_for("a line in the log", || {
            Some(gateway.log()).filter(|log| log.contains("\"cause\":\"reply_unreadable\""))
        });
        assert!(log.contains("the upstream failed"), "{log}");

        server.answers(plain("", SUCCESS));
        assert_eq!(gateway.call().outcome(), "succeeded", "the next one, behind {told}");
    }
}

#[test]
fn token_endpoint_replies_are_parsed_like_upstream_replies() {
    const TOKEN: &str = r#"{"AccessToken":"token-of-the-test","Expires":"600"}"#;
    let (sandbox, server) = (sandbox(), Server::start());
    let token_url = format!("{}/apigovernance/api/oauth/tokenByAkSk", server.url());
    let setup = || Setup { token_url: Some(token_url.clone()), ..Setup::default() };
    for answer in &readable(TOKEN)[..6] {
        server.answers(answer.clone());
        let gateway = start_with(&sandbox, setup());
        wait_for("the token", || (gateway.admin("/readyz").status == 200).then_some(()));
    }
    let of_head =
        unreadable().into_iter().filter(|(_, reason)| reason.contains("256") || reason.contains("HTTP"));
    for (answer, reason) in of_head.take(3) {
        server.answers(answer.clone());
        let gateway = start_with(&sandbox, setup().set("token.wait", "100ms"));
        let reply = gateway.call();
        assert_eq!((reply.code(), &reply.json()["cause"]), ("token_unavailable", &json!("reply_unreadable")));
        let status = gateway.admin("/status").json();
        let detail = status["credentials"][0]["last_error"]["detail"].as_str().unwrap();
        assert!(detail.contains(reason), "{answer:.200}: {detail}");
    }
    assert_eq!(sandbox.requests().len(), 0);
}

/// What a head over HTTP/2 says beside its status, and how long its body is: a success, and blanks.
type Whole = (Vec<(String, String)>, usize);

/// A gateway before an upstream that answers over HTTP/2 with what it is told.
fn over_http2(sandbox: &Sandbox) -> (Gateway, Upstream, Arc<Mutex<Whole>>) {
    let whole = Arc::<Mutex<Whole>>::default();
    let answer = whole.clone();
    let upstream = Upstream::start(move |wire, request| {
        let (stream, (fields, size)) = (request.stream, answer.lock().unwrap().clone());
        wire.head_with(stream, &fields);
        wire.blanks_behind(SUCCESS.as_bytes(), stream, size, move |wire| wire.data(stream, b"", true));
    });
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("ca.pem"), &upstream.ca).unwrap();
    let setup = Setup { base_url: Some(upstream.url()), folder: Some(Arc::new(folder)), ..Setup::default() };
    let setup = setup.set("upstream.ca_file", "ca.pem").set("upstream.http2", "auto");
    (start_with(sandbox, setup), upstream, whole)
}

fn lengths(lengths: &[usize]) -> Vec<(String, String)> {
    lengths.iter().map(|length| ("content-length".into(), length.to_string())).collect()
}

fn field(name: &str, value: &str) -> Vec<(String, String)> {
    vec![(name.to_owned(), value.to_owned())]
}

#[test]
fn unreadable_http2_reply_is_reported_as_unreadable() {
    let sandbox = sandbox();
    let (gateway, upstream, whole) = over_http2(&sandbox);
    let size = SUCCESS.len();
    let call = |fields: &[(String, String)]| {
        let before = upstream.received().len();
        *whole.lock().unwrap() = (fields.to_vec(), size);
        let reply = gateway.call_once();
        assert_eq!(upstream.received().len(), before + 1, "nothing is sent again: {reply:?}");
        reply
    };
    let many = |count: usize| (0..count).map(|it| (format!("x-more-{it}"), "a".into())).collect::<Vec<_>>();
    let large = |count: usize| vec![("x-large".to_owned(), "x".repeat(10_000)); count];
    for fields in [vec![], lengths(&[size]), lengths(&[size, size]), many(500), large(6)] {
        let reply = call(&fields);
        assert_eq!((reply.outcome(), &*reply.body), ("succeeded", SUCCESS), "{reply:?}");
        assert_eq!(reply.headers["content-length"], size.to_string());
    }
    for fields in [
        field("content-length", &format!("+{size}")),
        field("content-length", &format!("{size}, {size}")),
        lengths(&[size, size + 1]),
        lengths(&[size - 1]),
        lengths(&[size + 1]),
        lengths(&[0]),
        field("transfer-encoding", "chunked"),
        field("connection", "close"),
        large(7),
        large(200),
    ] {
        let reply = call(&fields);
        let last = gateway.admin("/status").json()["upstream"]["last_error"].take();
        let told = format!("{:.200}: {reply:?} {last}", format!("{fields:?}"));
        assert_eq!((reply.code(), reply.outcome()), ("upstream_broken", "unknown"), "{told}");
        assert_eq!(reply.json()["cause"], "reply_unreadable", "{told}");
        let detail = last["detail"].as_str().unwrap();
        assert!(detail.contains("breaks RFC 9113") && detail.contains("64 KiB"), "{told}");
        assert_eq!(recorded(&gateway, &reply)["cause"], "reply_unreadable", "{told}");
        assert_eq!(call(&[]).outcome(), "succeeded", "the next one, behind {told}");
    }
}

/// Each on a connection of its own, since the upstream of the tests keeps to the flow control of one long reply.
#[test]
fn long_http2_reply_keeps_only_a_single_valid_content_length() {
    const SIZE: usize = 300_000;
    let sandbox = sandbox();
    for stated in [&[SIZE][..], &[SIZE, SIZE], &[], &[SIZE - 100_000], &[SIZE + 100_000]] {
        let (gateway, upstream, whole) = over_http2(&sandbox);
        *whole.lock().unwrap() = (lengths(stated), SIZE);
        let reply = gateway.call();
        let (told, body) = (format!("{stated:?}: {:?}", reply.headers), decoded(&reply));
        assert_eq!((reply.status, reply.outcome()), (200, "succeeded"), "{told}");
        assert_eq!(reply.headers.contains_key("content-length"), stated.len() == 1, "{told}");
        assert_eq!(upstream.received().len(), 1, "{told}");
        let record = recorded(&gateway, &reply);
        if stated.first().is_none_or(|length| *length == SIZE) {
            let body = body.unwrap();
            assert_eq!((body.trim_end(), body.len()), (SUCCESS, SIZE), "{told}");
            assert_eq!((&record["cause"], &record["note"]), (&Value::Null, &Value::Null), "{told}");
        } else {
            // What decides was read before that was seen, and the caller sees that the rest is none.
            assert_eq!(body, None, "{told}");
            assert_eq!(record["cause"], "reply_unreadable", "{told}");
            assert!(record["note"].as_str().unwrap().contains("broke off"), "{record}");
        }
    }
}

/// An upstream that refuses a request before it has read it, and reads it while another token is fetched.
#[test]
fn early_401_counts_as_refused_while_the_body_is_still_being_sent() {
    let sandbox = sandbox();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
    let address = listener.local_addr().unwrap();
    let setup = Setup { base_url: Some(format!("http://{address}")), ..Setup::default() }
        .set("server.max_body", "16MiB")
        .set("upstream.timeout", "3s")
        .set("upstream.breaker_failures", 1)
        .set("token.timeout", "20s")
        .set("token.wait", "20s");
    let gateway = start_with(&sandbox, setup);
    wait_for("the token", || (gateway.admin("/readyz").status == 200).then_some(()));
    script(&sandbox, Faults::token(Fault::instead(Instead::Hang)));
    let body = format!("{BODY}{}", " ".repeat(15_000_000));
    let (reply, read) = thread::scope(|scope| {
        let call = scope.spawn(|| gateway.post(&body));
        let (mut stream, _) = listener.accept().unwrap();
        let length = length_in(&read_head(&mut stream).unwrap());
        stream.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n").unwrap();
        wait_for("the next fetch", || (sandbox.token_calls().len() == 2).then_some(()));
        SockRef::from(&stream).set_recv_buffer_size(1 << 20).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (mut read, mut piece) = (0, vec![0; 65_536]);
        while !call.is_finished() && read < length {
            match stream.read(&mut piece) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        (call.join().unwrap(), read)
    });
    assert!(read > 6_000_000, "it is no test if hardly anything leaves behind the answer: {read}");
    assert_eq!(
        (reply.status, reply.code(), reply.outcome()),
        (503, "token_unavailable", "refused"),
        "{reply:?}"
    );
    assert_eq!(recorded(&gateway, &reply)["outcome"], "refused");
    assert_eq!(gateway.admin("/status").json()["upstream"]["suspended"], false, "the upstream has answered");
}
