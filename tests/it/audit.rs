//! Stage 8: the trail, through crashes, through faults of its disk, and through floods.

pub(crate) mod disk;
mod limits;
mod places;

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, OpenOptions},
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{ConnectionFault, Fault, Faults, Framing, Instead, Received, Sandbox};
use serde_json::{Value, json};

use crate::support::*;

/// `audit verify`: whether the trail is whole, and what it says.
pub(crate) fn verify(directory: &Path) -> (bool, String) {
    let (code, out, error) = command(&["audit", "verify", directory.to_str().unwrap()]);
    assert!(code <= 1, "{error}");
    (code == 0, out)
}

pub(crate) fn segments(directory: &Path) -> Vec<PathBuf> {
    let mut segments: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    segments.sort();
    segments
}

fn outcomes(directory: &Path) -> HashMap<String, Vec<Value>> {
    let mut outcomes = HashMap::<_, Vec<_>>::new();
    for record in records(directory, "outcome") {
        outcomes.entry(text(&record["id"])).or_default().push(record);
    }
    outcomes
}

pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A body that assigns a task of its own.
pub(crate) fn body(task: u64) -> String {
    BODY.replace("\"954645333549048833\"", &task.to_string())
}

// ---- Killed ----------------------------------------------------------------------------------------------

/// Callers at once; some of them meet a fault that holds their request in one phase, the others run free.
const CALLERS: usize = 10;

/// What a caller was told, whole.
struct Told {
    task: u64,
    id: String,
    outcome: String,
}

/// All that is known outside the gateway.
struct Load {
    task: Arc<AtomicU64>,
    told: Arc<Mutex<Vec<Told>>>,
}

impl Load {
    /// Callers that call until nobody listens.
    fn begin(&self, address: SocketAddr) -> Vec<thread::JoinHandle<()>> {
        let caller = || {
            let (task, told) = (self.task.clone(), self.told.clone());
            thread::spawn(move || {
                while let Ok(mut stream) = TcpStream::connect(address) {
                    let task = task.fetch_add(1, Ordering::Relaxed);
                    let body = body(task);
                    let _ = stream.write_all((head(body.len(), "") + &body).as_bytes());
                    let reply = read_reply(&mut stream);
                    let length = reply.headers.get("content-length").and_then(|length| length.parse().ok());
                    if length == Some(reply.body.len()) {
                        let outcome = reply.outcome().to_owned();
                        told.lock().unwrap().push(Told {
                            task,
                            id: reply.headers["x-gateway-request-id"].clone(),
                            outcome,
                        });
                    }
                }
            })
        };
        (0..CALLERS).map(|_| caller()).collect()
    }

    fn told(&self) -> usize {
        self.told.lock().unwrap().len()
    }
}

/// The upstream holds two connections without reading, two requests without answering, and two in the middle
/// of its answer. What is not held is answered at once.
fn hold_some(sandbox: &Sandbox) {
    let connection = ConnectionFault { times: Some(2), after: 1, delay_ms: 60_000, instead: Instead::Hang };
    let business = vec![
        Fault::delayed(60_000).after(8).times(2),
        Fault::framing(Framing::SlowBody(500)).after(12).times(2),
    ];
    script(sandbox, Faults { connections: vec![connection], business, ..Faults::default() });
}

/// Tasks that the sandbox received, whole or not.
fn received(sandbox: &Sandbox) -> HashMap<u64, Vec<Received>> {
    let mut received = HashMap::<_, Vec<_>>::new();
    for request in sandbox.requests() {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        received.entry(body["qualityTaskId"].as_u64().unwrap_or(0)).or_default().push(request);
    }
    received
}

/// What must hold after each restart.
fn check_after_a_kill(audit: &Path, received: &HashMap<u64, Vec<Received>>, load: &Load, open: &[Value]) {
    let (whole, said) = verify(audit);
    assert!(whole, "{said}");
    let intents: HashMap<_, _> = records(audit, "intent")
        .into_iter()
        .map(|intent| (intent["task"].as_u64().unwrap(), text(&intent["id"])))
        .collect();
    let outcomes = outcomes(audit);
    for (task, requests) in received.iter().filter(|(task, _)| **task != 0) {
        assert!(intents.contains_key(task), "the upstream received {task}, of which the trail knows nothing");
        assert_eq!(requests.len(), 1, "{task} was sent more than once");
    }
    for id in intents.values() {
        assert_eq!(outcomes.get(id).map(Vec::len), Some(1), "{id}");
    }
    let cut_off: BTreeSet<_> = open.iter().map(|intent| text(&intent["id"])).collect();
    for id in &cut_off {
        assert_eq!(outcomes[id][0]["outcome"], "unknown", "{id}");
    }
    for Told { task, id, outcome } in &*load.told.lock().unwrap() {
        assert_eq!(intents.get(task), Some(id), "a caller was told {outcome}");
        // An outcome is queued, not safe, before the answer's last byte: after a kill it may be in doubt.
        let ended = &outcomes[id][0];
        let in_doubt = ended["note"] == "the process ended between intent and outcome";
        assert!(in_doubt || ended["outcome"] == **outcome, "a caller was told {outcome}: {ended}");
    }
}

// ---- Damaged ---------------------------------------------------------------------------------------------

