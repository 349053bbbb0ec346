//! Tests of the rules and of each fault, as a raw client socket observes them.
//!
//! The client is a plain socket, not an HTTP library, which would hide a wrong framing or open a second connection by itself.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;

/// The longest wait for something that must happen. Long enough for a machine that runs all tests at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// A raw HTTP/1.1 client on one connection.
struct Client {
    stream: TcpStream,
    /// The bytes behind the last answer that was returned.
    rest: Vec<u8>,
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

impl Client {
    fn to(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, rest: Vec::new() }
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    fn read(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 65536];
        let count = self.stream.read(&mut bytes)?;
        self.rest.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    /// Returns all bytes until the other side closes, or the error that it closes with.
    fn read_to_end(&mut self) -> io::Result<Vec<u8>> {
        while self.read()? > 0 {}
        Ok(std::mem::take(&mut self.rest))
    }

    /// Returns the next answer, which has a `Content-Length` or no body.
    fn answer(&mut self) -> Answer {
        let end = loop {
            if let Some(at) = self.rest.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            assert!(self.read().unwrap() > 0, "no answer, only {:?}", String::from_utf8_lossy(&self.rest));
        };
        let head = String::from_utf8(self.rest.drain(..end).collect()).unwrap();
        let mut answer = Answer { status: head[9..12].parse().unwrap(), head, body: Vec::new() };
        let length = answer.header("Content-Length").map_or(0, |length| length.parse().unwrap());
        while self.rest.len() < length {
            assert!(self.read().unwrap() > 0, "half a body");
        }
        answer.body = self.rest.drain(..length).collect();
        answer
    }

    fn call(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        self.send(request(method, path, headers, body));
        self.answer()
    }

    fn appoint(&mut self, token: &str) -> Answer {
        self.call("POST", APPOINT_PATH, &business_headers(token), &body().to_string())
    }
}

fn request(method: &str, path: &str, headers: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: sandbox\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn business_headers(token: &str) -> String {
    format!(
        "Authorization: Bearer {token}\r\nx-app-key: sandbox-app-key\r\nx-UserId: 1611917095665261978\r\n\
         Content-Type: application/json; charset=UTF-8\r\n"
    )
}

/// Returns the body of the example on the vendor's page.
fn body() -> Value {
    json!({
        "qualityTaskId": "954645333549048833",
        "setCountsType": 1,
        "isTakeEffect": 0,
        "setCounts": [{"personID": "1600226476732482572", "count": 2}]
    })
}

fn start() -> Sandbox {
    Sandbox::start(Options::default()).unwrap()
}

fn fetch_with(sandbox: &Sandbox, headers: &str, secret: &str) -> Answer {
    let headers = format!("Content-Type: application/json\r\n{headers}");
    let pair = json!({"app_key": "sandbox-app-key", "app_secret": secret}).to_string();
    let door = sandbox.cloud.token.as_ref().unwrap_or(&sandbox.cloud.api);
    Client::to(door.address).call("POST", TOKEN_PATH, &headers, &pair)
}

fn fetch(sandbox: &Sandbox) -> Answer {
    fetch_with(sandbox, "", "sandbox-app-secret")
}

fn token(sandbox: &Sandbox) -> String {
    fetch(sandbox).json()["AccessToken"].as_str().unwrap().to_owned()
}

fn appoint(sandbox: &Sandbox, token: &str) -> Answer {
    Client::to(sandbox.address()).appoint(token)
}

/// Sends one good business call under this fault and returns the client that waits for what comes.
fn under(fault: Fault) -> (Sandbox, Client) {
    let sandbox = start();
    let token = token(&sandbox);
    sandbox.faults(Faults::business(fault)).unwrap();
    let mut client = Client::to(sandbox.address());
    client.send(request("POST", APPOINT_PATH, &business_headers(&token), &body().to_string()));
    (sandbox, client)
}

fn answer_under(fault: Fault) -> Answer {
    under(fault).1.answer()
}

/// Waits for something that another thread does, by polling: there is no event to wait on.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "never: {what}");
        thread::yield_now();
    }
}

mod rules {
    use super::*;

