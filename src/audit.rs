//! Stage 8: the audit trail. A record is opened first and closed by its outcome, its refusal, or its drop.
//!
//! *Queued* means in the writer's queue; *safe* means that the write returned, so that `kill -9` of this
//! process loses nothing, or, with durability `disk`, that fdatasync returned after it, so that a crash of the
//! machine loses nothing either; and that the segment's name still led to the file then. Guarantees: an intent is
//! safe before the first upstream byte; intents and outcomes are never dropped; refusals never wait and cannot fill
//! the queue or the disk. Against somebody who can write as the gateway the chain proves only what lies before a
//! head that is kept elsewhere.

pub mod age;
mod batch;
pub mod chain;
mod clocks;
mod directory;
pub mod history;
pub mod init;
mod folds;
mod lane;
mod ledger;
pub mod limit;
mod line;
mod lock;
pub mod loss;
mod queue;
mod record;
pub mod recovery;
mod reply;
pub mod resolution;
mod retention;
mod segment;
mod sync;
#[cfg(test)]
mod tests;
pub mod unresolved;
mod writer;

use std::{
    fs::{File, OpenOptions, TryLockError},
    future::{Future, poll_fn},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt, chown},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use http::HeaderValue;
use prometheus::{Counter, IntCounter, IntCounterVec, IntGauge, Opts, Registry, core::Collector};
use rustix::{fs::OFlags, io::Errno};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::sync::SemaphorePermit;

use crate::{
    clock,
    config::{RefusalBudget, trail::SLACK},
    keyed_hash::{Keys, hidden},
    model::{audit_fields::SHOWN, durability::Durability, peer::Peer, redaction::Shown},
    supervisor::Vital,
};
use age::{Ages, Newer};
use batch::Batch;
use chain::KeyError;
pub use clocks::ClockDoubt;
use clocks::Clocks;
use directory::{Directory, look_for_space, open_regular};
use init::Absent;
use lane::Lane;
use lock::{Lock, Statement};
use queue::Shared;
use record::Entry;
pub use record::{Answer, Detail, Names, Queued, Record};
use recovery::{DAMAGED, Damage, Found};
pub use reply::StoredReply;
pub use retention::Early;
use retention::Place;
use segment::Segment;

use sync::{Syncs, UNFINISHED, make_directory, sync_all, write_again};
use unresolved::{CallState, UnresolvedCall, UnresolvedList};
use writer::Writer;

/// How long a stop waits for the last write.
const CLOSE_TIME: Duration = Duration::from_secs(3);

/// How long the hour lasts that budgets of refusals are for.
pub const HOUR: Duration = Duration::from_secs(60 * 60);

/// Where and how a trail is kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory of the segments.
    pub directory: PathBuf,
    /// Directory and key must be there: see [`init`].
    pub must_exist: bool,
    /// When a record is safe.
    pub durability: Durability,
    /// Bytes after which a new segment begins.
    pub segment_size: u64,
    /// The chain's key; without one, a key is made in the directory.
    pub key_file: Option<PathBuf>,
    /// How many records may wait to be written.
    pub queue: usize,
    /// An intent that is not safe by then is refused.
    pub intent_deadline: Duration,
    /// How operator, peer, caller_id and traceparent are written: [`SHOWN`].
    pub shown: [Shown; SHOWN.len()],
    /// How long records are kept, at least; `None`: for ever.
    pub retain: Option<Duration>,
    /// From which size on segments go before that; `None`: from none.
    pub early: Option<Early>,
    /// How many bytes refusals may take an hour.
    pub refusals: RefusalBudget,
    /// How long that hour lasts: [`HOUR`], but in tests.
    pub hour: Duration,
    /// The idempotency window: a trail without a record in it makes the clock doubtful, and no younger record is removed.
    pub window: Duration,
    /// Below this much free space, in bytes, refusals are no longer recorded: no stranger may fill the disk.
    pub low_water: u64,
    /// The word of a loss that the operator accepts: see [`loss`].
    pub accept_loss: Option<String>,
}

impl Options {
    /// Looks whether a start finds what it needs. Segments whose key is missing are set aside if that loss is accepted;
    /// returns where they are.
    fn look_for_key(&self) -> Result<Option<String>, StartError> {
        match init::check(&self.directory, self.key_file.as_deref(), self.must_exist) {
            Err(Absent::KeyOfSegments { word, .. }) if self.accept_loss.as_ref() == Some(&word) => {
                loss::set_aside(&self.directory).map(Some)
            }
            checked => checked.map(|()| None).map_err(StartError::from),
        }
    }

