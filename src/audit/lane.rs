//! Where the requests of one worker wait until their intents are safe, and before that for a permit to begin one.
//!
//! The writer wakes a worker once a batch, however many requests wait there: a task of the worker's own then
//! wakes each of them, which costs no system call. It also watches the deadline, with one timer for all.

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

/// A day: how long the timer sleeps while nobody waits.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);

/// So many requests of a worker get a permit without waiting. Who waits takes two, so that of a crowd half as many
/// have one.
const ABREAST: usize = 32;

/// The requests of one worker that wait for the writer.
#[derive(Debug)]
pub(super) struct Lane {
    permits: Semaphore,
    /// Whether the task of this lane was spawned.
    started: AtomicBool,
    /// For that task.
    vital: Mutex<Option<Vital>>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// In the order in which they began to wait, which is nearly that of their records.
    requests: VecDeque<Request>,
    /// The nearest of their deadlines, as far as the lane's task knows.
    nearest: Option<u64>,
    /// The lane's task.
    task: Option<Waker>,
}

#[derive(Debug)]
struct Request {
    seq: u64,
    /// In nanoseconds of this process, as all times here.
    deadline: u64,
    waker: Waker,
}

impl Lane {
    /// For one worker. `vital` is for the lane's task.
    pub(super) fn new(vital: Option<Vital>) -> Self {
        Self {
            permits: Semaphore::new(ABREAST),
            started: AtomicBool::default(),
            vital: Mutex::new(vital),
            waiting: Mutex::default(),
        }
    }

    /// The permit to reserve a connection and begin an intent, if few others have one.
    ///
    /// A worker that has more to do than it can would otherwise take each step with all of its requests before it
    /// takes the next with any. By then the processor's cache has lost what a request needs, and each holds a
    /// connection to the upstream. Few at a time find both warm.
    pub(super) fn permit(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.try_acquire().ok()
    }

    /// Waits for it.
    pub(super) async fn permit_in_turn(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.acquire_many(2).await.ok()
    }

    /// Waits until the record of this number is safe. To be called on the runtime of the lane's worker.
    pub(super) async fn wait(
        self: &Arc<Self>,
        safe: &Arc<AtomicU64>,
        seq: u64,
        time: Duration,
    ) -> Result<(), Unavailable> {
        if !self.started.swap(true, Ordering::Relaxed) {
            let vital = self.vital.lock().unwrap_or_else(PoisonError::into_inner).take();
            let work = self.clone().run(safe.clone());
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
            } else if clock::nanos() >= deadline {
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
        let is_nearer = waiting.nearest.is_none_or(|nearest| request.deadline < nearest);
        waiting.requests.push_back(request);
        let task = if is_nearer { waiting.task.clone() } else { None };
        drop(waiting);
        if let Some(task) = task {
            task.wake(); // it watches the nearest deadline
        }
    }

    /// The lane's task: wakes whose intent is safe, and whose deadline has passed.
    async fn run(self: Arc<Self>, safe: Arc<AtomicU64>) {
        let mut timer = pin!(sleep_until(Instant::now() + LONG));
        poll_fn(|cx| -> Poll<()> {
            loop {
                let next = self.release(&safe, cx.waker());
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

    /// Wakes those that need not wait any more; returns the nearest deadline of those that wait on.
    fn release(&self, safe: &AtomicU64, task: &Waker) -> Option<u64> {
        let mut waiting = self.lock();
        // Behind the lock: whoever made more safe since then finds this task, and wakes it.
        let safe = safe.load(Ordering::Acquire);
        if !waiting.task.as_ref().is_some_and(|known| known.will_wake(task)) {
            waiting.task = Some(task.clone());
        }
        while let Some(first) = waiting.requests.pop_front_if(|first| first.seq <= safe) {
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

    /// Polls futures; those that are done are taken out.
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
    fn of_a_crowd_half_as_many_have_a_permit_as_without_one() {
        let lane = Lane::new(None);
        let first: Vec<_> = (0..32).map(|_| lane.permit().unwrap()).collect();
        assert!(lane.permit().is_none());
        let mut crowd: Vec<_> = (0..48).map(|_| Box::pin(lane.permit_in_turn())).collect();
        assert_eq!(done(&mut crowd).len(), 0);
        drop(first);
        for left in [32, 16, 0] {
            let next = done(&mut crowd);
            assert_eq!((next.len(), crowd.len()), (16, left));
            assert!(lane.permit().is_none());
        }
        // All are given back, also by those who left before it was their turn.
        let held: Vec<_> = (0..32).map(|_| lane.permit().unwrap()).collect();
        let mut gone: Vec<_> = (0..48).map(|_| Box::pin(lane.permit_in_turn())).collect();
        assert_eq!(done(&mut gone).len(), 0);
        drop(held);
        drop(gone);
        assert_eq!((0..).map_while(|_| lane.permit().map(std::mem::forget)).count(), 32);
    }

    #[test]
    fn who_waits_for_a_connection_hands_its_permit_on() {
        let lane = Lane::new(None);
        let permit = || Permit { _held: Some(lane.permit().unwrap()), waited: 0 };
        let mut held: Vec<_> = (0..32).map(|_| permit()).collect();
        assert_eq!(done(&mut vec![Box::pin(held[0].during(pin!(std::future::ready(7))))]), [7]);
        assert!(lane.permit().is_none(), "the control: at once there, so that it keeps it");
        assert_eq!(done(&mut vec![Box::pin(held[0].during(pin!(std::future::pending::<()>())))]), []);
        assert!(lane.permit().is_some());
    }

    /// An exchange whose caller leaves goes on in a task of its own.
    #[tokio::test]
    async fn a_wait_that_moves_to_another_task_is_woken_there() {
        let (lane, safe) = (Arc::new(Lane::new(None)), Arc::new(AtomicU64::new(0)));
        let (waits, proven) = (lane.clone(), safe.clone());
        let mut wait = Box::pin(async move { waits.wait(&proven, 1, Duration::from_secs(60)).await });
        assert!(wait.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let moved = tokio::spawn(wait);
        tokio::task::yield_now().await;
        safe.store(1, Ordering::Release);
        lane.more_is_safe();
        let woken = tokio::time::timeout(Duration::from_secs(20), moved).await;
        assert_eq!(woken.unwrap().unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn a_wait_of_less_time_is_over_before_those_that_began_earlier() {
        let (lane, safe) = (Arc::new(Lane::new(None)), Arc::new(AtomicU64::new(0)));
        let wait = |time| {
            let (lane, safe) = (lane.clone(), safe.clone());
            tokio::spawn(async move { lane.wait(&safe, 1, time).await })
        };
        let long = wait(Duration::from_secs(60));
        tokio::task::yield_now().await;
        let short = tokio::time::timeout(Duration::from_secs(20), wait(Duration::from_millis(1))).await;
        assert_eq!(short.unwrap().unwrap(), Err(Unavailable));
        assert!(!long.is_finished());
    }
}