    #[test]
    fn documented_example_request_is_assigned() {
        let sandbox = start();
        let answer = appoint(&sandbox, &token(&sandbox));
        assert_eq!(answer.status, 200);
        assert_eq!(answer.body, br#"{"resultCode":"0409000","resultDesc":"Operation successful."}"#);
        let inspector = Inspector { person: "1600226476732482572".to_owned(), count: Some(2) };
        let task = Task {
            task: "954645333549048833".to_owned(),
            operator: "1611917095665261978".to_owned(),
            takes_effect: false,
            inspectors: vec![inspector],
        };
        assert_eq!(sandbox.tasks(), [task]);
    }

    #[test]
    fn malformed_request_gets_400_and_a_wrong_value_500_with_a_code() {
        let sandbox = start();
        let token = token(&sandbox);
        let mut client = Client::to(sandbox.address());
        for (member, value, status) in [
            // The largest 64-bit id; -1 has the form of a number, but is not the id of a task.
            ("qualityTaskId", json!(18446744073709551615_u64), 200),
            ("qualityTaskId", json!(-1), 500),
            ("qualityTaskId", json!("12x"), 500),
            ("qualityTaskId", json!("123456789012345678901"), 500),
            ("qualityTaskId", json!(null), 400),
            ("setCountsType", json!(2), 500),
            ("setCountsType", json!("1"), 400),
            ("isTakeEffect", json!(1), 200),
            ("isTakeEffect", json!(2), 500),
            ("isTakeEffect", json!(true), 400),
            ("setCounts", json!([]), 500),
            ("setCounts", json!({"personID": "1"}), 400),
            ("setCounts", json!(["1"]), 400),
            ("setCounts", json!([{"personID": 1}]), 400),
            ("setCounts", json!([{"personID": ""}]), 500),
            // The page does not forbid the same inspector twice. The gateway's contract does.
            ("setCounts", json!([{"personID": "1"}, {"personID": "1"}]), 200),
            // Both sides of eight characters.
            ("setCounts", json!([{"personID": "1", "count": 99_999_999}]), 200),
            ("setCounts", json!([{"personID": "1", "count": 100_000_000}]), 500),
            ("setCounts", json!([{"personID": "1", "count": "2"}]), 400),
            ("setCounts", json!([{"personID": "1", "count": null}]), 400),
        ] {
            let mut body = body();
            body[member] = value;
            let body = body.to_string();
            let answer = client.call("POST", APPOINT_PATH, &business_headers(&token), &body);
            assert_eq!(answer.status, status, "{body}");
            let code = answer.json()["resultCode"].clone();
            let expected = match status {
                200 => json!("0409000"),
                500 => json!("0409001"),
                _ => json!(null),
            };
            assert_eq!(code, expected, "{body}");
        }
        for member in ["qualityTaskId", "setCountsType", "isTakeEffect", "setCounts"] {
            let mut body = body();
            body.as_object_mut().unwrap().remove(member);
            let answer = client.call("POST", APPOINT_PATH, &business_headers(&token), &body.to_string());
            assert_eq!(answer.status, 400, "without {member}");
        }
        for body in ["", "[]", "{", "null"] {
            let answer = client.call("POST", APPOINT_PATH, &business_headers(&token), body);
            assert_eq!(answer.status, 400, "{body}");
        }
    }

    #[test]
    fn headers_are_checked_as_documented() {
        let sandbox = start();
        let token = token(&sandbox);
        let good = business_headers(&token);
        let user = "x-UserId: 1611917095665261978\r\n";
        let key = "x-app-key: sandbox-app-key\r\n";
        let mut client = Client::to(sandbox.address());
        for (headers, status) in [
            // What the page allows comes first, as the control for the refusals behind it.
            (good.clone(), 200),
            (good.replace("x-UserId", "X-UserID"), 200),
            (good.replace(key, ""), 200),
            (good.replace("Content-Type: application/json; charset=UTF-8\r\n", ""), 200),
            (good.replace(key, "x-app-key: other\r\n"), 401),
            (good.replace(key, &key.repeat(2)), 401),
            (good.replace("Bearer ", "bearer"), 401),
            (good.replace(&token, ""), 401),
            (good.replace(&token, "made-up"), 401),
            // Twice, though both are good: a server may take either, so the gateway must not send two.
            (format!("{good}Authorization: Bearer {token}\r\n"), 401),
            (good.replace(user, ""), 400),
            (good.replace(user, &user.repeat(2)), 400),
            (good.replace(user, "x-UserId: \r\n"), 400),
            (good.replace("application/json", "text/plain"), 400),
            (good.replace("UTF-8", "GBK"), 400),
        ] {
            let answer = client.call("POST", APPOINT_PATH, &headers, &body().to_string());
            assert_eq!(answer.status, status, "{headers}");
            assert!(answer.json().is_object());
        }
    }

    #[test]
    fn paths_and_methods_must_match_exactly() {
        let sandbox = start();
        let token = token(&sandbox);
        let prefix = "/apiaccess/CCSQM/rest/ccisqm/v1/";
        let mut client = Client::to(sandbox.address());
        for (method, path, status) in [
            ("POST", format!("{prefix}qualitytask/deleteQualityTask"), 200),
            ("POST", format!("{prefix}regularqualitytask/stopQualityTask"), 200),
            ("POST", format!("{prefix}qualitytask/appointqualitytask"), 404),
            ("POST", format!("{APPOINT_PATH}/"), 404),
            ("POST", "/".to_owned(), 404),
            ("GET", APPOINT_PATH.to_owned(), 405),
            ("GET", TOKEN_PATH.to_owned(), 405),
        ] {
            let answer = client.call(method, &path, &business_headers(&token), "{}");
            assert_eq!(answer.status, status, "{method} {path}");
        }
    }
}

mod tokens {
    use super::*;

