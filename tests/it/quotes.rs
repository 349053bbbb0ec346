//! An upstream that quotes the credential: in each header, in the body, behind its first 64 KiB. Nothing of it reaches callers,
//! trail, replays, log or `/status`. The same replies without the quote pass whole.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
};

use ccsqm_gateway::sandbox::{Fault, Faults, Framing, Sandbox};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::*;

const APP_KEY: &str = "quoted/app-key-0123456789";
const APP_SECRET: &str = "Quoted\"app\\secret-0123456789";

/// A gateway whose key and secret are long enough to be looked for, and a token of it.
fn start_quoted(sandbox: &Sandbox, set: &[(&'static str, &str)]) -> (Gateway, [String; 3]) {
    let folder: Arc<TempDir> = start(sandbox).kill();
    sandbox.secret(APP_KEY, APP_SECRET);
    fs::write(folder.path().join("app_key"), APP_KEY).unwrap();
    fs::write(folder.path().join("app_secret"), APP_SECRET).unwrap();
    let set: Vec<_> =
        set.iter().chain(&[("log.level", "debug")]).map(|(key, value)| (*key, (*value).to_owned())).collect();
    let gateway = serve_with(&folder, &[], &set, &[]);
    wait_for("the keys", || gateway.log().contains("Idempotency-Keys of the window were read").then_some(()));
    assert_eq!(gateway.call().outcome(), "succeeded");
    let token = sandbox.token_calls().last().unwrap().issued.clone().unwrap();
    assert!(token.len() >= 16, "{token}");
    (gateway, [token, APP_KEY.to_owned(), APP_SECRET.to_owned()])
}

/// Each character as `\u00xx`.
fn spelled(text: &str) -> String {
    text.bytes().map(|byte| format!("\\u{byte:04x}")).collect()
}

/// The ways in which JSON may quote a text.
fn in_json(text: &str) -> [String; 3] {
    let plain = serde_json::to_string(text).unwrap();
    let plain = plain.trim_start_matches('"').strip_suffix('"').unwrap().to_owned();
    [plain.replace('/', "\\/"), plain, spelled(text)]
}

/// Sends the example request and reads whatever comes.
fn raw_call(gateway: &Gateway, headers: &str) -> String {
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    write!(stream, "{}{BODY}", head(BODY.len(), headers)).unwrap();
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    String::from_utf8_lossy(&reply).into_owned()
}

/// What of a gateway somebody may read, beside replies.
fn sinks(gateway: &Gateway) -> String {
    let mut text = gateway.log() + &gateway.admin("/status").body + &gateway.admin("/metrics").body;
    for entry in fs::read_dir(gateway.audit_directory()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            text += &fs::read_to_string(path).unwrap();
        }
    }
    text
}

/// Whether a text shows a secret in any form that a reader of JSON would take for it.
fn shows(text: &str, secret: &str) -> bool {
    let forms = in_json(secret);
    let twice = forms.each_ref().map(|form| form.replace('\\', "\\\\"));
    let plain = [secret.to_owned()];
    plain.iter().chain(&forms).chain(&twice).any(|form| text.contains(form.as_str()))
}

fn withheld(gateway: &Gateway, place: &str) -> u64 {
    let name = format!("ccsqm_gateway_withheld_total{{place=\"{place}\"}} ");
    let metrics = gateway.admin("/metrics").body;
    metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

#[test]
fn header_that_quotes_the_credential_is_dropped() {
    let sandbox = sandbox();
    let (gateway, secrets) = start_quoted(&sandbox, &[("upstream.reply_headers", "[\"x-trace\"]")]);
    let names = [
        "content-language",
        "content-range",
        "allow",
        "vary",
        "age",
        "expires",
        "cache-control",
        "retry-after",
        "x-trace",
    ];
    let mut quoted = 0;
    for name in names {
        let answer = |value: &str| {
            script(&sandbox, Faults::business(Fault::default().with_header(name, value).times(1)));
            raw_call(&gateway, "")
        };
        let reply = answer("a harmless value of the same length");
        assert!(reply.contains(&format!("\r\n{name}: a harmless value")), "the control: {reply}");
        for secret in &secrets {
            for form in [secret.clone(), spelled(secret), format!("key=\"{secret}\"; x")] {
                let reply = answer(&form);
                let passes = reply.to_ascii_lowercase().contains(&format!("\r\n{name}:"));
                assert!(!passes && !shows(&reply, secret), "{name}: {reply}");
                assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("0409000"), "{name}: {reply}");
                quoted += 1;
            }
        }
    }
    assert_eq!(withheld(&gateway, "header"), quoted);
    let content_type = format!("text/plain; {}", secrets[0]);
    script(
        &sandbox,
        Faults::business(Fault { content_type: Some(content_type), ..Fault::default().times(1) }),
    );
    let reply = raw_call(&gateway, "idempotency-key: typed\r\n");
    assert!(!reply.contains("content-type") && reply.contains("0409000"), "{reply}");
    let sinks = sinks(&gateway);
    assert!(secrets.iter().all(|secret| !shows(&sinks, secret)));
}

#[test]
fn only_reply_headers_on_the_allow_list_pass() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default());
    let headers = [
        ("x-debug", "1"),
        ("alt-svc", "h3=\":443\""),
        ("strict-transport-security", "max-age=1"),
        ("clear-site-data", "\"*\""),
        ("set-cookie", "a=b"),
        ("location", "http://elsewhere/"),
        ("etag", "\"x\""),
        ("vary", "accept"),
        ("cache-control", "no-store"),
        ("expires", "0"),
        ("connection", "vary"),
        ("x-request-id", "up/1:2=3"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    script(&sandbox, Faults::business(Fault { headers: headers.into(), ..Fault::default().times(1) }));
    let reply = raw_call(&gateway, "x-request-id: mine\r\n");
    let (head, _) = reply.split_once("\r\n\r\n").unwrap();
    let mut names: Vec<_> = head.lines().skip(1).map(|line| line.split_once(": ").unwrap()).collect();
    names.sort_unstable();
    let kept: Vec<_> = names.iter().map(|(name, _)| *name).collect();
    let expected = [
        "cache-control",
        "connection",
        "content-length",
        "content-type",
        "date",
        "expires",
        "x-gateway-outcome",
        "x-gateway-request-id",
        "x-gateway-retry",
        "x-gateway-upstream-request-id",
        "x-request-id",
    ];
    assert_eq!(kept, expected, "{head}");
    assert!(names.contains(&("x-request-id", "mine")), "{head}");
    assert!(names.contains(&("x-gateway-upstream-request-id", "up/1:2=3")), "{head}");
    let outcome = &gateway.records("outcome", 1)[0];
    assert_eq!(outcome["upstream_request_id"], "up/1:2=3");
    for id in ["", "with blank", "é", &"x".repeat(129)] {
        script(&sandbox, Faults::business(Fault::default().with_header("x-request-id", id).times(1)));
        let reply = raw_call(&gateway, "");
        assert!(reply.starts_with("HTTP/1.1 200") && !reply.contains("upstream-request-id"), "{reply}");
    }
}

#[test]
fn body_that_quotes_the_credential_is_withheld_and_never_stored() {
    let sandbox = sandbox();
    let (gateway, secrets) = start_quoted(&sandbox, &[]);
    let mut number = 0;
    for secret in &secrets {
        for form in in_json(secret) {
            for (status, body, code) in [
                (200, r#"{"resultCode":"0409000","data":"QUOTED"}"#, json!("0409000")),
                (200, r#"{"resultCode":"QUOTED"}"#, Value::Null),
                (400, r#"{"error":"QUOTED"}"#, Value::Null),
                (200, "not JSON: QUOTED", Value::Null),
                (502, "QUOTED", Value::Null),
            ] {
                number += 1;
                let answer = |body: &str, key: &str| {
                    script(&sandbox, Faults::business(Fault::status(status).with_body(body).times(1)));
                    raw_call(&gateway, &format!("idempotency-key: {key}{number}\r\n"))
                };
                let harmless = body.replace("QUOTED", "harmless");
                let reply = answer(&harmless, "control");
                assert!(reply.ends_with(&harmless), "the control: {reply}");
                let reply = answer(&body.replace("QUOTED", &form), "key");
                assert!(!shows(&reply, secret), "{reply}");
                assert!(reply.starts_with(&format!("HTTP/1.1 {status}")), "{reply}");
                let reply = parse_reply(&reply);
                let expected = if code.is_null() {
                    json!({ "withheld": true })
                } else {
                    json!({ "resultCode": code, "withheld": true })
                };
                assert_eq!(
                    (reply.headers["content-type"].as_str(), reply.json()),
                    ("application/json", expected)
                );
                if matches!(reply.outcome(), "succeeded" | "failed") {
                    let replay = raw_call(&gateway, &format!("idempotency-key: key{number}\r\n"));
                    let replay = parse_reply(&replay);
                    assert_eq!((replay.outcome(), &replay.body), ("replayed", &reply.body));
                }
            }
        }
    }
    assert_eq!(withheld(&gateway, "body"), number);
    let sinks = sinks(&gateway);
    assert!(sinks.contains("quotes the credential"), "a WARN tells of it");
    assert!(secrets.iter().all(|secret| !shows(&sinks, secret)));
    let notes = records(&gateway.audit_directory(), "outcome");
    let notes =
        notes.iter().filter(|outcome| outcome["note"].as_str().is_some_and(|note| note.contains("withheld")));
    assert_eq!(notes.count() as u64, number);
}

#[test]
fn reply_that_quotes_the_previously_refused_token_is_withheld() {
    let sandbox = sandbox();
    let (gateway, [first, ..]) = start_quoted(&sandbox, &[]);
    sandbox.revoke();
    let body = json!({ "resultCode": "0409000", "data": first }).to_string();
    script(&sandbox, Faults::business(Fault::body(body).after(1).times(1)));
    let reply = gateway.call();
    assert_eq!(
        (reply.outcome(), reply.json()),
        ("succeeded", json!({ "resultCode": "0409000", "withheld": true }))
    );
}

#[test]
fn long_reply_that_quotes_the_credential_is_cut_off_before_the_quote() {
    const LENGTH: usize = 200 * 1024;
    let sandbox = sandbox();
    let (gateway, secrets) = start_quoted(&sandbox, &[]);
    let filler = |length: usize| "lorem ipsum, ".chars().cycle().take(length).collect::<String>();
    let mut cut = 0;
    for (number, secret) in secrets.iter().enumerate() {
        for form in in_json(secret) {
            let borders = [64 * 1024, LENGTH / 2, LENGTH - 40].map(|border| border - form.len() / 2);
            for (place, framing) in borders
                .into_iter()
                .flat_map(|place| [None, Some(Framing::Chunked)].map(|framing| (place, framing)))
            {
                let body = |quote: &str| {
                    let begin = r#"{"resultCode":"0409000","data":""#;
                    let before = filler(place.min(LENGTH - 2 - form.len()) - begin.len());
                    let after = (LENGTH - 2).saturating_sub(begin.len() + before.len() + quote.len());
                    format!("{begin}{before}{quote}{}\"}}", filler(after))
                };
                let answer = |body: &str, framing| {
                    let fault = Fault { framing, ..Fault::body(body).times(1) };
                    script(&sandbox, Faults::business(fault));
                    raw_call(&gateway, "")
                };
                if number == 0 {
                    let harmless = body(&form.replace(|byte: char| byte.is_ascii_alphanumeric(), "x"));
                    let harmless = harmless.replace("\\", "/");
                    let reply = answer(&harmless, framing);
                    let body = dechunked(&reply);
                    assert!(body == harmless, "the control: {} of {}", body.len(), harmless.len());
                }
                let reply = answer(&body(&form), framing);
                let is_withheld = reply.contains("withheld");
                assert!(is_withheld || reply.starts_with("HTTP/1.1 200"), "{}", &reply[..200]);
                let (_, left) = reply.split_once("\r\n\r\n").unwrap();
                assert!(!left.contains(&form[..8]), "a part of {form} left");
                cut += u64::from(!is_withheld);
                assert!(is_withheld || !reply.ends_with("0\r\n\r\n"), "the caller sees that it is cut");
            }
        }
    }
    assert_eq!(withheld(&gateway, "tail"), cut);
    assert!(cut >= 18, "{cut}"); // those at the end of a reply are never in its first 64 KiB
    let sinks = sinks(&gateway);
    assert!(secrets.iter().all(|secret| !shows(&sinks, secret)));
}

/// The body of a reply that is sent in chunks, or as it is.
fn dechunked(reply: &str) -> String {
    let (head, mut rest) = reply.split_once("\r\n\r\n").unwrap();
    if !head.contains("transfer-encoding: chunked") {
        return rest.to_owned();
    }
    let mut body = String::new();
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            break;
        }
        body += &after[..length];
        rest = &after[length + 2..];
    }
    body
}

#[test]
fn forbidden_reply_headers_are_rejected_in_the_configuration() {
    let folder = start(&sandbox()).kill();
    let config = folder.path().join("gateway.toml");
    let text = fs::read_to_string(&config).unwrap();
    let check = |names: &str| {
        let line = format!("[upstream]\nreply_headers = {names}\n");
        fs::write(&config, text.replace("[upstream]\n", &line)).unwrap();
        command(&["check", "--config", config.to_str().unwrap()])
    };
    let (code, said, error) = check(r#"["x-trace", "ETag"]"#);
    assert_eq!(code, 0, "the control: {error}");
    assert!(said.contains(r#"reply_headers = ["x-trace", "etag"]"#), "{said}");
    for name in
        ["Set-Cookie", "location", "connection", "x-request-id", "x-gateway-outcome", "x-app-key", "a b", ""]
    {
        let (code, _, error) = check(&format!("[\"x-trace\", \"{name}\"]"));
        assert!(code == 78 && error.contains(":8: upstream.reply_headers: "), "{name}: {code} {error}");
    }
}

#[test]
fn secrets_too_short_to_search_for_are_reported() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let config = folder.path().join("gateway.toml");
    let check = |key: &str| {
        fs::write(folder.path().join("app_key"), key).unwrap();
        command(&["check", "--config", config.to_str().unwrap()]).1
    };
    let told = "the app key of credential default has fewer than 16 bytes";
    assert!(check("123456789012345").contains(told));
    let gateway = serve(&folder);
    wait_for("the WARN", || gateway.log().contains(told).then_some(()));
    assert!(!check("1234567890123456").contains(told), "the control");
    drop(gateway);

    let text = fs::read_to_string(&config).unwrap();
    let login =
        "proxy = \"http://127.0.0.1:1\"\nproxy_user_file = \"user\"\nproxy_password_file = \"password\"";
    fs::write(&config, text.replace("[upstream]\n", &format!("[upstream]\n{login}\n"))).unwrap();
    fs::write(folder.path().join("user"), "gateway").unwrap();
    let check = |password: &str| {
        fs::write(folder.path().join("password"), password).unwrap();
        command(&["check", "--config", config.to_str().unwrap()]).1
    };
    let told = "the password in upstream.proxy_password_file has fewer than 16 bytes";
    assert!(!check("1234567890123456").contains(told), "the control");
    assert!(check("123456789012345").contains(told));
    let gateway = serve(&folder);
    wait_for("the WARN", || gateway.log().contains(told).then_some(()));
}
