//! The way out: a proxy, the gateway's own certificate, names whose addresses change.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use ccsqm_gateway::sandbox::{Fault, Faults, Sandbox};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tempfile::TempDir;
use tokio::{io::copy_bidirectional, net, runtime::Builder};

use crate::{
    callers::{CALLER, Ca, SERVER, change, swap},
    exchange::secure_sandbox,
    http2_upstream::SUCCESS,
    secrets::shows,
    support::*,
};

/// A proxy that answers CONNECT with this head and, if that is a 200, opens a tunnel. Keeps what callers sent first.
pub(crate) struct Proxy {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Proxy {
    pub(crate) fn start(answer: &'static str) -> Self {
        Self::answering(move |_| answer.to_owned())
    }

    /// One whose answer depends on the head.
    fn answering(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (heads, bytes) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let proxy = Self { address, heads: heads.clone(), bytes: bytes.clone() };
        let answer = Arc::new(answer);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answer, heads, bytes) = (answer.clone(), heads.clone(), bytes.clone());
                thread::spawn(move || serve_tunnel(stream, &*answer, &heads, &bytes));
            }
        });
        proxy
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How often a password was sent to it.
    fn tries(&self) -> usize {
        self.heads.lock().unwrap().iter().filter(|head| head.contains("Basic")).count()
    }
}