    #[test]
    fn token_reply_has_the_seven_documented_strings() {
        let sandbox = start();
        let reply = fetch_with(&sandbox, "X-Token-Expire: 300\r\n", "sandbox-app-secret").json();
        let names: Vec<_> = reply.as_object().unwrap().keys().cloned().collect();
        let expected = ["AccessToken", "ApplyType", "CreateTime", "Expires", "Scope", "AppKey", "UserID"];
        assert_eq!(names, expected);
        assert!(reply.as_object().unwrap().values().all(Value::is_string));
        assert_eq!((&reply["Expires"], &reply["UserID"]), (&json!("300"), &json!("Anonymous")));
        let calls = sandbox.token_calls();
        assert_eq!(calls[0].asked.as_deref(), Some("300"));
        assert_eq!(calls[0].issued.as_deref(), reply["AccessToken"].as_str());
        assert_eq!((calls[0].request.status, calls[0].request.complete), (Some(200), true));
        // Token calls are never among the business calls, which tests of the gateway count.
        assert!(sandbox.requests().is_empty());
    }

    #[test]
    fn token_lifetime_defaults_to_600_s_and_is_at_most_3600_s() {
        let sandbox = start();
        for (headers, expires) in [("", json!("600")), ("X-Token-Expire: 7200\r\n", json!("3600"))] {
            assert_eq!(fetch_with(&sandbox, headers, "sandbox-app-secret").json()["Expires"], expires);
        }
        assert_eq!(fetch_with(&sandbox, "X-Token-Expire: soon\r\n", "sandbox-app-secret").status, 400);
    }

    #[test]
    fn only_the_accepted_key_pair_gets_a_token() {
        let sandbox = start();
        let old = token(&sandbox);
        assert_eq!(fetch_with(&sandbox, "", "wrong").status, 403);
        sandbox.secret("sandbox-app-key", "rotated");
        assert_eq!(fetch(&sandbox).status, 403);
        assert_eq!(fetch_with(&sandbox, "", "rotated").status, 200);
        assert_eq!(appoint(&sandbox, &old).status, 200, "tokens outlive a rotation");
        let statuses: Vec<_> =
            sandbox.token_calls().iter().map(|call| call.request.status.unwrap()).collect();
        assert_eq!(statuses, [200, 403, 403, 200]);
    }

    #[test]
    fn sandbox_token_expires_with_its_lifetime() {
        let sandbox = start();
        sandbox.faults(Faults { lifetime_ms: Some(1500), ..Faults::default() }).unwrap();
        let fetched = Instant::now();
        let answer = fetch(&sandbox).json();
        // The reply has whole seconds, rounded down: a client that trusts it stops using the token too early, never too late.
        assert_eq!(answer["Expires"], "1");
        let token = answer["AccessToken"].as_str().unwrap();
        assert_eq!(appoint(&sandbox, token).status, 200);
        eventually("the token ends", || appoint(&sandbox, token).status == 401);
        assert!(fetched.elapsed() >= Duration::from_millis(1500));
    }

    #[test]
    fn each_token_habit_treats_the_older_token_as_defined() {
        for (habit, same, old_status) in [
            (Habit::Independent, false, 200),
            (Habit::SameUntilExpiry, true, 200),
            (Habit::LastWins, false, 401),
        ] {
            let sandbox = start();
            sandbox.faults(Faults { habit, ..Faults::default() }).unwrap();
            let (old, new) = (token(&sandbox), token(&sandbox));
            assert_eq!(old == new, same, "{habit:?}");
            assert_eq!(appoint(&sandbox, &old).status, old_status, "{habit:?}");
            assert_eq!(appoint(&sandbox, &new).status, 200, "{habit:?}");
        }
    }

