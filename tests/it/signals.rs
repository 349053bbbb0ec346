//! Signals that come while the gateway starts, also where it is the first process of a container: the kernel drops what such a
//! process has no handler for.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{audit::verify, support::*};

/// A stop during the start takes no longer.
const SOON: Duration = Duration::from_secs(5);

/// What makes the gateway the first process of its own namespace. Killed, it takes the gateway with it.
const ALONE: [&str; 5] = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"];

/// A configuration at ports of its own, which comes through a pipe when a test says so.
struct Start {
    /// The gateway, or what made it the first process.
    child: Child,
    pid: Pid,
    admin: SocketAddr,
    text: String,
    pipe: File,
    folder: TempDir,
}

impl Drop for Start {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::KILL);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A good configuration at ports of its own, with the address of its admin listener.
fn configuration(folder: &Path) -> (String, SocketAddr) {
    let (listen, admin) = (free(), free());
    for (name, text) in [("app_key", "key"), ("app_secret", "secret")] {
        fs::write(folder.join(name), text).unwrap();
    }
    let place = folder.display();
    let text = format!(
        r#"[[listeners]]
address = "{listen}"
[admin]
address = "{admin}"
[server]
drain_grace = "0s"
[upstream]
base_url = "http://127.0.0.1:9"
[audit]
directory = "{place}/audit"
[[credentials]]
name = "default"
app_key_file = "{place}/app_key"
app_secret_file = "{place}/app_secret"
[[callers]]
name = "qa-console"
peer = "loopback"
operator_id = "1611917095665261978"
credential = "default"
routes = ["appointQualityTask"]
"#
    );
    (text, admin)
}

impl Start {
    /// Starts a gateway, and returns when it waits for its configuration.
    fn begin(through: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let (text, admin) = configuration(folder.path());
        let path = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let words: Vec<_> = through.iter().copied().chain([BINARY, "serve", "--config"]).collect();
        let mut child = Command::new(words[0]);
        let child = child.args(&words[1..]).arg(&path).stderr(Stdio::piped()).spawn().unwrap();
        // Without a reader this fails.
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let pipe = wait_for("a reader of the configuration", || {
            OpenOptions::new().write(true).custom_flags(nonblock).open(&path).ok()
        });
        let id = if through.is_empty() { child.id() } else { only_child(child.id()) };
        let pid = Pid::from_raw(id.cast_signed()).unwrap();
        Self { child, pid, admin, text, pipe, folder }
    }

    /// Sends the configuration, and leaves a file of it in the pipe's place.
    fn configure(&mut self) {
        let (path, file) = (self.folder.path().join("pipe"), self.folder.path().join("file"));
        fs::write(&file, &self.text).unwrap();
        fs::rename(file, path).unwrap();
        self.pipe.write_all(self.text.as_bytes()).unwrap();
        self.pipe = File::open("/dev/null").unwrap();
    }

    fn signal(&self, signal: Signal) {
        let _ = kill_process(self.pid, signal);
    }

    fn wait(&mut self) -> ExitStatus {
        wait_for("the process's end", || self.child.try_wait().unwrap())
    }

    /// Waits for an answer to a probe.
    fn serves(&mut self, when: &str) {
        wait_for("an answer to a probe", || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{when}: {ended:?}: {}", self.said());
            (probe(self.admin, "/livez") == Some(200)).then_some(())
        });
    }

    fn stops(&mut self, when: &str) {
        let begun = Instant::now();
        self.signal(Signal::TERM);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{when}: {status}: {}", self.said());
        assert!(begun.elapsed() < SOON, "{when}: {:?}", begun.elapsed());
    }

    /// What it has said; to be called when it has ended.
    fn said(&mut self) -> String {
        let _ = kill_process(self.pid, Signal::KILL);
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut said);
        }
        said
    }
}

/// The process that another one has started.
pub(crate) fn only_child(pid: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.trim().parse().unwrap()
}

/// The status of an answer of the admin listener.
pub(crate) fn probe(admin: SocketAddr, path: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(admin).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").ok()?;
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).ok()?;
    reply.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

#[test]
fn signal_before_the_configuration_is_read_is_handled() {
    for through in [&[][..], &ALONE] {
        let mut start = Start::begin(through);
        start.stops("SIGTERM");

        let mut start = Start::begin(through);
        for signal in [Signal::HUP, Signal::HUP] {
            start.signal(signal);
        }
        start.configure();
        start.serves("SIGHUP");
        start.stops("the control");
    }
}

#[test]
fn signals_at_any_time_during_start_are_handled() {
    for moment in 0..30 {
        let through = if moment % 2 == 0 { &[][..] } else { &ALONE };
        let wait = Duration::from_micros(fastrand::u64(..300_000));
        let when = format!("{wait:?} of {} words", through.len());

        let mut start = Start::begin(through);
        start.configure();
        let begun = Instant::now();
        wait_for("the moment", || (begun.elapsed() >= wait).then_some(()));
        start.signal(Signal::HUP);
        start.serves(&when);
        start.stops(&when);

        let mut start = Start::begin(through);
        start.configure();
        let begun = Instant::now();
        wait_for("the moment", || (begun.elapsed() >= wait).then_some(()));
        start.stops(&when);
    }
}

