//! stderr is a pipe that nobody reads: nothing waits for it, what must not be missed is kept, and what is dropped is counted.

use std::{
    fs,
    io::{ErrorKind, PipeReader, Read, Write, pipe},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    process::{Child, Command, ExitStatus},
    sync::Arc,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};
use rustix::fs::{OFlags, fcntl_setfl};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::*;

/// So much may pass on a busy machine: four times what is promised.
const PROMPT: Duration = Duration::from_millis(4 * 50);

/// So long a process waits for a reader that takes something now and then; for one that takes nothing, much less.
const WAITED_FOR: Duration = Duration::from_secs(1);

/// A gateway whose stderr is a full pipe from the start. Killed on drop.
struct Unread {
    child: Child,
    address: SocketAddr,
    admin: SocketAddr,
    folder: Arc<TempDir>,
    pipe: PipeReader,
}

/// The configuration of a usual gateway, with addresses that are known beforehand.
fn configured(sandbox: &Sandbox) -> (Arc<TempDir>, [SocketAddr; 2]) {
    let folder = start(sandbox).kill();
    let path = folder.path().join("gateway.toml");
    let addresses = [free(), free()];
    let text = fs::read_to_string(&path).unwrap();
    let text = addresses.iter().fold(text, |text, address| {
        text.replacen("address = \"127.0.0.1:0\"", &format!("address = \"{address}\""), 1)
    });
    fs::write(&path, text).unwrap();
    (folder, addresses)
}

impl Unread {
    fn start(sandbox: &Sandbox, set: &[&str]) -> Self {
        let (folder, [address, admin]) = configured(sandbox);
        let (pipe, writer) = full_pipe();
        let mut command = Command::new(BINARY);
        command.args(["serve", "--config"]).arg(folder.path().join("gateway.toml"));
        command.args(set.iter().flat_map(|set| ["--set", set])).stderr(writer);
        command.env("CCSQM_GATEWAY_FAULT_FILE", folder.path().join("fault"));
        let child = command.spawn().unwrap();
        let gateway = Self { child, address, admin, folder, pipe };
        wait_for("the gateway", || {
            let stream = TcpStream::connect(admin).ok()?;
            (get(stream, "/readyz").status == 200).then_some(())
        });
        gateway
    }

    fn send(&self, path: &str, body: &str) -> Reply {
        let head = head(body.len(), "").replace(PATH, path);
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        read_reply(&mut stream)
    }

    fn call(&self) -> Reply {
        self.send(PATH, BODY)
    }

    fn admin(&self, path: &str) -> Reply {
        get(TcpStream::connect(self.admin).unwrap(), path)
    }

    fn dropped(&self) -> u64 {
        missing(self.admin)
    }

    /// Refusals until lines are dropped. At the level `debug` each is a line.
    fn until_lines_are_dropped(&self) {
        wait_for("lines that are dropped", || {
            for _ in 0..200 {
                assert_eq!(prompt("a refusal", || self.send("/nowhere", BODY)).status, 404);
            }
            (self.dropped() > 0).then_some(())
        });
    }

    fn stop(&mut self) -> ExitStatus {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.end()
    }

