//! Thousands of silent connections of those who are no callers: a caller does not notice.

use std::{
    collections::VecDeque,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use crate::{
    audit::connect_from,
    callers::{CALLER, Ca, caller, start_with_certificates, unix_listener},
    support::*,
};

const SILENT: usize = 5000;

/// Opens connections that send nothing, opens a thousand a second anew of those that are closed, and holds them until it
/// is killed.
const OPENER: &str = r#"
import ipaddress, select, socket, sys, time
kind, target, first, count, addresses = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
def connect(number):
    if kind == "unix":
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(target)
    else:
        stream = socket.socket()
        stream.bind((str(ipaddress.ip_address(first) + number % addresses), 0))
        stream.connect(("127.0.0.1", int(target)))
    return stream
poll = select.epoll()
open_ones = {}
opened = 0
def add():
    global opened
    stream = connect(opened)
    opened += 1
    open_ones[stream.fileno()] = stream
    poll.register(stream, select.EPOLLIN)
for _ in range(count):
    add()
print("ready", flush=True)
while True:
    time.sleep(0.05)
    for number, _ in poll.poll(0)[:50]:
        poll.unregister(number)
        open_ones.pop(number).close()
        add()
"#;

/// A process that holds silent connections. Killed on drop.
struct Silent(Child);

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn silent(uid: u32, arguments: [&str; 5]) -> Silent {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let mut child = Command::new("setpriv")
        .args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"])
        .args(["/usr/bin/python3", "-c", OPENER])
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    Silent(child)
}

/// A good caller's calls, of which each passes.
fn good_calls(what: &str, call: impl Fn() -> Reply + Sync) {
    thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                for number in 0..30 {
                    // A caller's own limit is not the matter here.
                    let reply = wait_for("a call within its limit", || {
                        Some(in_time(&call)).filter(|reply| reply.code() != "rate_limited")
                    });
                    assert_eq!(reply.outcome(), "succeeded", "{what}, call {number}: {reply:?}");
                }
            });
        }
    });
}

fn metric(gateway: &Gateway, line: &str) -> u64 {
    let metrics = gateway.admin("/metrics").body;
    let value = metrics.lines().find_map(|text| text.strip_prefix(&format!("ccsqm_gateway_{line} ")));
    value.map_or(0, |value| value.parse().unwrap())
}

#[test]
fn silent_unknown_peers_over_tcp_block_no_caller() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup { peer: "127.0.0.1/32", ..Setup::default() });
    let port = gateway.address.port().to_string();
    // All callers are behind one address, and hold more connections than all strangers may.
    let kept: Vec<_> = (0..400).map(|_| TcpStream::connect(gateway.address).unwrap()).collect();
    wait_for("the callers", || (metric(&gateway, "connections") >= 400).then_some(()));
    for addresses in ["1", "1000"] {
        let before = metric(&gateway, "connections_closed_total{reason=\"too_many_strangers\"}");
        let silent = silent(0, ["tcp", &port, "127.8.0.1", &SILENT.to_string(), addresses]);
        good_calls(&format!("strangers from {addresses} addresses"), || gateway.call_once());
        let open = metric(&gateway, "connections");
        let share = if addresses == "1" { 64 } else { 256 };
        assert!(open <= 400 + share + 5, "{open} connections");
        let closed = metric(&gateway, "connections_closed_total{reason=\"too_many_strangers\"}") - before;
        assert!(closed > 4000, "{closed} connections of strangers were closed");
        drop(silent);
        wait_for("their end", || (metric(&gateway, "connections") <= 400 + 5).then_some(()));
    }
    for mut stream in kept.into_iter().take(5) {
        write!(stream, "{}{BODY}", head(BODY.len(), "")).unwrap();
        assert_eq!(read_reply(&mut stream).outcome(), "succeeded", "callers keep their connections");
    }
}

#[test]
fn silent_unknown_peers_on_a_unix_socket_block_no_caller() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = folder.path().join("gateway.sock");
    let caller =
        unix_listener(&socket) + &caller("by-uid", "uid:0", "rate_limit = \"1000000/s\"\nburst = 1000000");
    let gateway = start_with(&sandbox, Setup { caller, folder: Some(folder), ..Setup::default() });
    let _silent = silent(4242, ["unix", socket.to_str().unwrap(), "-", &SILENT.to_string(), "1"]);
    good_calls("strangers over a Unix socket", || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        write!(stream, "{}{BODY}", head(BODY.len(), "")).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        parse_reply(&text)
    });
    let closed = metric(&gateway, "connections_closed_total{reason=\"too_many_strangers\"}");
    assert!(closed > 4000, "{closed} connections of strangers were closed");
}

/// Over the cap, who is told so: strangers leave callers a part of the places for that.
#[test]
fn unknown_peers_leave_callers_room_for_overload_replies() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let sandbox = sandbox();
    let setup = Setup { peer: "127.0.0.1/32", ..Setup::default() };
    // Of so many connections strangers get 64.
    let setup = setup.set("server.max_connections", 1024).set("server.header_timeout", "5m");
    let gateway = start_with(&sandbox, setup);
    let kept: Vec<_> = (0..1024).map(|_| TcpStream::connect(gateway.address).unwrap()).collect();
    wait_for("the callers", || (metric(&gateway, "connections") >= 1024).then_some(()));
    assert_eq!(gateway.call_once().code(), "overloaded", "the control");
    let is_over = AtomicBool::new(false);
    let opened = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            // A silent one is closed after a second: the oldest are opened anew all the time.
            let mut strangers = VecDeque::new();
            while !is_over.load(Ordering::Relaxed) {
                let number = opened.fetch_add(1, Ordering::Relaxed);
                strangers
                    .push_back(connect_from(Ipv4Addr::new(127, 1, 0, number as u8 % 8), gateway.address));
                if strangers.len() > 400 {
                    strangers.pop_front();
                }
            }
        });
        wait_for("a flood", || (opened.load(Ordering::Relaxed) > 1000).then_some(()));
        let told: Vec<_> = (0..50).map(|_| gateway.call_once().code().to_owned()).collect();
        is_over.store(true, Ordering::Relaxed);
        assert!(told.iter().all(|code| code == "overloaded"), "{told:?}");
    });
    let closed = metric(&gateway, "connections_closed_total{reason=\"overloaded\"}");
    assert!(closed > 100, "strangers had their part: {closed}");
    drop(kept);
}

#[test]
fn silent_handshakes_block_no_caller_with_a_certificate() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let gateway = start_with_certificates(&sandbox, &ca, &ca.revoke(&[666], 2124));
    let address = gateway.second.unwrap();
    let good = ca.issue(CALLER);
    let _silent = silent(0, ["tcp", &address.port().to_string(), "127.9.0.1", &SILENT.to_string(), "1"]);
    good_calls("silent handshakes", || ca.call(address, Some(&good)).unwrap_or_default());
    let closed = metric(&gateway, "connections_closed_total{reason=\"too_many_handshakes\"}");
    assert!(closed > 3000, "{closed} handshakes were closed");
}
