//! SIGKILL at random moments under load, on one trail, and what four witnesses say of it: the callers, the upstream,
//! the token endpoint and the trail.
//!
//! `CCSQM_GATEWAY_TEST_KILLS` says how many kills; from 200 on each phase must be met in 20 rounds, and the load be 200
//! requests a second.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    hash::{BuildHasher, RandomState},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults, Received, Sandbox};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    audit::{body, disk::Disk, segments, text, verify},
    idempotency::until_keys_are_known,
    support::*,
};

/// Callers at once, each on a connection of its own.
const CALLERS: usize = 16;

/// A round's load lasts at least so many milliseconds, and at most as many more.
const LOAD: u64 = 60;
const MORE_LOAD: u64 = 300;

/// So many kills are proof; fewer are a smoke test.
const PROOF: usize = 200;

/// How a round is shaped, from outside, so that kills meet every phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shape {
    /// It is killed as it runs.
    Plain,
    /// Durability is `disk`, and the disk is slow: intents and outcomes wait for it.
    SlowDisk,
    /// It is stopped, as a busy machine may do for a while, until all that the upstream received is answered.
    Frozen,
}

impl Shape {
    const ALL: [Self; 3] = [Self::Plain, Self::SlowDisk, Self::Frozen];

    /// Each segment begins with the list of all that is unresolved, and each start reads all of them: many rounds have larger
    /// segments.
    fn setup(self, disk: &Disk) -> Setup {
        let setup = if self == Self::SlowDisk { disk.setup("disk") } else { Setup::default() };
        setup.set("audit.segment_size", if kills() >= PROOF { "4MiB" } else { "512KiB" })
    }
}

/// Where a kill meets a request of which the trail has the intent, and no outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// The upstream never received a byte of it.
    IntentToSend,
    /// The upstream received it, and had not begun to answer when the process was gone.
    SendToReply,
    /// The upstream had begun to answer before the kill.
    ReplyToOutcome,
    /// It was answered at the very moment of the kill: one of the last two.
    AtTheReply,
}

/// What the upstream has received, by task.
type Snapshot = HashMap<u64, Received>;

/// What the upstream had received before the kill, when the process was gone, and at last.
struct Snapshots {
    before: Snapshot,
    behind: Snapshot,
    at_last: Snapshot,
}

impl Snapshots {
    fn phase(&self, task: u64) -> Phase {
        let answered = |snapshot: &Snapshot| snapshot.get(&task).is_some_and(|it| it.status.is_some());
        match () {
            () if answered(&self.before) => Phase::ReplyToOutcome,
            () if !self.at_last.contains_key(&task) => Phase::IntentToSend,
            () if !answered(&self.behind) => Phase::SendToReply,
            () => Phase::AtTheReply,
        }
    }
}

/// A call, and the answer that its caller saw, if it saw all of it.
type Call = (u64, Option<Reply>);

/// Every other task has a key of its own.
fn is_keyed(task: u64) -> bool {
    task.is_multiple_of(2)
}

/// So many kills are asked for.
fn kills() -> usize {
    std::env::var("CCSQM_GATEWAY_TEST_KILLS").map_or(15, |kills| kills.parse().unwrap())
}

fn random(below: u64) -> u64 {
    RandomState::new().hash_one(()) % below
}

/// A caller's connection.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::new(stream))
    }

    /// Nothing, if the connection ends before the answer does.
    fn call(&mut self, task: u64) -> Option<Reply> {
        let (body, key) = (body(task), format!("idempotency-key: task-{task}\r\n"));
        let head =
            head(body.len(), if is_keyed(task) { &key } else { "" }).replace("connection: close\r\n", "");
        self.0.get_mut().write_all((head + &body).as_bytes()).ok()?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            self.0.read_line(&mut head).ok().filter(|read| *read > 0)?;
        }
        let mut reply = parse_reply(&head);
        let mut body = vec![0; reply.headers["content-length"].parse().unwrap()];
        self.0.read_exact(&mut body).ok()?;
        reply.body = String::from_utf8(body).unwrap();
        Some(reply)
    }
}

/// Calls with new tasks until the connection ends.
fn call_on(mut connection: Connection, next: &AtomicU64) -> Vec<Call> {
    let mut calls = Vec::new();
    loop {
        let task = next.fetch_add(1, Ordering::Relaxed);
        let seen = connection.call(task);
        let is_over = seen.is_none();
        calls.push((task, seen));
        if is_over {
            return calls;
        }
    }
}

/// Of 20 calls two are answered late, one fails and one ends in doubt.
fn misbehave(sandbox: &Sandbox) {
    let faults = (0..100).flat_map(|round| {
        [
            Fault::delayed(20 + random(60)).after(round * 20 + 3).times(1),
            Fault::failure("0409001").after(round * 20 + 8).times(1),
            Fault::delayed(20 + random(60)).after(round * 20 + 13).times(1),
            Fault::status(503).with_body("busy").after(round * 20 + 18).times(1),
        ]
    });
    script(sandbox, Faults::business(faults.collect::<Vec<_>>()));
}

