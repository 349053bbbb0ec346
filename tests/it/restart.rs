//! Stops and starts under load: who connects meanwhile waits, or is told in time.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::net::UnixDatagram,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults, Sandbox};
use tempfile::TempDir;

use crate::support::*;

/// A folder with a gateway's configuration, and a socket at its listener's address.
fn activated(sandbox: &Sandbox) -> (Arc<TempDir>, TcpListener) {
    let folder = Arc::new(TempDir::new().unwrap());
    drop(start_with(sandbox, Setup { folder: Some(folder.clone()), ..Setup::default() }));
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = folder.path().join("gateway.toml");
    let text = fs::read_to_string(&config).unwrap();
    let address = format!("address = \"{}\"", socket.local_addr().unwrap());
    fs::write(&config, text.replacen("address = \"127.0.0.1:0\"", &address, 1)).unwrap();
    (folder, socket)
}

/// A task of its own.
fn body(number: u64) -> String {
    BODY.replace("954645333549048833", &number.to_string())
}

fn tasks(sandbox: &Sandbox) -> Vec<String> {
    let mut tasks: Vec<_> = sandbox
        .requests()
        .iter()
        .map(|request| String::from_utf8_lossy(&request.body).into_owned())
        .collect();
    tasks.sort();
    tasks
}

#[test]
fn twenty_restarts_under_load_fail_no_request_on_a_new_connection() {
    let sandbox = sandbox();
    let (folder, socket) = activated(&sandbox);
    let address = socket.local_addr().unwrap();
    let (stop, next) = (AtomicBool::new(false), AtomicU64::new(1));
    let call = || {
        let body = body(next.fetch_add(1, Ordering::Relaxed));
        let mut stream = TcpStream::connect(address).unwrap();
        std::io::Write::write_all(&mut stream, (head(body.len(), "") + &body).as_bytes()).unwrap();
        let reply = read_reply(&mut stream);
        assert_eq!(reply.outcome(), "succeeded", "{reply:?}");
    };
    let mut gateway = serve_on(&folder, &socket);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    call();
                }
            });
        }
        for _ in 0..20 {
            let before = next.load(Ordering::Relaxed);
            wait_for("some calls", || (next.load(Ordering::Relaxed) > before + 20).then_some(()));
            gateway.signal("-TERM");
            assert!(gateway.wait().success());
            gateway = serve_on(&folder, &socket);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let sent = usize::try_from(next.into_inner()).unwrap() - 1;
    assert!(sent > 400, "{sent}");
    let tasks = tasks(&sandbox);
    assert_eq!(tasks.len(), sent);
    assert!(tasks.windows(2).all(|two| two[0] != two[1]), "none twice");
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let audit = gateway.audit_directory();
    assert_eq!(command(&["audit", "in-doubt", audit.to_str().unwrap()]).0, 0);
    assert_eq!(records(&audit, "outcome").len(), sent);
}

#[test]
fn requests_in_flight_finish_before_the_next_process_takes_over() {
    let sandbox = sandbox();
    let (folder, socket) = activated(&sandbox);
    let mut gateway = serve_on(&folder, &socket);
    script(&sandbox, Faults::business(Fault::delayed(700).times(1)));
    thread::scope(|scope| {
        let slow = scope.spawn(|| gateway.call());
        wait_for("the slow one", || (sandbox.requests().len() == 1).then_some(()));
        gateway.signal("-TERM");
        wait_for("the stop", || gateway.log().contains("shutdown started").then_some(()));
        let waits = scope.spawn(|| gateway.call());
        assert_eq!(slow.join().unwrap().outcome(), "succeeded");
        wait_for("the end", || gateway.has_ended().then_some(()));
        assert_eq!(sandbox.requests().len(), 1, "who connects meanwhile waits in the socket");
        let _next = serve_on(&folder, &socket);
        assert_eq!(waits.join().unwrap().outcome(), "succeeded");
    });
    assert!(gateway.wait().success());
    assert_eq!(sandbox.requests().len(), 2);
}

#[test]
fn unused_inherited_socket_fails_the_start() {
    let sandbox = sandbox();
    let (folder, _) = activated(&sandbox);
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = inheriting(&folder, &other).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    let address = other.local_addr().unwrap().to_string();
    assert!(
        !output.status.success() && error.contains(&address) && error.contains("[[listeners]]"),
        "{error}"
    );
}

#[test]
fn drain_grace_serves_callers_while_readiness_fails() {
    let sandbox = sandbox();
    let mut gateway = start_with(&sandbox, Setup::default().set("server.drain_grace", "1500ms"));
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!(gateway.admin("/readyz").status, 200, "the control");
    let keep = head(BODY.len(), "").replace("connection: close\r\n", "");
    gateway.signal("-TERM");
    let begin = Instant::now();
    wait_for("the stop", || gateway.log().contains("shutdown started").then_some(()));
    assert_eq!(gateway.admin("/readyz").status, 503);
    assert_eq!(gateway.admin("/livez").status, 200);
    let reply = gateway.send(&keep, BODY); // returns when the connection is closed
    assert_eq!((reply.outcome(), reply.headers["connection"].as_str()), ("succeeded", "close"));
    assert!(gateway.wait().success());
    assert!(begin.elapsed() > Duration::from_millis(1400) && begin.elapsed() < Duration::from_secs(7));
    assert!(TcpStream::connect(gateway.address).is_err());
    assert_eq!(sandbox.requests().len(), 2);
}

#[test]
fn systemd_is_notified_of_readiness_watchdog_and_stop() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let path = folder.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    systemd.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let hear = || {
        let mut message = [0; 256];
        let length = systemd.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).trim().to_owned()
    };
    let through = ["env", &format!("NOTIFY_SOCKET={}", path.display()), "WATCHDOG_USEC=800000"];
    let setup =
        Setup { folder: Some(folder), through: through.map(str::to_owned).into(), ..Setup::default() };
    let mut gateway = start_with(&sandbox, setup);
    assert_eq!(hear(), "READY=1");
    assert_eq!(gateway.call().outcome(), "succeeded", "ready means that it serves");
    for _ in 0..5 {
        assert_eq!(hear(), "WATCHDOG=1");
    }
    gateway.signal("-STOP"); // a process that hangs is not heard of
    systemd.set_nonblocking(true).unwrap();
    while systemd.recv(&mut [0; 256]).is_ok() {}
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1600) {
        assert!(systemd.recv(&mut [0; 256]).is_err());
        thread::sleep(Duration::from_millis(20)); // looking, not waiting for something
    }
    systemd.set_nonblocking(false).unwrap();
    gateway.signal("-CONT");
    assert_eq!(hear(), "WATCHDOG=1");
    gateway.signal("-TERM");
    wait_for("the stop", || (hear() == "STOPPING=1").then_some(()));
    assert!(gateway.wait().success());
}
