//! Budgets that are counted, not timed: what a warm request allocates, and what keys and replies take. A target of its own,
//! since the allocator counts for the whole process: the gateway runs in it, the cloud does not, and the caller allocates
//! nothing. One test at a time.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use ccsqm_gateway::{
    app::App,
    config::{self, Config, ListenAddress},
    idempotency::memory::KeyMemory,
    preflight,
};
use tempfile::TempDir;
use tokio::sync::oneshot;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// Blocks a request, hyper's own and the audit trail's among them. To be lowered whenever it can be. Two are hyper's for the
/// fields of a reply, of which it keeps up to 100 without a block, and the gateway reads 256.
const BUDGET: u64 = 12;

const PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask";
/// A key of so many digits, and what counts as the weight of the reply to it.
const KEY: &str = "idempotency-key: key-0000000
";
const DIGITS: usize = 7;
const REPLY: usize = 520;

const BODY: &str = r#"{"qualityTaskId":"954645333549048833","setCountsType":1,"isTakeEffect":0,"setCounts":[{"personID":"1600226476732482572","count":2}]}"#;

/// The cloud, in a process of its own. Killed on drop.
struct Cloud(Child, String);

impl Cloud {
    fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ccsqm-gateway"));
        command.args(["sandbox", "--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        // Borrowed: without a reader, what the sandbox says next would end it.
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let url = line.split_whitespace().last().unwrap().to_owned();
        Self(child, url)
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn configuration(folder: &TempDir, cloud: &Cloud) -> Config {
    fs::write(folder.path().join("app_key"), "sandbox-app-key").unwrap();
    fs::write(folder.path().join("app_secret"), "sandbox-app-secret").unwrap();
    let text = format!(
        r#"
listeners = [{{ address = "127.0.0.1:0" }}]
admin = {{ address = "127.0.0.1:0" }}
upstream = {{ base_url = "{}" }}
quota = {{ rate = "1000000/s", burst = 1000000 }}
credentials = [{{ name = "default", app_key_file = "app_key", app_secret_file = "app_secret" }}]
[[callers]]
name = "qa-console"
peer = "loopback"
operator_id = "1611917095665261978"
credential = "default"
routes = ["appointQualityTask"]
rate_limit = "1000000/s"
burst = 1000000
"#,
        cloud.1
    );
    let path = folder.path().join("gateway.toml");
    fs::write(&path, text).unwrap();
    preflight::load(&path, &[], []).unwrap()
}

/// A gateway in this process. Stopped on drop.
struct Gateway {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<()>>,
}

impl Gateway {
    fn start(configuration: Config) -> Self {
        let app = App::build(configuration, None).unwrap();
        let Some(ListenAddress::Tcp(address)) = app.addresses().next().cloned() else {
            panic!("no TCP listener")
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let running = thread::spawn(move || app.run(async { drop(stopped.await) }, None).unwrap());
        Self { address, stop: Some(stop), running: Some(running) }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.running.take().unwrap().join().unwrap();
    }
}

/// The example request, for one more task each time it is sent.
fn request(headers: &str) -> Vec<u8> {
    format!(
        "POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n{BODY}",
        BODY.len()
    )
    .into_bytes()
}

/// Another task in the same place: what follows the number's last digit.
fn count_up(request: &mut [u8], end: usize) {
    for digit in request[..end].iter_mut().rev() {
        *digit += 1;
        if *digit <= b'9' {
            return;
        }
        *digit = b'0';
    }
}

/// Calls so many times on one connection, each time for another task.
fn call(stream: &mut TcpStream, request: &mut [u8], times: u64) {
    let mut buffer = [0; 2048];
    let end = request.len() - BODY.len() + BODY.find("\",\"setCountsType").unwrap();
    let name = b"idempotency-key: key-";
    let key = request.windows(name.len()).position(|part| part == name).map(|at| at + name.len() + DIGITS);
    for _ in 0..times {
        count_up(request, end);
        key.into_iter().for_each(|end| count_up(request, end));
        stream.write_all(request).unwrap();
        let mut length = 0;
        while !buffer[..length].ends_with(b"}") {
            let read = stream.read(&mut buffer[length..]).unwrap();
            assert!(read > 0, "the gateway closed the connection");
            length += read;
        }
        assert!(buffer.starts_with(b"HTTP/1.1 200"));
    }
}

static ONE: Mutex<()> = Mutex::new(());

#[test]
fn warm_request_stays_within_its_allocation_budget() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _profiler = dhat::Profiler::builder().testing().build();
    let (cloud, folder) = (Cloud::start(), TempDir::new().unwrap());
    let gateway = Gateway::start(configuration(&folder, &cloud));
    let mut request = request("");
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    call(&mut stream, &mut request, 200);
    let before = dhat::HeapStats::get().total_blocks;
    const CALLS: u64 = 2000;
    call(&mut stream, &mut request, CALLS);
    let blocks = (dhat::HeapStats::get().total_blocks - before) as f64 / CALLS as f64;
    println!("{blocks:.1} blocks a request");
    assert!(blocks > 1.0, "the count is alive");
    assert!(blocks <= BUDGET as f64, "{blocks:.1} blocks a request, of {BUDGET}");
}

#[test]
fn keys_and_stored_replies_stay_within_the_memory_bound() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _profiler = dhat::Profiler::builder().testing().build();
    let (cloud, folder) = (Cloud::start(), TempDir::new().unwrap());
    let mut configuration = configuration(&folder, &cloud);
    configuration.idempotency.max_keys = 6000;
    let said = |settings: &config::Idempotency| KeyMemory::new(settings).keys;
    let one_key = (said(&configuration.idempotency)
        - said(&config::Idempotency { max_keys: 1, ..configuration.idempotency }))
        / 5999;
    let gateway = Gateway::start(configuration);
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    call(&mut stream, &mut request(""), 200); // meanwhile the trail is read
    let mut request = request(KEY);
    call(&mut stream, &mut request, 200);
    let before = dhat::HeapStats::get().curr_bytes;
    const CALLS: usize = 5000;
    call(&mut stream, &mut request, CALLS as u64);
    let bytes = (dhat::HeapStats::get().curr_bytes - before) / CALLS;
    println!("{bytes} bytes a key and its reply");
    assert!(bytes > 100, "the count is alive");
    let said = one_key as usize + REPLY;
    assert!(bytes <= said, "{bytes} bytes a key and its reply, of {said}");
}