    #[test]
    fn reissued_token_ends_at_its_first_expiry_and_another_follows() {
        let sandbox = start();
        let habit = Habit::SameUntilExpiry;
        sandbox.faults(Faults { habit, lifetime_ms: Some(500), ..Faults::default() }).unwrap();
        let old = token(&sandbox);
        eventually("another token follows", || token(&sandbox) != old);
        assert_eq!(appoint(&sandbox, &old).status, 401);
    }

    #[test]
    fn revoked_tokens_are_rejected() {
        let sandbox = start();
        let token = token(&sandbox);
        sandbox.revoke();
        assert_eq!(appoint(&sandbox, &token).status, 401);
    }

    #[test]
    fn token_reply_members_can_be_changed_one_by_one() {
        let sandbox = start();
        sandbox
            .faults(
                serde_json::from_value(json!({"token": [
                    {"times": 1, "with": {"Expires": 600}},
                    {"times": 1, "with": {"Expires": null, "AccessToken": ""}},
                    {"times": 1, "without": ["Expires", "AccessToken"]},
                    {"times": 1, "prefixed": true, "skew_s": -86400},
                    {"times": 1, "status": 503, "body": "busy", "content_type": "text/plain"},
                ]}))
                .unwrap(),
            )
            .unwrap();
        assert_eq!(fetch(&sandbox).json()["Expires"], 600);
        let reply = fetch(&sandbox).json();
        assert_eq!((&reply["Expires"], &reply["AccessToken"]), (&json!(null), &json!("")));
        let reply = fetch(&sandbox).json();
        assert!(reply.get("Expires").is_none() && reply.get("AccessToken").is_none());
        let reply = fetch(&sandbox).json();
        let token = reply["AccessToken"].as_str().unwrap().strip_prefix("Bearer ").unwrap();
        let created: u64 = reply["CreateTime"].as_str().unwrap().parse().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        // A day, and the time that the calls above took.
        assert!((86_400..86_500).contains(&(now - created)));
        assert_eq!(appoint(&sandbox, token).status, 200);
        let answer = fetch(&sandbox);
        assert_eq!((answer.status, answer.header("Content-Type")), (503, Some("text/plain")));
    }