    /// To append to a trail that nobody writes. No new segment is begun there, unless the last one is damaged: it would belong to
    /// whoever appends.
    fn to_append(directory: &Path) -> Self {
        Self {
            directory: directory.into(),
            must_exist: true,
            durability: Durability::Disk,
            segment_size: u64::MAX,
            key_file: None,
            queue: 0,
            intent_deadline: Duration::ZERO,
            shown: Default::default(),
            retain: None,
            early: None,
            refusals: RefusalBudget::default(),
            hour: HOUR,
            window: Duration::ZERO,
            low_water: 0,
            accept_loss: None,
        }
    }
}

#[cfg(any(test, fuzzing))]
impl Options {
    /// For tests: one segment, a short queue, nothing hidden or removed.
    pub(crate) fn small(directory: &Path) -> Self {
        Self {
            directory: directory.into(),
            must_exist: false,
            durability: Durability::Kernel,
            segment_size: 1 << 30,
            key_file: None,
            queue: 64,
            intent_deadline: Duration::from_secs(5),
            shown: Default::default(),
            retain: None,
            early: None,
            refusals: RefusalBudget::default(),
            hour: HOUR,
            window: Duration::ZERO,
            low_water: 0,
            accept_loss: None,
        }
    }
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
    /// The key in the directory cannot be used.
    #[error("audit key {0}")]
    Key(KeyError),
    /// The key of [`Options::key_file`] cannot be used.
    #[error("audit key {0}")]
    KeyFile(KeyError),
    /// The trail is another program's.
    #[error("audit directory {0}: {1}")]
    Newer(PathBuf, Newer),
    /// Something must be there first.
    #[error(transparent)]
    Absent(#[from] Absent),
    /// No segment has room.
    #[error(transparent)]
    Limit(#[from] limit::TooLow),
}

impl From<KeyError> for StartError {
    fn from(error: KeyError) -> Self {
        Self::Key(error)
    }
}

/// The intent could not be made safe in time.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the intent could not be made safe")]
pub struct Unavailable;

/// Why a trail was closed without all that was queued.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Unfinished {
    /// Its writer ended before.
    #[error("a panic")]
    Panic,
    /// The last write failed.
    #[error("the end of the audit trail could not be written")]
    Unwritten,
    /// Its writer is not done, as with a disk that hangs.
    #[error("it hangs, and is not waited for; the end of the audit trail is missing")]
    Hangs,
}

/// Counts of the trail.
#[derive(Clone, Debug)]
pub struct Metrics {
    records: [IntCounter; Kind::ALL.len()],
    bytes: IntCounter,
    batches: IntCounter,
    errors: IntCounter,
    syncs: IntCounter,
    sync_errors: IntCounter,
    sync_seconds: Counter,
    removed: IntCounter,
    removed_early: IntCounter,
    /// Restored, and lost.
    files_lost: [IntCounter; 2],
    folded: IntCounter,
    dropped: IntCounter,
    late: IntCounter,
    queue: IntGauge,
    doubtful: IntGauge,
    unresolved: IntGauge,
    damaged: IntGauge,
    healthy: IntGauge,
    free: IntGauge,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| {
            registered(registry, IntCounter::new(format!("ccsqm_gateway_audit_{name}"), help))
        };
        let counters = |name: &str, help: &str, label: &str| {
            let opts = Opts::new(format!("ccsqm_gateway_audit_{name}"), help);
            registered(registry, IntCounterVec::new(opts, &[label]))
        };
        let gauge = |name: &str, help: &str| {
            registered(registry, IntGauge::new(format!("ccsqm_gateway_{name}"), help))
        };
        let records = counters("records_total", "Records written, by kind.", "kind")?;
        let files_lost = counters(
            "files_lost_total",
            "Files of the trail that were moved, deleted, replaced or cut by others, by result.",
            "result",
        )?;
        let sync_seconds =
            Counter::new("ccsqm_gateway_audit_sync_seconds_total", "Seconds spent in fdatasync.");
        Ok(Self {
            records: Kind::ALL.map(|kind| records.with_label_values(&[kind.as_str()])),
            bytes: counter("bytes_total", "Bytes written.")?,
            batches: counter("batches_total", "Batches written.")?,
            errors: counter("write_errors_total", "Writes that failed, fdatasync included.")?,
            syncs: counter("syncs_total", "Times that fdatasync succeeded; only with durability disk.")?,
            sync_errors: counter("sync_errors_total", "Times that fdatasync failed.")?,
            sync_seconds: registered(registry, sync_seconds)?,
            removed: counter("removed_segments_total", "Segments removed since all in them was old enough.")?,
            removed_early: counter(
                "removed_early_total",
                "Of these, those removed before `retain` had passed, since the trail was larger than max_size.",
            )?,
            files_lost: ["restored", "lost"].map(|result| files_lost.with_label_values(&[result])),
            folded: counter("folded_refusals_total", "Refusals that were recorded by count only.")?,
            dropped: counter("dropped_refusals_total", "Refusals that were not recorded.")?,
            late: counter("late_intents_total", "Intents that were not safe in time.")?,
            queue: gauge("audit_queue_records", "Records that wait to be written.")?,
            doubtful: gauge(
                "clock_doubtful",
                "Whether the wall clock is doubtful, so that no audit segment is removed.",
            )?,
            unresolved: gauge("unresolved_outcomes", "Calls of unknown outcome that nobody has resolved.")?,
            damaged: gauge(
                "audit_damaged",
                "Whether a part of the trail within the idempotency window is lost and nobody has accepted that.",
            )?,
            healthy: gauge(
                "audit_healthy",
                "Whether new calls can be put on record; without that none is sent.",
            )?,
            free: gauge("audit_free_bytes", "What is free on the trail's file system.")?,
        })
    }