    /// Its end. What comes behind the last record, by when nothing is left to do but to tell, must not take long; a drain may,
    /// on a busy machine.
    fn end(&mut self) -> ExitStatus {
        let audit = self.folder.path().join("audit");
        wait_for("the last record", || {
            records(&audit, "event").iter().any(|event| event["event"] == "stop").then_some(())
        });
        let began = Instant::now();
        let status = wait_for("the end", || self.child.try_wait().unwrap());
        assert!(began.elapsed() < WAITED_FOR, "the end took {:?}", began.elapsed());
        status
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn full_pipe() -> (PipeReader, std::io::PipeWriter) {
    let (reader, mut writer) = pipe().unwrap();
    fcntl_setfl(writer.as_fd(), OFlags::NONBLOCK).unwrap();
    loop {
        match writer.write(&[b'\n'; 4096]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    fcntl_setfl(writer.as_fd(), OFlags::empty()).unwrap(); // the gateway has the same description
    (reader, writer)
}

fn get(mut stream: TcpStream, path: &str) -> Reply {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    read_reply(&mut stream)
}

/// What comes within the time that is promised.
fn prompt<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = work();
    assert!(began.elapsed() < PROMPT, "{what} took {:?}", began.elapsed());
    result
}

/// How many lines are missing.
fn missing(admin: SocketAddr) -> u64 {
    let text = get(TcpStream::connect(admin).unwrap(), "/metrics").body;
    let value = text.lines().find_map(|line| line.strip_prefix("ccsqm_gateway_log_lines_dropped_total "));
    value.unwrap().parse().unwrap()
}

/// The lines about requests that a gateway has written.
fn about_requests(gateway: &Gateway) -> Vec<Value> {
    let log = gateway.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["target"] == "ccsqm_gateway::log::requests").collect()
}

#[test]
fn log_requests_selects_failures_all_or_none() {
    let sandbox = sandbox();
    for (setting, told) in
        [("off", [false; 6]), ("failures", [false, true, true, true, true, false]), ("all", [true; 6])]
    {
        let gateway = start_with(&sandbox, Setup::default().set("log.requests", setting));
        let failing = |fault: Fault| {
            script(&sandbox, Faults::business(fault));
            let reply = gateway.call();
            script(&sandbox, Faults::default());
            reply
        };
        let replies = [
            gateway.call(),
            failing(Fault::instead(Instead::Reset).times(1)),
            failing(Fault::failure("0409001").times(1)),
            failing(Fault::status(403).times(1)),
            failing(Fault::status(401)),
            gateway.post("{}"),
        ];
        let outcomes = replies.each_ref().map(|reply| reply.outcome().to_owned());
        assert_eq!(outcomes, ["succeeded", "unknown", "failed", "refused", "refused", "not_sent"]);
        let wanted = told.iter().filter(|told| **told).count();
        wait_for("the lines", || (about_requests(&gateway).len() >= wanted).then_some(()));
        // A later line is there, and so is what was before it.
        fs::write(gateway.folder.path().join("app_secret"), "").unwrap();
        wait_for("another line", || gateway.log().contains("the secret cannot be used").then_some(()));
        let lines = about_requests(&gateway);
        for (reply, told) in replies.iter().zip(told) {
            let id = &reply.headers["x-gateway-request-id"];
            let line = lines.iter().find(|line| line["fields"]["id"] == **id);
            assert_eq!(line.is_some(), told, "{setting}: {reply:?} {lines:?}");
            let Some(line) = line else { continue };
            let fields = &line["fields"];
            assert_eq!(
                (&fields["caller"], &fields["route"]),
                (&json!("qa-console"), &json!("appointQualityTask"))
            );
            assert_eq!(
                (&fields["outcome"], &fields["status"]),
                (&json!(reply.outcome()), &json!(reply.status))
            );
            assert!(fields["ms"].is_u64(), "{line}");
            let is_failure = !["succeeded", "not_sent"].contains(&reply.outcome());
            assert_eq!(line["level"], if is_failure { "WARN" } else { "INFO" });
            assert_eq!(fields["code"].as_str().unwrap_or_default(), reply.code());
            assert_eq!(fields["cause"], serde_json::from_str::<Value>(&reply.body).unwrap()["cause"]);
        }
        assert_eq!(lines.len(), wanted, "{setting}: {lines:?}");
    }
}

#[test]
fn failures_of_a_kind_log_ten_lines_a_second_and_count_the_rest() {
    const CALLS: usize = 300;
    let sandbox = sandbox();
    let gateway =
        start_with(&sandbox, Setup { base_url: Some(format!("http://{}", free())), ..Setup::default() });
    let begun = Instant::now();
    for _ in 0..CALLS {
        assert_eq!(gateway.call().code(), "upstream_unreachable");
    }
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap() + 2;
    assert_eq!(gateway.post("{}").code(), "contract_violation", "the control: no failure of that kind");
    let counted = || {
        let lines = about_requests(&gateway);
        let times = lines.iter().map(|line| line["fields"]["times"].as_u64().unwrap_or(1));
        (lines.len(), times.sum::<u64>() as usize)
    };
    wait_for("all of them", || (counted().1 >= CALLS).then_some(()));
    let (lines, calls) = counted();
    assert_eq!(calls, CALLS, "each is told once");
    assert!(lines <= 11 * seconds, "{lines} lines in {seconds} s");
}

#[test]
fn unwritable_log_lines_are_counted() {
    let sandbox = sandbox();
    let (folder, [address, admin]) = configured(&sandbox);
    for path in ["/dev/full", "log"] {
        let log = fs::OpenOptions::new().create(true).append(true).open(folder.path().join(path)).unwrap();
        let mut command = Command::new(BINARY);
        command
            .args(["serve", "--set", "log.level=debug", "--config"])
            .arg(folder.path().join("gateway.toml"));
        let _gateway = Running(command.stderr(log).spawn().unwrap());
        wait_for("the gateway", || {
            let stream = TcpStream::connect(admin).ok()?;
            (get(stream, "/readyz").status == 200).then_some(())
        });
        let before = missing(admin);
        for _ in 0..20 {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(head(0, "").replace(PATH, "/nowhere").as_bytes()).unwrap();
            assert_eq!(read_reply(&mut stream).status, 404);
        }
        if path == "log" {
            let lines = || fs::read_to_string(folder.path().join(path)).unwrap().lines().count();
            wait_for("the lines", || (lines() > 20).then_some(()));
            assert_eq!(missing(admin), 0, "the control");
        } else {
            assert!(before > 0, "the lines of the start");
            wait_for("a count of the lines", || (missing(admin) >= before + 20).then_some(()));
        }
    }
}

#[test]
fn gateway_never_waits_for_an_unread_log() {
    for (workers, level) in [(1, "debug"), (2, "debug"), (2, "info")] {
        println!("{workers} workers, level {level}");
        let sandbox = sandbox();
        script(&sandbox, Faults { lifetime_ms: Some(4000), ..Faults::default() });
        let set = [format!("server.workers={workers}"), format!("log.level={level}")];
        let mut gateway = Unread::start(&sandbox, &set.each_ref().map(String::as_str));
        for _ in 0..20 {
            assert_eq!(prompt("a call", || gateway.call()).outcome(), "succeeded");
        }
        script(&sandbox, Faults { lifetime_ms: Some(4000), ..Faults::business(Fault::status(429).times(1)) });
        assert_eq!(prompt("a 429", || gateway.call()).status, 429);
        assert_eq!(prompt("a call behind it", || gateway.call()).outcome(), "succeeded");
        if level == "debug" {
            gateway.until_lines_are_dropped();
        }
        for path in ["/livez", "/readyz", "/metrics", "/status"] {
            assert_eq!(prompt(path, || gateway.admin(path)).status, 200, "{path}");
        }
        let tokens = sandbox.token_calls().len();
        wait_for("another token", || (sandbox.token_calls().len() > tokens).then_some(()));
        assert_eq!(prompt("a call with it", || gateway.call()).outcome(), "succeeded");
        assert!(gateway.stop().success());
        let (code, _, error) =
            command(&["audit", "verify", gateway.folder.path().join("audit").to_str().unwrap()]);
        assert_eq!(code, 0, "{error}");
    }
}

#[test]
fn panic_does_not_wait_for_an_unread_log() {
    let sandbox = sandbox();
    let mut gateway = Unread::start(&sandbox, &["server.workers=2"]);
    assert_eq!(prompt("a call", || gateway.call()).outcome(), "succeeded");
    fs::write(gateway.folder.path().join("fault"), "panic worker 1").unwrap();
    assert_eq!(gateway.end().code(), Some(70));
}

#[test]
fn failed_start_does_not_wait_for_an_unread_log() {
    let sandbox = sandbox();
    let (folder, _) = configured(&sandbox);
    let (_pipe, writer) = full_pipe();
    let config = folder.path().join("gateway.toml");
    let mut command = Command::new(BINARY);
    command.args(["serve", "--config"]).arg(&config).args(["--set", "server.workers=none"]).stderr(writer);
    let mut child = command.spawn().unwrap();
    let status = wait_for("the end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(78));
}

/// What was said while nobody read, from the pipe of a gateway that goes on.
fn read_on(gateway: &mut Unread, until: &str) -> Vec<Value> {
    let (mut text, mut piece) = (Vec::new(), [0; 65536]);
    while !String::from_utf8_lossy(&text).contains(until) {
        let length = gateway.pipe.read(&mut piece).unwrap();
        text.extend(&piece[..length]);
    }
    let text = String::from_utf8(text).unwrap();
    let whole = &text[..text.rfind('\n').unwrap()];
    whole
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[test]
fn unknown_outcomes_are_logged_even_with_a_full_log_queue() {
    let sandbox = sandbox();
    let mut gateway = Unread::start(&sandbox, &["log.level=debug"]);
    gateway.until_lines_are_dropped();
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let unknown = gateway.call();
    assert_eq!(unknown.outcome(), "unknown");
    let id = &unknown.headers["x-gateway-request-id"];
    let dropped = gateway.dropped();
    let lines = read_on(&mut gateway, "log lines were dropped");
    let said =
        |text: &str| lines.iter().find(|line| line["fields"]["message"].as_str().unwrap().contains(text));
    let warning = said("the outcome of a call is unknown").expect("the warning");
    assert_eq!((&warning["level"], &warning["fields"]["id"]), (&json!("WARN"), &json!(id)));
    assert!(said("listening (admin)").is_some(), "the oldest lines are there");
    let counted = said("log lines were dropped").unwrap()["fields"]["lines"].as_u64().unwrap();
    assert!(counted >= dropped, "{counted} {dropped}");
}
