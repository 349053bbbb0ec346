//! What must not end: when a thread or a task does, the process drains, closes the trail and exits with 70. What hangs turns
//! `/livez` red. No test can end one thread of a process from outside, so that a test build panics, or hangs, where a file says so.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};
use tempfile::TempDir;

use crate::{audit::verify, support::*};

/// A gateway, and the file that says what is to panic or to hang.
fn start_faulty(sandbox: &Sandbox, workers: usize) -> (Gateway, PathBuf) {
    let folder = Arc::new(TempDir::new().unwrap());
    let file = folder.path().join("fault");
    let through = vec!["env".to_owned(), format!("CCSQM_GATEWAY_FAULT_FILE={}", file.display())];
    let setup = Setup { folder: Some(folder), through, ..Setup::default() };
    let gateway = start_with(sandbox, setup.set("server.workers", workers));
    wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
    (gateway, file)
}

#[test]
fn end_of_any_part_drains_and_ends_the_process() {
    // By name, and whether a call that is under way is still answered.
    for (part, answers) in [
        ("worker 0", false),
        ("worker 1", false),
        ("the audit writer", false),
        ("the log", true),
        ("the token fetcher of default", true),
        ("the admin listener", true),
        ("the reload of the configuration", true),
        ("the control socket", true),
        ("the watchdog", true),
        ("the check of clock and threads", true),
        ("the accept loop of worker 0", true),
        ("the sweep of the pool of worker 0", true),
        ("the commit waiters of worker 0", true),
        ("the watchdog of worker 0", true),
    ] {
        let sandbox = sandbox();
        let workers = if part == "worker 1" { 2 } else { 1 };
        let (mut gateway, file) = start_faulty(&sandbox, workers);
        assert_eq!(gateway.call().outcome(), "succeeded", "{part}");
        fs::write(&file, "panic another part").unwrap();
        script(&sandbox, Faults::business(Fault::delayed(1000).times(1)));
        let before = sandbox.requests().len();
        let address = gateway.address;
        let under_way = thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(stream, "{}{BODY}", head(BODY.len(), "")).unwrap();
            let mut reply = String::new();
            let _ = stream.read_to_string(&mut reply);
            reply
        });
        wait_for("the call under way", || (sandbox.requests().len() > before).then_some(()));
        assert_eq!(gateway.admin("/livez").status, 200, "{part}: the control");
        fs::write(&file, format!("panic {part}")).unwrap();
        if part == "the log" {
            script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
            let _ = gateway.call(); // which is told
        }
        assert_eq!(gateway.wait().code(), Some(70), "{part}: {}", gateway.log());
        let reply = under_way.join().unwrap();
        assert!(!answers || reply.starts_with("HTTP/1.1 200"), "{part}: {reply}");
        let log = gateway.log();
        let told = log.lines().filter(|line| line.contains("; the gateway stops")).count();
        // The log itself cannot tell.
        assert!(part == "the log" || told == 1 && log.contains(part), "{part}: {log}");
        let (is_whole, said) = verify(&gateway.audit_directory());
        assert!(is_whole, "{part}: {said}");
    }
}

#[test]
fn hanging_loop_fails_livez_until_it_recovers() {
    for part in ["worker 1", "the background runtime"] {
        let sandbox = sandbox();
        let (gateway, file) = start_faulty(&sandbox, 2);
        // Of the background's tasks, one is enough.
        let task = if part == "worker 1" { part } else { "the reload of the configuration" };
        fs::write(&file, format!("hang {task}")).unwrap();
        let red = wait_for("red", || Some(gateway.admin("/livez")).filter(|reply| reply.status != 200));
        let since = red.body.strip_prefix(&format!("the event loop of {part} has not run for "));
        let seconds: u64 = since.unwrap().trim_end().trim_end_matches(" s").parse().unwrap();
        assert!(red.status == 503 && seconds >= 10, "{red:?}");
        fs::remove_file(&file).unwrap();
        wait_for("green", || (gateway.admin("/livez").status == 200).then_some(()));
    }
}

