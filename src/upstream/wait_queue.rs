//! Bounded wait for an upstream connection, with load shedding.
//!
//! A waiter is rejected at once if its position in line times the service interval is more than half of its longest
//! wait. Under overload a rejected request then costs its caller no time, and an admitted one waits only a little.
//!
//! The service interval is the average time from one served waiter to the next. It is measured in windows. A window
//! ends when as many waiters have been served as the pool has connections. Its interval is the time during which at
//! least one request waited, divided by the number of waiters served. Of the last two windows the smaller interval is
//! used, so that a single stall (such as the fetch of a token) does not raise it.
//!
//! Once a wait has timed out, only the first waiter in line is admitted, until one is served again.
//!
//! The queue bounds and measures waits. It does not hand out connections, and does not order the waiters: the
//! future that a waiter passes in acquires the connection.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::timeout;

use crate::clock;

/// The waiters of one pool: how many there are, and how fast they are served.
#[derive(Debug)]
pub(super) struct WaitQueue {
    waiting: AtomicUsize,
    rate: Mutex<ServiceRate>,
}

/// Measures the service interval. Times are in nanoseconds of [`clock::nanos`].
#[derive(Debug)]
struct ServiceRate {
    /// The number of served waiters after which a window ends.
    size: u64,
    /// The time of the last update: a waiter joined an empty line, was served, or timed out.
    since: u64,
    served: u64,
    /// For how long at least one request has waited in this window, up to `since`. Times without a waiter do not
    /// count, so it can be less than the age of the window.
    took: u64,
    /// The service intervals of the last two windows that have ended, the older one first; 0 in place of a window that
    /// does not exist yet.
    each: [u64; 2],
    /// Whether the last wait timed out, and no waiter has been served after it.
    is_stalled: bool,
}

impl ServiceRate {
    fn new(size: usize) -> Self {
        // `max(1)`, since a size of 0 would divide by zero. The number of connections is the size because in one
        // round of service each connection serves one waiter, so a window sees every one of them.
        Self { size: size.max(1) as u64, since: 0, served: 0, took: 0, each: [0, 0], is_stalled: false }
    }

    /// Sets `since` when a waiter joins an empty line, so that the time without a waiter is not counted. The present
    /// window goes on.
    fn begin(&mut self, now: u64) {
        self.since = now;
    }

    fn advance(&mut self, now: u64) {
        self.took += now.saturating_sub(self.since);
        self.since = now;
    }

    fn stall(&mut self, now: u64) {
        self.advance(now);
        // Not counted as served: a line that does not move would look like one that does, and later waiters would
        // wait for nothing.
        self.is_stalled = true;
    }

    fn serve(&mut self, now: u64) {
        self.advance(now);
        self.is_stalled = false;
        self.served += 1;
        if self.served >= self.size {
            self.each = [self.each[1], self.took / self.size];
            (self.served, self.took) = (0, 0);
        }
    }

    fn expected(&self, number: usize) -> Duration {
        // `MAX` is above every bound. It rejects all but the first in line, for which `wait` does not ask.
        if self.is_stalled {
            return Duration::MAX;
        }
        // The smaller one: with the last window alone, one stall rejected a thousand requests that could have been
        // served a moment later.
        Duration::from_nanos(self.each[0].min(self.each[1]).saturating_mul(number as u64))
    }
}

impl WaitQueue {
    /// A queue for a pool of `connections` connections.
    pub(super) fn new(connections: usize) -> Self {
        Self { waiting: AtomicUsize::new(0), rate: Mutex::new(ServiceRate::new(connections)) }
    }

    /// Waits for `what`, for at most `max_wait`. Returns `None` if the wait took too long, or at once if it is
    /// expected to.
    ///
    /// The first waiter in line is always admitted. Only admitted waiters are measured, so without this rule a long
    /// service interval would never become shorter again. If the future is dropped, the place in line becomes free and
    /// nothing is measured.
    pub(super) async fn wait<T>(&self, max_wait: Duration, what: impl Future<Output = T>) -> Option<T> {
        // The place is a guard, so that a waiter whose caller disconnects does not stay in the count.
        let position = Position::behind(&self.waiting);
        if position.number == 1 {
            self.rate().begin(clock::nanos());
        // Half, since the interval is an average of the past: a waiter that is expected to need nearly all of its
        // time would often time out instead of being rejected early.
        } else if self.rate().expected(position.number) > max_wait / 2 {
            return None;
        }
        // No lock is held here: `rate` locks for one statement only.
        let output = timeout(max_wait, what).await.ok();
        match output {
            Some(_) => self.rate().serve(clock::nanos()),
            None => self.rate().stall(clock::nanos()),
        }
        output
    }

