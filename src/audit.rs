//! Stage 8, the audit trail: a write-ahead log of all requests, linked as a hash chain and written by group commit.
//!
//! The trail is a directory of files, the *segments*. A record is *queued* while it waits for the writer. It is
//! *committed* once its write has returned and the segment's name still leads to the file that was written. With
//! durability `disk`, fdatasync must have returned after the write, too: only then is the record *durable*. A
//! committed record survives `kill -9` of this process; a durable one also survives a crash of the machine.
//!
//! A request that is to be sent has two records: the *intent* before it is sent, and the *outcome* after it. A request
//! that is answered without being sent has one record, a *refusal*; replayed requests and dry runs count as refusals here.
//!
//! Guarantees:
//!
//! * An intent is committed before the first byte goes to the upstream (*write-ahead*).
//! * Intents and outcomes are never dropped. Each intent gets exactly one outcome; after a crash, crash recovery at
//!   the next start writes the missing ones as `unknown`.
//! * A refusal never waits for the disk, and refusals cannot fill the queue or the disk: beyond a rate and a budget
//!   they are aggregated, and then only counted.
//!
//! The chain does not protect against an attacker who can write files as the gateway's user and read its key. To
//! prove records against that attacker, keep the number and hash of the last record elsewhere (`audit head` prints
//! them): they prove that record and all before it.
//!
//! This file has the handle for requests and operators. `start` opens a trail; `offline` appends to a trail that no
//! process writes. `record` is what a request writes, `queue` is where records wait, and `writer` is the thread that
//! writes them.

pub mod age;
mod batch;
pub mod chain;
mod clocks;
mod directory;
mod entry;
mod facts;
pub mod history;
pub mod init;
mod aggregation;
mod commit_waiters;
mod ledger;
pub mod limit;
mod line;
mod lock;
pub mod loss;
mod metrics;
mod offline;
mod options;
mod queue;
mod record;
pub mod recovery;
mod reply;
pub mod resolution;
mod retention;
mod segment;
mod start;
mod sync;
pub mod unresolved_calls;
mod writer;

use std::future::{Future, poll_fn};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use http::HeaderValue;
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::sync::SemaphorePermit;

use crate::clock;
use crate::keyed_hash::{Keys, hidden};
use crate::model::audit_fields::REDACTABLE;
use crate::model::peer::Peer;
use crate::model::redaction::Redaction;
use crate::supervisor::Vital;
use age::Ages;
pub use clocks::ClockDoubt;
use clocks::Clocks;
use commit_waiters::CommitWaiters;
pub use facts::Detail;
pub use metrics::AuditMetrics;
pub use offline::{accept_clock, accept_loss, accept_lost_key};
pub use options::{HOUR, Options};
use queue::Shared;
pub use record::{ExchangeResult, IntendedRecord, Names, OpenRecord, Queued};
use recovery::{DAMAGED, Damage};
pub use reply::StoredReply;
pub use retention::Early;
pub use start::{OpenError, dry_run, is_live};
use unresolved_calls::{CallState, UnresolvedCall, UnresolvedList};

/// How long [`Audit::close`] waits for the last write.
// A disk that hangs must not hold up the stop: the process exits with an error instead, and an intent that has no
// outcome then becomes `unknown` at the next start.
const CLOSE_TIME: Duration = Duration::from_secs(3);

/// The intent could not be committed in time, or could not be queued at all. Nothing was sent.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the record could not be committed to the audit trail")]
pub struct Unavailable;

/// Why not all queued records were written before the trail was closed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Unfinished {
    /// The writer's thread ended earlier, by a panic.
    #[error("a panic")]
    Panic,
    /// The last write failed.
    #[error("the end of the audit trail could not be written")]
    Unwritten,
    /// The writer's thread did not end in time, for example because the disk does not answer.
    #[error("it hangs, and the gateway does not wait for it; the end of the audit trail is missing")]
    Hangs,
}