/// A gateway with a call under way that the upstream answers after so many milliseconds.
fn start_faulty_with_call(sandbox: &Sandbox, workers: usize, delay_ms: u64) -> (Gateway, PathBuf) {
    let (gateway, file) = start_faulty(sandbox, workers);
    script(sandbox, Faults::business(Fault::delayed(delay_ms).times(1)));
    let address = gateway.address;
    thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "{}{BODY}", head(BODY.len(), "")).unwrap();
        let _ = stream.read_to_string(&mut String::new());
    });
    wait_for("the call under way", || (sandbox.requests().len() == 1).then_some(()));
    (gateway, file)
}

#[test]
fn part_that_fails_during_a_stop_is_named_and_fails_the_stop() {
    for (part, fault, said) in [
        ("worker 0", "panic", "worker 0 ended: a panic"),
        ("worker 0", "hang", "worker 0 ended: it hangs"),
        ("the commit waiters of worker 0", "panic", "the commit waiters of worker 0 ended: a panic"),
    ] {
        let sandbox = sandbox();
        let (mut gateway, file) = start_faulty_with_call(&sandbox, 1, 2000);
        gateway.signal("-TERM");
        wait_for("the stop", || gateway.log().contains("shutdown started").then_some(()));
        let stopping = Instant::now();
        fs::write(&file, format!("{fault} {part}")).unwrap();
        assert_eq!(gateway.wait().code(), Some(70), "{fault} {part}: {}", gateway.log());
        assert!(stopping.elapsed() < Duration::from_secs(30), "{fault} {part}: {:?}", stopping.elapsed());
        assert!(gateway.log().contains(said), "{fault} {part}: {}", gateway.log());
        let (is_whole, said) = verify(&gateway.audit_directory());
        assert!(is_whole, "{fault} {part}: {said}");
    }
    let sandbox = sandbox();
    let (mut gateway, _) = start_faulty_with_call(&sandbox, 1, 2000);
    gateway.signal("-TERM");
    assert_eq!(gateway.wait().code(), Some(0), "the control: {}", gateway.log());
}

/// How many sockets listen on an address.
fn listening(address: SocketAddr) -> usize {
    let IpAddr::V4(ip) = address.ip() else { return 0 };
    let it = format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port());
    let sockets = fs::read_to_string("/proc/net/tcp").unwrap();
    let is_it = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(&*it) && words.nth(1) == Some("0A")
    };
    sockets.lines().filter(is_it).count()
}

#[test]
fn gateway_with_few_file_descriptors_is_fully_ready_or_exits() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let config = folder.path().join("gateway.toml");
    let text = fs::read_to_string(&config).unwrap();
    let mut ended = 0;
    let mut served = 0;
    for (workers, limits) in [(1, 14..46), (64, 200..228)] {
        for limit in limits.step_by(if workers == 1 { 1 } else { 4 }) {
            let [address, admin] = [free(), free()];
            let text = [address, admin].iter().fold(text.clone(), |text, address| {
                text.replacen("\"127.0.0.1:0\"", &format!("\"{address}\""), 1)
            });
            fs::write(&config, text).unwrap();
            let line = format!("ulimit -n {limit} && exec \"$@\"");
            let mut child = Command::new("sh")
                .args(["-c", &line, "sh", BINARY, "serve", "--config"])
                .arg(&config)
                .args(["--set", &format!("server.workers={workers}")])
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let is_ready = wait_for("readiness or the end", || match child.try_wait().unwrap() {
                Some(status) => {
                    assert!(matches!(status.code(), Some(1 | 70)), "{limit}: {status}");
                    Some(false)
                }
                None => is_ready(admin).then_some(true),
            });
            if is_ready {
                assert_eq!(listening(address), workers, "{limit}");
                child.kill().unwrap();
                child.wait().unwrap();
                served += 1;
            } else {
                let mut said = String::new();
                child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
                assert!(said.contains("Too many open files"), "{limit}: {said}");
                ended += 1;
            }
        }
    }
    assert!(ended > 5 && served > 5, "{ended} {served}");
}

fn is_ready(admin: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(admin) else { return false };
    let asked = stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let mut reply = String::new();
    asked.is_ok() && stream.read_to_string(&mut reply).is_ok() && reply.starts_with("HTTP/1.1 200")
}
