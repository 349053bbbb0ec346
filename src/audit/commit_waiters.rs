//! The commit waiters of one worker: requests that wait until a group commit includes their record. Before that they
//! wait here for a permit to queue an intent.
//!
//! The writer wakes each worker at most once per batch, however many of its requests wait. A task of the worker then
//! wakes the requests, which costs no system call. The same task has one timer for all deadlines.
//!
//! This module does not decide what is committed: the queue publishes the number of the last committed record.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep_until};

use super::Unavailable;
use crate::clock;
use crate::supervisor::Vital;

/// How long the timer sleeps while no request waits: a day.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);

/// The number of permits of a worker. A request that finds a free one takes one. A request that has to wait takes two,
/// so that while requests wait only half as many of them hold permits.
// In the benchmark with 256 connections a request costs about a tenth less with permits than without.
const MAX_CONCURRENT_INTENTS: usize = 32;

/// The requests of one worker that wait for the writer.
#[derive(Debug)]
pub(super) struct CommitWaiters {
    permits: Semaphore,
    /// Whether this worker's waking task is spawned.
    // Not before the first wait: the handle is made before the worker's runtime exists.
    started: AtomicBool,
    /// Reports an unexpected end of the waking task. Taken by that task when it is spawned.
    vital: Mutex<Option<Vital>>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// In the order in which they began to wait, which is nearly the order of their record numbers.
    requests: VecDeque<Request>,
    /// The nearest deadline of all requests when the waking task last checked them; `None` if there were none.
    nearest: Option<u64>,
    /// The waker of the waking task.
    task: Option<Waker>,
}

#[derive(Debug)]
struct Request {
    /// The number of the record that must be committed.
    seq: u64,
    /// In nanoseconds of [`clock::nanos`], as all times here.
    deadline: u64,
    waker: Waker,
}

impl CommitWaiters {
    /// Makes an empty collection of waiters for one worker. `vital` supervises the waking task.
    pub(super) fn new(vital: Option<Vital>) -> Self {
        Self {
            permits: Semaphore::new(MAX_CONCURRENT_INTENTS),
            started: AtomicBool::default(),
            vital: Mutex::new(vital),
            waiting: Mutex::default(),
        }
    }

    /// Returns a permit to reserve a connection and queue an intent, if one is free.
    ///
    /// Without permits, an overloaded worker takes one step for each of its requests before it takes the next step for
    /// any. Each request then holds a connection to the upstream, and the processor's cache has lost the request's data
    /// before its next step. With few requests at a time, their data and connections stay in the cache.
    pub(super) fn permit(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.try_acquire().ok()
    }

    /// Waits for a permit, first come, first served. Cancellation safe. `None` only if the semaphore were closed,
    /// which does not happen.
    pub(super) async fn permit_in_turn(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.acquire_many(2).await.ok()
    }

