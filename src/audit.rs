//! Stage 8: the audit trail. A record is opened first and closed by its outcome, its refusal, or its drop.
//!
//! *Queued* means in the writer's queue; *safe* means that the write returned, so that `kill -9` of this
//! process loses nothing. Guarantees: an intent is safe before the first upstream byte; intents and outcomes
//! are never dropped; refusals never wait and cannot fill the queue or the disk. Against somebody who can
//! write as the gateway the chain proves only what lies before a head that is kept elsewhere.

pub mod chain;
pub mod recovery;
mod writer;

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bytes::Bytes;
use jiff::Timestamp;
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use serde::Serialize;
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::{sync::watch, time::timeout};
use uuid::Uuid;

use crate::{
    admission::Peer,
    error::{Code, Stage},
    outcome::Outcome,
};
use chain::{KeyError, Keys};
use writer::Writer;

/// Refusals of one kind that are recorded in full each second; the rest of the second is one record.
const FULL_REFUSALS: u32 = 10;

/// So many kinds of refusals are told apart; what goes beyond shares a kind.
const MAX_KINDS: usize = 1024;

/// Below this much free space refusals are no longer recorded: no stranger may fill the disk.
const LOW_WATER: u64 = 64 << 20;

/// How long a stop waits for the last write.
const CLOSE_TIME: Duration = Duration::from_secs(3);

/// Where and how a trail is kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory of the segments.
    pub directory: PathBuf,
    /// Bytes after which a new segment begins.
    pub segment_size: u64,
    /// The chain's key; without one, a key is made in the directory.
    pub key_file: Option<PathBuf>,
    /// How many records may wait to be written.
    pub queue: usize,
    /// An intent that is not safe by then is refused.
    pub intent_deadline: Duration,
}

/// Why a trail could not be opened.
#[derive(Debug, Error)]
pub enum StartError {
    /// Another process writes it.
    #[error("audit directory {0}: another process writes here; each gateway needs a directory of its own")]
    Locked(PathBuf),
    /// The directory cannot be used.
    #[error("audit directory {0}: {1}")]
    Directory(PathBuf, io::Error),
    /// The key cannot be used.
    #[error("audit key {0}")]
    Key(#[from] KeyError),
}

/// The intent could not be made safe in time.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the intent could not be made safe")]
pub struct Unavailable;

/// How an exchange ended.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What became of the task.
    pub outcome: Outcome,
    /// The gateway's own code, if it has one to say.
    pub code: Option<Code>,
    /// The status that the caller gets.
    pub status: Option<u16>,
    /// The upstream's status.
    pub upstream_status: Option<u16>,
    /// The upstream's result code.
    pub result_code: Option<String>,
    /// How often a request was sent.
    pub attempts: u32,
    /// Which token was used last.
    pub token_generation: u64,
    /// What else is to be said.
    pub note: Option<&'static str>,
}

/// Counts of the trail.
#[derive(Clone, Debug)]
pub struct Metrics {
    records: IntCounterVec,
    bytes: IntCounter,
    batches: IntCounter,
    errors: IntCounter,
    folded: IntCounter,
    dropped: IntCounter,
    late: IntCounter,
    queue: IntGauge,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(format!("ccsqm_gateway_audit_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let records = Opts::new("ccsqm_gateway_audit_records_total", "Records written, by kind.");
        let metrics = Self {
            records: IntCounterVec::new(records, &["kind"])?,
            bytes: counter("bytes_total", "Bytes written.")?,
            batches: counter("batches_total", "Batches written.")?,
            errors: counter("write_errors_total", "Writes that failed.")?,
            folded: counter("folded_refusals_total", "Refusals that were recorded by count only.")?,
            dropped: counter("dropped_refusals_total", "Refusals that were not recorded.")?,
            late: counter("late_intents_total", "Intents that were not safe in time.")?,
            queue: IntGauge::new("ccsqm_gateway_audit_queue_records", "Records that wait to be written.")?,
        };
        registry.register(Box::new(metrics.records.clone()))?;
        registry.register(Box::new(metrics.queue.clone()))?;
        Ok(metrics)
    }
}

/// The trail, as all of the gateway sees it. Cheap to clone.
#[derive(Clone)]
pub struct Audit {
    shared: Arc<Shared>,
    writer: Arc<Mutex<Option<JoinHandle<()>>>>,
    deadline: Duration,
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Audit")
    }
}

struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
    /// The position up to which everything is safe.
    safe: watch::Sender<u64>,
    healthy: AtomicBool,
    metrics: Metrics,
    directory: PathBuf,
    capacity: usize,
}

struct Queue {
    entries: Vec<Entry>,
    /// Places kept for the outcomes of intents.
    reserved: usize,
    /// How many entries were ever queued.
    position: u64,
    closing: bool,
    folds: Folds,
}

/// The refusals of the present second.
struct Folds {
    since: Instant,
    kinds: HashMap<(Who, Code), Fold>,
    space_left: bool,
}

#[derive(Default)]
struct Fold {
    seen: u32,
    more: Option<Entry>,
}

/// Whose refusals are folded together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Who {
    Caller(Arc<str>),
    Address(IpAddr),
    Uid(u32),
    Others,
}

/// A record on its way to the writer.
enum Entry {
    Intent {
        time: Timestamp,
        facts: Box<Facts>,
        body: Bytes,
        members: Vec<u8>,
    },
    Outcome {
        time: Timestamp,
        facts: Box<Facts>,
        answer: Answer,
    },
    Refusal {
        time: Timestamp,
        facts: Box<Facts>,
        code: Code,
        status: u16,
        count: u64,
    },
    Event {
        time: Timestamp,
        name: &'static str,
        details: Map<String, Value>,
    },
    /// The outcome that a restart gives to an intent left without one.
    Doubt {
        time: Timestamp,
        id: String,
    },
}

/// What is known of a request.
#[derive(Clone)]
struct Facts {
    id: Uuid,
    peer: Peer,
    caller: Option<Arc<str>>,
    caller_id: Option<String>,
    traceparent: Option<String>,
    route: Option<Arc<str>>,
    operator: Option<String>,
    stage: Stage,
    entered: Instant,
    spent: [Duration; Stage::COUNT],
}

impl Audit {
    /// Opens the trail: takes its lock, recovers what a crash left, starts the writer.
    pub fn start(options: &Options, metrics: Metrics) -> Result<Self, StartError> {
        let directory = options.directory.clone();
        let fail = |error| StartError::Directory(directory.clone(), error);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(fail)?;
        let lock = lock(&directory)?;
        let keys = match &options.key_file {
            Some(path) => Keys::load(path)?,
            None => Keys::load_or_make(&directory)?,
        };
        let writer = recover(options, keys, lock).map_err(fail)?;
        let now = Instant::now();
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                entries: Vec::new(),
                reserved: 0,
                position: 0,
                closing: false,
                folds: Folds { since: now, kinds: HashMap::new(), space_left: true },
            }),
            filled: Condvar::new(),
            safe: watch::Sender::new(0),
            healthy: AtomicBool::new(true),
            metrics,
            directory: options.directory.clone(),
            capacity: options.queue,
        });
        let writing = shared.clone();
        let writer =
            thread::Builder::new().name("audit".into()).spawn(move || writer.run(&writing)).map_err(fail)?;
        Ok(Self { shared, writer: Arc::new(Mutex::new(Some(writer))), deadline: options.intent_deadline })
    }

    /// Opens the record of a request.
    pub fn open(&self, peer: Peer) -> Record {
        let id = Uuid::now_v7();
        let facts = Facts {
            id,
            peer,
            caller: None,
            caller_id: None,
            traceparent: None,
            route: None,
            operator: None,
            stage: Stage::Admission,
            entered: Instant::now(),
            spent: [Duration::ZERO; Stage::COUNT],
        };
        Record {
            audit: self.clone(),
            id,
            stage: Stage::Admission,
            open: Some(Box::new(facts)),
            intended: false,
            taken: false,
        }
    }

    /// Records an event of the gateway itself.
    pub fn event(&self, name: &'static str, details: Map<String, Value>) {
        self.shared.push(Entry::Event { time: Timestamp::now(), name, details });
    }

    /// Whether the last write succeeded.
    pub fn healthy(&self) -> bool {
        self.shared.healthy.load(Ordering::Relaxed)
    }

    /// Records the stop and waits, for a while, until all is written.
    pub fn close(&self) {
        {
            let mut queue = self.shared.lock();
            queue.fold_up(&self.shared.metrics);
            queue.push(Entry::Event { time: Timestamp::now(), name: "stop", details: Map::new() });
            queue.closing = true;
        }
        self.shared.filled.notify_all();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(writer) = writer else { return };
        let deadline = Instant::now() + CLOSE_TIME;
        while !writer.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        if writer.is_finished() {
            let _ = writer.join();
        }
    }
}

