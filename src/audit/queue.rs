//! The queue between the requests and the writer: room kept for outcomes, refusals folded, nothing that waits
//! for a disk.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::Map;
use tokio::sync::watch;

use super::{
    Metrics, Unavailable,
    record::{Answer, Entry, Facts},
};
use crate::error::Code;

/// Refusals of one kind that are recorded in full each second; the rest of the second is one record.
const FULL_REFUSALS: u32 = 10;

/// So many kinds of refusals are told apart; what goes beyond shares a kind.
const MAX_KINDS: usize = 1024;

/// Below this much free space refusals are no longer recorded: no stranger may fill the disk.
const LOW_WATER: u64 = 64 << 20;

/// What requests and the writer share.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
    /// The position up to which everything is safe.
    pub(super) safe: watch::Sender<u64>,
    healthy: AtomicBool,
    pub(super) metrics: Metrics,
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
pub(super) enum Who {
    Caller(Arc<str>),
    Address(IpAddr),
    Uid(u32),
    Others,
}

impl Shared {
    pub(super) fn new(metrics: Metrics, directory: PathBuf, capacity: usize) -> Self {
        Self {
            queue: Mutex::new(Queue {
                entries: Vec::new(),
                reserved: 0,
                position: 0,
                closing: false,
                folds: Folds { since: Instant::now(), kinds: HashMap::new(), space_left: true },
            }),
            filled: Condvar::new(),
            safe: watch::Sender::new(0),
            healthy: AtomicBool::new(true),
            metrics,
            directory,
            capacity,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, entry: Entry) {
        self.lock().push(entry);
        self.filled.notify_one();
    }

    pub(super) fn push_intent(&self, entry: Entry) -> Result<u64, Unavailable> {
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

    pub(super) fn push_outcome(&self, facts: Box<Facts>, answer: Answer) {
        let mut queue = self.lock();
        queue.reserved = queue.reserved.saturating_sub(1);
        queue.push(Entry::Outcome { time: Timestamp::now(), facts, answer });
        drop(queue);
        self.filled.notify_one();
    }

    pub(super) fn push_refusal(&self, facts: Box<Facts>, code: Code, status: u16) {
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
    pub(super) fn next_batch(&self, batch: &mut Vec<Entry>) -> bool {
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

    pub(super) fn written(&self, batch: &[Entry], bytes: usize) {
        for entry in batch {
            self.metrics.records.with_label_values(&[entry.kind()]).inc();
        }
        self.metrics.bytes.inc_by(bytes as u64);
        self.metrics.batches.inc();
        self.safe.send_modify(|safe| *safe += batch.len() as u64);
        self.metrics.queue.set(i64::try_from(self.lock().entries.len()).unwrap_or(i64::MAX));
    }

    /// Queues the last record; what is queued is still written.
    pub(super) fn close(&self) {
        let mut queue = self.lock();
        queue.fold_up(&self.metrics);
        queue.push(Entry::Event { time: Timestamp::now(), name: "stop", details: Map::new() });
        queue.closing = true;
        drop(queue);
        self.filled.notify_all();
    }

    pub(super) fn is_healthy(&self) -> bool {
        self.healthy.load(Ordering::Relaxed)
    }

    pub(super) fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Ordering::Relaxed);
    }

    pub(super) fn count_error(&self) {
        self.metrics.errors.inc();
    }

    /// Waits before a retry; true if the trail is closing, so that the next try is the last.
    pub(super) fn wait_for_retry(&self, wait: Duration) -> bool {
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