#[test]
fn verify_names_the_changed_line() {
    let sandbox = sandbox();
    let mut gateway = start(&sandbox);
    for _ in 0..100 {
        assert_eq!(gateway.call().outcome(), "succeeded");
    }
    gateway.records("outcome", 100);
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let audit = gateway.audit_directory();
    let verify = || command(&["audit", "verify", audit.to_str().unwrap()]);
    assert_eq!(verify().0, 0, "the control");
    let segment = segments(&audit).remove(0);
    let text = fs::read(&segment).unwrap();
    let mut begin = 0;
    for (index, line) in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).enumerate() {
        let mut changed = text.clone();
        changed[begin + index * 97 % line.len()] ^= 1 << (index % 8);
        fs::write(&segment, &changed).unwrap();
        let (code, out, _) = verify();
        assert!(code == 1 && out.contains(&format!(".jsonl:{}: ", index + 1)), "{index}: {out}");
        begin += line.len() + 1;
    }
    let whole = &text[..text.len() - 1];
    let without_one = whole.split(|b| *b == b'\n').enumerate().filter(|(i, _)| *i != 2).map(|(_, line)| line);
    fs::write(&segment, [without_one.collect::<Vec<_>>().join(&b'\n'), vec![b'\n']].concat()).unwrap();
    let (code, out, _) = verify();
    assert!(code == 1 && out.contains(":3: "), "{out}");
}

#[test]
fn key_of_another_trail_is_reported_in_one_line() {
    let (sandbox, other) = (sandbox(), tempfile::TempDir::new().unwrap());
    let mut gateway = start(&sandbox);
    let id = gateway.call().headers["x-gateway-request-id"].clone();
    gateway.records("outcome", 1);
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let audit = gateway.audit_directory();
    let (trail, key) = (audit.to_str().unwrap(), other.path().join("audit.key"));
    assert_eq!(command(&["audit", "init", other.path().to_str().unwrap()]).0, 0);
    for words in [&["verify"][..], &["in-doubt"], &["unresolved"], &["head"]] {
        let run = |key: &Path| {
            command(&[&["audit"], words, &[trail, "--key-file", key.to_str().unwrap()]].concat())
        };
        assert_eq!(run(&audit.join("audit.key")).0, 0, "the control");
        let (code, out, error) = run(&key);
        assert_eq!((code, out.as_str(), error.lines().count()), (78, "", 1), "{words:?}: {error}");
        assert!(error.contains("does not match record 1") && error.contains("--key-file"), "{error}");
    }
    assert_eq!(command(&["audit", "show", trail, &id]).0, 0, "it needs no key");
}

#[test]
fn torn_last_line_is_truncated_and_recorded() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.records("outcome", 1);
    let audit = gateway.audit_directory();
    let folder = gateway.kill();
    let segment = segments(&audit).remove(0);
    let text = fs::read(&segment).unwrap();
    fs::write(&segment, &text[..text.len() - 30]).unwrap();
    let gateway = start_with(&sandbox, Setup { folder: Some(folder), ..Setup::default() });
    let events = gateway.records("event", 3);
    assert!(events.iter().any(|event| event["event"] == "recovery" && event["what"] == "torn line cut off"));
    assert_eq!(records(&audit, "outcome").last().unwrap()["outcome"], "unknown", "its outcome was torn");
    assert_eq!(command(&["audit", "verify", audit.to_str().unwrap()]).0, 0);
}

#[test]
fn two_gateways_never_share_a_trail() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let config = gateway.folder.path().join("gateway.toml");
    let (code, _, error) = command(&["serve", "--config", config.to_str().unwrap()]);
    assert!(code == 1 && error.contains("another process writes here"), "{error}");
}

#[test]
fn audit_commands_support_text_and_json_output() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.records("outcome", 1);
    let audit = gateway.audit_directory();
    let run = |words: &str| {
        let words: Vec<_> = words.split(' ').collect();
        command(&[&["audit", words[0], audit.to_str().unwrap()], &words[1..]].concat())
    };
    let json = |words: &str| serde_json::from_str::<Value>(&run(words).1).unwrap();
    let last = records(&audit, "").pop().unwrap();
    assert_eq!(json("head --json"), json!({ "seq": last["seq"], "hash": last["hash"] }));
    assert_eq!(run("head").1, format!("{} {}\n", last["seq"], text(&last["hash"])));
    assert_eq!(
        json("verify --json"),
        json!({ "whole": true, "records": last["seq"], "faults": [], "missing": [], "torn": null })
    );
    assert_eq!((run("verify").0, run("in-doubt")), (0, (0, "0 in doubt\n".into(), String::new())));

    script(&sandbox, Faults::business(Fault::delayed(60_000)));
    let mut caller = TcpStream::connect(gateway.address).unwrap();
    caller.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    wait_for("the request", || (sandbox.requests().len() == 2).then_some(()));
    let intent = records(&audit, "intent").pop().unwrap();
    let (code, out, _) = run("in-doubt");
    assert!(
        code == 1 && out.contains(intent["id"].as_str().unwrap()) && out.ends_with("1 in doubt\n"),
        "{out}"
    );
    let doubt = json("in-doubt --json");
    for member in ["id", "time", "caller", "route", "task"] {
        assert_eq!(doubt[member], intent[member], "{member}");
    }

    let other_key = gateway.folder.path().join("other.key");
    fs::write(&other_key, [7; 32]).unwrap();
    let (code, _, error) = run(&format!("verify --key-file {}", other_key.display()));
    assert!(code == 78 && error.contains("does not match record 1"), "{error}");
    let (code, _, error) = run("verify --key-file /nowhere");
    assert!(code == 78 && error.contains("/nowhere"), "{error}");
    let (code, _, error) = command(&["audit", "verify", "/nowhere"]);
    assert!(code == 78 && error.contains("/nowhere: No such file or directory"), "{error}");

    // A line that is being written is no fault of a live trail, and one of a dead trail.
    let folder = gateway.kill();
    OpenOptions::new()
        .append(true)
        .open(segments(&audit).remove(0))
        .unwrap()
        .write_all(b"{\"seq\":")
        .unwrap();
    let (code, out, _) = run("verify");
    assert!(code == 1 && out.contains("the last line is torn"), "{out}");
    let lock = fs::File::open(audit.join("lock")).unwrap();
    lock.try_lock().unwrap();
    assert_eq!(run("verify").0, 0);
    drop((lock, folder));
}

