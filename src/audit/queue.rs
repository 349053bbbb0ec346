//! The commit queue between requests and the writer, bounded in records and in bytes, with load shedding for intents.
//!
//! The writer takes all queued records as one batch (group commit). Each accepted intent reserves the place of its
//! outcome, so that an outcome is never refused. Refusals use at most half of the queue; beyond that they are only
//! counted. Nothing here waits for a disk: a stuck disk holds the writer's thread, and never the lock of the queue.
//!
//! This module does not wait for commits (`commit_waiters` does) and does not write (`writer` does).

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use super::aggregation::RefusalAggregator;
use super::batch::Batch;
use super::commit_waiters::CommitWaiters;
use super::entry::{Entry, RefusalReason};
use super::facts::RequestFacts;
use super::unresolved_calls::UnresolvedList;
use super::writer::MOST_AT_ONCE;
use super::{AuditMetrics, Options, Unavailable, limit};
use crate::clock;
use crate::log::OncePerSecond;
use crate::supervisor::Vital;
use crate::trouble::LastTrouble;

/// The size of the queued records, in bytes, above which intents are refused.
// A bound in records is not enough: one record can name a thousand inspectors, and 16,384 of these take 800 MB.
pub(super) const MAX_QUEUED: usize = 64 << 20;

/// The longest time for which wake-ups of the writer are deferred, in nanoseconds. See [`Shared::filled()`].
// Not much shorter: each intent that is committed before its worker sleeps costs another poll of its connection.
const LONG_TURN: u64 = 50_000_000;

/// The longest time for a batch of a writer that keeps up, in nanoseconds: a fixed part, and a part for each record.
// While requests wait for permits, a worker needs about this time for those that hold one, so that it is not idle for
// want of permits. The part for each record keeps a batch from counting as slow only because it is large.
const PROMPT: (u64, u64) = (100_000, 10_000);

/// How often the writer checks the files and the free space.
// A bit less than a second, so that with the work in between a lost file is reported within a second.
pub(super) const LOOK_AROUND: Duration = Duration::from_millis(900);

/// The period over which refusals are aggregated.
const SECOND: Duration = Duration::from_secs(1);

thread_local! {
    /// Whether this thread defers wake-ups of the writer.
    static DEFERS: Cell<bool> = const { Cell::new(false) };
    /// A buffer for the members of a record until they are copied into its line.
    static MEMBERS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How many bytes of [`MEMBERS`] a thread keeps allocated for its next record.
// Otherwise each worker would keep the memory of its longest record for ever.
const MAX_KEPT: usize = 64 * 1024;

/// Makes this thread stop waking the writer for each record. It must then call [`super::Audit::flush`] before it sleeps.
pub(super) fn defer_wake_ups() {
    DEFERS.set(true);
}

/// The state that requests and the writer share.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
    /// The number of the last committed record. All records before it are committed, too.
    pub(super) committed: Arc<AtomicU64>,
    /// The waiters of each worker.
    all_waiters: Mutex<Vec<Arc<CommitWaiters>>>,
    /// When the current batch must be done, in nanoseconds of [`clock::nanos`]; [`u64::MAX`] between batches. After a
    /// batch that was late, the value stays in the past until a later batch is done in time.
    batch_deadline: AtomicU64,
    /// Whether the last write succeeded.
    pub(super) writable: Flag,
    /// Whether the directory and the lock file are in their place.
    pub(super) in_place: Flag,
    /// Whether new intents may be queued: space is reserved for them and for all outcomes.
    pub(super) room: Flag,
    /// Whether refusals may be queued: the free space is not below the low-water mark.
    pub(super) space_left: Flag,
    unresolved: Mutex<UnresolvedList>,
    /// The last error that kept records from being written, for `/status`.
    pub(super) trouble: LastTrouble,
    pub(super) metrics: AuditMetrics,
    capacity: usize,
    /// A test holds this lock to simulate a disk that does not answer.
    #[cfg(test)]
    pub(super) disk: Mutex<()>,
}

/// A state that only the writer sets.
// Relaxed: no other data is published with a flag. To read an old value is as if the request had come a moment earlier.
pub(super) struct Flag(AtomicBool);

