//! Stages 1 to 3: heads, callers, routes, limits. What is refused has a control that passes.

use std::process::Command;

use crate::support::*;

/// Heads as upstream received them, lower case.
fn upstream_heads(sandbox: &ccsqm_gateway::sandbox::Sandbox) -> Vec<String> {
    let text = |received: ccsqm_gateway::sandbox::Received| {
        String::from_utf8(received.head).unwrap().to_ascii_lowercase()
    };
    sandbox.requests().into_iter().map(text).collect()
}

#[test]
fn caller_credentials_and_identities_never_reach_the_upstream() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    for (headers, code) in [
        ("authorization: Bearer stolen-credential\r\n", ""),
        ("x-app-key: stolen-credential\r\n", ""),
        ("x_userid: stolen-credential\r\n", ""),
        ("x-userid: 999\r\n", "operator_denied"),
        ("x-userid: 1611917095665261978\r\nx-userid: 1611917095665261978\r\n", "head_invalid"),
        ("x-userid: 1611917095665261978\r\nconnection: x-userid\r\n", "head_invalid"),
        ("x-userid: 1611917095665261978\r\nconnection: x-userid, \u{ff}\r\n", "head_invalid"),
        ("host: evil\r\n", "head_invalid"),
        ("origin: http://evil\r\n", "browser_refused"),
        ("sec-fetch-site: cross-site\r\n", "browser_refused"),
        ("transfer-encoding: chunked\r\n", "body_incomplete"),
    ] {
        let before = sandbox.requests().len();
        let reply = gateway.post_with(headers);
        assert_eq!(reply.code(), code, "{headers}");
        let sent = sandbox.requests().len() - before;
        assert_eq!(sent, usize::from(code.is_empty()), "{headers}");
    }
    for head in upstream_heads(&sandbox) {
        assert!(!head.contains("stolen-credential") && !head.contains("x_userid"), "{head}");
        for name in ["authorization:", "x-app-key:", "x-userid: 1611917095665261978"] {
            assert_eq!(head.matches(&format!("\r\n{name}")).count(), 1, "{head}");
        }
    }
    let metrics = gateway.admin("/metrics").body;
    assert!(metrics.contains("ccsqm_gateway_credential_headers_dropped_total 2"), "{metrics}");
}

#[test]
fn only_http_1_1_with_plain_chunked_coding_is_accepted() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let chunked = format!("{:x}\r\n{BODY}\r\n0\r\n\r\n", BODY.len());
    let coded =
        |coding: &str| head(0, "").replace("content-length: 0", &format!("transfer-encoding: {coding}"));
    let old = head(BODY.len(), "").replace("HTTP/1.1", "HTTP/1.0");
    for (head, body, code) in [
        (old, BODY, "head_invalid"),
        (coded("gzip, chunked"), &chunked, "head_invalid"),
        (coded("chunked\r\ntransfer-encoding: chunked"), &chunked, "head_invalid"),
        (coded("chunked"), &chunked, ""),
        (head(BODY.len(), ""), BODY, ""),
    ] {
        assert_eq!(gateway.send(&head, body).code(), code, "{head}");
    }
    assert_eq!(sandbox.requests().len(), 2);
}

#[test]
fn only_the_exact_path_and_method_of_a_route_pass() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let request =
        |line: &str| gateway.send(&head(BODY.len(), "").replacen(&format!("POST {PATH}"), line, 1), BODY);
    for (line, code, status) in [
        (format!("POST http://localhost{PATH}"), "target_invalid", 400),
        (format!("POST {PATH}?x=1"), "target_invalid", 400),
        (format!("POST {PATH}/"), "route_unknown", 404),
        (format!("POST /{PATH}"), "route_unknown", 404),
        (format!("POST {}", PATH.replace("CCSQM", "%43CSQM")), "route_unknown", 404),
        (format!("GET {PATH}"), "method_not_allowed", 405),
    ] {
        let reply = request(&line);
        assert_eq!((reply.code(), reply.status, reply.outcome()), (code, status, "not_sent"), "{line}");
    }
    assert_eq!(sandbox.requests().len(), 0);
    assert_eq!(request(&format!("POST {PATH}")).outcome(), "succeeded", "the control");
}

#[test]
fn exhausted_quota_reply_has_a_retry_after() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("quota.rate", "1/h").set("quota.burst", 1));
    assert_eq!(gateway.call().status, 200);
    let refused = gateway.call();
    assert_eq!((refused.status, refused.code()), (429, "quota_exhausted"));
    let wait: u64 = refused.headers["retry-after"].parse().unwrap();
    assert!((3000..=3600).contains(&wait), "{wait}");
    assert_eq!(sandbox.requests().len(), 1);
}

#[test]
fn default_requests_of_usual_clients_are_accepted() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let url: &str = &format!("http://localhost:{}{PATH}", gateway.address.port());
    let client = |name: &str| format!("{}/tests/clients/{name}", env!("CARGO_MANIFEST_DIR"));
    let (requests, httpx) = (client("with_requests.py"), client("with_httpx.py"));
    let (fetch, axios) = (client("with_fetch.mjs"), client("with_axios.cjs"));
    let java = client("WithHttpClient.java");
    let curl =
        ["curl", "-s", "-4", "-w", "%header{x-gateway-outcome}", url, "-H", "Content-Type: application/json"];
    let python = "/usr/bin/python3"; // Debian's, which has Debian's libraries
    let quick = "-XX:TieredStopAtLevel=1";
    let commands = [
        [&curl[..], &["-d", BODY]].concat(),
        [&curl[..], &["-H", "Expect: 100-continue", "-d", BODY]].concat(),
        vec![python, &requests, url, BODY],
        vec![python, &httpx, url, BODY],
        vec!["node", &fetch, url, BODY],
        vec!["node", &axios, url, BODY],
        vec!["java", quick, &java, url, BODY],
        vec!["java", quick, &java, url, BODY, "expect"],
    ];
    for (calls, command) in commands.iter().enumerate() {
        let run = Command::new(command[0]).args(&command[1..]).env("NODE_PATH", "/usr/share/nodejs").output();
        let output = run.unwrap_or_else(|error| panic!("{}: {error}; tests/run installs it", command[0]));
        let (text, error) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("0409000") && text.contains("succeeded"), "{command:?}: {text} {error}");
        let received = sandbox.requests();
        assert_eq!((received.len(), &*received[calls].body), (calls + 1, BODY.as_bytes()), "{command:?}");
    }
}

/// What Go's net/http and .NET's `HttpClient` put on the wire for a plain POST.
#[test]
fn request_heads_of_go_and_dotnet_are_accepted() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let length = BODY.len();
    for head in [
        format!(
            "POST {PATH} HTTP/1.1\r\nHost: localhost:8080\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {length}\r\n\
             Content-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n"
        ),
        format!(
            "POST {PATH} HTTP/1.1\r\nHost: localhost:8080\r\nContent-Type: application/json; charset=utf-8\r\n\
             Content-Length: {length}\r\n\r\n"
        ),
        format!(
            "POST {PATH} HTTP/1.1\r\nHost: localhost:8080\r\ntraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\
             Content-Type: application/json; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{BODY}\r\n0\r\n\r\n"
        ),
    ] {
        let body = if head.contains("chunked") { "" } else { BODY };
        assert_eq!(gateway.send_and_finish(&head, body).outcome(), "succeeded", "{head}");
        assert_eq!(sandbox.requests().last().unwrap().body, BODY.as_bytes());
    }
}