    /// Waits until the record `seq` is committed. Fails after `time`. Must be polled on the runtime of this worker: the
    /// first call spawns the waking task there.
    ///
    /// Cancellation safe: if the future is dropped, its waker is still woken once, without effect.
    pub(super) async fn wait(
        self: &Arc<Self>,
        committed: &Arc<AtomicU64>,
        seq: u64,
        time: Duration,
    ) -> Result<(), Unavailable> {
        if !self.started.swap(true, Ordering::Relaxed) {
            let vital = self.vital.lock().unwrap_or_else(PoisonError::into_inner).take();
            let work = self.clone().run(committed.clone());
            tokio::spawn(async move {
                match vital {
                    Some(vital) => vital.run(work).await,
                    None => work.await,
                }
            });
        }
        let deadline = clock::nanos() + clock::nanos_of(time);
        let mut registered: Option<Waker> = None;
        poll_fn(|cx| {
            if committed.load(Ordering::Acquire) >= seq {
                return Poll::Ready(Ok(()));
            }
            // Registered again if another task polls now: an exchange moves to a task of its own when its caller
            // disconnects. The earlier waker would wake the connection's task, and the exchange would never notice the
            // commit.
            if !registered.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
                registered = Some(cx.waker().clone());
                self.register(Request { seq, deadline, waker: cx.waker().clone() });
                // The writer may have committed the record before this request was registered. It then woke no task
                // for it.
                if committed.load(Ordering::Acquire) >= seq {
                    return Poll::Ready(Ok(()));
                }
            } else if clock::nanos() >= deadline {
                // No timer of its own is needed: the task wakes this request at its deadline.
                return Poll::Ready(Err(Unavailable));
            }
            Poll::Pending
        })
        .await
    }

    /// Wakes the waking task after a commit, if any request waits. Called by the writer, on its thread.
    pub(super) fn more_is_committed(&self) {
        // A worker without waiting requests sleeps on: the wake-up is a system call. The lock is not held while
        // waking.
        let task = {
            let waiting = self.lock();
            if waiting.requests.is_empty() { None } else { waiting.task.clone() }
        };
        if let Some(task) = task {
            task.wake();
        }
    }

    /// Adds a request, and wakes the waking task if its timer must be set to a nearer deadline.
    fn register(&self, request: Request) {
        let mut waiting = self.lock();
        let is_nearer = waiting.nearest.is_none_or(|nearest| request.deadline < nearest);
        waiting.requests.push_back(request);
        let task = if is_nearer { waiting.task.clone() } else { None };
        drop(waiting);
        if let Some(task) = task {
            // Deadlines are not in the order of registration: what a request waited for its permit counts towards its
            // deadline.
            task.wake();
        }
    }

    /// The waking task of this worker: wakes each request whose record is committed or whose deadline has passed.
    /// Never ends.
    async fn run(self: Arc<Self>, committed: Arc<AtomicU64>) {
        let mut timer = pin!(sleep_until(Instant::now() + LONG));
        poll_fn(|cx| -> Poll<()> {
            loop {
                let next = self.release(&committed, cx.waker());
                // Only to an earlier time. Most requests are woken long before their deadline. To set the timer for each of
                // them would cost more than to be woken in vain once later.
                if let Some(next) = next.map(clock::instant).filter(|next| *next < timer.deadline()) {
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

    /// Wakes the requests whose record is committed or whose deadline has passed. Returns the nearest deadline of the
    /// others. `task` is the waker of the waking task.
    fn release(&self, committed: &AtomicU64, task: &Waker) -> Option<u64> {
        let mut waiting = self.lock();
        // After the lock is taken: if the writer commits more after this load, it finds this task's waker and wakes
        // it. With the load before the lock, a request could wait for the next batch.
        let committed = committed.load(Ordering::Acquire);
        if !waiting.task.as_ref().is_some_and(|known| known.will_wake(task)) {
            waiting.task = Some(task.clone());
        }
        // Only from the front: the first request whose record is not committed ends the search. A request after it
        // whose record is committed is rare. It is woken together with the first one, after this batch or the next.
        while let Some(first) = waiting.requests.pop_front_if(|first| first.seq <= committed) {
            first.waker.wake();
        }
        let nearest = |waiting: &Waiting| waiting.requests.iter().map(|request| request.deadline).min();
        waiting.nearest = nearest(&waiting);
        let now = clock::nanos();
        if waiting.nearest.is_some_and(|nearest| nearest <= now) {
            waiting.requests.retain(|request| {
                let waits_on = request.deadline > now;
                if !waits_on {
                    request.waker.wake_by_ref();
                }
                waits_on
            });
            waiting.nearest = nearest(&waiting);
        }
        waiting.nearest
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::pin::Pin;
    use std::task::Context;

    use super::super::Permit;
    use super::*;

    /// Polls the futures once each, and removes and returns the output of those that are ready.
    pub(in super::super) fn done<F: Future + Unpin>(waiting: &mut Vec<F>) -> Vec<F::Output> {
        let mut done = Vec::new();
        waiting.retain_mut(|one| match Pin::new(one).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => {
                done.push(output);
                false
            }
            Poll::Pending => true,
        });
        done
    }

    #[test]
    fn waiting_intents_get_half_of_the_permits() {
        let waiters = CommitWaiters::new(None);
        let first: Vec<_> = (0..32).map(|_| waiters.permit().unwrap()).collect();
        assert!(waiters.permit().is_none());
        // More than the permits serve in two rounds, so that the third round shows that what was released is handed
        // on again.
        let mut crowd: Vec<_> = (0..48).map(|_| Box::pin(waiters.permit_in_turn())).collect();
        assert_eq!(done(&mut crowd).len(), 0);
        drop(first);
        for left in [32, 16, 0] {
            let next = done(&mut crowd);
            assert_eq!((next.len(), crowd.len()), (16, left));
            assert!(waiters.permit().is_none());
        }
        // All permits are released, also by requests that stopped waiting before it was their turn.
        let held: Vec<_> = (0..32).map(|_| waiters.permit().unwrap()).collect();
        let mut gone: Vec<_> = (0..48).map(|_| Box::pin(waiters.permit_in_turn())).collect();
        assert_eq!(done(&mut gone).len(), 0);
        drop(held);
        drop(gone);
        assert_eq!((0..).map_while(|_| waiters.permit().map(std::mem::forget)).count(), 32);
    }

    #[test]
    fn permit_is_released_while_waiting_for_a_connection() {
        let waiters = CommitWaiters::new(None);
        let permit = || Permit { _held: Some(waiters.permit().unwrap()), waited: 0 };
        let mut held: Vec<_> = (0..32).map(|_| permit()).collect();
        assert_eq!(
            done(&mut vec![Box::pin(held[0].release_while_pending(pin!(std::future::ready(7))))]),
            [7]
        );
        // A future that is ready at once keeps the permit. Without this control the last line would also hold if
        // `release_while_pending` always released it.
        assert!(waiters.permit().is_none(), "the control: at once there, so that it keeps it");
        assert_eq!(
            done(&mut vec![Box::pin(held[0].release_while_pending(pin!(std::future::pending::<()>())))]),
            []
        );
        assert!(waiters.permit().is_some());
    }

    /// An exchange whose caller disconnects goes on in a task of its own.
    #[tokio::test]
    async fn commit_wait_moved_to_another_task_is_woken_there() {
        let (waiters, committed) = (Arc::new(CommitWaiters::new(None)), Arc::new(AtomicU64::new(0)));
        let (waits, seen) = (waiters.clone(), committed.clone());
        let mut wait = Box::pin(async move { waits.wait(&seen, 1, Duration::from_secs(60)).await });
        assert!(wait.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let moved = tokio::spawn(wait);
        tokio::task::yield_now().await;
        committed.store(1, Ordering::Release);
        waiters.more_is_committed();
        let woken = tokio::time::timeout(Duration::from_secs(20), moved).await;
        assert_eq!(woken.unwrap().unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn shorter_commit_wait_ends_before_earlier_longer_ones() {
        let (waiters, committed) = (Arc::new(CommitWaiters::new(None)), Arc::new(AtomicU64::new(0)));
        let wait = |time| {
            let (waiters, committed) = (waiters.clone(), committed.clone());
            tokio::spawn(async move { waiters.wait(&committed, 1, time).await })
        };
        let long = wait(Duration::from_secs(60));
        tokio::task::yield_now().await;
        let short = tokio::time::timeout(Duration::from_secs(20), wait(Duration::from_millis(1))).await;
        assert_eq!(short.unwrap().unwrap(), Err(Unavailable));
        assert!(!long.is_finished());
    }
}