impl Flag {
    fn set() -> Self {
        Self(AtomicBool::new(true))
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets the flag and returns its previous value.
    pub(super) fn replace(&self, is_set: bool) -> bool {
        self.0.swap(is_set, Ordering::Relaxed)
    }
}

struct Queue {
    /// The lines that wait for the writer, complete except for their links.
    // The worker writes the line. When the facts were moved to the writer instead, they were copied twice, and their
    // memory was freed on another thread than the one that allocated it.
    batch: Batch,
    /// Whether the writer sleeps, so that a new record must wake it.
    writer_sleeps: bool,
    /// When a worker first deferred the wake-up, in nanoseconds of [`clock::nanos`]; `None` if none is deferred.
    deferred: Option<u64>,
    /// Places reserved for the outcomes of intents: the number of intents whose outcome is not queued yet.
    reserved: usize,
    closing: bool,
    aggregator: RefusalAggregator,
}

/// What the writer knows of calls in earlier segments that a new segment's list of unresolved calls must contain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carried {
    /// Whether there are calls at work: their intent is committed and their outcome is not.
    pub(super) at_work: bool,
    /// Whether the present list of unresolved calls has entries.
    pub(super) listed: bool,
}

/// The writer's next step.
pub(super) enum WriterWork {
    /// Write the batch.
    Write,
    /// Check the free space and the files; there is nothing to write.
    Look,
    /// End the thread: the trail is closed and everything is written.
    End,
}