    fn set_unresolved(&self, count: usize) {
        self.unresolved.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    fn set_doubtful(&self, is_doubtful: bool) {
        self.doubtful.set(is_doubtful.into());
    }

    fn files_lost(&self, is_restored: bool) {
        self.files_lost[usize::from(!is_restored)].inc();
    }

    fn written(&self, batch: &Batch) {
        for (counter, count) in self.records.iter().zip(batch.kinds) {
            if count > 0 {
                counter.inc_by(count);
            }
        }
        self.bytes.inc_by(batch.size() as u64);
        self.batches.inc();
    }

    fn synced(&self, syncs: &Syncs) {
        if syncs.good + syncs.failed == 0 {
            return; // durability `kernel`
        }
        self.syncs.inc_by(syncs.good);
        self.sync_errors.inc_by(syncs.failed);
        self.sync_seconds.inc_by(syncs.took.as_secs_f64());
    }
}

/// Registers a metric.
fn registered<T: Collector + Clone + 'static>(
    registry: &Registry,
    metric: Result<T, prometheus::Error>,
) -> Result<T, prometheus::Error> {
    let metric = metric?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// The kinds of records.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Intent,
    Outcome,
    Refusal,
    Event,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Intent, Self::Outcome, Self::Refusal, Self::Event];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Intent => "intent",
            Self::Outcome => "outcome",
            Self::Refusal => "refusal",
            Self::Event => "event",
        }
    }
}

/// The permit to reserve a connection and queue an intent, until this is dropped.
#[derive(Debug, Default)]
pub struct Permit<'a> {
    _held: Option<SemaphorePermit<'a>>,
    /// What the wait for it took of the time that an intent may take.
    waited: Duration,
}

impl Permit<'_> {
    /// Runs a future, and hands the permit to the next request if that has to wait.
    pub fn during<F: Future>(&mut self, mut future: Pin<&mut F>) -> impl Future<Output = F::Output> {
        poll_fn(move |cx| {
            let polled = future.as_mut().poll(cx);
            if polled.is_pending() {
                self._held = None;
            }
            polled
        })
    }
}

/// The writer's thread.
type Writing = JoinHandle<Result<(), Unfinished>>;

/// The trail, as one worker sees it. Cheap to clone.
#[derive(Clone)]
pub struct Audit(Arc<Handle>);

#[derive(Clone)]
struct Handle {
    shared: Arc<Shared>,
    lane: Arc<Lane>,
    keys: Arc<Keys>,
    clocks: Arc<Clocks>,
    writer: Arc<Mutex<Option<Writing>>>,
    intent_deadline: Duration,
    begun: u64,
    damage: Arc<[Damage]>,
    shown: [Shown; SHOWN.len()],
    /// Held while one call is resolved.
    resolving: Arc<tokio::sync::Mutex<()>>,
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Audit")
    }
}