fn serve_tunnel(
    mut stream: TcpStream,
    answer: &dyn Fn(&str) -> String,
    heads: &Mutex<Vec<String>>,
    bytes: &Arc<Mutex<Vec<u8>>>,
) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let port = head.split(' ').nth(1)?.rsplit(':').next()?.to_owned();
    heads.lock().unwrap().push(head.clone());
    let answer = answer(&head);
    stream.write_all(answer.as_bytes()).ok()?;
    if !answer.contains(" 200 ") {
        return None;
    }
    let upstream = TcpStream::connect(format!("127.0.0.1:{port}")).ok()?;
    let (mut from, mut to) = (stream.try_clone().ok()?, upstream.try_clone().ok()?);
    let bytes = bytes.clone();
    thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Some(length) = from.read(&mut piece).ok().filter(|length| *length > 0) {
            bytes.lock().unwrap().extend_from_slice(&piece[..length]);
            if to.write_all(&piece[..length]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    std::io::copy(&mut &upstream, &mut stream).ok().map(drop)
}

#[test]
fn proxy_tunnel_reaches_the_upstream_and_hides_the_content() {
    let (secure, setup) = secure_sandbox();
    let proxy = Proxy::start("HTTP/1.1 200 Connection established\r\nVia: 1.1 egress\r\n\r\n");
    let gateway = start_with(&secure, setup.set("upstream.proxy", proxy.url()));
    let reply = gateway.call();
    assert_eq!(reply.outcome(), "succeeded", "{reply:?} {}", gateway.log());
    assert_eq!((secure.requests().len(), secure.token_calls().len()), (1, 1));
    let port = |url: String| url.rsplit(':').next().unwrap().split('/').next().unwrap().to_owned();
    let heads = proxy.heads.lock().unwrap().clone();
    for port in [port(secure.url()), port(secure.token_url())] {
        let head = format!("CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n");
        assert!(heads.contains(&head), "{heads:?}");
    }
    assert_eq!(secure.connections().accepted as usize, heads.len(), "no way around it");
    let bytes = proxy.bytes.lock().unwrap();
    let holds = |text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
    assert!(holds("localhost"), "the control: the server's name is not hidden");
    assert!(!holds("Bearer") && !holds("954645333549048833") && !holds("sandbox-app"));
}

#[test]
fn proxy_without_a_tunnel_makes_the_upstream_unreachable() {
    for answer in [
        "HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 502 Bad Gateway\r\n\r\n",
        "HTTP/1.1 200 OK\r\n\r\nand more",
        "220 smtp.example.org\r\n\r\n",
        "",
    ] {
        let (secure, setup) = secure_sandbox();
        let plain = sandbox();
        let proxy = Proxy::start(answer);
        // The token comes from elsewhere, so that the request gets as far as the upstream.
        let setup = Setup { token_url: Some(plain.token_url()), ..setup };
        let setup = setup.set("upstream.connect_timeout", "1s").set("upstream.proxy", proxy.url());
        let gateway = start_with(&plain, setup);
        let reply = gateway.call();
        assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"), "{answer}");
        assert_eq!(proxy.heads.lock().unwrap().len(), 1, "{answer}");
        assert!(secure.connections().accepted <= u64::from(answer.contains("200")), "{answer}");
        assert_eq!(secure.requests().len(), 0);
        let metrics = gateway.admin("/metrics").body;
        assert!(metrics.contains(r#"upstream_connects_total{result="proxy_"#), "{answer}: {metrics}");
    }
}

/// Tokens come from elsewhere, so that a request gets as far as the upstream.
fn with_other_tokens(setup: Setup, other: &Sandbox) -> Setup {
    Setup { token_url: Some(other.token_url()), ..setup }
}

/// What a gateway behind such a proxy answers, and what it tells operators; the upstream has the requests.
fn through(proxy: &Proxy, is_good: bool) -> (Reply, Gateway, Sandbox) {
    let (secure, setup) = secure_sandbox();
    let plain = sandbox();
    let setup = if is_good { setup } else { with_other_tokens(setup, &plain) };
    let gateway = start_with(&plain, setup.set("upstream.proxy", proxy.url()));
    (gateway.call(), gateway, secure)
}

#[test]
fn proxy_response_after_interim_heads_is_read_up_to_logged_limits() {
    let fields = |count: usize| format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(count));
    let long = |length: usize| {
        let around = "HTTP/1.1 200 OK\r\nx: \r\n\r\n".len();
        format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(length - around))
    };
    let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".to_owned();
    for answer in [interim.clone() + &fields(0), fields(70), fields(256), long(9 << 10), long(64 << 10)] {
        let said = answer.clone();
        let (reply, gateway, secure) = through(&Proxy::answering(move |_| said.clone()), true);
        assert_eq!(reply.outcome(), "succeeded", "{:.99}: {reply:?} {}", answer, gateway.log());
        assert_eq!(secure.requests().len(), 1);
    }
    for (answer, bound) in [
        (fields(257), "the proxy's answer has more than 256 header fields"),
        (long((64 << 10) + 1), "the proxy's answer is longer than 64 KiB"),
        (interim.repeat(1100) + &fields(0), "the proxy's answer is longer than 64 KiB"),
    ] {
        let (reply, gateway, secure) = through(&Proxy::answering(move |_| answer.clone()), false);
        assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"), "{bound}");
        assert_eq!(reply.json()["cause"], "proxy_unreadable", "{bound}");
        let detail = gateway.admin("/status").json()["upstream"]["last_error"]["detail"].take();
        assert!(detail.as_str().unwrap().contains(bound), "{detail}");
        wait_for("its line", || gateway.log().contains(bound).then_some(()));
        wait_for("the record", || {
            let records = records(&gateway.audit_directory(), "");
            records.iter().any(|record| record["cause"] == "proxy_unreadable").then_some(())
        });
        assert_eq!((secure.requests().len(), secure.connections().application_bytes), (0, 0), "{bound}");
    }
    // What is no HTTP is told before it ends.
    let (reply, ..) = through(&Proxy::start("\x15\x03\x01"), false);
    assert_eq!(reply.json()["cause"], "proxy_unreadable");
}

const PROXY_USER: &str = "gateway";
const PROXY_PASSWORD: &str = "proxy-password-0.example";
/// Both, as they are sent.
const LOGIN: &str = "Proxy-Authorization: Basic Z2F0ZXdheTpwcm94eS1wYXNzd29yZC0wLmV4YW1wbGU=\r\n";

const OPENED: &str = "HTTP/1.1 200 OK\r\n\r\n";

/// A proxy that lets in who sends this, and challenges others so.
fn guarded_proxy(challenge: &'static str) -> Proxy {
    Proxy::answering(move |head| guard_tunnel(head, challenge))
}

fn guard_tunnel(head: &str, challenge: &str) -> String {
    match head.contains(LOGIN) {
        true => OPENED.to_owned(),
        // It quotes all that it heard, too.
        false => format!("HTTP/1.1 407 {}\r\n{challenge}\r\n", head.replace("\r\n", " ")),
    }
}

fn with_login(setup: Setup, password: &str) -> Setup {
    let folder = setup.folder.as_ref().unwrap();
    fs::write(folder.path().join("proxy_user"), PROXY_USER.to_owned() + "\n").unwrap();
    fs::write(folder.path().join("proxy_password"), password.to_owned() + "\n").unwrap();
    let setup = setup.set("upstream.proxy_user_file", "proxy_user");
    setup.set("upstream.proxy_password_file", "proxy_password")
}

#[test]
fn proxy_credentials_are_read_from_files_and_reloaded() {
    const WRONG: &str = "another-password-of-the-gateway";
    let (secure, setup) = secure_sandbox();
    let folder = setup.folder.clone().unwrap();
    let proxy = guarded_proxy("Proxy-Authenticate: Basic realm=\"egress\"\r\n");
    let setup = setup.set("upstream.proxy", proxy.url()).set("log.level", "trace").set("token.wait", "10s");
    let gateway = start_with(&secure, with_login(setup, WRONG));
    let refused =
        "the proxy refuses the user and password of proxy_user_file and proxy_password_file (status 407)";
    wait_for("the refusal", || gateway.log().contains(refused).then_some(()));
    let status = gateway.admin("/status");
    assert_eq!(
        status.json()["credentials"][0]["last_error"]["cause"],
        "proxy_credentials",
        "{}",
        status.body
    );
    assert_eq!(secure.connections().accepted, 0);

    let change = |count: usize| {
        let is_change = |event: &serde_json::Value| event["event"] == "secret_change";
        let events = || records(&gateway.audit_directory(), "event").into_iter().filter(is_change);
        let event = wait_for("the event", || events().nth(count - 1));
        assert_eq!(event["upstream"], "proxy_password_file", "{event}");
        event["result"].as_str().unwrap().to_owned()
    };
    swap(&folder, "proxy_password", PROXY_PASSWORD);
    assert_eq!(change(1), "accepted");
    let reply = gateway.call();
    assert_eq!(reply.outcome(), "succeeded", "{reply:?} {}", gateway.log());
    assert_eq!((secure.requests().len(), secure.token_calls().len()), (1, 1));
    let token_head = secure.token_calls()[0].request.head.clone();
    for head in [&secure.requests()[0].head, &token_head] {
        assert!(!String::from_utf8_lossy(head).to_lowercase().contains("proxy"), "it is the proxy's alone");
    }
    let head = proxy.heads.lock().unwrap().last().unwrap().clone();
    assert!(head.starts_with("CONNECT localhost:") && head.ends_with(&format!("\r\n{LOGIN}\r\n")), "{head}");

    swap(&folder, "proxy_password", "two\nlines");
    assert_eq!(change(2), "refused");
    assert_eq!(gateway.call().outcome(), "succeeded", "the old ones stay in use");

    let config = folder.path().join("gateway.toml").display().to_string();
    let named = ["proxy", "proxy_user_file", "proxy_password_file"].map(|key| {
        format!("upstream.{key}={}", if key == "proxy" { proxy.url() } else { key.replace("_file", "") })
    });
    let mut check = vec!["check", "--config", &config];
    named.iter().for_each(|set| check.extend(["--set", set]));
    swap(&folder, "proxy_password", PROXY_PASSWORD);
    let (code, out, error) = command(&check);
    assert!(code == 0 && out.contains("proxy_password_file = "), "{out}{error}");
    let trail = records(&gateway.audit_directory(), "").iter().map(ToString::to_string).collect();
    for (sink, text) in [
        ("log", gateway.log()),
        ("reply", reply.text()),
        ("status", status.body + &gateway.admin("/status").body),
        ("metrics", gateway.admin("/metrics").body),
        ("trail", trail),
        ("check", out + &error),
    ] {
        for secret in [WRONG, PROXY_PASSWORD] {
            assert!(!shows(&text, secret), "{secret} shows in the {sink}");
        }
    }
}

#[test]
fn proxy_challenge_is_reported_with_the_required_action() {
    let basic = "Proxy-Authenticate: Basic realm=\"egress\"\r\n";
    let ntlm = "Proxy-Authenticate: NTLM\r\nProxy-Authenticate: Negotiate\r\n";
    for (challenge, password, told) in [
        (basic, None, "name the files of a user and a password in [upstream] proxy_user_file"),
        ("", None, "name the files of a user and a password in [upstream] proxy_user_file"),
        (basic, Some("wrong-password"), "put those that it accepts into these files"),
        (ntlm, None, "but not by Basic"),
        (ntlm, Some("wrong-password"), "but not by Basic"),
        (ntlm, Some(PROXY_PASSWORD), ""), // the control
    ] {
        let (secure, setup) = secure_sandbox();
        let plain = sandbox();
        let proxy = guarded_proxy(challenge);
        let setup = if told.is_empty() { setup } else { with_other_tokens(setup, &plain) };
        let setup = setup.set("upstream.proxy", proxy.url());
        let setup = match password {
            Some(password) => with_login(setup, password),
            None => setup,
        };
        let gateway = start_with(&plain, setup);
        let reply = gateway.call();
        assert_eq!(proxy.heads.lock().unwrap().iter().any(|head| head.contains("Basic")), password.is_some());
        if told.is_empty() {
            assert_eq!(reply.outcome(), "succeeded", "{reply:?} {}", gateway.log());
            continue;
        }
        assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"), "{challenge}");
        assert_eq!(reply.json()["cause"], "proxy_credentials");
        let detail = gateway.admin("/status").json()["upstream"]["last_error"]["detail"].take();
        assert!(detail.as_str().unwrap().contains(told), "{challenge} {password:?}: {detail}");
        wait_for("its line", || gateway.log().contains(told).then_some(()));
        assert_eq!(secure.connections().accepted, 0);
    }
}

/// A directory behind a proxy locks an account after a few wrong tries.
#[test]
fn wrong_proxy_password_is_sent_once_and_the_right_one_at_once() {
    const CALLERS: usize = 8;
    // Each side alone dials: tokens are wanted, or they come from elsewhere.
    for for_tokens in [true, false] {
        let (secure, setup) = secure_sandbox();
        let (folder, plain) = (setup.folder.clone().unwrap(), sandbox());
        let setup = if for_tokens { setup } else { with_other_tokens(setup, &plain) };
        // The upstream takes those of elsewhere, too.
        script(&secure, Faults::business(Fault::body(SUCCESS)));
        let proxy = guarded_proxy("Proxy-Authenticate: Basic realm=\"egress\"\r\n");
        let setup = setup.set("upstream.proxy", proxy.url()).set("token.wait", "500ms");
        let gateway = start_with(&secure, with_login(setup, "wrong-password-of-the-gateway"));
        let code = if for_tokens { "token_unavailable" } else { "upstream_unreachable" };
        let begin = std::time::Instant::now();
        while begin.elapsed() < Duration::from_secs(5) {
            let replies: Vec<_> = thread::scope(|scope| {
                let calls: Vec<_> = (0..CALLERS).map(|_| scope.spawn(|| gateway.call())).collect();
                calls.into_iter().map(|call| call.join().unwrap()).collect()
            });
            for reply in replies {
                assert_eq!((reply.code(), reply.outcome()), (code, "not_sent"), "{reply:?}");
                assert_eq!(reply.json()["cause"], "proxy_credentials", "{reply:?}");
                assert!(!for_tokens || reply.headers.contains_key("retry-after"), "{reply:?}");
            }
        }
        assert_eq!(proxy.tries(), 1, "for tokens: {for_tokens}");
        assert_eq!(secure.connections().accepted, 0);

        // The control: the right ones end the wait.
        swap(&folder, "proxy_password", PROXY_PASSWORD);
        wait_for("a call", || (gateway.call().outcome() == "succeeded").then_some(()));
        assert!(begin.elapsed() < Duration::from_secs(25), "within the pause after a refusal");
        assert_eq!(secure.requests().len(), 1);
        assert!(proxy.tries() > 1, "the proxy is asked again");
    }
}

/// A gateway with a password for the proxy; tokens come from elsewhere, and the upstream takes them.
fn with_password(proxy: &Proxy, password: &str, connect_timeout: &str) -> (Gateway, [Sandbox; 2]) {
    let (secure, setup) = secure_sandbox();
    let plain = sandbox();
    script(&secure, Faults::business(Fault::body(SUCCESS)));
    let setup = with_other_tokens(setup, &plain).set("upstream.proxy", proxy.url());
    // Each call needs a connection of its own.
    let setup = setup.set("upstream.idle_timeout", "10ms").set("upstream.connect_timeout", connect_timeout);
    (start_with(&plain, with_login(setup, password)), [secure, plain])
}

/// So many calls at once.
fn calls(gateway: &Gateway, count: usize) -> Vec<Reply> {
    thread::scope(|scope| {
        let calls: Vec<_> = (0..count).map(|_| scope.spawn(|| gateway.call())).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    })
}

fn last_error(gateway: &Gateway) -> String {
    gateway.admin("/status").json()["upstream"]["last_error"]["detail"].as_str().unwrap().to_owned()
}

/// The right password ends what holds a wrong one back.
fn succeeds_with_the_right_password(gateway: &Gateway) {
    swap(&gateway.folder, "proxy_password", PROXY_PASSWORD);
    wait_for("a call", || (gateway.call().outcome() == "succeeded").then_some(()));
}

#[test]
fn late_proxy_refusal_also_holds_the_password_back() {
    let answers = Arc::new(Mutex::new(())); // whoever has it holds them back
    let gate = answers.clone();
    let proxy = Proxy::answering(move |head| {
        drop(gate.lock().unwrap());
        guard_tunnel(head, "")
    });
    let (gateway, _sandboxes) = with_password(&proxy, "wrong-password-of-the-gateway", "300ms");
    let held = answers.lock().unwrap();
    for _ in 0..3 {
        for reply in calls(&gateway, 4) {
            assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"), "{reply:?}");
            assert_eq!(reply.json()["cause"], "timeout", "{reply:?}");
        }
    }
    assert_eq!(proxy.tries(), 1, "while the answer is on its way");
    let told = last_error(&gateway);
    assert!(told.contains("the proxy's answer to another connection"), "{told}");
    drop(held);
    wait_for("the refusal", || (gateway.call().json()["cause"] == "proxy_credentials").then_some(()));
    assert_eq!(proxy.tries(), 1, "after the answer");
    succeeds_with_the_right_password(&gateway);
}

#[test]
fn unanswered_proxy_password_is_held_back_after_two_attempts() {
    let proxy = Proxy::answering(|head| if head.contains(LOGIN) { OPENED } else { "" }.to_owned());
    let (gateway, _sandboxes) = with_password(&proxy, "wrong-password-of-the-gateway", "3s");
    for cause in ["proxy_cut", "proxy_cut", "proxy_credentials", "proxy_credentials"] {
        let reply = gateway.call();
        assert_eq!((reply.outcome(), &reply.json()["cause"]), ("not_sent", &cause.into()), "{reply:?}");
    }
    assert_eq!(proxy.tries(), 2);
    let told = last_error(&gateway);
    assert!(told.contains("twice in a row the proxy did not answer"), "{told}");
    succeeds_with_the_right_password(&gateway);
}

#[test]
fn proxy_password_that_expired_while_idle_is_sent_once() {
    let expired = Arc::new(AtomicBool::new(false));
    let has_expired = expired.clone();
    let proxy = Proxy::answering(move |head| {
        guard_tunnel(if has_expired.load(Ordering::SeqCst) { "" } else { head }, "")
    });
    let (gateway, _sandboxes) = with_password(&proxy, PROXY_PASSWORD, "3s");
    for reply in calls(&gateway, 8) {
        assert_eq!(reply.outcome(), "succeeded", "the control: {reply:?}");
    }
    let before = proxy.tries();
    expired.store(true, Ordering::SeqCst);
    thread::sleep(Duration::from_secs(6)); // the lull itself: nothing tells that it is over
    for reply in calls(&gateway, 8) {
        assert_eq!(reply.json()["cause"], "proxy_credentials", "{reply:?}");
    }
    assert_eq!(proxy.tries(), before + 1);
}

#[test]
fn proxy_that_cannot_reach_the_host_is_asked_in_parallel() {
    let (answers, asked, is_good) =
        (Arc::new(Mutex::new(())), AtomicUsize::new(0), Arc::new(AtomicBool::new(false)));
    let (gate, opens) = (answers.clone(), is_good.clone());
    let proxy = Proxy::answering(move |_| {
        if asked.fetch_add(1, Ordering::SeqCst) > 0 {
            drop(gate.lock().unwrap());
        }
        if opens.load(Ordering::SeqCst) { OPENED } else { "HTTP/1.1 504 Gateway Timeout\r\n\r\n" }.to_owned()
    });
    let (gateway, _sandboxes) = with_password(&proxy, PROXY_PASSWORD, "10s");
    assert_eq!(gateway.call().json()["cause"], "proxy_refused");
    let held = answers.lock().unwrap();
    thread::scope(|scope| {
        let calls = scope.spawn(|| calls(&gateway, 4));
        wait_for("all connections at the proxy", || (proxy.tries() == 5).then_some(()));
        drop(held);
        for reply in calls.join().unwrap() {
            assert_eq!(reply.json()["cause"], "proxy_refused", "{reply:?}");
        }
    });
    is_good.store(true, Ordering::SeqCst);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
}

/// A proxy that breaks TLS open shows a certificate of its own, and knows the password.
#[test]
fn error_about_a_proxy_certificate_quotes_no_password() {
    for (name, told) in [(PROXY_PASSWORD, "quotes the proxy's password"), ("other.example", "other.example")]
    {
        let (ca, tls) = crate::exchange::certificate(name, false);
        let options = ccsqm_gateway::sandbox::Options { tls: Some(tls), ..Default::default() };
        let (plain, opens) = (sandbox(), Sandbox::start(options).unwrap());
        let folder = Arc::new(TempDir::new().unwrap());
        fs::write(folder.path().join("ca.pem"), ca).unwrap();
        let proxy = guarded_proxy("");
        let base_url = Some(format!("https://localhost:{}", opens.address().port()));
        let setup = Setup { base_url, folder: Some(folder), ..Setup::default() };
        let setup = setup.set("upstream.ca_file", "ca.pem").set("upstream.proxy", proxy.url());
        let gateway = start_with(&plain, with_login(setup, PROXY_PASSWORD));
        assert_eq!(gateway.call().json()["cause"], "tls_name");
        wait_for("its line", || gateway.log().contains(told).then_some(()));
        let status = gateway.admin("/status").body;
        for text in [&status, &gateway.log()] {
            assert!(text.contains(told) && !text.contains(PROXY_PASSWORD), "{text}");
        }
    }
}

/// A relay in front of the sandbox that asks for a certificate of this CA.
pub(crate) fn guard(ca: &Ca, upstream: SocketAddr) -> SocketAddr {
    let server = ca.issue(SERVER);
    let mut roots = RootCertStore::empty();
    roots.add(ca.0.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let chain = CertificateDer::pem_slice_iter(server.certificate.as_bytes()).map(Result::unwrap);
    let key = PrivateKeyDer::from_pem_slice(server.key.as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(clients.build().unwrap())
        .with_single_cert(chain.collect(), key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        Builder::new_current_thread().enable_all().build().unwrap().block_on(async move {
            let listener = net::TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut upstream = net::TcpStream::connect(upstream).await.unwrap();
                    let _ = copy_bidirectional(&mut stream, &mut upstream).await;
                });
            }
        });
    });
    address
}