impl Shared {
    /// Makes an empty queue whose first record will have the number after `seq`.
    pub(super) fn new(
        options: &Options,
        metrics: AuditMetrics,
        seq: u64,
        unresolved: UnresolvedList,
    ) -> Self {
        Self {
            queue: Mutex::new(Queue {
                batch: Batch::behind(seq),
                writer_sleeps: false,
                deferred: None,
                reserved: 0,
                closing: false,
                aggregator: RefusalAggregator::new(options.refusals, options.hour),
            }),
            filled: Condvar::new(),
            committed: Arc::new(AtomicU64::new(seq)),
            all_waiters: Mutex::default(),
            batch_deadline: AtomicU64::new(u64::MAX),
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

    /// Locks and returns the list of unresolved calls, as far as their records are committed.
    pub(super) fn unresolved(&self) -> MutexGuard<'_, UnresolvedList> {
        self.unresolved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the waiters of one worker, which are woken after each batch from now on.
    pub(super) fn new_waiters(&self, vital: Option<Vital>) -> Arc<CommitWaiters> {
        let waiters = Arc::new(CommitWaiters::new(vital));
        self.all_waiters.lock().unwrap_or_else(PoisonError::into_inner).push(waiters.clone());
        waiters
    }

    /// Wakes the writer for a new record, if the writer sleeps and this thread does not defer wake-ups.
    ///
    /// A worker defers them until it has nothing else to do, so that a batch costs one wake-up: see [`defer_wake_ups`]. The
    /// deferral ends after [`LONG_TURN`]: otherwise the records of all workers could wait for ever for one that is busy.
    fn filled(&self, mut queue: MutexGuard<'_, Queue>) {
        if !queue.writer_sleeps || (DEFERS.get() && queue.may_wait()) {
            return;
        }
        // The writer must not wake up only to wait for the lock.
        drop(queue);
        self.filled.notify_one();
    }

    /// Wakes the writer for records whose wake-up was deferred.
    pub(super) fn flush(&self) {
        self.wake(self.lock());
    }

    /// Wakes the writer if a worker has deferred the wake-up for too long.
    pub(super) fn wake_if_overdue(&self) {
        let queue = self.lock();
        if !queue.batch.is_empty() {
            self.filled(queue);
        }
    }

    /// Wakes the writer if it sleeps and has records or aggregated refusals to write, whether the wake-up is deferred
    /// or not.
    fn wake(&self, queue: MutexGuard<'_, Queue>) {
        if queue.writer_sleeps && (!queue.batch.is_empty() || queue.aggregator.is_pending()) {
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

    /// Queues the outcome `unknown` for an intent that an earlier process left without an outcome.
    pub(super) fn doubt(&self, id: Uuid) {
        let mut queue = self.lock();
        queue.batch.push(&Entry::UnknownOutcome { id });
        self.filled(queue);
    }

    /// Queues an intent and reserves the place of its outcome. Returns the number of the record.
    ///
    /// Fails at once (load shedding) if the queue is full in records or bytes, if space cannot be reserved, if the
    /// directory or the lock file is not in its place, if the trail is closing, or if the record is longer than a
    /// quarter of the limit on file sizes.
    pub(super) fn push_intent(&self, entry: &Entry<'_>) -> Result<u64, Unavailable> {
        with_members(entry, |members| {
            // Under a limit on file sizes the writer would try such a record for ever, and all records after it would
            // be lost. A quarter of the limit leaves room for the reserved space and for a list in the same segment.
            if members.len() > MOST_AT_ONCE && members.len() as u64 > limit::of_files() / 4 {
                static TOO_LONG: OncePerSecond = OncePerSecond::new();
                if let Some(times) = TOO_LONG.times() {
                    let (bytes, raise) = (members.len(), limit::RAISE);
                    let what = "its record, the reserved space and the list of unresolved calls do not fit into a file \
                         together";
                    tracing::error!(bytes, raise, times, "a call was refused: {what}");
                }
                // Records whose wake-up was deferred must be flushed here: only queueing a record ends an overdue
                // deferral, and a worker whose requests are all refused queues none.
                self.flush();
                return Err(Unavailable);
            }
            let mut queue = self.lock();
            // Two places: one for this record and one for its outcome.
            let is_full = queue.batch.len() + queue.reserved + 2 > self.capacity || !self.room.is_set();
            if queue.closing || is_full || queue.batch.size() > MAX_QUEUED || !self.in_place.is_set() {
                // For the same reason as above. Without this, after a burst that filled the queue all intents were
                // refused until the worker slept.
                self.wake(queue);
                return Err(Unavailable);
            }
            let seq = queue.batch.push_written(entry, members);
            // After the line, which can panic: a place that is reserved for no intent would never be released.
            queue.reserved += 1;
            self.filled(queue);
            Ok(seq)
        })
    }

    /// Queues an outcome in the place that its intent reserved. Never refused. Returns the number of the record.
    pub(super) fn push_outcome(&self, entry: &Entry<'_>) -> u64 {
        let push = |write: &dyn Fn(&mut Batch) -> u64| {
            let mut queue = self.lock();
            queue.reserved = queue.reserved.saturating_sub(1);
            let seq = write(&mut queue.batch);
            self.filled(queue);
            seq
        };
        // A short outcome goes straight into the queue, which saves a copy. The lock is held hardly longer for it.
        if entry.is_brief() {
            push(&|batch| batch.push(entry))
        } else {
            with_members(entry, |members| push(&|batch| batch.push_written(entry, members)))
        }
    }

    /// Queues a refusal, adds it to an aggregate, or only counts it. Never waits. Half of the queue is for intents and
    /// outcomes. Only the aggregates of an earlier second, which are few, may use that half, too.
    pub(super) fn push_refusal(&self, facts: Box<RequestFacts>, reason: RefusalReason, status: u16) {
        let mut queue = self.lock();
        // Here as well as in the writer, which may be stuck in a write while refusals go on.
        if queue.aggregator.is_due() {
            queue.flush_refusals(&self.metrics);
            if self.takes_refusals(&queue) {
                queue.close_gap();
            }
        }
        if !self.takes_refusals(&queue) {
            queue.aggregator.unrecorded += 1;
            self.metrics.dropped.inc();
            return;
        }
        let Queue { aggregator, batch, .. } = &mut *queue;
        aggregator.push(facts, (reason, status), batch, &self.metrics);
        self.filled(queue);
    }

    /// Whether a refusal may be queued.
    // Half of the queue stays free for intents and outcomes: a flood of refusals must not keep calls from being
    // served.
    fn takes_refusals(&self, queue: &Queue) -> bool {
        let usable = self.is_healthy() && self.space_left.is_set();
        usable && queue.batch.len() + queue.reserved < self.capacity / 2
    }

    /// Waits for records and moves all of them to `batch`, or returns what else the writer has to do.
    ///
    /// `begins` is set if the batch is to begin a segment. The last line of the batch is then a placeholder for the
    /// list of unresolved calls, unless that list would be empty.
    pub(super) fn next_batch(&self, batch: &mut Batch, begins: Option<Carried>) -> WriterWork {
        let mut queue = self.lock();
        let begun = Instant::now();
        loop {
            let pending = queue.aggregator.is_pending() && self.takes_refusals(&queue);
            if pending && queue.aggregator.is_due() {
                queue.flush_refusals(&self.metrics);
                queue.close_gap();
            }
            if !queue.batch.is_empty() {
                // A batch that is written in parts begins the segment only with its last part. The intents of the
                // other parts are in the segment before, so that the new one needs the list for them.
                let is_cut = queue.batch.size() > MOST_AT_ONCE;
                if let Some(Carried { at_work, listed }) = begins
                    && (listed || (at_work || is_cut) && queue.reserved > 0 || queue.batch.changes_list())
                {
                    queue.batch.reserve_list();
                }
                queue.batch.move_to(batch);
                batch.begins_segment = begins.is_some();
                queue.deferred = None;
                return WriterWork::Write;
            }
            if queue.closing {
                return WriterWork::End;
            }
            // Without space, all calls are refused until the writer notices that there is space again. Aggregated
            // refusals become records soon after their second is over.
            let wait = match (pending, self.space_left.is_set()) {
                _ if !self.room.is_set() => SECOND / 10,
                (true, true) => SECOND / 5,
                _ => LOOK_AROUND,
            };
            queue.writer_sleeps = true;
            let (mut woken, waited) =
                self.filled.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner);
            woken.writer_sleeps = false;
            // Not only the time-out counts: requests that are refused may wake the writer again and again, and it would
            // never check the free space.
            let is_time = waited.timed_out() || begun.elapsed() >= wait;
            if is_time && (!pending || !self.room.is_set()) && woken.batch.is_empty() {
                return WriterWork::Look;
            }
            queue = woken;
        }
    }

    /// Sets the deadline of a batch of `records` records, with which the writer begins now. Returns it, in nanoseconds
    /// of [`clock::nanos`].
    pub(super) fn begin(&self, records: usize) -> u64 {
        let deadline = clock::nanos() + PROMPT.0 + PROMPT.1 * records as u64;
        let unset = u64::MAX;
        // Only if no deadline is set: after a late batch the deadline in the past stays, so that the writer counts as
        // falling behind until a batch is in time again.
        let _ = self.batch_deadline.compare_exchange(unset, deadline, Ordering::Relaxed, Ordering::Relaxed);
        deadline
    }

    /// Clears the deadline if the batch that is done now was done in time. `batch_deadline` is from [`Self::begin`].
    pub(super) fn finished(&self, batch_deadline: u64) {
        if clock::nanos() < batch_deadline {
            self.batch_deadline.store(u64::MAX, Ordering::Relaxed);
        }
    }

    /// Whether the writer keeps up: its last batch was done in time, and the deadline of its current one has not passed.
    pub(super) fn is_keeping_up(&self) -> bool {
        clock::nanos() < self.batch_deadline.load(Ordering::Relaxed)
    }

    /// Publishes that `batch` is committed, and wakes each worker that has waiting requests.
    pub(super) fn written(&self, batch: &Batch) {
        // Before the waiters are woken: each compares its number with this one.
        self.committed.store(batch.last(), Ordering::Release);
        for waiters in &*self.all_waiters.lock().unwrap_or_else(PoisonError::into_inner) {
            waiters.more_is_committed();
        }
        self.metrics.written(batch);
        self.metrics.queue.set(i64::try_from(self.lock().batch.len()).unwrap_or(i64::MAX));
    }

    /// Queues the event `stop`, and accepts no intent from now on. Everything queued is still written.
    pub(super) fn close(&self) {
        let mut queue = self.lock();
        let Queue { aggregator, batch, .. } = &mut *queue;
        // Refusals that are only counted get their record now: the writer ends when the queue is empty.
        aggregator.flush(batch, &self.metrics);
        aggregator.end_hour(batch);
        aggregator.close_gap(batch);
        batch.event("stop", json!({}));
        queue.closing = true;
        drop(queue);
        self.filled.notify_all();
    }

    /// Whether new calls can be recorded: the last write succeeded, space is reserved, and the directory and the lock
    /// file are in their place.
    pub(super) fn is_healthy(&self) -> bool {
        self.writable.is_set() && self.room.is_set() && self.in_place.is_set()
    }

    /// Whether no record waits for the writer.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.lock().batch.is_empty()
    }

    pub(super) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    /// The number of intents whose outcome is not queued yet.
    pub(super) fn in_flight(&self) -> u64 {
        self.lock().reserved as u64
    }

    /// Waits before a retry of a failed write. Returns true if the trail is closing, so that the next try is the last
    /// one.
    pub(super) fn wait_for_retry(&self, wait: Duration) -> bool {
        let queue = self.lock();
        let waited = self.filled.wait_timeout_while(queue, wait, |queue| !queue.closing);
        waited.unwrap_or_else(PoisonError::into_inner).0.closing
    }
}

/// Passes the members of a record, as JSON text, to `push`.
// They are written before the queue is locked: a redacted value needs a hash, and a stored reply is long. With the
// queue locked, all workers would wait meanwhile.
fn with_members<T>(entry: &Entry<'_>, push: impl FnOnce(&[u8]) -> T) -> T {
    MEMBERS.with_borrow_mut(|text| {
        text.clear();
        text.shrink_to(MAX_KEPT);
        entry.members(text);
        push(text)
    })
}

impl Queue {
    fn flush_refusals(&mut self, metrics: &AuditMetrics) {
        self.aggregator.flush(&mut self.batch, metrics);
    }

    fn close_gap(&mut self) {
        self.aggregator.close_gap(&mut self.batch);
    }

    /// Returns whether the wake-up of the writer may still be deferred. If not, ends the present deferral.
    fn may_wait(&mut self) -> bool {
        let now = clock::nanos();
        // Saturating: each worker reads the clock once a turn, so its time can be earlier than the one that another
        // worker stored.
        let is_overdue = now.saturating_sub(*self.deferred.get_or_insert(now)) > LONG_TURN;
        if is_overdue {
            self.deferred = None;
        }
        !is_overdue
    }
}
