//! The queue between the requests and the writer: room kept for outcomes, refusals folded, nothing that waits
//! for a disk.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use super::batch::Batch;
use super::entry::{Entry, Why};
use super::facts::Facts;
use super::folds::Folds;
use super::lane::Lane;
use super::unresolved::UnresolvedList;
use super::writer::MOST_AT_ONCE;
use super::{Metrics, Options, Unavailable, limit};
use crate::clock;
use crate::log::OncePerSecond;
use crate::supervisor::Vital;
use crate::trouble::LastTrouble;

/// Beyond so many bytes that wait for the disk no intent is queued: records name up to a thousand inspectors each.
pub(super) const MAX_QUEUED: usize = 64 << 20;

/// A worker that is busy for longer wakes the writer in between, in nanoseconds.
const LONG_TURN: u64 = 50_000_000;

/// So long may a batch take, and so much more for each record in it, while the writer counts as prompt, in
/// nanoseconds. A worker needs as long for as many requests as it has permits in a crowd, so that waiting for them does not slow
/// it down; and a batch is not called slow for being large.
const PROMPT: (u64, u64) = (100_000, 10_000);

/// How often the writer looks around, at least: once a second, with all that comes in between.
pub(super) const LOOK_AROUND: Duration = Duration::from_millis(900);

/// A second of refusals.
const SECOND: Duration = Duration::from_secs(1);

thread_local! {
    static DEFERS: Cell<bool> = const { Cell::new(false) };
    /// The members of a record, until they are in its line.
    static MEMBERS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// So much of that memory is kept for the next record, in bytes.
const MAX_KEPT: usize = 64 * 1024;

/// From now on this thread does not wake the writer: whoever calls this calls [`super::Audit::flush`] before
/// the thread sleeps.
pub(super) fn defer_wake_ups() {
    DEFERS.set(true);
}

/// What requests and the writer share.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
    /// The number of the last record that is safe, and with it all before it.
    pub(super) safe: Arc<AtomicU64>,
    /// Who waits for that.
    lanes: Mutex<Vec<Arc<Lane>>>,
    /// When the writer is due to be done with its batch, in nanoseconds of this process; [`u64::MAX`] while it rests. It
    /// stays in the past behind a batch that took longer.
    due: AtomicU64,
    /// Whether the last write succeeded.
    pub(super) writable: Flag,
    /// Whether directory and lock file are where they were.
    pub(super) in_place: Flag,
    /// Whether new intents may be recorded: space is reserved for them and all outcomes.
    pub(super) room: Flag,
    /// Whether refusals may be recorded: there is space behind the last write, above the low-water mark.
    pub(super) space_left: Flag,
    unresolved: Mutex<UnresolvedList>,
    /// Why nothing could be put on record last.
    pub(super) trouble: LastTrouble,
    pub(super) metrics: Metrics,
    capacity: usize,
    /// While a test holds it, the disk is stuck.
    #[cfg(test)]
    pub(super) disk: Mutex<()>,
}

/// A state that the writer sets.
pub(super) struct Flag(AtomicBool);

impl Flag {
    fn set() -> Self {
        Self(AtomicBool::new(true))
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns what it was before.
    pub(super) fn replace(&self, is_set: bool) -> bool {
        self.0.swap(is_set, Ordering::Relaxed)
    }
}

struct Queue {
    /// What waits for the writer. A record is written into its line at once, while what it tells is at hand.
    batch: Batch,
    /// The writer sleeps, so that somebody must wake it.
    writer_sleeps: bool,
    /// Since when a worker has deferred to wake it, in nanoseconds of this process.
    deferred: Option<u64>,
    /// Places kept for the outcomes of intents.
    reserved: usize,
    closing: bool,
    folds: Folds,
}

/// What a new segment is to carry over from those before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carried {
    /// There are calls at work.
    pub(super) at_work: bool,
    /// There are calls on the list.
    pub(super) listed: bool,
}

/// What the writer has to do.
pub(super) enum Next {
    /// To write a batch.
    Write,
    /// To look whether there is space, and whether all files are in their place.
    Look,
    /// To end: the trail is closed and all is written.
    End,
}

impl Shared {
    /// Behind the record of this number.
    pub(super) fn new(options: &Options, metrics: Metrics, seq: u64, unresolved: UnresolvedList) -> Self {
        Self {
            queue: Mutex::new(Queue {
                batch: Batch::behind(seq),
                writer_sleeps: false,
                deferred: None,
                reserved: 0,
                closing: false,
                folds: Folds::new(options.refusals, options.hour),
            }),
            filled: Condvar::new(),
            safe: Arc::new(AtomicU64::new(seq)),
            lanes: Mutex::default(),
            due: AtomicU64::new(u64::MAX),
            writable: Flag::set(),
            in_place: Flag::set(),
            room: Flag::set(),
            space_left: Flag::set(),
            unresolved: Mutex::new(unresolved),
            trouble: LastTrouble::default(),
            metrics,
            capacity: options.queue,
            #[cfg(test)]
            disk: Mutex::default(),
        }
    }

