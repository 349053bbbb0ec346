//! Stage 8: the audit trail. A record is opened first and closed by its outcome, its refusal, or its drop.
//!
//! *Queued* means in the writer's queue; *safe* means that the write returned, so that `kill -9` of this
//! process loses nothing, or, with durability `disk`, that fdatasync returned after it, so that a crash of the
//! machine loses nothing either; and that the segment's name still led to the file then. Guarantees: an intent is
//! safe before the first upstream byte; intents and outcomes are never dropped; refusals never wait and cannot fill
//! the queue or the disk. Against somebody who can write as the gateway the chain proves only what lies before a
//! head that is kept elsewhere.
//!
//! This file is the handle that requests and operators have. A trail is opened in `start`; `offline` appends to one that nobody
//! writes; `record` is what a request writes, `queue` where that waits, and `writer` the thread that writes it.

pub mod age;
mod batch;
pub mod chain;
mod clocks;
mod directory;
mod entry;
mod facts;
pub mod history;
pub mod init;
mod folds;
mod lane;
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
pub mod unresolved;
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
use crate::model::audit_fields::SHOWN;
use crate::model::peer::Peer;
use crate::model::redaction::Shown;
use crate::supervisor::Vital;
use age::Ages;
pub use clocks::ClockDoubt;
use clocks::Clocks;
pub use facts::Detail;
use lane::Lane;
pub use metrics::Metrics;
pub use offline::{accept_clock, accept_loss, accept_lost_key};
pub use options::{HOUR, Options};
use queue::Shared;
pub use record::{Answer, IntendedRecord, Names, OpenRecord, Queued};
use recovery::{DAMAGED, Damage};
pub use reply::StoredReply;
pub use retention::Early;
pub use start::{StartError, is_live, rehearse};
use unresolved::{CallState, UnresolvedCall, UnresolvedList};

/// How long a stop waits for the last write.
const CLOSE_TIME: Duration = Duration::from_secs(3);

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

/// The permit to reserve a connection and queue an intent, until this is dropped.
#[derive(Debug, Default)]
pub struct Permit<'a> {
    _held: Option<SemaphorePermit<'a>>,
    /// What the wait for it took of the time that an intent may take, in nanoseconds.
    waited: u64,
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
            return Permit { _held: Some(permit), waited: 0 };
        }
        shared.nudge();
        let asked = clock::nanos();
        let permit = Box::pin(lane.permit_in_turn()).await.filter(|_| shared.is_prompt());
        Permit { _held: permit, waited: clock::nanos().saturating_sub(asked) }
    }

    /// Waits until the record of this number is safe, for as long as an intent may take, of which so many nanoseconds are over.
    fn safe(&self, seq: u64, waited: u64) -> impl Future<Output = Result<(), Unavailable>> {
        let left = self.0.intent_deadline.saturating_sub(Duration::from_nanos(waited));
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
    pub fn open(&self, peer: Peer) -> OpenRecord {
        OpenRecord::new(self.clone(), peer)
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
        let found = recovery::read(directory, self.keys());
        let found = found.inspect_err(|_| self.0.clocks.know(Vec::new()))?;
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
            self.unresolved().insert(call);
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
        let (metrics, unknown) = (&self.shared().metrics, self.unresolved().unknown().count());
        metrics.unresolved.set(i64::try_from(unknown).unwrap_or(i64::MAX));
        metrics.healthy.set(self.healthy().into());
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

#[cfg(test)]
mod tests;
