//! The harness: a gateway process on a sandbox, and a caller on a raw socket.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults, Options, Sandbox};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask";
/// The path of `OTHER_ROUTE`.
pub(crate) const OTHER_PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/other";
/// A second route. Its contract lies in the folder.
pub(crate) const OTHER_ROUTE: &str = r#"
[[routes]]
name = "other"
path = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/other"
contract_file = "contract.json"
success_codes = ["0"]
"#;
pub(crate) const BODY: &str = r#"{"qualityTaskId":"954645333549048833","setCountsType":1,"isTakeEffect":0,"setCounts":[{"personID":"1600226476732482572","count":2}]}"#;
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_ccsqm-gateway");

/// A gateway process. Killed on drop.
pub(crate) struct Gateway {
    child: Child,
    pub(crate) address: SocketAddr,
    /// Of the TCP listener that a test adds to the usual one.
    pub(crate) second: Option<SocketAddr>,
    pub(crate) admin: SocketAddr,
    pub(crate) folder: Arc<TempDir>,
    log: Arc<Mutex<String>>,
}

/// How a gateway is configured; `config` is appended sections, `set` overrides.
#[derive(Default)]
pub(crate) struct Setup {
    pub(crate) base_url: Option<String>,
    pub(crate) token_url: Option<String>,
    pub(crate) set: Vec<(&'static str, String)>,
    pub(crate) caller: String,
    /// Who the caller is; empty: whoever calls from this machine.
    pub(crate) peer: &'static str,
    /// The caller's `rate_limit` and `burst`.
    pub(crate) limit: Option<(&'static str, u32)>,
    /// The credential's name; empty: `default`.
    pub(crate) credential: &'static str,
    pub(crate) folder: Option<Arc<TempDir>>,
    /// A command that becomes the gateway, such as `env A=1`; empty: none.
    pub(crate) through: Vec<String>,
    /// Further flags of `serve`.
    pub(crate) flags: Vec<String>,
}

impl Setup {
    pub(crate) fn set(mut self, key: &'static str, value: impl std::fmt::Display) -> Self {
        self.set.push((key, value.to_string()));
        self
    }
}

pub(crate) fn sandbox() -> Sandbox {
    Sandbox::start(Options { token_listener: true, ..Options::default() }).unwrap()
}

/// Sets what a sandbox does wrong from now on, instead of what was set before.
pub(crate) fn script(sandbox: &Sandbox, faults: Faults) {
    sandbox.faults(faults).unwrap();
}

/// What tells faults from the default one, for the message of a failed test.
pub(crate) fn shown(faults: &[Fault]) -> String {
    let fields = |fault: &Fault| serde_json::to_value(fault).unwrap();
    let default = fields(&Fault::default());
    let shown = faults.iter().map(|fault| {
        let mut fault = fields(fault);
        fault.as_object_mut().unwrap().retain(|name, value| *value != default[name]);
        fault
    });
    Value::from_iter(shown).to_string()
}

/// A gateway on a sandbox, with limits and breaker out of the way, and without a look at equal bodies: tests send the same one
/// over and over.
pub(crate) fn start(sandbox: &Sandbox) -> Gateway {
    start_with(sandbox, Setup::default())
}

pub(crate) fn start_with(sandbox: &Sandbox, setup: Setup) -> Gateway {
    let folder = setup.folder.unwrap_or_else(|| Arc::new(TempDir::new().unwrap()));
    let base_url = setup.base_url.unwrap_or_else(|| sandbox.url());
    let token_url = setup.token_url.unwrap_or_else(|| sandbox.token_url());
    let credential = if setup.credential.is_empty() { "default" } else { setup.credential };
    let peer = if setup.peer.is_empty() { "loopback" } else { setup.peer };
    let (rate_limit, burst) = setup.limit.unwrap_or(("1000000/s", 1_000_000));
    let options = Options::default();
    fs::write(folder.path().join("app_key"), &options.app_key).unwrap();
    fs::write(folder.path().join("app_secret"), &options.app_secret).unwrap();
    let text = format!(
        r#"[[listeners]]
address = "127.0.0.1:0"
[admin]
address = "127.0.0.1:0"
[server]
drain_grace = "0s"
[upstream]
base_url = "{base_url}"
breaker_failures = 0
[token]
url = "{token_url}"
[quota]
rate = "1000000/s"
burst = 1000000
[idempotency]
without_key = "off"
[log]
format = "json"
level = "info"
[[credentials]]
name = "{credential}"
app_key_file = "app_key"
app_secret_file = "app_secret"
[[callers]]
name = "qa-console"
peer = "{peer}"
operator_id = "1611917095665261978"
credential = "{credential}"
routes = ["appointQualityTask"]
rate_limit = "{rate_limit}"
burst = {burst}
{}
"#,
        setup.caller
    );
    fs::write(folder.path().join("gateway.toml"), text).unwrap();
    serve_with(&folder, &setup.through, &setup.set, &setup.flags)
}

/// A gateway with the configuration that lies in a folder.
pub(crate) fn serve(folder: &Arc<TempDir>) -> Gateway {
    serve_with(folder, &[], &[], &[])
}

/// The same, with the socket that its listener has in the configuration.
pub(crate) fn serve_on(folder: &Arc<TempDir>, socket: &TcpListener) -> Gateway {
    let mut command = inheriting(folder, socket);
    command.stderr(Stdio::piped());
    Gateway::spawn(command, folder.clone())
}

/// `serve` with a socket that it inherits.
pub(crate) fn inheriting(folder: &Arc<TempDir>, socket: &TcpListener) -> Command {
    let mut command = Command::new("sh");
    // The process that execs is the one that systemd would name.
    let hand_over = "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\" 3<&0 0</dev/null";
    command
        .args(["-c", hand_over, "sh", BINARY, "serve", "--config"])
        .arg(folder.path().join("gateway.toml"));
    command.stdin(OwnedFd::from(socket.try_clone().unwrap()));
    command
}

/// A gateway, by a command that becomes it.
pub(crate) fn spawn(mut command: Command, folder: &Arc<TempDir>) -> Gateway {
    command.stderr(Stdio::piped());
    Gateway::spawn(command, folder.clone())
}

/// A gateway with the configuration that lies in a folder, by a command that becomes it, with overrides and further flags.
pub(crate) fn serve_with(
    folder: &Arc<TempDir>,
    through: &[String],
    set: &[(&str, String)],
    flags: &[String],
) -> Gateway {
    let config = folder.path().join("gateway.toml");
    let words: Vec<_> = through.iter().map(String::as_str).chain([BINARY]).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg("serve").arg("--config").arg(&config).stderr(Stdio::piped());
    for (key, value) in set {
        command.arg("--set").arg(format!("{key}={value}"));
    }
    command.args(flags);
    Gateway::spawn(command, folder.clone())
}

impl Gateway {
    fn spawn(mut command: Command, folder: Arc<TempDir>) -> Self {
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let (mut addresses, mut admin) = (Vec::new(), None);
        while admin.is_none() {
            let line =
                lines.next().unwrap_or_else(|| panic!("did not start: {}", log.lock().unwrap())).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            let at = event["fields"]["address"].as_str().and_then(|at| at.parse().ok());
            match event["fields"]["message"].as_str() {
                Some("listening") => addresses.extend(at),
                Some("listening (admin)") => admin = at,
                _ => {}
            }
            *log.lock().unwrap() += &(line + "\n");
        }
        let rest = log.clone();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                *rest.lock().unwrap() += &(line + "\n");
            }
        });
        let (address, second) = (addresses[0], addresses.get(1).copied());
        Self { child, address, second, admin: admin.unwrap(), folder, log }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn audit_directory(&self) -> PathBuf {
        self.folder.path().join("audit")
    }