/// The task in what the upstream received of a body. A body that is cut before it ends has no task.
fn task_of(received: &Received) -> Option<u64> {
    let body: Value = serde_json::from_slice(&received.body).unwrap_or_default();
    body["qualityTaskId"].as_u64()
}

fn token_of(received: &Received) -> Option<String> {
    let head = String::from_utf8_lossy(&received.head);
    head.lines().find_map(|line| line.strip_prefix("authorization: Bearer ").map(str::to_owned))
}

fn is_stopped(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") T ")
}

fn id(reply: &Reply) -> &str {
    &reply.headers["x-gateway-request-id"]
}

/// What the trail says, read on from where it was read last.
#[derive(Default)]
struct Trail {
    seq: u64,
    /// The requests that were to be sent, by task.
    intents: HashMap<u64, Vec<String>>,
    /// Tasks whose intents have no outcome, by request.
    open: BTreeMap<String, u64>,
    outcomes: HashMap<String, Value>,
}

impl Trail {
    fn read_on(&mut self, directory: &Path) {
        let segments = segments(directory);
        let is_read = |next: &&std::path::PathBuf| {
            let name = next.file_stem().unwrap().to_str().unwrap();
            name["audit-".len()..].parse::<u64>().unwrap() <= self.seq + 1
        };
        let first = segments.iter().take_while(is_read).count().saturating_sub(1);
        for segment in &segments[first..] {
            let lines = fs::read_to_string(segment).unwrap();
            for record in lines.lines().map_while(|line| serde_json::from_str::<Value>(line).ok()) {
                self.take(record);
            }
        }
    }

    fn take(&mut self, record: Value) {
        let seq = record["seq"].as_u64().unwrap();
        if seq <= self.seq {
            return;
        }
        self.seq = seq;
        let id = text(&record["id"]);
        match record["kind"].as_str().unwrap() {
            "intent" => {
                let task = record["task"].as_u64().unwrap();
                self.intents.entry(task).or_default().push(id.clone());
                assert_eq!(self.open.insert(id, task), None);
            }
            "outcome" => {
                assert!(self.open.remove(&id).is_some(), "an outcome too many: {record}");
                self.outcomes.insert(id, record);
            }
            _ => {}
        }
    }

    /// What became of the last request with this task, if it has one.
    fn last(&self, task: u64) -> Option<(&str, &Value)> {
        let id = self.intents.get(&task)?.last()?;
        Some((id, &self.outcomes[id]))
    }
}

/// A process ended between intent and outcome.
fn is_from_recovery(outcome: &Value) -> bool {
    outcome["note"] == "the process ended between intent and outcome"
}

/// All rounds: what the witnesses said so far.
struct Rounds {
    sandbox: Sandbox,
    disk: Disk,
    folder: Arc<TempDir>,
    next: AtomicU64,
    trail: Trail,
    received: BTreeSet<u64>,
    /// What callers saw of keyed calls.
    seen: HashMap<u64, Reply>,
    /// In how many rounds, and of how many requests.
    phases: BTreeMap<Phase, [usize; 2]>,
    by_shape: BTreeMap<(Shape, Phase), usize>,
    starts: usize,
    token_calls: usize,
    answered: usize,
    driven: Duration,
}

impl Rounds {
    fn begin() -> Self {
        let disk = Disk::new();
        disk.ask_for("slow", "8");
        Self {
            sandbox: sandbox(),
            disk,
            folder: Arc::new(TempDir::new().unwrap()),
            next: AtomicU64::new(1_000),
            trail: Trail::default(),
            received: BTreeSet::new(),
            seen: HashMap::new(),
            phases: BTreeMap::new(),
            by_shape: BTreeMap::new(),
            starts: 0,
            token_calls: 0,
            answered: 0,
            driven: Duration::ZERO,
        }
    }

    fn start(&mut self, shape: Shape) -> Gateway {
        self.sandbox.reset();
        self.starts += 1;
        let folder = Some(self.folder.clone());
        let gateway = start_with(&self.sandbox, Setup { folder, ..shape.setup(&self.disk) });
        until_keys_are_known(&gateway);
        gateway
    }