impl Audit {
    /// Opens the trail: takes its lock, recovers what a crash left, starts the writer.
    pub fn start(options: &Options, metrics: Metrics) -> Result<Self, StartError> {
        let fail = |error| start_error(&options.directory, error);
        let aside = options.look_for_key()?;
        make_directory(&options.directory, options.durability).map_err(fail)?;
        let directory = Directory::open(&options.directory).map_err(fail)?;
        lock(&directory)?;
        let keys = match &options.key_file {
            Some(path) => Keys::load(path).map_err(StartError::KeyFile)?,
            None => Keys::load_or_make(&directory)?,
        };
        let (lock, statement) = lock_file(&directory)?;
        if options.durability == Durability::Disk {
            directory.sync().map_err(fail)?; // the key's name, the lock's, and the segments'
        }
        let keys = Arc::new(keys);
        let Recovered { writer, begun, unresolved, damage } =
            recover(options, keys.clone(), (directory, lock), &statement).map_err(fail)?;
        let shared = Arc::new(Shared::new(
            metrics,
            options.queue,
            (options.refusals, options.hour),
            begun,
            unresolved,
        ));
        let clocks = writer.clocks.clone();
        clocks.look(&shared);
        if let Some(aside) = aside {
            shared.event(loss::ACCEPTED, json!({ "reason": "the key was missing", "aside": aside }));
        }
        let writing = shared.clone();
        let writer =
            thread::Builder::new().name("audit".into()).spawn(move || writer.run(&writing)).map_err(fail)?;
        let (lane, writer) = (shared.new_lane(None), Arc::new(Mutex::new(Some(writer))));
        let (intent_deadline, shown) = (options.intent_deadline, options.shown);
        Ok(Self(Arc::new(Handle {
            shared,
            lane,
            keys,
            clocks,
            writer,
            intent_deadline,
            begun,
            damage,
            shown,
            resolving: Arc::default(),
        })))
    }

    /// The same trail, for a worker of its own. `vital` is for the task that wakes its requests.
    pub(crate) fn for_worker(&self, vital: Vital) -> Self {
        Self(Arc::new(Handle { lane: self.shared().new_lane(Some(vital)), ..Handle::clone(&self.0) }))
    }

    fn shared(&self) -> &Shared {
        &self.0.shared
    }

    /// The keys of its digests and marks.
    pub fn keys(&self) -> &Arc<Keys> {
        &self.0.keys
    }

    /// The number of the last record that the start wrote: what lies before it was there before.
    pub fn begun(&self) -> u64 {
        self.0.begun
    }