    /// The example request.
    pub(crate) fn call(&self) -> Reply {
        self.post(BODY)
    }

    pub(crate) fn post(&self, body: &str) -> Reply {
        self.send(&head(body.len(), ""), body)
    }

    pub(crate) fn post_with(&self, headers: &str) -> Reply {
        self.send(&head(BODY.len(), headers), BODY)
    }

    /// A call that the trail is late for, as on a busy machine, is repeated: it was not sent.
    pub(crate) fn send(&self, head: &str, body: &str) -> Reply {
        in_time(|| self.send_once(head, body))
    }

    /// The example request, whatever the answer.
    pub(crate) fn call_once(&self) -> Reply {
        self.send_once(&head(BODY.len(), ""), BODY)
    }

    pub(crate) fn send_once(&self, head: &str, body: &str) -> Reply {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        let _ = stream.write_all(body.as_bytes());
        read_reply(&mut stream)
    }

    /// Sends a request that asks to keep the connection, and half-closes it.
    pub(crate) fn send_and_finish(&self, head: &str, body: &str) -> Reply {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        read_reply(&mut stream)
    }

    pub(crate) fn admin(&self, path: &str) -> Reply {
        self.admin_with(path, "")
    }

    /// Asks the admin listener, with further header lines.
    pub(crate) fn admin_with(&self, path: &str, headers: &str) -> Reply {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n")
            .unwrap();
        read_reply(&mut stream)
    }