    #[test]
    fn token_listener_can_go_down_alone_and_returns_on_its_port() {
        let sandbox = Sandbox::start(Options { token_listener: true, ..Options::default() }).unwrap();
        let token = token(&sandbox);
        let door = sandbox.cloud.token.as_ref().unwrap().address;
        assert_eq!(sandbox.token_url(), format!("http://{door}{TOKEN_PATH}"));
        // A call first, so that the connection has been accepted and does not just wait in the backlog.
        let mut open = Client::to(door);
        assert_eq!(open.call("GET", "/_sandbox/", "", "").status, 200);
        sandbox.faults(Faults { token_down: true, ..Faults::default() }).unwrap();
        assert_eq!(TcpStream::connect(door).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert!(open.read_to_end().is_ok_and(|bytes| bytes.is_empty()), "open connections end");
        assert_eq!(appoint(&sandbox, &token).status, 200);
        // The other listener must not serve the token path in its place.
        let elsewhere = Client::to(sandbox.address()).call("POST", TOKEN_PATH, "", "{}");
        assert_eq!(elsewhere.status, 404);
        sandbox.reset();
        assert_eq!(fetch(&sandbox).status, 200);
    }

    #[test]
    fn token_endpoint_supports_the_same_faults() {
        let sandbox = start();
        sandbox.faults(Faults::token(Fault::instead(Instead::Reset))).unwrap();
        let mut client = Client::to(sandbox.address());
        client.send(request("POST", TOKEN_PATH, "Content-Type: application/json\r\n", "{}"));
        assert_eq!(client.read_to_end().unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(sandbox.token_calls()[0].request.status, None);
    }
}

mod faults {
    use super::*;

    #[test]
    fn status_fault_replaces_the_reply_and_assigns_nothing() {
        for status in [302, 401, 429, 500, 502] {
            let (sandbox, mut client) = under(Fault::status(status));
            assert_eq!(client.answer().status, status);
            assert_eq!(sandbox.requests()[0].status, Some(status));
            assert!(sandbox.tasks().is_empty());
        }
    }

    #[test]
    fn body_content_type_and_headers_are_sent_as_given() {
        let html = "<html>busy</html>";
        let headers =
            [("Retry-After", "5"), ("Set-Cookie", "a=b"), ("Server", "x"), ("Content-Encoding", "gzip")];
        let answer = answer_under(Fault {
            status: Some(500),
            body: Some(html.to_owned()),
            content_type: Some("text/html".to_owned()),
            headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            ..Fault::default()
        });
        assert_eq!((answer.status, answer.body.as_slice()), (500, html.as_bytes()));
        assert_eq!(answer.header("Content-Type"), Some("text/html"));
        for (name, value) in headers {
            assert_eq!(answer.header(name), Some(value));
        }
    }

    #[test]
    fn status_204_has_no_body_and_keeps_the_connection() {
        let (sandbox, mut client) = under(Fault::status(204).times(1));
        let answer = client.answer();
        assert_eq!((answer.status, answer.header("Content-Length")), (204, None));
        // A second call on the same connection: bytes of a body would be taken for the beginning of its answer.
        assert_eq!(client.appoint(&token(&sandbox)).status, 200);
    }

    #[test]
    fn fault_applies_as_often_as_its_times_member_says() {
        let sandbox = start();
        let token = token(&sandbox);
        let mut client = Client::to(sandbox.address());
        let mut statuses = |fault| {
            sandbox.faults(Faults::business(fault)).unwrap();
            [0; 3].map(|_| client.appoint(&token).status)
        };
        assert_eq!(statuses(Fault::status(401).times(1)), [401, 200, 200]);
        assert_eq!(statuses(Fault::status(401)), [401, 401, 401]);
        assert_eq!(statuses(Fault { after: 1, ..Fault::status(401).times(1) }), [200, 401, 200]);
    }

    #[test]
    fn result_codes_can_take_every_known_form() {
        for (code, body, assigned) in [
            (
                Code::Failure("0409001".to_owned()),
                r#"{"resultCode":"0409001","resultDesc":"Operation failed."}"#,
                false,
            ),
            (Code::Unquoted, r#"{"resultCode": 0409000,"resultDesc":"Operation successful."}"#, true),
            (Code::Numeric, r#"{"resultCode":409000,"resultDesc":"Operation successful."}"#, true),
            (Code::Absent, r#"{"resultDesc":"Operation successful."}"#, true),
            (
                Code::Two("0409000".to_owned(), "0409001".to_owned()),
                r#"{"resultCode":"0409000","resultCode":"0409001","resultDesc":"Operation successful."}"#,
                false,
            ),
        ] {
            let (sandbox, mut client) = under(Fault::code(code));
            let answer = client.answer();
            assert_eq!((answer.status, std::str::from_utf8(&answer.body).unwrap()), (200, body));
            assert_eq!(!sandbox.tasks().is_empty(), assigned, "{body}");
        }
    }

    #[test]
    fn delay_fault_starts_after_the_task_is_assigned() {
        let begun = Instant::now();
        let (sandbox, mut client) = under(Fault::delayed(300));
        eventually("the task is assigned", || sandbox.tasks().len() == 1);
        // Assigned, but not answered yet: a client that gives up now must not call again.
        assert_eq!(sandbox.requests()[0].status, None);
        assert_eq!(client.answer().status, 200);
        assert!(begun.elapsed() >= Duration::from_millis(300));
    }

    #[test]
    fn hang_fault_sends_nothing_and_keeps_the_connection_open() {
        let (sandbox, mut client) = under(Fault::instead(Instead::Hang));
        eventually("the request is read", || sandbox.requests().first().is_some_and(|r| r.complete));
        client.stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        // Unix reports a read timeout as `WouldBlock`, other systems as `TimedOut`.
        assert!(matches!(client.read().unwrap_err().kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
        assert_eq!(sandbox.requests()[0].status, None);
        assert_eq!(sandbox.tasks().len(), 1, "the harmful case: done, but nobody hears of it");
        drop(client);
        eventually("the connection ends with the client", || sandbox.connections().open == 0);
    }

    #[test]
    fn reset_and_close_faults_end_the_connection_as_named() {
        let (sandbox, mut client) = under(Fault::instead(Instead::Reset));
        assert_eq!(client.read_to_end().unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(sandbox.requests()[0].complete);
        let (sandbox, mut client) = under(Fault::instead(Instead::Close));
        assert!(client.read_to_end().unwrap().is_empty());
        assert!(sandbox.requests()[0].complete);
    }

    #[test]
    fn garbage_fault_sends_bytes_that_are_not_http() {
        let bytes = under(Fault::instead(Instead::Garbage)).1.read_to_end().unwrap();
        assert!(!bytes.is_empty() && !bytes.starts_with(b"HTTP/"));
    }

    #[test]
    fn reply_head_or_body_can_be_cut() {
        let whole = r#"{"resultCode":"0409000","resultDesc":"Operation successful."}"#;
        let body_of = |framing| {
            let bytes = under(Fault::framing(framing)).1.read_to_end().unwrap();
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains(&format!("Content-Length: {}\r\n", whole.len())));
            text.split_once("\r\n\r\n").unwrap().1.to_owned()
        };
        assert_eq!(body_of(Framing::HalfBody), whole[..whole.len() / 2]);
        assert_eq!(body_of(Framing::Cut(5)), whole[..5]);
        let half = under(Fault::framing(Framing::HalfHead)).1.read_to_end().unwrap();
        assert!(half.starts_with(b"HTTP/1.1 200 OK\r\n") && !half.windows(4).any(|four| four == b"\r\n\r\n"));
    }

    #[test]
    fn reply_body_can_be_chunked_slow_or_large() {
        let (_sandbox, mut client) =
            under(Fault { then: Some(Then::Close), ..Fault::framing(Framing::Chunked) });
        let text = String::from_utf8(client.read_to_end().unwrap()).unwrap();
        assert!(text.contains("Transfer-Encoding: chunked\r\n") && !text.contains("Content-Length"));
        assert!(text.ends_with("\r\n0\r\n\r\n"));
        let begun = Instant::now();
        let answer = answer_under(Fault::framing(Framing::SlowBody(2)));
        // The body has 60 bytes, each behind a pause of 2 ms.
        assert!(answer.json()["resultCode"] == "0409000" && begun.elapsed() >= Duration::from_millis(120));
        let answer = answer_under(Fault { size: Some(100_000), ..Fault::default() });
        assert_eq!((answer.body.len(), answer.json()["resultCode"].as_str()), (100_000, Some("0409000")));
        // Beyond 64 KiB, the part of a reply that the gateway holds back before it passes anything on.
        let cut = Fault { size: Some(100_000), ..Fault::framing(Framing::Cut(70_000)) };
        let bytes = under(cut).1.read_to_end().unwrap();
        assert!((70_000..71_000).contains(&bytes.len()));
    }

    #[test]
    fn interim_response_precedes_the_final_one() {
        let (_sandbox, mut client) = under(Fault { interim: Some(103), ..Fault::default() });
        assert_eq!((client.answer().status, client.answer().status), (103, 200));
    }

    #[test]
    fn close_is_announced_and_an_idle_close_is_not() {
        let (_sandbox, mut client) = under(Fault::then(Then::Close));
        assert_eq!(client.answer().header("Connection"), Some("close"));
        assert!(client.read_to_end().unwrap().is_empty());
        for idle in [0, 20] {
            let (_sandbox, mut client) = under(Fault::then(Then::CloseIdle(idle)));
            assert_eq!(client.answer().header("Connection"), None);
            assert!(client.read_to_end().unwrap().is_empty());
        }
        let (sandbox, mut client) = under(Fault::then(Then::CloseIdle(10_000)).times(1));
        client.answer();
        assert_eq!(client.appoint(&token(&sandbox)).status, 200, "served before it was idle for so long");
    }

    #[test]
    fn extra_bytes_follow_the_reply() {
        let extra = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        let (_sandbox, mut client) = under(Fault::then(Then::Extra(extra.to_owned())));
        assert_eq!(client.answer().json()["resultCode"], "0409000");
        assert_eq!(client.answer().body, b"{}");
    }

    #[test]
    fn connections_can_fail_before_a_byte_is_read() {
        let sandbox = start();
        let fault = |instead| ConnectionFault { times: Some(1), after: 0, delay_ms: 0, instead };
        let connections = vec![fault(Instead::Reset), fault(Instead::Close)];
        sandbox.faults(Faults { connections, ..Faults::default() }).unwrap();
        assert_eq!(
            Client::to(sandbox.address()).read_to_end().unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
        assert!(Client::to(sandbox.address()).read_to_end().unwrap().is_empty());
        assert_eq!(fetch(&sandbox).status, 200);
    }

    #[test]
    fn listener_goes_down_and_returns_on_the_same_port() {
        let sandbox = start();
        let token = token(&sandbox);
        // More than once: tokio remembers the shutdown of a socket, so that each time needs a new handle.
        for _ in 0..3 {
            sandbox.faults(Faults { down: true, ..Faults::default() }).unwrap();
            let refused = TcpStream::connect(sandbox.address()).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            sandbox.faults(Faults::default()).unwrap();
            assert_eq!(appoint(&sandbox, &token).status, 200);
        }
        assert!(sandbox.faults(Faults { token_down: true, ..Faults::default() }).is_err());
    }
}

mod records {
    use super::*;

    #[test]
    fn requests_are_recorded_byte_for_byte() {
        let sandbox = start();
        let token = token(&sandbox);
        let bytes = request("POST", APPOINT_PATH, &business_headers(&token), &body().to_string());
        let mut client = Client::to(sandbox.address());
        // Seven bytes end in the middle of names, values and line breaks.
        for piece in bytes.as_bytes().chunks(7) {
            client.send(piece);
        }
        assert_eq!(client.answer().status, 200);
        let received = &sandbox.requests()[0];
        assert_eq!([received.head.as_slice(), received.body.as_slice()].concat(), bytes.as_bytes());
        assert!(received.complete && received.head.ends_with(b"\r\n\r\n"));
    }

    #[test]
    fn pipelined_requests_are_recorded_separately() {
        let sandbox = start();
        let mut client = Client::to(sandbox.address());
        client.send(request("POST", "/a", "", "1").repeat(2));
        assert_eq!((client.answer().status, client.answer().status), (404, 404));
        assert_eq!(sandbox.requests().len(), 2);
    }

    #[test]
    fn unfinished_requests_are_recorded_as_far_as_received() {
        let sandbox = start();
        let mut client = Client::to(sandbox.address());
        client.send("POST /x HT");
        eventually("half a head is seen", || sandbox.requests().iter().any(|r| r.head == b"POST /x HT"));
        client.send("TP/1.1\r\nContent-Length: 5\r\n\r\nabc");
        eventually("half a body is seen", || sandbox.requests().iter().any(|r| r.body == b"abc"));
        drop(client);
        eventually("the connection ends", || sandbox.connections().open == 0);
        let received = &sandbox.requests()[0];
        assert_eq!((received.complete, received.status), (false, None));
    }

    #[test]
    fn unfinished_token_call_is_not_recorded_as_a_request() {
        // A listener for both has to guess by the beginning of the head; a token listener knows.
        for token_listener in [false, true] {
            let sandbox = Sandbox::start(Options { token_listener, ..Options::default() }).unwrap();
            let door = sandbox.cloud.token.as_ref().map_or(sandbox.address(), |door| door.address);
            let mut client = Client::to(door);
            let head = format!("POST {TOKEN_PATH} HT");
            for (begin, end) in [(0, 1), (1, 7), (7, head.len())] {
                client.send(&head[begin..end]);
                let is_seen = || sandbox.token_calls().iter().any(|call| call.request.head.len() == end);
                eventually("a part of the head is seen", is_seen);
                assert!(sandbox.requests().is_empty(), "{}", &head[..end]);
            }
            client.send("TP/1.1\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}");
            client.answer();
            assert_eq!((sandbox.token_calls().len(), sandbox.requests().len()), (1, 0));
        }
    }

    #[test]
    fn invalid_or_chunked_requests_are_rejected_and_recorded() {
        for (bytes, status) in [
            ("\x16\x03\x01 a TLS hello\r\n\r\n", 400),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12", 400),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
            ("POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        ] {
            let sandbox = start();
            let mut client = Client::to(sandbox.address());
            client.send(bytes);
            assert_eq!(client.answer().status, status, "{bytes}");
            // Ends the drain at once. The answer above must have arrived, not been destroyed by a reset.
            client.stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(client.read_to_end().unwrap().is_empty());
            let received = &sandbox.requests()[0];
            assert!(bytes.as_bytes().starts_with(&received.head));
            assert_eq!((received.complete, received.status), (false, Some(status)));
        }
    }

    #[test]
    fn expect_continue_is_honoured() {
        let sandbox = start();
        let mut client = Client::to(sandbox.address());
        client.send("POST /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n");
        assert_eq!(client.answer().status, 100);
        client.send("1");
        assert_eq!(client.answer().status, 404);
    }

    #[test]
    fn control_calls_change_faults_and_are_not_recorded() {
        let sandbox = start();
        let token = token(&sandbox);
        let mut client = Client::to(sandbox.address());
        let put = |client: &mut Client, faults: &str| client.call("PUT", "/_sandbox/faults", "", faults);
        assert_eq!(put(&mut client, r#"{"business":[{"times":1,"status":502}]}"#).status, 200);
        assert_eq!(client.appoint(&token).status, 502);
        assert_eq!(client.appoint(&token).status, 200);
        // The last two are valid, but no control call could end them: this sandbox has one listener.
        for wrong in ["{", r#"{"typo":1}"#, r#"{"down":true}"#, r#"{"connections":[{"instead":"reset"}]}"#] {
            let answer = put(&mut client, wrong);
            assert_eq!(answer.status, 400, "{wrong}");
            assert!(answer.json()["error_msg"].is_string());
        }
        let get =
            |client: &mut Client, what: &str| client.call("GET", &format!("/_sandbox/{what}"), "", "").json();
        let requests = get(&mut client, "requests");
        assert_eq!((requests[0]["status"].as_u64(), requests[1]["status"].as_u64()), (Some(502), Some(200)));
        assert_eq!(requests[1]["body"], body().to_string());
        assert_eq!(get(&mut client, "token-calls")[0]["issued"], token.as_str());
        assert_eq!(get(&mut client, "tasks")[0]["task"], "954645333549048833");
        assert_eq!(get(&mut client, "faults")["business"][0]["status"], 502);
        assert_eq!(get(&mut client, "connections")["open"], 1);
        assert_eq!(client.call("POST", "/_sandbox/reset", "", "").status, 200);
        assert!(
            sandbox.requests().is_empty() && sandbox.token_calls().is_empty() && sandbox.tasks().is_empty()
        );
        assert_eq!(client.appoint(&token).status, 200, "tokens survive a reset");
        assert_eq!(client.call("POST", "/_sandbox/revoke", "", "").status, 200);
        assert_eq!(client.appoint(&token).status, 401);
    }

    #[test]
    fn one_thousand_connections_are_served_in_parallel() {
        let sandbox = start();
        // All are open before the first one sends, so that a server of one connection at a time would hang.
        let mut clients: Vec<_> = (0..1000).map(|_| Client::to(sandbox.address())).collect();
        for client in &mut clients {
            client.send(request("POST", "/x", "", "1"));
        }
        assert!(clients.iter_mut().all(|client| client.answer().status == 404));
        assert_eq!((sandbox.requests().len(), sandbox.connections().open), (1000, 1000));
        drop(sandbox);
        assert!(clients.iter_mut().all(|client| client.read_to_end().is_ok()), "dropping ends them all");
    }
}

mod encrypted {
    use super::*;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

    fn start() -> (Sandbox, String) {
        let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let cert_pem = pair.cert.pem();
        let tls = Tls { cert_pem: cert_pem.clone(), key_pem: pair.signing_key.serialize_pem() };
        (Sandbox::start(Options { tls: Some(tls), ..Options::default() }).unwrap(), cert_pem)
    }

    fn connect(sandbox: &Sandbox, root_pem: Option<&str>) -> StreamOwned<ClientConnection, TcpStream> {
        let mut roots = RootCertStore::empty();
        if let Some(pem) = root_pem {
            roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let name = ServerName::try_from("localhost").unwrap();
        let client = ClientConnection::new(Arc::new(config), name).unwrap();
        StreamOwned::new(client, TcpStream::connect(sandbox.address()).unwrap())
    }

    #[test]
    fn trusting_tls_client_is_served_over_http_1_1() {
        let (sandbox, root) = start();
        assert!(sandbox.url().starts_with("https://"));
        let mut stream = connect(&sandbox, Some(&root));
        let bytes = request("POST", "/x", "Connection: close\r\n", "1");
        stream.write_all(bytes.as_bytes()).unwrap();
        let mut answer = String::new();
        // Fails without a close_notify, which distinguishes a complete answer from a truncated one.
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 404 "));
        assert_eq!(stream.conn.alpn_protocol(), Some(b"http/1.1".as_slice()));
        assert_eq!(sandbox.connections().application_bytes, bytes.len() as u64);
    }

    #[test]
    fn failed_handshake_is_counted_with_its_alert_and_sends_no_data() {
        let (sandbox, _root) = start();
        // The client trusts no root, so it ends the handshake before it sends anything.
        assert!(connect(&sandbox, None).write_all(b"POST").is_err());
        eventually("the failure is counted", || sandbox.connections().handshake_failures.len() == 1);
        let connections = sandbox.connections();
        assert!(connections.handshake_failures[0].contains("alert"), "{connections:?}");
        assert_eq!(connections.application_bytes, 0);
        assert!(sandbox.requests().is_empty());
    }

    #[test]
    fn reset_fault_also_works_over_tls() {
        let (sandbox, root) = start();
        sandbox.faults(Faults::business(Fault::instead(Instead::Reset))).unwrap();
        let mut stream = connect(&sandbox, Some(&root));
        stream.write_all(request("POST", "/x", "", "1").as_bytes()).unwrap();
        let error = stream.read(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn unusable_certificate_fails_the_sandbox_start() {
        let tls = Some(Tls { cert_pem: "none".to_owned(), key_pem: "none".to_owned() });
        let error = Sandbox::start(Options { tls, ..Options::default() }).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}