    /// Waits for the permit to reserve a connection and queue an intent: of a busy worker's requests only some are
    /// at that at a time. A writer that is not prompt needs none, since the more wait for it the more it writes at
    /// once.
    pub async fn permit(&self) -> Permit<'_> {
        let (lane, shared) = (&self.0.lane, self.shared());
        if !shared.is_prompt() {
            return Permit::default();
        }
        if let Some(permit) = lane.permit() {
            return Permit { _held: Some(permit), waited: Duration::ZERO };
        }
        shared.nudge();
        let asked = clock::nanos();
        let permit = Box::pin(lane.permit_in_turn()).await.filter(|_| shared.is_prompt());
        Permit { _held: permit, waited: Duration::from_nanos(clock::nanos().saturating_sub(asked)) }
    }

    /// Waits until the record of this number is safe, for as long as an intent may take, of which so much is over.
    fn safe(&self, seq: u64, waited: Duration) -> impl Future<Output = Result<(), Unavailable>> {
        let left = self.0.intent_deadline.saturating_sub(waited);
        self.0.lane.wait(&self.shared().safe, seq, left)
    }

    /// From now on this thread does not wake the writer: it calls [`Audit::flush`] before it sleeps.
    pub fn defer_wake_ups() {
        queue::defer_wake_ups();
    }

    /// Wakes the writer, if there is something to write.
    pub fn flush(&self) {
        self.shared().flush();
    }

    /// A value as it is to be written; `field` is an index of [`SHOWN`].
    fn show(&self, field: usize, value: HeaderValue) -> Option<HeaderValue> {
        match self.0.shown[field] {
            Shown::Clear => Some(value),
            Shown::Omit => None,
            Shown::Hmac => {
                let mark = self.keys().mark(&[b"field", SHOWN[field].as_bytes(), value.as_bytes()]);
                HeaderValue::from_str(&hidden(mark)).ok()
            }
        }
    }

    /// What is written in the place of a peer, if it is to be hidden: of an address without its port.
    fn hides_peer(&self, peer: Peer) -> Option<Option<HeaderValue>> {
        if self.0.shown[1] == Shown::Clear {
            return None;
        }
        let text = match peer {
            Peer::Tcp(address) => address.ip().to_string(),
            Peer::Unix { .. } => peer.to_string(),
        };
        Some(HeaderValue::from_str(&text).ok().and_then(|text| self.show(1, text)))
    }

    /// Opens the record of a request.
    pub fn open(&self, peer: Peer) -> Record {
        Record::open(self.clone(), peer)
    }

    /// Records an event of the gateway itself.
    pub fn event(&self, name: &'static str, details: Map<String, Value>) {
        self.shared().event(name, Value::Object(details));
    }

    /// The calls that somebody must still look into.
    pub fn unresolved(&self) -> MutexGuard<'_, UnresolvedList> {
        self.shared().unresolved()
    }

    /// What the start found missing without a trace in the chain: what the lock file names and the trail lacks.
    pub fn damage(&self) -> &[Damage] {
        &self.0.damage
    }

    /// Verifies what was there before the start, and records the first fault; gives every intent its outcome that was
    /// left open there. Takes as long as the trail is long: to be called beside everything else.
    pub fn verify_past(&self, directory: &Path) -> io::Result<()> {
        let found = match recovery::read(directory, self.keys()) {
            Ok(found) => found,
            Err(error) => {
                self.0.clocks.know(Vec::new());
                return Err(error);
            }
        };
        self.0.clocks.know(found.anchors);
        if let Some(fault) = found.faults.iter().find(|fault| fault.seq <= self.begun()) {
            let file = fault.file.file_name().map(|name| name.to_string_lossy().into_owned());
            tracing::error!(file, line = fault.line, reason = fault.reason, "the audit trail is damaged");
            let details =
                json!({ "what": DAMAGED, "file": file, "line": fault.line, "reason": fault.reason });
            self.shared().event("recovery", details);
        }
        for call in found.unresolved.orphans() {
            let call = UnresolvedCall { state: CallState::Unknown, ..call.clone() };
            let id = call.id;
            // A segment that the doubt begins must have it on its list.
            self.shared().change_unresolved(|list| list.insert(call));
            self.shared().doubt(id);
        }
        Ok(())
    }

    /// Finds the segment from which on to read so that all records are met that are no older than `within`: returns its
    /// index, and the ages for its first line. `segments` are those of this trail, oldest first. See [`age`].
    pub fn ages(&self, segments: &[PathBuf], within: Duration) -> io::Result<(usize, Ages)> {
        self.0.clocks.ages().since(segments, within, self.keys())
    }

    /// Why the wall clock is doubtful, if it is. While it is, no segment is removed.
    pub fn clock_doubt(&self) -> Option<ClockDoubt> {
        self.0.clocks.doubt()
    }

    /// Looks at the wall clock, and tells when doubt begins or ends. To be called about once a second.
    pub fn look_at_clock(&self) {
        self.0.clocks.look(self.shared());
    }

    /// An operator accepts the wall clock as it is: doubt ends, and the event `clock_accepted` says so with these details.
    /// The next start takes records of earlier boots to be as old as that clock says. Returns the number of the record, for
    /// [`Audit::committed`]. For a trail that nobody writes there is [`accept_clock`].
    pub fn accept_clock(&self, details: Map<String, Value>) -> u64 {
        self.0.clocks.accept(self.shared(), details)
    }

    /// Counts what is only counted when it is asked for.
    pub fn count(&self) {
        self.shared().metrics.set_unresolved(self.unresolved().unknown().count());
        self.shared().metrics.healthy.set(self.healthy().into());
    }

    /// For `/status`: how the trail stands, and the last error.
    pub fn status(&self) -> Value {
        let metrics = &self.shared().metrics;
        json!({
            "healthy": self.healthy(),
            "free_bytes": metrics.free.get(),
            "damaged": metrics.damaged.get() == 1,
            "last_error": self.shared().trouble.get(),
        })
    }

    /// Tells the metric whether a loss is open.
    pub fn set_damaged(&self, is_damaged: bool) {
        self.shared().metrics.damaged.set(is_damaged.into());
    }

    /// Whether the last write succeeded.
    pub fn healthy(&self) -> bool {
        self.shared().is_healthy()
    }

    /// Whether there is a writer: it ends with [`Audit::close`], or by a panic.
    pub(crate) fn is_written(&self) -> bool {
        let writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.as_ref().is_some_and(|writer| !writer.is_finished())
    }

    /// Records the stop and waits, for a while, until all is written. Returns why it is not, if so.
    pub fn close(&self) -> Option<Unfinished> {
        self.shared().close();
        let writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let deadline = Instant::now() + CLOSE_TIME;
        while !writer.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        if !writer.is_finished() {
            return Some(Unfinished::Hangs);
        }
        writer.join().map_or(Some(Unfinished::Panic), |written| written.err())
    }
}