fn lock(directory: &Path) -> Result<File, StartError> {
    let fail = |error| StartError::Directory(directory.into(), error);
    let path = directory.join("lock");
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(StartError::Locked(directory.into())),
        Err(fs::TryLockError::Error(error)) => Err(fail(error)),
    }
}

/// Whether a process holds the lock of a trail, so that its last line may be half-written.
pub fn is_live(directory: &Path) -> bool {
    matches!(lock(directory), Err(StartError::Locked(_)))
}

/// Reads the trail, cuts a torn line off, gives every open intent its outcome, and records all that. One
/// write does it, so that a crash in between leaves either nothing or a torn line for the next start.
fn recover(options: &Options, keys: Keys, lock: File) -> io::Result<Writer> {
    let found = recovery::read(&options.directory, &keys)?;
    let mut entries = Vec::new();
    let event = |name, details: Value| Entry::Event {
        time: Timestamp::now(),
        name,
        details: details.as_object().cloned().unwrap_or_default(),
    };
    if let Some((path, offset, length)) = &found.torn {
        OpenOptions::new().write(true).open(path)?.set_len(*offset)?;
        entries.push(event("recovery", json!({ "what": "torn line cut off", "bytes": length })));
    }
    if let Some(fault) = found.faults.first() {
        let file = fault.file.file_name().map(|name| name.to_string_lossy().into_owned());
        let details = json!({ "what": "damaged", "file": file, "line": fault.line, "reason": fault.reason });
        entries.push(event("recovery", details));
    }
    for id in found.in_doubt.into_keys() {
        entries.push(Entry::Doubt { time: Timestamp::now(), id });
    }
    entries.push(event("start", json!({ "version": env!("CARGO_PKG_VERSION") })));
    // What is damaged stays as it is: new records go into a new segment.
    let segment = match found.last {
        Some((path, length)) if found.faults.is_empty() => {
            Some((OpenOptions::new().write(true).open(path)?, length))
        }
        _ => None,
    };
    let mut writer = Writer {
        directory: options.directory.clone(),
        segment_size: options.segment_size,
        keys,
        seq: found.seq,
        hash: found.hash,
        segment,
        _lock: lock,
    };
    let first = writer.seq + 1;
    let mut text = Vec::new();
    for entry in &entries {
        writer.append(entry, &mut text);
    }
    writer.write(&text, first)?;
    Ok(writer)
}

/// The record of one request. Moved, never shared.
#[derive(Debug)]
pub struct Record {
    audit: Audit,
    id: Uuid,
    stage: Stage,
    open: Option<Box<Facts>>,
    intended: bool,
    taken: bool,
}

impl std::fmt::Debug for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Facts({})", self.id)
    }
}