    fn rate(&self) -> MutexGuard<'_, ServiceRate> {
        self.rate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A waiter's position in the line, counted from 1. Dropping it removes the waiter from the line.
struct Position<'a> {
    waiting: &'a AtomicUsize,
    number: usize,
}

impl<'a> Position<'a> {
    fn behind(waiting: &'a AtomicUsize) -> Self {
        // All others in the count came earlier, so the count is the position. It is not kept up to date: it is used
        // only once, for the decision at the beginning of the wait.
        Self { waiting, number: waiting.fetch_add(1, Ordering::Relaxed) + 1 }
    }
}

impl Drop for Position<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    /// A waiter that is served after `number` × 10 ms, as the one at that position is if one is served every 10 ms.
    async fn served(queue: &WaitQueue, max_wait: u64, number: u32) -> Option<()> {
        queue.wait(Duration::from_millis(max_wait), sleep(Duration::from_millis(10) * number)).await
    }

    #[tokio::test]
    async fn load_shedding_rejects_waiters_at_once_if_they_would_time_out() {
        // With one connection each served waiter ends a window, so that the rate is known after two of them.
        let queue = WaitQueue::new(1);
        for number in 1..=3 {
            assert_eq!(served(&queue, 200, number).await, Some(()));
        }
        // The three waits above took 10, 20 and 30 ms, each alone in line, so the interval is 20 ms, and half of 200
        // ms allows five waiters. The bounds below are wide because timers fire late on a busy machine.
        let begin = Instant::now();
        let waits = (1..=100).map(|number| {
            let queue = &queue;
            async move { (served(queue, 200, number).await.is_some(), begin.elapsed()) }
        });
        let mut all = Vec::new();
        let mut waits: Vec<_> = waits.map(Box::pin).collect();
        std::future::poll_fn(|cx| {
            waits.retain_mut(|wait| match wait.as_mut().poll(cx) {
                std::task::Poll::Ready(output) => {
                    all.push(output);
                    false
                }
                std::task::Poll::Pending => true,
            });
            if waits.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        let (served_ones, refused): (Vec<_>, Vec<_>) = all.into_iter().partition(|(is_served, _)| *is_served);
        assert!((3..=12).contains(&served_ones.len()), "{} were let in", served_ones.len());
        assert!(refused.iter().all(|(_, took)| *took < Duration::from_millis(40)), "{refused:?}");
        // Without this, a queue that never admits anyone again would pass.
        assert_eq!(served(&queue, 200, 1).await, Some(()), "the control");
    }

    #[test]
    fn service_interval_ignores_one_stall_but_not_two_in_a_row() {
        // Four connections served after a stall of one second: 250 ms for each, 25 s for the hundredth.
        let mut rate = ServiceRate::new(4);
        let second = 1_000_000_000;
        rate.begin(0);
        (0..4).for_each(|_| rate.serve(second));
        assert_eq!(rate.expected(100), Duration::ZERO, "one");
        (0..4).for_each(|_| rate.serve(2 * second));
        assert_eq!(rate.expected(100), Duration::from_secs(25), "two");
        (0..4).for_each(|_| rate.serve(2 * second + second / 1000));
        assert_eq!(rate.expected(100), Duration::from_millis(25), "it is fast again");
    }

    /// After a slow time only the first in line is admitted. Its waits must be enough to learn that the slow time is
    /// over: they were not while each of them began the window anew, and the queue then stayed at one place for good.
    #[test]
    fn single_waiters_also_update_the_service_interval() {
        let (mut rate, second) = (ServiceRate::new(4), 1_000_000_000);
        // Eight waiters are two windows of four, which is what it takes to replace both intervals.
        let mut alone = |from: u64, takes: u64| {
            for number in 0..8 {
                rate.begin((from + number) * second);
                rate.serve((from + number) * second + takes);
            }
            rate.expected(1)
        };
        assert_eq!(alone(0, second), Duration::from_secs(1));
        assert_eq!(alone(8, second / 1000), Duration::from_millis(1));
    }

    #[tokio::test]
    async fn queue_admits_one_waiter_after_a_timeout_until_one_is_served() {
        let queue = WaitQueue::new(4);
        // 100 × 10 ms is beyond the 50 ms that this waiter has.
        assert_eq!(served(&queue, 50, 100).await, None);
        let (first, second) = tokio::join!(served(&queue, 50, 100), served(&queue, 50, 1));
        assert_eq!((first, second), (None, None), "the second would have been served");
        // One served waiter ends the stall for all that come later.
        assert_eq!(served(&queue, 50, 1).await, Some(()), "the first in line is let in");
        let (first, second) = tokio::join!(served(&queue, 50, 2), served(&queue, 50, 1));
        assert_eq!((first, second), (Some(()), Some(())), "the control");
    }
}