/// Locks the directory for this process.
fn lock(directory: &Directory) -> Result<(), StartError> {
    let path = directory.path();
    match directory.try_lock() {
        Ok(true) => Ok(()),
        Ok(false) => {
            tracing::warn!(directory = %path.display(), "the file system locks no directories; the file `lock` must stay where it is");
            Ok(())
        }
        Err(error) => Err(locked(path, error)),
    }
}

/// Opens and locks the lock file, or makes it, and reads what it says.
fn lock_file(directory: &Directory) -> Result<(Lock, Statement), StartError> {
    let (path, fail) = (directory.path(), |error| StartError::Directory(directory.path().into(), error));
    if let Some(lock) = Lock::open(directory).map_err(|error| locked(path, error))? {
        let statement = lock.read().map_err(fail)?;
        return Ok((lock, statement));
    }
    let has_segments = !chain::segments(path).map_err(fail)?.is_empty();
    let lock = Lock::make(directory, has_segments).map_err(|error| locked(path, error))?;
    Ok((lock, if has_segments { Statement::Missing } else { Statement::Nothing }))
}

fn locked(directory: &Path, error: TryLockError) -> StartError {
    match error {
        TryLockError::WouldBlock => StartError::Locked(directory.into()),
        TryLockError::Error(error) => StartError::Directory(directory.into(), error),
    }
}

/// Looks whether a trail could be opened, were it not locked. Makes and changes nothing, and takes no lock.
pub fn rehearse(options: &Options) -> Result<(), StartError> {
    init::check(&options.directory, options.key_file.as_deref(), options.must_exist)?;
    let fail = |error| start_error(&options.directory, error);
    let of_key = |error| StartError::from(KeyError::File(chain::key_path(&options.directory), error));
    let directory = match Directory::open(&options.directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let path = std::path::absolute(&options.directory).map_err(fail)?;
            let folder = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
            return match options.key_file {
                Some(_) => look_for_space(folder, 1, 0).map_err(fail),
                None => look_for_space(folder, 2, 0).map_err(of_key),
            };
        }
        opened => opened.map_err(fail)?,
    };
    let keys = match &options.key_file {
        Some(path) => Some(Keys::load(path).map_err(StartError::KeyFile)?),
        None if directory.find(chain::KEY).map_err(fail)?.is_some() => {
            Some(Keys::load_own(&options.directory)?)
        }
        None => {
            directory.check_removable(chain::UNFINISHED_KEY).map_err(of_key)?;
            look_for_space(&options.directory, 2, 0).map_err(of_key)?;
            None
        }
    };
    let is_writable = |name: &str, unfinished: &str| match directory.open_file(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => directory.check_removable(unfinished),
        opened => opened.map(drop),
    };
    is_writable(lock::NAME, lock::UNFINISHED).map_err(fail)?;
    directory.check_removable(UNFINISHED).map_err(fail)?;
    let Some(keys) = keys else { return Ok(()) }; // there are no segments either
    let statement = lock::read(directory.path()).map_err(fail)?;
    let read = || recovery::read_end(directory.path(), &keys, &statement);
    // A gateway that runs may have removed a segment meanwhile.
    let again = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { read() } else { Err(error) };
    let found = read().or_else(again).map_err(fail)?;
    if let Some(name) = found.last.as_ref().and_then(|(path, _)| path.file_name()) {
        is_writable(&name.to_string_lossy(), UNFINISHED).map_err(fail)?;
    }
    look_for_room(options, &directory, &found).map_err(fail)
}

/// A start writes no fewer bytes, beside the list of the unresolved.
const LEAST_START: u64 = 384;

/// Looks whether a start could write what it does: the end of the trail once more, and its own record.
fn look_for_room(options: &Options, directory: &Directory, found: &Found) -> io::Result<()> {
    let bytes = LEAST_START + found.unresolved.size();
    let Some((first, length)) = found.resume().1 else {
        return look_for_space(directory.path(), 1, bytes);
    };
    let name = chain::segment_name(first);
    if options.durability == Durability::Disk && length > limit::of_files() {
        return Err(limit::explain(Errno::FBIG.into(), &name));
    }
    // A crash leaves the space that was reserved behind the records.
    let segment = std::fs::metadata(directory.path().join(name))?;
    let reserved = (segment.blocks() * 512).saturating_sub(length);
    look_for_space(directory.path(), 0, bytes.saturating_sub(reserved))
}