    /// Calls and kills. Returns what callers saw.
    fn drive(&mut self, gateway: Gateway, shape: Shape) -> (Vec<Call>, Snapshots) {
        misbehave(&self.sandbox);
        let (address, moment) = (gateway.address, Duration::from_millis(LOAD + random(MORE_LOAD)));
        let connections: Vec<_> = (0..CALLERS).map(|_| Connection::open(address)).collect();
        let begun = Instant::now();
        let (calls, took, [before, behind]) = thread::scope(|scope| {
            let next = &self.next;
            let call = |connection| scope.spawn(move || call_on(connection, next));
            let callers: Vec<_> = connections.into_iter().map(call).collect();
            thread::sleep(moment);
            let took = begun.elapsed();
            let snapshots = self.kill(gateway, shape);
            (callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect(), took, snapshots)
        });
        let calls: Vec<Call> = calls;
        self.driven += took;
        let is_answer = |(_, seen): &&Call| seen.as_ref().is_some_and(|reply| reply.outcome() != "not_sent");
        self.answered += calls.iter().filter(is_answer).count();
        self.until_all_is_received();
        (calls, Snapshots { before, behind, at_last: self.snapshot() })
    }

    fn kill(&self, gateway: Gateway, shape: Shape) -> [Snapshot; 2] {
        if shape == Shape::Frozen {
            gateway.signal("-STOP");
            wait_for("the stop", || is_stopped(gateway.pid()).then_some(()));
            wait_for("answers to all", || {
                self.snapshot().values().all(|it| it.status.is_some()).then_some(())
            });
        }
        let before = self.snapshot();
        gateway.kill();
        [before, self.snapshot()]
    }

