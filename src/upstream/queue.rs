//! The wait for an upstream connection: short, or not at all.
//!
//! Who would have to wait longer than it may is refused at once, not when its time is over: an overload then costs those
//! who are refused nothing, and those who wait little. How long it takes is learnt from those who wait: the time in
//! which as many were served as there are connections, twice in a row, so that one stall (a token that is fetched) is
//! not taken for the pace.

use std::{
    future::Future,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::timeout;

use crate::clock;

/// The queue of one pool.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: AtomicUsize,
    pace: Mutex<Pace>,
    longest: Duration,
}

/// How fast those who wait are served. Times are in nanoseconds of this process.
#[derive(Debug)]
struct Pace {
    /// So many make a window.
    size: u64,
    since: u64,
    served: u64,
    /// For each one who waits, in the last two windows.
    each: [u64; 2],
}

impl Pace {
    fn begin(&mut self, now: u64) {
        (self.since, self.served) = (now, 0);
    }

    fn serve(&mut self, now: u64) {
        self.served += 1;
        if self.served >= self.size {
            self.each = [self.each[1], now.saturating_sub(self.since) / self.size];
            self.begin(now);
        }
    }

    fn expected(&self, number: usize) -> Duration {
        Duration::from_nanos(self.each[0].min(self.each[1]).saturating_mul(number as u64))
    }
}

impl Queue {
    /// For so many connections. Nobody waits for longer.
    pub(super) fn new(connections: usize, longest: Duration) -> Self {
        let pace = Pace { size: connections.max(1) as u64, since: 0, served: 0, each: [0, 0] };
        Self { waiting: AtomicUsize::new(0), pace: Mutex::new(pace), longest }
    }

    /// Waits for something that others wait for, too; `None` if that took, or would take, too long. Half of the time is
    /// kept for what a pace does not say. The first one is always let in: what it meets is learnt.
    pub(super) async fn wait<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        let place = Place::behind(&self.waiting);
        if place.number == 1 {
            self.pace().begin(clock::nanos());
        } else if self.pace().expected(place.number) > self.longest / 2 {
            return None;
        }
        let output = timeout(self.longest, what).await;
        self.pace().serve(clock::nanos());
        output.ok()
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the queue, the first one being 1.
struct Place<'a> {
    waiting: &'a AtomicUsize,
    number: usize,
}

impl<'a> Place<'a> {
    fn behind(waiting: &'a AtomicUsize) -> Self {
        Self { waiting, number: waiting.fetch_add(1, Ordering::Relaxed) + 1 }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    /// One who is served each 10 ms.
    async fn served(queue: &Queue, number: u32) -> Option<()> {
        queue.wait(sleep(Duration::from_millis(10) * number)).await
    }

    #[tokio::test]
    async fn who_would_wait_too_long_is_refused_at_once_and_who_comes_later_is_not() {
        let queue = Queue::new(1, Duration::from_millis(200));
        for number in 1..=3 {
            assert_eq!(served(&queue, number).await, Some(()));
        }
        let begin = Instant::now();
        let waits = (1..=100).map(|number| {
            let queue = &queue;
            async move { (served(queue, number).await.is_some(), begin.elapsed()) }
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
        assert_eq!(served(&queue, 1).await, Some(()), "the control");
    }

    #[test]
    fn one_stall_is_not_the_pace_and_two_in_a_row_are() {
        let mut pace = Pace { size: 4, since: 0, served: 0, each: [0, 0] };
        let second = 1_000_000_000;
        pace.begin(0);
        (0..4).for_each(|_| pace.serve(second));
        assert_eq!(pace.expected(100), Duration::ZERO, "one");
        (0..4).for_each(|_| pace.serve(2 * second));
        assert_eq!(pace.expected(100), Duration::from_secs(25), "two");
        (0..4).for_each(|_| pace.serve(2 * second + second / 1000));
        assert_eq!(pace.expected(100), Duration::from_millis(25), "it is fast again");
    }
}