#[test]
fn client_certificate_is_sent_to_the_upstream_and_reloaded() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let address = guard(&ca, sandbox.address());
    let folder = Arc::new(TempDir::new().unwrap());
    fs::write(folder.path().join("ca.pem"), ca.0.pem()).unwrap();
    let place = |identity: &crate::callers::Identity| {
        swap(&folder, "client.key", &identity.key);
        swap(&folder, "client.pem", &identity.certificate);
    };
    let setup = || Setup {
        base_url: Some(format!("https://localhost:{}", address.port())),
        folder: Some(folder.clone()),
        ..Setup::default()
    };
    let setup = || setup().set("upstream.ca_file", "ca.pem").set("upstream.idle_timeout", "10ms");
    // By TLS 1.3 a client may speak before the server has looked at its certificate, so that this looks as if the
    // request had arrived.
    assert_eq!(start_with(&sandbox, setup()).call().outcome(), "unknown", "none");

    let with_identity = || {
        setup().set("upstream.client_cert_file", "client.pem").set("upstream.client_key_file", "client.key")
    };
    place(&Ca::new().issue(CALLER));
    let gateway = start_with(&sandbox, with_identity());
    assert_eq!(gateway.call().outcome(), "unknown", "of another CA");
    assert_eq!(sandbox.requests().len(), 0);
    place(&ca.issue(CALLER));
    // The key and the certificate may be seen one after the other.
    wait_for("a connection", || {
        thread::sleep(Duration::from_millis(100));
        (gateway.call().outcome() == "succeeded").then_some(())
    });
    assert_eq!(sandbox.requests().len(), 1);
    // An event is on record some time after what it tells of.
    let changes = wait_for("the event", || {
        let mut changes = records(&gateway.audit_directory(), "event");
        changes.retain(|event| event["event"] == "certificate_change");
        changes.last().is_some_and(|last| last["result"] == "accepted").then_some(changes.len())
    });
    swap(&folder, "client.pem", "rubbish");
    assert_eq!(change(&gateway, changes + 1), "refused");
    thread::sleep(Duration::from_millis(20)); // beyond idle_timeout: the next one is a new connection
    assert_eq!(gateway.call().outcome(), "succeeded", "the old one stays in use");
}