    /// The calls that somebody must still look into, as far as their records are committed.
    pub(super) fn unresolved(&self) -> MutexGuard<'_, UnresolvedList> {
        self.unresolved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place to wait for what is safe.
    pub(super) fn new_lane(&self, vital: Option<Vital>) -> Arc<Lane> {
        let lane = Arc::new(Lane::new(vital));
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).push(lane.clone());
        lane
    }

    /// Wakes the writer, if it sleeps and there is something to write. A worker defers that until it has
    /// nothing else to do, so that a batch is one wake-up: see [`defer_wake_ups`]. A worker that is never done must not
    /// keep the others' records for ever.
    fn filled(&self, mut queue: MutexGuard<'_, Queue>) {
        if !queue.writer_sleeps || (DEFERS.get() && queue.may_wait()) {
            return;
        }
        drop(queue);
        self.filled.notify_one();
    }

    /// Wakes the writer for what was deferred.
    pub(super) fn flush(&self) {
        self.wake(self.lock());
    }

    /// Wakes the writer, if a worker has deferred it for too long.
    pub(super) fn nudge(&self) {
        let queue = self.lock();
        if !queue.batch.is_empty() {
            self.filled(queue);
        }
    }

    fn wake(&self, queue: MutexGuard<'_, Queue>) {
        if queue.writer_sleeps && (!queue.batch.is_empty() || queue.folds.is_pending()) {
            drop(queue);
            self.filled.notify_one();
        }
    }

    /// Queues an event; `details` is an object. Returns the number of the record.
    pub(super) fn event(&self, name: &'static str, details: Value) -> u64 {
        let mut queue = self.lock();
        queue.batch.event(name, details);
        let seq = queue.batch.last();
        self.filled(queue);
        seq
    }

    /// Queues the outcome of an intent that an earlier process left open.
    pub(super) fn doubt(&self, id: Uuid) {
        let mut queue = self.lock();
        queue.batch.push(&Entry::Doubt { id });
        self.filled(queue);
    }

    /// Returns the number of the record.
    pub(super) fn push_intent(&self, entry: &Entry<'_>) -> Result<u64, Unavailable> {
        with_members(entry, |members| {
            if members.len() > MOST_AT_ONCE && members.len() as u64 > limit::of_files() / 4 {
                static TOO_LONG: OncePerSecond = OncePerSecond::new();
                if let Some(times) = TOO_LONG.times() {
                    let (bytes, raise) = (members.len(), limit::RAISE);
                    let what = "a file has no room for its record, what is reserved and a list";
                    tracing::error!(bytes, raise, times, "a call is refused: {what}");
                }
                self.flush(); // whatever is deferred: nothing more comes to wake the writer
                return Err(Unavailable);
            }
            let mut queue = self.lock();
            let is_full = queue.batch.len() + queue.reserved + 2 > self.capacity || !self.room.is_set();
            if queue.closing || is_full || queue.batch.size() > MAX_QUEUED || !self.in_place.is_set() {
                self.wake(queue); // whatever is deferred: nothing more comes to wake it
                return Err(Unavailable);
            }
            let seq = queue.batch.push_written(entry, members);
            queue.reserved += 1;
            self.filled(queue);
            Ok(seq)
        })
    }

    /// Returns the number of the record.
    pub(super) fn push_outcome(&self, entry: &Entry<'_>) -> u64 {
        let push = |write: &dyn Fn(&mut Batch) -> u64| {
            let mut queue = self.lock();
            queue.reserved = queue.reserved.saturating_sub(1);
            let seq = write(&mut queue.batch);
            self.filled(queue);
            seq
        };
        if entry.is_brief() {
            push(&|batch| batch.push(entry))
        } else {
            with_members(entry, |members| push(&|batch| batch.push_written(entry, members)))
        }
    }

    /// Queues a refusal, counts it, or drops it; never waits, and never takes what is kept for intents and
    /// outcomes.
    pub(super) fn push_refusal(&self, facts: Box<Facts>, why: Why, status: u16) {
        let mut queue = self.lock();
        if queue.folds.is_due() {
            queue.fold_up(&self.metrics);
            if self.takes_refusals(&queue) {
                queue.close_gap();
            }
        }
        if !self.takes_refusals(&queue) {
            queue.folds.unrecorded += 1;
            self.metrics.dropped.inc();
            return;
        }
        let Queue { folds, batch, .. } = &mut *queue;
        folds.push(facts, (why, status), batch, &self.metrics);
        self.filled(queue);
    }

    fn takes_refusals(&self, queue: &Queue) -> bool {
        let usable = self.is_healthy() && self.space_left.is_set();
        usable && queue.batch.len() + queue.reserved < self.capacity / 2
    }

    /// Waits for records and moves them out whole. If they are to begin a segment, there is a place for the list of the
    /// unresolved at their end, unless it would be empty.
    pub(super) fn next_batch(&self, batch: &mut Batch, begins: Option<Carried>) -> Next {
        let mut queue = self.lock();
        let begun = Instant::now();
        loop {
            let pending = queue.folds.is_pending() && self.takes_refusals(&queue);
            if pending && queue.folds.is_due() {
                queue.fold_up(&self.metrics);
                queue.close_gap();
            }
            if !queue.batch.is_empty() {
                // Only the last part begins the segment: the intents of the other parts lie in the segment before.
                let is_cut = queue.batch.size() > MOST_AT_ONCE;
                if let Some(Carried { at_work, listed }) = begins
                    && (listed || (at_work || is_cut) && queue.reserved > 0 || queue.batch.changes_list())
                {
                    queue.batch.reserve_list();
                }
                queue.batch.move_to(batch);
                batch.begins_segment = begins.is_some();
                queue.deferred = None;
                return Next::Write;
            }
            if queue.closing {
                return Next::End;
            }
            let wait = match (pending, self.space_left.is_set()) {
                _ if !self.room.is_set() => SECOND / 10,
                (true, true) => SECOND / 5,
                _ => LOOK_AROUND,
            };
            queue.writer_sleeps = true;
            let (mut woken, waited) =
                self.filled.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner);
            woken.writer_sleeps = false;
            // Not only when nobody wakes it: those who are refused meanwhile do.
            let is_time = waited.timed_out() || begun.elapsed() >= wait;
            if is_time && (!pending || !self.room.is_set()) && woken.batch.is_empty() {
                return Next::Look;
            }
            queue = woken;
        }
    }

    /// The writer begins with a batch of so many records; returns when it is due to be done.
    pub(super) fn begin(&self, records: usize) -> u64 {
        let due = clock::nanos() + PROMPT.0 + PROMPT.1 * records as u64;
        let _ = self.due.compare_exchange(u64::MAX, due, Ordering::Relaxed, Ordering::Relaxed);
        due
    }

    /// The writer is done with what was due by then.
    pub(super) fn rest(&self, due: u64) {
        if clock::nanos() < due {
            self.due.store(u64::MAX, Ordering::Relaxed);
        }
    }

    /// Whether the writer was done with its last batch when it was due, and still may be with the one that it is at.
    pub(super) fn is_prompt(&self) -> bool {
        clock::nanos() < self.due.load(Ordering::Relaxed)
    }

    pub(super) fn written(&self, batch: &Batch) {
        self.safe.store(batch.last(), Ordering::Release);
        for lane in &*self.lanes.lock().unwrap_or_else(PoisonError::into_inner) {
            lane.more_is_safe();
        }
        self.metrics.written(batch);
        self.metrics.queue.set(i64::try_from(self.lock().batch.len()).unwrap_or(i64::MAX));
    }

    /// Queues the last record; what is queued is still written.
    pub(super) fn close(&self) {
        let mut queue = self.lock();
        let Queue { folds, batch, .. } = &mut *queue;
        folds.fold_up(batch, &self.metrics);
        folds.end_hour(batch);
        folds.close_gap(batch);
        batch.event("stop", json!({}));
        queue.closing = true;
        drop(queue);
        self.filled.notify_all();
    }

    /// Whether the last write succeeded, there is room for more, and directory and lock file are in their place.
    pub(super) fn is_healthy(&self) -> bool {
        self.writable.is_set() && self.room.is_set() && self.in_place.is_set()
    }

    /// Whether nothing waits for the writer.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.lock().batch.is_empty()
    }

    pub(super) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    /// Intents without an outcome.
    pub(super) fn in_flight(&self) -> u64 {
        self.lock().reserved as u64
    }

    /// Waits before a retry; true if the trail is closing, so that the next try is the last.
    pub(super) fn wait_for_retry(&self, wait: Duration) -> bool {
        let queue = self.lock();
        let waited = self.filled.wait_timeout_while(queue, wait, |queue| !queue.closing);
        waited.unwrap_or_else(PoisonError::into_inner).0.closing
    }
}

/// Hands over what a record's members are in its line. They are written before the queue is locked: a hidden value is a hash, and a
/// stored reply is long.
fn with_members<T>(entry: &Entry<'_>, push: impl FnOnce(&[u8]) -> T) -> T {
    MEMBERS.with_borrow_mut(|text| {
        text.clear();
        text.shrink_to(MAX_KEPT);
        entry.members(text);
        push(text)
    })
}

impl Queue {
    fn fold_up(&mut self, metrics: &Metrics) {
        self.folds.fold_up(&mut self.batch, metrics);
    }

    fn close_gap(&mut self) {
        self.folds.close_gap(&mut self.batch);
    }

    /// Whether waking the writer may be deferred once more.
    fn may_wait(&mut self) -> bool {
        let now = clock::nanos();
        // Saturating: each worker has a clock of its own, and they differ a little.
        let is_overdue = now.saturating_sub(*self.deferred.get_or_insert(now)) > LONG_TURN;
        if is_overdue {
            self.deferred = None;
        }
        !is_overdue
    }
}
