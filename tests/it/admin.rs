//! The admin listener and the control socket, beside peers that only hold connections.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use crate::support::*;

/// As many connections as the admin listener holds.
const ALL: usize = 64;

/// So long a probe may take.
const SOON: Duration = Duration::from_secs(1);

/// A deadline of the admin listener, and what a busy machine adds to it.
const DEADLINE: Duration = Duration::from_secs(3);
const LATE: Duration = Duration::from_secs(20);

fn ask(admin: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(admin)?;
    stream.set_read_timeout(Some(SOON))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {admin}\r\n\r\n")?;
    let mut head = [0; 15];
    stream.read_exact(&mut head)?;
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Probes on new connections are all answered, soon.
fn assert_probes_pass(admin: SocketAddr, what: &str) {
    for round in 0..10 {
        for path in ["/livez", "/readyz"] {
            let begin = Instant::now();
            let answer = ask(admin, path);
            let took = begin.elapsed();
            assert!(
                answer.as_ref().is_ok_and(|head| head == "HTTP/1.1 200 OK") && took < SOON,
                "{what}, round {round}, {path}: {answer:?} after {took:?}"
            );
        }
    }
}

fn ready(sandbox: &ccsqm_gateway::sandbox::Sandbox) -> Gateway {
    let gateway = start(sandbox);
    wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
    gateway
}

#[test]
fn held_admin_connections_do_not_block_probes() {
    let sandbox = sandbox();
    let gateway = ready(&sandbox);
    let admin = gateway.admin;
    assert_probes_pass(admin, "the control");
    let connect = || (0..ALL).map(|_| TcpStream::connect(admin).unwrap()).collect::<Vec<_>>();

    let silent = connect();
    assert_probes_pass(admin, "silent");
    drop(silent);

    // A head that never ends, a byte at a time.
    let (stop, sent) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut slow = connect();
            for stream in &mut slow {
                let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nx: ");
            }
            while !stop.load(Ordering::Relaxed) {
                for stream in &mut slow {
                    if stream.write_all(b"x").is_err() {
                        *stream = TcpStream::connect(admin).unwrap();
                        let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nx: ");
                    }
                }
                sent.store(true, Ordering::Relaxed);
            }
        });
        wait_for("slow heads", || sent.load(Ordering::Relaxed).then_some(()));
        let probes = std::panic::catch_unwind(|| assert_probes_pass(admin, "a byte at a time"));
        stop.store(true, Ordering::Relaxed);
        probes.unwrap();
    });

    // So many requests that their answers fill every buffer, if they are answered.
    let requests = "GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(2000);
    let deaf: Vec<_> = connect()
        .into_iter()
        .map(|mut stream| {
            stream.set_nonblocking(true).unwrap();
            let _ = stream.write(requests.as_bytes());
            stream
        })
        .collect();
    assert_probes_pass(admin, "who reads no answer");
    drop(deaf);
}

