//! What the kernel and the system say is not always what it seems: users in a namespace of their own, and a `localhost` elsewhere.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, TcpListener, UdpSocket},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
};

use tempfile::TempDir;

use crate::{
    callers::{caller, unix_listener},
    support::*,
};

/// A process in a user namespace with these maps. It is killed on drop.
struct Namespaced(Child);

impl Drop for Namespaced {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the gateway's binary in a user namespace: each line of a map is inside, outside, count.
fn in_namespace(maps: &str, args: &[&str]) -> Namespaced {
    let mut child = Command::new("unshare")
        .args(["--user", "sh", "-c", "read -r _; exec \"$@\"", "sh", BINARY])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let place = |file: &str| format!("/proc/{}/{file}", child.id());
    // Once it has a namespace of its own it has no map yet.
    wait_for("the namespace", || fs::read_to_string(place("uid_map")).unwrap().is_empty().then_some(()));
    fs::write(place("uid_map"), maps).unwrap();
    fs::write(place("gid_map"), maps).unwrap();
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    Namespaced(child)
}

/// A configuration with a Unix socket for everybody, and these callers on it.
fn configured(sandbox: &ccsqm_gateway::sandbox::Sandbox, peers: &[&str]) -> Arc<TempDir> {
    let folder = start(sandbox).kill();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let config = folder.path().join("gateway.toml");
    let mut text = fs::read_to_string(&config).unwrap();
    text += &unix_listener(&folder.path().join("gateway.sock"));
    for (number, peer) in peers.iter().enumerate() {
        text += &caller(&format!("caller-{number}"), peer, "");
    }
    fs::write(&config, text).unwrap();
    folder
}

/// The example request, from a process of this user.
fn call_as(uid: u32, socket: &Path) -> String {
    let output = Command::new("setpriv")
        .args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"])
        .args(["curl", "-s", "-i", "--unix-socket"])
        .arg(socket)
        .args([&format!("http://localhost{PATH}"), "-H", "Content-Type: application/json", "-d", BODY])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Two ids are mapped: root's, and that of user 1000.
const TWO: &str = "0 0 1\n1000 1000 1\n";

#[test]
fn check_and_start_reject_a_caller_with_an_unmapped_id() {
    let sandbox = sandbox();
    let before = sandbox.requests().len();
    for (peer, is_good) in [
        ("uid:1000", true),
        ("gid:1000", true),
        ("uid:65534", false),
        ("gid:65534", false),
        ("uid:4242", false),
        ("gid:4242", false),
    ] {
        let folder = configured(&sandbox, &[peer]);
        let config = folder.path().join("gateway.toml");
        for command in ["check", "serve"] {
            let mut process = in_namespace(TWO, &[command, "--config", config.to_str().unwrap()]);
            let mut said = String::new();
            if is_good && command == "serve" {
                let socket = folder.path().join("gateway.sock");
                wait_for("the socket", || UnixStream::connect(&socket).is_ok().then_some(()));
                continue;
            }
            process.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            let code = process.0.wait().unwrap().code();
            assert_eq!(code, Some(if is_good { 0 } else { 78 }), "{command} {peer}: {said}");
            assert!(
                is_good || said.contains("callers[1].peer: ") && said.contains("mapped"),
                "{command}: {said}"
            );
        }
        assert_eq!(command(&["check", "--config", config.to_str().unwrap()]).0, 0, "the control: {peer}");
    }
    assert_eq!(sandbox.requests().len(), before, "nothing was sent");
}

#[test]
fn unmapped_users_are_not_identified_as_callers() {
    let sandbox = sandbox();
    let folder = configured(&sandbox, &["uid:1000"]);
    let (config, socket) = (folder.path().join("gateway.toml"), folder.path().join("gateway.sock"));
    let mut gateway = in_namespace(TWO, &["serve", "--config", config.to_str().unwrap()]);
    let log = BufReader::new(gateway.0.stderr.take().unwrap());
    thread::spawn(move || log.lines().for_each(drop));
    wait_for("the socket", || UnixStream::connect(&socket).is_ok().then_some(()));
    let before = sandbox.requests().len();
    for uid in [4242, 65534] {
        let reply = call_as(uid, &socket);
        assert!(reply.contains("x-gateway-error: caller_denied"), "{uid}: {reply}");
    }
    assert_eq!(sandbox.requests().len(), before, "nothing was sent");
    let reply = call_as(1000, &socket);
    assert!(reply.contains("x-gateway-outcome: succeeded"), "the control: {reply}");
}

/// An address of this machine that is not loopback.
fn outside() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_loopback())
}

#[test]
fn nothing_is_sent_to_a_localhost_that_is_not_loopback() {
    let Some(outside) = outside() else { return eprintln!("this machine has no address but loopback") };
    let sandbox = sandbox();
    let hosts = tempfile::NamedTempFile::new().unwrap();
    let urls = [sandbox.url(), sandbox.token_url()].map(|url| url.replace("127.0.0.1", "localhost"));
    // What is elsewhere counts the bytes that come, at the very ports.
    let listeners: Vec<_> = urls
        .iter()
        .map(|url| {
            let port: u16 = url.rsplit(':').next().unwrap().split('/').next().unwrap().parse().unwrap();
            let listener = TcpListener::bind((outside, port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        })
        .collect();
    let bind = format!("mount --bind {} /etc/hosts && exec \"$@\"", hosts.path().display());
    let start = |line: String| {
        fs::write(hosts.path(), line).unwrap();
        let through = ["unshare", "--mount", "sh", "-c", &bind, "sh"].map(str::to_owned).into();
        let [base_url, token_url] = urls.clone().map(Some);
        start_with(
            &sandbox,
            Setup { base_url, token_url, through, ..Setup::default() }.set("token.wait", "1s"),
        )
    };
    let gateway = start(format!("{outside} localhost\n"));
    let reply = gateway.call();
    assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "token_unavailable", "not_sent"));
    wait_for("the reason", || gateway.log().contains("localhost has no loopback address").then_some(()));
    assert!(listeners.iter().all(|listener| listener.accept().is_err()), "nobody even connected");
    assert_eq!(sandbox.requests().len() + sandbox.token_calls().len(), 0);
    // Where it has both, only loopback is used.
    drop(gateway);
    let gateway = start(format!("{outside} localhost\n127.0.0.1 localhost\n"));
    assert_eq!(gateway.call().outcome(), "succeeded", "the control: {}", gateway.log());
    assert!(listeners.iter().all(|listener| listener.accept().is_err()), "nobody connected elsewhere");
}