/// A permit to reserve an upstream connection and queue an intent. Dropping it releases it.
#[derive(Debug, Default)]
pub struct Permit<'a> {
    _held: Option<SemaphorePermit<'a>>,
    /// How long the request waited for the permit, in nanoseconds. This counts towards the intent's deadline.
    waited: u64,
}

impl Permit<'_> {
    /// Runs `future`, and releases the permit as soon as `future` has to wait. If `future` is ready at its first poll,
    /// the permit is kept.
    pub fn release_while_pending<F: Future>(
        &mut self,
        mut future: Pin<&mut F>,
    ) -> impl Future<Output = F::Output> {
        poll_fn(move |cx| {
            let polled = future.as_mut().poll(cx);
            if polled.is_pending() {
                // The wait for a connection can be long. With a permit held meanwhile, 32 such requests would stop
                // all others of the worker, including those for which a connection is idle.
                self._held = None;
            }
            polled
        })
    }
}

/// The writer's thread, and how it ended.
type Writing = JoinHandle<Result<(), Unfinished>>;

/// The audit trail, as one worker sees it. Clones share everything, including the worker's waiters.
#[derive(Clone)]
pub struct Audit(Arc<Handle>);

#[derive(Clone)]
struct Handle {
    shared: Arc<Shared>,
    waiters: Arc<CommitWaiters>,
    keys: Arc<Keys>,
    clocks: Arc<Clocks>,
    writer: Arc<Mutex<Option<Writing>>>,
    intent_deadline: Duration,
    begun: u64,
    damage: Arc<[Damage]>,
    redactions: [Redaction; REDACTABLE.len()],
    /// Held while a call is resolved, so that of two resolutions of one call at the same time exactly one is
    /// recorded.
    resolving: Arc<tokio::sync::Mutex<()>>,
}

// By hand: the handle holds the chain's key, which must not reach a log line.
impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Audit")
    }
}

impl Audit {
    /// Returns a handle on the same trail with waiters of its own, for one worker. `vital` supervises the task that
    /// wakes the worker's requests: if that task ends, the process drains.
    pub(crate) fn for_worker(&self, vital: Vital) -> Self {
        Self(Arc::new(Handle { waiters: self.shared().new_waiters(Some(vital)), ..Handle::clone(&self.0) }))
    }

    fn shared(&self) -> &Shared {
        &self.0.shared
    }

    /// The keys of the chain, of the digests of bodies, and of keyed fingerprints.
    pub fn keys(&self) -> &Arc<Keys> {
        &self.0.keys
    }

    /// Returns the number of the event `start` of this run. Records with lower numbers are from earlier runs, or from
    /// the crash recovery of this one.
    pub fn begun(&self) -> u64 {
        self.0.begun
    }