    /// What a dead process has sent is there to be read. We queue up behind its connections, then wait for their ends.
    fn until_all_is_received(&self) {
        let mut queued = TcpStream::connect(self.sandbox.address()).unwrap();
        write!(queued, "GET /_sandbox/ HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
        queued.read_to_end(&mut Vec::new()).unwrap();
        wait_for("an idle upstream", || (self.sandbox.connections().open == 0).then_some(()));
    }

    fn snapshot(&self) -> Snapshot {
        self.sandbox.requests().into_iter().filter_map(|it| Some((task_of(&it)?, it))).collect()
    }

    /// The upstream and its token endpoint, when a process is gone: nothing came without an intent or twice, all with a
    /// token of the one call.
    fn hear_upstream(&mut self) {
        let calls = self.sandbox.token_calls();
        self.token_calls += calls.len();
        assert_eq!(self.token_calls, self.starts, "one call a start: {calls:?}");
        let token = calls[0].issued.clone();
        assert!(token.is_some());
        for request in self.sandbox.requests() {
            assert_eq!(token_of(&request), token);
            let Some(task) = task_of(&request) else { panic!("cut: {request:?}") };
            assert!(self.trail.intents.contains_key(&task), "{task} was sent, and has no intent");
            assert!(self.received.insert(task), "{task} was sent twice");
        }
    }

    /// How many requests the kill left open, by phase.
    fn count(&mut self, shape: Shape, snapshots: &Snapshots) -> BTreeMap<Phase, usize> {
        let mut met = BTreeMap::<Phase, usize>::new();
        for task in self.trail.open.values() {
            *met.entry(snapshots.phase(*task)).or_default() += 1;
        }
        for (phase, requests) in &met {
            let [rounds, all] = self.phases.entry(*phase).or_default();
            *rounds += 1;
            *all += requests;
            *self.by_shape.entry((shape, *phase)).or_default() += requests;
        }
        met
    }

    /// The trail after the restart: what was open is unknown, once, and all else is as it was.
    fn hear_trail(&mut self, open: &BTreeMap<String, u64>) {
        self.trail.read_on(&self.folder.path().join("audit"));
        assert!(self.trail.open.is_empty(), "still open: {:?}", self.trail.open);
        for id in open.keys() {
            let outcome = &self.trail.outcomes[id];
            assert!(outcome["outcome"] == "unknown" && is_from_recovery(outcome), "{outcome}");
        }
    }

    /// What a caller saw is what the trail says. A call without a key may be in doubt there, since its outcome need
    /// not be safe before it is answered.
    fn hear_callers(&mut self, calls: &[Call]) {
        for (task, reply) in calls.iter().filter_map(|(task, seen)| Some((task, seen.as_ref()?))) {
            let was_sent =
                self.trail.intents.get(task).is_some_and(|ids| ids.contains(&id(reply).to_owned()));
            if !was_sent {
                assert_eq!(reply.outcome(), "not_sent", "{task}: {reply:?}");
                continue;
            }
            let on_record = &self.trail.outcomes[id(reply)];
            let may_differ = !is_keyed(*task) && is_from_recovery(on_record);
            assert!(may_differ || on_record["outcome"] == reply.outcome(), "{reply:?}: {on_record}");
            let needs_a_send = reply.outcome() != "not_sent";
            assert!(!needs_a_send || self.received.contains(task), "{task} was never sent: {reply:?}");
        }
    }

    /// Repeats keyed calls. Says how many were sent only now, since there was no intent of theirs.
    fn repeat(&mut self, gateway: &Gateway, tasks: &[u64]) -> usize {
        let mut connection = Connection::open(gateway.address);
        let is_new = |task: &&u64| {
            let reply = wait_for("an answer", || {
                let reply = connection.call(**task).unwrap();
                // On a busy machine the trail may be late with an intent: nothing was sent, and the key is free.
                (reply.code() != "audit_unavailable").then_some(reply)
            });
            self.check_repeated(**task, &reply)
        };
        let new: Vec<_> = tasks.iter().filter(is_new).copied().collect();
        new.len()
    }

    /// The answer to a repeated call is the first one's, or there is doubt. Says whether it is a first call.
    fn check_repeated(&self, task: u64, reply: &Reply) -> bool {
        let Some((first, outcome)) =
            self.trail.last(task).filter(|(_, outcome)| outcome["outcome"] != "not_sent")
        else {
            assert_eq!(reply.outcome(), "succeeded", "{task}: {reply:?}");
            return true;
        };
        let named = reply.headers.get("x-gateway-first-request-id").map_or("", String::as_str);
        assert_eq!(named, first, "{task}: {reply:?}");
        if outcome["outcome"] == "unknown" {
            assert_eq!((reply.status, reply.code()), (409, "outcome_unknown"), "{task}: {reply:?}");
        } else {
            assert_eq!(reply.outcome(), "replayed", "{task}: {reply:?}");
            if let Some(seen) = self.seen.get(&task) {
                assert_eq!((reply.status, &reply.body), (seen.status, &seen.body), "{task}");
            }
        }
        false
    }

    fn phase(&self, phase: Phase) -> [usize; 2] {
        self.phases.get(&phase).copied().unwrap_or_default()
    }

    fn rate(&self) -> f64 {
        self.answered as f64 / self.driven.as_secs_f64()
    }
}

#[test]
fn whenever_it_is_killed_all_witnesses_agree() {
    let kills = kills();
    let mut rounds = Rounds::begin();
    let mut gateway = rounds.start(Shape::ALL[0]);
    let mut sent_at_last = 0;
    for kill in 1..=kills {
        let (shape, next) = (Shape::ALL[(kill - 1) % 3], Shape::ALL[kill % 3]);
        let (calls, snapshots) = rounds.drive(gateway, shape);
        rounds.trail.read_on(&rounds.folder.path().join("audit"));
        rounds.hear_upstream();
        println!("{shape:?}: {:?}", rounds.count(shape, &snapshots));
        let open = rounds.trail.open.clone();
        gateway = rounds.start(next);
        rounds.hear_trail(&open);
        rounds.hear_callers(&calls);
        let keyed: Vec<_> = calls.iter().map(|(task, _)| *task).filter(|task| is_keyed(*task)).collect();
        // A key whose call was not sent is free: what comes of it is to be seen.
        let is_sent = |seen: &Reply| seen.outcome() != "not_sent";
        let seen = calls.into_iter().filter_map(|(task, seen)| Some((task, seen.filter(is_sent)?)));
        rounds.seen.extend(seen);
        sent_at_last += rounds.repeat(&gateway, &keyed);
    }
    println!("{}", finish(&mut rounds, gateway, kills));
    println!("{sent_at_last} keyed calls were sent only when they were repeated");
}

/// Every key once more, then the trail from its beginning, and the figures.
fn finish(rounds: &mut Rounds, gateway: Gateway, kills: usize) -> String {
    let folder = gateway.kill();
    let audit = folder.path().join("audit");
    rounds.until_all_is_received();
    rounds.trail.read_on(&audit);
    rounds.hear_upstream();
    let open = rounds.trail.open.clone();
    let mut gateway = rounds.start(Shape::Plain);
    rounds.hear_trail(&open);
    let keyed: Vec<_> = rounds.trail.intents.keys().filter(|task| is_keyed(**task)).copied().collect();
    assert_eq!(
        (rounds.repeat(&gateway, &keyed), rounds.sandbox.requests().len()),
        (0, 0),
        "nothing is sent again"
    );
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    rounds.hear_upstream();
    let (whole, said) = verify(&audit);
    assert!(whole, "{said}");

    let Rounds { starts, token_calls, answered, received, phases, by_shape, .. } = &*rounds;
    let figures = format!(
        "{kills} kills, {starts} starts, {token_calls} token calls; {said}{answered} answers, {:.0} a second; {} \
         requests sent, {} keys repeated; by phase, in rounds and requests: {phases:?}; {by_shape:?}",
        rounds.rate(),
        received.len(),
        keyed.len(),
    );
    let least = if kills >= PROOF { 20 } else { 1 };
    for phase in [Phase::IntentToSend, Phase::SendToReply, Phase::ReplyToOutcome] {
        assert!(rounds.phase(phase)[0] >= least, "{figures}");
    }
    assert!(kills < PROOF || rounds.rate() >= 200.0, "{figures}");
    figures
}