/// Whether a process holds the lock of a trail, so that its last line may be half-written. Changes nothing
/// in the directory. An older version locks only the file in it.
pub fn is_live(directory: &Path) -> bool {
    let is_locked = |file: io::Result<File>| {
        matches!(file.map(|file| file.try_lock_shared()), Ok(Err(TryLockError::WouldBlock)))
    };
    // No pipe in the place of either may hold the caller.
    let whole =
        OpenOptions::new().read(true).custom_flags(OFlags::DIRECTORY.bits().cast_signed()).open(directory);
    let lock = open_regular(&directory.join(lock::NAME), OpenOptions::new().read(true));
    is_locked(whole) || is_locked(lock)
}

/// What a start found, and who goes on.
struct Recovered {
    writer: Writer,
    /// The number of the last record that the start wrote.
    begun: u64,
    unresolved: UnresolvedList,
    damage: Arc<[Damage]>,
}

/// Accepts the wall clock for a trail that nobody writes: see [`Audit::accept_clock`]. Returns the number of the event, which is
/// on the disk then. Fails with [`StartError::Locked`] while a gateway writes the trail.
pub fn accept_clock(directory: &Path, keys: Keys) -> Result<u64, StartError> {
    check_trail(directory)?;
    append_event(directory, keys.into(), |clocks| (age::ACCEPTED, clocks.accepted()))
}

/// Accepts what is lost of a trail that nobody writes: see [`loss`]. Returns the number of the event, which is on the disk then;
/// `None` if nothing is lost, and nothing was removed. Fails with [`StartError::Locked`] while a gateway writes the trail.
pub fn accept_loss(directory: &Path, keys: Keys) -> Result<Option<u64>, StartError> {
    check_trail(directory)?;
    let keys = Arc::new(keys);
    // What is missing at the end is on record before the faults are looked for, as it is when a gateway starts.
    append(directory, keys.clone(), |_, _, _| Ok::<_, StartError>(()))?;
    let loss = loss::look(directory, &keys).map_err(|error| start_error(directory, error))?;
    loss.map(|loss| append_event(directory, keys, |_| (loss::ACCEPTED, loss.details()))).transpose()
}

/// Sets segments aside whose key is missing, and begins a new trail with a new key, whose first record says so. Returns the
/// name of the directory in which they are now.
pub fn accept_lost_key(directory: &Path) -> Result<String, StartError> {
    let aside = loss::set_aside(directory)?;
    init::init(directory, None)?;
    let details = json!({ "reason": "the key was missing", "aside": aside });
    let details = details.as_object().cloned().unwrap_or_default();
    append_event(directory, Keys::load_own(directory)?.into(), |_| (loss::ACCEPTED, details))?;
    Ok(aside)
}

fn check_trail(directory: &Path) -> Result<(), StartError> {
    let fail = |error| start_error(directory, error);
    if chain::segments(directory).map_err(fail)?.is_empty() {
        return Err(fail(io::Error::new(io::ErrorKind::NotFound, "there is no audit trail")));
    }
    Ok(())
}