impl Record {
    /// The request's id.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The stage that the request has reached.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The request goes on to the next stage.
    pub fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        if let Some(facts) = &mut self.open {
            facts.enter(stage);
        }
    }

    /// The caller's own id of the request.
    pub fn caller_id(&mut self, id: String) {
        self.set(|facts| facts.caller_id = Some(id));
    }

    /// The caller's `traceparent`.
    pub fn traceparent(&mut self, parent: String) {
        self.set(|facts| facts.traceparent = Some(parent));
    }

    /// Who calls.
    pub fn caller(&mut self, name: Arc<str>) {
        self.set(|facts| facts.caller = Some(name));
    }

    /// Which route.
    pub fn route(&mut self, name: Arc<str>) {
        self.set(|facts| facts.route = Some(name));
    }

    /// Who acts.
    pub fn operator(&mut self, id: String) {
        self.set(|facts| facts.operator = Some(id));
    }

    fn set(&mut self, change: impl FnOnce(&mut Facts)) {
        if let Some(facts) = &mut self.open {
            change(facts);
        }
    }

    /// Closes the record of a request that was refused here. Does nothing to one that is closed or taken.
    pub fn refuse(&mut self, code: Code, status: u16) {
        let Some(mut facts) = self.open.take() else { return };
        facts.enter(self.stage);
        if self.intended {
            let answer = Answer::without_reply(Outcome::NotSent, code, status);
            self.audit.shared.push_outcome(facts, answer);
        } else {
            self.audit.shared.push_refusal(facts, code, status);
        }
    }

    /// Queues the intent and waits until it is safe. `members` are further members of the record, as JSON
    /// text with a comma in front.
    pub async fn intent(&mut self, body: &Bytes, members: Vec<u8>) -> Result<(), Unavailable> {
        let facts = self.open.clone().ok_or(Unavailable)?;
        let shared = &self.audit.shared;
        let entry = Entry::Intent { time: Timestamp::now(), facts, body: body.clone(), members };
        let position = shared.push_intent(entry)?;
        self.intended = true;
        let mut safe = shared.safe.subscribe();
        match timeout(self.audit.deadline, safe.wait_for(|safe| *safe >= position)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => {
                shared.metrics.late.inc();
                Err(Unavailable)
            }
        }
    }

    /// Hands the open record over. What is left knows its id and stage and records nothing.
    pub fn take(&mut self) -> Self {
        self.taken = true;
        Self {
            audit: self.audit.clone(),
            id: self.id,
            stage: self.stage,
            open: self.open.take(),
            intended: self.intended,
            taken: false,
        }
    }

    /// Whether it was handed over.
    pub fn is_taken(&self) -> bool {
        self.taken
    }

    /// Closes the record with the outcome of its exchange.
    pub fn finish(mut self, answer: Answer) {
        if let Some(mut facts) = self.open.take() {
            facts.enter(self.stage);
            self.audit.shared.push_outcome(facts, answer);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Some(mut facts) = self.open.take() else { return };
        facts.enter(self.stage);
        if self.intended {
            let code = Code::Internal;
            let answer = Answer::without_reply(Outcome::Unknown, code, code.status().as_u16());
            self.audit.shared.push_outcome(facts, Answer { note: Some("cut off"), ..answer });
        } else {
            let code = Code::CallerLeft;
            self.audit.shared.push_refusal(facts, code, code.status().as_u16());
        }
    }
}

impl Answer {
    fn without_reply(outcome: Outcome, code: Code, status: u16) -> Self {
        Self {
            outcome,
            code: Some(code),
            status: Some(status),
            upstream_status: None,
            result_code: None,
            attempts: 0,
            token_generation: 0,
            note: None,
        }
    }
}

impl Facts {
    fn enter(&mut self, stage: Stage) {
        let now = Instant::now();
        self.spent[self.stage as usize] += now.duration_since(self.entered);
        self.entered = now;
        self.stage = stage;
    }

    fn who(&self) -> Who {
        match (&self.caller, self.peer) {
            (Some(caller), _) => Who::Caller(caller.clone()),
            (None, Peer::Tcp(address)) => Who::Address(address.ip()),
            (None, Peer::Unix { uid, .. }) => Who::Uid(uid),
        }
    }