#[test]
fn changed_dns_address_is_adopted_and_a_lost_one_stays_in_use() {
    let name = "ccsqm.example";
    let (ca, tls) = crate::exchange::certificate(name, false);
    let options = ccsqm_gateway::sandbox::Options { tls: Some(tls), ..Default::default() };
    let sandbox = Sandbox::start(options).unwrap();
    let folder = Arc::new(TempDir::new().unwrap());
    let hosts = folder.path().join("hosts");
    fs::write(folder.path().join("ca.pem"), ca).unwrap();
    fs::write(&hosts, format!("127.0.0.1 {name}\n")).unwrap();
    let mount = format!("mount --bind {} /etc/hosts && exec \"$@\"", hosts.display());
    let through = ["unshare", "--mount", "sh", "-c", &mount, "sh"].map(str::to_owned).into();
    let url = format!("https://{name}:{}", sandbox.address().port());
    let setup = Setup {
        base_url: Some(url.clone()),
        token_url: Some(format!("{url}/apigovernance/api/oauth/tokenByAkSk")),
        folder: Some(folder),
        through,
        ..Setup::default()
    };
    let setup = setup.set("upstream.ca_file", "ca.pem").set("upstream.idle_timeout", "10ms");
    let gateway = start_with(&sandbox, setup);
    let outcome = || {
        thread::sleep(Duration::from_millis(20)); // beyond idle_timeout: each is a new connection
        gateway.call().outcome().to_owned()
    };
    assert_eq!(outcome(), "succeeded");
    fs::write(&hosts, "").unwrap();
    let begin = std::time::Instant::now();
    while begin.elapsed() < Duration::from_secs(7) {
        assert_eq!(outcome(), "succeeded", "no answer of the resolver");
    }
    assert!(gateway.log().contains("its last addresses are used"), "the control");
    fs::write(&hosts, format!("127.0.0.2 {name}\n")).unwrap(); // nobody is there
    wait_for("the new address", || (outcome() == "not_sent").then_some(()));
    fs::write(&hosts, format!("127.0.0.1 {name}\n")).unwrap();
    wait_for("the old address", || (outcome() == "succeeded").then_some(()));
}

