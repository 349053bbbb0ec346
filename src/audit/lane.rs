//! Where the requests of one worker wait until their intents are safe.
//!
//! The writer wakes a worker once a batch, however many requests wait there: a task of the worker's own then
//! wakes each of them, which costs no system call. It also watches the deadline, with one timer for all.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Poll, Waker},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::Unavailable;
use crate::clock;

/// A day: how long the timer sleeps while nobody waits.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);

/// The requests of one worker that wait for the writer.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// Whether the task of this lane was spawned.
    started: AtomicBool,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// In the order in which they began to wait, which is that of their deadlines, and nearly that of their records.
    requests: VecDeque<Request>,
    /// The lane's task.
    task: Option<Waker>,
}

#[derive(Debug)]
struct Request {
    seq: u64,
    deadline: Instant,
    waker: Waker,
}

impl Lane {
    /// Waits until the record of this number is safe. To be called on the runtime of the lane's worker.
    pub(super) async fn wait(
        self: &Arc<Self>,
        safe: &Arc<AtomicU64>,
        seq: u64,
        time: Duration,
    ) -> Result<(), Unavailable> {
        if !self.started.swap(true, Ordering::Relaxed) {
            tokio::spawn(self.clone().run(safe.clone()));
        }
        let deadline = clock::now() + time;
        let mut registered: Option<Waker> = None;
        poll_fn(|cx| {
            if safe.load(Ordering::Acquire) >= seq {
                return Poll::Ready(Ok(()));
            }
            // Anew if it is another task that waits now: an exchange moves to one of its own when its caller leaves.
            if !registered.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
                registered = Some(cx.waker().clone());
                self.register(Request { seq, deadline, waker: cx.waker().clone() });
                // It may have become safe in between.
                if safe.load(Ordering::Acquire) >= seq {
                    return Poll::Ready(Ok(()));
                }
            } else if Instant::now() >= deadline {
                return Poll::Ready(Err(Unavailable));
            }
            Poll::Pending
        })
        .await
    }

    /// Tells the worker that more is safe. Called by the writer.
    pub(super) fn more_is_safe(&self) {
        let task = {
            let waiting = self.lock();
            if waiting.requests.is_empty() { None } else { waiting.task.clone() }
        };
        if let Some(task) = task {
            task.wake();
        }
    }

    fn register(&self, request: Request) {
        let mut waiting = self.lock();
        waiting.requests.push_back(request);
        let task = if waiting.requests.len() == 1 { waiting.task.clone() } else { None };
        drop(waiting);
        if let Some(task) = task {
            task.wake(); // it watches the deadline of the first one
        }
    }

    /// The lane's task: wakes whose intent is safe, and whose deadline has passed.
    async fn run(self: Arc<Self>, safe: Arc<AtomicU64>) {
        let mut timer = pin!(sleep_until(Instant::now() + LONG));
        poll_fn(|cx| -> Poll<()> {
            loop {
                let next = self.release(safe.load(Ordering::Acquire), cx.waker());
                if let Some(next) = next.filter(|next| *next < timer.deadline()) {
                    timer.as_mut().reset(next);
                }
                if timer.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                timer.as_mut().reset(Instant::now() + LONG);
            }
        })
        .await;
    }

    /// Wakes those that need not wait any more; returns the deadline of the first one that waits on.
    fn release(&self, safe: u64, task: &Waker) -> Option<Instant> {
        let mut waiting = self.lock();
        if !waiting.task.as_ref().is_some_and(|known| known.will_wake(task)) {
            waiting.task = Some(task.clone());
        }
        while let Some(first) = waiting.requests.front() {
            if first.seq > safe && first.deadline > clock::now() {
                return Some(first.deadline);
            }
            if let Some(first) = waiting.requests.pop_front() {
                first.waker.wake();
            }
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