    fn write(&self, line: &mut Vec<u8>) {
        member(line, "id", &self.id.to_string());
        optional(line, "caller", self.caller.as_deref());
        member(line, "peer", &self.peer.to_string());
        optional(line, "caller_id", self.caller_id.as_ref());
        optional(line, "traceparent", self.traceparent.as_ref());
        optional(line, "operator", self.operator.as_ref());
        optional(line, "route", self.route.as_deref());
    }

    /// Milliseconds by stage.
    fn milliseconds(&self) -> Map<String, Value> {
        let reached = Stage::ALL.iter().zip(self.spent).take(self.stage as usize + 1);
        reached.map(|(stage, spent)| (stage.as_str().to_owned(), json!(millis(spent)))).collect()
    }
}

/// Milliseconds with three decimals.
fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

impl Entry {
    fn kind(&self) -> &'static str {
        match self {
            Self::Intent { .. } => "intent",
            Self::Outcome { .. } | Self::Doubt { .. } => "outcome",
            Self::Refusal { .. } => "refusal",
            Self::Event { .. } => "event",
        }
    }

    fn time(&self) -> Timestamp {
        match self {
            Self::Intent { time, .. }
            | Self::Outcome { time, .. }
            | Self::Refusal { time, .. }
            | Self::Event { time, .. }
            | Self::Doubt { time, .. } => *time,
        }
    }

    /// The record as JSON, but for its links and closing brace.
    fn format(&self, seq: u64, keys: &Keys, line: &mut Vec<u8>) {
        line.extend_from_slice(format!("{{\"seq\":{seq}").as_bytes());
        member(line, "time", &format!("{:.6}", self.time()));
        member(line, "kind", self.kind());
        match self {
            Self::Intent { facts, body, members, .. } => {
                facts.write(line);
                line.extend_from_slice(members);
                member(line, "body_size", &body.len());
                member(line, "digest", &keys.digest(body));
            }
            Self::Outcome { facts, answer, .. } => {
                facts.write(line);
                member(line, "outcome", answer.outcome.as_str());
                optional(line, "code", answer.code.map(Code::as_str));
                member(line, "stage", facts.stage.as_str());
                optional(line, "status", answer.status);
                optional(line, "upstream_status", answer.upstream_status);
                optional(line, "result_code", answer.result_code.as_ref());
                member(line, "attempts", &answer.attempts);
                member(line, "token_generation", &answer.token_generation);
                optional(line, "note", answer.note);
                member(line, "ms", &facts.milliseconds());
            }
            Self::Refusal { facts, code, status, count, .. } => {
                facts.write(line);
                member(line, "outcome", Outcome::NotSent.as_str());
                member(line, "code", code.as_str());
                member(line, "stage", facts.stage.as_str());
                member(line, "status", status);
                optional(line, "count", (*count > 1).then_some(count));
            }
            Self::Event { name, details, .. } => {
                member(line, "event", name);
                for (key, value) in details {
                    member(line, key, value);
                }
            }
            Self::Doubt { id, .. } => {
                member(line, "id", id);
                member(line, "outcome", Outcome::Unknown.as_str());
                member(line, "note", "the process ended between intent and outcome");
            }
        }
    }
}

fn member(line: &mut Vec<u8>, key: &str, value: &(impl Serialize + ?Sized)) {
    line.push(b',');
    // Writing strings, numbers and maps of them into memory cannot fail.
    let _ = serde_json::to_writer(&mut *line, key);
    line.push(b':');
    let _ = serde_json::to_writer(line, value);
}