#[test]
fn root_removed_from_ca_file_is_no_longer_trusted() {
    let (sandbox, setup) = secure_sandbox();
    let folder = setup.folder.clone().unwrap();
    let own = fs::read_to_string(folder.path().join("ca.pem")).unwrap();
    let (other, _) = crate::exchange::certificate("localhost", false);
    // One worker: each has connections of its own.
    let gateway = start_with(&sandbox, setup.set("upstream.idle_timeout", "1h").set("server.workers", 1));
    assert_eq!(gateway.call().outcome(), "succeeded");
    let open = || sandbox.connections().open;
    // The one that brought the token closes by itself. The control: the other is kept for the next call.
    wait_for("the end of the token's connection", || (open() == 1).then_some(()));

    swap(&folder, "ca.pem", "rubbish");
    assert_eq!(change(&gateway, 1), "refused");
    assert_eq!(gateway.call().outcome(), "succeeded", "the old ones stay in use");
    assert_eq!(open(), 1);
    swap(&folder, "ca.pem", &(other.clone() + &own));
    assert_eq!(change(&gateway, 2), "accepted");
    assert_eq!(gateway.call().outcome(), "succeeded", "one more");

    swap(&folder, "ca.pem", &other);
    assert_eq!(change(&gateway, 3), "accepted");
    let (sent, bytes) = (sandbox.requests().len(), sandbox.connections().application_bytes);
    let reply = gateway.call_once();
    assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"), "{reply:?}");
    wait_for("the end of what was open", || (open() == 0).then_some(()));
    // The token endpoint has the same roots: a secret that changed is tried there.
    let tokens = sandbox.token_calls().len();
    swap(&folder, "app_secret", "another-secret");
    wait_for("a trial", || gateway.log().contains("invalid peer certificate").then_some(()));
    assert_eq!((sandbox.requests().len(), sandbox.token_calls().len()), (sent, tokens));
    assert_eq!(sandbox.connections().application_bytes, bytes, "nothing is sent");

    swap(&folder, "ca.pem", &own);
    assert_eq!(change(&gateway, 4), "accepted");
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
}