    /// Waits for a permit to reserve an upstream connection and queue an intent.
    ///
    /// Only some of a worker's requests hold a permit at a time, so that few connections are in use and their memory
    /// stays in the processor's cache. While the writer falls behind, the number is not limited, and each request gets
    /// its permit at once: the more records wait, the more one write commits.
    ///
    /// Cancellation safe: a request that stops waiting leaves the queue for permits.
    pub async fn permit(&self) -> Permit<'_> {
        let (waiters, shared) = (&self.0.waiters, self.shared());
        if !shared.is_keeping_up() {
            return Permit::default();
        }
        if let Some(permit) = waiters.permit() {
            return Permit { _held: Some(permit), waited: 0 };
        }
        // A worker wakes the writer before it sleeps, but this one may be too busy to sleep. The requests that hold
        // permits would then wait for a writer that nobody wakes, and this request would wait for them.
        shared.wake_if_overdue();
        let asked = clock::nanos();
        // Boxed, since few requests wait here and the future of every request would otherwise be larger. If the writer
        // has fallen behind meanwhile, the permit is released at once, so that all waiting requests get into the same
        // batch.
        let permit = Box::pin(waiters.permit_in_turn()).await.filter(|_| shared.is_keeping_up());
        Permit { _held: permit, waited: clock::nanos().saturating_sub(asked) }
    }

    /// Waits until the record `seq` is committed. The longest wait is the deadline of an intent less `waited`
    /// nanoseconds. The future must be polled on this handle's worker.
    fn committed_within(&self, seq: u64, waited: u64) -> impl Future<Output = Result<(), Unavailable>> {
        let left = self.0.intent_deadline.saturating_sub(Duration::from_nanos(waited));
        self.0.waiters.wait(&self.shared().committed, seq, left)
    }

    /// Makes this thread stop waking the writer for each record: one wake-up per turn of the event loop is cheaper.
    /// The caller must arrange that the thread calls [`Audit::flush`] before it sleeps; otherwise its records are
    /// delayed.
    pub fn defer_wake_ups() {
        queue::defer_wake_ups();
    }

    /// Wakes the writer if records wait for it.
    pub fn flush(&self) {
        self.shared().flush();
    }

    /// Applies the configured redaction to a value. Returns the value itself, a keyed hash of it, or `None` if it is
    /// to be omitted. `field` is an index into [`REDACTABLE`].
    fn redact(&self, field: usize, value: HeaderValue) -> Option<HeaderValue> {
        match self.0.redactions[field] {
            Redaction::Clear => Some(value),
            Redaction::Omit => None,
            Redaction::Hmac => {
                // The field's name is hashed with the value. Otherwise equal hashes would show that an operator's id
                // and a caller's request id are the same text.
                let fingerprint =
                    self.keys().fingerprint(&[b"field", REDACTABLE[field].as_bytes(), value.as_bytes()]);
                HeaderValue::from_str(&hidden(fingerprint)).ok()
            }
        }
    }

    /// Returns what is written instead of a peer's address: `None` if the address itself is written, `Some(None)` if
    /// nothing is.
    fn redacted_peer(&self, peer: Peer) -> Option<Option<HeaderValue>> {
        if self.0.redactions[1] == Redaction::Clear {
            return None;
        }
        // Without the port: it differs for each connection, so that a hash over it would recognise no peer.
        let text = match peer {
            Peer::Tcp(address) => address.ip().to_string(),
            Peer::Unix { .. } => peer.to_string(),
        };
        Some(HeaderValue::from_str(&text).ok().and_then(|text| self.redact(1, text)))
    }

    /// Opens the record of a request. If the request's future is dropped, the record closes itself as refused.
    pub fn open(&self, peer: Peer) -> OpenRecord {
        OpenRecord::new(self.clone(), peer)
    }

    /// Queues an event of the gateway itself. Does not wait, and is not refused when the queue is full.
    pub fn event(&self, name: &'static str, details: Map<String, Value>) {
        self.shared().event(name, Value::Object(details));
    }

    /// Locks and returns the list of calls that a person must still resolve, as far as their records are committed.
    /// The writer takes the same lock: hold it briefly.
    pub fn unresolved(&self) -> MutexGuard<'_, UnresolvedList> {
        self.shared().unresolved()
    }

    /// Damage that the chain cannot show: the start did not find the lock file, or did not find a segment or a record
    /// that the lock file names.
    pub fn damage(&self) -> &[Damage] {
        &self.0.damage
    }

    /// Verifies the records of earlier runs, and records the first fault as an event. Each intent among them that has
    /// no outcome gets the outcome `unknown`.
    ///
    /// Reads the whole trail, and must therefore run on a thread of its own while the gateway serves. Fails if a
    /// segment cannot be read, or if a newer version wrote it.
    pub fn verify_past(&self, directory: &Path) -> io::Result<()> {
        let found = recovery::read(directory, self.keys());
        // Retention waits until the clock anchors are known. An error must end that wait, too, or no segment would be
        // removed in this run.
        let found = found.inspect_err(|_| self.0.clocks.set_anchors(Vec::new()))?;
        self.0.clocks.set_anchors(found.anchors);
        // The reader goes on past the event `start`, into lines that this process is writing at the same time. A fault
        // there is a half-written line and no damage.
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
            // Before the record: if the record begins a segment, the list at that segment's beginning must contain
            // the call.
            self.unresolved().insert(call);
            self.shared().doubt(id);
        }
        Ok(())
    }

    /// Finds the segment at which a reader must begin in order to read all records younger than `within`. Returns its
    /// index in `segments`, and the [`Ages`] for the records from its first line on. `segments` are all segments of this
    /// trail, oldest first. Fails if a segment cannot be read.
    pub fn ages(&self, segments: &[PathBuf], within: Duration) -> io::Result<(usize, Ages)> {
        self.0.clocks.ages().since(segments, within, self.keys())
    }

    /// Returns why the wall clock is in doubt; `None` if it is not. While it is in doubt, no segment is removed.
    pub fn clock_doubt(&self) -> Option<ClockDoubt> {
        self.0.clocks.doubt()
    }

    /// Compares the clocks, and records when doubt in the wall clock begins or ends. Must be called about once a second.
    pub fn check_clock(&self) {
        self.0.clocks.update(self.shared());
    }

    /// Accepts the wall clock on behalf of an operator: ends the doubt, and queues the event `clock_accepted` with
    /// `details`. The next start then computes the ages of records from earlier boots of the machine by that clock.
    /// Returns the number of the event, for [`Audit::committed`]. For a trail that no process writes, use
    /// [`accept_clock`].
    pub fn accept_clock(&self, details: Map<String, Value>) -> u64 {
        self.0.clocks.accept(self.shared(), details)
    }

    /// Updates the gauges that are computed only when metrics are read.
    // To count the unresolved calls takes the lock of their list and a pass over it: too much for each call that ends.
    pub fn count(&self) {
        let (metrics, unknown) = (&self.shared().metrics, self.unresolved().unknown().count());
        metrics.unresolved.set(i64::try_from(unknown).unwrap_or(i64::MAX));
        metrics.healthy.set(self.healthy().into());
    }

    /// The state of the trail for `/status`: health, free space, damage and the last error.
    pub fn status(&self) -> Value {
        let metrics = &self.shared().metrics;
        json!({
            "healthy": self.healthy(),
            "free_bytes": metrics.free.get(),
            "damaged": metrics.damaged.get() == 1,
            "last_error": self.shared().trouble.get(),
        })
    }

    /// Sets the metric for damage: whether a part of the trail is lost, and no operator has accepted the loss.
    pub fn set_damaged(&self, is_damaged: bool) {
        self.shared().metrics.damaged.set(is_damaged.into());
    }

    /// Whether new calls can be recorded: the last write succeeded, space is reserved, and the files are in place.
    pub fn healthy(&self) -> bool {
        self.shared().is_healthy()
    }

    /// Whether the writer's thread runs. It ends with [`Audit::close`], or by a panic.
    pub(crate) fn is_written(&self) -> bool {
        let writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.as_ref().is_some_and(|writer| !writer.is_finished())
    }

    /// Queues the event `stop` and waits until all queued records are written, for at most three seconds. Returns
    /// `None` if they are, otherwise why not. Blocks the thread. A second call returns `None` at once.
    pub fn close(&self) -> Option<Unfinished> {
        self.shared().close();
        let writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let deadline = Instant::now() + CLOSE_TIME;
        // `JoinHandle::join` has no time limit, and the writer may hang in a system call that nothing interrupts.
        while !writer.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        if !writer.is_finished() {
            return Some(Unfinished::Hangs);
        }
        writer.join().map_or(Some(Unfinished::Panic), |written| written.err())
    }
}

#[cfg(test)]
mod tests;