#[test]
fn longest_idle_admin_connection_is_closed_for_a_new_one() {
    let sandbox = sandbox();
    let gateway = ready(&sandbox);
    // One that was used would be younger by that; here only the age tells them apart.
    let mut all: Vec<_> = (0..ALL).map(|_| TcpStream::connect(gateway.admin).unwrap()).collect();
    let newer = TcpStream::connect(gateway.admin).unwrap();
    let mut oldest = all.remove(0);
    oldest.set_read_timeout(Some(DEADLINE / 2)).unwrap();
    let end = oldest.read(&mut [0; 1]);
    assert!(!matches!(&end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock), "{end:?}");
    // The control: nobody else had to go.
    assert!(!all.iter().chain([&newer]).any(is_readable));
    for mut stream in all.into_iter().chain([newer]) {
        write!(stream, "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        assert_eq!(read_reply(&mut stream).status, 200);
    }
}

#[test]
fn incomplete_admin_request_is_closed_after_three_seconds() {
    let sandbox = sandbox();
    let gateway = ready(&sandbox);
    for (part, bytes) in [("nothing", ""), ("half a head", "GET /livez HTTP/1.1\r\nhost: loc")] {
        let begin = Instant::now();
        let mut stream = TcpStream::connect(gateway.admin).unwrap();
        stream.write_all(bytes.as_bytes()).unwrap();
        stream.set_read_timeout(Some(LATE)).unwrap();
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        assert!(
            !matches!(&end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
            "{part}: {end:?}"
        );
        let took = begin.elapsed();
        assert!(took > DEADLINE - SOON && took < LATE, "{part}: {took:?}");
        assert!(!String::from_utf8_lossy(&rest).contains("200 OK"), "{part}");
    }
}

#[test]
fn admin_connection_carries_one_request() {
    let sandbox = sandbox();
    let gateway = ready(&sandbox);
    let mut stream = TcpStream::connect(gateway.admin).unwrap();
    let request = "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";
    stream.write_all(request.repeat(3).as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 1, "{text}");
    assert!(text.to_ascii_lowercase().contains("connection: close"), "{text}");
    // A caller that ends its side first is answered all the same.
    let mut stream = TcpStream::connect(gateway.admin).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_reply(&mut stream).status, 200);
}

#[test]
fn held_control_connections_do_not_block_commands() {
    let sandbox = sandbox();
    let gateway = ready(&sandbox);
    let audit = gateway.audit_directory();
    let accept = || {
        let (code, told, error) = command(&["audit", "accept-clock", audit.to_str().unwrap(), "--json"]);
        assert_eq!(code, 0, "{told}{error}");
        assert_eq!(serde_json::from_str::<Value>(&told).unwrap()["ok"], true, "{told}");
    };
    let socket = audit.join("control.sock");
    wait_for("the socket", || socket.exists().then_some(()));
    accept();
    let _silent: Vec<_> = (0..16).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let begin = Instant::now();
    accept();
    assert!(begin.elapsed() < DEADLINE, "{:?}", begin.elapsed());
    // Who has asked and reads no answer.
    let _deaf: Vec<_> = (0..16)
        .map(|_| {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.write_all(b"{\"do\":\"accept-clock\"}\n").unwrap();
            stream
        })
        .collect();
    accept();
}

#[test]
fn admin_client_that_reads_nothing_is_closed_after_three_seconds() {
    let sandbox = sandbox();
    // So many that what `/status` says of them fits in no buffer.
    let routes: String = (0..1000)
        .map(|number| {
            format!(
                "[[routes]]\nname = \"r{number}\"\npath = \"/apiaccess/{}{number}\"\ncontract_file = \"contract.json\"\n\
                 success_codes = [\"0\"]\n",
                "x".repeat(100)
            )
        })
        .collect();
    let folder = Arc::new(TempDir::new().unwrap());
    fs::write(folder.path().join("contract.json"), r#"{ "type": "string" }"#).unwrap();
    let gateway = start_with(&sandbox, Setup { caller: routes, folder: Some(folder), ..Setup::default() });
    wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
    let whole = gateway.admin("/status").body.len();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(1).unwrap();
    socket.set_tcp_mss(536).unwrap(); // the sender's buffer is made for so many segments
    socket.connect(&gateway.admin.into()).unwrap();
    let mut stream = TcpStream::from(socket);
    let begin = Instant::now();
    write!(stream, "GET /status HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    wait_for("the answer", || is_readable(&stream).then_some(()));
    // The gateway's end of the connection. It stays in the kernel, with what was not taken, but is nobody's file then.
    let port = stream.local_addr().unwrap().port();
    let is_held = || {
        let connections = fs::read_to_string("/proc/net/tcp").unwrap();
        connections.lines().any(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            words[2].ends_with(&format!(":{port:04X}")) && words[9] != "0"
        })
    };
    assert!(is_held(), "the control");
    wait_for("the end of the connection", || (!is_held()).then_some(()));
    let took = begin.elapsed();
    assert!(took > DEADLINE - SOON && took < LATE, "{took:?}");
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < whole, "the control: it was not all sent: {} of {whole}", rest.len());
}

/// An answer of the admin listener to a head.
fn answer(gateway: &Gateway, head: &str) -> Reply {
    let mut stream = TcpStream::connect(gateway.admin).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    read_reply(&mut stream)
}

#[test]
fn admin_listener_accepts_only_its_own_host_names() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("admin.hosts", "ops.example.com"));
    wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
    let status = |path: &str, host: &str| {
        let reply = answer(&gateway, &format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n"));
        assert!(
            reply.status != 421 || reply.body.contains("`[admin] hosts`"),
            "{path} {host}: {}",
            reply.body
        );
        reply.status
    };
    let paths = ["/livez", "/readyz", "/metrics", "/nowhere"];
    let found = |path| if path == "/nowhere" { 404 } else { 200 };
    for host in [
        "127.0.0.1",
        "10.1.2.3:9090",
        "[::1]",
        "[fd00::1]:9090",
        "localhost",
        "LocalHost:9090",
        "localhost.",
        "gateway",
        "gateway:9090",
        "ccsqm-gateway_1",
        "gateway.qa.svc",
        "gateway.qa.svc.cluster.local.:9090",
        "GATEWAY.qa.svc.CLUSTER.local",
        "gateway.internal",
        "printer.local",
        "ops.example.com",
        "OPS.example.com:1",
    ] {
        for path in paths {
            assert_eq!(status(path, host), found(path), "{path} {host}");
        }
    }
    for host in [
        "evil.example",
        "evil.example:9090",
        "example.com",
        "x.ops.example.com",
        "ops.example.com.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "localhost.evil.example",
        "svc.evil.example",
        "evilsvc.example",
        "notinternal.com",
        ".internal",
        "..svc",
        "a..svc",
        "ai.",
        "256.1.1.1",
        "1.2.3",
        "::1",
        "[::1",
        "[evil]",
        "localhost:80:80",
        "localhost:x",
        "evil example",
        "a\u{e9}.internal",
        ":9090",
    ] {
        for path in paths.into_iter().chain(["/status"]) {
            assert_eq!(status(path, host), 421, "{path} {host}");
        }
    }
    // What names routes and callers takes fewer.
    for (host, expected) in [
        ("localhost", 200),
        ("127.0.0.1:9090", 200),
        ("[::1]", 200),
        ("ops.example.com", 200),
        ("10.1.2.3", 421),
        ("gateway", 421),
        ("gateway.qa.svc", 421),
    ] {
        assert_eq!(status("/status", host), expected, "{host}");
    }
    // A browser always sends Host; other probes may not.
    for (path, expected) in
        [("/livez", 200), ("/readyz", 200), ("/metrics", 421), ("/status", 421), ("/nowhere", 421)]
    {
        for head in ["HTTP/1.0\r\n\r\n", "HTTP/1.1\r\nhost:\r\n\r\n"] {
            let reply = answer(&gateway, &format!("GET {path} {head}"));
            assert_eq!(reply.status, expected, "{path} {head}");
        }
    }
    // Of several names none may be foreign, wherever they stand; and it is no matter of the method.
    for (head, expected) in [
        ("GET /livez HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n", 200),
        ("GET /livez HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n", 421),
        ("GET http://localhost/livez HTTP/1.1\r\nhost: localhost\r\n", 200),
        ("GET http://evil.example/livez HTTP/1.1\r\nhost: localhost\r\n", 421),
        ("GET http://localhost/livez HTTP/1.1\r\nhost: evil.example\r\n", 421),
        ("POST /livez HTTP/1.1\r\nhost: localhost\r\n", 405),
        ("POST /livez HTTP/1.1\r\nhost: evil.example\r\n", 421),
    ] {
        assert_eq!(answer(&gateway, &format!("{head}\r\n")).status, expected, "{head}");
    }
}

/// The kernel drops what finds no place among them, and the peer tries again only a second later.
#[test]
fn admin_listener_backlog_holds_a_burst_of_connections() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let connect = |address| {
        let connect = |_| TcpStream::connect_timeout(&address, Duration::from_millis(900)).ok();
        (0..400).map_while(connect).collect::<Vec<_>>()
    };
    gateway.signal("-STOP");
    let burst = connect(gateway.admin);
    gateway.signal("-CONT");
    assert_eq!(burst.len(), 400);
    assert_eq!(gateway.admin("/livez").status, 200);
    let usual = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(connect(usual.local_addr().unwrap()).len() < 400, "the control: a queue as the library makes it");
}