#[test]
fn world_writable_roots_are_not_reloaded() {
    let (sandbox, setup) = secure_sandbox();
    let (other, _) = crate::exchange::certificate("localhost", false);
    let path = setup.folder.as_ref().unwrap().path().join("ca.pem");
    // One worker: each has connections of its own.
    let gateway = start_with(&sandbox, setup.set("upstream.idle_timeout", "1h").set("server.workers", 1));
    assert_eq!(gateway.call().outcome(), "succeeded");
    let accepted = sandbox.connections().accepted;
    let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o646);
    fs::write(&path, &other).unwrap();
    assert_eq!(change(&gateway, 1), "refused");
    let told =
        "every user can change it (mode 0646), so everyone could decide who gets the credential: chmod o-w ";
    wait_for(told, || gateway.log().contains(told).then_some(()));
    assert_eq!(gateway.call().outcome(), "succeeded", "the old ones stay in use");
    assert_eq!(sandbox.connections().accepted, accepted, "so does the connection");
    // The control: the same content, which its owner alone can change.
    mode(0o644);
    assert_eq!(change(&gateway, 2), "accepted");
    let reply = gateway.call_once();
    assert_eq!((reply.code(), reply.outcome()), ("upstream_unreachable", "not_sent"), "{reply:?}");
}