#[test]
fn redacted_fields_are_not_in_the_trail() {
    let people = ["1600226476732482572", "1611917095665261978", "127.0.0.1", "callers-own-id"];
    let sandbox = sandbox();
    let trail = |setup: Setup| {
        let gateway = start_with(&sandbox, setup);
        for _ in 0..2 {
            assert_eq!(gateway.post_with("x-request-id: callers-own-id\r\n").outcome(), "succeeded");
        }
        gateway.records("outcome", 2);
        let audit = gateway.audit_directory();
        assert!(verify(&audit).0);
        (records(&audit, "intent"), records(&audit, "").iter().map(Value::to_string).collect::<String>())
    };
    let (_, clear) = trail(Setup::default());
    assert!(people.iter().all(|person| clear.contains(person)), "the control: {clear}");

    let hidden = Setup::default()
        .set("audit.fields.inspectors", "hmac")
        .set("audit.fields.operator", "omit")
        .set("audit.fields.peer", "hmac")
        .set("audit.fields.caller_id", "hmac");
    let (intents, hidden) = trail(hidden);
    assert!(people.iter().all(|person| !hidden.contains(person)), "{hidden}");
    for name in ["inspectors", "peer", "caller_id"] {
        assert!(intents[0][name].to_string().contains("hmac:"), "{}", intents[0]);
        assert_eq!(intents[0][name], intents[1][name], "the same value has the same hash");
    }
    assert!(
        intents[0].get("operator").is_none() && intents[0]["task"] == "954645333549048833",
        "{}",
        intents[0]
    );
    assert_ne!(intents[0]["peer"], intents[0]["caller_id"]);

    let gateway = start(&sandbox);
    let config = gateway.folder.path().join("gateway.toml");
    let _folder = gateway.kill();
    let check = |field: &str| command(&["check", "--config", config.to_str().unwrap(), "--set", field]);
    assert_eq!(check("audit.fields.task=hmac").0, 0, "the control");
    let (code, _, error) = check("audit.fields.taks=hmac");
    assert!(code == 78 && error.contains("`taks` cannot be hidden"), "{error}");
}