fn optional(line: &mut Vec<u8>, key: &str, value: Option<impl Serialize>) {
    if let Some(value) = value {
        member(line, key, &value);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, entry: Entry) {
        self.lock().push(entry);
        self.filled.notify_one();
    }

    fn push_intent(&self, entry: Entry) -> Result<u64, Unavailable> {
        let mut queue = self.lock();
        if queue.closing || queue.entries.len() + queue.reserved + 2 > self.capacity {
            return Err(Unavailable);
        }
        queue.reserved += 1;
        let position = queue.push(entry);
        drop(queue);
        self.filled.notify_one();
        Ok(position)
    }

    fn push_outcome(&self, facts: Box<Facts>, answer: Answer) {
        let mut queue = self.lock();
        queue.reserved = queue.reserved.saturating_sub(1);
        queue.push(Entry::Outcome { time: Timestamp::now(), facts, answer });
        drop(queue);
        self.filled.notify_one();
    }

    fn push_refusal(&self, facts: Box<Facts>, code: Code, status: u16) {
        let mut queue = self.lock();
        if queue.folds.since.elapsed() >= Duration::from_secs(1) {
            queue.fold_up(&self.metrics);
            queue.folds.space_left = has_space(&self.directory);
        }
        let room = queue.folds.space_left && queue.entries.len() + queue.reserved < self.capacity / 2;
        let folds = &mut queue.folds;
        let mut kind = (facts.who(), code);
        if folds.kinds.len() >= MAX_KINDS && !folds.kinds.contains_key(&kind) {
            kind.0 = Who::Others;
        }
        let fold = folds.kinds.entry(kind).or_default();
        fold.seen += 1;
        match &mut fold.more {
            _ if !room => self.metrics.dropped.inc(),
            Some(Entry::Refusal { count, .. }) => *count += 1,
            more => {
                let entry = Entry::Refusal { time: Timestamp::now(), facts, code, status, count: 1 };
                if fold.seen > FULL_REFUSALS {
                    *more = Some(entry);
                } else {
                    queue.push(entry);
                }
            }
        }
        drop(queue);
        self.filled.notify_one();
    }

    /// Waits for entries and swaps them out whole; false once the trail is closed and all is written.
    fn next_batch(&self, batch: &mut Vec<Entry>) -> bool {
        let mut queue = self.lock();
        loop {
            if queue.folds.is_due() {
                queue.fold_up(&self.metrics);
            }
            if !queue.entries.is_empty() {
                std::mem::swap(&mut queue.entries, batch);
                return true;
            }
            if queue.closing {
                return false;
            }
            queue = if queue.folds.is_pending() {
                let waited = self.filled.wait_timeout(queue, Duration::from_millis(200));
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.filled.wait(queue).unwrap_or_else(PoisonError::into_inner)
            };
        }
    }

    fn written(&self, batch: &[Entry], bytes: usize) {
        for entry in batch {
            self.metrics.records.with_label_values(&[entry.kind()]).inc();
        }
        self.metrics.bytes.inc_by(bytes as u64);
        self.metrics.batches.inc();
        self.safe.send_modify(|safe| *safe += batch.len() as u64);
        self.metrics.queue.set(i64::try_from(self.lock().entries.len()).unwrap_or(i64::MAX));
    }

    fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Ordering::Relaxed);
    }

    fn count_error(&self) {
        self.metrics.errors.inc();
    }

    /// Waits before a retry; true if the trail is closing, so that the next try is the last.
    fn wait_for_retry(&self, wait: Duration) -> bool {
        let queue = self.lock();
        let waited = self.filled.wait_timeout_while(queue, wait, |queue| !queue.closing);
        waited.unwrap_or_else(PoisonError::into_inner).0.closing
    }
}

impl Queue {
    fn push(&mut self, entry: Entry) -> u64 {
        self.entries.push(entry);
        self.position += 1;
        self.position
    }

    /// The second is over: what was only counted becomes one record each.
    fn fold_up(&mut self, metrics: &Metrics) {
        self.folds.since = Instant::now();
        for (_, fold) in std::mem::take(&mut self.folds.kinds) {
            if let Some(entry) = fold.more {
                if let Entry::Refusal { count, .. } = &entry {
                    metrics.folded.inc_by(*count);
                }
                self.push(entry);
            }
        }
    }
}

impl Folds {
    fn is_pending(&self) -> bool {
        self.kinds.values().any(|fold| fold.more.is_some())
    }

    fn is_due(&self) -> bool {
        self.since.elapsed() >= Duration::from_secs(1) && self.is_pending()
    }
}

fn has_space(directory: &Path) -> bool {
    rustix::fs::statvfs(directory).is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= LOW_WATER)
}