/// A relay that holds new connections while it is shut.
pub(crate) struct Gate {
    /// The server's, but leading here.
    pub(crate) url: String,
    state: Arc<GateState>,
}

/// Whether it is shut, and how many wait at it.
type GateState = (Mutex<(bool, usize)>, Condvar);

impl Gate {
    /// An open one before the server of a URL.
    pub(crate) fn before(url: &str) -> Self {
        let port = url.rsplit(':').next().and_then(|rest| rest.split('/').next()).unwrap();
        let server = SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap().port();
        let state = Arc::<GateState>::default();
        let held = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = held.clone();
                thread::spawn(move || relay(&stream, server, &state));
            }
        });
        Self { url: url.replace(&format!(":{port}"), &format!(":{own}")), state }
    }

    pub(crate) fn shut(&self) {
        self.state.0.lock().unwrap().0 = true;
    }

    pub(crate) fn open(&self) {
        *self.state.0.lock().unwrap() = (false, 0);
        self.state.1.notify_all();
    }

    pub(crate) fn wait_for_somebody(&self) {
        wait_for("somebody at the gate", || (self.state.0.lock().unwrap().1 > 0).then_some(()));
    }
}

fn relay(stream: &TcpStream, server: SocketAddr, (gate, opened): &GateState) -> Option<()> {
    let mut found = gate.lock().unwrap();
    found.1 += usize::from(found.0);
    drop(opened.wait_while(found, |found| found.0).unwrap());
    let server = TcpStream::connect(server).ok()?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::copy(&mut &*stream, &mut &server);
            let _ = server.shutdown(Shutdown::Write);
        });
        let _ = std::io::copy(&mut &server, &mut &*stream);
        let _ = stream.shutdown(Shutdown::Write);
    });
    Some(())
}