#[test]
fn intent_records_inspector_counts_and_the_take_effect_flag() {
    let inspectors = r#"{"personID":"1600226476732482572"},{"count":7,"personID":"1600226476732482573"},{"personID":"1600226476732482574","count":0}"#;
    let body = BODY
        .replace(r#"{"personID":"1600226476732482572","count":2}"#, inspectors)
        .replace(r#""isTakeEffect":0"#, r#""isTakeEffect":1"#);
    let sandbox = sandbox();
    let intent = |shown: Option<&str>| {
        let mut setup = Setup::default();
        for field in ["audit.fields.inspectors", "audit.fields.counts", "audit.fields.take_effect"] {
            setup = shown.into_iter().fold(setup, |setup, shown| setup.set(field, shown));
        }
        let gateway = start_with(&sandbox, setup);
        assert_eq!(gateway.post(&body).outcome(), "succeeded");
        let intent = gateway.records("intent", 1).remove(0);
        assert!(verify(&gateway.audit_directory()).0);
        intent
    };
    for shown in [None, Some("clear")] {
        let intent = intent(shown);
        let people = ["1600226476732482572", "1600226476732482573", "1600226476732482574"];
        assert_eq!(intent["inspectors"], serde_json::json!(people));
        assert_eq!(intent["counts"], serde_json::json!([null, 7, 0]));
        assert_eq!(intent["take_effect"], 1);
    }
    let hidden = intent(Some("hmac"));
    assert!(hidden["take_effect"].as_str().unwrap().starts_with("hmac:"), "{hidden}");
    let counts = hidden["counts"].as_array().unwrap();
    assert!(counts.len() == 3 && counts[0].is_null() && counts[1].as_str().unwrap().starts_with("hmac:"));
    assert_ne!(counts[1], counts[2]);
    let omitted = intent(Some("omit"));
    assert!(
        ["inspectors", "counts", "take_effect"].iter().all(|name| omitted.get(name).is_none()),
        "{omitted}"
    );
}

// ---- Faults of the disk ----------------------------------------------------------------------------------

/// So much longer than promised may things take here: a busy machine is slow.
const MARGIN: u32 = 4;

/// What happens to a new request when its intent cannot be made safe.
fn assert_refused(gateway: &Gateway, sandbox: &Sandbox) {
    // Others may still be on their way.
    let sent = || sandbox.requests().iter().filter(|request| request.body == BODY.as_bytes()).count();
    let (before, begun) = (sent(), Instant::now());
    let reply = gateway.call_once();
    let took = begun.elapsed();
    let said = (reply.status, reply.code(), reply.outcome());
    assert_eq!(said, (503, "audit_unavailable", "not_sent"), "{reply:?}\n{}", gateway.log());
    assert!(reply.headers.contains_key("retry-after"));
    assert!(took < MARGIN * Duration::from_millis(250), "{took:?}");
    assert_eq!(sent(), before, "the sandbox receives nothing");
}

/// Service comes back by itself; then the trail is whole, and has one outcome for each intent, which is
/// `not_sent` for what was refused meanwhile.
fn assert_resumed(gateway: &Gateway, sandbox: &Sandbox) {
    let begun = Instant::now();
    wait_for("service", || (gateway.call_once().outcome() == "succeeded").then_some(()));
    let took = begun.elapsed();
    assert!(took < MARGIN * Duration::from_secs(1), "{took:?}");
    let audit = gateway.audit_directory();
    let outcomes = wait_for("all outcomes", || {
        let outcomes = outcomes(&audit);
        (outcomes.len() == records(&audit, "intent").len()).then_some(outcomes)
    });
    assert!(outcomes.values().all(|of_one| of_one.len() == 1), "{outcomes:?}");
    let succeeded = outcomes.values().filter(|of_one| of_one[0]["outcome"] == "succeeded").count();
    assert_eq!(succeeded, sandbox.requests().len());
    assert!(
        outcomes
            .values()
            .all(|of_one| of_one[0]["outcome"] == "succeeded" || of_one[0]["outcome"] == "not_sent")
    );
    let (whole, said) = verify(&audit);
    assert!(whole, "{said}");
}

/// A fault of the disk, from its begin to its end, while a request is in flight.
fn assert_outage(gateway: &Gateway, sandbox: &Sandbox, begin: impl FnOnce(), end: impl FnOnce()) {
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    assert_eq!(gateway.admin("/readyz").status, 200, "the control");
    script(sandbox, Faults::business(Fault::delayed(5_000).times(1)));
    let before = sandbox.requests().len();
    let mut in_flight = TcpStream::connect(gateway.address).unwrap();
    in_flight.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    wait_for("the request", || (sandbox.requests().len() == before + 1).then_some(()));
    begin();
    (0..3).for_each(|_| assert_refused(gateway, sandbox));
    let ready = gateway.admin("/readyz");
    assert!(ready.status == 503 && ready.body.contains("audit"), "{ready:?}");
    let sent = sandbox.requests().len();
    let reply = read_reply(&mut in_flight);
    assert_eq!(reply.outcome(), "succeeded", "what was sent before is answered");
    assert_refused(gateway, sandbox);
    assert_eq!(sandbox.requests().len(), sent, "nothing new was sent");
    let (audit, id) = (gateway.audit_directory(), &reply.headers["x-gateway-request-id"]);
    assert!(!outcomes(&audit).contains_key(id), "the control: it cannot be written");
    end();
    assert_resumed(gateway, sandbox);
    assert_eq!(outcomes(&audit)[id][0]["outcome"], "succeeded");
}

/// Sets how large a file of the process may grow. Beyond it a write is cut short and then fails, as on a full
/// disk.
fn limit_files(gateway: &Gateway, bytes: &str) {
    let pid = gateway.pid().to_string();
    let set = Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:")]).status();
    assert!(set.unwrap().success());
}

#[test]
fn full_disk_rejects_new_requests_and_delays_no_reply() {
    let sandbox = sandbox();
    // The limit's signal ends a process that does not ignore it; a full disk sends none.
    let through = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"].map(str::to_owned).into();
    let gateway = start_with(&sandbox, Setup { through, ..Setup::default() });
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    assert_eq!(gateway.admin("/readyz").status, 200, "the control");
    script(&sandbox, Faults::business(Fault::delayed(2_000).times(1)));
    let mut in_flight = TcpStream::connect(gateway.address).unwrap();
    in_flight.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    wait_for("the request", || (sandbox.requests().len() == 2).then_some(()));

    let audit = gateway.audit_directory();
    let segment = segments(&audit).remove(0);
    let length = fs::metadata(&segment).unwrap().len();
    // On a full disk there is no place for another segment either: each is made by this name.
    let obstacle = audit.join("segment.new");
    fs::create_dir(&obstacle).unwrap();
    limit_files(&gateway, &(length + 100).to_string());
    assert_refused(&gateway, &sandbox);
    assert_refused(&gateway, &sandbox);
    assert_eq!(gateway.admin("/readyz").status, 503);
    let metrics = gateway.admin("/metrics").body;
    assert!(!metrics.contains("ccsqm_gateway_audit_write_errors_total 0\n"), "{metrics}");
    assert!(metrics.contains("ccsqm_gateway_audit_healthy 0\n"), "{metrics}");
    let last = gateway.admin("/status").json()["audit"]["last_error"].take();
    assert!(last["detail"].as_str().unwrap().contains("File too large") && last["over"].is_null(), "{last}");
    assert!(gateway.admin("/readyz").body.contains("audit"), "{}", gateway.admin("/readyz").body);
    let reply = read_reply(&mut in_flight);
    assert_eq!(reply.outcome(), "succeeded", "what was sent before is answered");
    let id = &reply.headers["x-gateway-request-id"];
    assert!(!outcomes(&audit).contains_key(id), "the disk is full");
    wait_for("what was half-written to be cut off", || {
        (fs::metadata(&segment).unwrap().len() == length).then_some(())
    });

    fs::remove_dir(&obstacle).unwrap();
    limit_files(&gateway, "unlimited");
    assert_resumed(&gateway, &sandbox);
    assert!(gateway.admin("/metrics").body.contains("ccsqm_gateway_audit_healthy 1\n"));
    assert_eq!(outcomes(&audit)[id][0]["outcome"], "succeeded", "its outcome is written once there is space");
}

/// A small file system; unmounted on drop.
struct Small(PathBuf);

impl Small {
    /// None where this machine lets nobody mount; what only this shows is then not shown, and that is said.
    fn mount(directory: PathBuf) -> Option<Self> {
        fs::create_dir(&directory).unwrap();
        if mount(&["-t", "tmpfs", "-o", "size=4m,mode=700", "none"], &directory) {
            return Some(Self(directory));
        }
        let notice = b"NOT SHOWN: this machine mounts no tmpfs; see a_full_disk_* and audit/tests.rs for the parts of it\n";
        std::io::stderr().write_all(notice).unwrap(); // not captured, as `eprintln!` would be
        None
    }
}

fn mount(words: &[&str], directory: &Path) -> bool {
    let mount = Command::new("mount").args(words).arg(directory).output();
    mount.is_ok_and(|mount| mount.status.success())
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn full_file_system_gives_unknown_peers_no_space_and_recovers() {
    let sandbox = sandbox();
    let folder = Arc::new(tempfile::TempDir::new().unwrap());
    let Some(small) = Small::mount(folder.path().join("audit")) else { return };
    let mut gateway = start_with(&sandbox, Setup { folder: Some(folder), ..Setup::default() });
    assert_eq!(gateway.call().outcome(), "succeeded", "below the low-water mark requests go on");
    for _ in 0..20 {
        assert_eq!(gateway.send(&head(0, "").replace(PATH, "/nowhere"), "").code(), "route_unknown");
    }
    assert!(gateway.admin("/metrics").body.contains("audit_dropped_refusals_total 20"));

    let filler = small.fill();
    // What is reserved has room for some more.
    wait_for("the disk to be full", || (gateway.call_once().status == 503).then_some(()));
    assert_refused(&gateway, &sandbox);
    fs::remove_file(filler).unwrap();
    assert_resumed(&gateway, &sandbox);

    assert_eq!(records(&small.0, "refusal"), Vec::<Value>::new());
    let dropped = disk::metric(&gateway, "audit_dropped_refusals_total");
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let events = records(&small.0, "event");
    let gaps = events.iter().filter(|event| event["event"] == "gap");
    assert_eq!(
        gaps.map(|gap| gap["count"].as_f64().unwrap()).sum::<f64>(),
        dropped,
        "the trail says what it lacks"
    );
}

impl Small {
    /// The same once more, read-only, over itself.
    fn read_only(&self) -> Self {
        assert!(mount(&["-o", "bind,ro", self.0.to_str().unwrap()], &self.0));
        Self(self.0.clone())
    }

    /// Takes all the space that is left; given back by removing the file.
    fn fill(&self) -> PathBuf {
        let filler = self.0.join("filler");
        let mut file = fs::File::create(&filler).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        filler
    }
}

/// Both say whether a start finds the space that it needs: also where some was reserved, or is left in the last block.
#[test]
fn check_reports_a_full_file_system_exactly_when_start_fails() {
    const BLOCK: u64 = 4096;
    let sandbox = sandbox();
    let folder = Arc::new(tempfile::TempDir::new().unwrap());
    let Some(small) = Small::mount(folder.path().join("audit")) else { return };
    let config = folder.path().join("gateway.toml").display().to_string();
    let newest = || segments(&small.0).pop().unwrap();
    let length = || fs::metadata(newest()).unwrap().len();
    let stop = |mut gateway: Gateway| {
        gateway.signal("-TERM");
        assert!(gateway.wait().success());
    };
    let both_tell_of_it = |case: &str, set: &[&str]| {
        let set: Vec<_> = set.iter().flat_map(|set| ["--set", set]).collect();
        for verb in ["check", "serve"] {
            let (code, _, said) = command(&[&[verb, "--config", &config], &set[..]].concat());
            assert!(code == 1 && said.contains("No space left on device"), "{case}: {verb}: {code} {said}");
        }
    };
    let both_pass = |case: &str| {
        let (code, _, said) = command(&["check", "--config", &config]);
        assert_eq!(code, 0, "{case}: {said}");
        serve(&folder)
    };
    let gateway = start_with(&sandbox, Setup { folder: Some(folder.clone()), ..Setup::default() });
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.kill();
    let filler = small.fill();
    drop(both_pass("a crash leaves what was reserved"));
    fs::remove_file(filler).unwrap();

    // An event fills the last block but for so many bytes.
    for (left, passes) in [(40, false), (BLOCK / 2, true)] {
        stop(serve(&folder));
        let before = length();
        limits::append(&small.0, [limits::event(0)]);
        let event = length() - before;
        let missing = (2 * BLOCK - left - event - length() % BLOCK) % BLOCK;
        limits::append(&small.0, [limits::event(missing as usize)]);
        assert_eq!(length() % BLOCK, BLOCK - left);
        stop_reserving(&newest());
        let filler = small.fill();
        if passes {
            drop(both_pass("some is left in the last block"));
        } else {
            both_tell_of_it("the last block is full", &[]);
        }
        fs::remove_file(filler).unwrap();
        drop(both_pass("the control"));
    }

    let key = folder.path().join("key").display().to_string();
    fs::write(&key, [7; 32]).unwrap();
    let (missing, empty) = (small.0.join("a/b"), small.0.join("c"));
    fs::create_dir(&empty).unwrap();
    let filler = small.fill();
    for directory in [missing, empty] {
        let directory = format!("audit.directory={}", directory.display());
        both_tell_of_it("a new trail", &[&directory]);
        both_tell_of_it("a new trail with a key elsewhere", &[&directory, &format!("audit.key_file={key}")]);
        fs::remove_file(&filler).unwrap();
        let (code, _, said) = command(&["check", "--config", &config, "--set", &directory]);
        assert_eq!(code, 0, "the control: {said}");
        small.fill();
    }
}

#[test]
fn audit_commands_fail_with_the_same_exit_codes_as_serve() {
    let sandbox = sandbox();
    let folder = Arc::new(tempfile::TempDir::new().unwrap());
    let Some(small) = Small::mount(folder.path().join("audit")) else { return };
    let serve = || command(&["serve", "--config", folder.path().join("gateway.toml").to_str().unwrap()]);
    let audit = |verb: &str| command(&["audit", verb, small.0.to_str().unwrap()]);
    let gateway = start_with(&sandbox, Setup { folder: Some(folder.clone()), ..Setup::default() });
    for (code, _, said) in [serve(), audit("accept-loss")] {
        assert!(code == 1 && said.contains("another process writes here"), "{code}: {said}");
    }
    drop(gateway.kill());
    for verb in ["accept-loss", "accept-clock"] {
        let (code, _, said) = audit(verb);
        assert_eq!(code, 0, "the control: {verb}: {said}");
    }
    let _read_only = small.read_only();
    for (code, _, said) in [serve(), audit("accept-clock")] {
        assert!(code == 78 && said.contains("Read-only file system"), "{code}: {said}");
    }
}

/// Takes back what is reserved behind the end of a file.
fn stop_reserving(file: &Path) {
    let file = OpenOptions::new().write(true).open(file).unwrap();
    file.set_len(file.metadata().unwrap().len()).unwrap();
}

#[test]
fn full_file_system_keeps_outcomes_of_sent_calls_and_sends_no_more() {
    const IN_FLIGHT: usize = 50;
    for durability in ["kernel", "disk"] {
        let sandbox = sandbox();
        let folder = Arc::new(tempfile::TempDir::new().unwrap());
        let Some(small) = Small::mount(folder.path().join("audit")) else { return };
        // The segment is full long before the disk is.
        let setup =
            || Setup::default().set("audit.durability", durability).set("audit.segment_size", "64KiB");
        let setup = setup().set("upstream.max_connections", 2 * IN_FLIGHT);
        let gateway = start_with(&sandbox, Setup { folder: Some(folder), ..setup });
        assert_eq!(gateway.call().outcome(), "succeeded", "the control");
        script(&sandbox, Faults::business(Fault::delayed(4_000).times(IN_FLIGHT as u64)));
        let mut in_flight: Vec<_> = (0..IN_FLIGHT)
            .map(|_| {
                let mut stream = TcpStream::connect(gateway.address).unwrap();
                stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
                stream
            })
            .collect();
        wait_for("the requests", || (sandbox.requests().len() == IN_FLIGHT + 1).then_some(()));
        let filler = small.fill();
        wait_for("the end of what was reserved", || (gateway.call_once().status == 503).then_some(()));
        let sent = sandbox.requests().len();
        assert_refused(&gateway, &sandbox);
        assert_eq!(gateway.admin("/readyz").status, 503);
        let replies: Vec<_> = in_flight.iter_mut().map(read_reply).collect();
        assert!(replies.iter().all(|reply| reply.outcome() == "succeeded"), "{replies:?}");
        let ids = replies.iter().map(|reply| &reply.headers["x-gateway-request-id"]);
        wait_for("their outcomes", || {
            let outcomes = outcomes(&small.0);
            ids.clone().all(|id| outcomes.contains_key(id)).then_some(())
        });
        assert_eq!(sandbox.requests().len(), sent, "nothing new was sent");
        assert!(
            fs::File::create(small.0.join("more")).and_then(|mut more| more.write_all(b"1")).is_err(),
            "it is full"
        );
        fs::remove_file(filler).unwrap();
        assert_resumed(&gateway, &sandbox);
        let (whole, said) = verify(&small.0);
        assert!(whole, "{durability}: {said}");
        let empty = |segment: &PathBuf| fs::metadata(segment).unwrap().len() == 0;
        assert!(!segments(&small.0).iter().any(empty), "what could not be begun is gone");
    }
}

/// Calls until the next record begins a new segment, while so many others are in flight; returns that segment's path.
fn fill_segment(gateway: &Gateway, sandbox: &Sandbox, in_flight: usize) -> PathBuf {
    let audit = gateway.audit_directory();
    let length = || fs::metadata(segments(&audit).pop().unwrap()).unwrap().len();
    let mut long: Value = serde_json::from_str(BODY).unwrap(); // makes a long record
    long["setCounts"] = (0..500).map(|person| json!({ "personID": format!("{person:019}") })).collect();
    let long = long.to_string();
    while length() < 64 * 1024 {
        // The outcome must fill it: behind an intent that does it begins another one.
        let body = if length() < 40 * 1024 { &*long } else { BODY };
        assert_eq!(gateway.post(body).outcome(), "succeeded");
        gateway.records("outcome", sandbox.requests().len() - in_flight);
    }
    let seq = records(&audit, "").pop().unwrap()["seq"].as_u64().unwrap();
    audit.join(format!("audit-{:020}.jsonl", seq + 1))
}

#[test]
fn read_only_directory_mode_rejects_requests_until_writable() {
    use std::os::unix::fs::PermissionsExt;
    let sandbox = sandbox();
    // Root without the right to pass over permissions.
    let through = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"].map(str::to_owned);
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let setup = Setup { through: if is_root { through.into() } else { Vec::new() }, ..Setup::default() };
    let gateway = start_with(&sandbox, setup.set("audit.segment_size", "64KiB"));
    fill_segment(&gateway, &sandbox, 0);
    let audit = gateway.audit_directory();
    fs::set_permissions(&audit, fs::Permissions::from_mode(0o500)).unwrap();
    assert_refused(&gateway, &sandbox);
    fs::set_permissions(&audit, fs::Permissions::from_mode(0o700)).unwrap();
    assert_resumed(&gateway, &sandbox);
}

/// Another mount in its place, since the kernel makes no mount read-only that has files open for writing. What is open
/// goes on; what is to be opened is refused.
#[test]
fn read_only_mount_rejects_requests_until_writable() {
    let sandbox = sandbox();
    let folder = Arc::new(tempfile::TempDir::new().unwrap());
    let Some(small) = Small::mount(folder.path().join("audit")) else { return };
    let setup = Setup::default().set("audit.segment_size", "64KiB");
    let gateway = start_with(&sandbox, Setup { folder: Some(folder), ..setup });
    let read_only = Mutex::new(None);
    let begin = || {
        assert!(!mount(&["-o", "remount,ro"], &small.0), "busy");
        fill_segment(&gateway, &sandbox, 1);
        *read_only.lock().unwrap() = Some(small.read_only());
    };
    assert_outage(&gateway, &sandbox, begin, || drop(read_only.lock().unwrap().take()));
}

#[test]
fn nothing_is_sent_after_directory_loss_until_a_restart() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    let audit = gateway.audit_directory();
    fs::remove_dir_all(&audit).unwrap();
    assert_refused(&gateway, &sandbox);
    fs::create_dir(&audit).unwrap();
    assert_refused(&gateway, &sandbox);
    fs::write(audit.join("lock"), "").unwrap();
    assert_refused(&gateway, &sandbox);
    assert!(gateway.log().contains("the audit trail cannot be written"), "{}", gateway.log());
    let folder = gateway.kill();
    let gateway = start_with(&sandbox, Setup { folder: Some(folder), ..Setup::default() });
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert!(verify(&audit).0);
}

#[test]
fn unusable_audit_directory_fails_the_start_with_its_name() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let config = gateway.folder.path().join("gateway.toml");
    let file = gateway.folder.path().join("app_key").join("audit");
    let set = format!("audit.directory={}", file.display());
    let (code, _, error) = command(&["serve", "--config", config.to_str().unwrap(), "--set", &set]);
    assert!(
        code == 78 && error.contains("app_key/audit") && error.contains("Not a directory"),
        "{code} {error}"
    );
}

// ---- Flooded ---------------------------------------------------------------------------------------------

/// Requests of a flood, and how many come over one connection.
const FLOOD: usize = 50_000;
const PIPELINED: usize = 250;

#[test]
fn flood_of_rejected_requests_adds_under_a_megabyte_and_is_counted() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    let audit = gateway.audit_directory();
    let size = || segments(&audit).iter().map(|path| fs::metadata(path).unwrap().len()).sum::<u64>();
    let (before, begun) = (size(), Instant::now());
    let kinds = [
        "GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned(),
        format!("GET {PATH} HTTP/1.1\r\nhost: elsewhere\r\n\r\n"),
        format!("GET {PATH} HTTP/1.1\r\nhost: localhost\r\norigin: http://evil\r\n\r\n"),
        format!("GET {PATH} HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    ];
    let requests: String = kinds.iter().cycle().take(PIPELINED).map(String::as_str).collect();
    let next = AtomicU64::new(0);
    let refused: usize = thread::scope(|scope| {
        let flood = || {
            let mut refused = 0;
            loop {
                let number = u32::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap();
                if number as usize >= FLOOD / PIPELINED {
                    return refused;
                }
                let mut stream = connect_from(Ipv4Addr::from(0x7f00_0002 + number), gateway.address);
                stream.write_all(requests.as_bytes()).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut replies = String::new();
                stream.read_to_string(&mut replies).unwrap();
                refused += replies.matches("HTTP/1.1 4").count();
            }
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(flood)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let took = begun.elapsed();
    assert_eq!(refused, FLOOD);
    let sum =
        || records(&audit, "refusal").iter().map(|record| record["count"].as_u64().unwrap_or(1)).sum::<u64>();
    wait_for("all refusals", || (sum() == FLOOD as u64).then_some(()));
    let added = size() - before;
    println!(
        "{FLOOD} refusals in {took:?} added {added} bytes in {} records",
        records(&audit, "refusal").len()
    );
    assert!(took < Duration::from_secs(40), "{took:?}");
    // What is recorded in full grows with the seconds that a flood takes; a slow machine takes more of them.
    let tens_of_seconds = (took.as_secs_f64() / 10.0).max(1.0);
    assert!((added as f64) < 1e6 * tens_of_seconds, "{added} bytes in {took:?}");
    let codes: BTreeSet<_> = records(&audit, "refusal").iter().map(|record| text(&record["code"])).collect();
    assert_eq!(codes.len(), kinds.len(), "{codes:?}");
    let metrics = gateway.admin("/metrics").body;
    let counted = ["audit_aggregated_rejections_total", "audit_folded_refusals_total"].map(|name| {
        let sample = format!("ccsqm_gateway_{name} ");
        metrics.lines().find_map(|line| line.strip_prefix(&sample)).unwrap().parse::<u64>().unwrap()
    });
    assert!(counted[0] > 0 && counted[0] == counted[1], "{counted:?}");
    assert_eq!(gateway.call().outcome(), "succeeded", "and callers are served");
    assert!(verify(&audit).0);
}

#[test]
fn unknown_peer_refusals_stay_in_budget_and_displace_no_caller_ones() {
    let sandbox = sandbox();
    let setup = Setup { peer: "127.0.0.1/32", ..Setup::default() };
    let mut gateway = start_with(&sandbox, setup.set("audit.stranger_refusals", "64KiB"));
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    let audit = gateway.audit_directory();
    let size = || segments(&audit).iter().map(|path| fs::metadata(path).unwrap().len()).sum::<u64>();
    let (before, begun) = (size(), Instant::now());
    let get = format!("GET {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    // Kinds of refusals: of one alone a second's folding would write less than the budget.
    let kinds = [
        format!("{get}\r\n"),
        get.replace("localhost", "elsewhere") + "\r\n",
        format!("{get}origin: http://evil\r\n\r\n"),
        get.replace("HTTP/1.1", "HTTP/1.0") + "\r\n",
    ];
    let ask = |source: Ipv4Addr, request: &str| {
        let mut stream = connect_from(source, gateway.address);
        stream.write_all(request.as_bytes()).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply
    };
    let mut strangers = 0;
    while begun.elapsed() < Duration::from_secs(8) {
        strangers += 1;
        let reply = ask(Ipv4Addr::from(0x7f01_0000 + strangers), &kinds[strangers as usize % kinds.len()]);
        assert!(reply.contains("x-gateway-error"), "{reply}");
    }
    let reply = ask(Ipv4Addr::LOCALHOST, &kinds[0]);
    assert!(reply.contains("method_not_allowed"), "{reply}");
    let added = size() - before;
    assert!(strangers > 1000 && added < 64 * 1024 + 4096, "{added} bytes for {strangers} refusals");
    wait_for("the caller's refusal", || {
        let refusals = records(&audit, "refusal");
        refusals.iter().any(|record| record["caller"] == "qa-console").then_some(())
    });
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let count = |record: &Value| record["count"].as_u64().unwrap_or(1);
    let denied = records(&audit, "refusal").into_iter().filter(|record| record.get("caller").is_none());
    assert_eq!(denied.map(|record| count(&record)).sum::<u64>(), u64::from(strangers), "each is counted");
    assert!(verify(&audit).0);
}

#[test]
fn early_rejection_of_a_caller_is_recorded_under_its_name() {
    let sandbox = sandbox();
    let setup = Setup { peer: "127.0.0.1/32", ..Setup::default() };
    let mut gateway = start_with(&sandbox, setup.set("server.max_in_flight", 1));
    let stranger = Ipv4Addr::new(127, 1, 2, 3);
    let ask = |mut stream: TcpStream, request: &str| {
        stream.write_all(request.as_bytes()).unwrap();
        read_reply(&mut stream)
    };
    let good = head(BODY.len(), "") + BODY;
    let kinds = [
        ("host_unknown", good.replace("host: localhost", "host: elsewhere")),
        ("browser_refused", good.replace("connection:", "origin: http://evil\r\nconnection:")),
        ("head_invalid", good.replace("HTTP/1.1", "HTTP/1.0")),
    ];
    for (code, request) in &kinds {
        for source in [Ipv4Addr::LOCALHOST, stranger] {
            assert_eq!(ask(connect_from(source, gateway.address), request).code(), *code, "{source}");
        }
    }
    let silent = [Ipv4Addr::LOCALHOST, stranger].map(|source| connect_from(source, gateway.address));
    script(&sandbox, Faults::business(Fault::delayed(2000)));
    let sent = sandbox.requests().len();
    thread::scope(|scope| {
        let held = scope.spawn(|| gateway.call());
        wait_for("the call", || (sandbox.requests().len() > sent).then_some(()));
        for source in [Ipv4Addr::LOCALHOST, stranger] {
            assert_eq!(ask(connect_from(source, gateway.address), &good).code(), "overloaded", "{source}");
        }
        gateway.signal("-TERM");
        wait_for("the stop", || gateway.log().contains("shutdown started").then_some(()));
        for stream in silent {
            assert_eq!(ask(stream, &good).code(), "draining");
        }
        assert_eq!(held.join().unwrap().outcome(), "succeeded", "the control");
    });
    assert!(gateway.wait().success());
    let refusals = records(&gateway.audit_directory(), "refusal");
    for code in kinds.iter().map(|(code, _)| *code).chain(["overloaded", "draining"]) {
        let of = |source: &str| {
            let is_it = |record: &&Value| record["code"] == code && text(&record["peer"]).starts_with(source);
            refusals.iter().filter(is_it).map(|record| record["caller"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(of("127.0.0.1:"), [json!("qa-console")], "{code}: {refusals:#?}");
        assert_eq!(of("127.1.2.3:"), [Value::Null], "{code}: {refusals:#?}");
    }
}

/// Connects from one of the many addresses that a local stranger has.
pub(crate) fn connect_from(source: Ipv4Addr, target: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((source, 0)).into()).unwrap();
    socket.connect(&target.into()).unwrap();
    socket.into()
}