/// Appends an event to a trail that nobody writes. Returns its number.
fn append_event(
    directory: &Path,
    keys: Arc<Keys>,
    event: impl FnOnce(&Clocks) -> (&'static str, Map<String, Value>),
) -> Result<u64, StartError> {
    let ((), seq) = append(directory, keys, |batch, _, clocks| {
        let (name, details) = event(clocks);
        batch.event(name, Value::Object(details));
        Ok::<_, StartError>(())
    })?;
    Ok(seq)
}

/// Appends to a trail that nobody writes, under its lock: what reading its end found, and what `fill` adds to that. Returns
/// what `fill` returned, and the number of the last record. What reading found is recorded even if `fill` fails.
fn append<T, E: From<StartError>>(
    directory: &Path,
    keys: Arc<Keys>,
    fill: impl FnOnce(&mut Batch, &Found, &Clocks) -> Result<T, E>,
) -> Result<(T, u64), E> {
    let fail = |error| start_error(directory, error);
    let directory = Directory::open(directory).map_err(fail)?;
    lock(&directory)?;
    let (lock, statement) = lock_file(&directory)?;
    let (options, owned) = (Options::to_append(directory.path()), directory.path().to_owned());
    let Resumed { mut batch, found, last, segment } =
        resume(&options, &directory, &keys, &statement).map_err(fail)?;
    let clocks = Arc::new(Clocks::go_on(&found, options.window));
    let filled = fill(&mut batch, &found, &clocks);
    if !batch.is_empty() {
        let mut writer =
            Writer::new(&options, keys, (directory, lock), clocks, last, segment).map_err(fail)?;
        let appended = writer.append(&mut batch);
        let appended = appended.map_err(|error| limit::explain(error, "what is to be recorded"));
        appended.and_then(|()| give_to_owner(&owned)).map_err(fail)?;
        writer.close();
    }
    Ok((filled?, batch.last()))
}

/// Gives the newest segment and the lock file to whom the directory belongs: root may have made them.
fn give_to_owner(directory: &Path) -> io::Result<()> {
    let owner = std::fs::metadata(directory)?;
    for path in chain::segments(directory)?.pop().into_iter().chain([directory.join(lock::NAME)]) {
        if std::fs::metadata(&path)?.uid() != owner.uid() {
            chown(&path, Some(owner.uid()), Some(owner.gid()))?;
        }
    }
    Ok(())
}

fn start_error(directory: &Path, error: io::Error) -> StartError {
    match error.get_ref().and_then(|error| error.downcast_ref::<Newer>()) {
        Some(newer) => StartError::Newer(directory.into(), *newer),
        None => StartError::Directory(directory.into(), error),
    }
}

/// Reads the end of the trail, cuts a torn line off, gives every intent that is open there its outcome, and
/// records all that. One write does it, so that a crash in between leaves either nothing or a torn line for the next
/// start. Returns the number of the last record and what was open, too.
fn recover(
    options: &Options,
    keys: Arc<Keys>,
    (directory, lock): (Directory, Lock),
    statement: &Statement,
) -> io::Result<Recovered> {
    directory.remove(UNFINISHED)?;
    let Resumed { mut batch, mut found, last, segment } = resume(options, &directory, &keys, statement)?;
    for id in found.unresolved.close() {
        batch.push(&Entry::Doubt { id });
    }
    let clocks = Arc::new(Clocks::go_on(&found, options.window));
    let mut start = clocks.start(&found);
    start[unresolved::LIST] = found.unresolved.to_json();
    batch.event(age::START, start);
    let mut writer = Writer::new(options, keys, (directory, lock), clocks, last, segment)?;
    writer.append(&mut batch).map_err(|error| limit::explain(error, "what the start records"))?;
    let Found { unresolved, damage, .. } = found;
    Ok(Recovered { writer, begun: batch.last(), unresolved, damage: damage.into() })
}

/// What a trail goes on behind.
struct Resumed {
    /// Tells what was found.
    batch: Batch,
    found: Found,
    last: Place,
    segment: Option<Segment>,
}

/// Reads the end of the trail, and cuts a torn line off.
fn resume(
    options: &Options,
    directory: &Directory,
    keys: &Keys,
    statement: &Statement,
) -> io::Result<Resumed> {
    let found = recovery::read_end(directory.path(), keys, statement)?;
    let (seq, segment) = found.resume();
    let mut batch = Batch::behind(seq);
    if let Some((path, offset, length)) = &found.torn {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        directory.open_file(&name)?.set_len(*offset)?;
        batch.event("recovery", json!({ "what": "torn line cut off", "bytes": length }));
    }
    if found.is_lock_unreadable {
        let what = "the lock file cannot be read, so that nobody knows whether the end of the trail is here";
        tracing::warn!("{what}");
        batch.event("recovery", json!({ "what": what }));
    }
    for damage in &found.damage {
        tracing::error!(file = damage.file, reason = damage.reason, "the audit trail is damaged");
        batch.event("recovery", damage.details());
    }
    let segment = segment.map(|(first, length)| reopen(options.durability, directory, first, length));
    if options.durability == Durability::Disk {
        sync_all(&chain::segments(directory.path())?)?;
    }
    let last = Place { seq, hash: found.hash };
    Ok(Resumed { batch, found, last, segment: segment.transpose()? })
}

/// Opens the segment that a writer goes on with. With `disk` all of it is on the disk afterwards.
fn reopen(durability: Durability, directory: &Directory, first: u64, length: u64) -> io::Result<Segment> {
    let file = directory.open_file(&chain::segment_name(first))?;
    if durability == Durability::Disk {
        // Before the segment only appends.
        write_again(&file, length).map_err(|error| limit::explain(error, &chain::segment_name(first)))?;
    }
    Segment::new(directory, first, file, length)
}