/// Starts through a library with which the reading of some files hangs, as on a mount that is dead.
pub(crate) fn hanging(hang: &Path) -> Vec<String> {
    let library = compile("files/hang");
    ["env", &format!("HANG={}", hang.display()), &format!("LD_PRELOAD={}", library.display())]
        .map(str::to_owned)
        .into()
}

#[test]
fn sigterm_ends_a_long_start_and_keeps_the_trail_intact() {
    let sandbox = sandbox();
    let mut gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    let folder = gateway.folder.clone();
    let (config, audit) = (folder.path().join("gateway.toml"), gateway.audit_directory());
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let hang = folder.path().join("hang");
    fs::write(&hang, "audit-0").unwrap();
    let words = hanging(&hang);
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .args([BINARY, "serve", "--config"])
        .arg(&config)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It has the lock, and reads.
    wait_for("the lock", || ccsqm_gateway::audit::is_live(&audit).then_some(()));
    let begun = Instant::now();
    kill_process(Pid::from_raw(child.id().cast_signed()).unwrap(), Signal::TERM).unwrap();
    let status = wait_for("the end", || child.try_wait().unwrap());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(begun.elapsed() < SOON && said.contains("stopped during the start"), "{said}");
    fs::remove_file(&hang).unwrap();
    let (is_whole, said) = verify(&audit);
    assert!(is_whole, "{said}");
    assert_eq!(serve(&folder).call().outcome(), "succeeded", "the control");
}

#[test]
fn sandbox_and_demo_stop_cleanly_on_a_signal_as_process_1() {
    let temporary = TempDir::new().unwrap();
    let commands: [&[&str]; 2] = [
        &["sandbox", "--listen", "127.0.0.1:0"],
        &["demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"],
    ];
    for command in commands {
        for signal in [Signal::TERM, Signal::INT] {
            let mut child = Command::new(ALONE[0])
                .args(&ALONE[1..])
                .arg(BINARY)
                .args(command)
                .env("TMPDIR", temporary.path())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut said = String::new();
            let mut stdout = child.stdout.take().unwrap();
            let mut byte = [0];
            while !said.contains("stops it") {
                stdout.read_exact(&mut byte).unwrap();
                said.push(char::from(byte[0]));
            }
            let gateway = Pid::from_raw(only_child(child.id()).cast_signed()).unwrap();
            kill_process(gateway, signal).unwrap();
            let status = child.wait_or_kill(gateway);
            assert_eq!(status.code(), Some(0), "{command:?} {signal:?}");
            let left: Vec<PathBuf> =
                fs::read_dir(temporary.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(left.is_empty(), "{command:?}: {left:?}");
        }
    }
}

trait WaitOrKill {
    fn wait_or_kill(&mut self, gateway: Pid) -> ExitStatus;
}

impl WaitOrKill for Child {
    /// Waits; kills what does not end, so that no test leaves it behind.
    fn wait_or_kill(&mut self, gateway: Pid) -> ExitStatus {
        let end = Instant::now() + 2 * SOON;
        loop {
            if let Some(status) = self.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > end {
                let _ = kill_process(gateway, Signal::KILL);
            }
            std::thread::yield_now();
        }
    }
}

/// Where it is the first process of a container, the kernel drops what comes before a handler.
#[test]
fn serving_process_installs_signal_handlers_first() {
    let folder = TempDir::new().unwrap();
    let trace = folder.path().join("trace");
    let calls = |args: &[&str]| {
        let only = "trace=rt_sigaction,prctl,prlimit64,openat";
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-e", only, "-o"]).arg(&trace).arg(BINARY).args(args);
        strace.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        fs::read_to_string(&trace).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let place = |calls: &[String], texts: &[&str]| {
        calls.iter().position(|call| texts.iter().all(|text| call.contains(text)))
    };
    let set = ["sa_handler=0x", "rt_sigaction("];
    let config = folder.path().join("nowhere.toml").display().to_string();
    for command in [["serve", "--config", &config].as_slice(), &["sandbox", "--listen", "nowhere"]] {
        let calls = calls(command);
        let hides = place(&calls, &["RLIMIT_CORE", "rlim_cur=0"]).unwrap();
        for signal in ["(SIGTERM", "(SIGINT", "(SIGHUP"] {
            let taken = place(&calls, &[set[0], set[1], signal]);
            assert!(taken.is_some_and(|taken| taken < hides), "{command:?} {signal}: {taken:?}, {calls:#?}");
        }
    }
    let calls = calls(&["check", "--config", &config]);
    assert!(place(&calls, &["RLIMIT_CORE", "rlim_cur=0"]).is_some(), "the control: {calls:#?}");
    assert_eq!(place(&calls, &[set[0], set[1], "(SIGTERM"]), None, "a command that ends by itself is ended");
}