/// What may happen to `ca_file` while something waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Roots {
    /// Nothing: the control.
    Stay,
    /// Another root comes before the one that is there.
    Grow,
    /// Another root takes the place of the one that is there.
    Change,
}

impl Roots {
    pub(crate) const ALL: [Self; 3] = [Self::Stay, Self::Grow, Self::Change];

    /// Does it, and waits until it is taken.
    pub(crate) fn happen(self, gateway: &Gateway, name: &str) {
        let (other, _) = crate::exchange::certificate("localhost", false);
        let own = fs::read_to_string(gateway.folder.path().join(name)).unwrap();
        let roots = match self {
            Self::Stay => return,
            Self::Grow => other + &own,
            Self::Change => other,
        };
        swap(&gateway.folder, name, &roots);
        assert_eq!(change(gateway, 1), "accepted");
    }
}

/// Calls, and lets this happen while the call waits at the gate. Returns its answer, and how many bytes the upstream had by then.
fn call_while(roots: Roots, gateway: &Gateway, secure: &Sandbox, gate: &Gate) -> (Reply, u64) {
    thread::scope(|scope| {
        let reply = scope.spawn(|| gateway.call());
        gate.wait_for_somebody();
        let bytes = secure.connections().application_bytes;
        roots.happen(gateway, "ca.pem");
        gate.open();
        (reply.join().unwrap(), bytes)
    })
}

#[test]
fn changed_roots_keep_a_new_token_off_the_old_connection() {
    for roots in Roots::ALL {
        let (secure, setup) = secure_sandbox();
        script(&secure, Faults::business([Fault::status(401).times(1), Fault::body(SUCCESS)]));
        // Tokens come from where no roots are asked for.
        let tokens = sandbox();
        let gate = Gate::before(&tokens.token_url());
        let setup = Setup { token_url: Some(gate.url.clone()), ..setup };
        let gateway = start_with(&secure, setup.set("token.timeout", "30s"));
        wait_for("the first token", || (tokens.token_calls().len() == 1).then_some(()));
        gate.shut();
        let (reply, bytes) = call_while(roots, &gateway, &secure, &gate);
        let connections: Vec<_> = secure.requests().iter().map(|request| request.connection).collect();
        match roots {
            Roots::Stay => assert_eq!((reply.outcome(), &connections[..]), ("succeeded", &[1, 1][..])),
            Roots::Grow => assert_eq!((reply.outcome(), &connections[..]), ("succeeded", &[1, 2][..])),
            Roots::Change => {
                assert_eq!((reply.code(), reply.outcome()), ("token_unavailable", "refused"), "{reply:?}");
                assert_eq!((secure.connections().application_bytes, connections.len()), (bytes, 1));
            }
        }
        assert_eq!(tokens.token_calls().len(), 2, "{roots:?}: there was a fresh token");
    }
}

#[test]
fn changed_roots_restart_a_connection_attempt_in_progress() {
    for (roots, to_tokens) in Roots::ALL.into_iter().flat_map(|roots| [(roots, false), (roots, true)]) {
        let (secure, setup) = secure_sandbox();
        let server = if to_tokens { &setup.token_url } else { &setup.base_url };
        let gate = Gate::before(server.as_ref().unwrap());
        gate.shut();
        let setup = match to_tokens {
            true => Setup { token_url: Some(gate.url.clone()), ..setup },
            false => Setup { base_url: Some(gate.url.clone()), ..setup },
        };
        // Where no token will come, nobody waits for one.
        let wait = if to_tokens && roots == Roots::Change { "0s" } else { "1m" };
        let setup = setup.set("token.timeout", "30s").set("token.wait", wait);
        let gateway = start_with(&secure, setup.set("upstream.connect_timeout", "30s"));
        let (reply, bytes) = call_while(roots, &gateway, &secure, &gate);
        let case = format!("{roots:?} {to_tokens} {reply:?} {:?}", secure.connections());
        if roots == Roots::Change {
            if to_tokens {
                let is_told = || gateway.log().contains("invalid peer certificate").then_some(());
                wait_for("a handshake under the new root", is_told);
            }
            assert_eq!(reply.outcome(), "not_sent", "{case}");
            assert_eq!(reply.code() == "upstream_unreachable", !to_tokens, "{case}");
            assert_eq!(secure.connections().application_bytes, bytes, "{case}");
        } else {
            assert_eq!(reply.outcome(), "succeeded", "{case}");
            assert_eq!(secure.connections().accepted, 2 + u64::from(roots == Roots::Grow), "{case}");
        }
    }
}