    /// All records of requests; waits until every request that was answered is in.
    pub(crate) fn records(&self, kind: &str, count: usize) -> Vec<Value> {
        wait_for(&format!("{count} records of {kind}"), || {
            let records = records(&self.audit_directory(), kind);
            (records.len() >= count).then_some(records)
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// SIGKILL, from outside.
    pub(crate) fn kill(mut self) -> Arc<TempDir> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.folder.clone()
    }

    /// Whether the process is gone; a zombie is.
    pub(crate) fn has_ended(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .is_none_or(|rest| rest.trim_start().starts_with(['Z', 'X']) || rest.is_empty())
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_for("the process's end", || self.child.try_wait().unwrap())
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process, killed on drop.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn head(length: usize, headers: &str) -> String {
    format!(
        "POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    )
}

/// A reply, its head parsed. Every header is on the allow-list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn outcome(&self) -> &str {
        self.headers.get("x-gateway-outcome").map_or("", String::as_str)
    }

    pub(crate) fn code(&self) -> &str {
        self.headers.get("x-gateway-error").map_or("", String::as_str)
    }

    /// All of it.
    pub(crate) fn text(&self) -> String {
        format!("{self:?}")
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// Whether an answer has begun, or the connection has ended.
pub(crate) fn is_readable(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let is_readable = stream.peek(&mut [0]).is_ok();
    stream.set_nonblocking(false).unwrap();
    is_readable
}

/// Reads to the end of the connection.
pub(crate) fn read_reply(stream: &mut TcpStream) -> Reply {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    parse_reply(&String::from_utf8_lossy(&bytes))
}

/// The last reply in a text; nothing in one that is cut.
pub(crate) fn parse_reply(text: &str) -> Reply {
    const ALLOWED: [&str; 17] = [
        "allow",
        "connection",
        "content-length",
        "content-type",
        "date",
        "retry-after",
        "transfer-encoding",
        "x-gateway-error",
        "x-gateway-first-outcome",
        "x-gateway-first-request-id",
        "x-gateway-outcome",
        "x-gateway-request-id",
        "x-gateway-resolved",
        "x-gateway-retry",
        "x-gateway-upstream-request-id",
        "x-request-id",
        "content-encoding",
    ];
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Reply::default() };
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: HashMap<_, _> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    if status == 100 {
        return parse_reply(body);
    }
    for name in headers.keys() {
        assert!(ALLOWED.contains(&name.as_str()), "{name} is not a header of ours");
    }
    Reply { status, headers, body: body.to_owned() }
}

/// The records of a trail, oldest first; `kind` empty: all.
pub(crate) fn records(directory: &Path, kind: &str) -> Vec<Value> {
    let mut segments: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    segments.sort();
    segments
        .iter()
        .flat_map(|path| match fs::read_to_string(path) {
            Ok(text) => text.lines().map(str::to_owned).collect::<Vec<_>>(),
            // Retention has removed it meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => panic!("{}: {error}", path.display()),
        })
        .filter_map(|line| serde_json::from_str::<Value>(&line).ok())
        .filter(|record| kind.is_empty() || record["kind"] == kind)
        .collect()
}

/// Compiles a C source of the suite to a library that can be preloaded. Takes its place at once: another test may preload it.
pub(crate) fn compile(source: &str) -> PathBuf {
    let target =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(source.replace('/', "-")).with_extension("so");
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let unfinished = folder.path().join("library");
    let source = format!("{}/tests/it/{source}.c", env!("CARGO_MANIFEST_DIR"));
    let compiled =
        Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).arg(&unfinished).arg(source).status();
    assert!(compiled.unwrap().success());
    fs::rename(unfinished, &target).unwrap();
    target
}

/// Makes a call, and makes it again while the trail is late for it. A disk that takes no records at all is told after some calls.
pub(crate) fn in_time(mut call: impl FnMut() -> Reply) -> Reply {
    let mut reply = call();
    for _ in 0..20 {
        if reply.code() != "audit_unavailable" {
            break;
        }
        reply = call();
    }
    reply
}

/// An address that is free, and stays so: on a loopback address of its own, since outgoing connections take ports of 127.0.0.1.
pub(crate) fn free() -> SocketAddr {
    let ip = [127, fastrand::u8(1..), fastrand::u8(..), fastrand::u8(1..255)];
    TcpListener::bind(SocketAddr::from((ip, 0))).unwrap().local_addr().unwrap()
}

/// Polls for something that must come about soon.
pub(crate) fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command of the binary to its end: exit code, stdout, stderr.
pub(crate) fn command(args: &[&str]) -> (i32, String, String) {
    // The suite's own override would hide what a configuration says.
    let output =
        Command::new(BINARY).args(args).env_remove("CCSQM_GATEWAY__SERVER__WORKERS").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}
