//! Budgets that are counted, not timed.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
};

use crate::support::*;

/// System calls a request, of all threads, the audit trail's among them, with 32 callers at once. strace slows
/// the process, which makes batches smaller than they are without it.
const SYSTEM_CALLS: f64 = 5.2;

const CALLERS: usize = 32;

/// Each caller sends, then each reads its answer, so many times.
fn rounds(streams: &mut [TcpStream], count: usize) {
    let request = head(BODY.len(), "").replace("connection: close\r\n", "") + BODY;
    let mut buffer = [0; 2048];
    for _ in 0..count {
        for stream in &mut *streams {
            stream.write_all(request.as_bytes()).unwrap();
        }
        for stream in &mut *streams {
            let mut length = 0;
            while !buffer[..length].ends_with(b"}") {
                let read = stream.read(&mut buffer[length..]).unwrap();
                assert!(read > 0, "the gateway closed the connection");
                length += read;
            }
            assert!(buffer.starts_with(b"HTTP/1.1 200"));
        }
    }
}

/// Counts the system calls of a few rounds, by strace; returns how many a request, and what they were.
fn system_calls(gateway: &Gateway, streams: &mut [TcpStream]) -> (f64, String) {
    const ROUNDS: usize = 60;
    let counts = gateway.folder.path().join("strace");
    let mut strace = Command::new("strace")
        .args(["-f", "-c", "-U", "name,calls", "-p", &gateway.id().to_string(), "-o"])
        .arg(&counts)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", gateway.id());
    wait_for("strace", || {
        let status = fs::read_to_string(&status).unwrap();
        (!status.contains("TracerPid:\t0\n")).then_some(())
    });
    rounds(streams, ROUNDS);
    let interrupt = Command::new("kill").args(["-INT", &strace.id().to_string()]).status().unwrap();
    assert!(interrupt.success());
    strace.wait().unwrap();
    let text = fs::read_to_string(&counts).unwrap();
    let total = text.lines().find_map(|line| line.trim().strip_prefix("total"));
    let total: f64 = total.unwrap_or_else(|| panic!("{text}")).trim().parse().unwrap();
    (total / (CALLERS * ROUNDS) as f64, text)
}

#[test]
fn request_stays_within_its_system_call_budget() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup::default().set("server.workers", 1));
    let mut streams: Vec<_> = (0..CALLERS).map(|_| TcpStream::connect(gateway.address).unwrap()).collect();
    rounds(&mut streams, 10);
    // Beside other tests callers come in dribbles, and a batch is small: the least of a few counts is taken.
    let counts = (0..10).map(|_| system_calls(&gateway, &mut streams));
    let mut least = (f64::MAX, String::new());
    for (calls, text) in counts {
        assert!(calls > 4.0, "two reads and two writes, at least: {text}");
        if calls < least.0 {
            least = (calls, text);
        }
        if least.0 <= SYSTEM_CALLS {
            break;
        }
    }
    let (calls, text) = least;
    println!("{calls:.2} system calls a request\n{text}");
    assert!(!text.contains("clock_gettime"), "the time is read without a system call: {text}");
    assert!(calls <= SYSTEM_CALLS, "{calls:.2} system calls a request, of {SYSTEM_CALLS}\n{text}");
}
